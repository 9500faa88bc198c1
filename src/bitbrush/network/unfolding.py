"""A convolution's input as its product sees it: for each place of the output, all channels at all kernel places.

DGQ's authors quantize it in this form (`ActivationSpec.unfolded`). It has every value as often as the kernel reads it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def places(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of the output for an input ``[.., C, H, W]``."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    (kh, kw), (dh, dw), (sh, sw) = _pairs(layer)
    height, width = x.shape[-2] + top + bottom, x.shape[-1] + left + right
    return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1


def unfolded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``[.., C * kh * kw, places]``, rows in the order of the weight's, what pads the picture in place."""
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    kernel, dilation, stride = _pairs(layer)
    return F.unfold(padded, kernel, dilation=dilation, stride=stride)


def _pairs(layer: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, dilation and stride."""
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    return (kernel[0], kernel[1]), (dilation[0], dilation[1]), (stride[0], stride[1])
