"""Set an attribute of many modules for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def holding(objects: Iterable[Any], attribute: str, value: Any) -> Iterator[None]:
    """``attribute = value`` on every object inside the block; the values before come back afterwards."""
    before = [(item, getattr(item, attribute)) for item in objects]
    for item, _ in before:
        setattr(item, attribute, value)
    try:
        yield
    finally:
        for item, former in before:
            setattr(item, attribute, former)
