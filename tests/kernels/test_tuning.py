"""Which cut of a product is taken: measured once, kept on disk, a rule where nothing may be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitbrush.kernels import tuning
from bitbrush.kernels.triton_int8 import Config, Frame
from bitbrush.kernels.tuning import CANDIDATES, Problem, by_rule, config

DEVICE = torch.device("cuda", 0)
PROBLEM = Problem.of(4096, 640, (640,), None)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BITBRUSH_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_name", lambda device: "a-gpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning._known.cache_clear()
    return tmp_path / "bitbrush" / "kernels" / "a-gpu.json"


def _slower_with_area(cut: Config, run: object) -> float:
    return float("inf") if cut.bn == 256 else 1.0 / (cut.bm * cut.bn) + cut.tma


def test_the_fastest_is_found_once_and_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def time(cut: Config, run: object) -> float:
        tried.append(cut)
        return _slower_with_area(cut, run)

    monkeypatch.setattr(tuning, "_time", time)
    found = config(PROBLEM, DEVICE, lambda cut: None)
    assert (found.bm, found.bn, found.tma) == (128, 128, False) and len(tried) == len(set(tried)) >= 12
    assert config(PROBLEM, DEVICE, lambda cut: None) == found and len(set(tried)) == len(tried)
    assert json.loads(file.read_text())[PROBLEM.key()]["bm"] == 128
    tuning._known.cache_clear()  # another process
    assert config(PROBLEM, DEVICE, lambda cut: pytest.fail("measured again")) == found


def test_nothing_is_measured_in_a_capture_or_when_told_not_to(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_time", lambda cut, run: pytest.fail("measured"))
    monkeypatch.setenv("BITBRUSH_TUNE", "0")
    assert config(PROBLEM, DEVICE, lambda cut: None) == by_rule(PROBLEM)
    monkeypatch.delenv("BITBRUSH_TUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert config(PROBLEM, DEVICE, lambda cut: None) == by_rule(PROBLEM) and not file.exists()
    assert by_rule(Problem.of(64, 64, (64,), None)).bm == 64


def test_nothing_is_measured_where_times_do_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Config] = []
    monkeypatch.setattr(tuning, "_time", lambda cut, run: measured.append(cut) or 1.0)
    with tuning.untimed():
        assert config(PROBLEM, DEVICE, lambda cut: None) == by_rule(PROBLEM)
    assert not measured and not file.exists()
    config(PROBLEM, DEVICE, lambda cut: None)  # the rule's cut was not kept for a found one
    assert len(measured) >= 12 and file.exists()


def test_the_rule_gathers_convolutions_of_ragged_segments() -> None:
    frame = Frame(2, 128, 128, (3, 3), 1, 1)
    cuts = [by_rule(Problem.of(2 * 128 * 128, 640, (width,), frame)) for width in (320, 640)]
    assert [(cut.bm, cut.bk, cut.tma) for cut in cuts] == [(128, 64, False), (64, 128, True)]
    assert by_rule(Problem.of(8192, 640, (320,), None)) == Config()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 3}', '{"x": {"unknown": 1}}'])
def test_a_broken_cache_is_measured_anew(file: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    monkeypatch.setattr(tuning, "_time", _slower_with_area)
    assert config(PROBLEM, DEVICE, lambda cut: None).bm == 128
    assert PROBLEM.key() in json.loads(file.read_text())


def test_cuts_fit_the_layer(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Config] = []
    monkeypatch.setattr(tuning, "_time", lambda cut, run: tried.append(cut) or 1.0)
    config(Problem.of(2048, 320, (320,), Frame(2, 32, 32, (3, 3), 1, 1)), DEVICE, lambda cut: None)
    assert tried and all(320 % cut.bk == 0 for cut in tried)
    tried.clear()
    config(Problem.of(2048, 320, (320,), Frame(2, 32, 32, (3, 3), 1, 2)), DEVICE, lambda cut: None)
    assert tried and not any(cut.tma for cut in tried)
    keys = {Problem.of(2048, 320, (320,), frame).key() for frame in (None, Frame(2, 32, 32, (3, 3), 1, 2))}
    assert len(keys) == 2 and len(set(CANDIDATES)) == len(CANDIDATES)
