"""Launches attention on codes: two int8 products with a softmax between them, in one kernel, and a small one before it
that turns v (int8 products read both operands along what is summed) and sums codes.

A program has a block of queries of one head and goes over the keys twice. The first time it finds the largest score of
every row and the sum of the exponentials; the second time it computes the scores again, encodes their softmax and
multiplies the codes with those of v. So no tensor of scores exists, and each code is that of the whole row's softmax.

Codes less 128 are int8; zero-points are taken off in integers, with z the zero-point and L' the number of keys:

    sum (p - zp) (v - zv) = sum a b + (128 - zv) sum a + (128 - zp) (sum b + L' (128 - zv))      a, b = p, v less 128

Keys behind the last one, and the end of a head whose size is no power of two, are zeros in ``a`` and ``b``.

Importing this module does not import Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 16
"""Codes of v lie with the keys of a channel one after the other; a row of them begins at a multiple of this."""


@dataclass(frozen=True)
class Table:
    """Scale float32 and zero-point (uint8 or float32) ``[T, 1]`` of an operand, and which row counts: int64 ``[1]``."""

    scale: Tensor
    zero_point: Tensor
    times: Tensor


@dataclass(frozen=True)
class Cut:
    """Queries and keys of a block, warps, stages of the pipeline."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Kept:
    """Integers that tests look at, for every head of every sample: int32 sums of q and k ``[B * heads, L, L']``, codes
    of the probabilities uint8 likewise, int32 sums of these and v ``[B * heads, L, size]``."""

    sums: Tensor
    codes: Tensor
    totals: Tensor

    @classmethod
    def empty(cls, rows: int, queries: int, keys: int, size: int, device: torch.device | str) -> Kept:
        """Memory for them."""
        return cls(torch.empty((rows, queries, keys), dtype=torch.int32, device=device),
                   torch.empty((rows, queries, keys), dtype=torch.uint8, device=device),
                   torch.empty((rows, queries, size), dtype=torch.int32, device=device))


def width(size: int) -> int:
    """Channels of a head as the kernel has them: a power of two, 32 or more."""
    return max(32, 1 << (size - 1).bit_length())


def cut(queries: int, size: int) -> Cut:
    """Blocks by rule: two blocks of int32 numbers fit the registers, so that up to 64 channels two programs share a
    multiprocessor."""
    few = queries <= 64
    return Cut(64 if few else 128, 64, 4 if few else 8, 3 if width(size) <= 128 else 2)


def laid_out(k: Tensor, v: Tensor, batch: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel reads besides the codes of k.

    Returns:
        v int8 ``[B, heads * size, L']`` with zeros up to a multiple of `ALIGN`, and int32 sums of the codes: those of k
        over the channels of a head ``[B, heads, L']``, those of v over the keys ``[B, heads * size]``.
    """
    from bitbrush.kernels import triton_attention_kernels as kernels

    keys, device = k.shape[0] // batch, k.device
    turned = torch.empty((batch, heads * size, -(-keys // ALIGN) * ALIGN), dtype=torch.int8, device=device)
    of_k = torch.empty((batch, heads, keys), dtype=torch.int32, device=device)
    of_v = torch.zeros((batch, heads * size), dtype=torch.int32, device=device)
    with torch.cuda.device_of(k):
        kernels.lay_out[(-(-keys // 128), batch * heads)](
            k, v, turned, of_k, of_v, keys, k.stride(0), v.stride(0), turned.stride(1),
            HEADS=heads, SIZE=size, BN=128, BD=width(size), num_warps=4,
        )
    return turned, of_k, of_v


def attention(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Table], inverse: Tensor, top: int, batch: int, heads: int, size: int,
    dtype: torch.dtype, *, config: Cut | None = None, kept: Kept | None = None,
) -> Tensor:
    """Attention ``[B, L, heads * size]``.

    Args:
        q, k, v: Codes less 128, int8 ``[B * L, ..]`` and ``[B * L', ..]``; heads one after the other in a row.
        tables: Of q, k, v and the softmax.
        inverse: Reciprocals of the softmax's scale, ``[T, 1]``.
        top: The largest code of the softmax.
        kept: Where integers are written to, for tests.
    """
    from bitbrush.kernels import triton_attention_kernels as kernels

    queries, keys = q.shape[0] // batch, k.shape[0] // batch
    y = torch.empty((batch, queries, heads * size), dtype=dtype, device=q.device)
    if not y.numel() or not keys:
        return y.zero_()
    config = config or cut(queries, size)
    turned, of_k, of_v = laid_out(k, v, batch, heads, size)
    numbers = [t for table in tables[:3] for t in (table.scale, table.zero_point, table.times)]
    last = tables[3]
    with torch.cuda.device_of(q):
        kernels.attention[(-(-queries // config.bm), batch * heads)](
            q, k, turned, y, of_k, of_v, *numbers,
            last.scale, inverse, last.zero_point, last.times,
            *((y, y, y) if kept is None else (kept.sums, kept.codes, kept.totals)),
            queries, keys, q.stride(0), k.stride(0), turned.stride(1), size**-0.5, float(top),
            HEADS=heads, SIZE=size, KEEP=kept is not None, BM=config.bm, BN=config.bn, BD=width(size),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )
    return y
