"""The Triton code of `bitbrush.kernels.triton_encode`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def in_turn(EARLY: tl.constexpr):
    """With EARLY the kernel was launched before the one ahead of it ended: wait for that, let the next one launch."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def centred(x, inverse, zero, top):
    """``code - 128`` int8 of float32 ``x``: ``clamp(round(x * inverse) + zero, 0, top) - 128``, half to even.

    Adding 1.5 * 2**23 rounds what is below 2**22, and leaves the integer in the low bits of the mantissa; what is
    larger is clamped either way (`numbers.codec.encode_bytes` does the same). Instructions that round or convert run at
    an eighth of the rate of additions, and an encode has to keep up with the memory. The sum must not be contracted
    with the product. NaN has no code; it gives that of 0.
    """
    middle = 12582912.0 - zero
    shifted = tl.minimum(tl.maximum(x * inverse + 12582912.0, middle), middle + top)
    return (shifted.to(tl.int32, bitcast=True) + (zero.to(tl.int32) - 128)).to(tl.int8)


@triton.jit
def zero_and_top(zero_ptr, entry, top):
    """(zero-point, largest code) of an entry of a table, float32: a table of int32 holds both (`int8_ops.with_tops`),
    others the zero-point, and ``top`` is the largest code of all."""
    found = tl.load(zero_ptr + entry)
    if zero_ptr.dtype.element_ty == tl.int32:
        return (found & 255).to(tl.float32), (found >> 8).to(tl.float32)
    else:
        return found.to(tl.float32), top


@triton.jit(do_not_specialize=("rows",))
def encode_each(
    x_ptr, out_ptr, factor_ptr, inverse_ptr, zero_ptr, times_ptr, top, rows, table_rows,
    CHANNELS: tl.constexpr, LENGTH: tl.constexpr, OWN: tl.constexpr, FACTOR: tl.constexpr, CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``code - 128`` int8 of one input for several layers, or with OWN of an input each, which lie one below the other,
    as codes do. Each has a table of ``table_rows`` rows and factors of its own."""
    in_turn(EARLY)
    PER_ROW: tl.constexpr = LENGTH // 16
    layer = tl.program_id(1)
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    row, column = chunk // PER_ROW, ((chunk % PER_ROW) * 16)[:, None] + tl.arange(0, 16)[None, :]
    kept = (row < rows)[:, None]
    real = kept & (column < CHANNELS)
    source = row.to(tl.int64)
    if OWN:
        source += layer.to(tl.int64) * rows
    x = tl.load(x_ptr + source[:, None] * CHANNELS + column, mask=real, other=0.0).to(tl.float32)
    entry = tl.load(times_ptr) + layer * table_rows
    inverse = tl.load(inverse_ptr + entry)
    zero, top = zero_and_top(zero_ptr, entry, top)
    if FACTOR:
        x = x * tl.load(factor_ptr + layer * CHANNELS + column, mask=real, other=0.0)
    where = (layer.to(tl.int64) * rows + row)[:, None] * LENGTH + column
    tl.store(out_ptr + where, centred(x, inverse, zero, top), mask=kept)


@triton.jit
def segment_at(column, PLACES: tl.constexpr):
    """Of columns of the output: (segment, columns of padding before it, end of its channels in the input).

    PLACES: (where it begins in the output, padding before it, end of its channels in the input) of each segment.
    """
    segment = column * 0
    shift = column * 0 + PLACES[0][1]
    end = column * 0 + PLACES[0][2]
    for s in tl.static_range(1, len(PLACES)):
        here = column >= PLACES[s][0]
        segment = tl.where(here, s, segment)
        shift = tl.where(here, PLACES[s][1], shift)
        end = tl.where(here, PLACES[s][2], end)
    return segment, shift, end


@triton.jit
def chunk_at(places_ptr, column, within, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    """(channel, whether it is no padding, segment) of chunks of 16 columns, all of one segment: the first of each, and
    all ``within``. Without PLACES a table lists ``channel * 256 + segment`` of each column of the output: so layers
    whose groups have other sizes share a build."""
    if len(PLACES) > 0:
        segment, shift, end = segment_at(column, PLACES)
        channel = within - shift[:, None]
        return channel, channel < end[:, None], segment
    else:
        segment = tl.load(places_ptr + column) & 255
        channel = tl.load(places_ptr + within) >> 8
        return channel, channel < CHANNELS, segment


@triton.jit(do_not_specialize=("rows", "samples", "per_sample", "pitch", "height", "pad", "high", "wide"))
def encode(
    x_ptr, out_ptr, factor_ptr, inverse_ptr, zero_ptr, times_ptr, places_ptr, top, rows, samples, per_sample, pitch,
    height, pad, high, wide,
    PLACES: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, TABLE: tl.constexpr,
    SPATIAL: tl.constexpr, TIMES: tl.constexpr, FACTOR: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr,
):
    """``code - 128`` int8 of CHUNKS times 16 channels; padding holds the zero-point's code. With SPATIAL a pixel of the
    input is one of the frame's, or TIMES in both directions. PLACES: see `chunk_at`.

    Programs count chunks of the rows, or with SPATIAL (chunks of a line of the frame, its lines, samples): so no row is
    divided by anything that is not known here. The input is asked for first, then the tables, whose address waits for
    the row of them that counts.
    """
    in_turn(EARLY)
    PER_ROW: tl.constexpr = LENGTH // 16
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    at, column = chunk // PER_ROW, (chunk % PER_ROW) * 16
    within = column[:, None] + tl.arange(0, 16)[None, :]
    channel, real, segment = chunk_at(places_ptr, column, within, PLACES, CHANNELS)
    if SPATIAL:
        sample, y, x = tl.program_id(2), tl.program_id(1), at - pad
        inside = (x >= 0) & (x < wide) & (y >= pad) & (y < pad + high)
        row = (sample * height + y) * pitch + at
        kept = (at < pitch) & ((y < height) | (sample == samples - 1))
        source = (sample * (high // TIMES) + (y - pad) // TIMES) * (wide // TIMES) + x // TIMES
    else:
        row, source = at, at
        kept = row < rows
        inside = kept
        sample = row // per_sample if TABLE == 1 else 0
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * CHANNELS + channel, mask=inside[:, None] & real, other=0.0)
    x = x.to(tl.float32)
    if TABLE == 1:
        time = tl.load(times_ptr + tl.minimum(sample, samples - 1))
    elif TABLE == 2:
        time = tl.where(inside, source, 0).to(tl.int64)
    else:
        time = tl.load(times_ptr)
    if COUNT > 1 or (TABLE == 2 or (TABLE == 1 and not SPATIAL)):
        entry = (time * COUNT + segment).to(tl.int64)
        inverse = tl.load(inverse_ptr + entry)[:, None]
        zero, top = zero_and_top(zero_ptr, entry[:, None], top)
    else:
        inverse = tl.load(inverse_ptr + time)
        zero, top = zero_and_top(zero_ptr, time, top)
    if FACTOR:
        x = x * tl.load(factor_ptr + channel, mask=real, other=0.0)
    where = row.to(tl.int64)[:, None] * LENGTH + within
    tl.store(out_ptr + where, centred(x, inverse, zero, top), mask=kept[:, None])
