"""What `bitbrush recipes` shows."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any


def listing() -> list[dict[str, Any]]:
    """Name, title and presets of every bundled recipe, read from the files themselves."""
    rows = []
    for file in sorted((files("bitbrush") / "recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            data = tomllib.loads(file.read_text(encoding="utf-8"))
            name = file.name.removesuffix(".toml")
            rows.append({"name": name, "title": data.get("title", ""), "presets": sorted(data.get("preset", {}))})
    return rows


def expanded(name: str, weights: int | None, activations: int | None, preset: str | None) -> str:
    """A recipe in full as TOML, with bits and preset applied.

    Raises:
        InputError: No such recipe or preset, or bits out of 1 to 8.
    """
    import bitbrush

    return bitbrush.read_recipe(name, weights, activations, preset).to_toml()
