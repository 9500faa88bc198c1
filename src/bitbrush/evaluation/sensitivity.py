"""What rounding one layer (or block) alone does to the pictures, with a cheap proxy beside it.

The network is float except for the unit at hand. Its pictures, of the same prompts and noise, are compared with those
of the float network, which are drawn once. The proxies need a few denoiser calls only: the relative error of the unit's
own output, and of the denoiser's answer. Their rank correlation with the pictures says how far one may trust them in
this network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitbrush.engine.disk import write_bytes
from bitbrush.errors import ArtifactError, NumericsError
from bitbrush.evaluation.pairs import psnr
from bitbrush.evaluation.rows import RowLog
from bitbrush.evaluation.sampling import Progress, autocasting, denoiser, draw
from bitbrush.evaluation.statistics import bootstrap_mean
from bitbrush.evaluation.store import PictureSet, PictureStore
from bitbrush.network.layers import QuantLayer
from bitbrush.network.pipelines import first_output
from bitbrush.network.survey import Survey
from bitbrush.network.temporary import holding

FORMAT = 1
PROBES, PROBED = 4, 2
"""Denoiser calls that the proxies look at, and pictures in each of them."""
ALL = "all layers at once"
Compare = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""(pictures, those of the float network, prompts) to one number a picture."""


class Rounding(Protocol):
    """What gives the layers their codes: `bitbrush.steps.plain.PlainRounding`."""

    def round(self, bits: int) -> None: ...
    def layers(self) -> dict[str, QuantLayer]: ...


@dataclass(frozen=True)
class Unit:
    """What is rounded at once: a layer, or the layers of a block.

    Args:
        name: Of the module.
        block: It belongs to.
        kind: ``linear``, ``conv`` or ``block``.
        layers: Names of its layers.
        parameters, macs: Of them together; multiply-accumulates of one sample.
    """

    name: str
    block: str
    kind: str
    layers: tuple[str, ...]
    parameters: int
    macs: int


@dataclass
class Sensitivity:
    """What was measured; the input of a bit allocation.

    Attributes:
        model: Where the network is from.
        weights: Bit widths.
        activations: Bits of the rounded unit's inputs; 16 = float.
        baseline: ``all``: every unit rounded at once, a row for each width.
        settings: by, metric, n, seed, steps, guidance, batch, prompts, recipe, versions.
        rows: One for each width and unit, in the order of execution: layer, block, kind, parameters, macs,
            weight_bits, activation_bits, output_error and noise_error (``||error|| / ||signal||`` of the unit's output
            and of the denoiser's), psnr {value, low, high} in dB and, where asked for, lpips or clip (the change of the
            score). Where pictures are not finite psnr is None.
        rank_correlation: Width -> ``proxy~metric`` -> Spearman's rho over the units, and n. A proxy that ranks as the
            pictures do has -1 with psnr and clip, +1 with lpips.
    """

    model: str
    weights: list[int]
    activations: int
    baseline: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    rank_correlation: dict[str, dict[str, float | int | None]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Which of the rows' numbers ranks them."""
        return str(self.settings["metric"])

    def worst(self, count: int | None = None, weights: int | None = None) -> list[dict[str, Any]]:
        """Rows with the most damage first, of one width (the first by default)."""
        bits = self.weights[0] if weights is None else weights
        mine = [row for row in self.rows if row["weight_bits"] == bits]
        return sorted(mine, key=lambda row: damage(row, self.metric), reverse=True)[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The inverse of ``to_json``.

        Raises:
            ArtifactError: It is of another format.
        """
        if data.get("format") != FORMAT:
            raise ArtifactError("these are no sensitivities that this release reads", where="sensitivity.json",
                                why=f"format {data.get('format')!r}, known: {FORMAT}",
                                try_="measure them again with bitbrush sensitivity")  # fmt: skip
        return cls(**{name: value for name, value in data.items() if name != "format"})

    def save(self, path: Path | str) -> None:
        """Write the JSON file."""
        write_bytes(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())


def damage(row: Mapping[str, Any], metric: str) -> float:
    """A number that is larger the worse the pictures are."""
    found = row.get(metric)
    if found is None:
        return math.inf
    return float(found["value"]) if metric == "lpips" else -float(found["value"])


def units(survey: Survey, by: str, names: Sequence[str] | None = None) -> list[Unit]:
    """The units of a network in execution order.

    Args:
        survey: Of the network.
        by: ``layer`` or ``block``; a layer outside of all blocks is a block of its own.
        names: Only units that have one of these layers.
    """
    sites = {site.name: site for site in survey.layers()}
    groups = {n: (n,) for n in sites} if by == "layer" else dict(survey.blocks)
    wanted = set(sites) if names is None else set(names)
    found = []
    for name, members in groups.items():
        if wanted.isdisjoint(members):
            continue
        own = [sites[member] for member in members]
        kind = own[0].kind if members == (name,) else "block"
        found.append(Unit(name, own[0].block, kind, tuple(members), sum(s.parameters for s in own),
                          sum(s.macs for s in own)))  # fmt: skip
    return found


class Measure:
    """Measures units one by one; rows that are in the log are not measured again.

    Args:
        pipeline: Whose denoiser ``rounding`` has wrapped, in float face.
        rounding: Gives its layers their codes.
        folder: Of the pictures of the float network and of the log.
        facts: What the float pictures follow from, besides what is given here.
        activations: Bits, for the rows.
        prompts: At least ``n``, or None.
        compare: Further numbers a picture, by name (``lpips``, ``clip``), beside ``psnr``.
        n, seed, steps, guidance, batch, autocast: As for ``sampling.draw``.
        progress: Where to report.
    """

    def __init__(
        self, pipeline: Any, rounding: Rounding, *, folder: Path, facts: Mapping[str, Any], activations: int,
        prompts: Sequence[str] | None, compare: Mapping[str, Compare], n: int, seed: int, steps: int, guidance: float,
        batch: int, autocast: torch.dtype | None, progress: Progress,
    ) -> None:  # fmt: skip
        self.pipeline, self.model, self.rounding = pipeline, denoiser(pipeline), rounding
        self.activations, self.prompts, self.compare = activations, prompts, dict(compare)
        self.n, self.batch, self.progress, self.autocast = n, batch, progress, autocast
        self.drawing: dict[str, Any] = {"prompts": prompts, "seed": seed, "steps": steps, "guidance": guidance}
        self.drawing |= {"batch": batch, "autocast": autocast}
        known = {**facts, "prompts": list(prompts[:n]) if prompts is not None else None, "seed": seed, "steps": steps,
                 "guidance": guidance, "autocast": str(autocast)}  # fmt: skip
        self.store, self.facts = PictureStore(folder / "pictures"), known
        asked = {"n": n, "batch": batch, "activations": activations, "compare": sorted(self.compare)}
        self.log = RowLog(folder / "rows", known | asked)
        self._reference: PictureSet | None = None
        self._probes: list[tuple[Any, Tensor]] = []

    def run(self, wanted: Sequence[Unit], weights: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """A row for each width and unit, and behind them one of all units at once, by width."""
        everything = Unit(ALL, ALL, "network", tuple(name for unit in wanted for name in unit.layers),
                          sum(u.parameters for u in wanted), sum(u.macs for u in wanted))  # fmt: skip
        asked = [(bits, unit) for bits in weights for unit in (*wanted, everything)]
        left = [(bits, unit) for bits, unit in asked if self.log.find(_name(bits, unit)) is None]
        self.progress.start("sensitivity", len(left))
        try:
            for bits, unit in left:
                self.rounding.round(bits)
                row = self.row(unit, bits)
                self.log.add(_name(bits, unit), row)
                self.progress.advance(1, _note(row))
        finally:
            self.progress.finish()
        found = {bits: [self.log.rows[_name(bits, unit)] for unit in (*wanted, everything)] for bits in weights}
        return found

    def row(self, unit: Unit, bits: int) -> dict[str, Any]:
        """One unit, rounded as it is now."""
        numbers: dict[str, Any] = {"layer": unit.name, "block": unit.block, "kind": unit.kind,
                                   "parameters": unit.parameters, "macs": unit.macs, "weight_bits": bits,
                                   "activation_bits": self.activations}  # fmt: skip
        with self._rounded(unit):
            numbers |= self._proxies(unit)
            numbers |= self._pictures()
        return numbers

    # ---- inside ------------------------------------------------------------------------------------------------
    @contextmanager
    def _rounded(self, unit: Unit) -> Iterator[None]:
        self.reference()  # of the float network: before anything is rounded
        self.probes()
        with holding(self._members(unit), "face", "sim"):
            yield

    def _members(self, unit: Unit) -> list[QuantLayer]:
        layers = self.rounding.layers()
        return [layers[name] for name in unit.layers]

    def reference(self) -> PictureSet:
        """The float network's pictures, drawn once."""
        if self._reference is None:
            self._reference = self.store.drawn(
                self.facts, self.n, lambda part: {"pictures": draw(self.pipeline, indices=part, **self.drawing)},
                batch=self.batch,
            )  # fmt: skip
        return self._reference

    def probes(self) -> list[tuple[Any, Tensor]]:
        """A few calls of the float denoiser, evenly over the steps: (args, kwargs), and the answer."""
        if not self._probes:
            calls: list[tuple[Any, Tensor]] = []

            def keep(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                given = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
                calls.append((given, first_output(out).detach().float()))

            handle = self.model.register_forward_hook(keep, with_kwargs=True)
            try:
                draw(self.pipeline, indices=range(min(PROBED, self.n)), **self.drawing)
            finally:
                handle.remove()
            count = min(PROBES, len(calls))
            self._probes = [calls[(2 * i + 1) * len(calls) // (2 * count)] for i in range(count)]
        return self._probes

    def _proxies(self, unit: Unit) -> dict[str, float | None]:
        """Relative errors of the unit's output, on its float inputs, and of the denoiser's answer."""
        own, whole, members = _Error(), _Error(), self._members(unit)

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            with holding(members, "face", "float"):
                plain = module.forward(*args, **kwargs)
            for ours, theirs in zip(_tensors(out), _tensors(plain), strict=True):
                own.add(theirs, ours)

        module = None if unit.name == ALL else self.model.get_submodule(unit.name)
        handle = None if module is None else module.register_forward_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad(), autocasting(self.pipeline, self.autocast):
                for (args, kwargs), answer in self.probes():
                    whole.add(answer, first_output(self.model(*args, **kwargs)))
        finally:
            if handle is not None:
                handle.remove()
        return {"output_error": own.relative(), "noise_error": whole.relative()}

    def _pictures(self) -> dict[str, Any]:
        """The change of the pictures; only one batch of them is held."""
        found: dict[str, list[float]] = {name: [] for name in ("psnr", *self.compare)}
        expected = self.reference()
        try:
            for part, plain in zip(expected.ranges(), expected.parts(), strict=True):
                drawn = draw(self.pipeline, indices=part, **self.drawing)
                texts = [self.prompts[i] for i in part] if self.prompts is not None else []
                found["psnr"] += psnr(drawn, plain).tolist()
                for name, compare in self.compare.items():
                    found[name] += compare(drawn, plain, texts).double().tolist()
        except NumericsError as error:
            return dict.fromkeys(found) | {"note": error.what}
        return {name: bootstrap_mean(values).to_json() for name, values in found.items()}


class _Error:
    """``||error|| / ||signal||`` over several tensors."""

    def __init__(self) -> None:
        self.signal = self.error = 0.0

    def add(self, signal: Tensor, other: Tensor) -> None:
        self.signal += float(signal.double().square().sum())
        self.error += float((signal.double() - other.double()).square().sum())

    def relative(self) -> float | None:
        """None where nothing was added, or it is not finite."""
        value = math.sqrt(self.error / self.signal) if self.signal > 0 else math.nan
        return value if math.isfinite(value) else None


def correlations(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float | int | None]:
    """Spearman's rho of each proxy with each metric over the rows of one width, and n; None below three rows, or where
    either does not vary."""
    found: dict[str, float | int | None] = {}
    for proxy in ("output_error", "noise_error"):
        for metric in metrics:
            both = [(row[proxy], row[metric]["value"]) for row in rows
                    if row[proxy] is not None and row.get(metric) is not None]  # fmt: skip
            varied = len(both) > 2 and all(len(set(side)) > 1 for side in zip(*both, strict=True))
            found[f"{proxy}~{metric}"] = round(float(spearmanr(both).statistic), 4) if varied else None
    return found | {"n": len(rows)}


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _name(bits: int, unit: Unit) -> str:
    members = hashlib.sha256("\n".join(unit.layers).encode()).hexdigest()[:8]
    return f"{unit.kind} {unit.name} W{bits} {members}"


def _note(row: Mapping[str, Any]) -> str:
    found = row["psnr"]
    return f"{row['layer']} W{row['weight_bits']}: " + ("not finite" if found is None else f"{found['value']:.1f} dB")
