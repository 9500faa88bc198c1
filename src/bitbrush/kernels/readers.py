"""Layers all over a network that read one tensor: what the first of them that is called makes for all.

Every ResnetBlock2D projects the same time embedding, and every cross-attention the same prompt. Each such product has
few rows, and takes less time than what stands around it: encode, launches, calls. What is made for all of them is kept
until every reader has taken its part, and served for the very tensor that it was made from, not written to since, in
the forward of the same timestep.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer


class Made(NamedTuple):
    """Parts that nobody has taken yet, by the place of their layer, and what they were made from.

    Attributes:
        moment: See `Readers.moment`; kept, so that no later one has its identity.
        also: Other tensors that it was made from, and their versions.
    """

    source: weakref.ref[Tensor]
    version: int
    moment: Any
    parts: dict[int, Tensor]
    also: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def serves(self, source: Tensor, also: tuple[Tensor, ...]) -> bool:
        """Whether it was made from these very tensors, not written to since."""
        known = ((self.source, self.version), *self.also)
        now = (source, *also)
        return len(known) == len(now) and all(
            held() is tensor and version == tensor._version for (held, version), tensor in zip(known, now, strict=True))


class Readers(ABC):
    """Layers that read one tensor.

    Attributes:
        joined: Of all of them as of one; None where they cannot be joined, or have not been yet.
        tried: Whether that was found out since the layers were last changed.
    """

    def __init__(self, layers: list[QuantLayer]) -> None:
        self.layers = layers
        self.places = {id(layer): place for place, layer in enumerate(layers)}
        self.joined: Any = None
        self.tried = False
        self.made: Made | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the copied layers, and what was made belongs to this one."""
        return type(self), (self.layers,)

    def forget(self) -> None:
        """Join again at the next call, as weights may lie elsewhere."""
        self.joined, self.tried, self.made = None, False, None

    @abstractmethod
    def moment(self) -> Any:
        """What is the same in calls of one timestep; None where layers have several at a time."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two moments are the same."""
        return bool(one == other)

    @abstractmethod
    def outputs(self, source: Tensor, seen: Callable[[], Any]) -> list[Tensor] | None:
        """Of every layer, or None where each has to be called."""

    def take(
        self, layers: list[Any], source: Tensor, seen: Callable[[], Any], also: tuple[Tensor, ...] = ()
    ) -> list[Tensor] | None:
        """Outputs of some of the layers, in the dtype of their input; None where each has to be called.

        Args:
            source: The tensor that all of them read, as it lies.
            seen: Gives what they make of it first.
            also: Other tensors that this takes.
        """
        if torch.compiler.is_compiling() or source.is_inference():
            return None
        places = [self.places.get(id(layer), -1) for layer in layers]
        if -1 in places:  # an adapter has taken its place
            return None
        if torch.is_grad_enabled() and source.requires_grad:
            return None
        moment = self.moment()
        if moment is None:
            return None
        made = self.made
        if made is None or not made.serves(source, also) or not self.same(made.moment, moment) or any(
            place not in made.parts for place in places
        ):
            made = self._make(source, moment, seen, also)
        if made is None:
            return None
        parts = [made.parts.pop(place, None) for place in places]
        if not made.parts and self.made is made:
            self.made = None
        taken = [part for part in parts if part is not None]  # a thread with the same tensor may have been first
        return taken if len(taken) == len(parts) else None

    def _make(
        self, source: Tensor, moment: Any, seen: Callable[[], Any], also: tuple[Tensor, ...]
    ) -> Made | None:
        found = self.outputs(source, seen)
        if found is None:
            return None
        others = tuple((weakref.ref(tensor), tensor._version) for tensor in also)
        self.made = Made(weakref.ref(source), source._version, moment, dict(enumerate(found)), others)
        return self.made
