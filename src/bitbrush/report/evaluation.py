"""The report of an evaluation: one HTML file that loads nothing and runs nothing.

Safety: all text passes ``inert`` first and the template's escaping last; no text from outside stands in a style rule, a
plot or an attribute other than ``alt``; plots and pictures are data URIs in image elements; the page's content policy
allows these and its one style sheet, by hash, and forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bitbrush.engine import disk
from bitbrush.evaluation.result import Evaluation, PairedTest, Value
from bitbrush.report import curves, expense, findings, flip, interior
from bitbrush.report.cleaned import FULL, cleaned
from bitbrush.report.intervals import axis, by_key, extent, whisker
from bitbrush.report.plots import INK, arm_colours
from bitbrush.report.sensitivity import section as sensitivity
from bitbrush.report.template import fill, source
from bitbrush.report.text import duration, inert, interval, number, size
from bitbrush.report.verdict import bits_in_words

SUMMARY = ("psnr", "ssim", "lpips", "clip", "fid", "kid")  # columns of the first table, where measured
MAX_CARDS = 3  # candidates that get cards; more get their sentence and a row of the table
GROUPS = (
    ("paired", "Distance to the reference", "Picture by picture: same prompt, same noise, same scheduler."),
    ("text", "Agreement with the prompts", "What the picture shows against what was asked for."),
    ("distribution", "Distribution of the pictures", "All pictures of an arm together, in the features of a network."),
)


def write_evaluation(path: Path | str, evaluation: Evaluation, extras: Mapping[str, Any] | None = None) -> Path:
    """Writes the report.

    Args:
        path: The file to write; its folder is made.
        evaluation: From ``bitbrush.evaluate``, with pictures or without; whatever it lacks is left out of the page.
        extras: All optional: ``title``, ``model``, ``command`` (str), ``seconds`` (float), ``peak_memory`` (bytes),
            ``notes`` (sentences), ``device`` (str), ``settings`` and ``versions`` (name to value), ``sizes`` (arm to
            bytes on disk, used where the cost was not measured), ``histories`` (arm to its ``history.json``, for the
            bits), ``sensitivity`` (the data of ``sensitivity.json``).

    Returns:
        The path written.

    Raises:
        InputError: The evaluation has no candidate, or two arms of one name.
        ResourceError: The file cannot be written.
    """
    page = render_evaluation(evaluation, extras)
    disk.write_bytes(Path(path), page.encode("utf-8"))
    return Path(path)


def render_evaluation(evaluation: Evaluation, extras: Mapping[str, Any] | None = None) -> str:
    """The page as text. Arguments and errors as for ``write_evaluation``."""
    given = dict(extras or {})
    clean, more = cleaned(_with_sizes(evaluation, given.get("sizes") or {})), inert(given)
    shown = dict(zip(evaluation.arms, clean.arms, strict=True))
    histories = given.get("histories") or {}
    more["bits"] = {name: bits_in_words(histories.get(arm) or {}) for arm, name in shown.items()}
    palette = arm_colours(clean.candidates, None) | {clean.reference: INK}
    style = source("evaluation.css") + _rules(clean, palette)
    return fill("evaluation.html", _context(clean, more, palette) | {"style": Markup(style), "policy": policy(style)})


def _with_sizes(evaluation: Evaluation, sizes: Mapping[str, float]) -> Evaluation:
    """A copy where the bytes of an arm's folder stand in its cost, if its cost does not say so itself."""
    cost = {arm: dict(evaluation.cost.get(arm) or {}) for arm in evaluation.arms}
    for arm, found in cost.items():
        if found.get("disk_bytes") is None and sizes.get(arm):
            found["disk_bytes"] = sizes[arm]
    return replace(evaluation, cost={arm: found for arm, found in cost.items() if found})


def policy(style: str) -> str:
    """The content policy of a page with this one style sheet."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _rules(evaluation: Evaluation, palette: Mapping[str, str]) -> str:
    """Style rules of this page: one colour an arm, and the flip. Made of numbers and our own colours."""
    colours = "".join(f".c{i}{{background:{palette[arm]}}}" for i, arm in enumerate(evaluation.arms))
    shown = [arm for arm in evaluation.arms if arm in evaluation.pictures]
    return colours + flip.rules(len(shown))


def _context(evaluation: Evaluation, extras: Mapping[str, Any], palette: Mapping[str, str]) -> dict[str, Any]:
    found = [findings.finding(evaluation, arm) for arm in evaluation.candidates]
    notes = list(dict.fromkeys([*evaluation.notes, *_warnings(evaluation), *map(str, extras.get("notes") or [])]))
    return {
        "title": str(extras.get("title") or _title(evaluation, found)),
        "model": str(extras.get("model") or evaluation.settings.get("model") or ""),
        "reference": evaluation.reference,
        "findings": found,
        "cards": len(found) <= MAX_CARDS,
        "bits": extras["bits"],
        "place": {arm: i for i, arm in enumerate(evaluation.arms)},
        "summary": _summary(evaluation),
        "notes": notes,
        "missing": evaluation.missing,
        "album": flip.album(evaluation),
        "groups": _groups(evaluation, palette),
        "tests": _tests(evaluation),
        "steps": _steps(evaluation, palette),
        "cost": expense.section(evaluation),
        "inside": interior.section(evaluation, palette),
        "sensitivity": sensitivity(extras.get("sensitivity")),
        "about": _about(evaluation, extras),
        "versions": dict(evaluation.settings.get("versions") or {}) | dict(extras.get("versions") or {}),
    }


def _title(evaluation: Evaluation, found: Sequence[findings.Finding]) -> str:
    if len(found) == 1:
        return found[0].claim
    names = evaluation.candidates
    against = "full precision" if evaluation.reference == FULL else evaluation.reference
    return f"{', '.join(names[:-1])} and {names[-1]} against {against}"


def _warnings(evaluation: Evaluation) -> list[str]:
    return [v.warning for values in evaluation.values.values() for v in values if v.warning]


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    found = by_key(evaluation.values)
    keys = [key for key in SUMMARY if key in found]
    keys = keys or list(found)[: len(SUMMARY)]
    first = [next(iter(found[key].values())) for key in keys]
    heads = [(findings.heading(v.label), v.better) for v in first]
    columns = [{"name": name, "sub": sub, "better": better} for (name, sub), better in heads]
    extra = [name for name in ("On disk", "A picture") if any(_cost(evaluation, arm, name) for arm in evaluation.arms)]
    columns += [{"name": name, "sub": "", "better": "lower"} for name in extra]
    rows = [
        {
            "arm": arm,
            "cells": [
                _cell(evaluation, arm, found[key].get(arm)) or _other_seeds(evaluation.reference, arm, found[key])
                for key in keys
            ]
            + [_cost(evaluation, arm, name) for name in extra],
        }
        for arm in evaluation.arms
    ]
    return {"columns": columns, "rows": rows, "tested": bool(evaluation.tests)}


def _other_seeds(reference: str, arm: str, values: Mapping[str, Value]) -> dict[str, Any] | None:
    """For the reference, by a metric that it cannot have: what it shows against itself with other seeds."""
    floors = [v for v in values.values() if v.floor is not None and v.group == "paired"]
    if arm != reference or arm in values or not floors:
        return None
    return _bare("") | {"notes": [f"other seeds {number(floors[0].floor or 0.0, floors[0].digits)}"]}


def _cost(evaluation: Evaluation, arm: str, name: str) -> dict[str, Any] | None:
    cost = evaluation.cost.get(arm) or {}
    if name == "On disk":
        value = cost.get("disk_bytes")
        return None if value is None else _bare(size(value))
    value = (cost.get("picture_seconds") or {}).get("median")
    return None if value is None else _bare(expense.brief(value))


def _bare(value: str) -> dict[str, Any]:
    return {"value": value, "notes": [], "mark": None, "leads": False}


def _cell(evaluation: Evaluation, arm: str, value: Value | None) -> dict[str, Any] | None:
    if value is None:
        return None
    found = findings.mark(evaluation, arm, value)
    full = arm == evaluation.reference
    floor = [f"floor ± {number(value.floor, value.digits)}"] if value.floor is not None and full else []
    return {
        "value": number(value.value, value.digits),
        "notes": [_ends(value), *floor],
        "mark": found,
        "leads": findings.leads(evaluation, arm, value),
    }


def _ends(value: Value) -> str:
    if value.low is not None and value.high is not None:
        return interval({"low": value.low, "high": value.high}, value.digits)
    return "" if value.spread is None else f"± {number(value.spread, value.digits)}"


def _groups(evaluation: Evaluation, palette: Mapping[str, str]) -> list[dict[str, Any]]:
    found = by_key(evaluation.values)
    groups = []
    for kind, title, words in GROUPS:
        metrics = [_metric(evaluation, arms, palette) for arms in found.values() if _kind(arms) == kind]
        if metrics:
            groups.append({"title": title, "words": words, "metrics": metrics})
    return groups


def _kind(arms: Mapping[str, Value]) -> str:
    return next(iter(arms.values())).group


def _metric(evaluation: Evaluation, arms: Mapping[str, Value], palette: Mapping[str, str]) -> dict[str, Any]:
    values = list(arms.values())
    scale = axis(values, arms.get(evaluation.reference))
    rows = [
        (_cell(evaluation, arm, arms[arm]) or {}) | {"arm": arm, "src": whisker(arms[arm], scale, palette[arm])}
        for arm in evaluation.arms
        if arm in arms
    ]
    return {
        "name": findings.heading(values[0].label)[0],
        "sub": findings.heading(values[0].label)[1],
        "facts": _facts(values),
        "rows": rows,
        "ends": scale.ends,
        "band": scale.floor is not None,
        "spread": any(v.low is None and v.spread is not None for v in values),
        "whiskers": any(extent(v)[1] > extent(v)[0] for v in values),
    }


def _facts(values: Sequence[Value]) -> list[str]:
    """What has to stand beside a number: which way is better, counts, floor, reference and settings of the metric."""
    first = values[0]
    counts = sorted({v.count for v in values})
    facts = [f"{first.better} is better", " or ".join(map(findings.pictures, counts))]
    floors = [v.floor for v in values if v.floor is not None]
    if floors and first.group == "paired":
        facts.append(f"the reference with other seeds {number(floors[0], first.digits)}")
    elif floors:
        facts.append(f"noise floor ± {number(max(floors), first.digits)}")
    elif first.group == "distribution":
        facts.append("noise floor not measured")
    names = {"reference": "against", "width": "features", "subset_size": "subset of"}
    for key, value in first.detail.items():
        told = key in ("extractor", "label", "network")  # by the label
        if not told and isinstance(value, str | int | float) and not isinstance(value, bool):
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            facts.append(f"{shown} features" if key == "width" else f"{names.get(key, key.replace('_', ' '))} {shown}")
    return facts


def _tests(evaluation: Evaluation) -> list[dict[str, Any]]:
    labels = {value.key: value for values in evaluation.values.values() for value in values}
    rows = []
    for test in evaluation.tests:
        value = labels.get(test.key)
        digits = value.digits if value is not None else 3
        rows.append(
            {
                "name": value.label if value is not None else _feature_name(test) or test.key,
                "sub": ", ".join(["control"] * bool(test.detail.get("control")) + _told(test)),
                "first": test.first,
                "second": test.second,
                "difference": number(test.difference.value, digits, sign=True),
                "interval": interval(test.difference.to_json(), digits, sign=True),
                "p": findings.probability(test.p).removeprefix("p\u00a0=").strip("p\u00a0"),
                "adjusted": findings.probability(test.adjusted).removeprefix("p\u00a0=").strip("p\u00a0"),
                "prompts": f"{test.prompts:,}",
                "mark": findings.verdict(evaluation, test),
            }
        )
    return rows


def _feature_name(test: PairedTest) -> str:
    network = test.detail.get("features")
    return f"Features of {network}" if network and test.key.startswith(findings.FEATURES) else ""


def _told(test: PairedTest) -> list[str]:
    return [str(test.detail[key]) for key in ("statistic", "noise", "test") if test.detail.get(key)]


def _steps(evaluation: Evaluation, palette: Mapping[str, str]) -> dict[str, Any] | None:
    found = {arm: evaluation.step_errors[arm] for arm in evaluation.candidates if evaluation.step_errors.get(arm)}
    if not found:
        return None
    rows = []
    for i, time in enumerate(evaluation.timesteps):
        cells = [f"{100 * curve[i].value:.2f}" if i < len(curve) else "" for curve in found.values()]
        rows.append([str(i + 1), f"{time:g}", *cells])
    last = [{"arm": arm, "value": f"{100 * curve[-1].value:.1f} %"} for arm, curve in found.items()]
    return {"plot": curves.step_errors(found, palette), "arms": list(found), "rows": rows, "last": last}


def _about(evaluation: Evaluation, extras: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = dict(evaluation.settings) | dict(extras.get("settings") or {})
    rows: list[tuple[Any, Any]] = [("Model", extras.get("model") or settings.pop("model", None))]
    rows.append(("Machine", extras.get("device")))
    rows.append(("Command", extras.get("command") or settings.pop("command", None)))
    if "seconds" in extras:
        rows.append(("Time of the run", duration(extras["seconds"])))
    if "peak_memory" in extras:
        rows.append(("Peak memory", size(extras["peak_memory"])))
    names = {"n": "Pictures a seed", "seeds": "Sampling seeds", "steps": "Sampling steps", "guidance": "Guidance"}
    names |= {"batch": "Pictures a batch", "autocast": "Autocast", "device": "Device", "scheduler": "Scheduler"}
    for key, value in settings.items():
        if key not in ("versions", "model", "command"):
            rows.append((names.get(key, str(key).replace("_", " ")), _in_words(value)))
    return [(str(name), str(value)) for name, value in rows if value not in (None, "")]


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "" if value is None else str(value)
