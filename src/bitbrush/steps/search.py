"""What the searches of groups share: mixtures go into quantizers and out of them again; tables have a row a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.steps.learners import SharedTables, parts_of, table_order


class Search:
    """Quantizers of one time grid that choose among candidates, and their tables.

    Whoever trains sets ``unit`` to the loss at the start; the entropy counts in it.

    Args:
        quantizers: Activation quantizers with a fitted row a timestep, by name; all of one time grid.
        entropy: eta at the end of the training; it rises from 0 in proportion to the progress.
        straight_through: Whether gradients pass through the rounding of a mixture to earlier layers.
    """

    def __init__(self, quantizers: dict[str, ActivationQuantizer], entropy: float, straight_through: bool) -> None:
        first = of_one_clock(quantizers)
        self.quantizers, self.members = quantizers, list(quantizers.values())
        self.entropy, self.unit, self.straight_through = entropy, 1.0, straight_through
        self.shapes = {name: q.scale.shape for name, q in quantizers.items()}
        self.widths = [shape[1] for shape in self.shapes.values()]
        self.times, self.device = len(first.scale), first.scale.device
        self.order = table_order(self.widths, self.times).to(self.device)
        self.tables = SharedTables(self.members)
        self.looked: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def release(self) -> None:
        """Neither mixtures nor trial tables stay behind."""
        self.tables.clear()
        self.looked = {}
        for quantizer in self.members:
            quantizer.trial_mixture, quantizer.straight_through = None, True

    def result(self) -> dict[str, Tensor]:
        """The tables, a row a step."""
        return {f"{n}/{key}": getattr(q, key) for n, q in self.quantizers.items() for key in ("scale", "zero_point")}

    def at_row(self, quantizer: ActivationQuantizer, find: Callable[[Tensor], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What ``find`` makes of the row in force, for all quantizers at once; kept as long as the time stands."""
        clock, lookup = quantizer.clock, quantizer.spec.lookup
        now = None if clock is None else clock.now
        known = self.looked.get(lookup)
        if known is None or known[0] is not now:
            row = quantizer.times()
            if row is None:
                raise InternalError("a quantizer without a clock was taken for a timed one")
            known = self.looked[lookup] = (now, find(row))
        return known[1]

    def try_tables(self, columns: tuple[Tensor, Tensor]) -> None:
        """Scales and zero-points of every step, ``[C, T]`` each, as trial tables."""
        self.tables.put(*(self._flat(part) for part in columns))

    def store_tables(self, columns: tuple[Tensor, Tensor]) -> None:
        """The same into the quantizers, for good."""
        scale, zero = (parts_of(self._flat(part), self.shapes) for part in columns)
        for name, quantizer in self.quantizers.items():
            quantizer.set_scale(scale[name].clone(), zero[name])

    def _flat(self, columns: Tensor) -> Tensor:
        """Tables ``[T, S]``, one after another, of columns ``[C, T]``."""
        return columns.flatten().index_select(0, self.order)


def of_one_clock(quantizers: dict[str, ActivationQuantizer]) -> ActivationQuantizer:
    """The first of them; raises where they have no rows a timestep of one clock."""
    every = list(quantizers.values())
    clock = every[0].clock if every else None
    if clock is None or any(q.clock is not clock or q.spec.time_bits or q.spec.time_groups for q in every):
        raise InternalError("groups of timesteps need tables with a row a timestep, all of one clock and equal bits")
    return every[0]
