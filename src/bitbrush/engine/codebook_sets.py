"""Which layers share a set of additive codebooks, where a rule leaves that to the data: `WeightRule.share`.

A set of K codebooks of 2**B vectors costs ``K * 2**B * g * 16`` bits, whatever it serves: 0.04 bits a weight of a large
convolution, several bits a weight of a small projection. A rule says how many bits a weight all sets of its layers
together may add (``table_bits``). Every layer begins with a set of its own. Then, until the sets fit, the two that
serve the fewest weights together become one: only within a subset of the network (which is fitted at once), layers of
one shape rather than of one kind, of one kind rather than any. A subset keeps at least one set: what `bitbrush inspect`
then shows may be more than was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

from bitbrush.engine.recipe import WeightRule
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers.codebook import bits_of
from bitbrush.numbers.grid import LayerSpec, Plan

_POSITION = 60e-6  # seconds of a GPU for one place of a beam search, replayed: some twenty small kernels
_MOVE = 1e-4  # and for a layer's part in one iteration of Adam

_Class = tuple[tuple[int, int, int], str, float]


def subset_of(name: str) -> str:
    """The part of the network that a layer is fitted with: ``down_blocks.0``, ``mid_block``, ``transformer_blocks.7``.

    VQDM's subsets are the entries of a UNet's ``down_blocks`` and ``up_blocks``, and the middle; in general a module of
    the network, or the entry where that is a list.
    """
    parts = name.split(".")
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


@dataclass(frozen=True)
class _Set:
    """Layers that share codebooks: places in the order of execution, what they are, and how many weights."""

    members: tuple[int, ...]
    kinds: frozenset[str]
    shapes: frozenset[tuple[int, ...]]
    weights: int

    @classmethod
    def of(cls, site: Site) -> _Set:
        return cls((site.order,), frozenset((site.kind,)), frozenset((site.shape,)), prod(site.shape))

    def joined(self, other: _Set) -> _Set:
        return _Set(tuple(sorted(self.members + other.members)), self.kinds | other.kinds, self.shapes | other.shapes,
                    self.weights + other.weights)

    def price(self, other: _Set, share: str) -> float | None:
        """What joining costs: the weights that would share, unlike ones counted more; None: it may not be."""
        together = self.weights + other.weights
        if len(self.shapes | other.shapes) == 1:
            return together
        if share == "shape":
            return None
        return together * (2 if len(self.kinds | other.kinds) == 1 else 4)


def form_sets(survey: Survey, layers: Mapping[str, LayerSpec], rules: Mapping[str, WeightRule]) -> dict[str, LayerSpec]:
    """The specs of the layers that are to share, with the names of their sets.

    Args:
        survey: Shapes and order of execution.
        layers: Specs of the plan.
        rules: The rule of each layer's weight, of all that have one.
    """
    classes: dict[_Class, list[Site]] = {}
    for site in survey.layers():
        weight, rule = layers[site.name].weight if site.name in layers else None, rules.get(site.name)
        if weight is not None and weight.additive and rule is not None and rule.share != "layer":
            classes.setdefault((weight.table_shape, rule.share, rule.table_bits), []).append(site)
    taken = {spec.weight.shared for spec in layers.values() if spec.weight is not None}
    names = {site.order: site.name for site in survey.layers()}
    found: dict[str, LayerSpec] = {}
    for (shape, share, limit), sites in classes.items():
        for subset, sets in _joined(sites, shape, share, limit).items():
            for one in (s for s in sets if len(s.members) > 1):
                name = _free(subset.replace(".", "_"), taken)
                for member in one.members:
                    spec = layers[names[member]]
                    found[names[member]] = spec.model_copy(update={
                        "weight": spec.weight.model_copy(update={"shared": name}) if spec.weight is not None else None
                    })
    return found


def _free(stem: str, taken: set[str]) -> str:
    """A name for a set that no other has; from now on it is taken."""
    number = next(i for i in range(len(taken) + 1) if f"{stem}-{i}" not in taken)
    taken.add(f"{stem}-{number}")
    return f"{stem}-{number}"


def _joined(sites: list[Site], shape: tuple[int, int, int], share: str, limit: float) -> dict[str, list[_Set]]:
    """Sets by subset, in the order of execution: as few as the limit asks for, where that is possible."""
    sets: dict[str, list[_Set]] = {}
    for site in sites:
        sets.setdefault(subset_of(site.name), []).append(_Set.of(site))
    words, group = shape[1], shape[2]
    one = bits_of([(1, group)], shape[0], words.bit_length() - 1, group).codebooks
    allowed = int(limit * sum(prod(site.shape) for site in sites) / one)
    best = {subset: _cheapest(found, share) for subset, found in sets.items()}
    while sum(len(found) for found in sets.values()) > allowed:
        open_ = {subset: pair for subset, pair in best.items() if pair is not None}
        if not open_:
            break
        subset = min(open_, key=lambda name: open_[name][0])
        _, a, b = open_[subset]
        rest = [s for s in sets[subset] if s is not a and s is not b]
        sets[subset] = sorted([*rest, a.joined(b)], key=lambda s: s.members)
        best[subset] = _cheapest(sets[subset], share)
    return sets


def _cheapest(sets: list[_Set], share: str) -> tuple[float, _Set, _Set] | None:
    pairs = ((price, a, b) for a, b in combinations(sets, 2) if (price := a.price(b, share)) is not None)
    return min(pairs, key=lambda pair: pair[0], default=None)


def searched(survey: Survey, plan: Plan, step: Mapping[str, Any]) -> dict[str, float]:
    """What fitting all codebooks costs: multiply-accumulates, seconds of GPU launches, and passes over trajectories.

    Args:
        survey: Shapes.
        plan: Which layers.
        step: The settings of `bitbrush.steps.codebooks.FitCodebooks`.
    """
    macs = launches = 0.0
    subsets = set()
    for site in survey.layers():
        weight = plan.layers[site.name].weight if site.name in plan.layers else None
        if weight is None or not weight.additive:
            continue
        subsets.add(subset_of(site.name))
        rows, columns = site.shape[0], prod(site.shape[1:])
        places, words = columns // weight.group * weight.codebooks, weight.grid.levels
        points = min(step["points"] * words, rows * columns // weight.group)
        each = rows * columns**2 * (step["steps"] + step["beam"]) + places * rows * step["beam"] * words * weight.group
        macs += step["epochs"] * each + max(step["tokens"], step["tokens_per_feature"] * columns) * columns**2
        macs += weight.codebooks * step["kmeans_iterations"] * points * words * weight.group
        launches += step["epochs"] * (places * _POSITION + step["steps"] * _MOVE)
    passes = 0 if step["inputs"] == "none" else len(subsets)
    return {"macs": macs, "launches": launches, "passes": passes}
