"""Reconstruction: roundings that differ by one step, scales that only one pass may touch, and never a worse block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import bitbrush.assets
import tiny
from bitbrush.engine.run import Run
from bitbrush.numbers.codec import expand_weight_scale
from bitbrush.steps import loop
from bitbrush.steps.learners import RoundingLearner, ScaleLearner
from bitbrush.steps.loop import Budget
from bitbrush.steps.reconstruct import Reconstruct, block_loss
from small import CALIBRATE, FIT, HEAD, RANGES, ROUND, SCALES, SPLIT, execute, least_pipeline

START = HEAD + CALIBRATE + SPLIT + FIT


def weights(run: Run) -> dict[str, dict[str, Tensor]]:
    return {
        name: {
            "codes": layer.stored_codes().clone(),
            "scale": layer.weight_scale.clone(),
            "zero": layer.weight_zero_point.clone(),
        }
        for name, layer in run.layers().items()
    }


def inputs(run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        n: (m.input.scale.clone(), m.input.zero_point.clone()) for n, m in run.layers().items() if m.input is not None
    }


def units(run: Run, step: str) -> list[dict[str, Any]]:
    return [entry for entry in run.done if entry["step"] == step]


def pair(folder: Path, before: str, after: str, pipe: Any = least_pipeline) -> tuple[Run, Run]:
    """Two runs on the same model, without and with the last steps."""
    runs = []
    for name, text in (("a", before), ("b", after)):
        (folder / name).mkdir()
        runs.append(execute(folder / name, pipe(), text))
    return runs[0], runs[1]


# ---- rounding ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["block", "layer"])
@pytest.mark.parametrize("given", ["quantized", "float"])
def test_rounding_moves_codes_by_one_and_scales_not_at_all(by: str, given: str, tmp_path: Path) -> None:
    text = START + ROUND.replace("lr = 0.02", f'lr = 0.2\nby = "{by}"\ninputs = "{given}"').replace(
        "iterations = 4", "iterations = 12"
    )
    fitted, trained = pair(tmp_path, START, text)
    before, after = weights(fitted), weights(trained)
    changed = 0
    for name, layer in trained.layers().items():
        assert torch.equal(before[name]["scale"], after[name]["scale"])
        assert torch.equal(before[name]["zero"], after[name]["zero"])
        s, z = (
            expand_weight_scale(after[name][k].float(), layer.segments, layer.weight.ndim) for k in ("scale", "zero")
        )
        floor = torch.floor(layer.weight * (1 / s)) + z
        low, high = floor.clamp(0, layer.top()), (floor + 1).clamp(0, layer.top())
        codes = after[name]["codes"].float()
        assert bool(((codes == low) | (codes == high)).all()), name
        changed += int((before[name]["codes"] != after[name]["codes"]).sum())
        assert layer.trial_weight is None
    notes = units(trained, "weights")
    assert changed > 0 and len(notes) == (len(trained.survey.blocks) if by == "block" else len(trained.layers()))
    assert all(n["loss_end"] <= n["loss_start"] and n["kept"] in ("trained", "start") for n in notes)
    assert any(n["kept"] == "trained" and n["codes_changed"] > 0 for n in notes)
    assert all(0 <= n["decided"] <= 1 for n in notes)


@pytest.mark.parametrize("fault", ["lr", "nan"])
def test_no_unit_ends_worse_than_it_starts(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate a million times too large; gradients that are not numbers."""
    text = START + ROUND + RANGES + SCALES
    if fault == "lr":
        text = text.replace("lr = 0.02", "lr = 20000.0").replace("lr = 0.001", "lr = 1000.0")
    else:
        step = loop._Loop._step

        def spoiled(self: Any) -> None:
            step(self)
            for p in self.tensors:
                p.grad = torch.full_like(p, float("nan"))
            self.adam.step()

        monkeypatch.setattr(loop._Loop, "_step", spoiled)
    run = execute(tmp_path, least_pipeline(), text)
    ran = 0
    for entry in units(run, "weights") + units(run, "activations"):
        assert entry["loss_end"] <= entry["loss_start"] and entry["loss_start"] == entry["loss_start"]
        if entry["kept"] == "start":
            assert entry["loss_end"] == entry["loss_start"]
        ran += 1
    assert ran == 2 * len(run.survey.blocks)
    kept = [entry["kept"] for entry in units(run, "weights" if fault == "nan" else "activations")]
    assert kept.count("start") > len(kept) / 2
    for layer in run.layers().values():
        assert layer.input is not None and torch.isfinite(layer.input.scale).all() and (layer.input.scale > 0).all()
        assert layer.trial_weight is None and layer.input.trial_scale is None
    assert torch.isfinite(run.model(torch.randn(1, 1, 8, 8), torch.tensor(5)).sample).all()


def test_what_was_not_better_is_as_it_was(tmp_path: Path) -> None:
    """A useless learning rate: every unit keeps its start, and the model is that of the fit alone."""
    fitted, trained = pair(tmp_path, START, START + ROUND.replace("lr = 0.02", "lr = 1e-30"))
    assert {n["kept"] for n in units(trained, "weights")} == {"start"}
    before, after = weights(fitted), weights(trained)
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])


def test_no_iterations_no_units(tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), START + ROUND.replace("iterations = 4", "iterations = 0"))
    assert not units(run, "weights")


# ---- activation scales -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["quantized", "float"])
def test_activation_training_moves_scales_only(given: str, tmp_path: Path) -> None:
    scales = SCALES.replace('inputs = "float"', f'inputs = "{given}"').replace("lr = 0.001", "lr = 0.02")
    fitted, trained = pair(tmp_path, START + RANGES, START + RANGES + scales)
    before, after = weights(fitted), weights(trained)
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])
    a, b = inputs(fitted), inputs(trained)
    assert all(torch.equal(a[n][1], b[n][1]) for n in a), "zero-points stay"
    moved = [n for n in a if not torch.equal(a[n][0], b[n][0])]
    assert moved and all((b[n][0] > 0).all() for n in a)
    for layer in trained.layers().values():
        assert layer.input is not None
        assert torch.equal(layer.input.inverse_scale, 1 / layer.input.scale)
    notes = units(trained, "activations")
    assert all(n["loss_end"] <= n["loss_start"] for n in notes)
    assert any(n["kept"] == "trained" and n["loss_end"] < n["loss_start"] for n in notes)


def test_steps_that_share_recordings(tmp_path: Path) -> None:
    """One step by block over 6 samples, the next by layer over all: a shared memo may not mix them up."""
    first = ROUND.replace("batch = 4", "batch = 4\nsamples = 6")
    last = SCALES.replace("batch = 4", 'batch = 4\nby = "layer"')
    run = execute(tmp_path, least_pipeline(), START + first + RANGES + last)
    assert len(units(run, "activations")) == len(run.layers())
    (tmp_path / "alone").mkdir()
    small = execute(
        tmp_path / "alone", least_pipeline(), START + first + RANGES + last.replace('by = "layer"', 'by = "block"')
    )
    assert {n["unit"] for n in units(small, "activations")} == set(small.survey.blocks)


# ---- AdaRound on a trained model -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def emoji() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(bitbrush.assets.path("emoji-sd-tiny"))


def test_adaround_beats_nearest_on_the_trained_model(emoji: Any, tmp_path: Path) -> None:
    """Two blocks of emoji-sd-tiny at 4 bits, few iterations: the block's error falls well below nearest rounding's."""
    names = ["down_blocks.0.resnets.0", "up_blocks.1.resnets.0"]
    rules = "\n".join(f'"{name}.*" = {{ weight = {{}} }}' for name in names)
    text = (
        f'name = "two"\nweights = 4\nactivations = 16\n[layers]\n{rules}\n'
        + CALIBRATE.replace("samples = 12", "samples = 32")
        .replace("steps = 3", "steps = 4")
        .replace("batch = 2", "batch = 4")
        + SPLIT
        + FIT
        + ROUND.replace("iterations = 4", "iterations = 60").replace("batch = 4", "batch = 8")
    )
    run = execute(tmp_path, emoji, text)
    notes = units(run, "weights")
    assert [n["unit"] for n in notes] == names
    for n in notes:
        assert n["kept"] == "trained" and n["loss_end"] < 0.8 * n["loss_start"], n
        assert 0.01 < n["codes_changed"] < 0.5


# ---- parts -------------------------------------------------------------------------------------------------------
def test_the_penalty_follows_the_schedule() -> None:
    model = tiny.quantized_model(tiny.text_unet(), tiny.plan_for(tiny.text_unet()), pack=False)
    from bitbrush.network import wrap

    layers = dict(list(wrap.layers(model).items())[3:5])
    settings = Reconstruct(do="reconstruct", train="rounding", regularisation=0.01, warmup=0.2)
    learner = RoundingLearner(layers, settings)
    penalties = []
    for share in (0.0, 0.19, 0.2, 0.6, 1.0):
        h = (torch.sigmoid(learner.alpha.detach()) * 1.2 - 0.1).clamp(0, 1)
        beta = {0.2: 20.0, 0.6: 11.0, 1.0: 2.0}.get(share, 20.0)
        want = 0.01 * (1 - (2 * h - 1).abs() ** beta).sum() if share >= 0.2 else torch.zeros(())
        got = learner.relax(torch.tensor(share))
        assert torch.allclose(got.detach(), want, rtol=1e-3), share
        penalties.append(float(got.detach()))
    assert penalties[0] == penalties[1] == 0 < penalties[4] < penalties[3] < penalties[2]
    for name, layer in layers.items():  # untrained: the relaxed weight is the weight, where it is inside the range
        inside = (layer.stored_codes() > 0) & (layer.stored_codes() < layer.top())
        assert layer.trial_weight is not None
        assert torch.allclose(layer.trial_weight[inside], layer.weight[inside], atol=1e-4), name
    learner.harden()
    assert all(torch.equal(layer.stored_codes(), learner.start[n]) for n, layer in layers.items())  # = nearest
    learner.release()


def test_scale_learner_restores() -> None:
    model = tiny.quantized_model(tiny.text_unet(), tiny.plan_for(tiny.text_unet(), timed=False), pack=False)
    from bitbrush.network.activation import ActivationQuantizer

    found = {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    learner = ScaleLearner(found)
    before = {n: q.scale.clone() for n, q in found.items()}
    with torch.no_grad():
        learner.theta.fill_(0.1)
    learner.relax(torch.tensor(0.5))
    assert all(q.trial_scale is not None for q in found.values())
    learner.harden()
    assert all(torch.allclose(q.scale, before[n] * 1.10517, rtol=1e-4) for n, q in found.items())
    learner.restore()
    learner.release()
    assert all(torch.equal(q.scale, before[n]) and q.trial_scale is None for n, q in found.items()) and len(found) > 50


def test_block_loss() -> None:
    a, b = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    assert torch.allclose(block_loss(a, b, 2.0), (a - b).square().sum(1).mean())
    assert torch.allclose(block_loss(a, b, 2.4), (a - b).abs().pow(2.4).sum(1).mean())
    t, u = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    assert torch.allclose(block_loss(t, u, 2.0), (t - u).square().sum(2).mean())
    assert torch.allclose(block_loss(a[:, :, 0, 0], b[:, :, 0, 0], 2.0), (a - b)[:, :, 0, 0].square().sum(1).mean())


def test_learning_rates() -> None:
    constant, cosine = Budget(10, 1, 0.5, "constant"), Budget(10, 1, 0.5, "cosine")
    linear = Budget(10, 1, 0.5, "linear")
    assert [linear.rate(k) for k in (0, 5, 10)] == [0.5, 0.25, 0.0]
    assert [constant.rate(k) for k in range(10)] == [0.5] * 10
    rates = [cosine.rate(k) for k in range(11)]
    assert (
        rates[0] == 0.5
        and rates[5] == pytest.approx(0.25)
        and rates[10] == pytest.approx(0)
        and rates == sorted(rates, reverse=True)
    )
