"""smooth: move the difference between input channels from the activation, which has one scale, to the weight.

Each input channel c gets a constant factor: the layer sees ``X_c * delta_c`` and stores codes of ``W_c / delta_c``; the
product is the same. ``ratios = "balanced"`` takes

    delta_c = max|W_c| ** exponent / max|X_c| ** (1 - exponent)

so that with the exponent 0.5 both maxima become sqrt(max|W_c| max|X_c|) (SmoothQuant, Xiao et al. 2023, eq. 4; MPQ-DM,
"pre-scaling", section 3.1 of its method page). ``ratios = "activation"`` gives every channel the same range,
``delta_c = m / max|X_c|`` with m the geometric mean of the layer's max|X_c|: what scales a channel would do (QuEST at 4
bits), in a form that an integer product can run.

``times = "first"`` looks at the noisiest step alone, and ``statistic = "mean"`` takes for X the mean over samples of
each sample's ``max|X_c|``: ViDiT-Q's static channel balancing (Zhao et al., ICLR 2025; its ``lambda`` is ``1 / delta``
and its alpha ``1 - exponent``). ``rotation = "hadamard"`` is its dynamic part: the inputs of linear layers are rotated
after they are scaled, see `numbers.rotation`.

Maxima are those of the float network over the tape. Ones below `FLOOR` of the layer's largest (dead channels) count as
that much, so no factor grows without bound for a channel that only comes alive later.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.planning import check_pattern, matches
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.errors import InternalError
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import LayerSpec, Plan
from bitbrush.steps.observe import observe

FLOOR = 1e-5
"""Smallest maximum of a channel, as a share of the layer's largest."""


class Smooth(Step):
    """Give layers a factor for each input channel.

    Layers without quantized weight or without quantized input are left alone, and grouped convolutions.

    Args:
        exponent: Share of the range that goes by the weight (``balanced`` only).
        ratios: ``balanced`` between weight and activation, by the ``activation`` alone, or ``none``.
        times: Samples of ``all`` sampling steps, or of the ``first``, the noisiest.
        statistic: Of samples' maxima: their ``max``, or their ``mean``.
        rotation: ``hadamard`` rotates the inputs of linear layers (in one segment, of an even number of channels).
        samples: Calibration samples looked at, spread over the tape.
        layers: Pattern of the layers concerned.
        enabled: ``false`` leaves every layer as it is, for comparison.
    """

    exponent: float = Field(default=0.5, ge=0, le=1)
    ratios: Literal["balanced", "activation", "none"] = "balanced"
    times: Literal["all", "first"] = "all"
    statistic: Literal["max", "mean"] = "max"
    rotation: Literal["none", "hadamard"] = "none"
    samples: int = Field(default=256, ge=1)
    layers: str = "*"
    enabled: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Samples, for the range of each channel."""
        return ("calibrate",)

    @property
    def not_after(self) -> tuple[str, ...]:
        """Factors are folded once, and everything that is fitted is fitted to the scaled weights and inputs."""
        return ("smooth", "low_rank", "fit weights", "codebooks", "fit activations", "allocate", "finetune", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """The pattern names layers of this model."""
        if self.enabled:
            check_pattern(self.layers, [site.name for site in survey.layers()], f"step {self.label}: layers")

    def units(self, run: Run) -> list[str]:
        """All layers at once: one pass over the samples sees every input."""
        return ["all layers"] if self.enabled else []

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Measure, and decide the factors."""
        specs = self.foresee(run.survey, run.plan)
        chosen = {n: layer for n, layer in run.layers().items() if n in specs and getattr(layer, "groups", 1) == 1}
        scaled = {n: layer for n, layer in chosen.items() if specs[n].input_scale}
        maxima = self._input_maxima(run, scaled) if scaled else {}
        changes = {name: specs[name] for name in chosen}
        tensors: dict[str, Tensor] = {}
        extremes: list[tuple[float, float]] = []
        for name, layer in scaled.items():
            factor = self.factors(maxima[name], weight_maxima(layer.weight))
            tensors[f"{name}/input_scale"] = factor.cpu()
            extremes.append((float(factor.min()), float(factor.max())))
        notes: dict[str, Any] = {"layers": len(scaled)}
        if self.rotation != "none":
            notes["rotated"] = sum(spec.rotation != "none" for spec in changes.values())
        if extremes:
            notes |= {"smallest_factor": short(min(e[0] for e in extremes)),
                      "largest_factor": short(max(e[1] for e in extremes))}
        return UnitResult(tensors, changes, notes)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store the factors in the layers."""
        apply_input_scales(run, result.tensors)

    def factors(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """``delta`` ``[C]`` from the maxima ``[C]`` of a layer's input and weight by input channel."""
        x, w = clamped(inputs), clamped(weights)
        if self.ratios == "activation":
            return x.log().mean().exp() / x
        return w.pow(self.exponent) / x.pow(1 - self.exponent)

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """The layers with quantized weight and input that the pattern names (grouped convolutions are seen later)."""
        linear = {site.name for site in survey.layers() if site.kind == "linear" and site.shape[1] % 2 == 0}
        found: dict[str, LayerSpec] = {}
        for name, spec in plan.layers.items():
            a, turn = spec.activation, self.rotation if name in linear and len(spec.segments) < 2 else "none"
            if not self.enabled or spec.weight is None or a is None or a.position != "input":
                continue
            if matches(self.layers, name) and (self.ratios != "none" or turn != "none"):
                found[name] = spec.model_copy(update={"input_scale": self.ratios != "none", "rotation": turn})
        return found

    def _input_maxima(self, run: Run, chosen: dict[str, QuantLayer]) -> dict[str, Tensor]:
        """``max|X_c|`` of each layer in the float face, over samples (or the mean over them), ``[C]`` by layer."""
        seen: dict[str, _Maxima] = {name: _Maxima(self.statistic) for name in chosen}

        def watch(name: str, layer: QuantLayer) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach().float().movedim(layer.channel_dim, -1)
                seen[name].add(x.flatten(1, -2).abs().amax(dim=1) if x.ndim > 2 else x.abs())

            return hook

        handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in chosen.items()]
        with wrap.show(run.model, "float"):
            observe(run, "channel ranges", self.samples, handles, rows=self._rows(run))
        return {name: maxima.found() for name, maxima in seen.items()}

    def _rows(self, run: Run) -> list[int] | None:
        """The samples of the noisiest step, as many as are looked at; None where all steps count."""
        if self.times == "all":
            return None
        times = run.tape.column("timestep")
        rows = (times == times.max()).nonzero().flatten()
        count = min(self.samples, len(rows))
        return [int(rows[i * len(rows) // count]) for i in range(count)]


class _Maxima:
    """Largest, or mean, of samples' maxima by channel."""

    def __init__(self, statistic: str) -> None:
        self.statistic, self.samples = statistic, 0
        self.total: Tensor | None = None

    def add(self, maxima: Tensor) -> None:
        """Take ``[B, C]``."""
        self.samples += len(maxima)
        here = maxima.amax(dim=0) if self.statistic == "max" else maxima.sum(dim=0)
        if self.total is not None:
            here = torch.maximum(self.total, here) if self.statistic == "max" else self.total + here
        self.total = here

    def found(self) -> Tensor:
        """``[C]``."""
        if self.total is None:
            raise InternalError("no inputs were seen", where="smooth")
        return self.total if self.statistic == "max" else self.total / self.samples


def weight_maxima(weight: Tensor) -> Tensor:
    """``max|W_c|`` by input channel, ``[C]``, of a weight ``[N, C]`` or ``[N, C, kh, kw]``."""
    by_channel = weight.detach().float().transpose(0, 1)
    return by_channel.reshape(len(by_channel), -1).abs().amax(dim=1)


def apply_input_scales(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store ``<layer>/input_scale`` in the layers, whose specs ask for it."""
    layers = run.layers()
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "input_scale":
            layers[name].set_input_scale(value)


def clamped(maxima: Tensor) -> Tensor:
    """Positive maxima; a layer of zeros has them all equal."""
    largest = maxima.max()
    return maxima.clamp_min(FLOOR * float(largest)) if largest > 0 else torch.ones_like(maxima)
