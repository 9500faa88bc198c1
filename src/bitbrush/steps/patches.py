"""Patches that a convolution sees, at chosen output pixels: no unfolded copy of the whole input exists."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]


def output_size(padded: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Pair:
    """Height and width of the output of a convolution over ``padded`` ``[B, H, W, C]``."""
    high, wide = ((padded.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return high, wide


def patches(padded: Tensor, place: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Patches ``[M, kh, kw, C]`` of pictures that are padded already.

    Args:
        padded: ``[B, H, W, C]``.
        place: ``[M]`` output pixels, counted through picture by picture and row by row.
        kernel, stride, dilation: Of the convolution.
    """
    high, wide = output_size(padded, kernel, stride, dilation)
    picture, pixel = place // (high * wide), place % (high * wide)
    rows, columns = (torch.arange(kernel[i], device=place.device) * dilation[i] for i in range(2))
    y = (pixel // wide * stride[0])[:, None] + rows
    x = (pixel % wide * stride[1])[:, None] + columns
    return padded[picture[:, None, None], y[:, :, None], x[:, None, :]]
