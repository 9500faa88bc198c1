"""Plots as SVG files: speed-ups of steps and of kernels over their own bf16. Equal numbers give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE, BASE = "#1c2430", "#667085", "#e3e7ed", "#98a2b3"
COLOURS = ("#2563a8", "#c2571a", "#2a8a6a", "#8a4fa0", "#b3912a", "#b03060")
Bar = tuple[str, float, int]
"""Label, length, number of a colour (-1: grey)."""
_STYLE = {"svg.hashsalt": "bitbrush", "svg.fonttype": "none", "font.family": "sans-serif", "text.color": INK,
          "axes.edgecolor": LINE, "xtick.color": MUTED, "ytick.color": INK}  # fmt: skip


def bars(file: Path, rows: Sequence[Bar], *, label: str, wanted: float | None = None) -> bool:
    """Horizontal bars, first on top, a line at 1 and (dashed) at the bar; nothing is drawn without rows.

    Returns:
        Whether there is a plot.
    """
    if not rows:
        file.unlink(missing_ok=True)
        return False
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.8 + 0.28 * len(rows)), layout="constrained")
        axes: Axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [length for _, length, _ in rows], height=0.68,
                  color=[BASE if c < 0 else COLOURS[c % len(COLOURS)] for _, _, c in rows])  # fmt: skip
        for place, (_, length, _) in zip(places, rows, strict=True):
            axes.text(length + 0.012, place, f"{length:.2f}", va="center", fontsize=8, zorder=3,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
        axes.set_yticks(places, [name for name, _, _ in rows], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1.0, color=INK, lw=0.8)
        if wanted is not None:
            axes.axvline(wanted, color=INK, lw=0.8, ls="--")
        axes.set_xlim(0, 1.12 * max(1.0, wanted or 0.0, *(length for _, length, _ in rows)))
        axes.set_xlabel(label, fontsize=9, color=MUTED)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.read_text(encoding="utf-8")
    file.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    return True
