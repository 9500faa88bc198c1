"""``python -m bitbrush.cli``: the same as ``bitbrush``, where the console script is not on the path."""

from __future__ import annotations

from bitbrush.cli.entry import run

if __name__ == "__main__":
    run()
