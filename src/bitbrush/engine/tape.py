"""The calibration store: denoiser inputs from real sampling trajectories, and a service that records activations.

A sample is what the denoiser was given at one moment of one trajectory (x_t, t, condition) and what it answered, with
the number of the trajectory and the half of the call (0 = unconditional or only, 1 = conditional). The samples are the
result files of the ``calibrate`` units, read piece by piece, so memory stays bounded whatever their number. `record`
may be called inside any unit: it runs the network over the samples, in whichever face it shows, and keeps what goes
into and comes out of one module. `Tape.table` says which sample is which moment of which trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitbrush.engine.memo import Memo
from bitbrush.engine.store import Store
from bitbrush.errors import InputError, NumericsError

BATCH = {"cpu": 16, "cuda": 128}
"""Samples a forward when recording, by device type."""
LABELS = ("trajectory", "half")
"""Entries of a sample that say where it comes from, int64; the denoiser is not given them."""


class _Stop(Exception):
    """Raised inside a forward when everything wanted has been seen."""


@dataclass
class Recording:
    """What one module received and returned over all samples.

    ``inputs`` and ``output`` hold tensors with the sample as first dimension (in memory, or in a file when large);
    ``template`` rebuilds (args, kwargs), with constants in place. ``timesteps`` is ``[M]``.
    """

    template: Any
    inputs: dict[int, Store]
    constants: dict[int, Any]
    output: Store
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.output)

    def call(self, module: nn.Module, index: Tensor) -> Tensor:
        """Run ``module`` on the recorded inputs of the samples ``index``."""
        leaves = [
            self.inputs[i].take(index) if i in self.inputs else self.constants[i]
            for i in range(len(self.inputs) + len(self.constants))
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.template)
        return first_tensor(module(*args, **kwargs))


@dataclass
class Tape:
    """Calibration samples on disk.

    Args:
        scratch: Folder for recordings that do not fit into memory.
        device: Where the denoiser runs.
        budget: Bytes that one recording may take in memory before it goes to a file.
    """

    scratch: Path
    device: torch.device
    budget: int
    dtype: torch.dtype = torch.float32
    shards: list[tuple[Path, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, path: Path, source: str = "") -> None:
        """Append a shard of samples (a unit's result file) of the step ``source``, which numbers its trajectories."""
        self.kept = {}
        with safe_open(path, framework="pt") as file:
            self.shards.append((path, file.get_slice("timestep").get_shape()[0]))
        self.sources.append(source)

    def __len__(self) -> int:
        return sum(count for _, count in self.shards)

    def count(self, limit: int | None) -> int:
        """Samples looked at under a limit."""
        return min(len(self), limit or len(self))

    @property
    def batch(self) -> int:
        """Samples a forward; fixed by the device, so that a resumed run forms the same batches."""
        return BATCH.get(self.device.type, 16)

    def batches(self, size: int | None = None, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Samples in order, ``size`` at a time (batches do not cross shards), at most ``limit`` samples."""
        self._check()
        left, size = len(self) if limit is None else limit, size or self.batch
        for path, count in self.shards:
            with safe_open(path, framework="pt") as file:
                for start in range(0, count, size):
                    stop = min(start + size, count, start + left)
                    if left <= 0 or stop <= start:
                        return
                    left -= stop - start
                    yield {k: file.get_slice(k)[start:stop] for k in file.keys()}  # noqa: SIM118

    def select(self, indices: list[int], size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Given samples (ascending indices), at most ``size`` at a time."""
        self._check()
        size = size or self.batch
        start = 0
        for path, count in self.shards:
            here = [i - start for i in indices if start <= i < start + count]
            start += count
            with safe_open(path, framework="pt") as file:
                for low in range(0, len(here), size):
                    part = here[low : low + size]
                    rows = [{k: file.get_slice(k)[i : i + 1] for k in file.keys()} for i in part]  # noqa: SIM118
                    yield {k: torch.cat([row[k] for row in rows]) for k in rows[0]}

    def column(self, name: str, limit: int | None = None) -> Tensor:
        """One entry of the first ``limit`` samples, such as ``timestep``, without reading the others."""
        self._check()
        parts = []
        for path, _ in self.shards:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor(name))
        return torch.cat(parts)[:limit]

    def table(self, limit: int | None = None) -> Tensor:
        """Which sample is which moment of which trajectory: row numbers, int64 ``[trajectories, steps, halves]``.

        Rows count over the shards in order, -1 where there is no sample. Steps are the distinct timesteps of the whole
        tape, descending (the order of sampling); trajectories are those from which one of the first ``limit`` samples
        comes, in the order of their numbers.
        """
        steps = self.column("timestep").unique().flip(0)
        keys, _ = self._keys(limit)
        known, trajectory = keys.unique(return_inverse=True)
        step = len(steps) - 1 - torch.searchsorted(steps.flip(0), self.column("timestep", limit))
        half = self.column("half")
        table = torch.full((len(known), len(steps), int(half.max()) + 1), -1)
        table[trajectory, step, half[:limit]] = torch.arange(len(keys))
        return table

    def trajectories(self, limit: int | None = None) -> list[tuple[str, int]]:
        """(calibrate step, number) of the trajectories in the rows of `table`."""
        keys, width = self._keys(limit)
        names = list(dict.fromkeys(self.sources))
        return [(names[key // width], key % width) for key in keys.unique().tolist()]

    def _keys(self, limit: int | None) -> tuple[Tensor, int]:
        """One number a sample that names its trajectory: number of the source * width + number; and the width."""
        numbers = self.column("trajectory")
        names = {source: i for i, source in enumerate(dict.fromkeys(self.sources))}
        groups = [torch.full((count,), names[s]) for s, (_, count) in zip(self.sources, self.shards, strict=True)]
        width = int(numbers.max()) + 1
        return (torch.cat(groups) * width + numbers)[:limit], width

    def spread(self, limit: int | None = None) -> list[int]:
        """Numbers of ``limit`` samples, equally strided over the tape: over its trajectories and their times."""
        total, count = len(self), self.count(limit)
        return [i * total // count for i in range(count)]

    def spread_batches(self, limit: int | None = None, size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The samples of `spread`, ``size`` at a time. A part of the tape is read once and kept, where it fits."""
        self._check()
        size = size or self.batch
        chosen = self.spread(limit)
        if len(chosen) == len(self):
            yield from self.batches(size)
            return
        joined = self.kept.get(len(chosen))
        if joined is None:
            parts = list(self.select(chosen, size=len(chosen)))
            joined = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
            fits = sum(t.numel() * t.element_size() for t in joined.values()) <= self.budget
            self.kept = {len(chosen): joined} if fits else {}
        for start in range(0, len(chosen), size):
            yield {k: t[start : start + size] for k, t in joined.items()}

    def _check(self) -> None:
        if not self.shards:
            raise InputError("there are no calibration samples yet", why="no calibrate step came before",
                             try_="put a calibrate step first in the recipe")

    def inputs(self, batch: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the denoiser's forward for a batch of samples, on the device."""
        def cast(t: Tensor) -> Tensor:
            return t.to(self.device, self.dtype if t.is_floating_point() else None)

        kwargs: dict[str, Any] = {}
        for key, value in batch.items():
            if key in ("sample", "timestep", "output", *LABELS):
                continue
            outer, _, inner = key.partition(".")
            if inner:
                kwargs.setdefault(outer, {})[inner] = cast(value)
            else:
                kwargs[outer] = cast(value)
        return (cast(batch["sample"]), batch["timestep"].to(self.device)), kwargs

    def run(
        self, model: nn.Module, *, limit: int | None = None, size: int | None = None, memo: Memo | None = None,
        each: Callable[[int, int], None] | None = None, site: str = "",
    ) -> None:
        """Run the network over ``limit`` samples spread over the tape, for the sake of hooks (on the module ``site``,
        where one is named).

        ``each(batch number, samples)`` is called after each batch.
        """
        with torch.no_grad():
            for number, batch in enumerate(self.spread_batches(limit, size)):
                args, kwargs = self.inputs(batch)
                count = len(batch["timestep"])
                replay: AbstractContextManager[None] = nullcontext()
                if memo is not None:
                    replay = memo.batch(model, number, count, site, self.count(limit))
                with replay, suppress(_Stop):
                    model(*args, **kwargs)
                if each is not None:
                    each(number, count)

    def record(
        self, model: nn.Module, site: str, *, limit: int | None = None, memo: Memo | None = None, output: bool = True,
        inputs: bool = True, size: int | None = None,
    ) -> Recording:
        """Record the inputs and output of the module ``site`` over ``limit`` samples spread over the tape, in the face
        the model shows.

        The forward stops as soon as the module has answered.
        """
        recorder = _Recorder(self, self.count(limit), inputs, output, site)
        module = model.get_submodule(site)
        before = module.register_forward_pre_hook(recorder.before, with_kwargs=True)
        after = module.register_forward_hook(recorder.after)
        try:
            self.run(model, limit=limit, size=size, memo=memo, site=site)
        finally:
            before.remove()
            after.remove()
        return recorder.result(self.column("timestep")[self.spread(limit)].to(self.device))


class _Recorder:
    def __init__(self, tape: Tape, count: int, inputs: bool, output: bool, site: str) -> None:
        self.tape, self.count, self.site = tape, count, site
        self.want_inputs, self.want_output = inputs, output
        self.template: Any = None
        self.inputs: dict[int, Store] = {}
        self.constants: dict[int, Any] = {}
        self.output = Store(tape.scratch, tape.device, tape.budget, count)

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.want_inputs:
            return
        leaves, self.template = pytree.tree_flatten((args, kwargs))
        batch = next(t.shape[0] for t in leaves if isinstance(t, Tensor) and t.ndim > 0)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch:
                store = self.inputs.setdefault(i, Store(self.tape.scratch, self.tape.device, self.tape.budget,
                                                        self.count))
                store.append(leaf)
            else:
                self.constants[i] = leaf
        if not self.want_output:
            raise _Stop

    def after(self, _module: nn.Module, _args: Any, out: Any) -> None:
        if self.want_output:
            tensor = first_tensor(out)
            if not torch.isfinite(tensor).all():
                raise NumericsError("NaN or Inf while recording", where=self.site,
                                    why="the module's output is not finite", try_="bitbrush inspect; check the model")
            self.output.append(tensor)
        raise _Stop

    def result(self, timesteps: Tensor) -> Recording:
        return Recording(self.template, self.inputs, self.constants, self.output, timesteps)


def first_tensor(out: Any) -> Tensor:
    """The tensor of a module's output (alone, or first of a tuple)."""
    return out if isinstance(out, Tensor) else out[0]
