"""The section on sensitivity: which layers hurt the pictures most when quantized alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bitbrush.report import heat
from bitbrush.report.text import compact, number

MAX_ROWS = 12
PROXY = "output_error~psnr"


def section(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The layers with the lowest PSNR, lowest first; None without data. ``src`` is the heat map, empty where
    the data do not say what it is of.

    Args:
        data: Of ``sensitivity.json``, with inert texts.
    """
    rows = [row for row in (data or {}).get("rows") or [] if isinstance(row, Mapping)]
    if data is None or not rows:
        return None
    ranked = sorted(rows, key=_psnr)[:MAX_ROWS]
    return {
        "src": heat.sensitivity(data) if _mapped(data) else "",
        "total": len(rows),
        "rows": [_row(row) for row in ranked],
        "rho": _rho(data.get("rank_correlation") or {}),
        "model": str(data.get("model") or ""),
    }


def _mapped(data: Mapping[str, Any]) -> bool:
    """Whether the widths and the metric are told."""
    return bool(data.get("weights")) and "activations" in data and bool((data.get("settings") or {}).get("metric"))


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    psnr, error = row.get("psnr") or {}, row.get("output_error")
    ends = all(isinstance(psnr.get(end), int | float) for end in ("low", "high"))
    return {
        "layer": str(row.get("layer") or ""),
        "bits": f"W{_bits(row.get('weight_bits'))}A{_bits(row.get('activation_bits'))}",
        "psnr": f"{number(psnr['value'], 1)} dB" if isinstance(psnr.get("value"), int | float) else "not finite",
        "interval": f"[{number(psnr['low'], 1)}, {number(psnr['high'], 1)}]" if ends else "",
        "error": compact(error) if isinstance(error, int | float) else "not finite",
    }


def _bits(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "16" if value is None else str(value)


def _psnr(row: Mapping[str, Any]) -> float:
    """None: the pictures were not finite, which is the worst."""
    value = (row.get("psnr") or {}).get("value")
    return float(value) if isinstance(value, int | float) else -math.inf


def _rho(found: Mapping[str, Any], bits: str = "") -> str:
    """How well the output error ranks the layers, in words; by width, where it is given by width."""
    own: Any = found.get(PROXY)
    count = found.get("n")
    if isinstance(own, Mapping):
        own, count = own.get("rho"), own.get("n")
    if isinstance(own, int | float):
        layers = f" ({count} layers)" if isinstance(count, int) else ""
        return f"{number(own, 2)}{f' at {bits} bits' if bits else ''}{layers}"
    widths = [_rho(part, str(width)) for width, part in found.items() if not bits and isinstance(part, Mapping)]
    return ", ".join(part for part in widths if part)
