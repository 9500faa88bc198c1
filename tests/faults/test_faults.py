"""Disk full and kill at every disk operation of a whole run: after resuming, the artifact has the same bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import bitbrush
from bitbrush.artifact import manifest
from bitbrush.engine.disk import Disk
from bitbrush.engine.progress import Silent
from bitbrush.errors import InputError, ResourceError
from small import least_pipeline

RECIPE = """
name = "faults"
weights = 4
activations = 8
[layers]
"conv_in" = { activation = {} }
"up_blocks.0.resnets.0.conv_shortcut" = { weight = {}, activation = {} }
[[step]]
do = "calibrate"
samples = 2
trajectories = 2
steps = 2
batch = 1
[[step]]
do = "split"
[[step]]
do = "fit"
id = "weights-fit"
what = "weights"
points = 2
[[step]]
do = "reconstruct"
id = "weights"
train = "rounding"
iterations = 2
batch = 2
checkpoint = 1
[[step]]
do = "fit"
id = "activations-fit"
what = "activations"
method = "minmax"
values = 4
[[step]]
do = "pack"
[[step]]
do = "verify"
"""
SHARDS = 4
"""The points are dealt out to this many tests, so that two workers share them."""


class Killed(BaseException):
    """The process dies here: nothing cleans up."""


class Failing(Disk):
    """Raises at operation ``at`` (before or after a primitive), and counts."""

    def __init__(self, at: int = -1, error: Callable[[], BaseException] = Killed) -> None:
        self.at, self.error, self.count = at, error, 0
        self.kinds: list[str] = []

    def _op(self, kind: str, path: Path) -> None:
        self.kinds.append(kind)
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync cannot be observed by a test, but it can be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def start(folder: Path, disk: Disk) -> None:
    recipe = folder.parent / "faults.toml"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    bitbrush.quantize(least_pipeline(), recipe, output=folder, disk=disk, progress=Silent())


def go_on(folder: Path) -> str:
    """What a user does next: resume, or begin again where nothing had begun. Returns which it was."""
    try:
        bitbrush.resume(folder, least_pipeline(), disk=Disk(), progress=Silent())
        return "resumed"
    except InputError as error:
        assert error.what == "there is nothing to resume", error
        if (folder / manifest.NAME).exists():
            return "complete"
        start(folder, Disk())
        return "begun again"


def artifact(folder: Path) -> dict[str, bytes]:
    manifest.check(folder)
    return {name: (folder / name).read_bytes() for name in manifest.list_files(folder)[0]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    """Files of an uninterrupted run, and its points: before and after every primitive of the writer."""
    before, os.fsync = os.fsync, lambda descriptor: None  # type: ignore[assignment]
    try:
        folder, disk = tmp_path_factory.mktemp("whole") / "out", Failing()
        start(folder, disk)
        again = folder.with_name("again")
        start(again, Disk())
    finally:
        os.fsync = before
    files = artifact(folder)
    assert files == artifact(again), "two uninterrupted runs differ"
    names = {kind.split("-", 1)[1] for kind in disk.kinds}
    assert len(disk.kinds) >= 200 and names == {
        "make",
        "write",
        "fsync",
        "rename",
        "fsync-folder",
        "append",
        "remove",
        "stage",
    }
    assert [p.name for p in (folder / ".run").iterdir()] == ["journal.jsonl"]
    return files, disk.kinds


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("mode", ["killed", "full"])
def test_every_disk_operation(mode: str, shard: int, whole: tuple[dict[str, bytes], list[str]], tmp_path: Path) -> None:
    files, kinds = whole
    wanted = [i for i, kind in enumerate(kinds) if mode == "killed" or kind.startswith("before")]
    points = wanted[shard::SHARDS]
    outcomes: dict[str, int] = {"resumed": 0, "complete": 0, "begun again": 0}
    for at in points:
        folder = tmp_path / str(at)
        if mode == "killed":
            with pytest.raises(Killed):
                start(folder, Failing(at))
        else:
            with pytest.raises(ResourceError, match="disk is full"):
                start(folder, Failing(at, lambda: OSError(errno.ENOSPC, "full")))
        outcomes[go_on(folder)] += 1
        assert artifact(folder) == files, f"point {at} of {len(kinds)}, {kinds[at]}"
        assert [p.name for p in (folder / ".run").iterdir()] == ["journal.jsonl"], (
            f"point {at} of {len(kinds)}, {kinds[at]}"
        )
    assert sum(outcomes.values()) == len(points) >= (50 if mode == "killed" else 25)
    assert outcomes["resumed"] > 0.7 * len(points) and outcomes["begun again"] > 0, outcomes


def test_failing_again_and_again(whole: tuple[dict[str, bytes], list[str]], tmp_path: Path) -> None:
    """Killed again in every resume, a little later each time."""
    files, _ = whole
    folder, kills = tmp_path / "out", 1
    with pytest.raises(Killed):
        start(folder, Failing(40))
    while kills < 50 and not (folder / manifest.NAME).exists():
        with suppress(Killed):
            bitbrush.resume(folder, least_pipeline(), disk=Failing(20 + 5 * kills), progress=Silent())
        kills += 1
    assert go_on(folder) in ("resumed", "complete")
    assert artifact(folder) == files and 5 <= kills < 50


class Slow(Disk):
    """Two milliseconds an operation, so that a signal can come anywhere."""

    def _op(self, kind: str, path: Path) -> None:
        time.sleep(0.002)


def test_real_kills(whole: tuple[dict[str, bytes], list[str]], tmp_path: Path) -> None:
    files, kinds = whole
    rng, killed = random.Random(0), 0
    for i in range(5):
        folder = tmp_path / str(i) / "out"
        folder.parent.mkdir()
        child = os.fork()
        if child == 0:
            try:
                start(folder, Slow())
            finally:
                os._exit(0)
        while not (folder / ".run" / "run.json").exists():  # it takes a moment to begin
            time.sleep(0.002)
        time.sleep(len(kinds) * 0.002 * (i + rng.random()) / 6)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        go_on(folder)
        assert artifact(folder) == files
    assert killed >= 4
