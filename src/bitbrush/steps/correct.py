"""trajectories and correct: constants a timestep that pull the packed network's chain back to the float one (TAC).

``trajectories`` samples from the float network, with prompts and noise of its own label, and keeps every step. Its
samples do not join the tape, so the steps between are what they would be without a correction. ``correct`` comes last:
it is fitted on the packed network, which is what will be deployed (`bitbrush.steps.chain`), and hooked to the denoiser.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from bitbrush.engine.recipe import CORRECTIONS
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InternalError
from bitbrush.network import correction
from bitbrush.network.correction import CorrectionSpec
from bitbrush.network.pipelines import takes_prompt
from bitbrush.steps import chain, nearer
from bitbrush.steps.beside import Chains
from bitbrush.steps.calibrate import Calibrate, calibration

TRIED = ("tac-mean", "tac-state", "tac-even")
"""Forms that ``fit = "auto"`` chooses from; the published one was never the best of them."""


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
            ``auto`` tries those of `TRIED` on trajectories that they were not fitted to, and takes the best or none;
            other settings than ``samples`` then say nothing.
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
    fit: Literal["branches", "guided", "state", "even", "auto"] = "branches"
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
        """How the walk along the chain fits. Raises InternalError where that is still to be found (``auto``)."""
        if self.fit == "auto":
            raise InternalError("a correction has no rule yet", where="step correct", why='fit = "auto" finds it')
        return chain.Rule(self.l1, self.l2, self.tau, self.rel_reduction, self.granularity, self.clamp, self.input_term,
                          self.fit, self.significance)

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Walk the chain without a correction, to know its error, and fitting."""
        source = _source(run)
        chains = Chains(run, source, self.samples)
        run.progress.start("walks", self._walks(chains) * chains.steps)
        try:
            return self._fitted(run, source, chains)
        finally:
            run.progress.finish()

    def _walks(self, chains: Chains) -> int:
        """How many there will be: without a correction, and fitting it."""
        if self.fit != "auto":
            return 1 + chains.fits(self.rule)
        return 3 + sum(chains.fits(rule_of(name)) + 1 for name in TRIED)  # without: on all, and on those that judge

    def _fitted(self, run: Run, source: Trajectories, chains: Chains) -> UnitResult:
        rule, tried = self._found(run, chains) if self.fit == "auto" else (self.rule, {})
        plain = chains.walk()
        fitted, why = (plain, "") if rule is None else chains.fitted(rule)
        fit = "none" if rule is None else "branches" if rule.fit == "state" and chains.factors is None else rule.fit
        if rule is not None and fit != rule.fit:
            run.progress.say(f"The correction is fitted for the estimate, not for the next state: {chains.why}.")
        spec = self._spec(run, fitted, source.sampler(run), chains.factors is not None, why)
        facts = {
            "in_words": "none: no form of it was found to help" if rule is None else spec.in_words(),
            "samples": chains.recorded.count,
            "fit": fit, "factors": int((fitted.scale != 1).sum()), "shifts": int((fitted.shift != 0).sum()),
            "constants": int((fitted.bias != 0).sum()), "tried": tried,
            "error_without": [round(v, 6) for v in plain.error], "error_with": [round(v, 6) for v in fitted.error],
        }
        if fitted.error[-1] > plain.error[-1]:
            run.progress.say("The correction does not help here: the error of the last input is "
                             f"{fitted.error[-1]:.4g} with it and {plain.error[-1]:.4g} without.")
        return UnitResult(fitted.tables(), notes={"correction": {**spec.model_dump(mode="json"), **facts}})

    def _found(self, run: Run, chains: Chains) -> tuple[chain.Rule | None, dict[str, Any]]:
        """The form to take, and what each is worth: fitted on half of the trajectories, judged on the other half.

        A gain is by how many decibels the last input's error falls, in mean over the trajectories of the second half,
        with its standard error. Taken is the largest gain, if it exceeds two errors; None: no form's does.
        """
        first, rest = chains.halves()
        plain, gains = nearer.decibels(rest.walk().last), dict[str, nearer.Gain]()
        for name in TRIED:
            found, _ = first.fitted(rule_of(name))
            gains[name] = nearer.gain(plain, nearer.decibels(rest.walk(given=found).last))
        best = max(gains, key=lambda name: gains[name].value)
        taken = best if gains[best].sure else None
        told = "no form of the correction helps, so it does nothing" if taken is None else f"{taken} is taken"
        listed = ", ".join(f"{name} {gain}" for name, gain in gains.items())
        run.progress.say(f"On trajectories that no fit saw, {told}. Less error of the last input: {listed}.")
        return None if taken is None else rule_of(taken), {name: gain.note() for name, gain in gains.items()}

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


def rule_of(name: str) -> chain.Rule:
    """The rule of a correction that ``--correct`` knows by name."""
    return Correct(do="correct", **CORRECTIONS[name]).rule


def _source(run: Run) -> Trajectories:
    return next(step for step in run.recipe.steps if isinstance(step, Trajectories))
