"""The int8 operations as torch ops: Triton on CUDA, the definition in plain torch elsewhere, shapes for tracing.

    bitbrush::int8_encode    an input to codes less 128, rows of channels, or a frame (`triton_int8.Frame`) of them; a
                             frame of more pixels than the input has repeats them, as often in both directions
    bitbrush::int8_weight    packed rows below 8 bits to ``code - zero_point``
    bitbrush::int8_weights   those of several layers at once
    bitbrush::int8_product   the integer product of both, scaled, with what is added to it: one rounding

``places`` and ``columns`` sort the channels of input and weight, where they are summed by group (`kernels.sums`). A
compiled graph sees each as one operation, so none breaks it; in one, the encode is written out instead
(`gpu.codes_in_graph`), for the compiler to join with what stands before it. Lists of integers stand for a `Frame`:
batch, high, wide, kh, kw, pad, stride, shared; empty for linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitbrush.kernels import cpu_weights, direct, triton_encode, triton_int8, triton_unpack, tuning
from bitbrush.kernels.sums import OF_CHANNEL, by_columns
from bitbrush.kernels.triton_int8 import BY_ROW, BY_SAMPLE, Extra, Frame, Tables
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode as encode_codes

_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "int8_encode(Tensor x, Tensor inverse, Tensor zero_point, Tensor times, int kind, int[] counts, int top, "
    "int[] frame, int per_sample, Tensor? factor, Tensor? places=None) -> Tensor"
)
_LIBRARY.define(
    "int8_weight(Tensor[] codes, int[] bits, Tensor zero_point, Tensor? order, int[] counts, int taps, bool halved, "
    "Tensor? columns=None) -> Tensor"
)
_LIBRARY.define(
    "int8_weights(Tensor like, Tensor[] codes, Tensor[] zero_point, int[] channels, int bits, bool halved) -> Tensor[]"
)
_LIBRARY.define(
    "int8_product(Tensor a, Tensor w, Tensor scale, Tensor zero_point, Tensor times, int kind, Tensor weight_scale, "
    "Tensor weight_sum, int[] widths, int[] frame, int per_sample, Tensor? bias, Tensor? shared, Tensor? residual, "
    "ScalarType dtype, bool gate=False) -> Tensor"
)


def frame_of(numbers: list[int]) -> Frame | None:
    """The frame that a list of integers stands for."""
    if not numbers:
        return None
    batch, high, wide, kh, kw, pad, stride, shared = numbers
    return Frame(batch, high, wide, (kh, kw), pad, stride, bool(shared))


def numbers_of(frame: Frame | None) -> list[int]:
    """Inverse of `frame_of`."""
    if frame is None:
        return []
    return [frame.batch, frame.high, frame.wide, *frame.kernel, frame.pad, frame.stride, int(frame.shared)]


# ---- encode ----------------------------------------------------------------------------------------------------------
def _encode_cuda(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, kind: int, counts: list[int], top: int,
    frame: list[int], per_sample: int, factor: Tensor | None, places: Tensor | None = None,
) -> Tensor:
    segments, place = tuple(counts), frame_of(frame)
    x = x.contiguous(memory_format=torch.channels_last) if place is not None else x.contiguous()
    return triton_encode.encode(x, inverse, zero_point, times, kind, segments, top,
                                frame=place, per_sample=per_sample, factor=factor, places=places)


def _encode_plain(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, kind: int, counts: list[int], top: int,
    frame: list[int], per_sample: int, factor: Tensor | None, places: Tensor | None = None,
) -> Tensor:
    place = frame_of(frame)
    if place is not None and place.high != x.shape[2]:
        x = torch.nn.functional.interpolate(x, (place.high, place.wide))
    rows = x if place is None else x.permute(0, 2, 3, 1)
    rows = in_places(rows.float() if factor is None else rows.float() * factor, places)

    def wide(table: Tensor) -> Tensor:
        found = table if kind == BY_ROW else table.index_select(0, times)
        if kind == BY_SAMPLE and place is None:
            found = found.repeat_interleave(per_sample, 0)
        found = by_channel(found, counts) if found.shape[1] > 1 else found
        return found if place is None else found[:, None, None, :]

    zero, limit = zero_and_top(wide(zero_point), top)
    return laid_out(encode_codes(rows, wide(inverse), zero, limit), zero, counts, place)


def in_places(rows: Tensor, places: Tensor | None) -> Tensor:
    """Rows ``[.., C]`` with their channels sum by sum, not padded (`sums.places`)."""
    if places is None:
        return rows
    channels = places // OF_CHANNEL
    return rows.index_select(-1, channels[channels < rows.shape[-1]])


def with_tops(zero_point: Tensor, tops: Tensor) -> Tensor:
    """int32 ``[T, S]``: zero-points and the largest codes ``[T, 1]`` of tables whose rows are on different grids; what
    encodes takes it in the place of the zero-points alone."""
    return zero_point.to(torch.int32) + 256 * tops.to(torch.int32)


def zero_and_top(table: Tensor, top: int) -> tuple[Tensor, int | Tensor]:
    """(zero-points as float32, largest code) of rows of a table with or without the latter."""
    if table.dtype != torch.int32:
        return table.float(), top
    return (table & 255).float(), (table >> 8).float()


def by_channel(table: Tensor, counts: list[int]) -> Tensor:
    """A table ``[R, S]`` of segments as one of their channels."""
    return torch.cat([table[:, s : s + 1].expand(-1, count) for s, count in enumerate(counts)], 1)


def laid_out(codes: Tensor, zero: Tensor, counts: list[int], frame: Frame | None) -> Tensor:
    """Float codes ``[R, C]`` or ``[B, H, W, C]`` as int8 rows less 128: segments padded, a border with a frame.

    Args:
        zero: Zero-points, shaped to broadcast against the codes.

    What is padded holds the zero-point's code. Written so that a compiler makes one pass over memory of it.
    """
    pad = torch.nn.functional.pad
    centred = codes - zero
    if packing.padded(tuple(counts)) != tuple(counts):
        parts = centred.split(list(counts), -1)
        centred = torch.cat([pad(p, (0, -p.shape[-1] % packing.SEGMENT_ALIGN)) for p in parts], -1)
        if zero.shape[-1] > 1:
            zeros = zero.split(list(counts), -1)
            zero = torch.cat([pad(z, (0, -z.shape[-1] % packing.SEGMENT_ALIGN), value=0.0) for z in zeros], -1)
    if frame is None:
        return (centred + (zero - 128)).to(torch.int8)
    missing = frame.rows - frame.batch * frame.height * frame.pitch  # below the last picture
    if frame.shared:  # one zero-point for all: it is added last, to the border as well
        rows = pad(centred, (0, 0, frame.pad, 0, frame.pad, 0)).flatten(0, 2)
        return (pad(rows, (0, 0, 0, missing)) + (zero.reshape(-1, zero.shape[-1])[:1] - 128)).to(torch.int8)
    around = (0, 0, frame.pad, frame.pad, frame.pad, frame.pad)
    rows = (pad(centred, around) + (zero - 128)).to(torch.int8).flatten(0, 2)
    return pad(rows, (0, 0, 0, missing))  # nothing reads what is there


# ---- weight ----------------------------------------------------------------------------------------------------------
def _weight_cuda(
    codes: list[Tensor], bits: list[int], zero_point: Tensor, order: Tensor | None, counts: list[int], taps: int,
    halved: bool, columns: Tensor | None = None,
) -> Tensor:
    segments = tuple(counts)
    widths = packing.padded(segments)
    length = taps * sum(widths)
    wide = length if columns is None else len(columns)
    out = torch.empty((zero_point.shape[0], wide), dtype=torch.int8, device=zero_point.device)
    start = 0
    for data, width in zip(codes, bits, strict=True):
        mine = None if order is None else order[start : start + data.shape[0]]
        if columns is not None:
            triton_unpack.unpack_sorted(out, data, width, zero_point, mine, columns, length, halved and width == 1)
        elif width == 8:
            values = packing.int8_rows(data)[:, : out.shape[1]]
            out = values if mine is None else out.index_copy_(0, mine.long(), values)
        else:
            triton_unpack.unpack(out, data, width, zero_point, mine, segments, widths, taps, halved and width == 1)
        start += data.shape[0]
    return out


def _weight_plain(
    codes: list[Tensor], bits: list[int], zero_point: Tensor, order: Tensor | None, counts: list[int], taps: int,
    halved: bool, columns: Tensor | None = None,
) -> Tensor:
    rows = torch.cat(cpu_weights.rows(codes, bits, [int(halved and b == 1) for b in bits], order, zero_point, counts,
                                      taps), 1)
    return rows if columns is None else by_columns(rows, columns)


def _weights_cuda(
    like: Tensor, codes: list[Tensor], zero_point: list[Tensor], channels: list[int], bits: int, halved: bool
) -> list[Tensor]:
    out = _weights_shape(like, codes, zero_point, channels, bits, halved)
    triton_unpack.unpack_each(out, codes, bits, zero_point, channels, halved)
    return out


def _weights_plain(
    like: Tensor, codes: list[Tensor], zero_point: list[Tensor], channels: list[int], bits: int, halved: bool
) -> list[Tensor]:
    """int8 ``[N, padded(C)]`` of linear layers of one segment and one number of bits, below 8.

    Args:
        like: On the device; nothing else counts.
        codes, zero_point, channels: Packed rows, uint8 ``[N, 1]`` and C of each layer.
    """
    given = zip(codes, zero_point, channels, strict=True)
    return [_weight_plain([packed], [bits], zero, None, [count], 1, halved) for packed, zero, count in given]


# ---- product ---------------------------------------------------------------------------------------------------------
def _product_cuda(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, kind: int, weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], frame: list[int], per_sample: int, bias: Tensor | None,
    shared: Tensor | None, residual: Tensor | None, dtype: torch.dtype, gate: bool = False,
) -> Tensor:
    tables = Tables(scale, zero_point, times, kind, weight_scale, weight_sum)
    place, extra = frame_of(frame), Extra(bias, shared, residual, gate)

    def run(config: triton_int8.Config) -> Tensor:
        return triton_int8.product(a, w, tables, tuple(widths), dtype, frame=place, per_sample=per_sample, extra=extra,
                                   config=config)

    rows = a.shape[0] if place is None else place.batch * place.out[0] * place.out[1]
    return run(tuning.config(tuning.Problem.of(rows, w.shape[0], tuple(widths), place), a.device, run))


def _product_plain(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, kind: int, weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], frame: list[int], per_sample: int, bias: Tensor | None,
    shared: Tensor | None, residual: Tensor | None, dtype: torch.dtype, gate: bool = False,
) -> Tensor:
    place = frame_of(frame)
    tables = Tables(scale, zero_point, times, kind, weight_scale, weight_sum)
    sums, (sample, row) = plain_sums(a, w, tables, widths, place, per_sample), _served(a, tables, place, per_sample)
    total = (sums[0].float() * scale[row, :1]) * weight_scale[:, 0]
    for s in range(1, len(sums)):
        total = total + (sums[s].float() * scale[row, s : s + 1]) * weight_scale[:, s]
    total = total if bias is None else total + bias.float()
    if shared is not None:
        row = shared.float()[sample]
        total = total * row if gate else total + row
    total = total if residual is None else total + residual.float().reshape(total.shape)
    out = total.to(dtype)
    return out if place is None else out.reshape(place.batch, *place.out, -1)


def plain_sums(
    a: Tensor, w: Tensor, tables: Tables, widths: list[int], frame: Frame | None, per_sample: int
) -> list[Tensor]:
    """``sum (code_a - zero_a) w`` of each segment, int32 ``[M, N]``, in plain torch."""
    taps, row = 1 if frame is None else frame.kernel[0] * frame.kernel[1], _served(a, tables, frame, per_sample)[1]
    parts = zip(a.split(widths, 1), w[:, : taps * sum(widths)].split([taps * k for k in widths], 1), strict=True)
    out = []
    for s, (left, right) in enumerate(parts):
        gathered = left if frame is None else _gathered(left, frame)
        acc = (gathered.double() @ right.double().T).to(torch.int32)  # integers below 2**53: exact
        out.append(acc + (128 - tables.zero_point[row, s : s + 1].to(torch.int32)) * tables.weight_sum[s])
    return out


def _served(a: Tensor, tables: Tables, frame: Frame | None, per_sample: int) -> tuple[Tensor, Tensor]:
    """(sample, row of the activation's tables) of each output."""
    count = a.shape[0] if frame is None else frame.batch * frame.out[0] * frame.out[1]
    every = torch.arange(count, device=a.device)
    sample = every // (per_sample if frame is None else frame.out[0] * frame.out[1])
    if tables.kind == BY_ROW:
        return sample, every
    return sample, tables.times[sample] if tables.kind == BY_SAMPLE else tables.times


def _gathered(frame_rows: Tensor, frame: Frame) -> Tensor:
    """The rows ``[M, kh * kw * C]`` of a convolution's product, by the frame's arithmetic."""
    b, y, x = (torch.arange(n) for n in (frame.batch, *frame.out))
    first = ((b[:, None, None] * frame.height + y[:, None] * frame.stride) * frame.pitch + x * frame.stride).flatten()
    i, j = (torch.arange(n) for n in frame.kernel)
    taps = (i[:, None] * frame.pitch + j).flatten()
    return frame_rows[first[:, None] + taps].flatten(1)


# ---- shapes ----------------------------------------------------------------------------------------------------------
def _encode_shape(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, kind: int, counts: list[int], top: int,
    frame: list[int], per_sample: int, factor: Tensor | None, places: Tensor | None = None,
) -> Tensor:
    place = frame_of(frame)
    rows = x.shape[0] if place is None else place.rows
    return x.new_empty((rows, sum(packing.padded(tuple(counts)))), dtype=torch.int8)


def _weight_shape(
    codes: list[Tensor], bits: list[int], zero_point: Tensor, order: Tensor | None, counts: list[int], taps: int,
    halved: bool, columns: Tensor | None = None,
) -> Tensor:
    length = taps * sum(packing.padded(tuple(counts))) if columns is None else columns.shape[0]
    return zero_point.new_empty((zero_point.shape[0], length), dtype=torch.int8)


def _weights_shape(
    like: Tensor, codes: list[Tensor], zero_point: list[Tensor], channels: list[int], bits: int, halved: bool
) -> list[Tensor]:
    given = zip(zero_point, channels, strict=True)
    return [like.new_empty((len(zero), *packing.padded((count,))), dtype=torch.int8) for zero, count in given]


def _product_shape(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, kind: int, weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], frame: list[int], per_sample: int, bias: Tensor | None,
    shared: Tensor | None, residual: Tensor | None, dtype: torch.dtype, gate: bool = False,
) -> Tensor:
    place = frame_of(frame)
    shape = (a.shape[0],) if place is None else (place.batch, *place.out)
    return a.new_empty((*shape, w.shape[0]), dtype=dtype)


for _name, _cuda, _plain, _shape in (
    ("int8_encode", _encode_cuda, _encode_plain, _encode_shape),
    ("int8_weight", _weight_cuda, _weight_plain, _weight_shape),
    ("int8_weights", _weights_cuda, _weights_plain, _weights_shape),
    ("int8_product", _product_cuda, _product_plain, _product_shape),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _plain, "CPU")
    torch.library.register_fake(f"bitbrush::{_name}", _shape, lib=_LIBRARY)
    direct.register(_name, _cuda, 2 if _name == "int8_weight" else 0)
