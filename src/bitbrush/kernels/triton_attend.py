"""Launches attention of float operands whose output is encoded for the layer that follows.

What a head gives leaves the tensor cores in registers, so the codes cost nothing but their bytes: no float output is
written and read again, and there is one launch where a library's attention takes two or three.

Importing this module does not import Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitbrush.kernels.launching import Launch
from bitbrush.kernels.triton_int8 import early, launched

LOG2E = 1.4426950408889634


class Cut(NamedTuple):
    """Queries and keys of a step, warps, and stages of the pipeline."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3


def cut(keys: int) -> Cut:
    """How an attention is cut: few keys, as a prompt's, take one step."""
    return Cut(keys=128 if 64 < keys <= 128 else 64, stages=1 if keys <= 128 else 3)


def attend(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int,
    factor: Tensor | None, how: Cut | None = None,
) -> Tensor:
    """int8 codes less 128 ``[B * L, heads * size]`` of ``softmax(q k' / sqrt(size)) v``.

    Args:
        q: ``[B, heads, L, size]``; the numbers of a head lie one after the other. ``k`` and ``v`` likewise, with a
            length of their own.
        factor: ``input_scale`` float32 ``[heads * size]``.
    """
    batch, heads, queries, size = q.shape
    key = (q.shape, q.stride(), k.shape[2], k.stride(), v.stride(), top, factor is None, how, q.device,
           early(q.device))  # fmt: skip
    launch = _KNOWN.get(key)
    if launch is None:
        launch = _KNOWN[key] = _launch(q, k, v, top, factor is not None, how or cut(k.shape[2]))
    out = torch.empty((batch * queries, heads * size), dtype=torch.int8, device=q.device)
    if out.numel():
        launch((q, k, v, out, inverse, zero_point, times, q if factor is None else factor))
    return out


_KNOWN: dict[Any, Launch] = {}


def _launch(q: Tensor, k: Tensor, v: Tensor, top: int, factor: bool, how: Cut) -> Launch:
    from bitbrush.kernels import triton_attend_kernels as kernels

    (batch, heads, queries, size), keys = q.shape, k.shape[2]
    numbers = (float(top), size**-0.5 * LOG2E, queries, keys, *(t.stride(i) for t in (q, k, v) for i in (0, 1, 2)))
    options = {
        "HEADS": heads, "SIZE": size, "WIDE": max(16, 1 << (size - 1).bit_length()), "FACTOR": factor,
        "ONE": keys <= how.keys, "EVEN": keys % how.keys == 0, "BM": how.queries, "BN": how.keys,
        "num_warps": how.warps, "num_stages": how.stages, "enable_fp_fusion": False, **launched(q.device),
    }
    return Launch(kernels.attend, (-(-queries // how.queries), batch * heads), numbers, options)
