"""The Triton kernels are compiled for compute capability 9.0, without a GPU: they build, spill nothing, and use the
instructions they are written for."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

POINTERS = {
    "y_ptr": "*bf16", "acc_ptr": "*bf16", "bias_ptr": "*fp32", "residual_ptr": "*bf16", "shared_ptr": "*bf16",
    "scale_a_ptr": "*fp32", "zero_a_ptr": "*u8", "times_ptr": "*i64", "scale_w_ptr": "*fp32", "sum_w_ptr": "*i32",
    "x_ptr": "*bf16", "factor_ptr": "*fp32", "inverse_ptr": "*fp32", "tops_ptr": "*fp32", "data": "*u8",
    "weight_ptr": "*bf16", "mean_ptr": "*fp32", "square_ptr": "*fp32",
    "zero_ptr": "*u8", "order_ptr": "*i16", "book_ptr": "*fp16", "a": "*i8", "w": "*i8",
}
DIVISIBLE = {"m_count", "n_count", "length_a", "length_w", "stride_row", "length", "stride", "columns", "four", "two",
             "one", "count"}


def _built(kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 3, **pointers: str) -> str:
    """PTX of a kernel, with the specialisations that its arguments have in use."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    known, attributes = {**POINTERS, **pointers}, {}
    signature: dict[str, Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in known:
            signature[name] = known[name]
        elif name == "tables":  # of two consumers
            signature[name] = (("*fp32", "*u8", "*i64", "*fp32"),) * 2
            attributes.update({(i, p, j): [["tt.divisibility", 16]] for p in range(2) for j in range(4)})
            continue
        else:
            signature[name] = "fp32" if name in ("top", "eps") else "i32"
        if signature[name].startswith("*") or name in DIVISIBLE - set(constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx: str = built.asm["ptx"]
    return ptx


def _product(config: Any, spatial: int, widths: tuple[int, ...], taps: tuple[int, int], table: int) -> str:
    from bitbrush.kernels import triton_int8_kernels as kernels

    constants = {
        "WIDTHS": widths, "KH": taps[0], "KW": taps[1], "TABLE": table, "SPATIAL": spatial, "TMA": config.tma,
        "BIAS": True, "RESIDUAL": False, "SHARED": False, "KEEP": False, "BM": config.bm, "BN": config.bn,
        "BK": config.bk, "GROUP": config.group, "PROGRAMS": 132 if config.persistent else 0,
    }
    described = {"a": f"tensordesc<i8[{config.bm}, {config.bk}]>", "w": f"tensordesc<i8[{config.bn}, {config.bk}]>"}
    return _built(kernels.product, constants, config.warps, config.stages, **(described if config.tma else {}))


def test_products_multiply_on_the_tensor_cores_from_copies_in_flight() -> None:
    from bitbrush.kernels.triton_int8 import FLAT, GATHERED, LINEAR, Config

    built = 0
    for config, spatial, widths, taps, table in (
        (Config(), LINEAR, (1280,), (1, 1), 0), (Config(tma=False), LINEAR, (1280,), (1, 1), 2),
        (Config(persistent=True), LINEAR, (640,), (1, 1), 1), (Config(bk=64), FLAT, (320,), (3, 3), 0),
        (Config(bk=64, tma=False), GATHERED, (320,), (3, 3), 0), (Config(128, 64, 64), LINEAR, (640, 320), (1, 1), 0),
    ):
        ptx = _product(config, spatial, widths, taps, table)
        assert "wgmma.mma_async.sync.aligned" in ptx and ".s32.s8.s8" in ptx and "mma.sync.aligned.m" not in ptx
        assert ("cp.async.bulk.tensor" in ptx) == config.tma and ("cp.async.c" in ptx) != config.tma
        built += 1
    assert built == 6


def test_one_pass_kernels_move_sixteen_bytes_at_a_time() -> None:
    from bitbrush.kernels import triton_decode_kernels, triton_encode_kernels, triton_int8_kernels

    flat = {"PLACES": ((0, 0, 640), (640, 0, 960)), "CHANNELS": 960, "LENGTH": 960, "TABLE": 0, "FACTOR": False,
            "TOPS": False, "CHUNKS": 128}
    rows = {"ENDS": (1280,), "BITS": 4, "ORDER": False, "HALVED": False, "BK": 256}
    ptx = {
        "encode": _built(triton_encode_kernels.encode, {**flat, "SPATIAL": False}, out_ptr="*i8"),
        "frame": _built(triton_encode_kernels.encode, {**flat, "SPATIAL": True}, out_ptr="*i8"),
        "unpack": _built(triton_int8_kernels.unpack, {**rows, "REAL": ((1280, 1280),), "BR": 16}, out_ptr="*i8"),
        "affine": _built(triton_decode_kernels.affine, {**rows, "REAL": ((1280, 1280, 1280),), "STARTS": (0,), "BR": 8},
                         scale_ptr="*fp32", out_ptr="*bf16"),
        "codebook": _built(triton_decode_kernels.codebook, {"BOOKS": 3, "BITS": 8, "SIZE": 8, "WIDE": 8, "BG": 256},
                           scale_ptr="*fp16", out_ptr="*bf16"),
    }
    for name, text in ptx.items():
        assert set(re.findall(r"st\.global\.(\S+?)\s", text)) == {"v4.b32"}, name
        assert re.search(r"ld\.global\.(v4|v2)\.b32", text), name
        assert name not in ("encode", "frame") or not re.search(r"cvt\.r[nzmp]i", text), name  # see `centred`
    assert len(ptx) == 5


def test_norms_are_read_in_sixteen_bytes_and_use_no_slow_conversion() -> None:
    """What rounds or converts one number at a time runs at an eighth of the rate of additions: two a step to bfloat16,
    none to integers. Rows of a LayerNorm are summed within a warp, so it has no shared memory."""
    from bitbrush.kernels import triton_norm_kernels as kernels
    from bitbrush.kernels.triton_norm import ROWS, SUM_WARPS

    size = {"CHANNELS": 640, "LENGTH": 640}
    group = {"CHANNELS": 640, "SIZE": 20, "GROUPS": 32}
    rows = {"TOPS": (255, 255), "WEIGHT": True, "BIAS": True, "FACTORS": (False, True), "VECTOR": 8}
    ptx = {
        "layer": _built(kernels.layer_norm, {**size, **rows, "PARTS": 4, "BR": 2, "INNER": 256}, out_ptr="*i8",
                        bias_ptr="*bf16", warps=1),
        "group": _built(kernels.group_norm, {
            **group, "LENGTH": 640, "BLOCKS": ((0, 0, 0, 640, 640),), "SILU": True, "FACTOR": False, "SPATIAL": True,
            "MOST": 64, "BG": 8, "BC": 64, "BR": ROWS}, out_ptr="*i8", bias_ptr="*bf16"),
        "geglu": _built(kernels.geglu, {**size, "FACTOR": False, "CHUNKS": 128}, out_ptr="*i8"),
        "sums": _built(kernels.group_sums, {
            **group, "BLOCK": 8, "BG": 8, "BC": 256, "LANES": 8, "DEEP": 8, "EVEN": True}, warps=SUM_WARPS),
    }  # fmt: skip
    for name, text in ptx.items():
        assert "ld.global.v4.b32" in text, name
        stored = {"layer": {"v2.b32"}, "sums": {"b32"}}.get(name, {"v4.b32"})
        assert set(re.findall(r"st\.global\.(\S+?)\s", text)) == stored, name
        assert not re.search(r"cvt\.r[nzmp]i|cvt\.rn\.bf16\.f32", text), name
        assert ("cvt.rn.bf16x2.f32" in text) == (name != "sums"), name
        assert ".local" not in text, name
    assert "ld.shared" not in ptx["layer"] and len(ptx) == 4
