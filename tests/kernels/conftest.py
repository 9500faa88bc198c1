"""The builder of random layers, as a fixture (tests are imported without packages)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """tests/kernels/builder.py."""
    spec = importlib.util.spec_from_file_location("builder", Path(__file__).with_name("builder.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
