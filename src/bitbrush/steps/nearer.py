"""Which of two ways brings sampled trajectories nearer to the float network's: errors in decibels, one a trajectory.

The errors of trajectories differ by factors of a hundred: where rounding has changed what a picture shows, nothing is
left of the float one. A mean of squares speaks for these few alone. Decibels weigh every trajectory's factor alike, as
the PSNR of pictures does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR_DB = -100.0
"""Below this an error is none, as PSNR ends at 100 dB."""


class Gain(NamedTuple):
    """How many decibels one way is nearer than the other, in mean over the trajectories, and the standard error of
    that (infinite for a single trajectory)."""

    value: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether it is more than two standard errors above 0."""
        return self.value > 2 * self.error

    def __str__(self) -> str:
        return f"{self.value:+.2f} dB" + (f" +- {self.error:.2f}" if math.isfinite(self.error) else "")

    def note(self) -> dict[str, float | None]:
        """For a run's notes."""
        error = round(self.error, 4) if math.isfinite(self.error) else None
        return {"gain_db": round(self.value, 4), "error_db": error}


def decibels(error: Tensor, power: Tensor | float = 1.0) -> Tensor:
    """10 log10(error / power) of mean squares ``[n]``, float64, at least `FLOOR_DB`."""
    share = error.double() / power
    return 10 * torch.log10(share.clamp_min(10 ** (FLOOR_DB / 10)))


def gain(before: Tensor, after: Tensor) -> Gain:
    """Of ``after`` over ``before``, both `decibels` of the same trajectories ``[n]``."""
    less = before - after
    error = float(less.std() / len(less) ** 0.5) if len(less) > 1 else math.inf
    return Gain(float(less.mean()), error)
