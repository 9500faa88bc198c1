"""Small words: sizes, times and text from outside, made safe for a terminal."""

from __future__ import annotations

import unicodedata


def clean(text: object) -> str:
    """Text with every control and direction character shown as an escape, so that it cannot steer the terminal."""
    return "".join(_visible(character) for character in str(text))


_JOINERS = "\u200c\u200d"  # inside emoji and some scripts; they steer nothing


def _visible(character: str) -> str:
    if character in "\n\t" + _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def size(count: float) -> str:
    """Bytes for people: ``size(1_500_000) == "1.5 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Seconds for people: ``3.2 s``, ``4:05``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(part: float) -> str:
    """A share of one as a percentage."""
    return f"{100 * part:.1f} %"
