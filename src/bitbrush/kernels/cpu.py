"""Exact int8 products on the CPU for packed linear and convolution layers.

Activations become ``a = code - 128`` and weights ``w = code - zero_point``, both int8; every segment has an int32
accumulator, and the activation's zero-point is corrected with the integer sum of each weight row:

    sum (code_a - zero_a) w  =  sum a w  +  (128 - zero_a) * sum w

so that padding with the zero-point's code contributes exactly nothing. Only the epilogue is float32:
``y = sum_s (acc_s * activation_scale_s) * weight_scale[n, s] + bias``, rounded once to the dtype of the input. A
low-rank branch is computed as in the reference and added to that.

Convolutions are products too: the int8 input is laid out as rows (kh, kw, channel), the order of the packed weight.

Where one scale serves a sample, `cpu_fused` does all of this with oneDNN's fused product, as far as torch has it. What
stands here is the plain form: for scales a token, under torch.compile with them, and on machines without that product.
"""

from __future__ import annotations

import functools
import math
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu_fused, cpu_layout, cpu_onednn, reference, sums
from bitbrush.kernels.cpu_onednn import OFFSET
from bitbrush.kernels.cpu_weights import int8_weights, largest
from bitbrush.numbers import packing

if TYPE_CHECKING:
    from bitbrush.network.activation import ActivationQuantizer
    from bitbrush.network.layers import QuantLayer

BY_PIXEL = ("token", "token_group", "pixel_group")
"""Granularities with a scale a token or pixel: it leaves the sum where that is over one pixel."""
FLOAT_BLOCK = 1024
"""Products of int8 values that float32 sums exactly in any order: 1024 * 128 * 128 = 2**24."""


# ---- which layers ----------------------------------------------------------------------------------------------------
def why_not(layer: QuantLayer, device_type: str) -> str | None:
    """Why this kernel cannot run a packed layer on a device, or None when it can."""
    weight, activation = layer.spec.weight, layer.spec.activation
    if device_type != "cpu":
        return f"the kernel runs on the CPU, not on {device_type}"
    if weight is None:
        return "the weight is not quantized"
    if weight.additive:
        return "the weight is a sum of codewords, not integers times a scale"
    if activation is None:
        return "weight only: the input stays float"
    if activation.position == "output":
        return "the output is quantized, not the input"
    if activation.unfolded:
        return "the input is quantized unfolded: simulated only"
    if activation.granularity == "channel":
        return "a scale a channel cannot leave the integer sum: simulated only"
    if activation.granularity == "token_group" and layer.segments != groups_of(layer.in_channels_, activation.group):
        return "groups of a token's channels that are not the segments of the weight: a scale cannot leave the sum"
    if activation.groups_timed:
        return "groups anew at each timestep would sort the weight anew at each: simulated only"
    if 8 in weight.bit_classes() and not weight.grid.signed:
        return "8-bit weights with free zero-points do not fit int8"
    reason = _conv_reason(layer, activation.granularity in BY_PIXEL)
    widest, bound = max(segment_lengths(layer)), longest(layer)
    if reason is None and widest > bound:
        form = f"W{max(weight.bit_classes())}A{_bits(layer)}"
        return f"K = {widest:,} exceeds {bound:,}, the longest int32 sum for {form}"
    return reason


def _conv_reason(layer: QuantLayer, by_token: bool) -> str | None:
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.groups > 1:
        return f"a convolution with groups = {layer.groups}"
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode}"
    if by_token and (layer.kernel_hw != (1, 1) or any(layer._reversed_padding_repeated_twice)):
        return "scales a pixel in a convolution larger than 1x1"
    return None


def groups_of(channels: int, size: int) -> tuple[int, ...]:
    """Channels in each group of ``size`` consecutive ones; the last may be short."""
    return tuple(min(size, channels - start) for start in range(0, channels, size))


def _bits(layer: QuantLayer) -> int:
    return layer.spec.activation.most_bits if layer.spec.activation is not None else 8


def longest(layer: QuantLayer) -> int:
    """Longest sum that an int32 accumulator holds whatever the codes are: 65,793 for W8A8 (symmetric weights)."""
    weight = layer.spec.weight
    if weight is None:
        return 0
    return (2**31 - 1) // (((1 << _bits(layer)) - 1) * largest(weight))


def segment_lengths(layer: QuantLayer) -> tuple[int, ...]:
    """Products summed in each segment's accumulator (padded channels are zero and do not count)."""
    kh, kw = layer.kernel_hw
    return tuple(kh * kw * count for count in layer.segments)


# ---- the layer -------------------------------------------------------------------------------------------------------
def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer from exact integer products, in the dtype of ``x``.

    Inputs that it `leaves` are the reference's.
    """
    quantizer = layer.input
    if quantizer is None or _leaves(quantizer, x):
        return reference.run(layer, x)
    if cpu_fused.takes(quantizer, x):
        made = cpu_fused.run(layer, x)
        return made if layer.low_rank is None else layer.with_branch(made, x)
    codes, scale, zero = quantizer.encode(layer.prepare(x), layer.channel_dim % x.ndim)
    scales, of_weight = _by_segment(layer, _rows_last(layer, scale)), sums.weight_scale(layer)
    y: Tensor | None = None
    for s, acc in enumerate(_accumulate(layer, codes, zero)):
        part = (acc.float() * _at_output(layer, scales[s])) * of_weight[:, s]
        y = part if y is None else y + part
    if y is None:
        return reference.run(layer, x)
    if layer.bias is not None:
        y = y + layer.bias.float()
    y = y.to(x.dtype)
    if not isinstance(layer, nn.Conv2d):
        return layer.with_branch(y, x)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() if x.ndim == 4 else False
    y = layer.with_branch(y.permute(0, 3, 1, 2) if x.ndim == 4 else y.squeeze(0).permute(2, 0, 1), x)
    return y.contiguous(memory_format=torch.channels_last) if last else y.contiguous()


def leaves(layer: QuantLayer, x: Tensor) -> bool:
    """Whether an input is left to the reference: while the activation quantizer is switched off, or where a gradient is
    wanted. Integers carry neither."""
    quantizer = layer.input
    return quantizer is None or _leaves(quantizer, x)


def _leaves(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    return not quantizer.enabled or (torch.is_grad_enabled() and x.requires_grad)


def input_codes(layer: QuantLayer, x: Tensor) -> Tensor:
    """The activation codes that the products are made from, uint8, shape of ``x``."""
    if layer.input is None:
        raise ValueError("the input of this layer is not quantized")
    if cpu_fused.takes(layer.input, x):
        return cpu_fused.codes(layer, x)
    codes = layer.input.encode(layer.prepare(x), layer.channel_dim % x.ndim)[0]
    return (to_int8(codes).to(torch.int16) + OFFSET).to(torch.uint8)


def accumulators(layer: QuantLayer, x: Tensor) -> list[Tensor]:
    """int32 sums of ``(code_a - zero_a) * (code_w - zero_w)`` of each segment.

    Shapes: ``[..., N]`` for linear layers, ``[B, H', W', N]`` for convolutions (channels last).
    """
    if layer.input is None:
        raise ValueError("the input of this layer is not quantized")
    if cpu_fused.takes(layer.input, x):
        return cpu_fused.accumulators(layer, x)
    codes, _, zero = layer.input.encode(layer.prepare(x), layer.channel_dim % x.ndim)
    return _accumulate(layer, codes, zero)


def _accumulate(layer: QuantLayer, codes: Tensor, zero: Tensor) -> list[Tensor]:
    counts = sums.counts(layer)
    parts = sums.in_order(layer, _rows_last(layer, to_int8(codes))).split(list(counts), dim=-1)
    zeros = _by_segment(layer, _rows_last(layer, zero))
    weights = int8_weights(layer)
    if sums.grouped(layer):
        lengths = [math.prod(layer.kernel_hw) * width for width in packing.padded(counts)]
        weights = list(sums.by_columns(weights[0], sums.columns(layer)).split(lengths, dim=1))
    out = []
    for s, weight in enumerate(weights):
        rows = _patches(layer, parts[s], zeros[s], weight.shape[1])
        product = int8_product(rows.flatten(0, -2), weight).reshape(*rows.shape[:-1], weight.shape[0])
        out.append(product + correction(_at_output(layer, zeros[s]), weight))
    return out


def to_int8(codes: Tensor) -> Tensor:
    """Activation codes 0 .. 255 as int8, less `OFFSET`."""
    return (codes - OFFSET).to(torch.int8)


def correction(zero: Tensor, weight: Tensor) -> Tensor:
    """``(128 - zero_a) * sum w`` in int32; zero ``[..., 1]``, weight int8 ``[N, K]``."""
    return (OFFSET - zero).to(torch.int32) * weight.sum(dim=1, dtype=torch.int32)


# ---- layout ----------------------------------------------------------------------------------------------------------
def _rows_last(layer: QuantLayer, tensor: Tensor) -> Tensor:
    """Channels to the last dimension; a picture without batch gets one."""
    if not isinstance(layer, nn.Conv2d):
        return tensor
    tensor = tensor if tensor.ndim == 4 else tensor.unsqueeze(0)
    return tensor.permute(0, 2, 3, 1)


def _by_segment(layer: QuantLayer, table: Tensor) -> list[Tensor]:
    """A broadcastable scale or zero-point, one ``[..., 1]`` a sum; where there is nothing to sum, any."""
    counts, last = sums.counts(layer), table.shape[-1] - 1
    table = sums.in_order(layer, table) if last else table
    starts = [min(start, last) for start in accumulate(counts[:-1], initial=0)]
    return [table[..., start : start + 1] for start in starts]


def _at_output(layer: QuantLayer, table: Tensor) -> Tensor:
    """Scales a pixel (1x1 convolutions only) at the pixels that a stride keeps; other tables as they are."""
    if isinstance(layer, nn.Conv2d) and table.shape[1:3].numel() > 1:
        return table[:, :: int(layer.stride[0]), :: int(layer.stride[1])]
    return table


def _patches(layer: QuantLayer, part: Tensor, zero: Tensor, length: int) -> Tensor:
    """Rows of the int8 product of one segment, last dimension (kh, kw, padded channel) of ``length`` codes.

    Pictures are padded with the zero-point's code of the segment and the sample's time.
    """
    if not isinstance(layer, nn.Conv2d):
        return nn.functional.pad(part, (0, length - part.shape[-1]))
    (kh, kw), (dh, dw), (sh, sw) = layer.kernel_hw, layer.dilation, layer.stride
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    b, h, w, c = part.shape
    wide = length // (kh * kw)
    if left or right or top or bottom:
        fill = to_int8(zero)
        framed = fill.expand(b, h + top + bottom, w + left + right, wide).clone()
        framed[:, top : top + h, left : left + w, :c] = part
    else:
        framed = nn.functional.pad(part, (0, wide - c)).contiguous()
    return cpu_layout.windows(framed, [kh, kw], [int(sh), int(sw)], [int(dh), int(dw)])


# ---- the product -----------------------------------------------------------------------------------------------------
def int8_product(a: Tensor, w: Tensor) -> Tensor:
    """``a @ w.T`` in int32, exactly; a int8 ``[M, K]``, w int8 ``[N, K]``.

    Where a processor has no dot-product instructions, ``torch._int_mm`` is wrong or a plain loop: oneDNN's other
    product is taken.
    """
    if not w.shape[1]:  # a group without channels
        return torch.zeros((a.shape[0], w.shape[0]), dtype=torch.int32, device=a.device)
    if not torch.compiler.is_compiling() and cpu_onednn.engine() == "saturates" and a.numel():
        return cpu_onednn.sums(a.view(torch.uint8) ^ OFFSET, OFFSET, w.t(), 255, 128)
    if int_mm_is_exact():
        return torch._int_mm(a.contiguous(), w.t())
    out = torch.zeros((a.shape[0], w.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], FLOAT_BLOCK):
        stop = start + FLOAT_BLOCK
        out += (a[:, start:stop].float() @ w[:, start:stop].float().T).to(torch.int32)
    return out


@torch.compiler.assume_constant_result
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` holds on this machine for the largest values; tried once a process."""
    return _try_int_mm()


@functools.cache
def _try_int_mm() -> bool:
    """Processors without dot-product instructions may add pairs of products in 16 bits with saturation."""
    for high, low in ((127, 127), (-128, -128), (127, -128)):
        a = torch.full((17, 64), high, dtype=torch.int8)
        w = torch.full((16, 64), low, dtype=torch.int8)
        if not bool((torch._int_mm(a, w.t()) == 64 * high * low).all()):
            return False
    return True
