"""Artifacts of tiny pipelines, saved once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tiny
from bitbrush.artifact import save as save_module
from bitbrush.numbers.grid import Plan

EXTRAS = {"proof.json": b'{"equal": true}\n', "recipe.toml": b'name = "rtn"\n', "history.json": b"{}\n"}


@dataclass(frozen=True)
class Saved:
    """An artifact, the packed pipeline it was saved from, and that pipeline's denoiser's output."""

    folder: Path
    pipe: Any
    plan: Plan
    output: Tensor


Saver = Callable[..., Saved]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """``saved(kind, bits, **choices)``: the artifact of `tiny.quantized_pipeline`; do not change it."""
    known: dict[Any, Saved] = {}

    def make(kind: tiny.Kind = "text", bits: int = 4, **choices: Any) -> Saved:
        key = (kind, bits, *sorted(choices.items()))
        if key not in known:
            pipe, plan = tiny.quantized_pipeline(kind, bits, **choices)
            output = tiny.run(pipe.unet)
            folder = save_module.save(pipe, tmp_path_factory.mktemp("artifact") / "out", plan, EXTRAS)
            known[key] = Saved(folder, pipe, plan, output)
        return known[key]

    return make


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
