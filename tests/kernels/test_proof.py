"""The proof holds for honest layers and fails for every seeded fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.errors import InternalError
from bitbrush.kernels import cpu, cpu_fused, proof, reference, tuning
from bitbrush.network import activation, layers
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer, QuantLinear
from bitbrush.numbers import packing
from bitbrush.numbers.grid import ActivationSpec, LayerSpec, WeightSpec

CONV = {"kind": "conv", "segments": (40, 24), "padding": (2, 1), "kernel": (5, 3), "stride": (2, 1), "mode": "timed"}
SQUARE = {"kind": "conv", "kernel": (3, 3), "padding": (1, 1), "segments": (33, 1, 30)}
LINEAR = {"kind": "linear"}
THREE = {"kind": "linear", "weight_bits": 3, "segments": (40, 24)}
MIXED = {"kind": "linear", "weight_bits": "mixed", "rows": 33}
SIGNS = {"kind": "linear", "weight_bits": "mixed sign", "rows": 33, "segments": (40, 24)}
SCALED = {"kind": "conv", "input_scale": True, "kernel": (3, 3), "padding": (1, 1), "segments": (40, 24)}
EIGHT = {"kind": "linear", "weight_bits": 8, "weight_signed": True}


def test_pairwise_grid_is_proven(builder: ModuleType) -> None:
    cases, ran, accumulators, probed = [*builder.pairwise(21), *builder.pairwise(22)], 0, 0, 0
    for i, case in enumerate(cases):
        _, packed, codes = builder.build(case, i)
        with packed.input._clock[0].at(builder.timestep(case)):
            result = proof.prove_layer(codes, packed, builder.make_input(case, i))
        assert result["ok"], (case, result)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert result["codes"]["equal"] == result["codes"]["total"] == codes.numel()
        ours = result["kernels"]["cpu-int8"]
        accumulators += ours["accumulators"]["total"] if "skipped" not in ours else 0
        probed += "skipped" not in result["kernels"]["reference"]["identity"]
        ran += 1
    assert ran == len(cases) >= 90 and accumulators > 100_000 and probed >= 40


def test_weight_only_activation_only_and_output_position(builder: ModuleType) -> None:
    specs = [
        LayerSpec(weight=WeightSpec()), LayerSpec(activation=ActivationSpec(mode="dynamic")),
        LayerSpec(weight=WeightSpec(), activation=ActivationSpec(position="output")),
    ]
    for spec in specs:
        layer = QuantLinear.wrap(nn.Linear(64, 16), spec, None, 1)
        codes = builder.quantize_weight(layer, torch.Generator().manual_seed(0)) if spec.weight else None
        builder.set_ranges(layer, torch.Generator().manual_seed(1))
        layer.pack()
        result = proof.prove_layer(codes, layer, torch.randn(5, 64))
        assert result["ok"] and "skipped" in result["kernels"]["cpu-int8"], result
        assert result["kernels"]["reference"]["identity"]["ok"]


def test_a_proof_measures_no_cuts(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each would be compiled and timed for every shape: ten seconds a layer."""
    seen: list[bool] = []

    def spied(layer: QuantLayer, x: Tensor) -> Tensor:
        seen.append(tuning._UNTIMED.get())
        return reference.run(layer, x)

    monkeypatch.setitem(kernels.PROVEN, "reference", spied)
    _, packed, codes = builder.build(LINEAR, 0)
    assert proof.prove_layer(codes, packed, builder.make_input(LINEAR, 0))["ok"]
    assert seen and all(seen) and not tuning._UNTIMED.get()


def test_the_layer_is_as_before_a_proof(builder: ModuleType) -> None:
    _, packed, codes = builder.build(LINEAR)
    before, bias = {k: v.clone() for k, v in packed.state_dict().items()}, packed.bias
    proof.prove_layer(codes, packed, builder.make_input(LINEAR))
    assert packed.bias is bias and packed.input.enabled
    after = packed.state_dict()
    assert sorted(after) == sorted(before) and all(torch.equal(v, after[k]) for k, v in before.items())


def test_unpacked_layers_are_refused(builder: ModuleType) -> None:
    sim, _, codes = builder.build(LINEAR)
    with pytest.raises(InternalError):
        proof.prove_layer(codes, sim, builder.make_input(LINEAR))


def test_half_ulp_and_bound_ratio() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = torch.tensor([1.0, 1.5, 2.0, 1000.0, 3e-5, 1e-8], dtype=dtype)
        gap = (torch.nextafter(y, torch.tensor(torch.inf, dtype=dtype)).double() - y.double()) / 2
        assert torch.equal(proof.half_ulp(y, dtype), gap)
    exact = torch.tensor([1.0, 70_000.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    assert proof.bound_ratio(torch.tensor([1.0, torch.inf], dtype=torch.float16), exact, zero) == 0
    assert proof.bound_ratio(torch.tensor([torch.inf, torch.inf]), exact, zero) == torch.inf
    assert proof.bound_ratio(torch.tensor([torch.nan, 7e4]), exact, zero) == torch.inf
    assert proof.bound_ratio(torch.zeros(3), exact, zero) == torch.inf


# ---- seeded faults ---------------------------------------------------------------------------------------------------
Patch = Callable[[pytest.MonkeyPatch], None]
Damage = Callable[[QuantLayer], None]


@dataclass
class Fault:
    """A mistake: a patch of the code in force while packing and running, or damage to the packed tensors."""

    name: str
    case: dict[str, Any]
    patch: Patch | None = None
    damage: Damage | None = None
    while_packing: Patch | None = None
    found: list[str] = field(default_factory=list)


FAULTS: list[Fault] = []


def fault(name: str, case: dict[str, Any], kind: str = "patch") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a fault; ``kind`` is one of patch, while_packing, damage."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        FAULTS.append(Fault(name, case, **{kind: function}))
        return function

    return register


def _replace_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(layer: QuantLayer) -> None:
        owner: nn.Module = layer
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, change(getattr(owner, last)))

    return damage


@fault("kernel subtracts a weight zero-point that is one too large", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu.int8_weights
    patch.setattr(cpu, "int8_weights", lambda layer: [w - 1 for w in real(layer)])


@fault("reference decodes with a zero-point that is one too large", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = layers.decode
    patch.setattr(layers, "decode", lambda code, scale, zero: real(code, scale, zero + 1))


@fault("nibbles swapped when packing", LINEAR, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.pack_plane
    patch.setattr(packing, "pack_plane", lambda codes, width: (real(codes, width) >> 4) | (real(codes, width) << 4))


@fault("nibbles swapped when unpacking", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.unpack_plane
    patch.setattr(packing, "unpack_plane", lambda data, width, n: real((data >> 4) | (data << 4), width, n))


@fault("activations rounded half up", {**LINEAR, "activation_bits": 4, "ties": True})
def _(patch: pytest.MonkeyPatch) -> None:
    def encode(x: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        return (torch.floor(x.float() * inverse + 0.5) + zero).clamp(0, top)

    patch.setattr(activation, "encode", encode)


@fault("activations encoded in half precision", {**LINEAR, "dtype": torch.float16})
def _(patch: pytest.MonkeyPatch) -> None:
    def encode(x: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        return (torch.round((x.half() * inverse.half()).float()) + zero).clamp(0, top)

    patch.setattr(activation, "encode", encode)


@fault("planes in the wrong order", THREE, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.planes
    patch.setattr(packing, "planes", lambda bits: real(bits)[::-1])


@fault("high plane not shifted into place", THREE)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "unpack", lambda data, bits, length: packing.unpack_plane(data, 2, length))


@fault("segments stored in the wrong order", THREE, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.weight_rows
    patch.setattr(packing, "weight_rows", lambda codes, segments, fill: real(codes, segments, fill).roll(32, 1))


@fault("segments exchanged in the kernel", {**SQUARE, "segments": (32, 32)})
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu.int8_weights
    patch.setattr(cpu, "int8_weights", lambda layer: real(layer)[::-1])


@fault("pictures padded with code 0 instead of the zero-point", SQUARE)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu._patches
    patch.setattr(cpu, "_patches", lambda layer, part, zero, n: real(layer, part, torch.zeros_like(zero), n))


@fault("activation zero-point not corrected", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu, "correction", lambda zero, weight: torch.zeros((), dtype=torch.int32))


@fault("activation zero-point corrected with the wrong sign", CONV)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu.correction
    patch.setattr(cpu, "correction", lambda zero, weight: -real(zero, weight))


@fault("row sums in eight bits", EIGHT)
def _(patch: pytest.MonkeyPatch) -> None:
    def correction(zero: Tensor, weight: Tensor) -> Tensor:
        return (128 - zero).to(torch.int32) * weight.sum(1, dtype=torch.int8).to(torch.int32)

    patch.setattr(cpu, "correction", correction)


@fault("the row of an earlier timestep", CONV)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ActivationQuantizer, "rows", lambda self: torch.tensor([0]))


@fault("one row for a batch of mixed timesteps", {**CONV, "mode": "timed_batch"})
def _(patch: pytest.MonkeyPatch) -> None:
    real = ActivationQuantizer.rows
    patch.setattr(ActivationQuantizer, "rows", lambda self: real(self)[:1])


@fault("row order not undone", MIXED, "damage")
def _(layer: QuantLayer) -> None:
    layer.row_order.copy_(torch.arange(33))


@fault("weight scales stored in half precision", LINEAR, "damage")
def _(layer: QuantLayer) -> None:
    layer.weight_scale = layer.weight_scale.half()


@fault("weight scales went through half precision", LINEAR, "damage")
def _(layer: QuantLayer) -> None:
    layer.weight_scale = layer.weight_scale.half().float()


@fault("kernel multiplies with half-precision scales", {**LINEAR, "dtype": torch.float32})
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu._by_segment
    patch.setattr(cpu, "_by_segment", lambda layer, table: [t.half().float() for t in real(layer, table)])


@fault("accumulator of 16 bits", SQUARE)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu.int8_product
    patch.setattr(cpu, "int8_product", lambda a, w: real(a, w).to(torch.int16).to(torch.int32))


@fault("pairs of products saturate at 16 bits", {**EIGHT, "activation_signed": True})
def _(patch: pytest.MonkeyPatch) -> None:
    def product(a: Tensor, w: Tensor) -> Tensor:
        pairs = (a.int()[:, None, :] + 128) * w.int()[None]  # unsigned by signed, as without dot-product instructions
        sums = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1)
        return (sums - 128 * w.sum(1, dtype=torch.int32)).to(torch.int32)

    patch.setattr(cpu, "int8_product", product)


@fault("kernel height and width exchanged", SQUARE)
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.rows_to_weight
    patch.setattr(packing, "rows_to_weight", lambda rows, segments, kernel: real(rows, segments, kernel).mT)


@fault("rows laid out channels first", SQUARE, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.weight_rows
    patch.setattr(packing, "weight_rows", lambda codes, segments, fill: real(codes.mT, segments, fill))


@fault("last byte of a row dropped", {"kind": "linear", "segments": (32, 32)}, "damage")
def _(layer: QuantLayer) -> None:
    layer.codes4[:, -1] = 0


@fault("one bit of one byte flipped", SQUARE, "damage")
def _(layer: QuantLayer) -> None:
    layer.codes4[3, 7] ^= 16


@fault("channels padded with 0 instead of the zero-point", SQUARE, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.weight_rows
    patch.setattr(packing, "weight_rows", lambda codes, segments, fill: real(codes, segments, torch.zeros_like(fill)))


@fault("first segment's activation scale used for all", CONV)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu._by_segment
    patch.setattr(cpu, "_by_segment", lambda layer, table: [real(layer, table)[0]] * len(layer.segments))


@fault("reciprocals of other scales", LINEAR, "damage")
def _(layer: QuantLayer) -> None:
    layer.input.inverse_scale = layer.input.inverse_scale * 1.01


@fault("8-bit codes read as signed", EIGHT)
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.unpack
    patch.setattr(packing, "unpack", lambda data, bits, length: real(data, bits, length) ^ 128)


@fault("bias forgotten", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = reference.run

    def without(layer: QuantLayer, x: Tensor) -> Tensor:
        return real(layer, x) if layer.bias is None else real(layer, x) - layer.bias

    patch.setitem(proof.kernels.KERNELS, "reference", without)


@fault("one weight zero-point changed", SQUARE, "damage")
def _(layer: QuantLayer) -> None:
    layer.weight_zero_point[2, 1] ^= 1


@fault("padding of symmetric 1-bit rows counted", SIGNS)
def _(patch: pytest.MonkeyPatch) -> None:
    real = packing.padded
    patch.setattr(cpu, "int8_weights", lambda layer: _all_channels(layer, real(layer.segments)))


def _all_channels(layer: QuantLayer, wide: tuple[int, ...]) -> list[Tensor]:
    """The int8 weights as the bytes have them, padding included."""
    parts = [packing.unpack_class(getattr(layer, f"codes{b}"), b, layer.row_length, layer.spec.weight)
             for b in layer.spec.weight.bit_classes()]
    rows = torch.empty_like(torch.cat(parts)).index_copy_(0, layer.row_order.long(), torch.cat(parts))
    pairs = zip(rows.to(torch.int16).split(list(wide), 1), layer.weight_zero_point.T, strict=True)
    return [(block - zero[:, None]).to(torch.int8) for block, zero in pairs]


@fault("codes of symmetric 1-bit rows not doubled", SIGNS)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "unpack_class", lambda data, bits, length, spec: packing.unpack(data, bits, length))


@fault("symmetric 1-bit rows packed without halving", SIGNS, "while_packing")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "pack_class", lambda codes, bits, spec: packing.pack(codes & ((1 << bits) - 1), bits))


@fault("input scale forgotten by the kernel", SCALED)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers.QuantLayer, "prepare", lambda self, x: x)


@fault("input scale applied in half precision", {**SCALED, "dtype": torch.float16})
def _(patch: pytest.MonkeyPatch) -> None:
    real = layers.QuantLayer.prepare
    patch.setattr(layers.QuantLayer, "prepare", lambda self, x: real(self, x).half().float())


@fault("input scale applied twice", SCALED)
def _(patch: pytest.MonkeyPatch) -> None:
    real = layers.QuantLayer.prepare
    patch.setattr(layers.QuantLayer, "prepare", lambda self, x: real(self, real(self, x)))


@fault("input scale is not positive", SCALED, "damage")
def _(layer: QuantLayer) -> None:
    layer.input_scale[5] *= -1


def detectors(builder: ModuleType, one: Fault, patch: pytest.MonkeyPatch) -> list[str]:
    """Which checks fail on a fault: parts of the proof, and the equality of sim and packed.

    The int8 kernel runs in its plain form; faults of the fused one are in test_cpu_fused.py.
    """
    patch.setattr(cpu_fused, "_engine", lambda: "absent")
    x = builder.make_input(one.case, 5)
    if one.while_packing is not None:
        with pytest.MonkeyPatch.context() as packing_patch:
            one.while_packing(packing_patch)
            sim, packed, codes = builder.build(one.case, 5)
    else:
        sim, packed, codes = builder.build(one.case, 5)
    if one.case.get("ties"):  # scales that are powers of two, so that the input holds exact ties
        for layer in (sim, packed):
            layer.input.set_scale(torch.exp2(torch.round(torch.log2(layer.input.scale))))
        x.view(-1)[:200] = (torch.arange(200) % 16 - 7.5) * sim.input.scale[0, 0]
    with packed.input._clock[0].at(builder.timestep(one.case)):
        want = sim(x)
        if one.damage is not None:
            one.damage(packed)
        if one.patch is not None:
            one.patch(patch)
        found = [] if torch.equal(packed(x), want) else ["sim != packed"]
        result = proof.prove_layer(codes, packed, x, (sim.weight_scale, sim.weight_zero_point))
    parts = ("codes", "bytes", "tables", "activation_codes")
    found += [part for part in parts if not (result[part] or {}).get("ok", True)]
    for name, kernel in result["kernels"].items():
        found += [f"{name}.{key}" for key, v in kernel.items() if isinstance(v, dict) and not v.get("ok", True)]
        if "skipped" not in kernel and not (kernel["max_error_over_bound"] or 0) <= 1:
            found.append(f"{name}.bound")
    assert result["ok"] == (not [f for f in found if f != "sim != packed"])
    return found


def test_without_fault_nothing_is_found(builder: ModuleType) -> None:
    for case in {str(f.case): f.case for f in FAULTS}.values():
        with pytest.MonkeyPatch.context() as patch:
            assert detectors(builder, Fault("none", case), patch) == []


def test_all_seeded_faults_are_caught(builder: ModuleType) -> None:
    caught = 0
    for one in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            one.found = detectors(builder, one, patch)
        assert one.found, f"not caught: {one.name}"
        caught += 1
    assert caught == len(FAULTS) == 39
