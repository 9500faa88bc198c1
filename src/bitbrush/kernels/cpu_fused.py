"""A packed layer on the CPU through oneDNN: encode, lay out, multiply and rescale in as few passes as torch has.

Where one scale serves a sample (tables over time, K segments and scales found at run time included), a layer is

    codes    uint8 rows (kh, kw, channel) of pictures in channels-last order, padded with the zero-point's code
    weights  int8 columns, unpacked for this call (`cpu_weights`)
    product  `cpu_onednn.product`: int32 sums, then scales and bias in the same pass; a product a segment. Of few rows
             `cpu_onednn.few_product`, which wants codes less 128, and weights as they are stored. Without VNNI often
             `cpu_float`, which wants codes less the zero-point, as floats

Samples whose scales differ (a batch of mixed timesteps) are computed one after the other. Pictures leave in
channels-last order, whatever they came in: the next layer then has nothing to transpose, and norms, activations and
additions between layers keep the order.

`Shape` is what a layer looks like in numbers, so that the computation is a function of tensors and numbers: called as
it is, and under torch.compile as the operation ``bitbrush::cpu_int8``, which is the same function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu_float, cpu_onednn, cpu_plain
from bitbrush.kernels.cpu_layout import Shape, batched, framed, kept_shape, shape_of, unbatched, windows
from bitbrush.kernels.cpu_weights import columns, rows, tensors

if TYPE_CHECKING:
    from bitbrush.network.activation import ActivationQuantizer
    from bitbrush.network.layers import QuantLayer


Way = Literal["few", "many", "floats"]
"""How products are made: `cpu_onednn.few_product`, `cpu_onednn.product`, `cpu_float`."""


class Part(NamedTuple):
    """Samples with the same scales: their slice of the batch, and scale, zero-point of each segment.

    ``codes``: of each segment, ``[B, H, W, padded channels]``, framed: uint8, or int8 less 128 where rows are few. In
    floats ``[B, H, W, channels]``, less the zero-point.
    """

    start: int
    stop: int
    scale: list[float]
    zero: list[int]
    codes: list[Tensor]


# ---- which layers ----------------------------------------------------------------------------------------------------
def takes(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    """Whether `run` can compute this: one scale a sample (and segment), something to compute, and a product for it."""
    return quantizer.spec.granularity in ("tensor", "sample") and x.numel() > 0 and _engine() != "absent"


@torch.compiler.assume_constant_result
def _engine() -> cpu_onednn.Engine:
    return cpu_onednn.engine()


# ---- the layer -------------------------------------------------------------------------------------------------------
def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """The product of a packed layer with its epilogue, in the dtype of ``x``, shape of the layer's output; without a
    low-rank branch. Pictures are in channels-last order."""
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.bitbrush.cpu_int8(*arguments(layer, layer.prepare(x), x.dtype, shape_of(layer)))
        return unbatched(layer, y, x)
    found = cpu_plain.run(layer, x)
    if found is not None:
        return found
    y = _compute(*arguments(layer, layer.prepare(x), x.dtype, kept_shape(layer)))
    return unbatched(layer, y, x)


def arguments(layer: QuantLayer, prepared: Tensor, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """What `_compute` takes, for an input as `QuantLayer.prepare` gives it."""
    stored = [getattr(layer, f"codes{b}") for b in shape.bits]
    order = layer._buffers.get("row_order")
    found = batched(layer, prepared), *tables(layer, prepared), stored, order, layer.weight_scale
    return *found, layer.weight_zero_point, layer.bias, dtype, *shape


def codes(layer: QuantLayer, x: Tensor) -> Tensor:
    """The activation codes that `run` multiplies, uint8, shape of ``x``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    pictures, found = batched(layer, prepared), tables(layer, prepared)
    way, _ = _way(pictures, found[2], found[3], shape, layer.out_channels_, tensors(layer))
    left, right, top, bottom = shape.frame
    out = torch.empty_like(pictures, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for part in _parts(pictures, *found, shape, "floats" if way == "floats" else "many"):
        if way == "floats":
            inner = [c + zero for c, zero in zip(part.codes, part.zero, strict=True)]
        else:
            inner = [c[:, top : c.shape[1] - bottom, left : c.shape[2] - right, :n]
                     for c, n in zip(part.codes, shape.segments, strict=True)]  # fmt: skip
        out[part.start : part.stop] = torch.cat(inner, dim=3)
    return unbatched(layer, out, x)


def accumulators(layer: QuantLayer, x: Tensor) -> list[Tensor]:
    """int32 sums of ``(code_a - zero_a) * (code_w - zero_w)`` of each segment, channels last, from the products that
    `run` multiplies; ``[..., N]``, pictures ``[B, H', W', N]``."""
    prepared, shape = layer.prepare(x), shape_of(layer)
    pictures, given = batched(layer, prepared), tables(layer, prepared)
    way, weights = _way(pictures, given[2], given[3], shape, layer.out_channels_, tensors(layer))
    found: list[list[Tensor]] = [[] for _ in shape.segments]
    for part in _parts(pictures, *given, shape, way):
        for s, (codes, weight) in enumerate(zip(part.codes, weights, strict=True)):
            found[s].append(_sums(way, codes, part.zero[s], weight, shape))
    whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]
    return whole if isinstance(layer, nn.Conv2d) else [acc.view(*x.shape[:-1], -1) for acc in whole]


def _sums(way: Way, codes: Tensor, zero: int, weight: Tensor, shape: Shape) -> Tensor:
    """int32 ``[B, H', W', N]`` of one segment."""
    if way == "floats":
        return cpu_float.sums(codes, weight, shape).to(torch.int32)
    seen = windows(codes, shape.kernel, shape.stride, shape.dilation)
    operands = seen.flatten(0, 2), zero, weight
    made = cpu_onednn.few_sums(*operands) if way == "few" else cpu_onednn.sums(*operands, *shape.extremes)
    return made.view(*seen.shape[:3], -1)


def _compute(
    x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor | None, stored: list[Tensor],
    order: Tensor | None, weight_scale: Tensor, weight_zero_point: Tensor, bias: Tensor | None, dtype: torch.dtype,
    segments: list[int], kernel: list[int], stride: list[int], dilation: list[int], frame: list[int], bits: list[int],
    halved: list[int], extremes: list[int],
) -> Tensor:
    """Output ``[B, H', W', N]`` for an input ``[B, H, W, C]``, channels last in both; tables ``[R, S]``, R = 1 or B."""
    shape = Shape(segments, kernel, stride, dilation, frame, bits, halved, extremes)
    packed = stored, bits, halved, order, weight_zero_point, segments, kernel[0] * kernel[1]
    way, weights = _way(x, zero, top, shape, weight_scale.shape[0], packed)
    split, last = cpu_onednn.must_split(*extremes), len(segments) - 1
    scales, bias = weight_scale.t().contiguous(), None if bias is None else bias.detach().float()
    found = []
    for part in _parts(x, scale, inverse, zero, top, shape, way):
        made = []
        for s, codes in enumerate(part.codes):
            added, rescale = bias if s == last else None, scales[s] * part.scale[s]
            if way == "floats":
                made.append(cpu_onednn.rescaled(cpu_float.sums(codes, weights[s], shape), rescale, added))
                continue
            seen = windows(codes, kernel, stride, dilation)
            operands = seen.flatten(0, 2), part.zero[s], weights[s]
            if way == "few":
                y = cpu_onednn.few_product(*operands, rescale, added)
            else:
                y = cpu_onednn.product(*operands, part.scale[s], scales[s], added, split)
            made.append(y.view(*seen.shape[:3], -1))
        found.append(functools.reduce(Tensor.add_, made))
    return (torch.cat(found) if len(found) > 1 else found[0]).to(dtype)


def _way(
    x: Tensor, zero_point: Tensor, top: Tensor | None, shape: Shape, n: int, packed: tuple[Any, ...]
) -> tuple[Way, list[Tensor]]:
    """How products are made of ``[B, H, W, C]``, and the weight of each segment as that wants it (``packed``: what
    `cpu_weights.rows` takes)."""
    if cpu_float.wanted(shape, x, n):
        weights = rows(*packed)
        tops = _tops(top, shape, len(zero_point))
        cases = [(z, t, s) for zeros, t in zip(zero_point.tolist(), tops, strict=True) for s, z in enumerate(zeros)]
        reaches = [cpu_float.reach(weight) for weight in weights]
        if all(cpu_float.exact(reaches[s], int(z), t) for z, t, s in cases):
            return "floats", weights
    return ("few", rows(*packed)) if shape.few(x, n) else ("many", columns(*packed))


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


# ---- codes -----------------------------------------------------------------------------------------------------------
def _parts(
    x: Tensor, scale: Tensor, inverse_scale: Tensor, zero_point: Tensor, top: Tensor | None, shape: Shape, way: Way
) -> Iterator[Part]:
    """``x`` ``[B, H, W, C]`` in codes: all of it at once where all samples have the same scales."""
    found = list(zip(scale.tolist(), zero_point.tolist(), strict=True))
    tops = _tops(top, shape, len(found))
    once = all(row == found[0] for row in found) and all(t == tops[0] for t in tops)
    for i in range(1 if once else len(found)):
        start, stop = (0, x.shape[0]) if once else (i, i + 1)
        taken = x[start:stop].split(shape.segments, dim=3) if len(shape.segments) > 1 else (x[start:stop],)
        scales, zeros, inverses = found[i][0], [int(z) for z in found[i][1]], inverse_scale[i].unbind()
        made = [_encoded(way, t, inverse, zero, tops[i], shape)
                for t, inverse, zero in zip(taken, inverses, zeros, strict=True)]  # fmt: skip
        yield Part(start, stop, scales, zeros, made)


def _encoded(way: Way, part: Tensor, inverse: Tensor, zero: int, top: int, shape: Shape) -> Tensor:
    if way == "floats":
        return cpu_float.encode(part, inverse, zero, top)
    found = framed(part, inverse, zero, top, shape.frame, cpu_onednn.OFFSET if way == "few" else 0)
    return found.view(torch.int8) if way == "few" else found


def _tops(top: Tensor | None, shape: Shape, count: int) -> list[int]:
    """The largest code of each of ``count`` rows of tables."""
    return [shape.extremes[0]] * count if top is None else [int(t) for t in top.flatten().tolist()]


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
