"""The three faces of a layer: float untouched, sim equal to packed bit for bit, packing of exactly those codes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import builder
from bitbrush.errors import BitbrushError, InternalError
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLinear
from bitbrush.numbers import packing
from bitbrush.numbers.codec import decode
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec


def test_pairwise_grid_covers_every_pair() -> None:
    cases = builder.pairwise(0)
    names = list(builder.FACTORS)
    pairs = 0
    for a, b in itertools.combinations(names, 2):
        seen = {(str(case[a]), str(case[b])) for case in cases}
        assert len(seen) == len(builder.FACTORS[a]) * len(builder.FACTORS[b])
        pairs += len(seen)
    assert pairs > 800 and 45 <= len(cases) <= 130


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_equals_sim(seed: int) -> None:
    """`torch.equal` over the grid; the input is unchanged; other memory layouts give the same values."""
    cases, ran = builder.pairwise(seed), 0
    for i, case in enumerate(cases):
        sim, packed, codes = builder.build(case, i)
        x = builder.make_input(case, i)
        before = x.clone()
        with sim.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            y = sim(x)
            assert torch.equal(packed(x), y), case
            assert torch.equal(x, before)
            assert y.dtype == x.dtype and torch.isfinite(y).all()
        assert torch.equal(packed.stored_codes(), codes)
        assert packed.codes is None and packed.float_weight is None
        ran += 1
    assert ran == len(cases) >= 45


def test_float_face_is_the_original_bit_for_bit() -> None:
    ran = 0
    for case in builder.pairwise(5):
        generator = torch.Generator().manual_seed(ran)
        case = {**builder.ALWAYS, **case}
        module = builder.make_module(case, generator)
        wrapper = QuantLinear if case["kind"] == "linear" else QuantConv2d
        layer = wrapper.wrap(module, builder.spec_of(case), Clock(builder.TIMES), len(builder.TIMES))
        x = builder.make_input(case, ran)
        assert layer.float_weight is module.weight and layer.bias is module.bias  # no copy
        want = module(x)
        assert torch.equal(layer(x), want)
        builder.quantize_weight(layer, generator)
        layer.face = "float"
        assert torch.equal(layer(x), want)  # quantizing leaves the teacher untouched
        ran += 1
    assert ran >= 45


def test_sim_is_the_definition() -> None:
    """Sim equals the plain operation on decoded tensors written out by hand."""
    sim, _, codes = builder.build({"kind": "conv", "segments": (40, 24), "padding": (1, 1)}, 3)
    x = builder.make_input({"kind": "conv"}, 3)
    scale = sim.weight_scale.repeat_interleave(torch.tensor([40, 24]), 1)[:, :, None, None]
    zero = sim.weight_zero_point.float().repeat_interleave(torch.tensor([40, 24]), 1)[:, :, None, None]
    weight = (codes.float() - zero) * scale
    a_scale = sim.input.scale.repeat_interleave(torch.tensor([40, 24]), 1).reshape(1, -1, 1, 1)
    a_zero = sim.input.zero_point.float().repeat_interleave(torch.tensor([40, 24]), 1).reshape(1, -1, 1, 1)
    value = (torch.clamp(torch.round(x * (1 / a_scale)) + a_zero, 0, 255) - a_zero) * a_scale
    assert torch.equal(sim(x), nn.functional.conv2d(value, weight, sim.bias, padding=1))


def test_state_dict_round_trip() -> None:
    """A packed layer is its tensors: an empty declared layer that loads them is the same layer."""
    ran = 0
    for i, case in enumerate(builder.pairwise(7)):
        _, packed, _ = builder.build(case, i)
        full = {**builder.ALWAYS, **case}
        module = builder.make_module(full, torch.Generator().manual_seed(99))
        other = type(packed).wrap(module, packed.spec, packed.input._clock[0], len(builder.TIMES))
        other.float_weight = None
        other.declare_packed()
        other.load_state_dict(packed.state_dict())
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)):
            assert torch.equal(other(x), packed(x))
        mine, theirs = other.state_dict(), packed.state_dict()
        assert sorted(mine) == sorted(theirs)
        assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)
        ran += 1
    assert ran >= 45


def test_four_bits_take_four_bits() -> None:
    layer = QuantLinear.wrap(nn.Linear(1024, 512), LayerSpec(weight=WeightSpec()), None, 1)
    builder.quantize_weight(layer, torch.Generator())
    layer.pack()
    assert layer.codes4.numel() == 1024 * 512 // 2
    assert layer.packed_bytes() == 1024 * 512 // 2 + 512 * (4 + 1) + 512 * 4
    assert [p.shape for p in layer.parameters()] == [layer.bias.shape]


def test_mixed_rows_are_sorted_by_class_and_put_back() -> None:
    case = {"kind": "linear", "weight_bits": "mixed", "rows": 33}
    sim, packed, codes = builder.build(case, 1)
    bits = torch.tensor(sim.spec.weight.row_bits)
    assert torch.equal(bits[packed.row_order.long()], bits.sort().values)
    assert sorted(packed.row_order.tolist()) == list(range(33))
    start = 0
    for b in (2, 3, 4, 7):
        data = getattr(packed, f"codes{b}")
        order = packed.row_order[start : start + data.shape[0]].long()
        rows = packing.unpack(data, b, packed.row_length)[:, :64]
        assert torch.equal(rows, codes[order]) and data.shape[1] == packing.row_bytes(64, b)
        start += data.shape[0]
    assert start == 33
    assert torch.equal(packed.weight, sim.decoded_weight())


def test_weight_only_and_activation_only() -> None:
    x = torch.randn(2, 5, 64)
    module = nn.Linear(64, 8)
    weight_only = QuantLinear.wrap(module, LayerSpec(weight=WeightSpec()), None, 1)
    codes = builder.quantize_weight(weight_only, torch.Generator())
    scale, zero = weight_only.scale_tables()
    want = nn.functional.linear(x, decode(codes, scale, zero), module.bias)
    assert torch.equal(weight_only(x), want)
    weight_only.pack()
    assert torch.equal(weight_only(x), want)
    activation_only = QuantLinear.wrap(module, LayerSpec(activation=ActivationSpec(mode="dynamic")), None, 1)
    activation_only.face = "sim"
    sim = activation_only(x)
    assert torch.equal(sim, nn.functional.linear(activation_only.input(x, 2), module.weight, module.bias))
    activation_only.pack()
    assert torch.equal(activation_only(x), sim) and activation_only.float_weight is module.weight


def test_output_position_quantizes_the_output() -> None:
    spec = LayerSpec(weight=WeightSpec(), activation=ActivationSpec(position="output", grid=Grid(bits=4)))
    layer = QuantLinear.wrap(nn.Linear(64, 8), spec, None, 1)
    builder.quantize_weight(layer, torch.Generator())
    layer.input.set_scale(torch.tensor([[0.25]]), torch.tensor([[8.0]]))
    y = layer(torch.randn(3, 64))
    assert torch.equal(y, (y / 0.25).round() * 0.25) and len(y.unique()) <= 16
    packed = builder.packed_copy(layer)
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), layer(x))


def test_trial_weight_and_gradients() -> None:
    """Training reaches the trial weight, the input and a trial scale; a forward leaves no trace."""
    sim, _, _ = builder.build({"kind": "conv", "mode": "timed"}, 2)
    before = copy.deepcopy(sim.state_dict())
    x = builder.make_input({"kind": "conv"}).requires_grad_()
    sim.trial_weight = sim.decoded_weight().clone().requires_grad_()
    sim.input.trial_scale = sim.input.scale.clone().requires_grad_()
    with sim.input._clock[0].at(480):
        sim(x).pow(2).mean().backward()
    grad = sim.input.trial_scale.grad
    assert x.grad is not None and x.grad.abs().sum() > 0 and sim.trial_weight.grad.abs().sum() > 0
    assert grad[2].abs().sum() > 0 and grad[[0, 1, 3]].abs().sum() == 0  # only the row in force
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sim.state_dict().values(), strict=True))


def test_memory_layouts_give_equal_values() -> None:
    ran = 0
    for kind, packed_face in itertools.product(("linear", "conv"), (False, True)):
        sim, packed, _ = builder.build({"kind": kind}, 4)
        layer = packed if packed_face else sim
        x = builder.make_input({"kind": kind}, 4)
        want = layer(x)
        wide = torch.empty(*x.shape[:-1], x.shape[-1] * 2)
        wide[..., 1::2] = x
        offset = torch.empty(x.numel() + 5)[5:].view(x.shape).copy_(x)
        forms = [wide[..., 1::2], offset, x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(0).flip(0)]
        if kind == "conv":
            forms.append(x.contiguous(memory_format=torch.channels_last))
        for form in forms:
            assert torch.allclose(layer(form), want, rtol=0, atol=2e-5) and torch.equal(form, x)
            assert torch.equal(sim(form), packed(form))
            ran += 1
    assert ran == 18


def test_refusals() -> None:
    layer = QuantLinear.wrap(nn.Linear(8, 4), LayerSpec(weight=WeightSpec()), None, 1)
    for action in (layer.pack, layer.stored_codes, layer.decoded_weight):
        with pytest.raises(InternalError):
            action()
    layer.face = "sim"
    with pytest.raises(BitbrushError):
        layer(torch.zeros(1, 8))
    timed = QuantLinear.wrap(nn.Linear(8, 4), LayerSpec(activation=ActivationSpec(timed=True)), Clock((1.0, 2.0)), 2)
    timed.face = "sim"
    with pytest.raises(BitbrushError, match="clock"):
        timed(torch.zeros(1, 8))


def test_weight_is_read_only() -> None:
    _, packed, _ = builder.build({"kind": "linear"})
    with pytest.raises((AttributeError, KeyError)):
        packed.weight = nn.Parameter(torch.zeros(16, 64))
    assert packed.weight.shape == (16, 64) and packed.weight.dtype == torch.float32
    conv = builder.build({"kind": "conv", "dtype": torch.float16})[1]
    assert conv.weight.shape == (16, 64, 3, 3) and conv.weight.dtype == torch.float16
