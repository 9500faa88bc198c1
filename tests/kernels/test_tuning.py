"""Which cut of a product is taken: measured once, kept on disk, a rule where nothing may be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitbrush.kernels import tuning
from bitbrush.kernels.triton_int8 import Config, Frame
from bitbrush.kernels.tuning import CANDIDATES, GATHERED, Problem, by_rule, config, cost, cuts

DEVICE = torch.device("cuda", 0)
PROBLEM = Problem.of(4096, 640, (640,), None)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BITBRUSH_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_name", lambda device: "a-gpu")
    monkeypatch.setattr(tuning, "_processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.forget()
    return tmp_path / "bitbrush" / "kernels" / "a-gpu.json"


def _small_are_fast(cut: Config, run: object) -> float:
    return float("inf") if cut.bn == 256 else cut.bm + cut.stages


def test_the_fastest_is_found_once_and_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def time(cut: Config, run: object) -> float:
        tried.append(cut)
        return _small_are_fast(cut, run)

    monkeypatch.setattr(tuning, "_time", time)
    found = config(PROBLEM, DEVICE, lambda cut: None)
    assert (found.bm, found.bn, found.stages) == (64, 128, 3) and len(tried) == len(set(tried)) >= 4
    assert config(PROBLEM, DEVICE, lambda cut: None) == found and len(set(tried)) == len(tried)
    assert json.loads(file.read_text())[PROBLEM.key()]["bm"] == 64
    tuning.forget()  # another process
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
    assert len(measured) >= 4 and file.exists()


def test_the_rule_gathers_convolutions_of_ragged_segments() -> None:
    frame = Frame(2, 128, 128, (3, 3), 1, 1)
    found = [by_rule(Problem.of(2 * 128 * 128, 640, (width,), frame)) for width in (320, 640)]
    assert [(cut.bm, cut.bk, cut.tma) for cut in found] == [(128, 64, False), (128, 128, True)]
    assert by_rule(Problem.of(8192, 640, (320,), None)) == Config()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 3}', '{"x": {"unknown": 1}}'])
def test_a_broken_cache_is_measured_anew(file: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    monkeypatch.setattr(tuning, "_time", _small_are_fast)
    assert config(PROBLEM, DEVICE, lambda cut: None).bm == 64
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
    kinds = {Problem(2048, 960, (320,), 1, 1, parts, gated).key() for parts in (1, 3) for gated in (False, True)}
    assert len(keys) == 2 and len(kinds) == 4
    assert len({*CANDIDATES, *GATHERED}) == len(CANDIDATES) + len(GATHERED)


MEASURED = (
    ((2048, 10240, 1280, 1), (128, 128)), ((8192, 5120, 640, 1), (128, 128)), ((2048, 1280, 5120, 1), (128, 128)),
    ((8192, 640, 2560, 1), (64, 128)), ((2048, 1280, 1280, 1), (128, 128)), ((8192, 640, 640, 1), (64, 128)),
    ((4608, 12288, 3072, 1), (128, 128)), ((4608, 3072, 3072, 1), (128, 128)), ((4608, 3072, 15360, 1), (128, 128)),
    ((154, 1280, 2048, 1), (64, 64)), ((32768, 320, 320, 9), (128, 128)), ((8192, 640, 640, 9), (64, 128)),
    ((2048, 1280, 1280, 9), (64, 128)),
)
"""Rows, columns, K and taps, and the tile that was the fastest of 21 on an H200."""


@pytest.mark.parametrize("shape, tile", MEASURED)
def test_what_is_not_tried_was_never_the_fastest(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    rows, columns, width, taps = shape
    problem = Problem(rows, columns, (width,), taps, 1)
    kept = [cut for cut in cuts(problem, 132) if cut.split_k == 1]
    assert tile in {(cut.bm, cut.bn) for cut in kept} and 2 <= len(kept) <= 8
    assert by_rule(problem) == kept[0] and cost(kept[0], problem, 132) <= cost(kept[-1], problem, 132)


def test_sums_are_split_where_tiles_leave_processors_idle() -> None:
    """The convolutions of SD 1.5's 16 x 16 and 8 x 8 pictures; of a frame the rows count that lie between outputs."""
    small = {side: Problem.of(2 * side * side, 1280, (1280,), Frame(2, side, side, (3, 3), 1)) for side in (8, 16)}
    checked = 0
    for problem in small.values():
        every = cuts(problem, 132, written_out=True)
        split = [cut for cut in every if cut.split_k > 1]
        for cut in split:
            tiles = -(-problem.lines // cut.bm) * -(-problem.columns // cut.bn) if cut.tma else None
            assert tiles is None or 0.4 * 132 <= tiles * cut.split_k <= 2 * 132, cut
            assert problem.taps * -(-1280 // cut.bk) // cut.split_k >= 4
            checked += 1
        assert any(cut.flow for cut in split) and every[0].split_k == 1  # a rule by shape never splits
        assert cost(split[0], problem, 132) < cost(every[0], problem, 132)
    assert checked >= 8
    many = Problem.of(2 * 64 * 64, 640, (640,), Frame(2, 64, 64, (3, 3), 1))
    few_columns = Problem(128, 1280, (256,), 1, 1)
    several = Problem(128, 1280, (640, 640), 1, 1)
    for problem in (many, few_columns, several, Problem(128, 3 * 640, (1280,), 1, 1, parts=3),
                    Problem(128, 2 * 640, (1280,), 1, 1, gated=True)):
        assert not any(cut.split_k > 1 for cut in cuts(problem, 132, written_out=True)), problem


def test_cuts_that_leave_processors_idle_are_not_tried() -> None:
    few, many = Problem(64, 640, (640,), 1, 1), Problem(65536, 5120, (640,), 1, 1)
    assert all(cut.bm == 64 for cut in cuts(few, 132)) and all(cut.bm * cut.bn >= 128 * 128 for cut in cuts(many, 132))
    one = Problem(2048, 3 * 640, (640,), 1, 1)
    joined = Problem(2048, 3 * 640, (640,), 1, 1, parts=3)  # a tile of 256 columns ends with its layer's 640
    wide = Config(128, 256, 128, 8, 8, 4, together=1)
    assert cost(wide, joined, 132) > cost(wide, one, 132)


def test_registers_are_limited_where_two_programs_share_a_processor() -> None:
    assert Config().registers == 128 and Config(together=1).registers is None
    for cut in (*CANDIDATES, *GATHERED):
        assert (cut.registers or 255) * 32 * cut.warps * cut.together <= 65536 or cut.registers is None
        assert cut.together * cut.stages * (cut.bm + cut.bn) * cut.bk <= tuning.SHARED
