"""Exact integer sums in float32, for x86 processors without dot products of 8-bit integers (VNNI).

float32 holds every integer up to 2**24, so products of codes add up exactly, in any order and with or without fused
multiply-adds, as long as no sum of magnitudes reaches that: the largest ``|code_a - zero_a|`` times the sum of
``|code_w - zero_w|`` over a row of the weight (`reach`), which is known once the weight is unpacked. Then a layer is
torch's own product or convolution of ``code - zero_point``; the border of a picture is 0, the zero-point's code.

oneDNN's uint8 x int8 product is twice as fast as float32 there, but has 0.1 ms of its own, transposes the weight, and
takes 8-bit weights as halves in a sum twice as long (`cpu_onednn`). So float32 wins with 8-bit weights always, with
narrower ones where a product is small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.kernels import cpu_onednn
from bitbrush.kernels.cpu_layout import Shape

SMALL, PER_WEIGHT = 10_000_000, 200
"""Products of which float32 is faster though oneDNN need not split: at most SMALL, and PER_WEIGHT for each weight that
oneDNN transposes. Measured with everything held to AVX2 on Sapphire Rapids, rows 2 to 2048, columns 64 to 1024."""


def wanted(shape: Shape, x: Tensor, n: int) -> bool:
    """Whether a layer with N outputs is a case for float32, if it is `exact` there; ``x`` ``[B, H, W, C]``."""
    if cpu_onednn.engine() != "saturates" or not _fits(shape):
        return False
    k = shape.kernel[0] * shape.kernel[1] * max(shape.segments)
    products = x.shape[0] * math.prod(shape.places(x)) * k * n
    return cpu_onednn.must_split(*shape.extremes) or products <= SMALL + PER_WEIGHT * k * n


def _fits(shape: Shape) -> bool:
    """Whether the padding is one that torch's convolution has: as wide before as behind."""
    left, right, above, below = shape.frame
    return left == right and above == below


def reach(weight: Tensor) -> int:
    """The largest sum of magnitudes in a row of int8 ``[N, K]``."""
    return int(weight.to(torch.int16).abs_().sum(dim=1, dtype=torch.int32).max()) if weight.numel() else 0


def exact(reach: int, zero: int, top: int) -> bool:
    """Whether every partial sum of codes ``0 .. top`` less ``zero`` times such weights is a float32 number."""
    return max(zero, top - zero) * reach < cpu_onednn.FLOAT_EXACT


def encode(x: Tensor, inverse_scale: Tensor, zero: int, top: int) -> Tensor:
    """``code - zero_point`` in float32, with strides as `torch.mul` gives them; arguments as in `numbers.codec`."""
    return torch.mul(x.float(), inverse_scale).round_().clamp_(-zero, top - zero)


def sums(codes: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """``[B, H', W', N]``, integers in float32, of one segment.

    Args:
        codes: `encode`, ``[B, H, W, C]``.
        weight: int8 ``[N, kh * kw * padded channels]``.
        shape: The layer's, as `wanted` saw it.
    """
    (kh, kw), c, n = shape.kernel, codes.shape[3], weight.shape[0]
    taps = weight.view(n, kh, kw, -1)[..., :c].float()
    if kh == kw == 1 and shape.stride == [1, 1] and not any(shape.frame):
        return torch.mm(codes.reshape(-1, c), taps.view(n, c).t()).view(*codes.shape[:3], n)
    made = F.conv2d(codes.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), taps.permute(0, 3, 1, 2),
                    None, shape.stride, (shape.frame[2], shape.frame[0]), shape.dilation)  # fmt: skip
    return made.permute(0, 2, 3, 1).contiguous()
