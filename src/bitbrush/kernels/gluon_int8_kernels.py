"""The int8 product in Gluon: linear layers, and convolutions over a frame. Importing this module imports Triton.

How it goes about it: `gluon_ring_kernels`. What it computes: `triton_int8_kernels.product`, in the same order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bitbrush.kernels.gluon_ring_kernels import (
    channels,
    column_tables,
    corner,
    corrected,
    keep_columns,
    multiplied,
    multiplied_ragged,
    of_columns,
    of_one_row,
    own_tiles,
    producer,
    ring,
    sums_layout,
    tiles,
    turn_of,
    written_layout,
)
from bitbrush.kernels.triton_int8_kernels import _activation, _geometry, _time, part_of


@gluon.jit
def _outputs(m, m_count, geometry, SPATIAL: gl.constexpr):
    """Of rows m: (row of the output, sample, whether it is an output at all)."""
    pitch, height, out_h, out_w, per_sample = geometry
    _rows, where, sample, output = _geometry(m, pitch, height, out_h, out_w, 1, per_sample, SPATIAL)
    return where, sample, (m < m_count) & output


@gluon.jit
def _rows_of_tables(
    activation, m, s, geometry, m_count, COUNT: gl.constexpr, TABLE: gl.constexpr, SPATIAL: gl.constexpr,
):
    """(scale, zero-point) ``[BMC, 1]`` of segment s for each row m, where a row has its own."""
    scale_ptr, zero_ptr, times_ptr = activation
    where, sample, kept = _outputs(m, m_count, geometry, SPATIAL)
    time = _time(times_ptr, sample, where, kept, 0, TABLE, 1)
    return _activation(scale_ptr, zero_ptr, time, s, kept, 0, COUNT, TABLE, 1)


@gluon.jit
def _scaled(
    acc, tables, scale, zero, activation, s, m0, n0, end, columns, m_count, out_rows, geometry, acc_ptr,
    FROM: gl.constexpr, COUNT: gl.constexpr, TABLE: gl.constexpr, SPATIAL: gl.constexpr, KEEP: gl.constexpr,
    BMC: gl.constexpr, CH: gl.constexpr,
):
    """float32 ``[BMC, CH]``: a segment's sums, corrected and scaled; of columns FROM and following of the tables."""
    L: gl.constexpr = sums_layout(CH)
    m = m0 + gl.arange(0, BMC, layout=gl.SliceLayout(1, L))
    if TABLE == 1 or TABLE == 2:
        scales, zeros = _rows_of_tables(activation, m, s, geometry, m_count, COUNT, TABLE, SPATIAL)
        acc, value = corrected(acc, tables, scales, 128 - zeros, FROM, CH)
    else:
        acc, value = corrected(acc, tables, scale, 128 - zero, FROM, CH)
    if KEEP:
        where, _sample, kept = _outputs(m, m_count, geometry, SPATIAL)
        n = n0 + FROM + gl.arange(0, CH, layout=gl.SliceLayout(0, L))
        at = s * out_rows.to(gl.int64) * columns + where.to(gl.int64)[:, None] * columns + n[None, :]
        gl.store(acc_ptr + at, acc, mask=kept[:, None] & (n < end)[None, :])
    return value


@gluon.jit
def _finish(
    acc, tables, scale, zero, activation, pointers, m0, n0, end, columns, m_count, out_rows, geometry,
    FROM: gl.constexpr, SCALED: gl.constexpr, TABLE: gl.constexpr, SPATIAL: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr, SHARED: gl.constexpr, KEEP: gl.constexpr, BMC: gl.constexpr, BN: gl.constexpr,
    CH: gl.constexpr,
):
    """Columns FROM .. FROM + BN of a tile, CH at a time. SCALED: what is given are no sums but values."""
    if BN > CH:
        HALF: gl.constexpr = BN // 2
        left, right = gl.split(gl.permute(gl.reshape(acc, (BMC, 2, HALF)), (0, 2, 1)))
        _finish(left, tables, scale, zero, activation, pointers, m0, n0, end, columns, m_count, out_rows, geometry,
                FROM, SCALED, TABLE, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, BMC, HALF, CH)
        _finish(right, tables, scale, zero, activation, pointers, m0, n0, end, columns, m_count, out_rows, geometry,
                FROM + HALF, SCALED, TABLE, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, BMC, HALF, CH)
    else:
        L: gl.constexpr = sums_layout(CH)
        y_ptr, acc_ptr, residual_ptr, shared_ptr = pointers
        own = gl.convert_layout(acc, L, assert_trivial=True)
        if SCALED:
            value = own
        else:
            value = _scaled(own, tables, scale, zero, activation, 0, m0, n0, end, columns, m_count, out_rows, geometry,
                            acc_ptr, FROM, 1, TABLE, SPATIAL, KEEP, BMC, CH)
        if BIAS:
            value += tables[2].slice(FROM, CH).load(gl.SliceLayout(0, L))[None, :]
        TYPE: gl.constexpr = y_ptr.dtype.element_ty
        W: gl.constexpr = written_layout(CH, TYPE.primitive_bitwidth // 8)
        m = m0 + gl.arange(0, BMC, layout=gl.SliceLayout(1, W))
        n = n0 + FROM + gl.arange(0, CH, layout=gl.SliceLayout(0, W))
        where, sample, kept = _outputs(m, m_count, geometry, SPATIAL)
        inside = kept[:, None] & (n < end)[None, :]
        at = where.to(gl.int64)[:, None] * columns + n[None, :]
        if SHARED > 0:
            row = sample.to(gl.int64)[:, None] * columns + n[None, :]
            row_of_sample = gl.convert_layout(gl.load(shared_ptr + row, mask=inside, other=0.0), L).to(gl.float32)
            if SHARED == 2:
                value *= row_of_sample
            else:
                value += row_of_sample
        if RESIDUAL:
            value += gl.convert_layout(gl.load(residual_ptr + at, mask=inside, other=0.0), L).to(gl.float32)
        gl.store(y_ptr + at, gl.convert_layout(value.to(TYPE), W), mask=inside)


@gluon.jit
def _consumer(
    rings, bars, tables1, tables2, pointers, activation, weight, m_count, n_count, out_rows, geometry, width,
    PART: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, TAPS: gl.constexpr, TABLE: gl.constexpr,
    PARTS: gl.constexpr, SPATIAL: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr,
    KEEP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr,
    BN2: gl.constexpr, BK: gl.constexpr, CH1: gl.constexpr, CH2: gl.constexpr, GROUP: gl.constexpr,
):
    """Multiplies half of each tile's rows, or with TURNS every second tile, and writes it."""
    COPIES: gl.constexpr = 1 if TURNS else 2
    INDEX: gl.constexpr = 0 if TURNS else PART
    BM: gl.constexpr = COPIES * BMC
    BN: gl.constexpr = BN1 + BN2
    sum_w_ptr, scale_w_ptr, bias_ptr = weight
    y_ptr, acc_ptr, residual_ptr, shared_ptr = pointers
    first_steps = TAPS * gl.cdiv(channels(width, 0, COUNT, WIDTH), BK)
    first, stride, position = own_tiles(first_steps, PART, TURNS)
    if COUNT > 1 and PART == 1:  # half a segment behind the other: one scales its sums while the other multiplies
        mbarrier.wait(bars[0].index(gl.maximum(gl.minimum(first_steps, STAGES) - 1, 0)), 0)
    at = 0
    phase = 0
    turns = 0
    for tile in range(first, tiles(m_count, n_count, PARTS, BM, BN), stride):
        m0, n0, end, part = corner(tile, m_count, n_count, PARTS, BM, BN, GROUP)
        m0 += INDEX * BMC
        own_ptr = y_ptr
        if PARTS > 1:
            own_ptr += part.to(gl.int64) * (out_rows - 1) * n_count  # columns are counted over all parts
        written = (own_ptr, acc_ptr, residual_ptr, shared_ptr)
        # what belongs to the columns: asked for now, so that nothing waits for memory after the sums
        scale, zero = of_one_row(activation, part, 0, geometry[4], COUNT, TABLE, PARTS)
        read1 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0, 0, end, n_count * PARTS, COUNT, BIAS, BN1)
        read2 = read1
        if BN2 > 0:
            read2 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0 + BN1, 0, end, n_count * PARTS, COUNT, BIAS, BN2)
        if TURNS:  # one segment, so that every tile has as many steps
            at, phase = turn_of(bars, position, turns, PART, STAGES)
            position += 2 * first_steps
            turns ^= 1
        if COUNT == 1:
            acc1, acc2, at, phase = multiplied(rings, bars, at, phase, first_steps, INDEX, PART, STAGES, TURNS, BMC,
                                                BN1, BN2)
        else:
            acc1, acc2, at, phase = multiplied_ragged(rings, bars, at, phase, TAPS, channels(width, 0, COUNT, WIDTH),
                                                       PART, STAGES, BMC, BN1, BN2, BK)
        keep_columns(tables1, read1)
        if BN2 > 0:
            keep_columns(tables2, read2)
        made1 = acc1
        made2 = acc2
        if COUNT > 1:
            made1 = _scaled(acc1, tables1, scale, zero, activation, 0, m0, n0, end, n_count, m_count, out_rows,
                            geometry, acc_ptr, 0, COUNT, TABLE, SPATIAL, KEEP, BMC, BN1)
            if BN2 > 0:
                made2 = _scaled(acc2, tables2, scale, zero, activation, 0, m0, n0 + BN1, end, n_count, m_count,
                                out_rows, geometry, acc_ptr, 0, COUNT, TABLE, SPATIAL, KEEP, BMC, BN2)
            for s in range(1, COUNT):
                scale, zero = of_one_row(activation, part, s, geometry[4], COUNT, TABLE, PARTS)
                read1 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0, s, end, n_count * PARTS, COUNT, BIAS, BN1)
                if BN2 > 0:
                    read2 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0 + BN1, s, end, n_count * PARTS, COUNT,
                                       BIAS, BN2)
                acc1, acc2, at, phase = multiplied_ragged(rings, bars, at, phase, TAPS,
                                                          channels(width, s, COUNT, WIDTH), PART, STAGES, BMC, BN1,
                                                          BN2, BK)
                keep_columns(tables1, read1)
                made1 += _scaled(acc1, tables1, scale, zero, activation, s, m0, n0, end, n_count, m_count, out_rows,
                                 geometry, acc_ptr, 0, COUNT, TABLE, SPATIAL, KEEP, BMC, BN1)
                if BN2 > 0:
                    keep_columns(tables2, read2)
                    made2 += _scaled(acc2, tables2, scale, zero, activation, s, m0, n0 + BN1, end, n_count, m_count,
                                     out_rows, geometry, acc_ptr, 0, COUNT, TABLE, SPATIAL, KEEP, BMC, BN2)
        _finish(made1, tables1, scale, zero, activation, written, m0, n0, end, n_count, m_count, out_rows, geometry, 0,
                COUNT > 1, TABLE, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, BMC, BN1, CH1)
        if BN2 > 0:
            _finish(made2, tables2, scale, zero, activation, written, m0, n0 + BN1, end, n_count, m_count, out_rows,
                    geometry, 0, COUNT > 1, TABLE, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, BMC, BN2, CH2)


@gluon.jit
def _part(
    acc, acc_ptr, m0, first, end, columns, m_count, out_rows, geometry, share,
    SPATIAL: gl.constexpr, BMC: gl.constexpr, BN: gl.constexpr,
):
    """Writes one part's sums of BN columns."""
    L: gl.constexpr = sums_layout(BN)
    m = m0 + gl.arange(0, BMC, layout=gl.SliceLayout(1, L))
    n = first + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    where, _sample, kept = _outputs(m, m_count, geometry, SPATIAL)
    at = (share * out_rows.to(gl.int64) + where.to(gl.int64))[:, None] * columns + n[None, :]
    gl.store(acc_ptr + at, acc, mask=kept[:, None] & (n < end)[None, :])


@gluon.jit
def _consumer_of_parts(
    rings, bars, acc_ptr, m_count, n_count, out_rows, geometry, width,
    PART: gl.constexpr, WIDTH: gl.constexpr, TAPS: gl.constexpr, SPATIAL: gl.constexpr, SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Half of each tile's rows, of a part of its steps, as int32 sums ``[SPLIT_K, rows, n_count]``."""
    BM: gl.constexpr = 2 * BMC
    BN: gl.constexpr = BN1 + BN2
    steps = TAPS * gl.cdiv(channels(width, 0, 1, WIDTH), BK)
    at = 0
    phase = 0
    for turn in range(gl.program_id(0), tiles(m_count, n_count, 1, BM, BN) * SPLIT_K, gl.num_programs(0)):
        share = turn % SPLIT_K
        m0, n0, end, _part_of_layers = corner(turn // SPLIT_K, m_count, n_count, 1, BM, BN, GROUP)
        first, last = part_of(steps, share, SPLIT_K)
        acc1, acc2, at, phase = multiplied(rings, bars, at, phase, last - first, PART, PART, STAGES, False, BMC, BN1,
                                            BN2)
        _part(acc1, acc_ptr, m0 + PART * BMC, n0, end, n_count, m_count, out_rows, geometry, share, SPATIAL, BMC, BN1)
        if BN2 > 0:
            _part(acc2, acc_ptr, m0 + PART * BMC, n0 + BN1, end, n_count, m_count, out_rows, geometry, share, SPATIAL,
                  BMC, BN2)


@gluon.jit(do_not_specialize=["m_count", "out_rows", "part_rows", "per_sample", "pitch", "height", "out_h", "out_w"])
def product(
    a, w1, w2, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, m_count, n_count, out_rows, part_rows, per_sample, pitch, height, out_h, out_w, width,
    COUNT: gl.constexpr, WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, TABLE: gl.constexpr,
    PARTS: gl.constexpr, SPATIAL: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr,
    KEEP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr,
    BN2: gl.constexpr, BK: gl.constexpr, CH1: gl.constexpr, CH2: gl.constexpr, GROUP: gl.constexpr,
):
    """Tiles of ``y [PARTS, rows, n_count]``; arguments as those of `triton_int8_kernels.product`."""
    rings, bars = ring(a, w1, w2, STAGES, TURNS, BMC, BN1, BN2, BK)
    t01 = column_tables(BN1)
    t11 = column_tables(BN1)
    t02 = t01
    t12 = t11
    if BN2 > 0:
        t02 = column_tables(BN2)
        t12 = column_tables(BN2)
    pointers = (y_ptr, acc_ptr, residual_ptr, shared_ptr)
    activation = (scale_a_ptr, zero_a_ptr, times_ptr)
    weight = (sum_w_ptr, scale_w_ptr, bias_ptr)
    geometry = (pitch, height, out_h, out_w, per_sample)
    gl.warp_specialize([
        (_consumer, (
            rings, bars, t01, t02, pointers, activation, weight, m_count, n_count, out_rows, geometry, width, 0, COUNT,
            WIDTH, KH * KW, TABLE, PARTS, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, STAGES, TURNS, BMC, BN1, BN2, BK, CH1,
            CH2, GROUP)),
        (_consumer, (
            rings, bars, t11, t12, pointers, activation, weight, m_count, n_count, out_rows, geometry, width, 1, COUNT,
            WIDTH, KH * KW, TABLE, PARTS, SPATIAL, BIAS, RESIDUAL, SHARED, KEEP, STAGES, TURNS, BMC, BN1, BN2, BK, CH1,
            CH2, GROUP)),
        (producer, (
            a, w1, w2, rings, bars, m_count, n_count, BN1, part_rows, pitch, width, COUNT, WIDTH, KH, KW, PARTS,
            1, STAGES, TURNS, BMC, BN1, BN2, BK, BN1 + BN2, GROUP)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["m_count", "out_rows", "part_rows", "per_sample", "pitch", "height", "out_h", "out_w"])
def split_product(
    a, w1, w2, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, m_count, n_count, out_rows, part_rows, per_sample, pitch, height, out_h, out_w, width,
    WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, SPATIAL: gl.constexpr, SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Parts of the sums of a product, ``acc [SPLIT_K, rows, n_count]``; nothing else is read or written."""
    rings, bars = ring(a, w1, w2, STAGES, False, BMC, BN1, BN2, BK)
    geometry = (pitch, height, out_h, out_w, per_sample)
    gl.warp_specialize([
        (_consumer_of_parts, (
            rings, bars, acc_ptr, m_count, n_count, out_rows, geometry, width, 0, WIDTH, KH * KW, SPATIAL, SPLIT_K,
            STAGES, BMC, BN1, BN2, BK, GROUP)),
        (_consumer_of_parts, (
            rings, bars, acc_ptr, m_count, n_count, out_rows, geometry, width, 1, WIDTH, KH * KW, SPATIAL, SPLIT_K,
            STAGES, BMC, BN1, BN2, BK, GROUP)),
        (producer, (
            a, w1, w2, rings, bars, m_count, n_count, BN1, part_rows, pitch, width, 1, WIDTH, KH, KW, 1, SPLIT_K,
            STAGES, False, BMC, BN1, BN2, BK, BN1 + BN2, GROUP)),
    ], [4, 1], [240, 24])  # fmt: skip
