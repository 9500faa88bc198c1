"""Prompt files: what is accepted, and what each refusal says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitbrush import prompts as module
from bitbrush.errors import InputError
from bitbrush.prompts import check_enough, read_prompts

ACCEPTED = {
    "plain": (b"red apple\nblue car\n", ["red apple", "blue car"]),
    "no last line end": (b"red apple\nblue car", ["red apple", "blue car"]),
    "bom": (b"\xef\xbb\xbfred apple\n", ["red apple"]),
    "crlf": (b"red apple\r\nblue car\r\n", ["red apple", "blue car"]),
    "blank lines": (b"\n\nred apple\n   \n\tblue car  \n\n", ["red apple", "blue car"]),
    "bom before a blank line": (b"\xef\xbb\xbf\nred apple\n", ["red apple"]),
    "unicode": ("größe 🍎\n日本\n".encode(), ["größe 🍎", "日本"]),
    "a hash is no comment": (b"# 1 fan\n", ["# 1 fan"]),
    "duplicates stay": (b"a\na\n", ["a", "a"]),
    "bidi control": ("a\u202eb\n".encode(), ["a\u202eb"]),
    "the longest line": (b"x" * 10_000 + b"\r\n", ["x" * 10_000]),
}

REFUSED = {
    "empty": (b"", "holds no prompt", ""),
    "only blanks": (b"\n \r\n\t\n", "holds no prompt", ""),
    "only bom": (b"\xef\xbb\xbf", "holds no prompt", ""),
    "latin-1": (b"red apple\nbl\xfce\n", "not UTF-8", "line 2"),
    "latin-1 byte": (b"red apple\nbl\xfce\n", "not UTF-8", "byte 0xfc at byte 3"),
    "latin-1 after bom": (b"\xef\xbb\xbfbl\xfce\n", "not UTF-8", "byte 0xfc at byte 6"),
    "surrogate": (b"\xed\xa0\x80\n", "not UTF-8", "line 1"),
    "overlong": (b"\xc0\xaf\n", "not UTF-8", "0xc0"),
    "cut at the end": (b"a\n\xf0\x9f\x8d", "not UTF-8", "line 2"),
    "utf-16 little": ("red".encode("utf-16-le").join([b"\xff\xfe", b""]), "not UTF-8", "UTF-16"),
    "utf-16 big": (b"\xfe\xff\0r\0e\0d", "not UTF-8", "UTF-16"),
    "utf-16 without bom": ("red".encode("utf-16-le"), "not a text file", "NUL at byte 2"),
    "nul": (b"red\0apple\n", "not a text file", "NUL at byte 4"),
    "long line": (b"ok\n" + b"x" * 10_001 + b"\n", "longer than 10,000 bytes", "line 2"),
    "10 MB line": (b"x" * 10_000_000, "longer than 10,000 bytes", "line 1"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path: Path, name: str) -> None:
    content, expected = ACCEPTED[name]
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_prompts(path) == expected
    assert read_prompts(str(path)) == expected


def four_parts(error: InputError) -> str:
    assert all(isinstance(part, str) and part for part in (error.what, error.where, error.why, error.try_))
    assert error.exit_code == 3
    return str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    content, what, detail = REFUSED[name]
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        read_prompts(path)
    text = four_parts(caught.value)
    assert detail in text
    assert str(path) in text


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        read_prompts(tmp_path / "none.txt")
    assert "none.txt" in four_parts(caught.value)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder") as caught:
        read_prompts(tmp_path)
    four_parts(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n")
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_prompts(path)
    four_parts(caught.value)


def test_sparse_gigabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="longer than"):
        read_prompts(path)


def test_line_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_LINES == 1_000_000
    monkeypatch.setattr(module, "MAX_LINES", 100)
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a\n" * 100)
    assert len(read_prompts(path)) == 100
    path.write_bytes(b"\n" * 101)
    with pytest.raises(InputError, match="more than 100 lines") as caught:
        read_prompts(path)
    four_parts(caught.value)


def test_check_enough() -> None:
    check_enough(["a", "b"], 2)
    check_enough(["a", "b"], 0)
    with pytest.raises(InputError, match="64 prompts are needed, 2 were given") as caught:
        check_enough(["a", "b"], 64)
    four_parts(caught.value)
