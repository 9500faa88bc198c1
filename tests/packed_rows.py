"""Packed rows of linear layers of every number of bits below 8, for what unpacks several at once: in Triton's
interpreter (kernels/interpreted_int8.py) and on a GPU (benchmarks/check_int8.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bitbrush.numbers import packing
from bitbrush.numbers.grid import Grid, WeightSpec

SHAPES = ((17, 40), (5, 300), (33, 32))
"""Rows and channels of the layers."""
WEIGHTS = 7 * sum(rows * packing.padded((channels,))[0] for rows, channels in SHAPES)
"""Of all cases, with padding."""


def cases() -> Iterator[tuple[Any, ...]]:
    """What ``bitbrush::int8_weights`` takes."""
    g = torch.Generator().manual_seed(6)
    for bits in range(1, 8):
        spec = WeightSpec(grid=Grid(bits=bits), binary="symmetric" if bits == 1 else "affine")
        packed, zeros = [], []
        for rows, channels in SHAPES:
            codes = torch.randint(0, 1 << bits, (rows, channels, 1, 1), dtype=torch.uint8, generator=g)
            zero = torch.randint(0, 1 << bits, (rows, 1), dtype=torch.uint8, generator=g)
            if bits == 1:
                codes, zero = codes * 2, torch.ones_like(zero)
            packed.append(packing.pack_class(packing.weight_rows(codes, (channels,), zero), bits, spec))
            zeros.append(zero)
        yield packed[0], packed, zeros, [channels for _, channels in SHAPES], bits, bits == 1
