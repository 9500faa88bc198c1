"""Time is a value, not a counter.

Activation ranges of a diffusion model move along the sampling trajectory, so some layers keep a table of scales with a
row for each timestep. Which row is in force must not depend on how often somebody called the network: classifier-free
guidance calls it once or twice a step, img2img starts in the middle, a sample may be aborted, two pipelines may share
one model. So nothing here counts. A forward pre-hook on the denoiser reads the ``timestep`` argument of that very call
into a `Clock`; layers look their row up; a post-hook that also runs after an exception clears it. A clock that is not
set raises when a layer needs it: there is no default row.

Reconstruction runs single blocks, where no denoiser forward happens; ``with clock.at(t):`` sets the time there.

The time is kept as a tensor ``[1]`` or ``[batch]``, so a compiled graph takes it as data and is not compiled again
when it changes. Rows for a batch of mixed timesteps are looked up per sample; of one timestep that a pipeline has
expanded over the batch (as DiT's and SD 3's do) there is one row, which kernels take faster. Within one denoiser
forward they are looked up once, not by every layer.

A timestep that is not on the grid (other step counts than the calibrated one) gets the row that the layer's ``lookup``
says, and the denoiser warns once: at the first such call, or, of a timestep on a GPU, at a call after it, since nobody
waits for the GPU to see it (`bitbrush.network.arrivals`). A compiled or captured graph cannot warn.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitbrush.errors import InputError, Notice
from bitbrush.network.arrivals import Arrivals
from bitbrush.network.dtypes import moving_only
from bitbrush.numbers.grid import Lookup

_Groups = tuple[int, ...]


def expanded(timestep: Tensor) -> bool:
    """Whether one value in memory serves all samples. Equal values beside each other cannot be told without a wait."""
    return timestep.ndim == 1 and len(timestep) > 1 and timestep.stride(0) == 0


def once(timestep: Tensor) -> Tensor:
    """The one value of a timestep that is expanded over the batch, ``[1]``; any other tensor as it is."""
    return timestep[:1] if expanded(timestep) else timestep


class Clock(nn.Module):
    """The current timestep of one denoiser, shared by all its layers.

    Args:
        timesteps: Ascending timesteps of the time grid that the model's scale tables are indexed by.
    """

    def __init__(self, timesteps: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.now: Tensor | None = None
        self.said = False  # whether this denoiser has warned of a timestep that is not on the grid
        self._found: dict[Lookup, Tensor] | None = None  # rows of the forward under way; None outside of one
        self._grouped: dict[Lookup, Tensor] = {}  # likewise, through the tables of groups
        self._hooks: list[RemovableHandle] = []
        self._arrivals = Arrivals()
        self._tables: dict[_Groups, int] = {}  # groups of timesteps that layers have, and their places in `_stacked`
        self._alone: dict[str, Tensor] = {}
        self._stacked: dict[str, Tensor] = {}
        grid = torch.tensor(timesteps, dtype=torch.float64)
        self._host = grid.float(), ((grid[1:] + grid[:-1]) / 2).float()  # the buffers' numbers; stay on the host
        self.register_buffer("timesteps", self._host[0].clone(), persistent=False)
        self.register_buffer("between", self._host[1].clone(), persistent=False)
        self.timesteps: Tensor
        self.between: Tensor

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the time of the call that is starting; a scalar or one value a sample."""
        device = self.timesteps.device
        tensor = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float32)
        self.now = once(tensor).to(device=device, dtype=torch.float32).reshape(-1)
        self._found, self._grouped = None, {}

    def clear(self) -> None:
        """Forget the time: the next reader raises until somebody sets it."""
        self.now = self._found = None
        self._grouped = {}

    @contextmanager
    def at(self, timestep: Tensor | float | int) -> Iterator[None]:
        """Hold the time at ``timestep`` inside the block; the former value comes back afterwards."""
        before = self.now, self._found, self._grouped
        self.set(timestep)
        try:
            yield
        finally:
            self.now, self._found, self._grouped = before

    def rows(self, lookup: Lookup) -> Tensor:
        """Row of the time grid for each sample, int64 ``[1]`` or ``[batch]``.

        ``nearest``: the closest grid time (the earlier one when between two); ``ceil``: the next grid time at or above
        the timestep, the last one beyond the end; ``exact``: the timestep must be on the grid.
        """
        if self.now is None:
            raise InputError(
                "the clock is not set, so timestep-dependent scales cannot be chosen",
                where="a layer with a table of scales a timestep",
                why="the layer was called outside a denoiser forward",
                try_="call the whole denoiser, or wrap the call in `with clock.at(t):`",
            )
        grid = self.timesteps
        known = None if self._found is None else self._found.get(lookup)
        if known is not None and known.device == grid.device:
            return known
        if not grid.numel():
            raise InputError(
                "the time grid is empty, so timestep-dependent scales cannot be chosen",
                where="a layer with a table of scales a timestep", why="no step has said which timesteps there are",
                try_="put a calibrate step first in the recipe",
            )
        now = self.now.to(grid.device)  # offloading may have moved the model since the call began
        if self._found is None:
            return self._look(now, lookup)
        known = self._found[lookup] = self._look(now, lookup)
        self._notice(now, lookup)
        return known

    def groups(self, groups: _Groups, lookup: Lookup) -> Tensor:
        """The group of each sample's timestep, int64 ``[1]`` or ``[batch]``. Those of all layers are looked up at once.

        Args:
            groups: Of each time of the grid.
        """
        row = self.rows(lookup)
        if torch.compiler.is_compiling() or self._found is None:
            return self._alone_for(groups, row.device).index_select(0, row)
        found = self._grouped.get(lookup)
        if found is None or self._tables.get(groups, len(found)) >= len(found):
            self.know(groups, row.device)
            found = self._grouped[lookup] = self._stack(row.device).index_select(1, row)
        return found[self._tables[groups]]

    def know(self, groups: _Groups, device: torch.device) -> None:
        """Keep a table of groups where it is used: a forward does it too, but one that is being compiled would be
        compiled again at the next call, which finds it."""
        self._alone_for(groups, device)
        if groups not in self._tables:
            self._tables[groups] = len(self._tables)
            self._stacked = {}

    def _alone_for(self, groups: _Groups, device: torch.device) -> Tensor:
        """The group of each timestep, int64 ``[T]``."""
        key = f"{groups} {device}"
        if key not in self._alone:
            with torch.inference_mode(False):  # what is kept must serve training, too
                self._alone[key] = torch.tensor(groups, device=device)
        return self._alone[key]

    def _stack(self, device: torch.device) -> Tensor:
        """The group of each timestep in every known table, int64 ``[tables, T]``; kept, for graphs captured later."""
        key = str(device)
        if key not in self._stacked:
            with torch.inference_mode(False):
                self._stacked[key] = torch.tensor(list(self._tables), device=device)
        return self._stacked[key]

    def _look(self, now: Tensor, lookup: Lookup) -> Tensor:
        row = _row(self.timesteps, self.between, now, lookup)
        if lookup == "exact":
            _on_grid(self.timesteps[row] == now, now)
        return row

    def _notice(self, now: Tensor, lookup: Lookup) -> None:
        """Warn once of a timestep that is not on the grid."""
        if self.said or _in_graph(now):
            return
        arrived = self._arrivals.latest(now, lookup)
        if arrived is not None:
            self._say(*arrived)

    def _say(self, now: Tensor, lookup: Lookup) -> None:
        (grid, between), now = self._host, now.float()
        taken = grid[_row(grid, between, now, lookup)]
        other = taken != now
        if not bool(other.any()):
            return
        self.said = True
        warnings.warn(
            f"timestep {float(now[other][0]):g} is not one of the {len(grid)} that were calibrated (other "
            f"sampling steps?): by the recipe's lookup = {lookup} the activation scales of timestep "
            f"{float(taken[other][0]):g} serve it, and so for others; bitbrush says this once",
            Notice, stacklevel=2,
        )

    def check(self, timestep: Tensor, lookups: Iterable[Lookup]) -> None:
        """Say of a timestep what a forward would say that looked rows up in these ways: for calls that are replayed."""
        lookup = min(lookups, default=None)
        if lookup is not None and self.timesteps.numel():
            self._notice(timestep.reshape(-1), lookup)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay float32: in half precision timesteps would be other ones."""
        super()._apply(moving_only(fn), recurse)
        return self

    def attach(self, model: nn.Module) -> None:
        """Hook the denoiser so that each forward sets this clock from its ``timestep`` argument and clears it after."""
        names = list(inspect.signature(model.forward).parameters)
        position = names.index("timestep")

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            clock = _of(module)
            clock.set(kwargs["timestep"] if "timestep" in kwargs else args[position])
            clock._found = {}

        def after(module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
            _of(module).clear()

        model.bitbrush_clock = self
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks that `attach` made."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _row(grid: Tensor, between: Tensor, now: Tensor, lookup: Lookup) -> Tensor:
    """Row of the ascending grid ``[T]`` for each time: one kernel.

    Args:
        between: The middle of each two neighbours ``[T - 1]``: up to there the earlier one is the nearest.
    """
    return torch.searchsorted(grid[:-1] if lookup == "ceil" else between, now)


def _in_graph(tensor: Tensor) -> bool:
    """Whether this call is being compiled or captured: values cannot be looked at."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _on_grid(found: Tensor, now: Tensor) -> None:
    """Raise where a time is not on the grid; inside a compiled or captured graph only an assertion is possible."""
    if _in_graph(found):
        torch._assert_async(found.all(), "a timestep is not on the time grid (lookup = exact)")
    elif not bool(found.all()):
        raise InputError(
            "a timestep is not on the time grid", where=f"timestep {float(now.expand_as(found)[~found][0]):g}",
            why="the layer's spec says lookup = exact",
            try_="use the sampling steps of the calibration, or lookup = nearest",
        )


def _of(model: nn.Module) -> Clock:
    """The clock of the model that is being called: a deep copy of a model must find its own, not the original's."""
    clock: Clock = model.bitbrush_clock  # type: ignore[assignment]
    return clock
