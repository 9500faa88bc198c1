"""Sets of additive codebooks: the tables that a layer's weight is decoded with, one layer's own or shared by several.

A layer's own set is its submodule ``codebooks``. Sets that layers share (``WeightSpec.shared``, their name) belong to
the model, in one module `NAME`, so that a state dict and an artifact hold each of them once:

    <layer>.codebooks.values            float16 [K, 2**B, g]   a layer's own
    bitbrush_codebooks.<set>.values     float16 [K, 2**B, g]   of all layers that name the set

Layers hold a shared set as they hold the clock, in a tuple: it is found by a deep copy of the model, and listed once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitbrush.errors import InputError, InternalError
from bitbrush.network.dtypes import HalfTables
from bitbrush.numbers.codebook import to_half
from bitbrush.numbers.grid import LayerSpec, Plan

NAME = "bitbrush_codebooks"


class Codebooks(HalfTables):
    """One set of codebooks, ``values`` float16 ``[K, 2**B, g]``.

    While a step trains it puts the trained codebooks (any floating dtype, same shape) into ``trial``; the sim face of
    every layer of the set uses them. Once a layer of the set is packed the values are fixed: its codes refer to them.
    """

    values: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float16))
        self.trial: Tensor | None = None
        self.fixed = False

    def forward(self) -> Tensor:
        """The stored codebooks. A call, because offloading hooks bring a module's tensors when it is called."""
        return self.values

    def set(self, values: Tensor) -> None:
        """Store codebooks, rounded to float16; for all layers of the set.

        Raises:
            InternalError: Another shape, or other values than a packed layer was packed with.
            NumericsError: A value is not finite in float16.
        """
        if values.shape != self.values.shape:
            raise InternalError("the codebooks have another shape than the set", where=type(self).__name__,
                                why=f"{list(values.shape)} given, {list(self.values.shape)} expected")
        half = to_half(values).to(self.values.device)
        if self.fixed and not torch.equal(half, self.values):
            raise InternalError("the codebooks of a packed layer cannot change", where=type(self).__name__)
        self.values = half.clone(memory_format=torch.contiguous_format)

    def fix(self) -> None:
        """From now on a packed layer is decoded with the values."""
        self.trial, self.fixed = None, True

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        count, words, group = self.values.shape
        return f"{count} codebooks of {words} vectors of {group}"


class CodebookSets(nn.Module):
    """The sets that layers of a model share, by name."""


def install(model: nn.Module, plan: Plan) -> dict[str, Codebooks]:
    """Make the sets that the plan's layers share, on the model; a set of the same name and shape stays as it is.

    Returns:
        The sets by name.

    Raises:
        InputError: Two layers ask for different shapes of one set.
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    for name, spec in plan.layers.items():
        weight = spec.weight
        if weight is None or not weight.additive or not weight.shared:
            continue
        known = shapes.setdefault(weight.shared, weight.table_shape)
        if known != weight.table_shape:
            raise InputError(
                f"the layer asks for another shape of the codebooks {weight.shared!r}", where=name,
                why=f"[K, 2**B, g] = {list(weight.table_shape)}, in layers before it {list(known)}",
                try_="give layers of other codebooks, bits or groups another name of a set",
            )
    former = dict(getattr(model, NAME).named_children()) if hasattr(model, NAME) else {}
    remove(model)
    device = next(model.parameters()).device
    sets: dict[str, Codebooks] = {}
    for key in sorted(shapes):
        old = former.get(key)
        kept = isinstance(old, Codebooks) and old.values.shape == shapes[key]
        sets[key] = old if isinstance(old, Codebooks) and kept else Codebooks(shapes[key]).to(device)
    if sets:
        holder = CodebookSets()
        for key, one in sets.items():
            holder.add_module(key, one)
        setattr(model, NAME, holder)
    return sets


def remove(model: nn.Module) -> None:
    """Take the shared sets off again, if there are any."""
    if hasattr(model, NAME):
        delattr(model, NAME)


def check(name: str, spec: LayerSpec, channels: int, groups: int = 1) -> None:
    """Raise `InputError` for additive codebooks, or their settings, where they mean nothing.

    Args:
        name: Of the layer.
        spec: Its spec.
        channels: Input channels of its weight.
        groups: Of a convolution.
    """
    weight = spec.weight
    if weight is None:
        return
    reasons = _additive_reasons(spec, channels, groups) if weight.additive else {
        "codebooks, group and shared belong to weights on a grid of kind codebook, and this one is affine":
            weight.codebooks > 0 or bool(weight.shared) or weight.group != 8,
    }
    for why, holds in reasons.items():
        if holds:
            raise InputError(
                "the weight cannot be stored as additive codebooks like this", where=name, why=why,
                try_=f"leave this layer out, or choose a group size that divides {channels}" if "multiple" in why
                else '{ weight = { grid = "codebook", codebooks = 4, bits = 8 } }',
            )


def _additive_reasons(spec: LayerSpec, channels: int, groups: int) -> dict[str, bool]:
    weight = spec.weight
    if weight is None:
        return {}
    return {
        "the number of codebooks is 0": weight.codebooks == 0,
        f"its {channels} input channels are not a multiple of the group of {weight.group}":
            channels % weight.group != 0,
        f"it is a convolution with groups = {groups}": groups != 1,
        "all rows share the codebooks, hence the bits": bool(weight.row_bits),
        "codes are numbers of codewords: signed, rounding and symmetric 1-bit rows say nothing of them":
            weight.grid.signed or weight.rounding != "nearest" or weight.binary != "affine",
        "a row has its scale, a tensor none": weight.granularity != "row",
        "a row has one scale, and no input scales that segments would tell apart":
            len(spec.segments) > 1 and spec.activation is None,
        f"a set of codebooks cannot be called {weight.shared!r}":
            bool(weight.shared) and hasattr(CodebookSets(), weight.shared),
    }
