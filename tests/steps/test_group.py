"""The step that groups channels or pixels (DGQ): what it chooses, what is fitted after it, and whole recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import foreseen, layer_bytes, model_bytes
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers.grid import GROUPED, Grid
from bitbrush.numbers.ranges import affine_parameters
from bitbrush.steps.fit import Fit, quantizers
from bitbrush.steps.group import Group
from bitbrush.steps.range_groups import clustered, hulls, spread
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, SPLIT, TIMED, begin, complete, execute, least_pipeline, recipe

TUNE = '[[step]]\ndo = "finetune"\niterations = 2\nbatch = 2\n'


def group(**choices: Any) -> str:
    return '[[step]]\ndo = "group"\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in choices.items())


def seen(run: Run) -> tuple[dict[str, Tensor], Tensor]:
    """What every layer's input quantizer is given over the whole tape: weights quantized, activations not."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        layer.input.register_forward_pre_hook(lambda _m, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, layer in run.layers().items() if layer.input is not None
    ]
    times = []
    with wrap.show(run.model, "sim"), wrap.float_activations(run.model), torch.no_grad():
        for batch in run.tape.select(range(len(run.tape))):
            args, kwargs = run.tape.inputs(batch)
            run.model(*args, **kwargs)
            times.append(batch["timestep"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(times)


def by_index(layer: QuantLayer, x: Tensor, dimension: str) -> Tensor:
    """Values of each channel or pixel, ``[members, ..]``."""
    last = x.movedim(layer.channel_dim % x.ndim, -1).flatten(1, -2)  # [B, pixels, C]
    return last.movedim(2 if dimension == "channel" else 1, 0).flatten(1)


def ends(layer: QuantLayer, x: Tensor, dimension: str) -> tuple[Tensor, Tensor]:
    rows = by_index(layer, x, dimension)
    return rows.amin(1), rows.amax(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Run:
    steps = TIMED + CALIBRATE + SPLIT + FIT + group(groups=4) + RANGES
    return execute(tmp_path_factory.mktemp("text"), tiny.pipeline("text"), steps)


def notes_of(run: Run) -> dict[str, Any]:
    return next(d for d in run.done if d["step"] == "group")


# ---- what is chosen ----------------------------------------------------------------------------------------------
def test_dimension_and_groups_are_those_of_the_inputs(text: Run) -> None:
    notes, inputs = notes_of(text), seen(text)[0]
    chosen: dict[str, int] = {"channel": 0, "pixel": 0, "tensor": 0, "segments": 0}
    for name, layer in text.layers().items():
        assert layer.input is not None and layer.spec.activation is not None
        x, activation, labels = inputs[name], layer.spec.activation, layer.input.group_of
        if len(layer.spec.segments) > 1 or x.ndim == 2:
            assert activation.granularity == "tensor" and labels is None and name not in notes["layers"]
            chosen["segments" if x.ndim > 2 else "tensor"] += 1
            continue
        possible = ("pixel", "channel") if layer.kernel_hw == (1, 1) else ("channel",)
        spreads = {d: spread(*ends(layer, x, d)) for d in possible}
        dimension = max(possible, key=lambda d: spreads[d])
        want = clustered(*ends(layer, x, dimension), 4)
        assert labels is not None and torch.equal(labels.long(), want), name
        assert activation.granularity == f"{dimension}_group" and activation.groups == int(want.max()) + 1
        assert activation.pixels == (len(want) if dimension == "pixel" else 0)
        fact = notes["layers"][name]
        assert (fact["dimension"], fact["groups"]) == (dimension, activation.groups)
        assert ("channel_over_pixel" in fact) is (len(possible) == 2)
        if len(possible) == 2:
            assert fact["channel_over_pixel"] == pytest.approx(spreads["channel"] / spreads["pixel"], rel=1e-3)
        chosen[dimension] += 1
    assert [notes[k] for k in ("channel", "pixel", "per_tensor", "in_segments")] == list(chosen.values())
    assert all(count > 1 for count in chosen.values()), chosen


def test_ranges_fitted_after_it_are_the_groups_hulls(text: Run) -> None:
    """Tables [T, K]: each group's range at each timestep; minmax keeps the extremes of every sample."""
    inputs, times = seen(text)
    compared = 0
    for name, layer in text.layers().items():
        activation, quantizer = layer.spec.activation, layer.input
        if activation is None or activation.granularity not in GROUPED or quantizer is None:
            continue
        assert quantizer.scale.shape == (3, activation.groups) and quantizer.group_of is not None
        for row, t in enumerate(text.plan.timesteps):
            low, high = ends(layer, inputs[name][times == t], activation.granularity.removesuffix("_group"))
            scale, zero = affine_parameters(*hulls(low, high, quantizer.group_of.long()), Grid(bits=4))
            assert torch.allclose(quantizer.scale[row], scale, rtol=1e-5), (name, t)
            assert torch.equal(quantizer.zero_point[row].float(), zero)
            compared += 1
    assert compared > 60


def test_least_error_a_group_is_never_more_than_of_a_tensor(tmp_path: Path, text: Run) -> None:
    """Groups of four have a finer grid where it counts: less error of the inputs, over all layers."""
    plain = execute(tmp_path, tiny.pipeline("text"), TIMED + CALIBRATE + SPLIT + FIT + RANGES)
    inputs, times = seen(text)
    errors = []
    for run in (plain, text):
        found = {}
        for name, layer in run.layers().items():
            if name in notes_of(text)["layers"] and layer.input is not None:
                x = inputs[name]
                with run.clock.at(times), torch.no_grad():
                    found[name] = float((layer.input(x, layer.channel_dim % x.ndim) - x).square().mean())
        errors.append(found)
    better = [errors[1][name] < errors[0][name] for name in errors[0]]
    assert len(better) > 30 and sum(better) > 0.9 * len(better)


@pytest.mark.parametrize("dimension", ["channel", "pixel"])
def test_one_dimension_alone(dimension: str, tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + CALIBRATE + SPLIT + FIT + group(dimension=dimension))
    kinds = {s.activation.granularity for s in run.plan.layers.values() if s.activation is not None}
    assert kinds == {"tensor", f"{dimension}_group"}
    wide = [n for n, layer in run.layers().items() if layer.kernel_hw == (3, 3)]
    notes = notes_of(run)
    assert len(wide) > 5 and all((n in notes["layers"]) is (dimension == "channel") for n in wide)
    assert notes["channel" if dimension == "pixel" else "pixel"] == 0 and notes[dimension] > 5


def test_one_group_is_the_fit_of_a_tensor(tmp_path: Path) -> None:
    """Invariant 1, through the steps: the same tables, the same network."""
    answers, tables = [], []
    for i, step in enumerate(("", group(groups=1))):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = execute(folder, least_pipeline(), TIMED + CALIBRATE + SPLIT + FIT + step + RANGES)
        wrap.set_face(run.model, "sim")
        answers.append(tiny.run(run.model))
        tables.append({n: q.scale for n, q in quantizers(run).items()})
    assert torch.equal(*answers) and len(tables[0]) >= 12
    assert all(torch.equal(tables[0][n], tables[1][n]) for n in tables[0])


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_searches_give_a_scale_a_group(method: str, text: Run) -> None:
    fit = next(step for step in text.recipe.steps if isinstance(step, Fit) and step.what == "activations")
    fit = fit.model_copy(update={"method": method})
    found = fit.run_unit(text, "all activations", torch.Generator().manual_seed(0))
    shapes = {name: tuple(q.scale.shape) for name, q in quantizers(text).items()}
    assert {n: tuple(found.tensors[f"{n}/scale"].shape) for n in shapes} == shapes
    assert {shape[1] for shape in shapes.values()} > {1, 4}
    assert all(bool((t > 0).all()) for n, t in found.tensors.items() if n.endswith("/scale"))


def test_pixels_that_vary_leave_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where samples differ in size there are no pixels to group."""
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + CALIBRATE + FIT)
    step, forward, calls = Group(do="group"), run.model.forward, list[int]()
    select: Any = run.tape.select

    def shrinking(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return forward(sample[..., :4] if len(calls) % 2 else sample, *args, **kwargs)

    monkeypatch.setattr(run.model, "forward", shrinking)
    monkeypatch.setattr(run.tape, "select", lambda chosen: select(chosen, size=4))
    found = step.run_unit(run, "all layers", torch.Generator())
    assert calls == [4, 4, 4]
    for name, fact in found.notes["layers"].items():
        if "attn2.to_k" not in name and "attn2.to_v" not in name:
            assert fact["dimension"] == "channel" and "channel_over_pixel" not in fact, name


# ---- its place ---------------------------------------------------------------------------------------------------
def test_refusals(tmp_path: Path) -> None:
    cases = {
        HEAD + CALIBRATE + group() + FIT: "fit weights", HEAD + FIT + group(): "calibrate",
        HEAD + CALIBRATE + FIT + RANGES + group(): "fit activations",
        HEAD + CALIBRATE + FIT + group() + group(id="again"): "group",
        HEAD + CALIBRATE + FIT + group(samples=7): "samples", HEAD + CALIBRATE + FIT + group(groups=257): "groups",
    }
    for wrong, word in cases.items():
        with pytest.raises(InputError) as caught:
            recipe(tmp_path, wrong)
        assert word in str(caught.value)
    with pytest.raises(InputError, match="matches no layer"):
        execute(tmp_path, tiny.pipeline("text"), HEAD + CALIBRATE + FIT + group(layers="nothing*"))


def test_too_few_samples(tmp_path: Path) -> None:
    few = CALIBRATE.replace("samples = 12", "samples = 6")
    with pytest.raises(InputError, match="too few samples") as caught:
        execute(tmp_path, least_pipeline(), HEAD + few + FIT + group())
    assert complete(caught.value) and "6" in (caught.value.why or "")


def test_left_alone(tmp_path: Path) -> None:
    """Off; and what is not static, or a scale a channel, or behind a float weight, or not named."""
    off = execute(tmp_path, least_pipeline(), HEAD + CALIBRATE + FIT + group(enabled=False).replace("False", "false"))
    assert not any(q.group_of is not None for q in quantizers(off).values())
    rules = ('"*.conv2" = { activation = { granularity = "channel" } }\n"*.attn1.*" = { weight = "float" }\n'
             '"*.to_out.0" = { activation = { mode = "dynamic" } }\n"*:q" = { activation = {} }\n')
    (tmp_path / "b").mkdir()
    run = execute(tmp_path / "b", tiny.pipeline("text"), HEAD + rules + CALIBRATE + FIT + group(layers="*conv*|*to_*"))
    layers = notes_of(run)["layers"]
    assert len(layers) > 10 and not any("conv2" in n or "attn1" in n or "to_out" in n or ":" in n for n in layers)
    assert all("conv" in n or "to_" in n for n in layers)


def test_what_it_will_cost_is_foreseen(tmp_path: Path) -> None:
    for dimension in ("channel", "pixel"):
        folder = tmp_path / dimension
        folder.mkdir()
        run = execute(folder, tiny.pipeline("text"), TIMED + CALIBRATE + SPLIT + FIT + group(dimension=dimension))
        (folder / "again").mkdir()
        start = begin(folder / "again", tiny.pipeline("text"), run.recipe)
        plan = foreseen(start.survey, start.plan, start.recipe)
        start.journal.release()
        of = {n: s.activation for n, s in plan.layers.items() if s.activation is not None}
        real = {n: s.activation for n, s in run.plan.layers.items() if s.activation is not None}
        assert {n for n, a in of.items() if a.groups} == {n for n, a in real.items() if a.groups}
        assert all(a.granularity == real[n].granularity and a.pixels == real[n].pixels for n, a in of.items())
        times = run.plan.model_copy(update={"layers": plan.layers})
        assert model_bytes(run.survey, times)["packed_bytes"] >= model_bytes(run.survey, run.plan)["packed_bytes"]


def test_a_later_change_of_the_spec_keeps_the_groups(text: Run, tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), TIMED + CALIBRATE + FIT + group(groups=3))
    before = {n: layer.input.group_of for n, layer in run.layers().items() if layer.input is not None}
    bits = {n: s.model_copy(update={"activation": s.activation.model_copy(update={"time_bits": (8, 4, 4)})})
            for n, s in run.plan.layers.items() if s.activation is not None}
    run.change_plan(bits)
    after = {n: layer.input.group_of for n, layer in run.layers().items() if layer.input is not None}
    kept = [torch.equal(labels, after[n]) for n, labels in before.items()  # type: ignore[arg-type]
            if labels is not None]
    assert len(kept) > 8 and all(kept)
    assert any(bool(labels.any()) for labels in before.values() if labels is not None)


# ---- the authors' form -------------------------------------------------------------------------------------------
UNFOLDED = TIMED.replace("timed = true", "timed = true, unfolded = true")


def test_groups_found_anew_at_each_timestep(tmp_path: Path) -> None:
    """Labels [T, members] are those of the timestep's own inputs, and so are the ranges; samples of several timesteps
    in one batch are kept apart."""
    run = execute(tmp_path, tiny.pipeline("text"), TIMED + CALIBRATE + SPLIT + FIT + group(groups=3, anew=True)
                  + RANGES)  # fmt: skip
    inputs, times = seen(run)
    compared = differ = 0
    for name, layer in run.layers().items():
        activation, quantizer = layer.spec.activation, layer.input
        if activation is None or activation.granularity not in GROUPED or quantizer is None:
            continue
        labels = quantizer.group_of
        assert activation.groups_timed and labels is not None and labels.shape[0] == 3
        differ += not torch.equal(labels[0], labels[2])
        for row, t in enumerate(run.plan.timesteps):
            low, high = ends(layer, inputs[name][times == t], activation.granularity.removesuffix("_group"))
            assert torch.equal(labels[row].long(), clustered(low, high, 3)), (name, t)
            scale, zero = affine_parameters(*hulls(low, high, labels[row].long()), Grid(bits=4))
            count = len(scale)
            assert torch.allclose(quantizer.scale[row, :count], scale, rtol=1e-5), (name, t)
            assert torch.equal(quantizer.zero_point[row, :count].float(), zero)
            compared += 1
    assert compared > 60 and differ > 10


def test_an_unfolded_input_has_a_row_for_every_place_of_the_kernel(tmp_path: Path) -> None:
    steps = UNFOLDED + CALIBRATE + SPLIT + FIT + group(groups=3, anew=True) + RANGES
    run = execute(tmp_path, tiny.pipeline("text"), steps)
    wide = {n: layer for n, layer in run.layers().items() if layer.kernel_hw == (3, 3)}
    taken = {"channel_group": 0, "pixel_group": 0, "tensor": 0}
    for name, layer in run.layers().items():
        assert layer.spec.activation is not None and layer.input is not None
        assert layer.spec.activation.unfolded is (name in wide)
    wrap.set_face(run.model, "sim")
    for layer in wide.values():
        quantizer, activation = layer.input, layer.spec.activation
        assert quantizer is not None and activation is not None
        taken[activation.granularity] += 1
        side = round(activation.pixels**0.5) * int(layer.stride[0]) if activation.pixels else 6
        x = torch.randn(2, layer.in_channels_, side, side)
        with run.model.bitbrush_clock.at(torch.tensor(run.plan.timesteps[:2])), torch.no_grad():
            got, columns = layer(x), layer.quantize_input(x)
            a, b = torch.nn.functional.unfold(x, 3, padding=1, stride=layer.stride), layer.decoded_weight().flatten(1)
            assert columns.shape == a.shape == (2, 9 * layer.in_channels_, got[0, 0].numel())
            for sample in range(2):  # by hand, one timestep a sample
                scale, zero, labels = quantizer.scale[sample], quantizer.zero_point[sample].float(), quantizer.group_of
                if labels is not None:
                    own = labels[sample].long()
                    scale, zero = (t[own] if activation.granularity == "pixel_group" else t[own][:, None]
                                   for t in (scale, zero))  # fmt: skip
                want = ((a[sample] / scale).round() + zero).clamp(0, 15).sub(zero) * scale
                apart = (columns[sample] - want).abs()  # one code where a value lies at an edge
                assert apart.max() <= 1.01 * scale.max() and (apart > 1e-5).float().mean() < 1e-3
                bias = 0 if layer.bias is None else layer.bias[:, None]
                assert torch.allclose(got[sample].flatten(1), b @ columns[sample] + bias, atol=1e-4, rtol=1e-4)
    assert len(wide) > 8 and taken["channel_group"] > 0 and taken["pixel_group"] > 0


def test_unfolding_changes_nothing_with_one_scale(tmp_path: Path) -> None:
    """One scale and a zero-point that is a code: every copy of a value has its code, padding decodes to 0."""
    answers = []
    for i, start in enumerate((TIMED, UNFOLDED)):
        (tmp_path / str(i)).mkdir()
        run = execute(tmp_path / str(i), least_pipeline(), start + CALIBRATE + FIT + RANGES.replace("= 32", "= 2"))
        wrap.set_face(run.model, "sim")
        answers.append((tiny.run(run.model), {n: q.scale for n, q in quantizers(run).items()}))
    (one, tables), (two, others) = answers
    assert torch.allclose(one, two, atol=1e-4) and len(tables) > 10
    assert all(torch.allclose(tables[n], others[n], rtol=1e-4) for n in tables)


def test_the_authors_form_is_packed_proven_and_opened(tmp_path: Path) -> None:
    """Simulated only: the reference alone runs it, other kernels say why not."""
    pipe = tiny.pipeline("text")
    steps = UNFOLDED + CALIBRATE + SPLIT + FIT + group(groups=3, anew=True) + RANGES
    run = execute(tmp_path, pipe, steps + PACK.replace('"pack"\n', '"pack"\ncrop = 3\n'))
    proofs = {n: p for done in run.done for n, p in done.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())
    skipped = [p["kernels"]["cpu-int8"].get("skipped", "") for p in proofs.values()]
    assert sum("simulated" in reason for reason in skipped) > 20
    of = {site.name: site for site in run.survey.layers()}
    for name, layer in run.layers().items():  # labels a timestep and a kernel place count
        found = layer_bytes(of[name].shape, layer.spec, layer.bias is not None, len(run.plan.timesteps))
        assert found == layer.packed_bytes(), name
    want = tiny.run(pipe.unet)
    again = type(pipe.unet).from_pretrained(save(pipe, tmp_path / "made", run.plan) / "unet")
    assert torch.equal(tiny.run(again), want) and bool(torch.isfinite(want).all())


# ---- whole recipes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text", "unconditional"])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_whole_recipe(kind: Any, tuned: bool, tmp_path: Path) -> None:
    """Fitted, trained, packed, proven, saved, and opened by diffusers alone: the same bits."""
    pipe = tiny.pipeline(kind)
    steps = TIMED + CALIBRATE + SPLIT + FIT + group(groups=4) + RANGES
    cropped = PACK.replace('"pack"\n', '"pack"\ncrop = 3\n')  # inputs with groups of pixels are proven whole
    run = execute(tmp_path, pipe, steps + (TUNE if tuned else "") + cropped)
    proofs = [p for done in run.done for p in done.get("proof", {}).values()]
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs)
    ran = [p for p in proofs if "skipped" not in p["kernels"]["cpu-int8"]]
    assert len(ran) > 20 and all(p["kernels"]["cpu-int8"]["largest_sums"]["ok"] for p in ran)
    verified = next(done for done in run.done if done["step"] == "verify")
    assert verified["equal"] is True
    grouped = [q for q in quantizers(run).values() if q.group_of is not None]
    assert len(grouped) > 20 and all(q.scale.shape == (3, q.spec.groups) for q in grouped)
    want = tiny.run(pipe.unet)
    folder = save(pipe, tmp_path / "made", run.plan)
    again = type(pipe.unet).from_pretrained(folder / "unet")
    assert torch.equal(tiny.run(again), want) and bool(torch.isfinite(want).all())


@pytest.mark.parametrize("form", ["table", "network", "groups"])
def test_finetuning_moves_the_scales_of_groups(form: str, tmp_path: Path) -> None:
    """Every form of training them; groups of timesteps keep those of channels and pixels."""
    tuned = ('[[step]]\ndo = "finetune"\niterations = 12\nbatch = 4\nevaluate_every = 2\nlr_scales = 0.05\n'
             f'zero_points = {"true" if form == "table" else "false"}\nscale_form = "{form}"\ngroups = 2\n')
    runs = []
    for i, tune in enumerate(("", tuned)):
        folder = tmp_path / str(i)
        folder.mkdir()
        steps = TIMED + CALIBRATE + FIT + group(groups=3) + RANGES + tune + (PACK if tune else "")
        runs.append(execute(folder, least_pipeline(), steps))
    of = [{n: q.group_of for n, q in quantizers(run).items()} for run in runs]
    assert all(labels is None or torch.equal(labels, of[1][n]) for n, labels in of[0].items())  # type: ignore[arg-type]
    before, after = ({n: q.scale for n, q in quantizers(run).items() if q.group_of is not None} for run in runs)
    moved = [not torch.equal(after[n], scale) for n, scale in before.items()]
    assert len(moved) > 8 and sum(moved) > len(moved) // 2
    rows = {q.scale.shape[0] for n, q in quantizers(runs[1]).items() if n in after}
    assert rows <= {1, 2} if form == "groups" else rows == {3}
    assert all(q.trial_rows is None and q.trial_scale is None for q in quantizers(runs[1]).values())


def test_resumed(tmp_path: Path) -> None:
    """Labels come back from the journal."""
    steps = TIMED + CALIBRATE + SPLIT + FIT + group(groups=4) + RANGES
    first = execute(tmp_path, tiny.pipeline("text"), steps)
    again = begin(tmp_path, tiny.pipeline("text"), first.recipe, resume=True)
    again.execute()
    again.journal.release()
    assert again.plan == first.plan and not again.costs
    want, got = first.model.state_dict(), again.model.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(got[n], t) for n, t in want.items())
    assert sum(n.endswith("group_of") for n in want) > 20
