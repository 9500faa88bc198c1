"""Results of units that runs which begin alike share: arms of a comparison need not calibrate and round again.

A unit's result depends on the model, prompts, seed, kind of device and versions, on the recipe's layers and bits, and
on the steps up to its own; its key is the hash of all that. Later steps do not count. Up to the first step that looks
at activations (`Step.sees_activations`) what the recipe says of them does not count either: arms that differ in their
activations have the very same weights. (Alone, such a run may round a weight differently, where operands of attention
are quantized in one arm and not in another: scores written out and fused kernels differ in their last digits.)
A step that stands aside (`Step.aside`) counts for those alone that need it: with a correction or without, the network
under it is the same one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bitbrush.engine.disk import Disk
from bitbrush.engine.recipe import Recipe
from bitbrush.engine.sealed import seal, unseal
from bitbrush.engine.step import UnitResult

NOT_OF_THE_RESULT = ("step", "name", "title", "paper")
"""Keys of a recipe that say nothing of what a step does."""


class Cache:
    """A folder of results.

    Args:
        folder: Created where it is missing; several runs may use it, and it may be removed at any time.
        fingerprint: What the run depends on, beside the recipe.
        recipe: Its steps.
        disk: The writer.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str], recipe: Recipe, disk: Disk) -> None:
        self.folder, self.disk = folder, disk
        self.found = 0
        table = {k: v for k, v in recipe.to_dict().items() if k not in NOT_OF_THE_RESULT}
        key, whole = _hash([fingerprint, _of_weights(table)]), False
        self.keys: dict[str, str] = {}
        aside: dict[str, str] = {}
        for step in recipe.steps:
            own = [step.model_dump(mode="json"), *(aside[kind] for kind in step.needs if kind in aside)]
            if step.aside:
                self.keys[step.label] = aside[step.kind] = _hash([key, table, *own])
                continue
            if step.sees_activations and not whole:
                key, whole = _hash([key, table]), True
            key = _hash([key, *own])
            self.keys[step.label] = key

    def find(self, step: str, unit: str) -> UnitResult | None:
        """The result of a unit in another run that began alike, or None."""
        path = self._path(step, unit)
        whole = unseal(path.read_bytes()) if path.exists() else None
        if whole is None:
            return None
        self.found += 1
        return UnitResult.of(*whole)

    def keep(self, step: str, unit: str, result: UnitResult) -> None:
        """Keep a result for other runs."""
        self.disk.make(self.folder)
        self.disk.write(self._path(step, unit), seal(result.tensors, result.facts()), shared=True)

    def _path(self, step: str, unit: str) -> Path:
        return self.folder / f"{_hash([self.keys[step], unit])}.unit"


def _of_weights(table: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of weights; of the rules those that do, in order."""
    rules = [[pattern, rule["weight"]] for pattern, rule in table["layers"].items() if rule["weight"] is not None]
    return {k: v for k, v in table.items() if k not in ("layers", "activations")} | {"layers": rules}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
