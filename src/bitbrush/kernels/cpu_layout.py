"""How a packed layer on the CPU looks in numbers, and how its codes lie: rows of (kh, kw, channel).

Pictures are ``[B, H, W, C]``, channels last; tokens are pictures of one column. What is added to them, a border and
channels up to the weight's padding, has the zero-point's code, so that it contributes exactly nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu_onednn
from bitbrush.kernels.cpu_weights import largest
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode_shifted

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer


class Shape(NamedTuple):
    """A layer in numbers.

    ``frame``: padding (left, right, top, bottom). ``bits``: of each class of rows; ``halved``: 1 for a class of
    symmetric 1-bit rows. ``extremes``: magnitudes of activation codes and of weights that the layer's bits allow.
    """

    segments: list[int]
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    frame: list[int]
    bits: list[int]
    halved: list[int]
    extremes: list[int]

    def places(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for an input ``[B, H, W, C]``."""
        left, right, above, below = self.frame
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        height, width = x.shape[1] + above + below, x.shape[2] + left + right
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    def few(self, x: Tensor, n: int) -> bool:
        """Whether products of this input and N rows of weights have few outputs."""
        height, width = self.places(x)
        longest = self.kernel[0] * self.kernel[1] * max(self.segments)
        return cpu_onednn.few(x.shape[0] * height * width, longest, n)


def shape_of(layer: QuantLayer) -> Shape:
    """The layer in numbers."""
    spec, activation = layer.spec.weight, layer.spec.activation
    if spec is None or activation is None:
        raise ValueError("the weight and the input of this layer are not both quantized")
    bits = list(spec.bit_classes())
    stride, dilation, frame = [1, 1], [1, 1], [0, 0, 0, 0]
    if isinstance(layer, nn.Conv2d):
        stride, dilation, frame = list(layer.stride), list(layer.dilation), layer._reversed_padding_repeated_twice
    return Shape(
        list(layer.segments), list(layer.kernel_hw), stride, dilation, list(frame),
        bits, [int(spec.halved(b)) for b in bits], [(1 << activation.most_bits) - 1, largest(spec)],
    )  # fmt: skip


def kept_shape(layer: QuantLayer) -> Shape:
    """`shape_of`, found once a layer: a layer's spec and sizes do not change."""
    kept: Shape | None = layer.__dict__.get("_cpu_shape")
    if kept is None:
        kept = layer.__dict__["_cpu_shape"] = shape_of(layer)
    return kept


def batched(layer: QuantLayer, x: Tensor) -> Tensor:
    """``[B, H, W, C]``: a picture with its channels last, tokens as pictures of one column."""
    if isinstance(layer, nn.Conv2d):
        return (x if x.ndim == 4 else x.unsqueeze(0)).permute(0, 2, 3, 1)
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, 1, x.shape[-1])


def unbatched(layer: QuantLayer, y: Tensor, x: Tensor) -> Tensor:
    """The inverse of `batched`, for any number of channels."""
    if not isinstance(layer, nn.Conv2d):
        return y.view(*x.shape[:-1], y.shape[-1])
    return y.permute(0, 3, 1, 2) if x.ndim == 4 else y.squeeze(0).permute(2, 0, 1)


def framed(part: Tensor, inverse: Tensor, zero: int, top: int, frame: list[int], less: int) -> Tensor:
    """Codes of one segment ``[B, H, W, C]`` less an offset, modulo 256, uint8 ``[B, H + .., W + .., padded channels]``,
    contiguous."""
    codes = encode_shifted(part, inverse, zero, top, less)
    left, right, above, below = frame
    b, h, w, c = part.shape
    size = (b, h + above + below, w + left + right, packing.padded((c,))[0])
    if size == part.shape:
        return codes.contiguous()
    out = torch.full(size, (zero - less) % 256, dtype=torch.uint8)
    out[:, above : above + h, left : left + w, :c] = codes
    return out


def windows(framed: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """``[B, H', W', kh * kw * C]``: what each place of the output sees of ``[B, H, W, C]``. A view where it can be."""
    b, h, w, c = framed.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    if kh == kw == sh == sw == 1:
        return framed
    size = (b, (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1)
    s0, s1, s2, s3 = framed.stride()
    moves = (s0, s1 * sh, s2 * sw)
    if dw == 1:  # neighbours in a row are neighbours in memory: long runs copy faster
        return framed.as_strided((*size, kh, kw * c), (*moves, s1 * dh, s3)).reshape(*size, kh * kw * c)
    return framed.as_strided((*size, kh, kw, c), (*moves, s1 * dh, s2 * dw, s3)).reshape(*size, kh * kw * c)
