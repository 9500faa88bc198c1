"""Launches the int8 products in Gluon, whose copies and multiplications are both in flight all the time.

Triton's own pipeliner waits for the products of a step before those of the next begin, where sums are int32. Written
out (`gluon_ring_kernels`) they follow each other without a gap: at ten shapes of SDXL and of a DiT on an H200 linear
layers took 0.71 to 0.96 of the time (benchmarks/results/spike/gluon_product.json).

They take what `triton_int8` takes, but for convolutions with a stride, and several segments in large tiles. Segments
end where they end: of a slot, that part is multiplied which belongs to one (`gluon_ring_kernels.multiplied_ragged`),
and the warpgroups are half a segment apart, as to scale sums takes as long as to multiply 160 columns. They are
cut by a `Config` with a `flow`: ``pair``, two warpgroups share a tile, or ``turns``, each has tiles of its own.

Hopper's instructions, and Gluon is experimental: other GPUs, and versions of Triton that they were not built with, take
Triton's products (`able`). Importing this module does not import Triton.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bitbrush.kernels.launching import Described, Launch

if TYPE_CHECKING:
    from bitbrush.kernels.triton_int8 import Config

PAIR, TURNS = "pair", "turns"
VERSIONS = ((3, 6), (3, 7))
"""Of Triton, whose Gluon may be another one with each."""
MOST_STAGES = 8
ROWS = {128: 1.0, 64: 1.1, 32: 2.0}
"""What a byte costs in copied rows of so many, as reckoned from two layouts of eight segments on an H200."""
WARPGROUPS = 2
OF_PARTS = ("WIDTH", "KH", "KW", "SPATIAL", "STAGES", "BMC", "BN1", "BN2", "BK", "GROUP", "num_warps",
            "enable_fp_fusion")  # fmt: skip
"""Of all options those that a product whose sums are split has, too."""


class Shape(NamedTuple):
    """How a flow's tile lies in its program.

    Args:
        rows: Of a consumer.
        first, others: Columns of one instruction, and those beyond its power of two.
        chunk: Columns that are written at a time.
    """

    rows: int
    first: int
    others: int
    chunk: int


@cache
def able(device: torch.device) -> bool:
    """Whether products may be cut so on a device: a Hopper GPU, a Triton whose Gluon they were written in, and no
    ``BITBRUSH_FLOWS=0``."""
    if os.environ.get("BITBRUSH_FLOWS") == "0" or device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and _triton() in VERSIONS


def _triton() -> tuple[int, ...]:
    try:
        import triton
    except ImportError:
        return ()
    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


def shape(bm: int, bn: int, flow: str, *, gated: bool = False, added: bool = False) -> Shape:
    """Of a tile of ``bm`` rows and ``bn`` columns.

    Args:
        gated: Half of the columns are gates.
        added: A residual or a row a sample is: with 128 rows, 64 columns of it at a time do not fit into registers.
    """
    rows = bm // (WARPGROUPS if flow == PAIR else 1)
    chunk = 32 if rows > 64 and (gated or added) else 64
    if gated:
        return Shape(rows, bn // 2, bn // 2, min(bn // 2, chunk))
    first = 1 << (bn.bit_length() - 1)
    return Shape(rows, first, bn - first, chunk)


def fits(flow: str, bm: int, bn: int, segments: int, gated: bool) -> bool:
    """Whether sums, and of several segments their values beside them, have room in registers, and columns are ones
    that instructions know."""
    found = shape(bm, bn, flow, gated=gated)
    if gated:
        return found.first & (found.first - 1) == 0
    if segments > 1:
        return flow == PAIR and found.rows * (found.first + found.others) <= 64 * 160
    return True


def product(a: Tensor, w: Tensor, config: Config, numbers: tuple[Any, ...], tiles: int, options: dict[str, Any],
            processors: int) -> tuple[Launch, tuple[tuple[int, Described], ...]]:
    """What launches a product, and what describes its operands.

    Args:
        config: With a flow.
        numbers: As the kernel takes them.
        tiles: Of the output; where sums are split, parts of them.
        options: Constants that say what is computed; those that say how are added here.
    """
    from bitbrush.kernels import gluon_int8_kernels as kernels

    how = shape(config.bm, config.bn, config.flow, added=options["RESIDUAL"] or options["SHARED"] > 0)
    own = {"CH1": min(how.first, how.chunk), "CH2": min(how.others, how.chunk) or min(how.first, how.chunk)}
    kernel, every = kernels.product, {**options, **own, **_how(config, how)}
    if every.pop("SPLIT_K") > 1:
        kernel = kernels.split_product
        every = {name: every[name] for name in OF_PARTS} | {"SPLIT_K": config.split_k}
    grid = (min(tiles, processors),)
    return Launch(kernel, grid, numbers, every), _described(a, w, config, how)


def gated(a: Tensor, w: Tensor, config: Config, numbers: tuple[Any, ...], tiles: int, options: dict[str, Any],
          processors: int) -> tuple[Launch, tuple[tuple[int, Described], ...]]:
    """As `product`, of a gated one."""
    from bitbrush.kernels import gluon_gated_kernels as kernels

    how = shape(config.bm, config.bn, config.flow, gated=True)
    grid = (min(tiles, processors),)
    return (Launch(kernels.gated, grid, numbers, {**options, "CH1": how.chunk, **_how(config, how)}),
            _described(a, w, config, how))  # fmt: skip


def _how(config: Config, how: Shape) -> dict[str, Any]:
    return {
        "STAGES": config.stages, "TURNS": config.flow == TURNS, "BMC": how.rows, "BN1": how.first, "BN2": how.others,
        "BK": config.bk, "GROUP": config.group, "num_warps": 4, "enable_fp_fusion": False,
    }


def _described(a: Tensor, w: Tensor, config: Config, how: Shape) -> tuple[tuple[int, Described], ...]:
    """(which operand, its description) of codes, of the first columns' weights, of the others'."""
    if not a.numel() or not w.numel():
        return ()
    blocks = ((0, a, how.rows), (1, w, how.first), (1, w, how.others or how.first))
    return tuple((i, Described(tensor, [rows, config.bk], swizzled=True)) for i, tensor, rows in blocks)


def block(most: int, widths: tuple[int, ...]) -> int:
    """Columns of a slot where there are several segments, which may end within one: what fetches least. Rows of fewer
    bytes than 128 cost a little more, those of 32, half of what the second level of the cache gives at once, twice."""
    costs = {bk: sum(-(-width // bk) * bk for width in widths) * weight
             for bk, weight in ROWS.items() if bk <= most}  # fmt: skip
    return min(costs, key=costs.__getitem__)


def fitted(config: Config, bk: int) -> Config:
    """The config with blocks of ``bk`` columns; of narrower ones more are on their way."""
    return replace(config, bk=bk, stages=max(config.stages, min(config.stages * config.bk // bk, MOST_STAGES)))
