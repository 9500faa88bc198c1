"""The Triton code of `bitbrush.kernels.triton_split`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_encode_kernels import in_turn


@triton.jit(do_not_specialize=("rows", "columns", "per_sample"))
def merge(
    partial_ptr, y_ptr, acc_ptr, bias_ptr, residual_ptr, shared_ptr, scale_a_ptr, zero_a_ptr, times_ptr, scale_w_ptr,
    sum_w_ptr, rows, columns, per_sample,
    SPLIT_K: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SHARED: tl.constexpr, KEEP: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):
    """``y`` of int32 ``partial [SPLIT_K, rows, columns]``: their sum, corrected and scaled as `triton_int8_kernels`
    does it, in the same order."""
    in_turn(EARLY)
    row, n = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)
    there = n < columns
    time = tl.load(times_ptr)
    total = tl.load(sum_w_ptr + n, mask=there, other=0)[None, :]
    scale_w = tl.load(scale_w_ptr + n, mask=there, other=0.0)[None, :]
    inside = (row < rows)[:, None] & there[None, :]
    at = row.to(tl.int64)[:, None] * columns + n[None, :]
    acc = tl.load(partial_ptr + at, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT_K):
        acc += tl.load(partial_ptr + part * rows.to(tl.int64) * columns + at, mask=inside, other=0)
    acc += (128 - tl.load(zero_a_ptr + time).to(tl.int32)) * total
    if KEEP:
        tl.store(acc_ptr + at, acc, mask=inside)
    value = (acc.to(tl.float32) * tl.load(scale_a_ptr + time)) * scale_w
    if BIAS:
        value += tl.load(bias_ptr + n, mask=there, other=0.0)[None, :].to(tl.float32)
    if SHARED > 0:
        of_sample = (row // per_sample).to(tl.int64)[:, None] * columns + n[None, :]
        own = tl.load(shared_ptr + of_sample, mask=inside, other=0.0).to(tl.float32)
        value = value * own if SHARED == 2 else value + own
    if RESIDUAL:
        value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=inside)
