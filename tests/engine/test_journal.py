"""The run directory: torn lines, damaged units, states inside a unit, locks, occupied folders, fingerprints."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from bitbrush.engine.disk import Disk
from bitbrush.engine.journal import Journal, derived_seed, generator, read_lines
from bitbrush.engine.step import UnitResult
from bitbrush.errors import InputError, ResourceError
from bitbrush.numbers.grid import LayerSpec, WeightSpec
from small import complete

PRINT = {"model": "m", "recipe": "r", "seed": "0"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def opened(folder: Path, *, resume: bool = False, fingerprint: dict[str, str] | None = None) -> Journal:
    journal = Journal(folder, Disk())
    journal.open({"source": "x"}, fingerprint or PRINT, resume=resume)
    return journal


def result(value: float) -> UnitResult:
    plan = {"conv_in": LayerSpec(weight=WeightSpec(), segments=(2, 3))}
    return UnitResult({"a": torch.full((3,), value)}, plan, {"loss": value})


def begun(folder: Path, units: int = 4) -> Journal:
    journal = opened(folder)
    for i in range(units):
        journal.commit("step", f"unit {i}", result(float(i)), 0.5)
    journal.release()
    return journal


def found(folder: Path, units: int = 4) -> list[int]:
    """Numbers of the units that a resumed run would not do again."""
    journal = opened(folder, resume=True)
    try:
        return [i for i in range(units) if journal.find("step", f"unit {i}") is not None]
    finally:
        journal.release()


def test_units_come_back_as_they_were(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    journal = opened(tmp_path / "out", resume=True)
    for i in range(4):
        back = journal.find("step", f"unit {i}")
        assert back is not None and torch.equal(back.tensors["a"], torch.full((3,), float(i)))
        assert back.plan == result(0).plan and back.notes == {"loss": float(i)}
        assert journal.path_of("step", f"unit {i}").exists()
    assert journal.find("step", "unit 9") is None and journal.find("other", "unit 0") is None
    with pytest.raises(KeyError):
        journal.path_of("step", "unit 9")
    journal.release()


def test_a_torn_last_line_at_every_byte(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    path = tmp_path / "out" / ".run" / "journal.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    cuts = range(last, len(whole))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert len(read_lines(path)) == 3
    path.write_bytes(whole[:-9])
    assert found(tmp_path / "out") == [0, 1, 2]
    assert path.read_bytes() == whole[:last]  # the torn end is gone before anything is appended
    assert len(cuts) > 300


def test_a_flipped_bit_anywhere_in_a_line(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    path = tmp_path / "out" / ".run" / "journal.jsonl"
    whole = path.read_bytes()
    first, second = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1)
    for at in range(first, second + 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert len(read_lines(path)) == 1, at
    assert found(tmp_path / "out") == [0] and second - first > 300


def test_a_damaged_unit_and_all_after_it_are_done_again(tmp_path: Path) -> None:
    ran = 0
    for damaged in range(4):
        for how in ("flip", "truncate", "delete", "empty"):
            folder = tmp_path / f"{damaged}{how}"
            begun(folder)
            path = folder / ".run" / "units" / f"{damaged:05d}.safetensors"
            data = path.read_bytes()
            if how == "flip":
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            elif how == "delete":
                path.unlink()
            else:
                path.write_bytes(data[: len(data) // 2] if how == "truncate" else b"")
            assert found(folder) == list(range(damaged))
            assert len(read_lines(folder / ".run" / "journal.jsonl")) == damaged
            ran += 1
    assert ran == 16


def test_states_inside_a_unit(tmp_path: Path) -> None:
    journal = opened(tmp_path / "out")
    assert journal.load_carry("s", "u") is None
    for k in (1, 2, 3):
        journal.save_carry("s", "u", {"p": torch.full((2,), float(k))}, k)
    assert journal.load_carry("s", "other") is None
    got = journal.load_carry("s", "u")
    assert got is not None and got[0] == 3 and torch.equal(got[1]["p"], torch.full((2,), 3.0))
    files = {p.name: p.read_bytes() for p in (tmp_path / "out" / ".run").glob("carry-*")}
    assert len(files) == 2
    newest = next(n for n, d in files.items() if rb'iteration\": 3' in d)
    ran = 0
    for damage in (b"", files[newest][:40], files[newest][:-1], files[newest][:-40] + b"x" * 40, b"x" * 100):
        (tmp_path / "out" / ".run" / newest).write_bytes(damage)
        got = journal.load_carry("s", "u")
        assert got is not None and got[0] == 2  # the older one is still there
        ran += 1
    journal.save_carry("s", "u", {"p": torch.full((2,), 4.0)}, 4)  # goes over the damaged one, not over the good one
    got = journal.load_carry("s", "u")
    assert got is not None and got[0] == 4
    journal.commit("s", "u", result(0), 0.1)
    assert not list((tmp_path / "out" / ".run").glob("carry-*")) and ran == 5
    journal.release()


def test_every_changed_fingerprint_is_refused_and_named(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    ran = 0
    for key in PRINT:
        for other in ({**PRINT, key: "changed"}, {k: v for k, v in PRINT.items() if k != key}):
            with pytest.raises(InputError) as caught:
                opened(tmp_path / "out", resume=True, fingerprint=other)
            assert f"{key}: {PRINT[key]} ->" in (caught.value.why or "") and complete(caught.value)
            ran += 1
    with pytest.raises(InputError, match="new"):
        opened(tmp_path / "out", resume=True, fingerprint={**PRINT, "new": "1"})
    assert ran == 6 and found(tmp_path / "out") == [0, 1, 2, 3]


def test_a_held_lock(tmp_path: Path) -> None:
    journal = opened(tmp_path / "out")
    for resume in (True,):
        with pytest.raises(ResourceError, match="another process") as caught:
            opened(tmp_path / "out", resume=resume)
        assert complete(caught.value)
    journal.release()
    journal.release()  # twice is fine
    opened(tmp_path / "out", resume=True).release()


def test_one_winner_among_processes_that_start_together(tmp_path: Path) -> None:
    """The lock file is never replaced, so no two processes can hold two of them."""
    folder = tmp_path / "out" / ".run"
    Disk().make(folder)
    held = open(folder / "lock", "wb")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    inode = os.stat(folder / "lock").st_ino
    with pytest.raises(ResourceError):
        opened(tmp_path / "out")
    assert os.stat(folder / "lock").st_ino == inode
    held.close()
    opened(tmp_path / "out").release()


def test_occupied_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "foreign" / ".run").mkdir(parents=True)
    (tmp_path / "foreign" / ".run" / "mine").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / ".run").write_text("a file")
    begun(tmp_path / "unfinished")
    for name, word in (
        ("file", "is a file"),
        ("full", "not empty"),
        ("foreign", "not empty"),
        ("odd", "not empty"),
        ("unfinished", "unfinished run"),
    ):
        before = sorted((tmp_path / name).rglob("*"))
        with pytest.raises(InputError, match=word) as caught:
            opened(tmp_path / name)
        assert complete(caught.value) and sorted((tmp_path / name).rglob("*")) == before
    for name in ("empty", "absent", "begun"):
        if name != "absent":
            (tmp_path / name).mkdir()
        if name == "begun":  # killed before run.json was written: nothing to resume, nothing to lose
            (tmp_path / name / ".run" / "units").mkdir(parents=True)
            (tmp_path / name / ".run" / "lock").write_bytes(b"")
            (tmp_path / name / ".run" / ".run.json.part").write_bytes(b"{")
        opened(tmp_path / name).release()


def test_close_leaves_only_the_journal(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    journal = opened(tmp_path / "out", resume=True)
    (tmp_path / "out" / ".run" / "scratch").mkdir()
    journal.save_carry("step", "unit 9", {"p": torch.ones(1)}, 1)
    journal.close()
    assert [p.name for p in (tmp_path / "out" / ".run").iterdir()] == ["journal.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "out" / ".run" / "journal.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines] == [f"unit {i}" for i in range(4)]


def test_seeds_are_their_own(tmp_path: Path) -> None:
    keys = [(seed, step, unit) for seed in (0, 1) for step in ("a", "b") for unit in ("", "u", "v")]
    seeds = {derived_seed(*key) for key in keys}
    assert len(seeds) == len(keys) == 12 and all(0 <= s < 1 << 63 for s in seeds)
    a, b = (torch.randn(3, generator=generator(5, "s", "u")) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, torch.randn(3, generator=generator(6, "s", "u")))
