"""The Triton code of `bitbrush.kernels.triton_norm_small`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_encode_kernels import centred, in_turn, zero_and_top
from bitbrush.kernels.triton_norm_kernels import rounded, silu


@triton.jit
def _moments(held, at, working, part, PIXELS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr):
    """(mean, sum of squares about it) of a group, of all its numbers ``held`` in tiles ``[LANES, VECTOR]``.

    Sums of a place of the tiles are of differences to its first number. So no more than a factor ``1 + tiles`` of
    float32's precision is lost: the first numbers' squares about the mean are at most all there are, and each counts
    once a tile. Only the picture's last tile may have pixels that are none.
    """
    TILES: tl.constexpr = len(held)
    last = (TILES - 1) * STEP + at < PIXELS  # places that the last tile has, too
    start = held[0].to(tl.float32)
    if TILES > 1:
        start = tl.where((last | (part * OWN != TILES - 1))[:, None], start, held[1].to(tl.float32))
    total = tl.zeros(start.shape, dtype=tl.float32)
    square = tl.zeros(start.shape, dtype=tl.float32)
    for t in tl.static_range(TILES):
        v = held[t].to(tl.float32) - start
        if PIXELS % STEP != 0 and (TILES - 1 - t) % OWN == 0:
            v = tl.where((last | ((t + part * OWN) % TILES != TILES - 1))[:, None], v, 0.0)
        total += v
        square = tl.fma(v, v, square)
    many = tl.where(working, tl.where(last, TILES, TILES - 1), 0).to(tl.float32)[:, None]
    mean = tl.div_rn(tl.sum(tl.sum(tl.fma(many, start, total), 1), 0), PIXELS * SIZE * 1.0)
    apart = mean - start
    square += apart * tl.fma(many, apart, -2.0 * total)
    return mean, tl.maximum(tl.sum(tl.sum(square, 1), 0), 0.0)


@triton.jit
def _border(
    out_ptr, nothing, at, working, part, rows, HIGH: tl.constexpr, WIDE: tl.constexpr, PITCH: tl.constexpr,
    PAD: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
):
    """Fills what is no pixel in a part of the first ``rows`` rows of a sample's frame.

    Args:
        out_ptr: ``[LANES, VECTOR]``, of the frame's first row.
    """
    for turn in range(part, tl.cdiv(rows, STEP), SPLIT):
        row = turn * STEP + at
        y, x = row // PITCH - PAD, row % PITCH - PAD
        border = working & (row < rows) & ((y < 0) | (y >= HIGH) | (x < 0) | (x >= WIDE))
        tl.store(out_ptr + row.to(tl.int64)[:, None] * LENGTH, tl.zeros(out_ptr.shape, dtype=tl.int8) + nothing,
                 mask=border[:, None])


@triton.jit(do_not_specialize=("samples",))
def group_norm(
    x_ptr, weight_ptr, bias_ptr, out_ptr, inverse_ptr, zero_ptr, times_ptr, factor_ptr, top, eps, samples,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, HEIGHT: tl.constexpr,
    PITCH: tl.constexpr, PAD: tl.constexpr, BELOW: tl.constexpr, SILU: tl.constexpr, FACTOR: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, OWN: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes less 128 of a group of a sample: each of SPLIT programs reads all of it and writes its own tiles.

    A thread has VECTOR channels, the same in every tile; SIZE / VECTOR threads have a pixel's, so that few of LANES
    have no place. A program asks for all tiles before it waits, its own first: so each is brought from memory by one
    program, and the others find it in the cache. Borders are written while the tiles are under way.
    """
    in_turn(EARLY)
    UNIT: tl.constexpr = SIZE // VECTOR
    STEP: tl.constexpr = LANES // UNIT  # pixels of a tile
    PIXELS: tl.constexpr = HIGH * WIDE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    group, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, LANES)
    at = lane // UNIT
    working = at < STEP
    channel = group * SIZE + (lane % UNIT)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    x_ptr += sample * (PIXELS * CHANNELS) + channel
    out_ptr += sample * (HEIGHT * PITCH * CHANNELS) + channel
    held = tl.tuple([])
    for t in tl.static_range(TILES):
        pixel = (t + part * OWN) % TILES * STEP + at
        held += (tl.load(x_ptr + pixel[:, None] * CHANNELS, mask=(working & (pixel < PIXELS))[:, None], other=0.0),)
    time = tl.load(times_ptr)
    weight = tl.load(weight_ptr + channel, mask=working[:, None], other=0.0)
    bias = tl.load(bias_ptr + channel, mask=working[:, None], other=0.0)
    tl.debug_barrier()  # so that loads stay before what waits for one
    inverse = tl.load(inverse_ptr + time)
    zero, top = zero_and_top(zero_ptr, time, top)
    if HEIGHT * PITCH != PIXELS or BELOW:
        rows = HEIGHT * PITCH + tl.where(tl.program_id(2) == samples - 1, BELOW, 0)
        _border(out_ptr, centred(0.0, inverse, zero, top), at, working, part, rows, HIGH, WIDE, PITCH, PAD, CHANNELS,
                STEP, SPLIT)
    mean, square = _moments(held, at, working, part, PIXELS, SIZE, STEP, OWN)
    slope = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, PIXELS * SIZE * 1.0) + eps)) * weight.to(tl.float32)
    shift = bias.to(tl.float32) - mean * slope
    for t in tl.static_range(OWN):
        pixel = (t + part * OWN) * STEP + at  # past the last tile for a part that has fewer
        v = rounded(tl.fma(held[t].to(tl.float32), slope, shift), dtype)
        if SILU:
            v = rounded(silu(v), dtype)
        if FACTOR:
            v = v * tl.load(factor_ptr + channel, mask=working[:, None], other=0.0)
        row = (pixel // WIDE + PAD) * PITCH + pixel % WIDE + PAD
        tl.store(out_ptr + row[:, None] * CHANNELS, centred(v, inverse, zero, top),
                 mask=(working & (pixel < PIXELS))[:, None])
