"""The page of an evaluation in a real headless Chromium; skipped where there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import evaluations
from bitbrush.evaluation.result import Evaluation
from bitbrush.report import render_evaluation
from browser import Browser, find
from markup import PAYLOADS

SHOWN = "[...document.querySelectorAll('.tile:first-child .shot')].slice(0, 3).map(s => getComputedStyle(s).visibility)"
LONG = "unbroken" * 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium on this machine")
    made = Browser(program, tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page") / "report.html"
    made.write_text(render_evaluation(evaluations.full(), evaluations.extras()), encoding="utf-8")
    return made


def middle(browser: Browser, selector: str) -> tuple[float, float]:
    x, y = browser.value(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('{selector}').getBoundingClientRect())"
    )
    return x, y


def test_it_renders_and_asks_for_nothing(browser: Browser, file: Path) -> None:
    browser.open(file)
    assert browser.complaints == []
    outside = [address for address in browser.requests if not address.startswith("data:image/")]
    assert outside == [file.resolve().as_uri()] and len(browser.requests) > 50
    assert browser.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert browser.value("getComputedStyle(document.querySelector('.card')).borderRadius") == "10px", "the hash fits"
    assert browser.value("getComputedStyle(document.querySelector('.swatch.c1')).backgroundColor") == "rgb(37, 99, 168)"
    assert browser.value("document.querySelector('.summary').getBoundingClientRect().bottom") < 800, "the first screen"


def test_the_policy_stops_what_should_not_be_there(browser: Browser, file: Path, tmp_path: Path) -> None:
    bad = "<img src='http://127.0.0.1:9/x.png'><script>window.ran = 1</script><p id=p style='color: red'>x</p>"
    page = tmp_path / "bad.html"
    page.write_text(file.read_text(encoding="utf-8").replace("<main>", f"<main>{bad}"), encoding="utf-8")
    browser.open(page)
    assert len([c for c in browser.complaints if "Content Security Policy" in c]) >= 3
    assert browser.value("window.ran === undefined && getComputedStyle(p).color !== 'rgb(255, 0, 0)'") is True


def test_the_flip_shows_one_picture_in_the_place_of_another(browser: Browser, file: Path) -> None:
    browser.open(file)
    assert browser.value(SHOWN) == ["visible"] * 3
    browser.value("document.querySelector('.tools').scrollIntoView()")
    boxes, shots = [], []
    for i in range(3):
        browser.click(*middle(browser, f".tools label[for=flip-{i}]"))
        assert browser.value(SHOWN) == ["visible" if j == i else "hidden" for j in range(3)]
        box = f"(r => [r.x, r.y, r.width, r.height])(document.querySelector('.a{i} img.plain').getBoundingClientRect())"
        boxes.append(browser.value(box))
        shots.append(hashlib.sha256(browser.screenshot()).hexdigest())
    assert boxes[0] == boxes[1] == boxes[2] and boxes[0][2] > 100, "in place"
    assert len(set(shots)) == 3, "and one sees it"
    browser.click(*middle(browser, ".tools label[for=flip-all]"))
    assert browser.value(SHOWN) == ["visible"] * 3


def test_a_click_on_a_picture_brings_the_next_and_does_not_scroll(browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.value("document.querySelectorAll('.album')[1].scrollIntoView()")
    browser.click(*middle(browser, ".album:last-of-type .tile:first-child .a2 .frame"))
    assert browser.value(SHOWN) == ["hidden", "hidden", "visible"], "from side by side, the picture clicked"
    browser.value("document.querySelectorAll('.album')[1].scrollIntoView()")
    before = browser.value("scrollY")
    for expected in (0, 1, 2):
        browser.click(*middle(browser, f".album:last-of-type .tile:first-child .a{(expected + 2) % 3} .frame"))
        assert browser.value(SHOWN)[expected] == "visible"
        assert browser.value("scrollY") == before > 500


def test_the_flip_works_from_the_keyboard(browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.value("document.querySelector('#flip-all').focus()")
    for expected in (0, 1, 2):
        browser.press("ArrowRight", 39)
        assert browser.value(SHOWN)[expected] == "visible" and browser.value(SHOWN).count("visible") == 1
    outline = "getComputedStyle(document.querySelector('.tools label[for=flip-2]')).outlineStyle"
    assert browser.value(outline) == "solid", "one sees where the focus is"
    browser.press("Tab", 9)
    browser.value("document.activeElement.click()")
    shown = "getComputedStyle(document.querySelector('.a1 .turned')).display"
    assert browser.value("document.activeElement.id") == "flip-difference" and browser.value(shown) == "block"
    assert browser.value("getComputedStyle(document.querySelector('.a1 .plain')).display") == "none"
    assert browser.value("getComputedStyle(document.querySelector('.a0 .plain')).display") == "block"


def test_on_paper_all_pictures_stand_side_by_side(browser: Browser, file: Path) -> None:
    browser.open(file, 700, 1000)
    browser.value("document.querySelector('#flip-1').click()")
    assert browser.value(SHOWN).count("visible") == 1
    browser.media("print")
    try:
        assert browser.value(SHOWN) == ["visible"] * 3
        places = "['a0', 'a1', 'a2'].map(a => document.querySelector('.' + a + ' .frame').getBoundingClientRect().x)"
        found = browser.value(places)
        assert found[0] < found[1] < found[2]
        assert browser.value("getComputedStyle(document.querySelector('.tools')).display") == "none"
        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    finally:
        browser.media("screen")


def long_names() -> Evaluation:
    return evaluations.full({name: f"{LONG}{name}" for name in evaluations.SINKS})


@pytest.mark.parametrize("make", [evaluations.full, evaluations.minimal, evaluations.edges, long_names])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_never_scrolls_sideways(
    browser: Browser, tmp_path: Path, make: Callable[[], Evaluation], width: int
) -> None:
    texts = {name: f"{LONG}{name}" for name in evaluations.SINKS} if make is long_names else {}
    page = tmp_path / "page.html"
    page.write_text(render_evaluation(make(), evaluations.extras(texts)), encoding="utf-8")
    browser.open(page, width, 800)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    if make is not evaluations.minimal:
        browser.value("document.querySelector('#flip-1').click()")
        assert browser.value("document.documentElement.scrollWidth") <= width


def test_plots_stay_readable_on_a_phone(browser: Browser, file: Path) -> None:
    browser.open(file, 375, 800)
    scales = browser.value(
        "[...document.querySelectorAll('figure > img')].filter(i => i.offsetWidth && i.src.includes('svg'))"
        ".map(i => i.offsetWidth / i.naturalWidth)"
    )
    assert len(scales) >= 10 and min(scales) > 0.9, "text of 11.5 px stays above 10"
    sizes = browser.value(
        "[...document.querySelectorAll('main *')].filter(e => e.innerText && !e.children.length && e.offsetWidth)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert len(sizes) > 200 and min(sizes) >= 11


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_runs_nothing(browser: Browser, file: Path, tmp_path: Path, payload: str) -> None:
    if "\ud800" in payload:
        payload = payload.replace("\ud800", "")
    texts = {name: f"{payload} {name}" for name in evaluations.SINKS}
    page = tmp_path / "page.html"
    page.write_text(render_evaluation(evaluations.full(texts), evaluations.extras(texts)), encoding="utf-8")
    browser.open(page)
    assert browser.complaints == [] and browser.value("document.scripts.length") == 0
    assert all(address.startswith(("data:image/", "file:")) for address in browser.requests)
    assert browser.value("document.querySelectorAll('main input').length") == 5
