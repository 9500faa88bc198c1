"""The scripts that time every cut of a kernel run to their end in Triton's interpreter; nothing about times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interpreter import TRITON

ROOT = Path(__file__).resolve().parents[2]


@TRITON
@pytest.mark.parametrize(("script", "lines"), [("tune_int8.py", 4), ("tune_attention.py", 1)])
def test_a_smoke_run_ends(script: str, lines: int) -> None:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--smoke"], capture_output=True,
                          text=True, env=env, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in done.stdout.splitlines() if "us" in line]) == lines
