"""The two pages' templates: strict, and escaping everything that is not marked as made here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2


def source(name: str) -> str:
    """The text of a file of this package."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def fill(name: str, context: Mapping[str, Any]) -> str:
    """The template ``name``, filled. A name that it uses and ``context`` lacks is an error of ours."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name).render(context)
