"""Bits a timestep: every row of a timed table on its own grid, in simulation, training, packed, proven and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush import kernels
from bitbrush.artifact.save import save
from bitbrush.errors import InputError
from bitbrush.kernels import cpu
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.learners import ScaleLearner, held_tables

TIMES = tiny.TIMES
BITS = (8, 3, 6, 6, 2)


def mixed(plan: Plan, bits: tuple[int, ...] = BITS) -> Plan:
    """The plan with bits a timestep in every timed activation."""
    return tiny.timed_with(plan, time_bits=bits)


def fill(quantizer: ActivationQuantizer, seed: int = 0) -> None:
    """Rows of random ranges, each on its own grid."""
    g = torch.Generator().manual_seed(seed)
    shape = quantizer.scale.shape
    low, high = -torch.rand(shape, generator=g) * 2, torch.rand(shape, generator=g) * 3
    grids = quantizer.spec.grids()
    found = [ranges.affine_parameters(a, b, grids[i % len(grids)]) for i, (a, b) in enumerate(zip(low, high,
                                                                                                  strict=True))]
    quantizer.set_scale(torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]))


def quantizer_of(bits: tuple[int, ...] = BITS, segments: tuple[int, ...] = (), base: int = 4, **spec: Any) -> Any:
    """(clock, quantizer)."""
    clock = Clock(TIMES)
    chosen = ActivationSpec(grid=Grid(bits=base), timed=True, time_bits=bits, **spec)
    quantizer = ActivationQuantizer(chosen, segments, clock, len(TIMES), channels=6)
    fill(quantizer)
    return clock, quantizer


# ---- the quantizer -----------------------------------------------------------------------------------------------
def test_every_row_has_its_own_levels() -> None:
    clock, quantizer = quantizer_of()
    x, seen = torch.linspace(-4, 4, 6000).view(1, 6, 10, 100), {}
    for t, bits in zip(TIMES, BITS, strict=True):
        with clock.at(t):
            codes, scale, zero = quantizer.encode(x, 1)
            assert torch.equal(quantizer(x, 1), decode(codes, scale, zero))
        assert torch.equal(codes, encode(x, reciprocal(scale), zero, (1 << bits) - 1))
        seen[t] = len(codes.unique())
    assert seen == {t: 1 << bits for t, bits in zip(TIMES, BITS, strict=True)}
    assert quantizer.top == 255 and quantizer.spec.average_bits == 5.0 and quantizer.spec.most_bits == 8


@pytest.mark.parametrize("choices", [{}, {"segments": (4, 2)}, {"granularity": "channel"}])
def test_a_batch_of_mixed_times_is_a_loop_over_samples(choices: Any) -> None:
    clock, quantizer = quantizer_of(**choices)
    x, times = torch.randn(5, 6, 3, 3) * 3, torch.tensor(TIMES).flip(0)
    with clock.at(times):
        together = quantizer(x, 1)
        codes = quantizer.encode(x, 1)[0]
    for i in range(5):
        with clock.at(times[i]):
            assert torch.equal(quantizer(x[i : i + 1], 1), together[i : i + 1])
    assert [int(c.max()) <= (1 << b) - 1 for c, b in zip(codes, reversed(BITS), strict=True)] == [True] * 5


def test_equal_bits_are_the_plain_quantizer() -> None:
    """Invariant 6 of PCR: all rows relaxed equal a quantizer of that many bits; none, the original."""
    compared = 0
    for bits in (3, 6, 8):
        clock, quantizer = quantizer_of((bits,) * 5)
        plain = ActivationQuantizer(ActivationSpec(grid=Grid(bits=bits), timed=True), (), clock, 5)
        plain.set_scale(quantizer.scale, quantizer.zero_point)
        assert isinstance(plain.row_tops(), int) and not isinstance(quantizer.row_tops(), int)
        for t in TIMES:
            x = torch.randn(2, 6, 4, 4) * 3
            with clock.at(t):
                assert torch.equal(plain(x, 1), quantizer(x, 1))
                compared += 1
    assert compared == 15


def test_training_sees_each_rows_codes() -> None:
    """Gradients, trial tables, trial zero-points and shared tables use the row's own largest code."""
    clock, quantizer = quantizer_of()
    x = (torch.randn(5, 6, 3, 3) * 4).requires_grad_()
    looked = 0
    with clock.at(torch.tensor(TIMES)):
        with torch.no_grad():
            want = quantizer(x, 1)
        out = quantizer(x, 1)
        out.sum().backward()
        inside = quantizer.encode(x.detach(), 1)[0]
        tops = torch.tensor([float((1 << b) - 1) for b in BITS]).view(5, 1, 1, 1)
        raw = torch.round(x.detach() * reciprocal(quantizer.scale)[:, 0].view(5, 1, 1, 1))
        raw = raw + quantizer.zero_point.float()[:, 0].view(5, 1, 1, 1)
        assert x.grad is not None and torch.equal(x.grad, ((raw >= 0) & (raw <= tops)).float())
        assert bool((inside <= tops).all())
        with held_tables([quantizer]):
            assert torch.equal(quantizer(x, 1).detach(), want)
        learner = ScaleLearner({"q": quantizer}, zero_points=True)
        learner.relax(torch.tensor(0.0))
        assert torch.equal(quantizer(x, 1).detach(), want)
        quantizer.trial_rows = None
        assert torch.equal(quantizer(x, 1).detach(), want), "and by its own trial tables"
        assert learner.zero is not None
        learner.zero.data.add_(1e6)
        learner.harden()
        looked += 1
    assert looked == 1 and quantizer.zero_point.flatten().tolist() == [(1 << b) - 1 for b in BITS]


def test_refusals() -> None:
    for wrong in ((0,) * 5, (9,) * 5, (10,) * 5):
        with pytest.raises(ValidationError):
            ActivationSpec(timed=True, time_bits=wrong)
    for spec in (ActivationSpec(time_bits=BITS), ActivationSpec(timed=True, mode="dynamic", time_bits=BITS)):
        assert LayerSpec(activation=spec).unsupported() == ["activation.time_bits"]
    assert LayerSpec(activation=ActivationSpec(timed=True, time_bits=BITS)).unsupported() == []
    plan = mixed(tiny.plan_for(tiny.text_unet()), (8, 6))
    for change in (wrap.wrap, wrap.declare):
        with pytest.raises(InputError, match="do not fit the time grid") as caught:
            change(tiny.text_unet(), plan)
        assert caught.value.why == "2 entries for 5 timesteps" and caught.value.try_
        assert caught.value.where in plan.layers


def test_one_compiled_graph_serves_all_rows() -> None:
    clock, quantizer = quantizer_of()
    x, compared = torch.randn(2, 6, 4, 4) * 3, 0
    compiled = torch.compile(lambda a: quantizer(a, 1), fullgraph=True, backend="aot_eager")
    for t in TIMES:
        with torch.no_grad(), clock.at(t):
            assert torch.equal(compiled(x), quantizer(x, 1))
            compared += 1
    assert compared == 5


# ---- packed ------------------------------------------------------------------------------------------------------
def layer_of(kind: str, segments: tuple[int, ...]) -> tuple[Clock, Any, Any]:
    """(clock, layer in sim face, its packed copy)."""
    spec = LayerSpec(
        weight=WeightSpec(grid=Grid(bits=4)), segments=segments,
        activation=ActivationSpec(grid=Grid(bits=6), timed=True, time_bits=BITS),
    )
    return tiny.packed_pair(kind, spec, fill)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("segments", [(), (16, 8)])
def test_packed_and_proven_at_every_time(kind: str, segments: tuple[int, ...]) -> None:
    clock, layer, packed = layer_of(kind, segments)
    codes, proven = layer.stored_codes(), 0
    for times in [*TIMES, torch.tensor([999.0, 250.0])]:
        x = torch.randn(2, 7, 24) * 2 if kind == "linear" else torch.randn(2, 24, 5, 5) * 2
        with torch.no_grad(), clock.at(times):
            assert torch.equal(packed(x), layer(x))
            result = prove_layer(codes, packed, x)
            assert result["ok"] and set(result["kernels"]) == set(kernels.KERNELS), result
            assert "skipped" not in result["kernels"]["cpu-int8"]
            assert torch.allclose(cpu.run(packed, x), layer(x), atol=1e-4)
        proven += 1
    assert proven == 6
    assert cpu.longest(packed) == (2**31 - 1) // (255 * 15), "the widest row counts"


def test_the_proof_has_a_second_opinion() -> None:
    """A kernel that used another row's largest code would be found out."""
    clock, layer, packed = layer_of("linear", ())
    x = torch.randn(2, 7, 24) * 9
    packed.input._tops = {f"{BITS} cpu": torch.full((5, 1), 255.0)}
    with torch.no_grad(), clock.at(250.0):
        assert not prove_layer(layer.stored_codes(), packed, x)["ok"]


# ---- the whole network -------------------------------------------------------------------------------------------
def test_network_packs_saves_and_loads(tmp_path: Path) -> None:
    model = tiny.text_unet()
    plan = mixed(tiny.plan_for(model, attention=True))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.layers["conv_in"].activation is not None
    assert again.layers["conv_in"].activation.time_bits == BITS
    pipe = tiny.pipeline("text")
    simulated = tiny.packed_network(pipe, plan, fill)
    found = [m for m in pipe.unet.modules() if isinstance(m, ActivationQuantizer)]
    assert len(found) == len(plan.layers) > 40
    assert not torch.equal(simulated[1.0], simulated[999.0])
    assert all(torch.equal(tiny.run(pipe.unet, t), simulated[t]) for t in TIMES)
    assert not any("tops" in name for name in pipe.unet.state_dict())
    used = kernels.use(pipe.unet, "cpu-int8")
    assert sum(reason == "cpu-int8" for reason in used.values()) > 30
    assert torch.allclose(tiny.run(pipe.unet, 250.0), simulated[250.0], atol=0.1)
    kernels.use(pipe.unet, "reference")
    folder = tmp_path / "made"
    save(pipe, folder, plan)
    loaded = type(pipe.unet).from_pretrained(folder / "unet")
    assert all(torch.equal(tiny.run(loaded, t), simulated[t]) for t in TIMES)
