"""The parts of the proof that additive codebooks have of their own: bytes, tables, and a second decode.

The second decode shares nothing with `bitbrush.numbers.codebook.decode` but the definition: it walks over kernel
positions and groups of channels and looks every codeword up by plain indexing, on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.errors import InternalError
from bitbrush.kernels import cpu_lookup
from bitbrush.numbers.codebook import pack_codes

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer
    from bitbrush.numbers.grid import WeightSpec


def additive(layer: QuantLayer) -> WeightSpec | None:
    """The weight's spec where the layer is one of additive codebooks."""
    spec = layer.spec.weight
    return spec if spec is not None and spec.additive else None


def weight(codes: Tensor, layer: QuantLayer, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """The weight ``[N, C]`` or ``[N, C, kh, kw]``, float32 on the CPU, from codes ``[N, G, K]`` and the tables given
    (codebooks, scale), or the layer's own."""
    spec = additive(layer)
    if spec is None:
        raise InternalError("the layer has no additive codebooks")
    books, scale = (table.cpu().float() for table in tables or layer.weight_tables())
    index, (high, wide) = codes.cpu().long(), layer.kernel_hw
    channels = layer.in_channels_ // spec.group
    out = torch.empty(layer.out_channels_, layer.in_channels_, high, wide)
    for number in range(high * wide * channels):
        position, block = divmod(number, channels)
        total = books[0][index[:, number, 0]]
        for k in range(1, spec.codebooks):
            total = total + books[k][index[:, number, k]]
        first = block * spec.group
        out[:, first : first + spec.group, position // wide, position % wide] = total * scale[:, None]
    return out if isinstance(layer, torch.nn.Conv2d) else out[:, :, 0, 0]


def packed(codes: Tensor, spec: WeightSpec) -> Tensor:
    """The bytes that the codes have to be stored as."""
    return pack_codes(codes.cpu(), spec.grid.bits)


def tables_hold(layer: QuantLayer, expected: tuple[Tensor, Tensor] | None) -> tuple[bool, int]:
    """(whether codebooks and scale are float16, finite, and those expected; their entries)."""
    found = layer.weight_tables()
    good = all(table.dtype == torch.float16 and bool(torch.isfinite(table).all()) for table in found)
    if expected is not None:
        pairs = zip(expected, found, strict=True)
        good = good and all(torch.equal(want.cpu(), got.cpu()) for want, got in pairs)
    return good, sum(table.numel() for table in found)


def magnitude(kernel: str, layer: QuantLayer) -> Tensor | None:
    """What a kernel's sums are bounded by, on the CPU, where that is not the weight."""
    return cpu_lookup.magnitude(layer).cpu() if kernel == "cpu-lookup" and additive(layer) is not None else None
