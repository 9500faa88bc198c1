"""Layers that read the same input, as one product: queries, keys and values.

Three products of 2,048 x 1,280 x 1,280 leave a large GPU half idle at their ends; one of 2,048 x 3,840 x 1,280 does
not. The layers keep their own scales of the input: each has codes of its own, one below the other.

The packed rows lie in one buffer of which the layers' buffers are views, so that nothing is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.kernels import direct, gpu, sums
from bitbrush.kernels.gpu import Given
from bitbrush.numbers import packing

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

_OPS = direct.OPS


@dataclass
class Joined:
    """What the layers' product needs, rows of all one below the other.

    Attributes:
        parts: Number of layers.
        bits: Of every weight.
        codes: Packed rows ``[parts * N, bytes]``.
        zero_point: uint8 ``[parts * N, 1]``.
        weight_scale: float32 ``[parts * N, S]``.
        weight_sum: int32 ``[S, parts * N]``.
        bias: ``[parts * N]``, or None.
        segments: Channels of the rows' segments.
        widths: Padded channels of each of the S sums.
        columns: `sums.columns` where sums are over groups of channels.
        halved: Whether rows are of one bit and symmetric.
    """

    parts: int
    bits: int
    codes: Tensor
    zero_point: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    bias: Tensor | None
    segments: tuple[int, ...]
    widths: tuple[int, ...]
    columns: Tensor | None
    halved: bool

    def weight(self) -> Tensor:
        """``code - zero_point`` int8 ``[parts * N, K]``."""
        if self.bits == 8 and self.columns is None:
            return packing.int8_rows(self.codes)
        found: Tensor = _OPS.int8_weight([self.codes], [self.bits], self.zero_point, None, list(self.segments), 1,
                                         self.halved, self.columns)  # fmt: skip
        return found

    def multiply(self, codes: Tensor, given: list[Given], dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
        """The outputs, ``[parts, M, N]``.

        Args:
            codes: int8 ``[parts * M, K]``, those of one layer below those of another.
            given: What each layer's codes were encoded by.
            dtype: Of the output.
            weight: `weight`, where it is there already.
        """
        out: Tensor = _OPS.int8_joined(
            codes, self.weight() if weight is None else weight, [g.scale for g in given],
            [g.zero_point for g in given], [g.times for g in given], self.weight_scale, self.weight_sum,
            list(self.widths), self.parts, self.bias, dtype,
        )
        return out


def able(layers: list[QuantLayer]) -> bool:
    """Whether linear layers of one input can be one product: of one size and width in bits, with a bias or without, and
    of sums over the same channels."""
    first = layers[0]
    kinds = {
        (layer.in_channels_, layer.out_channels_, layer.bias is None, layer.segments,
         layer.spec.weight.bit_classes() if layer.spec.weight is not None else None,
         bool(layer.spec.weight is not None and layer.spec.weight.row_bits),
         bool(layer.spec.weight is not None and layer.spec.weight.halved(1)))
        for layer in layers
    }  # fmt: skip
    spec = first.spec.weight
    return len(kinds) == 1 and spec is not None and not spec.row_bits and sums.alike(layers)


@torch.no_grad()
def join(layers: list[QuantLayer]) -> Joined:
    """Put the rows of layers into one buffer, and give the layers views of it."""
    spec = layers[0].spec.weight
    if spec is None:
        raise ValueError("the weight of these layers is not quantized")
    (bits,) = spec.bit_classes()
    with torch.inference_mode(False):
        biases = [layer.bias for layer in layers if layer.bias is not None]
        made = Joined(
            len(layers), bits, shared([getattr(layer, f"codes{bits}") for layer in layers]),
            torch.cat([layer.weight_zero_point for layer in layers]),
            torch.cat([sums.weight_scale(layer) for layer in layers]),
            torch.cat([gpu.weight_sum(layer) for layer in layers], 1), torch.cat(biases) if biases else None,
            layers[0].segments, gpu.facts(layers[0]).widths,
            sums.columns(layers[0]) if sums.grouped(layers[0]) else None, spec.halved(1),
        )  # fmt: skip
        rows = made.codes.shape[0] // len(layers)
        for part, layer in enumerate(layers):
            layer._buffers[f"codes{bits}"] = made.codes[part * rows : (part + 1) * rows]
    return made


def shared(parts: list[Tensor]) -> Tensor:
    """One tensor of several rows of tensors: a piece of the one of which they are already views, one behind the other,
    or a copy of all."""
    base, rows = parts[0]._base, [part.shape[0] for part in parts]
    if base is not None and base.shape[1:] == parts[0].shape[1:] and base.stride() == parts[0].stride():
        first = parts[0].storage_offset() // max(1, base.stride(0))
        starts = [base[first + sum(rows[:i]) :].data_ptr() for i in range(len(parts))]
        if all(part._base is base and part.data_ptr() == start for part, start in zip(parts, starts, strict=True)):
            return base if len(base) == sum(rows) else base[first : first + sum(rows)]
    return torch.cat(parts)
