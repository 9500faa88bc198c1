"""A fixed orthogonal rotation of input channels: random signs, then a Hadamard transform (ViDiT-Q, QuaRot).

With Q orthogonal, ``x W^T = (x Q) (W Q)^T``: the product is the same, and what stood out in one channel is spread over
all of its block. Here ``Q = diag(signs) H``, H block-diagonal with blocks of n, the largest power of two that divides
the number of channels, each ``1 / sqrt(n)`` times the Hadamard matrix of Sylvester's construction (symmetric, so it is
its own inverse). The transform takes log2(n) passes of sums and differences, the same ones in the same order on every
device.

Nothing is stored: the signs are those of an integer hash of the channel's number, so that any reader finds the same
ones whatever its random numbers are. Channels of an odd number are not mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIX = 0x45D9F3B
"""Multiplier of the hash (below 2**31, so that int64 products do not overflow)."""


def block_size(channels: int) -> int:
    """The largest power of two that divides ``channels``."""
    return channels & -channels


def signs(channels: int, device: torch.device | str | None = None) -> Tensor:
    """+1 or -1 for each channel, float32 ``[C]``: the lowest bit of a hash of its number."""
    hashed = torch.arange(1, channels + 1, device=device, dtype=torch.int64)
    for _ in range(2):
        hashed = (((hashed >> 16) ^ hashed) * _MIX) & 0xFFFFFFFF
    return 1.0 - 2.0 * (((hashed >> 16) ^ hashed) & 1).float()


def rotate(x: Tensor) -> Tensor:
    """``x Q`` in float32; channels last, ``[..., C]``."""
    return _hadamard(x.float() * signs(x.shape[-1], x.device))


def unrotate(x: Tensor) -> Tensor:
    """``x Q^T``, the inverse of `rotate`."""
    return _hadamard(x.float()) * signs(x.shape[-1], x.device)


def _hadamard(x: Tensor) -> Tensor:
    """Blocks of the last dimension times the normalised Hadamard matrix."""
    n, shape, half = block_size(x.shape[-1]), x.shape, 1
    while half < n:
        a, b = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).reshape(shape)
        half *= 2
    return x * n**-0.5
