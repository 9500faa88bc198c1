"""Channels in groups within a timestep (ADP-DM's released code): bank, search, mixed ranges, stored, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import tiny
from bitbrush.api import read_recipe
from bitbrush.artifact.save import save
from bitbrush.engine.journal import generator
from bitbrush.engine.planning import make_plan
from bitbrush.errors import InputError, InternalError
from bitbrush.kernels import why_not
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.survey import survey
from bitbrush.numbers import ranges
from bitbrush.numbers.grid import ActivationSpec, Grid
from bitbrush.numbers.straight_through import fake_quantize
from bitbrush.steps import loop, teaching
from bitbrush.steps.channel_groups import ChannelGroupLearner, bank
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.learners import ScaleLearner
from bitbrush.steps.losses import Objective
from bitbrush.steps.time_groups import GroupLearner, span
from small import (
    FIT,
    HEAD,
    PACK,
    RANGES,
    SPLIT,
    TIMED,
    WALKS,
    begin,
    captured_and_eager,
    complete,
    execute,
    killed_and_resumed,
    least_pipeline,
    note,
    recipe,
    tables,
)

TIME = '"time_embedding.* | *.time_emb_proj" = { activation = { timed = true } }\n'
BY_CHANNEL = TIMED.replace("timed = true", 'timed = true, granularity = "channel"')
START = BY_CHANNEL + TIME + WALKS + SPLIT + FIT + RANGES
TUNE = (
    '[[step]]\ndo = "finetune"\nid = "tune"\nweights = "none"\nscales = "all"\nscale_form = "channel_groups"\n'
    "groups = 3\niterations = 12\nbatch = 4\nevaluate_every = 3\ncheckpoint = 4\nlr_scales = 0.002\n"
)
RESIDUAL = HEAD.partition("[layers]")[0].replace("activations = 8", "activations = 4") + (
    '[layers]\n"*" = { weight = "float", activation = "float" }\n'
    '"*.conv1 | *.conv2" = { weight = {}, activation = { timed = true, granularity = "channel" } }\n'
)
"""What the released code quantizes: the 3 x 3 convolutions of residual blocks."""
GRID = (1.0, 200.0, 400.0, 600.0, 999.0)
TIMES = len(GRID)


def made(
    channels: tuple[int, ...] = (5, 5), bits: int = 4, signed: bool = False, **spec: Any
) -> tuple[Clock, dict[str, ActivationQuantizer]]:
    """(clock, quantizers by name), each with a table ``[T, C]``."""
    clock, out, g = Clock(GRID), {}, torch.Generator().manual_seed(3)
    for i, count in enumerate(channels):
        chosen = ActivationSpec(grid=Grid(bits=bits, signed=signed), timed=True, granularity="channel", **spec)
        q = ActivationQuantizer(chosen, (), clock, TIMES, channels=count)
        zero = torch.randint(0, 1 << bits, q.scale.shape, generator=g)
        q.set_scale(torch.randn(q.scale.shape, generator=g).exp() * 0.1, torch.full_like(zero, 8) if signed else zero)
        out[f"q{i}.input"] = q
    return clock, out


def shake(learner: ChannelGroupLearner, size: float = 1.0) -> None:
    g = torch.Generator().manual_seed(9)
    learner.logits.data.add_(torch.randn(learner.logits.shape, generator=g) * size)


def at(progress: float) -> Tensor:
    return torch.tensor(progress)


# ---- the bank ------------------------------------------------------------------------------------------------------
def literal(values: list[float], count: int, largest: bool) -> list[float]:
    """The page's bins, one by one: edges, members, and the upper edge where there are none."""
    first, last = min(values), max(values)
    edges = [first + k * (last - first) / count for k in range(count + 1)]
    found = []
    for k in range(count):
        members = [v for v in values if edges[k] <= v and (v < edges[k + 1] or k == count - 1)]
        found.append((max(members) if largest else min(members)) if members else edges[k + 1])
    return sorted(found)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_bank_is_that_of_the_page(count: int) -> None:
    looked, empty = 0, 0
    for channels in (2, 5, 40):
        _, quantizers = made((channels,))
        q = quantizers["q0.input"]
        low, high = bank(q.scale, q.zero_point, q.spec.grid, count)
        assert low.shape == high.shape == (TIMES, count) and low.dtype == torch.float32
        ends = span(q.scale, q.zero_point, q.spec.grid)
        for t in range(TIMES):
            lows, highs = (part[t].tolist() for part in ends)
            assert low[t].tolist() == pytest.approx(literal(lows, count, largest=False), rel=1e-6)
            assert high[t].tolist() == pytest.approx(literal(highs, count, largest=True), rel=1e-6)
            empty += sum(v not in torch.tensor(highs).float().tolist() for v in high[t].tolist())
            looked += 1
        assert bool((low <= 0).all()) and bool((high >= 0).all()), "0 is in every range"
        assert bool((low.diff(dim=1) >= 0).all()) and bool((high.diff(dim=1) >= 0).all())
    assert looked == 3 * TIMES and (empty > 3) == (count > 2), "empty bins were among them"


def test_a_bank_of_channels_that_are_alike_or_of_one() -> None:
    scale, zero = torch.full((2, 7), 0.5), torch.full((2, 7), 3)
    for columns in (7, 1):
        low, high = bank(scale[:, :columns], zero[:, :columns], Grid(bits=4), 4)
        assert torch.equal(low, torch.full((2, 4), -1.5)) and torch.equal(high, torch.full((2, 4), 6.0))


# ---- relaxed and measured ------------------------------------------------------------------------------------------
def test_one_hot_shares_are_one_quantizer_a_channel() -> None:
    """The mixture of outputs, the measured and the stored table agree, and are the chosen candidate's range."""
    clock, quantizers = made((5, 3))
    learner = ChannelGroupLearner(quantizers, 4)
    g = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 4, (TIMES, 8), generator=g)
    learner.logits.data.copy_(nn.functional.one_hot(chosen, 4).mT * 500.0)
    compared = 0
    for i, (q, part) in enumerate(zip(quantizers.values(), chosen.split(learner.widths, dim=1), strict=True)):
        low, high = (ends[i].gather(1, part) for ends in (learner.low, learner.high))
        wanted = ranges.affine_parameters(low, high, q.spec.grid)
        x = torch.randn(TIMES, part.shape[1], 4, 4, generator=g) * 2
        with clock.at(torch.tensor(GRID)):
            learner.relax(at(0.5))
            relaxed = q(x, 1).detach()
            with torch.no_grad():
                learner.relax(at(0.5))
                assert q.trial_mixture is None and q.trial_rows is not None
                measured = q(x, 1)
            learner.harden()
            assert torch.equal(q(x, 1), measured) and float((relaxed - measured).abs().max()) <= 1e-6
        assert torch.equal(q.scale, wanted[0]) and torch.equal(q.zero_point.float(), wanted[1])
        compared += 1
    assert compared == 2 and learner.harden() == {"channel_groups": 2, "certainty": 1.0}


def test_it_starts_from_equal_shares() -> None:
    """And what is stored is one quantizer a channel, whose range is the mean of the ranges by shares."""
    clock, quantizers = made((5, 3))
    fitted = {n: (q.scale.clone(), q.zero_point.clone()) for n, q in quantizers.items()}
    learner = ChannelGroupLearner(quantizers, 3)
    assert float(learner.logits.detach().unique()) == pytest.approx(0.01) and learner.logits.shape == (TIMES, 3, 8)
    for (name, q), size in zip(quantizers.items(), (5, 3), strict=True):
        low, high = bank(*fitted[name], q.spec.grid, 3)
        scale, zero = ranges.affine_parameters(low.mean(1), high.mean(1), q.spec.grid)
        assert torch.allclose(q.scale, scale[:, None].expand(TIMES, size), rtol=1e-6)
        assert torch.equal(q.zero_point.float(), zero[:, None].expand(TIMES, size))
    equal = {n: (q.scale.clone(), q.zero_point.clone()) for n, q in quantizers.items()}
    with torch.no_grad(), clock.at(GRID[1]):
        x = torch.randn(2, 5, 3, 3)
        before = quantizers["q0.input"](x, 1)
        learner.relax(at(0.0))
        assert torch.equal(quantizers["q0.input"](x, 1), before), "what is measured first is the start, bit for bit"
    shake(learner)
    learner.harden()
    shares = learner.logits.detach().softmax(1)[:, :, :5]
    low = (shares * learner.low[0, :, :, None]).sum(1)
    high = (shares * learner.high[0, :, :, None]).sum(1)
    ends = span(quantizers["q0.input"].scale, quantizers["q0.input"].zero_point, Grid(bits=4))
    half = quantizers["q0.input"].scale / 2 + 1e-6  # an integer zero-point moves both ends by half a step at most
    assert bool(((ends[0] - low).abs() <= half).all()) and bool(((ends[1] - high).abs() <= half).all())
    assert not torch.equal(quantizers["q0.input"].scale, equal["q0.input"][0])
    learner.restore()
    assert all(torch.equal(q.scale, equal[n][0]) and torch.equal(q.zero_point, equal[n][1])
               for n, q in quantizers.items())
    assert learner.result().keys() == {f"q{i}.input/{k}" for i in (0, 1) for k in ("scale", "zero_point")}


def test_shares_and_entropy() -> None:
    clock, quantizers = made((5, 3, 2))
    learner = ChannelGroupLearner(quantizers, 8, entropy=3.0)
    assert float(learner.relax(at(0.5)).detach()) == pytest.approx(1.5), "uniform: eta * progress"
    assert torch.allclose(learner.uncertainty(), torch.full((TIMES,), 3.0)), "L at every step"
    learner.unit = 0.01
    assert float(learner.relax(at(0.5)).detach()) == pytest.approx(0.015)
    looked = 0
    for size in (0.1, 1.0, 30.0):
        shake(learner, size)
        with clock.at(torch.tensor([1.0, 600.0])):
            penalty = float(learner.relax(at(1.0)).detach())
            for q, channels in zip(quantizers.values(), (5, 3, 2), strict=True):
                share, scale, zero = q.trial_mixture()
                assert share.shape == (2, 8, channels) and scale.shape == zero.shape == (8, 2)
                assert torch.allclose(share.sum(1), torch.ones(2, channels), atol=1e-6)
                looked += 1
        assert 0 <= penalty <= 0.03
        shares = learner.logits.detach().double().softmax(1)
        each = -(shares * shares.log().nan_to_num(neginf=0)).sum(1) / torch.tensor(8.0).double().log()
        wanted = sum(part.mean(1) for part in each.split([5, 3, 2], dim=1))
        assert torch.allclose(learner.uncertainty().double(), wanted, atol=1e-5), "mean over channels, sum over layers"
    assert looked == 9
    learner.release()
    assert all(q.trial_mixture is None and q.trial_rows is None and q.straight_through for q in quantizers.values())


def test_levels_are_those_of_the_bits() -> None:
    clock, quantizers = made((6,), bits=2)
    learner = ChannelGroupLearner(quantizers, 5)
    shake(learner)
    learner.harden()
    with clock.at(200.0):
        out = quantizers["q0.input"](torch.randn(1, 6, 64, 64), 1)
    counts = [len(channel.unique()) for channel in out[0]]
    assert len(counts) == 6 and max(counts) <= 4


# ---- gradients -----------------------------------------------------------------------------------------------------
LAYOUTS = {"pictures": ((3, 5, 4, 2), 1), "tokens": ((3, 7, 5), -1), "rows": ((3, 5), 1)}


def naive(learner: ChannelGroupLearner, i: int, x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The page's sum, every part kept by autograd."""
    begin = sum(learner.widths[:i])
    shares = learner.logits.softmax(dim=1)[:, :, begin : begin + learner.widths[i]]
    total = torch.zeros_like(x)
    for b, row in enumerate(rows.tolist()):
        for k in range(shares.shape[1]):
            s, z = ranges.affine_parameters(learner.low[i, row, k], learner.high[i, row, k], Grid(bits=4))
            for c in range(x.shape[dim]):
                where = torch.zeros_like(x, dtype=torch.bool)
                where[b].select(dim % x.ndim - 1, c).fill_(True)
                total = total + where * shares[row, k, c] * fake_quantize(x, s, z, 15)
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_are_those_of_a_naive_build(layout: str) -> None:
    clock, quantizers = made((5, 5))
    learner = ChannelGroupLearner(quantizers, 3)
    shake(learner)
    shape, dim = LAYOUTS[layout]
    g, found = torch.Generator().manual_seed(1), []
    x, up, times = torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.tensor([400.0, 1.0, 400.0])
    for form in ("ours", "naive"):
        given = x.clone().requires_grad_()
        learner.relax(at(0.0))
        with clock.at(times):
            q = quantizers["q1.input"]
            out = q(given, dim) if form == "ours" else naive(learner, 1, given, q.times(), dim)
        found.append([out.detach(), *torch.autograd.grad((out * up).sum(), [learner.logits, given])])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))
    seen = found[0][1].abs().sum((1, 2)) > 0
    assert seen.tolist() == [True, False, True, False, False], "only steps that were visited"
    assert not bool(found[0][1][:, :, :5].any()), "and only the quantizer that was used"


def test_gradients_are_finite_differences() -> None:
    clock, quantizers = made((5,))
    learner = ChannelGroupLearner(quantizers, 3)
    shake(learner)
    x, q, compared = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(2)), quantizers["q0.input"], 0

    def loss() -> Tensor:
        penalty = learner.relax(at(1.0))
        with clock.at(600.0):
            return (q(x, 1) - x).square().mean() + penalty

    (grad,) = torch.autograd.grad(loss(), learner.logits)
    for t, k, c in ((3, 0, 0), (3, 2, 4), (3, 1, 2), (0, 1, 1)):
        ends = []
        for step in (1e-2, -1e-2):
            learner.logits.data[t, k, c] += step
            ends.append(float(loss().detach()))
            learner.logits.data[t, k, c] -= step
        assert float(grad[t, k, c]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=2e-5)
        compared += 1
    assert compared == 4


def test_a_mixture_of_one_picture_without_batch() -> None:
    clock, quantizers = made((5,))
    learner, q, x = ChannelGroupLearner(quantizers, 3), quantizers["q0.input"], torch.randn(5, 3, 3)
    shake(learner)
    learner.relax(at(0.0))
    with clock.at(400.0):
        assert torch.equal(q(x, -3), q(x[None], 1)[0])


def test_channels_find_their_range() -> None:
    """Channels of two sizes, all positive: each comes to the candidate of its size, and the error falls."""
    g, clock = torch.Generator().manual_seed(0), Clock(GRID)
    sizes = torch.tensor([0.1, 1.0, 0.1, 1.0, 1.0, 0.1])
    x = torch.rand(TIMES, 6, 256, generator=g) * sizes[:, None]
    scale, zero = ranges.affine_parameters(torch.zeros(TIMES, 6), x.amax(2), Grid(bits=4))
    q = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4), timed=True, granularity="channel"), (), clock, TIMES,
                            channels=6)
    q.set_scale(scale, zero)

    def error() -> float:
        with torch.no_grad(), clock.at(torch.tensor(GRID)):
            return float(((q(x, 1) - x) / sizes[:, None]).square().mean())

    best = error()
    learner = ChannelGroupLearner({"q.input": q}, 2, entropy=0.01)
    begun = error()
    adam = torch.optim.Adam([learner.logits], lr=0.05)
    for i in range(150):
        adam.zero_grad()
        penalty = learner.relax(at(i / 150))
        with clock.at(torch.tensor(GRID)):
            (((q(x, 1) - x) / sizes[:, None]).square().mean() + penalty).backward()
        adam.step()
    facts = learner.harden()
    assert torch.equal(learner.logits.detach().argmax(1), (sizes > 0.5).long().expand(TIMES, 6))
    assert facts["certainty"] > 0.9 and begun > 10 * best and error() < 2 * best, (facts, best, begun, error())


def test_what_it_cannot_take() -> None:
    tensor = ActivationQuantizer(ActivationSpec(timed=True), (), Clock(GRID), TIMES)
    two_clocks = {"a.input": made((3,))[1]["q0.input"], "b.input": made((3,))[1]["q0.input"]}
    refused = 0
    for wrong in ({}, {"q.input": tensor}, made(signed=True)[1], two_clocks,
                  made((3,), time_groups=(0, 0, 1, 1, 2))[1]):
        with pytest.raises(InternalError, match="need tables with a"):
            ChannelGroupLearner(wrong)
        refused += 1
    assert refused == 5


# ---- whole runs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["channel_groups", "groups"])
def test_without_straight_through_first_convolutions_are_not_searched(form: str, tmp_path: Path) -> None:
    """The page's 4.3: quantized are the convolutions of residual blocks alone; the output of a first one goes through
    the second one's quantizer only. Its logits get exactly 0 from the task, and at equal shares 0 from the entropy."""
    text = RESIDUAL if form == "channel_groups" else RESIDUAL.replace(', granularity = "channel"', "")
    run = execute(tmp_path, least_pipeline(), text + WALKS + SPLIT + FIT + RANGES)
    fitted = {name: (layer.input.scale, layer.input.zero_point) for name, layer in run.layers().items()}
    looked: dict[tuple[bool, str], list[float]] = {}
    for through in (True, False):
        for name, layer in run.layers().items():
            layer.input.set_scale(*fitted[name])  # what a learner starts from
        step = Finetune(do="finetune", id="tune", weights="none", scales="all", scale_form=form, groups=3,  # type: ignore[arg-type]
                        straight_through=through)
        (learner,) = step.learner(run, step.chosen(run), generator(0, "a", "b")).learners
        assert isinstance(learner, GroupLearner | ChannelGroupLearner)
        with wrap.show(run.model, "sim"):
            for batch in run.tape.select(run.tape.spread(4)):
                args, kwargs = run.tape.inputs(batch)
                with torch.no_grad(), wrap.show(run.model, "float"):
                    target = run.model(*args, **kwargs).sample
                learner.relax(at(0.0))
                (run.model(*args, **kwargs).sample - target).square().mean().backward()
        (entropy,) = torch.autograd.grad(learner.relax(at(1.0)), learner.logits)
        assert float(entropy.abs().max()) < 1e-7, "stationary where shares are equal"
        learner.release()
        grad = learner.logits.grad
        assert grad is not None and all(m.straight_through for m in learner.members)
        by_layer = grad.abs().amax(dim=(1, 2)) if form == "groups" else torch.stack(
            [part.abs().max() for part in grad.split(learner.widths, dim=2)])
        for name, value in zip(learner.quantizers, by_layer.tolist(), strict=True):
            looked.setdefault((through, name.split(".")[-2]), []).append(value)
    assert len(looked) == 4 and all(len(found) >= 4 for found in looked.values()), looked
    assert min(looked[True, "conv1"] + looked[True, "conv2"] + looked[False, "conv2"]) > 1e-6, looked
    assert max(looked[False, "conv1"]) == 0


def test_a_run_finds_channel_groups_and_stores_a_table_of_channels(tmp_path: Path) -> None:
    text = START + TUNE.replace("iterations = 12", "iterations = 60")
    run = execute(tmp_path, least_pipeline(), text + PACK)
    found = note(run)
    assert found["kept"] == "trained" and found["loss_end"] < found["loss_start"]
    json.dumps(run.done, allow_nan=False)
    of_channels, others = 0, 0
    for name, layer in run.layers().items():
        spec = run.plan.layers[name].activation
        assert spec is not None and not spec.time_groups and layer.spec.activation == spec
        if spec.granularity == "channel":
            assert layer.input.scale.shape == layer.input.zero_point.shape == (4, layer.in_channels_)
            assert "simulated only" in str(why_not("cpu-int8", layer, "cpu"))
            of_channels += 1
        else:
            assert layer.input.scale.shape == (4, 1)
            others += 1
    assert found["channel_groups"] == of_channels > 8 and others > 3
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())
    wrap.set_face(run.model, "packed")
    output = tiny.run(run.model)
    save(run.model, tmp_path / "saved", run.plan)
    again = type(run.model).from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.run(again), output)
    assert all(torch.equal(again.get_submodule(f"{n}.input").scale, layer.input.scale)
               for n, layer in run.layers().items())


def test_what_is_measured_is_one_quantizer_a_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe sees mixed ranges, never mixed outputs; the noted loss is that of what is stored."""
    seen: dict[int, float] = {}
    mixed: list[bool] = []
    look = loop._Loop.look

    def spy(self: Any, probe: Any, iteration: int) -> float:
        def measure() -> float:
            searched = next(part for part in self.learner.learners if isinstance(part, ChannelGroupLearner))
            mixed.extend(q.trial_mixture is not None or q.trial_rows is None for q in searched.members)
            return probe.measure()

        seen[iteration] = look(self, loop.Probe(measure, probe.every), iteration)
        return seen[iteration]

    monkeypatch.setattr(loop._Loop, "look", spy)
    run = execute(tmp_path, least_pipeline(), START + TUNE)
    found = note(run)
    assert sorted(seen) == [0, 3, 6, 9, 12] and len(mixed) > 40 and not any(mixed)
    assert found["loss_start"] == float(f"{seen[0]:.6g}")
    assert found["loss_end"] == float(f"{min(seen.values()):.6g}")
    wrap.set_face(run.model, "sim")
    step = Finetune(do="finetune")
    objective = Objective(run.model, teaching.load(run, 1), step.losses, ["conv_in"], 1.0)
    measured = objective.measure(objective.lessons.probe(64), 4)["total"]
    assert found["loss_end"] == pytest.approx(measured, rel=1e-5)


def test_never_worse_than_the_start(tmp_path: Path) -> None:
    """A search gone astray ends as equal shares, bit for bit: what no iterations give, too."""
    wild = TUNE.replace("lr_scales = 0.002", "lr_scales = 50.0").replace("evaluate_every = 3", "evaluate_every = 50")
    (tmp_path / "none").mkdir()
    none = execute(tmp_path / "none", least_pipeline(), START + TUNE.replace("iterations = 12", "iterations = 0"))
    run = execute(tmp_path, least_pipeline(), START + wild)
    for found in (note(run), note(none)):
        assert found["kept"] == "start" and found["loss_end"] == found["loss_start"]
    one, two = tables(run), tables(none)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    scale = one["conv_in.input/scale"]
    assert scale.shape == (4, 1) and torch.equal(one["conv_out.input/scale"].std(1), torch.zeros(4)), "equal shares"


@pytest.mark.parametrize("how", ["", 'order = "risk"\nround_length = 2\nstraight_through = false\n'])
def test_killed_and_resumed_ends_with_the_same_bytes(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = killed_and_resumed(tmp_path, monkeypatch, START + TUNE + how, 9)
    one, two = tables(again), tables(whole)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in two)


def test_other_tables_are_trained_as_tables(tmp_path: Path) -> None:
    signed = '"conv_out" = { activation = { timed = true, granularity = "channel", signed = true } }\n'
    operands = '"*:q | *:softmax" = { activation = { timed = true } }\n'
    text = BY_CHANNEL + TIME + signed + operands + WALKS + SPLIT + FIT + RANGES + TUNE
    run = execute(tmp_path, tiny.pipeline("text"), text)
    step = Finetune(do="finetune", weights="none", scales="all", scale_form="channel_groups")
    searched, plain = step.learner(run, step.chosen(run), generator(0, "a", "b")).learners
    assert isinstance(searched, ChannelGroupLearner) and isinstance(plain, ScaleLearner)
    searched.release()
    kinds = {n: "signed" if n == "conv_out.input" else "operand" if ".processor." in n else
             "time" if "time_emb" in n else "" for n in plain.quantizers}
    assert set(kinds.values()) == {"signed", "operand", "time"}, kinds
    assert note(run)["channel_groups"] == len(searched.quantizers) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_iteration_is_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and eager searches agree but for rounding."""
    text = START + TUNE.replace("iterations = 12", "iterations = 40")
    ends = [n["loss_end"] / n["loss_start"] for n in captured_and_eager(tmp_path, monkeypatch, text)]
    assert all(end <= 1 for end in ends) and max(ends) - min(ends) < 0.1


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    for wrong in ({"zero_points": True}, {"scales": "none"}, {"groups": 0},
                  {"scale_form": "table", "straight_through": False}):
        with pytest.raises(ValidationError):
            Finetune(do="finetune", **{"scale_form": "channel_groups", "scales": "all", **wrong})  # type: ignore[arg-type]
    refused = 0
    still, signed = BY_CHANNEL.replace("timed = true, ", ""), BY_CHANNEL.replace("timed", "signed = true, timed")
    for head in (HEAD, TIMED, still, signed):
        asked = recipe(tmp_path, head + WALKS + SPLIT + FIT + RANGES + TUNE)
        with pytest.raises(InputError, match="groups of channels need") as caught:
            begin(tmp_path / str(refused), least_pipeline(), asked)
        assert complete(caught.value)
        refused += 1
    assert refused == 4


@pytest.mark.parametrize("kind", ["text", "plain"])
def test_the_preset(kind: str) -> None:
    asked = read_recipe("adpdm", preset="channels")
    tuned = next(step for step in asked.steps if isinstance(step, Finetune))
    assert (tuned.scale_form, tuned.groups, tuned.order, tuned.straight_through) == ("channel_groups", 8, "risk", True)
    model = tiny.text_unet() if kind == "text" else tiny.plain_unet()
    plan = make_plan(survey(model, tokens=tiny.TOKENS), asked).plan
    by_tensor = {n for n, spec in plan.layers.items() if spec.activation and spec.activation.granularity == "tensor"}
    assert plan.layers["conv_in"].activation is None and plan.layers["conv_in"].weight is not None
    expected = {n for n in plan.layers if n == "conv_out" or "time_emb" in n}
    assert by_tensor == expected and len(plan.layers) > 2 * len(by_tensor) > 8
    assert {spec.activation.timed for spec in plan.layers.values() if spec.activation} == {True}
