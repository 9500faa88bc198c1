"""The process of a slot of `arms.py`: runs of `quality.py`, one after another."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import quality
import torch


def serve() -> None:
    """Run what comes in, one after another in this process, so that libraries are loaded once: a line is
    ``{"words": arguments, "log": file}``, the answer 0 or 1, on a line, too. What a run prints goes to its file."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library writes past Python is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        with open(asked["log"], "a") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                quality.main(asked["words"])
                code = 0
            except (Exception, SystemExit):  # noqa: BLE001 - the others go on
                traceback.print_exc()
                code = 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other runs may share the card
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    serve()
