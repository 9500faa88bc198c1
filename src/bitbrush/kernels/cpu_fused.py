"""A packed layer on the CPU through oneDNN: encode, lay out, multiply and rescale in as few passes as torch has.

Where one scale serves a sample (tables over time, K segments and scales found at run time included), a layer is

    codes    uint8 rows (kh, kw, channel) of pictures in channels-last order, padded with the zero-point's code
    weights  int8 columns, unpacked for this call (`cpu_weights`)
    product  `cpu_onednn.product`: int32 sums, then scales and bias in the same pass; a product a segment

Samples whose scales differ (a batch of mixed timesteps) are computed one after the other. Pictures leave in
channels-last order, whatever they came in: the next layer then has nothing to transpose, and norms, activations and
additions between layers keep the order.

`Shape` is what a layer looks like in numbers, so that the computation is a function of tensors and numbers: called as
it is, and under torch.compile as the operation ``bitbrush::cpu_int8``, which is the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu_onednn
from bitbrush.kernels.cpu_weights import columns, largest
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode_bytes

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


class Part(NamedTuple):
    """Samples with the same scales: their slice of the batch, and scale, zero-point of each segment.

    ``codes``: of each segment, uint8 ``[B, H, W, padded channels]``, framed; tokens have H = W = 1.
    """

    start: int
    stop: int
    scale: list[float]
    zero: list[int]
    codes: list[Tensor]


# ---- which layers ----------------------------------------------------------------------------------------------------
def takes(layer: QuantLayer, x: Tensor) -> bool:
    """Whether `run` can compute this: one scale a sample (and segment), something to compute, and a product for it."""
    quantizer = layer.input
    if quantizer is None or x.numel() == 0 or quantizer.spec.granularity not in ("tensor", "sample"):
        return False
    return _engine() != "absent"


@torch.compiler.assume_constant_result
def _engine() -> cpu_onednn.Engine:
    return cpu_onednn.engine()


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


# ---- the layer -------------------------------------------------------------------------------------------------------
def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """The product of a packed layer with its epilogue, in the dtype of ``x``, shape of the layer's output; without a
    low-rank branch. Pictures are in channels-last order."""
    compute = torch.ops.bitbrush.cpu_int8 if torch.compiler.is_compiling() else _compute
    y: Tensor = compute(*arguments(layer, layer.prepare(x), x.dtype))
    return _unbatched(layer, y, x)


def arguments(layer: QuantLayer, prepared: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `_compute` takes, for an input as `QuantLayer.prepare` gives it."""
    found = _batched(layer, prepared), *tables(layer, prepared), *_weight(layer), layer.bias, dtype
    return *found, *shape_of(layer)


def codes(layer: QuantLayer, x: Tensor) -> Tensor:
    """The activation codes that `run` multiplies, uint8, shape of ``x``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    batched = _batched(layer, prepared)
    left, right, top, bottom = shape.frame
    out = torch.empty_like(batched, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for part in _parts(batched, *tables(layer, prepared), shape):
        inner = [c[:, top : c.shape[1] - bottom, left : c.shape[2] - right, :n]
                 for c, n in zip(part.codes, shape.segments, strict=True)]  # fmt: skip
        out[part.start : part.stop] = torch.cat(inner, dim=3)
    return _unbatched(layer, out, x)


def accumulators(layer: QuantLayer, x: Tensor) -> list[Tensor]:
    """int32 sums of ``(code_a - zero_a) * (code_w - zero_w)`` of each segment, channels last, from the products that
    `run` multiplies; ``[..., N]``, pictures ``[B, H', W', N]``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    weights = _columns(shape, *_weight(layer))
    found: list[list[Tensor]] = [[] for _ in shape.segments]
    for part in _parts(_batched(layer, prepared), *tables(layer, prepared), shape):
        for s, (framed, weight) in enumerate(zip(part.codes, weights, strict=True)):
            rows = windows(framed, shape.kernel, shape.stride, shape.dilation)
            made = cpu_onednn.sums(rows.flatten(0, 2), part.zero[s], weight, *shape.extremes)
            found[s].append(made.view(*rows.shape[:3], -1))
    whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]
    return whole if isinstance(layer, nn.Conv2d) else [acc.view(*x.shape[:-1], -1) for acc in whole]


def _compute(
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor, stored: list[Tensor], order: Tensor | None,
    weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, dtype: torch.dtype, segments: list[int],
    kernel: list[int], stride: list[int], dilation: list[int], frame: list[int], bits: list[int], halved: list[int],
    extremes: list[int],
) -> Tensor:
    """Output ``[B, H', W', N]`` for an input ``[B, H, W, C]``, channels last in both; tables ``[R, S]``, R = 1 or B."""
    shape = Shape(segments, kernel, stride, dilation, frame, bits, halved, extremes)
    weights = _columns(shape, stored, order, weight_scale, weight_zero_point)
    split = cpu_onednn.must_split(*extremes)
    scales = weight_scale.t().contiguous()
    biases: list[Tensor | None] = [None] * len(segments)
    biases[-1] = None if bias is None else bias.float()
    found = []
    for part in _parts(x, scale, inverse, zero, top, shape):
        made = []
        for s, framed in enumerate(part.codes):
            rows = windows(framed, kernel, stride, dilation)
            y = cpu_onednn.product(
                rows.flatten(0, 2), part.zero[s], weights[s], part.scale[s], scales[s], biases[s], split
            )
            made.append(y.view(*rows.shape[:3], -1))
        found.append(functools.reduce(Tensor.add_, made))
    return (torch.cat(found) if len(found) > 1 else found[0]).to(dtype)


# ---- its tensors -----------------------------------------------------------------------------------------------------
def tables(layer: QuantLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, inverse_scale, zero_point) float32 ``[R, S]`` and the largest code ``[R, 1]`` at the time of this call; R
    is 1, or the batch."""
    quantizer = layer.input
    if quantizer is None:
        raise ValueError("the input of this layer is not quantized")
    tops = quantizer.row_tops()
    if quantizer.spec.mode == "static":
        found = (quantizer.scale, quantizer.inverse_scale, quantizer.zero_point)
        times, row = quantizer.times() if isinstance(tops, Tensor) else None, quantizer.rows()
        if row is not None:
            found = tuple(t.index_select(0, row) for t in found)  # type: ignore[assignment]
        if isinstance(tops, Tensor) and times is not None:
            tops = tops.index_select(0, times)
    else:
        found = quantizer.parameters_for(x, layer.channel_dim % x.ndim)
        found = tuple(_by_segment(t, layer.channel_dim % x.ndim, layer.segments) for t in found)  # type: ignore[assignment]
    tops = tops if isinstance(tops, Tensor) else torch.tensor([[float(tops)]])
    return found[0], found[1], found[2].float(), tops


def _by_segment(table: Tensor, dim: int, segments: tuple[int, ...]) -> Tensor:
    """A broadcastable table of the channels as ``[R, S]``."""
    count = table.shape[dim]
    starts = [sum(segments[:s]) if count > 1 else 0 for s in range(len(segments))]
    return torch.stack([table.narrow(dim, start, 1).flatten() for start in starts], dim=1)


def _weight(layer: QuantLayer) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    spec = layer.spec.weight
    if spec is None:
        raise ValueError("the weight of this layer is not quantized")
    stored = [getattr(layer, f"codes{bits}") for bits in spec.bit_classes()]
    order: Tensor | None = layer.row_order if spec.row_bits else None  # type: ignore[assignment]
    return stored, order, layer.weight_scale, layer.weight_zero_point


def _columns(
    shape: Shape, stored: list[Tensor], order: Tensor | None, _scale: Tensor, weight_zero_point: Tensor
) -> list[Tensor]:
    taps = shape.kernel[0] * shape.kernel[1]
    return columns(stored, shape.bits, shape.halved, order, weight_zero_point, shape.segments, taps)


# ---- layout ----------------------------------------------------------------------------------------------------------
def _batched(layer: QuantLayer, x: Tensor) -> Tensor:
    """``[B, H, W, C]``: a picture with its channels last, tokens as pictures of one column."""
    if isinstance(layer, nn.Conv2d):
        return (x if x.ndim == 4 else x.unsqueeze(0)).permute(0, 2, 3, 1)
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, 1, x.shape[-1])


def _unbatched(layer: QuantLayer, y: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_batched`, for any number of channels."""
    if not isinstance(layer, nn.Conv2d):
        return y.view(*x.shape[:-1], y.shape[-1])
    return y.permute(0, 3, 1, 2) if x.ndim == 4 else y.squeeze(0).permute(2, 0, 1)


def _parts(
    x: Tensor, scale: Tensor, inverse_scale: Tensor, zero_point: Tensor, top: Tensor, shape: Shape
) -> Iterator[Part]:
    """``x`` ``[B, H, W, C]`` in codes: all of it at once where all samples have the same scales."""
    rows = list(zip(scale.tolist(), inverse_scale.tolist(), zero_point.tolist(), strict=True))
    tops = top.flatten().tolist() * (len(rows) if len(top) == 1 else 1)
    rows = rows * (len(tops) // len(rows))
    once = all(row == rows[0] for row in rows) and all(t == tops[0] for t in tops)
    for i in range(1 if once else len(rows)):
        start, stop = (0, x.shape[0]) if once else (i, i + 1)
        scales, inverses, zeros = rows[i]
        zeros = [int(z) for z in zeros]
        taken = x[start:stop].split(shape.segments, dim=3) if len(shape.segments) > 1 else (x[start:stop],)
        made = [_framed(t, inverse, zero, int(tops[i]), shape.frame)
                for t, inverse, zero in zip(taken, inverses, zeros, strict=True)]  # fmt: skip
        yield Part(start, stop, scales, zeros, made)


def _framed(part: Tensor, inverse: float, zero: int, top: int, frame: list[int]) -> Tensor:
    """Codes of one segment, uint8 ``[B, H + .., W + .., padded channels]``; what is added has the zero-point's code."""
    left, right, above, below = frame
    b, h, w, c = part.shape
    wide = packing.padded((c,))[0]
    size = (b, h + above + below, w + left + right, wide)
    if size == part.shape:
        return encode_bytes(part, inverse, zero, top, torch.empty(size, dtype=torch.uint8)).add_(zero)
    out = torch.zeros(size, dtype=torch.uint8)
    encode_bytes(part, inverse, zero, top, out[:, above : above + h, left : left + w, :c])
    return out.add_(zero)


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


# ---- under torch.compile ---------------------------------------------------------------------------------------------
_operation = torch.library.custom_op("bitbrush::cpu_int8", _compute, mutates_args=(), device_types="cpu")


@_operation.register_fake
def _fake(
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor, stored: list[Tensor], order: Tensor | None,
    weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, dtype: torch.dtype, segments: list[int],
    kernel: list[int], stride: list[int], dilation: list[int], frame: list[int], bits: list[int], halved: list[int],
    extremes: list[int],
) -> Tensor:
    left, right, above, below = frame
    height, width = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(
        (x.shape[1] + above + below, x.shape[2] + left + right), dilation, kernel, stride, strict=True))  # fmt: skip
    return x.new_empty((x.shape[0], height, width, weight_scale.shape[0]), dtype=dtype)
