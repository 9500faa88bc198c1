"""Scripts that run Triton kernels in its interpreter: in a process of their own, since it is chosen at import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(script: str, *args: str, timeout: float = 300) -> dict[str, Any]:
    """What ``tests/kernels/SCRIPT`` prints last: JSON."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(TESTS / "kernels" / script), *args], capture_output=True, text=True,
                          env=env, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
