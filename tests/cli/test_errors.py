"""Every error ends as four parts and one exit code, on the screen or as JSON, and never as a traceback."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

import bitbrush
from bitbrush import errors
from bitbrush.cli import main

FAMILIES = {
    errors.InputError: 3,
    errors.ArtifactError: 4,
    errors.ResourceError: 5,
    errors.NumericsError: 6,
    errors.InterruptedRun: 130,
    errors.InternalError: 70,
}
MISFIT = ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'")
MISFIT.__cause__ = RuntimeError("operator torchvision::nms does not exist")
OUTSIDE = {
    "torchvision of another torch": (MISFIT, 3, "the torchvision installed here"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
    "bug": (ZeroDivisionError("by zero"), 70, "ZeroDivisionError: by zero"),
    "memory": (MemoryError(), 5, "out of memory"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), 5, "the disk is full"),
    "other system error": (OSError(errno.EIO, "I/O"), 70, "OSError"),
}


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(bitbrush, "resume", fail, raising=False)


def test_every_family_is_listed() -> None:
    assert set(errors.BitbrushError.__subclasses__()) >= set(FAMILIES)
    ours = {each for each in errors.BitbrushError.__subclasses__() if each.__module__ == "bitbrush.errors"}
    assert ours == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_is_four_parts_and_a_code(family: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    raising(monkeypatch, family("it broke", where="layer [red]a.b[/red]", why="5 for 4", try_="bitbrush resume OUT"))
    assert main(["resume", "OUT"]) == FAMILIES[family]
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == family.family
    assert lines[1:] == [
        "what:  it broke",
        "where: layer [red]a.b[/red]",
        "why:   5 for 4",
        "try:   bitbrush resume OUT",
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_as_json(family: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    error = family("it broke", where="here", why="5 for 4", try_="again")
    raising(monkeypatch, error)
    assert main(["resume", "OUT", "--json"]) == FAMILIES[family]
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == error.to_dict()


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_nobody_raised_on_purpose(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    error, code, text = OUTSIDE[name]
    raising(monkeypatch, error)
    assert main(["resume", "OUT"]) == code
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown
    assert all(f"\n{part}:" in shown for part in ("what", "where", "try"))
    assert main(["resume", "OUT", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    assert main(["resume", "OUT", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


@pytest.mark.parametrize(
    "words", [["resum"], ["resume"], ["resume", "OUT", "--fast"], ["sample", "OUT", "--steps", "0"]]
)
def test_usage(words: list[str], capsys: Any) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage error\nwhat:") and "--help" in shown and "Traceback" not in shown
    assert main([*words, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["error"] == "usage error" and report["exit_code"] == 2


def test_no_words_show_the_help(capsys: Any) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "quantize" in captured.out + captured.err


def test_text_from_outside_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    raising(monkeypatch, errors.InputError("bad \x1b[2J name \u202e \x07", where="a", why="b", try_="c"))
    assert main(["resume", "OUT"]) == 3
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert "\\x1b[2J" in shown and "\\u202e" in shown


def test_a_long_part_is_not_broken_into_lines(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = "/very/long" * 40
    raising(monkeypatch, errors.ArtifactError("it broke", where=path, why="b", try_="c"))
    assert main(["resume", "OUT"]) == 4
    assert f"where: {path}\n" in capsys.readouterr().err
