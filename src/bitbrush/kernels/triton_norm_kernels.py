"""The Triton code of `bitbrush.kernels.triton_norm`. Importing this module imports Triton.

Parameters have no annotations but Triton's own: it takes every other one for a global variable that the kernel reads.
Sums are float32; divisions are exact where a quotient is a number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bitbrush.kernels.triton_encode_kernels import centred, in_turn, segment_at, zero_and_top

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether there is no assembler: what is written in PTX below has a plain form beside it."""


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """float32 ``v`` after one rounding to the compute dtype. Two at a time: a single one to bfloat16 takes 8 times as
    long as an addition."""
    if dtype == tl.float32:
        return v
    elif dtype == tl.float16:
        return v.to(dtype).to(tl.float32)
    elif _INTERPRETED:  # whose conversion cuts off
        bits = v.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=f,=f,f,f", [v], tl.float32, True, 2,
        )


@triton.jit
def _power_of_two(v):
    if _INTERPRETED:
        return tl.exp2(v)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)


@triton.jit
def _reciprocal(v):
    if _INTERPRETED:
        return 1.0 / v
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)


@triton.jit
def silu(v):
    """``v / (1 + exp(-v))`` of float32, to about 2**-21."""
    return v * _reciprocal(1.0 + _power_of_two(v * -1.4426950408889634))


@triton.jit
def gelu(v):
    """``v * (1 + erf(v / sqrt(2))) / 2`` of float32, within 1.5e-7 ``|v|``: Abramowitz and Stegun 7.1.26, whose sum is
    the smaller one of both tails, so nothing cancels."""
    t = _reciprocal(tl.fma(tl.abs(v), 0.23164188, 1.0))
    tail = tl.fma(t, 0.5307027145, -0.7265760135)
    tail = tl.fma(t, tail, 0.7107068705)
    tail = tl.fma(t, tail, -0.142248368)
    tail = tl.fma(t, tail, 0.127414796) * t * _power_of_two(v * v * -0.7213475204444817)
    return v * tl.where(v < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_tanh(v):
    """``v * (1 + tanh(u)) / 2`` of float32 with ``u = sqrt(2 / pi) * (v + 0.044715 v ** 3)``, as ``v`` times the
    logistic function of ``2 u``, in which nothing cancels; to about 2**-21."""
    u = v * tl.fma(v * v, 0.044715, 1.0)
    return v * _reciprocal(1.0 + _power_of_two(u * -2.302208198144325))


@triton.jit
def _share(total, COUNT: tl.constexpr):
    """``total / COUNT`` of float32, exact where the quotient is a number; an IEEE division would branch."""
    first = total * (1.0 / COUNT)
    return tl.fma(tl.fma(first, -1.0 * COUNT, total), 1.0 / COUNT, first)


# ---- LayerNorm -------------------------------------------------------------------------------------------------------
@triton.jit
def _affine(
    x, weight, bias, scale, shift, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr,
    dtype: tl.constexpr,
):
    """What follows the division by the deviation, rounded to ``dtype`` where separate operations round."""
    if WEIGHT and BIAS:
        x = tl.fma(x, weight.to(tl.float32), bias.to(tl.float32))
    elif WEIGHT:
        x = x * weight.to(tl.float32)
    elif BIAS:
        x = x + bias.to(tl.float32)
    x = rounded(x, dtype)
    if MODULATED:
        x = rounded(x * rounded(scale.to(tl.float32) + 1.0, dtype), dtype)
        x = rounded(x + shift.to(tl.float32), dtype)
    return x


@triton.jit
def sorted_at(places_ptr, column, PLACES: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr):
    """(channel, sum, whether it is no padding) of columns of the codes: those of segments lie side by side (PLACES), of
    groups a table lists ``channel * 256 + sum``."""
    if len(PLACES) > 0:
        part, shift, end = segment_at(column, PLACES)
        if PLACES[len(PLACES) - 1][1] == 0:  # without padding, so that loads are wide
            return column, part, column < LENGTH
        else:
            return column - shift, part, (column - shift < end) & (column < LENGTH)
    else:
        found = tl.load(places_ptr + column, mask=column < LENGTH, other=CHANNELS * 256)
        return found >> 8, found & 255, (found >> 8) < CHANNELS


@triton.jit
def _sorted_codes(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, places_ptr, out_ptr, tables, steps, where, kept, mean, rate,
    column, rows,
    TOPS: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    MODULATED: tl.constexpr, FACTORS: tl.constexpr, COUNT: tl.constexpr, PLACES: tl.constexpr,
):
    """Writes columns of codes sum by sum: their channels may lie anywhere in a row, and are read again, from the first
    level of the cache."""
    channel, part, real = sorted_at(places_ptr, column, PLACES, CHANNELS, LENGTH)
    x = (tl.load(x_ptr + where * CHANNELS + channel, mask=kept & real, other=0.0).to(tl.float32) - mean) * rate
    weight, bias, scale, shift = x, x, x, x
    if WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=real, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=real, other=0.0)
    if MODULATED:
        scale = tl.load(scale_ptr + channel, mask=real, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=real, other=0.0)
    x = _affine(x, weight, bias, scale, shift, WEIGHT, BIAS, MODULATED, x_ptr.dtype.element_ty)
    x = tl.where(real, x, 0.0)
    for p in tl.static_range(len(TOPS)):
        entry = steps[p] * COUNT + part
        zero, top = zero_and_top(tables[p][1], entry, TOPS[p] + 0.0)
        y = x
        if FACTORS[p]:
            y = x * tl.load(tables[p][3] + channel, mask=real, other=0.0)
        tl.store(out_ptr + (where + p * rows.to(tl.int64)) * LENGTH + column,
                 centred(y, tl.load(tables[p][0] + entry), zero, top), mask=kept & (column < LENGTH))


@triton.jit(do_not_specialize=("rows",))
def layer_norm(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, places_ptr, out_ptr, tables, eps, rows, per_sample, stride,
    TOPS: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    MODULATED: tl.constexpr, FACTORS: tl.constexpr, COUNT: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr,
    BR: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr, EARLY: tl.constexpr,
):
    """BR whole rows in registers; their codes for each consumer, whose rows lie below those of the one before.

    Rows are PARTS pieces of INNER channels, VECTOR for each thread. All that is read is asked for before anything
    waits: first what belongs to columns, which serves all rows of a thread.

    COUNT: of sums; of several, codes are made in their order, from a second look at the row (`_sorted_codes`).

    Args:
        scale_ptr, shift_ptr: MODULATED: a row of each sample, ``stride`` apart. A sample has ``per_sample`` rows of
            ``x``; those of a program belong to one sample.
        tables: (inverse, zero_point, times, factor) of each consumer.
    """
    in_turn(EARLY)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inner = tl.max_contiguous(tl.arange(0, INNER), VECTOR)[None, :]
    kept, where = (row < rows)[:, None], row.to(tl.int64)[:, None]
    pieces, weights, biases, steps = tl.tuple([]), tl.tuple([]), tl.tuple([]), tl.tuple([])
    scales, shifts, sample = tl.tuple([]), tl.tuple([]), (tl.program_id(0) * BR // per_sample).to(tl.int64) * stride
    for d in tl.static_range(PARTS):
        column = d * INNER + inner
        if MODULATED and COUNT == 1:
            scales += (tl.load(scale_ptr + sample + column, mask=column < CHANNELS, other=0.0),)
            shifts += (tl.load(shift_ptr + sample + column, mask=column < CHANNELS, other=0.0),)
        if WEIGHT and COUNT == 1:
            weights += (tl.load(weight_ptr + column, mask=column < CHANNELS, other=0.0),)
        if BIAS and COUNT == 1:
            biases += (tl.load(bias_ptr + column, mask=column < CHANNELS, other=0.0),)
    for p in tl.static_range(len(TOPS)):
        steps += (tl.load(tables[p][2]),)
    tl.debug_barrier()  # or the assembler asks for them when the sums are there
    for d in tl.static_range(PARTS):
        column = d * INNER + inner
        pieces += (tl.load(x_ptr + where * CHANNELS + column, mask=kept & (column < CHANNELS), other=0.0),)
    entries = tl.tuple([])
    if COUNT == 1:
        for p in tl.static_range(len(TOPS)):
            zero, top = zero_and_top(tables[p][1], steps[p], TOPS[p] + 0.0)
            entries += (tl.load(tables[p][0] + steps[p]), zero, top)
    total = tl.zeros((BR, INNER), dtype=tl.float32)
    for d in tl.static_range(PARTS):
        total += pieces[d].to(tl.float32)
    mean = _share(tl.sum(total, 1, True), CHANNELS)
    square = tl.zeros((BR, INNER), dtype=tl.float32)
    for d in tl.static_range(PARTS):
        apart = pieces[d].to(tl.float32) - mean
        if (d + 1) * INNER > CHANNELS:
            apart = tl.where(d * INNER + inner < CHANNELS, apart, 0.0)
        square = tl.fma(apart, apart, square)
    rate = tl.rsqrt(_share(tl.sum(square, 1, True), CHANNELS) + eps)
    if COUNT > 1:
        for first in range(0, LENGTH, INNER):
            _sorted_codes(x_ptr, weight_ptr, bias_ptr, scale_ptr + sample, shift_ptr + sample, places_ptr, out_ptr,
                          tables, steps, where, kept, mean, rate, first + inner, rows, TOPS, CHANNELS, LENGTH, WEIGHT,
                          BIAS, MODULATED, FACTORS, COUNT, PLACES)
    for d in tl.static_range(PARTS if COUNT == 1 else 0):
        column, x = d * INNER + inner, (pieces[d].to(tl.float32) - mean) * rate
        x = _affine(x, weights[d] if WEIGHT else x, biases[d] if BIAS else x, scales[d] if MODULATED else x,
                    shifts[d] if MODULATED else x, WEIGHT, BIAS, MODULATED, dtype)
        if (d + 1) * INNER > CHANNELS:
            x = tl.where(column < CHANNELS, x, 0.0)
        for p in tl.static_range(len(TOPS)):
            y = x
            if FACTORS[p]:
                y = x * tl.load(tables[p][3] + column, mask=column < CHANNELS, other=0.0)
            tl.store(out_ptr + (where + p * rows.to(tl.int64)) * LENGTH + column,
                     centred(y, entries[3 * p], entries[3 * p + 1], entries[3 * p + 2]), mask=kept & (column < LENGTH))


# ---- GroupNorm -------------------------------------------------------------------------------------------------------
@triton.jit
def _pixels(
    x_ptr, first, lane, channel, mine, limit, CHANNELS: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """DEEP tiles ``[LANES, BC]`` of pixels from ``first``; EVEN: all of them lie before ``limit``."""
    tiles = tl.tuple([])
    for d in tl.static_range(DEEP):
        place = first + d * LANES + lane
        there = mine[None, :] if EVEN else mine[None, :] & (place < limit)[:, None]
        tiles += (tl.load(x_ptr + place.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask=there, other=0.0),)
    return tiles


@triton.jit
def _summed(tiles, start, total, square, first, lane, limit, LANES: tl.constexpr, EVEN: tl.constexpr):
    """Both sums ``[LANES, BC]``, of differences to ``start [BC]``, with those of ``tiles``."""
    for d in tl.static_range(len(tiles)):
        v = tiles[d].to(tl.float32) - start[None, :]
        if not EVEN:
            v = tl.where((first + d * LANES + lane < limit)[:, None], v, 0.0)
        total += v
        square = tl.fma(v, v, square)
    return total, square


@triton.jit(do_not_specialize=("pixels", "chunk", "chunks"))
def group_sums(
    x_ptr, mean_ptr, square_ptr, pixels, chunk, chunks,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BG: tl.constexpr,
    BC: tl.constexpr, LANES: tl.constexpr, DEEP: tl.constexpr, EVEN: tl.constexpr, PAIRED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Mean, and sum of squares about it, of BLOCK groups over a chunk of a sample's pixels: float32 ``[B, chunks, G]``.

    Sums are of differences to the group's first value in the chunk. As that is one of the values, ``S2 - S1**2 / n``
    loses at most a factor n of float32's precision, and that only where it is all there is to the variance.
    DEEP times LANES pixels are asked for before anything waits. EVEN: chunks are whole tiles of so many. Both sums are
    carried across threads at once, for each time costs a wait of all of them.
    """
    in_turn(EARLY)
    if PAIRED and not EARLY:
        gdc_launch_dependents()
    sample, part = tl.program_id(2), tl.program_id(1)
    c, g, lane = tl.arange(0, BC), tl.arange(0, BG), tl.arange(0, LANES)
    channel, group = tl.program_id(0) * (BLOCK * SIZE) + c, tl.program_id(0) * BLOCK + g
    mine, kept = (c < BLOCK * SIZE) & (channel < CHANNELS), (g < BLOCK) & (group < GROUPS)
    first = part * chunk
    limit = tl.minimum(first + chunk, pixels)
    x_ptr += sample.to(tl.int64) * pixels * CHANNELS
    tiles = _pixels(x_ptr, first, lane, channel, mine, limit, CHANNELS, LANES, DEEP, EVEN)
    begin_ptr = x_ptr + first.to(tl.int64) * CHANNELS
    start = tl.load(begin_ptr + (channel // SIZE) * SIZE, mask=mine, other=0.0)
    about = tl.load(begin_ptr + group * SIZE, mask=kept, other=0.0)  # the same, of groups
    tl.debug_barrier()  # so that loads stay before what waits for one
    start, zeros = start.to(tl.float32), tl.zeros((LANES, BC), dtype=tl.float32)
    total, square = _summed(tiles, start, zeros, zeros, first, lane, limit, LANES, EVEN)
    for here in range(first + DEEP * LANES, limit, DEEP * LANES):
        tiles = _pixels(x_ptr, here, lane, channel, mine, limit, CHANNELS, LANES, DEEP, EVEN)
        total, square = _summed(tiles, start, total, square, here, lane, limit, LANES, EVEN)
    sums = tl.sum(tl.join(total, square), 0)
    members = (c // SIZE)[:, None] == g[None, :]
    whole, squares = tl.split(tl.sum(tl.where(members[:, :, None], sums[:, None, :], 0.0), 0))
    apart = tl.div_rn(whole, (limit - first).to(tl.float32) * SIZE)
    at = (sample * chunks + part) * GROUPS + group
    tl.store(mean_ptr + at, about.to(tl.float32) + apart, mask=kept)
    tl.store(square_ptr + at, tl.maximum(squares - apart * whole, 0.0), mask=kept)


@triton.jit
def _merged(
    mean_ptr, square_ptr, group, pixels, chunk, chunks, eps, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    MOST: tl.constexpr,
):
    """(mean, 1 / deviation) of groups of a sample, from those of its chunks (Chan et al. 1979)."""
    n = tl.arange(0, MOST)
    at, there = n[:, None] * GROUPS + group[None, :], (n < chunks)[:, None] & (group < GROUPS)[None, :]
    many = tl.where(n < chunks, tl.minimum(chunk, pixels - n * chunk), 0).to(tl.float32)[:, None] * SIZE
    means = tl.load(mean_ptr + at, mask=there, other=0.0)
    squares = tl.load(square_ptr + at, mask=there, other=0.0)
    whole = pixels.to(tl.float32) * SIZE
    mean = tl.div_rn(tl.sum(many * means, 0), whole)
    apart = means - mean[None, :]
    variance = tl.div_rn(tl.sum(squares + many * (apart * apart), 0), whole)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _block_of(number, BLOCKS: tl.constexpr, BC: tl.constexpr):
    """Of a block of the output's columns: (segment, first column, first channel, end of the segment's channels, and of
    its columns).

    BLOCKS: (first block, first column, first channel, end of the channels, of the columns) of each segment.
    """
    segment = number * 0
    first = number * 0
    column = number * 0
    channel = number * 0
    end = number * 0 + BLOCKS[0][3]
    last = number * 0 + BLOCKS[0][4]
    for s in tl.static_range(1, len(BLOCKS)):
        here = number >= BLOCKS[s][0]
        segment = tl.where(here, s, segment)
        first = tl.where(here, BLOCKS[s][0], first)
        column = tl.where(here, BLOCKS[s][1], column)
        channel = tl.where(here, BLOCKS[s][2], channel)
        end = tl.where(here, BLOCKS[s][3], end)
        last = tl.where(here, BLOCKS[s][4], last)
    return segment, column + (number - first) * BC, channel + (number - first) * BC, end, last


@triton.jit
def _rows(
    x_ptr, first, limit, sample, pixels, pitch, pad, high, wide, channel, real, CHANNELS: tl.constexpr,
    SPATIAL: tl.constexpr, BR: tl.constexpr,
):
    """(the input of BR rows of a sample's part of the output, which of them are no border)."""
    row = first + tl.arange(0, BR)
    inside, source = row < limit, sample * pixels + row
    if SPATIAL:
        y = row // pitch
        x = row - y * pitch - pad
        y -= pad
        inside = inside & (x >= 0) & (x < wide) & (y >= 0) & (y < high)
        source = (sample * high + y) * wide + x
    there = inside[:, None] & real[None, :]
    return tl.load(x_ptr + source.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask=there, other=0.0), inside


@triton.jit(do_not_specialize=(
    "pixels", "chunk", "chunks", "span", "samples", "pitch", "height", "pad", "high", "wide", "below",
))
def group_norm(
    x_ptr, mean_ptr, square_ptr, weight_ptr, bias_ptr, out_ptr, inverse_ptr, zero_ptr, times_ptr, factor_ptr, top, eps,
    pixels, chunk, chunks, span, samples, pitch, height, pad, high, wide, below,
    BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    SILU: tl.constexpr, FACTOR: tl.constexpr, SPATIAL: tl.constexpr, CODES: tl.constexpr, MOST: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PAIRED: tl.constexpr, EARLY: tl.constexpr,
):
    """Codes less 128 (without CODES: the numbers themselves) of BC columns and ``span`` rows of a sample's part of the
    output, by the sums of `group_sums`.

    Rows are pixels, or with SPATIAL the rows of a frame; the last sample has ``below`` rows more. All that is not a sum
    is asked for first. PAIRED: this was launched while the sums were still being made, and waits for them only then:
    what it reads before was there when they began.
    """
    if not PAIRED:
        in_turn(EARLY)
    sample = tl.program_id(2)
    lines = height * pitch if SPATIAL else pixels  # of the output, a sample
    start = tl.program_id(1) * span
    limit = tl.minimum(start + span, lines + tl.where(sample == samples - 1, below, 0))
    segment, column, channel, end, last = _block_of(tl.program_id(0), BLOCKS, BC)
    column += tl.arange(0, BC)
    group = channel // SIZE + tl.arange(0, BG)
    channel += tl.arange(0, BC)
    real = channel < end
    now, inside = _rows(x_ptr, start, limit, sample, pixels, pitch, pad, high, wide, channel, real, CHANNELS, SPATIAL,
                        BR)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0)
    if CODES:
        time = tl.load(times_ptr) * len(BLOCKS) + segment
    if PAIRED:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    else:
        tl.debug_barrier()  # so that loads stay before what waits for one
    if CODES:
        inverse = tl.load(inverse_ptr + time)
        zero, top = zero_and_top(zero_ptr, time, top)
        nothing = centred(0.0, inverse, zero, top)
    partial = sample.to(tl.int64) * chunks * GROUPS
    mean, rate = _merged(mean_ptr + partial, square_ptr + partial, group, pixels, chunk, chunks, eps, SIZE, GROUPS,
                         MOST)
    members = ((channel // SIZE)[:, None] == group[None, :])[:, :, None]
    mean, rate = tl.split(tl.sum(tl.where(members, tl.join(mean, rate)[None, :, :], 0.0), 1))
    slope = rate * weight.to(tl.float32)
    shift = bias.to(tl.float32) - mean * slope
    for first in range(start, limit, BR):
        v = rounded(tl.fma(now.to(tl.float32), slope[None, :], shift[None, :]), x_ptr.dtype.element_ty)
        if SILU:
            v = rounded(silu(v), x_ptr.dtype.element_ty)
        if FACTOR:
            v = v * tl.load(factor_ptr + channel, mask=real, other=0.0)[None, :]
        row = first + tl.arange(0, BR)
        out = out_ptr + (sample.to(tl.int64) * lines + row)[:, None] * LENGTH + column[None, :]
        there, kept = inside[:, None] & real[None, :], (row < limit)[:, None] & (column < last)[None, :]
        if CODES:
            tl.store(out, centred(v, inverse, zero, top), mask=there)
            tl.store(out, tl.zeros((BR, BC), dtype=tl.int8) + nothing, mask=kept & (there == 0))
        else:
            tl.store(out, v.to(out_ptr.dtype.element_ty), mask=there)
        now, inside = _rows(x_ptr, first + BR, limit, sample, pixels, pitch, pad, high, wide, channel, real, CHANNELS,
                            SPATIAL, BR)
