"""The only writer: whole or nothing, at every operation, also when the process dies there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from bitbrush.artifact import manifest, save
from bitbrush.engine.disk import Disk, write_bytes
from bitbrush.errors import ArtifactError, InputError, ResourceError
from bitbrush.numbers.grid import Plan


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync cannot be observed by a test, but it can be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(BaseException):
    """The process dies here."""


class Faulty(Disk):
    """Raises ``error`` at operation number ``at``, and counts."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.at, self.error, self.count = at, error or Crash(), 0
        self.log: list[str] = []

    def _op(self, kind: str, path: Path) -> None:
        self.log.append(kind)
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error


class Killed(Faulty):
    """Exits at operation ``at``, without any cleaning up."""

    def _op(self, kind: str, path: Path) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            os._exit(7)


def visible(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in manifest.list_files(folder)[0]}


def test_operations(tmp_path: Path) -> None:
    disk = Faulty()
    disk.make(tmp_path / "a" / "b")
    disk.write(tmp_path / "a" / "x", b"1")
    disk.write(tmp_path / "a" / "x", b"22")
    disk.append(tmp_path / "a" / "log", b"one\n")
    disk.append(tmp_path / "a" / "log", b"two\n")
    disk.write(tmp_path / "stage", b"adopted")
    disk.adopt(tmp_path / "stage", tmp_path / "a" / "b" / "y")
    assert visible(tmp_path) == {"a/x": b"22", "a/log": b"one\ntwo\n", "a/b/y": b"adopted"}
    disk.remove(tmp_path / "a" / "x")
    disk.remove(tmp_path / "a" / "b")
    disk.remove(tmp_path / "nothing")
    assert visible(tmp_path) == {"a/log": b"one\ntwo\n"} and sorted(os.listdir(tmp_path / "a")) == ["log"]
    assert disk.log.count("before-fsync") == disk.log.count("after-fsync") == 4
    assert {kind.split("-", 1)[1] for kind in disk.log} == {
        "make", "write", "fsync", "rename", "fsync-folder", "append", "remove"
    }


def test_write_bytes_makes_the_folder(tmp_path: Path) -> None:
    write_bytes(tmp_path / "deep" / "report.html", b"<html>")
    assert visible(tmp_path) == {"deep/report.html": b"<html>"}


def test_write_survives_every_failure(tmp_path: Path) -> None:
    counter = Faulty()
    counter.write(tmp_path / "x", b"old")
    assert counter.count >= 8
    cases = 0
    for at in range(counter.count):
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            Disk().write(tmp_path / "x", b"old")
            with pytest.raises(ResourceError) as caught:
                Faulty(at, OSError(number, "refused")).write(tmp_path / "x", b"new!")
            error = caught.value
            assert error.what and error.where and error.why and error.try_ and "bitbrush resume" in error.try_
            assert "4 bytes" in error.why and "nothing" in error.why
            assert (tmp_path / "x").read_bytes() in (b"old", b"new!")
            assert os.listdir(tmp_path) == ["x"], "no half file stays"
            cases += 1
    assert cases == 4 * counter.count


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Disk().write(tmp_path / "missing" / "x", b"")


def test_append_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    Disk().append(path, b"first\n")
    real, calls = os.write, []

    def half(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, bytes(data)[:3])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(ResourceError):
        Disk().append(path, b"second\n")
    assert path.read_bytes() == b"first\n" and calls == [7, 4]


def test_killed_at_every_operation(tmp_path: Path) -> None:
    """A forked child exits without cleaning up; then the same work is done again."""

    def work(disk: Disk, folder: Path) -> None:
        disk.make(folder / "units")
        disk.write(folder / "units" / "a", b"new")
        disk.write(folder / "stage", b"data")
        disk.adopt(folder / "stage", folder / "units" / "b")
        disk.remove(folder / "units" / "old")
        disk.append(folder / "log", b"line\n")

    counter = Faulty()
    work(counter, _prepared(tmp_path / "count"))
    died = 0
    for at in range(counter.count):
        folder = _prepared(tmp_path / str(at))
        child = os.fork()
        if child == 0:
            work(Killed(at), folder)
            os._exit(0)
        died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        found = visible(folder)
        assert found.get("units/a", b"old") in (b"old", b"new") and found.get("log", b"") in (b"", b"line\n")
        (folder / "log").unlink(missing_ok=True)
        work(Disk(), folder)
        assert visible(folder) == {"units/a": b"new", "units/b": b"data", "log": b"line\n"}
        left = {path.name for path in folder.rglob(".*")}
        assert not left, left
    assert died == counter.count >= 30


def _prepared(folder: Path) -> Path:
    (folder / "units" / "old" / "deep").mkdir(parents=True)
    (folder / "units" / "a").write_bytes(b"old")
    (folder / "units" / "old" / "deep" / "x").write_bytes(b"x")
    return folder


# ---- saving an artifact, cut short anywhere ------------------------------------------------------------------------
class FakePipeline:
    """Saves like a pipeline would, three files."""

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        (Path(folder) / "unet").mkdir(exist_ok=True)
        (Path(folder) / "model_index.json").write_text('{\n  "_name_or_path": "/home/someone/model",\n  "a": 1\n}\n')
        (Path(folder) / "unet" / "config.json").write_text("{}\n")
        (Path(folder) / "unet" / "weights.safetensors").write_bytes(bytes(1000))


def test_save_cut_short_anywhere_and_repeated_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "attach", lambda model, plan: None)
    extras = {"proof.json": b"{}\n", "history.json": b"[]\n"}
    counter = Faulty()
    save.save(FakePipeline(), tmp_path / "whole", Plan(), extras, counter)
    whole = visible(tmp_path / "whole")
    assert len(whole) == 6 and b"someone" not in b"".join(whole.values())
    assert not (tmp_path / "whole" / ".run").exists()
    cases = refused = 0
    for start in ("empty", "old"):
        for at in range(counter.count + (start == "old") * 8):
            folder = tmp_path / f"{start}{at}"
            if start == "old":
                save.save(FakePipeline(), folder, Plan(), {"proof.json": b"older\n", "recipe.toml": b"x = 1\n"})
            with pytest.raises(Crash) if at < counter.count else _perhaps():
                save.save(FakePipeline(), folder, Plan(), extras, Faulty(at))
            try:
                manifest.check(folder)
            except (ArtifactError, InputError):
                refused += 1
            else:
                assert visible(folder) == whole or start == "old"
            save.save(FakePipeline(), folder, Plan(), extras)
            assert visible(folder) == whole, at
            assert manifest.check(folder).files.keys() == whole.keys() - {manifest.NAME}
            cases += 1
    assert cases == 2 * counter.count + 8 and cases >= 150 and refused >= 80


def _perhaps() -> Any:
    import contextlib

    return contextlib.suppress(Crash)


def test_full_disk_while_diffusers_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    monkeypatch.setattr(save, "attach", lambda model, plan: None)
    cases = 0
    for failure in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        class Full(FakePipeline):
            def save_pretrained(self, folder: str, failure: Exception = failure, **kwargs: Any) -> None:
                raise failure

        with pytest.raises(ResourceError, match="disk is full"):
            save.save(Full(), tmp_path / str(cases), Plan())
        with pytest.raises(ArtifactError, match="not finished"):
            manifest.check(tmp_path / str(cases))
        cases += 1
    assert cases == 2


def test_files_of_somebody_else_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "attach", lambda model, plan: None)
    FakePipeline().save_pretrained(str(_made(tmp_path / "model")))  # the float model's own folder
    (_made(tmp_path / "letters") / "letter.txt").write_text("dear")
    before = {name: visible(tmp_path / name) for name in ("model", "letters")}
    for name in before:
        with pytest.raises(InputError, match="not the artifact's"):
            save.save(FakePipeline(), tmp_path / name, Plan())
        assert visible(tmp_path / name) == before[name]
    with pytest.raises(InputError, match="overwrite the model"):
        save.save(FakePipeline(), tmp_path / "model", Plan(), source=tmp_path / "model")
    assert len(before) == 2


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
