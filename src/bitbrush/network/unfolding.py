"""A convolution's input as its product sees it: for each place of the output, all channels at all kernel places.

DGQ's authors quantize it in this form (`ActivationSpec.unfolded`). It has every value as often as the kernel reads it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnfoldedInput:
    """What a quantized convolution does with an input that its spec wants unfolded; any other goes the usual way."""

    def computed(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        """See `QuantLayer.computed`. What is quantized unfolded is multiplied unfolded; while it is not quantized, and
        nobody looks at it, the convolution is the same and needs less memory."""
        quantizer = self.input
        if quantizer is None or not quantizer.spec.unfolded:
            usual: Tensor = super().computed(x, weight)  # type: ignore[misc]
            return usual
        if not quantizer.enabled and not quantizer._forward_pre_hooks:
            plain: Tensor = self.operation(x, weight)
            return plain
        y, bias = torch.matmul(weight.flatten(1), self.quantize_input(x)), self.bias_in_use(x)
        return (y if bias is None else y + bias[:, None]).unflatten(-1, places(self, x))

    def quantize_input(self: Any, x: Tensor) -> Tensor:
        """See `QuantLayer.quantize_input`; unfolded ``[B, C * kh * kw, places]`` where the spec says so."""
        if self.input is None or not self.input.spec.unfolded:
            usual: Tensor = super().quantize_input(x)  # type: ignore[misc]
            return usual
        columns = unfolded(self, x)
        quantized: Tensor = self.input(columns, columns.ndim - 2)
        return quantized.to(x.dtype)


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
