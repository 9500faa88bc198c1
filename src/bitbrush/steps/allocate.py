"""allocate: rows of one layer get N-1, N or N+1 bits, N on average (MPQ-DM, OMQ; section 3.3 of its method page).

A few output rows hold outliers that wreck their uniform grid. The rows are ranked by the kurtosis of their weights; the
g groups of a tenth of the rows with the largest kurtosis get one bit more, as many with the smallest one bit less. The
number of groups is the one, from 0 to ``shares``, with the least

    || f(X, W) - f(Q(X), Q(W | bits(g))) ||^2

where X is what the layer receives when all earlier layers are quantized. An output channel depends on its own row only,
so its error is computed once for each of the three widths, and the error of any split is a sum over the rows.

Rows that keep N bits keep their codes; the others get scales by the search of `steps.fit`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.memo import Memo
from bitbrush.engine.planning import check_pattern, matches
from bitbrush.engine.run import Run
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.engine.tape import Recording
from bitbrush.errors import InternalError
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.survey import Survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, expand_weight_scale
from bitbrush.numbers.grid import Grid, Plan, WeightSpec
from bitbrush.numbers.straight_through import BINARY_TOP, encode_weight
from bitbrush.steps.branches import apply_branches
from bitbrush.steps.fit import apply_activations, apply_weights, binary_scale, class_grid, weight_tables
from bitbrush.steps.smooth import apply_input_scales

GROUPS = 10
"""Rows move in groups of a tenth of the layer's rows."""
CHUNK = 32

Coded = dict[str, Tensor]
"""``codes`` in the weight's shape, ``scale`` and ``zero_point`` ``[N, S]``."""


class Allocate(Step):
    """Mix bit widths inside each layer.

    Layers with fewer than ten rows, with other bits than ``bits``, or with one scale a tensor keep one width.

    Args:
        bits: Bits of the layers concerned; None: the run's ``--weights``.
        shares: Largest number of groups that move each way (5 = half of the rows up, half down); 0 leaves all layers
            uniform, for comparison.
        rank: Rows are ranked by ``kurtosis``, or in ``random`` order, for comparison.
        extra: Share of the rows that get one bit more beyond the balanced swap (MPQ-DM+), those with the largest
            kurtosis among the N-bit rows.
        samples: Calibration samples on which splits are compared.
        points, step, power: Of the search for the scales of rows that change width.
        layers: Pattern of the layers concerned.
    """

    bits: int | None = Field(default=None, ge=2, le=7)
    shares: int = Field(default=5, ge=0, le=5)
    rank: Literal["kurtosis", "random"] = "kurtosis"
    extra: float = Field(default=0.0, ge=0, le=1)
    samples: int = Field(default=128, ge=1)
    points: int = Field(default=80, ge=1)
    step: float = Field(default=0.01, gt=0)
    power: float = Field(default=2.4, gt=0)
    layers: str = "*"

    @property
    def needs(self) -> tuple[str, ...]:
        """Splits are compared on samples, behind quantized layers, with quantized inputs."""
        return ("calibrate", "fit weights", "codebooks", "fit activations")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Rows move once; what was trained on the old widths would be lost."""
        return ("allocate", "finetune", "pack")

    def check(self, survey: Survey, plan: Plan) -> None:
        """The pattern names layers of this model."""
        if self.shares:
            check_pattern(self.layers, [site.name for site in survey.layers()], f"step {self.label}: layers")

    def units(self, run: Run) -> list[str]:
        """Layers to be mixed, in execution order."""
        if self.shares == 0 and self.extra == 0:
            return []
        found = []
        for name, layer in run.layers().items():
            weight = layer.spec.weight
            if weight is None or weight.additive:
                continue
            if weight.grid.bits != (self.bits or run.recipe.weights) or weight.granularity != "row":
                continue
            if matches(self.layers, name) and layer.out_channels_ >= GROUPS:
                found.append(name)
        return found

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Rank, measure, and choose the split of one layer."""
        layer, spec = run.layers()[unit], run.plan.layers[unit]
        if spec.weight is None:
            raise InternalError("a layer without weight grid cannot be mixed", where=unit)
        bits = spec.weight.grid.bits
        scores = kurtosis(layer.scaled_weight())
        if self.rank == "random":
            scores = torch.randperm(len(scores), generator=generator).to(scores)
        splits = [split_rows(scores, bits, g, self.extra) for g in range(self.shares + 1)]
        widths = sorted({b for split in splits for b in split})
        candidates = {b: self._coded(layer, spec.weight, b) for b in widths}
        errors = self._errors(run, unit, layer, candidates)
        totals = [float(sum(errors[b][torch.tensor(s) == b].sum() for b in widths)) for s in splits]
        best = min(range(len(splits)), key=lambda g: (totals[g], g))
        count, row_bits = len(scores), splits[best]
        notes = {
            "groups": best, "average_bits": round(sum(row_bits) / count, 4),
            "rows": {str(b): row_bits.count(b) for b in widths}, "share": round(best * (count // GROUPS) / count, 4),
            "loss_start": short(totals[0] / self._used(run)), "loss_end": short(totals[best] / self._used(run)),
        }
        if set(row_bits) == {bits}:
            return UnitResult(notes=notes)
        change = spec.model_copy(update={"weight": spec.weight.model_copy(update={"row_bits": row_bits})})
        return UnitResult(self._tensors(unit, layer, mixed(candidates, row_bits)), {unit: change}, notes)

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store codes and tables in the layer, which was wrapped anew; its output is final now."""
        apply_input_scales(run, result.tensors)
        apply_branches(run, result.tensors)
        apply_weights(run, result.tensors)
        apply_activations(run, {k: v for k, v in result.tensors.items() if k.startswith(f"{unit}.input/")})
        settle(run, run.memo(self.label), unit)
        if unit == self.units(run)[-1]:
            run.forget(self.label)

    # ---- inside ------------------------------------------------------------------------------------------------
    def _used(self, run: Run) -> int:
        return min(self.samples, len(run.tape))

    def _coded(self, layer: QuantLayer, spec: WeightSpec, bits: int) -> Coded:
        """The whole weight at one width: as it is at the layer's own, else fitted and rounded to nearest."""
        if bits == spec.grid.bits:
            return {"codes": layer.stored_codes(), "scale": layer.weight_scale,
                    "zero_point": layer.weight_zero_point}
        one = spec.model_copy(update={"grid": class_grid(spec, bits), "row_bits": ()})
        scale, zero = weight_tables(layer, one, self._search, self._magnitude)
        weight = layer.scaled_weight()
        s, z = (expand_weight_scale(t, layer.segments, weight.ndim) for t in (scale, zero))
        halved = one.halved(bits)
        binary = torch.ones_like(s[:, :1], dtype=torch.bool) if halved else None
        codes = encode_weight(weight, s, z, BINARY_TOP if halved else one.grid.levels - 1, None, binary)
        return {"codes": codes.to(torch.uint8), "scale": scale, "zero_point": zero.to(torch.uint8)}

    def _search(self, values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return ranges.search(values, grid, points=self.points, step=self.step, power=self.power)

    def _magnitude(self, values: Tensor) -> Tensor:
        return binary_scale(values, self.power)

    def _errors(self, run: Run, unit: str, layer: QuantLayer, candidates: dict[int, Coded]) -> dict[int, Tensor]:
        """Squared output error of each row with its weights at each width, summed over samples; float64 ``[N]``."""
        memo = run.memo(self.label)
        with wrap.show(run.model, "sim"):
            recording = run.tape.record(run.model, unit, limit=self._used(run), memo=memo, output=False)
        weights = {bits: _decoded(layer, coded) for bits, coded in candidates.items()}
        errors = {bits: torch.zeros(layer.out_channels_, dtype=torch.float64) for bits in weights}
        for rows in torch.arange(self._used(run), device=run.device).split(CHUNK):
            with torch.no_grad(), run.clock.at(recording.timesteps[rows]):
                for bits, error in row_errors(layer, recording, rows, weights).items():
                    errors[bits] += error
        return errors

    def _tensors(self, unit: str, layer: QuantLayer, coded: Coded) -> dict[str, Tensor]:
        """All that the layer has to hold after it is wrapped anew."""
        tensors = {f"{unit}/{key}": value for key, value in coded.items()}
        if layer.input_scale is not None:
            tensors[f"{unit}/input_scale"] = layer.input_scale
        if layer.low_rank is not None:
            tensors[f"{unit}/up"], tensors[f"{unit}/down"] = layer.low_rank()
        if layer.input is not None and layer.input.spec.mode == "static":
            tensors[f"{unit}.input/scale"] = layer.input.scale
            tensors[f"{unit}.input/zero_point"] = layer.input.zero_point
        return tensors


def kurtosis(weight: Tensor) -> Tensor:
    """Fourth standardised moment of each output row, ``[N]`` (MPQ-DM; section 3.2 of its method page).

    ``mean_j (w_j - mean)^4 / std^4`` over everything but the first dimension, with the unbiased standard deviation and
    without the "- 3": about 3 for Gaussian rows, whatever their scale and shift. Constant rows give 0.

    Args:
        weight: ``[N, ...]``, the weight that is quantized (divided by ``input_scale`` where there is one).
    """
    rows = weight.detach().double().reshape(len(weight), -1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1) / max(rows.shape[1] - 1, 1)
    flat = rows.amax(dim=1) == rows.amin(dim=1)
    found = centred.pow(4).mean(dim=1) / variance.square()
    return torch.where(flat | ~torch.isfinite(found), torch.zeros_like(found), found)


def split_rows(scores: Tensor, bits: int, groups: int, extra: float = 0.0) -> tuple[int, ...]:
    """Bits of each row when ``groups`` tenths of the rows move each way (MPQ-DM; section 3.3 of its method page).

    The ``groups * (N // 10)`` rows with the largest score get ``bits + 1``, as many with the smallest ``bits - 1``, so
    the average stays ``bits``. ``extra`` (MPQ-DM+) raises the next ``extra * N`` rows by score too, those that still
    have ``bits``. Rows of equal score are taken by number.

    Args:
        scores: ``[N]``, for instance `kurtosis`.
    """
    count = len(scores)
    moved = min(groups * (count // GROUPS), count // 2)
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    raised = moved + min(round(extra * count), count - 2 * moved)
    found = [bits] * count
    for row in order[:raised]:
        found[row] = bits + 1
    for row in order[count - moved :]:
        found[row] = bits - 1
    return tuple(found)


def mixed(candidates: dict[int, Coded], row_bits: tuple[int, ...]) -> Coded:
    """Each row from the candidate of its width."""
    widths = torch.tensor(row_bits)
    out = {key: value.clone() for key, value in next(iter(candidates.values())).items()}
    for bits, coded in candidates.items():
        rows = (widths == bits).nonzero().flatten().to(coded["codes"].device)
        for key, value in coded.items():
            out[key][rows] = value[rows].to(out[key].dtype)
    return out


def row_errors(layer: QuantLayer, recording: Recording, rows: Tensor, weights: dict[int, Tensor]) -> dict[int, Tensor]:
    """Squared error of each output channel of the sim face, with each of the weights, against the float face.

    Args:
        layer: The layer; its input quantizer and input scale are those of the simulation.
        recording: What it receives.
        rows: Samples looked at.
        weights: Decoded weights (of the scaled layer) by any key.

    Returns:
        Float64 ``[N]`` on the CPU by key.
    """
    with wrap.show(layer, "float"):
        target = recording.call(layer, rows)
    found = {}
    with wrap.show(layer, "sim"):
        for key, weight in weights.items():
            layer.trial_weight = weight
            try:
                delta = (recording.call(layer, rows).float() - target.float()).movedim(layer.channel_dim, 0)
            finally:
                layer.trial_weight = None
            found[key] = delta.reshape(len(delta), -1).double().square().sum(dim=1).cpu()
    return found


def settle(run: Run, memo: Memo, unit: str) -> None:
    """Declare final what runs up to the layer ``unit``: whole blocks where all their layers are, else single layers.

    The outputs inside a finished block are no longer asked for, and make room.
    """
    done = set[str]()
    for site in run.survey.layers():
        done.add(site.name)
        if site.name == unit:
            break
    for block, members in run.survey.blocks.items():
        if block in memo.finished:
            continue
        if done.issuperset(members):
            memo.finish(block)
            for key in [k for k in memo.kept if k[0] in members and k[0] != block]:
                kept = memo.kept.pop(key)
                memo.used -= kept.numel() * kept.element_size()
            for name in members:
                if name != block:
                    memo.finished.pop(name, None)
        else:
            for name in members:
                if name in done:
                    memo.finish(name)


def _decoded(layer: QuantLayer, coded: Coded) -> Tensor:
    ndim = 4 if isinstance(layer, nn.Conv2d) else 2
    scale, zero = (expand_weight_scale(coded[k].float(), layer.segments, ndim) for k in ("scale", "zero_point"))
    return decode(coded["codes"], scale, zero)
