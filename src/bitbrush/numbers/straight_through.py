"""Encode and decode with gradients: the form in which scales, zero-points and weights are trained.

Forward is exactly ``decode(encode(x))`` of `bitbrush.numbers.codec`, so what is trained is what is packed. Backward
takes rounding as the identity (the straight-through estimator). With ``v = x / s``, ``q = round(v) + z`` and
``code = clamp(q, 0, top)``:

    to x            1 where 0 <= q <= top, else 0
    to the scale    round(v) - v inside; code - z at the clamped ends           (Esser et al. 2020, LSQ eq. 3)
    to zero-point   0 inside; -s at the clamped ends                            (Bhalgat et al. 2020, LSQ+ eq. 4-5)

Rows of symmetric 1-bit weights are ``sign(w) s`` with ``sign(0) = 1``: to w 1 where ``|w| <= s``, to s ``sign(w)``.

On a ``log2`` grid: to x 1 where ``round(-log2(x / delta))`` is a code, else 0 (zeros too); delta gets none. Inside
the range it would get none anyway: ``delta * 2**log2(x / delta)`` is x, whatever delta is.

Little is kept for backward: the tensor as it came and its tables; everything else is computed again. On CUDA fused
forms (`Fused`, `FusedWeight`) do forward and backward in one pass each; whoever calls hands them in, so that this
module knows no kernels. `fake_rows` is `fake_weight` for the weights of any number of layers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitbrush.numbers.codec import clamp, decode, encode, encode_offset, octaves, reciprocal, round_trip_log2

BINARY_TOP = 2
"""Largest code of a symmetric 1-bit row: codes are 0 and 2 around the zero-point 1."""


@dataclass(frozen=True)
class Fused:
    """One-pass kernels for tensors with one scale, or one a sample.

    Args:
        fits: ``(x, scale, zero_point) -> bool``: whether the kernels take these shapes, dtypes and devices.
        forward: ``(x, scale, inverse_scale, zero_point, top) -> decode(encode(x))`` in the dtype of ``x``.
        backward: ``(grad, x, scale, inverse_scale, zero_point, top, tables) -> (dx, dscale, dzero)``; the last two in
            the shape of ``scale``, or None unless ``tables``.
    """

    fits: Callable[[Tensor, Tensor, Tensor], bool]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None, Tensor | None]
    ]


@dataclass(frozen=True)
class Rows:
    """Stretches of a flat tensor, one after another, each with a scale of its own: rows of weights, or their segments.

    A weight ``[N, C, kh, kw]`` with S segments of its channels, laid out flat, is N * S stretches in the order of its
    table ``[N, S]``; the weights of several layers follow each other.

    Args:
        start: First element of each, int64 ``[R]``.
        length: Elements of each, int32 ``[R]``.
        longest: The largest ``length``.
        zero_point: Integer-valued float32 ``[R]``; 1 in symmetric 1-bit rows.
        top: Largest code, float32 ``[R]``.
        binary: Bool ``[R]``, True in symmetric 1-bit rows; None where there are none.
    """

    start: Tensor
    length: Tensor
    longest: int
    zero_point: Tensor
    top: Tensor
    binary: Tensor | None = None


@dataclass(frozen=True)
class FusedWeight:
    """One-pass kernels for weights in flat form, float32.

    Args:
        forward: ``(weight [M], scale [R], inverse_scale [R], rows, offset) -> decode(encode_weight(weight))``.
        backward: ``(grad [M], weight, scale, inverse_scale, rows, offset, tables) -> (dweight [M], dscale [R])``; the
            latter is None unless ``tables``.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Rows, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Rows, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, fused: Fused | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """``decode(encode(x))`` in the dtype of ``x``, with straight-through gradients.

    Args:
        x: Values, any floating dtype and shape.
        scale: Float32, positive, broadcastable to ``x``: one entry, one a sample ``[B, 1, ..]``, one a channel
            ``[1, C, ..]`` or both. Gradients come back in its shape.
        zero_point: Integer-valued float32, broadcastable to ``x``; gradients come back in its shape.
        top: Largest code; a tensor where rows differ in bits.
        fused: Kernels to use where they fit.
        inverse: `reciprocal` of the scale, where it is known already.
    """
    usable = fused if fused is not None and isinstance(top, int) and fused.fits(x, scale, zero_point) else None
    out: Tensor = _FakeActivation.apply(x, scale, zero_point, top, usable, inverse)
    return out


def fake_log2(x: Tensor, delta: Tensor, top: int) -> Tensor:
    """``decode_log2(encode_log2(x))`` in the dtype of ``x``, with a straight-through gradient to ``x`` alone.

    Arguments are those of `encode_log2`.
    """
    out: Tensor = _FakeLog2.apply(x, delta, top)
    return out


def encode_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, offset: Tensor | None = None,
    binary: Tensor | None = None,
) -> Tensor:
    """Codes of a weight, float32 integers.

    Args:
        weight: ``[N, C]`` or ``[N, C, kh, kw]``, any floating dtype.
        scale: Float32, broadcastable to the weight.
        zero_point: Integer-valued float32, broadcastable to the weight; 1 in symmetric 1-bit rows.
        top: Largest code, `QuantLayer.top`.
        offset: Rounding decisions in {0, 1}, weight's shape: ``floor(w / s) + offset``. None rounds to nearest.
        binary: Bool ``[N, 1, ..]``, True in symmetric 1-bit rows, whose codes are 2 where ``w >= 0``, else 0.
    """
    inverse = reciprocal(scale)
    if offset is None:
        code = encode(weight, inverse, zero_point, top)
    else:
        code = encode_offset(weight, inverse, zero_point, top, offset)
    return code if binary is None else torch.where(binary, (weight >= 0).float() * BINARY_TOP, code)


def fake_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, offset: Tensor | None = None,
    binary: Tensor | None = None,
) -> Tensor:
    """``decode(encode_weight(...))`` in float32, with straight-through gradients to the weight and the scale.

    Arguments are those of `encode_weight`. ``floor`` passes gradients like rounding does; ``offset`` gets none.
    """
    out: Tensor = _FakeWeight.apply(weight, scale, zero_point, top, offset, binary)
    return out


def fake_rows(weight: Tensor, scale: Tensor, rows: Rows, offset: Tensor | None, fused: FusedWeight) -> Tensor:
    """`fake_weight` of weights in flat form: the same values bit for bit, the same gradients.

    Args:
        weight: Float32 ``[M]``, what ``rows`` describes.
        scale: Float32, positive, ``[R]``; gradients to it are sums over each row, and do not depend on chance.
        rows: Where each scale is in force.
        offset: Rounding decisions in {0, 1}, any dtype ``[M]``, or None; as in `encode_weight`.
        fused: The kernels.
    """
    out: Tensor = _FakeRows.apply(weight, scale, rows, offset, fused)
    return out


class _FakeActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, fused: Fused | None,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, known)
        ctx.top, ctx.fused = top, fused
        inverse = reciprocal(scale) if known is None else known
        if fused is not None and isinstance(top, int):
            return fused.forward(x, scale, inverse, zero_point, top)
        return decode(encode(x, inverse, zero_point, top), scale, zero_point).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, known = ctx.saved_tensors
        want_x, want_scale, want_zero = ctx.needs_input_grad[:3]
        inverse = reciprocal(scale) if known is None else known
        if ctx.fused is not None:
            tables = want_scale or want_zero
            dx, ds, dz = ctx.fused.backward(grad, x, scale, inverse, zero_point, ctx.top, tables)
            dz = None if dz is None else dz.reshape(zero_point.shape)
            return dx if want_x else None, ds if want_scale else None, dz if want_zero else None, None, None, None
        scaled = x.float() * inverse
        parts = _gradients(grad, scaled, torch.round(scaled), scale, zero_point, ctx.top, ctx.needs_input_grad[:3])
        return parts[0], parts[1], parts[2], None, None, None


class _FakeLog2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x, delta)
        ctx.top = top
        return round_trip_log2(x, delta, top).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, delta = ctx.saved_tensors
        code = octaves(x, delta)
        return torch.where((code >= 0) & (code <= ctx.top), grad, torch.zeros_like(grad)), None, None


class _FakeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, offset: Tensor | None,
        binary: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point, offset, binary)
        ctx.top = top
        return decode(encode_weight(weight, scale, zero_point, top, offset, binary), scale, zero_point)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point, offset, binary = ctx.saved_tensors
        scaled = weight.float() * reciprocal(scale)
        rounded = torch.round(scaled) if offset is None else torch.floor(scaled) + offset
        sign = None
        if binary is not None:
            sign = torch.where(binary, torch.where(weight >= 0, 1.0, -1.0), torch.zeros_like(scaled))
        parts = _gradients(
            grad, scaled, rounded, scale, zero_point, ctx.top, ctx.needs_input_grad[:3], weight.dtype, sign
        )
        return parts[0], parts[1], parts[2], None, None, None


class _FakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, rows: Rows, offset: Tensor | None, fused: FusedWeight
    ) -> Tensor:
        inverse = reciprocal(scale)
        ctx.save_for_backward(weight, scale, inverse, offset)
        ctx.rows, ctx.fused = rows, fused
        return fused.forward(weight, scale, inverse, rows, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, inverse, offset = ctx.saved_tensors
        want_weight, want_scale = ctx.needs_input_grad[:2]
        dw, ds = ctx.fused.backward(grad, weight, scale, inverse, ctx.rows, offset, want_scale)
        return dw if want_weight else None, ds, None, None, None


def _gradients(
    grad: Tensor, scaled: Tensor, rounded: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor,
    wanted: tuple[bool, bool, bool], dtype: torch.dtype | None = None, sign: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, scale and zero-point; ``sign`` is +-1 in symmetric 1-bit rows and 0 in the others."""
    code = rounded + zero_point
    clamped = clamp(code, top)
    inside = code == clamped
    dx = ds = dz = None
    if sign is not None:
        binary = sign != 0
        inside = torch.where(binary, scaled.abs() <= 1, inside)
    if wanted[0]:
        dx = torch.where(inside, grad, torch.zeros_like(grad)).to(dtype or grad.dtype)
    if wanted[1]:
        slope = torch.where(inside, rounded - scaled, clamped - zero_point)
        if sign is not None:
            slope = torch.where(binary, sign, slope)
        ds = (grad.float() * slope).sum_to_size(scale.shape).to(scale.dtype)
    if wanted[2]:
        outside = ~inside if sign is None else ~(inside | binary)
        slope = torch.where(outside, grad.float() * -scale, torch.zeros_like(scaled))
        dz = slope.sum_to_size(zero_point.shape).to(zero_point.dtype)
    return dx, ds, dz
