"""Peers' processes: what is kept when one is stopped or dies, and that they are timed one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

Script = Callable[[str], ModuleType]
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

PEER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from speed import models, peers, record, steps
made = record.Record("peer-some", Path({out!r}), record.Budget(100), run="r", smoke=True, command="c")
peer = peers.Peer("some", "torch", "torch", "call", lambda net: None)
real = steps.forwards

def stuck(**arguments):
    (Path({out!r}) / "stuck").touch()
    time.sleep(100) if {stays} else sys.exit(5)

def forwards(net, compiling, *, smoke):
    return real(net, (), smoke=smoke) | {{steps.BY_BLOCKS: stuck, steps.WHOLE: net}}

steps.forwards = forwards
peers.run(made, peer, models.find("sdxl").shrunk(), "cpu", smoke=True, way_s={limit})
"""


def peer(script: Script, folder: Path, *, limit: float = 600.0, stays: bool = True) -> tuple[int | None, Path]:
    """Run a peer that does not come back from its first compiled way; as its parent does."""
    processes, record, file = script("speed.processes"), script("speed.record"), folder / "peer-some.json"
    code = PEER.format(folder=str(FOLDER), out=str(folder), stays=stays, limit=limit)
    begun = folder / "stuck"
    end = time.monotonic() + 120

    def late() -> bool:
        return record.overdue(file) is not None if limit < 600 else begun.exists() or time.monotonic() > end

    return processes.watched([sys.executable, "-c", code], 150, dict(os.environ), late), file


@pytest.mark.parametrize("seconds, ends", [(100.0, True), (0.5, False)])
def test_warming_ends_in_time_and_leaves_nothing(
    script: Script, tmp_path: Path, seconds: float, ends: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    program, processes = script("speed.program"), script("speed.processes")
    parts = ["ceilings"] if ends else ["ceilings", "steps-dit"]
    args = program.arguments([*parts, "--smoke", "--out", str(tmp_path), "--forms", "w8a8"])
    assert processes.warmed(args.parts, args, seconds) == (parts if ends else [])
    assert not list(tmp_path.iterdir()) and capfd.readouterr().out == ""


def test_a_way_that_does_not_end_leaves_those_before_it(script: Script, tmp_path: Path) -> None:
    code, file = peer(script, tmp_path, limit=2.0)
    processes, record = script("speed.processes"), script("speed.record")
    assert code is None and "partial" in record.load(file)["items"]["sdxl"]
    assert processes.stopped(file) == "compiled by blocks did not end within 2 s"
    kept = json.loads(file.read_text())
    item = kept["items"]["sdxl"]
    assert item["ways"]["eager"]["wall_ms"] > 0 and item["turns"]["some"]["way"] == "eager" and item["run"] == "r"
    assert item["ways"]["compiled by blocks"] == {"error": "did not end within 2 s"}
    assert item["ways"]["compiled"] == {"error": "not tried: compiled by blocks did not end within 2 s"}
    assert kept["complete"] and "open" not in kept and not kept["doing"] and "partial" not in item


def test_a_peer_stopped_by_the_budget_is_tried_again_and_a_crash_is_not(script: Script, tmp_path: Path) -> None:
    processes, record = script("speed.processes"), script("speed.record")
    code, file = peer(script, tmp_path)
    assert code is None and processes.stopped(file) == "the time is up"
    found = record.load(file)
    item = found["items"]["sdxl"]
    assert item["partial"] and not found["complete"] and found["doing"] == {"sdxl": 0}
    assert item["ways"]["compiled by blocks"]["error"] == "had not ended when the time was up"
    again = opened(script, tmp_path)
    assert not again.has("sdxl")
    code, file = peer(script, tmp_path, stays=False, limit=599.0)
    assert code == 5
    again = opened(script, tmp_path)
    assert again.has("sdxl") and again.items["sdxl"]["ways"]["eager"]["wall_ms"] > 0
    assert "its process ended" in again.items["sdxl"]["ways"]["compiled by blocks"]["error"]


def opened(script: Script, folder: Path) -> Any:
    record = script("speed.record")
    return record.Record("peer-some", folder, record.Budget(50), run="r", smoke=True, command="c")


def test_a_part_of_an_item_replaces_no_larger_part(script: Script, tmp_path: Path) -> None:
    made, way = opened(script, tmp_path), {"wall_ms": 1.0}
    made.keep("sdxl", {"ways": {"eager": way, "compiled": way}})
    made.keep("sdxl", {"ways": {"eager": way, "compiled": {"error": "no"}}})
    assert made.items["sdxl"]["ways"]["compiled"] == way
    made.run = "another"
    made.keep("sdxl", {"ways": {"eager": way}})
    assert set(made.items["sdxl"]["ways"]) == {"eager"}
    made.begin("other", "eager", None, [])  # nothing was timed of it
    record = script("speed.record")
    record.close(made.file, "did not end", final=True)
    assert record.load(made.file)["errors"] == {"other": "eager did not end"}


def test_every_way_is_kept_and_the_fastest_takes_turns(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, models, made = script("speed.peers"), script("speed.models"), opened(script, tmp_path)
    seen: list[list[str]] = []
    keep = made.keep
    monkeypatch.setattr(made, "keep", lambda name, item: (seen.append(list(item["ways"])), keep(name, item)))
    quantized: list[nn.Module] = []
    some = peers.Peer("some", "torch", "torch", "call", quantized.append)
    peers.run(made, some, models.find("sdxl").shrunk(), "cpu", smoke=True, way_s=60.0, compiling="blocks")
    assert seen == [["eager"], ["eager", "compiled by blocks"]] and len(quantized) == 1
    item = made.items["sdxl"]
    assert set(item["turns"]) == {"bf16", "some"} and item["strongest"] == item["turns"]["some"]["way"]
    assert item["ways"]["compiled by blocks"]["graphs"] > 0 and "partial" not in item and made.data["complete"]


def test_a_library_that_tunes_is_first_compiled_without(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, steps = script("speed.peers"), script("speed.steps")
    config = peers.torch._inductor.config
    monkeypatch.setattr(config, "coordinate_descent_tuning", False)
    assert peers.compilations("auto", smoke=False) == (steps.BY_BLOCKS, steps.WHOLE)
    monkeypatch.setattr(config, "coordinate_descent_tuning", True)
    assert peers.compilations("auto", smoke=False) == (steps.UNTUNED, steps.BY_BLOCKS, steps.WHOLE)
    assert peers.compilations("whole", smoke=False) == (steps.WHOLE,) and peers.compilations("none", smoke=False) == ()
    assert set(steps.forwards(nn.Identity(), (steps.UNTUNED,), smoke=False)) == {"eager", steps.UNTUNED}


# ---- one at a time -----------------------------------------------------------------------------------------------
TIMED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from speed import quiet
section, log = quiet.section(Path({lock!r})), open({log!r}, "a", buffering=1)
for _ in range({rounds}):
    with section():
        log.write(f"begin {{time.monotonic()}}\\n")
        time.sleep(0.1)
        log.write(f"end {{time.monotonic()}}\\n")
    for _ in range(5):
        log.write(f"work {{time.monotonic()}}\\n")
        time.sleep(0.01)
"""


def timed(folder: Path, name: str, rounds: int) -> subprocess.Popen[bytes]:
    code = TIMED.format(folder=str(FOLDER), lock=str(folder / "lock"), log=str(folder / name), rounds=rounds)
    return subprocess.Popen([sys.executable, "-c", code], process_group=0)


def read(file: Path) -> list[tuple[str, float]]:
    return [(word, float(at)) for word, at in (line.split() for line in file.read_text().splitlines())]


def test_sections_never_overlap_and_the_others_stand_still(script: Script, tmp_path: Path) -> None:
    both = [timed(tmp_path, name, 4) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    logs = [read(tmp_path / name) for name in "ab"]
    for own, other in (logs, logs[::-1]):
        begins, ends = ([at for word, at in own if word == kind] for kind in ("begin", "end"))
        assert len(begins) == len(ends) == 4
        for begin, end in zip(begins, ends, strict=True):
            assert not [word for word, at in other if begin < at < end]


def test_who_was_stopped_by_the_dead_goes_on(script: Script, tmp_path: Path) -> None:
    quiet, lock = script("speed.quiet"), tmp_path / "lock"
    other = timed(tmp_path, "other", 400)
    while not (tmp_path / "other").exists() or not read(tmp_path / "other"):
        time.sleep(0.05)
    dying = f"import sys, os; sys.path.insert(0, {str(FOLDER)!r})\nfrom pathlib import Path\nfrom speed import quiet\n"
    dying += f"with quiet.section(Path({str(lock)!r}))(): os.kill(os.getpid(), 9)"
    dead = subprocess.Popen([sys.executable, "-c", dying], process_group=0)
    try:
        assert dead.wait(60) == -9
        lines = len(read(tmp_path / "other"))
        time.sleep(0.5)
        assert len(read(tmp_path / "other")) == lines  # stopped, and nobody there to wake it up
        quiet.leave(lock, dead.pid)
        time.sleep(1.0)
        assert len(read(tmp_path / "other")) > lines
        assert lock.read_text() == f"{other.pid}\n"
    finally:
        other.kill()
        other.wait()


def test_peers_side_by_side(script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = script("speed.program")
    words = ["peer-quanto-int8", "peer-sdnq-int8", "--smoke", "--together", "2", "--out", str(tmp_path)]
    assert program.run(program.arguments(words)) == 0
    told = capfd.readouterr()
    for name in ("quanto-int8", "sdnq-int8"):
        found = json.loads((tmp_path / f"peer-{name}.json").read_text())
        assert found["complete"] and {*found["items"], *found["errors"]} == {"sdxl"}
        assert found["items"] or found["errors"]["sdxl"].startswith("left out: ")  # whether the library is here or not
        assert f"peer-{name} on CPU" in told.out
        assert found["command"] == f"python benchmarks/speed.py peer-{name} --smoke --together 2"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "peer-quanto-int8.json", "peer-sdnq-int8.json", "run.json"]  # fmt: skip


def test_no_time_is_left_where_the_run_is_interrupted(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, processes, record = script("speed.program"), script("speed.processes"), script("speed.record")
    budget = record.Budget(100)

    def interrupted(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "in_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.together(["peer-sdnq-int8"], program.arguments(["peers", "--together", "2"]), budget)
    assert budget.left() == 0
