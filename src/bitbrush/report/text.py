"""Text from outside, made harmless and readable before it reaches a page or a plot."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{12,}")
_USERINFO = re.compile(r"(\w+://)[^/\s@]+@")


def inert(value: Any) -> Any:
    """A copy of plain data in which every string, keys included, is safe to show.

    Control, bidirectional and unpaired characters become visible escapes (``\\x1b``, ``\\u202e``), the home directory
    becomes ``~``, access tokens and passwords in addresses become ``***``. Markup stays as it is: the template escapes
    it.
    """
    if isinstance(value, str):
        return _inert_string(value)
    if isinstance(value, dict):
        return {inert(key) if isinstance(key, str) else key: inert(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inert(item) for item in value]
    return _inert_string(str(value)) if isinstance(value, Path) else value


def _inert_string(text: str) -> str:
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", text)
    text = _USERINFO.sub(r"\1***@", _SECRET.sub("***", text))
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp") or character == "\u200d":
        return character  # the zero-width joiner holds emoji together
    return character.encode("unicode_escape").decode("ascii")


def plot_label(text: str, limit: int = 60) -> str:
    """``text`` for a matplotlib label: no mathematics, no characters its font lacks, cut in the middle if long."""
    plain = text.encode("latin-1", "backslashreplace").decode("latin-1")
    if len(plain) > limit:
        plain = plain[: limit // 2 - 1] + "..." + plain[-(limit // 2 - 2) :]
    return plain.replace("$", r"\$")


def number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """A number with a real minus sign; ``sign`` adds a plus sign too."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(estimate: dict[str, float], digits: int = 2, *, sign: bool = False) -> str:
    """The interval alone: ``[1.20, 1.40]``."""
    return f"[{number(estimate['low'], digits, sign=sign)}, {number(estimate['high'], digits, sign=sign)}]"


def size(count: float) -> str:
    """Bytes in decimal units: ``9.66 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """``0.42 s``, ``38 s``, ``5 min 12 s``, ``2 h 03 min``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def compact(value: float) -> str:
    """Three significant digits, for losses and ranges."""
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else "not finite"
