"""Layers all over a network that read one tensor, on the CPU: one product, made by the first of them that is called.

Every ResnetBlock2D projects the same time embedding, and every cross-attention the same prompt. Each such product has
few rows, and waits longer for what stands around it than for its sums: encode, unpack, a dozen calls. Where calibration
has given the layers one table of the input, all of them are one product, and each takes its columns, with every number
what it is without.

What was made is kept until every reader has taken its part, and served for the very tensor that it was made from, not
written to since, at the same row of the table.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bitbrush.kernels import cpu_onednn, cpu_plain
from bitbrush.kernels.blocks import watched
from bitbrush.kernels.cpu_attention import alike, join, runs

if TYPE_CHECKING:
    from bitbrush.kernels.cpu_plain import Facts
    from bitbrush.network.layers import QuantLayer


class Made(NamedTuple):
    """Parts that nobody has taken yet, by the place of their layer, and what they were made from."""

    source: weakref.ref[Tensor]
    version: int
    row: int
    parts: dict[int, Tensor]


class Readers:
    """Layers that read one tensor, in the order of their columns in the product.

    Attributes:
        joined: Of all of them as of one; None where they cannot be joined, or have not been yet.
        tried: Whether that was found out since the layers were last changed.
    """

    def __init__(self, layers: list[QuantLayer]) -> None:
        self.layers = layers
        self.places = {id(layer): place for place, layer in enumerate(layers)}
        self.joined: Facts | None = None
        self.tried = False
        self.made: Made | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the copied layers, and what was made belongs to this one."""
        return Readers, (self.layers,)

    def forget(self) -> None:
        """Join again at the next call, as weights may lie elsewhere."""
        self.joined, self.tried, self.made = None, False, None

    def take(self, layers: list[Any], source: Tensor, seen: Callable[[], Tensor]) -> list[Tensor] | None:
        """Outputs of some of the layers, in the dtype of their input; None where each has to be called.

        Args:
            source: The tensor that all of them read, as it lies.
            seen: Gives what they make of it first.
        """
        places = [self.places.get(id(layer), -1) for layer in layers]
        if -1 in places:  # an adapter has taken its place
            return None
        if source.is_inference() or source.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and source.requires_grad:
            return None
        row = self._row()
        if row is None:
            return None
        made = self.made
        if made is None or made.source() is not source or (made.version, made.row) != (source._version, row):
            made = None
        if made is None or any(place not in made.parts for place in places):
            made = self._make(source, row, seen)
        if made is None:
            return None
        parts = [made.parts.pop(place, None) for place in places]
        if not made.parts and self.made is made:
            self.made = None
        taken = [part for part in parts if part is not None]  # a thread with the same tensor may have been first
        return taken if len(taken) == len(parts) else None

    def _row(self) -> int | None:
        quantizer = self.layers[0].input
        if quantizer is None:
            return None
        return cpu_plain.row_now(self.layers[0]) if quantizer.spec.timed else 0

    def _make(self, source: Tensor, row: int, seen: Callable[[], Tensor]) -> Made | None:
        known = self._known()
        x = None if known is None else seen()
        if known is None or x is None or x.numel() == 0:
            return None
        product = cpu_plain.product(known, self.layers[0], x)
        if product is None:
            return None
        parts = product.split([layer.out_channels_ for layer in self.layers], dim=-1)
        self.made = Made(weakref.ref(source), source._version, row, dict(enumerate(parts)))
        return self.made

    def _known(self) -> Facts | None:
        """The layers as one, while all of them are plain, run by this kernel, and watched by nobody."""
        if not all(layer.face == "packed" and runs(layer) for layer in self.layers) or watched(self.layers):
            return None
        if self.joined is not None and self.joined.stale():
            self.forget()
        if not self.tried:
            self.tried = True
            here = all(_here(layer) for layer in self.layers)
            self.joined = join(self.layers) if here and cpu_onednn.engine() != "absent" else None
        return self.joined


def share(blocks: list[tuple[Any, ...]]) -> None:
    """Give blocks ``(block, layer, ..)`` whose layers read one tensor what makes one product of them, as ``readers``,
    where they are alike in two blocks or more."""
    found: list[list[tuple[Any, ...]]] = []
    for block, *layers in blocks:
        if not all(_here(layer) and alike(layers[0], layer) for layer in layers):
            continue
        group = next((group for group in found if alike(group[0][1], layers[0])), None)
        if group is None:
            found.append(group := [])
        group.append((block, *layers))
    for group in found:
        if len(group) > 1:
            readers = Readers([layer for _, *layers in group for layer in layers])
            for block, *_ in group:
                block.readers = readers
                block.join()  # no pair of its own


def _here(layer: Any) -> bool:
    """Whether it is a packed layer on the CPU."""
    return hasattr(layer, "declare_packed") and layer.face == "packed" and layer.weight_scale.device.type == "cpu"
