"""Where a token of the prompt is looked at: maps of cross-attention, of a reference and a candidate on the same inputs.

A map is computed from what ``to_q`` and ``to_k`` of an attention answer, so it does not matter how they are quantized
or which kernel computes the attention. It is the mean over heads of the softmax at the token's columns, summed where
the token has several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.errors import InputError
from bitbrush.network.attention import attention_weights

SIDE = 32
"""Largest height and width of a map that is kept."""
PUNCTUATION = ".,;:!?\"'()[]"


def cross_attentions(model: nn.Module) -> dict[str, Any]:
    """Modules that attend to the text, by name: diffusers' ``Attention`` with ``to_q``, ``to_k`` and ``heads``."""
    return {
        name: module for name, module in model.named_modules()
        if getattr(module, "is_cross_attention", False) and all(hasattr(module, n) for n in ("to_q", "to_k", "heads"))
    }  # fmt: skip


def token_places(tokenizer: Any, prompts: Sequence[str], token: str) -> list[list[int]]:
    """Columns of a token in each prompt: of its first occurrence, one column for each piece; empty where the prompt
    does not have it."""
    wanted = list(tokenizer(token, add_special_tokens=False).input_ids)
    found = []
    for prompt in prompts:
        ids = list(tokenizer(prompt, truncation=True).input_ids)
        starts = (i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted)
        start = next(starts, None)
        found.append([] if start is None else list(range(start, start + len(wanted))))
    return found


def choose(pipeline: Any, prompts: Sequence[str], token: str | None) -> tuple[str, list[list[int]]]:
    """The token, and its columns in each prompt. By default the last word of the first prompt.

    Raises:
        InputError: A token was asked for that no prompt has.
    """
    last = prompts[0].split()[-1:]
    word = token if token is not None else "".join(last).strip(PUNCTUATION)
    places = token_places(pipeline.tokenizer, prompts, word)
    if token is not None and not any(places):
        raise InputError(
            "the token is in none of the prompts", where=f"token {token!r}",
            why=f"looked for in {len(prompts)} prompts, the first: {prompts[0]!r}",
            try_="name a word of a prompt, as it is written there",
        )  # fmt: skip
    return word, places


class AttentionMaps:
    """Compares the maps of two denoisers that are called in turn: ``reference``, then ``candidate``.

    Whoever calls them sets ``side`` and ``members`` (the numbers of the pictures in the call; of a call with more rows
    they are the last ones, the conditional half). Hooks are gone afterwards.

    Args:
        denoisers: ``reference`` and ``candidate``; they may be one.
        places: Columns of the token for each picture.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], places: Sequence[Sequence[int]]) -> None:
        self.places, self.side = places, "reference"
        self.members: Sequence[int] = ()
        self.shape = (1, 1)  # of x_t
        first = cross_attentions(denoisers["reference"])
        self.names = [name for name in first if name in cross_attentions(denoisers["candidate"])]
        self.modules = [(name, dict(model.named_modules())[name])
                        for model in dict.fromkeys(denoisers.values()) for name in self.names]  # fmt: skip
        self.shown = next((i for i, columns in enumerate(places) if columns), None)
        self._q: dict[int, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self.difference: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in self.names}
        self.maps: dict[str, Tensor] = {}
        self.counted = 0
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionMaps:
        for name, attention in self.modules:
            self._handles.append(attention.to_q.register_forward_hook(self._keep(attention)))
            self._handles.append(attention.to_k.register_forward_hook(self._look(name, attention)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._q.clear()

    def _keep(self, attention: Any) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            self._q[id(attention)] = out

        return hook

    def _look(self, name: str, attention: Any) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            q = self._q.pop(id(attention), None)
            if q is not None:
                self._note(name, attention, q, out)

        return hook

    @torch.no_grad()
    def _note(self, name: str, attention: Any, q: Tensor, k: Tensor) -> None:
        rows = [i for i, picture in enumerate(self.members) if self.places[picture]]
        if not rows:
            return
        weights = attention_weights(attention, q, k)[-len(self.members) :].mean(dim=1)  # [n, T, T']
        here = torch.stack([weights[i][:, list(self.places[self.members[i]])].sum(dim=1) for i in rows]).cpu()
        if self.side == "reference":
            self._before[name] = here
        else:
            self._compare(name, self._before.pop(name), here)
        if self.shown in [self.members[i] for i in rows]:
            self._add(here[[self.members[i] for i in rows].index(self.shown)])

    def _compare(self, name: str, before: Tensor, here: Tensor) -> None:
        sums = self.difference[name]
        sums[0] += float((here - before).abs().double().mean())
        sums[1] += float(before.double().mean())
        sums[2] += 1

    def _add(self, flat: Tensor) -> None:
        """One map into the average of this side, at the common size."""
        height = max(1, round(math.sqrt(len(flat) * self.shape[0] / self.shape[1])))
        if len(flat) % height:
            return
        picture = flat.reshape(1, 1, height, -1)
        size = [min(SIDE, side) for side in self.shape]
        large = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)[0, 0].double()
        self.maps[self.side] = self.maps.get(self.side, torch.zeros_like(large)) + large
        self.counted += self.side == "reference"

    def result(self, token: str, prompts: Sequence[str]) -> dict[str, Any] | None:
        """``token``, ``prompt`` (of the maps), ``pictures``, ``layers`` (mean absolute difference over positions,
        steps and pictures), ``levels`` (mean of the reference's map, to compare it with) and ``maps`` (mean over layers
        and steps of one picture: ``reference``, ``candidate``); None where nothing was attended to."""
        seen = {name: sums for name, sums in self.difference.items() if sums[2]}
        if not seen or self.shown is None:
            return None
        maps = {side: [[float(f"{v:.5g}") for v in row] for row in (total / self.counted).tolist()]
                for side, total in self.maps.items()}  # fmt: skip
        return {
            "token": token, "prompt": prompts[self.shown], "pictures": sum(bool(columns) for columns in self.places),
            "layers": {name: sums[0] / sums[2] for name, sums in seen.items()},
            "levels": {name: sums[1] / sums[2] for name, sums in seen.items()}, "maps": maps,
        }  # fmt: skip
