"""Scales from networks of the timestep (TDQ): at the start, warmed, trained, folded, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from bitbrush.engine.journal import generator
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.pipelines import sample_latents
from bitbrush.numbers import ranges
from bitbrush.numbers.grid import ActivationSpec, Grid
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.learners import ScaleLearner
from bitbrush.steps.time_networks import CODE, WIDTH, NetworkScaleLearner, inverse_softplus, time_code
from small import (
    FIT,
    HEAD,
    PACK,
    RANGES,
    SPLIT,
    TIMED,
    WALKS,
    begin,
    complete,
    execute,
    killed_and_resumed,
    least_pipeline,
    recipe,
    tables,
)

START = TIMED + WALKS + SPLIT + FIT + RANGES
TUNE = (
    '[[step]]\ndo = "finetune"\nid = "tune"\nweights = "none"\nscales = "all"\nscale_form = "network"\n'
    "warm_start = 20\niterations = 12\nbatch = 4\nevaluate_every = 3\ncheckpoint = 4\nlr_scales = 0.002\n"
)
GRID = tuple(float(t) for t in range(1, 1000, 40))


def made(levels: tuple[float, ...] = (0.01, 1.0), bits: int = 4, segments: tuple[int, ...] = ()) -> tuple[Clock, Any]:
    """(clock, quantizers by name), each table drifting over the grid around a level."""
    clock, out = Clock(GRID), {}
    g = torch.Generator().manual_seed(3)
    for i, level in enumerate(levels):
        spec = ActivationSpec(grid=Grid(bits=bits), timed=True)
        wide = segments if i % 2 else ()
        q = ActivationQuantizer(spec, wide, clock, len(GRID))
        drift = torch.exp(torch.randn(1, q.scale.shape[1], generator=g) * torch.linspace(-1, 1, len(GRID))[:, None])
        q.set_scale(level * drift, torch.randint(0, 1 << bits, q.scale.shape, generator=g))
        out[f"q{i}"] = q
    return clock, out


def learner_of(quantizers: Any, **choices: Any) -> NetworkScaleLearner:
    return NetworkScaleLearner(quantizers, torch.Generator().manual_seed(0), **choices)


def shake(learner: NetworkScaleLearner, size: float = 0.05) -> None:
    g = torch.Generator().manual_seed(9)
    for p in learner.parameters().values():
        p.data.add_(torch.randn(p.shape, generator=g) * size)


# ---- the networks ------------------------------------------------------------------------------------------------
def test_inverse_softplus_at_any_size() -> None:
    values = torch.tensor([1e-6, 1e-3, 0.69, 1.0, 20.0, 1e3, 1e30])
    assert torch.allclose(F.softplus(inverse_softplus(values)), values, rtol=1e-4)
    assert inverse_softplus(torch.tensor(1e30)).isfinite() and len(values) == 7


def test_the_code_is_the_papers() -> None:
    code = time_code(torch.tensor([0.0, 3.0, 999.5]))
    assert code.shape == (3, CODE) and torch.equal(code[0, : CODE // 2], torch.ones(CODE // 2))
    j = 5
    want = torch.tensor(3 * 10000 ** (-j / (CODE / 2)))
    assert torch.allclose(code[1, [j, CODE // 2 + j]], torch.stack([want.cos(), want.sin()]).float(), atol=1e-6)


def test_at_the_start_every_scale_is_the_mean_of_its_table() -> None:
    """Invariant 1: zero last-layer weights give s0, whatever the size of s0; scales are positive always."""
    _, quantizers = made((1e-6, 1e-3, 1.0, 10.0, 3e4), segments=(3, 2))
    learner = learner_of(quantizers, warm_start=0)
    looked = 0
    for name, part in learner._parts(learner.scales()).items():
        mean = quantizers[name].scale.double().log().mean(0, keepdim=True).exp().float()
        assert torch.allclose(part, mean.expand_as(part), rtol=1e-6, atol=0)
        looked += part.numel()
    assert looked == 7 * len(GRID)
    shake(learner, 1.0)
    assert bool((learner.scales() > 0).all())
    count = sum(p.numel() for p in learner.parameters().values())
    assert count == 5 * (CODE * WIDTH + WIDTH + 2 * (WIDTH * WIDTH + WIDTH)) + 7 * (WIDTH + 1)


def test_large_and_small_scales_are_trained_alike() -> None:
    """The same drift around 1e-3 and around 10: the warm start follows both equally well."""
    clock, quantizers = made((1e-3, 10.0))
    drift = quantizers["q0"].scale / 1e-3
    quantizers["q1"].set_scale(drift * 10)
    learner = learner_of(quantizers, warm_start=300)
    found = learner._parts(learner.scales().detach())
    errors = [float((found[n] / q.scale).log().abs().max()) for n, q in quantizers.items()]
    assert max(errors) < 0.1 and clock is quantizers["q0"].clock


def test_folded_tables_equal_the_networks_one_by_one() -> None:
    """Invariant 2: each network evaluated alone, without batching, at each time gives the entry that is stored."""
    _, quantizers = made((0.01, 1.0, 5.0), segments=(3, 2))
    learner = learner_of(quantizers, warm_start=5)
    shake(learner)
    n, base = learner.networks, learner.base
    learner.harden()
    compared = 0
    for c, (name, column) in enumerate([("q0", 0), ("q1", 0), ("q1", 1), ("q2", 0)]):
        q = int(n.owner[c])
        for row, t in enumerate(GRID):
            h = time_code(torch.tensor([t]))
            for w, b in ((n.w1, n.b1), (n.w2, n.b2), (n.w3, n.b3)):
                h = F.relu(h @ w[q] + b[q])
            alone = base[c] * F.softplus(h @ n.w4[c] + n.b4[c]).flatten()
            assert torch.allclose(alone, quantizers[name].scale[row, column], rtol=1e-5, atol=0)
            compared += 1
    assert compared == 4 * len(GRID)
    assert set(learner.result()) == {"q0/scale", "q1/scale", "q2/scale"}, "nothing of the networks is stored"


def test_live_networks_and_folded_tables_give_the_same_bits() -> None:
    clock, quantizers = made((0.01, 1.0), segments=(3, 2))
    learner = learner_of(quantizers, warm_start=5)
    shake(learner)
    x, t = torch.randn(3, 5, 4, 4), torch.tensor([41.0, 500.0, 961.0])
    zeros = {n: q.zero_point.clone() for n, q in quantizers.items()}
    with torch.no_grad(), clock.at(t):
        learner.relax(torch.tensor(0.0))
        live = [q(x, 1) for q in quantizers.values()]
        learner.harden()
        folded = [q(x, 1) for q in quantizers.values()]
    assert len(live) == 2 and all(torch.equal(a, b) for a, b in zip(live, folded, strict=True))
    assert all(torch.equal(q.zero_point, zeros[n]) for n, q in quantizers.items()), "zero-points stay the table's"
    learner.restore()
    assert torch.equal(quantizers["q0"].scale, learner.start["q0"][0])


def test_a_network_constant_in_time_is_the_static_quantizer() -> None:
    """Invariant 3, bit for bit."""
    clock, quantizers = made((0.37,))
    quantizer = quantizers["q0"]
    quantizer.set_scale(torch.full_like(quantizer.scale, 0.37), torch.full_like(quantizer.zero_point, 6))
    learner = learner_of(quantizers, warm_start=0)
    static = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)))
    with torch.no_grad():
        scale = learner.scales()[:1].view(1, 1)
    static.set_scale(scale, torch.tensor([[6]]))
    x, compared = torch.randn(2, 3, 4, 4), 0
    learner.relax(torch.tensor(0.0))
    for t in GRID[::5]:
        with torch.no_grad(), clock.at(t):
            assert torch.equal(quantizer(x, 1), static(x, 1))
        compared += 1
    assert compared == 5


def test_gradients_are_lsqs_and_samples_of_mixed_times_are_a_loop() -> None:
    """Invariant 4: into the table by the closed form, then by autograd into the networks."""
    clock, quantizers = made((0.3,))
    quantizer = quantizers["q0"]
    learner = learner_of(quantizers, warm_start=0)
    shake(learner)
    g = torch.Generator().manual_seed(1)
    x, up = torch.randn(4, 3, 5, 5, generator=g), torch.randn(4, 3, 5, 5, generator=g)
    times = torch.tensor([1.0, 401.0, 401.0, 961.0])

    def gradients(rows: list[int]) -> list[Tensor]:
        for p in learner.parameters().values():
            p.grad = None
        learner.relax(torch.tensor(0.0))
        with clock.at(times[rows]):
            (quantizer(x[rows], 1) * up[rows]).sum().backward()
        return [p.grad.clone() for p in learner.parameters().values() if p.grad is not None]

    together = gradients([0, 1, 2, 3])
    loop_ = [sum(parts) for parts in zip(*(gradients([i]) for i in range(4)), strict=True)]
    assert len(together) == 8 and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5)
                                      for a, b in zip(together, loop_, strict=True))
    with torch.no_grad():
        table = learner._parts(learner.scales())["q0"]
    row = [GRID.index(t) for t in times.tolist()]
    s, z = (t[row].view(4, 1, 1, 1) for t in (table, quantizer.zero_point.float()))
    v = x / s
    code = v.round() + z
    slope = torch.where((code >= 0) & (code <= 15), v.round() - v, code.clamp(0, 15) - z)
    per_row = torch.zeros(len(GRID)).index_add_(0, torch.tensor(row), (slope * up).sum((1, 2, 3)))
    want = torch.autograd.grad((learner.scales() * per_row).sum(), list(learner.parameters().values()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(together, want, strict=True))


def test_planted_drift_is_followed() -> None:
    """Invariant 6: inputs of standard deviation sigma(t); s(t) / sigma(t) is constant within 5 %."""
    g = torch.Generator().manual_seed(0)
    clock = Clock(GRID)
    sigma = 0.02 * torch.exp(2 * torch.sin(torch.tensor(GRID) / 300))
    quantizer = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4), timed=True), (), clock, len(GRID))
    scale, zero = ranges.search(torch.randn(1, 4096, generator=g) * sigma[:, None], Grid(bits=4))
    quantizer.set_scale(scale[:, None], zero[:, None])
    learner = learner_of({"q": quantizer}, warm_start=500)
    learner.harden()
    ratio = quantizer.scale.flatten() / sigma
    assert float(sigma.max() / sigma.min()) > 5 and len(ratio) == 25
    assert float((ratio / ratio.log().mean().exp() - 1).abs().max()) < 0.05
    assert learner.warm_error < 0.03


# ---- in a run ----------------------------------------------------------------------------------------------------
def test_a_run_trains_and_stores_tables_only(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = execute(tmp_path / "plain", least_pipeline(), START)
    run = execute(tmp_path, least_pipeline(), START + TUNE.replace("iterations = 12", "iterations = 60") + PACK)
    note = next(entry for entry in run.done if entry["step"] == "tune")
    assert note["kept"] == "trained" and note["loss_end"] < note["loss_start"] and note["time_networks"] > 10
    before, after = tables(plain), tables(run)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.endswith("/scale") for n in moved) and before.keys() == after.keys()
    assert sum(t.numel() for t in after.values()) == sum(t.numel() for t in before.values()), "invariant 7"
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())


def test_live_and_folded_models_draw_the_same_samples(tmp_path: Path) -> None:
    """Invariant 2 for whole trajectories."""
    run = execute(tmp_path, least_pipeline(), START)
    step = Finetune(do="finetune", id="tune", weights="none", scales="all", scale_form="network", warm_start=10)
    learner = step.learner(run, step.chosen(run), generator(0, "a", "b"))
    drawn: list[Tensor] = []
    handle = run.model.register_forward_hook(lambda _m, _a, out: drawn.append(out[0].clone()))
    for live in (True, False):
        with torch.no_grad(), wrap.show(run.model, "sim"):
            if live:
                learner.relax(torch.tensor(0.0))
            else:
                learner.harden()
            sample_latents(run.pipeline, None, [torch.Generator().manual_seed(5)], steps=4, guidance=1.0)
    handle.remove()
    assert len(drawn) == 8 and all(torch.equal(a, b) for a, b in zip(drawn[:4], drawn[4:], strict=True))


@pytest.mark.parametrize("stop", [3, 9])
def test_killed_and_resumed_ends_with_the_same_bytes(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_and_resumed(tmp_path, monkeypatch, START + TUNE, stop)


def test_tables_of_one_row_are_trained_as_such(tmp_path: Path) -> None:
    head = TIMED + '"conv_in" = { activation = { bits = 8 } }\n'
    run = execute(tmp_path, least_pipeline(), head + WALKS + SPLIT + FIT + RANGES)
    step = Finetune(do="finetune", weights="none", scales="all", scale_form="network", warm_start=0)
    networks, plain = step.learner(run, step.chosen(run), generator(0, "a", "b")).learners
    assert isinstance(networks, NetworkScaleLearner) and isinstance(plain, ScaleLearner)
    assert set(plain.quantizers) == {"conv_in.input"} and len(networks.quantizers) > 10


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    for wrong in ({"zero_points": True}, {"scales": "none"}, {"warm_start": -1}):
        with pytest.raises(ValidationError):
            Finetune(do="finetune", **{"scale_form": "network", "scales": "all", **wrong})  # type: ignore[arg-type]
    static = HEAD + WALKS + SPLIT + FIT + RANGES + TUNE
    with pytest.raises(InputError, match="networks of the time need") as caught:
        begin(tmp_path, least_pipeline(), recipe(tmp_path, static))
    assert complete(caught.value)
