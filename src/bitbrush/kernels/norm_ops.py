"""A norm, a GELU or a GEGLU together with the encode of what follows it, as torch ops: the codes are written, and
nothing between.

    bitbrush::layer_norm_encode    LayerNorm, modulated where scale and shift are given (adaLN), then the codes of one
                                   to three linear layers that share it
    bitbrush::group_norm_encode    GroupNorm, SiLU where there is one, then rows of pixels or the frame of a convolution
    bitbrush::group_norm           GroupNorm alone, channels last, where no product on codes follows at once
    bitbrush::geglu_encode         ``hidden * gelu(gate)``, then the codes of a linear layer
    bitbrush::gelu_encode          ``gelu(x)``, by erf or by tanh, then the codes of a linear layer

Each is the chain of its parts in the dtype of ``x``: computed in float32, rounded to that dtype where the chain of
separate operations rounds (after the norm, after each step of its modulation, after SiLU, after gelu and after the
product), then encoded as `numbers.codec.encode` does. What is defined here in plain torch runs on the CPU; Triton's
sums of a norm are in another order, so that a code may differ by one where a value lies at an edge.

Every table serves one row (`triton_int8.ONE_ROW`): ``inverse`` float32 and ``zero_point`` uint8 or float32 ``[T, S]``
(int32: with the largest codes, `int8_ops.with_tops`), ``times`` int64 ``[1]``. Codes are int8 less 128, segments padded
with the zero-point's code. ``frame``: a list of integers, see `int8_ops.frame_of`. ``counts``: channels of
each sum of a linear layer that has several; ``places``: `sums.places`, where they are groups. Those of all consumers
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.kernels import direct, triton_norm
from bitbrush.kernels.int8_ops import by_channel, frame_of, in_places, laid_out, zero_and_top
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode

_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "layer_norm_encode(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor[] inverse, Tensor[] zero_point, "
    "Tensor[] times, int[] tops, Tensor?[] factors, Tensor? scale=None, Tensor? shift=None, int[] counts=[], "
    "Tensor? places=None) -> Tensor"
)
_LIBRARY.define(
    "group_norm_encode(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor inverse, "
    "Tensor zero_point, Tensor times, int[] counts, int top, int[] frame, Tensor? factor) -> Tensor"
)
_LIBRARY.define("group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor")
_LIBRARY.define(
    "geglu_encode(Tensor x, Tensor inverse, Tensor zero_point, Tensor times, int top, Tensor? factor, int[] counts=[], "
    "Tensor? places=None) -> Tensor"
)
_LIBRARY.define(
    "gelu_encode(Tensor x, bool tanh, Tensor inverse, Tensor zero_point, Tensor times, int top, Tensor? factor, "
    "int[] counts=[], Tensor? places=None) -> Tensor"
)


def _float(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.float()


def _codes(
    rows: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, counts: list[int], top: int, frame: list[int],
    factor: Tensor | None, places: Tensor | None = None,
) -> Tensor:
    """int8 codes less 128 of ``rows [.., C]``, of pictures ``[B, H, W, C]``; padded, or in their frame."""
    inverse = inverse.index_select(0, times)
    zero, limit = zero_and_top(zero_point.index_select(0, times), top)
    if len(counts) > 1:
        inverse, zero = by_channel(inverse, counts), by_channel(zero, counts)
        limit = limit if isinstance(limit, int) else by_channel(limit, counts)
    values = in_places(rows.float() if factor is None else rows.float() * factor, places)
    place = frame_of(frame)
    values = values if place is not None else values.reshape(-1, values.shape[-1])
    return laid_out(encode(values, inverse, zero, limit), zero, counts, place)


# ---- LayerNorm -------------------------------------------------------------------------------------------------------
def _layer_norm_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inverse: list[Tensor], zero_point: list[Tensor],
    times: list[Tensor], tops: list[int], factors: list[Tensor | None], scale: Tensor | None = None,
    shift: Tensor | None = None, counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    tables = tuple(zip(inverse, zero_point, times, factors, strict=True))
    rows, modulation = x.reshape(-1, x.shape[-1]).contiguous(), None
    if scale is not None and shift is not None:
        alike = scale.stride() == shift.stride() and scale.stride(1) == 1
        modulation = (scale, shift) if alike else (scale.contiguous(), shift.contiguous())
    return triton_norm.layer_norm(rows, weight, bias, eps, tables, tuple(tops), modulation, tuple(counts), places)


def _layer_norm_plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inverse: list[Tensor], zero_point: list[Tensor],
    times: list[Tensor], tops: list[int], factors: list[Tensor | None], scale: Tensor | None = None,
    shift: Tensor | None = None, counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    """int8 ``[P * R, padded(C)]``: the codes of P consumers of ``x [.., C]``, R rows each, one below the other.

    Args:
        factors: ``input_scale`` float32 ``[C]`` of each consumer, or None.
        scale, shift: ``[B, C]`` in the dtype of ``x [B, .., C]``, or None: the norm is multiplied by ``1 + scale`` of
            its sample, and shift added.
    """
    channels = x.shape[-1]
    normed = F.layer_norm(x.float(), (channels,), _float(weight), _float(bias), eps).to(x.dtype)
    if scale is not None and shift is not None:
        each = (len(x), *[1] * (x.ndim - 2), channels)
        normed = normed * (1 + scale.reshape(each)) + shift.reshape(each)
    consumers = zip(inverse, zero_point, times, tops, factors, strict=True)
    each_sum = list(counts) or [channels]
    return torch.cat([_codes(normed, i, z, t, each_sum, top, [], f, places) for i, z, t, top, f in consumers])


def _layer_norm_shape(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inverse: list[Tensor], zero_point: list[Tensor],
    times: list[Tensor], tops: list[int], factors: list[Tensor | None], scale: Tensor | None = None,
    shift: Tensor | None = None, counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    rows = x.numel() // x.shape[-1]
    return x.new_empty((len(inverse) * rows, _length(counts, x.shape[-1])), dtype=torch.int8)


def _length(counts: Sequence[int], channels: int) -> int:
    """Of a row of codes."""
    return sum(packing.padded(tuple(counts) or (channels,)))


# ---- GroupNorm -------------------------------------------------------------------------------------------------------
def _group_norm_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, inverse: Tensor, zero_point: Tensor,
    times: Tensor, counts: list[int], top: int, frame: list[int], factor: Tensor | None,
) -> Tensor:
    return triton_norm.group_norm(x.contiguous(memory_format=torch.channels_last), weight, bias, groups, eps, silu,
                                  inverse, zero_point, times, tuple(counts), top, frame_of(frame), factor)


def _group_norm_plain(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, inverse: Tensor, zero_point: Tensor,
    times: Tensor, counts: list[int], top: int, frame: list[int], factor: Tensor | None,
) -> Tensor:
    """int8 rows of pixels of ``x [B, C, H, W]``, or without a frame ``[B * H * W, sum(padded(counts))]``.

    Args:
        counts: Channels of each segment.
        factor: ``input_scale`` float32 ``[C]``.
    """
    normed = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    normed = F.silu(normed.float()).to(x.dtype) if silu else normed
    return _codes(normed.permute(0, 2, 3, 1), inverse, zero_point, times, counts, top, frame, factor)


def _group_norm_shape(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, inverse: Tensor, zero_point: Tensor,
    times: Tensor, counts: list[int], top: int, frame: list[int], factor: Tensor | None,
) -> Tensor:
    place = frame_of(frame)
    rows = x.shape[0] * x.shape[2] * x.shape[3] if place is None else place.rows
    return x.new_empty((rows, sum(packing.padded(tuple(counts)))), dtype=torch.int8)


def _group_norm_float_cuda(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return triton_norm.group_norm_float(x, weight, bias, groups, eps, silu)


def _group_norm_float_plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """The norm of ``x [B, C, H, W]`` in its dtype, channels last."""
    normed = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    normed = F.silu(normed.float()).to(x.dtype) if silu else normed
    return normed.contiguous(memory_format=torch.channels_last)


def _group_norm_float_shape(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


# ---- GEGLU -----------------------------------------------------------------------------------------------------------
def _geglu_cuda(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return triton_norm.geglu(rows, (inverse, zero_point, times, factor), top, tuple(counts), places)


def _geglu_plain(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    """int8 ``[R, padded(C)]`` of ``x [.., 2 C]``: hidden and gate, C channels each."""
    hidden, gate = x.chunk(2, -1)
    gated = F.gelu(gate.float()).to(x.dtype).float()
    each_sum = list(counts) or [hidden.shape[-1]]
    return _codes((hidden.float() * gated).to(x.dtype), inverse, zero_point, times, each_sum, top, [], factor, places)


def _geglu_shape(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], _length(counts, x.shape[-1] // 2)), dtype=torch.int8)


# ---- GELU ------------------------------------------------------------------------------------------------------------
def _gelu_cuda(
    x: Tensor, tanh: bool, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return triton_norm.gelu(rows, tanh, (inverse, zero_point, times, factor), top, tuple(counts), places)


def _gelu_plain(
    x: Tensor, tanh: bool, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    """int8 ``[R, padded(C)]`` of ``gelu(x)``, ``x [.., C]``. tanh: its approximation by tanh."""
    made = F.gelu(x.float(), approximate="tanh" if tanh else "none").to(x.dtype)
    return _codes(made, inverse, zero_point, times, list(counts) or [x.shape[-1]], top, [], factor, places)


def _gelu_shape(
    x: Tensor, tanh: bool, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None,
    counts: Sequence[int] = (), places: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], _length(counts, x.shape[-1])), dtype=torch.int8)


for _name, _cuda, _plain, _shape in (
    ("layer_norm_encode", _layer_norm_cuda, _layer_norm_plain, _layer_norm_shape),
    ("group_norm_encode", _group_norm_cuda, _group_norm_plain, _group_norm_shape),
    ("group_norm", _group_norm_float_cuda, _group_norm_float_plain, _group_norm_float_shape),
    ("geglu_encode", _geglu_cuda, _geglu_plain, _geglu_shape),
    ("gelu_encode", _gelu_cuda, _gelu_plain, _gelu_shape),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _plain, "CPU")
    torch.library.register_fake(f"bitbrush::{_name}", _shape, lib=_LIBRARY)
    direct.register(_name, _cuda)
