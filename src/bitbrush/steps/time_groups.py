"""Timesteps in groups that share a scale: which step belongs to which, found by a differentiable search (ADP-DM, also
called APQ-DM, Wang et al. 2024, in the reading "timestep groups").

Every quantizer has K entries (scale and integer zero-point) and, for each step i, importance logits a_i of K numbers:

    pi_i = softmax(a_i)
    x'   = sum_k pi_ik Q(x; s_k, z_k)                  in training: a mixture of outputs (`bitbrush.numbers.mixture`)
    g(i) = argmax_k a_ik                               what is measured and stored: one quantizer a step

Entries come from a clustering of the fitted rows: entry k spans the ranges of its cluster, ``(min lo, max hi)``. They
are trained too, as ``s = s_k exp(theta)``. The penalty ``eta * progress * H / ln K``, with H the mean entropy of pi
over quantizers and steps, drives pi to one entry a step.

Logits start equal, so that the data decide. Ties are decided for the step's own cluster, then for the lowest k: a step
that no sample ever visits, or for which entries do not differ, stays where the clustering put it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.numbers.grid import Grid, LayerSpec, Plan
from bitbrush.numbers.ranges import affine_parameters
from bitbrush.steps.search import Search

Clustering = Literal["runs", "kmeans"]
START = 0.01
"""Of every logit (the released code's)."""
ROUNDS = 100
"""Of k-means, at most."""

Mixed = tuple[Tensor, Tensor, Tensor]
"""(share [R, K], scale [K, S], zero-point [K, S])."""


# ---- clustering: on the CPU, in float64, without chance ------------------------------------------------------------
def span(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Ends (lo, hi) of the ranges of a table ``[T, S]``, float64."""
    s, z = scale.double().cpu(), zero_point.double().cpu()
    return -z * s, (grid.levels - 1 - z) * s


def cluster(scale: Tensor, zero_point: Tensor, grid: Grid, groups: int, how: Clustering) -> Tensor:
    """Which cluster each row of a fitted table ``[T, S]`` belongs to: int64 ``[T]``, numbered by first use from 0.

    ``runs``: contiguous runs of steps. ``kmeans``: any steps, by (log width, lo / width) of their ranges. At most
    ``groups`` clusters, and none is empty.
    """
    low, high = span(scale, zero_point, grid)
    count = min(groups, len(scale))
    return renumbered(runs(low, high, count) if how == "runs" else kmeans(low, high, count))


def runs(low: Tensor, high: Tensor, count: int) -> Tensor:
    """``count`` contiguous runs of steps of least error, by dynamic programming.

    A range widened to that of its run has a step that is larger by the ratio of their widths, and the error of rounding
    grows with its square: what is summed, over steps and segments, is that square.

    Args:
        low, high: Ends of the ranges ``[T, S]``, float64.
        count: K, at most T.
    """
    cost = _run_costs(low, high)  # [first, last]
    times = len(cost)
    best, cuts = cost[0], []
    for _ in range(count - 1):  # best[j]: steps 0 .. j in the runs so far
        before = torch.cat([torch.full((1,), math.inf, dtype=cost.dtype), best[:-1]])
        best, cut = (before[:, None] + cost).min(dim=0)
        cuts.append(cut)
    found, last = torch.zeros(times, dtype=torch.int64), times - 1
    for number, cut in zip(range(count - 1, 0, -1), reversed(cuts), strict=True):
        first = int(cut[last])
        found[first : last + 1] = number
        last = first - 1
    return found


def _run_costs(low: Tensor, high: Tensor) -> Tensor:
    """Error of every run ``[first, last]``; infinite where last < first."""
    cost = torch.full((len(low), len(low)), math.inf, dtype=torch.float64)
    inverse = (high - low).pow(-2)
    for first in range(len(low)):
        width = high[first:].cummax(dim=0).values - low[first:].cummin(dim=0).values
        cost[first, first:] = (width.square() * inverse[first:].cumsum(dim=0)).sum(dim=1)
    return cost


def kmeans(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Clusters of steps in (log width, lo / width) of their ranges ``[T, S]``, float64; at most ``count``, none empty.

    Centres start far from each other: the narrowest step, then each time the step farthest from all of them.
    """
    width = high - low
    points = torch.cat([width.log(), low / width], dim=1)
    chosen = [int(points[:, : low.shape[1]].sum(dim=1).argmin())]
    while len(chosen) < count:
        apart = _apart(points, points[chosen]).amin(dim=1)
        if not bool(apart.max() > 0):
            break
        chosen.append(int(apart.argmax()))
    centres, found = points[chosen], torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        nearest = _apart(points, centres).argmin(dim=1)
        if torch.equal(nearest, found):
            break
        found = nearest
        for k in found.unique().tolist():
            centres[k] = points[found == k].mean(dim=0)
    return found


def _apart(points: Tensor, centres: Tensor) -> Tensor:
    """Distances ``[T, K]``; exactly 0 between equal points."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def renumbered(groups: Tensor) -> Tensor:
    """The same groups ``[T]``, numbered 0 .. in the order of first use."""
    order = {k: i for i, k in enumerate(dict.fromkeys(groups.tolist()))}
    return torch.tensor([order[k] for k in groups.tolist()], dtype=torch.int64)


def entries(scale: Tensor, zero_point: Tensor, grid: Grid, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scale and zero-point ``[count, S]`` (float32) of the union of each group's ranges; it contains 0.

    Where one member's range is the union, its numbers are taken as they are. Entries beyond the groups in use (rows
    too alike for ``count`` clusters) span all rows.
    """
    low, high = span(scale, zero_point, grid)
    scales, zeros = torch.empty(count, low.shape[1]), torch.empty(count, low.shape[1])
    for k in range(count):
        here = (groups == k).nonzero().flatten()
        here = here if len(here) else torch.arange(len(low))
        least, most = low[here].amin(dim=0), high[here].amax(dim=0)
        s, z = affine_parameters(least, most, grid)
        same = (low[here] == least) & (high[here] == most)
        member = here[same.int().argmax(dim=0)]
        columns = torch.arange(low.shape[1])
        taken = same.any(dim=0)
        scales[k] = torch.where(taken, scale.float().cpu()[member, columns], s)
        zeros[k] = torch.where(taken, zero_point.float().cpu()[member, columns], z)
    return scales, zeros


# ---- the search ----------------------------------------------------------------------------------------------------
class GroupLearner(Search):
    """Groups of timesteps of several quantizers, and the K entries that they choose from.

    From the construction on, the quantizers hold the clustered tables, a row a step; `restore` brings those back.
    Parameters of all quantizers lie in two tensors. Without gradients (when a network is measured) `relax` puts the
    hard tables in place, never the mixture, which is finer than its bits. The penalty counts in ``unit``, which whoever
    trains sets to the loss at the start: what eta means then does not depend on the size of the losses.

    Args:
        quantizers: Static activation quantizers with a fitted row a timestep, by name; all of one time grid.
        groups: K; at most as many as there are timesteps.
        clustering: How the entries are found: ``runs`` or ``kmeans``.
        entropy: eta at the end of the training; it rises from 0 in proportion to the progress.
        rate, group_rate: Learning rates of theta and of the logits relative to the budget's.
        straight_through: Whether gradients pass through the rounding of a mixture to earlier layers.
    """

    def __init__(
        self, quantizers: dict[str, ActivationQuantizer], groups: int = 8, clustering: Clustering = "runs", *,
        entropy: float = 1.0, rate: float = 1.0, group_rate: float = 1.0, straight_through: bool = True,
    ) -> None:
        super().__init__(quantizers, entropy, straight_through)
        device, times, self.factors = self.device, self.times, {"groups": group_rate, "entry": rate}
        count = min(groups, times)
        homes, scales, zeros = [], [], []
        for q in quantizers.values():
            home = cluster(q.scale, q.zero_point, q.spec.grid, count, clustering)
            s, z = entries(q.scale, q.zero_point, q.spec.grid, home, count)
            homes.append(home)
            scales.append(s)
            zeros.append(z)
        self.home = torch.stack(homes).to(device)  # [Q, T]
        self.base, self.zero = torch.cat(scales, dim=1).to(device), torch.cat(zeros, dim=1).to(device)  # [K, C]
        self.owner = torch.arange(len(homes)).repeat_interleave(torch.tensor(self.widths)).to(device)  # [C]
        self.logits = nn.Parameter(torch.full((len(homes), times, count), START, device=device))
        self.theta = nn.Parameter(torch.zeros_like(self.base))
        self.restore()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Logits ``[Q, T, K]`` and the logarithms of the entries relative to their start ``[K, C]``."""
        return {"groups": self.logits, "entry": self.theta}

    def rates(self) -> dict[str, float]:
        """Of logits and of entries."""
        return self.factors

    def relax(self, progress: Tensor) -> Tensor:
        """With gradients: mixtures into the quantizers, and the entropy as penalty. Without: the hard tables."""
        self.release()
        if not torch.is_grad_enabled():
            self.try_tables(self._expanded(self.choice(), self.scales()))
            return torch.zeros((), device=progress.device)
        logarithm = torch.log_softmax(self.logits, dim=2)
        shares, scales = logarithm.exp(), self.scales()
        parts = zip(scales.split(self.widths, dim=1), self.zero.split(self.widths, dim=1), strict=True)
        for i, (quantizer, (scale, zero)) in enumerate(zip(self.members, parts, strict=True)):
            quantizer.trial_mixture = partial(self._mixed, i, shares, scale, zero)
            quantizer.straight_through = self.straight_through
        return self.entropy * self.unit * progress * share_entropy(shares, logarithm).mean()

    def harden(self) -> dict[str, Any]:
        """Decide; store the tables, a row a step."""
        self.release()
        with torch.no_grad():
            chosen = self.choice()
            shares = torch.softmax(self.logits, dim=2)
            certainty = float(shares.amax(dim=2).mean())
            self._keep(chosen, self.scales())
        used = sum(len(row.unique()) for row in chosen) / len(chosen)
        return {
            "time_groups": len(self.quantizers), "groups_used": round(used, 3), "certainty": round(certainty, 4),
            "steps_regrouped": round(float((chosen != self.home).float().mean()), 4),
        }

    def restore(self) -> None:
        """The clustered tables."""
        self._keep(self.home, self.base)

    def groups(self) -> dict[str, tuple[tuple[int, ...], Tensor, Tensor]]:
        """By quantizer: the group of each step, numbered by first use, and scale (float32) and zero-point (uint8) of
        the groups in use, ``[K', S]``: what the quantizers hold now."""
        chosen, found = self.chosen.cpu(), {}
        for row, (name, quantizer) in zip(chosen, self.quantizers.items(), strict=True):
            of = renumbered(row)
            first = [of.tolist().index(k) for k in range(int(of.max()) + 1)]
            found[name] = (tuple(of.tolist()), quantizer.scale[first].clone(), quantizer.zero_point[first].clone())
        return found

    def uncertainty(self) -> Tensor:
        """Entropy over ln K of each timestep, summed over quantizers: ``[T]`` in the order of the plan."""
        with torch.no_grad():
            logarithm = torch.log_softmax(self.logits, dim=2)
            return share_entropy(logarithm.exp(), logarithm).sum(dim=0)

    # ---- inside ------------------------------------------------------------------------------------------------
    def scales(self) -> Tensor:
        """Scales of all entries ``[K, C]``."""
        return self.base * self.theta.exp()

    def choice(self) -> Tensor:
        """The entry of each step, int64 ``[Q, T]``."""
        most = self.logits.detach().amax(dim=2)
        own = self.logits.detach().gather(2, self.home[..., None])[..., 0]
        return torch.where(own >= most, self.home, self.logits.detach().argmax(dim=2))

    def _mixed(self, i: int, shares: Tensor, scale: Tensor, zero: Tensor) -> Mixed:
        """What quantizer ``i`` mixes now; shares are looked up for all together when the time is another than at the
        last call."""
        found = self.at_row(self.members[i], lambda row: shares.index_select(1, row).unbind())
        return found[i], scale, zero

    def _expanded(self, chosen: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero-points of every step, ``[C, T]`` each, from entries ``[K, C]``."""
        index = chosen.index_select(0, self.owner)
        return scales.t().gather(1, index), self.zero.t().gather(1, index)

    def _keep(self, chosen: Tensor, scales: Tensor) -> None:
        self.chosen = chosen  # by the tables as they are
        with torch.no_grad():
            self.store_tables(self._expanded(chosen, scales))


def grouped(plan: Plan, learner: GroupLearner) -> tuple[dict[str, LayerSpec], dict[str, Tensor]]:
    """The specs of the layers whose inputs have groups of timesteps now, and their tables, a row a group."""
    specs: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for name, (groups, scale, zero_point) in learner.groups().items():
        layer = name.removesuffix(".input")
        spec = plan.layers[layer]
        if spec.activation is None:
            raise InternalError("a layer without a spec for its input has groups of timesteps", where=layer)
        activation = spec.activation.model_copy(update={"time_groups": groups})
        specs[layer] = spec.model_copy(update={"activation": activation})
        tensors |= {f"{name}/scale": scale, f"{name}/zero_point": zero_point}
    return specs, tensors


def groupable(name: str, quantizer: ActivationQuantizer) -> bool:
    """Whether the rows of a quantizer can be put into groups: a layer's input (no operand of attention) with a row a
    timestep, all of equal bits."""
    spec = quantizer.spec
    return name.endswith(".input") and spec.timed and not spec.time_bits and not spec.time_groups


def share_entropy(shares: Tensor, logarithm: Tensor, dim: int = -1) -> Tensor:
    """Entropy of K shares along ``dim`` over ln K: 1 where they are equal, 0 where one has all (and for K = 1)."""
    count = shares.shape[dim]
    return -(shares * logarithm).sum(dim=dim) / (math.log(count) if count > 1 else 1.0)
