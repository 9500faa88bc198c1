"""What people read: words, tables and progress."""

from __future__ import annotations

import io
import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitbrush.cli import render
from bitbrush.cli.quiet import notices
from bitbrush.cli.rich_progress import PlainReporter, Reporter, RichReporter, estimate, reporter
from bitbrush.cli.text import clean, clock, share, size
from bitbrush.errors import Notice

ESTIMATE = {"value": 23.456, "low": 22.0, "high": 24.0}
COMPARISON = {
    "metrics": {"FP": {}, "rtn [b]": {"psnr": ESTIMATE}, "qdiffusion": {"psnr": ESTIMATE, "ssim": ESTIMATE}},
    "seconds_per_picture": {"FP": 1.0, "rtn [b]": 2.0, "qdiffusion": 2.5},
    "settings": {"n": 12, "steps": 20},
    "notes": ["Only 12 prompts."],
}


def shown(*parts: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_sizes_and_times() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_000_000, 3.1e9, 4e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3.1 GB",
        "4.0 TB",
    ]
    assert [clock(s) for s in (0.04, 59.9, 65, 3725)] == ["0.0 s", "59.9 s", "1:05", "1:02:05"]
    assert share(0.0471) == "4.7 %"
    assert estimate(10.0, 2, 6) == 20.0 and estimate(10.0, 0, 6) is None


def test_clean_keeps_text_and_shows_controls() -> None:
    family = "👨\u200d👩\u200d👧"
    assert clean(f"grün\n\t{family} 日本") == f"grün\n\t{family} 日本"
    assert clean("\x1b[31m\r\x00\x9b\u202e\u2066") == "\\x1b[31m\\x0d\\x00\\x9b\\u202e\\u2066"


def test_json_is_strict() -> None:
    text = render.to_json({"a": math.nan, "b": [math.inf, 1.5], "c": Path("x"), "d": {"e": (1, None)}, 3: "ü"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "x", "d": {"e": [1, None]}, "3": "ü"}


def test_comparison_table() -> None:
    text = shown(*render.comparison_tables(COMPARISON, "out/[red]report.html"))
    for part in ("rtn [b]", "PSNR, dB", "SSIM", "23.46", "22.00 to 24.00", "2.50", "Only 12", "out/[red]report.html"):
        assert part in text
    assert "CLIP" not in text


def test_demo_table_ends_with_the_report() -> None:
    numbers = {"gain_db": ESTIMATE, "seconds": 200.0, "peak_memory": 1.5e9, "report": "/x/report.html"}
    text = shown(*render.demo_tables({**COMPARISON, **numbers}))
    assert "+23.46 dB" in text and "3:20" in text and "1.5 GB" in text and "Promised" not in text
    more = {"parts": {"rtn": 20.0}, "cpu_seconds": 300.0}
    more["promises"] = [{"what": "time", "bar": "within 6:00", "found": "3:20", "kept": False}]  # type: ignore[assignment]
    text = shown(*render.demo_tables({**COMPARISON, **numbers, **more}))
    assert "5:00" in text and "20.0 s" in text and "within 6:00" in text and "NO" in text
    assert text.rstrip().endswith("report: /x/report.html")


def drive(progress: Reporter) -> None:
    progress.start("recon[struct]", 2)
    progress.start("iterations", 3)
    for _ in range(3):
        progress.advance(note="loss \x1b 0.5")
    progress.finish()
    progress.advance()
    progress.say("a [word]")
    progress.advance()
    progress.finish()
    progress.finish()  # one too many does no harm
    progress.advance()
    progress.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    made = reporter(console)
    assert isinstance(made, RichReporter if terminal else PlainReporter)
    drive(made)
    text = file.getvalue()
    assert "recon[struct]" in text and "a [word]" in text and "2 in 0.0 s" in text
    assert terminal or "\x1b" not in text


def test_plain_progress_reports_in_between_with_the_time_left() -> None:
    file = io.StringIO()
    drive(PlainReporter(file, every=0.0))
    lines = file.getvalue().splitlines()
    assert lines[0] == "recon[struct]: 2 to do"
    assert any(line.startswith("recon[struct] 0/2 > iterations 1/3, 0.0 s left loss \\x1b 0.5") for line in lines)
    assert lines[-1].startswith("recon[struct]: 2 in")


def test_time_left_is_that_of_the_outermost_level(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = io.StringIO()
    progress = PlainReporter(file, every=0.0)
    progress.start("blocks", 4)
    progress.advance()  # the first block, restored: no time yet
    progress.start("block 2", 10)
    now[0] = 30.0
    progress.advance(5)  # half of the second: 1.5 of 4 in 30 s
    assert file.getvalue().splitlines()[-1] == "blocks 1/4 > block 2 5/10, 50.0 s left"


def test_a_level_of_nothing_is_not_mentioned() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        made = reporter(Console(file=file, force_terminal=terminal, width=120))
        made.start("activations", 0)
        made.finish()
        assert "activations:" not in file.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_bars_fit_their_line(width: int) -> None:
    file = io.StringIO()
    made = RichReporter(Console(file=file, force_terminal=True, width=width))
    made.start("weights", 4)
    for name in ("down_blocks.0.attentions.0.transformer_blocks.0", "x"):
        made.start(name, 100)
        made.advance(50)
        made.finish()
        made.advance(note=name)
    made.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "…" in shown
    assert " left" in shown and not re.search(r"^\s*left", shown, re.MULTILINE)
    assert all(len(line) <= width for part in shown.split("\n") for line in part.split("\r"))


def test_bars_are_gone_after_an_error() -> None:
    screen = render.Screen()
    with pytest.raises(ZeroDivisionError), screen.progress() as progress:
        progress.start("x", 3)
        raise ZeroDivisionError
    progress.finish()


def test_what_a_network_says_once_is_a_note_and_other_warnings_stay(recwarn: pytest.WarningsRecorder) -> None:
    said: list[str] = []
    with notices(said.append):
        for _ in range(2):
            warnings.warn("timestep 7 is not on the grid", Notice, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert said == ["timestep 7 is not on the grid"] * 2
    assert [str(w.message) for w in recwarn] == ["old"]
    warnings.warn("afterwards", Notice, stacklevel=1)
    assert len(said) == 2 and str(recwarn[-1].message) == "afterwards"
