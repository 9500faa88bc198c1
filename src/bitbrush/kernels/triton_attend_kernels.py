"""The Triton code of `bitbrush.kernels.triton_attend`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_encode_kernels import centred, in_turn, zero_and_top
from bitbrush.kernels.triton_norm_kernels import rounded


@triton.jit
def _scores(q, k_ptr, row_k, first, keys, column, scale, SIZE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr):
    """Scores of a block of keys, in powers of two."""
    n = first + tl.arange(0, BN)
    there = (column < SIZE)[None, :] if EVEN else (n < keys)[:, None] & (column < SIZE)[None, :]
    k = tl.load(k_ptr + n.to(tl.int64)[:, None] * row_k + column[None, :], mask=there, other=0.0)
    s = tl.dot(q, tl.trans(k)) * scale
    return s if EVEN else tl.where((n < keys)[None, :], s, float("-inf"))


@triton.jit
def _values(v_ptr, row_v, first, keys, column, SIZE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr):
    n = first + tl.arange(0, BN)
    there = (column < SIZE)[None, :] if EVEN else (n < keys)[:, None] & (column < SIZE)[None, :]
    return tl.load(v_ptr + n.to(tl.int64)[:, None] * row_v + column[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=("queries", "keys"))
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, inverse_ptr, zero_ptr, times_ptr, factor_ptr, top, scale, queries, keys,
    sample_q, head_q, row_q, sample_k, head_k, row_k, sample_v, head_v, row_v,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, FACTOR: tl.constexpr, ONE: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):
    """Codes less 128 of BM queries of a head.

    ONE: all keys are one block. Otherwise the softmax is summed as keys come (Milakov and Gimelshein 2018).
    """
    in_turn(EARLY)
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    m, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, WIDE)
    kept = (m < queries)[:, None] & (column < SIZE)[None, :]
    q_ptr += sample.to(tl.int64) * sample_q + head * head_q
    k_ptr += sample.to(tl.int64) * sample_k + head * head_k
    v_ptr += sample.to(tl.int64) * sample_v + head * head_v
    q = tl.load(q_ptr + m.to(tl.int64)[:, None] * row_q + column[None, :], mask=kept, other=0.0)
    time = tl.load(times_ptr)
    inverse = tl.load(inverse_ptr + time)
    zero, top = zero_and_top(zero_ptr, time, top)
    if ONE:
        s = _scores(q, k_ptr, row_k, 0, keys, column, scale, SIZE, EVEN, BN)
        v = _values(v_ptr, row_v, 0, keys, column, SIZE, EVEN, BN)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        whole = tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v)
    else:
        largest = tl.full((BM,), float("-inf"), dtype=tl.float32)
        whole = tl.zeros((BM,), dtype=tl.float32)
        y = tl.zeros((BM, WIDE), dtype=tl.float32)
        for first in range(0, keys, BN):
            s = _scores(q, k_ptr, row_k, first, keys, column, scale, SIZE, EVEN, BN)
            most = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s - most[:, None])
            less = tl.exp2(largest - most)
            whole = tl.fma(whole, less, tl.sum(p, 1))
            v = _values(v_ptr, row_v, first, keys, column, SIZE, EVEN, BN)
            y = tl.dot(p.to(v.dtype), v, y * less[:, None])
            largest = most
    y = rounded(y * (1.0 / whole)[:, None], q_ptr.dtype.element_ty)
    if FACTOR:
        y = y * tl.load(factor_ptr + head * SIZE + column, mask=column < SIZE, other=0.0)[None, :]
    at = (sample.to(tl.int64) * queries + m)[:, None] * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(out_ptr + at, centred(y, inverse, zero, top), mask=kept)
