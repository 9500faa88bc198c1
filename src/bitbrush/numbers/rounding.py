"""Learned rounding: AdaRound (Nagel et al. 2020) as Q-Diffusion uses it.

The offset of a weight above its floor is ``h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)`` (eq. 23); a regulariser
pushes it to 0 or 1 with an annealed exponent (eq. 24); `harden` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """``h(alpha)`` in [0, 1]."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_alpha(weight: Tensor, inverse_scale: Tensor) -> Tensor:
    """``alpha`` with ``h(alpha) = frac(w / scale)``: training starts from the unrounded weight."""
    scaled = weight.float() * inverse_scale
    fraction = scaled - torch.floor(scaled)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def harden(alpha: Tensor) -> Tensor:
    """The rounding decision, 1 where ``h(alpha) >= 1/2``, as float."""
    return (alpha >= 0).float()


def regulariser(offset: Tensor, beta: Tensor | float) -> Tensor:
    """``sum(1 - |2 h - 1| ** beta)`` of offsets ``h``, zero exactly when every ``h`` is 0 or 1."""
    return (1 - (2 * offset - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, iterations: int, *, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """Exponent of the regulariser: ``start`` during the warm-up share, then linear to ``end``."""
    begin = warmup * iterations
    if iteration < begin:
        return start
    done = (iteration - begin) / max(iterations - begin, 1e-9)
    return end + (start - end) * max(0.0, 1.0 - done)
