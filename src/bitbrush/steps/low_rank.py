"""low_rank: a 16-bit branch of low rank beside low-bit products, and smoothing that knows of it (SVDQuant, section B3).

For one layer, with inputs X kept from the float network: every candidate of the factors between input and weight is
tried with the branch and with rounded weights and inputs; the one that loses the least of the output is taken. Then the
branch is iterated around the rounding of what it leaves over, `bitbrush.steps.branches`. The codes themselves are made
by the fit step that follows, of ``W / input_scale - L1 L2``.

Memory is bounded: of every layer at most ``rows`` inputs are kept (rows of a linear layer, patches of a convolution),
fewer where all layers together would take more than half of the run's memory.
"""

from __future__ import annotations

import math
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
from bitbrush.network.low_rank import HALF_BYTES, branch_bytes
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, expand_weight_scale
from bitbrush.numbers.grid import Grid, LayerSpec, Plan
from bitbrush.numbers.straight_through import encode_weight
from bitbrush.steps.branches import OutputError, Quantize, Split, apply_branches, inputs_of, smoothings, split
from bitbrush.steps.fit import binary_scale, weight_tables
from bitbrush.steps.layer_sets import PRESETS
from bitbrush.steps.observe import observe
from bitbrush.steps.smooth import apply_input_scales, clamped, weight_maxima

INPUTS = "inputs"
"""The unit that keeps inputs; every other one is a block."""


class LowRank(Step):
    """Give layers a low-rank branch, and factors for their input channels.

    Layers without quantized weight or without quantized input are left alone, additive codebooks and grouped
    convolutions too.

    Args:
        rank: Of the branches, at most; 0: none, the smoothing alone.
        branch: Layers with a branch: linear ones of ``attention`` and feed-forward, or ``all`` that are concerned.
        iterations: Iterates at most; the first that is not better is the last.
        smooth: ``search`` the factors of each layer, or ``keep`` what a smooth step found (nothing without one).
        grid: Parts of the exponents' range: ``2 * grid - 1`` candidates; 20 is the paper's.
        samples: Calibration samples that inputs are taken from, spread over the tape.
        rows: Inputs kept of a layer.
        layers: Pattern of the layers concerned.
        points, step, power: Of the search for the scales of what is rounded here.
    """

    rank: int = Field(default=32, ge=0)
    branch: Literal["attention", "all"] = "attention"
    iterations: int = Field(default=100, ge=1)
    smooth: Literal["search", "keep"] = "search"
    grid: int = Field(default=10, ge=2)
    samples: int = Field(default=128, ge=1)
    rows: int = Field(default=512, ge=1)
    layers: str = "*"
    points: int = Field(default=10, ge=1)
    step: float = Field(default=0.05, gt=0)
    power: float = Field(default=2.4, gt=0)

    @property
    def needs(self) -> tuple[str, ...]:
        """Samples, for the inputs."""
        return ("calibrate",)

    @property
    def not_after(self) -> tuple[str, ...]:
        """Everything that is fitted is fitted to what the branch leaves over."""
        return ("low_rank", "fit weights", "fit activations", "allocate", "finetune", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """The pattern names layers of this model."""
        check_pattern(self.layers, [site.name for site in survey.layers()], f"step {self.label}: layers")

    def foresee(self, survey: Survey, plan: Plan) -> dict[str, LayerSpec]:
        """The layers with quantized weight and input that the pattern names (grouped convolutions are seen later)."""
        sites = {site.name: site for site in survey.layers()}
        found = {}
        for name, spec in plan.layers.items():
            concerned = spec.weight is not None and not spec.weight.additive and spec.activation is not None
            if name not in sites or not concerned or not matches(self.layers, name):
                continue
            if spec.activation is not None and spec.activation.position == "input":
                scaled = spec.input_scale or self.smooth == "search"
                found[name] = spec.model_copy(update={"input_scale": scaled, "low_rank": self._rank(sites[name])})
        return found

    def units(self, run: Run) -> list[str]:
        """The inputs, then the blocks that hold layers concerned."""
        specs = self.foresee(run.survey, run.plan)
        return [INPUTS, *(b for b, members in run.survey.blocks.items() if not specs.keys().isdisjoint(members))]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Keep inputs, or decide factors and branches of a block."""
        if unit == INPUTS:
            return self._inputs(run, generator)
        found = run.journal.find(self.label, INPUTS)
        if found is None:
            raise InternalError("no inputs were kept", where=f"step {self.label}")
        specs, layers = self.foresee(run.survey, run.plan), self._chosen(run)
        sites = {site.name: site for site in run.survey.layers()}
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        changes = {name: specs[name] for name in run.survey.blocks[unit] if name in layers}
        for name, spec in changes.items():
            given = {key: found.tensors[f"{key}/{name}"].to(run.device) for key in ("x", "max")}
            tensors |= {f"{name}/{key}": t for key, t in self._layer(layers[name], spec, given, name, facts).items()}
            facts[name] |= _cost(sites[name], spec)
        start, end = (sum(f[key] for f in facts.values()) / max(1, len(facts)) for key in ("plain", "kept"))
        return UnitResult(tensors, changes, {"loss_start": start, "loss_end": end, "layers": facts})

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store factors and branches in the layers."""
        apply_input_scales(run, result.tensors)
        apply_branches(run, result.tensors)

    # ---- inside ------------------------------------------------------------------------------------------------
    def _rank(self, site: Site) -> int:
        """Rank of a layer's branch, 0 where it has none."""
        if self.branch == "attention" and not (site.kind == "linear" and PRESETS["attention"](site.name)):
            return 0
        return min(self.rank, site.shape[0], math.prod(site.shape[1:]))

    def _chosen(self, run: Run) -> dict[str, QuantLayer]:
        specs = self.foresee(run.survey, run.plan)
        return {n: layer for n, layer in run.layers().items() if n in specs and getattr(layer, "groups", 1) == 1}

    def _inputs(self, run: Run, generator: torch.Generator) -> UnitResult:
        """Inputs ``x/<layer>`` and ``max|X_c|`` ``max/<layer>`` of the float face."""
        chosen = self._chosen(run)
        features = sum(layer.weight[0].numel() for layer in chosen.values())
        samples = min(self.samples, len(run.tape))
        rows = max(1, min(self.rows, run.memory // 2 // (4 * max(1, features))))
        kept: dict[str, list[Tensor]] = {name: [] for name in chosen}
        maxima: dict[str, Tensor] = {}

        def watch(name: str, layer: QuantLayer) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach()
                kept[name].append(inputs_of(layer, x, -(-rows * len(x) // samples), generator).cpu())
                here = x.float().movedim(layer.channel_dim, 0).flatten(1).abs().amax(dim=1)
                maxima[name] = torch.maximum(maxima[name], here) if name in maxima else here

            return hook

        handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in chosen.items()]
        with wrap.show(run.model, "float"):
            observe(run, "inputs of layers", samples, handles)
        tensors = {f"x/{name}": torch.cat(parts)[:rows].contiguous() for name, parts in kept.items()}
        return UnitResult(tensors | {f"max/{n}": t.cpu() for n, t in maxima.items()}, notes={"rows": rows})

    @torch.no_grad()
    def _layer(
        self, layer: QuantLayer, spec: LayerSpec, given: dict[str, Tensor], name: str, facts: dict[str, Any]
    ) -> dict[str, Tensor]:
        """What one layer is to hold: ``input_scale`` and ``up``, ``down``, as far as its spec has them."""
        weight, inputs = layer.weight.detach().float(), given["x"]
        column = [1, -1, *[1] * (weight.ndim - 2)]
        quantize = self._quantizer(layer)
        before = layer.input_scale  # of a smooth step

        def tried(factor: Tensor | None, rank: int, iterations: int = 1) -> Split:
            scaled = weight if factor is None else weight / factor.reshape(column)
            return split(scaled.flatten(1), rank, quantize, OutputError(layer, inputs, factor), iterations)

        plain = tried(None, 0).errors[0]
        best, exponents = (before, (0.0, 0.0))
        least = tried(before, spec.low_rank).errors[0]
        if self.smooth == "search":
            for ends, factor in smoothings(clamped(given["max"]), clamped(weight_maxima(weight)), self.grid):
                error = tried(factor, spec.low_rank).errors[0]
                if error < least:
                    least, best, exponents = error, factor, ends
        found = tried(best, spec.low_rank, self.iterations)
        facts[name] = {"plain": short(plain), "first": short(found.errors[0]), "kept": short(min(found.errors)),
                       "iterates": len(found.errors), "exponents": list(exponents)}
        tensors = {}
        if spec.input_scale:
            ones = torch.ones(weight.shape[1], device=weight.device)
            tensors["input_scale"] = (ones if best is None else best).cpu()
        if spec.low_rank:
            tensors["up"] = found.up.cpu().contiguous()
            tensors["down"] = found.down.reshape(-1, *weight.shape[1:]).cpu().contiguous()
        return tensors

    def _quantizer(self, layer: QuantLayer) -> Quantize:
        """Rounds a matrix ``[N, n]`` as the layer's weight will be."""
        spec = layer.spec.weight
        if spec is None:
            raise InternalError("a layer without weight grid has nothing to round")

        def search(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
            return ranges.search(values, grid, points=self.points, step=self.step, power=self.power)

        def quantize(matrix: Tensor) -> Tensor:
            weight = matrix.reshape(layer.weight.shape)
            tables = weight_tables(layer, spec, search, lambda v: binary_scale(v, self.power), weight)
            scale, zero = (expand_weight_scale(t, layer.segments, weight.ndim) for t in tables)
            codes = encode_weight(weight, scale, zero, layer.top(), binary=layer.binary_rows())
            return decode(codes, scale, zero).flatten(1)

        return quantize


def _cost(site: Site, spec: LayerSpec) -> dict[str, Any]:
    """What a layer's branch costs: bytes, and multiply-accumulates as a share of the layer's (one for each number)."""
    size = branch_bytes(site.shape, spec)
    share = size / HALF_BYTES / math.prod(site.shape)
    return {"rank": spec.low_rank, "branch_bytes": size, "branch_macs": short(share)} if size else {}
