"""reconstruct: learn, block by block, what makes the quantized block answer like the float one.

``train = "rounding"``: AdaRound on all weights of a block together; scales and zero-points stay (Q-Diffusion's first
pass: input from the weight-quantized network, target from the float one, activation quantizers off).
``train = "activation_scale"``: the scales of a block's activation quantizers; zero-points stay (second pass).

A unit never ends worse than it starts: the start (nearest rounding, fitted scales) is measured on the same samples and
kept when training did not beat it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.engine.tape import Recording
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import Plan
from bitbrush.steps.fit import apply_activations, apply_weights
from bitbrush.steps.learners import Learner, RoundingLearner, ScaleLearner
from bitbrush.steps.loop import Budget, Schedule, on_device, optimise

EVALUATE = 256


class Reconstruct(Step):
    """Train rounding decisions or activation scales against the float face.

    Args:
        train: What is trained.
        by: ``block`` (residual block, transformer block, attention; other layers alone) or ``layer``.
        inputs: Input of the block: from the ``quantized`` network so far, or from the ``float`` one.
        iterations, batch, lr: Of Adam.
        schedule: ``constant``, ``linear`` or ``cosine`` (to 0).
        power: Exponent of the output error.
        regularisation: Factor of the rounding regulariser (rounding only).
        warmup: Share of the iterations before the regulariser starts.
        beta_start, beta_end: Its exponent, annealed linearly.
        samples: Calibration samples used.
        checkpoint: Iterations between two saved states inside a unit.
        autocast: On CUDA, run the block in bf16 autocast while training (recordings and codes stay float32).
    """

    train: Literal["rounding", "activation_scale"]
    by: Literal["block", "layer"] = "block"
    inputs: Literal["quantized", "float"] = "quantized"
    iterations: int = Field(default=20000, ge=0)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    schedule: Schedule = "constant"
    power: float = Field(default=2.0, gt=0)
    regularisation: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.2, ge=0, le=1)
    beta_start: float = 20.0
    beta_end: float = 2.0
    samples: int = Field(default=1024, ge=1)
    checkpoint: int = Field(default=2000, ge=1)
    autocast: bool = True

    @property
    def kind(self) -> str:
        """``reconstruct rounding`` or ``reconstruct activation_scale``."""
        return f"reconstruct {self.train}"

    @property
    def sees_activations(self) -> bool:
        """Rounding is trained with all activations float."""
        return self.train != "rounding"

    @property
    def needs(self) -> tuple[str, ...]:
        """Samples, and ranges to start from."""
        return ("calibrate", "codebooks", "fit weights" if self.train == "rounding" else "fit activations")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Packed weights cannot be trained."""
        return ("pack",)

    def check(self, survey: Survey, plan: Plan) -> None:
        """There is a weight to round, if any is quantized; layers on additive codebooks are passed over."""
        weights = [spec.weight for spec in plan.layers.values() if spec.weight is not None]
        if self.train == "rounding" and self.iterations and weights and all(w.additive for w in weights):
            raise InputError("there are no rounding decisions to learn", where=f"step {self.label}: train",
                             why=f"all {len(weights)} quantized weights are additive codebooks",
                             try_="leave the step out; finetune with codebooks = true trains what they are made of")

    def units(self, run: Run) -> list[str]:
        """Blocks (or layers) that hold something to train, in execution order."""
        if self.iterations == 0:
            return []
        layers = run.layers()
        groups = run.survey.blocks if self.by == "block" else {name: (name,) for name in layers}
        return [name for name, members in groups.items() if self._trainable(run, layers, name, members)]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Reconstruct one block."""
        recording, target = self._record(run, unit)
        module = run.model.get_submodule(unit)
        learner = self._learner(run, unit, module)
        index = torch.randint(len(recording), (self.iterations, min(self.batch, len(recording))), generator=generator)
        with wrap.show(module, "sim"):
            if self.train == "rounding":
                with wrap.float_activations(module):
                    notes = self._train(run, unit, module, recording, target, learner, index)
            else:
                notes = self._train(run, unit, module, recording, target, learner, index)
        return UnitResult(learner.result(), notes=notes)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store the outcome; the block's output is now final for the passes of this step."""
        (apply_weights if self.train == "rounding" else apply_activations)(run, result.tensors)
        run.memo("float").finish(unit)
        if self.inputs == "quantized":
            run.memo(self.label).finish(unit)
        if unit == self.units(run)[-1]:
            run.forget(self.label)

    # ---- inside ------------------------------------------------------------------------------------------------
    def _trainable(self, run: Run, layers: dict[str, QuantLayer], unit: str, members: tuple[str, ...]) -> bool:
        if self.train == "rounding":
            return any(name in layers and _rounds(layers[name]) for name in members)
        return bool(_quantizers(run.model.get_submodule(unit)))

    def _record(self, run: Run, unit: str) -> tuple[Recording, Recording]:
        limit = min(self.samples, len(run.tape))
        with wrap.show(run.model, "float"):
            target = run.tape.record(run.model, unit, limit=limit, memo=run.memo("float"),
                                     inputs=self.inputs == "float")
        if self.inputs == "float":
            return target, target
        with wrap.show(run.model, "sim"):
            if self.train == "rounding":
                with wrap.float_activations(run.model):
                    recording = run.tape.record(run.model, unit, limit=limit, memo=run.memo(self.label), output=False)
            else:
                recording = run.tape.record(run.model, unit, limit=limit, memo=run.memo(self.label), output=False)
        recording.output = target.output
        return recording, target

    def _learner(self, run: Run, unit: str, module: nn.Module) -> Learner:
        if self.train == "rounding":
            layers = run.layers()
            names = run.survey.blocks[unit] if self.by == "block" else (unit,)
            chosen = {n: layers[n] for n in names if n in layers and _rounds(layers[n])}
            return RoundingLearner(chosen, self)
        found = {f"{unit}.{name}" if name else unit: q for name, q in _quantizers(module).items()}
        return ScaleLearner(found)

    def _train(
        self, run: Run, unit: str, module: nn.Module, recording: Recording, target: Recording, learner: Learner,
        index: Tensor,
    ) -> dict[str, object]:
        count = len(recording)
        probe = torch.arange(0, count, max(1, count // EVALUATE))

        def loss_at(rows: Tensor) -> Tensor:
            with run.clock.at(recording.timesteps.index_select(0, rows)), half_precision(run.device, self.autocast):
                answer = recording.call(module, rows)
            return block_loss(answer, target.output.take(rows), self.power)

        def measured() -> float:
            with torch.no_grad():
                parts = [loss_at(rows.to(run.device)) * len(rows) for rows in probe.split(32)]
            return float(torch.stack(parts).sum() / len(probe))

        start = measured()
        budget = Budget(self.iterations, self.checkpoint, self.lr, self.schedule)
        run.progress.start(unit, self.iterations)
        try:
            resident = on_device(target.output, *recording.inputs.values())
            optimise(learner, loss_at, index, budget, run, (self.label, unit), capture=resident)
        finally:
            run.progress.finish()
        facts = learner.harden()
        end = measured()
        kept = "trained" if end < start else "start"  # NaN compares false: the start is kept
        if kept == "start":
            learner.restore()
            end = start
        learner.release()
        return {"loss_start": short(start), "loss_end": short(end), "kept": kept, **facts}


def half_precision(device: torch.device, wanted: bool) -> AbstractContextManager[Any]:
    """bf16 autocast on CUDA; without its weight cache, which a CUDA graph cannot replay."""
    if wanted and device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()


def block_loss(answer: Tensor, target: Tensor, power: float) -> Tensor:
    """``mean over samples and positions of sum over channels |answer - target| ** power``."""
    delta = (answer.float() - target.float()).abs()
    delta = delta.square() if power == 2.0 else delta.pow(power)
    return delta.sum(dim=1 if delta.ndim != 3 else 2).mean()


def _rounds(layer: QuantLayer) -> bool:
    """Whether the weight's codes are rounded values; of additive codebooks they are numbers of codewords."""
    return layer.spec.weight is not None and not layer.spec.weight.additive


def _quantizers(module: nn.Module) -> dict[str, ActivationQuantizer]:
    return {
        name: m for name, m in module.named_modules()
        if isinstance(m, ActivationQuantizer) and m.spec.mode == "static" and m.spec.grid.kind == "affine"
    }
