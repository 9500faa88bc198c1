"""Attention of float operands and the encode behind it, as one torch op: Triton on CUDA, the definition elsewhere.

    bitbrush::attend_encode    ``softmax(q k' / sqrt(size)) v``, heads side by side, as codes of a linear layer

The output is rounded to the dtype of ``q`` before it is encoded, as that of separate operations is. Exponentials and
sums are in an order of their own, like those of any library's attention: a code may differ by one where a value lies at
an edge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.kernels import direct, int8_ops, triton_attend
from bitbrush.kernels.triton_int8 import ONE_ROW
from bitbrush.numbers import packing

_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "attend_encode(Tensor q, Tensor k, Tensor v, Tensor inverse, Tensor zero_point, Tensor times, int top, "
    "Tensor? factor) -> Tensor"
)
FEW_KEYS, MOST_KEYS = 128, 1024
"""Of any heads, and of heads of 64 channels, which need no padding: on an H200 8.5 us beside 14.0 of cuDNN's attention
and an encode at 77 keys, 34.5 beside 37.2 at 1,024, but 228 beside 188 at 4,096."""


def fits(q: Tensor, k: Tensor, kind: int) -> bool:
    """Whether an attention ``[B, heads, L, size]`` is computed so: where that is the fastest."""
    width, size, keys = q.shape[1] * q.shape[3], q.shape[3], k.shape[2]
    if q.dtype not in (torch.bfloat16, torch.float16) or kind != ONE_ROW or packing.padded((width,)) != (width,):
        return False
    return keys <= (MOST_KEYS if size == 64 else FEW_KEYS) and size % 16 == 0 and size <= 256


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int,
    factor: Tensor | None,
) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return triton_attend.attend(q, k, v, inverse, zero_point, times, top, factor)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int,
    factor: Tensor | None,
) -> Tensor:
    """int8 codes less 128 ``[B * L, heads * size]``.

    Args:
        q, k, v: ``[B, heads, L, size]``, keys and values with a length of their own.
        inverse, zero_point, times, top, factor: Of the encode (`int8_ops`), one row.
    """
    found = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    rows = found.transpose(1, 2).flatten(2).flatten(0, 1)
    return int8_ops._encode_plain(rows, inverse, zero_point, times, ONE_ROW, [rows.shape[1]], top, [], 1, factor)


def _shape(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int,
    factor: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0] * q.shape[2], q.shape[1] * q.shape[3]), dtype=torch.int8)


_LIBRARY.impl("attend_encode", _cuda, "CUDA")
_LIBRARY.impl("attend_encode", _plain, "CPU")
torch.library.register_fake("bitbrush::attend_encode", _shape, lib=_LIBRARY)
direct.register("attend_encode", _cuda)
