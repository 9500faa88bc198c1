"""The Triton code of `bitbrush.kernels.triton_decode`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _values(data, at, k, ok, WIDTH: tl.constexpr):
    """Values below ``2**WIDTH`` at the places k of a plane that begins at ``data + at``."""
    byte = tl.load(data + at + k * WIDTH // 8, mask=ok, other=0).to(tl.int32)
    return (byte >> ((k % (8 // WIDTH)) * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def affine(
    data, scale_ptr, zero_ptr, order_ptr, out_ptr, rows, length, stride, columns, four, two, one, segments,
    ENDS: tl.constexpr, REAL: tl.constexpr, STARTS: tl.constexpr, BITS: tl.constexpr, ORDER: tl.constexpr,
    HALVED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):
    """``(code - zero_point) * scale`` of the packed rows of one bit class, without padding, in (kh, kw, channel) order.

    ENDS: where each segment ends in a packed row. REAL: (channels, padded channels, channels of all) of each.
    STARTS: its first channel.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    ok = (row < rows)[:, None] & (k < length)[None, :]
    base = row.to(tl.int64)[:, None] * stride
    k2 = k[None, :] + tl.zeros((BR, BK), dtype=tl.int32)
    if BITS == 8:
        code = tl.load(data + base + k2, mask=ok, other=0).to(tl.int32) ^ 128
    else:
        code = tl.zeros((BR, BK), dtype=tl.int32)
        shift = 0
        if BITS & 4:
            code += _values(data, base + four, k2, ok, 4)
            shift += 4
        if BITS & 2:
            code += _values(data, base + two, k2, ok, 2) << shift
            shift += 2
        if BITS & 1:
            code += _values(data, base + one, k2, ok, 1) << shift
    if HALVED:
        code = code * 2
    place = row
    if ORDER:
        place = tl.load(order_ptr + row, mask=row < rows, other=0).to(tl.int32)
    segment = tl.zeros((BK,), dtype=tl.int32)
    column = tl.zeros((BK,), dtype=tl.int32)
    real = k < 0
    begin = 0
    for s in tl.static_range(len(ENDS)):
        here = (k >= begin) & (k < ENDS[s])
        channel = (k - begin) % REAL[s][1]
        segment = tl.where(here, s, segment)
        column = tl.where(here, (k - begin) // REAL[s][1] * REAL[s][2] + STARTS[s] + channel, column)
        real = real | (here & (channel < REAL[s][0]))
        begin = ENDS[s]
    table = place.to(tl.int64)[:, None] * segments + segment[None, :]
    zero = tl.load(zero_ptr + table, mask=ok, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + table, mask=ok, other=0.0)
    value = (code.to(tl.float32) - zero) * scale
    where = place.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=ok & real[None, :])


@triton.jit
def codebook(
    data, book_ptr, scale_ptr, out_ptr, count, groups, stride, four, two, one,
    BOOKS: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, BG: tl.constexpr,
):
    """The vectors of BG groups, added in the order of the codebooks, times the row's scale; SIZE values each."""
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    ok = group < count
    lane = tl.arange(0, WIDE)
    inside = ok[:, None] & (lane < SIZE)[None, :]
    total = tl.zeros((BG, WIDE), dtype=tl.float32)
    for book in tl.static_range(BOOKS):
        start = book * stride
        if BITS == 8:
            code = tl.load(data + start + group, mask=ok, other=0).to(tl.int32)
        else:
            code = tl.zeros((BG,), dtype=tl.int32)
            shift = 0
            if BITS & 4:
                code += _values(data, start + four, group, ok, 4)
                shift += 4
            if BITS & 2:
                code += _values(data, start + two, group, ok, 2) << shift
                shift += 2
            if BITS & 1:
                code += _values(data, start + one, group, ok, 1) << shift
        entry = (book * (1 << BITS) + code)[:, None] * SIZE + lane[None, :]
        vector = tl.load(book_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        if book == 0:
            total = vector
        else:
            total += vector
    scale = tl.load(scale_ptr + group // groups, mask=ok, other=0.0).to(tl.float32)
    where = group.to(tl.int64)[:, None] * SIZE + lane[None, :]
    tl.store(out_ptr + where, (total * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
