"""Input scales, trained biases and zero-points, scales a channel, symmetric 1-bit rows: each against its definition."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import builder
import tiny
from bitbrush.errors import InputError, InternalError
from bitbrush.kernels import cpu, proof
from bitbrush.network import wrap
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers import packing
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec

KINDS = ("linear", "conv")


def _built(kind: str, **case: object) -> tuple[QuantLayer, QuantLayer, Tensor, Tensor]:
    """(sim, packed, codes, input)."""
    full = {"kind": kind, "padding": (1, 1), **case}
    return (*builder.build(full, 3), builder.make_input(full, 3))


def _operation(layer: QuantLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)


# ---- input scale -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_input_scale_is_the_definition(kind: str) -> None:
    sim, packed, codes, x = _built(kind, input_scale=True)
    view = (1, -1, 1, 1) if kind == "conv" else (1, -1)
    factors = sim.input_scale.reshape(view if kind == "conv" else (-1,))
    assert torch.equal(sim.scaled_weight(), sim.float_weight / sim.input_scale.reshape(view))
    value = decode(encode(x * factors, sim.input.inverse_scale, sim.input.zero_point.float(), 255),
                   sim.input.scale, sim.input.zero_point.float())
    scale, zero = sim.scale_tables()
    want = _operation(sim, value, decode(codes, scale, zero), sim.bias)
    assert torch.equal(sim(x), want) and torch.equal(packed(x), want)
    plain = _operation(sim, x, sim.float_weight, sim.bias)
    fine = _built(kind, input_scale=True, weight_bits=8)[0]
    fine.input.enabled = False
    assert float((fine(x) - plain).std() / plain.std()) < 0.1  # the product is the same, but for rounding
    assert torch.equal(packed.weight, decode(codes, scale, zero) * sim.input_scale.reshape(view))
    assert torch.equal(sim.weight, sim.float_weight)  # the float face is untouched
    sim.face = "float"
    assert torch.equal(sim(x), plain)
    for layer in (sim, packed):
        layer.face = "sim" if layer is sim else "packed"
        layer.input.enabled = False
        assert torch.equal(layer.quantize_input(x.half()), (x.half().float() * factors).half())
        layer.input.enabled = True
        assert layer.quantize_input(x.bfloat16()).dtype == torch.bfloat16


def test_input_scale_in_kernels_and_proof() -> None:
    ran = 0
    for kind, bits, mode in itertools.product(KINDS, (3, "mixed sign"), ("timed", "tensor")):
        case = {"weight_bits": bits, "mode": mode, "segments": (40, 24), "rows": 33, "input_scale": True}
        _, packed, codes, x = _built(kind, **case)
        with packed.input._clock[0].at(480):
            result = proof.prove_layer(codes, packed, x)
            got = cpu.accumulators(packed, x)
            want = cpu.accumulators(_without_scale(packed), packed.prepare(x))
        assert result["ok"] and "skipped" not in result["kernels"]["cpu-int8"], result
        assert result["kernels"]["reference"]["identity"]["ok"]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        ran += 1
    assert ran == 8


def _without_scale(layer: QuantLayer) -> QuantLayer:
    other = copy.deepcopy(layer)
    other.input._clock = layer.input._clock
    other.set_input_scale(torch.ones_like(other.input_scale))
    return other


def test_input_scale_refusals() -> None:
    layer = QuantLinear.wrap(nn.Linear(8, 4), LayerSpec(weight=WeightSpec(), input_scale=True), None, 1)
    bad = (torch.ones(7), torch.zeros(8), -torch.ones(8), torch.full((8,), torch.inf), torch.full((8,), torch.nan))
    for table in bad:
        with pytest.raises(InternalError):
            layer.set_input_scale(table)
    plain = QuantLinear.wrap(nn.Linear(8, 4), LayerSpec(weight=WeightSpec()), None, 1)
    with pytest.raises(InternalError, match="no input scale"):
        plain.set_input_scale(torch.ones(8))
    builder.quantize_weight(layer, torch.Generator())
    layer.set_input_scale(layer.input_scale)
    assert layer.codes is not None
    layer.set_input_scale(torch.full((8,), 2.0))
    assert layer.codes is None  # they were those of another weight
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    with pytest.raises(InputError, match="grouped"):
        wrap.wrap(grouped, Plan(layers={"0": LayerSpec(input_scale=True)}))
    assert len(bad) == 5


def test_input_scale_with_a_float_weight_or_a_quantized_output() -> None:
    module, x = nn.Linear(16, 8), torch.randn(5, 16)
    factors = torch.rand(16) + 0.5
    spec = LayerSpec(activation=ActivationSpec(mode="dynamic"), input_scale=True)
    only = QuantLinear.wrap(module, spec, None, 1)
    only.set_input_scale(factors)
    only.face = "sim"
    want = F.linear(only.input(x * factors, 1), module.weight / factors, module.bias)
    assert torch.equal(only(x), want)
    only.pack()
    assert torch.equal(only(x), want)
    spec = LayerSpec(weight=WeightSpec(), activation=ActivationSpec(position="output"), input_scale=True)
    output = QuantLinear.wrap(module, spec, None, 1)
    codes = builder.quantize_weight(output, torch.Generator())
    output.input.set_scale(torch.tensor([[0.1]]), torch.tensor([[100.0]]))
    scale, zero = output.scale_tables()
    y = F.linear(x * output.input_scale, decode(codes, scale, zero), module.bias)
    assert torch.equal(output(x), output.input(y, 1))


# ---- trained biases --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_trained_bias(kind: str) -> None:
    sim, _, codes, x = _built(kind)
    teacher = sim.bias
    value, weight = sim.quantize_input(x), sim.decoded_weight()
    trained, trial = torch.randn(16), torch.randn(16).requires_grad_()
    sim.set_bias(trained)
    assert torch.equal(sim(x), _operation(sim, value, weight, trained))
    sim.trial_bias = trial
    y = sim(x)
    y.sum().backward()
    assert torch.equal(y.detach(), _operation(sim, value, weight, trial.detach()))
    assert trial.grad is not None and trial.grad.unique().numel() == 1 and sim.bias is teacher
    sim.trial_bias = None
    keys = set(sim.state_dict())
    assert not {"trained_bias", "trial_bias"} & keys and "bias" in keys
    sim.face = "float"
    assert torch.equal(sim(x), _operation(sim, x, sim.float_weight, teacher))
    sim.face = "sim"
    want = sim(x)
    sim.pack()
    assert torch.equal(sim(x), want) and torch.equal(sim.bias, trained) and sim.trained_bias is None
    assert isinstance(sim.bias, nn.Parameter) and set(sim.state_dict()) >= {"bias"}
    assert "trained_bias" not in sim._buffers and torch.equal(copy.deepcopy(sim)(x), want)
    result = proof.prove_layer(codes, sim, x)
    assert result["ok"] and "skipped" not in result["kernels"]["cpu-int8"]


def test_trained_bias_keeps_the_dtype_of_the_layer() -> None:
    sim, _, _, x = _built("linear", dtype=torch.bfloat16)
    sim.set_bias(torch.full((16,), 0.123456789))
    want = sim(x)
    assert sim.trained_bias.dtype == torch.bfloat16 and want.dtype == torch.bfloat16
    sim.trial_bias = torch.zeros(16)  # float32 while training
    assert sim(x).dtype == torch.bfloat16
    sim.pack()
    assert torch.equal(sim(x), want) and sim.bias.dtype == torch.bfloat16 and sim.trial_bias is None
    bare = _built("linear", bias=False)[0]
    for layer, bias in ((bare, torch.zeros(16)), (sim, torch.zeros(15))):
        with pytest.raises(InternalError, match="no bias"):
            layer.set_bias(bias)


# ---- trained zero-points ---------------------------------------------------------------------------------------------
def test_trial_tables_equal_stored_ones() -> None:
    """What trains with trial tables is what `set_scale` stores, bit for bit; only rows in force get gradients."""
    ran = 0
    for kind, segments, mode in itertools.product(KINDS, ((), (40, 24)), ("static", "timed", "timed_batch")):
        sim, _, _, x = _built(kind, segments=segments, mode=mode)
        quantizer = sim.input
        scale = (quantizer.scale * 0.7).requires_grad_()
        zero = (torch.rand(scale.shape) * 300 - 20).requires_grad_()
        quantizer.trial_scale, quantizer.trial_zero_point = scale, zero
        with quantizer._clock[0].at(builder.timestep({"mode": mode})):
            y = sim(x)
            y.square().mean().backward()
            quantizer.trial_scale = quantizer.trial_zero_point = None
            quantizer.set_scale(scale, torch.round(zero).clamp(0, 255))
            assert torch.equal(sim(x), y.detach())
        rows = (scale.grad != 0).any(1)
        assert int(rows.sum()) == {"static": 1, "timed": 1, "timed_batch": 2}[mode]
        assert not bool(zero.grad[~rows].any()) and not bool(zero.grad[(zero < -0.5) | (zero > 255.5)].any())
        ran += 1
    assert ran == 12


def test_a_trial_zero_point_alone() -> None:
    sim, _, _, x = _built("linear")
    sim.input.trial_zero_point = (sim.input.zero_point.float() + 0.3).requires_grad_()
    x.requires_grad_()
    y = sim(x * 100)  # far outside, so that the ends move with the zero-point
    y.sum().backward()
    assert sim.input.trial_zero_point.grad.abs().sum() > 0
    sim.input.trial_zero_point = None
    assert torch.equal(sim(x.detach() * 100), y.detach())


# ---- scales a channel ------------------------------------------------------------------------------------------------
def test_scales_a_channel() -> None:
    ran = 0
    for kind, mode, layout in itertools.product(KINDS, ("channel", "timed channel"), ("contiguous", "unbatched")):
        case = {"mode": mode, "layout": layout, "segments": (40, 24)}
        sim, packed, codes, x = _built(kind, **case)
        rows = 4 if "timed" in mode else 1
        assert sim.input.scale.shape == (rows, 64) and sim.input.segments == (1,) * 64
        row = 2 if rows == 4 else 0
        view = (-1, 1, 1) if kind == "conv" else (-1,)
        s, z = sim.input.scale[row].reshape(view), sim.input.zero_point[row].float().reshape(view)
        with sim.input._clock[0].at(480):
            value = sim.quantize_input(x)
            assert torch.equal(value, decode(encode(x, reciprocal(s), z, 255), s, z))
            assert torch.equal(packed(x), sim(x))
            result = proof.prove_layer(codes, packed, x)
        assert result["ok"] and "scale a channel" in result["kernels"]["cpu-int8"]["skipped"]
        assert result["activation_codes"]["total"] == x.numel()
        ran += 1
    assert ran == 8


def test_scales_a_channel_of_a_grouped_convolution_and_of_an_output() -> None:
    spec = LayerSpec(activation=ActivationSpec(granularity="channel"))
    grouped = QuantConv2d.wrap(nn.Conv2d(8, 4, 3, groups=2), spec, None, 1)
    assert grouped.input.scale.shape == (1, 8)
    spec = LayerSpec(activation=ActivationSpec(granularity="channel", position="output"))
    output = QuantLinear.wrap(nn.Linear(8, 6), spec, None, 1)
    assert output.input.scale.shape == (1, 6)
    for layer, x in ((grouped, torch.randn(2, 8, 5, 5)), (output, torch.randn(2, 8))):
        layer.face = "sim"
        assert torch.isfinite(layer(x)).all()


def test_operands_have_no_channels() -> None:
    model = tiny.text_unet()
    name = next(n for n, m in model.named_modules() if n.endswith("attn1"))
    spec = LayerSpec(activation=ActivationSpec(granularity="channel"))
    with pytest.raises(InputError, match="operands have no scales a channel"):
        wrap.wrap(model, Plan(layers={f"{name}:q": spec}))


# ---- symmetric 1-bit rows --------------------------------------------------------------------------------------------
def _binary(row_bits: tuple[int, ...], kind: str = "linear", binary: str = "symmetric") -> QuantLayer:
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=1), row_bits=row_bits, binary=binary))
    if kind == "linear":
        return QuantLinear.wrap(nn.Linear(40, 3), spec, None, 1)
    return QuantConv2d.wrap(nn.Conv2d(40, 3, 3), spec, None, 1)


def test_tops_and_binary_rows() -> None:
    mixed, conv = _binary((1, 3, 1)), _binary((1, 2, 4), "conv")
    assert mixed.top().tolist() == [[2], [7], [2]] and mixed.binary_rows().tolist() == [[True], [False], [True]]
    assert conv.top().flatten().tolist() == [2, 3, 15] and conv.top().shape == conv.binary_rows().shape == (3, 1, 1, 1)
    whole = _binary(())
    assert whole.top() == 2 and whole.binary_rows().all() and whole.binary_rows().shape == (3, 1)
    affine, none = _binary((1, 3, 1), binary="affine"), _binary((4, 3, 2))
    assert affine.binary_rows() is None and affine.top().tolist() == [[1], [7], [1]] and none.binary_rows() is None
    assert mixed.top() is mixed.top() and mixed.binary_rows() is mixed.binary_rows()  # kept: no copies to the device
    assert QuantLinear.wrap(nn.Linear(4, 4), LayerSpec(), None, 1).binary_rows() is None
    assert "top cpu" in copy.deepcopy(mixed)._row_tables and mixed.to("meta").top().device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_rows_hold_plus_and_minus_s(kind: str) -> None:
    layer = _binary((1, 2, 1), kind)
    codes = builder.quantize_weight(layer, torch.Generator())
    signs = torch.where(layer.float_weight >= 0, 1.0, -1.0)
    decoded, scale = layer.decoded_weight(), layer.scale_tables()[0]
    share = (torch.sign(decoded[[0, 2]]) == signs[[0, 2]]).float().mean()  # the builder rounds up or down at random
    assert sorted(codes[[0, 2]].unique().tolist()) == [0, 2] and share > 0.5
    assert torch.equal(decoded[[0, 2]].abs(), scale[[0, 2]].expand_as(decoded[[0, 2]]))
    layer.pack()
    assert torch.equal(layer.stored_codes(), codes) and torch.equal(layer.decoded_weight(), decoded)
    length = packing.row_length((40,), layer.kernel_hw)
    assert layer.codes1.shape == (2, packing.row_bytes(length, 1)) and layer.codes2.shape[0] == 1
    raw = packing.unpack(layer.codes1, 1, length).reshape(2, -1, 64)
    assert not raw[:, :, 40:].any()  # padding: bit 0, which is -s for whoever reads it as a weight
    (weights,) = cpu.int8_weights(layer)
    assert not weights.reshape(3, -1, 64)[:, :, 40:].any()  # the kernel does not
    assert set(weights.reshape(3, -1, 64)[[0, 2], :, :40].unique().tolist()) == {-1, 1}


def test_other_codes_in_symmetric_rows_are_refused() -> None:
    layer = _binary((1, 2, 1))
    codes = builder.quantize_weight(layer, torch.Generator())
    wrong = codes.clone()
    wrong[2, 5] = 1
    zero = layer.weight_zero_point.clone()
    zero[0] = 0
    for pair in ((wrong, layer.weight_zero_point), (codes, zero)):
        with pytest.raises(InternalError, match="symmetric 1-bit row"):
            layer.set_weight(pair[0], layer.weight_scale, pair[1])
    layer.set_weight(codes, layer.weight_scale, torch.ones(3, 1))
    layer.codes = wrong
    with pytest.raises(InternalError, match="symmetric 1-bit row"):
        layer.pack()


def test_proof_of_mixed_rows_with_symmetric_ones() -> None:
    ran = sums = 0
    for kind, segments, mode in itertools.product(KINDS, ((40, 24), (33, 1, 30), ()), ("static", "timed", "token")):
        if kind == "conv" and mode == "token":
            continue
        for bits in ("sign", "mixed sign"):
            case = {"weight_bits": bits, "segments": segments, "mode": mode, "rows": 16}
            sim, packed, codes, x = _built(kind, **case)
            with sim.input._clock[0].at(480):
                result = proof.prove_layer(codes, packed, x, (sim.weight_scale, sim.weight_zero_point))
                assert torch.equal(packed(x), sim(x))
            assert result["ok"], (case, result)
            sums += result["kernels"]["cpu-int8"]["accumulators"]["total"]
            ran += 1
    assert ran == 30 and sums > 30_000
