"""The plots of an evaluation: error over the sampling steps, activation ranges over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitbrush.evaluation.statistics import Estimate
from bitbrush.report.svg import HALF, NARROW, WIDE, Plot

STEPS = "sampling step (left: noise, right: picture)"
Fit = dict[str, str]  # the same plot twice: "wide" for a desk and for paper, "narrow" for a phone


def step_errors(curves: Mapping[str, Sequence[Estimate]], colours: Mapping[str, str]) -> Fit:
    """Relative error of the latents at each sampling step with its 95 % band, one line an arm."""
    highest = max(100 * max(finite([p.high, p.value])) for curve in curves.values() for p in curve)
    longest = max(map(len, curves.values()))
    found = {}
    for name, width, height in (("wide", WIDE, 250), ("narrow", NARROW, 220)):
        plot = Plot(
            (1, max(longest, 2)), (0, 1.06 * highest or 1), width=width, height=height, x_label=STEPS,
            y_label="relative error, %", whole=True,
        )  # fmt: skip
        for arm, curve in curves.items():
            steps = range(1, len(curve) + 1)
            plot.band(steps, [100 * p.low for p in curve], [100 * p.high for p in curve], colours[arm], 0.16)
            plot.line(steps, [100 * p.value for p in curve], colours[arm])
        found[name] = plot.uri()
    return found


def decibels(curves: Mapping[str, Sequence[float | None]], colours: Mapping[str, str]) -> Fit:
    """Signal-to-quantization-noise ratio at each sampling step, one line an arm; gaps where it is infinite."""
    values = [number for curve in curves.values() for number in finite(curve, none=True)] or [0.0]
    longest = max(map(len, curves.values()))
    spare = 0.08 * (max(values) - min(values))
    found = {}
    for name, width in (("wide", HALF), ("narrow", NARROW)):
        plot = Plot(
            (1, max(longest, 2)), (min(values) - spare, max(values) + spare), x_label=STEPS, y_label="dB", whole=True,
            width=width, height=220,
        )  # fmt: skip
        for arm, curve in curves.items():
            plot.line(range(1, len(curve) + 1), [math.nan if v is None else v for v in curve], colours[arm])
        found[name] = plot.uri()
    return found


def activation_bands(times: Sequence[float], layer: Mapping[str, Any], colour: str) -> str:
    """Minimum to maximum, 0.1 to 99.9 % and 1 to 99 % of a layer's input over time, from noise to picture."""
    low, high = layer["low"], layer["high"]
    ends = finite([*low, *high]) or [0.0]
    spare = 0.05 * (max(ends) - min(ends))
    span = (max(times), min(times)) if len(times) > 1 else (1.0, 0.0)
    plot = Plot(span, (min(ends) - spare, max(ends) + spare), height=170, x_label="timestep")
    plot.band(times, low, high, colour, 0.16)
    for lower, upper, opacity in (("p01", "p999", 0.3), ("p1", "p99", 0.45)):
        if layer.get(lower) and layer.get(upper):
            plot.band(times, layer[lower], layer[upper], colour, opacity)
    plot.line(times, low, colour, width=1.2)
    plot.line(times, high, colour, width=1.2)
    plot.level(0)
    return plot.uri()


def finite(values: Sequence[float | None], *, none: bool = False) -> list[float]:
    """The finite ones of ``values``; 0 if there are none, unless ``none`` allows that."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return found if found or none else [0.0]
