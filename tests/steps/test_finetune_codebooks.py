"""Finetuning of everything but the codes (VQDM section 3.6), in whole runs; codes come from a step of this test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbrush
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.journal import generator
from bitbrush.engine.progress import Silent
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InputError
from bitbrush.network import norms, wrap
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.network.norms import FacedNorm
from bitbrush.numbers.codebook import to_groups
from bitbrush.steps import STEPS, teaching
from bitbrush.steps import additive as fitting
from bitbrush.steps.codebook_learner import additive_layers, apply_codebooks, sets_of
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.fit import Fit, apply_weights
from bitbrush.steps.losses import Objective
from small import (
    PACK,
    WALKS,
    begin,
    captured_and_eager,
    complete,
    execute,
    killed_and_resumed,
    least_pipeline,
    note,
    recipe,
    resumed,
)

HEAD = """
name = "small"
weights = 2
activations = 16
[layers]
"*" = { weight = { grid = "codebook", group = 4, bits = 3, codebooks = 2 } }
"*.conv1 | *.conv2" = { weight = { grid = "codebook", group = 4, bits = 3, codebooks = 2, shared = "wide" } }
"conv_in | conv_out | *.time_emb_proj" = { weight = { grid = "affine", bits = 8 } }
"""
FILL = """
[[step]]
do = "nothing"
[[step]]
do = "fill"
[[step]]
do = "fit"
id = "activations-fit"
what = "activations"
"""
START = WALKS + FILL
VQDM: dict[str, Any] = {
    "weights": "none", "codebooks": True, "weight_scale": True, "bias": True, "norms": True, "scales": "none",
    "lr_codebooks": 0.01, "lr_weight_scale": 0.01, "lr_weights": 0.01, "lr_norms": 0.01, "iterations": 12, "batch": 4,
    "evaluate_every": 6, "checkpoint": 4,
}


class Fill(Step):
    """Additive codebooks for the layers that have them in the plan, by plain weight error; nearest codes elsewhere."""

    @property
    def kind(self) -> str:
        return "codebooks"

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        tensors: dict[str, Tensor] = {}
        layers = run.layers()
        for name, layer in layers.items():
            if not isinstance(layer, CodebookLayer):
                fit = Fit(do="fit", what="weights", points=8, step=0.08)
                tensors |= {f"{name}/{key}": value for key, value in fit.weight(layer).items()}
        for key, members in sets_of(additive_layers(layers)).items():
            spec = next(iter(members.values())).weight_spec
            targets = []
            for layer in members.values():
                weight = to_groups(layer.scaled_weight(), spec.group)
                targets.append(fitting.Target(weight, torch.eye(weight.shape[1], device=weight.device)))
            settings = fitting.Settings(spec.codebooks, spec.grid.bits, spec.group, steps=2, beam=2, epochs=1)
            found, _ = fitting.fit(targets, settings, generator)
            tensors[f"{key}/values"] = found.codebooks
            for name, codes, scale in zip(members, found.codes, found.scales, strict=True):
                tensors[f"{name}/additive"], tensors[f"{name}/weight_scale"] = codes, scale
        return UnitResult(tensors)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        apply_weights(run, result.tensors)
        for name, layer in additive_layers(run.layers()).items():
            layer.set_codes(result.tensors[f"{name}/additive"], None, layer.weight_scale)
        apply_codebooks(run, result.tensors)


class Nothing(Step):
    """The step that others want to come after; `Fill` does its work, too."""

    @property
    def kind(self) -> str:
        return "fit weights"

    def units(self, run: Run) -> list[str]:
        return []


@pytest.fixture(autouse=True)
def filling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "fill", Fill)
    monkeypatch.setitem(STEPS, "nothing", Nothing)


def tune(**changes: Any) -> str:
    """The step as TOML."""
    return '[[step]]\ndo = "finetune"\nid = "tune"\n' + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in {**VQDM, **changes}.items()
    )


def contents(run: Run) -> dict[str, Tensor]:
    """Every number of the student, and the teacher's under ``float/``."""
    found = {f"float/{n}": p.detach().clone() for n, p in run.model.named_parameters()}
    for name, layer in run.layers().items():
        found[f"{name}/codes"] = layer.stored_codes().clone()
        first, second = layer.weight_tables()
        found |= {f"{name}/books" if isinstance(layer, CodebookLayer) else f"{name}/scale": first}
        found |= {f"{name}/scale" if isinstance(layer, CodebookLayer) else f"{name}/zero": second}
        if layer.bias is not None:
            found[f"{name}/bias"] = (layer.bias if layer.trained_bias is None else layer.trained_bias).detach().clone()
    for name, module in norms.find(run.model).items():
        stored = module.trained() if isinstance(module, FacedNorm) else {}
        for key, own in module.named_parameters(recurse=False):
            found[f"{name}/norm"] = found.get(f"{name}/norm", torch.zeros(())) + stored.get(key, own).detach()
    return found


def changed(a: Run, b: Run) -> set[str]:
    """Names of what differs between two runs."""
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys() and len(one) > 60
    return {name for name in one if not torch.equal(one[name], two[name])}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(500)


# ---- training --------------------------------------------------------------------------------------------------------
def test_everything_but_the_codes_moves_and_the_teacher_stays(tmp_path: Path) -> None:
    runs = []
    for name, last in (("start", ""), ("tuned", tune(iterations=40))):
        (tmp_path / name).mkdir()
        runs.append(execute(tmp_path / name, least_pipeline(), HEAD + START + last))
    start, tuned = runs
    found, moved = note(tuned), changed(start, tuned)
    assert found["kept"] == "trained" and found["loss_end"] < 0.8 * found["loss_start"] and found["best_at"] > 0
    assert 0 < found["codebooks_moved"] < 1 and "codes_changed" in found
    kinds = {kind: {n.rpartition("/")[0] for n in moved if n.endswith(f"/{kind}")} for kind in
             ("codes", "books", "scale", "zero", "bias", "norm")}
    assert not any(name.startswith("float/") for name in moved), "the teacher"
    on_books = additive_layers(tuned.layers())
    assert kinds["books"] == set(on_books) and len(on_books) > 8 and kinds["scale"] == set(tuned.layers())
    assert not kinds["codes"] & set(on_books) and not kinds["zero"]
    assert kinds["bias"] == {n for n, layer in tuned.layers().items() if layer.bias is not None}
    assert kinds["norm"] == set(norms.find(tuned.model)) and len(kinds["norm"]) > 5
    with torch.no_grad(), wrap.show(tuned.model, "float"):
        assert torch.equal(tuned.model(*inputs()).sample, least_pipeline().unet(*inputs()).sample)
    assert all(layer.trial_weight is None and layer.trial_bias is None for layer in tuned.layers().values())
    assert all(not m.trial for m in tuned.model.modules() if isinstance(m, FacedNorm))
    assert all(p.requires_grad for p in tuned.model.parameters()), "as the pipeline came"
    json.dumps(tuned.done, allow_nan=False)


def test_the_loss_at_the_start_is_that_of_two_networks(tmp_path: Path) -> None:
    """Once as the step measures it, once as the mean squared difference of plain forwards; and at the end."""
    for name, last in (("one", tune(iterations=1, lr_codebooks=1e-9, lr_weight_scale=1e-9, lr_weights=1e-9,
                                    lr_norms=1e-9)), ("many", tune())):
        (tmp_path / name).mkdir()
        run = execute(tmp_path / name, least_pipeline(), HEAD + START + last)
        step = next(s for s in run.recipe.steps if isinstance(s, Finetune))
        lessons = teaching.load(run, 1, None, step.held_out)
        args, kwargs = lessons.inputs(lessons.rows(lessons.probe(step.evaluate_rows)))
        teacher = least_pipeline().unet
        with torch.no_grad(), wrap.show(run.model, "sim"):
            direct = float((run.model(*args, **kwargs).sample - teacher(*args, **kwargs).sample).square().mean())
        assert len(args[0]) == 16 and note(run)["loss_end"] == pytest.approx(direct, rel=1e-4)
        if name == "one":
            assert note(run)["loss_start"] == pytest.approx(direct, rel=1e-4)
        objective = Objective(run.model, lessons, step.losses, [], 1.0)
        with wrap.show(run.model, "sim"):
            assert objective.measure(lessons.probe(64), 4)["total"] == pytest.approx(direct, rel=1e-4)


def test_a_wild_learning_rate_keeps_the_start(tmp_path: Path) -> None:
    runs = []
    for name, last in (("start", ""), ("tuned", tune(lr_codebooks=1e6, lr_norms=1e4, evaluate_every=2))):
        (tmp_path / name).mkdir()
        runs.append(execute(tmp_path / name, least_pipeline(), HEAD + START + last))
    found = note(runs[1])
    assert found["kept"] == "start" and found["codebooks_moved"] == 0 and not changed(*runs)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [({"codebooks": True}, {"books"}), ({"norms": True}, {"norm"}), ({"weight_scale": True}, {"scale"}),
     ({"bias": True}, {"bias"})],
)
def test_each_alone(changes: dict[str, Any], kinds: set[str], tmp_path: Path) -> None:
    off = {"codebooks": False, "weight_scale": False, "bias": False, "norms": False}
    runs = []
    for name, last in (("start", ""), ("tuned", tune(**{**off, **changes}))):
        (tmp_path / name).mkdir()
        runs.append(execute(tmp_path / name, least_pipeline(), HEAD + START + last))
    moved = {name.rpartition("/")[2] for name in changed(*runs)}
    scalar = {"codes"} if "weight_scale" in changes else set()  # codes of 8 bits follow their scales
    assert kinds <= moved <= kinds | scalar and note(runs[1])["kept"] == "trained"


def test_frozen_norms_and_layers(tmp_path: Path) -> None:
    runs = []
    last = tune(frozen="mid_block.*.norm1 | conv_norm_out | conv_in")
    for name, text in (("start", ""), ("tuned", last)):
        (tmp_path / name).mkdir()
        runs.append(execute(tmp_path / name, least_pipeline(), HEAD + START + text))
    moved = changed(*runs)
    still = {n for n in norms.find(runs[1].model) if f"{n}/norm" not in moved}
    assert still == {"conv_norm_out", "mid_block.resnets.0.norm1", "mid_block.resnets.1.norm1"}
    assert not any(n.startswith("conv_in/") for n in moved) and "conv_out/bias" in moved


# ---- the run -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [3, 7])
def test_killed_and_resumed_ends_with_the_same_bytes(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = HEAD + START + tune(evaluate_every=3)
    whole, again = killed_and_resumed(tmp_path, monkeypatch, asked, stop)
    assert not changed(whole, again) and note(again) == note(whole) and note(whole)["kept"] == "trained"
    assert not changed(whole, resumed(tmp_path, asked)), "and from the journal alone"


def test_packed_equals_simulated_and_loads_as_a_plain_model(tmp_path: Path) -> None:
    runs = []
    for name, last in (("sim", ""), ("packed", PACK)):
        (tmp_path / name).mkdir()
        runs.append(execute(tmp_path / name, least_pipeline(), HEAD + START + tune() + last))
    sim, packed = runs
    proofs = {n: p for entry in packed.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(packed.layers()) and all(p["ok"] for p in proofs.values())
    assert next(entry for entry in packed.done if entry["step"] == "verify")["equal"]
    assert not any(isinstance(m, FacedNorm) for m in packed.model.modules()) and note(packed)["kept"] == "trained"
    wrap.set_face(sim.model, "sim")
    with torch.no_grad():
        want = sim.model(*inputs()).sample
        assert torch.equal(packed.model(*inputs()).sample, want)
        assert not torch.equal(least_pipeline().unet(*inputs()).sample, want)
    save(packed.model, tmp_path / "artifact", packed.plan)
    loaded = bitbrush.load(tmp_path / "artifact")
    plain = dict(least_pipeline().unet.named_parameters())
    trained = dict(loaded.named_parameters())
    assert not torch.equal(trained["conv_norm_out.weight"], plain["conv_norm_out.weight"])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).sample, want)


def test_a_second_step_goes_on_from_the_first(tmp_path: Path) -> None:
    one = tune()
    run = execute(tmp_path, least_pipeline(), HEAD + START + one + one.replace('"tune"', '"again"') + PACK)
    first, second = (e for e in run.done if e["step"] in ("tune", "again"))
    assert second["loss_start"] == first["loss_end"] and second["loss_end"] <= first["loss_end"]


def test_a_text_network_in_half_precision(tmp_path: Path) -> None:
    """Attention and layer norms; what is trained is stored in the network's dtype."""
    pipe, dtype = tiny.pipeline("text"), torch.bfloat16
    pipe.to(dtype)
    asked = HEAD + WALKS.replace("trajectories = 4", "trajectories = 2\nguidance = 3.0") + FILL
    run = execute(tmp_path, pipe, asked + tune(iterations=4, evaluate_every=2) + PACK)
    found, out = note(run), tiny.run(run.model)
    assert found["loss_end"] < found["loss_start"] and found["kept"] == "trained"
    assert out.dtype == dtype and bool(torch.isfinite(out).all())
    plain = dict(tiny.text_unet().to(dtype).named_parameters())
    trained = {n: p for n, p in run.model.named_parameters() if "norm" in n}
    assert len(trained) > 40 and {p.dtype for p in trained.values()} == {dtype}
    assert sum(not torch.equal(p, plain[n]) for n, p in trained.items()) > 0.9 * len(trained)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_iteration_is_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEAD.replace('"conv_in |', '"conv_in | *.ff.net.* |')
    notes = captured_and_eager(tmp_path, monkeypatch, head + START + tune(iterations=40, autocast=False))
    ends = [entry["loss_end"] / entry["loss_start"] for entry in notes]
    assert all(end < 0.9 for end in ends) and max(ends) - min(ends) < 0.05


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "step", "says"),
    [
        (HEAD, tune(weights="full", codebooks=False, layers="mid_block.*.conv1"), "cannot train additive codebooks"),
        (HEAD, tune(layers="conv_in"), "no codebooks to train"),
        (HEAD, tune(layers="mid_block.*"), "codebooks 'wide' are to be trained"),
        (HEAD, tune(frozen="mid_block.resnets.0.conv1"), "codebooks 'wide' are to be trained"),
        (HEAD.partition('"conv_in |')[0].replace("group = 4", "group = 1"), '[[step]]\ndo = "reconstruct"\n'
         'train = "rounding"\n', "no rounding decisions"),
    ],
)
def test_refusals(head: str, step: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        begin(tmp_path, least_pipeline(), recipe(tmp_path, head + START + step))
    assert complete(caught.value)


def test_layers_on_codebooks_are_left_out_where_weights_are_trained(tmp_path: Path) -> None:
    said: list[str] = []

    class Said(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, HEAD + START + tune(weights="full", codebooks=False)))
    run.progress = Said()
    run.execute()
    run.journal.release()
    count = len(additive_layers(run.layers()))
    assert said == [f"tune: weights = 'full' leaves out the {count} layers on additive codebooks"] and count > 8
    step = next(s for s in run.recipe.steps if isinstance(s, Finetune))
    names = step.learner(run, step.chosen(run), generator(0, "a", "b")).parameters()
    assert {n for n in names if n.startswith("weight/")} == {
        f"weight/{n}" for n, layer in run.layers().items() if not isinstance(layer, CodebookLayer)
    }


def test_rounding_is_learnt_where_there_is_any(tmp_path: Path) -> None:
    step = '[[step]]\ndo = "reconstruct"\nid = "r"\ntrain = "rounding"\niterations = 2\nbatch = 2\n'
    run = execute(tmp_path, least_pipeline(), HEAD + START + step)
    units = {entry["unit"] for entry in run.done if entry["step"] == "r"}
    owners = {site.block for site in run.survey.layers() if not isinstance(run.layers()[site.name], CodebookLayer)}
    assert units == owners and 0 < len(units) < len(run.survey.blocks)
