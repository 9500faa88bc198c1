"""The fused weight form made of torch's operations: what the kernels must equal, and what stands in for them here."""

from __future__ import annotations

import torch
from torch import Tensor

from bitbrush.numbers.straight_through import FusedWeight, Rows, fake_weight


def _apply(weight: Tensor, scale: Tensor, rows: Rows, offset: Tensor | None) -> Tensor:
    """Every row by itself."""
    parts = []
    for i, (start, length) in enumerate(zip(rows.start.tolist(), rows.length.tolist(), strict=True)):
        where, one = slice(start, start + length), slice(i, i + 1)
        parts.append(fake_weight(
            weight[where], scale[one], rows.zero_point[one], rows.top[one],
            None if offset is None else offset[where], None if rows.binary is None else rows.binary[one],
        ))
    return torch.cat(parts)


def forward(weight: Tensor, scale: Tensor, inverse: Tensor, rows: Rows, offset: Tensor | None) -> Tensor:
    """Decoded weights."""
    assert torch.equal(inverse, 1 / scale) and scale.shape == rows.start.shape == rows.top.shape
    with torch.no_grad():
        return _apply(weight, scale, rows, offset)


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, inverse: Tensor, rows: Rows, offset: Tensor | None, tables: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dscale)."""
    leaves = [t.detach().requires_grad_() for t in (weight, scale)]
    with torch.enable_grad():
        dw, ds = torch.autograd.grad(_apply(leaves[0], leaves[1], rows, offset), leaves, grad)
    return dw, ds if tables else None


FUSED = FusedWeight(forward, backward)
