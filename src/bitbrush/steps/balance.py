"""Constants of a channel that leave an error balanced against an instrument, found through whatever makes the error.

Least squares makes an error uncorrelated with what the factor multiplies, the quantized estimate. That estimate holds
noise of its own, so the factor is drawn towards 0 (Frisch, 1934: regression dilution). An instrument z that the noise
does not know (Reiersol, 1945) has no such pull. The constant v of a channel solves

    g(v) = mean over trajectories and pixels of z error(v) = 0

by Newton's method with slopes from differences, as a clipping scheduler is not linear in v; a step that does not bring
g nearer to 0 is halved. Its standard error is that of the mean of z error(v) over trajectories, divided by the slope.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS, APART, CLOSE = 12, 0.01, 1e-6
IDLE = 1e-4
"""Slopes below this share of rms(z) times the rms of what v moves say that v does nothing here (DDIM's last step)."""

Error = Callable[[Tensor], Tensor]
"""A constant a channel ``[C]`` to the error ``[n, C, H, W]`` that it leaves."""


def balanced(error: Error, instrument: Tensor, start: Tensor, size: Tensor, *, scalar: bool) -> tuple[Tensor, Tensor]:
    """(v, its standard error), both float64 ``[C]``.

    Args:
        error: What v leaves.
        instrument: z, ``[n, C, H, W]``.
        start: ``[C]``; v stays there, with an infinite error, where the error does not move with it.
        size: ``[n, C, H, W]``: what is moved, to know how small a slope is.
        scalar: One v for all channels.
    """
    idle = IDLE * instrument.double().square().mean().sqrt() * size.double().square().mean().sqrt()

    def by_trajectory(v: Tensor) -> Tensor:
        means = (error(v.to(instrument.dtype)) * instrument).double().mean((2, 3))
        return means.mean(1, keepdim=True).expand_as(means) if scalar else means

    v, part = start.double(), torch.ones_like(start, dtype=torch.float64)
    here, slope = by_trajectory(v), (by_trajectory(v + APART) - by_trajectory(v)).mean(0) / APART
    for _ in range(ROUNDS):
        step = torch.where(slope.abs() > idle, here.mean(0) / torch.where(slope.abs() > idle, slope, 1.0), 0.0)
        if bool((step.abs() < CLOSE).all()):
            break
        there = by_trajectory(v - part * step)
        nearer = there.mean(0).abs() < here.mean(0).abs()
        v, part = torch.where(nearer, v - part * step, v), torch.where(nearer, 1.0, part / 2)
        here = torch.where(nearer, there, here)
        slope = (by_trajectory(v + APART) - here).mean(0) / APART
    moves = (slope.abs() > idle) & (len(here) > 1)
    spread = here.std(0, correction=min(1, len(here) - 1)) / len(here) ** 0.5
    return v, torch.where(moves, spread / torch.where(moves, slope.abs(), 1.0), torch.inf)
