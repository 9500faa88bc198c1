"""GroupNorm (and SiLU) with the encode in one launch, for pictures whose groups a program holds in its registers.

Two launches wait twice for a kernel to begin and for memory to answer, which for small pictures is most of their time.
Here a program reads a whole group of a sample. Where there are fewer groups than processors, several programs read the
same one, and each writes a part of its pixels: what is read twice comes from the second-level cache.

Importing this module does not import Triton.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

from torch import Tensor

from bitbrush.kernels.launching import Launch
from bitbrush.kernels.triton_encode import border_lines
from bitbrush.kernels.triton_int8 import Frame, early, launched, processors
from bitbrush.numbers import packing

MOST_WARPS = 16
HELD = 96
"""Numbers of a thread at most: with 16 warps it has 128 registers."""
LEAST_VECTOR, MOST_VECTOR = 4, 8
"""Channels of a thread: 8 or 16 bytes of bfloat16. Groups of 10 or 30 channels are read by 4 bytes at a time, and take
more loads than there is room for."""
MOST_PARTS = 4


class Cut(NamedTuple):
    """How groups are held: channels of a thread, warps of a program, tiles of a group, how many of them a program
    writes, and programs of a group."""

    vector: int
    warps: int
    tiles: int
    own: int
    parts: int


def cut(size: int, pixels: int, programs: int, room: int) -> Cut | None:
    """How groups of ``size`` channels and ``pixels`` pixels are held, or None where two launches serve better.

    Args:
        programs: Groups of all samples.
        room: Processors.
    """
    vector = gcd(size, MOST_VECTOR)
    unit = size // vector  # threads of a pixel
    if vector < LEAST_VECTOR or programs > room or unit > 32 * MOST_WARPS:
        return None
    warps = MOST_WARPS
    while warps > 4 and 16 * warps // unit >= pixels:  # half as many hold all in a tile
        warps //= 2
    step = 32 * warps // unit
    tiles = -(-pixels // step)
    if tiles * vector > HELD:
        return None
    own = -(-tiles // min(MOST_PARTS, room // programs))
    return Cut(vector, warps, tiles, own, -(-tiles // own))


def small(x: Tensor, groups: int, counts: tuple[int, ...]) -> Cut | None:
    """How the groups of ``x [B, C, H, W]`` are held; None where they are not, or columns of the codes are padding."""
    batch, channels, high, wide = x.shape
    if packing.padded(counts) != (channels,) or x.element_size() != 2:
        return None
    return cut(channels // groups, high * wide, batch * groups, processors(x.device))


def group_norm(
    x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    tables: tuple[Tensor, Tensor, Tensor], top: int, frame: Frame | None, factor: Tensor | None, how: Cut,
) -> None:
    """Writes int8 codes less 128 of ``x [B, C, H, W]``, channels last, to ``out [rows, C]``: pixels, or their frame.

    Args:
        tables: (inverse, zero_point, times).
        factor: ``input_scale`` float32 ``[C]``.
    """
    key = (x.shape, groups, eps, silu, top, frame, factor is None, how, x.device, early(x.device))
    launch = _KNOWN.get(key)
    if launch is None:
        launch = _KNOWN[key] = _launch(x, groups, eps, silu, top, frame, factor is not None, how)
    launch((x, weight, bias, out, *tables, x if factor is None else factor))


_KNOWN: dict[Any, Launch] = {}


def _launch(
    x: Tensor, groups: int, eps: float, silu: bool, top: int, frame: Frame | None, factor: bool, how: Cut
) -> Launch:
    from bitbrush.kernels import triton_norm_small_kernels as kernels

    batch, channels, high, wide = x.shape
    place = frame or Frame(batch, high, wide)
    options = {
        "CHANNELS": channels, "SIZE": channels // groups, "HIGH": high, "WIDE": wide, "HEIGHT": place.height,
        "PITCH": place.pitch, "PAD": place.pad, "BELOW": border_lines(place) * place.pitch, "SILU": silu,
        "FACTOR": factor, "VECTOR": how.vector, "LANES": 32 * how.warps, "TILES": how.tiles, "OWN": how.own,
        "SPLIT": how.parts, "num_warps": how.warps, "enable_fp_fusion": False, **launched(x.device),
    }
    return Launch(kernels.group_norm, (groups, how.parts, batch), (float(top), eps, batch), options)
