"""The builder of random layers, as a fixture."""

from __future__ import annotations

from types import ModuleType

import pytest

import builder as layers


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """tests/builder.py."""
    return layers
