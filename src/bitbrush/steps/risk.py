"""Which sampling step the next rounds of a search learn from: structural risk (ADP-DM, Wang et al. 2024).

    score_i = U_i - lambda n_i        U_i: how undecided the search is at step i; n_i: rounds that were given to it
    choice  = the cleanest of the steps with the largest score

High uncertainty stands for what is left to learn there (the empirical risk); the count spreads the choices over all
steps (the distance between the chosen steps and those of deployment). In the released code lambda = 2, which its sums
of entropies over layers seldom differ by, so that it visits one step after another. Here lambda is a share of the
spread of U over the steps at that moment, unless a number is given; with no spread at all, it visits one after another,
too. Every group of a round's batch is of the chosen step.

``random`` draws the step of each round as PTQ4DM draws calibration times: normal, mean and deviation 0.4 of the number
of steps counted from the cleanest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHARE = 0.5
"""lambda over the standard deviation of U."""
LEAST = 1e-3
"""Smallest lambda."""
NORMAL = 0.4
"""Mean and deviation of ``random``, over the number of steps."""


def choose(uncertainty: Tensor, counts: Tensor, penalty: float | None = None) -> int:
    """The step to learn from.

    Args:
        uncertainty: U of each step, ``[T]``, noisiest first.
        counts: Rounds that each step had, ``[T]``.
        penalty: lambda; None: `SHARE` of the standard deviation of U, at least `LEAST`.
    """
    values = uncertainty.double().cpu()
    weight = max(SHARE * float(values.std(correction=0)), LEAST) if penalty is None else penalty
    score = values - weight * counts.double().cpu()
    return int((score == score.max()).nonzero().max())


class Rounds:
    """Writes the groups of the next round into the schedule of a search, in place.

    Args:
        index: Groups of every iteration, int64 ``[iterations, count]``, on the device.
        moments: Sampling step of each group (0 = noisiest; -1: never chosen), int64 ``[G]`` on the CPU.
        length: Iterations of a round.
        uncertainty: U of each step as the search stands, ``[T]``; None: steps are drawn (``random``).
        generator: For the draws.
        penalty: lambda, see `choose`.
    """

    def __init__(
        self, index: Tensor, moments: Tensor, length: int, uncertainty: Callable[[], Tensor] | None,
        generator: torch.Generator, penalty: float | None = None,
    ) -> None:
        self.index, self.moments, self.length = index, moments, length
        self.uncertainty, self.penalty = uncertainty, penalty
        self.steps = int(moments.max()) + 1
        rounds = -(-len(index) // length)
        self.members = [(moments == step).nonzero()[:, 0] for step in range(self.steps)]
        # drawn beforehand, so that a resumed search finds the same
        self.drawn = torch.rand(index.shape, generator=generator)
        normal = torch.randn(rounds, generator=generator) * NORMAL + NORMAL
        self.times = self.steps - 1 - (normal * self.steps).floor().clamp(0, self.steps - 1).long()

    def begin(self, iteration: int) -> None:
        """Choose the step of the round that begins, and its groups."""
        if self.uncertainty is None:
            step = int(self.times[iteration // self.length])
        else:
            step = choose(self.uncertainty(), self.counts(iteration), self.penalty)
        members, rows = self.members[step], self.drawn[iteration : iteration + self.length]
        chosen = members[(rows * len(members)).long()]
        self.index[iteration : iteration + self.length] = chosen.to(self.index.device)

    def counts(self, iteration: int) -> Tensor:
        """Rounds that each step had before an iteration, ``[T]``."""
        starts = self.index[: iteration : self.length, 0].cpu()
        return torch.bincount(self.moments[starts], minlength=self.steps)
