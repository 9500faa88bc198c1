"""The Triton code of `bitbrush.kernels.triton_correction`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(now_ptr, times_ptr, state_ptr, samples, count, OFF: tl.constexpr, TIMES: tl.constexpr, BATCH: tl.constexpr):
    """One program: the row of the timestep where it is its turn, else OFF, to ``state[0]``, the timestep to ``[1]``."""
    each = tl.arange(0, BATCH)
    first = tl.load(now_ptr).to(tl.float32)
    others = tl.load(now_ptr + each, mask=each < samples, other=0).to(tl.float32)
    same = tl.sum(((each < samples) & (others != first)).to(tl.int32), 0) == 0
    at = tl.arange(0, TIMES)
    hit = (at < count) & (tl.load(times_ptr + at, mask=at < count, other=0.0) == first)
    row = tl.sum(tl.where(hit, at, 0), 0)
    found = tl.sum(hit.to(tl.int32), 0) == 1
    position, last = tl.load(state_ptr), tl.load(state_ptr + 1)
    ahead = row.to(tl.float32) - position
    in_turn = ((row == 0) & (last <= first)) | (ahead == 0.0) | (ahead == 1.0)
    tl.debug_barrier()  # all have read what is written now
    tl.store(state_ptr, tl.where(found & same & in_turn, row, OFF).to(tl.float32))
    tl.store(state_ptr + 1, first)


@triton.jit
def shifted(x_ptr, out_ptr, state_ptr, shift_ptr, count, channels, inner, BLOCK: tl.constexpr):
    """``x - shift[row]``, or x where no row is next."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < count
    row = tl.load(state_ptr)
    entry = tl.maximum(row, 0.0).to(tl.int32) * channels + (at // inner) % channels
    shift = tl.where(row < 0, 0.0, tl.load(shift_ptr + entry, mask=kept, other=0.0))
    x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x - shift).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def corrected(x_ptr, out_ptr, state_ptr, scale_ptr, bias_ptr, count, channels, inner, BLOCK: tl.constexpr):
    """``scale[row] * x + bias[row]``, or x where no row is next."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < count
    row = tl.load(state_ptr)
    entry = tl.maximum(row, 0.0).to(tl.int32) * channels + (at // inner) % channels
    scale = tl.where(row < 0, 1.0, tl.load(scale_ptr + entry, mask=kept, other=1.0))
    bias = tl.where(row < 0, 0.0, tl.load(bias_ptr + entry, mask=kept, other=0.0))
    x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (scale * x + bias).to(out_ptr.dtype.element_ty), mask=kept)
