"""group: scales for groups of channels or of pixels whose ranges are alike (DGQ, Ryu et al., ICLR 2025, section on
outlier-preserving group quantization; `range_groups` has the formulas).

A few channels, or a few pixels, of an input have ranges of their own. In one scale for the tensor they are clipped, or
all others are rounded coarsely. Here each layer is looked at once, over all timesteps together: the dimension whose
indices lie farther apart is cut into K groups by K-means on the ranges. What is decided is the same at every timestep,
so that a kernel can sort the channels beforehand; the scales of the groups are fitted afterwards, by `fit activations`,
one a group and (where the activation is timed) a timestep. The released code decides everything anew at each step, and
unfolds convolutions: ``anew`` and the layers' ``unfolded`` are that form, which no kernel runs. Only the dimension
stays one for all steps.

Ranges are taken behind quantized weights, with activations left float.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.planning import check_pattern, matches
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers.grid import Fallback, LayerSpec, Plan
from bitbrush.steps.observe import observe
from bitbrush.steps.range_groups import Dimension, Extremes, choose, clustered
from bitbrush.steps.start_token import start_in_words, start_mass

LEAST_SAMPLES = 8
"""Below it the larger spread is chance where outliers are centred on 0 (measured: right in 7 of 20 cases with one)."""
TIME = 0.0
"""One timestep for all: the groups are those of all together."""


class Group(Step):
    """Give layers' inputs a scale a group of channels or pixels.

    Concerned are static inputs with one scale a tensor, of layers with quantized weight. Layers in segments keep
    those, and inputs without pixels (a time embedding) keep one scale. Convolutions wider than 1x1 have groups of
    channels only, unless their input is unfolded, and so has every layer whose number of pixels is not the same in all
    samples.

    Args:
        groups: K, at most; a layer with fewer distinct ranges has fewer.
        dimension: ``auto`` takes the one of larger spread, layer by layer; ``channel`` and ``pixel`` leave layers that
            cannot have it as they are. Groups of pixels hold for one size of picture and one length of text.
        fallback: What a layer with groups of pixels does with another number of pixels: ``refuse`` it, by name, or take
            one scale a ``tensor``, which spans the ranges of all its groups.
        anew: The groups of a layer with scales a timestep are found for each timestep by itself (simulated only).
        samples: Calibration samples looked at, spread over the tape.
        layers: Pattern of the layers concerned.
        enabled: ``false`` leaves every layer as it is, for comparison.
    """

    groups: int = Field(default=8, ge=1, le=256)
    dimension: Literal["auto", "channel", "pixel"] = "auto"
    fallback: Fallback = "refuse"
    anew: bool = False
    samples: int = Field(default=256, ge=LEAST_SAMPLES)
    layers: str = "*"
    enabled: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Samples, and the weights that they will be seen behind."""
        return ("calibrate", "fit weights", "codebooks")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Everything that is fitted or trained for one scale a tensor would be lost."""
        return ("group", "fit activations", "finetune", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """The pattern names layers of this model."""
        if self.enabled:
            check_pattern(self.layers, [site.name for site in survey.layers()], f"step {self.label}: layers")

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """Every layer concerned with K groups; of channels, unless pixels are asked for."""
        found: dict[str, LayerSpec] = {}
        for site in survey.layers():
            spec, pixels = plan.layers.get(site.name), _pixels(site)
            if spec is None or not self._concerned(site.name, spec) or len(spec.segments) > 1 or pixels < 2:
                continue
            if self.dimension == "pixel" and (site.shape[2:] in ((), (1, 1)) or _unfolded(spec)):
                found[site.name] = self._grouped(spec, "pixel", self.groups, pixels)
            elif self.dimension != "pixel":
                found[site.name] = self._grouped(spec, "channel", self.groups)
        return found

    def units(self, run: Run) -> list[str]:
        """All layers at once: one pass over the samples sees every input."""
        return ["all layers"] if self.enabled else []

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Measure, choose the dimension of every layer, and form its groups."""
        limit = min(self.samples, len(run.tape))
        if limit < LEAST_SAMPLES:
            raise InputError("too few samples to find groups from", where=f"step {self.label}",
                             why=f"the tape holds {limit}; below {LEAST_SAMPLES} the choice of the dimension is chance",
                             try_="give the calibrate step more trajectories or steps")
        concerned = {n: layer for n, layer in run.layers().items() if self._concerned(n, layer.spec)}
        whole = {n: layer for n, layer in concerned.items() if len(layer.spec.segments) < 2}
        found = self._extremes(run, whole, limit)
        changes: dict[str, LayerSpec] = {}
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        for name, extremes in found.items():
            spreads = extremes.spreads()
            dimension = self._dimension(spreads)
            if dimension is None:
                continue
            labels = self._labels(extremes, dimension, whole[name].spec, run.plan.timesteps)
            count, members = int(labels.max()) + 1, labels.shape[-1]
            changes[name] = self._grouped(whole[name].spec, dimension, count, members)
            tensors[f"{name}/group_of"] = labels.to(torch.uint8)
            layers[name] = {"dimension": dimension, "groups": count, **_ratio(spreads)}
            if dimension == "pixel":
                layers[name]["pixels"] = members
        taken = [layer["dimension"] for layer in layers.values()]
        notes: dict[str, Any] = {
            "channel": taken.count("channel"), "pixel": taken.count("pixel"),
            "in_segments": len(concerned) - len(whole), "per_tensor": len(whole) - len(layers), "layers": layers,
        }
        shares = start_mass(run) if any(spec.exempt for spec in run.plan.layers.values()) else {}
        if shares:
            notes["start_mass"] = {name: float(f"{share:.4g}") for name, share in shares.items()}
            run.progress.say(start_in_words(shares))
        return UnitResult(tensors, changes, notes)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store which group each channel or pixel is in."""
        layers = run.layers()
        for key, labels in result.tensors.items():
            quantizer = layers[key.rpartition("/")[0]].input
            if quantizer is not None:
                quantizer.set_groups(labels)

    def _anew(self, spec: LayerSpec) -> bool:
        """Whether a layer's groups are those of a timestep."""
        return self.anew and spec.activation is not None and spec.activation.timed

    def _labels(self, extremes: Extremes, dimension: Dimension, spec: LayerSpec, times: tuple[float, ...]) -> Tensor:
        """The group of each index ``[members]``, or ``[T, members]``; a timestep without samples has its neighbour's,
        whose samples its scales are fitted to."""
        if not self._anew(spec):
            return clustered(*extremes.ends(dimension), self.groups)
        seen = {row: clustered(*extremes.ends(dimension, row), self.groups) for row in sorted(extremes.times)}
        nearest = [min(seen, key=lambda row, time=time: abs(times[int(row)] - time)) for time in times]  # type: ignore[misc]
        return torch.stack([seen[row] for row in nearest])

    def _grouped(self, spec: LayerSpec, dimension: Dimension, groups: int, pixels: int = 0) -> LayerSpec:
        """`grouped`, with the step's choices."""
        return grouped(spec, dimension, groups, pixels, self.fallback, self._anew(spec))

    def _concerned(self, name: str, spec: LayerSpec) -> bool:
        a = spec.activation
        plain = a is not None and (a.mode, a.granularity, a.position) == ("static", "tensor", "input")
        return plain and spec.weight is not None and not wrap.is_operand(name) and matches(self.layers, name)

    def _dimension(self, spreads: dict[Dimension, float]) -> Dimension | None:
        """The one to group; None where the layer cannot have the one that is asked for."""
        if self.dimension == "auto":
            return choose(spreads)
        return self.dimension if self.dimension in spreads else None

    def _extremes(self, run: Run, chosen: dict[str, QuantLayer], limit: int) -> dict[str, Extremes]:
        """What the inputs span, by layer; without layers whose input has no pixels."""
        found: dict[str, Extremes] = {}

        def watch(name: str, layer: QuantLayer) -> Any:
            pixels: list[int] = []  # of the first input

            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x, channel_dim = args
                count = math.prod(x.shape[1:]) // x.shape[channel_dim]
                if x.ndim < 3:
                    return
                if name not in found:
                    found[name] = Extremes(pixels=layer.kernel_hw == (1, 1) or _unfolded(layer.spec))
                    pixels.append(count)
                if count != pixels[0]:
                    found[name].without_pixels()
                rows = layer.input.rows() if layer.input is not None and self._anew(layer.spec) else None
                found[name].add(x, [TIME] * len(x) if rows is None else rows.tolist(), channel_dim)

            return hook

        handles = [layer.input.register_forward_pre_hook(watch(name, layer)) for name, layer in chosen.items()
                   if layer.input is not None]
        with wrap.show(run.model, "sim"), wrap.float_activations(run.model):
            observe(run, "ranges of channels and pixels", limit, handles)
        return {name: found[name] for name in chosen if name in found}


def grouped(
    spec: LayerSpec, dimension: Dimension, groups: int, pixels: int = 0, fallback: Fallback = "refuse",
    anew: bool = False,
) -> LayerSpec:
    """The spec with ``groups`` groups of the channels or of the ``pixels`` of its input, each timestep's own or not."""
    if spec.activation is None:
        return spec
    of: dict[str, Any] = {"granularity": f"{dimension}_group", "groups": groups, "groups_timed": anew}
    if dimension == "pixel":
        of |= {"pixels": pixels, "fallback": fallback}
    return spec.model_copy(update={"activation": spec.activation.model_copy(update=of)})


def _unfolded(spec: LayerSpec) -> bool:
    return spec.activation is not None and spec.activation.unfolded


def _pixels(site: Site) -> int:
    """Products that a layer makes with its weight for one sample; 1 for an input that is one vector."""
    return site.macs // max(1, math.prod(site.shape))


def _ratio(spreads: dict[Dimension, float]) -> dict[str, float]:
    """Spread of the channels over that of the pixels, where both are known: above 1 channels differ more."""
    if len(spreads) < 2 or spreads["pixel"] <= 0:
        return {}
    return {"channel_over_pixel": float(f"{spreads['channel'] / spreads['pixel']:.4g}")}
