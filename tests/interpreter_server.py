"""Runs scripts with Triton's interpreter, each in a fork of this process, which has torch and Triton imported already:
that takes longer than most of them. Reads a JSON list a line: script, arguments, seconds, file for what it writes and
for its errors; answers with the script's status."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import triton.language  # noqa: F401

from bitbrush.kernels import int8_ops  # noqa: F401 - what nearly all of them import


def serve() -> None:
    """Until nobody asks any more."""
    for line in sys.stdin:
        script, args, seconds, out, error = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(_run(script, args, seconds, out, error))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _run(script: str, args: list[str], seconds: int, out: str, error: str) -> int:
    signal.alarm(seconds)
    sys.argv, sys.path[0] = [script, *args], str(Path(script).parent)
    with open(out, "w") as sys.stdout, open(error, "w") as sys.stderr:
        try:
            runpy.run_path(script, run_name="__main__")
            return 0
        except BaseException:  # noqa: BLE001 - told by whoever asked
            traceback.print_exc()
            return 1


if __name__ == "__main__":
    serve()
