"""split: quantize the parts of a concatenated input apart (Q-Diffusion, section 3.4 of the paper).

The input of an up block's shortcut convolution joins deep features with a skip connection of another range. Each part
gets its own activation scale and its own weight scale a row; the product is the sum of the parts' products. The
boundary comes from the survey, which saw the concatenation.

With ``group`` the channels of every layer are cut into stretches of that many instead (at the boundary, too): weights
then have a scale for each row and group of input channels. Activation scales of a tensor follow them; those found for a
token's groups have groups of their own.
"""

from __future__ import annotations

import torch
from pydantic import Field

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers.grid import LayerSpec, Plan


class Split(Step):
    """Give layers whose input is a concatenation one segment for each part.

    Args:
        group: Most input channels in a segment; 0: the parts of a concatenation only.
        enabled: ``false`` leaves every layer whole, for comparison.
    """

    group: int = Field(default=0, ge=0)
    enabled: bool = True

    @property
    def not_after(self) -> tuple[str, ...]:
        """Ranges belong to the segments."""
        return ("smooth", "low_rank", "fit weights", "codebooks", "fit activations", "pack")

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """Every such layer, in segments."""
        found = {site.name: self._segments(site) for site in survey.layers() if site.name in plan.layers}
        return {
            name: plan.layers[name].model_copy(update={"segments": segments})
            for name, segments in found.items() if self.enabled and segments
        }

    def _segments(self, site: Site) -> tuple[int, ...]:
        """Input channels of each segment; none where the layer stays whole."""
        parts = site.boundary or (site.shape[1],)
        if not self.group:
            return site.boundary
        cut = [min(self.group, count - start) for count in parts for start in range(0, count, self.group)]
        return tuple(cut) if len(cut) > 1 else ()

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Change the plan of every such layer."""
        changes = self.foresee(run.survey, run.plan)
        return UnitResult(plan=changes, notes={"layers": len(changes)})
