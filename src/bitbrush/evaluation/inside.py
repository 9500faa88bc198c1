"""What happens inside a quantized pipeline: ranges, kurtosis, errors step by step, and where a token is looked at.

The candidate is compared with the reference in two ways. On the *reference's* trajectory both denoisers are given the
very same inputs at every step: what differs is the error that quantization makes there, and the attention maps. On the
*candidate's own* trajectory, from the same noise, errors add up: that is x_t, and there the layers' inputs are looked
at. Layers are found by name, so it does not matter who quantized them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitbrush.errors import InputError
from bitbrush.evaluation import attention_maps
from bitbrush.evaluation.activation_ranges import ActivationRanges
from bitbrush.evaluation.attention_maps import AttentionMaps
from bitbrush.evaluation.layers import library_of, quantizable
from bitbrush.evaluation.sampling import Progress, denoiser, draw, given
from bitbrush.network.pipelines import first_output, takes_prompt

BATCH = 8


@dataclass
class Inside:
    """What was seen inside a candidate.

    Attributes:
        timesteps: Of the denoiser's calls [steps]; a scheduler that calls twice a step has two.
        activations: layer -> ``low``, ``high``, ``p01``, ``p1``, ``p99``, ``p999``, each [steps]: what the candidate's
            layer is given on the candidate's own trajectory (0.1, 1, 99 and 99.9 %).
        kurtosis: layer -> fourth standardised moment of the reference's weight; about 3 for Gaussian weights.
        noise_sqnr: Signal to error in dB of the denoiser's answer on the reference's x_t [steps]; None where both are
            equal. Signal and error are summed over pictures and, under guidance, both halves.
        latent_sqnr: The same of x_t, each along its own trajectory [steps]; the first is the noise they share: None.
        attention: See `attention_maps.AttentionMaps.result`; None without text or maps.
        settings: n, seed, steps, guidance.
        notes: In sentences.
    """

    timesteps: list[float]
    activations: dict[str, dict[str, list[float | None]]]
    kurtosis: dict[str, float]
    noise_sqnr: list[float | None]
    latent_sqnr: list[float | None]
    attention: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; None stands for infinity."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inside:
        """The inverse of ``to_json``."""
        return cls(**data)


def look(
    pipeline: Any,
    reference: Any,
    *,
    prompts: Sequence[str] | None,
    n: int,
    seed: int,
    steps: int,
    guidance: float,
    autocast: torch.dtype | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    batch: int = BATCH,
) -> Inside:
    """Draws ``n`` pictures with both pipelines and watches.

    Args:
        pipeline: The candidate, quantized by anyone.
        reference: Full precision; the same network and scheduler. Hooks are on both only while this runs.
        prompts: At least ``n``; None for unconditional pipelines.
        n, seed, steps, guidance, autocast: As for ``sampling.draw``.
        token: Whose attention maps are compared: a word of a prompt, as written there. None: the last word of the first
            prompt.
        progress: Told of every picture, twice.
        batch: Pictures a call; it bounds the memory.

    Raises:
        InputError: The two do not belong together, or the token is in no prompt.
    """
    networks = {"reference": denoiser(reference), "candidate": denoiser(pipeline)}
    used = list(prompts[:n]) if prompts is not None else None
    text = used is not None and takes_prompt(reference) and getattr(reference, "tokenizer", None) is not None
    word, places = attention_maps.choose(reference, used or [""], token) if text else ("", [])
    names = quantizable(networks["reference"])
    inside = dict(networks["candidate"].named_modules())
    layers = {name: inside[name] for name in names if name in inside}
    rows = n * (2 if text and guidance > 1 else 1)
    ranges = ActivationRanges(layers, steps, rows, seed)
    maps, steps_seen = AttentionMaps(networks, places), _Steps()
    call = partial(draw, prompts=used, seed=seed, steps=steps, guidance=guidance, batch=batch, autocast=autocast,
                   progress=progress)  # fmt: skip
    if progress is not None:
        progress.start("inside", 2 * n)
    try:
        for first in range(0, n, batch):
            members = range(first, min(first + batch, n))
            with _side_by_side(networks, members, steps_seen, maps):
                call(reference, indices=members)
            with _alone(networks["candidate"], members, steps_seen, ranges):
                call(pipeline, indices=members)
            steps_seen.next_batch()
    finally:
        if progress is not None:
            progress.finish()
    lost = [name for name in names if name not in inside]
    return Inside(
        timesteps=steps_seen.times, activations=ranges.result(len(steps_seen.times)), kurtosis=kurtoses(names),
        noise_sqnr=steps_seen.sqnr("noise"), latent_sqnr=steps_seen.sqnr("latent"),
        attention=maps.result(word, used or []),
        settings={"n": n, "seed": seed, "steps": steps, "guidance": guidance if text else None},
        notes=_notes(lost, text, maps, token),
    )  # fmt: skip


def kurtoses(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Kurtosis of the float weight of each layer; quantized ones are left out."""
    found = {}
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if library_of(layer) == "none" and isinstance(weight, Tensor) and weight.is_floating_point():
            found[name] = kurtosis(weight)
    return found


def kurtosis(weight: Tensor) -> float:
    """Fourth standardised moment of all numbers of a tensor, without the "- 3"; 0 where they are all equal."""
    values = weight.detach().double().flatten()
    centred = values - values.mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square()) if float(variance) > 0 else 0.0


# ---- inside ----------------------------------------------------------------------------------------------------------
class _Steps:
    """Signal and error of every step, summed over batches; the reference's x_t of the batch at hand."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sums: dict[str, list[list[float]]] = {"noise": [], "latent": []}
        self.latents: list[Tensor] = []
        self.seen = 0

    def add(self, what: str, step: int, signal: Tensor, other: Tensor) -> None:
        """One more batch at a step."""
        sums = self.sums[what]
        if step == len(sums):
            sums.append([0.0, 0.0])
        sums[step][0] += float(signal.double().square().sum())
        sums[step][1] += float((signal.double() - other.double()).square().sum())

    def time(self, step: int, time: float, whose: str) -> None:
        """Check that a call is at the timestep that this step has."""
        if step == len(self.times) and whose == "reference":
            self.times.append(time)
        elif step >= len(self.times) or self.times[step] != time:
            raise InputError(
                "the two pipelines do not take the same steps", where=f"call {step + 1} of the {whose}'s denoiser",
                why=f"it is at timestep {time:g}; the reference's steps are {[round(t, 2) for t in self.times]}",
                try_="give both the same scheduler",
            )  # fmt: skip

    def next_batch(self) -> None:
        """Forget the latents, having compared them all."""
        if self.seen != len(self.latents):
            raise InputError("the two pipelines do not take the same steps", where="evaluation.inside",
                             why=f"{len(self.latents)} denoiser calls of the reference, {self.seen} of the candidate",
                             try_="give both the same scheduler")  # fmt: skip
        self.latents, self.seen = [], 0

    def sqnr(self, what: str) -> list[float | None]:
        """dB at each step; None where there is no error."""
        tiny = 1e-300
        return [None if error == 0 else 10 * math.log10(max(signal, tiny) / error) for signal, error in self.sums[what]]


@contextmanager
def _side_by_side(
    networks: Mapping[str, nn.Module], members: Sequence[int], steps: _Steps, maps: AttentionMaps
) -> Iterator[None]:
    """Inside the block every call of the reference's denoiser is made of the candidate's, too."""
    reference, candidate = networks["reference"], networks["candidate"]
    busy = False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not busy:
            maps.side, maps.members = "reference", members
            maps.shape = tuple(given(args, kwargs)[1].shape[-2:])  # type: ignore[assignment]

    @torch.no_grad()
    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal busy
        if busy:
            return
        time, sample = given(args, kwargs)
        step = len(steps.latents)
        steps.time(step, time, "reference")
        steps.latents.append(sample[-len(members) :].detach().float().cpu())
        busy, maps.side = True, "candidate"
        try:
            moved, named = _for(candidate, reference, (args, kwargs))
            other = first_output(candidate(*moved, **named))
        finally:
            busy, maps.side = False, "reference"
        answer = first_output(out).detach().float()
        steps.add("noise", step, answer, other.detach().float().to(answer.device))

    with ExitStack() as stack:
        stack.enter_context(maps)
        stack.callback(reference.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(reference.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def _alone(model: nn.Module, members: Sequence[int], steps: _Steps, ranges: ActivationRanges) -> Iterator[None]:
    """Inside the block x_t of the candidate is compared with the reference's, and its layers' inputs are watched."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time, sample = given(args, kwargs)
        ranges.step = steps.seen
        steps.time(steps.seen, time, "candidate")
        latent = sample[-len(members) :].detach().float().cpu()
        steps.add("latent", steps.seen, steps.latents[steps.seen], latent)
        steps.seen += 1

    with ExitStack() as stack:
        stack.enter_context(ranges)
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def _for(candidate: nn.Module, reference: nn.Module, given_: Any) -> Any:
    """A call's arguments on the candidate's device, and in its type where that is another."""
    device = next((p.device for p in candidate.parameters()), None)
    ours, theirs = getattr(candidate, "dtype", None), getattr(reference, "dtype", None)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        change = ours is not None and ours != theirs and ours.is_floating_point and leaf.dtype == theirs
        return leaf.to(device=device, dtype=ours if change else None)

    return pytree.tree_map(move, given_)


def _notes(lost: list[str], text: bool, maps: AttentionMaps, token: str | None) -> list[str]:
    found = []
    if lost:
        found.append(f"{len(lost)} layers of the reference are not in the candidate by their names, first: {lost[0]}.")
    if text and not maps.names:
        found.append("No cross-attention with to_q and to_k was found in both: no attention maps.")
    elif text and maps.shown is None and token is None:
        found.append("The last word of the first prompt is no token of its own: no attention maps.")
    return found
