"""Plots as SVG data URIs. A browser treats an SVG in an image element as a picture: nothing in it can run or load.

Figure objects only, no pyplot; matplotlib's settings are changed while one figure is written, and put back.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitbrush.report.text import plot_label

INK, MUTED, LINE = "#1c2430", "#667085", "#e3e7ed"
BASELINE = "#98a2b3"
COLOURS = ("#2563a8", "#c2571a", "#2a8a6a", "#8a4fa0", "#b3912a", "#b03060")
BITS = {2: "#b03060", 3: "#c2571a", 4: "#2563a8", 5: "#3f8fb5", 6: "#2a8a6a", 8: "#7fb89c"}
WIDTH = 10.4
MAX_RANGES, MAX_UNITS = 6, 40
FLOAT = 10.0  # where layers that stay float are drawn on the axis of bits
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def arm_colours(arms: Sequence[str], baseline: str | None) -> dict[str, str]:
    """One colour an arm, the same in every plot; plain rounding is grey."""
    others = [arm for arm in arms if arm != baseline]
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}
    return colours | ({baseline: BASELINE} if baseline is not None else {})


def step_errors(curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]) -> str:
    """Relative error of the latents at each sampling step, with its interval, one line an arm."""
    figure, (axes,) = _figure(1, 3.3)
    for arm, curve in curves.items():
        steps = range(1, len(curve) + 1)
        axes.fill_between(
            steps,
            [100 * p["low"] for p in curve],
            [100 * p["high"] for p in curve],
            color=colours[arm],
            alpha=0.16,
            lw=0,
        )
        axes.plot(steps, [100 * p["value"] for p in curve], color=colours[arm], lw=2, label=plot_label(arm))
    axes.set_xlabel("sampling step (left: noise, right: picture)")
    axes.set_ylabel("relative error, %")
    axes.set_ylim(bottom=0)
    longest = max(len(curve) for curve in curves.values())
    axes.set_xlim(1, max(longest, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    axes.legend(frameon=False, loc="upper left", labelcolor=INK)
    return _uri(figure)


def layer_bits(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Weight bits of every layer as bars, activation bits as a line, in the order given; blocks as labels."""
    figure, (axes,) = _figure(1, 2.9)
    names = list(layers)
    weights = [_shown_bits(layer.get("weight_bits")) for layer in layers.values()]
    activations = [_shown_bits(layer.get("activation_bits")) for layer in layers.values()]
    axes.bar(range(len(names)), weights, width=0.82, color=[_bits_colour(bits) for bits in weights])
    axes.plot([], [], color=_bits_colour(min(weights, default=4)), lw=7, label="weights")
    axes.step(range(len(names)), activations, where="mid", color=INK, lw=1.2, label="activations")
    axes.set_ylim(0, FLOAT * 1.2)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylabel("bits")
    axes.set_yticks([2, 4, 6, 8, FLOAT], ["2", "4", "6", "8", "float"])
    _group_labels(axes, names)
    axes.legend(frameon=False, loc="upper right", ncols=2, labelcolor=INK, borderaxespad=0)
    return _uri(figure)


def ranges(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[str, list[str]]:
    """Activation range per timestep of at most six layers, those whose range changes most, no two of them alike.

    Returns:
        The data URI, and the names of the layers shown.
    """
    chosen = different(layers)
    rows = -(-len(chosen) // 3)
    figure, axes = _figure(len(chosen), 2.15 * rows + 0.2, columns=min(3, len(chosen)))
    for name, part in zip(chosen, axes, strict=True):
        times, low, high = (layers[name][key] for key in ("timesteps", "low", "high"))
        part.fill_between(times, low, high, color=COLOURS[0], alpha=0.22, lw=0)
        part.plot(times, low, color=COLOURS[0], lw=1.4)
        part.plot(times, high, color=COLOURS[0], lw=1.4)
        part.axhline(0, color=MUTED, lw=0.6)
        part.set_title(plot_label(name, 40), fontsize=9, color=INK, loc="left")
        part.invert_xaxis()
    for part in axes[-min(3, len(chosen)) :]:
        part.set_xlabel("timestep")
    return _uri(figure), chosen


def reconstruction(units: Sequence[Mapping[str, Any]]) -> str:
    """Loss of every unit before (open) and after (filled), on a logarithmic axis; at most the first 40 units."""
    shown = list(units)[:MAX_UNITS]
    figure, (axes,) = _figure(1, 0.235 * len(shown) + 0.95)
    positive = [u[k] for u in shown for k in ("loss_start", "loss_end") if u[k] > 0]
    floor = min(positive, default=1e-12)
    for y, unit in enumerate(shown):
        start, end = max(unit["loss_start"], floor), max(unit["loss_end"], floor)
        axes.plot([start, end], [y, y], color=LINE, lw=3, solid_capstyle="round", zorder=1)
        axes.scatter([start], [y], s=26, facecolor="white", edgecolor=COLOURS[1], lw=1.4, zorder=2)
        axes.scatter([end], [y], s=28, color=COLOURS[0], zorder=3)
    axes.scatter([], [], s=26, facecolor="white", edgecolor=COLOURS[1], lw=1.4, label="before")
    axes.scatter([], [], s=28, color=COLOURS[0], label="after")
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [plot_label(str(unit["unit"]), 48) for unit in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("reconstruction loss")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, labelcolor=INK, borderaxespad=0.1)
    return _uri(figure)


def _figure(parts: int, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    rows = -(-parts // columns)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(parts)]
    for part in axes:
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            part.spines[side].set_color("#c5ccd6")
        part.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
        part.xaxis.label.set_color(MUTED)
        part.yaxis.label.set_color(MUTED)
        part.xaxis.label.set_fontsize(9)
        part.yaxis.label.set_fontsize(9)
        part.grid(axis="y", color=LINE, lw=0.7)
        part.set_axisbelow(True)
    return figure, axes


def _uri(figure: Figure) -> str:
    """The figure as an SVG data URI. The same figure gives the same bytes; text stays text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bitbrush", "font.size": 9}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<!--.*?-->\s*|<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"(font(?:-family)?: ?[^;\"]*?)'DejaVu Sans'[^;\"]*", rf"\1{_FONT}", svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def different(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The layers to show: those of the largest spread, one of each kind first (``conv_shortcut``, ``to_q``, ...), and
    one of those with the same input (as all projections of the time embedding have)."""
    ranked: list[str] = []
    for name in sorted(layers, key=lambda name: -_spread(layers[name])):
        if not any(_alike(layers[name], layers[other]) for other in ranked):
            ranked.append(name)
    kinds: dict[str, str] = {}
    for name in ranked:
        kinds.setdefault(name.rpartition(".")[2], name)
    first = list(kinds.values())
    chosen = (first + [name for name in ranked if name not in first])[:MAX_RANGES]
    return [name for name in layers if name in chosen]


def _alike(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Whether two ranges could be taken for each other in a plot."""
    ours, theirs = [*one["low"], *one["high"]], [*other["low"], *other["high"]]
    largest = max(map(abs, ours), default=0.0)
    return len(ours) == len(theirs) and all(abs(a - b) <= 0.02 * largest for a, b in zip(ours, theirs, strict=True))


def _spread(layer: Mapping[str, Sequence[float]]) -> float:
    """How much a range changes over time: largest width over smallest."""
    widths = [high - low for low, high in zip(layer["low"], layer["high"], strict=True)]
    return max(widths, default=0.0) / max(min(widths, default=0.0), 1e-12)


def _shown_bits(bits: float | None) -> float:
    return FLOAT if bits is None or bits > 8 else float(bits)


def _bits_colour(bits: float) -> str:
    return BITS[min(BITS, key=lambda known: abs(known - bits))] if bits <= 8 else BASELINE


def _group_labels(axes: Axes, names: Sequence[str]) -> None:
    """Marks where the model's blocks begin, with their names in the middle; narrow blocks stay unnamed."""
    groups: list[tuple[str, int, int]] = []
    for i, name in enumerate(names):
        parts = name.split(".")
        group = ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]
        if groups and groups[-1][0] == group:
            groups[-1] = (group, groups[-1][1], i)
        else:
            groups.append((group, i, i))
    for _, first, _ in groups[1:]:
        axes.axvline(first - 0.5, color="#c5ccd6", lw=0.8)
    wide = [(g, (a + b) / 2) for g, a, b in groups if (b - a + 1) / len(names) >= 0.0068 * min(len(g), 24)]
    axes.set_xticks([x for _, x in wide], [plot_label(group, 24) for group, _ in wide], fontsize=8)
