"""Do two arms differ? Tests that flip or swap whole prompts, and Holm's correction for many of them.

Sign flips: under the null hypothesis the sign of each prompt's difference is a coin toss. Swaps: under the null
hypothesis the pictures of a prompt could as well have come from the other arm; the statistic is the energy distance
(Szekely and Rizzo 2013) of the features, in which any difference of two distributions shows. With the sign e_i = -1
where prompt i is swapped it is the quadratic form

    T(e) = sum over i, j of e_i e_j h_ij,   h_ij = |a_i - b_j| + |b_i - a_j| - |a_i - a_j| - |b_i - b_j|

so thousands of swaps cost one matrix product. Both tests are exact in level for any number of prompts: all flips are
enumerated where they are few, else drawn from a seeded generator and the observed one counted among them. All seeds of
a prompt are flipped together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.evaluation.feature_sets import FeatureSet
from bitbrush.evaluation.statistics import Estimate

ENUMERATED = 14  # prompts up to which all flips are tried: 8,192, since a flip of all changes nothing
RESAMPLES = 9999  # the least p is then 0.0001
BLOCK = 2048  # pictures an arm whose distances are held at a time: 32 MiB in float64
BOOTSTRAPS = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Whether the features of two arms differ, and by how much.

    Args:
        value: Energy distance as a share of the mean distance between the arms, without bias (0 for equal
            distributions; noise may bring it below), with its 95 % bootstrap interval over prompts.
        p: Probability of such a distance, or a larger one, under swaps of the two arms prompt by prompt.
        prompts: Number of prompts.
        features: The network they are features of.
        exact: All swaps were tried.
    """

    value: Estimate
    p: float
    prompts: int
    features: str
    exact: bool


def sign_flip(differences: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p of a mean difference under random signs.

    Args:
        differences: [prompts] or [seeds, prompts]; seeds of one prompt are averaged, so they flip together.
        seed: Seed of the flips.
        resamples: Number of flips where they cannot all be tried.

    Raises:
        InputError: No differences, or some that are not finite.
    """
    table = np.atleast_2d(np.asarray(differences, np.float64))
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise InputError("a paired test needs finite differences", where="bitbrush.evaluation.paired",
                         why=f"shape {table.shape}", try_="pass [prompts] or [seeds, prompts]")
    mean = table.mean(axis=0)
    found = [np.abs(signs @ mean) for signs in _signs(len(mean), seed, resamples)]
    return _share(np.concatenate(found), abs(float(mean.sum())), len(mean))


def difference(
    first: FeatureSet | Tensor,
    second: FeatureSet | Tensor,
    *,
    seeds: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Whether two sets of pictures of the same prompts come from one distribution.

    Drawn with the same noise the test finds any systematic change, however small; drawn with other seeds it asks
    whether the change can be told from the luck of the noise with this many pictures.

    Args:
        first, second: Features [seeds * prompts, d], seed by seed, of the same prompts in the same order.
        seeds: Pictures a prompt.
        seed, resamples: As for ``sign_flip``.

    Raises:
        InputError: The sets do not belong together, or have fewer than two prompts.
    """
    ours, theirs = _features(first), _features(second)
    names = [x.extractor for x in (first, second) if isinstance(x, FeatureSet)]
    fits = ours.shape == theirs.shape and ours.ndim == 2 and len(set(names)) <= 1
    if not fits or len(ours) % seeds or len(ours) < 2 * seeds:
        raise InputError(
            "these features cannot be tested for a difference", where="bitbrush.evaluation.paired.difference",
            why=f"shapes {tuple(ours.shape)}, {tuple(theirs.shape)}, {seeds} seeds, {' and '.join(names) or 'no name'}",
            try_="give features of the same prompts, at least two, by one network",
        )  # fmt: skip
    prompts = len(ours) // seeds
    blocks, between = _blocks(ours, theirs, seeds)
    observed = sum(float(block.sum()) for _, block in blocks)
    drawn = np.concatenate([_quadratic(signs, blocks) for signs in _signs(prompts, seed, resamples)])
    p = _share(drawn, observed, prompts)
    return Difference(_distance(blocks, between, prompts, seed), p, prompts, names[0] if names else "given features",
                      prompts <= ENUMERATED)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the chance of one false finding among all tests stays below the level."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, highest = [0.0] * len(probabilities), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[i]))
        adjusted[i] = highest
    return adjusted


def _signs(prompts: int, seed: int, resamples: int) -> list[Floats]:
    """Rows of signs [r, prompts], the first row of all enumerated ones being the observed one."""
    if prompts <= ENUMERATED:  # the first sign stays: flipping all changes neither |sum| nor a quadratic form
        numbers = np.arange(2 ** max(prompts - 1, 0))
        bits = (numbers[:, None] >> np.arange(prompts)) & 1
        return [(1 - 2 * bits).astype(np.float64)]
    rng = np.random.default_rng(seed)
    sizes = [min(1000, resamples - first) for first in range(0, resamples, 1000)]
    return [(rng.integers(0, 2, size=(size, prompts)) * 2 - 1).astype(np.float64) for size in sizes]


def _share(drawn: Floats, observed: float, prompts: int) -> float:
    slack = 1e-9 * max(abs(observed), float(np.abs(drawn).max(initial=0.0)))  # equal but for rounding
    as_large = int((drawn >= observed - slack).sum())
    if prompts <= ENUMERATED:
        return as_large / len(drawn)
    return (1 + as_large) / (1 + len(drawn))


def _blocks(ours: Tensor, theirs: Tensor, seeds: int) -> tuple[list[tuple[slice, Floats]], float]:
    """h by blocks of prompts (pairs of prompts of different blocks are left out: memory is bounded, and a sum of the
    blocks' statistics is as good a statistic), and the mean distance between the arms over all pairs that are used."""
    prompts, size = len(ours) // seeds, max(BLOCK // seeds, 2)
    a, b = (x.reshape(seeds, prompts, -1) for x in (ours, theirs))
    blocks, total, pairs = [], 0.0, 0
    for start in range(0, prompts, size):
        part = slice(start, min(start + size, prompts))
        x, y = (each[:, part].flatten(0, 1).double() for each in (a, b))
        count = part.stop - part.start

        def summed(distances: Tensor, count: int = count) -> Tensor:
            return distances.reshape(seeds, count, seeds, count).sum(dim=(0, 2))

        cross = summed(torch.cdist(x, y))
        h = cross + cross.T - summed(torch.cdist(x, x)) - summed(torch.cdist(y, y))
        h.fill_diagonal_(0.0)  # the same under every swap
        h[h.abs() < 1e-12 * cross.mean()] = 0.0  # rounding: equal pictures have no difference to swap
        total += float(cross.sum() - cross.diagonal().sum()) / seeds**2
        pairs += count * (count - 1)
        blocks.append((part, h.numpy() / seeds**2))
    return blocks, total / max(pairs, 1)


def _quadratic(signs: Floats, blocks: list[tuple[slice, Floats]]) -> Floats:
    return np.sum([((signs[:, part] @ h) * signs[:, part]).sum(axis=1) for part, h in blocks], axis=0)


def _distance(blocks: list[tuple[slice, Floats]], between: float, prompts: int, seed: int) -> Estimate:
    """The distance over different prompts, as a share, and its bootstrap over prompts without pairs of one prompt."""
    rng = np.random.default_rng(seed)

    def share(weights: Floats) -> Floats:
        pairs = np.sum([weights[:, p].sum(axis=1) ** 2 - (weights[:, p] ** 2).sum(axis=1) for p, _ in blocks], axis=0)
        return _quadratic(weights, blocks) / np.maximum(pairs, 1.0) / max(2 * between, 1e-30)

    drawn = share(rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=BOOTSTRAPS).astype(np.float64))
    value = float(share(np.ones((1, prompts)))[0])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _features(given: FeatureSet | Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(given.pooled)) if isinstance(given, FeatureSet) else given.detach().cpu()
