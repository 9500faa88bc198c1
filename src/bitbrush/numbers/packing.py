"""Codes to bytes and back: 1 to 8 bits, any length, an exact inverse.

A code of ``b`` bits is stored as planes of 8, 4, 2 or 1 bits, the widest first (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1), low-order bits in the first plane. Within a plane, consecutive elements fill a byte from its low end.
A code of 8 bits is stored as ``code - 128`` in two's complement: the bytes of a symmetric 8-bit weight are the int8
values that a product takes (`int8_rows`), as they lie.

A weight is stored by rows of K = segments x kh x kw x channels (see `weight_rows`); each plane of a row is padded to a
multiple of 16 bytes, so that every row of every plane starts aligned for a vector load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitbrush.numbers.grid import WeightSpec

SEGMENT_ALIGN = 32
ROW_ALIGN = 16
SIGN = 128
"""The bit that turns a code of 8 bits into ``code - 128`` in two's complement, and back."""


def planes(bits: int) -> tuple[int, ...]:
    """Plane widths of a code of ``bits`` bits, low-order plane first: ``planes(7) == (4, 2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """Pack values below ``2**width`` along the last dimension; the last byte is padded with zeros."""
    if width == 8:
        return codes.to(torch.uint8)
    per_byte = 8 // width
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_byte))
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    out = parts[..., 0]
    for i in range(1, per_byte):
        out = out | (parts[..., i] << (i * width))
    return out


def unpack_plane(data: Tensor, width: int, length: int) -> Tensor:
    """Inverse of `pack_plane`: the first ``length`` values along the last dimension, uint8."""
    if width == 8:
        return data[..., :length]
    mask = (1 << width) - 1
    parts = [(data >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :length]


def plane_bytes(length: int, width: int) -> int:
    """Bytes of one plane of a row of ``length`` codes, padded to `ROW_ALIGN`."""
    size = -(-length * width // 8)
    return -(-size // ROW_ALIGN) * ROW_ALIGN


def plane_starts(length: int, bits: int, size: Callable[[int, int], int] = plane_bytes) -> tuple[int, int, int]:
    """Where the planes of 4, 2 and 1 bits begin in a row of ``length`` codes, 0 where there is none; ``size(length,
    width)`` bytes each."""
    found, start = {4: 0, 2: 0, 1: 0}, 0
    for width in found:
        if bits & width:
            found[width], start = start, start + size(length, width)
    return found[4], found[2], found[1]


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a packed row of ``length`` codes of ``bits`` bits."""
    return sum(plane_bytes(length, width) for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes ``[N, K]`` (integers below ``2**bits``) into ``[N, row_bytes(K, bits)]`` uint8."""
    codes = codes.to(torch.uint8) ^ SIGN if bits == 8 else codes.to(torch.uint8)
    parts, shift = [], 0
    for width in planes(bits):
        plane = pack_plane((codes >> shift) & ((1 << width) - 1), width)
        parts.append(torch.nn.functional.pad(plane, (0, plane_bytes(codes.shape[-1], width) - plane.shape[-1])))
        shift += width
    return torch.cat(parts, dim=-1)


def unpack(data: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`: codes ``[N, length]`` uint8."""
    out: Tensor | None = None
    start = shift = 0
    for width in planes(bits):
        size = plane_bytes(length, width)
        plane = unpack_plane(data[..., start : start + size], width, length) << shift
        out = plane if out is None else out | plane
        start += size
        shift += width
    if out is None:
        raise ValueError("bits must be 1 to 8")
    return out ^ SIGN if bits == 8 else out


def int8_rows(data: Tensor) -> Tensor:
    """``code - 128`` of packed 8-bit rows: int8 ``[N, row_bytes]``, the same memory; past the row's codes it is 0."""
    return data.view(torch.int8)


def pack_class(codes: Tensor, bits: int, spec: WeightSpec) -> Tensor:
    """`pack` for the rows of one bit class of a weight: symmetric 1-bit codes {0, 2} are stored as {0, 1}.

    Their padding, the zero-point's code 1, becomes 0, that is the value ``-s``: readers must not count it.
    """
    return pack(codes.to(torch.uint8) >> 1 if spec.halved(bits) else codes, bits)


def unpack_class(data: Tensor, bits: int, length: int, spec: WeightSpec) -> Tensor:
    """Inverse of `pack_class`, except for the padding of symmetric 1-bit rows: codes ``[N, length]`` uint8."""
    codes = unpack(data, bits, length)
    return codes << 1 if spec.halved(bits) else codes


def order_dtype(rows: int) -> torch.dtype:
    """Type of ``row_order`` in a layer of so many rows: the smallest that holds every row's number."""
    return torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32


def padded(segments: tuple[int, ...]) -> tuple[int, ...]:
    """Channel counts of the segments after padding to `SEGMENT_ALIGN`."""
    return tuple(-(-c // SEGMENT_ALIGN) * SEGMENT_ALIGN for c in segments)


def row_length(segments: tuple[int, ...], kernel: tuple[int, int]) -> int:
    """Codes in a packed row, K = sum over segments of kh * kw * padded channels."""
    return kernel[0] * kernel[1] * sum(padded(segments))


def weight_rows(codes: Tensor, segments: tuple[int, ...], fill: Tensor) -> Tensor:
    """Codes ``[N, C, kh, kw]`` as rows ``[N, K]`` in the order (segment, kh, kw, channel).

    ``fill`` ``[N, S]`` are the zero-point codes: padded channels decode to exactly 0.
    """
    parts = []
    for s, part in enumerate(codes.split(list(segments), dim=1)):
        part = part.permute(0, 2, 3, 1)
        extra = padded((segments[s],))[0] - segments[s]
        pad = fill[:, s].to(part.dtype).reshape(-1, 1, 1, 1).expand(*part.shape[:3], extra)
        parts.append(torch.cat([part, pad], dim=3).flatten(1))
    return torch.cat(parts, dim=1)


def rows_to_weight(rows: Tensor, segments: tuple[int, ...], kernel: tuple[int, int]) -> Tensor:
    """Inverse of `weight_rows`, without the padding: ``[N, C, kh, kw]`` with the standard strides.

    A 1x1 weight counts as contiguous with channels-last strides too, and convolutions then take another algorithm,
    which rounds differently: the copy is therefore made explicitly.
    """
    kh, kw = kernel
    parts, start = [], 0
    for count, wide in zip(segments, padded(segments), strict=True):
        block = rows[:, start : start + kh * kw * wide].reshape(-1, kh, kw, wide)
        parts.append(block[..., :count].permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format))
        start += kh * kw * wide
    return torch.cat(parts, dim=1)
