"""Kernels of norms, GEGLU and encode: Triton's interpreter against the definition, planted faults, and how work is cut.
What they are built to for a GPU: test_triton_builds.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitbrush.kernels.triton_encode import segment_places
from bitbrush.kernels.triton_norm import column_blocks, row_cut, sum_block
from bitbrush.kernels.triton_norm_small import Cut, cut
from interpreter import TRITON, interpreted

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"


@TRITON
def test_codes_are_equal_where_norms_are_exact_and_rarely_differ_by_one_elsewhere() -> None:
    found = interpreted("interpreted_norm.py")
    results: dict[str, dict[str, int]] = found["results"]
    assert {name: entry["cases"] for name, entry in results.items()} == {
        "layer exact": 5, "layer random": 5, "modulated exact": 4, "modulated random": 4, "layer listed": 4,
        "geglu listed": 4, "gelu listed": 4, "layer segments": 3, "geglu segments": 3, "gelu segments": 3,
        "group exact": 11, "group random": 14, "geglu random": 3, "gelu erf": 4, "gelu tanh": 4, "encode exact": 3,
    }  # fmt: skip
    for name, entry in results.items():
        assert entry["codes"] > 5000 and entry["distinct"] > 80, name
        if name.endswith("exact"):
            assert entry["unequal"] == 0, (name, entry)
        assert entry["most"] <= 1 and entry["unequal"] <= 1e-4 * entry["codes"], (name, entry)
    assert found["merged"] < 3e-4  # float32 has 6e-5 deviations there
    assert found["alone"] < 4e-3  # of half precision's last bit


@TRITON
@pytest.mark.parametrize("fault, shows", [
    ("consumers", "layer exact"), ("place", "group exact"), ("sums", "group exact"), ("tile", "group exact"),
    ("gelu", "geglu random"), ("half-up", "encode exact"), ("sample", "modulated exact"), ("gelu", "gelu erf"),
    ("tanh", "gelu tanh"), ("unsorted", "layer listed"), ("gelu", "geglu listed"),
])  # fmt: skip
def test_a_planted_fault_shows(fault: str, shows: str) -> None:
    entry = interpreted("interpreted_norm.py", fault, shows)["results"][shows]
    assert entry["cases"] > 2 and entry["unequal"] > 1e-3 * entry["codes"]


@pytest.mark.parametrize("channels, expected", [
    (640, (4, 1, 5, 2)), (1280, (8, 1, 5, 1)), (320, (4, 1, 3, 4)), (3072, (8, 4, 3, 2)), (32, (4, 1, 1, 8)),
    (4096, (8, 4, 4, 1)), (1152, (4, 1, 9, 1)), (18432, (4, 16, 9, 1)),
])  # fmt: skip
def test_rows_are_held_by_as_few_threads_as_have_room(channels: int, expected: tuple[int, int, int, int]) -> None:
    vector, warps, parts, rows = row_cut(channels)
    assert (vector, warps, parts, rows) == expected
    assert channels <= 32 * warps * parts * vector < channels + 32 * warps * vector and parts * rows * vector <= 48


@pytest.mark.parametrize("channels, expected", [(320, (12, 128)), (640, (6, 128)), (1280, (3, 128)), (2560, (3, 256)),
                                                (960, (4, 128)), (1920, (2, 128)), (10240, (1, 512))])
def test_sums_are_of_whole_groups_whose_rows_begin_at_sixteen_bytes(channels: int, expected: tuple[int, int]) -> None:
    size = channels // 32
    block, columns = sum_block(32, size)
    assert (block, columns) == expected
    assert block * size * 2 % 16 == 0 and columns >= block * size


def test_groups_of_small_pictures_are_held_whole() -> None:
    """By as many programs as there are processors, each of which writes some tiles of them."""
    held = {
        (40, 1024, 64): Cut(8, 16, 11, 6, 2), (20, 1024, 64): Cut(4, 16, 11, 6, 2), (40, 256, 64): Cut(8, 16, 3, 2, 2),
        (40, 64, 64): Cut(8, 16, 1, 1, 1), (40, 1024, 32): Cut(8, 16, 11, 3, 4), (40, 30, 128): Cut(8, 8, 1, 1, 1),
    }
    for (size, pixels, programs), how in held.items():
        assert cut(size, pixels, programs, 132) == how
        step = 32 * how.warps // (size // how.vector)
        assert how.tiles * step >= pixels and how.own * how.parts >= how.tiles > how.own * (how.parts - 1)
    for size, pixels, programs in ((20, 4096, 64), (10, 64, 64), (80, 1024, 64), (40, 1024, 160), (8192, 4, 1)):
        assert cut(size, pixels, programs, 132) is None


def test_segments_have_places_of_their_own() -> None:
    """33 and 7 channels lie at 0 and 64 of the output; blocks of columns do not cross from one to the other."""
    assert segment_places((33, 7)) == ((0, 0, 33), (64, 31, 40))
    assert column_blocks((33, 7, 130)) == (((0, 0, 0, 33, 64), (1, 64, 33, 40, 96), (2, 96, 40, 170, 256)), 5)
