"""Several processes on one machine that compile side by side and are timed one at a time.

A timing section has the lock of a file to itself, and while it lasts every other process that joined is stopped
(SIGSTOP, with the workers that compile for it): nothing of theirs is launched on the GPU or runs on the CPU. A lock
alone, shared by those who compile, would not do: a compilation of minutes would hold it for minutes. The kernel gives
the lock back when its holder dies; `leave` wakes up those whom the dead stopped.

    FILE    a line a process group that joined; its lock is flock's
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

Section = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes the context of one timing section."""
SETTLE = 0.5
"""Seconds for the GPU to finish what the stopped had launched: some steps at most."""


def section(file: Path | None) -> Section:
    """Timing sections of this process, which joins; without a file it is alone anyway."""
    if file is None:
        return contextlib.nullcontext
    with _locked(file) as handle:
        _write(handle, {*_groups(handle), os.getpgrp()})
    return lambda: alone(file)


@contextlib.contextmanager
def alone(file: Path, settle: float = SETTLE) -> Iterator[None]:
    """The lock, and all others that joined stopped until the end."""
    with _locked(file) as handle:
        others = _groups(handle) - {os.getpgrp()}
        try:
            _send(others, signal.SIGSTOP)
            time.sleep(settle if others else 0)
            yield
        finally:
            _send(others, signal.SIGCONT)


def leave(file: Path, group: int) -> None:
    """Forget a process that ended, for its parent. Who is stopped now was stopped by it, since nobody has the lock."""
    with _locked(file) as handle:
        others = _groups(handle) - {group}
        _write(handle, others)
        _send(others, signal.SIGCONT)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[IO[str]]:
    with file.open("a+", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle  # closing gives the lock back


def _groups(handle: IO[str]) -> set[int]:
    handle.seek(0)
    return {int(line) for line in handle}


def _write(handle: IO[str], groups: set[int]) -> None:
    handle.truncate(0)
    handle.writelines(f"{group}\n" for group in sorted(groups))
    handle.flush()


def _send(groups: set[int], what: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, what)
