"""How a long step says where it is. The command line draws bars with rich; the library default is tqdm."""

from __future__ import annotations

from typing import Protocol

from tqdm.auto import tqdm


class Progress(Protocol):
    """What steps report to. ``start`` and ``finish`` nest."""

    def start(self, label: str, total: int) -> None:
        """Begin a bar of ``total`` units."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Advance the innermost bar."""

    def finish(self) -> None:
        """End the innermost bar."""

    def say(self, text: str) -> None:
        """One line that stays visible."""


class Silent:
    """Progress that shows nothing, for tests and ``--json``."""

    def start(self, label: str, total: int) -> None:
        """Nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class TqdmProgress:
    """Progress on tqdm bars, one a level."""

    def __init__(self) -> None:
        self.bars: list[tqdm] = []

    def start(self, label: str, total: int) -> None:
        """Begin a bar of ``total`` units."""
        self.bars.append(tqdm(total=total, desc=label, leave=not self.bars, position=len(self.bars)))

    def advance(self, n: int = 1, note: str = "") -> None:
        """Advance the innermost bar."""
        if self.bars:
            self.bars[-1].update(n)
            if note:
                self.bars[-1].set_postfix_str(note, refresh=False)

    def finish(self) -> None:
        """End the innermost bar."""
        if self.bars:
            self.bars.pop().close()

    def say(self, text: str) -> None:
        """One line that stays visible."""
        tqdm.write(text)
