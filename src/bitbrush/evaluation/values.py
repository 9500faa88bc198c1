"""Numbers of pictures and features as `Value`: each with its label, interval, floor, count and warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from bitbrush.evaluation.asked import FEW
from bitbrush.evaluation.distribution import Figure
from bitbrush.evaluation.measuring import Measured, Samples
from bitbrush.evaluation.result import Value
from bitbrush.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_share,
    bootstrap_worst,
    paired_difference,
)

Better = Literal["higher", "lower"]
LABELS: dict[str, tuple[str, Better, int]] = {
    "psnr": ("PSNR, dB", "higher", 2),
    "ssim": ("SSIM", "higher", 3),
    "lpips": ("LPIPS", "lower", 3),
    "clip": ("CLIP score", "higher", 3),
    "clip_difference": ("CLIP score, difference to full precision", "higher", 3),
    "r1": ("R@1", "higher", 3),
    "r1_heldout": ("R@1, held-out prompts", "higher", 3),
    "r1_seen": ("R@1, seen prompts", "higher", 3),
}
KEYS: dict[str, tuple[str, Better, int]] = {  # distribution's names
    "FID": ("fid", "lower", 2),
    "sFID": ("sfid", "lower", 2),
    "KID": ("kid", "lower", 4),
    "Inception score": ("is", "higher", 2),
    "precision": ("precision", "higher", 3),
    "recall": ("recall", "higher", 3),
    "density": ("density", "higher", 3),
    "coverage": ("coverage", "higher", 3),
}
Floors = Mapping[str, float]


def picture_values(found: Measured, reference: Samples, names: Mapping[str, str], floors: Floors) -> list[Value]:
    """Values of one arm's pictures.

    Args:
        found: Its numbers.
        reference: Those of the reference arm; for itself an empty mapping.
        names: Metric to the name of the network behind it: ``lpips``, ``clip``.
        floors: Key to what full precision with other seeds shows.
    """
    values: list[Value] = []
    for key in ("psnr", "ssim", "lpips"):
        if key in found.samples:
            table = found.samples[key]
            values.append(_value(key, "paired", bootstrap_mean(table), table, names, floors))
            values.append(_value(key, "paired", _worst(key, table), table, names, floors, worst=True))
    if "clip" in found.samples:
        table = found.samples["clip"]
        values.append(_value("clip", "text", bootstrap_mean(table), table, names, floors))
        if "clip" in reference:
            change = paired_difference(table, reference["clip"])
            values.append(_value("clip_difference", "text", change, table, names, floors))
    for key, hits in found.hits.items():
        values.append(_value(key, "text", bootstrap_share(hits), hits, names, floors))
    return values


def picture_floors(other: Measured, first: Measured) -> dict[str, float]:
    """What full precision with other seeds shows by each key: to the reference where that is a pair of pictures, else
    by how much the two runs of full precision differ."""
    floors = {key: bootstrap_mean(table, resamples=1).value for key, table in other.samples.items() if key != "clip"}
    floors |= {f"{key}_worst5": _worst(key, other.samples[key]).value for key in list(floors)}
    pairs = [(key, other.samples, first.samples) for key in ("clip",) if key in other.samples]
    pairs += [(key, other.hits, first.hits) for key in other.hits]
    for key, ours, theirs in pairs:
        floors[key] = abs(float(np.mean(ours[key])) - float(np.mean(theirs[key])))
    if "clip" in floors:
        floors["clip_difference"] = floors["clip"]
    return floors


def figure_value(figure: Figure, floor: float | None, detail: Mapping[str, Any]) -> Value:
    """A figure of a distribution metric as a value."""
    key, better, digits = KEYS[figure.metric]
    told = {"extractor": figure.extractor, "width": figure.width, "reference": figure.reference,
            "reference_count": figure.reference_count, "standard": figure.standard, **figure.settings, **detail}
    return Value(key, figure.label, "distribution", figure.value, None, None, figure.spread, better, digits, floor,
                 figure.count, figure.warning, {name: value for name, value in told.items() if value is not None})


def few(count: int, what: str = "prompts") -> str | None:
    """A sentence where there are too few prompts for an interval."""
    return f"Only {count} {what}: the intervals are too narrow to be trusted below {FEW}." if count < FEW else None


def _value(
    key: str, group: Literal["paired", "text"], found: Estimate, table: list[list[float]], names: Mapping[str, str],
    floors: Floors, *, worst: bool = False,
) -> Value:  # fmt: skip
    label, better, digits = LABELS[key]
    network = names.get("clip" if group == "text" else key)
    label = network if key == "lpips" and network else label + (f" by {network}" if network else "")
    full = f"{key}_worst5" if worst else key
    return Value(full, f"{label}, worst 5 %" if worst else label, group, found.value, found.low, found.high, None,
                 better, digits, floors.get(full), sum(map(len, table)), few(len(table[0])),
                 {"network": network} if network else {})


def _worst(key: str, table: list[list[float]]) -> Estimate:
    """Mean of the worst 5 %: the lowest values, or the highest where lower is better."""
    if LABELS[key][1] == "higher":
        return bootstrap_worst(table)
    found = bootstrap_worst((-np.asarray(table)).tolist())
    return Estimate(-found.value, -found.high, -found.low)


