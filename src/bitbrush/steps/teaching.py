"""Batches for finetuning, from the tape: what the float network was given and answered along its own trajectories.

The unit of a batch is a *group*: a window of consecutive sampling steps of one trajectory, with both halves of each
step under classifier-free guidance. The windows of a trajectory do not overlap. Rows are read once and kept on the
device where they fit into the run's memory, else in a file. Rows often share their condition (a prompt serves every
step of a trajectory), so conditions are kept once each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bitbrush.engine.store import Store
from bitbrush.engine.tape import Tape
from bitbrush.errors import InputError
from bitbrush.steps.loop import on_device

if TYPE_CHECKING:
    from bitbrush.engine.run import Run

Order = Literal["shuffled", "sequential", "risk", "random"]
OWN = ("sample", "output", "timestep", "trajectory", "half")
"""Entries of a sample that are its own; all others are conditions."""


@dataclass
class Lessons:
    """Groups of rows, and the rows.

    Args:
        tape: For the form in which the denoiser takes its inputs.
        groups: Rows of each group, int64 ``[G, window, halves]``, on the device.
        moments: Number of each group's window along its trajectory, 0 = noisiest; int64 ``[G]``, on the CPU.
        timesteps: Of the rows, ``[M]``, on the device.
        sample, output: Inputs and float answers of the rows.
        conditions: Distinct conditions, by name.
        condition_of: Which one a row has, int64 ``[M]``, on the device.
        table: Row of each moment of each trajectory, int64 ``[trajectories, steps, halves]`` on the CPU, -1 = absent.
        trajectories: (calibrate step, number) of its rows.
        held_out: So many trajectories, the first of the table, are measured and never trained on.
    """

    tape: Tape
    groups: Tensor
    moments: Tensor
    timesteps: Tensor
    sample: Store
    output: Store
    conditions: dict[str, Store]
    condition_of: Tensor
    table: Tensor
    trajectories: list[tuple[str, int]]
    held_out: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def width(self) -> int:
        """Rows of a group."""
        return self.groups[0].numel()

    @property
    def halves(self) -> int:
        """Rows of a sampling step: two under classifier-free guidance."""
        return int(self.groups.shape[2])

    @property
    def resident(self) -> bool:
        """Whether all rows lie on the device: a CUDA graph can read them."""
        return on_device(self.sample, self.output, *self.conditions.values())

    def groups_of(self, trajectories: Sequence[int]) -> Tensor:
        """Which groups have rows of these trajectories (rows of the table), bool ``[G]`` on the CPU."""
        rows = self.table[list(trajectories)]
        there = torch.zeros(len(self.timesteps), dtype=torch.bool)
        there[rows[rows >= 0]] = True
        return there[self.groups.cpu()].flatten(1).any(dim=1)

    @property
    def held(self) -> Tensor:
        """Which groups are held out, bool ``[G]`` on the CPU."""
        return self.groups_of(range(self.held_out))

    def hold_out(self, share: float) -> None:
        """Hold out a share of the trajectories, rounded down; none where a moment would have no group left."""
        self.held_out = int(share * len(self.table))
        if len(self.moments[~self.held].unique()) < len(self.moments.unique()):
            self.held_out = 0

    def rows(self, groups: Tensor) -> Tensor:
        """Rows of groups ``[g]``, flat: group by group, step by step, half by half."""
        return self.groups.index_select(0, groups).reshape(-1)

    def inputs(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the denoiser for rows."""
        batch = {"sample": self.sample.take(rows), "timestep": self.timesteps.index_select(0, rows)}
        which = self.condition_of.index_select(0, rows)
        return self.tape.inputs(batch | {name: store.take(which) for name, store in self.conditions.items()})

    def schedule(self, iterations: int, count: int, order: Order, generator: torch.Generator) -> Tensor:
        """Groups of every iteration, int64 ``[iterations, count]`` on the CPU; none that is held out.

        ``shuffled``: permutations of these groups, one after another. ``sequential``: the windows in sampling order,
        from noisy to clean, an equal share of the iterations each, shuffled within (QuEST, stage 1). With ``risk`` and
        ``random`` what is drawn here is replaced round by round (`bitbrush.steps.risk`).
        """
        every = (~self.held).nonzero()[:, 0]
        count = min(count, len(every))
        parts = [every] if order != "sequential" else [every[self.moments[every] == m] for m in self.moments.unique()]
        drawn = []
        for i, members in enumerate(parts):
            share = iterations * (i + 1) // len(parts) - iterations * i // len(parts)
            drawn.append(_permutations(members, share * count, generator).view(share, count))
        return torch.cat(drawn)

    def probe(self, count: int, among: Tensor | None = None) -> Tensor:
        """About ``count`` rows' worth of groups, at least one, equally strided over time, on the device.

        Those held out; where none are, those ``among`` which a choice is left (bool ``[G]`` on the CPU; None: all).
        """
        free = torch.ones(len(self), dtype=torch.bool) if among is None else among
        every = (self.held if self.held_out else free).nonzero()[:, 0]
        ordered = every[torch.argsort(self.moments[every], stable=True)]
        number = min(len(ordered), max(1, count // self.width))
        return ordered[[i * len(ordered) // number for i in range(number)]].to(self.groups.device)


def load(run: Run, window: int, limit: int | None = None, held_out: float = 0.0) -> Lessons:
    """Groups of the first ``limit`` samples of the tape.

    Args:
        run: Tape, device and memory.
        window: Consecutive sampling steps of a group.
        limit: Samples looked at; None means all.
        held_out: Share of the trajectories that is not trained on.

    Raises:
        InputError: No trajectory has a whole window.
    """
    table = run.tape.table(limit)
    groups, moments = windows(table, window)
    if not len(groups):
        raise InputError(
            f"no trajectory on the tape has {window} consecutive sampling steps", where="finetune: window",
            why="calibrate keeps `samples` moments spread over its trajectories; a window needs all of its own",
            try_="give calibrate samples = trajectories * steps * (2 with guidance), or finetune window = 1",
        )
    used = torch.zeros(len(run.tape), dtype=torch.bool)
    used[groups.flatten()] = True
    place = used.cumsum(0) - 1
    reader = _Reader(run, int(used.sum()))
    start = 0
    for batch in run.tape.batches(limit=limit):
        stop = start + len(batch["timestep"])
        mask = used[start:stop]
        if bool(mask.any()):
            reader.take({name: value[mask] for name, value in batch.items()})
        start = stop
    present = (table >= 0) & used[table.clamp(min=0)]
    rows = place[table.clamp(min=0)].where(present, -1)
    lessons = reader.lessons(place[groups], moments, rows, run.tape.trajectories(limit))
    lessons.hold_out(held_out)
    return lessons


def windows(table: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Whole windows of a table of rows ``[trajectories, steps, halves]`` (-1 = absent): rows ``[G, window, halves]``,
    and the number of each window along its trajectory ``[G]``.

    The windows of one trajectory do not overlap. Where their length does not divide the steps, the windows of one
    trajectory after another begin a step later, so that every step is in some window.
    """
    steps = table.shape[1]
    number, shifts = steps // window, steps % window + 1
    begin = torch.arange(len(table)) % shifts
    index = begin[:, None] + torch.arange(number * window)
    cut = table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))
    cut = cut.reshape(len(table), number, window, table.shape[2])
    whole = (cut >= 0).all(dim=3).all(dim=2)
    return cut[whole], whole.nonzero()[:, 1]


class _Reader:
    """Puts rows of the tape into stores, and conditions once each."""

    def __init__(self, run: Run, count: int) -> None:
        self.run, self.count, self.left = run, count, run.memory
        self.own: dict[str, Store] = {}
        self.times: list[Tensor] = []
        self.known: dict[bytes, int] = {}
        self.found: dict[str, list[Tensor]] = {}
        self.which: list[int] = []

    def take(self, batch: dict[str, Tensor]) -> None:
        """Append rows."""
        self.times.append(batch["timestep"].float())
        for name in ("sample", "output"):
            if name not in self.own:
                self.own[name] = self._store(batch[name], self.count)
            self.own[name].append(batch[name])
        conditions = {name: value for name, value in batch.items() if name not in OWN}
        for i in range(len(batch["timestep"])):
            self.which.append(self._condition({name: value[i] for name, value in conditions.items()}))

    def _condition(self, row: dict[str, Tensor]) -> int:
        digest = hashlib.sha256()
        for value in row.values():
            digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        key = digest.digest()
        if key not in self.known:
            self.known[key] = len(self.known)
            for name, value in row.items():
                self.found.setdefault(name, []).append(value[None])
        return self.known[key]

    def _store(self, rows: Tensor, count: int) -> Store:
        size = count * rows[0].numel() * rows.element_size()
        store = Store(self.run.tape.scratch, self.run.device, self.left, count)
        self.left -= size if size <= self.left else 0
        return store

    def lessons(
        self, groups: Tensor, moments: Tensor, table: Tensor, names: list[tuple[str, int]]
    ) -> Lessons:
        """Everything that was taken; ``groups`` and ``table`` count rows in the order taken."""
        conditions = {}
        for name, rows in self.found.items():
            conditions[name] = self._store(rows[0], len(rows))
            for row in rows:
                conditions[name].append(row)
        device = self.run.device
        return Lessons(
            self.run.tape, groups.to(device), moments, torch.cat(self.times).to(device), self.own["sample"],
            self.own["output"], conditions, torch.tensor(self.which, device=device), table, names,
        )


def _permutations(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the members: permutations of all, one after another."""
    rounds = -(-count // len(members))
    drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
    return torch.cat(drawn)[:count] if drawn else members[:0]
