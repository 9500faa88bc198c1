"""Small plots written as SVG, shown in image elements, where nothing in them can run or load.

No text from outside enters a plot: names stand beside it, on the page. Only presentation attributes are used, no style
sheet. The native width is that of a phone, so that labels of the axes stay readable there.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

INK, MUTED, LINE, AXIS = "#1c2430", "#667085", "#e3e7ed", "#c5ccd6"
NARROW, HALF, WIDE = 344, 520, 1080
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


class Plot:
    """Axes and what is drawn in them, in data coordinates.

    Args:
        x, y: Ends of the axes in data units; ``x`` may run downwards.
        width, height: In pixels.
        x_label, y_label: Our own words.
        whole: Ticks of ``x`` at whole numbers only.
    """

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: int = NARROW, height: int = 200,
        x_label: str = "", y_label: str = "", whole: bool = False,
    ) -> None:  # fmt: skip
        self._size = (width, height)
        self._x, self._y = _widened(x), _widened(y)
        self._ticks = ticks(min(self._y), max(self._y), 5)
        left = 12 + 6.4 * max((len(tick_text(tick, self._ticks)) for tick in self._ticks), default=1)
        self._box = (left, 26 if y_label else 8, width - 10, height - (34 if x_label else 20))
        self._parts: list[str] = []
        self._frame(x_label, y_label, whole)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, *, width: float = 2, dash: str = "") -> None:
        """A line through the points; it breaks where one is not finite."""
        for part in _finite_runs(xs, ys):
            points = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in part)
            kind = f' stroke-dasharray="{dash}"' if dash else ""
            if len(part) == 1:
                self._dot(*part[0], colour, width)
            else:
                self._parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
                    f'stroke-linejoin="round" stroke-linecap="round"{kind}/>'
                )

    def band(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, opacity: float
    ) -> None:
        """The area between two lines; points where an end is not finite are left out."""
        points = [p for p in zip(xs, low, high, strict=True) if all(map(math.isfinite, p))]
        edge = [(x, h) for x, _, h in points] + [(x, lo) for x, lo, _ in reversed(points)]
        if points:
            area = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in edge)
            self._parts.append(f'<polygon points="{area}" fill="{colour}" fill-opacity="{opacity}"/>')

    def level(self, y: float, colour: str = MUTED) -> None:
        """A thin horizontal line, if ``y`` lies on the axis."""
        if min(self._y) < y < max(self._y):
            left, _, right, _ = self._box
            self._parts.append(_segment(left, self._at_y(y), right, self._at_y(y), colour, 0.8))

    def uri(self) -> str:
        """The plot as a data URI."""
        width, height = self._size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        return uri(f'{head} viewBox="0 0 {width} {height}" font-family="{_FONT}">{"".join(self._parts)}</svg>')

    def _at_x(self, x: float) -> float:
        left, _, right, _ = self._box
        return left + (x - self._x[0]) / (self._x[1] - self._x[0]) * (right - left)

    def _at_y(self, y: float) -> float:
        _, top, _, bottom = self._box
        return bottom - (min(max(y, self._y[0]), self._y[1]) - self._y[0]) / (self._y[1] - self._y[0]) * (bottom - top)

    def _dot(self, x: float, y: float, colour: str, width: float) -> None:
        self._parts.append(
            f'<circle cx="{self._at_x(x):.1f}" cy="{self._at_y(y):.1f}" r="{1.2 * width:g}" fill="{colour}"/>'
        )

    def _frame(self, x_label: str, y_label: str, whole: bool) -> None:
        left, _, right, bottom = self._box
        for y in self._ticks:
            self._parts.append(_segment(left, self._at_y(y), right, self._at_y(y), LINE, 1))
            self._text(left - 7, self._at_y(y) + 3.8, tick_text(y, self._ticks), "end")
        self._parts.append(_segment(left, bottom, right, bottom, AXIS, 1))
        count = max(4, self._size[0] // 70)
        across = ticks(min(self._x), max(self._x), count, whole=whole)
        for x in across:
            at = self._at_x(x)
            self._text(at, bottom + 15, tick_text(x, across), "end" if at > right - 12 else "middle")
        if x_label:
            self._text((left + right) / 2, bottom + 31, x_label, "middle")
        if y_label:
            self._text(0, 13, y_label, "start")

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="11.5" fill="{MUTED}" text-anchor="{anchor}">{text}</text>'
        )


def uri(svg: str) -> str:
    """An SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def bar(share: float, colour: str) -> str:
    """A bar that fills ``share`` of the width it is given; the page stretches it."""
    filled = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return stretched(
        f'<rect width="100" height="10" fill="#eef1f5"/><rect width="{max(filled, 0.6):.2f}" height="10" '
        f'fill="{colour}"/>'
    )


def stretched(body: str) -> str:
    """A picture of 100 by 10 units that the page may stretch; line widths do not stretch with it."""
    return uri(
        '<svg xmlns="http://www.w3.org/2000/svg" width="100" height="10" viewBox="0 0 100 10" '
        f'preserveAspectRatio="none">{body}</svg>'
    )


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, last + 1)]


def tick_text(value: float, others: Sequence[float]) -> str:
    """A tick with as many digits as its neighbours need."""
    largest = max((abs(other) for other in others), default=0.0)
    step = abs(others[1] - others[0]) if len(others) > 1 else largest
    if largest >= 1e5 or (step and step < 1e-4):
        return f"{value:.0e}".replace("-", "−").replace("e+", "e") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return f"{value:.{digits}f}".replace("-", "−")


def _segment(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        centre = low if math.isfinite(low) else 0.0
        return (centre - 0.5, centre + 0.5)
    return ends


def _finite_runs(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
