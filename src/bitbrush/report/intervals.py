"""One metric of several arms on one axis: the values, their intervals, and what full precision shows against itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitbrush.evaluation.result import Value
from bitbrush.report.svg import INK, stretched
from bitbrush.report.text import number


@dataclass(frozen=True)
class Axis:
    """The scale that all arms of one metric share; ``floor`` is a range in which differences say nothing."""

    low: float
    high: float
    floor: tuple[float, float] | None
    digits: int

    @property
    def ends(self) -> tuple[str, str]:
        """The axis's ends in words."""
        digits = self.digits if self.high - self.low > 4 * 10**-self.digits else self.digits + 1
        return number(self.low, digits), number(self.high, digits)


def axis(values: Sequence[Value], reference: Value | None) -> Axis:
    """An axis on which all of ``values`` fit, with their intervals and the noise floor around the reference."""
    floor = band(values, reference)
    ends = [end for value in values for end in (value.value, *extent(value)) if math.isfinite(end)]
    ends += floor or ()
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    spare = 0.08 * (high - low) or max(0.05 * abs(high), 10.0 ** -values[0].digits if values else 1.0)
    return Axis(low - spare, high + spare, floor, values[0].digits if values else 2)


def band(values: Sequence[Value], reference: Value | None) -> tuple[float, float] | None:
    """The reference's figure give or take the noise floor, where both are known."""
    floors = [v.floor for v in values if v.floor is not None and math.isfinite(v.floor)]
    if reference is None or not floors or not math.isfinite(reference.value):
        return None
    return reference.value - max(floors), reference.value + max(floors)


def extent(value: Value) -> tuple[float, float]:
    """What the whisker covers: the interval, or the spread over subsets, or nothing but the value."""
    if value.low is not None and value.high is not None:
        return value.low, value.high
    spread = value.spread or 0.0
    return value.value - spread, value.value + spread


def whisker(value: Value, scale: Axis, colour: str) -> str:
    """The value as a dot on its interval, in front of the noise floor."""

    def at(x: float) -> float:
        return 100 * min(max((x - scale.low) / (scale.high - scale.low), 0.0), 1.0)

    keep = 'vector-effect="non-scaling-stroke"'
    parts = [f'<line x1="0" x2="100" y1="5" y2="5" stroke="#e3e7ed" stroke-width="1" {keep}/>']
    if scale.floor is not None:
        left, right = map(at, scale.floor)
        width = f'width="{right - left:.2f}" height="10"'
        parts.insert(0, f'<rect x="{left:.2f}" {width} fill="{INK}" fill-opacity="0.09"/>')
    if math.isfinite(value.value):
        low, high = map(at, extent(value))
        centre = at(value.value)
        if high > low:
            parts.append(
                f'<line x1="{low:.2f}" x2="{high:.2f}" y1="5" y2="5" stroke="{colour}" stroke-width="3" '
                f'stroke-opacity="0.45" {keep}/>'
            )
        parts.append(
            f'<line x1="{centre:.2f}" x2="{centre + 0.01:.2f}" y1="5" y2="5" stroke="{colour}" stroke-width="9" '
            f'stroke-linecap="round" {keep}/>'
        )
    return stretched("".join(parts))


def by_key(values: Mapping[str, Sequence[Value]]) -> dict[str, dict[str, Value]]:
    """metric -> arm -> value, metrics in the order in which the arms show them."""
    found: dict[str, dict[str, Value]] = {}
    for arm, numbers in values.items():
        for value in numbers:
            found.setdefault(value.key, {})[arm] = value
    return found
