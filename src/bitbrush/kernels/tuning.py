"""Which cut of a product is fastest on this GPU: measured once a shape, kept on disk.

A product is exact whichever way it is cut, so this changes times and nothing else. Each new shape is tried with the
`CANDIDATES` the first time it runs outside a CUDA graph (a few milliseconds each); within a capture, and with
``BITBRUSH_TUNE=0``, a rule by shape decides. Times lie in ``bitbrush/kernels`` of the user's cache folder, one file a
GPU and version of Triton.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitbrush.kernels.triton_int8 import Config, Frame, fitting

CANDIDATES = (
    Config(128, 128, 128, 8, 8, 3), Config(64, 128, 128, 8, 4, 4), Config(128, 256, 128, 8, 8, 3),
    Config(256, 128, 128, 8, 8, 3), Config(128, 256, 128, 8, 8, 3, persistent=True), Config(128, 128, 128, 8, 4, 3),
    Config(128, 64, 128, 8, 4, 4), Config(64, 64, 128, 8, 4, 5),
    Config(128, 128, 64, 8, 4, 4, tma=False), Config(128, 128, 128, 8, 8, 4, tma=False),
    Config(64, 128, 128, 8, 4, 4, tma=False), Config(128, 64, 64, 8, 4, 5, tma=False),
    Config(64, 64, 64, 8, 4, 5, tma=False),
)  # fmt: skip
"""What was within a few percent of the fastest at some shape of SDXL or FLUX on an H200, or may be at others. Triton
3.6 and 3.7 wait for each step's product where sums are int32 (only float32 sums stay in flight), so two programs a
multiprocessor mostly beat one with a larger tile."""
RUNS, REPEATS = 8, 4
_UNTIMED: ContextVar[bool] = ContextVar("untimed", default=False)


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Cut new shapes by the rule here: where values count and times do not, as in a proof of every layer."""
    token = _UNTIMED.set(True)
    try:
        yield
    finally:
        _UNTIMED.reset(token)


@dataclass(frozen=True)
class Problem:
    """What a cut depends on."""

    rows: int
    columns: int
    widths: tuple[int, ...]
    taps: int
    stride: int

    @classmethod
    def of(cls, rows: int, columns: int, widths: tuple[int, ...], frame: Frame | None) -> Problem:
        """Of a product's shapes."""
        taps = 1 if frame is None else frame.kernel[0] * frame.kernel[1]
        return cls(rows, columns, widths, taps, 1 if frame is None else frame.stride)

    def key(self) -> str:
        """As it stands on disk."""
        return f"{self.rows}x{self.columns}x{'+'.join(map(str, self.widths))}x{self.taps}/{self.stride}"


def by_rule(problem: Problem) -> Config:
    """A cut that is never far off: large tiles where every multiprocessor gets one. Convolutions are gathered where
    128 bytes are no part of a segment, and take lower tiles where they are: more programs share a multiprocessor."""
    if -(-problem.rows // 128) * -(-problem.columns // 128) < 132:
        return Config(64, 64, 128, 8, 4, 4)
    if problem.taps == 1:
        return Config()
    whole = not any(width % 128 for width in problem.widths)
    return Config(64, 128, 128, 8, 4, 4) if whole else Config(128, 128, 64, 8, 4, 4, tma=False)


def config(problem: Problem, device: torch.device, run: Callable[[Config], Any]) -> Config:
    """The fastest cut known for a problem, or found now by running it."""
    known = _known(str(device), _file(device))
    found = known.get(problem.key())
    if found is None:
        if _UNTIMED.get() or os.environ.get("BITBRUSH_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
            return by_rule(problem)
        found = known[problem.key()] = _fastest(problem, run)
        _keep(_file(device), known)
    return found


def _fastest(problem: Problem, run: Callable[[Config], Any]) -> Config:
    best, least, tried = by_rule(problem), float("inf"), set()
    for candidate in CANDIDATES:
        place = Frame(1, 1, 1, (problem.taps, 1), 0, problem.stride) if problem.taps > 1 or problem.stride > 1 else None
        cut = fitting(candidate, problem.widths, place)
        if cut in tried:
            continue
        tried.add(cut)
        time = _time(cut, run)
        if time < least:
            best, least = cut, time
    return best


def _time(cut: Config, run: Callable[[Config], Any]) -> float:
    """Milliseconds of one run; infinite where the GPU has too little shared memory for the cut.

    Of a graph of several runs: a launch takes the host longer than a small product takes the GPU.
    """
    from triton.errors import TritonError

    try:
        run(cut)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(RUNS):
                run(cut)
    except (TritonError, RuntimeError):
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / RUNS)
    return min(times)


def _file(device: torch.device) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "bitbrush" / "kernels" / f"{_name(device)}.json"


@cache
def _name(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return f"{name}-triton-{triton.__version__}"


@cache
def _known(device: str, file: Path) -> dict[str, Config]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: replace(Config(), **cut) for key, cut in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(file: Path, known: dict[str, Config]) -> None:
    """Write all that is known; a cache that cannot be written is done without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({key: asdict(cut) for key, cut in sorted(known.items())}, indent=1) + "\n",
                        encoding="utf-8")
        part.replace(file)
    except OSError:
        return
