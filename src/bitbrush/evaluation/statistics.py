"""Means with intervals. All intervals are 95 % percentile bootstrap intervals over prompts, from a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitbrush.errors import InputError

Floats = NDArray[np.float64]
WORST_SHARE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean over prompts.

    Args:
        values: [prompts] or [seeds, prompts]. Several seeds of one prompt are no independent prompts: whole columns are
            resampled.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.

    Raises:
        InputError: No values, or values that are not finite.
    """
    table = _table(values)
    return _bootstrap(table.mean(axis=0), lambda columns: columns.mean(axis=-1), seed, resamples)


def bootstrap_worst(values: ArrayLike, *, share: float = WORST_SHARE, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of the lowest ``share`` of all values (at least one value). Shapes and errors as for ``bootstrap_mean``."""
    table = _table(values)
    count = max(1, round(share * table.size))

    def worst(drawn: Floats) -> Floats:
        return np.sort(drawn, axis=-1)[..., :count].mean(axis=-1)

    rng = np.random.default_rng(seed)
    value = float(worst(table.ravel()))
    drawn = [
        float(worst(table[:, rng.integers(table.shape[1], size=table.shape[1])].ravel())) for _ in range(resamples)
    ]
    return _interval(value, np.asarray(drawn))


def paired_difference(values: ArrayLike, reference: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of ``values - reference``, prompt by prompt. Shapes [prompts] or [seeds, prompts], the same for both.

    Raises:
        InputError: The shapes differ, or as for ``bootstrap_mean``.
    """
    ours, theirs = _table(values), _table(reference)
    if ours.shape != theirs.shape:
        raise InputError(
            "a paired difference needs the same pictures on both sides",
            where="bitbrush.evaluation.statistics",
            why=f"the shapes are {ours.shape} and {theirs.shape}",
            try_="compare results of the same prompts and seeds",
        )
    return bootstrap_mean(ours - theirs, seed=seed, resamples=resamples)


def bootstrap_share(hits: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Share of true values, for R@1. Shapes and errors as for ``bootstrap_mean``."""
    return bootstrap_mean(np.asarray(hits, dtype=np.float64), seed=seed, resamples=resamples)


def _table(values: ArrayLike) -> Floats:
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise InputError(
            "there is no mean of these values",
            where="bitbrush.evaluation.statistics",
            why=f"shape {table.shape}, {int((~np.isfinite(table)).sum())} values not finite",
            try_="pass finite values of shape [prompts] or [seeds, prompts]",
        )
    return table


def _bootstrap(columns: Floats, statistic: Callable[[Floats], Floats], seed: int, resamples: int) -> Estimate:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(columns), size=(resamples, len(columns)))
    return _interval(float(statistic(columns)), statistic(columns[chosen]))


def _interval(value: float, drawn: Floats) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
