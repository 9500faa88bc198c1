"""Pictures as files hold them: 256 levels a colour."""

from __future__ import annotations

import torch
from torch import Tensor


def to_levels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] (what lies outside is clamped) as levels 0 to 255, uint8, in the same shape."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_levels(levels: Tensor) -> Tensor:
    """Levels 0 to 255 as pictures in [-1, 1], float32."""
    return levels.float() / 127.5 - 1


def round_to_8_bits(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as a file with 256 levels a colour would hold them; float32."""
    return from_levels(to_levels(pictures))
