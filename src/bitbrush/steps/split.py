"""split: quantize the parts of a concatenated input apart (Q-Diffusion, section 3.4 of the paper).

The input of an up block's shortcut convolution joins deep features with a skip connection of another range. Each part
gets its own activation scale and its own weight scale a row; the product is the sum of the parts' products. The
boundary comes from the survey, which saw the concatenation.
"""

from __future__ import annotations

import torch

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import LayerSpec, Plan


class Split(Step):
    """Give layers whose input is a concatenation one segment for each part.

    Args:
        enabled: ``false`` leaves every layer whole, for comparison.
    """

    enabled: bool = True

    @property
    def not_after(self) -> tuple[str, ...]:
        """Ranges belong to the segments."""
        return ("smooth", "fit weights", "codebooks", "fit activations", "pack")

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """Every such layer, in segments."""
        return {
            site.name: plan.layers[site.name].model_copy(update={"segments": site.boundary})
            for site in survey.layers()
            if self.enabled and site.boundary and site.name in plan.layers
        }

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Change the plan of every such layer."""
        changes = self.foresee(run.survey, run.plan)
        return UnitResult(plan=changes, notes={"layers": len(changes)})
