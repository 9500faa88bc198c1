"""What the int8 products in Gluon are made of: a ring of copies in flight, and its sums. Importing this module imports
Triton.

A program is one warp that copies and two warpgroups that multiply. The producer copies a block of BK columns of codes
and of weights into a ring of STAGES slots; a slot is full when its bytes are there, and empty when the products of all
consumers that read it are done, which a consumer knows one step later. Either both consumers have half of a tile's rows
each, or with TURNS tiles of their own, so that one multiplies while the other writes. Programs are persistent. A tile
has BN1 + BN2 columns because instructions know powers of two: 128 + 32 makes 128 tiles of 2048 x 1280, one a processor
of 132.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
Tuples of numbers and pointers have names; what is constant has to be handed on by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bitbrush.kernels.triton_int8_kernels import _activation, _place, _time, _width, part_of


# ---- how things lie --------------------------------------------------------------------------------------------------
@gluon.constexpr_function
def sums_layout(columns):
    """Of sums: as the instruction leaves them. Triton knows no integer instruction of 256 columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(columns, 128), 32])


@gluon.constexpr_function
def written_layout(columns, size):
    """Of what is written: 16 bytes a thread, rows of ``columns`` elements of ``size`` bytes by as few as have them."""
    vector = min(16 // size, columns)
    across = min(columns // vector, 32)
    return gl.BlockedLayout([1, vector], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def table_layout(columns):
    """Of what belongs to columns, as it is read."""
    return gl.BlockedLayout([max(columns // 128, 1)], [32], [4], [0])


# ---- tiles and steps -------------------------------------------------------------------------------------------------
@gluon.jit
def tiles(m_count, n_count, PARTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    return gl.cdiv(m_count, BM) * gl.cdiv(n_count, BN) * PARTS


@gluon.jit
def corner(tile, m_count, n_count, PARTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """(first row, first column, end of the columns, part) of a tile."""
    wide = gl.cdiv(n_count, BN)
    row, column = _place(tile, gl.cdiv(m_count, BM), wide * PARTS, GROUP)
    part = column // wide
    return row * BM, part * n_count + (column - part * wide) * BN, (part + 1) * n_count, part


@gluon.jit
def channels(width, s, COUNT: gl.constexpr, WIDTH: gl.constexpr):
    """Padded channels of segment s."""
    if COUNT > 1:
        return _width(width, s, COUNT)
    elif WIDTH > 0:
        return s * 0 + WIDTH
    else:
        return s * 0 + width


@gluon.jit
def _before(at, STAGES: gl.constexpr):
    """The slot before. Not `before = at` ahead of `at += 1`: a name that is another's value before a loop, and takes
    the other's value in it, is for Triton (3.6, 3.7) no variable of the loop, and stays what it was."""
    return gl.where(at == 0, STAGES, at) - 1


@gluon.jit
def _after(at, phase, STAGES: gl.constexpr):
    """The slot after, and its parity."""
    at += 1
    if at == STAGES:
        at = 0
        phase ^= 1
    return at, phase


@gluon.jit
def own_tiles(steps, PART: gl.constexpr, TURNS: gl.constexpr):
    """(first tile of a consumer, how far the next one is, slots that are used before its own)."""
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    position = 0
    if TURNS:
        first += PART * stride
        stride *= 2
        position += PART * steps
    return first, stride, position


@gluon.jit
def turn_of(bars, position, turns, PART: gl.constexpr, STAGES: gl.constexpr):
    """(slot, its parity) to begin with, once it is this consumer's turn: a slot's parity says which use of it is full
    only to who has seen the use before."""
    mbarrier.wait(bars[2].index(PART), turns ^ (1 - PART))
    return position % STAGES, (position // STAGES) & 1


# ---- the producer ----------------------------------------------------------------------------------------------------
@gluon.jit
def producer(
    a, w1, w2, rings, bars, m_count, n_count, other, part_rows, pitch, width,
    COUNT: gl.constexpr, WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, PARTS: gl.constexpr,
    SPLIT_K: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr,
    BN2: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
):
    """Copies what tiles are made of, as far ahead as the ring has room.

    Args:
        other: How far behind a tile's first columns their weights lie in ``w2``.
        BN: Columns from one tile to the next.
    """
    COPIES: gl.constexpr = 1 if TURNS else 2
    BM: gl.constexpr = COPIES * BMC
    SIZE: gl.constexpr = (BM + BN1 + BN2) * BK
    a_ring, w1_ring, w2_ring = rings
    full, empty, _ = bars
    at = 0
    phase = 1
    for turn in range(gl.program_id(0), tiles(m_count, n_count, PARTS, BM, BN) * SPLIT_K, gl.num_programs(0)):
        m0, n0, _end, part = corner(turn // SPLIT_K, m_count, n_count, PARTS, BM, BN, GROUP)
        row = part * part_rows + m0
        start = 0
        for s in range(COUNT):
            wide = channels(width, s, COUNT, WIDTH)
            per_tap = gl.cdiv(wide, BK)
            begin, end = part_of(KH * KW * per_tap, turn % SPLIT_K, SPLIT_K)
            for step in range(begin, end):
                tap = step // per_tap
                column = (step - tap * per_tap) * BK
                k = start * (KH * KW) + tap * wide + column
                ready = full.index(at)
                mbarrier.wait(empty.index(at), phase)
                mbarrier.expect(ready, SIZE)
                for c in gl.static_range(COPIES):
                    tma.async_copy_global_to_shared(
                        a, [row + (tap // KW) * pitch + tap % KW + c * BMC, start + column], ready,
                        a_ring.index(at * COPIES + c))
                tma.async_copy_global_to_shared(w1, [n0, k], ready, w1_ring.index(at))
                if BN2 > 0:
                    tma.async_copy_global_to_shared(w2, [n0 + other, k], ready, w2_ring.index(at))
                at, phase = _after(at, phase, STAGES)
            start += wide


# ---- consumers -------------------------------------------------------------------------------------------------------
@gluon.jit
def _nothing(BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr):
    """Both sums before any product."""
    acc1 = gl.zeros([BMC, BN1], gl.int32, layout=sums_layout(BN1))
    if BN2 > 0:
        return acc1, gl.zeros([BMC, BN2], gl.int32, layout=sums_layout(BN2))
    else:
        return acc1, acc1


@gluon.jit
def _in_flight(left, right1, right2, acc1, acc2, BN2: gl.constexpr):
    """Both sums with the products of a slot, which may be in flight still; those of the slot before are done."""
    flying1 = warpgroup_mma(left, right1.permute((1, 0)), acc1, is_async=True)
    if BN2 > 0:
        flying2 = warpgroup_mma(left, right2.permute((1, 0)), acc2, is_async=True)
        return warpgroup_mma_wait(num_outstanding=2, deps=(flying1, flying2))
    else:
        acc1 = warpgroup_mma_wait(num_outstanding=1, deps=(flying1,))
        return acc1, acc1


@gluon.jit
def _landed(acc1, acc2, BN2: gl.constexpr):
    """Both sums with all products done."""
    if BN2 > 0:
        return warpgroup_mma_wait(num_outstanding=0, deps=(acc1, acc2))
    else:
        acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc1,))
        return acc1, acc1


@gluon.jit
def multiplied(
    rings, bars, at, phase, steps,
    INDEX: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, BMC: gl.constexpr,
    BN1: gl.constexpr, BN2: gl.constexpr,
):
    """(sums of the first columns, of the others, slot, its parity) after ``steps`` slots."""
    COPIES: gl.constexpr = 1 if TURNS else 2
    a_ring, w1_ring, w2_ring = rings
    full, empty, turn = bars
    acc1, acc2 = _nothing(BMC, BN1, BN2)
    for step in range(steps):
        mbarrier.wait(full.index(at), phase)
        left = a_ring.index(at * COPIES + INDEX)
        acc1, acc2 = _in_flight(left, w1_ring.index(at), w2_ring.index(at), acc1, acc2, BN2)
        mbarrier.arrive(empty.index(_before(at, STAGES)), pred=step > 0)
        at, phase = _after(at, phase, STAGES)
    if TURNS:
        mbarrier.arrive(turn.index(1 - PART))
    acc1, acc2 = _landed(acc1, acc2, BN2)
    mbarrier.arrive(empty.index(_before(at, STAGES)))
    return acc1, acc2, at, phase


@gluon.jit
def _narrow(left, right1, right2, acc1, acc2, FROM: gl.constexpr, COLUMNS: gl.constexpr, BN2: gl.constexpr):
    """Both sums with the products of some columns of a slot."""
    rows = left.slice(FROM, COLUMNS, 1)
    acc1 = warpgroup_mma(rows, right1.slice(FROM, COLUMNS, 1).permute((1, 0)), acc1)
    if BN2 > 0:
        acc2 = warpgroup_mma(rows, right2.slice(FROM, COLUMNS, 1).permute((1, 0)), acc2)
    return acc1, acc2


@gluon.jit
def multiplied_ragged(
    rings, bars, at, phase, taps, wide,
    PART: gl.constexpr, STAGES: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr,
    BK: gl.constexpr,
):
    """As `multiplied`, after ``taps`` times ``wide`` columns, a multiple of 32: the last slot of each holds what is
    left of them, and columns of others, which are not multiplied."""
    a_ring, w1_ring, w2_ring = rings
    full, empty, _turn = bars
    acc1, acc2 = _nothing(BMC, BN1, BN2)
    whole = wide // BK
    rest = wide - whole * BK
    for _tap in range(taps):
        for step in range(whole):
            mbarrier.wait(full.index(at), phase)
            left = a_ring.index(at * 2 + PART)
            acc1, acc2 = _in_flight(left, w1_ring.index(at), w2_ring.index(at), acc1, acc2, BN2)
            mbarrier.arrive(empty.index(_before(at, STAGES)), pred=step > 0)
            at, phase = _after(at, phase, STAGES)
        acc1, acc2 = _landed(acc1, acc2, BN2)
        mbarrier.arrive(empty.index(_before(at, STAGES)), pred=whole > 0)
        if rest > 0:
            mbarrier.wait(full.index(at), phase)
            left = a_ring.index(at * 2 + PART)
            right1 = w1_ring.index(at)
            right2 = w2_ring.index(at)
            if BK == 128:
                if rest >= 64:
                    acc1, acc2 = _narrow(left, right1, right2, acc1, acc2, 0, 64, BN2)
                if rest == 96:
                    acc1, acc2 = _narrow(left, right1, right2, acc1, acc2, 64, 32, BN2)
            if rest == 32:
                acc1, acc2 = _narrow(left, right1, right2, acc1, acc2, 0, 32, BN2)
            mbarrier.arrive(empty.index(at))
            at, phase = _after(at, phase, STAGES)
    return acc1, acc2, at, phase


@gluon.jit
def of_columns(
    sum_w_ptr, scale_w_ptr, bias_ptr, first, s, end, columns,
    COUNT: gl.constexpr, BIAS: gl.constexpr, BN: gl.constexpr,
):
    """(sums, scales, biases) of BN columns of segment s."""
    n = first + gl.arange(0, BN, layout=table_layout(BN))
    sums = gl.load(sum_w_ptr + s * columns + n, mask=n < end, other=0)
    scales = gl.load(scale_w_ptr + n * COUNT + s, mask=n < end, other=0.0)
    if BIAS:
        return sums, scales, gl.load(bias_ptr + n, mask=n < end, other=0.0).to(gl.float32)
    else:
        return sums, scales, scales


@gluon.jit
def keep_columns(tables, read):
    """Into shared memory what `of_columns` has read."""
    tables[0].store(read[0])
    tables[1].store(read[1])
    tables[2].store(read[2])


@gluon.jit
def of_one_row(activation, part, s, table_rows, COUNT: gl.constexpr, TABLE: gl.constexpr, PARTS: gl.constexpr):
    """(scale, zero-point) of segment s where all rows of a tile share them; else numbers that nothing reads."""
    if TABLE == 1 or TABLE == 2:
        return s * 0.0, s * 0
    else:
        scale_ptr, zero_ptr, times_ptr = activation
        time = _time(times_ptr, part * table_rows, 0, True, part, TABLE, PARTS)
        return _activation(scale_ptr, zero_ptr, time, s, True, part, COUNT, TABLE, PARTS)


@gluon.jit
def corrected(acc, tables, scale, centre, FROM: gl.constexpr, CH: gl.constexpr):
    """(sums, values) of CH columns, FROM and following of the tables. centre: 128 less the zero-point."""
    C: gl.constexpr = gl.SliceLayout(0, sums_layout(CH))
    acc += centre * tables[0].slice(FROM, CH).load(C)[None, :]
    return acc, (acc.to(gl.float32) * scale) * tables[1].slice(FROM, CH).load(C)[None, :]


# ---- shared memory ---------------------------------------------------------------------------------------------------
@gluon.jit
def ring(
    a, w1, w2, STAGES: gl.constexpr, TURNS: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr,
    BK: gl.constexpr,
):
    """(slots of codes, of weights, of the other columns' weights), (full, empty, whose turn it is)."""
    COPIES: gl.constexpr = 1 if TURNS else 2
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES * COPIES, BMC, BK], a.layout)
    w1_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN1, BK], w1.layout)
    w2_ring = w1_ring
    if BN2 > 0:
        w2_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN2, BK], w2.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=COPIES)
    for s in gl.static_range(2):
        mbarrier.init(turn.index(s), count=1)
    fence_async_shared()
    return (a_ring, w1_ring, w2_ring), (full, empty, turn)


@gluon.jit
def column_tables(BN: gl.constexpr):
    """What a consumer keeps of BN columns: sums, scales, biases."""
    S: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (gl.allocate_shared_memory(gl.int32, [BN], S), gl.allocate_shared_memory(gl.float32, [BN], S),
            gl.allocate_shared_memory(gl.float32, [BN], S))
