"""Progress on the command line: a bar with a time estimate on a terminal, plain lines elsewhere.

Both keep a stack: the unit "block 3 of 20" may start its own inner bar of iterations and finish it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import IO, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from bitbrush.cli.text import clean, clock

PLAIN_SECONDS = 20.0


class Reporter(Protocol):
    """What library code reports to; the same protocol as the engine's."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def reporter(console: Console) -> Reporter:
    """The reporter that suits where standard error goes."""
    return RichReporter(console) if console.is_terminal else PlainReporter(console.file)


def estimate(elapsed: float, done: float, total: int) -> float | None:
    """Seconds left, from the mean pace so far; None before the first unit."""
    return elapsed / done * (total - done) if done > 0 and total >= done else None


class _Left(ProgressColumn):
    """Time left by the mean pace: units of a run differ too much for a window of the last few."""

    def render(self, task: Task) -> Text:
        at = task.fields["at"]  # when the last unit was done: between two units the estimate counts down
        left = estimate(at, int(task.completed), int(task.total or 0))
        if left is not None:
            left = max(left - ((task.elapsed or 0.0) - at), 0.0)
        return Text("" if left is None else f"{clock(left)} left", style="cyan")


def _short(label: str, limit: int = 26) -> str:
    """A layer's name cut in the middle: where it begins and what it is."""
    return label if len(label) <= limit else f"{label[: limit // 2 - 2]}…{label[-(limit // 2 + 1) :]}"


class RichReporter:
    """A live bar a level; an outer bar leaves one line behind when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._stack: list[TaskID] = []

    def start(self, label: str, total: int) -> None:
        if self._live is None:
            self._live = Progress(*self._columns(), console=self._console, transient=True)
            self._live.start()
        shown = "  " * len(self._stack) + _short(clean(label))
        self._stack.append(self._live.add_task(shown, total=total, note="", at=0.0))

    def _columns(self) -> list[ProgressColumn]:
        """Numbers and times are never broken or cut; names are, and the note is left out of a narrow terminal."""
        wide = self._console.width >= 110
        whole = Column(no_wrap=True, min_width=11)
        columns: list[ProgressColumn] = [
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=48 if wide else 30)
            ),
            BarColumn(bar_width=24 if wide else 12),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            _Left(table_column=whole),
        ]
        if wide:
            note = Column(no_wrap=True, ratio=1)
            columns.append(TextColumn("{task.fields[note]}", markup=False, style="dim", table_column=note))
        return columns

    def advance(self, n: int = 1, note: str = "") -> None:
        if self._live is not None and self._stack:
            task = self._task(self._live)
            shown = clean(note) if note else task.fields["note"]
            self._live.update(task.id, advance=n, note=shown, at=task.elapsed or 0.0)

    def finish(self) -> None:
        if self._live is None or not self._stack:
            return
        task = self._task(self._live)
        self._stack.pop()
        done = f"{task.description.strip()}: {int(task.completed)} in {clock(task.elapsed or 0.0)}"
        self._live.remove_task(task.id)
        if not self._stack:
            self.close()
            if task.total:
                self._console.print(Text(done, style="dim"))

    def _task(self, live: Progress) -> Task:
        """The innermost bar."""
        return next(task for task in live.tasks if task.id == self._stack[-1])

    def say(self, text: str) -> None:
        self._console.print(Text(clean(text)), soft_wrap=True)

    def close(self) -> None:
        """Take the bars off the screen, wherever the work was: an error message follows, or nothing."""
        if self._live is not None:
            self._live.stop()
        self._live = None
        self._stack.clear()


@dataclass
class _Level:
    label: str
    total: int
    began: float
    done: int = 0


@dataclass
class PlainReporter:
    """A line when a level starts and ends, and one in between every 20 seconds: for logs and pipes."""

    file: IO[str] = field(default_factory=lambda: sys.stderr)
    every: float = PLAIN_SECONDS
    _stack: list[_Level] = field(default_factory=list)
    _last: float = 0.0

    def start(self, label: str, total: int) -> None:
        self._stack.append(_Level(clean(label), total, time.monotonic()))
        if len(self._stack) == 1 and total:
            self._line(f"{clean(label)}: {total} to do")
            self._last = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        if not self._stack:
            return
        level = self._stack[-1]
        level.done += n
        now = time.monotonic()
        if now - self._last >= self.every and level.done < level.total:
            self._last = now
            where = " > ".join(f"{each.label} {each.done}/{each.total}" for each in self._stack)
            self._line(f"{where}, {self._left(now)} {clean(note)}".rstrip())

    def _left(self, now: float) -> str:
        """The time left of the outermost level, the started unit inside it counted by what is done of it."""
        outer, inside = self._stack[0], 0.0
        for level in reversed(self._stack[1:]):
            inside = (level.done + inside) / level.total if level.total else 1.0
        left = estimate(now - outer.began, outer.done + min(inside, 1.0), outer.total)
        return f"{clock(left or 0.0)} left"

    def finish(self) -> None:
        if self._stack:
            level = self._stack.pop()
            if not self._stack and level.total:
                self._line(f"{level.label}: {level.done} in {clock(time.monotonic() - level.began)}")

    def say(self, text: str) -> None:
        self._line(clean(text))

    def close(self) -> None:
        self._stack.clear()

    def _line(self, text: str) -> None:
        self.file.write(text + "\n")
        self.file.flush()
