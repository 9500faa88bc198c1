"""Seconds on a device. On CUDA: launches captured in a graph, replays between two events, contestants in turns. On a
CPU (smoke runs): the clock on the wall.

What is timed is given as a list of calls over different data, so that one replay goes through more bytes than the
second-level cache holds, and no call finds its inputs there (`sets`); where the data is larger, one is enough.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Numbers = dict[str, float]
REPLAY_SECONDS = 2e-3
MOST_SETS = 12


def sets(bytes_of_one: int, device: str) -> int:
    """How many sets of data of ``bytes_of_one`` it takes to leave three times the second-level cache behind."""
    if device != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20) or (50 << 20)
    return max(1, min(MOST_SETS, -(-3 * cache // max(bytes_of_one, 1))))


def kernels(contestants: Mapping[str, Sequence[Call]], device: str, *, rounds: int = 15) -> dict[str, Numbers]:
    """Microseconds a call of each contestant: median and quartiles over the rounds, in which all take turns.

    Args:
        contestants: Name to calls over different data; all are counted as one kind.
        device: ``cuda`` or ``cpu``.
        rounds: Turns.
    """
    if device != "cuda":
        works = {name: (_all(calls), len(calls)) for name, calls in contestants.items()}
    else:
        works = {name: _graph_of_many(calls) for name, calls in contestants.items()}
    once = {name: work for name, (work, _) in works.items()}
    found = turns(once, device, rounds if device == "cuda" else 2)
    return {
        name: {key: value * 1e6 / works[name][1] for key, value in numbers(values).items()} | {"rounds": len(values)}
        for name, values in found.items()
    }


def turns(works: Mapping[str, Call], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, one number a round; the order rotates, so that what drifts serves all alike."""
    names, found = list(works), {name: list[float]() for name in works}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(seconds(works[name], device))
    return found


def numbers(values: Sequence[float]) -> Numbers:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def seconds(work: Call, device: str) -> float:
    """Time of one call: between events on the GPU, else on the wall."""
    if device != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def wall(work: Call, device: str, *, steps: int) -> float:
    """Seconds a call on the wall, of ``steps`` calls one after the other; the device is waited for at the end only."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def captured(work: Call, *, warm: int = 3) -> tuple[Any, Any]:
    """A CUDA graph of one call, and what the call returned (its memory is written by every replay)."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    torch.cuda.synchronize()
    return graph, out


def _graph_of_many(calls: Sequence[Call]) -> tuple[Call, int]:
    """A replay of all calls, repeated until it takes `REPLAY_SECONDS`, and how many calls that is."""
    for call in calls:
        call()
    once = min(seconds(_all(calls), "cuda") for _ in range(3))
    repeats = max(1, min(200, round(REPLAY_SECONDS / max(once, 1e-6))))
    graph, kept = captured(_all(list(calls) * repeats), warm=1)
    graph.kept = kept  # memory that replays write
    graph.replay()
    return graph.replay, len(calls) * repeats


def _all(calls: Sequence[Call]) -> Call:
    def work() -> None:
        for call in calls:
            call()

    return work
