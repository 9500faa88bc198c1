"""Kernels of norms, GEGLU and encode: Triton's interpreter against the definition, planted faults, and how work is cut.
What they are built to for a GPU: test_triton_builds.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitbrush.kernels.triton_encode import places
from bitbrush.kernels.triton_norm import PIECE, VECTOR, column_blocks, row_cut, sum_block
from interpreter import TRITON, interpreted

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"


def _interpreted(*args: str) -> tuple[dict[str, dict[str, int]], float, float]:
    found = interpreted("interpreted_norm.py", *args)
    return found["results"], found["merged"], found["alone"]


@TRITON
def test_codes_are_equal_where_norms_are_exact_and_rarely_differ_by_one_elsewhere() -> None:
    results, merged, alone = _interpreted()
    assert {name: entry["cases"] for name, entry in results.items()} == {
        "layer exact": 5, "layer random": 5, "group exact": 5, "group random": 6, "geglu random": 3, "encode exact": 3,
    }  # fmt: skip
    for name, entry in results.items():
        assert entry["codes"] > 5000 and entry["distinct"] > 80, name
        if name.endswith("exact"):
            assert entry["unequal"] == 0, (name, entry)
        assert entry["most"] <= 1 and entry["unequal"] <= 1e-4 * entry["codes"], (name, entry)
    assert merged < 3e-4  # float32 has 6e-5 deviations there
    assert alone < 4e-3  # of half precision's last bit


@TRITON
@pytest.mark.parametrize("fault, shows", [
    ("consumers", "layer exact"), ("place", "group exact"), ("sums", "group exact"), ("gelu", "geglu random"),
    ("half-up", "encode exact"),
])  # fmt: skip
def test_a_planted_fault_shows(fault: str, shows: str) -> None:
    entry = _interpreted(fault)[0][shows]
    assert entry["unequal"] > 1e-3 * entry["codes"]


@pytest.mark.parametrize("channels, expected", [
    (640, (1, 4, 2)), (1280, (1, 8, 1)), (320, (1, 2, 2)), (3072, (4, 4, 2)), (32, (1, 1, 4)), (4096, (4, 4, 1)),
    (1152, (1, 8, 1)), (18432, (16, 8, 1)),
])  # fmt: skip
def test_rows_are_held_by_as_few_threads_as_have_room(channels: int, expected: tuple[int, int, int]) -> None:
    warps, parts, rows = row_cut(channels)
    assert (warps, parts, rows) == expected
    assert warps * parts * PIECE >= channels and parts * rows * VECTOR <= 64


@pytest.mark.parametrize("channels, expected", [(320, (16, 256)), (640, (8, 256)), (1280, (4, 256)), (2560, (2, 256)),
                                                (960, (8, 256)), (1920, (4, 256))])
def test_sums_are_of_whole_groups_whose_rows_begin_at_sixteen_bytes(channels: int, expected: tuple[int, int]) -> None:
    block, columns = sum_block(32, channels // 32)
    assert (block, columns) == expected
    assert block * (channels // 32) * 2 % 16 == 0 and columns >= block * (channels // 32)


def test_segments_have_places_of_their_own() -> None:
    """33 and 7 channels lie at 0 and 64 of the output; blocks of columns do not cross from one to the other."""
    assert places((33, 7)) == ((0, 0, 33), (64, 31, 40))
    assert column_blocks((33, 7, 130)) == (((0, 0, 0, 33, 64), (1, 64, 33, 40, 96), (2, 96, 40, 170, 256)), 5)
