"""A mixture of quantized tensors with gradients: what a search over K quantizers trains (ADP-DM, Wang et al. 2024).

    out = sum_k share_k Q(x; scale_k, zero_k)

Each ``Q`` is exactly ``decode(encode(x))`` of `bitbrush.numbers.codec`. Backward takes rounding as the identity, as
`bitbrush.numbers.straight_through` does:

    to x            sum of share_k over the quantizers in whose range x lies (none without ``straight_through``)
    to share_k      <grad, Q_k(x)>
    to scale_k, zero-point k    those of `fake_quantize`, times share_k

A mixture of K b-bit tensors is itself no b-bit tensor: it is for training only. Kept for backward are ``x`` and the
small tables; the quantized tensors are computed again, one after another, so memory does not grow with K. On CUDA fused
forms (`FusedMixture`) do all K in one pass; whoever calls hands them in, so that this module knows no kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitbrush.numbers.codec import clamp, decode, encode, reciprocal

Wanted = tuple[bool, bool, bool, bool]
"""Whether gradients are wanted to x, share, scale and zero-point."""


@dataclass(frozen=True)
class FusedMixture:
    """One-pass kernels for all members of a mixture.

    Args:
        fits: ``(x, share, scale, zero_point) -> bool``: whether the kernels take these shapes, dtypes and devices.
        forward: ``(x, share, scale, zero_point, top) -> mixture`` in the dtype of ``x``.
        backward: ``(grad, x, share, scale, zero_point, top, wanted) -> (dx, dshare, dscale, dzero)``: dx in the dtype
            of ``x``, the others float32 in the shapes of their tables; None where not wanted.
    """

    fits: Callable[[Tensor, Tensor, Tensor, Tensor], bool]
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Wanted], tuple[Tensor | None, ...]]


def mixture(
    x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int, fused: FusedMixture | None = None, *,
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
    usable = fused if fused is not None and fused.fits(x, share, scale, zero_point) else None
    out: Tensor = _Mixture.apply(x, share, scale, zero_point, top, usable, straight_through)
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int, fused: FusedMixture | None,
        straight_through: bool,
    ) -> Tensor:
        ctx.top, ctx.fused, ctx.straight_through = top, fused, straight_through
        if fused is not None:
            ctx.save_for_backward(x, share, scale, zero_point)
            return fused.forward(x, share, scale, zero_point, top)
        inverse = reciprocal(scale)
        ctx.save_for_backward(x, share, scale, zero_point, inverse)
        total = None
        for k, part in enumerate(share):
            one = part * decode(encode(x, inverse[k], zero_point[k], top), scale[k], zero_point[k])
            total = one if total is None else total.add_(one)
        return torch.zeros_like(x) if total is None else total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        want_x, *tables = ctx.needs_input_grad[:4]
        wanted = (want_x and ctx.straight_through, *tables)
        each: Callable[..., tuple[Tensor | None, ...]] = _each_by_itself if ctx.fused is None else ctx.fused.backward
        dx, *found = each(grad, *ctx.saved_tensors, ctx.top, wanted)
        if want_x and dx is None:  # zeros, not None: whatever is trained before has a gradient for the optimiser
            dx = torch.zeros_like(ctx.saved_tensors[0])
        return (dx, *found, None, None, None)


def _each_by_itself(
    grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, zero: Tensor, inverse: Tensor, top: int, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """As `FusedMixture.backward`, one member after another."""
    dx: Tensor | None = None
    tables: list[list[Tensor]] = [[], [], []]
    for k, part in enumerate(share):
        found = _gradients(grad, x, part, scale[k], zero[k], inverse[k], top, wanted)
        if wanted[0]:
            dx = found[0] if dx is None else dx.add_(found[0])
        for kept, one in zip(tables, found[1:], strict=True):
            kept.append(one)
    stacked = (torch.stack(kept) if want else None for kept, want in zip(tables, wanted[1:], strict=True))
    return (dx.to(x.dtype) if dx is not None else None, *stacked)


def _gradients(
    grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, zero: Tensor, inverse: Tensor, top: int, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one member: to x (float32), to its share, scale and zero-point."""
    scaled = x.float() * inverse
    rounded = torch.round(scaled)
    code = rounded + zero
    clamped = clamp(code, top)
    inside = code == clamped
    whole = grad.float()
    weighed = share * whole
    nothing = torch.zeros_like(weighed)
    ds, dz = torch.zeros_like(scale), torch.zeros_like(zero)
    if wanted[2]:
        ds = (weighed * torch.where(inside, rounded - scaled, clamped - zero)).sum_to_size(scale.shape)
    if wanted[3]:
        dz = torch.where(inside, nothing, weighed * -scale).sum_to_size(zero.shape)
    dshare = (whole * decode(clamped, scale, zero)).sum_to_size(share.shape)
    return torch.where(inside, weighed, nothing), dshare, ds, dz
