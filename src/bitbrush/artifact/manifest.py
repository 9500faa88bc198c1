"""The manifest ``bitbrush.json``: every file of an artifact with its size and SHA-256, written last.

    {"format": 1, "bitbrush": "0.1.0", "files": {"unet/config.json": {"size": 1234, "sha256": "..."}}, "digest": "..."}

``digest`` is the SHA-256 of the rest in canonical form, and the bytes of the manifest must *be* its canonical form, so
that every byte of an artifact, the manifest's included, is covered by a hash. Unlisted files are refused unless they
are documents, pictures or dot files. Names follow one strict pattern; links are not followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitbrush
from bitbrush.errors import ArtifactError, InputError

NAME = "bitbrush.json"
FORMAT = 1
MAX_BYTES = 16 << 20
MAX_DEPTH = 32
LISTED = (".safetensors", ".json", ".toml", ".txt", ".model", ".jinja")
HARMLESS = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".html", ".pdf", ".csv", ".log")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".msgpack", ".h5")

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_PATTERN = re.compile(rf"(?:{_PART}/){{0,3}}{_PART}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """Files of an artifact: name to (size in bytes, SHA-256 in hexadecimal), the writer's version, and the format."""

    files: dict[str, tuple[int, str]]
    version: str
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Canonical form, as written to disk."""
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        body: dict[str, Any] = {"format": self.format, "bitbrush": self.version, "files": files}
        body["digest"] = hashlib.sha256(canonical(body)).hexdigest()
        return canonical(body)


def canonical(value: object) -> bytes:
    """JSON with sorted keys, two spaces of indent and a final newline, in ASCII."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def version() -> str:
    """The version of this package."""
    return str(getattr(bitbrush, "__version__", "0"))


def describe(folder: Path, names: list[str]) -> Manifest:
    """The manifest of files as they are on disk."""
    return Manifest({name: (os.stat(folder / name).st_size, _sha256(folder, name)) for name in names}, version())


def check(folder: Path | str, fast: bool = False) -> Manifest:
    """Check an artifact against its manifest.

    Args:
        folder: The artifact.
        fast: Compare names and sizes only, not the hashes.

    Raises:
        InputError: No such folder.
        ArtifactError: It is foreign, of another format version, truncated, changed, or has files missing or added.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), why="an artifact is a folder with a bitbrush.json",
                         try_="give the OUT folder of `bitbrush quantize`")
    found, special = list_files(folder)
    if special and special[0] != NAME:
        _refuse_special(folder, special[0])
    if NAME not in found:
        _foreign(folder, special)
    manifest = read(folder / NAME)
    _compare_names(folder, manifest, found)
    for name, (size, _) in manifest.files.items():
        _compare_size(folder, name, size)
    if not fast:
        for name, (_, digest) in manifest.files.items():
            if _sha256(folder, name) != digest:
                raise changed(folder / name, "its SHA-256 differs from the manifest's")
    return manifest


def read(path: Path) -> Manifest:
    """Parse and validate a manifest, without looking at the files it lists."""
    data = parse(_bytes(path), path)
    if not isinstance(data, dict):
        raise malformed(path, "the top level is not an object")
    number = data.get("format")
    if type(number) is not int or number < 1:
        raise malformed(path, f"format: expected a positive integer, got {str(number)[:40]!r}")
    if number != FORMAT:
        raise other_format(path, number)
    if set(data) != {"format", "bitbrush", "files", "digest"}:
        odd = sorted(set(data) ^ {"format", "bitbrush", "files", "digest"})
        raise malformed(path, f"keys missing or unknown: {', '.join(odd)[:120]}")
    if not isinstance(data["bitbrush"], str) or not isinstance(data["files"], dict):
        raise malformed(path, "bitbrush: expected a string; files: expected an object")
    files = {name: _entry(path, name, entry) for name, entry in data["files"].items()}
    manifest = Manifest(files, data["bitbrush"])
    if manifest.to_bytes() != _bytes(path):
        raise changed(path, "the manifest's own digest does not match its content")
    return manifest


def parse(data: bytes, path: Path) -> Any:
    """Strict JSON: at most 16 MB and 32 levels, UTF-8, no duplicate keys, no NaN or Infinity."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"not valid JSON: {str(error)[:160]}") from error
    if _depth(value) > MAX_DEPTH:
        raise malformed(path, f"nested deeper than {MAX_DEPTH} levels")
    return value


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """(regular files, everything else that is not a folder) below a folder; dot entries left out, no link followed."""
    files: list[str] = []
    special: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    special.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                else:
                    (files if entry.is_file(follow_symlinks=False) else special).append(name)
    return sorted(files), sorted(special)


def unlisted(found: list[str], listed: set[str]) -> list[str]:
    """Files that are neither listed nor harmless (documents and pictures)."""
    return [name for name in found if name not in listed and name != NAME and not name.lower().endswith(HARMLESS)]


def valid_name(name: str) -> bool:
    """Whether a name may stand in a manifest."""
    return _PATTERN.fullmatch(name) is not None and ".." not in name and name.endswith(LISTED) and name != NAME


def changed(path: Path, why: str) -> ArtifactError:
    """The error for bytes that are not those that were written."""
    return ArtifactError(f"{path.name} has changed since it was saved", where=str(path), why=why,
                         try_="copy the artifact again, or quantize again")


def malformed(path: Path, why: str) -> ArtifactError:
    """The error for a file that does not follow the format."""
    return ArtifactError(f"{path.name} is malformed", where=str(path), why=why,
                         try_="copy the artifact again; never edit this file by hand")


def other_format(path: Path | str, number: int) -> ArtifactError:
    """The error for a format version that this release does not read."""
    newer = number > FORMAT
    return ArtifactError(
        f"the artifact has format version {number}; this release reads {FORMAT}", where=str(path),
        why="it was written by a newer release of bitbrush" if newer else "that format version was never released",
        try_="pip install --upgrade bitbrush" if newer else "quantize again with this release",
    )


def _entry(path: Path, name: str, entry: object) -> tuple[int, str]:
    if not valid_name(name):
        raise malformed(path, f"file name {name[:80]!r} is not allowed")
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        raise malformed(path, f"files.{name}: expected size and sha256")
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size < 1 << 50:
        raise malformed(path, f"files.{name}.size: expected a byte count")
    if not isinstance(digest, str) or _HEX.fullmatch(digest) is None:
        raise malformed(path, f"files.{name}.sha256: expected 64 hexadecimal digits")
    return size, digest


def _compare_names(folder: Path, manifest: Manifest, found: list[str]) -> None:
    missing = sorted(set(manifest.files) - set(found))
    if missing:
        raise ArtifactError(f"{len(missing)} of {len(manifest.files)} files are missing, first: {missing[0]}",
                            where=str(folder / missing[0]), why="the manifest lists it",
                            try_="copy the artifact again, or `bitbrush resume OUT`")
    for name in unlisted(found, set(manifest.files)):
        pickle = name.lower().endswith(PICKLES)
        why = "only .safetensors is accepted; pickles can run code" if pickle else "the manifest does not list it"
        raise ArtifactError(f"{name} does not belong to the artifact", where=str(folder / name), why=why,
                            try_="remove the file if you do not need it")


def _compare_size(folder: Path, name: str, size: int) -> None:
    found = os.stat(folder / name, follow_symlinks=False).st_size
    if found < size:
        raise ArtifactError(f"{name} is {100 * found // size} % complete", where=str(folder / name),
                            why=f"expected {size:,} bytes, found {found:,}",
                            try_="copy the artifact again, or `bitbrush resume OUT`")
    if found > size:
        raise changed(folder / name, f"expected {size:,} bytes, found {found:,}")


def _foreign(folder: Path, special: list[str]) -> None:
    if NAME in special:
        _refuse_special(folder, NAME)
    unfinished = (folder / ".run").is_dir()
    raise ArtifactError(
        "the artifact is not finished" if unfinished else "not a bitbrush artifact", where=str(folder),
        why=f"there is no {NAME}" + (", which is written last" if unfinished else ""),
        try_=f"bitbrush resume {folder}" if unfinished else "bitbrush quantize MODEL -o OUT makes one",
    )


def _refuse_special(folder: Path, name: str) -> None:
    raise ArtifactError(f"{name} is not a regular file", where=str(folder / name),
                        why="links and devices are never followed", try_="copy the artifact with its real files")


def _bytes(path: Path) -> bytes:
    with open(path, "rb", opener=_no_follow) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise malformed(path, f"larger than {MAX_BYTES:,} bytes")
    return data


def _sha256(folder: Path, name: str) -> str:
    with open(folder / name, "rb", opener=_no_follow) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH + 1:
        depth += 1
        level = [child for item in level for child in
                 (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())]
    return depth
