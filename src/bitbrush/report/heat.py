"""A heat map of sensitivities: layers in the order they run, bit widths below each other, dark where it hurts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bitbrush.engine.disk import write_bytes
from bitbrush.errors import InputError
from bitbrush.report.plots import COLOURS, LINE, MUTED, _figure, _group_labels, _uri
from bitbrush.report.text import plot_label

SCALE = LinearSegmentedColormap.from_list("damage", ["#f3f6fa", "#9cc0de", COLOURS[0], "#7a2e52", COLOURS[5]])
TITLES = {"psnr": "PSNR to full precision, dB", "lpips": "LPIPS to full precision", "clip": "change of the CLIP score"}
BETTER_HIGHER = ("psnr", "clip")
DOTS = 200


def figure(data: Mapping[str, Any], metric: str | None = None) -> Figure:
    """The map of what ``Sensitivity.to_json`` gives, coloured by ``metric`` (the one it was ranked by, by default).

    Cells without a number (pictures that were not finite) are hatched; the five worst layers of the fewest bits are
    named.
    """
    key = metric or str(data["settings"]["metric"])
    names, values = table(data, key)
    made, (axes,) = _figure(1, 1.3 + 0.34 * len(values))
    shown = np.ma.masked_invalid(values)
    reverse = key in BETTER_HIGHER
    axes.set_facecolor("#d7dbe2")
    picture = axes.imshow(shown, aspect="auto", cmap=SCALE.reversed() if reverse else SCALE, interpolation="nearest")
    axes.set_yticks(range(len(values)), [f"W{bits}A{data['activations']}" for bits in data["weights"]])
    axes.grid(visible=False)
    for y in range(1, len(values)):
        axes.axhline(y - 0.5, color="white", lw=1.5)
    _group_labels(axes, names)
    _name_worst(axes, names, values, reverse)
    bar = made.colorbar(picture, ax=axes, shrink=0.9, pad=0.012, aspect=9)
    bar.outline.set_edgecolor(LINE)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.set_label(TITLES.get(key, key), color=MUTED, fontsize=8.5)
    return made


def table(data: Mapping[str, Any], metric: str) -> tuple[list[str], NDArray[np.float64]]:
    """Names of the layers and numbers [widths, layers]; NaN where there is none."""
    names = list(dict.fromkeys(str(row["layer"]) for row in data["rows"]))
    values = np.full((len(data["weights"]), len(names)), np.nan)
    for row in data["rows"]:
        found = row.get(metric)
        if found is not None:
            values[data["weights"].index(row["weight_bits"]), names.index(row["layer"])] = found["value"]
    return names, values


def sensitivity(data: Mapping[str, Any], metric: str | None = None) -> str:
    """The map as an SVG data URI, for an image element."""
    return _uri(figure(data, metric))


def save(path: Path | str, data: Mapping[str, Any], metric: str | None = None) -> None:
    """Write the map as .svg or .png.

    Raises:
        InputError: Another ending.
    """
    target = Path(path)
    if target.suffix == ".svg":
        write_bytes(target, base64.b64decode(sensitivity(data, metric).partition(",")[2]))
    elif target.suffix == ".png":
        buffer = io.BytesIO()
        with matplotlib.rc_context({"font.size": 9}):
            figure(data, metric).savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
        write_bytes(target, buffer.getvalue())
    else:
        raise InputError("a heat map is written as .svg or .png", where=str(path),
                         why=f"the name ends in {target.suffix or 'nothing'}", try_=str(target.with_suffix(".svg")))


def _name_worst(axes: Any, names: Sequence[str], values: NDArray[np.float64], reverse: bool) -> None:
    """Numbers above the columns of the five worst layers, and what they stand for."""
    score = np.where(np.isnan(values[-1]), -np.inf if reverse else np.inf, values[-1])
    order = np.argsort(score if reverse else -score, kind="stable")[: min(5, len(names))]
    for rank, column in enumerate(order.tolist(), start=1):
        axes.annotate(str(rank), (column, -0.5), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7.5,
                      color=MUTED)
    worst = [f"{rank} {plot_label(names[column], 60)}" for rank, column in enumerate(order.tolist(), start=1)]
    legend = "\n".join("   ".join(worst[i : i + 3]) for i in range(0, len(worst), 3))
    axes.set_title(legend, fontsize=6.8, color=MUTED, loc="left", pad=13)
