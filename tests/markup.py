"""Pages taken apart for tests: every tag with its attributes, and the text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></head><body onload=alert(1)>",
    "]]></svg><svg onload=alert(1)>--><!-- x",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}",
    "$\\frac{1}{$ $x$ \\$ $$",
    "a\x00b\x1b[31mc\u202ed\ud800e",
    "&lt;b&gt; &amp; &#x3c;i&#x3e;",
    "<!--<iframe src='http://example.com'>",
    "red; background: url(http://example.com/x)",
]


class Page(HTMLParser):
    """Every tag with its attributes, and the text. What ``src`` and ``alt`` say stands apart."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[tuple[str, str], ...]]] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key == "src"]
        kept = tuple((key, value or "") if key not in ("src", "alt") else (key, "") for key, value in attrs)
        self.tags.append((tag, kept))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def without_map(html: str) -> str:
    """The page without its heat map, the one plot that names layers."""
    return re.sub(r'<img class="map"[^>]*>', "", html)


def check_svg(svg: bytes) -> None:
    """Well-formed, no element or attribute that could run or load, no comment left."""
    assert b"<!--" not in svg and b"<!DOCTYPE" not in svg
    allowed = {"svg", "g", "defs", "style", "path", "use", "text", "tspan", "clipPath", "rect"}
    allowed |= {"line", "polyline", "polygon", "circle"}
    for element in ElementTree.fromstring(svg).iter():
        name = str(element.tag).rsplit("}", 1)[-1]
        assert name in allowed, name
        for key, value in element.attrib.items():
            assert not key.lower().startswith("on")
            assert "href" not in key or value.startswith("#"), (key, value)
