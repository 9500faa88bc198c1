"""Time is a value, not a counter.

Activation ranges of a diffusion model move along the sampling trajectory, so some layers keep a table of scales with a
row for each timestep. Which row is in force must not depend on how often somebody called the network: classifier-free
guidance calls it once or twice a step, img2img starts in the middle, a sample may be aborted, two pipelines may share
one model. So nothing here counts. A forward pre-hook on the denoiser reads the ``timestep`` argument of that very call
into a `Clock`; layers look their row up; a post-hook that also runs after an exception clears it. A clock that is not
set raises when a layer needs it: there is no default row.

Reconstruction runs single blocks, where no denoiser forward happens; ``with clock.at(t):`` sets the time there.

The time is kept as a tensor ``[1]`` or ``[batch]``, so a compiled graph takes it as data and is not compiled again
when it changes. Rows for a batch of mixed timesteps are looked up per sample. Within one denoiser forward they are
looked up once, not by every layer.

A timestep that is not on the grid (other step counts than the calibrated one) gets the row that the layer's ``lookup``
says, and the first such call of a denoiser warns. A compiled or captured graph cannot warn.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitbrush.errors import InputError, Notice
from bitbrush.numbers.grid import Lookup


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
        self._hooks: list[RemovableHandle] = []
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.float32), persistent=False)
        self.timesteps: Tensor

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the time of the call that is starting; a scalar or one value a sample."""
        device = self.timesteps.device
        tensor = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float32)
        self.now = tensor.to(device=device, dtype=torch.float32).reshape(-1)
        self._found = None

    def clear(self) -> None:
        """Forget the time: the next reader raises until somebody sets it."""
        self.now = self._found = None

    @contextmanager
    def at(self, timestep: Tensor | float | int) -> Iterator[None]:
        """Hold the time at ``timestep`` inside the block; the former value comes back afterwards."""
        before = self.now, self._found
        self.set(timestep)
        try:
            yield
        finally:
            self.now, self._found = before

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
        self._say(now, known, lookup)
        return known

    def _look(self, now: Tensor, lookup: Lookup) -> Tensor:
        grid, last = self.timesteps, self.timesteps.numel() - 1
        above = torch.searchsorted(grid, now).clamp(max=last)
        if lookup == "ceil":
            return above
        below = (above - 1).clamp(min=0)
        closer = (now - grid[below]).abs() <= (grid[above] - now).abs()
        row = torch.where(closer, below, above)
        if lookup == "exact":
            _on_grid(grid[row] == now, now)
        return row

    def _say(self, now: Tensor, row: Tensor, lookup: Lookup) -> None:
        """Warn once of a timestep that is not on the grid. Until then a GPU is waited for once a forward."""
        if self.said or _in_graph(now):
            return
        taken = self.timesteps[row]
        other = taken != now
        if not bool(other.any()):
            return
        self.said = True
        warnings.warn(
            f"timestep {float(now[other][0]):g} is not one of the {self.timesteps.numel()} that were calibrated (other "
            f"sampling steps?): by the recipe's lookup = {lookup} the activation scales of timestep "
            f"{float(taken[other][0]):g} serve it, and so for others; bitbrush says this once",
            Notice, stacklevel=2,
        )

    def check(self, timestep: Tensor, lookups: Iterable[Lookup]) -> None:
        """Say of a timestep what a forward would say that looked rows up in these ways: for calls that are replayed."""
        if self.said or not self.timesteps.numel():
            return
        now = timestep.to(device=self.timesteps.device, dtype=torch.float32).reshape(-1)
        for lookup in lookups:
            self._say(now, self._look(now, lookup), lookup)

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
