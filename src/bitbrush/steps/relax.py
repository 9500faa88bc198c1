"""relax: some sampling steps get more activation bits (PCR, Tang et al. 2024, stage 3), at the end where it pays.

An interval of timesteps at one end of the trajectory, a given share of all, is relaxed in every layer with scales a
timestep. Near x_0 it serves the picture's details, near x_T its content; which of the two a model needs is found by
measurement: the same trajectories, of equal noise, are sampled by the float network and with either end relaxed, and
the end whose final latents lie nearer to the float ones is kept (`steps/nearer.py` says what nearer is). The paper
looks at FID and CLIP score with either end at full precision; see docs/methods/pcr.md.

The rows of relaxed timesteps are fitted again on their new grid, by the recipe's own fit step; after a progressive fit
the later calls are, too, because their inputs have changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitbrush.engine.journal import generator as derived
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import ActivationSpec, LayerSpec, Plan
from bitbrush.steps import nearer
from bitbrush.steps.calibrate import calibration
from bitbrush.steps.fit import Fit, apply_activations, quantizers, tables
from bitbrush.steps.progressive import walk
from bitbrush.steps.student import student

Bits = tuple[int, ...]


class Relax(Step):
    """Give some timesteps more activation bits.

    Args:
        share: Of the sampling steps that are relaxed, max(1, round(share * N)) of them. The budget that it means, the
            average of the activation bits over timesteps, stands in the notes.
        bits: Of the relaxed steps; layers that have as many already are left alone.
        which: ``measured``: the better end; ``start``: near x_T; ``end``: near x_0; ``random``: steps drawn at random;
            ``none``: nothing.
        trajectories: Sampled for the measurement, at most as many as the calibration has, with noise of their own;
            prompts are the first of the calibration. The difference of the ends varies from picture to picture by
            several times its mean, so few of them find the end by chance.
    """

    share: float = Field(default=0.2, gt=0, le=1)
    bits: int = Field(default=8, ge=1, le=8)
    which: Literal["measured", "start", "end", "random", "none"] = "measured"
    trajectories: int = Field(default=64, ge=1)

    @property
    def needs(self) -> tuple[str, ...]:
        """Trajectories to measure on, and fitted tables."""
        return ("calibrate", "fit weights", "codebooks", "fit activations")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Rows are fitted again: scales that were trained would be lost."""
        return ("reconstruct activation_scale", "finetune", "relax", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """Only a table with a row a timestep can have bits a timestep."""
        found = _activations(plan)
        if self.which != "none" and found and not any(_timed(a) for a in found):
            raise InputError("only scales a timestep can be relaxed", where=f"step {self.label}",
                             why="no activation of this plan has a table with a row a timestep",
                             try_=f"give the layers activation = {{ timed = true }}, or --set {self.label}.which=none")

    def units(self, run: Run) -> list[str]:
        """All layers at once."""
        return [self.label] if self.which != "none" and any(_timed(a) for a in _activations(run.plan)) else []

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Choose the timesteps, fit their rows."""
        count = len(run.plan.timesteps)
        number = relaxed_number(count, self.share)
        if not self._relaxed(run.plan, ()):
            why = f"every activation with scales a timestep has {self.bits} bits or more already"
            run.progress.say(f"{self.label}: nothing to relax, {why}.")
            return UnitResult(notes={"which": "none", "why": why})
        start = tables(quantizers(run, "static"))
        notes: dict[str, Any] = {}
        which: str = self.which
        if which == "measured":
            which, tensors, notes = self._measured(run, count, number, start)
            rows = ends(count, number, which)
        else:
            drawn = torch.randperm(count, generator=generator)[:number].tolist()
            rows = sorted(drawn) if which == "random" else ends(count, number, which)
            tensors = self._fitted(run, rows, start)
            apply_activations(run, start)
        plan = self._relaxed(run.plan, rows)
        before = _average([run.plan.layers[name] for name in plan])
        times = sorted((run.plan.timesteps[row] for row in rows), reverse=True)
        notes |= {
            "which": which, "timesteps": times, "layers": len(plan),
            "average_activation_bits": _average(list(plan.values())), "average_activation_bits_before": before,
        }
        return UnitResult(tensors, plan=plan, notes=notes)

    def _measured(
        self, run: Run, count: int, number: int, start: dict[str, Tensor]
    ) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
        """The better end, its tables, and what was measured: errors in decibels."""
        truth = self._sample(run, "float")
        errors, found = {"none": self._error(run, truth)}, {}
        for end in ("start", "end"):
            found[end] = self._fitted(run, ends(count, number, end), start)
            with self._trial(run, ends(count, number, end), found[end]):
                errors[end] = self._error(run, truth)
            apply_activations(run, start)
        late = nearer.gain(errors["start"], errors["end"])
        means = {name: float(error.mean()) for name, error in errors.items()}
        run.progress.say(f"Error of the final latents: {means['start']:.2f} dB relaxed near x_T, {means['end']:.2f} dB "
                         f"near x_0 (the latter is better by {late}), {means['none']:.2f} dB without.")
        notes = {f"error_{name}_db": short(mean) for name, mean in means.items()} | {"end_over_start": late.note()}
        which = "start" if late.value < 0 else "end"
        return which, found[which], notes

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store the tables (the plan has changed before); no output that was remembered holds any more."""
        apply_activations(run, result.tensors)
        run.forget_all()

    # ---- bits ----------------------------------------------------------------------------------------------------
    def _relaxed(self, plan: Plan, rows: list[int] | tuple[int, ...]) -> dict[str, LayerSpec]:
        """Specs of the layers and operands that can be relaxed, with more bits in ``rows``."""
        found = {}
        for name, spec in plan.layers.items():
            if spec.activation is not None and self._open(spec.activation):
                bits = self._bits(spec.activation, len(plan.timesteps), rows)
                found[name] = spec.model_copy(update={"activation": _with(spec.activation, bits)})
        return found

    def _open(self, spec: ActivationSpec) -> bool:
        return _timed(spec) and spec.grid.bits < self.bits

    def _bits(self, spec: ActivationSpec, count: int, rows: list[int] | tuple[int, ...]) -> Bits:
        return tuple(self.bits if row in rows else spec.grid.bits for row in range(count))

    @contextmanager
    def _trial(self, run: Run, rows: list[int], tensors: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Inside the block the quantizers have more bits in ``rows`` (and the given tables)."""
        count = len(run.plan.timesteps)
        moved = [(q, q.spec) for q in quantizers(run, "static").values() if self._open(q.spec)]
        try:
            for quantizer, spec in moved:
                quantizer.spec = _with(spec, self._bits(spec, count, rows))
            if tensors is not None:
                apply_activations(run, tensors)
            yield
        finally:
            for quantizer, spec in moved:
                quantizer.spec = spec

    # ---- fit and measure -----------------------------------------------------------------------------------------
    def _fitted(self, run: Run, rows: list[int], start: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tables, with the rows of relaxed timesteps fitted on their grid; the quantizers may hold them, too."""
        fit = next(step for step in reversed(run.recipe.steps) if isinstance(step, Fit) and step.what == "activations")
        random = derived(run.seed, fit.label, "all activations")
        open_ = {n: q for n, q in quantizers(run, "static").items() if self._open(q.spec)}
        with self._trial(run, rows, start):
            if fit.inputs == "progressive":
                walk(fit, run, random, set(range(max(rows) + 1)))
                return tables(quantizers(run, "static"))
            found = fit.activations(run, random).tensors
        out = dict(start)
        for name in open_:
            for key in (f"{name}/scale", f"{name}/zero_point"):
                out[key] = start[key].clone()
                out[key][rows] = found[key][rows]
        return out

    def _error(self, run: Run, truth: Tensor) -> Tensor:
        """Of the quantized network's final latents, relative to the float ones, in decibels ``[trajectories]``."""
        with student(run, {}):
            delta = self._sample(run, "sim") - truth
        error, power = (t.square().flatten(1).mean(1) for t in (delta, truth))
        return nearer.decibels(error, power)

    def _sample(self, run: Run, face: Literal["float", "sim"]) -> Tensor:
        """Final latents of the measured trajectories."""
        source = calibration(run)
        members = list(range(min(self.trajectories, source.trajectories)))
        with wrap.show(run.model, face):
            size = source.together(run)
            parts = [source.sample(run, members[i : i + size], self.label) for i in range(0, len(members), size)]
        return torch.cat(parts)


def relaxed_number(count: int, share: float) -> int:
    """Timesteps of ``count`` that a share of them is: at least one."""
    return min(count, max(1, round(share * count)))


def ends(count: int, number: int, which: str) -> list[int]:
    """Rows of the time grid (ascending: row 0 is the cleanest) of an interval at one end: ``start`` is near x_T."""
    return list(range(count - number, count)) if which == "start" else list(range(number))


def _average(specs: list[LayerSpec]) -> float:
    """Activation bits, the mean over timesteps and layers."""
    bits = [spec.activation.average_bits for spec in specs if spec.activation is not None]
    return round(sum(bits) / len(bits), 4)


def _activations(plan: Plan) -> list[ActivationSpec]:
    return [spec.activation for spec in plan.layers.values() if spec.activation is not None]


def _timed(spec: ActivationSpec) -> bool:
    return spec.mode == "static" and spec.timed


def _with(spec: ActivationSpec, bits: Bits) -> ActivationSpec:
    return spec.model_copy(update={"time_bits": bits})
