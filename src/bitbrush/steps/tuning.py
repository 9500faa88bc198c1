"""From a finetuning's settings to its learners, and from their results back into the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers.grid import Plan
from bitbrush.steps.channel_groups import ChannelGroupLearner, by_channel
from bitbrush.steps.codebook_learner import CodebookLearner, additive, additive_layers, apply_codebooks, check_sets
from bitbrush.steps.fit import apply_activations, apply_weights
from bitbrush.steps.learners import Learner, ScaleLearner, Together
from bitbrush.steps.norm_learner import NormLearner, apply_norms
from bitbrush.steps.time_groups import GroupLearner, groupable
from bitbrush.steps.time_networks import NetworkScaleLearner
from bitbrush.steps.tuning_learners import BiasLearner, WeightLearner, mean_scale

if TYPE_CHECKING:
    from bitbrush.steps.finetune import Finetune


def together(step: Finetune, run: Run, chosen: dict[str, QuantLayer], generator: torch.Generator) -> Together:
    """Everything that a step trains, as one learner; learning rates are absolute (the budget's is 1).

    Raises:
        InputError: Nothing at all.
    """
    parts = [*_weights(step, run, chosen, generator), *_biases(step, chosen), *_scales(step, run, chosen, generator)]
    modules = step.norm_layers(run)
    if modules:
        parts.append(NormLearner(modules, step.lr_norms))
    if not parts:
        raise InputError("there is nothing to train", where=f"step {step.label}",
                         why=f"{len(chosen)} layers, but no quantized weight, bias or static scale of theirs",
                         try_=f"--set {step.label}.iterations=0 leaves the step out")
    return Together(*parts)


def moving_weights(step: Finetune, chosen: dict[str, QuantLayer]) -> dict[str, QuantLayer]:
    """The layers whose weight a learner changes."""
    on_books = additive_layers(chosen)
    found: dict[str, QuantLayer] = {}
    if step.weights != "none" or step.weight_scale:
        found |= {name: layer for name, layer in chosen.items() if name not in on_books}
    return found | (on_books if step.codebooks or step.weight_scale else {})


def check_weights(step: Finetune, plan: Plan, chosen: Iterable[str]) -> None:
    """Whether the weights of the chosen layers can be trained as the settings say.

    Raises:
        InputError: No layer is of the kind that they are for, or a set of codebooks is trained by half.
    """
    names = [name for name in chosen if plan.layers[name].weight is not None]
    on_books = [name for name in names if additive(plan.layers[name])]
    if step.codebooks:
        if not on_books:
            raise InputError("there are no codebooks to train", where=f"step {step.label}: codebooks",
                             why=f"none of the {len(names)} layers that it selects is on additive codebooks",
                             try_=f"--set {step.label}.codebooks=false")
        check_sets(plan, on_books, step.label)
    if step.weights != "none" and names and len(on_books) == len(names):
        raise InputError(
            f"weights = {step.weights!r} cannot train additive codebooks", where=f"step {step.label}: weights",
            why=f"all {len(names)} layers that it selects are on them, and their codes have no neighbours to move to",
            try_='weights = "none" with codebooks = true',
        )


def _weights(
    step: Finetune, run: Run, chosen: dict[str, QuantLayer], generator: torch.Generator
) -> list[Learner]:
    """Of weights, adapters, weight scales and codebooks."""
    parts: list[Learner] = []
    on_books = additive_layers(chosen)
    weighted = {n: layer for n, layer in chosen.items() if layer.spec.weight is not None and n not in on_books}
    if weighted and (step.weights != "none" or step.weight_scale):
        parts.append(WeightLearner(weighted, step, generator))
    if on_books and (step.codebooks or step.weight_scale):
        parts.append(CodebookLearner(on_books, step))
    if on_books and step.weights != "none":
        run.progress.say(f"{step.label}: weights = {step.weights!r} leaves out the {len(on_books)} layers on additive "
                         "codebooks")
    return parts


def _biases(step: Finetune, chosen: dict[str, QuantLayer]) -> list[Learner]:
    biased = {n: layer for n, layer in chosen.items() if layer.bias is not None} if step.bias else {}
    if not biased:
        return []
    aware = step.scale_aware == "rate"
    rates = {
        n: step.lr_weights * (mean_scale(layer) if aware and layer.spec.weight is not None else 1.0)
        for n, layer in biased.items()
    }
    return [BiasLearner(biased, rates)]


def _scales(
    step: Finetune, run: Run, chosen: dict[str, QuantLayer], generator: torch.Generator
) -> list[Learner]:
    """Of activations."""
    parts: list[Learner] = []
    quantizers = step.quantizers(run, chosen)
    timed = {n: q for n, q in quantizers.items() if _formed(step, n, q)}
    if timed:
        quantizers = {n: q for n, q in quantizers.items() if n not in timed}
        parts.append(_form(step, timed, generator))
    if quantizers:
        parts.append(ScaleLearner(quantizers, zero_points=step.zero_points, rate=step.lr_scales,
                                  zero_rate=step.lr_zero_points))
    return parts


def _form(step: Finetune, timed: dict[str, ActivationQuantizer], generator: torch.Generator) -> Learner:
    """What trains the quantizers that `scale_form` is for."""
    if step.scale_form == "network":
        return NetworkScaleLearner(timed, generator, warm_start=step.warm_start, rate=step.lr_scales)
    if step.scale_form == "channel_groups":
        return ChannelGroupLearner(timed, step.groups, entropy=step.entropy, group_rate=step.lr_groups,
                                   straight_through=step.straight_through)
    return GroupLearner(timed, step.groups, step.cluster, entropy=step.entropy, rate=step.lr_scales,
                        group_rate=step.lr_groups, straight_through=step.straight_through)


def _formed(step: Finetune, name: str, quantizer: ActivationQuantizer) -> bool:
    """Whether `scale_form` is for this quantizer; the others are trained as tables."""
    if step.scale_form == "network":
        return quantizer.spec.timed and not quantizer.spec.time_groups
    if step.scale_form == "channel_groups":
        return by_channel(quantizer.spec)
    return step.scale_form == "groups" and groupable(name, quantizer)


def apply_tuned(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store codes and weight scales, codebooks, biases, activation scales and zero-points, normalisation layers."""
    apply_weights(run, tensors)
    apply_codebooks(run, tensors)
    apply_activations(run, tensors)
    apply_norms(run, tensors)
    layers = run.layers()
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "bias":
            layers[name].set_bias(tensor)
