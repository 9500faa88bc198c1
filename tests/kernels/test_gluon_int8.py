"""Products written out in Gluon: which tiles there are, and what they are compiled to. What they compute is compared on
a GPU (benchmarks/check_int8.py): Gluon has no interpreter."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_driver
from bitbrush.kernels import gluon_int8, triton_int8, tuning
from bitbrush.kernels.gluon_int8 import PAIR, TURNS, Shape, shape
from bitbrush.kernels.triton_int8 import JOINED, ONE_ROW, Config, Extra, Frame, Next, Tables, fitting
from bitbrush.kernels.tuning import FLOWS, GATED_FLOWS, Problem
from interpreter import TRITON

PAIRED = tuning.FLOWS[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BITBRUSH_FLOWS", "1")
    gluon_int8.asked.cache_clear()
    yield
    gluon_int8.asked.cache_clear()


def test_a_tile_is_shared_by_two_warpgroups_or_each_has_its_own() -> None:
    assert shape(128, 160, PAIR) == Shape(64, 128, 32, 64) and shape(128, 160, TURNS) == Shape(128, 128, 32, 64)
    assert shape(256, 160, PAIR, added=True) == Shape(128, 128, 32, 32)
    assert shape(128, 128, PAIR, gated=True) == Shape(64, 64, 64, 64)
    assert shape(128, 128, TURNS, gated=True) == Shape(128, 64, 64, 32)
    checked = 0
    for cut, gated in [(cut, False) for cut in FLOWS] + [(cut, True) for cut in GATED_FLOWS]:
        how = shape(cut.bm, cut.bn, cut.flow, gated=gated)
        assert how.rows in (64, 128) and how.first + how.others == cut.bn  # rows of one instruction, or of two
        assert all(n & (n - 1) == 0 for n in (how.first, how.others)) and how.rows * cut.bn <= 128 * 192
        assert gluon_int8.fits(cut.flow, cut.bm, cut.bn, 1, gated)
        checked += 1
    assert checked == 9


def test_a_ring_and_what_is_written_have_room_in_shared_memory() -> None:
    for cut in (*FLOWS, *GATED_FLOWS):
        for widths, frame in (((1280,), None), ((320,), Frame(1, 8, 8, (3, 3), 1)), ((96, 32), None)):
            config = fitting(cut, widths, frame)
            how = shape(config.bm, config.bn, config.flow)
            tables, written = 2 * 12 * config.bn, 2 * how.rows * how.chunk * 2
            assert config.stages * (config.bm + config.bn) * config.bk + tables + written < tuning.SHARED
            assert config.flow and config.tma and not any(w % config.bk for w in widths[1:])


def test_several_segments_are_for_tiles_with_room_for_values_beside_sums() -> None:
    several = Problem(2048, 1280, (640, 640), 1, 1)
    assert [(cut.flow, cut.bm, cut.bn) for cut in tuning.flows(several)] == [(PAIR, 128, 128)]
    assert tuning.flows(Problem(2048, 1280, (1280,), 1, 1)) == FLOWS
    assert tuning.flows(Problem(2048, 1280, (1280,), 1, 1, gated=True)) == GATED_FLOWS
    assert not tuning.flows(Problem(2048, 320, (320,), 9, 2))  # gathered by pointers


def test_nothing_is_cut_so_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITBRUSH_FLOWS", raising=False)
    gluon_int8.asked.cache_clear()
    assert not any(cut.flow for cut in tuning.cuts(Problem(2048, 1280, (1280,), 1, 1), 132))


@TRITON
@pytest.mark.usefixtures("asked")
def test_where_it_is_asked_for_both_kinds_are_tried() -> None:
    for problem in (Problem(2048, 1280, (1280,), 1, 1), Problem(8192, 320, (320,), 9, 1), Problem(64, 64, (32,), 1, 1),
                    Problem(2048, 20480, (1280,), 1, 1, gated=True), Problem(2048, 1280, (96, 32), 1, 1)):
        found = tuning.cuts(problem, 132)
        assert found[0].flow and not found[-1].flow
    few = tuning.cuts(Problem(2048, 1280, (1280,), 1, 1), 132)
    assert (few[0].bm, few[0].bn, few[0].flow) == (128, 160, PAIR)  # 128 tiles of 132 processors
    assert not any(cut.flow for cut in tuning.cuts(Problem(2048, 320, (320,), 9, 2), 132))


def test_what_was_timed_is_not_taken_where_it_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: None
) -> None:
    file = tmp_path / "a.json"
    tuning._keep(file, {"1x1": PAIRED, "2x2": Config()})
    assert tuning._known("gpu", file) == {"1x1": PAIRED, "2x2": Config()}
    tuning.forget()
    monkeypatch.delenv("BITBRUSH_FLOWS")
    gluon_int8.asked.cache_clear()
    assert tuning._known("gpu", file) == {"2x2": Config()}
    tuning.forget()


# ---- builds ----------------------------------------------------------------------------------------------------------
class Heard:
    """PTX of every build."""

    def __init__(self) -> None:
        self.ptx: list[str] = []

    def __call__(self, *, metadata_group: dict[str, str], **_rest: Any) -> None:
        self.ptx += [Path(path).read_text() for name, path in metadata_group.items() if name.endswith(".ptx")]


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Builds for a Hopper GPU; nothing is launched."""
    from triton import knobs

    before, found = knobs.compilation.listener, Heard()
    knobs.compilation.listener = found
    monkeypatch.setattr(triton_int8, "processors", lambda device: 132)
    with cuda_driver.hopper(tmp_path / "triton", monkeypatch):
        yield found
    knobs.compilation.listener = before


def _tables(n: int, segments: int = 1, kind: int = ONE_ROW, parts: int = 1) -> Tables:
    scale, zero, times = torch.zeros(4, segments), torch.zeros(4, segments, dtype=torch.uint8), torch.zeros(1).long()
    others = ((scale, zero, times),) * (parts - 1)
    return Tables(scale, zero, times, kind, torch.zeros(n, segments), torch.zeros(segments, n, dtype=torch.int32),
                  others)  # fmt: skip


def _codes(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int8)


def _needs(ptx: str, folder: Path) -> tuple[int, bool]:
    """(bytes spilled a thread, whether the assembler makes products wait for each other)."""
    import triton

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    done = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"],
                          capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found is not None
    return int(found[1]), "serializ" in done.stderr


def _products() -> Iterator[Any]:
    """Calls of every kind of product."""
    bias, type_ = torch.zeros(320), torch.bfloat16
    frame = Frame(2, 16, 16, (3, 3), 1)
    picture, pixels = _codes(frame.rows, 320), 2 * 16 * 16
    line = _codes(512, 640)
    for cut in FLOWS[1::2]:
        yield lambda cut=cut: triton_int8.product(line, _codes(320, 640), _tables(320), (640,), type_, config=cut,
                                                  extra=Extra(bias))
    yield lambda: triton_int8.product(
        picture, _codes(320, 9 * 320), _tables(320), (320,), type_, frame=frame, config=FLOWS[2],
        extra=Extra(bias, torch.zeros(2, 320, dtype=type_), torch.zeros(pixels, 320, dtype=type_)))
    yield lambda: triton_int8.product(_codes(1536, 640), _codes(960, 640), _tables(960, 1, JOINED, 3), (640,), type_,
                                      config=FLOWS[1])
    yield lambda: triton_int8.product(
        picture, _codes(320, 9 * 320), _tables(320, 2), (192, 128), torch.float16, frame=frame, config=FLOWS[0],
        extra=Extra(bias))
    yield lambda: triton_int8.product(line, _codes(320, 640), _tables(320, 1, triton_int8.BY_SAMPLE), (640,),
                                      torch.float32, config=FLOWS[1], per_sample=256)
    then = Next(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(1).long(), 255)
    for cut in GATED_FLOWS[1:]:
        yield lambda cut=cut: triton_int8.gated(line, _codes(640, 640), _tables(640), 640, type_, then,
                                                bias=torch.zeros(640), config=cut)


@TRITON
def test_every_kind_of_product_is_built_with_copies_and_products_in_flight(heard: Heard, tmp_path: Path) -> None:
    calls = list(_products())
    for call in calls:
        call()
    assert len(heard.ptx) == len(calls) == 9
    for ptx in heard.ptx:
        assert "cp.async.bulk.tensor" in ptx and "setmaxnreg" in ptx and "mbarrier.try_wait" in ptx
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.s32\.s8\.s8", ptx)
        assert products and "wgmma.wait_group.sync.aligned 0" in ptx
        assert re.search(r"wgmma\.wait_group\.sync\.aligned \s*[1-9]", ptx)  # a step's products outlive the next wait
        assert set(re.findall(r"st\.global\.(\S+?)\s", ptx)) == {"v4.b32"}
        spilled, serial = _needs(ptx, tmp_path)
        assert spilled <= 128 and not serial


@TRITON
def test_layers_of_one_kind_share_a_build(heard: Heard) -> None:
    for rows, columns, width in ((512, 320, 640), (2048, 1280, 5120), (154, 640, 768)):
        triton_int8.product(_codes(rows, width), _codes(columns, width), _tables(columns), (width,), torch.bfloat16,
                            config=PAIRED)
    assert len(heard.ptx) == 1
