"""Rows of a measurement that takes long, one durable line each, so that a stopped one goes on where it was.

    FOLDER/<key>/facts.json   what the rows follow from; the key is its hash
    FOLDER/<key>/rows.jsonl   one JSON object a line, each with a digest of itself
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitbrush.engine.disk import Disk

CHECK = "check"


class RowLog:
    """Rows by their names.

    Args:
        folder: Made where it is missing.
        facts: JSON values that decide about the rows; other facts are another log beside this one.
        disk: The writer.
    """

    def __init__(self, folder: Path | str, facts: Mapping[str, Any], disk: Disk | None = None) -> None:
        self.disk = disk or Disk()
        text = json.dumps(facts, sort_keys=True, indent=1)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.disk.make(self.folder)
        if not (self.folder / "facts.json").exists():
            self.disk.write(self.folder / "facts.json", text.encode())
        self.path = self.folder / "rows.jsonl"
        self.rows = self._read()

    def find(self, name: str) -> dict[str, Any] | None:
        """The row of this name, if it was measured."""
        return self.rows.get(name)

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Make a row durable; it is there whole or not at all."""
        line = _line(name, row)
        self.disk.append(self.path, line)
        self.rows[name] = json.loads(line)["row"]

    def _read(self) -> dict[str, dict[str, Any]]:
        """Rows up to the first line that is torn or damaged; what follows is cut off."""
        data = self.path.read_bytes() if self.path.exists() else b""
        found: dict[str, dict[str, Any]] = {}
        good = b""
        for line in data.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
                whole = line + b"\n" == _line(entry["name"], entry["row"])
            except (ValueError, KeyError, TypeError):
                break
            if not whole:
                break
            found[entry["name"]] = entry["row"]
            good += line + b"\n"
        if good != data:
            self.disk.write(self.path, good)
        return found


def _line(name: str, row: Mapping[str, Any]) -> bytes:
    body = {"name": name, "row": dict(row)}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps(body | {CHECK: digest}, sort_keys=True).encode() + b"\n"
