"""The cost section: sizes, memory, times, operations, kernels; a row a measure, a column an arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bitbrush.evaluation.result import Evaluation
from bitbrush.report.findings import ratio, speed_up, times_text
from bitbrush.report.text import number, size

Cell = dict[str, str]


def section(evaluation: Evaluation) -> dict[str, Any] | None:
    """Rows for the page; None where no cost was measured."""
    cost = {arm: evaluation.cost[arm] for arm in evaluation.arms if evaluation.cost.get(arm)}
    if not cost:
        return None
    return {
        "arms": list(cost),
        "rows": _rows(evaluation, cost),
        "kernels": _kernels(cost),
        "layers": [{"arm": arm, "rows": _layers(found)} for arm, found in cost.items() if _layers(found)],
        "notes": [f"{arm}: {note}" for arm, found in cost.items() for note in found.get("notes") or []],
        "devices": sorted({_device(found) for found in cost.values() if _device(found)}),
    }


def _rows(evaluation: Evaluation, cost: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    full = cost.get(evaluation.reference, {})

    def bytes_of(key: str) -> Callable[[str], Cell | None]:
        return lambda arm: _bytes(cost[arm].get(key), full.get(key) if arm != evaluation.reference else None)

    measures: list[tuple[str, str, Callable[[str], Cell | None]]] = [
        ("On disk", "denoiser's weights", bytes_of("disk_bytes")),
        ("Whole folder", "all files", bytes_of("disk_total_bytes")),
        ("Weights in memory", "denoiser", bytes_of("weight_bytes")),
        ("Peak memory", _peak(cost), bytes_of("peak_bytes")),
        ("A sampling step", "warm; median, spread", lambda arm: _time(cost[arm].get("step_seconds"))),
        ("A picture", "warm; median, spread", lambda arm: _time(cost[arm].get("picture_seconds"))),
        ("Speed-up", "same run", lambda arm: _speed(evaluation, arm)),
        ("Bits a weight", "everything counted", lambda arm: _plain(cost[arm].get("bits_per_weight"))),
        ("Bit operations", "a denoiser call", lambda arm: _operations(cost[arm])),
        ("Quantized by", "", lambda arm: _word(cost[arm].get("quantized_by"))),
        ("Device", "", lambda arm: _word(_device(cost[arm]))),
    ]
    rows = [{"name": name, "help": text, "cells": [read(arm) for arm in cost]} for name, text, read in measures]
    return [row for row in rows if any(row["cells"])]


def _device(found: Mapping[str, Any]) -> str:
    return str(found.get("device_name") or found.get("device") or "")


def _peak(cost: Mapping[str, Mapping[str, Any]]) -> str:
    """What peaks are of, where all are of the same."""
    kinds = {str(found.get("peak_of") or "") for found in cost.values()}
    return kinds.pop() or "while drawing" if len(kinds) == 1 else "while drawing"


def brief(seconds: float) -> str:
    """Three digits of a short time: ``840 µs``, ``12.3 ms``, ``1.42 s``."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if 0 < seconds * scale < 999.5:
            return f"{_three(seconds * scale)} {unit}"
    return f"{_three(seconds)} s" if seconds < 999.5 else f"{seconds / 60:.0f} min"


def quantity(value: float) -> str:
    """Three digits of a count: ``812``, ``4.21 G``."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(value) < 999.5:
            return f"{_three(value)}{unit}"
        value /= 1000
    return f"{value:.3g} E"


def _three(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def _bytes(value: Any, full: Any) -> Cell | None:
    if not _known(value):
        return None
    times = ratio(full, value)
    return {"value": size(value), "note": "" if times is None else f"{100 / times:.3g} %"}


def _time(found: Any) -> Cell | None:
    if not isinstance(found, Mapping) or not _known(found.get("median")):
        return None
    notes = [f"{brief(found['low'])} – {brief(found['high'])}"] if _known(found.get("low")) else []
    notes += [f"{found['runs']} runs"] if _known(found.get("runs")) else []
    return {"value": brief(found["median"]), "note": ", ".join(notes)}


def _speed(evaluation: Evaluation, arm: str) -> Cell | None:
    found = speed_up(evaluation, arm) if arm != evaluation.reference else None
    return None if found is None else {"value": times_text(found[0]), "note": "" if found[1] else "within the spread"}


def _plain(value: Any) -> Cell | None:
    return {"value": number(value, 2), "note": ""} if _known(value) else None


def _operations(found: Mapping[str, Any]) -> Cell | None:
    own: Any = found.get("bit_operations")
    if not _known(own):
        return None
    times = ratio(found.get("float_bit_operations"), own)
    return {"value": quantity(own), "note": f"{times:.3g}× fewer" if times is not None and times > 1.005 else ""}


def _word(value: Any) -> Cell | None:
    return {"value": str(value), "note": ""} if value else None


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _kernels(cost: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kernel -> layers of each arm that ran on it, the most used first."""
    counts = {arm: found.get("kernel_counts") or {} for arm, found in cost.items()}
    names = {name: None for found in counts.values() for name in found}
    most = sorted(names, key=lambda name: -max(found.get(name, 0) for found in counts.values()))
    return [{"name": name, "counts": [found.get(name, 0) for found in counts.values()]} for name in most]


def _layers(found: Mapping[str, Any]) -> list[list[str]]:
    return [[str(row.get(key, "")) for key in ("layer", "kind", "kernel")] for row in found.get("kernels") or []]
