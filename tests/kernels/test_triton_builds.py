"""The Triton kernels are compiled for compute capability 9.0, without a GPU: they build, spill nothing, and use the
instructions they are written for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from assembler import needs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

POINTERS = {
    "y_ptr": "*bf16", "acc_ptr": "*bf16", "bias_ptr": "*fp32", "residual_ptr": "*bf16", "shared_ptr": "*bf16",
    "scale_a_ptr": "*fp32", "zero_a_ptr": "*u8", "times_ptr": "*i64", "scale_w_ptr": "*fp32", "sum_w_ptr": "*i32",
    "x_ptr": "*bf16", "factor_ptr": "*fp32", "inverse_ptr": "*fp32", "data": "*u8",
    "weight_ptr": "*bf16", "scale_ptr": "*bf16", "shift_ptr": "*bf16", "mean_ptr": "*fp32", "square_ptr": "*fp32",
    "next_times_ptr": "*i64",
    "zero_ptr": "*u8", "order_ptr": "*i16", "book_ptr": "*fp16", "a": "*i8", "w": "*i8",
}
ATTENTION = {
    "q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*i8", "k_sum_ptr": "*i32", "v_sum_ptr": "*i32", "inverse_p_ptr": "*fp32",
    "sums_ptr": "*bf16", "codes_ptr": "*bf16", "totals_ptr": "*bf16", "root": "fp32",
    **{f"{what}_{name}_ptr": kind for name in "qkvp" for what, kind in (
        ("scale", "*fp32"), ("zero", "*u8"), ("times", "*i64"))},
}
DIVISIBLE = {"m_count", "n_count", "length_a", "length_w", "stride_row", "length", "stride", "columns", "four", "two",
             "one", "count", "width", "length_y", "part_rows", "row_q", "row_k", "row_v", "row_turned"}


def _built(kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 3, registers: int | None = None,
           **pointers: Any) -> str:
    """PTX of a kernel, with the specialisations that its arguments have in use. A tuple of types: of pointers."""
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
        if isinstance(signature[name], tuple):
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(signature[name]))}
        elif signature[name].startswith("*") or name in DIVISIBLE - set(constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": False}
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx: str = built.asm["ptx"]
    return ptx


def _tiles(config: Any, early: bool = False) -> dict[str, Any]:
    return {"TMA": config.tma, "BIAS": True, "BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP": config.group,
            "EARLY": early, "THREADS": 32 * config.warps}


def _described(config: Any, right: str) -> dict[str, str]:
    if not config.tma:
        return {}
    return {"a": f"tensordesc<i8[{config.bm}, {config.bk}]>", "w": f"tensordesc<i8[{right}, {config.bk}]>"}


def _product(config: Any, spatial: int, widths: tuple[int, ...], taps: tuple[int, int], table: int,
             parts: int = 1, early: bool = False, residual: bool = False) -> str:
    from bitbrush.kernels import triton_int8_kernels as kernels

    several = len(widths) > 1
    constants = {
        "COUNT": len(widths), "WIDTH": 0 if several else widths[0], "KH": taps[0], "KW": taps[1],
        "TABLE": table, "PARTS": parts, "SPATIAL": spatial,
        "RESIDUAL": residual, "SHARED": residual, "KEEP": False, "SPLIT_K": config.split_k, **_tiles(config, early),
    }
    tables = {"scale_a_ptr": ("*fp32",) * parts, "zero_a_ptr": ("*u8",) * parts, "times_ptr": ("*i64",) * parts}
    return _built(kernels.product, constants, config.warps, config.stages, config.registers,
                  **_described(config, str(config.bn)), **(tables if parts > 1 else {}),
                  **({"width": ("i32",) * len(widths)} if several else {}))


def _gated(config: Any) -> str:
    import triton.language as tl

    from bitbrush.kernels import triton_int8_kernels as kernels

    constants = {"FACTOR": True, "TYPE": tl.bfloat16, **_tiles(config)}
    return _built(kernels.gated, constants, config.warps, config.stages, config.registers, y_ptr="*i8",
                  zero_ptr="*fp32", **_described(config, f"2, {config.bn // 2}"))


def _multiplies_in_flight(ptx: str, tma: bool) -> bool:
    """On the tensor cores, from copies in flight."""
    assert "wgmma.mma_async.sync.aligned" in ptx and ".s32.s8.s8" in ptx and "mma.sync.aligned.m" not in ptx
    return ("cp.async.bulk.tensor" in ptx) == tma and ("cp.async.c" in ptx) != tma


def test_products_multiply_on_the_tensor_cores_from_copies_in_flight() -> None:
    from bitbrush.kernels.triton_int8 import FLAT, GATHERED, JOINED, LINEAR, Config

    built = 0
    for config, spatial, widths, taps, table, parts in (
        (Config(), LINEAR, (0,), (1, 1), 0, 1), (Config(tma=False), LINEAR, (0,), (1, 1), 2, 1),
        (Config(64, 128, warps=4), LINEAR, (0,), (1, 1), 1, 1), (Config(bk=64), FLAT, (320,), (3, 3), 0, 1),
        (Config(bk=64, tma=False), GATHERED, (320,), (3, 3), 0, 1),
        (Config(128, 64, 64), LINEAR, (640, 320), (1, 1), 0, 1), (Config(), LINEAR, (0,), (1, 1), JOINED, 3),
        (Config(bk=32), FLAT, (96, 32) * 4, (3, 3), 0, 1), (Config(split_k=3), FLAT, (1280,), (3, 3), 0, 1),
        (Config(64, 64, 64, tma=False, warps=4, split_k=2), GATHERED, (320,), (3, 3), 0, 1),
    ):
        assert _multiplies_in_flight(_product(config, spatial, widths, taps, table, parts), config.tma)
        built += 1
    assert built == 10


def test_segments_go_through_one_loop() -> None:
    from bitbrush.kernels.triton_int8 import LINEAR, Config

    two, eight = (_product(Config(), LINEAR, (128,) * count, (1, 1), 0) for count in (2, 8))
    assert two.count("wgmma.mma_async") == eight.count("wgmma.mma_async") > 0


def test_gated_products_do_so_with_both_halves_of_the_weight() -> None:
    from bitbrush.kernels.triton_int8 import Config

    for config in (Config(), Config(64, 128, warps=4), Config(tma=False)):
        ptx = _gated(config)
        assert _multiplies_in_flight(ptx, config.tma)
        assert set(re.findall(r"wgmma\.mma_async\S+\.(m\d+n\d+)k", ptx)) == {"m64n128"}  # both in one instruction
        assert set(re.findall(r"st\.global\.(\S+?)\s", ptx)) <= {"v4.b32", "v2.b32"}


def test_a_kernel_that_is_launched_early_waits_before_it_reads_or_writes() -> None:
    from bitbrush.kernels import triton_activated_kernels
    from bitbrush.kernels.triton_int8 import LINEAR, Config

    early, usual = (_product(Config(), LINEAR, (0,), (1, 1), 0, early=on) for on in (True, False))
    size = {"CHANNELS": 640, "LENGTH": 640, "GATED": True, "TANH": False, "FACTOR": False, "COUNT": 1,
            "PLACES": ((0, 0, 640),), "CHUNKS": 128, "EARLY": True}  # fmt: skip
    geglu = _built(triton_activated_kernels.activated, size, out_ptr="*i8", places_ptr="*i32")
    assert "griddepcontrol" not in usual
    for text, least in ((early, 15), (geglu, 5)):
        wait, launch = (text.index(f"griddepcontrol.{what};") for what in ("wait", "launch_dependents"))
        touched = [found.start() for found in re.finditer(r"(ld|st)\.global|cp\.async\.bulk\.tensor", text)]
        assert len(touched) > least and wait < launch < min(touched)


def test_programs_fit_a_processor_as_they_are_meant_to(tmp_path: Path) -> None:
    from bitbrush.kernels.triton_int8 import FLAT, JOINED, LINEAR, Config

    for config in (Config(), Config(64, 128, warps=4, together=3)):
        for ptx, most in (
            (_product(config, LINEAR, (0,), (1, 1), 0), 0), (_product(config, FLAT, (640,), (3, 3), 0), 0),
            (_product(config, LINEAR, (0,), (1, 1), JOINED, 3), 0), (_gated(config), 96),
            (_product(config, LINEAR, (0,), (1, 1), 0, residual=True), 32),
        ):
            registers, spilled, _ = needs(ptx, tmp_path)
            blocks = -(-registers // 8) * 8 * 32 * config.warps  # given out eight a thread at a time
            assert spilled <= most and blocks * config.together <= 65536, (config, registers, spilled)


def test_what_belongs_to_columns_is_read_before_the_sums_and_once_a_thread() -> None:
    from bitbrush.kernels.triton_int8 import LINEAR, Config

    for config in (Config(), Config(64, 128, warps=4), Config(64, 32, warps=4)):
        ptx = _product(config, LINEAR, (0,), (1, 1), 0)
        before, after = ptx[: ptx.index("wgmma")], ptx[ptx.rindex("wgmma") :]
        assert len(re.findall(r"ld\.global", before)) == 4  # scale, sum, bias; the time
        assert len(re.findall(r"ld\.global", after)) == 2  # scale and zero-point of the activation


def _codebooks(bits: int, **constants: Any) -> str:
    """PTX of the decode of three codebooks as SDXL's layers of 1280 channels have them."""
    from bitbrush.kernels import gpu_decode, triton_decode_kernels

    usual = {"GROUPS": 160, "BOOKS": 3, "BITS": bits, "SIZE": 8, "WIDE": 8, "BG": gpu_decode.BLOCK, "EVEN": True,
             "EARLY": False, **constants}  # fmt: skip
    return _built(triton_decode_kernels.codebook, usual, gpu_decode.WARPS, scale_ptr="*fp16", out_ptr="*bf16")


def test_codewords_are_one_load_each_and_what_is_decoded_stays_in_its_thread(tmp_path: Path) -> None:
    for bits, even, early in ((8, True, False), (8, False, False), (6, True, False), (8, True, True)):
        ptx, case = _codebooks(bits, EVEN=even, EARLY=early), (bits, even, early)
        assert "shared" not in ptx and "bar.sync" not in ptx, case
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 6 and ptx.count("st.global.v4.b32") == 2, case
        assert len(re.findall(r"ld\.global\.b8", ptx)) == (6 if bits == 8 else 12), case
        registers, spilled, _ = needs(ptx, tmp_path)
        assert registers <= (32 if even else 40) and spilled == 0, (case, registers)
        if early:
            assert ptx.index("griddepcontrol.wait;") < ptx.index("st.global")


def test_one_pass_kernels_move_sixteen_bytes_at_a_time() -> None:
    from bitbrush.kernels import triton_decode_kernels, triton_encode_kernels, triton_int8_kernels

    flat = {"PLACES": ((0, 0, 640), (640, 0, 960)), "CHANNELS": 960, "LENGTH": 960, "TABLE": 0, "FACTOR": False,
            "COUNT": 2, "CHUNKS": 128, "EARLY": False}
    rows = {"ENDS": (1280,), "BITS": 4, "ORDER": False, "HALVED": False, "BK": 256}
    ptx = {
        "encode": _built(triton_encode_kernels.encode, {**flat, "SPATIAL": False}, out_ptr="*i8"),
        "frame": _built(triton_encode_kernels.encode, {**flat, "SPATIAL": True}, out_ptr="*i8"),
        "unpack": _built(triton_int8_kernels.unpack, {**rows, "REAL": ((1280, 1280),), "BR": 16}, out_ptr="*i8"),
        "affine": _built(triton_decode_kernels.affine, {**rows, "REAL": ((1280, 1280, 1280),), "STARTS": (0,), "BR": 8},
                         scale_ptr="*fp32", out_ptr="*bf16"),
        "codebook": _codebooks(8), "unpack at once": _unpacked_at_once(),
    }
    for name, text in ptx.items():
        assert set(re.findall(r"st\.global\.(\S+?)\s", text)) == {"v4.b32"}, name
        assert re.search(r"ld\.global\.(v4|v2)\.b32", text), name
        assert name not in ("encode", "frame") or not re.search(r"cvt\.r[nzmp]i", text), name  # see `centred`
    assert len(ptx) == 6


def _unpacked_at_once() -> str:
    """PTX of the weights of a DiT's block."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from bitbrush.kernels import triton_int8_kernels, triton_unpack

    shapes = (3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)
    launch = triton_unpack._cut_each(
        [torch.empty(shape, dtype=torch.int8, device="meta") for shape in shapes],
        [torch.empty((rows, length // 2), dtype=torch.uint8, device="meta") for rows, length in shapes], 4,
        [length for _, length in shapes], False)
    sizes = launch._options["SIZES"]
    assert [size[1] for size in sizes] == [1080, 1440, 2880, 4176] == [size[0] for size in sizes[1:]] + [4176]
    constants = {name: launch._options[name] for name in ("SIZES", "BITS", "HALVED", "BR", "BK")}
    attributes = {(0, p, j): [["tt.divisibility", 16]] for p in range(len(shapes)) for j in range(3)}
    signature = {"parts": (("*u8", "*u8", "*i8"),) * len(shapes), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(triton_int8_kernels.unpack_each, signature, constexprs=constants, attrs=attributes)
    ptx: str = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return ptx


GROUP = {"CHANNELS": 640, "SIZE": 20, "GROUPS": 32}


def _norms() -> dict[str, str]:
    """PTX of the kernels of norms as SDXL has them."""
    from bitbrush.kernels import triton_norm as cuts
    from bitbrush.kernels import triton_norm_kernels as kernels
    from bitbrush.kernels import triton_norm_small_kernels as small
    from bitbrush.kernels.triton_encode import segment_places

    rows = {"TOPS": (255, 255), "WEIGHT": True, "BIAS": True, "MODULATED": False, "FACTORS": (False, True),
            "COUNT": 1, "PLACES": (), "EARLY": False}
    block, columns = cuts.sum_block(32, 20)
    held = {"HIGH": 32, "WIDE": 32, "HEIGHT": 33, "PITCH": 33, "PAD": 1, "BELOW": 66, "VECTOR": 8, "LANES": 512,
            "TILES": 11, "OWN": 6, "SPLIT": 2, "SILU": True, "FACTOR": False, "EARLY": False}  # fmt: skip
    second = {"LENGTH": 640, "BLOCKS": ((0, 0, 0, 640, 640),), "SILU": True, "FACTOR": False, "SPATIAL": True,
              "CODES": True, "MOST": 64, "BG": 8, "BC": cuts.COLUMNS, "BR": cuts.ROWS, "EARLY": False}  # fmt: skip
    made = {}
    bare = {"WEIGHT": False, "BIAS": False, "MODULATED": True}  # of a DiT
    whole = {"COUNT": 8, "PLACES": segment_places((160,) * 8)}
    for name, channels, more in (("layer 640", 640, {}), ("layer 1280", 1280, {}), ("modulated", 1152, bare),
                                 ("listed", 1280, {"COUNT": 8}), ("segments", 1280, whole)):
        vector, warps, parts, height = cuts.row_cut(channels, several="COUNT" in more)
        size = {"CHANNELS": channels, "LENGTH": channels, "PARTS": parts, "BR": height, "INNER": 32 * warps * vector,
                "VECTOR": vector}  # fmt: skip
        made[name] = _built(kernels.layer_norm, {**size, **rows, **more}, out_ptr="*i8", bias_ptr="*bf16",
                            places_ptr="*i32", warps=warps, registers=cuts.REGISTERS)  # fmt: skip
    for paired in (False, True):
        made[f"group {paired}"] = _built(kernels.group_norm, {**GROUP, **second, "PAIRED": paired}, out_ptr="*i8",
                                         bias_ptr="*bf16", registers=cuts.APPLY_REGISTERS)  # fmt: skip
        made[f"sums {paired}"] = _built(kernels.group_sums, {
            **GROUP, "BLOCK": block, "BG": 8, "BC": columns, "LANES": cuts.SUM_WARPS * cuts.PIECE // columns,
            "DEEP": cuts.SUM_DEEP, "EVEN": True, "PAIRED": paired, "EARLY": False,
        }, warps=cuts.SUM_WARPS, registers=cuts.SUM_REGISTERS)  # fmt: skip
    return {**made, "held": _built(small.group_norm, {"CHANNELS": 1280, "SIZE": 40, **held}, out_ptr="*i8",
                                   bias_ptr="*bf16", warps=16)}  # fmt: skip


def test_norms_are_read_in_sixteen_bytes_and_use_no_slow_conversion(tmp_path: Path) -> None:
    """What rounds or converts one number at a time runs at an eighth of the rate of additions: two a step to bfloat16,
    none to integers. Rows of a LayerNorm are summed within a warp, so it has no shared memory. 640 channels are read by
    8 bytes, so that no thread is idle."""
    from bitbrush.kernels import triton_activated_kernels as kernels
    from bitbrush.kernels.triton_encode import segment_places

    size = {"CHANNELS": 640, "LENGTH": 640, "FACTOR": False, "COUNT": 1, "PLACES": ((0, 0, 640),), "CHUNKS": 128,
            "EARLY": False}  # fmt: skip
    ptx = _norms()
    listed, halves = {"COUNT": 8, "PLACES": ()}, {"COUNT": 2, "PLACES": segment_places((320, 320))}
    for name, gated, tanh, more in (("geglu", True, False, {}), ("gelu", False, False, {}),
                                    ("gelu tanh", False, True, {}), ("geglu listed", True, False, listed),
                                    ("geglu segments", True, False, halves)):
        ptx[name] = _built(kernels.activated, {**size, "GATED": gated, "TANH": tanh, **more}, out_ptr="*i8",
                           places_ptr="*i32")  # fmt: skip
    stores = {"layer 640": {"b32"}, "modulated": {"b32"}, "layer 1280": {"v2.b32"}, "held": {"v2.b32"},
              "listed": {"b32"}, "segments": {"b32"}, "sums True": {"b32"}, "sums False": {"b32"}}  # fmt: skip
    for name, text in ptx.items():
        narrow = name in ("layer 640", "modulated", "listed", "segments")
        assert f"ld.global.{'v2' if narrow else 'v4'}.b32" in text, name
        assert set(re.findall(r"st\.global\.(\S+?)\s", text)) == stores.get(name, {"v4.b32"}), name
        assert not re.search(r"cvt\.r[nzmp]i|cvt\.rn\.bf16\.f32", text), name
        assert ("cvt.rn.bf16x2.f32" in text) == (not name.startswith("sums")), name
        assert ".local" not in text and needs(text, tmp_path).spilled == 0, name
    assert "ld.shared" not in ptx["layer 1280"] + ptx["layer 640"] + ptx["modulated"] and len(ptx) == 15


def test_a_second_pass_that_is_launched_early_reads_sums_and_writes_when_they_are_there() -> None:
    """Before it waits it reads what was there when the sums began: the picture (four pixels of 16 channels a thread),
    weight, bias, the time."""
    ptx = _norms()
    assert "griddepcontrol.launch_dependents" in ptx["sums True"] and "griddepcontrol.wait" not in ptx["sums True"]
    assert not any("griddepcontrol" in ptx[name] for name in ("sums False", "group False", "held"))
    before, after = ptx["group True"].split("griddepcontrol.wait;")
    assert before.count("ld.global.v4.b32") >= 4 and "st.global" not in before and "ld.global.b64" in before
    assert len(re.findall(r"ld\.global\.b32", after)) >= 3 and "st.global" in after


def test_both_products_of_attention_are_on_the_tensor_cores() -> None:
    from bitbrush.kernels import triton_attention, triton_attention_kernels

    built = 0
    for size, heads, queries in ((64, 10, 4096), (40, 8, 4096), (80, 8, 1024), (160, 8, 64)):
        cut = triton_attention.cut(queries, size)
        constants = {"HEADS": heads, "SIZE": size, "KEEP": False, "BM": cut.bm, "BN": cut.bn,
                     "BD": triton_attention.width(size)}
        ptx = _built(triton_attention_kernels.attention, constants, cut.warps, cut.stages, **ATTENTION)
        blocks = cut.bm // 64 // (cut.warps // 4)
        each = blocks * (2 * constants["BD"] // 32 + cut.bn // 32)  # scores twice, then the product with v
        assert len(re.findall(r"wgmma\.mma_async\.sync\.aligned\S*\.s32\.s8\.s8", ptx)) >= each
        assert "mma.sync.aligned.m" not in ptx and "cp.async.c" in ptx and "ex2.approx" in ptx
        assert set(re.findall(r"st\.global\.(\S+?)\s", ptx)) <= {"v4.b32", "v2.b32"}
        built += 1
    laid = {"HEADS": 10, "SIZE": 64, "BN": 128, "BD": 64}
    ptx = _built(triton_attention_kernels.lay_out, laid, **ATTENTION, turned_ptr="*i8")
    assert "v4.b32" in re.findall(r"st\.global\.(\S+?)\s", ptx) and re.search(r"ld\.global\.v4\.b32", ptx)
    assert built == 4


@pytest.mark.parametrize("keys, size", [(77, 64), (1024, 64), (77, 80), (77, 160)])
def test_attention_before_an_encode_is_on_the_tensor_cores_and_writes_bytes(keys: int, size: int) -> None:
    from bitbrush.kernels import triton_attend_kernels as kernels
    from bitbrush.kernels.triton_attend import cut

    how = cut(keys)
    constants = {
        "HEADS": 20, "SIZE": size, "WIDE": max(16, 1 << (size - 1).bit_length()), "FACTOR": False,
        "ONE": keys <= how.keys, "EVEN": keys % how.keys == 0, "BM": how.queries, "BN": how.keys, "EARLY": False,
    }  # fmt: skip
    of_rows = {f"{what}_{name}": "i32" for what in ("sample", "head", "row") for name in "qkv"}
    ptx = _built(kernels.attend, constants, how.warps, how.stages, q_ptr="*bf16", k_ptr="*bf16", v_ptr="*bf16",
                 out_ptr="*i8", scale="fp32", **of_rows)
    assert len(re.findall(r"wgmma\.mma_async\S+bf16\.bf16", ptx)) >= 2 and "st.global" in ptx
    assert "cvt.rn.bf16x2.f32" in ptx and ".local" not in ptx


def test_round_trips_move_sixteen_bytes_at_a_time_and_divide_as_ieee_has_it() -> None:
    from bitbrush.kernels import triton_fake_kernels as kernels

    wide = {"out_ptr": "*bf16", "scale_ptr": "*fp32", "zero_ptr": "*fp32"}
    ptx = {
        "log2": _built(kernels.log2, {"EXEMPT": 0, "BLOCK": 2048}, x_ptr="*fp32", out_ptr="*bf16", delta_ptr="*fp32",
                       top="i32"),
        "start token": _built(kernels.log2, {"EXEMPT": 1, "BLOCK": 2048}, x_ptr="*fp32", out_ptr="*bf16",
                              delta_ptr="*fp32", top="i32"),
        "tokens": _built(kernels.tables, {"ALONG": True, "BR": 16, "BC": 128}, **wide),
        "pictures": _built(kernels.tables, {"ALONG": False, "BR": 4, "BC": 512}, **wide),
    }
    for name, text in ptx.items():
        assert "ld.global.v4.b32" in text and set(re.findall(r"st\.global\.(\S+?)\s", text)) == {"v4.b32"}, name
        assert "fma" not in text and "cvt.rn.bf16x2.f32" in text and ".local" not in text, name
        if name in ("log2", "start token"):
            assert "div.rn.f32" in text and "ftz" not in text, name
    assert len(ptx) == 4


def test_a_correction_is_not_contracted_and_spills_nothing(tmp_path: Path) -> None:
    from bitbrush.kernels import triton_correction_kernels as kernels

    given = {"x_ptr": "*bf16", "out_ptr": "*bf16", "state_ptr": "*fp32", "shift_ptr": "*fp32", "scale_ptr": "*fp32",
             "bias_ptr": "*fp32", "now_ptr": "*i64", "times_ptr": "*fp32"}  # fmt: skip
    ptx = [_built(kernel, {"BLOCK": 1024}, **given) for kernel in (kernels.shifted, kernels.corrected)]
    ptx.append(_built(kernels.turn, {"OFF": -2, "TIMES": 64, "BATCH": 4}, **given))
    for text in ptx:
        assert "fma." not in text and needs(text, tmp_path).spilled == 0
    assert all(re.search(r"st\.global\.v(2|4)\.b32", text) for text in ptx[:2]) and len(ptx) == 3


def test_mixtures_move_sixteen_bytes_at_a_time_and_are_not_contracted(tmp_path: Path) -> None:
    """NaN is kept, and the members go through one loop."""
    from bitbrush.kernels import triton_mixture_kernels as kernels

    types = dict.fromkeys(("share_ptr", "scale_ptr", "zero_ptr", "part_ptr"), "*fp32")
    types |= dict.fromkeys(("out_ptr", "grad_ptr", "dx_ptr"), "*bf16")
    flags, ran = {"DX": True, "SHARE": True, "SCALE": True, "ZERO": True}, 0
    for along, rows, columns in ((False, 1, 1024), (False, 64, 16), (True, 32, 32)):
        block = {"COUNT": 8, "ALONG": along, "BR": rows, "BC": columns}
        for kernel, more in ((kernels.forward, {}), (kernels.backward, flags)):
            ptx = _built(kernel, {**more, **block}, **types)
            assert "fma" not in ptx and "div.rn.f32" in ptx and ".local" not in ptx and "ftz" not in ptx
            assert ptx.count("max.NaN.f32") == ptx.count("min.NaN.f32") == 8
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
            assert rows > 1 or len(re.findall(r"ld\.global\.b32", ptx)) == 3, "a table each"
            registers, spilled, _ = needs(ptx, tmp_path)
            assert registers <= (144 if along else 80) and spilled <= 8  # Triton 3.6: none; 3.7: 4 bytes at 128
            ran += 1
    assert ran == 6
