"""The report: one HTML file that loads nothing and runs nothing.

Safety: all text passes ``inert`` first and the template's escaping last; plots and pictures are data URIs in image
elements; the page's content policy forbids everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitbrush.engine import disk
from bitbrush.evaluation.compare import Comparison
from bitbrush.evaluation.statistics import Estimate
from bitbrush.report import pictures, plots
from bitbrush.report.template import fill
from bitbrush.report.text import compact, duration, inert, interval, number, size
from bitbrush.report.verdict import Verdict, verdict

METRICS = (  # key, name, digits, explanation
    ("psnr", "PSNR, dB", 1, "mean over pictures of the distance to full precision; higher is closer"),
    ("psnr_worst5", "PSNR, worst 5 %", 1, "mean of the 5 % of pictures that lie farthest from full precision"),
    ("ssim", "SSIM", 3, "structural similarity to full precision; 1 is equal"),
    ("clip", "CLIP score", 3, "cosine of picture and prompt in the emoji CLIP; higher is better"),
    ("clip_difference", "CLIP change", 3, "difference to full precision, paired by prompt"),
    (
        "r1_heldout",
        "R@1 held-out",
        3,
        "share of pictures whose nearest caption is their own; prompts not trained on",
    ),
    ("r1_seen", "R@1 seen", 3, "the same for prompts seen in training"),
    ("fid", "FID", 2, "Frechet distance to real pictures in the classifier's features; lower is better"),
)
FULL = "Full precision"


def write_report(
    path: Path | str, comparison: Comparison, histories: Mapping[str, Mapping[str, Any]], extras: Mapping[str, Any]
) -> Path:
    """Writes the report.

    Args:
        path: The file to write; its folder is made.
        comparison: From ``compare``, with pictures or without.
        histories: Candidate to its ``history.json``; whatever a history lacks is left out of the page.
        extras: All optional: ``title``, ``model``, ``command`` (str), ``seconds`` and ``cpu_seconds`` (float),
            ``parts`` (part of the run to seconds), ``peak_memory`` (bytes), ``device``, ``versions`` (name to version),
            ``settings`` (name to value), ``sizes`` (arm to bytes on disk, reference included), ``sizes_of`` (what these
            bytes are, default "denoiser weights on disk"), ``stored_as`` (the reference's type on disk), ``notes``
            (sentences), ``promises`` (dicts of ``what``, ``bar``, ``found`` and ``kept``).

    Returns:
        The path written.

    Raises:
        ResourceError: The file cannot be written.
    """
    page = render(comparison, histories, extras)
    disk.write_bytes(Path(path), page.encode("utf-8"))
    return Path(path)


def render(comparison: Comparison, histories: Mapping[str, Mapping[str, Any]], extras: Mapping[str, Any]) -> str:
    """The page as text. Arguments as for ``write_report``."""
    return fill("page.html", _context(_inert_comparison(comparison), inert(dict(histories)), inert(dict(extras))))


def _inert_comparison(comparison: Comparison) -> Comparison:
    clean = Comparison.from_json(inert(comparison.to_json()))
    return replace(clean, pictures={inert(arm): tensor for arm, tensor in comparison.pictures.items()})


def _context(comparison: Comparison, histories: dict[str, Any], extras: dict[str, Any]) -> dict[str, Any]:
    colours = plots.arm_colours(comparison.candidates, comparison.baseline)
    sizes = extras.get("sizes") or {}
    judged = [arm for arm in comparison.candidates if arm != comparison.baseline] or comparison.candidates
    stored = str(extras.get("stored_as") or "")
    verdicts = [verdict(comparison, arm, histories.get(arm, {}), sizes, stored) for arm in judged]
    inside = judged + [arm for arm in comparison.candidates if arm not in judged]
    title = extras.get("title") or _title(verdicts)
    return {
        "title": title,
        "model": extras.get("model", ""),
        "verdicts": verdicts,
        "names": {comparison.reference: FULL} | {arm: arm for arm in comparison.candidates},
        "baseline": comparison.baseline,
        "colours": colours | {comparison.reference: plots.INK},
        "grid": pictures.grid(comparison, comparison.prompts, comparison.settings.get("n", 0)),
        "metrics": _metrics(comparison),
        "steps": _steps(comparison, colours),
        "sizes": _sizes(comparison, sizes),
        "sizes_of": extras.get("sizes_of") or "denoiser weights on disk",
        "histories": [_history(arm, histories[arm]) for arm in inside if arm in histories],
        "promises": list(extras.get("promises") or []),
        "notes": comparison.notes + list(extras.get("notes") or []),
        "about": _about(comparison, extras),
        "versions": extras.get("versions") or {},
    }


def _title(verdicts: list[Verdict]) -> str:
    if len(verdicts) == 1:
        return verdicts[0].headline
    names = [v.arm for v in verdicts]
    return f"{', '.join(names[:-1])} and {names[-1]} against full precision" if names else "Comparison"


def _metrics(comparison: Comparison) -> dict[str, Any]:
    used = [entry for entry in METRICS if any(entry[0] in found for found in comparison.metrics.values())]
    rows = []
    for arm, found in comparison.metrics.items():
        cells = [_cell(found.get(key), digits, signed=key.endswith("difference")) for key, _, digits, _ in used]
        seconds = comparison.seconds_per_picture.get(arm)
        rows.append({"arm": arm, "cells": cells, "seconds": "" if seconds is None else duration(seconds)})
    return {"columns": [{"name": name, "help": text} for _, name, _, text in used], "rows": rows}


def _cell(estimate: Estimate | None, digits: int, *, signed: bool) -> dict[str, str] | None:
    if estimate is None:
        return None
    value = number(estimate.value, digits, sign=signed)
    return {"value": value, "interval": interval(estimate.to_json(), digits, sign=signed)}


def _steps(comparison: Comparison, colours: Mapping[str, str]) -> dict[str, Any] | None:
    curves = {arm: [p.to_json() for p in curve] for arm, curve in comparison.step_errors.items() if curve}
    if not curves:
        return None
    rows = [
        {
            "step": i + 1,
            "timestep": f"{time:g}",
            "values": [f"{100 * curve[i]['value']:.2f}" for curve in curves.values()],
        }
        for i, time in enumerate(comparison.timesteps)
    ]
    tracked = comparison.settings.get("tracked", 0)
    return {"src": plots.step_errors(curves, colours), "arms": list(curves), "rows": rows, "tracked": tracked}


def _sizes(comparison: Comparison, sizes: Mapping[str, float]) -> list[dict[str, Any]]:
    present = {arm: float(sizes[arm]) for arm in comparison.metrics if sizes.get(arm)}
    largest = max(present.values(), default=0.0)
    full = present.get(comparison.reference)
    return [
        {
            "arm": arm,
            "size": size(count),
            "width": round(100 * count / largest, 2),
            "share": "" if not full else f"{count / full:.2f}×",
        }
        for arm, count in present.items()
    ]


def _history(arm: str, history: dict[str, Any]) -> dict[str, Any]:
    layers, units = _layers_in_order(history), [u for u in history.get("units") or [] if _has_losses(u)]
    found = history.get("ranges") or {}
    found = {name: found[name] for name in [*layers, *found] if name in found}
    ranges = {name: r for name, r in found.items() if r.get("timesteps") and r.get("low") and r.get("high")}
    range_plot, shown = plots.ranges(ranges) if ranges else ("", [])
    average = history.get("average_bits")
    return {
        "arm": arm,
        "recipe": history.get("recipe", ""),
        "correction": (history.get("correction") or {}).get("in_words", ""),
        "average_bits": None if average is None else f"{average:.2f}",
        "layers": _layer_rows(layers),
        "kept_float": sum(1 for layer in layers.values() if "why" in layer),
        "bits_plot": plots.layer_bits(layers) if layers else "",
        "range_plot": range_plot,
        "ranges_shown": len(shown),
        "ranges_total": len(ranges),
        "units": [_unit(u) for u in units],
        "units_shown": min(len(units), plots.MAX_UNITS),
        "reconstruction_plot": plots.reconstruction(units) if units else "",
    }


def _layers_in_order(history: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All layers as the network runs them, those that stay float among them: units stand in that order, blocks first.

    A history of another order of units keeps the order of its layers.
    """
    kept = {name: {"why": why} for name, why in (history.get("kept_float") or {}).items()}
    layers: dict[str, dict[str, Any]] = {**(history.get("layers") or {}), **kept}
    places: dict[str, int] = {}
    for unit in history.get("units") or []:
        places.setdefault(str(unit.get("unit", "")), len(places))

    def place(name: str) -> int:
        parts = name.split(".")
        owners = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return next((places[owner] for owner in owners if owner in places), len(places))

    return dict(sorted(layers.items(), key=lambda item: place(item[0])))


def _layer_rows(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for name, layer in layers.items():
        segments = layer.get("segments") or []
        rows.append(
            {
                "name": name,
                "weights": "float" if "why" in layer else _bits(layer.get("weight_bits")),
                "activations": "float" if "why" in layer else _bits(layer.get("activation_bits")),
                "parameters": f"{layer['parameters']:,}" if "parameters" in layer else "",
                "bytes": size(layer["packed_bytes"]) if "packed_bytes" in layer else "",
                "segments": " + ".join(str(s) for s in segments) if len(segments) > 1 else str(layer.get("why", "")),
            }
        )
    return rows


def _bits(bits: float | None) -> str:
    return "" if bits is None else "float" if bits >= 16 else f"{bits:g}"


def _has_losses(unit: Mapping[str, Any]) -> bool:
    return isinstance(unit.get("loss_start"), int | float) and isinstance(unit.get("loss_end"), int | float)


def _unit(unit: Mapping[str, Any]) -> dict[str, str]:
    start, end = unit["loss_start"], unit["loss_end"]
    return {
        "unit": str(unit.get("unit", "")),
        "step": str(unit.get("step", "")),
        "before": compact(start),
        "after": compact(end),
        "ratio": f"{end / start:.2f}" if start > 0 else "",
        "kept": str(unit.get("kept", "")),
    }


def _about(comparison: Comparison, extras: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[Any, Any]] = [("Model", extras.get("model")), ("Command", extras.get("command"))]
    if "seconds" in extras:
        rows.append(("Time of the run", duration(extras["seconds"])))
    parts = (extras.get("parts") or {}).items()
    rows.append(("of which", ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts)))
    if "cpu_seconds" in extras:
        rows.append(("Processor time", f"{duration(extras['cpu_seconds'])} (user and system)"))
    if "peak_memory" in extras:
        rows.append(("Peak memory", size(extras["peak_memory"])))
    rows += [("Machine", extras.get("device"))]
    settings = dict(comparison.settings) | (extras.get("settings") or {})
    names = {"n": "Pictures a seed", "seeds": "Sampling seeds", "steps": "Sampling steps", "guidance": "Guidance"}
    names |= {"batch": "Pictures a batch", "autocast": "Autocast", "device": "Device", "scheduler": "Scheduler"}
    hidden = ("keep", "tracked", "sampler") if settings.get("sampler") == "own" else ("keep", "tracked")
    for key, value in settings.items():
        if key not in hidden:
            rows.append((names.get(key, key), ", ".join(map(str, value)) if isinstance(value, list) else value))
    return [(str(name), str(value)) for name, value in rows if value not in (None, "")]
