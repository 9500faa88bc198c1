"""Input channels in groups within each timestep: ADP-DM as its released code has it (the reading "channel groups").

Every quantizer and timestep t has a bank of K candidate ranges of its own, and for each input channel c logits a_tkc:

    pi_tkc = softmax_k(a_tkc)
    x'_c   = sum_k pi_tkc Q(x_c; lo_tk, hi_tk)                     in training: a mixture of outputs
    Q(x_c; sum_k pi_tkc lo_tk, sum_k pi_tkc hi_tk)                 what is measured and stored: a mixture of ranges

The two agree where pi is one-hot, which the entropy penalty drives it to. As in the code, nothing is decided at the
end, and the candidates are not trained. They are made from the fitted ranges of the channels at t: the ends hi_c are
put into K bins of equal width, hi_tk is the largest of bin k; lo_tk likewise, the smallest of its bin; both ascend.

The result is a timed table with one scale a channel (``granularity = "channel"``). No integer product can factor that
out, so this is a simulated arm, for comparison with `time_groups`, where timesteps share a scale.

From equal logits every channel has the same range, the mean of the candidates: the search starts from a scale a
timestep, and not from the fitted scales a channel that the candidates were made of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.errors import InputError, InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.numbers.grid import ActivationSpec, Grid, Plan
from bitbrush.numbers.ranges import affine_parameters
from bitbrush.steps.search import Search
from bitbrush.steps.time_groups import START, Mixed, share_entropy, span


# ---- the bank: on the CPU, in float64, without chance --------------------------------------------------------------
def bank(scale: Tensor, zero_point: Tensor, grid: Grid, count: int) -> tuple[Tensor, Tensor]:
    """Ends (lo, hi) of the candidate ranges of each timestep, float32 ``[T, K]``, from a table ``[T, C]``.

    Candidate 1 has the most negative lo with the smallest hi, candidate K the least negative lo with the largest hi.
    """
    low, high = span(scale, zero_point, grid)
    return bins(low, count, largest=False).float(), bins(high, count, largest=True).float()


def bins(values: Tensor, count: int, largest: bool) -> Tensor:
    """One member of each of ``count`` bins of equal width between the extremes of a row of ``values`` ``[T, C]``.

    The largest or the smallest member; where there is none, the bin's upper edge. Ascending, ``[T, count]``.
    """
    first, width = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    place = torch.where(width > 0, (values - first) / width * count, 0).floor().clamp(max=count - 1)
    ends, none = [], -torch.inf if largest else torch.inf
    for k in range(count):
        here = torch.where(place == k, values, none)
        end = here.amax(dim=1, keepdim=True) if largest else here.amin(dim=1, keepdim=True)
        ends.append(torch.where(end.isfinite(), end, first + (k + 1) / count * width))
    return torch.cat(ends, dim=1).sort(dim=1).values  # an edge may be off by its rounding


# ---- what it is for ------------------------------------------------------------------------------------------------
def by_channel(spec: ActivationSpec) -> bool:
    """Whether channels of such a quantizer can be put into groups: static, timed, a scale a channel, both ends free."""
    plain = not (spec.time_bits or spec.time_groups or spec.grid.signed)
    return spec.mode == "static" and spec.timed and spec.granularity == "channel" and plain


def check_channels(plan: Plan, where: str) -> None:
    """Raises where a plan has static activations, but none whose channels can be put into groups."""
    static = [a for s in plan.layers.values() if (a := s.activation) is not None and a.mode == "static"]
    if static and not any(by_channel(a) for a in static):
        raise InputError("groups of channels need a scale for each input channel and timestep", where=where,
                         why="no static scale of this plan is timed, one a channel, and of an unsigned grid",
                         try_='give the layers activation = { timed = true, granularity = "channel" }, or '
                              'scale_form = "groups"')


# ---- the search ----------------------------------------------------------------------------------------------------
class ChannelGroupLearner(Search):
    """Shares that the channels of several quantizers have in the K candidate ranges of each timestep.

    From the construction on, the quantizers hold the ranges of equal shares; `restore` brings those back. The logits of
    all quantizers lie in one tensor. Without gradients (when a network is measured) `relax` puts the mixture of ranges
    in place, never that of outputs, which is finer than its bits. The penalty counts in ``unit``, as in `GroupLearner`.

    Args:
        quantizers: Activation quantizers that `by_channel` takes, with a fitted row a timestep; all of one time grid.
        groups: K.
        entropy: eta at the end of the training; it rises from 0 in proportion to the progress.
        group_rate: Learning rate of the logits relative to the budget's.
        straight_through: Whether gradients pass through the rounding of a mixture to earlier layers.
    """

    def __init__(
        self, quantizers: dict[str, ActivationQuantizer], groups: int = 8, *, entropy: float = 1.0,
        group_rate: float = 1.0, straight_through: bool = True,
    ) -> None:
        super().__init__(quantizers, entropy, straight_through)
        if not all(by_channel(q.spec) for q in quantizers.values()):
            raise InternalError("groups of channels need tables with a scale a channel and timestep, unsigned")
        device, self.rate = self.device, group_rate
        banks = [bank(q.scale, q.zero_point, q.spec.grid, groups) for q in self.members]
        self.low, self.high = (torch.stack(ends).to(device) for ends in zip(*banks, strict=True))  # [Q, T, K]
        tables = (affine_parameters(*ends, q.spec.grid) for ends, q in zip(banks, self.members, strict=True))
        self.scale, self.zero = (torch.stack(t).mT.contiguous().to(device) for t in zip(*tables, strict=True))
        sizes = torch.tensor(self.widths)
        self.weight = (1 / sizes).repeat_interleave(sizes).to(device)  # [C]: a quantizer's channels count 1 together
        self.logits = nn.Parameter(torch.full((self.times, groups, sum(self.widths)), START, device=device))
        self.restore()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Logits ``[T, K, C]``, C the channels of all quantizers."""
        return {"channel_groups": self.logits}

    def rates(self) -> dict[str, float]:
        """Of the logits."""
        return {"channel_groups": self.rate}

    def relax(self, progress: Tensor) -> Tensor:
        """With gradients: mixtures into the quantizers, and the entropy as penalty. Without: tables of mixed ranges."""
        self.release()
        if not torch.is_grad_enabled():
            self.try_tables(self._ranges(self._shares()))
            return torch.zeros((), device=progress.device)
        logarithm = torch.log_softmax(self.logits, dim=1)
        shares = logarithm.exp()
        for i, quantizer in enumerate(self.members):
            quantizer.trial_mixture = partial(self._mixed, i, shares)
            quantizer.straight_through = self.straight_through
        return self.entropy * self.unit * progress * self._undecided(shares, logarithm).mean() / len(self.members)

    def harden(self) -> dict[str, Any]:
        """Store the tables of mixed ranges."""
        self.release()
        shares = self._shares()
        self.store_tables(self._ranges(shares))
        certainty = float((shares.amax(dim=1) * self.weight).sum(dim=1).mean()) / len(self.members)
        return {"channel_groups": len(self.members), "certainty": round(certainty, 4)}

    def restore(self) -> None:
        """The tables of equal shares."""
        self.store_tables(self._ranges(torch.softmax(torch.full_like(self.logits.detach(), START), dim=1)))

    def uncertainty(self) -> Tensor:
        """Entropy over ln K of each timestep, mean over channels, sum over quantizers: ``[T]`` as in the plan."""
        with torch.no_grad():
            logarithm = torch.log_softmax(self.logits, dim=1)
            return self._undecided(logarithm.exp(), logarithm)

    # ---- inside ------------------------------------------------------------------------------------------------
    def _shares(self) -> Tensor:
        return torch.softmax(self.logits.detach(), dim=1)

    def _undecided(self, shares: Tensor, logarithm: Tensor) -> Tensor:
        """Entropy over ln K, mean over channels, summed over quantizers: ``[T]``."""
        return (share_entropy(shares, logarithm, dim=1) * self.weight).sum(dim=1)

    def _mixed(self, i: int, shares: Tensor) -> Mixed:
        """What quantizer ``i`` mixes now; all are looked up together when the time is another than at the last call."""
        def find(row: Tensor) -> tuple[tuple[Tensor, ...], ...]:
            of_channels = shares.index_select(0, row).split(self.widths, dim=2)
            scale, zero = (table.index_select(2, row).unbind() for table in (self.scale, self.zero))
            return of_channels, scale, zero

        share, scale, zero = (part[i] for part in self.at_row(self.members[i], find))
        return share, scale, zero

    def _ranges(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero-points of every channel and step, ``[C, T]`` each, of the ranges mixed by shares."""
        scales, zeros = [], []
        for i, (quantizer, share) in enumerate(zip(self.members, shares.split(self.widths, dim=2), strict=True)):
            low, high = ((share * ends[i, :, :, None]).sum(dim=1) for ends in (self.low, self.high))  # [T, C]
            scale, zero = affine_parameters(low, high, quantizer.spec.grid)
            scales.append(scale.t())
            zeros.append(zero.t())
        return torch.cat(scales), torch.cat(zeros)
