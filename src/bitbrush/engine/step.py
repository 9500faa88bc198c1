"""What a step is: it names its units, does one, and applies a unit's result to the model.

``do`` changes nothing that outlives it; its result goes to the journal first and is then applied, whether it was just
computed or read back after a crash. That is why a resumed run ends with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bitbrush.numbers.grid import LayerSpec, Plan

if TYPE_CHECKING:
    from bitbrush.engine.run import Run
    from bitbrush.network.survey import Survey


@dataclass
class UnitResult:
    """What one unit changed: tensors, plan entries, and notes (small JSON facts for the history)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plan: dict[str, LayerSpec] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, as JSON: ``plan`` and ``notes``."""
        return {"plan": {k: spec.model_dump(mode="json") for k, spec in self.plan.items()}, "notes": self.notes}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Self:
        """Inverse of `facts`; other keys are left alone."""
        plan = {k: LayerSpec.model_validate(spec, strict=False) for k, spec in facts["plan"].items()}
        return cls(tensors, plan, facts["notes"])


def short(value: float) -> float:
    """A figure for the notes of a unit: six digits."""
    return float(f"{value:.6g}")


class Step(BaseModel):
    """A step of a recipe. Its fields are the keys of its TOML table; defaults live here and nowhere else.

    ``id`` names the step in ``--set id.key=value`` and in the journal; it defaults to ``do``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    do: str
    id: str = ""

    @property
    def label(self) -> str:
        """The step's name for people."""
        return self.id or self.do

    @property
    def kind(self) -> str:
        """What it does, in the words of `needs` and `not_after`."""
        return self.do

    @property
    def needs(self) -> tuple[str, ...]:
        """Kinds of steps that must have come before it."""
        return ()

    @property
    def not_after(self) -> tuple[str, ...]:
        """Kinds of steps whose outcome it would spoil."""
        return ()

    @property
    def sees_activations(self) -> bool:
        """Whether what the plan says of activations has a part in the result; if not, arms may share it (`Cache`)."""
        return True

    @property
    def aside(self) -> bool:
        """Whether only steps that need this kind by name look at its result: with or without it, others do the same."""
        return False

    def check(self, survey: Survey, plan: Plan) -> None:
        """Look at the model's sites and the plan, before anything slow.

        Raises:
            InputError: The step cannot do here what its settings ask for.
        """

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """The specs that it will change, as far as they are known before it runs: for the estimate."""
        return {}

    def units(self, run: Run) -> list[str]:
        """Names of the units, in order. Must be the same on every call of one run."""
        return [self.label]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Compute one unit. Randomness comes from ``generator`` only, derived from (seed, step, unit)."""
        return UnitResult()

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Bring a unit's result into the model; called right after ``run_unit`` and again on resume."""

    def needs_prompts(self) -> int:
        """How many prompts this step wants from a text-to-image pipeline."""
        return 0
