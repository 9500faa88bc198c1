"""codebooks: additive codebooks for every layer of the plan that is stored so, subset by subset (VQDM, section 3.1).

A subset is an entry of the network's ``down_blocks`` or ``up_blocks``, or its middle. For each one, in the order of
execution, whole guided trajectories are sampled by the student as it is by then (subsets before it quantized, the
others float, activations float), the layers' input covariances are recorded, and the layers are fitted to their own
float weights: residual k-means, then Adam and beam search in turns (`bitbrush.steps.additive`). Layers of one subset do
not see each other's errors; nothing corrects towards the float network's activations. Both as in the released code.

Layers that share codebooks are fitted together. Where they lie in several subsets, that happens in the last of these,
and they stay float until then.

Memory does not grow with the calibration set (`bitbrush.steps.moments`). A subset whose covariances would take more
than ``memory`` is cut into parts, each a unit of its own with trajectories of its own, behind the parts before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitbrush.engine.codebook_sets import subset_of
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.errors import InternalError
from bitbrush.network import wrap
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.network.layers import QuantLayer
from bitbrush.network.pipelines import answered
from bitbrush.numbers.codebook import to_groups, to_half
from bitbrush.numbers.grid import Plan, WeightSpec
from bitbrush.steps import additive
from bitbrush.steps.additive import Settings, Solution, Target
from bitbrush.steps.calibrate import calibration
from bitbrush.steps.captured import Captured
from bitbrush.steps.covariance import Covariance
from bitbrush.steps.moments import held_bytes, record
from bitbrush.steps.observe import observe
from bitbrush.steps.reconstruct import half_precision
from bitbrush.steps.student import student_so_far


@dataclass(frozen=True)
class Group:
    """Layers with one set of codebooks; ``name`` is the set's, or the layer's where it is its own."""

    name: str
    shared: bool
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of the codebooks in a unit's result."""
        return f"{'set' if self.shared else 'layer'}:{self.name}/codebooks"


class FitCodebooks(Step):
    """Fit additive codebooks.

    Args:
        inputs: Where the layers' inputs come from: the ``student``'s own trajectories; the ``float`` network on the
            samples of the tape; or ``none``, H = I, which fits the weights themselves.
        trajectories: Sampled for each subset, with prompts, noise, steps and guidance of the calibrate step; at most as
            many as that has. With ``float``, as many samples of the tape as they would have given.
        epochs: At most, of Adam and one beam search each (the paper: 1000).
        steps: Of Adam in an epoch, at ``rate``.
        beam: Hypotheses a row of the search; 1 is coordinate descent.
        tolerance: Relative improvement of an epoch below which no other follows.
        kmeans_iterations: Of Lloyd's algorithm, at most.
        points: Groups of weights a centre that k-means is fitted to (all are assigned).
        feedback: The start's codes are chosen with error feedback, H damped by this share of its mean diagonal
            (`bitbrush.steps.feedback`); 0 leaves k-means' codes, as the paper.
        feedback_epochs: First epochs whose search begins with that, too, where it makes a row better. In all of them,
            layers end some percent lower, and the search takes twice as long.
        damping: Share of its mean diagonal that is added to H throughout; the paper: 0.
        weighted: Groups count in k-means by their effect on the output.
        tokens, tokens_per_feature: Of a layer's inputs so many tokens or pixels are kept, and so many times the columns
            of its weight, whichever is more.
        memory: GB for covariances. What needs more is done in parts.
        autocast: Sample in bf16 autocast on CUDA.
    """

    inputs: Literal["student", "float", "none"] = "student"
    trajectories: int = Field(default=128, ge=1)
    epochs: int = Field(default=8, ge=1)
    steps: int = Field(default=100, ge=0)
    rate: float = Field(default=1e-4, gt=0)
    beam: int = Field(default=4, ge=1, le=256)
    tolerance: float = Field(default=0.01, ge=0, lt=1)
    kmeans_iterations: int = Field(default=50, ge=1)
    points: int = Field(default=1000, ge=1)
    weighted: bool = True
    feedback: float = Field(default=0.01, ge=0, le=1)
    feedback_epochs: int = Field(default=2, ge=0)
    damping: float = Field(default=0.01, ge=0, le=1)
    tokens: int = Field(default=16384, ge=1)
    tokens_per_feature: int = Field(default=8, ge=1)
    memory: float = Field(default=2.0, gt=0)
    autocast: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Prompts and noise; and every other weight of the student."""
        return ("calibrate", "fit weights")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Everything that is fitted or trained behind these weights."""
        return ("codebooks", "fit activations", "reconstruct rounding", "finetune", "pack")

    def units(self, run: Run) -> list[str]:
        """The subsets with something to fit, or parts of them."""
        return list(self.parts(run))

    def parts(self, run: Run) -> dict[str, list[Group]]:
        """What is fitted in each unit."""
        layers, parts = run.layers(), dict[str, list[Group]]()
        for subset, groups in by_subset(run.plan).items():
            pieces: list[list[Group]] = []
            taken = 0
            for group in groups:
                need = held_bytes([layers[name] for name in group.layers])
                if not pieces or taken + need > self.memory * 1e9:
                    pieces.append([])
                    taken = 0
                pieces[-1].append(group)
                taken += need
            for number, piece in enumerate(pieces, 1):
                parts[subset if len(pieces) == 1 else f"{subset} part {number} of {len(pieces)}"] = piece
        return parts

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Record and fit one subset."""
        groups, layers = self.parts(run)[unit], run.layers()
        names = [name for group in groups for name in group.layers]
        found = self._covariances(run, {name: layers[name] for name in layers if name in names}, generator)
        tensors: dict[str, Tensor] = {}
        sets: dict[str, Any] = {}
        made: dict[Settings, tuple[Captured, Captured]] = {}
        errors: dict[str, float] = {}
        run.progress.start(f"codebooks of {unit}", len(groups))
        try:
            for group in groups:
                targets = [self._target(layers[name], found.get(name)) for name in group.layers]
                solution, losses = self._fit(run, group, layers[group.layers[0]], targets, generator, made)
                tensors |= stored(group, solution)
                final = additive.relative_errors(targets, [t.energy() for t in targets], additive.rounded(solution))
                errors |= {name: short(float(e)) for name, e in zip(group.layers, final, strict=True)}
                sets[group.name] = {"layers": len(group.layers), "losses": [short(value) for value in losses]}
                run.progress.advance(1, f"{group.name}: error {losses[0]:.3g} to {losses[-1]:.3g}")
        finally:
            run.progress.finish()
        return UnitResult(tensors, notes={
            "loss_start": short(_mean(each["losses"][0] for each in sets.values())),
            "loss_end": short(_mean(each["losses"][-1] for each in sets.values())),
            "epochs": {name: len(each["losses"]) - 1 for name, each in sets.items()}, "sets": sets, "errors": errors,
            "recordings": len({id(covariance) for covariance in found.values()}),
        })

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store codes, codebooks and scales."""
        layers = run.layers()
        for group in self.parts(run)[unit]:
            for name in group.layers:
                layer = layers[name]
                if not isinstance(layer, CodebookLayer):
                    raise InternalError("not a layer of additive codebooks", where=name)
                layer.set_codes(result.tensors[f"{name}/codes"], result.tensors[group.key],
                                result.tensors[f"{name}/scale"])
        run.forget_all()

    # ---- inputs ------------------------------------------------------------------------------------------------
    def _covariances(
        self, run: Run, layers: dict[str, QuantLayer], generator: torch.Generator
    ) -> dict[str, Covariance]:
        if self.inputs == "none":
            return {}
        source = calibration(run)
        count, calls = min(self.trajectories, source.trajectories), len(source.timesteps(run))
        samples = count * calls * source.halves(run)
        if self.inputs == "float":
            samples = min(samples, len(run.tape))

        def along() -> None:
            def answer(_timestep: float, call: Any) -> Tensor:
                run.progress.advance(1)
                out: Tensor = call()
                return out

            run.progress.start("the student's inputs", calls)
            try:
                with answered(run.model, answer, run.tape.batch):
                    source.sample(run, list(range(count)))
            finally:
                run.progress.finish()

        def rows() -> None:
            observe(run, "the float network's inputs", samples, [])

        face = wrap.show(run.model, "float") if self.inputs == "float" else student_so_far(run)
        with face, half_precision(run.device, self.autocast):
            return record(run, layers, rows if self.inputs == "float" else along, samples, generator,
                          least=self.tokens, per_feature=self.tokens_per_feature)

    def _target(self, layer: QuantLayer, covariance: Covariance | None) -> Target:
        """The layer's float weight, and H in float32."""
        weight = to_groups(layer.scaled_weight(), _spec(layer).group).contiguous()
        if covariance is None:
            return Target(weight, torch.eye(weight.shape[1], device=weight.device))
        return damped(Target(weight, covariance.mean()), self.damping)

    # ---- the fit -----------------------------------------------------------------------------------------------
    def _fit(
        self, run: Run, group: Group, layer: QuantLayer, targets: list[Target], generator: torch.Generator,
        made: dict[Settings, tuple[Captured, Captured]],
    ) -> tuple[Solution, list[float]]:
        def report(phase: str, epoch: int, value: float) -> None:
            run.progress.advance(0, f"{group.name}: {phase} {epoch} of {self.epochs}, error {value:.4g}")

        settings = self.settings(_spec(layer))
        if settings not in made:
            made[settings] = additive.captured(settings, run.device)
        visitor, feeder = made[settings]
        return additive.fit(targets, settings, generator, report, visitor, feeder)

    def settings(self, spec: WeightSpec) -> Settings:
        """This step's settings for layers with such a weight."""
        return Settings(
            count=spec.codebooks, bits=spec.grid.bits, group=spec.group, weighted=self.weighted, feedback=self.feedback,
            feedback_epochs=self.feedback_epochs, kmeans_iterations=self.kmeans_iterations, points=self.points,
            steps=self.steps, rate=self.rate, beam=self.beam, epochs=self.epochs, tolerance=self.tolerance,
        )


def damped(target: Target, share: float) -> Target:
    """With a share of H's mean diagonal added to it: what few samples leave out costs a little, too."""
    h = target.covariance.clone()
    h.diagonal().add_(share * h.diagonal().mean())
    return Target(target.weight, h)


def by_subset(plan: Plan) -> dict[str, list[Group]]:
    """Sets of codebooks by the subset of the network that they are fitted with, the last one with a layer of theirs.

    Subsets and sets are in the order of execution.
    """
    members: dict[tuple[bool, str], list[str]] = {}
    for name, spec in plan.layers.items():
        if spec.weight is not None and spec.weight.additive:
            key = (True, spec.weight.shared) if spec.weight.shared else (False, name)
            members.setdefault(key, []).append(name)
    order = list(dict.fromkeys(subset_of(name) for name in plan.layers))
    found: dict[str, list[Group]] = {subset: [] for subset in order}
    for (shared, name), names in members.items():
        found[max((subset_of(n) for n in names), key=order.index)].append(Group(name, shared, tuple(names)))
    return {subset: groups for subset, groups in found.items() if groups}


def stored(group: Group, solution: Solution) -> dict[str, Tensor]:
    """A solution as it is stored: codebooks once, codes and scale of every layer; on the CPU."""
    tensors = {group.key: to_half(solution.codebooks, group.name).cpu()}
    for name, codes, scale in zip(group.layers, solution.codes, solution.scales, strict=True):
        tensors[f"{name}/codes"] = codes.to(torch.uint8).cpu()
        tensors[f"{name}/scale"] = to_half(scale, name).cpu()
    return tensors


def _spec(layer: QuantLayer) -> WeightSpec:
    if layer.spec.weight is None:
        raise InternalError("a layer without weight spec", where=type(layer).__name__)
    return layer.spec.weight


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
