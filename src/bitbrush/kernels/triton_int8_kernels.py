"""The Triton code of `bitbrush.kernels.triton_int8`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_decode_kernels import codes


# ---- the product -----------------------------------------------------------------------------------------------------
@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile. GROUP rows of tiles share a column before the next one, so both operands stay in L2."""
    wide = GROUP * tiles_n
    first = (tile // wide) * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % wide) % high, (tile % wide) // high


@triton.jit
def _geometry(m, pitch, height, out_h, out_w, stride, per_sample, SPATIAL: tl.constexpr):
    """Of the rows m of a tile: (row of the input buffer, row of the output, sample, whether it is an output at all).

    SPATIAL 0: a linear layer. 1: m counts the rows of the buffer, some of which are padding. 2: m counts outputs.
    """
    if SPATIAL == 0:
        return m, m, m // per_sample, m >= 0
    elif SPATIAL == 1:
        x, line = m % pitch, m // pitch
        y, sample = line % height, line // height
        return m, (sample * out_h + y) * out_w + x, sample, (x < out_w) & (y < out_h)
    else:
        x, line = m % out_w, m // out_w
        y, sample = line % out_h, line // out_h
        return (sample * height + y * stride) * pitch + x * stride, m, sample, m >= 0


@triton.jit
def _segment_sum(
    a, w, rows, first, n, m_ok, n_ok, a_start, w_start, pitch, length_a, length_w,
    WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """int32 ``[BM, BN]``: the sum over one segment's columns and all kernel positions."""
    PER_TAP: tl.constexpr = (WIDTH + BK - 1) // BK
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(KH * KW * PER_TAP):
        tap, column = step // PER_TAP, (step % PER_TAP) * BK
        offset = (tap // KW) * pitch + tap % KW
        if TMA:
            left = a.load([first + offset, a_start + column])
            right = w.load([n, w_start + tap * WIDTH + column])
        else:
            k = column + tl.arange(0, BK)
            inside = k < WIDTH
            left = tl.load(
                a + (rows + offset).to(tl.int64)[:, None] * length_a + (a_start + k)[None, :],
                mask=m_ok[:, None] & inside[None, :], other=0,
            )
            right = tl.load(
                w + n.to(tl.int64)[:, None] * length_w + (w_start + tap * WIDTH + k)[None, :],
                mask=n_ok[:, None] & inside[None, :], other=0,
            )
        acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _tile(
    a, w, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, m0, n0, m_count, n_count, out_rows, per_sample, pitch, height, out_h, out_w, stride, length_a, length_w,
    WIDTHS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr, SPATIAL: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SHARED: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """One tile of the output: integer sums, and the epilogue in float32 (the order is that of docs/numerics.md)."""
    COUNT: tl.constexpr = len(WIDTHS)
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    n_ok = n < n_count
    rows, where, sample, output = _geometry(m, pitch, height, out_h, out_w, stride, per_sample, SPATIAL)
    m_ok = m < m_count
    kept = m_ok & output
    if TABLE == 1:  # a row of the table a sample
        time = tl.load(times_ptr + sample, mask=kept, other=0)
    elif TABLE == 2:  # one a row
        time = where.to(tl.int64)
    else:
        time = tl.load(times_ptr)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    a_start = 0
    w_start = 0
    for s in tl.static_range(COUNT):
        acc = _segment_sum(
            a, w, rows, m0, n0 if TMA else n, m_ok, n_ok, a_start, w_start, pitch, length_a, length_w,
            WIDTHS[s], KH, KW, TMA, BM, BN, BK,
        )
        sums = tl.load(sum_w_ptr + s * n_count + n, mask=n_ok, other=0)
        scale_w = tl.load(scale_w_ptr + n * COUNT + s, mask=n_ok, other=0.0)
        if TABLE == 0:
            acc += (128 - tl.load(zero_a_ptr + time * COUNT + s).to(tl.int32)) * sums[None, :]
            part = (acc.to(tl.float32) * tl.load(scale_a_ptr + time * COUNT + s)) * scale_w[None, :]
        else:
            zero = tl.load(zero_a_ptr + time * COUNT + s, mask=kept, other=128).to(tl.int32)
            acc += (128 - zero)[:, None] * sums[None, :]
            scale = tl.load(scale_a_ptr + time * COUNT + s, mask=kept, other=0.0)
            part = (acc.to(tl.float32) * scale[:, None]) * scale_w[None, :]
        if s == 0:
            total = part
        else:
            total += part
        at = where.to(tl.int64)[:, None] * n_count + n[None, :]
        if KEEP:
            tl.store(acc_ptr + s * out_rows.to(tl.int64) * n_count + at, acc, mask=kept[:, None] & n_ok[None, :])
        a_start += WIDTHS[s]
        w_start += WIDTHS[s] * KH * KW
    inside = kept[:, None] & n_ok[None, :]
    at = where.to(tl.int64)[:, None] * n_count + n[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if SHARED:
        total += tl.load(shared_ptr + sample.to(tl.int64)[:, None] * n_count + n[None, :], mask=inside,
                         other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a, w, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, m_count, n_count, out_rows, per_sample, pitch, height, out_h, out_w, stride, length_a, length_w,
    WIDTHS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr, SPATIAL: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SHARED: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """Tiles of ``y``: one a program, or with PROGRAMS > 0 every PROGRAMS-th, so that a tile's end and the next one's
    loads overlap."""
    tiles_m, tiles_n = tl.cdiv(m_count, BM), tl.cdiv(n_count, BN)
    if PROGRAMS > 0:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=TMA):
            row, column = _place(tile, tiles_m, tiles_n, GROUP)
            _tile(
                a, w, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr,
                scale_w_ptr, sum_w_ptr, row * BM, column * BN, m_count, n_count, out_rows, per_sample, pitch, height,
                out_h, out_w, stride, length_a, length_w, WIDTHS, KH, KW, TABLE, SPATIAL, TMA, BIAS, RESIDUAL, SHARED,
                KEEP, BM, BN, BK,
            )
    else:
        row, column = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
        _tile(
            a, w, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr,
            scale_w_ptr, sum_w_ptr, row * BM, column * BN, m_count, n_count, out_rows, per_sample, pitch, height,
            out_h, out_w, stride, length_a, length_w, WIDTHS, KH, KW, TABLE, SPATIAL, TMA, BIAS, RESIDUAL, SHARED,
            KEEP, BM, BN, BK,
        )


# ---- unpack ----------------------------------------------------------------------------------------------------------
@triton.jit
def unpack(
    data, zero_ptr, order_ptr, out_ptr, rows, length, stride, four, two, one, segments,
    ENDS: tl.constexpr, REAL: tl.constexpr, BITS: tl.constexpr, ORDER: tl.constexpr, HALVED: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):
    """``code - zero_point`` int8 ``[N, K]`` of the packed rows of one bit class, each written to its own place.

    ENDS: where each segment ends in a row. REAL: (channels, padded channels) of each, read where padding is not 0.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    ok = (row < rows)[:, None] & (k < length)[None, :]
    code = codes(data, row, rows, tl.program_id(1) * BK, length, stride, four, two, one, BITS, BR, BK).to(tl.int8)
    if HALVED:
        code = code * 2
    place = row
    if ORDER:
        place = tl.load(order_ptr + row, mask=row < rows, other=0).to(tl.int32)
    if len(ENDS) == 1:
        padding = k % REAL[0][1] >= REAL[0][0]
        zero = tl.load(zero_ptr + (place * segments)[:, None], mask=(row < rows)[:, None], other=0)
    else:
        segment = tl.zeros((BK,), dtype=tl.int32)
        padding = k < 0
        begin = 0
        for s in tl.static_range(len(ENDS)):
            here = (k >= begin) & (k < ENDS[s])
            segment = tl.where(here, s, segment)
            padding = padding | (here & ((k - begin) % REAL[s][1] >= REAL[s][0]))
            begin = ENDS[s]
        zero = tl.load(zero_ptr + (place * segments)[:, None] + segment[None, :], mask=ok, other=0)
    value = tl.where(padding[None, :], 0, code - zero.to(tl.int8)).to(tl.int8)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * length + k[None, :], value, mask=ok)
