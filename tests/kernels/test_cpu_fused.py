"""The fused int8 layer on the CPU: codes, integer sums and outputs on both kinds of processor, and seeded faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bitbrush.kernels import cpu, cpu_fused, cpu_layout, cpu_onednn, cpu_weights, proof, reference
from bitbrush.numbers import codec

pytestmark = pytest.mark.skipif(cpu_onednn.engine() == "absent", reason="torch has no onednn::qlinear_pointwise here")

LINEAR = {"kind": "linear", "segments": (33, 1, 30)}
CONV = {"kind": "conv", "padding": (1, 1), "segments": (40, 24)}
SQUARE = {"kind": "conv", "padding": (2, 1), "rows": 33}
EIGHT = {"kind": "conv", "weight_bits": 8, "weight_signed": True}
THREE = {"kind": "linear", "weight_bits": 3}
MIXED = {"kind": "linear", "weight_bits": "mixed", "rows": 33}
SIGNS = {"kind": "conv", "weight_bits": "sign", "segments": (33, 1, 30)}


def case_grid() -> list[dict[str, Any]]:
    """Bits by kinds, each with another way of scales, segments, rows and layout."""
    kinds: list[dict[str, Any]] = [
        {"kind": "linear"},
        {"kind": "conv", "kernel": (1, 1)},
        {"kind": "conv", "kernel": (3, 3), "padding": (1, 1)},
        {"kind": "conv", "kernel": (3, 3), "padding": (1, 1), "stride": (2, 2)},
        {"kind": "conv", "kernel": (5, 3), "padding": (2, 1), "dilation": (2, 1), "stride": (2, 1)},
        {"kind": "conv", "kernel": (3, 3), "padding": (2, 1), "dilation": (1, 2)},
    ]
    ways: list[dict[str, Any]] = [
        {}, {"segments": (40, 24), "layout": "channels_last"}, {"mode": "timed", "rows": 33, "bias": False},
        {"mode": "timed_batch", "segments": (33, 1, 30)}, {"mode": "tensor", "segments": (40, 24)},
        {"rows": 1, "dtype": torch.bfloat16, "layout": "unbatched"}, {"input_scale": True, "low_rank": 3},
    ]  # fmt: skip
    widths: list[dict[str, Any]] = [
        {"weight_bits": 4}, {"weight_bits": 8, "weight_signed": True}, {"weight_bits": 3}, {"weight_bits": 2},
        {"weight_bits": "mixed"}, {"weight_bits": "mixed sign"}, {"weight_bits": 7},
        {"weight_bits": 4, "activation_bits": 4},
    ]  # fmt: skip
    return [kind | way | width for i, kind in enumerate(kinds) for j, width in enumerate(widths)
            for way in (ways[(i + j) % len(ways)], ways[(i + 3 * j + 2) % len(ways)])]  # fmt: skip


def test_codes_sums_and_outputs_over_bits_kinds_and_scales(builder: ModuleType, processor: str) -> None:
    cases, values = case_grid(), 0
    for i, case in enumerate(cases):
        _, packed, codes = builder.build(case, i)
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            assert cpu.why_not(packed, "cpu") is None and cpu_fused.takes(packed.input, x)
            result = proof.prove_layer(codes, packed, x)
            ours = result["kernels"]["cpu-int8"]
            assert result["ok"] and ours["ok"] and 0 < ours["max_error_over_bound"] <= 1, (case, result)
            values += ours["accumulators"]["equal"] + ours["largest_sums"]["equal"]
    assert len(cases) == 96 and values > 100_000


@pytest.mark.parametrize("fill", [(255, 255), (255, 0), (0, 255), (0, 0)])
def test_outputs_of_the_largest_sums(builder: ModuleType, processor: str, fill: tuple[int, int]) -> None:
    """What the fused product itself answers, not its sums block by block: 1,152 products of the largest codes."""
    code, weight = fill
    layer, _, _ = builder.build({**EIGHT, "padding": (1, 1), "rows": 33})
    wide = torch.full(layer.float_weight.shape, weight, dtype=torch.uint8)
    layer.set_weight(wide, torch.full((33, 1), 2.0**-9), torch.full((33, 1), 128))
    layer.input.set_scale(torch.full((1, 1), 0.25), torch.full((1, 1), 255 - code))
    layer.bias = None
    layer.pack()
    x = torch.full((2, 64, 9, 8), 1000.0 if code else -1000.0)
    want = reference.run(layer.double(), x.double()).float()
    assert torch.equal(cpu.run(layer.float(), x), want)
    assert float(want.abs().max()) == 255 * (128 - min(weight, 1)) * 576 * 2.0**-11


def test_the_plain_form_gives_the_same_codes_and_sums(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, case in enumerate(case_grid()[::5]):
        _, packed, _ = builder.build(case, i)
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            fused = cpu.input_codes(packed, x), *cpu.accumulators(packed, x)
            with monkeypatch.context() as patch:
                patch.setattr(cpu_fused, "_engine", lambda: "absent")
                plain = cpu.input_codes(packed, x), *cpu.accumulators(packed, x)
        assert len(fused) == len(plain) and all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True)), case


def test_columns_are_the_rows_transposed(builder: ModuleType) -> None:
    seen = 0
    for bits in (1, 2, 3, 4, 5, 6, 7, "mixed", "sign", "mixed sign"):
        for extra in ({}, {"segments": (33, 1, 30)}, {"kind": "conv", "rows": 33}):
            _, packed, _ = builder.build({"weight_bits": bits, **extra}, seen)
            shape, got = cpu_fused.shape_of(packed), cpu_weights.columns(*cpu_weights.tensors(packed))
            for column, row in zip(got, cpu_weights.int8_weights(packed), strict=True):
                assert column.dtype == torch.int8 and column.is_contiguous() and torch.equal(column.t(), row)
                assert int(column.int().abs().max()) <= shape.extremes[1]
                seen += 1
    assert seen == 50


def test_sums_are_exact_on_both_paths(processor: str) -> None:
    """Against int64, where int32 sums pass what float32 holds, and at sizes that leave remainders."""
    g, ran = torch.Generator().manual_seed(1), 0
    for m, k, n in ((1, 1, 1), (3, 5, 7), (17, 33, 9), (2, 1025, 3), (5, 4097, 4), (64, 96, 130)):
        for code, weight in ((255, 128), (255, 64), (255, 15), (127, 128), (15, 7)):
            rows = torch.randint(0, code + 1, (m, k), generator=g).to(torch.uint8)
            columns = torch.randint(-weight, min(weight, 127) + 1, (k, n), generator=g).to(torch.int8)
            for fill in (False, True):
                if fill:
                    rows, columns = torch.full_like(rows, code), torch.full_like(columns, -weight)
                got = cpu_onednn.sums(rows, 3, columns, code, weight)
                assert got.dtype == torch.int32 and torch.equal(got.long(), (rows.long() - 3) @ columns.long())
                ran += 1
    assert ran == 60


def test_halves_never_saturate_a_pair() -> None:
    weights = torch.arange(-128, 128).to(torch.int8)[:, None]
    low, high = cpu_onednn.halves(weights).long().chunk(2)
    assert torch.equal(low + high, weights.long())
    assert 2 * 255 * int(torch.cat([low, high]).abs().max()) < 2**15
    assert 2 * cpu_onednn.SEVEN_BITS * 128 < 2**15 <= 2 * 255 * (cpu_onednn.HALF + 1)


def test_which_products_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(255, 128), (255, 65), (255, 64), (255, 15), (127, 128), (128, 127)]
    for engine, want in (("exact", [False] * 6), ("saturates", [True, True, False, False, False, True])):
        monkeypatch.setattr(cpu_onednn, "engine", lambda engine=engine: engine)
        assert [cpu_onednn.must_split(*pair) for pair in pairs] == want


def test_without_the_operation_the_plain_form_runs(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed, _ = builder.build(CONV)
    x = builder.make_input(CONV)
    want = cpu.run(packed, x)
    monkeypatch.setattr(cpu_fused, "_engine", lambda: "absent")
    monkeypatch.setattr(cpu_onednn, "product", None)
    assert torch.allclose(cpu.run(packed, x), want, rtol=1e-6, atol=1e-6)


def test_scales_a_token_take_the_plain_form(builder: ModuleType, processor: str) -> None:
    for case in ({"kind": "linear", "mode": "token"}, {**THREE, "kind": "conv", "kernel": (1, 1), "mode": "token"}):
        _, packed, codes = builder.build(case)
        x = builder.make_input(case)
        assert not cpu_fused.takes(packed.input, x)
        assert proof.prove_layer(codes, packed, x)["kernels"]["cpu-int8"]["ok"]


def test_pictures_leave_in_channels_last_order(builder: ModuleType) -> None:
    for layout in ("contiguous", "channels_last", "strided"):
        _, packed, _ = builder.build({"kind": "conv", "padding": (1, 1)})
        y = cpu.run(packed, builder.make_input({"kind": "conv", "layout": layout}))
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_compiled_gives_the_same_bits(builder: ModuleType) -> None:
    for case in (CONV | {"mode": "timed"}, LINEAR, CONV | {"mode": "timed_batch", "low_rank": 3, "rows": 33}):
        _, packed, _ = builder.build(case)
        packed.kernel, x = "cpu-int8", builder.make_input(case)
        torch._dynamo.reset()
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            want, got = packed(x), compiled(x)
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_the_operation_is_well_formed(builder: ModuleType) -> None:
    odd = {"kind": "conv", "kernel": (5, 3), "stride": (2, 1), "dilation": (2, 1), "padding": (2, 1)}
    for case in (CONV, LINEAR, odd):
        _, packed, _ = builder.build(case)
        x = builder.make_input(case)
        args = cpu_fused.arguments(packed, packed.prepare(x), x.dtype, cpu_fused.shape_of(packed))
        torch.library.opcheck(torch.ops.bitbrush.cpu_int8.default, args)


SATURATING = """
import os
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
import builder, torch
from bitbrush.kernels import cpu_float, cpu_onednn, proof
found, wanted = cpu_onednn.engine(), cpu_float.wanted
for way in (wanted, lambda shape, x, n: False):
    cpu_float.wanted = way
    for case in CASES:
        _, packed, codes = builder.build(case, 3)
        with packed.input._clock[0].at(builder.timestep(case)):
            result = proof.prove_layer(codes, packed, builder.make_input(case, 3))
        assert result["ok"] and "skipped" not in result["kernels"]["cpu-int8"], (case, result)
print(found)
"""


def test_a_processor_without_dot_products() -> None:
    """oneDNN restricted to AVX2, in a process of its own: its products saturate, layers are exact all the same, in
    float32 and in halves."""
    cases = [CONV, EIGHT, {**EIGHT, "mode": "token", "kernel": (1, 1)}, {"kind": "linear", "weight_bits": 7}]
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("ONEDNN_MAX_CPU_ISA is for x86 processors")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SATURATING.replace("CASES", repr(cases))],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0 and done.stdout.strip() == "saturates", done.stderr[-2000:]


# ---- seeded faults ---------------------------------------------------------------------------------------------------
Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: list[tuple[str, dict[str, Any], Patch]] = []


def fault(name: str, case: dict[str, Any]) -> Callable[[Patch], None]:
    """Register a mistake: a patch in force while the layer runs and is proven."""
    return lambda patch: FAULTS.append((name, case, patch))


@fault("activation zero-point one too large", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_onednn._product
    patch.setattr(cpu_onednn, "_product", lambda rows, zero, *rest: real(rows, zero + 1, *rest))


@fault("nibbles swapped", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_weights._unpacked_plane
    patch.setattr(cpu_weights, "_unpacked_plane", lambda d, width: real(d >> 4 | d << 4, width))


@fault("half-up rounding", {**LINEAR, "ties": True})
def _(patch: pytest.MonkeyPatch) -> None:
    def encode(x: Tensor, inverse: Tensor, zero: int, top: int, less: int) -> Tensor:
        codes = (torch.floor(x.float() * inverse + 0.5) + zero).clamp(0, top) - less
        return (codes % 256).to(torch.uint8)

    patch.setattr(cpu_layout, "encode_shifted", encode)


@fault("encoded in half precision", LINEAR)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_layout.encode_shifted
    patch.setattr(cpu_layout, "encode_shifted", lambda x, *rest: real(x.half(), *rest))


@fault("codes not clamped to the top", {**LINEAR, "activation_bits": 4})
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_layout.encode_shifted
    patch.setattr(cpu_layout, "encode_shifted", lambda x, inverse, zero, top, less: real(x, inverse, zero, 255, less))


@fault("an odd number added before rounding, as torch adds zero-points", {**EIGHT, "kind": "linear", "ties": True})
def _(patch: pytest.MonkeyPatch) -> None:
    def quantized(x: Tensor, inverse: Tensor, zero: int, less: int) -> Tensor:
        code = torch.round(x.float() * inverse + 1) - 1 + zero
        return ((code.clamp(0, 255) - less) % 256).to(torch.uint8)

    patch.setattr(codec, "_quantized", quantized)


@fault("pictures padded with another code than the zero-point", SQUARE)
def _(patch: pytest.MonkeyPatch) -> None:
    real = torch.full
    patch.setattr(torch, "full", lambda size, value, **kw: real(size, (value + 249) % 256, **kw))


@fault("segments exchanged", {**SQUARE, "segments": (32, 32)})
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_fused, "columns", lambda *args: cpu_weights.columns(*args)[::-1])


@fault("high plane not shifted into place", THREE)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_weights.packing, "planes", lambda bits: (2, 1))
    patch.setattr(cpu_weights, "_unpacked", lambda stored, *_: cpu_weights._unpacked_plane(stored[:, :16], 2))


@fault("row order not undone", MIXED)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_weights.columns
    patch.setattr(cpu_fused, "columns", lambda stored, bits, halved, _, *rest: real(stored, bits, halved, None, *rest))


@fault("codes of symmetric 1-bit rows not doubled", SIGNS)
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_weights._unpacked
    patch.setattr(cpu_weights, "_unpacked", lambda stored, bits, halved, length: real(stored, bits, 0, length))


@fault("the first sample's scales for all", {**CONV, "mode": "timed_batch"})
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_fused.tables
    patch.setattr(cpu_fused, "tables", lambda layer, x: (*(t[:1] for t in real(layer, x)[:3]), None))


@fault("bias added once a segment", {**LINEAR, "segments": (40, 24)})
def _(patch: pytest.MonkeyPatch) -> None:
    real = cpu_onednn.product

    def product(rows: Tensor, zero: int, columns: Tensor, scale: float, weight_scale: Tensor, *rest: Any) -> Tensor:
        y = real(rows, zero, columns, scale, weight_scale, *rest)
        return y if rest[0] is None else y + 2 * rest[0]

    patch.setattr(cpu_onednn, "product", product)


@fault("halves of weights that do not add up", EIGHT)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_onednn, "must_split", lambda *_: True)
    patch.setattr(cpu_onednn, "halves", lambda columns: torch.cat([columns >> 1, columns >> 1]))


@fault("pairs of products saturate at 16 bits", {**EIGHT, "activation_signed": True})
def _(patch: pytest.MonkeyPatch) -> None:
    def product(rows: Tensor, zero: int, columns: Tensor, scale: float, weight_scale: Tensor, bias: Any) -> Tensor:
        w = columns.int().t()
        pairs = (rows.int()[:, None, :] * w[None]).unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        y = (pairs.sum(-1) - zero * w.sum(1)).float() * (scale * weight_scale)
        return y if bias is None else y + bias

    patch.setattr(cpu_onednn, "_product", product)


def _proof(builder: ModuleType, case: dict[str, Any], patch: Patch | None) -> dict[str, Any]:
    """What the proof says of the fused form, with a mistake in force."""
    sim, packed, codes = builder.build(case, 5)
    x = builder.make_input(case, 5)
    if case.get("ties"):  # scales that are powers of two, so that the input holds exact ties
        packed.input.set_scale(torch.exp2(torch.round(torch.log2(packed.input.scale))))
        x.view(-1)[:200] = (torch.arange(200) % 16 - 7.5) * packed.input.scale[0, 0]
    with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad(), pytest.MonkeyPatch.context() as context:
        context.setattr(cpu_onednn, "few", lambda m, k, n: False)
        if patch is not None:
            patch(context)
        result = proof.prove_layer(codes, packed, x, (sim.weight_scale, sim.weight_zero_point))
    ours: dict[str, Any] = result["kernels"]["cpu-int8"]
    assert cpu_fused.takes(packed.input, x) and "skipped" not in ours
    return ours


def test_every_seeded_fault_is_caught(builder: ModuleType) -> None:
    for name, case, patch in FAULTS:
        assert _proof(builder, case, None)["ok"], name
        assert not _proof(builder, case, patch)["ok"], f"not caught: {name}"
    assert len(FAULTS) == 15
