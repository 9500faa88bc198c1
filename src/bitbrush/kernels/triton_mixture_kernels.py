"""The Triton code of `bitbrush.kernels.triton_mixture`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.

Adding 1.5 * 2**23 rounds a float32 number half to even and leaves integers next to each other, so codes are clamped
where they stand, the zero-point in the ends: ``t - 1.5 * 2**23`` is ``code - zero``, without rounding. What is too
large for that (2**22) is clamped either way (`bitbrush.numbers.codec.encode_bytes`).
"""

from __future__ import annotations

import triton
import triton.language as tl

STRIDES = ("share_k", "share_b", "share_c", "scale_k", "scale_b", "scale_c", "zero_k", "zero_b", "zero_c")
TABLES = ("share_ptr", "scale_ptr", "zero_ptr")
"""Numbers of which a build for every kind is not worth its time: they are asked for a few times a program."""


@triton.jit
def entries(rows, columns, channels, ALONG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(sample, channel, whether they are there, offset of the block's values, which of them are there): the first three
    a row ``[BR, 1]``, or with ALONG a column ``[1, BC]``; of a single row numbers, which a thread reads but once."""
    row = tl.program_id(0) if BR == 1 else tl.program_id(0) * BR + tl.arange(0, BR)[:, None]
    column = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    if ALONG:
        first = tl.program_id(2).to(tl.int64) * rows
        sample, channel, there = tl.program_id(2) + column * 0, column, column < columns
    else:
        first = tl.zeros((1, 1), tl.int64)
        sample, channel, there = row // channels, row % channels, row < rows
    return sample, channel, there, (first + row) * columns + column, (row < rows) & (column < columns)


@triton.jit
def grid(scale_ptr, zero_ptr, scale_at, zero_at, there, top):
    """(scale, its reciprocal, the ends of the codes) of one member; the ends as the module says."""
    scale = tl.load(scale_ptr + scale_at, mask=there, other=1.0)
    low = 12582912.0 - tl.load(zero_ptr + zero_at, mask=there, other=0.0)
    return scale, tl.div_rn(scale * 0.0 + 1.0, scale), low, low + top


@triton.jit
def summed(values, ALONG: tl.constexpr, BR: tl.constexpr):
    """Over the values of each entry."""
    if ALONG:
        return tl.sum(values, axis=0, keep_dims=True)
    elif BR == 1:
        return tl.sum(values)
    else:
        return tl.sum(values, axis=1, keep_dims=True)


@triton.jit
def clamped(code, low, high):
    """NaN stays NaN, as in torch.clamp."""
    code = tl.maximum(code, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(code, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=("channels", *STRIDES), do_not_specialize_on_alignment=TABLES)
def forward(
    x_ptr, out_ptr, share_ptr, scale_ptr, zero_ptr, rows, columns, channels, top,
    share_k, share_b, share_c, scale_k, scale_b, scale_c, zero_k, zero_b, zero_c,
    COUNT: tl.constexpr, ALONG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """One block: out = sum over k of share_k * (code_k - zero_k) * scale_k, added in the order of k."""
    sample, channel, there, where, inside = entries(rows, columns, channels, ALONG, BR, BC)
    share_at, scale_at = sample * share_b + channel * share_c, sample * scale_b + channel * scale_c
    zero_at = sample * zero_b + channel * zero_c
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    total = tl.full((BR, BC), -0.0, tl.float32)  # the one number that changes nothing it is added to
    for k in range(COUNT):
        share = tl.load(share_ptr + share_at + k * share_k, mask=there, other=0.0)
        scale, inverse, low, high = grid(scale_ptr, zero_ptr, scale_at + k * scale_k, zero_at + k * zero_k, there, top)
        value = (clamped(x * inverse + 12582912.0, low, high) - 12582912.0) * scale
        total += share * value
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("channels", *STRIDES), do_not_specialize_on_alignment=TABLES)
def backward(
    grad_ptr, x_ptr, dx_ptr, part_ptr, share_ptr, scale_ptr, zero_ptr, rows, columns, channels, top,
    share_k, share_b, share_c, scale_k, scale_b, scale_c, zero_k, zero_b, zero_c,
    DX: tl.constexpr, SHARE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    COUNT: tl.constexpr, ALONG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """One block: dx, and the block's sums for share, scale and zero-point (those that are wanted), for each entry of
    the block at ``[which, k, block, entry]``."""
    sample, channel, there, where, inside = entries(rows, columns, channels, ALONG, BR, BC)
    share_at, scale_at = sample * share_b + channel * share_c, sample * scale_b + channel * scale_c
    zero_at = sample * zero_b + channel * zero_c
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + where, mask=inside, other=0.0).to(tl.float32)
    dx = tl.full((BR, BC), -0.0, tl.float32)
    if ALONG:
        block, blocks, width, entry = tl.program_id(0), tl.num_programs(0), tl.num_programs(2) * columns, channel
        entry += sample * columns
    else:
        block, blocks, width, entry = tl.program_id(1), tl.num_programs(1), rows, sample * channels + channel
    for k in range(COUNT):
        share = tl.load(share_ptr + share_at + k * share_k, mask=there, other=0.0)
        scale, inverse, low, high = grid(scale_ptr, zero_ptr, scale_at + k * scale_k, zero_at + k * zero_k, there, top)
        v = x * inverse
        code = v + 12582912.0
        end = clamped(code, low, high)
        free = (code >= low) & (code <= high)
        steps = end - 12582912.0
        if DX:
            dx += tl.where(free, share * grad, 0.0)
        place = part_ptr + (k * blocks + block).to(tl.int64) * width + entry
        whole = COUNT * blocks.to(tl.int64) * width
        if SHARE:
            tl.store(place, summed(grad * steps, ALONG, BR) * scale, mask=there)
            place += whole
        if SCALE:
            slope = steps - tl.where(free, v, 0.0)
            tl.store(place, summed(grad * slope, ALONG, BR) * share, mask=there)
            place += whole
        if ZERO:
            beyond = summed(tl.where(free, 0.0, grad), ALONG, BR)
            tl.store(place, beyond * -(share * scale), mask=there)
    if DX:
        tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask=inside)
