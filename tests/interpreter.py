"""Scripts that run Triton kernels in its interpreter: in a process of their own, since it is chosen at import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(script: str, *args: str, timeout: int = 300) -> dict[str, Any]:
    """What ``tests/kernels/SCRIPT`` prints last: JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        asked = [str(TESTS / "kernels" / script), args, timeout, str(out), str(error)]
        status = _answer(json.dumps(asked))
        assert status == "0", f"{script} {args}: {status or 'no answer'}\n{error.read_text()[-3000:]}"
        found: dict[str, Any] = json.loads(out.read_text().strip().splitlines()[-1])
    return found


def _answer(line: str) -> str:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return str(server.stdout.readline().strip())


@cache
def _server() -> subprocess.Popen[str]:
    """One for every process that tests; it ends with it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS))), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(TESTS / "interpreter_server.py")], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
