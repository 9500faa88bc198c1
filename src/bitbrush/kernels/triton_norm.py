"""Launches the kernels that join a norm, a GELU or a GEGLU with the encode of what follows it.

**LayerNorm** goes once over memory: a program holds whole rows. **GroupNorm** needs two kernels, for a group of a large
picture is more than a program holds: sums of chunks of the pixels, then a second pass that merges them (a few thousand
numbers a program) and applies. SDXL's pictures lie in the second-level cache when they are read again. Small pictures
take one kernel (`triton_norm_small`).

Importing this module does not import Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import triton_norm_small
from bitbrush.kernels.launching import Launch
from bitbrush.kernels.triton_encode import CHUNK, CHUNKS, WARPS, border_lines, segment_places
from bitbrush.kernels.triton_int8 import Frame, early, launched, overlaps, processors
from bitbrush.numbers import packing

MOST_CHUNKS = 64
"""Of a sample: what every program of the second pass merges."""
VECTOR = 8
PIECE = 32 * VECTOR
"""Channels that a warp reads at once: 16 bytes a thread of bfloat16."""
SUM_WARPS, SUM_DEEP, SUM_COLUMNS = 4, 8, 256
"""Of a program that sums: its threads ask for 8 times 16 bytes each before they wait, 15 kB together. Carrying sums
from warp to warp takes longer the more there are: a small picture takes 8.9 us with 8 warps, 7.4 with 4 (H200)."""
SUM_PROGRAMS, SUM_REGISTERS = 2, 80
"""For each processor: 30 kB asked for at once, and room for programs of the second pass beside them. Four programs take
as long for pictures of 128 x 128, and 0.7 to 1.2 us longer for those of 64 x 64 (of 14 to 23; H200)."""
PAIRED = True
"""Whether the second pass of a GroupNorm is launched while the first one runs; it reads the picture and its tables, and
waits for the sums then."""
COLUMNS, ROWS = 64, 128
"""Of a step of the second pass: 128 bytes of a bfloat16 pixel, 16 channels a thread; as many rows as registers hold:
what a program does first, merging the sums, takes as long as 64 of them."""
PROGRAMS, APPLY_REGISTERS = 3, 160
"""For each processor at most in the second pass: as many as its registers hold, so that none waits for another."""
REGISTERS = 96
"""Of a thread that holds a row's numbers, its weight and its bias: 20 warps a processor."""


def power(n: int) -> int:
    """The power of two at or above ``n``."""
    return 1 << max(0, n - 1).bit_length()


def row_cut(channels: int, several: bool = False) -> tuple[int, int, int, int]:
    """How whole rows are held: (channels of a thread's load, warps, pieces of a row, a power of two of rows).

    A piece has that many channels for every thread of the warps, so that all of a program's threads lie along a row,
    and a warp alone sums it without waiting for others. A thread has at most about 48 numbers. Where half a load leaves
    fewer threads idle at a row's end, it is taken: 640 channels are 5 pieces of 128, not 3 of 256.

    several: For layers of several sums a program has four rows: what is read for a column serves all of them.
    """
    if several:
        warps = min(16, power(-(-channels // (3 * PIECE // 2))))
        return VECTOR // 2, warps, -(-channels // (warps * PIECE // 2)), 4
    warps = min(16, power(-(-channels // (5 * PIECE))))
    vector = min((VECTOR, VECTOR // 2), key=lambda n: -(-channels // (32 * n * warps)) * n)
    many = -(-channels // (warps * 32 * vector))
    return vector, warps, many, 1 << (max(1, 48 // (many * vector)).bit_length() - 1)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    tables: tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], ...], tops: tuple[int, ...],
    modulation: tuple[Tensor, Tensor] | None = None, counts: tuple[int, ...] = (), places: Tensor | None = None,
) -> Tensor:
    """int8 codes less 128 ``[P * R, padded(C)]`` of ``x [R, C]``, contiguous.

    Args:
        tables: (inverse, zero_point, times, factor or None) of each of the P consumers.
        modulation: scale and shift ``[B, C]`` of samples of R / B rows each, of one stride, rows contiguous.
        counts: Channels of each sum, the same for all consumers; nothing stands for one sum of all.
        places: `sums.places`, where sums are over groups.
    """
    rows, channels = x.shape
    factors, counts = tuple(f is not None for *_, f in tables), counts or (channels,)
    samples = None if modulation is None else (len(modulation[0]), modulation[0].stride(0))
    key = (x.shape, weight is None, bias is None, samples, eps, tops, factors, counts, places is None, x.device,
           early(x.device))  # fmt: skip
    launch = _LAYER_NORMS.get(key)
    if launch is None:
        launch = _LAYER_NORMS[key] = _cut_rows(x, weight is not None, bias is not None, samples, eps, tops, factors,
                                               counts, places is not None)
    out = torch.empty((len(tops) * rows, sum(packing.padded(counts))), dtype=torch.int8, device=x.device)
    if not out.numel():
        return out
    given = tuple([(i, z, t, x if f is None else f) for i, z, t, f in tables])
    alone = (x, x if weight is None else weight, x if bias is None else bias, *(modulation or (x, x)),
             x if places is None else places, out)  # fmt: skip
    launch((*alone, *[t for table in given for t in table]), (*alone, given))
    return out


_LAYER_NORMS: dict[Any, Launch] = {}


def _cut_rows(
    x: Tensor, weight: bool, bias: bool, samples: tuple[int, int] | None, eps: float, tops: tuple[int, ...],
    factors: tuple[bool, ...], counts: tuple[int, ...], listed: bool,
) -> Launch:
    """samples: how many are modulated, and how far their scales lie apart. listed: whether a list says which channels
    the sums are over."""
    from bitbrush.kernels import triton_norm_kernels as kernels

    rows, channels = x.shape
    vector, warps, parts, height = row_cut(packing.padded((channels,))[0], several=len(counts) > 1)
    count, stride = samples or (1, 0)
    per_sample = max(1, rows // count)
    while samples and per_sample % height:  # a program's rows have one scale and shift
        height //= 2
    options = {
        "TOPS": tops, "CHANNELS": channels, "LENGTH": sum(packing.padded(counts)), "WEIGHT": weight, "BIAS": bias,
        "MODULATED": samples is not None, "FACTORS": factors, "COUNT": len(counts),
        "PLACES": () if listed or len(counts) == 1 else segment_places(counts), "PARTS": parts, "BR": height,
        "INNER": 32 * warps * vector, "VECTOR": vector, "num_warps": warps, "maxnreg": REGISTERS,
        "enable_fp_fusion": False, **launched(x.device),
    }
    return Launch(kernels.layer_norm, (-(-rows // height),), (eps, rows, per_sample, stride), options)


def sum_block(groups: int, size: int) -> tuple[int, int]:
    """(groups, columns) of a program that sums: whole groups, few columns idle, rows that begin at 16 bytes.

    The last program of a row may have fewer groups.
    """
    found = [n for n in range(1, groups + 1) if n == 1 or power(n * size) <= SUM_COLUMNS]
    n = min(found, key=lambda n: (n < groups and n * size % VECTOR != 0, -(-groups // n) * power(n * size), n))
    return n, power(n * size)


def paired(device: torch.device) -> bool:
    """Whether the second pass is launched while the first one runs: on GPUs that can, by drivers that keep it so in a
    CUDA graph (12.3)."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return PAIRED and overlaps(device) and driver is not None and driver() >= 12030


def group_sums(x: Tensor, groups: int) -> tuple[Tensor, Tensor, int]:
    """(mean, sum of squares about it, pixels) of chunks of each sample's pixels: float32 ``[B, chunks, groups]`` twice.

    Args:
        x: ``[B, C, H, W]``, channels last.
    """
    key = (x.shape, groups, x.device, early(x.device))
    known = _SUMS.get(key)
    if known is None:
        known = _SUMS[key] = _cut_sums(x, groups)
    launch, chunks, chunk = known
    mean, square = torch.empty((2, x.shape[0], chunks, groups), dtype=torch.float32, device=x.device)
    launch((x, mean, square))
    return mean, square, chunk


_SUMS: dict[Any, tuple[Launch, int, int]] = {}


def _cut_sums(x: Tensor, groups: int) -> tuple[Launch, int, int]:
    """The launch, and how many chunks of how many pixels there are."""
    from bitbrush.kernels import triton_norm_kernels as kernels

    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    size = channels // groups
    block, columns = sum_block(groups, size)
    lanes, blocks = max(1, SUM_WARPS * PIECE // columns), -(-groups // block)
    deep = max(1, min(SUM_DEEP, SUM_DEEP * SUM_WARPS * PIECE // (lanes * columns), -(-pixels // lanes)))
    deep, step = power(deep), lanes * power(deep)
    wanted = max(1, min(MOST_CHUNKS, SUM_PROGRAMS * processors(x.device) // (batch * blocks)))
    chunk = -(-pixels // wanted)
    chunk = -(-chunk // step) * step
    chunks = -(-pixels // chunk)
    options = {
        "CHANNELS": channels, "SIZE": size, "GROUPS": groups, "BLOCK": block, "BG": power(block), "BC": columns,
        "LANES": lanes, "DEEP": deep, "EVEN": pixels % step == 0, "PAIRED": paired(x.device), "num_warps": SUM_WARPS,
        "maxnreg": SUM_REGISTERS, "enable_fp_fusion": False, **launched(x.device),
    }
    return Launch(kernels.group_sums, (blocks, chunks, batch), (pixels, chunk, chunks), options), chunks, chunk


def column_blocks(counts: tuple[int, ...]) -> tuple[tuple[tuple[int, int, int, int, int], ...], int]:
    """(first block, first column, first channel, end of the channels, end of the columns) of each segment, and how many
    blocks of `COLUMNS` there are."""
    found, block, column, channel = [], 0, 0, 0
    for count, width in zip(counts, packing.padded(counts), strict=True):
        found.append((block, column, channel, channel + count, column + width))
        block, column, channel = block - (-width // COLUMNS), column + width, channel + count
    return tuple(found), block


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, inverse: Tensor, zero_point: Tensor,
    times: Tensor, counts: tuple[int, ...], top: int, frame: Frame | None, factor: Tensor | None,
) -> Tensor:
    """int8 codes less 128 of ``x [B, C, H, W]``, channels last: rows of pixels, or a frame of them.

    Args:
        counts: Channels of each segment.
        factor: ``input_scale`` float32 ``[C]``.
    """
    place = frame or Frame(x.shape[0], x.shape[2], x.shape[3])
    out = torch.empty((place.rows, sum(packing.padded(counts))), dtype=torch.int8, device=x.device)
    _normed(x, out, weight, bias, groups, eps, silu, (inverse, zero_point, times), counts, top, frame, factor)
    return out


def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """The norm of ``x [B, C, H, W]``, channels last, in its dtype and order."""
    out = torch.empty_like(x)
    _normed(x, out, weight, bias, groups, eps, silu, None, (x.shape[1],), 0, None, None)
    return out


def _normed(
    x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    tables: tuple[Tensor, Tensor, Tensor] | None, counts: tuple[int, ...], top: int, frame: Frame | None,
    factor: Tensor | None,
) -> None:
    if not out.numel():
        return
    how = triton_norm_small.small(x, groups, counts) if tables is not None else None
    if tables is not None and how is not None:
        triton_norm_small.group_norm(x, out, weight, bias, groups, eps, silu, tables, top, frame, factor, how)
        return
    mean, square, chunk = group_sums(x, groups)
    key = (x.shape, out.shape, groups, eps, silu, tables is None, counts, top, frame, factor is None, mean.shape[1],
           chunk, x.device, early(x.device))  # fmt: skip
    launch = _GROUP_NORMS.get(key)
    if launch is None:
        launch = _GROUP_NORMS[key] = _cut_pictures(x, out, groups, eps, silu, tables is not None, counts, top, frame,
                                                   factor is not None, (mean.shape[1], chunk))  # fmt: skip
    launch((x, mean, square, weight, bias, out, *(tables or (x, x, x)), x if factor is None else factor))


_GROUP_NORMS: dict[Any, Launch] = {}


def _cut_pictures(
    x: Tensor, out: Tensor, groups: int, eps: float, silu: bool, codes: bool, counts: tuple[int, ...], top: int,
    frame: Frame | None, factor: bool, summed: tuple[int, int],
) -> Launch:
    """summed: chunks of the sums, and pixels of one."""
    from bitbrush.kernels import triton_norm_kernels as kernels

    (batch, channels, high, wide), (chunks, chunk) = x.shape, summed
    pixels, place = high * wide, frame or Frame(batch, high, wide)
    size, (blocks, many), follows = channels // groups, column_blocks(counts), paired(x.device)
    below = border_lines(place) * place.pitch
    rows = place.height * place.pitch + below
    programs = max(1, PROGRAMS * processors(x.device) // (batch * many))
    span = max(ROWS, -(-rows // programs // ROWS) * ROWS)
    numbers = (float(top), eps, pixels, chunk, chunks, span, batch, place.pitch, place.height, place.pad, place.high,
               place.wide, below)  # fmt: skip
    options = {
        "BLOCKS": blocks, "CHANNELS": channels, "LENGTH": out.shape[1] if codes else channels, "SIZE": size,
        "GROUPS": groups, "SILU": silu, "FACTOR": factor, "SPATIAL": frame is not None, "CODES": codes,
        "MOST": power(chunks), "BG": power(min(groups, (COLUMNS - 1) // size + 2)), "BC": COLUMNS, "BR": ROWS,
        "PAIRED": follows, "num_warps": WARPS, "maxnreg": APPLY_REGISTERS, "enable_fp_fusion": False,
        **launched(x.device), **({"launch_pdl": True} if follows else {}),
    }
    return Launch(kernels.group_norm, (many, -(-rows // span), batch), numbers, options)


Encoding = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""(inverse, zero_point, times, factor or None)."""


def geglu(
    x: Tensor, tables: Encoding, top: int, counts: tuple[int, ...] = (), places: Tensor | None = None
) -> Tensor:
    """int8 codes less 128 ``[R, padded(C)]`` of ``x [R, 2 C]``, contiguous: ``hidden * gelu(gate)``."""
    return _activated(x, tables, top, counts or (x.shape[1] // 2,), places, gated=True, tanh=False)


def gelu(
    x: Tensor, tanh: bool, tables: Encoding, top: int, counts: tuple[int, ...] = (), places: Tensor | None = None
) -> Tensor:
    """int8 codes less 128 ``[R, padded(C)]`` of ``x [R, C]``, contiguous: ``gelu(x)``, by tanh or by erf."""
    return _activated(x, tables, top, counts or (x.shape[1],), places, gated=False, tanh=tanh)


def _activated(
    x: Tensor, tables: Encoding, top: int, counts: tuple[int, ...], places: Tensor | None, *, gated: bool, tanh: bool
) -> Tensor:
    """counts, places: as `layer_norm` takes them."""
    from bitbrush.kernels import triton_activated_kernels as kernels

    length, factor = sum(packing.padded(counts)), tables[3]
    out = torch.empty((len(x), length), dtype=torch.int8, device=x.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        kernels.activated[(-(-out.numel() // CHUNK // CHUNKS),)](
            x, out, *tables[:3], x if factor is None else factor, x if places is None else places, float(top), len(x),
            CHANNELS=sum(counts), LENGTH=length, GATED=gated, TANH=tanh, FACTOR=factor is not None, COUNT=len(counts),
            PLACES=segment_places(counts) if places is None else (), CHUNKS=CHUNKS,
            num_warps=WARPS, enable_fp_fusion=False, **launched(x.device),
        )
    return out
