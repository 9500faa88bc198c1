"""Layers all over a network that read one tensor, on a GPU: one encode, and a product for each size of output.

SDXL's 70 cross-attentions each encode the prompt twice and multiply 154 rows: 280 launches, most of which last as long
as an empty one. Here one launch writes the codes of all, each by a table of its own, and the layers of one size are one
product (`joined_ops`). What is kept for how long: `readers`.

The packed rows of the layers of one size lie in one buffer of which the layers' are views, so that nothing is stored
twice. A graph that is compiled calls the layers one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bitbrush.kernels import direct, gpu, joined, readers
from bitbrush.kernels.blocks import FusedBlock, ready, unfit_layer, watched
from bitbrush.kernels.joined import Joined
from bitbrush.numbers import packing

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

_OPS = direct.OPS
TABLES = ("scale", "inverse_scale", "zero_point")
UNPACKED = 1 << 26
"""Bytes of int8 weights that are unpacked for one product at most: of the keys and values of SDXL's prompt there are
315 MB."""


class Product(NamedTuple):
    """Of P layers of one size.

    Attributes:
        joined: Their weights.
        scale, zero_point: ``[P, T]``.
    """

    joined: Joined
    scale: Tensor
    zero_point: Tensor


class Stack(NamedTuple):
    """What the layers' products need.

    Attributes:
        inverse, encoding: ``[P, T]`` of all, in the order of the products; see `gpu.Given`.
        factor: ``input_scale`` ``[P, C]``, or None.
        places: Which layer each row is of.
        products: Of layers of one size each.
        source: What all this was made from, and its versions.
    """

    inverse: Tensor
    encoding: Tensor
    factor: Tensor | None
    places: list[int]
    products: list[Product]
    source: list[tuple[Tensor, int]]

    def stale(self, layers: list[QuantLayer]) -> bool:
        """Whether a layer has other tensors now, or others in them."""
        now = _source(layers)
        return len(now) != len(self.source) or any(
            a is not b or a._version != version for (a, version), b in zip(self.source, now, strict=True))


class Readers(readers.Readers):
    """Layers that read one tensor.

    Attributes:
        blocks: Those whose own pairs of layers share the rows of this product.
    """

    def __init__(self, layers: list[QuantLayer], blocks: list[FusedBlock]) -> None:
        super().__init__(layers)
        self.blocks = blocks

    def __reduce__(self) -> tuple[Any, ...]:
        """See `readers.Readers`. The blocks hold this: a copy of it has to exist before theirs."""
        return Readers, ([], []), (self.layers, self.blocks)

    def __setstate__(self, state: tuple[list[QuantLayer], list[FusedBlock]]) -> None:
        """What `__reduce__` says."""
        Readers.__init__(self, *state)

    def moment(self) -> Any:
        """The time of the denoiser's forward that is under way; True where layers have one row for all times."""
        quantizer = self.layers[0].input
        if quantizer is None:
            return None
        return True if quantizer.clock is None else quantizer.clock.now

    def same(self, one: Any, other: Any) -> bool:
        """A time is a tensor, of one forward."""
        return one is other

    def outputs(self, source: Tensor, seen: Callable[[], Any]) -> list[Tensor] | None:
        """See `readers.Readers.outputs`."""
        stack = self.stack(source)
        if stack is None:
            return None
        x, found = seen(), [source] * len(self.layers)
        parts = [part for out in self.multiply(stack, x.reshape(-1, x.shape[-1])) for part in out]
        for place, part in zip(stack.places, parts, strict=True):
            found[place] = part.reshape(*x.shape[:-1], -1)
        return found

    def multiply(self, stack: Stack, rows: Tensor) -> list[Tensor]:
        """``[P, R, N]`` of the layers of each product, in the order of ``stack.places``.

        Args:
            rows: ``[R, C]`` that all of them read; or ``[layers, R, C]``, in that order.
        """
        given, top = gpu.given_input(self.layers[0], rows), gpu.facts(self.layers[0]).top
        codes = _OPS.int8_encode_each(rows, stack.inverse, stack.encoding, given.times, top, stack.factor)
        found, start, many, (width,) = [], 0, rows.shape[-2], packing.padded((rows.shape[-1],))
        for weights, scale, zero in stack.products:
            stop = start + weights.parts
            found.append(_OPS.int8_stacked(
                codes[start * many : stop * many], weights.weight(), scale, zero, given.times, weights.weight_scale,
                weights.weight_sum, width, weights.bias, rows.dtype,
            ))  # fmt: skip
            start = stop
        return found

    def stack(self, x: Tensor) -> Stack | None:
        """The layers as one, while all of them are plain, run by this kernel, and watched by nobody."""
        if not x.numel() or watched(self.layers) or not ready(self.layers, x):
            return None
        if self.joined is not None and self.joined.stale(self.layers):
            self.forget()
        if not self.tried and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            here = not any(t.device != x.device or t.is_inference() for t in _source(self.layers))
            made = _stacked(self.layers, len(self.layers) // len(self.blocks)) if here else None
            if made is not None:
                for block in self.blocks:
                    block.join()  # what a block joins for itself lies in the same rows
                made = made._replace(source=[(tensor, tensor._version) for tensor in _source(self.layers)])
            self.joined, self.tried = made, True
        found: Stack | None = self.joined
        return found


@torch.no_grad()
def _stacked(layers: list[QuantLayer], each: int) -> Stack:
    """each: layers of a block, which stay together."""
    order = sorted(range(len(layers)), key=lambda place: layers[place].out_channels_)
    ordered = [layers[place] for place in order]
    with torch.inference_mode(False):
        sizes = [list(group) for _, group in groupby(ordered, lambda layer: layer.out_channels_)]
        groups = [group[i : i + most] for group in sizes for most in (_most(group, each),)
                  for i in range(0, len(group), most)]  # fmt: skip
        products = [Product(joined.join(group), _table(group, "scale"), _table(group, "zero_point"))
                    for group in groups]  # fmt: skip
        changing = [gpu.changing_table(layer).reshape(-1) for layer in ordered if gpu.facts(layer).changing]
        encoding = torch.stack(changing) if changing else _table(ordered, "zero_point")
        factors = [found for layer in ordered if (found := gpu.input_scale(layer)) is not None]
        factor = torch.stack(factors) if factors else None
        return Stack(_table(ordered, "inverse_scale"), encoding, factor, order, products, [])


def _most(group: list[QuantLayer], each: int) -> int:
    """How many layers of a size are one product: of 8 bits all, as they are multiplied where they lie."""
    spec, one = group[0].spec.weight, group[0].out_channels_ * group[0].in_channels_
    if spec is None or spec.bit_classes() == (8,):
        return len(group)
    return max(1, UNPACKED // (one * each)) * each


def _table(layers: list[QuantLayer], name: str) -> Tensor:
    """A table of all layers' inputs, ``[P, T]``."""
    return torch.stack([getattr(layer.input, name).reshape(-1) for layer in layers])


def _source(layers: Iterable[QuantLayer]) -> list[Tensor]:
    found = []
    for layer in layers:
        own, quantizer = layer._buffers, layer._modules["input"]
        found += [own["weight_scale"], own["weight_zero_point"], own.get("input_scale"), layer._parameters["bias"]]
        found += [own[f"codes{bits}"] for bits in layer.spec.weight.bit_classes()]  # type: ignore[union-attr]
        found += [quantizer._buffers[name] for name in TABLES]  # type: ignore[union-attr]
    return [tensor for tensor in found if tensor is not None]


def share(found: list[tuple[FusedBlock, list[Any]]]) -> None:
    """Give blocks whose layers read one tensor what makes their products together, as ``gpu_readers``, where such
    layers are in two blocks or more."""
    kinds: dict[Any, list[tuple[FusedBlock, list[Any]]]] = {}
    for block, layers in found:
        keys = {kind(layer) for layer in layers}
        if len(keys) == 1 and None not in keys:
            kinds.setdefault(keys.pop(), []).append((block, layers))
    for alike in kinds.values():
        if len(alike) > 1:
            made = Readers([layer for _, layers in alike for layer in layers], [block for block, _ in alike])
            for block, _ in alike:
                block.gpu_readers = made


def kind(layer: Any) -> Any:
    """What must be the same of layers that are made together; None where a layer cannot be."""
    if unfit_layer(layer, "it") is not None or layer.spec.weight.row_bits:
        return None
    spec, quantizer = layer.spec, layer.input
    if spec.activation.time_groups or not joined.able([layer]) or gpu.several(layer):
        return None
    heights = tuple(quantizer._buffers[name].shape for name in TABLES), quantizer._buffers["zero_point"].dtype
    return (layer.in_channels_, layer.bias is None, spec.weight.bit_classes(), spec.weight.halved(1),
            quantizer.spec.timed, quantizer.spec.lookup, id(quantizer.clock) if quantizer.spec.timed else None, heights,
            gpu.facts(layer).top, spec.activation.time_bits, gpu.input_scale(layer) is None)  # fmt: skip
