"""Packed weights to int8 on the CPU, as rows and as columns.

A call of a layer unpacks its weight again: only the packed bytes stay in memory. What costs is not the shifting but the
transposition that a product may want, so `columns` transposes the *bytes* (half as many as the codes at 4 bits), and
then every shift writes whole rows of the result.

Both take a layer's tensors: ``stored``, packed rows of each bit class, uint8 ``[N_b, bytes]``; ``bits`` of each class;
``halved``, 1 for a class of symmetric 1-bit rows; ``order``, the layer's ``row_order`` where rows differ in bits;
``zero_point`` uint8 ``[N, S]``; ``segments``, their input channels; ``taps`` = kh * kw. They answer
``code - zero_point`` of each segment, int8, in the order (kh, kw, padded channel); padded channels are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.numbers import packing
from bitbrush.numbers.grid import WeightSpec

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

_HIGH = torch.tensor(0xF0, dtype=torch.int16)
"""As a tensor: a number would be converted to one at every call."""


def largest(spec: WeightSpec) -> int:
    """The largest magnitude that ``code - zero_point`` may have in int8."""
    if spec.grid.signed and not spec.row_bits:
        return spec.grid.mid
    return max(min((1 << bits) - 1, 128) for bits in spec.bit_classes())


def tensors(layer: QuantLayer) -> tuple[list[Tensor], list[int], list[int], Tensor | None, Tensor, list[int], int]:
    """What `rows` and `columns` take."""
    spec = layer.spec.weight
    if spec is None:
        raise ValueError("the weight of this layer is not quantized")
    bits, (kh, kw) = list(spec.bit_classes()), layer.kernel_hw
    stored = [getattr(layer, f"codes{b}") for b in bits]
    order: Tensor | None = layer.row_order if spec.row_bits else None  # type: ignore[assignment]
    halved = [int(spec.halved(b)) for b in bits]
    return stored, bits, halved, order, layer.weight_zero_point, list(layer.segments), kh * kw


def int8_weights(layer: QuantLayer) -> list[Tensor]:
    """`rows` of a layer."""
    return rows(*tensors(layer))


def rows(
    stored: list[Tensor], bits: list[int], halved: list[int], order: Tensor | None, zero_point: Tensor,
    segments: list[int], taps: int,
) -> list[Tensor]:
    """int8 ``[N, taps * padded channels]`` of each segment."""
    wide = packing.padded(tuple(segments))
    length = taps * sum(wide)
    if bits == [8]:  # stored as they are wanted
        return list(packing.int8_rows(stored[0])[:, :length].split([taps * count for count in wide], dim=1))
    parts = [_unpacked_rows(*one, length) for one in zip(stored, bits, halved, strict=True)]
    codes = torch.cat(parts) if len(parts) > 1 else parts[0]
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order.long(), codes)
    out = []
    for s, block in enumerate(codes.split([taps * count for count in wide], dim=1) if len(wide) > 1 else [codes]):
        block = block - zero_point[:, s : s + 1]  # modulo 256, which is what int8 wants
        if segments[s] < wide[s]:
            block.view(-1, taps, wide[s])[:, :, segments[s] :] = 0  # padding of symmetric 1-bit rows reads as -1
        out.append(block.view(torch.int8))
    return out


def plain_rows(stored: Tensor, bits: int, halved: int, zero_point: Tensor, length: int) -> Tensor:
    """`rows` of one bit class in one segment without padding, ``zero_point`` ``[N, 1]``."""
    return _unpacked_rows(stored, bits, halved, length).sub_(zero_point).view(torch.int8)


def columns(
    stored: list[Tensor], bits: list[int], halved: list[int], order: Tensor | None, zero_point: Tensor,
    segments: list[int], taps: int,
) -> list[Tensor]:
    """int8 ``[taps * padded channels, N]`` of each segment: `rows`, transposed."""
    wide = packing.padded(tuple(segments))
    length = taps * sum(wide)
    if bits == [8]:  # stored as they are wanted
        plane = _unpacked_plane(stored[0][:, :length], 8).view(torch.int8)
        return list(plane.split([taps * count for count in wide]))
    parts = [_unpacked(*one, length) for one in zip(stored, bits, halved, strict=True)]
    codes = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order.long(), codes)
    out = []
    for s, block in enumerate(codes.split([taps * count for count in wide]) if len(wide) > 1 else [codes]):
        block -= zero_point[:, s]  # modulo 256, which is what int8 wants
        if segments[s] < wide[s]:
            block.view(taps, wide[s], -1)[:, segments[s] :] = 0  # padding of symmetric 1-bit rows reads as -1
        out.append(block.view(torch.int8))
    return out


def _unpacked_rows(stored: Tensor, bits: int, halved: int, length: int) -> Tensor:
    """Codes of one bit class, uint8 ``[N_b, length]``."""
    if bits != 4:
        codes = packing.unpack(stored, bits, length)
        return codes << 1 if halved else codes
    both = stored.to(torch.int16)  # 0x00HL: to 0x0H0L, two codes in the order of their bytes, by 15 times 0x00H0
    codes = both.add_(both & _HIGH, alpha=15).view(torch.uint8)
    return codes if codes.shape[1] == length else codes[:, :length]


def _unpacked(stored: Tensor, bits: int, halved: int, length: int) -> Tensor:
    """Codes of one bit class, uint8 ``[length, N_b]``, which nobody else has."""
    out: Tensor | None = None
    start = shift = 0
    for width in packing.planes(bits):
        plane = _unpacked_plane(stored[:, start : start + -(-length * width // 8)], width)[:length]
        out = plane if out is None else out.bitwise_or_(plane << shift)
        start += packing.plane_bytes(length, width)
        shift += width
    if out is None:
        raise ValueError("bits must be 1 to 8")
    if bits == 8:
        return out.bitwise_xor_(packing.SIGN)
    return out << 1 if halved else out


def _unpacked_plane(data: Tensor, width: int) -> Tensor:
    """uint8 ``[bytes * 8 / width, N]`` of packed rows ``[N, bytes]``, low end of a byte first."""
    data = data.t().clone(memory_format=torch.contiguous_format)
    if width == 8:
        return data
    per_byte, mask = 8 // width, (1 << width) - 1
    out = data.new_empty(data.shape[0], per_byte, data.shape[1])
    torch.bitwise_and(data, mask, out=out[:, 0])
    for i in range(1, per_byte):
        torch.bitwise_right_shift(data, i * width, out=out[:, i])
        if i < per_byte - 1:
            out[:, i] &= mask
    return out.flatten(0, 1)
