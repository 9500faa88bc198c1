"""verify: the whole packed network against the simulation, on the probe that was taken before packing."""

from __future__ import annotations

import torch
from pydantic import Field

from bitbrush.engine.journal import generator as derived
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import NumericsError
from bitbrush.steps.pack import PROBE, Pack, probe_inputs, sqnr


class Verify(Step):
    """Fail the run unless the packed network computes what was simulated.

    Args:
        tolerance: Largest allowed difference, relative to the largest output. The CPU gives exact equality; GPU
            kernels may choose another summation order from call to call.
    """

    tolerance: float = Field(default=1e-3, ge=0)

    @property
    def needs(self) -> tuple[str, ...]:
        """The probe that packing leaves."""
        return ("pack",)

    @property
    def not_after(self) -> tuple[str, ...]:
        """What was simulated has no correction yet."""
        return ("correct",)

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Compare one packed forward with the probe's simulated output."""
        pack = next((step for step in run.recipe.steps if isinstance(step, Pack)), None)
        probe = run.journal.find(pack.label, PROBE) if pack is not None else None
        if pack is None or probe is None:
            raise NumericsError("there is no probe to verify against", where="step verify",
                                why="the pack step's probe is missing", try_="put `pack` before `verify`")
        args, kwargs = probe_inputs(run, pack.samples, derived(run.seed, pack.label, PROBE))
        with torch.no_grad():
            packed = run.model(*args, **kwargs).sample.cpu()
        simulated = probe.tensors["output"]
        difference = float((packed.float() - simulated.float()).abs().max())
        largest = float(simulated.abs().max())
        notes = {
            "equal": bool(torch.equal(packed, simulated)),
            "max_difference": difference,
            "sqnr_packed_vs_simulated_db": sqnr(simulated, packed),
            "sqnr_simulated_vs_float_db": probe.notes["sqnr_db"],
        }
        if not difference <= self.tolerance * largest:
            raise NumericsError("the packed network does not compute what was simulated", where="whole network",
                                why=f"largest difference {difference:.3g} of {largest:.3g}",
                                try_="report this with proof.json")
        return UnitResult(notes=notes)
