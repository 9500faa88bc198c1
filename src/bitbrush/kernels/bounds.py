"""Bounds on rounding that the proof computes: half an ulp, and those of a low-rank branch.

The branch is ``z = x L2^T`` and ``y = z L1^T``, each rounded to the dtype of x. With n terms in a sum of z and r in one
of y, and u the unit roundoff of the sums,

    |z - z64| <= e      e = (n + 2) u |x| |L2|^T + half ulp(z)
    |y - y64| <= e |L1|^T + (r + 2) u (|z64| + e) |L1|^T + half ulp(y)

where the half ulps count only below float32, whose rounding is in the sums already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer


def half_ulp(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` at each ``|y|`` (float64)."""
    info = torch.finfo(dtype)
    size = y.double().abs().clamp_min(info.tiny)
    return torch.exp2(torch.frexp(size).exponent.double() - 1) * info.eps / 2


def branch(layer: QuantLayer, x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """(y64, bound) of a layer's low-rank branch for an input as the branch gets it, on the CPU; 0 without a branch.

    Args:
        layer: Its factors are taken in the dtype of ``x``, as the layer takes them.
        x: Scaled and not rounded.
        unit: Roundoff of the sums.
    """
    if layer.low_rank is None:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    up, down = (table.cpu().to(x.dtype).double() for table in layer.low_rank())
    narrow = x.dtype != torch.float32

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return layer._conv_forward(a, b, None) if isinstance(layer, nn.Conv2d) else F.linear(a, b)

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(a, b[:, :, None, None]) if isinstance(layer, nn.Conv2d) else F.linear(a, b)

    wide = x.double()
    z = inner(wide, down)
    error = (down[0].numel() + 2) * unit * inner(wide.abs(), down.abs())
    if narrow:
        error = error + half_ulp(z.abs() + error, x.dtype)
    y = outer(z, up)
    bound = outer(error, up.abs()) + (up.shape[1] + 2) * unit * outer(z.abs() + error, up.abs())
    return y, bound + half_ulp(y.abs() + bound, x.dtype) if narrow else bound


def factors_hold(layer: QuantLayer, expected: tuple[Tensor, Tensor] | None) -> tuple[bool, int]:
    """(whether a branch's factors are float16, finite, and those expected; their entries); (True, 0) without one."""
    if layer.low_rank is None:
        return True, 0
    found = layer.low_rank()
    good = all(table.dtype == torch.float16 and bool(torch.isfinite(table).all()) for table in found)
    if expected is not None:
        good = good and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, found, strict=True))
    return good, sum(table.numel() for table in found)
