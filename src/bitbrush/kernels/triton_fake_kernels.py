"""The Triton code of `bitbrush.kernels.triton_fake` and `triton_rounds`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.errors import TritonError

ERRORS = (TritonError,)
"""What building a kernel may raise besides built-in errors."""


@triton.jit
def half_even(v):
    """``round`` half to even of float32: ``v - floor(v)`` is exact wherever it decides."""
    low = tl.floor(v)
    above = v - low
    odd = (low - 2.0 * tl.floor(low * 0.5)) == 1.0
    return tl.where((above > 0.5) | ((above == 0.5) & odd), low + 1.0, low)


@triton.jit
def forward(
    x_ptr, out_ptr, scale_ptr, inverse_ptr, zero_ptr, length, top,
    BLOCK: tl.constexpr,
):
    """One block of one row: out = (clamp(round(x * inverse) + zero, 0, top) - zero) * scale."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = row.to(tl.int64) * length + column
    scale, inverse, zero = tl.load(scale_ptr + row), tl.load(inverse_ptr + row), tl.load(zero_ptr + row)
    x = tl.load(x_ptr + where, mask=column < length, other=0.0).to(tl.float32)
    code = half_even(x * inverse) + zero
    code = tl.where(code < 0.0, 0.0, tl.where(code > top, top, code))  # NaN stays NaN, as in torch.clamp
    tl.store(out_ptr + where, ((code - zero) * scale).to(out_ptr.dtype.element_ty), mask=column < length)


@triton.jit
def tables(
    x_ptr, out_ptr, scale_ptr, inverse_ptr, zero_ptr, rows, columns, entries, top,
    ALONG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """A block of one sample, as `forward`: with ALONG an entry of the table a column, else an entry a row."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    sample = tl.program_id(2)
    where = (sample.to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    entry = (sample * entries + column)[None, :] if ALONG else (sample * entries + row % entries)[:, None]
    there = (column < columns)[None, :] if ALONG else (row < rows)[:, None]
    scale, zero = tl.load(scale_ptr + entry, mask=there, other=1.0), tl.load(zero_ptr + entry, mask=there, other=0.0)
    inverse = tl.load(inverse_ptr + entry, mask=there, other=1.0)
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    code = half_even(x * inverse) + zero
    code = tl.where(code < 0.0, 0.0, tl.where(code > top, top, code))  # NaN stays NaN, as in torch.clamp
    tl.store(out_ptr + where, ((code - zero) * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def log2(
    x_ptr, out_ptr, delta_ptr, length, width, top, EXEMPT: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of a stretch with one delta: the power of two next to x / delta by its bits, clamped, times delta.

    2**64 keeps what matters from being subnormal; 0x4AFB0C carries a mantissa above that of sqrt(2) into the exponent
    (`bitbrush.numbers.codec.round_trip_log2`). Columns below EXEMPT stay as they are.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = tl.program_id(1).to(tl.int64) * length + column
    delta = tl.load(delta_ptr + tl.program_id(1))
    x = tl.load(x_ptr + where, mask=column < length, other=0.0).to(tl.float32)
    ratio = tl.div_rn(x * 18446744073709551616.0, tl.zeros((BLOCK,), tl.float32) + tl.where(delta > 0.0, delta, 1.0))
    bits = (ratio.to(tl.int32, bitcast=True) + 0x4AFB0C) & -8388608
    least, most = tl.maximum(191 - top, 0) << 23, 191 << 23
    bits = tl.minimum(tl.maximum(bits, least), most)
    value = delta * (bits.to(tl.float32, bitcast=True) * 5.421010862427522e-20)
    if EXEMPT:
        value = tl.where(column % width < EXEMPT, x, value)
    tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=column < length)


@triton.jit
def backward(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, dzero_ptr, scale_ptr, inverse_ptr,
    zero_ptr, length, top, TABLES: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one row: dx, and with TABLES the block's sums for dscale and dzero at [row, block]."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = row.to(tl.int64) * length + column
    scale, inverse, zero = tl.load(scale_ptr + row), tl.load(inverse_ptr + row), tl.load(zero_ptr + row)
    x = tl.load(x_ptr + where, mask=column < length, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + where, mask=column < length, other=0.0)
    v = x * inverse
    rounded = half_even(v)
    code = rounded + zero
    inside = (code >= 0.0) & (code <= top)
    tl.store(dx_ptr + where, tl.where(inside, grad, 0.0).to(dx_ptr.dtype.element_ty), mask=column < length)
    if TABLES:
        end = tl.where(code < 0.0, 0.0, tl.where(code > top, top, code))
        slope = tl.where(inside, rounded - v, end - zero)
        wide = grad.to(tl.float32)
        place = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(dscale_ptr + place, tl.sum(wide * slope))
        tl.store(dzero_ptr + place, tl.sum(tl.where(inside, 0.0, -(wide * scale))))


@triton.jit
def weight_forward(
    w_ptr, offset_ptr, out_ptr, start_ptr, length_ptr, scale_ptr, inverse_ptr, zero_ptr, top_ptr, binary_ptr,
    OFFSET: tl.constexpr, BINARY: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: out = (code - zero) * scale, where code is rounded to nearest, or down and up by OFFSET's decision."""
    row = tl.program_id(0)
    start, length = tl.load(start_ptr + row), tl.load(length_ptr + row)
    scale, inverse = tl.load(scale_ptr + row), tl.load(inverse_ptr + row)
    zero, top = tl.load(zero_ptr + row), tl.load(top_ptr + row)
    for begin in range(0, length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + start + column, mask=column < length, other=0.0)
        if OFFSET:
            up = tl.load(offset_ptr + start + column, mask=column < length, other=0).to(tl.float32)
            code = (tl.floor(w * inverse) + up) + zero
        else:
            code = half_even(w * inverse) + zero
        code = tl.where(code < 0.0, 0.0, tl.where(code > top, top, code))
        if BINARY:
            code = tl.where(tl.load(binary_ptr + row) != 0, tl.where(w >= 0.0, 2.0, 0.0), code)
        tl.store(out_ptr + start + column, (code - zero) * scale, mask=column < length)


@triton.jit
def weight_backward(
    grad_ptr, w_ptr, offset_ptr, dw_ptr, dscale_ptr, start_ptr, length_ptr, inverse_ptr, zero_ptr, top_ptr,
    binary_ptr, OFFSET: tl.constexpr, BINARY: tl.constexpr, TABLES: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row: dw, and with TABLES the sum over the row for dscale."""
    row = tl.program_id(0)
    start, length = tl.load(start_ptr + row), tl.load(length_ptr + row)
    inverse, zero, top = tl.load(inverse_ptr + row), tl.load(zero_ptr + row), tl.load(top_ptr + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + start + column, mask=column < length, other=0.0)
        grad = tl.load(grad_ptr + start + column, mask=column < length, other=0.0)
        v = w * inverse
        if OFFSET:
            rounded = tl.floor(v) + tl.load(offset_ptr + start + column, mask=column < length, other=0).to(tl.float32)
        else:
            rounded = half_even(v)
        code = rounded + zero
        inside = (code >= 0.0) & (code <= top)
        slope = tl.where(inside, rounded - v, tl.where(code < 0.0, 0.0, tl.where(code > top, top, code)) - zero)
        if BINARY:
            binary = tl.load(binary_ptr + row) != 0
            inside = tl.where(binary, tl.abs(v) <= 1.0, inside)
            slope = tl.where(binary, tl.where(w >= 0.0, 1.0, -1.0), slope)
        tl.store(dw_ptr + start + column, tl.where(inside, grad, 0.0), mask=column < length)
        if TABLES:
            total += grad * slope
    if TABLES:
        tl.store(dscale_ptr + row, tl.sum(total))
