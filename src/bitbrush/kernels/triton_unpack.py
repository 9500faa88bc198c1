"""Launches the kernels that unpack weights below 8 bits to int8. Importing this module does not import Triton."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from bitbrush.kernels.launching import Launch
from bitbrush.numbers.packing import plane_starts

ROWS, COLUMNS, WARPS = 16, 256, 4
"""Of a program."""


def unpack(
    out: Tensor, data: Tensor, bits: int, zero_point: Tensor, order: Tensor | None, counts: tuple[int, ...],
    widths: tuple[int, ...], taps: int, halved: bool,
) -> None:
    """Write ``code - zero_point`` of one bit class (below 8 bits) into its rows of ``out`` int8 ``[N, K]``.

    Args:
        data: uint8 ``[N_b, row_bytes]``.
        zero_point: uint8 ``[N, S]``.
        order: The row of ``out`` of each packed row; None: the same.
        halved: Symmetric 1-bit rows.
    """
    key = (out.shape, data.shape, data.stride(), bits, zero_point.shape, order is None, counts, taps, halved)
    launch = _UNPACKED.get(key)
    if launch is None:
        ordered = order is not None
        launch = _UNPACKED[key] = _cut_rows(out, data, bits, zero_point, ordered, counts, widths, taps, halved)
    launch((data, zero_point, data if order is None else order, out))


def unpack_sorted(
    out: Tensor, data: Tensor, bits: int, zero_point: Tensor, order: Tensor | None, columns: Tensor, length: int,
    halved: bool,
) -> None:
    """`unpack` of any number of bits into the columns of ``out`` int8 ``[N, len(columns)]`` that hold others of the
    packed row's ``length`` codes: those that ``columns`` says (`bitbrush.kernels.sums`), 0 where that is -1.

    Args:
        zero_point: uint8 ``[N, 1]``.
    """
    key = (out.shape, data.shape, data.stride(), bits, order is None, length, halved)
    launch = _SORTED.get(key)
    if launch is None:
        launch = _SORTED[key] = _cut_sorted(out, data, bits, order is not None, length, halved)
    launch((data, zero_point, data if order is None else order, columns, out))


_SORTED: dict[Any, Launch] = {}


def _cut_sorted(out: Tensor, data: Tensor, bits: int, order: bool, length: int, halved: bool) -> Launch:
    from bitbrush.kernels import triton_int8_kernels as kernels

    rows, columns, height = data.shape[0], COLUMNS, ROWS // 2  # twice as many take 1.3 times as long
    options = {"BITS": bits, "ORDER": order, "HALVED": halved, "BR": height, "BK": columns, "num_warps": WARPS}
    numbers = (rows, out.shape[1], data.stride(0), *plane_starts(length, bits))
    return Launch(kernels.unpack_sorted, (-(-rows // height), -(-out.shape[1] // columns)), numbers, options)


_UNPACKED: dict[Any, Launch] = {}


def _cut_rows(
    out: Tensor, data: Tensor, bits: int, zero_point: Tensor, order: bool, counts: tuple[int, ...],
    widths: tuple[int, ...], taps: int, halved: bool,
) -> Launch:
    from bitbrush.kernels import triton_int8_kernels as kernels

    length, rows, columns, height = out.shape[1], data.shape[0], COLUMNS, ROWS
    numbers = (rows, length, data.stride(0), *plane_starts(length, bits), zero_point.shape[1])
    options = {
        "ENDS": tuple(accumulate(width * taps for width in widths)), "REAL": tuple(zip(counts, widths, strict=True)),
        "BITS": bits, "ORDER": order, "HALVED": halved, "BR": height, "BK": columns, "num_warps": WARPS,
    }
    return Launch(kernels.unpack, (-(-rows // height), -(-length // columns)), numbers, options)


def unpack_each(
    out: Sequence[Tensor], data: Sequence[Tensor], bits: int, zero_point: Sequence[Tensor], channels: Sequence[int],
    halved: bool,
) -> None:
    """`unpack` of several matrices at once, each of one segment: a launch takes as long as a small matrix.

    Args:
        channels: Of each matrix's rows, without their padding.
    """
    key = (tuple([(o.shape, d.stride(0)) for o, d in zip(out, data, strict=True)]), bits, tuple(channels), halved)
    launch = _EACH.get(key)
    if launch is None:
        launch = _EACH[key] = _cut_each(out, data, bits, channels, halved)
    parts = tuple(zip(data, zero_point, out, strict=True))
    launch([tensor for part in parts for tensor in part], (parts,))


_EACH: dict[Any, Launch] = {}


def _cut_each(
    out: Sequence[Tensor], data: Sequence[Tensor], bits: int, channels: Sequence[int], halved: bool
) -> Launch:
    from bitbrush.kernels import triton_int8_kernels as kernels

    sizes, end = [], 0
    for made, packed, count in zip(out, data, channels, strict=True):
        (rows, length), begin = made.shape, end
        across = -(-length // COLUMNS)
        end += -(-rows // ROWS) * across
        sizes.append((begin, end, across, rows, length, count, packed.stride(0), *plane_starts(length, bits)))
    options = {"SIZES": tuple(sizes), "BITS": bits, "HALVED": halved, "BR": ROWS, "BK": COLUMNS, "num_warps": WARPS}
    return Launch(kernels.unpack_each, (end,), (), options)
