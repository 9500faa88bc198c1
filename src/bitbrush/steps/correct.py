"""trajectories and correct: constants a timestep that pull the packed network's chain back to the float one (TAC).

``trajectories`` samples from the float network, with prompts and noise of its own label, and keeps every step. Its
samples do not join the tape, so the steps between are what they would be without a correction. ``correct`` comes last:
it is fitted on the packed network, which is what will be deployed (`bitbrush.steps.chain`), and hooked to the denoiser.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.engine.tape import Tape
from bitbrush.errors import InputError
from bitbrush.network import correction
from bitbrush.network.correction import CorrectionSpec
from bitbrush.network.pipelines import takes_prompt
from bitbrush.steps import chain
from bitbrush.steps.calibrate import Calibrate, calibration


class Trajectories(Step):
    """Record whole trajectories of the float network.

    Args:
        samples: How many; one prompt each.
        steps, guidance: Of a trajectory; left out: those of the calibrate step.
        batch: Trajectories run together.
    """

    samples: int = Field(default=32, ge=2)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = None
    batch: int = Field(default=16, ge=1)

    @property
    def needs(self) -> tuple[str, ...]:
        """Whose settings it takes where it has none."""
        return ("calibrate",)

    @property
    def not_after(self) -> tuple[str, ...]:
        """Packing frees the float weights; and once is enough."""
        return ("pack", "trajectories")

    @property
    def aside(self) -> bool:
        """Nobody but the correction looks at these samples."""
        return True

    def needs_prompts(self) -> int:
        """One prompt a trajectory."""
        return self.samples

    def units(self, run: Run) -> list[str]:
        """Batches of trajectories."""
        return self.sampler(run).units(run)

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Sample one batch."""
        return self.sampler(run).run_unit(run, unit, generator)

    def sampler(self, run: Run) -> Calibrate:
        """The calibrate step that does the work, under this step's label."""
        base = calibration(run)
        return Calibrate(
            do="calibrate", id=self.label, samples="all", trajectories=self.samples, batch=self.batch,
            steps=base.steps if self.steps is None else self.steps,
            guidance=base.guidance if self.guidance is None else self.guidance,
        )


class Correct(Step):
    """Fit a correction of the packed network and store it.

    Args:
        method: ``tac``: a factor on the estimate and a shift of the input, a sampling step and channel.
        samples: Trajectories looked at; None: all that were recorded.
        l1: Weight of the relative error, from 0 to 1; the absolute error has 1 - l1.
        l2: Weight that keeps the factor near 1.
        tau: Elements of the estimate below tau times their mean size are left out of the fit.
        rel_reduction: ``mean``: the relative error is a mean, as the absolute one is; ``sum``: as published.
        input_term: Whether the input is corrected too.
        fit: What the factor is fitted on: ``branches``, the estimates of both halves of a guided call alike;
            ``guided``, the estimate that they make together; ``state``, what the scheduler makes of that estimate: the
            error of the next state. Where its update is not linear, ``state`` is as ``branches``, and the run says so.
            These three are least squares, which noise in the quantized estimate draws towards 0. ``even`` is not:
            factor K and a constant k on the estimate leave the next error r = step(K q + k, xq) - step(e, x) with
            mean r = 0 and mean r (e - mean e) = 0 in every channel, for any scheduler. There ``l1``, ``l2`` and ``tau``
            say nothing, and ``input_term`` says whether k is fitted: it is the next input's shift, told a step earlier.
        significance: Factor less 1 and input shift (or k) are shrunk towards 0 by this many of their standard errors
            over trajectories, and are 0 within them; 0: the factor is taken as it is, the shift where it exceeds two.
        granularity: One number a channel, or one for all.
        clamp: Factors stay between 1 / clamp and clamp.
    """

    method: Literal["tac"] = "tac"
    samples: int | None = Field(default=None, ge=2)
    l1: float = Field(default=0.5, ge=0, le=1)
    l2: float = Field(default=0.1, ge=0)
    tau: float = Field(default=0.5, ge=0)
    rel_reduction: Literal["mean", "sum"] = "mean"
    input_term: bool = True
    fit: Literal["branches", "guided", "state", "even"] = "branches"
    significance: float = Field(default=0.0, ge=0)
    granularity: Literal["channel", "scalar"] = "channel"
    clamp: float = Field(default=2.0, ge=1)

    @property
    def needs(self) -> tuple[str, ...]:
        """The float chain, and the network that is deployed."""
        return ("trajectories", "pack")

    @property
    def not_after(self) -> tuple[str, ...]:
        """One correction."""
        return ("correct",)

    @property
    def rule(self) -> chain.Rule:
        """How the walk along the chain fits."""
        return chain.Rule(self.l1, self.l2, self.tau, self.rel_reduction, self.granularity, self.clamp, self.input_term,
                          self.fit, self.significance)

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Walk the chain without a correction, to know its error, and fitting.

        Where the scheduler cannot be told of the input term, the fit is made with and without that term, and the one
        with the smaller error at the last input is kept.
        """
        source = _source(run)
        sampler = source.sampler(run)
        recorded = _Recorded(run, source, self.samples)
        scheduler, steps = run.pipeline.scheduler, sampler.steps
        rule = self.rule

        def walk(chosen: chain.Rule | None) -> chain.Walk:
            return chain.walk(recorded.moments, recorded.network, scheduler, steps, rule=chosen,
                              options=_step_options(run.pipeline), guidance=sampler.guidance)

        plain, fitted = walk(None), walk(rule)
        factors, why = chain.folding(scheduler, steps)
        fit = "branches" if self.fit == "state" and factors is None else self.fit
        if fit != self.fit:
            run.progress.say(f"The correction is fitted for the estimate, not for the next state: {why}.")
        if rule.shifts_input and factors is None:  # half of the input term: the network alone sees it
            without = walk(replace(rule, input_term=False))
            fitted = min(without, fitted, key=lambda walk: walk.error[-1])
            why += "; without its part for the scheduler the input term does not help" * (fitted is without)
        spec = self._spec(run, fitted, sampler, factors is not None, why if rule.shifts_input else "")
        facts = {
            "in_words": spec.in_words(), "samples": recorded.count,
            "fit": fit, "factors": int((fitted.scale != 1).sum()), "shifts": int((fitted.shift != 0).sum()),
            "constants": int((fitted.bias != 0).sum()),
            "error_without": [round(v, 6) for v in plain.error], "error_with": [round(v, 6) for v in fitted.error],
        }
        if fitted.error[-1] > plain.error[-1]:
            run.progress.say("The correction does not help here: the error of the last input is "
                             f"{fitted.error[-1]:.4g} with it and {plain.error[-1]:.4g} without.")
        return UnitResult(fitted.tables(), notes={"correction": {**spec.model_dump(mode="json"), **facts}})

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Hook the correction to the denoiser."""
        facts = {k: v for k, v in result.notes["correction"].items() if k in CorrectionSpec.model_fields}
        spec = CorrectionSpec.from_json(facts)
        correction.install(run.model, spec, dict(result.tensors)).watch(run.pipeline)

    def _spec(self, run: Run, fitted: chain.Walk, sampler: Calibrate, folded: bool, why: str) -> CorrectionSpec:
        term: Literal["folded", "network", "none"] = "folded" if folded else "network"
        term = term if bool(fitted.shift.any()) else "none"
        return CorrectionSpec(
            method=self.method, scheduler=type(run.pipeline.scheduler).__name__,
            timesteps=tuple(chain.timesteps_of(run.pipeline.scheduler, sampler.steps)),
            channels=fitted.scale.shape[1], guidance=sampler.guidance if takes_prompt(run.pipeline) else None,
            input_term=term, why=why,
        )


class _Recorded:
    """The recorded trajectories as `chain.walk` asks for them."""

    def __init__(self, run: Run, source: Trajectories, limit: int | None) -> None:
        sampler = source.sampler(run)
        times = chain.timesteps_of(run.pipeline.scheduler, sampler.steps)
        self.run = run
        self.tape = Tape(run.tape.scratch, run.device, run.tape.budget, run.tape.dtype)
        for unit in source.units(run):
            self.tape.add(run.journal.path_of(source.label, unit), source.label)
        table = self.tape.table()
        if table.shape[1] != len(times) or bool((table < 0).any()):
            raise InputError("the recorded trajectories are not whole", where="step correct",
                             why=f"expected {len(times)} timesteps in each, found {table.shape[1]}",
                             try_="use a scheduler that visits each timestep once, such as DDIMScheduler")
        self.table = table[:limit]
        self.count = len(self.table)

    def moments(self, step: int) -> tuple[Tensor, Tensor]:
        """(input, estimate) of the float network."""
        halves = [self._read(step, half) for half in range(self.table.shape[2])]
        sample = torch.cat([batch["sample"] for batch in halves[0]])
        estimates = torch.cat([batch["output"] for half in halves for batch in half])
        found = sample.to(self.run.device).float(), estimates.to(self.run.device).float()
        if found[0].shape[1:] != found[1].shape[1:]:
            raise InputError("the estimate has another shape than the sample", where="step correct",
                             why="the network also predicts a variance", try_="leave the correction out")
        return found

    def network(self, step: int, x: Tensor) -> Tensor:
        """The packed network's estimate for other inputs, under the recorded conditions."""
        parts = []
        with torch.no_grad():
            for half in range(self.table.shape[2]):
                start = 0
                for batch in self._read(step, half):
                    stop = start + len(batch["timestep"])
                    args, kwargs = self.tape.inputs({**batch, "sample": x[start:stop]})
                    parts.append(self.run.model(*args, **kwargs).sample.float())
                    start = stop
        return torch.cat(parts)

    def _read(self, step: int, half: int) -> list[dict[str, Tensor]]:
        return list(self.tape.select(self.table[:, step, half].tolist(), size=self.tape.batch))


def _source(run: Run) -> Trajectories:
    return next(step for step in run.recipe.steps if isinstance(step, Trajectories))


def _step_options(pipeline: Any) -> dict[str, Any]:
    """What the pipeline's call passes on to the scheduler's step, as `pipelines.sample_latents` asks for it."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    wanted = {"eta": 0.0, "use_clipped_model_output": True} if not takes_prompt(pipeline) else {}
    return {name: value for name, value in wanted.items() if name in accepted}
