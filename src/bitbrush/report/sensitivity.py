"""The section on sensitivity: which layers hurt the pictures most when quantized alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitbrush.report.svg import bar
from bitbrush.report.text import compact, number

MAX_ROWS = 12


def section(data: Mapping[str, Any] | None, colour: str) -> dict[str, Any] | None:
    """The layers with the lowest PSNR, lowest first; None without data. ``src`` is the place of a heat map.

    Args:
        data: Of ``sensitivity.json``, with inert texts.
        colour: Of the bars.
    """
    rows = [row for row in (data or {}).get("rows") or [] if isinstance(row, Mapping)]
    if data is None or not rows:
        return None
    ranked = sorted(rows, key=lambda row: _psnr(row, float("inf")))[:MAX_ROWS]
    worst = max((float(row.get("output_error") or 0.0) for row in ranked), default=0.0) or 1.0
    correlation = (data.get("rank_correlation") or {}).get("output_error~psnr") or {}
    return {
        "src": "",
        "total": len(rows),
        "rows": [_row(row, worst, colour) for row in ranked],
        "rho": number(correlation["rho"], 2) if isinstance(correlation.get("rho"), int | float) else "",
        "n": correlation.get("n", ""),
        "model": str(data.get("model") or ""),
    }


def _row(row: Mapping[str, Any], worst: float, colour: str) -> dict[str, str]:
    psnr, error = row.get("psnr") or {}, float(row.get("output_error") or 0.0)
    ends = all(isinstance(psnr.get(end), int | float) for end in ("low", "high"))
    return {
        "layer": str(row.get("layer") or row.get("block") or ""),
        "bits": f"W{_bits(row.get('weight_bits'))}A{_bits(row.get('activation_bits'))}",
        "psnr": f"{number(psnr['value'], 1)} dB" if isinstance(psnr.get("value"), int | float) else "",
        "interval": f"[{number(psnr['low'], 1)}, {number(psnr['high'], 1)}]" if ends else "",
        "error": compact(error),
        "bar": bar(error / worst, colour),
    }


def _bits(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "16" if value is None else str(value)


def _psnr(row: Mapping[str, Any], default: float) -> float:
    value = (row.get("psnr") or {}).get("value")
    return float(value) if isinstance(value, int | float) else default
