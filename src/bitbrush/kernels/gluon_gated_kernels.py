"""The gated int8 product in Gluon: product, GEGLU and the next layer's encode. Importing this module imports Triton.

How it goes about it: `gluon_ring_kernels`. What it computes: `triton_int8_kernels.gated`, in the same order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bitbrush.kernels.gluon_ring_kernels import (
    column_tables,
    corner,
    corrected,
    keep_columns,
    multiplied,
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
from bitbrush.kernels.triton_encode_kernels import centred, zero_and_top
from bitbrush.kernels.triton_int8_kernels import _geglu


@gluon.jit
def _finish_gated(
    hidden, gate, tables1, tables2, scale, zero, y_ptr, factor_ptr, then, m0, n0, m_count, n_count, length_y,
    FROM: gl.constexpr, BIAS: gl.constexpr, FACTOR: gl.constexpr, TYPE: gl.constexpr, BMC: gl.constexpr,
    BN: gl.constexpr, CH: gl.constexpr,
):
    """Codes of columns FROM .. FROM + BN of a tile, CH at a time, from the sums of both halves."""
    if BN > CH:
        HALF: gl.constexpr = BN // 2
        left, right = gl.split(gl.permute(gl.reshape(hidden, (BMC, 2, HALF)), (0, 2, 1)))
        left2, right2 = gl.split(gl.permute(gl.reshape(gate, (BMC, 2, HALF)), (0, 2, 1)))
        _finish_gated(left, left2, tables1, tables2, scale, zero, y_ptr, factor_ptr, then, m0, n0, m_count, n_count,
                      length_y, FROM, BIAS, FACTOR, TYPE, BMC, HALF, CH)
        _finish_gated(right, right2, tables1, tables2, scale, zero, y_ptr, factor_ptr, then, m0, n0, m_count, n_count,
                      length_y, FROM + HALF, BIAS, FACTOR, TYPE, BMC, HALF, CH)
    else:
        L: gl.constexpr = sums_layout(CH)
        C: gl.constexpr = gl.SliceLayout(0, L)
        W: gl.constexpr = written_layout(CH, 1)
        inverse, zero_next, top = then
        _, value = corrected(gl.convert_layout(hidden, L, assert_trivial=True), tables1, scale, 128 - zero, FROM, CH)
        _, other = corrected(gl.convert_layout(gate, L, assert_trivial=True), tables2, scale, 128 - zero, FROM, CH)
        if BIAS:
            value += tables1[2].slice(FROM, CH).load(C)[None, :]
            other += tables2[2].slice(FROM, CH).load(C)[None, :]
        value = _geglu(value, other, TYPE)
        n = n0 + FROM + gl.arange(0, CH, layout=C)
        if FACTOR:
            value *= gl.load(factor_ptr + n, mask=n < n_count, other=0.0)[None, :]
        value = gl.where((n < n_count)[None, :], value, 0.0)
        codes = gl.convert_layout(centred(value, inverse, zero_next, top), W)
        m = m0 + gl.arange(0, BMC, layout=gl.SliceLayout(1, W))
        column = n0 + FROM + gl.arange(0, CH, layout=gl.SliceLayout(0, W))
        gl.store(y_ptr + m.to(gl.int64)[:, None] * length_y + column[None, :], codes,
                 mask=(m < m_count)[:, None] & (column < length_y)[None, :])


@gluon.jit
def _gated_consumer(
    rings, bars, tables1, tables2, y_ptr, factor_ptr, activation, weight, following, top, m_count, n_count, length_y,
    width, PART: gl.constexpr, BIAS: gl.constexpr, FACTOR: gl.constexpr, TYPE: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr, BMC: gl.constexpr, BN1: gl.constexpr, BK: gl.constexpr, CH1: gl.constexpr,
    GROUP: gl.constexpr,
):
    """As `_consumer`: a tile has BN1 hidden channels and their gates."""
    COPIES: gl.constexpr = 1 if TURNS else 2
    INDEX: gl.constexpr = 0 if TURNS else PART
    BM: gl.constexpr = COPIES * BMC
    sum_w_ptr, scale_w_ptr, bias_ptr = weight
    inverse_ptr, zero_ptr, next_times_ptr = following
    scale, zero = of_one_row(activation, 0, 0, 0, 1, 0, 1)
    time = gl.load(next_times_ptr)
    zero_next, top = zero_and_top(zero_ptr, time, top)
    then = (gl.load(inverse_ptr + time), zero_next, top)
    steps = gl.cdiv(width, BK)
    first, stride, position = own_tiles(steps, PART, TURNS)
    at = 0
    phase = 0
    turns = 0
    for tile in range(first, tiles(m_count, length_y, 1, BM, BN1), stride):
        m0, n0, _end, _part = corner(tile, m_count, length_y, 1, BM, BN1, GROUP)
        m0 += INDEX * BMC
        read1 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0, 0, n_count, 0, 1, BIAS, BN1)
        read2 = of_columns(sum_w_ptr, scale_w_ptr, bias_ptr, n0 + n_count, 0, 2 * n_count, 0, 1, BIAS, BN1)
        if TURNS:
            at, phase = turn_of(bars, position, turns, PART, STAGES)
            position += 2 * steps
            turns ^= 1
        hidden, gate, at, phase = multiplied(rings, bars, at, phase, steps, INDEX, PART, STAGES, TURNS, BMC, BN1,
                                              BN1)
        keep_columns(tables1, read1)
        keep_columns(tables2, read2)
        _finish_gated(hidden, gate, tables1, tables2, scale, zero, y_ptr, factor_ptr, then, m0, n0, m_count, n_count,
                      length_y, 0, BIAS, FACTOR, TYPE, BMC, BN1, CH1)


@gluon.jit(do_not_specialize=["m_count"])
def gated(
    a, w1, w2, y_ptr, bias_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, factor_ptr, inverse_ptr,
    zero_ptr, next_times_ptr, top, m_count, n_count, length_y, width,
    BIAS: gl.constexpr, FACTOR: gl.constexpr, TYPE: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    BMC: gl.constexpr, BN1: gl.constexpr, BN2: gl.constexpr, BK: gl.constexpr, CH1: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Codes less 128 of the next layer; arguments as those of `triton_int8_kernels.gated`. BN2 is BN1."""
    rings, bars = ring(a, w1, w2, STAGES, TURNS, BMC, BN1, BN2, BK)
    t01 = column_tables(BN1)
    t02 = column_tables(BN2)
    t11 = column_tables(BN1)
    t12 = column_tables(BN2)
    activation = (scale_a_ptr, zero_a_ptr, times_ptr)
    weight = (sum_w_ptr, scale_w_ptr, bias_ptr)
    following = (inverse_ptr, zero_ptr, next_times_ptr)
    gl.warp_specialize([
        (_gated_consumer, (
            rings, bars, t01, t02, y_ptr, factor_ptr, activation, weight, following, top, m_count, n_count, length_y,
            width, 0, BIAS, FACTOR, TYPE, STAGES, TURNS, BMC, BN1, BK, CH1, GROUP)),
        (_gated_consumer, (
            rings, bars, t11, t12, y_ptr, factor_ptr, activation, weight, following, top, m_count, n_count, length_y,
            width, 1, BIAS, FACTOR, TYPE, STAGES, TURNS, BMC, BN1, BK, CH1, GROUP)),
        (producer, (
            a, w1, w2, rings, bars, m_count, length_y, n_count, 0, 1, width, 1, 0, 1, 1, 1, 1, STAGES, TURNS, BMC,
            BN1, BN2, BK, BN1, GROUP)),
    ], [4, 1], [240, 24])  # fmt: skip
