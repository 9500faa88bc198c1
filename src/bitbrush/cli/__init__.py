"""The command line. `run` is the console script; `main` does the same work and returns the exit code."""

from bitbrush.cli.entry import main, run

__all__ = ["main", "run"]
