"""The CPU's benchmark: ratios within a turn, the bars, and the table; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]


def found(vnni: bool, w4: float, w8: float, weights: float) -> dict[str, Any]:
    """One setting as `measure` gives it."""
    names = {"float32": 1.0, "w4a8": w4, "w8a8": w8}
    return {
        "machine": {"engine": "exact" if vnni else "saturates", "vnni": vnni, "capability": "AVX512",
                    "processor": "one", "threads": 2},
        "ms": {name: {"median": 100 * r, "fastest": 90 * r} for name, r in names.items()},
        "ratios": {name: dict.fromkeys(("median", "q1", "q3", "fastest"), names[name]) for name in ("w4a8", "w8a8")},
        "weights": {"w4a8": weights, "w8a8": 0.54},
        "kinds": {"linear": {"layers": 3.0, **names}},
    }  # fmt: skip


def test_a_ratio_is_taken_within_a_turn(script: Script) -> None:
    ratio = script("speed_cpu").ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert ratio == {"median": 2.0, "q1": 1.5, "q3": 2.5, "fastest": 2.0}


@pytest.mark.parametrize(("vnni", "w8", "met"), [(True, 1.0, True), (True, 1.1, False), (False, 1.3, True),
                                                 (False, 1.31, False)])  # fmt: skip
def test_the_bar_of_w8a8_depends_on_the_processor(script: Script, vnni: bool, w8: float, met: bool) -> None:
    bars = script("speed_cpu").summary({"native": found(vnni, 0.9, w8, 0.33)}, "the command")
    assert [bars[key]["met"] for key in bars] == [True, met, False]
    assert bars["cpu_w8a8_time_ratio"]["value"] == w8 and bars["cpu_w8a8_time_ratio"]["command"] == "the command"


def test_the_table_names_settings_networks_and_kinds(script: Script) -> None:
    module = script("speed_cpu")
    settings = {"native": found(True, 0.9, 1.2, 0.3), "avx2": found(False, 1.0, 1.25, 0.3)}
    text = module.table({"settings": settings, "bars": module.summary(settings, "x")})
    assert "native: one, AVX512, product exact, 2 threads" in text and "product saturates" in text
    assert text.count("linear") == 2 and "cpu_w8a8_time_ratio: 1.200" in text
    assert text.splitlines()[-3].endswith(": met)")
    assert "missed" in text.splitlines()[-2]


def test_steps_take_turns(script: Script) -> None:
    order: list[str] = []
    made = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    times = script("speed_cpu").steps(made, {}, 3)
    assert order[6:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3, "c": 3}
