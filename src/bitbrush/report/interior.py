"""The section on what happens inside: ranges over time, noise ratios, kurtosis, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitbrush.evaluation.result import Evaluation
from bitbrush.report import curves
from bitbrush.report.pictures import png
from bitbrush.report.plots import different
from bitbrush.report.svg import bar
from bitbrush.report.text import compact, number

MAX_BARS, MAX_MAPS = 10, 12


def section(evaluation: Evaluation, colours: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page shows of ``evaluation.inside``; None where nothing was looked at."""
    inside = {arm: evaluation.inside[arm] for arm in evaluation.candidates if evaluation.inside.get(arm)}
    if not inside:
        return None
    return {
        "arms": list(inside),
        "notes": [f"{arm}: {note}" for arm, found in inside.items() for note in found.get("notes") or []],
        "noise": _decibels(inside, "noise_sqnr", colours),
        "latent": _decibels(inside, "latent_sqnr", colours),
        "parts": [part for part in (_part(arm, found, colours[arm]) for arm, found in inside.items()) if _full(part)],
    }


def _part(arm: str, found: Mapping[str, Any], colour: str) -> dict[str, Any]:
    layers, bands = _bands(found, colour)
    return {
        "arm": arm,
        "layers": layers,
        "bands": bands,
        "kurtosis": bars(found.get("kurtosis") or {}, colour),
        "kurtosis_total": len(found.get("kurtosis") or {}),
        "attention": _attention(found.get("attention") or {}, colour),
    }


def _full(part: Mapping[str, Any]) -> bool:
    return bool(part["bands"] or part["kurtosis"] or part["attention"])


def _decibels(inside: Mapping[str, Mapping[str, Any]], key: str, colours: Mapping[str, str]) -> dict[str, Any] | None:
    found = {arm: [_number(v) for v in data[key]] for arm, data in inside.items() if data.get(key)}
    found = {arm: curve for arm, curve in found.items() if any(v is not None for v in curve)}
    if not found:
        return None
    lowest = {arm: min(v for v in curve if v is not None) for arm, curve in found.items()}
    return {
        "plot": curves.decibels(found, colours),
        "lowest": [{"arm": arm, "value": f"{number(value, 1)} dB"} for arm, value in lowest.items()],
    }


def _number(value: Any) -> float | None:
    """None for what is not a finite number: equal signals have an infinite ratio."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _bands(found: Mapping[str, Any], colour: str) -> tuple[int, list[dict[str, str]]]:
    """Ranges over time of the few layers whose range changes most, no two alike."""
    times = [float(t) for t in found.get("timesteps") or []]
    layers = {
        name: {key: [math.nan if v is None else v for v in line] for key, line in layer.items()} | {"timesteps": times}
        for name, layer in (found.get("activations") or {}).items()
        if times and all(len(_whole(layer.get(end))) == len(times) for end in ("low", "high"))
    }
    shown = [
        {
            "name": name,
            "src": curves.activation_bands(times, layers[name], colour),
            "note": f"{compact(min(layers[name]['low']))} to {compact(max(layers[name]['high']))}",
        }
        for name in different(layers)
    ]
    return len(layers), shown


def _whole(values: Any) -> list[float]:
    """The values, or nothing where one is not finite: such a range has no width to rank."""
    found = [_number(value) for value in values or []]
    return [] if None in found else [value for value in found if value is not None]


def bars(values: Mapping[str, float], colour: str) -> list[dict[str, str]]:
    """The largest values as bars, largest first."""
    found = {name: value for name, value in values.items() if _number(value) is not None}
    largest = sorted(found, key=lambda name: -found[name])[:MAX_BARS]
    top = max((found[name] for name in largest), default=1.0) or 1.0
    return [{"name": name, "value": compact(found[name]), "src": bar(found[name] / top, colour)} for name in largest]


def _attention(found: Mapping[str, Any], colour: str) -> dict[str, Any] | None:
    maps = [{"name": " · ".join(path), "src": heat(values)} for path, values in _arrays(found.get("maps") or {})]
    shown = bars(found.get("layers") or {}, colour)
    if not maps and not shown:
        return None
    words = {key: str(found.get(key) if found.get(key) is not None else "") for key in ("token", "prompt")}
    return words | {"bars": shown, "total": len(found.get("layers") or {}), "maps": maps[:MAX_MAPS]}


def _arrays(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], NDArray[np.float64]]]:
    """Every finite matrix of a nest of dicts, with the names on the way to it."""
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _arrays(branch, (*path, str(name)))
        return
    try:
        values = np.asarray(tree, dtype=np.float64)
    except (TypeError, ValueError):
        return
    if values.ndim == 2 and values.size and np.isfinite(values).all():
        yield path, values


def heat(values: NDArray[np.float64]) -> str:
    """A matrix as a picture: white is its least, our blue its largest value."""
    low, high = float(values.min()), float(values.max())
    share = torch.from_numpy((values - low) / (high - low) if high > low else np.zeros_like(values)).float()
    blue = torch.tensor([0x17, 0x3F, 0x6F]).view(3, 1, 1) / 127.5 - 1
    return png(1 + share * (blue - 1))
