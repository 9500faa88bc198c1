"""What an activation quantizer is given, in a bounded share: values to fit a range to, extremes for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbrush.network.activation import ActivationQuantizer

VALUES_BY_CHANNEL = 4096
"""Values kept a sample of a quantizer with scales a channel or a group, over all of them (at least two each)."""


class Watcher:
    """Keeps values and extremes of what one activation quantizer is given."""

    def __init__(
        self, quantizer: ActivationQuantizer, values: int, generator: torch.Generator, extremes: bool = True
    ) -> None:
        self.quantizer, self.values, self.generator, self.extremes = quantizer, values, generator, extremes
        self.times = torch.empty(0)
        self.time: float | None = None  # of all samples, where it is one
        self.kept: list[Tensor] = []
        self.kept_times: list[Tensor] = []
        self.ends: list[tuple[Tensor, Tensor, Tensor]] = []  # times, smallest and largest of each sample of a call
        self.handle = quantizer.register_forward_pre_hook(self._watch)

    def _watch(self, _module: Any, args: tuple[Any, ...]) -> None:
        x, channel_dim = args[0].detach().float(), args[1]
        if self.time is not None:
            self.times = torch.full((x.shape[0],), self.time)
        whole = x.reshape(x.shape[0], -1)
        if self.quantizer.spec.granularity == "channel":
            rows = x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], x.shape[0], -1)
            count = max(2, min(self.values, VALUES_BY_CHANNEL // len(rows)))
            self.kept.append(self._sample(rows, count))
        else:
            groups = self.quantizer.spec.groups
            count = max(2, min(self.values, VALUES_BY_CHANNEL // groups)) if groups else self.values
            self.kept.append(self._of_columns(x, channel_dim, count))
        self.kept_times.append(self.times)
        self.ends.append((self.times, whole.amin(1), whole.amax(1)))  # read later: nothing waits for the device here

    def _of_columns(self, x: Tensor, channel_dim: int, count: int) -> Tensor:
        """Values ``[S, B, count]`` that each column of the tables serves; groups may be those of a timestep."""
        rows = self.quantizer.rows() if self.quantizer.spec.groups_timed else None
        if rows is not None and len(distinct := rows.unique().tolist()) > 1:
            here = [(rows == row).nonzero().flatten() for row in distinct]
            parts = [self._at_row(x[index], channel_dim, count, row) for index, row in zip(here, distinct, strict=True)]
            return torch.cat(parts, dim=1)[:, torch.cat(here).argsort()]
        return self._at_row(x, channel_dim, count, 0 if rows is None else int(rows[0]))

    def _at_row(self, x: Tensor, channel_dim: int, count: int, row: int) -> Tensor:
        parts = self.quantizer.parts(x, channel_dim, row)
        flat = [part.reshape(1, x.shape[0], -1) if part.numel() else x.new_zeros(1, len(x), 1) for part in parts]
        return torch.cat([self._sample(part, count) for part in flat])

    def _sample(self, values: Tensor, count: int) -> Tensor:
        """``count`` values of each row of ``[..., M]``, at the same random places, and the extremes where wanted."""
        index = torch.randint(values.shape[-1], (count,), generator=self.generator)
        sample = values[..., index.to(values.device)]
        if self.extremes:
            sample[..., 0], sample[..., 1 % count] = values.amin(-1), values.amax(-1)
        return sample

    def values_by_segment(self) -> tuple[Tensor, Tensor]:
        """Values ``[S, samples, values]`` (S = C with scales a channel, K with groups) and timesteps ``[samples]``."""
        return torch.cat(self.kept, dim=1), torch.cat(self.kept_times).to(self.kept[0].device)

    def history(self) -> dict[str, list[float]]:
        """Extremes a timestep, ascending, rounded for the report."""
        low: dict[float, float] = {}
        high: dict[float, float] = {}
        if self.ends:
            found = [torch.cat([end[i] for end in self.ends]).tolist() for i in range(3)]
            for t, least, most in zip(*found, strict=True):
                low[t], high[t] = min(low.get(t, least), least), max(high.get(t, most), most)
        times = sorted(low)
        return {"timesteps": times, "low": [float(f"{low[t]:.5g}") for t in times],
                "high": [float(f"{high[t]:.5g}") for t in times]}
