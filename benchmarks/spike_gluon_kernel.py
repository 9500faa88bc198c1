"""The int8 product in Gluon (`spike_gluon_product.py` runs it): warp-specialised, copies and products in flight.

A program is one producer warp and one or two consumer warpgroups. The producer copies [rows, 128] codes and
[BN1 + BN2, 128] weights into a ring of STAGES slots; a slot is full when its bytes are there, and empty when every
consumer's products of it are done, which a consumer knows one step later. Two consumers share a tile (c2), or have
tiles of their own so that the epilogue of one runs while the other multiplies (pp). Programs are persistent. BN1 + BN2
because instructions know powers of two: 128 + 32 makes 128 tiles of 2048 x 1280, one a processor of 132.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


# ---- device code -----------------------------------------------------------------------------------------------------
@gluon.jit
def _place(tile, tiles_m, tiles_n, group):
    wide = group * tiles_n
    first = (tile // wide) * group
    high = gl.minimum(tiles_m - first, group)
    return first + (tile % wide) % high, (tile % wide) // high


@gluon.jit
def _before(at, STAGES: gl.constexpr):
    """The slot before. Not `before = at` ahead of `at += 1`: a name that is another's value before a loop, and takes
    the other's value in it, is for Triton (3.6, 3.7) no variable of the loop, and stays what it was."""
    return gl.where(at == 0, STAGES, at) - 1


@gluon.jit
def _producer(
    a, w1, w2, a_ring, w1_ring, w2_ring, full, empty, trace_ptr, tiles_m, tiles_n, steps, group,
    STAGES: gl.constexpr, COPIES: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr,
    TRACE: gl.constexpr,
):
    SIZE: gl.constexpr = (COPIES * BMC + BN1 + BN2) * 128
    at = 0
    phase = 1
    done = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _place(tile, tiles_m, tiles_n, group)
        m0 = row * (COPIES * BMC)
        n0 = column * (BN1 + BN2)
        for step in range(steps):
            ready = full.index(at)
            mbarrier.wait(empty.index(at), phase)
            mbarrier.expect(ready, SIZE)
            for c in gl.static_range(COPIES):
                tma.async_copy_global_to_shared(a, [m0 + c * BMC, step * 128], ready, a_ring.index(at * COPIES + c))
            tma.async_copy_global_to_shared(w1, [n0, step * 128], ready, w1_ring.index(at))
            if BN2 > 0:
                tma.async_copy_global_to_shared(w2, [n0 + BN1, step * 128], ready, w2_ring.index(at))
            if TRACE:
                done += 1
                gl.store(trace_ptr + gl.program_id(0) * 4, done)
            at += 1
            if at == STAGES:
                at = 0
                phase ^= 1


@gluon.constexpr_function
def _sums_layout(columns):
    """Triton knows no integer instruction of 256 columns: two of 128 then, of one operation."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(columns, 128) if columns > 0 else 8, 32])


@gluon.constexpr_function
def _table_layout(columns):
    return gl.BlockedLayout([max(columns // 128, 1)], [32], [4], [0])


@gluon.jit
def _asked(ptr, n, n_count):
    return gl.load(ptr + n, mask=n < n_count, other=0)


@gluon.jit
def _finish(
    acc, tables, scale, y, y_ptr, residual_ptr, acc_ptr, y_stage, m0, n0, m_count, n_count,
    FROM: gl.constexpr, BMC: gl.constexpr, BN: gl.constexpr, CH: gl.constexpr, BUFFERS: gl.constexpr,
    PENDING: gl.constexpr, RESIDUAL: gl.constexpr, KEEP: gl.constexpr,
):
    """Columns FROM .. FROM + BN of a tile, CH at a time."""
    if BN > CH:
        HALF: gl.constexpr = BN // 2
        left, right = gl.split(gl.permute(gl.reshape(acc, (BMC, 2, HALF)), (0, 2, 1)))
        _finish(left, tables, scale, y, y_ptr, residual_ptr, acc_ptr, y_stage, m0, n0, m_count, n_count, FROM, BMC,
                HALF, CH, BUFFERS, PENDING, RESIDUAL, KEEP)
        _finish(right, tables, scale, y, y_ptr, residual_ptr, acc_ptr, y_stage, m0, n0, m_count, n_count, FROM + HALF,
                BMC, HALF, CH, BUFFERS, PENDING, RESIDUAL, KEEP)
    else:
        L: gl.constexpr = _sums_layout(CH)
        C: gl.constexpr = gl.SliceLayout(0, L)
        own = gl.convert_layout(acc, L, assert_trivial=True)
        sums, scales, bias = tables
        own += sums.slice(FROM, CH).load(C)[None, :]
        value = (own.to(gl.float32) * scale) * scales.slice(FROM, CH).load(C)[None, :]
        value += bias.slice(FROM, CH).load(C)[None, :]
        if RESIDUAL or KEEP:
            m = m0 + gl.arange(0, BMC, layout=gl.SliceLayout(1, L))
            n = n0 + FROM + gl.arange(0, CH, layout=C)
            inside = (m < m_count)[:, None] & (n < n_count)[None, :]
            where = m.to(gl.int64)[:, None] * n_count + n[None, :]
            if RESIDUAL:
                value += gl.load(residual_ptr + where, mask=inside, other=0.0).to(gl.float32)
            if KEEP:
                gl.store(acc_ptr + where, own, mask=inside)
        own_stage = y_stage.index((FROM // CH) % BUFFERS)
        tma.store_wait(PENDING)
        own_stage.store(value.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [m0, n0 + FROM], own_stage)


@gluon.jit
def _added(acc, left, right, BMC: gl.constexpr, BN: gl.constexpr):
    """In place of a multiplication, on the ladder's first step: the sums of the rows of both that were copied."""
    L: gl.constexpr = _sums_layout(128)
    rows = gl.sum(left.load(L).to(gl.int32), 1)
    columns = gl.sum(right.load(_sums_layout(BN)).to(gl.int32), 0)
    return acc + (rows[:, None] + columns[None, :])


@gluon.jit
def _of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, first, n_count, centre, BN: gl.constexpr):
    """(corrections, scales, biases) of BN columns."""
    n = first + gl.arange(0, BN, layout=_table_layout(BN))
    return _asked(sum_w_ptr, n, n_count) * centre, _asked(scale_w_ptr, n, n_count), _asked(bias_ptr, n, n_count)


@gluon.jit
def _consumer(
    a_ring, w1_ring, w2_ring, full, empty, turn, tables1, tables2, y1, y2, stage1, stage2, y_ptr, acc_ptr, bias_ptr,
    residual_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, trace_ptr, tiles_m, tiles_n, m_count,
    n_count, steps, group, PART: gl.constexpr, STAGES: gl.constexpr, NC: gl.constexpr, PINGPONG: gl.constexpr,
    BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr, CH1: gl.constexpr, CH2: gl.constexpr,
    BUFFERS: gl.constexpr, RESIDUAL: gl.constexpr, KEEP: gl.constexpr, MULTIPLY: gl.constexpr, TRACE: gl.constexpr,
):
    COPIES: gl.constexpr = 1 if PINGPONG else NC
    INDEX: gl.constexpr = 0 if PINGPONG else PART
    time = gl.load(times_ptr)
    scale = gl.load(scale_a_ptr + time)
    centre = 128 - gl.load(zero_a_ptr + time).to(gl.int32)
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    position = 0
    turns = 0
    if PINGPONG:
        first += PART * stride
        position = PART * steps
        stride *= NC
    for tile in range(first, tiles_m * tiles_n, stride):
        row, column = _place(tile, tiles_m, tiles_n, group)
        m0 = row * (COPIES * BMC) + INDEX * BMC
        n0 = column * (BN1 + BN2)
        # what belongs to the columns: asked for now, so that nothing waits for memory after the sums
        sums1, scales1, bias1 = _of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0, n_count, centre, BN1)
        acc1 = gl.zeros([BMC, BN1], gl.int32, layout=_sums_layout(BN1))
        if BN2 > 0:
            sums2, scales2, bias2 = _of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0 + BN1, n_count, centre, BN2)
            acc2 = gl.zeros([BMC, BN2], gl.int32, layout=_sums_layout(BN2))
        at = position % STAGES
        phase = (position // STAGES) & 1
        if PINGPONG:  # a slot's parity says which use of it is full only to who has seen the use before
            mbarrier.wait(turn.index(PART), turns ^ (1 - PART))
            turns ^= 1
        for step in range(steps):
            mbarrier.wait(full.index(at), phase)
            left = a_ring.index(at * COPIES + INDEX)
            right = w1_ring.index(at).permute((1, 0))
            if not MULTIPLY:
                acc1 = _added(acc1, left, right, BMC, BN1)
            elif BN2 > 0:
                flying1 = warpgroup_mma(left, right, acc1, is_async=True)
                flying2 = warpgroup_mma(left, w2_ring.index(at).permute((1, 0)), acc2, is_async=True)
                acc1, acc2 = warpgroup_mma_wait(num_outstanding=2, deps=(flying1, flying2))
            else:
                flying1 = warpgroup_mma(left, right, acc1, is_async=True)
                acc1 = warpgroup_mma_wait(num_outstanding=1, deps=(flying1,))
            mbarrier.arrive(empty.index(_before(at, STAGES)), pred=step > 0)
            if TRACE:
                gl.store(trace_ptr + gl.program_id(0) * 4 + 1 + PART, position + step + 1)
            at += 1
            if at == STAGES:
                at = 0
                phase ^= 1
        if PINGPONG:
            mbarrier.arrive(turn.index(1 - PART))
        if BN2 > 0:
            acc1, acc2 = warpgroup_mma_wait(num_outstanding=0, deps=(acc1, acc2))
        else:
            acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc1,))
        mbarrier.arrive(empty.index(_before(at, STAGES)))
        position += steps * (NC if PINGPONG else 1)
        tables1[0].store(sums1)
        tables1[1].store(scales1)
        tables1[2].store(bias1)
        if BN2 > 0:
            tables2[0].store(sums2)
            tables2[1].store(scales2)
            tables2[2].store(bias2)
        _finish(acc1, tables1, scale, y1, y_ptr, residual_ptr, acc_ptr, stage1, m0, n0, m_count, n_count, 0, BMC, BN1,
                CH1, BUFFERS, BUFFERS - 1, RESIDUAL, KEEP)
        if BN2 > 0:
            _finish(acc2, tables2, scale, y2, y_ptr, residual_ptr, acc_ptr, stage2, m0, n0 + BN1, m_count, n_count, 0,
                    BMC, BN2, CH2, 1, 0 if CH2 == CH1 and BUFFERS == 1 else BN1 // CH1, RESIDUAL, KEEP)
    tma.store_wait(0)


@gluon.jit
def _own(BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr, CH1: gl.constexpr, CH2: gl.constexpr,
         BUFFERS: gl.constexpr, y1, y2):
    """Shared memory of one consumer: tables of its columns, and what it stores."""
    S: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums1 = gl.allocate_shared_memory(gl.int32, [BN1], S)
    scales1 = gl.allocate_shared_memory(gl.float32, [BN1], S)
    bias1 = gl.allocate_shared_memory(gl.float32, [BN1], S)
    stage1 = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BMC, CH1], y1.layout)
    if BN2 > 0:
        sums2 = gl.allocate_shared_memory(gl.int32, [BN2], S)
        scales2 = gl.allocate_shared_memory(gl.float32, [BN2], S)
        bias2 = gl.allocate_shared_memory(gl.float32, [BN2], S)
        if CH2 == CH1 and BUFFERS == 1:
            stage2 = stage1
        else:
            stage2 = gl.allocate_shared_memory(gl.bfloat16, [1, BMC, CH2], y2.layout)
        return (sums1, scales1, bias1), (sums2, scales2, bias2), stage1, stage2
    else:
        return (sums1, scales1, bias1), (sums1, scales1, bias1), stage1, stage1


@gluon.jit(do_not_specialize=["m_count", "n_count", "width", "group"])
def product(
    a, w1, w2, y1, y2, y_ptr, acc_ptr, bias_ptr, residual_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, trace_ptr, m_count, n_count, width, group,
    STAGES: gl.constexpr, NC: gl.constexpr, PINGPONG: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr,
    BN2: gl.constexpr, CH1: gl.constexpr, CH2: gl.constexpr, BUFFERS: gl.constexpr, RESIDUAL: gl.constexpr,
    KEEP: gl.constexpr, MULTIPLY: gl.constexpr, TRACE: gl.constexpr, LESS: gl.constexpr, MORE: gl.constexpr,
):
    COPIES: gl.constexpr = 1 if PINGPONG else NC
    tiles_m = gl.cdiv(m_count, COPIES * BMC)
    tiles_n = gl.cdiv(n_count, BN1 + BN2)
    steps = gl.cdiv(width, 128)
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES * COPIES, BMC, 128], a.layout)
    w1_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN1, 128], w1.layout)
    w2_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN2, 128], w2.layout) if BN2 > 0 else w1_ring
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=COPIES)
    if PINGPONG:
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(2):
            mbarrier.init(turn.index(s), count=1)
    else:
        turn = full
    fence_async_shared()
    # no names for the tuples of arguments: what has a name is no constant any more
    t01, t02, s01, s02 = _own(BMC, BN1, BN2, CH1, CH2, BUFFERS, y1, y2)
    if NC == 1:
        gl.warp_specialize([
            (_consumer, (
                a_ring, w1_ring, w2_ring, full, empty, turn, t01, t02, y1, y2, s01, s02, y_ptr, acc_ptr, bias_ptr,
                residual_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, trace_ptr, tiles_m, tiles_n,
                m_count, n_count, steps, group, 0, STAGES, NC, PINGPONG, BMC, BN1, BN2, CH1, CH2, BUFFERS, RESIDUAL,
                KEEP, MULTIPLY, TRACE)),
            (_producer, (a, w1, w2, a_ring, w1_ring, w2_ring, full, empty, trace_ptr, tiles_m, tiles_n, steps, group,
                         STAGES, COPIES, BMC, BN1, BN2, TRACE)),
        ], [1], [LESS])  # fmt: skip
    else:
        t11, t12, s11, s12 = _own(BMC, BN1, BN2, CH1, CH2, BUFFERS, y1, y2)
        gl.warp_specialize([
            (_consumer, (
                a_ring, w1_ring, w2_ring, full, empty, turn, t01, t02, y1, y2, s01, s02, y_ptr, acc_ptr, bias_ptr,
                residual_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, trace_ptr, tiles_m, tiles_n,
                m_count, n_count, steps, group, 0, STAGES, NC, PINGPONG, BMC, BN1, BN2, CH1, CH2, BUFFERS, RESIDUAL,
                KEEP, MULTIPLY, TRACE)),
            (_consumer, (
                a_ring, w1_ring, w2_ring, full, empty, turn, t11, t12, y1, y2, s11, s12, y_ptr, acc_ptr, bias_ptr,
                residual_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, trace_ptr, tiles_m, tiles_n,
                m_count, n_count, steps, group, 1, STAGES, NC, PINGPONG, BMC, BN1, BN2, CH1, CH2, BUFFERS, RESIDUAL,
                KEEP, MULTIPLY, TRACE)),
            (_producer, (a, w1, w2, a_ring, w1_ring, w2_ring, full, empty, trace_ptr, tiles_m, tiles_n, steps, group,
                         STAGES, COPIES, BMC, BN1, BN2, TRACE)),
        ], [4, 1], [MORE, LESS])  # fmt: skip


# ---- variants, and what the compiler makes of them -------------------------------------------------------------------
@dataclass(frozen=True)
class Variant:
    """bmc: rows of a consumer. less, more: registers of a producer's thread, of a second consumer's; the first takes
    what is left. buffers: of what a consumer stores, a divisor of its chunks of `chunk` columns. together: programs a
    processor; more than one need a limit for the registers of all threads (cap)."""

    name: str
    nc: int
    pingpong: bool
    bmc: int
    bn1: int
    bn2: int = 0
    stages: int = 4
    buffers: int = 1
    chunk: int = 64
    together: int = 1
    cap: int | None = None
    less: int = 24
    more: int = 240
    group: int = 8

    @property
    def bm(self) -> int:
        """Rows of a tile."""
        return self.bmc * (1 if self.pingpong else self.nc)

    @property
    def bn(self) -> int:
        """Columns of a tile."""
        return self.bn1 + self.bn2

    def constants(self, residual: bool = False, keep: bool = False, multiply: bool = True, trace: bool = False) -> dict:
        """What the kernel is compiled for."""
        ch1 = min(self.bn1, self.chunk)
        return {"STAGES": self.stages, "NC": self.nc, "PINGPONG": self.pingpong, "BMC": self.bmc, "BN1": self.bn1,
                "BN2": self.bn2, "CH1": ch1, "CH2": min(self.bn2, self.chunk) or ch1, "BUFFERS": self.buffers,
                "RESIDUAL": residual, "KEEP": keep, "MULTIPLY": multiply, "TRACE": trace, "LESS": self.less,
                "MORE": self.more}  # fmt: skip


VARIANTS = (
    Variant("c2_128x128", 2, False, 64, 128, stages=5, buffers=2),
    Variant("c2_128x256", 2, False, 64, 256, stages=4, chunk=32, buffers=2),
    Variant("c2_128x160", 2, False, 64, 128, 32, stages=5, buffers=2),
    Variant("c2_128x192", 2, False, 64, 128, 64, stages=4, buffers=2),
    Variant("c2_256x128", 2, False, 128, 128, stages=3, buffers=2),
    Variant("c2_256x160", 2, False, 128, 128, 32, stages=3, buffers=2, chunk=32),
    Variant("c2_256x192", 2, False, 128, 128, 64, stages=3),
    Variant("pp_128x128", 2, True, 128, 128, stages=4, buffers=2),
    Variant("pp_128x160", 2, True, 128, 128, 32, stages=4),
    Variant("pp_128x192", 2, True, 128, 128, 64, stages=4),
    Variant("pp_64x256", 2, True, 64, 256, stages=4, buffers=2),
    Variant("c1_128x128_x2", 1, False, 128, 128, stages=3, together=2, cap=128, chunk=32),
    Variant("c1_64x128_x2", 1, False, 64, 128, stages=4, together=2, cap=128),
    Variant("c1_64x256", 1, False, 64, 256, stages=5, cap=128),
)
"""Three consumers (192 x 256) are gone: 160 registers a thread, and the assembler of Triton 3.6 spills."""


def shared(bits: int, width: int) -> Any:
    """Layout in shared memory of rows of `width` bytes, and of the descriptor that copies them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width, 128), element_bitwidth=bits, rank=2)


def options(variant: Variant) -> dict:
    """What the compiler is told beside the constants."""
    return {"num_warps": 4, "maxnreg": variant.cap, "enable_fp_fusion": False}


def build(variant: Variant, **what: bool) -> Any:
    """The kernel compiled for compute capability 9.0, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compiled
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = variant.constants(**what)
    kinds = {
        "a": f"tensordesc<i8[{variant.bmc}, 128],{shared(8, 128)!r}>",
        "w1": f"tensordesc<i8[{variant.bn1}, 128],{shared(8, 128)!r}>",
        "w2": f"tensordesc<i8[{variant.bn2 or variant.bn1}, 128],{shared(8, 128)!r}>",
        "y1": f"tensordesc<bf16[{variant.bmc}, {constants['CH1']}],{shared(16, 2 * constants['CH1'])!r}>",
        "y2": f"tensordesc<bf16[{variant.bmc}, {constants['CH2']}],{shared(16, 2 * constants['CH2'])!r}>",
        "y_ptr": "*bf16", "acc_ptr": "*i32", "bias_ptr": "*fp32", "residual_ptr": "*bf16", "scale_a_ptr": "*fp32",
        "zero_a_ptr": "*u8", "times_ptr": "*i64", "scale_w_ptr": "*fp32", "sum_w_ptr": "*i32", "trace_ptr": "*i32",
        "m_count": "i32", "n_count": "i32", "width": "i32", "group": "i32",
    }  # fmt: skip
    signature = {name: kinds.get(name, "constexpr") for name in product.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(product.arg_names)
                 if signature[name].startswith("*")}
    source = GluonASTSource(product, signature, constexprs=constants, attrs=divisible)
    return compiled(source, target=GPUTarget("cuda", 90, 32), options=options(variant))


def evidence(variant: Variant, **what: bool) -> dict[str, Any]:
    """A build's PTX, and what the assembler says: registers, bytes spilled, shared memory, whether products wait."""
    built = build(variant, **what)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        done = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")],
                              capture_output=True, text=True, check=True)
    numbers = [re.search(text, done.stderr) for text in (r"Used (\d+) reg", r"(\d+) bytes spill stores")]
    registers, spilled = (int(found[1]) if found else -1 for found in numbers)
    return {"registers": registers, "spilled": spilled, "shared": built.metadata.shared,
            "serialised": "serializ" in done.stderr, "ptx": built.asm["ptx"]}  # fmt: skip
