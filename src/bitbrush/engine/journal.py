"""The run directory: lock, fingerprint, journal, and the results of finished units.

    OUT/.run/run.json        what was asked, and the fingerprint of everything that the result depends on
    OUT/.run/lock            held with a kernel file lock while a process works (freed by the kernel if it dies)
    OUT/.run/journal.jsonl   one line a finished unit, with the hash of its result file; no line = did not happen
    OUT/.run/units/*.safetensors
    OUT/.run/carry-{0,1}.safetensors   state inside a long unit, written alternately

A torn or damaged line is dropped, with all lines after it. A unit whose file no longer matches its hash is done again,
with all units after it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from bitbrush.engine.disk import Disk
from bitbrush.engine.sealed import seal, unseal
from bitbrush.engine.step import UnitResult
from bitbrush.errors import InputError, ResourceError


class Journal:
    """The durable side of one run.

    Args:
        output: The folder that will become the artifact; the run directory is ``output/.run``.
        disk: The writer.
    """

    def __init__(self, output: Path, disk: Disk) -> None:
        self.output, self.disk = output, disk
        self.folder = output / ".run"
        self.entries: list[dict[str, Any]] = []
        self._lock: Any = None
        self._carries = 0

    # ---- life --------------------------------------------------------------------------------------------------
    def open(self, asked: dict[str, Any], fingerprint: dict[str, str], *, resume: bool) -> None:
        """Create or reopen the run directory, take its lock, and check that nothing it depends on has changed."""
        if not resume:
            self.refuse_occupied()
        self.disk.make(self.folder / "units")
        with ExitStack() as undo:
            self.lock()
            undo.callback(self.release)
            if not resume:
                self.refuse_occupied()  # nobody was faster
            record = self.folder / "run.json"
            if record.exists():
                self._check_fingerprint(json.loads(record.read_text()), fingerprint)
            else:
                data = {"asked": asked, "fingerprint": fingerprint}
                self.disk.write(record, json.dumps(data, indent=1, sort_keys=True).encode())
            self.entries = read_lines(self.folder / "journal.jsonl")
            self._truncate(len(self.entries))
            undo.pop_all()

    def lock(self) -> None:
        """Take the run's lock; fails at once when another process holds it."""
        path = self.folder / "lock"
        self.disk.append(path, b"")  # creates it; never replaces a file that somebody else may have locked
        self._lock = open(path, "rb")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise ResourceError(
                "another process is working in this folder", where=str(self.output), why="its lock is held",
                try_="wait for that run to end, or choose another output folder",
            ) from error

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def abandon(self) -> None:
        """A run that was refused before its first unit ended leaves nothing to resume: it would be refused again.

        Does nothing where units ended, or the folder is not this process's.
        """
        if self._lock is None or self.entries:
            return
        self._sweep()
        self.folder.rmdir()

    def close(self) -> None:
        """After success: keep the journal as evidence, remove everything else."""
        self._sweep(keep="journal.jsonl")
        self.release()

    def _sweep(self, keep: str = "") -> None:
        """Empty the run directory. ``run.json`` goes first: without it there is nothing to resume, and what a kill
        leaves behind is swept up by the next call."""
        if (self.folder / "run.json").exists():
            self.disk.remove(self.folder / "run.json")
        for path in sorted(self.folder.iterdir()) if self.folder.exists() else []:
            if path.name != keep:
                self.disk.remove(path)

    # ---- units -------------------------------------------------------------------------------------------------
    def find(self, step: str, unit: str) -> UnitResult | None:
        """The stored result of a unit, or None when it has to be done (again)."""
        for i, entry in enumerate(self.entries):
            if (entry["step"], entry["unit"]) != (step, unit):
                continue
            try:
                data = (self.folder / entry["file"]).read_bytes()
            except OSError:
                data = b""
            if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                return UnitResult.of(load(data), entry)
            self._truncate(i)
            return None
        return None

    def commit(self, step: str, unit: str, result: UnitResult, seconds: float) -> None:
        """Make a unit's result durable: its file first, then one journal line."""
        name = f"units/{len(self.entries):05d}.safetensors"
        data = save({k: v.detach().cpu().contiguous() for k, v in result.tensors.items()})
        self.disk.write(self.folder / name, data)
        entry = {
            "step": step, "unit": unit, "file": name, "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(seconds, 3), **result.facts(),
        }
        entry["check"] = _check(entry)
        self.disk.append(self.folder / "journal.jsonl", json.dumps(entry, sort_keys=True).encode() + b"\n")
        self.entries.append(entry)
        self.drop_carry()

    def path_of(self, step: str, unit: str) -> Path:
        """The result file of a finished unit."""
        for entry in self.entries:
            if (entry["step"], entry["unit"]) == (step, unit):
                return Path(self.folder / entry["file"])
        raise KeyError((step, unit))

    def _truncate(self, count: int) -> None:
        """Forget the entries from ``count`` on, on disk too (and a torn last line)."""
        path = self.folder / "journal.jsonl"
        self.entries = self.entries[:count]
        text = b"".join(json.dumps(e, sort_keys=True).encode() + b"\n" for e in self.entries)
        if path.exists() and path.read_bytes() != text:
            self.disk.write(path, text)

    # ---- carry -------------------------------------------------------------------------------------------------
    def save_carry(self, step: str, unit: str, tensors: dict[str, Tensor], iteration: int) -> None:
        """Keep the state inside a long unit; two files alternate, so a torn write never loses the last one."""
        data = seal(tensors, {"step": step, "unit": unit, "iteration": iteration})
        self.disk.write(self.folder / f"carry-{self._carries % 2}.safetensors", data)
        self._carries += 1

    def load_carry(self, step: str, unit: str) -> tuple[int, dict[str, Tensor]] | None:
        """The newest intact state of this unit: (iteration, tensors)."""
        best: tuple[int, dict[str, Tensor]] | None = None
        for i in (0, 1):
            path = self.folder / f"carry-{i}.safetensors"
            found = _read_carry(path, step, unit) if path.exists() else None
            if found is not None and (best is None or found[0] > best[0]):
                best, self._carries = found, i + 1
        return best

    def drop_carry(self) -> None:
        """Forget states inside units, when the unit is done."""
        for i in (0, 1):
            if (self.folder / f"carry-{i}.safetensors").exists():
                self.disk.remove(self.folder / f"carry-{i}.safetensors")

    # ---- checks ------------------------------------------------------------------------------------------------
    def refuse_occupied(self) -> None:
        """Raise `InputError` unless the output is absent, empty, or what a run left that was killed as it began."""
        if self.output.exists() and not self.output.is_dir():
            raise InputError("the output is a file", where=str(self.output), why="a folder is needed",
                             try_="choose another -o")
        if (self.folder / "run.json").exists():
            raise InputError(
                "the output folder holds an unfinished run", where=str(self.output), why=".run/run.json is there",
                try_=f"bitbrush resume {self.output}",
            )
        if self.output.exists() and any(p.name != ".run" or not _unbegun(p) for p in self.output.iterdir()):
            raise InputError("the output folder is not empty", where=str(self.output),
                             why="bitbrush never overwrites what it did not make in this run",
                             try_="choose another -o or remove the folder")

    def _check_fingerprint(self, record: dict[str, Any], fingerprint: dict[str, str]) -> None:
        old = record["fingerprint"]
        changed = sorted(k for k in {*old, *fingerprint} if old.get(k) != fingerprint.get(k))
        if changed:
            facts = "; ".join(f"{k}: {str(old.get(k))[:60]} -> {str(fingerprint.get(k))[:60]}" for k in changed)
            raise InputError(
                "the run cannot be resumed: something it depends on has changed", where=str(self.output), why=facts,
                try_="start again in a new folder, or restore what changed",
            )


def _unbegun(folder: Path) -> bool:
    """Whether a run directory holds nothing: a run that was killed before it wrote down what was asked."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        p.name in ("lock", ".run.json.part") or (p.name == "units" and not any(p.iterdir())) for p in folder.iterdir()
    )


def _read_carry(path: Path, step: str, unit: str) -> tuple[int, dict[str, Tensor]] | None:
    whole = unseal(path.read_bytes())
    if whole is None or (whole[1].get("step"), whole[1].get("unit")) != (step, unit):
        return None
    return int(whole[1]["iteration"]), whole[0]


def _check(entry: dict[str, Any]) -> str:
    body = {k: v for k, v in entry.items() if k != "check"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a journal file, up to the first line that is torn or damaged (its ``check`` does not fit)."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or entry.get("check") != _check(entry):
            break
        entries.append(entry)
    return entries


def derived_seed(seed: int, step: str, unit: str) -> int:
    """A 63-bit seed from (seed, step, unit), so that no random state has to be saved."""
    digest = hashlib.sha256(f"{seed}/{step}/{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, step: str, unit: str) -> torch.Generator:
    """The CPU generator of one unit."""
    return torch.Generator().manual_seed(derived_seed(seed, step, unit))

