"""Reading prompt files: one prompt a line, UTF-8, checked before anything slow starts.

Accepted: a byte order mark at the start, CRLF line ends, blank lines (skipped), comments are *not* a thing: every
other line is a prompt, taken as it stands without the white space around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bitbrush.errors import InputError

MAX_LINES = 1_000_000
MAX_LINE_BYTES = 10_000
_BOM = b"\xef\xbb\xbf"


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in order.

    Args:
        path: A UTF-8 text file with one prompt a line; at most 1,000,000 lines of at most 10,000 bytes.

    Raises:
        InputError: The file is missing, is a folder, cannot be read, holds no prompt, is not UTF-8 (line and column
            are named), contains a NUL byte, or passes a limit.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        with path.open("rb") as file:
            prompts = [prompt for prompt in _prompts(file, path) if prompt]
    except OSError as error:
        raise InputError(
            "the prompt file cannot be read", where=str(path), why=error.strerror or str(error), try_="check its rights"
        ) from error
    if not prompts:
        raise InputError(
            "the prompt file holds no prompt",
            where=str(path),
            why="it is empty or has blank lines only",
            try_="write one prompt a line",
        )
    return prompts


def check_enough(prompts: Sequence[str], needed: int, *, where: str = "prompts") -> None:
    """Check that there are at least ``needed`` prompts.

    Raises:
        InputError: There are fewer.
    """
    if len(prompts) < needed:
        raise InputError(
            f"{needed:,} prompts are needed, {len(prompts):,} were given",
            where=where,
            why="a prompt is never used twice in silence",
            try_=f"give at least {needed:,} prompts, or ask for {len(prompts):,} or fewer",
        )


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(
            "the prompt file is a folder",
            where=str(path),
            why="a text file with one prompt a line is expected",
            try_="name the file inside it",
        )
    if not path.exists():
        raise InputError(
            "the prompt file does not exist",
            where=str(path),
            why=f"there is no such file in {path.absolute().parent}",
            try_="check the spelling, or leave --prompts out to use the bundled prompts",
        )


def _prompts(file: BinaryIO, path: Path) -> Iterator[str]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 3):  # room for the line end, so that the longest allowed line passes
        number += 1
        if number > MAX_LINES:
            raise InputError(
                f"the prompt file has more than {MAX_LINES:,} lines",
                where=str(path),
                why="that is the limit",
                try_=f"head -n {MAX_LINES} {path.name}",
            )
        line = raw.rstrip(b"\r\n")
        bom = number == 1 and line.startswith(_BOM)
        yield _decode(line.removeprefix(_BOM) if bom else line, path, number, offset=len(_BOM) if bom else 0)


def _decode(line: bytes, path: Path, number: int, offset: int) -> str:
    """One line without its end as text; ``offset`` bytes were cut off before it."""
    where = f"{path}, line {number:,}"
    if len(line) > MAX_LINE_BYTES:
        raise InputError(
            f"a line of the prompt file is longer than {MAX_LINE_BYTES:,} bytes",
            where=where,
            why="text encoders read some 77 tokens; such a line is not a prompt",
            try_="check that the file has one prompt a line",
        )
    if number == 1 and offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            "the prompt file is not UTF-8",
            where=where,
            why="it begins like UTF-16",
            try_=f"iconv -f UTF-16 -t UTF-8 {path.name} > prompts-utf8.txt",
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "the prompt file is not UTF-8",
            where=where,
            why=f"byte 0x{line[error.start]:02x} at byte {error.start + offset + 1} of the line: {error.reason}",
            try_="save the file as UTF-8",
        ) from error
    if "\0" in text:
        raise InputError(
            "the prompt file is not a text file",
            where=where,
            why=f"NUL at byte {line.index(0) + offset + 1} of the line",
            try_="give a text file with one prompt a line",
        )
    return text.strip()
