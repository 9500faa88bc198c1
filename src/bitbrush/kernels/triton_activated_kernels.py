"""The Triton code of GELU and GEGLU with the encode (`bitbrush.kernels.triton_norm`). Importing this module imports
Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitbrush.kernels.triton_encode_kernels import centred, chunk_at, in_turn, zero_and_top
from bitbrush.kernels.triton_norm_kernels import gelu, gelu_tanh, rounded


@triton.jit(do_not_specialize=("rows",))
def activated(
    x_ptr, out_ptr, inverse_ptr, zero_ptr, times_ptr, factor_ptr, places_ptr, top, rows,
    CHANNELS: tl.constexpr, LENGTH: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr, FACTOR: tl.constexpr,
    COUNT: tl.constexpr, PLACES: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr,
):
    """``code - 128`` int8 of ``gelu(x)``, GATED: of ``hidden * gelu(gate)``: CHUNKS times 16 channels, counted as in
    `encode`. TANH: gelu by tanh, not by erf. COUNT, PLACES: as in `encode`."""
    in_turn(EARLY)
    PER_ROW: tl.constexpr = LENGTH // 16
    PITCH: tl.constexpr = 2 * CHANNELS if GATED else CHANNELS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    row, first = chunk // PER_ROW, (chunk % PER_ROW) * 16
    column, kept = first[:, None] + tl.arange(0, 16)[None, :], (row < rows)[:, None]
    channel, real, segment = chunk_at(places_ptr, first, column, PLACES, CHANNELS)
    real = kept & real
    at = x_ptr + row.to(tl.int64)[:, None] * PITCH + channel
    hidden = tl.load(at, mask=real, other=0.0).to(tl.float32)
    gate = hidden
    if GATED:
        gate = tl.load(at + CHANNELS, mask=real, other=0.0).to(tl.float32)
    entry = tl.load(times_ptr)
    if COUNT > 1:
        entry = (entry * COUNT + segment)[:, None]
    inverse = tl.load(inverse_ptr + entry)
    zero, top = zero_and_top(zero_ptr, entry, top)
    y = rounded(gelu_tanh(gate) if TANH else gelu(gate), dtype)
    if GATED:
        y = rounded(hidden * y, dtype)
    if FACTOR:
        y = y * tl.load(factor_ptr + channel, mask=real, other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * LENGTH + column, centred(y, inverse, zero, top), mask=kept)
