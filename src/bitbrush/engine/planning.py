"""From a survey and a recipe's layer rules to a plan, with a reason for every layer that stays float."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitbrush.engine.codebook_sets import form_sets
from bitbrush.engine.recipe import FLOAT_BITS, ActivationRule, LayerRule, Recipe, WeightRule
from bitbrush.errors import InputError
from bitbrush.network import codebooks
from bitbrush.network.attention import OPERANDS
from bitbrush.network.log2 import check_log2
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec

GROUP = 64
"""Channels in a group of a token's channels where the recipe does not say: SVDQuant's, and those of int4 kernels."""


@dataclass(frozen=True)
class Planned:
    """A plan, and the layers it leaves in full precision with the reason."""

    plan: Plan
    kept_float: dict[str, str]


def make_plan(survey: Survey, recipe: Recipe) -> Planned:
    """Match every site with the recipe's rules, and let every step check its settings against the outcome.

    Raises:
        InputError: A pattern that matches nothing and is not optional, or a combination that cannot be run.
    """
    names = site_names(survey)
    for pattern, rule in recipe.layers.items():
        if not rule.optional:
            check_pattern(pattern, names, f"recipe {recipe.name}: layers", "; or mark the rule `optional = true`")
    layers: dict[str, LayerSpec] = {}
    kept: dict[str, str] = {}
    for site in survey.sites:
        targets = [f"{site.name}:{o}" for o in OPERANDS] if site.kind == "attention" else [site.name]
        for name in targets:
            spec, why = _spec(name, site, recipe)
            if spec.quantized:
                layers[name] = spec
            elif site.kind != "attention":
                kept[name] = why
    layers |= form_sets(survey, layers, {s.name: r for s in survey.layers() if (r := _weight_rule(s.name, recipe))})
    plan = Plan(layers=layers)
    for step in recipe.steps:
        step.check(survey, plan)
    return Planned(plan, kept)


def site_names(survey: Survey) -> list[str]:
    """What patterns are matched against: layers, then attention operands (``<attention>:q``)."""
    return [s.name for s in survey.layers()] + [f"{s.name}:{o}" for s in survey.attentions() for o in OPERANDS]


def matches(pattern: str, name: str) -> bool:
    """Whether a recipe pattern ("a.* | b") matches; only patterns with ':' match attention operands."""
    parts = [part.strip() for part in pattern.split("|")]
    return any((":" in part) == (":" in name) and fnmatchcase(name, part) for part in parts)


def check_pattern(pattern: str, names: Iterable[str], where: str, or_else: str = "") -> None:
    """Make sure that every part of a pattern ("a.* | b") matches something.

    Args:
        pattern: As in a recipe.
        names: Of the model's sites.
        where: Whose pattern it is.
        or_else: What else to try, after the advice to look at the names.

    Raises:
        InputError: A part that matches nothing; it names the nearest layer.
    """
    names = list(names)
    for part in pattern.split("|"):
        if not any(matches(part, name) for name in names):
            raise InputError(
                f"pattern {part.strip()!r} matches no layer of this model", where=where,
                why=_nearest(part.strip(), names), try_=f"bitbrush inspect MODEL lists the layers{or_else}",
            )


def _nearest(pattern: str, names: list[str]) -> str:
    operand = pattern.rpartition(":")[2]
    if ":" in pattern and not any(fnmatchcase(known, operand) for known in OPERANDS):
        return f"attention operands are {', '.join(f':{known}' for known in OPERANDS)}"
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
    return f"nearest layer: {close[0]}" if close else f"the model has {len(names)} sites"


def _spec(name: str, site: Site, recipe: Recipe) -> tuple[LayerSpec, str]:
    weight: WeightRule | str | None = None
    activation: ActivationRule | str | None = None
    why = "no rule of the recipe names it"
    for pattern, rule in recipe.layers.items():
        if matches(pattern, name):
            weight = rule.weight if rule.weight is not None else weight
            activation = rule.activation if rule.activation is not None else activation
            why = _reason(pattern, rule)
    if site.kind == "attention":
        weight = None
    chosen = _activation(activation, recipe, wide=site.kind == "conv" and site.shape[2:] != (1, 1))
    exempt = activation.exempt if isinstance(activation, ActivationRule) and chosen is not None else ()
    spec = LayerSpec(weight=_weight(name, weight, recipe), activation=chosen, exempt=exempt)
    check_log2(name, spec)
    if site.kind != "attention":
        codebooks.check(name, spec, site.shape[1])
    _check_channel(name, site, spec.activation)
    _check_group(name, site, activation)
    token = spec.activation is not None and spec.activation.granularity == "token"
    if token and site.kind == "conv" and site.shape[2:] != (1, 1):
        raise InputError(
            "scales per token cannot be used for this layer", where=name,
            why="a convolution wider than 1x1 mixes neighbouring positions in one product",
            try_="give it granularity = \"tensor\" in the recipe",
        )
    return spec, why


def _check_channel(name: str, site: Site, activation: ActivationSpec | None) -> None:
    """Scales a channel are fitted from samples, for a layer's input or output."""
    if activation is None or activation.granularity != "channel":
        return
    reasons = {
        "scales found at run time are one a tensor or one a token": activation.mode != "static",
        "attention operands have one scale a tensor": site.kind == "attention",
    }
    for why, holds in reasons.items():
        if holds:
            raise InputError("scales per channel cannot be used here", where=name, why=why,
                             try_='give it mode = "static", or granularity = "tensor"')


def _check_group(name: str, site: Site, rule: ActivationRule | str | None) -> None:
    """Groups of a token's channels are of a layer's input, found at run time; a size without groups says nothing."""
    if not isinstance(rule, ActivationRule) or (rule.granularity != "token_group" and rule.group is None):
        return
    reasons = {
        'a group has a size only with granularity = "token_group"': rule.granularity != "token_group",
        "scales a token are found at run time": rule.mode != "dynamic",
        "operands of attention have one scale a tensor": site.kind == "attention",
        "they are of a layer's input": rule.position == "output",
    }
    for why, holds in reasons.items():
        if holds:
            raise InputError("groups of a token's channels cannot be used here", where=name, why=why,
                             try_='{ activation = { mode = "dynamic", granularity = "token_group", group = 64 } }')


def _weight_rule(name: str, recipe: Recipe) -> WeightRule | None:
    """The last rule that says something of a layer's weight, where it does not leave it float."""
    said = [r.weight for pattern, r in recipe.layers.items() if r.weight is not None and matches(pattern, name)]
    return said[-1] if said and isinstance(said[-1], WeightRule) else None


def _reason(pattern: str, rule: LayerRule) -> str:
    return rule.why or f"rule {pattern!r} says so"


def _weight(name: str, rule: WeightRule | str | None, recipe: Recipe) -> WeightSpec | None:
    if not isinstance(rule, WeightRule):
        return None
    bits = rule.bits or recipe.weights
    if recipe.weights == FLOAT_BITS:  # also where a rule names bits of its own
        return None
    if rule.grid == "codebook":
        grid = Grid(kind="codebook", bits=rule.bits or 8, signed=rule.signed)
        return WeightSpec(grid=grid, granularity=rule.granularity, binary=rule.binary, group=rule.group,
                          codebooks=_codebooks(name, rule, recipe), shared=rule.shared)
    signed = rule.signed or bits == 8  # 8-bit weights are symmetric: code - zero_point must fit int8
    return WeightSpec(grid=Grid(bits=bits, signed=signed), granularity=rule.granularity, binary=rule.binary,
                      codebooks=rule.codebooks or 0, group=rule.group, shared=rule.shared)


def _codebooks(name: str, rule: WeightRule, recipe: Recipe) -> int:
    """The number of codebooks a rule names, or the one that makes the run's bits a weight."""
    if rule.codebooks is not None:
        return rule.codebooks
    bits = rule.bits or 8
    count, rest = divmod(recipe.weights * rule.group, bits)
    if rest or not 1 <= count <= 16:
        raise InputError(
            f"no number of codebooks makes {recipe.weights} bits a weight", where=name,
            why=f"K codebooks of {bits} bits on groups of {rule.group} make K * {bits} / {rule.group}",
            try_="name the number in the recipe: codebooks = 3",
        )
    return count


def _activation(rule: ActivationRule | str | None, recipe: Recipe, wide: bool) -> ActivationSpec | None:
    if not isinstance(rule, ActivationRule):
        return None
    bits = rule.bits or recipe.activations
    if recipe.activations == FLOAT_BITS:
        return None
    return ActivationSpec(
        grid=Grid(kind=rule.grid, bits=bits, signed=rule.signed), mode=rule.mode, granularity=rule.granularity,
        position=rule.position, timed=rule.timed, lookup=rule.lookup, scope=rule.scope,
        group=(rule.group or GROUP) if rule.granularity == "token_group" else 0, unfolded=rule.unfolded and wide,
    )
