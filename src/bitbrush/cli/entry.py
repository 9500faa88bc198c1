"""Where every error ends: one message in four parts, one exit code a family, a traceback only with ``--debug``.

Exit codes: 0 done; 2 usage; 3 to 6 the families of `bitbrush.errors`; 130 interrupted; 70 a bug.
With ``--json`` an error is a JSON object on standard output, as a result would be.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import typer

from bitbrush.cli.quiet import notices, quiet
from bitbrush.cli.render import Screen
from bitbrush.errors import BitbrushError, InputError, InternalError, InterruptedRun, ResourceError


class UsageError(BitbrushError):
    """A flag or an argument that the command does not know."""

    exit_code = 2
    family = "usage error"


def run() -> None:
    """The console script: `main` with SIGTERM treated like Ctrl-C, so that a stopped run is saved and says so."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after ``bitbrush``; those of the process when None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    screen = Screen(as_json="--json" in words, debug="--debug" in words)
    quiet(debug=screen.debug)
    try:
        with notices(screen.note):
            return _dispatch(words)
    except typer.TyperException as error:
        return _usage(screen, error)
    except BitbrushError as error:
        return _report(screen, error)
    except (KeyboardInterrupt, typer.Abort):
        return _report(screen, _interrupted())
    except Exception as error:  # noqa: BLE001 - the one place that may: everything unforeseen becomes an InternalError
        return _report(screen, _unforeseen(error))


def _dispatch(words: list[str]) -> int:
    from bitbrush.cli.app import app

    outcome = typer.main.get_command(app).main(args=words, prog_name="bitbrush", standalone_mode=False)
    if outcome == InterruptedRun.exit_code:  # the parser swallows Ctrl-C and returns the code
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report(screen: Screen, error: BitbrushError) -> int:
    screen.error(error)
    if screen.debug:
        traceback.print_exc(file=sys.stderr)
    return error.exit_code


def _usage(screen: Screen, error: typer.TyperException) -> int:
    """A wrong flag or a missing argument: the parser's words in our shape."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if not text or text.startswith("Usage:"):  # no words at all: the help is the answer
        sys.stdout.write(text + "\n" if text else "")
        return UsageError.exit_code
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "bitbrush"
    why = "the command line was not understood"
    return _report(screen, UsageError(text, where=command, why=why, try_=f"{command} --help"))


def _interrupted() -> InterruptedRun:
    return InterruptedRun(
        "interrupted",
        where="the command line",
        why="Ctrl-C or a stop signal",
        try_="bitbrush resume OUT, where a quantization was running; it goes on from the last finished unit",
    )


def _unforeseen(error: Exception) -> BitbrushError:
    """An error that nobody raised on purpose, as a family: out of memory, a full disk, or else a bug."""
    where = _place(error)
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", where=where, why=str(error) or None, try_="close other programs")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(
            "the disk is full", where=where, why=str(error), try_="free space, then bitbrush resume OUT"
        )
    if any("operator torchvision::" in str(cause) for cause in _causes(error)):
        return InputError(
            "the torchvision installed here belongs to another build of torch", where="importing transformers",
            why="its operators are missing, and transformers imports it wherever it finds it",
            try_="pip uninstall torchvision (bitbrush does not need it), or install the one made for this torch",
        )  # fmt: skip
    return InternalError(
        f"{type(error).__name__}: {error}",
        where=where,
        why="nothing in bitbrush expects this: it is a bug, here or in a library below",
        try_="run the same command with --debug, and report the traceback",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error: Exception) -> str:
    """File, line and function of the innermost frame that is ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "bitbrush" in frame.filename] or list(frames)
    if not ours:
        return "unknown"
    frame = ours[-1]
    name = frame.filename.rpartition("bitbrush")[2].lstrip("/\\") or frame.filename
    return f"{name}, line {frame.lineno}, in {frame.name}"
