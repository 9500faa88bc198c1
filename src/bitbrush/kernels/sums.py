"""Which channels of a layer's input are summed together: those of a segment, or those of a group (DGQ).

Channels of a segment lie side by side, in the input as in the packed rows. Those of a group lie anywhere. A kernel
sorts them: the codes of an input are written group by group, and so are the columns of the unpacked weight; from there
on groups are segments. The packed bytes stay as they are, so that a file says nothing of kernels.

What follows from a layer's labels is kept where its weight is (`kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.kernels import building
from bitbrush.numbers import packing

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

OF_CHANNEL = 256
"""`places` holds ``channel * OF_CHANNEL + group``: there are at most 256 groups."""


def kept(layer: QuantLayer, what: str, make: Callable[[QuantLayer], Tensor]) -> Tensor:
    """A tensor that is made once a device; one that is made while a graph is traced is part of that graph, and one that
    is made while launches are left out holds nothing."""
    key = (what, layer._buffers["weight_scale"].device)  # type: ignore[union-attr]
    found = layer._row_tables.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():
        made = make(layer)
    if not torch.compiler.is_compiling() and not building.noting():
        layer._row_tables[key] = made
    return made


def grouped(layer: QuantLayer) -> bool:
    """Whether channels are summed by group."""
    return layer.spec.activation is not None and layer.spec.activation.granularity == "channel_group"


def counts(layer: QuantLayer) -> tuple[int, ...]:
    """Channels of each sum; a group may have none."""
    return layer.input.group_sizes() if grouped(layer) and layer.input is not None else layer.segments


def order(layer: QuantLayer) -> Tensor:
    """int64 ``[C]``: the channels, group by group. Kept."""
    return kept(layer, "order", _order)


def _order(layer: QuantLayer) -> Tensor:
    if layer.input is None or layer.input.group_of is None:
        raise ValueError("the channels of this layer's input have no groups")
    return torch.argsort(layer.input.group_of, stable=True)


def alike(layers: Sequence[QuantLayer]) -> bool:
    """Whether the same channels of one input are summed together in all layers."""
    first, *others = layers
    if any(grouped(layer) != grouped(first) or counts(layer) != counts(first) for layer in others):
        return False
    return not grouped(first) or all(torch.equal(order(layer), order(first)) for layer in others)


def in_order(layer: QuantLayer, tensor: Tensor, dim: int = -1) -> Tensor:
    """A tensor with its channels sum by sum."""
    return tensor.index_select(dim, order(layer)) if grouped(layer) else tensor


def places(layer: QuantLayer) -> Tensor:
    """int32 ``[sum(padded(counts))]``: channel and group of each column of the codes; padding has channel C. Kept."""
    return kept(layer, "places", _places)


def _places(layer: QuantLayer) -> Tensor:
    parts, channels = order(layer).split(counts(layer)), layer.in_channels_
    found = [torch.nn.functional.pad(part, (0, -len(part) % packing.SEGMENT_ALIGN), value=channels) * OF_CHANNEL + s
             for s, part in enumerate(parts)]  # fmt: skip
    return torch.cat(found).to(torch.int32)


def columns(layer: QuantLayer) -> Tensor:
    """int32 ``[taps * sum(padded(counts))]``: of each column of the sorted weight, in the order (group, kh, kw,
    channel), the one of a packed row that it holds; -1 in padding. Kept."""
    return kept(layer, "columns", _columns)


def _columns(layer: QuantLayer) -> Tensor:
    (wide,), taps = packing.padded((layer.in_channels_,)), layer.kernel_hw[0] * layer.kernel_hw[1]
    steps = torch.arange(taps, device=layer.weight_scale.device)[:, None] * wide
    found = []
    for part in (places(layer) // OF_CHANNEL).split(packing.padded(counts(layer))):
        found.append(torch.where(part < layer.in_channels_, steps + part, -1).flatten())
    return torch.cat(found).to(torch.int32)


def by_columns(rows: Tensor, columns: Tensor) -> Tensor:
    """Rows ``[N, K]`` with their columns in another order, and 0 where that says -1."""
    return torch.where(columns >= 0, rows.index_select(1, columns.clamp_min(0)), 0)


def weight_scale(layer: QuantLayer) -> Tensor:
    """float32 ``[N, S]``: a row's scale for each of its sums. Kept, where groups share the row's one."""
    return kept(layer, "weight_scale", _weight_scale) if grouped(layer) else layer.weight_scale


def _weight_scale(layer: QuantLayer) -> Tensor:
    return layer.weight_scale.expand(-1, len(counts(layer))).contiguous()
