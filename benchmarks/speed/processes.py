"""One process a part: stopped when its time is up, called again where it ended early; several side by side."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speed import quiet, record
from speed.record import Budget

HERE = Path(__file__).resolve().parents[1]
START = 20.0
"""Seconds under which no process is started: it would end while it imports."""
RETRIES = 3
FOREIGN = 4
"""Exit code of a process that found a file of another machine."""
LOOK = 0.5
"""Seconds between two looks at a process."""


def together(parts: Sequence[str], args: argparse.Namespace, budget: Budget) -> None:
    """Parts in processes side by side, ``args.together`` at once: they share the budget, and are timed in turn."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.together) as pool:
        lock = Path(folder) / "timing"
        try:
            list(pool.map(lambda part: in_process(part, args, budget, args.forms, lock), parts))
        except BaseException:
            budget.end()  # else the processes would go on until it ends by itself
            raise


def warmed(parts: Sequence[str], args: argparse.Namespace, seconds: float) -> list[str]:
    """Run parts side by side and throw away what they measure, for at most so many seconds: what they compile is in the
    caches when each is timed by itself. The cuts of products that they choose, beside each other, are thrown away, too.

    Returns:
        Those that ended by themselves.
    """

    def one(part: str) -> bool:
        words = child(part, args, "warm", Path(folder) / part, seconds, seconds, args.forms)
        env = environment(part, args) | {"XDG_CACHE_HOME": folder}
        return watched(words, seconds, env, output=subprocess.DEVNULL) is not None

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, len(parts))) as pool:
        ended = list(pool.map(one, parts))
    return [part for part, by_itself in zip(parts, ended, strict=True) if by_itself]


def in_process(
    part: str, args: argparse.Namespace, budget: Budget, some: list[str] | None, lock: Path | None = None
) -> None:
    """Measure a part (its forms, where only ``some`` are wanted) in a process of its own, again where that ended before
    its time; stopped when the time is up, or that of the way it compiles."""
    file = args.out / f"{part}.json"
    for _ in range(RETRIES):
        if budget.left() < START:
            return
        words = child(part, args, args.run, args.out, budget.left() - 8, args.way, some)
        words += ["--lock", str(lock), "--together", str(args.together)] if lock else []
        code = watched(words, budget.left() - 3, environment(part, args),
                       lambda: budget.left() < 3 or record.overdue(file) is not None, lock)
        if code in (0, FOREIGN):
            return
        if code is None:
            print(f"{part}: stopped, {stopped(file)}", file=sys.stderr, flush=True)
            return
        print(f"{part}: its process ended with {code}", file=sys.stderr, flush=True)


def child(
    part: str, args: argparse.Namespace, run: str, out: Path, budget: float, way: float, forms: Sequence[str] | None
) -> list[str]:
    """What calls a part in a process of its own."""
    words = [sys.executable, str(HERE / "speed.py"), part, "--child", "--run", run, "--out", str(out)]
    words += ["--budget", f"{budget:.0f}", "--compile", args.compile, "--way", f"{way:g}"]
    return words + (["--smoke"] if args.smoke else []) + (["--forms", *forms] if forms else [])


def watched(
    words: list[str], seconds: float, env: dict[str, str], late: Callable[[], bool] = lambda: False,
    lock: Path | None = None, output: int | None = None,
) -> int | None:
    """Exit code of a process, None where it was stopped because it ran past its time or is ``late``."""
    end = time.monotonic() + seconds
    with subprocess.Popen(
        words, env=env, stdout=output, stderr=output, process_group=0  # those who compile for it end with it
    ) as process:
        try:
            while (left := end - time.monotonic()) > 0 and not late():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, LOOK))
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if lock is not None:
                quiet.leave(lock, process.pid)


def stopped(file: Path) -> str:
    """Write down what a process that was stopped had not ended, and say why it was stopped."""
    way = record.overdue(file)
    if way is not None:
        record.close(file, f"did not end within {way['limit_s']:g} s", final=True)
        return f"{way['way']} did not end within {way['limit_s']:g} s"
    record.close(file, "had not ended when the time was up", final=False)
    forget(file)
    return "the time is up"


def environment(part: str, args: argparse.Namespace) -> dict[str, str]:
    """For a part's process: the libraries of a peer, one cache of compiled kernels for all, and its share of the cores
    for compiling where several do."""
    env = dict(os.environ)
    if args.together > 1:
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // args.together)))
    if part.startswith("peer-") and args.site is not None:
        folder = args.site / part.removeprefix("peer-").partition("-")[0]
        env["PYTHONPATH"] = os.pathsep.join([str(folder.resolve()), *filter(None, [env.get("PYTHONPATH")])])
    return env


def forget(file: Path) -> None:
    """An item that was stopped for lack of time did not end the process: it may be tried as often as before."""
    found = record.load(file)
    if found is not None and found["doing"]:
        name = list(found["doing"])[-1]
        found["doing"][name] -= 1
        record.write(file, found)
