"""A packed layer on the CPU through oneDNN: encode, lay out, multiply and rescale in as few passes as torch has.

Where one scale serves a sample (tables over time, K segments and scales found at run time included), a layer is

    codes    uint8 rows (kh, kw, channel) of pictures in channels-last order, padded with the zero-point's code
    weights  int8 columns, unpacked for this call (`cpu_weights`)
    product  `cpu_onednn.product`: int32 sums, then scales and bias in the same pass; a product a segment. Of few rows
             `cpu_onednn.few_product`, which wants codes less 128, and weights as they are stored

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
from bitbrush.kernels.cpu_weights import columns, largest, plain_rows, rows, tensors
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

    def places(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for an input ``[B, H, W, C]``."""
        left, right, above, below = self.frame
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        height, width = x.shape[1] + above + below, x.shape[2] + left + right
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    def few(self, x: Tensor) -> bool:
        """Whether products of this input have few rows."""
        height, width = self.places(x)
        longest = self.kernel[0] * self.kernel[1] * max(self.segments)
        return cpu_onednn.few(x.shape[0] * height * width, longest)


class Part(NamedTuple):
    """Samples with the same scales: their slice of the batch, and scale, zero-point of each segment.

    ``codes``: of each segment, ``[B, H, W, padded channels]``, framed: uint8, or int8 less 128 where rows are few.
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


def _kept_shape(layer: QuantLayer) -> Shape:
    """`shape_of`, found once a layer: a layer's spec and sizes do not change."""
    kept: Shape | None = layer.__dict__.get("_cpu_shape")
    if kept is None:
        kept = layer.__dict__["_cpu_shape"] = shape_of(layer)
    return kept


# ---- the layer -------------------------------------------------------------------------------------------------------
def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """The product of a packed layer with its epilogue, in the dtype of ``x``, shape of the layer's output; without a
    low-rank branch. Pictures are in channels-last order."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.bitbrush.cpu_int8(*arguments(layer, layer.prepare(x), x.dtype, shape_of(layer)))
        return _unbatched(layer, y, x)
    found = _pointwise(layer, x)
    if found is not None:
        return found
    y = _compute(*arguments(layer, layer.prepare(x), x.dtype, _kept_shape(layer)))
    return _unbatched(layer, y, x)


class Small(NamedTuple):
    """What `_pointwise` needs of a layer, looked up once.

    ``scale``, ``zero``, ``inverse``: the input's table, one entry a row. ``stored``: packed rows; of 8 bits, int8 as
    they are wanted. ``source``: the tensors that all this was read from or is a view of, and their versions.
    """

    scale: list[float]
    zero: list[int]
    inverse: tuple[Tensor, ...]
    stored: Tensor
    bits: int
    halved: int
    weight_zero: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    extremes: list[int]
    source: tuple[tuple[dict[str, Any], str, Tensor, int], ...]

    def rows(self, length: int) -> Tensor:
        """The weight, int8 ``[N, length]``."""
        if self.bits == 8:
            return self.stored
        return plain_rows(self.stored, self.bits, self.halved, self.weight_zero, length)

    def stale(self) -> bool:
        """Whether a tensor was replaced or written to since."""
        return any(held.get(name) is not t or t._version != version for held, name, t, version in self.source)


def _small(layer: QuantLayer) -> Small | None:
    """Of a linear layer or a 1x1 convolution with a static table of one segment and nothing to pad; else None."""
    kept: Small | int | None = layer.__dict__.get("_cpu_small", 0)
    if kept is None or (isinstance(kept, Small) and not kept.stale()):
        return kept
    layer.__dict__["_cpu_small"] = found = _looked_up(layer)
    return found


def _looked_up(layer: QuantLayer) -> Small | None:
    shape, quantizer = _kept_shape(layer), layer.input
    whole = len(shape.segments) == 1 and shape.segments[0] % packing.SEGMENT_ALIGN == 0 and not any(shape.frame)
    pointwise = whole and shape.kernel == [1, 1] and shape.stride == [1, 1] and len(shape.bits) == 1
    if quantizer is None or quantizer.spec.mode != "static" or quantizer.spec.time_bits or not pointwise:
        return None
    spec = layer.spec
    if spec.input_scale or spec.rotation != "none" or spec.weight is None or spec.weight.row_bits:
        return None
    bits = shape.bits[0]
    names: list[tuple[dict[str, Any], str]] = []
    names += [(quantizer._buffers, name) for name in ("scale", "inverse_scale", "zero_point")]
    names += [(layer._buffers, name) for name in (f"codes{bits}", "weight_zero_point", "weight_scale")]
    names += [] if layer.bias is None else [(layer._parameters, "bias")]
    tensors_of: list[Any] = [held[name] for held, name in names]
    if any(t.is_inference() for t in tensors_of):
        return None  # such tensors do not say when they are written to
    scale, inverse, zero = (t.flatten() for t in tensors_of[:3])
    stored = packing.int8_rows(tensors_of[3])[:, : layer.row_length] if bits == 8 else tensors_of[3]
    source = tuple((held, name, t, t._version) for (held, name), t in zip(names, tensors_of, strict=True))
    return Small(
        scale.tolist(), [int(z) for z in zero.tolist()], inverse.unbind(), stored, bits, shape.halved[0], tensors_of[4],
        tensors_of[5].view(-1), None if layer.bias is None else layer.bias.float(), shape.extremes, source,
    )  # fmt: skip


def _pointwise(layer: QuantLayer, x: Tensor) -> Tensor | None:
    """`run` for linear layers and 1x1 convolutions with one static scale and nothing to pad, without what `_compute`
    looks up for all others: a small layer waits longer for that than for its product. None where it is no such layer.
    """
    small, conv = _small(layer), isinstance(layer, nn.Conv2d)
    if small is None or layer.input is None or (conv and x.ndim != 4):
        return None
    pixels, row = x.permute(0, 2, 3, 1) if conv else x, 0
    if not pixels.is_contiguous():
        return None
    if layer.input.spec.timed:
        at = layer.input.rows()
        every = [0] if at is None else at.tolist()
        if any(r != every[0] for r in every):
            return None
        row = every[0]
    channels, zero = pixels.shape[-1], small.zero[row]
    flat = pixels.view(-1, channels)
    few = cpu_onednn.few(flat.shape[0], channels)
    codes = _shifted(flat, small.inverse[row], zero, small.extremes[0], cpu_onednn.OFFSET if few else 0)
    weight = small.rows(channels) if few else columns(*tensors(layer))[0]
    operands = (zero, weight, small.scale[row], small.weight_scale, small.bias)
    if few:
        y = cpu_onednn.few_product(codes.view(torch.int8), *operands)
    else:
        y = cpu_onednn.product(codes, *operands, cpu_onednn.must_split(*small.extremes))
    y = (y if x.dtype == torch.float32 else y.to(x.dtype)).view(*pixels.shape[:-1], -1)
    return y.permute(0, 3, 1, 2) if conv else y


def arguments(layer: QuantLayer, prepared: Tensor, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """What `_compute` takes, for an input as `QuantLayer.prepare` gives it."""
    stored = [getattr(layer, f"codes{b}") for b in shape.bits]
    order = layer._buffers.get("row_order")
    found = _batched(layer, prepared), *tables(layer, prepared), stored, order, layer.weight_scale
    return *found, layer.weight_zero_point, layer.bias, dtype, *shape


def codes(layer: QuantLayer, x: Tensor) -> Tensor:
    """The activation codes that `run` multiplies, uint8, shape of ``x``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    batched = _batched(layer, prepared)
    left, right, top, bottom = shape.frame
    out = torch.empty_like(batched, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for part in _parts(batched, *tables(layer, prepared), shape, few=False):
        inner = [c[:, top : c.shape[1] - bottom, left : c.shape[2] - right, :n]
                 for c, n in zip(part.codes, shape.segments, strict=True)]  # fmt: skip
        out[part.start : part.stop] = torch.cat(inner, dim=3)
    return _unbatched(layer, out, x)


def accumulators(layer: QuantLayer, x: Tensor) -> list[Tensor]:
    """int32 sums of ``(code_a - zero_a) * (code_w - zero_w)`` of each segment, channels last, from the products that
    `run` multiplies; ``[..., N]``, pictures ``[B, H', W', N]``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    batched = _batched(layer, prepared)
    few = shape.few(batched)
    weights = (rows if few else columns)(*tensors(layer))
    found: list[list[Tensor]] = [[] for _ in shape.segments]
    for part in _parts(batched, *tables(layer, prepared), shape, few):
        for s, (framed, weight) in enumerate(zip(part.codes, weights, strict=True)):
            seen = windows(framed, shape.kernel, shape.stride, shape.dilation)
            operands = seen.flatten(0, 2), part.zero[s], weight
            made = cpu_onednn.few_sums(*operands) if few else cpu_onednn.sums(*operands, *shape.extremes)
            found[s].append(made.view(*seen.shape[:3], -1))
    whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]
    return whole if isinstance(layer, nn.Conv2d) else [acc.view(*x.shape[:-1], -1) for acc in whole]


def _compute(
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor | None, stored: list[Tensor],
    order: Tensor | None, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, dtype: torch.dtype,
    segments: list[int], kernel: list[int], stride: list[int], dilation: list[int], frame: list[int], bits: list[int],
    halved: list[int], extremes: list[int],
) -> Tensor:
    """Output ``[B, H', W', N]`` for an input ``[B, H, W, C]``, channels last in both; tables ``[R, S]``, R = 1 or B."""
    shape = Shape(segments, kernel, stride, dilation, frame, bits, halved, extremes)
    few, split, last = shape.few(x), cpu_onednn.must_split(*extremes), len(segments) - 1
    taps = kernel[0] * kernel[1]
    weights = (rows if few else columns)(stored, bits, halved, order, weight_zero_point, segments, taps)
    scales, bias = weight_scale.t().contiguous(), None if bias is None else bias.float()
    found = []
    for part in _parts(x, scale, inverse, zero, top, shape, few):
        made = []
        for s, framed in enumerate(part.codes):
            seen = windows(framed, kernel, stride, dilation)
            operands = (seen.flatten(0, 2), part.zero[s], weights[s], part.scale[s], scales[s],
                        bias if s == last else None)  # fmt: skip
            y = cpu_onednn.few_product(*operands) if few else cpu_onednn.product(*operands, split)
            made.append(y.view(*seen.shape[:3], -1))
        found.append(functools.reduce(Tensor.add_, made))
    return (torch.cat(found) if len(found) > 1 else found[0]).to(dtype)


# ---- its tensors -----------------------------------------------------------------------------------------------------
def tables(layer: QuantLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(scale, inverse_scale, zero_point) ``[R, S]`` at the time of this call, R = 1 or the batch; and the largest code
    ``[R, 1]`` where it changes over time."""
    quantizer = layer.input
    if quantizer is None:
        raise ValueError("the input of this layer is not quantized")
    if quantizer.spec.mode == "dynamic":
        found = quantizer.parameters_for(x, layer.channel_dim % x.ndim)
        a, b, c = (by_segment(t, layer.channel_dim % x.ndim, layer.segments) for t in found)
        return a, b, c, None
    row, tops = quantizer.rows(), quantizer.row_tops()
    if row is None:
        return quantizer.scale, quantizer.inverse_scale, quantizer.zero_point, None
    a, b, c = (t.index_select(0, row) for t in (quantizer.scale, quantizer.inverse_scale, quantizer.zero_point))
    times = quantizer.times() if isinstance(tops, Tensor) else None
    return a, b, c, tops.index_select(0, times) if isinstance(tops, Tensor) and times is not None else None


def by_segment(table: Tensor, dim: int, segments: tuple[int, ...]) -> Tensor:
    """A broadcastable table of the channels as ``[R, S]``."""
    count = table.shape[dim]
    starts = [sum(segments[:s]) if count > 1 else 0 for s in range(len(segments))]
    return torch.stack([table.narrow(dim, start, 1).flatten() for start in starts], dim=1)


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
    x: Tensor, scale: Tensor, inverse_scale: Tensor, zero_point: Tensor, top: Tensor | None, shape: Shape, few: bool
) -> Iterator[Part]:
    """``x`` ``[B, H, W, C]`` in codes: all of it at once where all samples have the same scales."""
    found = list(zip(scale.tolist(), zero_point.tolist(), strict=True))
    tops = [shape.extremes[0]] * len(found) if top is None else [int(t) for t in top.flatten().tolist()]
    once = all(row == found[0] for row in found) and all(t == tops[0] for t in tops)
    for i in range(1 if once else len(found)):
        start, stop = (0, x.shape[0]) if once else (i, i + 1)
        taken = x[start:stop].split(shape.segments, dim=3) if len(shape.segments) > 1 else (x[start:stop],)
        scales, zeros, inverses = found[i][0], [int(z) for z in found[i][1]], inverse_scale[i].unbind()
        made = [_framed(t, inverse, zero, tops[i], shape.frame, cpu_onednn.OFFSET if few else 0)
                for t, inverse, zero in zip(taken, inverses, zeros, strict=True)]  # fmt: skip
        yield Part(start, stop, scales, zeros, [m.view(torch.int8) for m in made] if few else made)


def _framed(part: Tensor, inverse: Tensor, zero: int, top: int, frame: list[int], less: int) -> Tensor:
    """Codes of one segment less an offset, modulo 256, uint8 ``[B, H + .., W + .., padded channels]``; what is added
    has the zero-point's code."""
    left, right, above, below = frame
    b, h, w, c = part.shape
    wide = packing.padded((c,))[0]
    size = (b, h + above + below, w + left + right, wide)
    if size == part.shape and part.is_contiguous():
        return _shifted(part, inverse, zero, top, less)
    out = torch.zeros(size, dtype=torch.uint8)
    inner = out if size == part.shape else out[:, above : above + h, left : left + w, :c]
    if part.stride(3) == 1:
        encode_bytes(part, inverse, zero, top, inner)
    else:  # bytes are transposed faster than what they are made of
        inner.copy_(encode_bytes(part, inverse, zero, top, torch.empty_like(part, dtype=torch.uint8)))
    return out.add_((zero - less) % 256)


def _shifted(x: Tensor, inverse: Tensor, zero: int, top: int, less: int) -> Tensor:
    """Codes of a contiguous tensor less an offset, modulo 256, uint8 in its shape."""
    out, shift = encode_bytes(x, inverse, zero, top, torch.empty(x.shape, dtype=torch.uint8)), (zero - less) % 256
    return out.add_(shift) if shift else out


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
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor | None, stored: list[Tensor],
    order: Tensor | None, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, dtype: torch.dtype,
    segments: list[int], kernel: list[int], stride: list[int], dilation: list[int], frame: list[int], bits: list[int],
    halved: list[int], extremes: list[int],
) -> Tensor:
    shape = Shape(segments, kernel, stride, dilation, frame, bits, halved, extremes)
    return x.new_empty((x.shape[0], *shape.places(x), weight_scale.shape[0]), dtype=dtype)
