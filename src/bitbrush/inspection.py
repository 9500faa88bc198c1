"""What `bitbrush.inspect` answers: layers, shares, bits, what stays float and why, size and time estimates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitbrush.engine.estimate import (
    codebook_storage,
    codebook_totals,
    estimate,
    foreseen,
    model_bytes,
    stored_bits,
    weight_bits,
)
from bitbrush.engine.planning import Planned
from bitbrush.engine.recipe import Recipe
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import LayerSpec


@dataclass
class Inspection:
    """A denoiser under a recipe, before anything slow happens.

    Attributes:
        rows: One dict a layer, in execution order: name, kind, shape, parameters, macs, share_of_weights,
            share_of_compute (0 to 1), weight_bits (the mean where rows differ), activation_bits (16 = float),
            stored_bits (a parameter, with scales, bias and codebooks; a shared set by the layer's part), segments,
            block, note.
        kept_float: Layers that stay float: name, parameters, share, why.
        totals: parameters, float_bytes (bf16), packed_bytes, average_bits (everything kept counts), macs, layers; where
            there are additive codebooks codebook_bits, theirs a weight with codebooks (sets once) and scales,
            codebook_sets, and the bytes of codes, codebooks and scales.
        estimates: device, seconds, peak_bytes, tape_bytes, forwards, macs_per_second, advice; see `engine.estimate`.
    """

    source: str
    network: str
    recipe: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    kept_float: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    estimates: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dict(vars(self))

    def __str__(self) -> str:
        """A plain table with totals."""
        head = f"{self.network} of {self.source}, recipe {self.recipe}"
        lines = [head, f"{'layer':<64}{'shape':>18}{'weights':>9}{'compute':>9}  bits"]
        for row in self.rows:
            shape = "x".join(str(n) for n in row["shape"])
            bits = f"W{row['weight_bits']}A{row['activation_bits']}"
            lines.append(
                f"{row['name']:<64}{shape:>18}{row['share_of_weights']:>9.2%}{row['share_of_compute']:>9.2%}  {bits}"
                + (f"  {row['note']}" if row["note"] else "")
            )
        t = self.totals
        lines.append(
            f"{t['layers']} layers, {t['parameters']:,} parameters, {t['macs'] / 1e9:.2f} GMAC a sample; bf16 "
            f"{t['float_bytes'] / 1e6:.2f} MB -> packed {t['packed_bytes'] / 1e6:.2f} MB, {t['average_bits']:.2f} bits "
            "on average"
        )
        for item in self.kept_float:
            lines.append(f"stays float: {item['name']} ({item['share']:.2%} of the weights): {item['why']}")
        return "\n".join(lines)


def build(
    source: str, network: str, survey: Survey, planned: Planned, recipe: Recipe, guided: bool, device: str
) -> Inspection:
    """Put an inspection together from a survey and a plan."""
    sites = survey.layers()
    all_weights = sum(s.parameters for s in sites) + sum(survey.other.values())
    all_macs = sum(s.macs for s in sites) or 1
    later = foreseen(survey, planned.plan, recipe)
    additive = codebook_storage({site.name: site.shape for site in sites}, planned.plan)
    rows = []
    for site in sites:
        spec = planned.plan.layers.get(site.name)
        activation = spec.activation if spec else None
        seen = later.layers.get(site.name)
        segments = seen.segments if seen else ()
        rows.append(
            {
                "name": site.name,
                "kind": site.kind,
                "shape": list(site.shape),
                "parameters": site.parameters,
                "macs": site.macs,
                "share_of_weights": site.parameters / all_weights,
                "share_of_compute": site.macs / all_macs,
                "weight_bits": weight_bits(spec),
                "activation_bits": activation.grid.bits if activation else 16,
                "stored_bits": stored_bits(site, later.layers.get(site.name), additive, len(later.timesteps) or 1),
                "segments": list(segments),
                "block": site.block,
                "note": _note(seen, segments) or planned.kept_float.get(site.name, ""),
            }
        )
    kept = [
        {
            "name": s.name,
            "parameters": s.parameters,
            "share": s.parameters / all_weights,
            "why": planned.kept_float[s.name],
        }
        for s in sites
        if s.name in planned.kept_float
    ]
    norms = sum(survey.other.values())
    if norms:
        kept.append(
            {
                "name": f"{len(survey.other)} normalisation and embedding modules",
                "parameters": norms,
                "share": norms / all_weights,
                "why": "only Conv2d and Linear weights are quantized",
            }
        )
    sizes = model_bytes(survey, later)
    totals = {
        "parameters": sizes["parameters"],
        "float_bytes": sizes["bf16_bytes"],
        "packed_bytes": sizes["packed_bytes"],
        "average_bits": round(8 * sizes["packed_bytes"] / sizes["parameters"], 3),
        "macs": all_macs,
        "layers": len(sites),
        **codebook_totals(additive),
    }
    return Inspection(
        source, network, recipe.name, rows, kept, totals, estimate(survey, planned.plan, recipe, guided, device)
    )


def _note(spec: LayerSpec | None, segments: tuple[int, ...]) -> str:
    """How the weight is stored, where that is not one piece of plain rows."""
    parts = [_cut(segments)] if segments else []
    weight = spec.weight if spec is not None else None
    if weight is not None and weight.additive:
        owner = f", set {weight.shared}" if weight.shared else ""
        parts.append(f"{weight.codebooks} codebooks of {weight.grid.levels} x {weight.group}{owner}")
    if spec is not None and spec.low_rank:
        parts.append(f"branch of rank {spec.low_rank}")
    return "; ".join(parts)


def _cut(segments: tuple[int, ...]) -> str:
    """The segments of a layer in words: one by one where they are few."""
    if len(segments) < 4:
        return f"split {' + '.join(map(str, segments))}"
    return f"{len(segments)} groups of up to {max(segments)}"
