"""An evaluation whose texts are all safe to show, and whose arms still differ by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitbrush.errors import InputError
from bitbrush.evaluation.result import OTHER_SEEDS, REFERENCE, Evaluation
from bitbrush.report.text import inert

FULL = "Full precision"
BY_ARM = ("values", "per_picture", "worst", "step_errors", "cost", "inside")  # fields whose keys are names of arms


def cleaned(evaluation: Evaluation) -> Evaluation:
    """A copy with inert texts. Two arms whose names read alike get numbers, so that none hides the other.

    Raises:
        InputError: There is no candidate, or an arm is named twice.
    """
    _check(evaluation)
    names = _names(evaluation.arms)
    plain = evaluation.to_json() | {"per_picture": {}}
    data: dict[str, Any] = inert({name: value for name, value in plain.items() if name not in BY_ARM})
    for field in BY_ARM:
        data[field] = {names[arm]: inert(found) for arm, found in plain[field].items() if arm in names}
    data["reference"], data["candidates"] = names[evaluation.reference], [names[c] for c in evaluation.candidates]
    for shown, test in zip(data["tests"], evaluation.tests, strict=True):
        shown |= {"first": _name(names, test.first), "second": _name(names, test.second)}
    clean = Evaluation.from_json(data)
    clean.per_picture = {names[arm]: found for arm, found in evaluation.per_picture.items() if arm in names}
    clean.pictures = {names[arm]: tensor for arm, tensor in evaluation.pictures.items() if arm in names}
    return clean


def _check(evaluation: Evaluation) -> None:
    if not evaluation.candidates:
        raise InputError(
            "an evaluation without candidates has nothing to report",
            where="bitbrush.report.write_evaluation",
            why=f"it holds the reference {evaluation.reference!r} alone",
            try_="evaluate at least one quantized pipeline against it",
        )
    twice = sorted({arm for arm in evaluation.arms if evaluation.arms.count(arm) > 1})
    if twice:
        raise InputError(
            f"two arms are named {twice[0]!r}",
            where="bitbrush.report.write_evaluation",
            why="their figures could not be told apart",
            try_="give every arm its own name",
        )


def _names(arms: list[str]) -> dict[str, str]:
    """Arm to what the page calls it. A reference of the default name is called what it is."""
    names: dict[str, str] = {}
    for place, arm in enumerate(arms):
        shown = FULL if place == 0 and arm == REFERENCE else inert(arm).strip() or f"arm {place}"
        count, unique = 1, shown
        while unique in names.values():
            count += 1
            unique = f"{shown} ({count})"
        names[arm] = unique
    return names


def _name(names: Mapping[str, str], arm: str) -> str:  # the reference is the first of names
    if arm == OTHER_SEEDS and arm not in names:
        return f"{next(iter(names.values()))}, other seeds"
    return names[arm] if arm in names else inert(arm)
