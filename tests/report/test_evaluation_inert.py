"""Hostile text in every sink of the page stays text."""

from __future__ import annotations

import base64

import pytest

import evaluations
from bitbrush.evaluation.result import Evaluation
from bitbrush.report import render_evaluation
from bitbrush.report.text import inert
from markup import PAYLOADS, Page, check_svg, without_map

MORE = [
    "</style><style>*{display:none}",
    "<svg/onload=alert(1)>",
    "<plaintext>",
    "<a href=javascript:alert(1)>x</a>",
    '\r\n<meta http-equiv=refresh content="0;url=http://example.com">',
    "data:text/html,<script>alert(1)</script>",
    "\u2066bidi\u2069\u200f\u2028",
    "=cmd|' /C calc'!A0",
    "<input id=flip-0 checked><label for=flip-1>",
    '" src="http://example.com/x" alt="',
]
NOT_SHOWN = {"extra_key", "sensitive_block", "sensitive_kind", "sensitive_model"}  # no place on the page
SINKS = [name for name in evaluations.SINKS if name not in NOT_SHOWN]


def texts(payload: str) -> dict[str, str]:
    """The payload in every sink, and the sink's name behind it."""
    return {name: f"{payload} {name}" for name in evaluations.SINKS}


def html_with(payload: str) -> str:
    found = texts(payload)
    return render_evaluation(evaluations.full(found), evaluations.extras(found) | {"title": f"{payload} title"})


def page_with(payload: str) -> Page:
    return Page(html_with(payload))


@pytest.fixture(scope="module")
def harmless() -> Page:
    return page_with("plain")


def test_these_are_enough_injections() -> None:
    assert len({*PAYLOADS, *MORE}) * len(SINKS) >= 200


@pytest.mark.parametrize("payload", [*PAYLOADS, *MORE])
def test_hostile_text_stays_text_in_every_sink(payload: str, harmless: Page) -> None:
    page = page_with(payload)
    assert page.tags == harmless.tags
    lost = [name for name in SINKS if inert(f"{payload} {name}").replace("_", " ") not in page.text.replace("_", " ")]
    assert not lost
    assert len(page.sources) == len(harmless.sources)
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in page.sources)


def test_no_plot_holds_anything_that_runs_or_loads() -> None:
    sources = Page(without_map(html_with("<script>alert(1)</script>"))).sources
    plots = [base64.b64decode(source.split(",", 1)[1]) for source in sources if "svg" in source[:20]]
    assert len(plots) > 20
    for plot in plots:
        check_svg(plot)


def test_home_and_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    token = "hf_" + "a" * 30
    made = Evaluation("FP", ["/home/ada/out"], {"cache": "/home/ada/.cache", "command": f"x --token {token}"})
    text = Page(render_evaluation(made, {"notes": ["https://ada:secret@example.com/x"]})).text
    assert "~/out" in text and "~/.cache" in text and token not in text and "secret" not in text and "ada" not in text
