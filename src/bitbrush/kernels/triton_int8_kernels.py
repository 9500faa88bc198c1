"""The Triton code of `bitbrush.kernels.triton_int8`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_decode_kernels import codes, codes_at
from bitbrush.kernels.triton_encode_kernels import centred, in_turn, zero_and_top
from bitbrush.kernels.triton_norm_kernels import gelu, rounded


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
def part_of(steps, part, SPLIT_K: tl.constexpr):
    """(first step, end) of a part of them."""
    if SPLIT_K == 1:
        return 0, steps
    else:
        each = (steps + SPLIT_K - 1) // SPLIT_K
        return part * each, tl.minimum(part * each + each, steps)


@triton.jit
def _segment_sum(
    a, w, rows, first, n, m_ok, n_ok, a_start, w_start, pitch, length_a, length_w, width, part,
    KH: tl.constexpr, KW: tl.constexpr, TMA: tl.constexpr, PAIRED: tl.constexpr, SPLIT_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """int32 ``[BM, BN]``: the sum over one segment's columns and all kernel positions; with SPLIT_K a part of it.

    PAIRED: the copy of ``w`` has three dimensions, half of a tile's columns each from one half of its rows.
    """
    per_tap = (width + BK - 1) // BK
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    begin, end = part_of(KH * KW * per_tap, part, SPLIT_K)
    for step in range(begin, end):
        if KH * KW == 1:
            tap, column = 0, step * BK
        else:
            tap, column = step // per_tap, (step % per_tap) * BK
        offset = (tap // KW) * pitch + tap % KW
        if TMA:
            left = a.load([first + offset, a_start + column])
            if PAIRED:
                right = tl.reshape(w.load([0, n, w_start + column]), (BN, BK))
            else:
                right = w.load([n, w_start + tap * width + column])
        else:
            k = column + tl.arange(0, BK)
            inside = k < width
            left = tl.load(
                a + (rows + offset).to(tl.int64)[:, None] * length_a + (a_start + k)[None, :],
                mask=m_ok[:, None] & inside[None, :], other=0,
            )
            right = tl.load(
                w + n.to(tl.int64)[:, None] * length_w + (w_start + tap * width + k)[None, :],
                mask=n_ok[:, None] & inside[None, :], other=0,
            )
        acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _time(times_ptr, sample, where, kept, part, TABLE: tl.constexpr, PARTS: tl.constexpr):
    """The row of the activation's tables: a number, or ``[BM]``. See `Tables.kind`; 3: of each part's own tables, 4: of
    a table of all parts, in which this part's begins at ``sample``."""
    if TABLE == 0:
        return tl.load(times_ptr)
    elif TABLE == 4:
        return tl.load(times_ptr) + sample
    elif TABLE == 1:
        return tl.load(times_ptr + sample, mask=kept, other=0)
    elif TABLE == 2:
        return where.to(tl.int64)
    else:
        chosen = times_ptr[0]
        for p in tl.static_range(1, PARTS):
            if part == p:
                chosen = times_ptr[p]
        return tl.load(chosen)


@triton.jit
def _activation(scale_ptr, zero_ptr, time, s, kept, part, COUNT: tl.constexpr, TABLE: tl.constexpr,
                PARTS: tl.constexpr):
    """(scale, zero-point) of segment s: numbers, or ``[BM, 1]``."""
    at = time * COUNT + s
    if TABLE == 0 or TABLE == 4:
        return tl.load(scale_ptr + at), tl.load(zero_ptr + at).to(tl.int32)
    elif TABLE == 3:
        scale, zero = tl.load(scale_ptr[0] + at, mask=part == 0, other=0.0), 0
        zero += tl.load(zero_ptr[0] + at, mask=part == 0, other=0).to(tl.int32)
        for p in tl.static_range(1, PARTS):
            scale += tl.load(scale_ptr[p] + at, mask=part == p, other=0.0)
            zero += tl.load(zero_ptr[p] + at, mask=part == p, other=0).to(tl.int32)
        return scale, zero
    else:
        return (tl.load(scale_ptr + at, mask=kept, other=0.0)[:, None],
                tl.load(zero_ptr + at, mask=kept, other=128).to(tl.int32)[:, None])


@triton.jit
def _asked(ptr, n, n_ok, TIMES: tl.constexpr):
    """What belongs to a tile's columns, read before the sums, so that nothing waits for memory after them.

    One number a thread, with TIMES threads a column: of fewer numbers than threads the compiler makes one read for each
    register in which a sum lies, and has to hold them all.
    """
    if TIMES == 1:
        return tl.load(ptr + n, mask=n_ok, other=0)
    else:
        copy = tl.arange(0, TIMES)[:, None]
        return tl.load(ptr + n[None, :] + 0 * copy, mask=n_ok[None, :] & (copy == 0), other=0)


@triton.jit
def _column(asked, TIMES: tl.constexpr):
    """What `_asked` reads, ``[1, BN]``, once it is needed."""
    return (asked if TIMES == 1 else tl.sum(asked, 0))[None, :]


@triton.jit
def _width(widths, s, COUNT: tl.constexpr):
    """Padded channels of segment s: of numbers that the kernel is given, as s is known only as it runs."""
    found = widths[0]
    for other in tl.static_range(1, COUNT):
        found = tl.where(s == other, widths[other], found)
    return found


@triton.jit
def _scaled(
    a, w, acc_ptr, scale_a_ptr, zero_a_ptr, scale_w_ptr, sum_w_ptr, s, time, a_start, w_start, wide, first, n0, rows,
    where, m_ok, kept, n, n_ok, part, columns, out_rows, pitch, length_a, length_w,
    COUNT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, PAIRED: tl.constexpr, KEEP: tl.constexpr, TIMES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """float32 ``[BM, BN]`` of one segment: its integer sums, corrected and scaled."""
    sums = _asked(sum_w_ptr + s * columns, n, n_ok, TIMES)
    scale_w = _asked(scale_w_ptr + s, n * COUNT, n_ok, TIMES)
    acc = _segment_sum(
        a, w, rows, first, n0 if TMA else n, m_ok, n_ok, a_start, w_start, pitch, length_a, length_w, wide, 0,
        KH, KW, TMA, PAIRED, 1, BM, BN, BK,
    )
    scale, zero = _activation(scale_a_ptr, zero_a_ptr, time, s, kept, part, COUNT, TABLE, PARTS)
    acc += (128 - zero) * _column(sums, TIMES)
    if KEEP:
        at = where.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(acc_ptr + s * out_rows.to(tl.int64) * columns + at, acc, mask=kept[:, None] & n_ok[None, :])
    return (acc.to(tl.float32) * scale) * _column(scale_w, TIMES)


@triton.jit
def _values(
    a, w, acc_ptr, bias_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, first, n0, rows, where,
    sample, m_ok, kept, n, n_ok, part, columns, out_rows, pitch, length_a, length_w, width,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, PAIRED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    THREADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """float32 ``[BM, BN]`` of a tile: integer sums, scaled, with the bias (the order is that of docs/numerics.md).

    COUNT: of segments; the padded channels of one are WIDTH, or where that is 0 ``width`` (so that layers share a
    build), of several the numbers ``width``. Several go through one loop: written out one after the other, eight take
    the compiler eight times as long, and for every layer anew.
    """
    TIMES: tl.constexpr = THREADS // BN if THREADS > BN else 1
    time = _time(times_ptr, sample, where, kept, part, TABLE, PARTS)
    if BIAS:
        bias = _asked(bias_ptr, n, n_ok, TIMES)
    if COUNT == 1:
        total = _scaled(
            a, w, acc_ptr, scale_a_ptr, zero_a_ptr, scale_w_ptr, sum_w_ptr, 0, time, 0, 0,
            WIDTH if WIDTH > 0 else width, first, n0, rows, where, m_ok, kept, n, n_ok, part, columns, out_rows, pitch,
            length_a, length_w, COUNT, KH, KW, TABLE, PARTS, TMA, PAIRED, KEEP, TIMES, BM, BN, BK,
        )
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32)
        start = 0
        for s in range(COUNT):
            wide = _width(width, s, COUNT)
            scaled = _scaled(
                a, w, acc_ptr, scale_a_ptr, zero_a_ptr, scale_w_ptr, sum_w_ptr, s, time, start, start * (KH * KW),
                wide, first, n0, rows, where, m_ok, kept, n, n_ok, part, columns, out_rows, pitch, length_a, length_w,
                COUNT, KH, KW, TABLE, PARTS, TMA, PAIRED, KEEP, TIMES, BM, BN, BK,
            )
            total = tl.where(s == 0, scaled, total + scaled)  # 0 + x is not x where x is -0
            start += wide
    if BIAS:
        total += _column(bias, TIMES).to(tl.float32)
    return total


@triton.jit
def _halves(values, BM: tl.constexpr, HALF: tl.constexpr):
    """Columns 0 .. HALF - 1 and the rest: of sums as they lie in registers nothing moves."""
    return tl.split(tl.permute(tl.reshape(values, (BM, 2, HALF)), (0, 2, 1)))


@triton.jit
def _store(
    values, y_ptr, residual_ptr, shared_ptr, where, sample, kept, first, end, columns,
    RESIDUAL: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr,
):
    """What is added, in this order, and the one rounding. SHARED 2: a sample's row is multiplied by."""
    n = first + tl.arange(0, BN)
    inside = kept[:, None] & (n < end)[None, :]
    at = where.to(tl.int64)[:, None] * columns + n[None, :]
    if SHARED > 0:
        own = tl.load(shared_ptr + sample.to(tl.int64)[:, None] * columns + n[None, :], mask=inside,
                      other=0.0).to(tl.float32)
        values = values * own if SHARED == 2 else values + own
    if RESIDUAL:
        values += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, values.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a, w, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, m_count, n_count, out_rows, part_rows, per_sample, pitch, height, out_h, out_w, stride, length_a,
    length_w, width,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr,
    PARTS: tl.constexpr, SPATIAL: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SHARED: tl.constexpr, KEEP: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr, THREADS: tl.constexpr,
):
    """A tile of ``y [PARTS, rows, n_count]``. Part p multiplies the rows of ``a`` from ``p * part_rows`` on.

    SPLIT_K: so many programs have a part of a tile's steps each, and write its int32 sums to ``acc [SPLIT_K, rows,
    n_count]``; nothing else.
    """
    in_turn(EARLY)
    tiles = tl.cdiv(n_count, BN)
    tile = tl.program_id(0) // SPLIT_K
    row, column = _place(tile, tl.cdiv(m_count, BM), tiles * PARTS, GROUP)
    part, columns = 0, n_count * PARTS
    m0, n0, end = row * BM, column * BN, n_count
    if PARTS > 1:
        part = column // tiles
        n0 = part * n_count + (column % tiles) * BN
        end = (part + 1) * n_count
        y_ptr += part.to(tl.int64) * (out_rows - 1) * n_count  # columns are counted over all parts
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    n_ok = n < end
    rows, where, sample, output = _geometry(m, pitch, height, out_h, out_w, stride, per_sample, SPATIAL)
    m_ok = m < m_count
    kept = m_ok & output
    if TABLE == 4:
        sample = part * per_sample
    if SPLIT_K > 1:  # of one part
        share = tl.program_id(0) % SPLIT_K
        acc = _segment_sum(
            a, w, rows, m0, n0 if TMA else n, m_ok, n_ok, 0, 0, pitch, length_a, length_w,
            WIDTH if WIDTH > 0 else width, share, KH, KW, TMA, False, SPLIT_K, BM, BN, BK,
        )
        at = (share * out_rows.to(tl.int64) + where)[:, None] * columns + n[None, :]
        tl.store(acc_ptr + at, acc, mask=kept[:, None] & n_ok[None, :])
    else:
        begin = part * part_rows
        total = _values(
            a, w, acc_ptr, bias_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, begin + m0, n0,
            begin + rows, where, sample, m_ok, kept, n, n_ok, part, columns, out_rows, pitch, length_a, length_w, width,
            COUNT, WIDTH, KH, KW, TABLE, PARTS, TMA, False, BIAS, KEEP, THREADS, BM, BN, BK,
        )
        if RESIDUAL or SHARED > 0:  # half the columns at a time: what is added and where from need fewer registers
            HALF: tl.constexpr = BN // 2
            left, right = _halves(total, BM, HALF)
            _store(left, y_ptr, residual_ptr, shared_ptr, where, sample, kept, n0, end, n_count, RESIDUAL, SHARED, HALF)
            _store(right, y_ptr, residual_ptr, shared_ptr, where, sample, kept, n0 + HALF, end, n_count, RESIDUAL,
                   SHARED, HALF)
        else:
            _store(total, y_ptr, residual_ptr, shared_ptr, where, sample, kept, n0, end, n_count, False, 0, BN)


# ---- the gated product -----------------------------------------------------------------------------------------------
@triton.jit
def _geglu(hidden, gate, TYPE: tl.constexpr):
    """``hidden * gelu(gate)`` with the roundings of separate operations in TYPE."""
    return rounded(rounded(hidden, TYPE) * rounded(gelu(rounded(gate, TYPE)), TYPE), TYPE)


@triton.jit
def gated(
    a, w, y_ptr, bias_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, factor_ptr, inverse_ptr,
    zero_ptr, next_times_ptr, top, m_count, n_count, length_a, length_w, length_y, width,
    TMA: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, TYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Codes less 128 of the next layer: a tile has BN / 2 hidden channels and their gates, ``n_count`` rows of w on."""
    in_turn(EARLY)
    HALF: tl.constexpr = BN // 2
    row, column = _place(tl.program_id(0), tl.cdiv(m_count, BM), tl.cdiv(length_y, HALF), GROUP)
    m, n0 = row * BM + tl.arange(0, BM), column * HALF
    both = tl.arange(0, BN)
    pair = n0 + both % HALF
    m_ok = m < m_count
    time = tl.load(next_times_ptr)
    total = _values(
        a, w, y_ptr, bias_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr, sum_w_ptr, row * BM, n0, m, m, m,
        m_ok, m_ok, pair + (both // HALF) * n_count, pair < n_count, 0, 2 * n_count, m_count, 0, length_a, length_w,
        width, 1, 0, 1, 1, 0, 1, TMA, True, BIAS, False, THREADS, BM, BN, BK,
    )
    hidden, gate = _halves(total, BM, HALF)
    value = _geglu(hidden, gate, TYPE)
    n = n0 + tl.arange(0, HALF)
    if FACTOR:
        value = value * tl.load(factor_ptr + n, mask=n < n_count, other=0.0)[None, :]
    zero, top = zero_and_top(zero_ptr, time, top)
    value = tl.where((n < n_count)[None, :], value, 0.0)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * length_y + n[None, :],
             centred(value, tl.load(inverse_ptr + time), zero, top), mask=m_ok[:, None] & (n < length_y)[None, :])


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


@triton.jit
def unpack_each(
    parts, SIZES: tl.constexpr, BITS: tl.constexpr, HALVED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """`unpack` of several matrices of one segment, one after the other: the ``data``, zero-points and ``out`` of each.

    SIZES: (first tile, end of its tiles, tiles of a row, rows, columns, channels, stride, where three planes begin) of
    each.
    """
    tile = tl.program_id(0)
    for p in tl.static_range(len(SIZES)):
        if (tile >= SIZES[p][0]) & (tile < SIZES[p][1]):
            own = tile - SIZES[p][0]
            rows, length, first = SIZES[p][3], SIZES[p][4], (own % SIZES[p][2]) * BK
            row, k = (own // SIZES[p][2]) * BR + tl.arange(0, BR), first + tl.arange(0, BK)
            code = codes(parts[p][0], row, rows, first, length, SIZES[p][6], SIZES[p][7], SIZES[p][8], SIZES[p][9],
                         BITS, BR, BK).to(tl.int8)  # fmt: skip
            if HALVED:
                code = code * 2
            zero = tl.load(parts[p][1] + row[:, None], mask=(row < rows)[:, None], other=0)
            value = tl.where((k < SIZES[p][5])[None, :], code - zero.to(tl.int8), 0).to(tl.int8)
            tl.store(parts[p][2] + row.to(tl.int64)[:, None] * length + k[None, :], value,
                     mask=(row < rows)[:, None] & (k < length)[None, :])


@triton.jit
def unpack_sorted(
    data, zero_ptr, order_ptr, columns_ptr, out_ptr, rows, length, stride, four, two, one,
    BITS: tl.constexpr, ORDER: tl.constexpr, HALVED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):
    """`unpack` into columns each of which holds any of the packed row's, or 0 where that is -1."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    k = tl.load(columns_ptr + column, mask=column < length, other=-1)
    ok = (row < rows)[:, None] & (k >= 0)[None, :]
    at = row.to(tl.int64)[:, None] * stride
    code = codes_at(data, at, tl.maximum(k, 0).to(tl.uint32)[None, :], ok, four, two, one, BITS).to(tl.int8)
    if HALVED:
        code = code * 2
    place = row
    if ORDER:
        place = tl.load(order_ptr + row, mask=row < rows, other=0).to(tl.int32)
    zero = tl.load(zero_ptr + place, mask=row < rows, other=0)[:, None]
    value = tl.where(ok, code - zero.to(tl.int8), 0).to(tl.int8)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * length + column[None, :], value,
             mask=(row < rows)[:, None] & (column < length)[None, :])
