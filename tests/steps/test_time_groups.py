"""Groups of timesteps (ADP-DM): clustered, searched, decided, stored as few rows, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.journal import generator
from bitbrush.engine.planning import make_plan
from bitbrush.errors import InputError, InternalError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.survey import survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid
from bitbrush.steps import loop, teaching
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.learners import ScaleLearner
from bitbrush.steps.losses import Objective
from bitbrush.steps.reconstruct import Reconstruct
from bitbrush.steps.time_groups import GroupLearner, cluster, entries, renumbered, span
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
    resumed,
    tables,
)

START = TIMED + WALKS + SPLIT + FIT + RANGES
TUNE = (
    '[[step]]\ndo = "finetune"\nid = "tune"\nweights = "none"\nscales = "all"\nscale_form = "groups"\ngroups = 2\n'
    "iterations = 12\nbatch = 4\nevaluate_every = 3\ncheckpoint = 4\nlr_scales = 0.002\n"
)
GRID = tuple(float(t) for t in range(1, 1000, 40))
TIMES = len(GRID)


def made(
    levels: tuple[float, ...] = (0.01, 1.0), bits: int = 4, segments: tuple[int, ...] = (), **spec: Any
) -> tuple[Clock, Any]:
    """(clock, quantizers by name), each table drifting over the grid around a level."""
    clock, out = Clock(GRID), {}
    g = torch.Generator().manual_seed(3)
    for i, level in enumerate(levels):
        chosen = ActivationSpec(grid=Grid(bits=bits), timed=True, **spec)
        wide = segments if i % 2 else ()
        q = ActivationQuantizer(chosen, wide, clock, TIMES)
        drift = torch.exp(torch.randn(1, q.scale.shape[1], generator=g) * torch.linspace(-1, 1, TIMES)[:, None])
        q.set_scale(level * drift, torch.randint(0, 1 << bits, q.scale.shape, generator=g))
        out[f"q{i}.input"] = q
    return clock, out


def shake(learner: GroupLearner, size: float = 1.0) -> None:
    g = torch.Generator().manual_seed(9)
    learner.logits.data.add_(torch.randn(learner.logits.shape, generator=g) * size)
    learner.theta.data.add_(torch.randn(learner.theta.shape, generator=g) * size * 0.1)


def at(progress: float) -> Tensor:
    return torch.tensor(progress)


# ---- clustering --------------------------------------------------------------------------------------------------
def table(widths: list[float], low: float = 0.25) -> tuple[Tensor, Tensor]:
    """Tables ``[T, 1]`` of 4 bits with these widths, ``low`` of them below 0."""
    scale, zero = torch.tensor(widths)[:, None] / 15, torch.full((len(widths), 1), round(low * 15))
    return scale, zero


def test_runs_are_contiguous_and_the_best_there_are() -> None:
    g, looked = torch.Generator().manual_seed(0), 0
    for count in (1, 2, 3):
        scale = torch.rand(7, 2, generator=g) + 0.1
        zero = torch.randint(0, 16, (7, 2), generator=g)
        low, high = span(scale, zero, Grid(bits=4))

        def cost(cuts: tuple[int, ...], low: Tensor = low, high: Tensor = high) -> float:
            total = 0.0
            for first, end in zip((0, *cuts), (*cuts, 7), strict=True):
                width = high[first:end].amax(0) - low[first:end].amin(0)
                total += float((width / (high - low)[first:end]).square().sum())
            return total

        found = cluster(scale, zero, Grid(bits=4), count, "runs").tolist()
        assert found == sorted(found) and set(found) == set(range(count))
        cuts = tuple(i for i in range(1, 7) if found[i] != found[i - 1])
        every = torch.combinations(torch.arange(1, 7), count - 1).tolist() if count > 1 else [()]
        assert cost(cuts) == pytest.approx(min(cost(tuple(c)) for c in every), rel=1e-9)
        looked += len(every)
    assert looked == 1 + 6 + 15


def test_kmeans_finds_steps_that_are_not_neighbours() -> None:
    scale, zero = table([1, 4, 1.1, 4.2, 0.9, 4.1, 16, 1])
    assert cluster(scale, zero, Grid(bits=4), 3, "kmeans").tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert cluster(scale, zero, Grid(bits=4), 2, "kmeans").tolist() == [0, 1, 0, 1, 0, 1, 1, 0]
    shifted = torch.tensor([[0], [15]] * 4)
    assert cluster(torch.ones(8, 1), shifted, Grid(bits=4), 2, "kmeans").tolist() == [0, 1] * 4, "by lo / width"


@pytest.mark.parametrize("how", ["runs", "kmeans"])
def test_clusters_are_never_empty_nor_too_many(how: Any) -> None:
    g, looked = torch.Generator().manual_seed(1), 0
    for rows, count in ((1, 8), (3, 8), (25, 8), (25, 25)):
        scale, zero = torch.rand(rows, 2, generator=g) + 0.1, torch.randint(0, 16, (rows, 2), generator=g)
        found = cluster(scale, zero, Grid(bits=4), count, how)
        assert set(found.tolist()) == set(range(min(rows, count))) and found[0] == 0
        assert torch.equal(found, cluster(scale, zero, Grid(bits=4), count, how)), "no chance"
        if count >= rows:
            s, z = entries(scale, zero, Grid(bits=4), found, count)
            assert torch.equal(s[found], scale) and torch.equal(z[found], zero.float()), "a row a step, bit for bit"
        looked += 1
    same = cluster(torch.ones(9, 1), torch.zeros(9, 1), Grid(bits=4), 4, how)
    assert looked == 4 and len(same.unique()) == (4 if how == "runs" else 1)


@pytest.mark.parametrize("signed", [False, True])
def test_entries_span_their_clusters(signed: bool) -> None:
    grid, g = Grid(bits=4, signed=signed), torch.Generator().manual_seed(2)
    scale = torch.rand(9, 3, generator=g) + 0.1
    zero = torch.full((9, 3), 8) if signed else torch.randint(0, 16, (9, 3), generator=g)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 1])
    s, z = entries(scale, zero, grid, groups, 4)
    low, high = span(scale, zero, grid)
    wide_low, wide_high = span(s, z, grid)
    assert s.shape == z.shape == (4, 3) and bool((z == z.round()).all()) and bool(((z >= 0) & (z <= 15)).all())
    half = s.double() / 2 + 1e-6  # an integer zero-point moves both ends by half a step at most
    for k in range(4):
        here = groups == k if k < 3 else groups >= 0
        assert bool((wide_low[k] <= low[here].amin(0) + half[k]).all())
        assert bool((wide_high[k] >= high[here].amax(0) - half[k]).all())
    assert renumbered(torch.tensor([3, 1, 3, 0])).tolist() == [0, 1, 0, 2]


# ---- invariants 1, 2, 4 ------------------------------------------------------------------------------------------
def test_one_group_is_the_static_quantizer_bit_for_bit() -> None:
    """Invariant 1, relaxed and hard, whatever the logits."""
    clock, quantizers = made((0.3, 1.0), segments=(3, 2))
    learner = GroupLearner(quantizers, 1)
    shake(learner)
    learner.theta.data.zero_()
    x, compared = torch.randn(2, 5, 4, 4) * 3, 0
    for i, q in enumerate(quantizers.values()):
        static = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)), q.segments)
        columns = learner.base.split(learner.widths, 1)[i], learner.zero.split(learner.widths, 1)[i]
        static.set_scale(*columns)
        for t in GRID[::6]:
            with clock.at(t):
                penalty = learner.relax(at(0.5))
                assert torch.equal(q(x, 1).detach(), static(x, 1)) and float(penalty.detach()) == 0
                learner.harden()
                assert torch.equal(q(x, 1), static(x, 1))
                compared += 1
    assert compared == 10 and {g[0] for g in learner.groups().values()} == {(0,) * TIMES}


def test_one_hot_logits_are_the_hard_quantizer() -> None:
    """Invariant 2: the mixture of outputs, the hard table and the mixture of ranges agree when shares are one-hot."""
    clock, quantizers = made((0.3, 1.0), segments=(3, 2))
    learner = GroupLearner(quantizers, 4)
    g = torch.Generator().manual_seed(1)
    wanted = torch.randint(0, 4, (2, TIMES), generator=g)
    learner.logits.data.zero_().scatter_(2, wanted[..., None], 200.0)
    learner.theta.data.copy_(torch.randn(learner.theta.shape, generator=g) * 0.1)
    x, times = torch.randn(4, 5, 4, 4, generator=g), torch.tensor([1.0, 401.0, 681.0, 961.0])
    with clock.at(times):
        assert float(learner.relax(at(1.0)).detach()) == pytest.approx(0, abs=1e-6)
        relaxed = [q(x, 1).detach() for q in quantizers.values()]
        share = torch.softmax(learner.logits.detach(), 2)
        mixed = torch.einsum("qtk,kc->qtc", share, learner.scales().detach())
        with torch.no_grad():
            learner.relax(at(1.0))
            assert all(q.trial_mixture is None for q in quantizers.values())
            trial = [q(x, 1) for q in quantizers.values()]
        learner.harden()
        hard = [q(x, 1) for q in quantizers.values()]
    for i, q in enumerate(quantizers.values()):
        columns = [slice(0, 1), slice(1, 3)][i]
        assert torch.allclose(q.scale, mixed[i][:, columns], rtol=1e-6), "the mixture of ranges"
        assert float((relaxed[i] - hard[i]).abs().max()) <= 1e-6 and torch.equal(trial[i], hard[i])
    assert torch.equal(learner.chosen, wanted)


def test_shares_and_entropy() -> None:
    """Invariant 4."""
    clock, quantizers = made((0.3, 1.0, 2.0))
    learner = GroupLearner(quantizers, 8, entropy=3.0)
    assert float(learner.relax(at(0.5)).detach()) == pytest.approx(1.5), "uniform: eta * progress"
    assert torch.allclose(learner.uncertainty(), torch.full((TIMES,), 3.0)), "L at every step"
    learner.unit = 0.01
    assert float(learner.relax(at(0.5)).detach()) == pytest.approx(0.015)
    looked = 0
    for size in (0.1, 1.0, 30.0):
        shake(learner, size)
        with clock.at(torch.tensor([1.0, 961.0])):
            penalty = float(learner.relax(at(1.0)).detach())
            for q in quantizers.values():
                share, scale, zero = q.trial_mixture()
                assert share.shape == (2, 8) and scale.shape == zero.shape == (8, 1)
                assert torch.allclose(share.sum(1), torch.ones(2), atol=1e-6)
                looked += 1
        assert 0 <= penalty <= 0.03
        assert bool((learner.uncertainty() >= 0).all()) and bool((learner.uncertainty() <= 3).all())
    assert looked == 9
    learner.release()
    assert all(q.trial_mixture is None and q.trial_rows is None for q in quantizers.values())


def test_levels_are_those_of_the_bits() -> None:
    """Invariant 3: after the decision at most 2 ** bits values, on normal and on skewed tensors."""
    looked = 0
    for bits in (2, 4):
        clock, quantizers = made((0.3,), bits)
        learner = GroupLearner(quantizers, 3)
        shake(learner)
        learner.harden()
        for x in (torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64).exp()):
            with clock.at(401.0):
                assert len(quantizers["q0.input"](x, 1).unique()) <= 1 << bits
            looked += 1
    assert looked == 4


# ---- the learner -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["runs", "kmeans"])
def test_it_starts_from_the_clustered_tables(how: Any) -> None:
    _, quantizers = made((0.01, 1.0), segments=(3, 2))
    fitted = {n: (q.scale.clone(), q.zero_point.clone()) for n, q in quantizers.items()}
    learner = GroupLearner(quantizers, 3, how)
    assert float(learner.logits.detach().unique()) == pytest.approx(0.01) and learner.logits.shape == (2, TIMES, 3)
    for name, q in quantizers.items():
        home = cluster(*fitted[name], Grid(bits=4), 3, how)
        s, z = entries(*fitted[name], Grid(bits=4), home, 3)
        assert torch.equal(q.scale, s[home]) and torch.equal(q.zero_point.float(), z[home])
        groups, scale, zero = learner.groups()[name]
        assert groups == tuple(home.tolist()) and torch.equal(scale, s) and torch.equal(zero.float(), z)
    clustered = {n: q.scale.clone() for n, q in quantizers.items()}
    facts = learner.harden()
    assert facts == {"time_groups": 2, "groups_used": 3.0, "certainty": 0.3333, "steps_regrouped": 0.0}
    assert all(torch.equal(q.scale, clustered[n]) for n, q in quantizers.items()), "equal logits: the clustering"
    shake(learner)
    assert learner.harden()["steps_regrouped"] > 0
    assert not torch.equal(quantizers["q0.input"].scale, clustered["q0.input"])
    learner.restore()
    assert all(torch.equal(q.scale, clustered[n]) for n, q in quantizers.items())
    assert learner.result().keys() == {f"q{i}.input/{k}" for i in (0, 1) for k in ("scale", "zero_point")}


def test_groups_and_their_tables_are_what_the_quantizers_hold() -> None:
    _, quantizers = made((0.01, 1.0, 3.0), segments=(3, 2))
    learner = GroupLearner(quantizers, 5)
    shake(learner)
    learner.harden()
    looked = 0
    for name, (groups, scale, zero) in learner.groups().items():
        order = list(dict.fromkeys(groups))
        assert order == list(range(len(scale))) and len(groups) == TIMES, "0 .. K'-1 in the order of first use"
        assert scale.dtype == torch.float32 and zero.dtype == torch.uint8
        assert torch.equal(scale[list(groups)], quantizers[name].scale)
        assert torch.equal(zero[list(groups)], quantizers[name].zero_point)
        looked += len(scale)
    assert looked > 9
    learner.logits.data.zero_()
    learner.logits.data[..., 2] = 1
    learner.harden()
    assert {len(s) for _, s, _ in learner.groups().values()} == {1}, "groups that no step chooses are gone"


def test_a_batch_of_mixed_times_is_a_loop_over_samples() -> None:
    """Outputs, and gradients to logits, entries and the input."""
    clock, quantizers = made((0.3, 1.0), segments=(3, 2))
    learner = GroupLearner(quantizers, 3)
    shake(learner)
    g = torch.Generator().manual_seed(1)
    x, up = torch.randn(4, 5, 3, 3, generator=g), torch.randn(4, 5, 3, 3, generator=g)
    times = torch.tensor([1.0, 401.0, 401.0, 961.0])

    def gradients(rows: list[int]) -> list[Tensor]:
        given = x[rows].requires_grad_()
        learner.relax(at(0.0))
        with clock.at(times[rows]):
            out = sum((q(given, 1) * up[rows]).sum() for q in quantizers.values())
            return [out.detach(), *torch.autograd.grad(out, [learner.logits, learner.theta, given])]

    together, alone = gradients([0, 1, 2, 3]), [gradients([i]) for i in range(4)]
    for i in range(3):
        assert torch.allclose(together[i], sum(a[i] for a in alone), rtol=1e-4, atol=1e-5)
    assert torch.allclose(together[3], torch.cat([a[3] for a in alone]), rtol=1e-4, atol=1e-5)
    seen = together[1].abs().sum((0, 2)) > 0
    assert [GRID[i] for i in seen.nonzero().flatten().tolist()] == [1.0, 401.0, 961.0], "only steps that were visited"


@pytest.mark.parametrize("how", ["runs", "kmeans"])
def test_planted_drift_is_found(how: Any) -> None:
    """Invariant 7: inputs whose deviation is one of two values, steps of either kind interleaved (contiguous for runs).
    Two groups are the two kinds, whatever the clustering said of each step; the error is that of a scale a step."""
    g, bits = torch.Generator().manual_seed(0), 4
    clock, kinds = Clock(GRID), torch.arange(TIMES) % 3 == 0 if how == "kmeans" else torch.arange(TIMES) >= 9
    sigma = torch.where(kinds, 0.8, 0.1)
    values = torch.randn(TIMES, 4096, generator=g) * sigma[:, None]
    scale, zero = ranges.search(values, Grid(bits=bits))
    quantizer = ActivationQuantizer(ActivationSpec(grid=Grid(bits=bits), timed=True), (), clock, TIMES)
    quantizer.set_scale(scale[:, None], zero[:, None])
    each = (encode(values, reciprocal(scale)[:, None], zero[:, None], 15) - zero[:, None]) * scale[:, None]
    best = float(((each - values) / sigma[:, None]).square().mean())
    learner = GroupLearner({"q.input": quantizer}, 2, how, entropy=0.1)
    assert torch.equal(learner.home[0].bool(), kinds != kinds[0])
    learner.home.zero_()  # not even ties help
    adam = torch.optim.Adam([{"params": [learner.logits], "lr": 0.05}, {"params": [learner.theta], "lr": 0.005}])
    for i in range(200):
        rows = torch.randint(0, TIMES, (32,), generator=g)
        x = values[rows][:, torch.randint(0, 4096, (256,), generator=g)]
        adam.zero_grad()
        penalty = learner.relax(at(i / 200))
        with clock.at(torch.tensor(GRID)[rows]):
            loss = ((quantizer(x, 1) - x) / sigma[rows, None]).square().mean() + penalty
        loss.backward()
        adam.step()
    facts = learner.harden()
    groups = torch.tensor(learner.groups()["q.input"][0])
    assert torch.equal(groups.bool(), kinds != kinds[0]) and facts["certainty"] > 0.9
    with clock.at(torch.tensor(GRID)):
        error = float(((quantizer(values, 1) - values) / sigma[:, None]).square().mean())
    assert error < 1.05 * best, (error, best)


def test_what_it_cannot_take() -> None:
    _, quantizers = made((0.3,), time_bits=(4,) * TIMES)
    two_clocks = {"a.input": made((0.3,))[1]["q0.input"], "b.input": made((0.3,))[1]["q0.input"]}
    for wrong in (quantizers, {}, {"q.input": ActivationQuantizer(ActivationSpec())}, two_clocks):
        with pytest.raises(InternalError, match="a row a timestep"):
            GroupLearner(wrong)


# ---- whole runs --------------------------------------------------------------------------------------------------
def learner_for(run: Any, **choices: Any) -> GroupLearner:
    step = Finetune(do="finetune", id="tune", weights="none", scales="all", scale_form="groups", **choices)
    (learner,) = step.learner(run, step.chosen(run), generator(0, "a", "b")).learners
    assert isinstance(learner, GroupLearner)
    return learner


@pytest.mark.parametrize("pipe", ["least", "text"])
def test_every_logit_gets_a_task_gradient(pipe: str, tmp_path: Path) -> None:
    """Invariant 6: straight through all layers, first convolutions of residual blocks included."""
    made_ = least_pipeline() if pipe == "least" else tiny.pipeline("text")
    run = execute(tmp_path, made_, START)
    learner = learner_for(run, groups=3)
    looked = 0
    with wrap.show(run.model, "sim"):
        for batch in run.tape.select(run.tape.spread(4)):
            args, kwargs = run.tape.inputs(batch)
            with torch.no_grad(), wrap.show(run.model, "float"):
                target = run.model(*args, **kwargs).sample
            penalty = learner.relax(at(0.0))
            assert float(penalty.detach()) == 0, "the task's gradient alone"
            (run.model(*args, **kwargs).sample - target).square().mean().backward()
            looked += 1
    learner.release()
    grad = learner.logits.grad
    assert grad is not None and looked > 0
    by_layer = dict(zip(learner.quantizers, grad.abs().amax(dim=(1, 2)).tolist(), strict=True))
    assert {n.removesuffix(".input") for n in by_layer} == set(run.layers()) and len(by_layer) > 10
    assert sum(n.endswith(".conv1.input") for n in by_layer) >= 3
    assert all(value > 0 for value in by_layer.values()), {n: v for n, v in by_layer.items() if not v}


def test_a_run_finds_groups_and_stores_their_rows_only(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = execute(tmp_path / "plain", least_pipeline(), START)
    run = execute(tmp_path, least_pipeline(), START + TUNE.replace("iterations = 12", "iterations = 60") + PACK)
    found = note(run)
    assert found["kept"] == "trained" and found["loss_end"] < found["loss_start"] and found["time_groups"] > 10
    json.dumps(run.done, allow_nan=False)
    looked, several = 0, 0
    for name, layer in run.layers().items():
        spec = run.plan.layers[name].activation
        assert spec is not None and layer.spec.activation == spec and len(spec.time_groups) == len(run.plan.timesteps)
        count = max(spec.time_groups) + 1
        assert layer.input.scale.shape[0] == layer.input.zero_point.shape[0] == count <= 2
        looked, several = looked + 1, several + (count > 1)
    assert looked == len(run.plan.layers) > 10 and several > 3
    before, after = tables(plain), tables(run)
    assert before.keys() == after.keys()
    assert sum(t.numel() for t in after.values()) <= sum(t.numel() for t in before.values()) / 2
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())


def test_what_is_measured_is_the_decided_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixture optimism: every probe sees one quantizer a step, and the loss that is noted is that of the artifact."""
    seen: dict[int, float] = {}
    mixed: list[bool] = []
    look = loop._Loop.look

    def spy(self: Any, probe: Any, iteration: int) -> float:
        def measure() -> float:
            parts = self.learner.learners[0].members
            mixed.extend(q.trial_mixture is not None or q.trial_rows is None for q in parts)
            return probe.measure()

        seen[iteration] = look(self, loop.Probe(measure, probe.every), iteration)
        return seen[iteration]

    monkeypatch.setattr(loop._Loop, "look", spy)
    run = execute(tmp_path, least_pipeline(), START + TUNE)
    found = note(run)
    assert sorted(seen) == [0, 3, 6, 9, 12] and len(mixed) > 50 and not any(mixed)
    assert found["loss_start"] == float(f"{seen[0]:.6g}"), "undecided: the clustering"
    assert found["loss_end"] == float(f"{min(seen.values()):.6g}")
    wrap.set_face(run.model, "sim")
    step = Finetune(do="finetune")
    objective = Objective(run.model, teaching.load(run, 1), step.losses, ["conv_in"], 1.0)
    measured = objective.measure(objective.lessons.probe(64), 4)["total"]
    assert found["loss_end"] == pytest.approx(measured, rel=1e-5), "what is stored, under the changed plan"


@pytest.mark.parametrize("cluster_", ["runs", "kmeans"])
def test_without_iterations_the_groups_are_those_of_the_clustering(cluster_: Any, tmp_path: Path) -> None:
    text = START + TUNE.replace("iterations = 12", f'iterations = 0\ncluster = "{cluster_}"')
    (tmp_path / "plain").mkdir()
    plain = execute(tmp_path / "plain", least_pipeline(), START)
    run = execute(tmp_path, least_pipeline(), text)
    found, compared = note(run), 0
    assert found["kept"] == "start" and found["loss_start"] == found["loss_end"]
    for name, layer in run.layers().items():
        fitted = plain.layers()[name].input
        home = cluster(fitted.scale, fitted.zero_point, fitted.spec.grid, 2, cluster_)
        scale, zero = entries(fitted.scale, fitted.zero_point, fitted.spec.grid, home, 2)
        assert layer.spec.activation.time_groups == tuple(home.tolist())
        assert torch.equal(layer.input.scale, scale) and torch.equal(layer.input.zero_point.float(), zero)
        compared += 1
    assert compared > 10


def test_never_worse_than_the_start(tmp_path: Path) -> None:
    """A search gone astray ends as the clustering, bit for bit."""
    wild = TUNE.replace("lr_scales = 0.002", "lr_scales = 50.0").replace("evaluate_every = 3", "evaluate_every = 50")
    (tmp_path / "none").mkdir()
    clustered = execute(tmp_path / "none", least_pipeline(), START + TUNE.replace("iterations = 12", "iterations = 0"))
    run = execute(tmp_path, least_pipeline(), START + wild)
    found = note(run)
    assert found["kept"] == "start" and found["loss_end"] == found["loss_start"] and found["best_at"] == 0
    assert found["steps_regrouped"] == 0 and run.plan == clustered.plan
    one, two = tables(run), tables(clustered)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("stop", [3, 9])
def test_killed_and_resumed_ends_with_the_same_bytes(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = killed_and_resumed(tmp_path, monkeypatch, START + TUNE, stop)
    third = resumed(tmp_path, START + TUNE)  # everything from the journal, the change of the plan included
    one, two = tables(third), tables(whole)
    assert third.plan == whole.plan and all(torch.equal(one[n], two[n]) for n in two)


def test_weights_and_biases_may_be_trained_along(tmp_path: Path) -> None:
    text = TUNE.replace('weights = "none"', 'weights = "full"\nbias = true\nweight_scale = true\nlr_weights = 1e-4')
    run = execute(tmp_path, least_pipeline(), START + text)
    found = note(run)
    assert found["kept"] == "trained" and found["codes_changed"] > 0
    for layer in run.layers().values():
        assert layer.trained_bias is not None and not torch.equal(layer.trained_bias, layer.bias)
    (tmp_path / "packed").mkdir()
    run = execute(tmp_path / "packed", least_pipeline(), START + text + PACK)
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())


def test_operands_of_attention_and_tables_of_one_row_are_trained_as_tables(tmp_path: Path) -> None:
    head = TIMED + '"*:q | *:softmax" = { activation = { timed = true } }\n"conv_in" = { activation = { bits = 8 } }\n'
    run = execute(tmp_path, tiny.pipeline("text"), head + WALKS + SPLIT + FIT + RANGES)
    step = Finetune(do="finetune", weights="none", scales="all", scale_form="groups")
    groups, plain = step.learner(run, step.chosen(run), generator(0, "a", "b")).learners
    assert isinstance(groups, GroupLearner) and isinstance(plain, ScaleLearner)
    assert all(n == "conv_in.input" or n.rpartition(".")[2] in ("q", "softmax") for n in plain.quantizers)
    assert len(plain.quantizers) > 8 and len(groups.quantizers) == len(run.layers()) - 1
    groups.release()
    (tmp_path / "tuned").mkdir()
    tuned = execute(tmp_path / "tuned", tiny.pipeline("text"), head + WALKS + SPLIT + FIT + RANGES + TUNE)
    assert note(tuned)["time_groups"] == len(groups.quantizers)
    rows = {n: m.scale.shape[0] for n, m in tuned.model.named_modules() if isinstance(m, ActivationQuantizer)}
    assert rows["conv_in.input"] == 1 and rows["conv_out.input"] <= 2
    assert {count for n, count in rows.items() if ".processor." in n} == {4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_iteration_is_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and eager searches agree but for rounding."""
    text = START + TUNE.replace("iterations = 12", "iterations = 40")
    ends = [n["loss_end"] / n["loss_start"] for n in captured_and_eager(tmp_path, monkeypatch, text)]
    assert all(end <= 1 for end in ends) and max(ends) - min(ends) < 0.1


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    for wrong in ({"zero_points": True}, {"scales": "none"}, {"groups": 0}, {"entropy": -1.0}, {"cluster": "some"}):
        with pytest.raises(ValidationError):
            Finetune(do="finetune", **{"scale_form": "groups", "scales": "all", **wrong})  # type: ignore[arg-type]
    static = HEAD + WALKS + SPLIT + FIT + RANGES + TUNE
    with pytest.raises(InputError, match="groups of timesteps need") as caught:
        begin(tmp_path, least_pipeline(), recipe(tmp_path, static))
    assert complete(caught.value)


def test_the_recipe_and_its_presets() -> None:
    forms = {}
    for preset in (None, "uniform", "random", "nearest", "clusters", "groups-2", "groups-4", "groups-16", "table",
                   "static"):
        asked = read_recipe("adpdm", preset=preset)
        tuned = next(step for step in asked.steps if isinstance(step, Finetune))
        rounded = next(step for step in asked.steps if isinstance(step, Reconstruct))
        forms[preset] = (tuned.scale_form, tuned.groups, tuned.iterations, tuned.order, rounded.iterations)
        make_plan(survey(tiny.text_unet(), tokens=tiny.TOKENS), asked)
    assert forms == {
        None: ("groups", 8, 2000, "risk", 2500), "uniform": ("groups", 8, 2000, "shuffled", 2500),
        "random": ("groups", 8, 2000, "random", 2500), "nearest": ("groups", 8, 2000, "risk", 0),
        "clusters": ("groups", 8, 0, "risk", 2500), "groups-2": ("groups", 2, 2000, "risk", 2500),
        "groups-4": ("groups", 4, 2000, "risk", 2500), "groups-16": ("groups", 16, 2000, "risk", 2500),
        "table": ("table", 8, 2000, "shuffled", 2500), "static": ("table", 8, 2000, "shuffled", 2500),
    }
