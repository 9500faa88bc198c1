"""The Triton code of `bitbrush.kernels.triton_decode`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_encode_kernels import in_turn


@triton.jit
def _values(data, at, k, ok, WIDTH: tl.constexpr):
    """Values below ``2**WIDTH`` at the places k (uint32) of a plane that begins at ``data + at``."""
    byte = tl.load(data + at + k // (8 // WIDTH), mask=ok, other=0).to(tl.uint32)
    return (byte >> ((k % (8 // WIDTH)) * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def spread(b, WIDTH: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Bytes ``[ROWS, COUNT * WIDTH / 8]`` as values below ``2**WIDTH``, ``[ROWS, COUNT]``: neighbours in a byte stay
    neighbours in a register, so loads and stores are wide."""
    if WIDTH == 4:
        return tl.reshape(tl.join(b & 15, b >> 4), (ROWS, COUNT))
    elif WIDTH == 2:
        even, odd = tl.join(b & 3, (b >> 4) & 3), tl.join((b >> 2) & 3, b >> 6)
        return tl.reshape(tl.join(even, odd), (ROWS, COUNT))
    else:
        e0, e1 = tl.join(b & 1, (b >> 4) & 1), tl.join((b >> 2) & 1, (b >> 6) & 1)
        o0, o1 = tl.join((b >> 1) & 1, (b >> 5) & 1), tl.join((b >> 3) & 1, b >> 7)
        return tl.reshape(tl.join(tl.join(e0, e1), tl.join(o0, o1)), (ROWS, COUNT))


@triton.jit
def plane(data, row, rows, first, length, stride, WIDTH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """One plane of the codes first .. first + BK of BR rows, uint8 ``[BR, BK]``. A plane is padded to 16 bytes."""
    byte = first * WIDTH // 8 + tl.arange(0, BK * WIDTH // 8)
    ok = (row < rows)[:, None] & (byte < tl.cdiv(length * WIDTH, 128) * 16)[None, :]
    return spread(tl.load(data + row.to(tl.int64)[:, None] * stride + byte[None, :], mask=ok, other=0), WIDTH, BR, BK)


@triton.jit
def codes(
    data, row, rows, first, length, stride, four, two, one, BITS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """Codes uint8 ``[BR, BK]`` of packed rows, from all planes (widest first, low-order bits first)."""
    if BITS == 8:
        k = first + tl.arange(0, BK)
        ok = (row < rows)[:, None] & (k < length)[None, :]
        code = tl.load(data + row.to(tl.int64)[:, None] * stride + k[None, :], mask=ok, other=0) ^ 128
    elif BITS & 4:
        code = plane(data + four, row, rows, first, length, stride, 4, BR, BK)
        if BITS & 2:
            code |= plane(data + two, row, rows, first, length, stride, 2, BR, BK) << 4
        if BITS & 1:
            code |= plane(data + one, row, rows, first, length, stride, 1, BR, BK) << (BITS - 1)
    elif BITS & 2:
        code = plane(data + two, row, rows, first, length, stride, 2, BR, BK)
        if BITS & 1:
            code |= plane(data + one, row, rows, first, length, stride, 1, BR, BK) << 2
    else:
        code = plane(data + one, row, rows, first, length, stride, 1, BR, BK)
    return code


@triton.jit
def codes_at(data, at, k, ok, four, two, one, BITS: tl.constexpr):
    """Codes uint8 at any places k (uint32) of packed rows that begin at ``data + at``: a load for each plane."""
    if BITS == 8:
        code = tl.load(data + at + k, mask=ok, other=0) ^ 128
    elif BITS & 4:
        code = _values(data + four, at, k, ok, 4)
        if BITS & 2:
            code |= _values(data + two, at, k, ok, 2) << 4
        if BITS & 1:
            code |= _values(data + one, at, k, ok, 1) << (BITS - 1)
    elif BITS & 2:
        code = _values(data + two, at, k, ok, 2)
        if BITS & 1:
            code |= _values(data + one, at, k, ok, 1) << 2
    else:
        code = _values(data + one, at, k, ok, 1)
    return code.to(tl.uint8)


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
    code = codes(data, row, rows, tl.program_id(1) * BK, length, stride, four, two, one, BITS, BR, BK)
    if HALVED:
        code = code * 2
    place = row
    if ORDER:
        place = tl.load(order_ptr + row, mask=row < rows, other=0).to(tl.int32)
    real = k < length
    column = k
    if len(ENDS) == 1:
        table = (place * segments)[:, None]
        within = (row < rows)[:, None]
        if REAL[0][0] != REAL[0][1]:
            real = real & (k % REAL[0][1] < REAL[0][0])
            column = k // REAL[0][1] * REAL[0][2] + k % REAL[0][1]
    else:
        segment = tl.zeros((BK,), dtype=tl.int32)
        begin = 0
        for s in tl.static_range(len(ENDS)):
            here = (k >= begin) & (k < ENDS[s])
            channel = (k - begin) % REAL[s][1]
            segment = tl.where(here, s, segment)
            column = tl.where(here, (k - begin) // REAL[s][1] * REAL[s][2] + STARTS[s] + channel, column)
            real = real & ((channel < REAL[s][0]) | (k < begin) | (k >= ENDS[s]))
            begin = ENDS[s]
        table = (place * segments)[:, None] + segment[None, :]
        within = ok
    zero = tl.load(zero_ptr + table, mask=within, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + table, mask=within, other=0.0)
    value = (code.to(tl.float32) - zero) * scale
    where = place.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=ok & real[None, :])


@triton.jit
def _code(data, k, ok, four, two, one, BITS: tl.constexpr):
    """Codes uint32 at the places k (uint32) of one codebook, from all its planes."""
    if BITS == 8:
        code = tl.load(data + k, mask=ok, other=0).to(tl.uint32)
    else:
        code = tl.zeros_like(k)
        shift = 0
        if BITS & 4:
            code += _values(data, four, k, ok, 4)
            shift += 4
        if BITS & 2:
            code += _values(data, two, k, ok, 2) << shift
            shift += 2
        if BITS & 1:
            code += _values(data, one, k, ok, 1) << shift
    return code


@triton.jit
def codebook(
    data, book_ptr, scale_ptr, out_ptr, count, stride, four, two, one,
    GROUPS: tl.constexpr, BOOKS: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    BG: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):
    """The vectors of BG groups, added in the order of the codebooks, times the row's scale; SIZE values each.

    A thread has whole groups, those of a warp lie side by side: a codeword of 8 is one load, 8 weights are one store,
    and codes come as single bytes. They are declared not to be contiguous: four codes a thread would have to be dealt
    out again through shared memory, behind barriers.

    GROUPS: of a row. EVEN: BG divides the number of groups. EARLY: see `in_turn`; codes and tables are no kernel's
    output, so they are read before the wait.
    """
    first = tl.program_id(0) * BG
    if first == 0:  # all codebooks into the second-level cache while the codes are on their way
        line = tl.arange(0, BG) * 64
        tl.load(book_ptr + line, mask=line < (BOOKS << BITS) * SIZE, other=0.0, volatile=True)
    k = first + tl.max_contiguous(tl.arange(0, BG), 1)
    ok, place = (k < count) | EVEN, k.to(tl.uint32)
    lane = tl.arange(0, WIDE)
    inside = (lane < SIZE)[None, :] | (SIZE == WIDE)
    total = tl.zeros((BG, WIDE), dtype=tl.float32)
    for book in tl.static_range(BOOKS):
        code = _code(data + book * stride, place, ok, four, two, one, BITS)
        entry = code[:, None] * SIZE + lane[None, :]
        vector = tl.load(book_ptr + (book << BITS) * SIZE + entry, mask=inside, other=0.0).to(tl.float32)
        if book == 0:
            total = vector
        else:
            total += vector
    scale = tl.load(scale_ptr + place // GROUPS, mask=ok, other=0.0).to(tl.float32)
    value = (total * scale[:, None]).to(out_ptr.dtype.element_ty)
    in_turn(EARLY)
    where = k.to(tl.int64)[:, None] * SIZE + lane[None, :]
    tl.store(out_ptr + where, value, mask=ok[:, None] & inside)
