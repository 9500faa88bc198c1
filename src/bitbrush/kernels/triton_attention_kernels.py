"""The Triton code of `bitbrush.kernels.triton_attention`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(
    q, base, k_ptr, k_sum_ptr, key, d, keys, row_k, shift_q, factor, root,
    SIZE: tl.constexpr,
):
    """(int32 sums of ``(code_q - zero_q) (code_k - zero_k)``, float32 scores) ``[BM, BN]`` of the keys at hand; behind
    the last key the score is minus infinity."""
    real = key < keys
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * row_k + d[None, :], mask=real[:, None] & (d < SIZE)[None, :],
                other=0)
    sums = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    sums += base[:, None] + (shift_q * tl.load(k_sum_ptr + key, mask=real, other=0))[None, :]
    return sums, tl.where(real[None, :], (sums.to(tl.float32) * factor) * root, float("-inf"))


@triton.jit
def half_even(v):
    """``round`` half to even of float32 from 0 to 2**22, as int32: the sum with 1.5 * 2**23 has no bits for a fraction,
    and its lowest are those of the integer."""
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _codes(scores, most, share, zero, top, real):
    """Codes of the probabilities less 128, int32; 0 for keys that are not there, which count for nothing. ``share``
    turns an exponential into a probability over the scale; none is negative, so no code is below the zero-point."""
    value = tl.exp(scores - most[:, None]) * share[:, None]
    code = half_even(tl.minimum(value, top - zero.to(tl.float32))) + (zero - 128)
    return tl.where(real[None, :], code, 0)


@triton.jit
def _table(scale_ptr, zero_ptr, times_ptr):
    """(scale, zero-point as int32) of an operand now."""
    time = tl.load(times_ptr)
    return tl.load(scale_ptr + time), tl.load(zero_ptr + time).to(tl.int32)


@triton.jit
def lay_out(
    k_ptr, v_ptr, turned_ptr, k_sum_ptr, v_sum_ptr, keys, row_k, row_v, row_turned,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """BN keys of one head: the sum of each row of k, v with its keys in a row, and what they add to the sums of v."""
    head, sample = tl.program_id(1) % HEADS, (tl.program_id(1) // HEADS).to(tl.int64)
    key, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    real = (key < keys)[:, None] & (d < SIZE)[None, :]
    row, column = (sample * keys + key)[:, None], (head * SIZE + d)[None, :]
    k = tl.load(k_ptr + row * row_k + column, mask=real, other=0)
    v = tl.load(v_ptr + row * row_v + column, mask=real, other=0)
    channel = (sample * HEADS + head) * SIZE + d
    tl.store(k_sum_ptr + (sample * HEADS + head) * keys + key, tl.sum(k.to(tl.int32), 1), mask=key < keys)
    tl.store(turned_ptr + channel[:, None] * row_turned + key[None, :], tl.trans(v),
             mask=(d < SIZE)[:, None] & (key < row_turned)[None, :])
    tl.atomic_add(v_sum_ptr + channel, tl.sum(v.to(tl.int32), 0), mask=d < SIZE, sem="relaxed")


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, y_ptr, k_sum_ptr, v_sum_ptr, scale_q_ptr, zero_q_ptr, times_q_ptr, scale_k_ptr, zero_k_ptr,
    times_k_ptr, scale_v_ptr, zero_v_ptr, times_v_ptr, scale_p_ptr, inverse_p_ptr, zero_p_ptr, times_p_ptr,
    sums_ptr, codes_ptr, totals_ptr, queries, keys, row_q, row_k, row_v, root, top,
    HEADS: tl.constexpr, SIZE: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):
    """BM queries of one head: first the largest score and the sum of exponentials of every row, then the codes of its
    probabilities and their product with v."""
    head, sample = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    m, d, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    scale_q, zero_q = _table(scale_q_ptr, zero_q_ptr, times_q_ptr)
    scale_k, zero_k = _table(scale_k_ptr, zero_k_ptr, times_k_ptr)
    scale_v, zero_v = _table(scale_v_ptr, zero_v_ptr, times_v_ptr)
    scale_p, zero_p = _table(scale_p_ptr, zero_p_ptr, times_p_ptr)
    inverse = tl.load(inverse_p_ptr + tl.load(times_p_ptr))
    whole = m < queries
    wide = sample.to(tl.int64)
    k_ptr += wide * keys * row_k + head * SIZE
    k_sum_ptr += (wide * HEADS + head) * keys
    v_ptr += (wide * HEADS + head) * SIZE * row_v
    q = tl.load(q_ptr + (wide * queries + m)[:, None] * row_q + (head * SIZE + d)[None, :],
                mask=whole[:, None] & (d < SIZE)[None, :], other=0)
    shift_q = 128 - zero_q
    base = (128 - zero_k) * (tl.sum(q.to(tl.int32), 1) + SIZE * shift_q)
    factor = scale_q * scale_k

    most = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, keys, BN):
        _, scores = _scores(q, base, k_ptr, k_sum_ptr, start + n, d, keys, row_k, shift_q, factor, root, SIZE)
        larger = tl.maximum(most, tl.max(scores, 1))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(scores - larger[:, None]), 1)
        most = larger

    share = inverse / total
    acc = tl.zeros((BM, BD), dtype=tl.int32)
    of_row = tl.zeros((BM,), dtype=tl.int32)
    place = tl.program_id(1).to(tl.int64) * queries + m
    for start in range(0, keys, BN):
        key = start + n
        sums, scores = _scores(q, base, k_ptr, k_sum_ptr, key, d, keys, row_k, shift_q, factor, root, SIZE)
        p = _codes(scores, most, share, zero_p, top, key < keys)
        v = tl.load(v_ptr + d[:, None] * row_v + key[None, :], mask=(d < SIZE)[:, None] & (key < keys)[None, :],
                    other=0)
        acc = tl.dot(p.to(tl.int8), tl.trans(v), acc, out_dtype=tl.int32)
        of_row += tl.sum(p, 1)
        if KEEP:
            inside = whole[:, None] & (key < keys)[None, :]
            tl.store(sums_ptr + place[:, None] * keys + key[None, :], sums, mask=inside)
            tl.store(codes_ptr + place[:, None] * keys + key[None, :], (p + 128).to(tl.uint8), mask=inside)

    of_column = tl.load(v_sum_ptr + (wide * HEADS + head) * SIZE + d, mask=d < SIZE, other=0)
    acc += (128 - zero_v) * of_row[:, None] + ((128 - zero_p) * (of_column + keys * (128 - zero_v)))[None, :]
    inside = whole[:, None] & (d < SIZE)[None, :]
    if KEEP:
        tl.store(totals_ptr + place[:, None] * SIZE + d[None, :], acc, mask=inside)
    at = ((wide * queries + m) * HEADS + head)[:, None] * SIZE + d[None, :]
    tl.store(y_ptr + at, ((acc.to(tl.float32) * scale_p) * scale_v).to(y_ptr.dtype.element_ty), mask=inside)
