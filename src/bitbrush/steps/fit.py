"""fit: scales and zero-points for weights (with nearest codes) and for activations.

Weights are those that the layer stores codes of: divided by ``input_scale`` where a layer has one. Rows of different
bits (``row_bits``) are each searched on their own grid; symmetric 1-bit rows search the one magnitude.

Activations are fitted on what the quantizers see when the weights are already quantized and the activations are not.
Each quantizer keeps a random, bounded share of the values of every sample (and exact extremes a timestep, for the
report).

With ``inputs = "progressive"`` (PCR, Tang et al. 2024) rows of timed tables are fitted one sampling step after another,
on what the network makes of its own trajectories: at each call of the sampler a first pass over all trajectories, with
weights quantized and activations not, fits the row of that timestep; then the call is made with activations quantized,
and that answer goes to the scheduler. All trajectories are sampled side by side, so a step costs two passes, whatever
its place: O(N) calls, where starting again for every step would be O(N^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InputError, InternalError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import Survey
from bitbrush.numbers import ranges
from bitbrush.numbers.grid import ActivationSpec, Grid, Plan, WeightSpec
from bitbrush.numbers.straight_through import encode_weight
from bitbrush.steps.observe import observe
from bitbrush.steps.watch import Watcher

CHUNK = 1 << 24  # values searched together
QUANTILE_VALUES = 2048
"""Values kept a sample, at least, of a quantizer whose scale is a high quantile of them."""
BINARY_ROUNDS = 24
"""Golden-section steps to the magnitude of a symmetric 1-bit row: to a hundred-thousandth of its range."""


class Fit(Step):
    """Find ranges.

    Args:
        what: ``weights`` or ``activations``.
        inputs: Of activations: ``float`` trajectories, those of the tape; or ``progressive``, sampled here with the
            prompts and noise of the calibrate step, each call behind the already quantized ones. Tables with one row
            for all times are fitted on the float trajectories first.
        method: ``minmax``, ``percentile`` or ``mse`` (least ``|error| ** power`` over shrunken ranges).
        points, step, power: Of the mse search.
        symmetric: Search ranges ``[-T, T]``, one-sided where the values have one sign (PTQ4DM).
        central_share: Share of the values inside the range, for ``percentile``.
        samples: Calibration samples looked at (activations); ``progressive`` takes as many trajectories as make up so
            many samples, at least one.
        values: Values kept a sample and quantizer.
        extremes_from: Bits from which on each sample's smallest and largest value are among them. Few bits are better
            fitted without, because two of ``values`` are far more than their share; with many, clipping what is rare
            and large costs more than it saves, of a softmax most of all.
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
    extremes_from: int = Field(default=1, ge=1)
    inputs: Literal["float", "progressive"] = "float"
    ema: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _sensible(self) -> Fit:
        if self.inputs == "progressive" and self.what != "activations":
            raise ValueError("inputs = progressive is for activations: weights are fitted without any inputs")
        return self

    @property
    def kind(self) -> str:
        """``fit weights`` or ``fit activations``."""
        return f"fit {self.what}"

    @property
    def sees_activations(self) -> bool:
        """Weights are fitted without any."""
        return self.what == "activations"

    @property
    def needs(self) -> tuple[str, ...]:
        """Activations are fitted on samples, behind quantized weights."""
        return ("calibrate", "fit weights", "codebooks") if self.what == "activations" else ()

    @property
    def not_after(self) -> tuple[str, ...]:
        """What is trained from these ranges would be lost."""
        trained = "reconstruct rounding" if self.what == "weights" else "reconstruct activation_scale"
        return (trained, "finetune", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """Calls one after another can only be told apart by scales a timestep."""
        static = [a for s in plan.layers.values() if (a := s.activation) is not None and a.mode == "static"]
        if self.inputs == "progressive" and static and not any(a.timed for a in static):
            raise InputError("progressive calibration needs scales a timestep", where=f"step {self.label}: inputs",
                             why="every static scale of this plan holds for all timesteps",
                             try_='give the layers activation = { timed = true }, or inputs = "float"')

    def units(self, run: Run) -> list[str]:
        """Weights block by block, where a block has some on a grid with scales; activations all at once."""
        if self.what == "activations":
            watched = any(spec.activation is not None for spec in run.plan.layers.values())
            return ["all activations"] if watched else []
        quantized = {n for n, s in run.plan.layers.items() if s.weight is not None and not s.weight.additive}
        return [block for block, members in run.survey.blocks.items() if not quantized.isdisjoint(members)]

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Fit one block's weights, or all activations."""
        if self.what == "activations":
            how = self._progressive if self.inputs == "progressive" else self.activations
            return how(run, generator)
        tensors: dict[str, Tensor] = {}
        layers = run.layers()
        for name in run.survey.blocks[unit]:
            spec = layers[name].spec.weight if name in layers else None
            if spec is not None and not spec.additive:
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
        spec = layer.spec.weight
        if spec is None:
            return {}
        scale, zero = weight_tables(layer, spec, self._search, self.magnitude)
        codes = nearest_codes(layer, scale, zero)
        return {"scale": scale, "zero_point": zero.to(torch.uint8), "codes": codes}

    def magnitude(self, values: Tensor) -> Tensor:
        """Scales of symmetric 1-bit rows ``[R, M]``: of least error for ``mse``, else the mean magnitude."""
        return binary_scale(values, self.power if self.method == "mse" else 2.0)

    def _search(self, values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        if grid.kind == "log2":
            return ranges.search_log2(values, grid)
        return ranges.search(values, grid, method=self.method, points=self.points, step=self.step, power=self.power,
                             central_share=self.central_share, symmetric=self.symmetric)

    def activations(self, run: Run, generator: torch.Generator) -> UnitResult:
        """Tables of all static quantizers from the samples of the tape."""
        found, static = quantizers(run), quantizers(run, "static")
        watchers = {name: self.watcher(m, generator) for name, m in found.items()}

        def tell(batch: dict[str, Tensor]) -> None:
            for watcher in watchers.values():
                watcher.times = batch["timestep"]

        with wrap.show(run.model, "sim"), wrap.float_activations(run.model):
            observe(run, "activation ranges", self.samples, [w.handle for w in watchers.values()], tell)
        tensors: dict[str, Tensor] = {}
        for name, quantizer in static.items():
            scale, zero = self._table(run, quantizer, watchers[name])
            tensors[f"{name}/scale"], tensors[f"{name}/zero_point"] = scale.cpu(), zero.to(torch.uint8).cpu()
        history = {name: watcher.history() for name, watcher in watchers.items()}
        return UnitResult(tensors, notes={"ranges": history, "quantizers": len(static)})

    def watcher(self, quantizer: ActivationQuantizer, generator: torch.Generator) -> Watcher:
        """Keeps what one quantizer sees. The static delta of a log2 grid is a high quantile: it takes many values, and
        none that was chosen because it is large."""
        if quantizer.spec.grid.kind == "log2" and quantizer.spec.mode == "static":
            return Watcher(quantizer, max(self.values, QUANTILE_VALUES), generator, extremes=False)
        return Watcher(quantizer, self.values, generator, quantizer.spec.most_bits >= self.extremes_from)

    # ---- step by step ------------------------------------------------------------------------------------------
    def _progressive(self, run: Run, generator: torch.Generator) -> UnitResult:
        """Tables of all quantizers: those of one row from the tape, the others call by call."""
        from bitbrush.steps.progressive import walk

        static = quantizers(run, "static")
        grouped = next((name for name, q in static.items() if q.spec.time_groups), None)
        if grouped is not None:
            raise InputError("progressive calibration cannot fit scales a group of timesteps", where=grouped,
                             why="a row that serves several calls of the sampler is needed before the last of them",
                             try_=f'step {self.label}: inputs = "float", or put it before the groups are made')
        start = UnitResult()
        if any(not q.spec.timed for q in static.values()):
            start = self.activations(run, generator)
            apply_activations(run, {key: t for key, t in start.tensors.items()
                                    if not static[key.rpartition("/")[0]].spec.timed})
        history, count = walk(self, run, generator, set(range(len(run.plan.timesteps))))
        tensors = tables(static)
        ranges_ = start.notes.get("ranges", {}) | {n: h for n, h in history.items() if n not in static
                                                   or static[n].spec.timed}
        return UnitResult(tensors, notes={"ranges": ranges_, "quantizers": len(static), "trajectories": count})

    # ---- ranges ------------------------------------------------------------------------------------------------
    def _table(self, run: Run, quantizer: ActivationQuantizer, watcher: Watcher) -> tuple[Tensor, Tensor]:
        """Scale and zero-point tables ``[T, S]`` from the values a quantizer saw."""
        values, times = watcher.values_by_segment()
        if not quantizer.spec.timed:
            scale, zero = self.row(values, quantizer.spec.grid)
            return scale[None], zero[None]
        nearest = samples_of(quantizer.spec, torch.tensor(run.plan.timesteps, device=times.device), times)
        given = quantizer.spec.grids()
        grids = given if len(given) == len(nearest) else given * len(nearest)
        if self.ema == 0:
            return self._by_class(values, nearest, grids)
        rows = [self.row(values[:, here], grid) for here, grid in zip(nearest, grids, strict=True)]
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def _by_class(self, values: Tensor, nearest: Tensor, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        """`_together`, rows of one grid and as many samples at a time."""
        classes = list(zip(grids, nearest.sum(dim=1).tolist(), strict=True))
        scale = torch.empty(len(nearest), values.shape[0], device=values.device)
        zero = torch.empty_like(scale)
        for kind in dict.fromkeys(classes):
            here = torch.tensor([c == kind for c in classes], device=values.device)
            chosen = nearest[here].nonzero()[:, 1].reshape(-1, kind[1])
            scale[here], zero[here] = self._together(values, chosen, kind[0])
        return scale, zero

    def _together(self, values: Tensor, chosen: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Tables ``[T, S]`` of values ``[S, samples, values]``; row t is fitted to the samples ``chosen[t]``."""
        found = []
        step = max(1, CHUNK // (values.shape[0] * chosen.shape[1] * values.shape[2]))
        for part in chosen.split(step):
            here = values[:, part].flatten(2).transpose(0, 1)  # [t, S, values]
            scale, zero = self._search(here.flatten(0, 1), grid)
            found.append((scale.reshape(len(part), -1), zero.reshape(len(part), -1)))
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def rows(self, values: dict[str, Tensor], grids: dict[str, Grid]) -> dict[str, tuple[Tensor, Tensor]]:
        """`row` of several quantizers; those of one grid and as many values are searched together."""
        alike: dict[tuple[Grid, int, int], list[str]] = {}
        for name, kept in values.items():
            alike.setdefault((grids[name], kept.shape[1], kept.shape[2]), []).append(name)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for (grid, samples, each), names in alike.items():
            for some in _by_size(names, {n: len(values[n]) * samples * each for n in names}):
                counts = [len(values[n]) for n in some]
                scale, zero = self.row(torch.cat([values[n] for n in some]), grid)
                found |= {n: (s, z) for n, s, z in zip(some, scale.split(counts), zero.split(counts), strict=True)}
        return found

    def row(self, values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and zero-point ``[S]`` of one row of a table from values ``[S, samples, values]``."""
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


def _by_size(names: list[str], sizes: dict[str, int]) -> list[list[str]]:
    """The names in order, as many at a time as have `CHUNK` values, at least one."""
    parts: list[list[str]] = []
    room = 0
    for name in names:
        if not parts or sizes[name] > room:
            parts.append([])
            room = CHUNK
        parts[-1].append(name)
        room -= sizes[name]
    return parts


def samples_of(spec: ActivationSpec, grid: Tensor, times: Tensor) -> Tensor:
    """Which samples each row of a timed table is fitted to, bool ``[rows, samples]``; at least one in each row.

    A row of one timestep has the samples nearest to it. A row of a group of timesteps has those whose nearest timestep
    is in the group; where there are none, the samples nearest to each timestep of the group.

    Args:
        spec: Says the groups.
        grid: The plan's timesteps ``[T]``, ascending.
        times: Timesteps of the samples ``[samples]``.
    """
    apart = (times[None] - grid[:, None]).abs()
    nearest = apart == apart.amin(dim=1, keepdim=True)  # [T, samples]
    if not spec.time_groups:
        return nearest
    group = torch.tensor(spec.time_groups, device=times.device)
    of_group = group == torch.arange(spec.table_rows(len(grid)), device=times.device)[:, None]  # [K, T]
    own = of_group[:, apart.argmin(dim=0)]
    lent = torch.stack([nearest[row].any(dim=0) for row in of_group])
    return torch.where(own.any(dim=1, keepdim=True), own, lent)


def quantizers(run: Run, mode: str = "") -> dict[str, ActivationQuantizer]:
    """Activation quantizers of the run's model by name, of one mode or of both."""
    found = {name: m for name, m in run.model.named_modules() if isinstance(m, ActivationQuantizer)}
    return {name: m for name, m in found.items() if not mode or m.spec.mode == mode}


def tables(static: dict[str, ActivationQuantizer]) -> dict[str, Tensor]:
    """The tables of static quantizers, as a result: ``<quantizer>/scale`` and ``/zero_point``, on the CPU."""
    return {f"{n}/{key}": getattr(q, key).cpu().clone() for n, q in static.items() for key in ("scale", "zero_point")}


def weight_tables(
    layer: QuantLayer, spec: WeightSpec, search: Callable[[Tensor, Grid], tuple[Tensor, Tensor]],
    magnitude: Callable[[Tensor], Tensor], weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point ``[N, S]`` (float32) of the weight that a layer stores codes of.

    Args:
        layer: For its weight and segments.
        spec: The weight's spec; it need not be the layer's own.
        search: ``(values [R, M], grid) -> (scale [R], zero_point [R])``, for each bit class and segment.
        magnitude: ``values [R, M] -> scale [R]`` for symmetric 1-bit rows, whose zero-point is 1.
        weight: Another one of the layer's shape, in its place.
    """
    weight = layer.scaled_weight().detach().float() if weight is None else weight
    rows = weight.shape[0]
    bits = torch.tensor(spec.row_bits or (spec.grid.bits,) * rows, device=weight.device)
    scale = torch.ones(rows, len(layer.segments), device=weight.device)
    zero = torch.ones_like(scale)
    parts = weight.reshape(rows, layer.in_channels_, -1).split(list(layer.segments), dim=1)
    for size in dict.fromkeys(layer.segments):  # segments of one size are searched together
        columns = torch.tensor([c for c, count in enumerate(layer.segments) if count == size], device=weight.device)
        alike = torch.stack([parts[c].flatten(1) for c in columns.tolist()], dim=1)  # [N, s, values]
        for width in spec.bit_classes():
            here = (bits == width).nonzero().flatten()
            values, shape = alike[here].flatten(0, 1), (len(here), len(columns))
            if spec.granularity == "tensor":
                values, shape = alike[here].transpose(0, 1).flatten(1), (1, len(columns))
            s, z = (magnitude(values), torch.ones_like(values[:, 0])) if spec.halved(width) else search(
                values, class_grid(spec, width))
            for table, found in ((scale, s), (zero, z)):
                table[here[:, None], columns] = found.reshape(shape).expand(len(here), -1)
    return scale, zero


def class_grid(spec: WeightSpec, bits: int) -> Grid:
    """The grid of rows of ``bits`` bits; with 8 bits it is signed, because code - zero_point must fit int8."""
    return spec.grid if bits == spec.grid.bits else Grid(bits=bits, signed=spec.grid.signed or bits == 8)


def binary_scale(values: Tensor, power: float = 2.4) -> Tensor:
    """The s of each row of ``values`` ``[R, M]`` for which ``mean |w - s sign(w)| ** power`` is least; shape ``[R]``.

    For power 2 it is the mean magnitude (Rastegari et al. 2016, section 3.1). Otherwise a golden-section search, exact
    to `BINARY_ROUNDS` divisions for powers from 1 (the error is convex in s), and never worse than the mean magnitude.
    """
    size = values.double().abs()

    def loss(scale: Tensor) -> Tensor:
        return (size - scale[:, None]).abs().pow(power).mean(dim=1)

    mean, low, high = size.mean(dim=1), size.amin(dim=1), size.amax(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    if power == 2.0:
        return mean.float().clamp_min(tiny)
    for _ in range(BINARY_ROUNDS):
        inner = (high - low) * (math.sqrt(5) - 1) / 2
        left = loss(high - inner) <= loss(low + inner)
        low, high = torch.where(left, low, high - inner), torch.where(left, low + inner, high)
    found = (low + high) / 2
    return torch.where(loss(found) < loss(mean), found, mean).float().clamp_min(tiny)


def nearest_codes(layer: QuantLayer, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of the layer's float weight on given tables ``[N, S]``, rounded to nearest, uint8."""
    layer.weight_scale = scale.to(layer.weight_scale.device)
    layer.weight_zero_point = zero.to(device=layer.weight_scale.device, dtype=torch.uint8)
    s, z = layer.scale_tables()
    return encode_weight(layer.scaled_weight(), s, z, layer.top(), binary=layer.binary_rows()).to(torch.uint8)


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
