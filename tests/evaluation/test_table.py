"""The table: every number with its interval or spread, floors, tests in words, nothing that steers a terminal."""

from __future__ import annotations

from bitbrush.evaluation.result import OTHER_SEEDS, Evaluation, PairedTest, Value
from bitbrush.evaluation.statistics import Estimate
from bitbrush.evaluation.table import differences, numbers, text, warnings


def value(key: str, number: float, **more: object) -> Value:
    given = {"low": None, "high": None, "spread": None, "floor": None, **more}
    return Value(key, key.upper(), "paired", number, better="higher", digits=2, count=4, **given)  # type: ignore[arg-type]


def evaluation() -> Evaluation:
    found = Evaluation("FP", ["a", "b"], {})
    found.values = {
        "FP": [value("clip", 0.5)],
        "a": [value("psnr", 20.126, low=19.0, high=21.0, floor=12.0), value("clip", 0.4)],
        "b": [value("kid", 0.3, spread=0.1)],
    }
    control = {"features": "cells", "control": True}
    found.tests = [
        PairedTest("psnr", "a", "b", Estimate(1.0, 0.5, 1.5), 0.001, 0.01, 40),
        PairedTest("features", OTHER_SEEDS, "FP", Estimate(0.0, -0.1, 0.1), 0.5, 0.5, 40, control),
    ]
    return found


def test_numbers() -> None:
    columns, rows = numbers(evaluation())
    assert columns == ["", "PSNR", "CLIP", "KID"]
    assert rows == [
        ["FP", "-", "0.50", "-"],
        ["a", "20.13 [19.00, 21.00]", "0.40", "-"],
        ["b", "-", "-", "0.30 ± 0.10"],
        ["noise floor", "12.00", "-", "-"],
    ]


def test_differences_in_words() -> None:
    found = differences(evaluation())
    assert found is not None
    assert [row[-1] for row in found[1]] == ["differ", "no difference found (control)"]
    assert found[1][1][1] == "features (cells)"
    assert differences(Evaluation("FP", [], {})) is None


def test_warnings_stand_once() -> None:
    found = evaluation()
    few, narrow = "too few for FID", "Only 4 prompts"
    found.values["a"] += [value("fid", 1.0, warning=few), value("sfid", 2.0, warning=narrow)]
    found.values["b"] += [value("fid", 1.0, warning=few)]
    found.notes = [narrow]
    assert warnings(found) == [few]
    assert str(text(found)).count(few) == 1 == str(text(found)).count(narrow)


def test_lines_are_aligned_and_nothing_steers() -> None:
    found = evaluation()
    found.notes = ["a \x1b[2Jnote \u202e turned"]
    shown = str(text(found))
    lines = shown.splitlines()
    assert lines[0].index("PSNR") == lines[2].index("20.13") and "Do they differ?" in shown
    assert "\x1b" not in shown and "\u202e" not in shown and "\\u001b[2Jnote" in shown
