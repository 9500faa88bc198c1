"""The int8 product, encode and unpack kernels: Triton's interpreter against the definition, and planted faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import packed_rows
from bitbrush.kernels import triton_split
from bitbrush.kernels.triton_int8 import Config, Frame, fitting
from interpreter import TRITON, interpreted

SOURCE = Path(__file__).resolve().parents[2] / "src"


def _interpreted(*args: str) -> dict[str, Any]:
    return interpreted("interpreted_int8.py", *args)


@TRITON
def test_sums_are_equal_and_outputs_within_their_rounding() -> None:
    found = _interpreted()
    assert found["cases"] == 28 and found["sums"] > 9_000
    assert found["unequal"] == 0 and found["codes"] and found["mixed_rows"] and found["repeated"]
    assert found["at_once"]["weights"] == packed_rows.WEIGHTS and found["at_once"]["unequal"] == 0
    assert found["at_once"]["distinct"] > 200
    assert found["gated"] > 2 and found["added"] > 2  # what belongs to samples is multiplied by, or added
    assert 0 < found["ratio"] <= 1


@TRITON
@pytest.mark.parametrize("fault", ["zero-point", "half-up", "border", "segment-order", "nibbles", "stale-time",
                                   "tap-order", "sum-of-weights"])
def test_a_planted_fault_shows(fault: str) -> None:
    found = _interpreted(fault)
    assert found["unequal"] >= 3 or not found["codes"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kernel, pad, stride", [((3, 3), 1, 1), ((3, 3), 1, 2), ((1, 1), 0, 1), ((5, 5), 2, 1)])
def test_a_frame_has_every_neighbour_at_the_same_distance(
    kernel: tuple[int, int], pad: int, stride: int, shared: bool
) -> None:
    """By hand: which row of the frame a kernel position reads is the pixel there, or border, and never outside."""
    frame = Frame(2, 4, 5, kernel, pad, stride, shared)
    where = {}
    for b in range(2):
        for y in range(4):
            for x in range(5):
                where[(b * frame.height + pad + y) * frame.pitch + pad + x] = (b, y, x)
    assert len(where) == 40
    read = 0
    for b in range(2):
        for y in range(frame.out[0]):
            for x in range(frame.out[1]):
                first = (b * frame.height + y * stride) * frame.pitch + x * stride
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        row = first + i * frame.pitch + j
                        iy, ix = y * stride + i - pad, x * stride + j - pad
                        inside = 0 <= iy < 4 and 0 <= ix < 5
                        assert 0 <= row < frame.rows
                        assert where.get(row) == ((b, iy, ix) if inside else None)
                        read += 1
    assert read == 2 * frame.out[0] * frame.out[1] * kernel[0] * kernel[1]


def test_blocks_of_columns_fit_the_segments() -> None:
    taps = Frame(1, 8, 8, (3, 3), 1, 1)
    assert fitting(Config(bk=128), (320,), None).bk == 128  # the end of a row is cut off by bounds
    assert fitting(Config(bk=128, stages=3), (320,), taps) == Config(bk=64, stages=6)
    assert fitting(Config(bk=128), (640, 320), None).bk == 64
    assert fitting(Config(bk=128), (96,), taps).bk == 32
    assert fitting(Config(bk=128), (960,), taps).bk == 128  # a fifteenth more, beyond the end
    assert fitting(Config(bk=128), (960, 320), taps).bk == 64  # beyond the end of a segment lies the next one
    assert not fitting(Config(), (64,), Frame(1, 8, 8, (3, 3), 1, 2)).tma  # strides are gathered


def test_no_part_of_a_split_sum_is_empty() -> None:
    for steps in range(1, 40):
        for wanted in range(1, 9):
            many = triton_split.parts(wanted, steps)
            each = -(-steps // many)
            assert 1 <= many <= wanted and (many - 1) * each < steps <= many * each
    split = Config(split_k=4)
    assert fitting(split, (1280,), None).split_k == 4 and fitting(split, (384,), None).split_k == 3
    assert fitting(split, (640, 640), None).split_k == 1  # segments have sums of their own
    assert fitting(replace(split, flow="turns"), (1280,), None).split_k == 1
