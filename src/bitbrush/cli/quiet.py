"""Quiet libraries: on the command line the notes of diffusers and transformers that ask nothing of the user are hidden.

Done by logging level alone (their own documented variables), so errors still come through. ``--debug`` shows all, and a
level that the user has set is respected. Nothing here touches a process that merely imports bitbrush.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bitbrush.errors import Notice

LEVELS = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
          "KINETO_LOG_LEVEL": "99"}  # fmt: skip


def quiet(*, debug: bool) -> None:
    """Set the level for libraries that are not imported yet. Cheap: it imports nothing."""
    if not debug:
        for name, level in LEVELS.items():
            os.environ.setdefault(name, level)


def quiet_loading(*, debug: bool) -> None:
    """Hide the loading bars and the notes of libraries that are imported already.

    Call it inside a command, where diffusers is needed anyway.
    """
    if debug:
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for name, logging in (("DIFFUSERS_VERBOSITY", of_diffusers), ("TRANSFORMERS_VERBOSITY", of_transformers)):
        if os.environ.get(name) == LEVELS[name]:
            logging.set_verbosity_error()
        if sys.stderr.isatty() or os.environ.get(name) == LEVELS[name]:
            logging.disable_progress_bar()


@contextmanager
def notices(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, what a network says once goes to ``say``, without the file and line that Python puts before a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        show = warnings.showwarning

        def route(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                say(str(message))
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = route
        yield
