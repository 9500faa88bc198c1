"""oneDNN's product of uint8 and int8 matrices, exact on every x86 processor.

torch offers it as ``onednn::qlinear_pointwise``: int32 sums, the input's zero-point corrected in integers, then in one
pass ``float(sum) * (input_scale * weight_scale[n]) + bias``. That is three roundings and the bias's for a segment; the
proof's bound allows for one more (`bitbrush.kernels.proof`).

Processors with dot-product instructions (VNNI) sum exactly. Without them ``vpmaddubsw`` adds pairs of products in
int16 and saturates: from 2 * 255 * 64 = 32,640 on there is nothing left. `engine` tries it once a process. Where it
saturates, weights beyond [-64, 64] (more than 6 bits) are written as ``w = h + (w - h)`` with ``h = w >> 1``, and
multiplied as a sum twice as long, ``[a, a] [h; w - h]``: the same integer, in one accumulator. Activation codes up to
127 need none of that: 2 * 127 * 128 fits.

The weight comes as ``[K, N]`` in plain order. The operation's own ``qlinear_prepack`` is not used: it takes longer than
the product at the sizes of a small network, and packed weights would have to be kept, at 8 bits.

Where there are few rows, the transposition to ``[K, N]`` and the operation's own 20 us cost more than they save:
`few_product` takes ``torch._int_mm``, which reads ``[N, K]`` as it is and answers in int32, and rescales after it. Only
with AVX-512 and VNNI: elsewhere ``_int_mm`` is a plain loop.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

Engine = Literal["exact", "saturates", "absent"]

OFFSET = 128
"""Subtracted from activation codes where they have to fit int8."""
HALF = 64
"""Weights up to this magnitude never saturate a pair: 2 * 255 * 64 < 2**15."""
SEVEN_BITS = 127
"""Activation codes up to this never do: 2 * 127 * 128 < 2**15."""
FEW = 160_000
"""Outputs that are rescaled while the other product gets under way."""
MANY = 1 << 20
"""Outputs that do not stay in a cache, 4 MB."""
FLOAT_EXACT = 1 << 24
"""Below this magnitude every integer is a float32 number."""


@functools.cache
def engine() -> Engine:
    """What this machine's product does with the largest values; tried once a process."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return "absent"
    try:
        small = [_holds(255, -HALF), _holds(255, HALF), _holds(SEVEN_BITS, -128), _holds(SEVEN_BITS, 127)]
        large = [_holds(255, -128), _holds(255, 127)]
    except RuntimeError:  # a build of torch without it
        return "absent"
    return "absent" if not all(small) else "exact" if all(large) else "saturates"


def _holds(code: int, weight: int) -> bool:
    """Whether sums of equal products are right, in blocks of every shape that a kernel may have for its remainders."""
    rows = torch.full((33, 96), code, dtype=torch.uint8)
    columns = torch.full((96, 47), weight, dtype=torch.int8)
    return bool((_product(rows, 0, columns, 1.0, torch.ones(47), None) == 96 * code * weight).all())


def few(m: int, k: int, n: int) -> bool:
    """Whether a product of M rows, sums of K and N columns is left to `few_product`.

    That rescales M * N outputs in passes of their own; the other product has 45 us of its own and transposes K * N
    weights, of which each takes as long as three or four outputs. Outputs that leave the cache between the passes are
    many in any case. Measured on Sapphire Rapids.
    """
    return m * n <= min(FEW + 4 * k * n, MANY) and _has_avx512() and engine() == "exact"


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def must_split(largest_code: int, largest_weight: int) -> bool:
    """Whether a product with such codes and weights (magnitudes) has to be made of halved weights here."""
    return engine() == "saturates" and largest_code > SEVEN_BITS and largest_weight > HALF


def product(
    rows: Tensor, zero: int, columns: Tensor, scale: float, weight_scale: Tensor, bias: Tensor | None, split: bool
) -> Tensor:
    """``scale * weight_scale * ((rows - zero) @ columns) + bias`` in float32 ``[M, N]``.

    Args:
        rows: Activation codes, uint8 ``[M, K]``.
        zero: Their zero-point.
        columns: Weights less their zero-points, int8 ``[K, N]``.
        scale: Of the activation.
        weight_scale: float32 ``[N]``.
        bias: float32 ``[N]``.
        split: See `must_split`.
    """
    if split:
        rows, columns = torch.cat([rows, rows], dim=1), halves(columns)
    return _product(rows, zero, columns, scale, weight_scale, bias)


def sums(rows: Tensor, zero: int, columns: Tensor, largest_code: int, largest_weight: int) -> Tensor:
    """``(rows - zero) @ columns`` in int32 ``[M, N]``, exactly.

    The operation answers in float32, so a sum that may pass 2**24 is made of blocks that cannot.
    """
    split = must_split(largest_code, largest_weight)
    block = max(1, (FLOAT_EXACT - 1) // (max(largest_code, 1) * max(largest_weight, 1)))
    ones = torch.ones(columns.shape[1])
    out: Tensor | None = None
    for start in range(0, columns.shape[0], block):
        part = product(rows[:, start : start + block], zero, columns[start : start + block], 1.0, ones, None, split)
        out = part.to(torch.int32) if out is None else out.add_(part.to(torch.int32))
    return torch.zeros((rows.shape[0], columns.shape[1]), dtype=torch.int32) if out is None else out


def halves(columns: Tensor) -> Tensor:
    """int8 ``[2 K, N]``: two weights within [-64, 64] for each, whose sum it is."""
    low = columns >> 1
    return torch.cat([low, columns - low])


def few_product(
    rows: Tensor, zero: int, weight: Tensor, rescale: Tensor, bias: Tensor | None, sums: Tensor | None = None
) -> Tensor:
    """`product` for int8 rows ``code - 128`` ``[M, K]`` and weights in rows, int8 ``[N, K]``.

    ``rescale``: both scales' product ``[N]``. ``sums``: of the weight's rows, where they are known (`few_sums`).
    """
    return rescaled(few_sums(rows, zero, weight, sums).float(), rescale, bias)


def rescaled(sums: Tensor, rescale: Tensor, bias: Tensor | None) -> Tensor:
    """``sums * rescale + bias`` in place, float32 ``[.., N]``; the others ``[N]``."""
    return sums.mul_(rescale) if bias is None else torch.addcmul(bias, sums, rescale, out=sums)


def few_sums(rows: Tensor, zero: int, weight: Tensor, sums: Tensor | None = None) -> Tensor:
    """``(rows + 128 - zero) @ weight.T`` in int32 ``[M, N]``; ``sums``: of the weight's rows, int32 ``[N]``."""
    sums = weight.sum(dim=1, dtype=torch.int32) if sums is None else sums
    return torch._int_mm(rows, weight.t()).add_(sums, alpha=OFFSET - zero)


def _product(
    rows: Tensor, zero: int, columns: Tensor, scale: float, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    none = torch.zeros(columns.shape[1], dtype=torch.int64)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows.contiguous(), scale, zero, columns.contiguous().to_mkldnn(), weight_scale, none, bias, 1.0, 0,
        torch.float32, "none", [], "",
    )
    return out
