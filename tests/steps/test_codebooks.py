"""The step that fits additive codebooks along the student's trajectories (VQDM), alone and in whole recipes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.codebook_sets import subset_of
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.numbers.codebook import to_groups
from bitbrush.steps import codebooks, moments
from bitbrush.steps.beam import row_losses
from bitbrush.steps.calibrate import calibration
from bitbrush.steps.codebooks import FitCodebooks, by_subset
from bitbrush.steps.covariance import Covariance
from bitbrush.steps.student import student_so_far
from small import CALIBRATE, FIT, PACK, Killed, begin, complete, execute, least_pipeline, recipe

LAYERS = """
name = "small"
weights = 2
activations = 16
[layers]
"*" = { weight = { grid = "codebook", group = 4, bits = 4, share = "block", table_bits = 0.4 } }
"conv_in | conv_out" = { weight = { bits = 8 } }
"""
STEP = '[[step]]\ndo = "codebooks"\nepochs = 2\nsteps = 4\nbeam = 2\nkmeans_iterations = 3\ntokens = 64\n' \
       'tokens_per_feature = 2\ntrajectories = 2\ntolerance = 0.0\n'
WHOLE = LAYERS + CALIBRATE + FIT + STEP + PACK


def additive_layers(run: Run) -> dict[str, CodebookLayer]:
    return {name: layer for name, layer in run.layers().items() if isinstance(layer, CodebookLayer)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return execute(tmp_path_factory.mktemp("text"), tiny.pipeline("text"), WHOLE)


def units_of(run: Run) -> list[dict[str, Any]]:
    return [entry for entry in run.done if entry["step"] == "codebooks"]


# ---- a whole recipe ------------------------------------------------------------------------------------------------
def test_every_layer_is_fitted_and_the_loss_never_rises(text: Run) -> None:
    units, layers = units_of(text), additive_layers(text)
    assert [u["unit"] for u in units] == list(dict.fromkeys(subset_of(name) for name in layers))
    assert {name for u in units for name in u["errors"]} == set(layers) and len(layers) > 50
    losses = [each["losses"] for u in units for each in u["sets"].values()]
    assert len(losses) == sum(len(groups) for groups in by_subset(text.plan).values()) > 5
    for found in losses:
        assert len(found) >= 2 and all(b <= a * (1 + 1e-5) for a, b in pairwise(found))
    assert all(u["loss_end"] < u["loss_start"] for u in units)


def test_packed_is_the_simulation_and_loads(text: Run, tmp_path: Path) -> None:
    proofs = [p for entry in text.done if entry["step"] == "pack" for p in entry.get("proof", {}).values()]
    assert len(proofs) == len(text.plan.layers) and all(p["ok"] for p in proofs)
    before = tiny.run(text.model)
    save(text.model, tmp_path / "unet", text.plan)
    again = type(text.model).from_pretrained(tmp_path / "unet")
    assert torch.equal(tiny.run(again), before)


def test_a_shared_set_is_one_table_that_its_layers_use(text: Run) -> None:
    layers, seen = additive_layers(text), 0
    for groups in by_subset(text.plan).values():
        for group in (g for g in groups if g.shared):
            books = {id(layers[name].book()) for name in group.layers}
            assert len(books) == 1 and len(group.layers) > 1
            seen += len(group.layers)
    assert seen > 30


# ---- where inputs come from ----------------------------------------------------------------------------------------
@pytest.fixture()
def half(tmp_path: Path) -> Run:
    """A run whose first subset has its codes, and all others have none."""
    run = begin(tmp_path, tiny.pipeline("text"), recipe(tmp_path, WHOLE))
    for step in run.recipe.steps[:3]:
        for unit in step.units(run)[:1 if step.do == "codebooks" else None]:
            run._one(step, unit)
    run.journal.release()
    return run


def the_step(run: Run) -> FitCodebooks:
    return next(step for step in run.recipe.steps if isinstance(step, FitCodebooks))


def test_the_student_is_quantized_as_far_as_it_is_fitted(half: Run) -> None:
    layers = additive_layers(half)
    coded = {name for name, layer in layers.items() if layer.codes is not None}
    assert {subset_of(name) for name in coded} == {the_step(half).units(half)[0]} and 0 < len(coded) < len(layers)
    faces = {name: layer.face for name, layer in half.layers().items()}
    with student_so_far(half):
        shown = {name: layer.face for name, layer in half.layers().items()}
        student = tiny.run(half.model)
    assert {name for name, face in shown.items() if face == "sim"} == coded | {"conv_in", "conv_out"}
    assert {name: layer.face for name, layer in half.layers().items()} == faces
    assert all(layer.trial_weight is None for layer in layers.values())
    for layer in half.layers().values():  # the same by hand: the float weight exchanged
        if layer.codes is not None:
            layer.float_weight = torch.nn.Parameter(layer.decoded_weight())
    with wrap.show(half.model, "float"):
        assert torch.equal(tiny.run(half.model), student)


def alone(run: Run, name: str, walk: Any) -> Tensor:
    """H of one layer from all its inputs, nothing shared."""
    layer = run.layers()[name]
    found = Covariance(moments.features(layer))
    handle = layer.register_forward_pre_hook(moments.recorder(layer, found))
    with student_so_far(run), torch.no_grad():
        walk()
    handle.remove()
    return found.mean(torch.float64)


def test_inputs_are_shared_where_layers_are_given_one_tensor(half: Run) -> None:
    step, layers = the_step(half), additive_layers(half)

    def walk() -> None:
        calibration(half).sample(half, [0, 1])

    with student_so_far(half):
        found = moments.record(half, dict(layers), walk, 12, torch.Generator().manual_seed(0),
                               least=10**9, per_feature=1)
        groups = moments.same_inputs(half, dict(layers))
    assert set(found) == set(layers) and len({id(each) for each in found.values()}) == len(groups) < len(layers)
    together = {name: group.layers for group in groups for name in group.layers}
    attention = next(name for name in layers if name.endswith("attn1.to_q"))[: -len("to_q")]
    assert set(together[f"{attention}to_q"]) == {f"{attention}to_{x}" for x in "qkv"}
    texts = {name for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(together[min(texts)]) == texts and len(texts) > 2  # every attention is given the same text
    checked = [f"{attention}to_v", max(texts), next(n for n in layers if n.endswith("conv2"))]
    for name in checked:
        torch.testing.assert_close(found[name].mean(torch.float64), alone(half, name, walk), rtol=1e-5, atol=1e-6)
    assert step.inputs == "student" and len(checked) == 3


def test_few_tokens_are_kept_of_each_call(half: Run) -> None:
    layers = {name: layer for name, layer in additive_layers(half).items() if name.startswith("up_blocks.0")}

    def walk() -> None:
        calibration(half).sample(half, [0, 1])

    with student_so_far(half):
        found = moments.record(half, dict(layers), walk, 12, torch.Generator().manual_seed(0), least=24, per_feature=1)
    for name, layer in layers.items():
        wanted = max(24, moments.features(layer))
        assert found[name].count <= 12 * 64 and found[name].count <= 1.6 * wanted + 24, name
    assert len(layers) > 3


@pytest.mark.parametrize("inputs", ["float", "none"])
def test_other_inputs(tmp_path: Path, inputs: str) -> None:
    run = execute(tmp_path, least_pipeline(), LAYERS + CALIBRATE + FIT + STEP + f'inputs = "{inputs}"\n' + PACK)
    units = units_of(run)
    assert len(units) == 4 and all((u["recordings"] > 0) == (inputs == "float") for u in units)


def test_errors_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    """With H = I: what is noted is measured again on what the layers hold, from their float weights."""
    plain = LAYERS + CALIBRATE + FIT + STEP + 'inputs = "none"\n'
    run = execute(tmp_path, least_pipeline(), plain)
    errors = {name: value for u in units_of(run) for name, value in u["errors"].items()}
    for name, layer in additive_layers(run).items():
        weight, decoded = to_groups(layer.scaled_weight(), 4), to_groups(layer.decoded_weight(), 4)
        eye = torch.eye(weight.shape[1])
        found = float(row_losses(decoded - weight, eye).sum() / row_losses(weight, eye).sum())
        assert errors[name] == pytest.approx(found, rel=1e-4)
    assert len(errors) > 5


# ---- units -----------------------------------------------------------------------------------------------------------
def test_a_subset_that_needs_much_memory_is_cut(half: Run) -> None:
    step = the_step(half)
    layers = half.layers()
    whole = {unit: sum(moments.held_bytes([layers[n] for n in g.layers]) for g in groups)
             for unit, groups in step.parts(half).items()}
    limit = max(whole.values()) / 1e9 * 0.6
    parts = step.model_copy(update={"memory": limit}).parts(half)
    assert len(parts) > len(whole) and any("part 1 of 2" in unit for unit in parts)
    names = [name for groups in parts.values() for g in groups for name in g.layers]
    assert sorted(names) == sorted(additive_layers(half))
    for groups in parts.values():
        need = sum(moments.held_bytes([layers[n] for n in g.layers]) for g in groups)
        assert need <= limit * 1e9 or len(groups) == 1


def test_a_set_across_subsets_is_fitted_with_the_last(tmp_path: Path) -> None:
    text = LAYERS + '"*.conv1" = { weight = { grid = "codebook", group = 4, bits = 4, shared = "wide" } }\n'
    run = execute(tmp_path, least_pipeline(), text + CALIBRATE + FIT + STEP + PACK)
    found = {group.name: subset for subset, groups in by_subset(run.plan).items() for group in groups}
    wide = [n for n, s in run.plan.layers.items() if s.weight is not None and s.weight.shared == "wide"]
    assert len({subset_of(name) for name in wide}) == 3 and found["wide"] == "up_blocks.0"
    assert next(u for u in units_of(run) if "wide" in u["sets"])["unit"] == "up_blocks.0"


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    execute(tmp_path / "whole", least_pipeline(), WHOLE)
    real, begun = codebooks.additive.fit, list[int]()

    def dying(*args: Any, **kwargs: Any) -> Any:
        begun.append(1)
        if len(begun) == 3:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(codebooks.additive, "fit", dying)
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, WHOLE))
    with pytest.raises(Killed):
        run.execute()
    run.journal.release()
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, WHOLE), resume=True)
    run.execute()
    run.journal.release()
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "out" / ".run" / "units").glob("*")}
    assert len(files) > 5
    assert all((run.journal.folder / "units" / name).read_bytes() == data for name, data in files.items())


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_order_is_checked_before_a_run(tmp_path: Path) -> None:
    cases = {
        LAYERS + CALIBRATE + FIT + PACK: "needs a step 'codebooks'",
        LAYERS + CALIBRATE + STEP + FIT + PACK: "needs a step 'fit weights'",
        LAYERS + FIT + STEP + PACK: "needs a step 'calibrate'",
        LAYERS + CALIBRATE + FIT + STEP + PACK + STEP.replace('"codebooks"', '"codebooks"\nid = "b"'): "must come",
    }
    for text, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            recipe(tmp_path, text)
        assert complete(caught.value)
    affine = LAYERS.replace('grid = "codebook", group = 4, bits = 4, share = "block", table_bits = 0.4', "")
    assert recipe(tmp_path, affine + CALIBRATE + FIT + PACK)  # without codebooks the step is not missed
    only = LAYERS.replace('"conv_in | conv_out" = { weight = { bits = 8 } }', "")
    assert recipe(tmp_path, only + CALIBRATE + STEP + PACK)  # nor is the other where nothing has scales
