"""Numbers to one HTML page that needs no network and runs no script."""

from __future__ import annotations

from bitbrush.report.evaluation import render_evaluation, write_evaluation
from bitbrush.report.html import write_report

__all__ = ["render_evaluation", "write_evaluation", "write_report"]
