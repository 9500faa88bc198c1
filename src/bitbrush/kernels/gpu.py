"""Packed linear and convolution layers on CUDA: encode, int8 product, one rounding (`triton_int8`, `int8_ops`).

A weight of 8 bits is multiplied as it lies in memory. Lower bits are unpacked to int8 right before the product, into
memory that the next layer uses again: at the batch sizes of a denoiser this costs a few percent of a step, and a
product that unpacks within itself costs more (each tile of the output would unpack the weight again).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu, cpu_fused, direct, gpu_decode, int8_ops, reference, sums, triton_int8
from bitbrush.kernels.triton_int8 import BY_ROW, BY_SAMPLE, ONE_ROW, Frame, Tables
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

MOST_SEGMENTS = 16
"""Each segment is unrolled in the kernel."""
_OPS = direct.OPS


def why_not(layer: QuantLayer, device_type: str) -> str | None:
    """Why this kernel cannot run a packed layer on a device, or None when it can."""
    return gpu_decode.no_triton(device_type) or unable(layer)


def unable(layer: QuantLayer) -> str | None:
    """Why a layer cannot be computed so on any device, or None when it can."""
    reason = cpu.why_not(layer, "cpu")  # what an int8 product can compute at all
    if reason is not None:
        return reason
    count = layer.spec.activation.groups if sums.grouped(layer) and layer.spec.activation else len(layer.segments)
    if count > MOST_SEGMENTS:
        return f"{count} {'groups' if sums.grouped(layer) else 'segments'}; the kernel takes {MOST_SEGMENTS}"
    if layer.spec.activation is not None and layer.spec.activation.time_bits and _by_pixel(layer):
        return "groups of pixels whose bits change over time"
    return _conv_reason(layer) if isinstance(layer, nn.Conv2d) else None


def _conv_reason(layer: Any) -> str | None:
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if len({left, right, top, bottom}) > 1 or max(layer.dilation) > 1 or len(set(layer.stride)) > 1:
        return "a convolution with dilation, or with padding or stride that differ by side"
    if left and left >= min(layer.kernel_hw):
        return "a convolution with more padding than kernel"
    if layer.spec.activation.granularity in cpu.BY_PIXEL and layer.stride[0] > 1:
        return "scales a pixel in a convolution with a stride"
    return None


def _by_pixel(layer: QuantLayer) -> bool:
    return layer.spec.activation is not None and layer.spec.activation.granularity == "pixel_group"


def leaves(layer: QuantLayer, x: Tensor) -> bool:
    """Whether an input is left to the reference; see `cpu.leaves`."""
    return cpu.leaves(layer, x) or (x.ndim != 4 and isinstance(layer, nn.Conv2d))


class Facts(NamedTuple):
    """What a layer's spec and shape say; see `facts`.

    Attributes:
        spec: Of the layer when this was found.
        conv, pointwise: Whether it is a convolution, and one that is a linear layer of pixels.
        pad, stride, kernel: Of a convolution.
        counts, widths: Channels of each sum (a segment, or a group), and padded.
        grouped: Whether sums are over groups.
        static: Whether one row of tables serves all times.
        changing: Whether rows have bits of their own.
        top: Largest code, of the widest row.
        whole: Whether every weight has 8 bits: its bytes are the integers themselves.
    """

    spec: Any
    conv: bool
    pointwise: bool
    pad: int
    stride: int
    kernel: tuple[int, int]
    counts: tuple[int, ...]
    widths: tuple[int, ...]
    grouped: bool
    static: bool
    changing: bool
    top: int
    whole: bool


def facts(layer: QuantLayer) -> Facts:
    """What does not change while the layer has its spec. Kept, but not by a graph that is being compiled."""
    kept: Facts | None = None if torch.compiler.is_compiling() else layer.__dict__.get("kernel_facts")
    if kept is not None and kept.spec is layer.spec and not (kept.grouped and kept.counts != sums.counts(layer)):
        return kept
    like: Any = layer
    counts = sums.counts(layer)
    spec, conv, given = layer.spec, isinstance(layer, nn.Conv2d), layer.spec.activation
    found = Facts(
        spec, conv, conv and _pointwise(layer), int(like._reversed_padding_repeated_twice[0]) if conv else 0,
        int(like.stride[0]) if conv else 1, layer.kernel_hw, counts, packing.padded(counts), sums.grouped(layer),
        given is not None and given.mode == "static" and not (given.timed or given.time_bits or _by_pixel(layer)),
        given is not None and given.mode == "static" and bool(given.time_bits),
        (1 << given.most_bits) - 1 if given is not None else 0,
        spec.weight is not None and spec.weight.bit_classes() == (8,),
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        layer.__dict__["kernel_facts"] = found
    return found


class Given(NamedTuple):
    """How an input lies in memory, and what encodes it: tables ``[T, S]`` and which row of them serves what
    (`triton_int8`). ``encoding`` stands for the zero-points where codes are made: where bits change over time it holds
    the largest codes, too."""

    frame: Frame | None
    per_sample: int
    scale: Tensor
    inverse: Tensor
    zero_point: Tensor
    times: Tensor
    kind: int
    encoding: Tensor


def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer from exact integer products, in the dtype of ``x``."""
    if layer.input is None or leaves(layer, x):
        return reference.run(layer, x)
    given = given_input(layer, x)
    return layer.with_branch(multiply(layer, input_rows(layer, x, given), given, x), x)


def multiply(
    layer: QuantLayer, codes: Tensor, given: Given, x: Tensor, *, shared: Tensor | None = None,
    residual: Tensor | None = None, gate: bool = False, weight: Tensor | None = None,
) -> Tensor:
    """The layer's output for codes, in the dtype of ``x``, and what is added to it before the one rounding.

    Args:
        codes: Rows or a frame, as `input_rows` gives them.
        given: What they were encoded by.
        x: The input (of its shape and dtype; values are not looked at).
        shared: ``[samples, N]``, contiguous: the same for all places of a sample.
        residual: Like the output.
        gate: What belongs to samples is multiplied by, not added.
        weight: `int8_weight`, where it is there already.
    """
    known = facts(layer)
    conv, of_weight = known.conv, sums.weight_scale(layer) if known.grouped else layer._buffers["weight_scale"]
    if residual is not None:
        residual = (residual.permute(0, 2, 3, 1) if conv else residual).contiguous()
    y: Tensor = _OPS.int8_product(
        codes, int8_weight(layer) if weight is None else weight, given.scale, given.zero_point, given.times,
        given.kind, of_weight, weight_sum(layer), known.widths, int8_ops.numbers_of(given.frame), given.per_sample,
        layer._parameters["bias"], shared, residual, x.dtype, gate,
    )
    if not conv:
        return y.reshape(*x.shape[:-1], -1)
    if given.frame is None:
        y = y.reshape(x.shape[0], *x.shape[2:], -1)
    return y.permute(0, 3, 1, 2)


def given_input(layer: QuantLayer, x: Tensor) -> Given:
    """How an input of this shape lies in memory and what encodes it now; of a linear layer, the last size of ``x`` does
    not matter."""
    known = facts(layer)
    if known.static:
        tables: dict[str, Any] = layer._modules["input"]._buffers  # type: ignore[union-attr]
        scale, inverse, zero = tables["scale"], tables["inverse_scale"], tables["zero_point"]
        times, kind = first_row(layer), ONE_ROW
    else:
        scale, inverse, zero, times, kind = _tables(layer, x)
    encoding = changing_table(layer) if known.changing else zero
    if known.conv and not known.pointwise:
        frame = Frame(x.shape[0], x.shape[2], x.shape[3], known.kernel, known.pad, known.stride, kind == ONE_ROW)
        return Given(frame, 1, scale, inverse, zero, times, kind, encoding)
    places = x.shape[2:] if known.pointwise else x.shape[1:-1]
    return Given(None, max(1, math.prod(places)), scale, inverse, zero, times, kind, encoding)


def _rows(layer: QuantLayer, x: Tensor, frame: Frame | None) -> Tensor:
    """The input as rows of channels, where it is not framed."""
    if frame is not None:
        return x
    return (x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else x).reshape(-1, layer.in_channels_)


def _pointwise(layer: Any) -> bool:
    """Whether a convolution is a linear layer of pixels."""
    borders = layer._reversed_padding_repeated_twice
    return layer.kernel_hw == (1, 1) and int(layer.stride[0]) == 1 and not any(borders)


def _tables(layer: QuantLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(scale, inverse, zero_point) ``[T, S]``, the rows that count, and for what each counts."""
    quantizer = layer.input
    if quantizer is None:
        raise ValueError("the input of this layer is not quantized")
    by_pixel = quantizer.spec.granularity == "pixel_group"
    if quantizer.spec.mode == "static" and not by_pixel:
        times = quantizer.times() if not quantizer.spec.time_groups else quantizer.rows()
        times = first_row(layer) if times is None else times
        kind = ONE_ROW if len(times) == 1 else BY_SAMPLE
        return quantizer.scale, quantizer.inverse_scale, quantizer.zero_point, times, kind
    dim = layer.channel_dim % x.ndim
    found = quantizer.parameters_for(layer.prepare(x), dim)
    if by_pixel:
        shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
        scale, inverse, zero = (table.expand(shape).reshape(-1, 1) for table in found)
    else:
        scale, inverse, zero = (cpu_fused.by_segment(table, dim, layer.segments) for table in found)
    if len(scale) == 1:
        return scale, inverse, zero, first_row(layer), ONE_ROW
    kind = BY_SAMPLE if quantizer.spec.granularity == "sample" else BY_ROW
    return scale, inverse, zero, torch.arange(len(scale), device=x.device), kind


def first_row(layer: QuantLayer) -> Tensor:
    """The row of a table that has one: int64 ``[1]``, on the layer's device. Kept: graphs need not fill it."""
    return sums.kept(layer, "first_row", _first_row)


def _first_row(layer: QuantLayer) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=layer.weight_scale.device)


def changing_table(layer: QuantLayer) -> Tensor:
    """int32 ``[T, S]``: the zero-points and largest codes of rows with bits of their own (`int8_ops.with_tops`). Kept,
    for graphs that are captured later."""
    return sums.kept(layer, "changing_table", _changing_table)


def _changing_table(layer: QuantLayer) -> Tensor:
    quantizer: Any = layer.input
    return int8_ops.with_tops(quantizer.zero_point, quantizer.row_tops())


def input_rows(layer: QuantLayer, x: Tensor, given: Given) -> Tensor:
    """The codes less 128: by one kernel, or written out where a compiler can join it with what stands before."""
    if layer.input is None:
        raise ValueError("the input of this layer is not quantized")
    if torch.compiler.is_compiling():
        return codes_in_graph(layer, x, given.frame)
    known, rows, factor = facts(layer), _rows(layer, x, given.frame), input_scale(layer)
    if layer.spec.rotation != "none":
        rows, factor = layer.prepare(x).reshape(rows.shape), None
    codes: Tensor = _OPS.int8_encode(
        rows, given.inverse, given.encoding, given.times, given.kind, known.counts, known.top,
        int8_ops.numbers_of(given.frame), given.per_sample, factor, places(layer),
    )
    return codes


def input_scale(layer: QuantLayer) -> Tensor | None:
    """Factors of the input's channels."""
    return layer._buffers.get("input_scale")


def places(layer: QuantLayer) -> Tensor | None:
    """Where the channels of groups lie (`sums.places`), where sums are over groups."""
    return sums.places(layer) if facts(layer).grouped else None


def several(layer: QuantLayer) -> bool:
    """Whether a layer has more than one sum."""
    return len(facts(layer).counts) > 1


def sorting(layer: QuantLayer) -> tuple[list[int], Tensor | None]:
    """Channels of each of a linear layer's sums and their `places`, for what encodes its input as it is made; nothing
    where there is one sum."""
    return (list(facts(layer).counts), places(layer)) if several(layer) else ([], None)


def codes_in_graph(layer: QuantLayer, x: Tensor, frame: Frame | None) -> Tensor:
    """What ``int8_encode`` gives, in operations of torch."""
    if layer.input is None:
        raise ValueError("the input of this layer is not quantized")
    prepared, dim = layer.prepare(x), layer.channel_dim % x.ndim
    _, inverse, zero = layer.input.parameters_for(prepared, dim)
    codes = encode(prepared, inverse, zero, layer.input.top_for(x.ndim, dim))
    codes, zero = (sums.in_order(layer, cpu._rows_last(layer, t)) for t in (codes, zero))
    if frame is None:
        zero = zero.expand(*codes.shape[:-1], zero.shape[-1]).reshape(-1, zero.shape[-1]) if zero.ndim > 1 else zero
        codes = codes.reshape(-1, codes.shape[-1])
    return int8_ops.laid_out(codes, zero, list(sums.counts(layer)), frame)


def input_codes(layer: QuantLayer, x: Tensor) -> Tensor:
    """The activation codes that the products are made from, uint8, shape of ``x``."""
    given = given_input(layer, x)
    counts, parts, start = sums.counts(layer), [], 0
    a = input_rows(layer, x, given)
    for count, width in zip(counts, packing.padded(counts), strict=True):
        parts.append(a[:, start : start + count])
        start += width
    codes = (torch.cat(parts, 1).to(torch.int16) + cpu.OFFSET).to(torch.uint8)
    codes = codes.index_select(1, sums.order(layer).argsort()) if sums.grouped(layer) else codes
    frame = given.frame
    if frame is not None:
        lines = codes[: frame.batch * frame.height * frame.pitch]
        framed = lines.reshape(frame.batch, frame.height, frame.pitch, -1)
        codes = framed[:, frame.pad : frame.pad + frame.high, frame.pad : frame.pad + frame.wide]
    elif isinstance(layer, nn.Conv2d):
        codes = codes.reshape(x.shape[0], *x.shape[2:], -1)
    return codes.permute(0, 3, 1, 2) if isinstance(layer, nn.Conv2d) else codes.reshape(x.shape)


def accumulators(layer: QuantLayer, x: Tensor) -> list[Tensor]:
    """int32 sums of ``(code_a - zero_a) * (code_w - zero_w)`` of each segment, shapes as `cpu.accumulators`."""
    given, widths = given_input(layer, x), facts(layer).widths
    a, w = input_rows(layer, x, given), int8_weight(layer)
    of_weight = sums.weight_scale(layer), weight_sum(layer)
    tables = Tables(given.scale, given.zero_point, given.times, given.kind, *of_weight)
    if x.is_cuda:
        count = len(a) if given.frame is None else given.frame.batch * given.frame.out[0] * given.frame.out[1]
        made = torch.empty((len(widths), count, len(w)), dtype=torch.int32, device=x.device)
        triton_int8.product(a, w, tables, widths, torch.float32, frame=given.frame, per_sample=given.per_sample,
                            sums=made)
        found = list(made)
    else:
        found = int8_ops.plain_sums(a, w, tables, list(widths), given.frame, given.per_sample)
    shape = (*x.shape[:-1], -1)
    if isinstance(layer, nn.Conv2d):
        shape = (x.shape[0], *(x.shape[2:] if given.frame is None else given.frame.out), -1)
    return [each.reshape(shape) for each in found]


def int8_weight(layer: QuantLayer) -> Tensor:
    """``code - zero_point`` int8 ``[N, K]``, K sum by sum: the packed bytes themselves where they are 8 bits wide and
    lie so."""
    known = facts(layer)
    if known.whole and not known.grouped:
        return packing.int8_rows(layer._buffers["codes8"])  # type: ignore[arg-type]
    spec = layer.spec.weight
    if spec is None:
        raise ValueError("the weight of this layer is not quantized")
    classes = spec.bit_classes()
    kh, kw = layer.kernel_hw
    found: Tensor = _OPS.int8_weight(
        [getattr(layer, f"codes{bits}") for bits in classes], list(classes), layer.weight_zero_point,
        layer.row_order if spec.row_bits else None, list(layer.segments), kh * kw, spec.halved(1),
        sums.columns(layer) if known.grouped else None,
    )
    return found


def weight_sum(layer: QuantLayer) -> Tensor:
    """int32 ``[S, N]``: of each row, what its weights come to in each sum. Kept, for graphs that are captured later."""
    return sums.kept(layer, "weight_sum", _weight_sum)


def _weight_sum(layer: QuantLayer) -> Tensor:
    """By torch's own operations: a model that is moved need not wait until kernels that unpack are built."""
    counts, codes, found = sums.counts(layer), sums.in_order(layer, layer.stored_codes(), 1), []
    zero = layer.weight_zero_point.to(torch.int32).expand(-1, len(counts))
    for s, part in enumerate(codes.split(counts, 1)):
        found.append(part.flatten(1).sum(1, dtype=torch.int32) - part[0].numel() * zero[:, s])
    return torch.stack(found)


def prepare(layer: QuantLayer) -> None:
    """Make what is kept of a layer."""
    weight_sum(layer)
    first_row(layer)
    known = facts(layer)
    if known.changing:
        changing_table(layer)
    if known.grouped:
        for make in (sums.order, sums.places, sums.columns, sums.weight_scale):
            make(layer)
