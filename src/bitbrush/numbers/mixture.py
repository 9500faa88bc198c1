"""A mixture of quantized tensors with gradients: what a search over K quantizers trains (ADP-DM, Wang et al. 2024).

    out = sum_k share_k Q(x; scale_k, zero_k)

Each ``Q`` is exactly ``decode(encode(x))`` of `bitbrush.numbers.codec`. Backward takes rounding as the identity, as
`bitbrush.numbers.straight_through` does:

    to x            sum of share_k over the quantizers in whose range x lies (none without ``straight_through``)
    to share_k      <grad, Q_k(x)>
    to scale_k, zero-point k    those of `fake_quantize`, times share_k

A mixture of K b-bit tensors is itself no b-bit tensor: it is for training only. Kept for backward are ``x`` and the
small tables; the quantized tensors are computed again, one after another, so memory does not grow with K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitbrush.numbers.codec import clamp, decode, encode, reciprocal
from bitbrush.numbers.straight_through import Fused


def mixture(
    x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int, fused: Fused | None = None, *,
    straight_through: bool = True,
) -> Tensor:
    """``sum_k share_k decode(encode(x))`` on K grids, summed in float32, in the dtype of ``x``.

    Args:
        x: Values, any floating dtype and shape.
        share: Float32 ``[K, ..]``; each entry broadcastable to ``x``: one a sample ``[K, B, 1, ..]``, one a channel
            ``[K, 1, C, ..]``, both, or one for all.
        scale: Float32, positive, ``[K, ..]``; each entry broadcastable to ``x``.
        zero_point: Integer-valued float32, in the shape of ``scale``.
        top: Largest code of all K grids.
        fused: Kernels to use where they fit.
        straight_through: Whether gradients reach ``x``. False: they are exactly 0, the derivative of rounding (what the
            released code of ADP-DM trains with); those of shares and tables stay.
    """
    usable = fused if fused is not None and fused.fits(x, scale[0], zero_point[0]) else None
    out: Tensor = _Mixture.apply(x, share, scale, zero_point, top, usable, straight_through)
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int, fused: Fused | None,
        straight_through: bool,
    ) -> Tensor:
        inverse = reciprocal(scale)
        ctx.save_for_backward(x, share, scale, inverse, zero_point)
        ctx.top, ctx.fused, ctx.straight_through = top, fused, straight_through
        total = None
        for k, part in enumerate(share):
            one = part * _quantized(x, scale[k], inverse[k], zero_point[k], top, fused)
            total = one if total is None else total.add_(one)
        return torch.zeros_like(x) if total is None else total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, share, scale, inverse, zero_point = ctx.saved_tensors
        want_x, want_share, want_scale, want_zero = ctx.needs_input_grad[:4]
        each = _fused_gradients if ctx.fused is not None else _gradients
        dx: Tensor | None = None
        tables: list[list[Tensor]] = [[], [], []]
        for k in range(len(share)):
            found = each(grad, x, share[k], scale[k], inverse[k], zero_point[k], ctx)
            if want_x and ctx.straight_through:
                dx = found[0] if dx is None else dx.add_(found[0])
            for kept, part in zip(tables, found[1:], strict=True):
                kept.append(part)
        wanted = (want_share, want_scale, want_zero)
        stacked = (torch.stack(kept) if want else None for kept, want in zip(tables, wanted, strict=True))
        if want_x and dx is None:  # zeros, not None: whatever is trained before has a gradient for the optimiser
            dx = torch.zeros_like(x)
        return (dx.to(x.dtype) if dx is not None else None, *stacked, None, None, None)


def _quantized(x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: int, fused: Fused | None) -> Tensor:
    if fused is not None:
        return fused.forward(x, scale, inverse, zero, top)
    return decode(encode(x, inverse, zero, top), scale, zero)


def _gradients(
    grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one member: to x (float32), to its share, scale and zero-point."""
    scaled = x.float() * inverse
    rounded = torch.round(scaled)
    code = rounded + zero
    clamped = clamp(code, ctx.top)
    inside = code == clamped
    whole = grad.float()
    weighed = share * whole
    nothing = torch.zeros_like(weighed)
    ds, dz = torch.zeros_like(scale), torch.zeros_like(zero)
    if ctx.needs_input_grad[2]:
        ds = (weighed * torch.where(inside, rounded - scaled, clamped - zero)).sum_to_size(scale.shape)
    if ctx.needs_input_grad[3]:
        dz = torch.where(inside, nothing, weighed * -scale).sum_to_size(zero.shape)
    dshare = (whole * decode(clamped, scale, zero)).sum_to_size(share.shape)
    return torch.where(inside, weighed, nothing), dshare, ds, dz


def _fused_gradients(
    grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_gradients` in one kernel for x and the tables, and one for the quantized tensor."""
    whole = grad.float()
    found = ctx.fused.forward(x, scale, inverse, zero, ctx.top)
    ds_wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dx, ds, dz = ctx.fused.backward((share * whole).to(x.dtype), x, scale, inverse, zero, ctx.top, ds_wanted)
    blank = torch.zeros_like(scale)
    return (
        dx.float(), (whole * found).sum_to_size(share.shape), blank if ds is None else ds.reshape(scale.shape),
        blank if dz is None else dz.reshape(zero.shape),
    )
