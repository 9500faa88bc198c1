"""Groups of channels or pixels whose ranges are alike: DGQ's outlier-preserving groups (Ryu et al., ICLR 2025).

For each index g of a dimension D (the channels of an input, or its pixels: tokens of a linear layer, places of a
convolution's input), over calibration inputs:

    lo_D[g] = min of x at g              hi_D[g] = max of x at g
    spread(D) = (max_g hi_D - min_g hi_D) + (max_g lo_D - min_g lo_D)          the dimension of larger spread is grouped
    groups    = K-means on the points (lo[g], hi[g])                           not contiguous, not of equal size
    range_k   = (min of lo, max of hi over group k), widened to hold 0

All inputs of all timesteps together give the dimension and the groups, so that a kernel can run the result; the range
of a group is that of one timestep. (In the paper's code all three are found anew at each step; `Group.anew`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from bitbrush.errors import InternalError

Dimension = Literal["channel", "pixel"]
"""What an index of is a group's member."""
DIMENSIONS: tuple[Dimension, ...] = ("pixel", "channel")
"""In the order that decides where spreads are equal: the row of the table comes first in the paper's code."""
ROUNDS = 100
"""Of K-means, at most."""


class Extremes:
    """Smallest and largest value at each channel and each pixel, a timestep at a time.

    Args:
        pixels: Whether to keep those of pixels; their number must then be the same in every input.
    """

    def __init__(self, pixels: bool = True) -> None:
        self.kept: tuple[Dimension, ...] = DIMENSIONS if pixels else ("channel",)
        self.samples = 0
        self._found: dict[float, dict[Dimension, Tensor]] = {}

    def add(self, x: Tensor, times: Sequence[float], channel_dim: int) -> None:
        """Take inputs ``[B, .., C, ..]`` of the timesteps ``[B]``; what is neither sample nor channel is a pixel."""
        samples = x.detach().float().movedim(channel_dim, -1).flatten(1, -2)  # [B, pixels, C]
        self.samples += len(samples)
        distinct = dict.fromkeys(times)
        for time in distinct:
            here = samples  # choosing among them copies, and waits for the device
            if len(distinct) > 1:
                here = samples[torch.tensor([t == time for t in times], device=x.device)]
            known = self._found.setdefault(time, {})
            for dimension in self.kept:
                over = (0, 1) if dimension == "channel" else (0, 2)
                ends = torch.stack([here.amin(dim=over), here.amax(dim=over)])
                known[dimension] = ends if dimension not in known else _joined([known[dimension], ends])

    @property
    def times(self) -> frozenset[float]:
        """The timesteps of which inputs were taken."""
        return frozenset(self._found)

    def without_pixels(self) -> None:
        """Keep channels only from now on: the number of pixels is not the same in every input."""
        self.kept = ("channel",)

    def ends(self, dimension: Dimension, time: float | None = None) -> tuple[Tensor, Tensor]:
        """(lo, hi) of each index ``[members]``, at one timestep or over all.

        Raises:
            InternalError: Nothing was taken (at that time), or this dimension was not kept.
        """
        times = list(self._found) if time is None else [time]
        if not times or any(dimension not in self._found.get(t, {}) for t in times):
            raise InternalError("no extremes were seen", where=f"{dimension}, timestep {time}")
        low, high = _joined([self._found[t][dimension] for t in times])
        return low, high

    def spreads(self) -> dict[Dimension, float]:
        """The spread of each dimension that is kept, over all timesteps."""
        return {dimension: spread(*self.ends(dimension)) for dimension in self.kept}


def _joined(ends: list[Tensor]) -> Tensor:
    """Extremes of extremes ``[2, members]``."""
    if len({e.shape for e in ends}) > 1:
        raise InternalError("inputs differ in their number of pixels", where=", ".join(str(e.shape[1]) for e in ends))
    return torch.stack([torch.stack([e[0] for e in ends]).amin(dim=0), torch.stack([e[1] for e in ends]).amax(dim=0)])


def spread(low: Tensor, high: Tensor) -> float:
    """How far the ranges of a dimension's indices lie apart (the paper's D_d); ``[members]`` each."""
    return float((high.amax() - high.amin()) + (low.amax() - low.amin()))


def choose(spreads: dict[Dimension, float]) -> Dimension:
    """The dimension of the largest spread; where spreads are equal, pixels."""
    return max((d for d in DIMENSIONS if d in spreads), key=lambda d: spreads[d])


def clustered(low: Tensor, high: Tensor, count: int, seed: int = 0) -> Tensor:
    """The group of each index: int64 ``[members]`` on the CPU, numbered by first use, none empty.

    K-means (k-means++ start) on the points (lo, hi); at most as many groups as there are distinct points.

    Args:
        low, high: Ends of each index's range ``[members]``.
        count: K, at most.
        seed: Of the start.
    """
    points = torch.stack([low, high], dim=1).double().cpu().numpy()
    distinct, place = np.unique(points, axis=0, return_inverse=True)
    place = place.reshape(-1)
    if count >= len(distinct):
        return _renumbered(place)
    # whole data, not the distinct points: indices that are alike weigh as many as they are
    centres, labels = kmeans2(points, count, iter=ROUNDS, minit="++", rng=np.random.default_rng(seed), missing="warn")
    used = np.unique(labels)
    nearest = ((points[:, None] - centres[None, used]) ** 2).sum(axis=2).argmin(axis=1)
    return _renumbered(nearest)


def _renumbered(labels: np.ndarray) -> Tensor:
    found = list(dict.fromkeys(labels.tolist()))
    number = {label: i for i, label in enumerate(found)}
    return torch.tensor([number[label] for label in labels.tolist()])


def hulls(low: Tensor, high: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(lo, hi) of each group ``[K]``: they hold the ranges of all its indices, and 0 (convolutions pad with it)."""
    count = int(groups.max()) + 1
    index = groups.to(low.device)
    bottom = torch.zeros(count, device=low.device, dtype=low.dtype).scatter_reduce_(0, index, low, "amin")
    top = torch.zeros(count, device=high.device, dtype=high.dtype).scatter_reduce_(0, index, high, "amax")
    return bottom, top
