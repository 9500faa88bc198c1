"""A part's JSON: written after every item, so that a killed run keeps what it had, and found again by the next call.

    OUT/<part>.json   {"part", "command", "machine", "smoke", "items": {name: {.., "run"}}, "errors": {name: why},
                       "doing": {name: tries}, "complete"[, "open": {"item", "way", "begun", "limit_s", "rest"}]}

An item of several ways that take long each is kept after every way, as ``partial`` until its last; ``open`` is the way
that is being measured, and tells whoever stops the process, or finds that it ended, what is missing.

``run`` names the process that measured an item. Two numbers are put in proportion only when they were measured in one
run of the script on one machine; what needs a baseline carries the one that was timed in turns with it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Item = dict[str, Any]
TRIES = 2
"""How often an item may end the process before it is left out."""


class Foreign(Exception):
    """A file of another machine, or of a smoke run where this is none."""


class Budget:
    """Seconds that are left, from the moment this is made."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._end - time.monotonic())

    def end(self) -> None:
        """Leave none."""
        self._end = time.monotonic()


class Record:
    """One part: its items, and whether there is time for another.

    Args:
        part: Name of the part, and of its file.
        folder: Where results are kept.
        budget: Of this process.
        run: Name of this run of the script.
        smoke: Whether this only shows that everything runs.
        command: What gives these results again.

    Raises:
        Foreign: The file is of another machine, or one is a smoke run and the other is not.
    """

    def __init__(self, part: str, folder: Path, budget: Budget, *, run: str, smoke: bool, command: str) -> None:
        self.part, self.file, self.budget, self.run = part, folder / f"{part}.json", budget, run
        self.data: dict[str, Any] = {
            "part": part, "command": command, "machine": machine(), "smoke": smoke, "items": {}, "errors": {},
            "doing": {}, "complete": False,
        }
        self.left_out: list[str] = []
        found = load(self.file)
        if found is None:
            return
        same = all(found["machine"].get(key) == self.data["machine"].get(key) for key in ("device", "torch"))
        if found["smoke"] != smoke or not same:
            raise Foreign(f"{self.file} is of {'a smoke run' if found['smoke'] else found['machine']['device']}: "
                          "give another --out")
        self.data |= {key: found[key] for key in ("items", "errors", "doing", "open") if key in found}
        if "open" in self.data:
            _shut(self.data, "was being measured when its process ended", final=True)
            self.save()

    @property
    def items(self) -> dict[str, Item]:
        """What has been measured so far, also by earlier runs."""
        return dict(self.data["items"])

    def has(self, name: str) -> bool:
        """Whether an item needs no measuring: it is there, failed, or ended the process too often."""
        tries = self.data["doing"].get(name, 0)
        there = name in self.data["errors"] or not self.data["items"].get(name, {"partial": True}).get("partial")
        if not there and tries >= TRIES:
            self.data["errors"][name] = "the process ended while it was measured"
            self.save()
        return there or name in self.data["errors"]

    def measure(self, name: str, seconds: float, work: Callable[[], Item], *, again: bool = False) -> Item | None:
        """The item: found, or measured now where ``seconds`` are left for it. What it raises is written down.

        Args:
            name: Of the item.
            seconds: What it may take.
            work: Measures it.
            again: Measure it also where it is known; what was known stays until it is there.

        Returns:
            None where it failed, or there was no time.
        """
        if self.has(name) and not (again and name in self.data["items"]):
            return self.items.get(name)
        if self.budget.left() < seconds:
            self.left_out.append(name)
            return None
        self.data["doing"][name] = self.data["doing"].get(name, 0) + 1
        self.save()
        begin = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever ends an item is what is to be told
            self.fail(name, told(error))
            return None
        self.data["items"][name] = found | {"run": self.run, "took_s": round(time.perf_counter() - begin, 1)}
        self.data["doing"].pop(name)
        self.data.pop("open", None)
        self.save()
        print(f"{self.part}: {name} in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        return self.items[name]

    def begin(self, name: str, way: str, limit_s: float | None, rest: Sequence[str]) -> None:
        """Say which way of an item is measured now, what it may take, and which ways are to follow."""
        self.data["open"] = {"item": name, "way": way, "begun": time.time(), "limit_s": limit_s, "rest": [*rest]}
        self.save()

    def keep(self, name: str, item: Item) -> None:
        """An item as it is before all of its ways are measured; one of this run that has more ways stays."""
        self.data.pop("open", None)
        old = self.data["items"].get(name)
        if old is None or old["run"] != self.run or _timed(old) <= _timed(item):
            self.data["items"][name] = item | {"run": self.run, "partial": True}
        self.save()

    def fail(self, name: str, why: str) -> None:
        """Write down why there is no such item, or no more of it."""
        self.data["errors"][name] = why
        self.data["doing"].pop(name, None)
        self.data.pop("open", None)
        self.save()
        print(f"{self.part}: {name}: {why}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Say that nothing of the part is missing, unless something was left out for lack of time."""
        self.data["complete"] = not self.left_out
        self.save()
        if self.left_out:
            print(f"{self.part}: no time left for {', '.join(self.left_out)}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Write the file as a whole, or not at all."""
        write(self.file, self.data)


def write(file: Path, data: dict[str, Any]) -> None:
    """A file as a whole, or none: what was there stays until the new one is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}.new")
    whole.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    whole.replace(file)


def load(file: Path) -> dict[str, Any] | None:
    """A part's data; None where there is none, or it is not whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"items", "errors", "machine", "smoke"} <= set(found) else None


def overdue(file: Path) -> dict[str, Any] | None:
    """The way of a part's item that is being measured and takes longer than it may."""
    way: dict[str, Any] | None = (load(file) or {}).get("open")
    if way is None or way["limit_s"] is None or time.time() - way["begun"] <= way["limit_s"]:
        return None
    return way


def close(file: Path, why: str, *, final: bool) -> None:
    """Write down for a process that was stopped why its way is missing; unless that is final, a later call measures the
    item again."""
    found = load(file)
    if found is not None and "open" in found:
        _shut(found, why, final=final)
        write(file, found)


def _shut(data: dict[str, Any], why: str, *, final: bool) -> None:
    """Name the way that was open, and those that were to follow it and take longer still, among an item's ways."""
    way = data.pop("open")
    name, item = way["item"], data["items"].get(way["item"])
    if item is not None and item.get("partial"):
        item["ways"].setdefault(way["way"], {"error": why})
        for other in way["rest"]:
            item["ways"].setdefault(other, {"error": f"not tried: {way['way']} {why}"})
    if not final:
        return
    if item is not None:
        item.pop("partial", None)
    else:
        data["errors"][name] = f"{way['way']} {why}"
    data["doing"].pop(name, None)
    data["complete"] = not any(one.get("partial") for one in data["items"].values())


def _timed(item: Item) -> int:
    """How many ways of an item work."""
    return sum("error" not in way for way in item["ways"].values())


def told(error: BaseException) -> str:
    """Kind and words of an error on one line of at most 400 characters, without places of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for place, name in ((sys.prefix, "ENVIRONMENT"), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        text = text.replace(place.rstrip("/") + "/", name + "/") if len(place) > 1 else text
    return text[:400]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "device": "CPU", "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "triton": version("triton"), "diffusers": version("diffusers"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


def version(distribution: str) -> str | None:
    """Of an installed distribution."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
