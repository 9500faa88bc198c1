"""fit: scales and zero-points for weights (with nearest codes) and for activations.

Activations are fitted on what the quantizers see when the weights are already quantized and the activations are not.
Each quantizer keeps a random, bounded share of the values of every sample (and exact extremes a timestep, for the
report).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InternalError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import encode, reciprocal


class Fit(Step):
    """Find ranges.

    Args:
        what: ``weights`` or ``activations``.
        method: ``minmax``, ``percentile`` or ``mse`` (least ``|error| ** power`` over shrunken ranges).
        points, step, power: Of the mse search.
        symmetric: Search ranges ``[-T, T]``, one-sided where the values have one sign (PTQ4DM).
        central_share: Share of the values inside the range, for ``percentile``.
        samples: Calibration samples looked at (activations).
        values: Values kept a sample and quantizer.
        ema: Weight of the past when ranges of batches are averaged (0: one range over all).
    """

    what: Literal["weights", "activations"]
    method: ranges.Method = "mse"
    points: int = Field(default=80, ge=1)
    step: float = Field(default=0.01, gt=0)
    power: float = Field(default=2.4, gt=0)
    symmetric: bool = False
    central_share: float = Field(default=0.999, gt=0, le=1)
    samples: int = Field(default=256, ge=1)
    values: int = Field(default=256, ge=2)
    ema: float = Field(default=0.0, ge=0, lt=1)

    @property
    def kind(self) -> str:
        """``fit weights`` or ``fit activations``."""
        return f"fit {self.what}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Activations are fitted on samples, behind quantized weights."""
        return ("calibrate", "fit weights") if self.what == "activations" else ()

    @property
    def not_after(self) -> tuple[str, ...]:
        """What is trained from these ranges would be lost."""
        return ("reconstruct rounding" if self.what == "weights" else "reconstruct activation_scale", "pack")

    def units(self, run: Run) -> list[str]:
        """Weights block by block, where a block has quantized ones; activations all at once."""
        if self.what == "activations":
            return ["all activations"]
        quantized = {name for name, spec in run.plan.layers.items() if spec.weight is not None}
        return [block for block, members in run.survey.blocks.items() if not quantized.isdisjoint(members)]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Fit one block's weights, or all activations."""
        if self.what == "activations":
            return self._activations(run, generator)
        tensors: dict[str, Tensor] = {}
        layers = run.layers()
        for name in run.survey.blocks[unit]:
            if name in layers and layers[name].spec.weight is not None:
                for key, value in self.weight(layers[name]).items():
                    tensors[f"{name}/{key}"] = value
        return UnitResult(tensors)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store scales (and codes) in the layers."""
        if self.what == "activations":
            apply_activations(run, result.tensors)
        else:
            apply_weights(run, result.tensors)

    def weight(self, layer: QuantLayer) -> dict[str, Tensor]:
        """Scale ``[N, S]``, zero_point ``[N, S]`` and nearest codes of one layer's weight."""
        spec, weight = layer.spec.weight, layer.weight.detach().float()
        if spec is None:
            return {}
        rows = weight.shape[0]
        scales, zeros = [], []
        for part in weight.reshape(rows, layer.in_channels_, -1).split(list(layer.segments), dim=1):
            values = part.reshape(1, -1) if spec.granularity == "tensor" else part.reshape(rows, -1)
            s, z = self._search(values, spec.grid)
            scales.append(s.expand(rows))
            zeros.append(z.expand(rows))
        scale, zero = torch.stack(scales, dim=1), torch.stack(zeros, dim=1)
        codes = nearest_codes(layer, scale, zero)
        return {"scale": scale, "zero_point": zero.to(torch.uint8), "codes": codes}

    def _search(self, values: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
        return ranges.search(values, grid, method=self.method, points=self.points, step=self.step, power=self.power,
                             central_share=self.central_share, symmetric=self.symmetric)

    def _activations(self, run: Run, generator: torch.Generator) -> UnitResult:
        found = {name: m for name, m in run.model.named_modules() if isinstance(m, ActivationQuantizer)}
        static = {name: m for name, m in found.items() if m.spec.mode == "static"}
        watchers = {name: _Watcher(m, self.values, generator) for name, m in found.items()}
        limit = min(self.samples, len(run.tape))
        run.progress.start("activation ranges", limit)
        spread = _spread(run, limit)
        try:
            with wrap.show(run.model, "sim"), wrap.float_activations(run.model), torch.no_grad():
                for batch in run.tape.select(spread):
                    for watcher in watchers.values():
                        watcher.times = batch["timestep"]
                    args, kwargs = run.tape.inputs(batch)
                    run.model(*args, **kwargs)
                    run.progress.advance(len(batch["timestep"]))
        finally:
            run.progress.finish()
            for watcher in watchers.values():
                watcher.handle.remove()
        tensors: dict[str, Tensor] = {}
        for name, quantizer in static.items():
            scale, zero = self._table(run, quantizer, watchers[name])
            tensors[f"{name}/scale"], tensors[f"{name}/zero_point"] = scale.cpu(), zero.to(torch.uint8).cpu()
        history = {name: watcher.history() for name, watcher in watchers.items()}
        return UnitResult(tensors, notes={"ranges": history, "quantizers": len(static)})

    def _table(self, run: Run, quantizer: ActivationQuantizer, watcher: _Watcher) -> tuple[Tensor, Tensor]:
        """Scale and zero-point tables ``[T, S]`` from the values a quantizer saw."""
        values, times = watcher.values_by_segment()
        if not quantizer.spec.timed:
            scale, zero = self._rows(values, quantizer)
            return scale[None], zero[None]
        rows = []
        for t in run.plan.timesteps:
            here = values[:, (times - t).abs() == (times - t).abs().min()]
            rows.append(self._rows(here, quantizer))
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def _rows(self, values: Tensor, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
        grid = quantizer.spec.grid
        if self.ema == 0:
            return self._search(values.flatten(1), grid)
        ends = None  # of the range, averaged over batches
        for part in values.split(64, dim=1):
            scale, zero = self._search(part.flatten(1), grid)
            here = torch.stack([-zero * scale, (grid.levels - 1 - zero) * scale])
            ends = here if ends is None else self.ema * ends + (1 - self.ema) * here
        if ends is None:
            raise InternalError("no values to fit a range to")
        if grid.signed:
            return (ends[1] - ends[0]) / (grid.levels - 1), torch.full_like(ends[0], grid.mid)
        return ranges.affine_parameters(ends[0], ends[1], grid)


class _Watcher:
    """Keeps values and extremes of what one activation quantizer is given."""

    def __init__(self, quantizer: ActivationQuantizer, values: int, generator: torch.Generator) -> None:
        self.quantizer, self.values, self.generator = quantizer, values, generator
        self.times = torch.empty(0)
        self.kept: list[Tensor] = []
        self.kept_times: list[Tensor] = []
        self.low: dict[float, float] = {}
        self.high: dict[float, float] = {}
        self.handle = quantizer.register_forward_pre_hook(self._watch)

    def _watch(self, _module: Any, args: tuple[Any, ...]) -> None:
        x, channel_dim = args[0].detach().float(), args[1]
        parts = x.split(list(self.quantizer.segments), channel_dim) if self.quantizer.segments else (x,)
        flat = [part.reshape(x.shape[0], -1) for part in parts]
        kept = []
        for part in flat:
            index = torch.randint(part.shape[1], (self.values,), generator=self.generator)
            sample = part[:, index.to(part.device)]
            sample[:, 0], sample[:, 1 % self.values] = part.amin(1), part.amax(1)  # the extremes always count
            kept.append(sample)
        self.kept.append(torch.stack(kept))
        self.kept_times.append(self.times)
        whole = torch.cat(flat, dim=1)
        for t, low, high in zip(self.times.tolist(), whole.amin(1).tolist(), whole.amax(1).tolist(), strict=True):
            self.low[t] = min(self.low.get(t, low), low)
            self.high[t] = max(self.high.get(t, high), high)

    def values_by_segment(self) -> tuple[Tensor, Tensor]:
        """Values ``[S, samples, values]`` and timesteps ``[samples]``."""
        return torch.cat(self.kept, dim=1), torch.cat(self.kept_times).to(self.kept[0].device)

    def history(self) -> dict[str, list[float]]:
        """Extremes a timestep, ascending, rounded for the report."""
        times = sorted(self.low)
        return {"timesteps": times, "low": [float(f"{self.low[t]:.5g}") for t in times],
                "high": [float(f"{self.high[t]:.5g}") for t in times]}


def _spread(run: Run, limit: int) -> list[int]:
    """Indices of ``limit`` samples, equally strided over the tape."""
    total = len(run.tape)
    return [i * total // limit for i in range(limit)]


def nearest_codes(layer: QuantLayer, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of the layer's float weight on given tables ``[N, S]``, rounded to nearest, uint8."""
    layer.weight_scale = scale.to(layer.weight_scale.device)
    layer.weight_zero_point = zero.to(device=layer.weight_scale.device, dtype=torch.uint8)
    s, z = layer.scale_tables()
    return encode(layer.weight.detach(), reciprocal(s), z, layer.top()).to(torch.uint8)


def apply_weights(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store ``<layer>/codes``, ``/scale``, ``/zero_point`` in the layers (scale and zero-point may be absent)."""
    layers = run.layers()
    for key, codes in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "codes":
            layer = layers[name]
            scale = tensors.get(f"{name}/scale", layer.weight_scale)
            layer.set_weight(codes, scale, tensors.get(f"{name}/zero_point", layer.weight_zero_point))


def apply_activations(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store ``<quantizer>/scale`` and ``/zero_point`` in the activation quantizers."""
    for key, scale in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "scale":
            quantizer = run.model.get_submodule(name)
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.set_scale(scale, tensors.get(f"{name}/zero_point"))
