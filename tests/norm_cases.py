"""Random inputs of the ops that join a norm or a GEGLU with the encode, and of the encode: for Triton's interpreter
(kernels/interpreted_norm.py) and for a GPU (benchmarks/check_int8.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import int8_ops, sums
from bitbrush.numbers import packing
from bitbrush.numbers.codec import reciprocal

LEVELS = torch.tensor([8.0, -8.0, 4.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
"""Mean 0 and deviation 4."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[str, str, tuple[Any, ...], tuple[int, ...]]
"""Whether a norm is exact, and of what; the op; what it takes; channels of the segments."""


def drawn(seed: int) -> torch.Generator:
    """Random numbers of a case."""
    return torch.Generator().manual_seed(seed)


def tables(
    g: torch.Generator, segments: int, top: int = 255, *, changing: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(inverse, zero_point, times) of three times; codes reach 4 to 8 above and below 0. ``changing``: rows are on
    different grids, the one that counts has codes up to ``top``."""
    scale = (torch.rand((3, segments), generator=g) + 1) * 8 / top
    zero = torch.randint(top // 3, top * 2 // 3, (3, segments), generator=g)
    kept = zero.to(torch.uint8) if segments == 1 else zero.float()
    kept = int8_ops.with_tops(kept, torch.tensor([[255], [3], [top]])) if changing else kept
    return reciprocal(scale), kept, torch.tensor([2])


def exact(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Rows of `LEVELS`, shuffled, about an integer mean: all of a norm without eps is exact."""
    rows, length = shape
    values = LEVELS.repeat(length // 10).expand(shape)
    mixed = values.gather(1, torch.rand(shape, generator=g).argsort(1))
    return mixed + torch.randint(-3, 4, (rows, 1), generator=g)


def dyadic(count: int, g: torch.Generator) -> Tensor:
    """Numbers whose products with a few integers are exact in every float."""
    return torch.randint(-8, 9, (count,), generator=g) / 8


def channels_of(codes: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Codes without the padding of segments, of several: there the definition has any code, for weights are 0."""
    if len(counts) == 1:
        return codes
    parts = codes.split(list(packing.padded(counts)), 1)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)


def layer_norms() -> Iterator[Case]:
    """LayerNorm: consumers, factors, weights or none, padding."""
    for i, (channels, many, dtype) in enumerate(((40, 1, FLOATS[1]), (320, 3, FLOATS[0]), (70, 2, FLOATS[2]),
                                                 (1280, 2, FLOATS[1]), (640, 1, FLOATS[2]))):
        g = drawn(i)
        tops = [255, 15, 255][:many]
        found = list(zip(*(tables(g, 1, top, changing=bool(i % 2)) for top in tops), strict=True))
        tops = [255] * many if i % 2 else tops  # the tables say it
        weight, bias = (dyadic(channels, g).to(dtype) for _ in range(2))
        for plain in ("exact", "random"):
            x = exact((7, channels), g) if plain == "exact" else torch.randn((2, 5, channels), generator=g) * 3 + 1
            factors = [None, torch.rand(channels, generator=g) + 0.5, None][:many]
            affine = (weight, bias) if plain == "exact" or i % 2 else (None, None)
            args = (x.to(dtype), *affine, 0.0 if plain == "exact" else 1e-5, *map(list, found), tops, factors)
            yield f"layer {plain}", "layer_norm_encode", args, (channels,)


def modulated_norms() -> Iterator[Case]:
    """LayerNorm with scale and shift of each sample, parts of longer rows, as adaLN has them: rows of samples that fill
    programs, and that do not."""
    for i, (channels, rows, many, dtype) in enumerate(((40, 8, 3, FLOATS[1]), (1150, 3, 2, FLOATS[1]),
                                                       (320, 7, 1, FLOATS[2]), (70, 4, 1, FLOATS[0]))):
        g = drawn(20 + i)
        found = list(zip(*(tables(g, 1, 255, changing=bool(i % 2)) for _ in range(many)), strict=True))
        for plain in ("exact", "random"):
            given = dyadic(3 * 6 * channels, g).reshape(3, 6 * channels).to(dtype)
            shift, scale, *_ = given.chunk(6, 1)
            x = exact((3 * rows, channels), g).reshape(3, rows, channels)
            x = x if plain == "exact" else torch.randn(x.shape, generator=g) * 3 + 1
            args = (x.to(dtype), None, None, 0.0 if plain == "exact" else 1e-6, *map(list, found), [255] * many,
                    [None] * many, scale, shift)
            yield f"modulated {plain}", "layer_norm_encode", args, (channels,)


def sorting(counts: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Of channels drawn for each sum, as `sums.places` lists them."""
    parts = torch.randperm(sum(counts), generator=g).split(list(counts))
    found = [torch.nn.functional.pad(part, (0, width - len(part)), value=sum(counts)) * sums.OF_CHANNEL + s
             for s, (part, width) in enumerate(zip(parts, packing.padded(counts), strict=True))]  # fmt: skip
    return torch.cat(found).to(torch.int32)


def of_sums() -> Iterator[Case]:
    """LayerNorm, GEGLU and GELU before layers of several sums: groups whose channels lie anywhere, one without
    any, and segments, with padding and without."""
    for i, (counts, many, dtype) in enumerate((
        ((33, 7), 2, FLOATS[1]), ((100, 1, 0, 219), 3, FLOATS[0]), ((700, 580), 1, FLOATS[1]), ((40, 30), 1, FLOATS[2]),
        ((33, 7), 1, FLOATS[2]), ((160, 96, 384), 3, FLOATS[1]), ((81, 79, 80), 2, FLOATS[0]),
    )):
        g, channels = drawn(30 + i), sum(counts)
        found = list(zip(*(tables(g, len(counts), changing=bool(i % 2)) for _ in range(many)), strict=True))
        places, name = (sorting(counts, g), "listed") if i < 4 else (None, "segments")
        weight = dyadic(channels, g).to(dtype) if i % 2 else None
        factors = [None, torch.rand(channels, generator=g) + 0.5, None][:many]
        shift, scale = (dyadic(3 * channels, g).reshape(3, channels).to(dtype) if i % 3 else None for _ in range(2))
        x = exact((6, channels), g) if channels % 10 == 0 else torch.randn((6, channels), generator=g)
        args = (x.reshape(3, 2, channels).to(dtype), weight, weight, 0.0, *map(list, found), [255] * many, factors,
                scale, shift, list(counts), places)
        yield f"layer {name}", "layer_norm_encode", args, counts
        table, last = [kind[0] for kind in found], (255, factors[-1], list(counts), places)
        x = torch.randn((3, 7, 2 * channels), generator=g) * 3
        yield f"geglu {name}", "geglu_encode", (x.to(dtype), *table, *last), counts
        yield f"gelu {name}", "gelu_encode", (x[..., :channels].to(dtype), bool(i % 2), *table, *last), counts


def group_norms() -> Iterator[Case]:
    """GroupNorm: frames or rows, segments, groups of odd sizes, chunks that end within a picture; last, what one launch
    does where processors are few: parts of one group or more, a last tile that few or no pixels fill."""
    for i, (counts, groups, batch, high, wide, dtype, pad) in enumerate((
        ((40,), 4, 2, 8, 8, FLOATS[1], 1), ((64, 32), 32, 1, 9, 5, FLOATS[2], 1),
        ((320,), 32, 2, 12, 9, FLOATS[1], None), ((33, 7), 4, 2, 6, 7, FLOATS[0], None),
        ((30,), 3, 1, 1, 1, FLOATS[0], 0), ((160,), 8, 3, 16, 17, FLOATS[1], 1),
        ((480,), 32, 1, 11, 13, FLOATS[1], 1), ((352,), 32, 3, 5, 7, FLOATS[2], None),
        ((160,), 4, 1, 20, 12, FLOATS[1], 1), ((64,), 2, 2, 5, 6, FLOATS[2], None), ((32,), 1, 3, 15, 13, FLOATS[1], 1),
        ((96,), 1, 1, 15, 13, FLOATS[2], 1), ((96,), 2, 1, 25, 10, FLOATS[1], None), ((640,), 1, 1, 7, 5, FLOATS[1], 1),
    )):
        g, channels = drawn(50 + i), sum(counts)
        frame = [] if pad is None else [batch, high, wide, 3 if pad else 1, 3 if pad else 1, pad, 1, 1]
        weight, bias = (dyadic(channels, g).to(dtype) for _ in range(2))
        found = tables(g, len(counts), 63 if i % 3 == 1 else 255, changing=i % 3 == 1)
        factor = torch.rand(channels, generator=g) + 0.5 if i % 2 else None
        for plain in ("exact", "random"):
            rest = (channels // groups) * high * wide
            if plain == "exact" and rest % 10:
                continue
            size, eps, silu = (batch * groups, rest), 0.0 if plain == "exact" else 1e-5, plain != "exact"
            x = exact(size, g) if plain == "exact" else torch.randn(size, generator=g) + 2
            x = x.reshape(batch, channels, high, wide).to(dtype)
            args = (x, weight, bias, groups, eps, silu, *found, list(counts), 255, frame, factor)
            yield f"group {plain}", "group_norm_encode", args, counts


def geglus() -> Iterator[Case]:
    """GEGLU, also of the largest and smallest gates."""
    for i, (channels, dtype) in enumerate(((40, FLOATS[1]), (64, FLOATS[2]), (96, FLOATS[0]))):
        g = drawn(80 + i)
        x = torch.randn((3, 11, 2 * channels), generator=g) * 3
        x[0, 0, channels:] = torch.linspace(-40, 40, channels)
        found = tables(g, 1, 63 if i == 1 else 255, changing=i == 1)
        args = (x.to(dtype), *found, 255, torch.rand(channels, generator=g) if i else None)
        yield "geglu random", "geglu_encode", args, (channels,)


def gelus() -> Iterator[Case]:
    """GELU by erf and by tanh, also of the largest and smallest numbers."""
    for i, (channels, dtype) in enumerate(((40, FLOATS[1]), (64, FLOATS[2]), (96, FLOATS[0]), (1152, FLOATS[1]))):
        g = drawn(70 + i)
        x = torch.randn((3, 11, channels), generator=g) * 4
        x[0, 0] = torch.linspace(-40, 40, channels)
        found = tables(g, 1, 63 if i == 1 else 255, changing=i == 1)
        for tanh in (False, True):
            args = (x.to(dtype), tanh, *found, 255, torch.rand(channels, generator=g) if i else None)
            yield f"gelu {'tanh' if tanh else 'erf'}", "gelu_encode", args, (channels,)


def encodes() -> Iterator[Case]:
    """The encode alone: every row of a frame, which the tests of products see through sums only."""
    for i, (counts, batch, high, wide, pad) in enumerate((
        ((64,), 2, 5, 7, 1), ((33, 7), 1, 4, 3, 1), ((40,), 3, 3, 2, 2),
    )):
        g = drawn(90 + i)
        x = torch.randn((batch, sum(counts), high, wide), generator=g) * 4
        inverse, zero, times = tables(g, len(counts), 63 if i else 255, changing=bool(i))
        x = torch.where(torch.rand(x.shape, generator=g) < 0.1, (x.round() + 0.5) / inverse[2, 0], x)  # ties
        x[0, 0, 0, :2] = torch.tensor([3e9, -1.26e7])  # past what an addition rounds
        args = (x, inverse, zero, times, 0, list(counts), 255,
                [batch, high, wide, 2 * pad + 1, 2 * pad + 1, pad, 1, 1], 1, None)
        yield "encode exact", "int8_encode", args, counts


def every() -> Iterator[Case]:
    """All cases."""
    for make in (layer_norms, modulated_norms, of_sums, group_norms, geglus, gelus, encodes):
        yield from make()


def compared(
    run: Callable[[str, tuple[Any, ...]], tuple[Tensor, Tensor]], only: str | None = None
) -> dict[str, dict[str, int]]:
    """What was compared of each kind: cases, codes, how many differ and by how much, distinct codes.

    Args:
        run: (op, arguments) to the codes of a kernel and of the definition.
        only: The one kind to compare; None: all.
    """
    out: dict[str, dict[str, int]] = {}
    for name, op, args, counts in every():
        if only not in (None, name):
            continue
        found, want = (channels_of(codes, counts) for codes in run(op, args))
        entry = out.setdefault(name, {"cases": 0, "codes": 0, "unequal": 0, "most": 0, "distinct": 0})
        off = (found.int() - want.int()).abs()
        entry["cases"] += 1
        entry["codes"] += off.numel()
        entry["unequal"] += int((off > 0).sum())
        entry["most"] = max(entry["most"], int(off.max()))
        entry["distinct"] = max(entry["distinct"], len(want.unique()))
    return out
