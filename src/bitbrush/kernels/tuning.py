"""Which cut of a product is fastest on this GPU: measured once a shape, kept on disk.

A product is exact whichever way it is cut, so this changes times and nothing else. Each new shape is tried with the
`CANDIDATES` the first time it runs outside a CUDA graph (a few milliseconds each); within a capture, and with
``BITBRUSH_TUNE=0``, a rule by shape decides. Times lie in ``bitbrush/kernels`` of the user's cache folder, one file a
GPU, version of Triton and set of cuts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitbrush.kernels import building, gluon_int8, triton_split
from bitbrush.kernels.gluon_int8 import PAIR, TURNS
from bitbrush.kernels.triton_int8 import Config, Frame, fitting
from bitbrush.kernels.triton_int8 import processors as _processors

CANDIDATES = (
    Config(128, 128, 128, 8, 8, 3), Config(128, 128, 128, 8, 4, 3),
    Config(64, 128, 128, 8, 4, 3, together=3), Config(64, 128, 128, 8, 4, 4),
    Config(128, 256, 128, 8, 8, 4, together=1),
    Config(64, 64, 128, 8, 4, 8, together=1), Config(64, 32, 128, 8, 4, 8),
)  # fmt: skip
"""With copies by the tensor memory accelerator. The products of a step are waited for before those of the next begin
(Triton keeps none with int32 sums in flight), so what hides a program's waits is another program on its processor: two
of 128 x 128, three of 64 x 128 with three stages. Few rows leave a processor one program: small tiles, deep pipelines.
Never the fastest at 13 shapes on an H200 and gone: 256 rows, 256 columns of 4 warps, 64 columns beside 128 rows, blocks
of 256 columns or of 64 with these copies, programs that go through several tiles."""
GATHERED = (
    Config(128, 128, 64, 8, 4, 4, tma=False), Config(64, 128, 128, 8, 4, 3, tma=False, together=3),
    Config(64, 64, 64, 8, 4, 5, tma=False, together=4),
)  # fmt: skip
"""With pointers: for convolutions with a stride, and beside the others for those without (at 320 channels the fastest
by 14 %; for linear layers never by 2 %)."""
FLOWS = (
    Config(128, 128, 128, 8, 8, 5, flow=PAIR), Config(128, 160, 128, 4, 8, 5, flow=PAIR),
    Config(256, 160, 128, 4, 8, 3, flow=PAIR), Config(128, 128, 128, 8, 8, 4, flow=TURNS),
    Config(128, 160, 128, 4, 8, 4, flow=TURNS), Config(128, 192, 128, 8, 8, 4, flow=TURNS),
)  # fmt: skip
"""Written out in Gluon, on GPUs that can (`gluon_int8.able`). One of them was the fastest of 14, or within 3 %
of it, at each of ten shapes on an H200 (benchmarks/spike_gluon_product.py)."""
GATED_FLOWS = (
    Config(128, 128, 128, 8, 8, 5, flow=PAIR), Config(128, 256, 128, 8, 8, 4, flow=PAIR),
    Config(128, 128, 128, 8, 8, 4, flow=TURNS),
)  # fmt: skip
WORSE, ALONE = 1.35, 1.35
"""Cuts are tried whose `cost` is at most WORSE times the least. A program that has its processor alone takes ALONE
times as long: 128 x 256 beside 128 x 128 at 2048 x 10240 x 1280 on an H200."""
SHARED = 227 * 1024
"""Bytes of a processor."""
MERGE, SPLITS = 5000, 4
"""Cycles of the kernel that adds parts: about 3 us, of a launch and of what it reads. How many of a kind are tried."""
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


class Problem(NamedTuple):
    """What a cut depends on. parts: layers in one product that have codes of their own; gated: `triton_int8.gated`;
    lines: rows of a frame from its first output to its last, of a convolution that counts them."""

    rows: int
    columns: int
    widths: tuple[int, ...]
    taps: int
    stride: int
    parts: int = 1
    gated: bool = False
    lines: int = 0

    @classmethod
    def of(cls, rows: int, columns: int, widths: tuple[int, ...], frame: Frame | None) -> Problem:
        """Of a product's shapes."""
        if frame is None:
            return cls(rows, columns, widths, 1, 1)
        lines = frame.lines if frame.stride == 1 else 0
        return cls(rows, columns, widths, frame.kernel[0] * frame.kernel[1], frame.stride, lines=lines)

    def key(self) -> str:
        """As it stands on disk."""
        kind = (f"*{self.parts}" if self.parts > 1 else "") + "g" * self.gated
        return f"{self.rows}x{self.columns}x{'+'.join(map(str, self.widths))}x{self.taps}/{self.stride}{kind}"


def cuts(problem: Problem, processors: int, written_out: bool = False) -> list[Config]:
    """What is worth trying, as it fits the problem: of each kind the cheapest by `cost` first, those that split sums
    last.

    Args:
        written_out: Those in Gluon, too; before the others.
    """
    place = Frame(1, 1, 1, (problem.taps, 1), 0, problem.stride) if problem.taps > 1 or problem.stride > 1 else None
    given = GATHERED if problem.stride > 1 else CANDIDATES if place is None else (*CANDIDATES, *GATHERED)
    ahead = flows(problem) if written_out else ()
    kinds = [(family, _cheap(family, problem, place, processors)) for family in (ahead, given)]
    split = [cut for family, whole in kinds for cut in _cheap_splits(family, whole, problem, place, processors)]
    return [*kinds[0][1], *kinds[1][1], *split]


def _cheap_splits(
    family: tuple[Config, ...], whole: list[Config], problem: Problem, place: Frame | None, processors: int
) -> list[Config]:
    """The cheapest of a kind's cuts with split sums, if they cost less than the cheapest without."""
    every = tuple(each for cut in family for each in splits(cut, problem, processors))
    least = min((cost(cut, problem, processors) for cut in whole), default=0.0)
    found = _cheap(every, problem, place, processors) if every else []
    return [cut for cut in found if cost(cut, problem, processors) < least][:SPLITS]


def splits(cut: Config, problem: Problem, processors: int) -> list[Config]:
    """A cut with its sums split, where its tiles leave half of the processors idle or more: so that all have a part, or
    two."""
    if problem.gated or problem.parts > 1 or len(problem.widths) > 1 or cut.flow == TURNS:
        return []
    tiles, steps = _tiles(cut, problem), -(-problem.widths[0] // cut.bk) * problem.taps
    many = {min(rounds * processors // tiles, steps // triton_split.STEPS, triton_split.MOST)
            for rounds in range(1, 2 if cut.flow else 1 + min(2, cut.together))}  # fmt: skip
    return [replace(cut, split_k=n) for n in sorted(many) if n > 1]


def flows(problem: Problem) -> tuple[Config, ...]:
    """Of the cuts written out in Gluon those that a problem allows."""
    if problem.stride > 1:
        return ()
    count = len(problem.widths)
    return tuple(cut for cut in (GATED_FLOWS if problem.gated else FLOWS)
                 if gluon_int8.fits(cut.flow, cut.bm, cut.bn, count, problem.gated))  # fmt: skip


def _cheap(
    family: tuple[Config, ...], problem: Problem, place: Frame | None, processors: int
) -> list[Config]:
    """Of cuts of one kind, whose costs compare, those that do not cost much more than the cheapest; that one first."""
    costs = {cut: cost(cut, problem, processors) for cut in (fitting(cut, problem.widths, place) for cut in family)}
    return sorted((cut for cut in costs if costs[cut] <= WORSE * min(costs.values())), key=costs.__getitem__)


def cost(cut: Config, problem: Problem, processors: int) -> float:
    """How long a cut takes, in no unit, from what its tiles multiply and copy and the rounds of tiles on a processor.

    For each column a tile takes ``bm * bn / 4096`` (int8 products of a processor a cycle), ``(bm + bn) / 32`` (bytes
    copied) and 1 (waiting), one after the other, as is fitting for products that are waited for. Pointers take 1.15
    times as long, copies of rows of less than 128 bytes 1.3 times. Fitted to 13 shapes on an H200
    (benchmarks/tune_int8.py).

    With a flow copies and products overlap, and what is left is the writing of a tile: for each of its numbers 0.19
    cycles, 0.12 where warpgroups take turns (benchmarks/results/spike/gluon_product.json). In another unit.

    Where sums are split, each program has a part of the columns, and MERGE cycles are for the kernel that adds.
    """
    tiles = _tiles(cut, problem) * cut.split_k
    rounds = -(-tiles // processors)
    columns = sum(-(-width // cut.bk) * cut.bk for width in problem.widths) * problem.taps
    if cut.split_k > 1:
        whole = replace(cut, split_k=1)
        few = Problem(tiles * cut.bm, cut.bn, (-(-columns // cut.split_k),), 1, 1)
        return cost(whole, few, processors) / cut.split_k + MERGE / columns
    if cut.flow:
        each = 0.19 if cut.flow == PAIR else 0.12 if rounds > 1 else 0.25  # who is alone has nobody to write beside
        written = each * cut.bm * cut.bn / columns
        return rounds * (max(cut.bm * cut.bn / 4096, (cut.bm + cut.bn) / 64) * 1.12 + written)
    together = min(rounds, cut.together, SHARED // (cut.stages * (cut.bm + cut.bn) * cut.bk))
    copies = (1.0 if cut.bk >= 128 else 1.3) if cut.tma else 1.15
    return rounds * (cut.bm * cut.bn / 4096 + (cut.bm + cut.bn) / 32 + 1) * copies * (1 if together > 1 else ALONE)


def _tiles(cut: Config, problem: Problem) -> int:
    rows = problem.lines or problem.rows if cut.tma else problem.rows
    return -(-rows // cut.bm) * problem.parts * -(-problem.columns // (problem.parts * cut.bn))


@cache
def by_rule(problem: Problem, processors: int = 132, written_out: bool = False) -> Config:
    """A cut that is never far off: the one of least `cost`, of those in Gluon if there are any."""
    return cuts(problem, processors, written_out)[0]


def config(problem: Problem, device: torch.device, run: Callable[[Config], Any]) -> Config:
    """The fastest cut known for a problem, or found now by running it."""
    met = _MET.get((problem, device))
    return _met(problem, device, run) if met is None else met


_MET: dict[tuple[Problem, torch.device], Config] = {}
"""Cuts that this process has asked for: to find the file and a key in it takes as long as a launch."""


def forget() -> None:
    """Read again what lies on disk."""
    _MET.clear()
    _known.cache_clear()


def _met(problem: Problem, device: torch.device, run: Callable[[Config], Any]) -> Config:
    known = _known(str(device), _file(device))
    found = known.get(problem.key())
    if found is None:
        if _UNTIMED.get() or os.environ.get("BITBRUSH_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
            return by_rule(*_given(problem, device))
        if building.noting():
            for cut in cuts(*_given(problem, device)):
                run(cut)
            return by_rule(*_given(problem, device))
        found = known[problem.key()] = _fastest(problem, device, run)
        _keep(_file(device), known)
    _MET[problem, device] = found
    return found


def _fastest(problem: Problem, device: torch.device, run: Callable[[Config], Any]) -> Config:
    times = {cut: _time(cut, run) for cut in cuts(*_given(problem, device))}
    return min(times, key=times.__getitem__)


def _given(problem: Problem, device: torch.device) -> tuple[Problem, int, bool]:
    return problem, _processors(device), gluon_int8.able(device)


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
    tried = hashlib.sha256(repr((CANDIDATES, GATHERED, FLOWS, GATED_FLOWS, gluon_int8.ROWS)).encode()).hexdigest()[:8]
    return f"{name}-triton-{triton.__version__}-cuts-{tried}"


@cache
def _known(device: str, file: Path) -> dict[str, Config]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        cuts = {key: replace(Config(), **cut) for key, cut in found.items()}
        return {key: cut for key, cut in cuts.items() if not cut.flow or gluon_int8.able(torch.device(device))}
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
