"""Runs the int8 kernels in Triton's interpreter and compares them with the definition; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. The integers must be equal, the output
within the rounding of its float32 epilogue. ``fault NAME`` plants one that must show.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor

import packed_rows
from bitbrush.kernels import int8_ops, triton_encode, triton_encode_kernels, triton_int8, triton_unpack
from bitbrush.kernels.triton_int8 import BY_ROW, BY_SAMPLE, ONE_ROW, Config, Extra, Frame, Tables
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode, reciprocal
from bitbrush.numbers.grid import Grid, WeightSpec

SMALL = {"bm": 16, "bn": 16, "bk": 32, "group": 2}


class Case:
    """A random layer, its input, and what comes out of both by the definition.

    Args:
        segments: Channels of each.
        rows: Outputs of the layer.
        frame: Of a convolution; else ``tokens`` rows for each of ``samples``.
        kind: Which row of the tables serves an output.
    """

    def __init__(self, segments: tuple[int, ...], rows: int, bits: int, kind: int, seed: int,
                 frame: Frame | None = None, tokens: int = 5, samples: int = 3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.segments, self.bits, self.kind, self.frame, self.tokens = segments, bits, kind, frame, tokens
        self.widths = packing.padded(segments)
        count, channels = len(segments), sum(segments)
        samples = samples if frame is None else frame.batch
        kernel = (1, 1) if frame is None else frame.kernel
        signed = bits == 8
        zero = torch.full((rows, count), 128) if signed else torch.randint(0, 2**bits, (rows, count), generator=g)
        codes = torch.randint(int(signed), 2**bits, (rows, channels, *kernel), generator=g)
        self.weight_zero = zero.to(torch.uint8)
        self.rows = packing.weight_rows(codes.to(torch.uint8), segments, self.weight_zero)
        self.values = torch.cat([c - z[:, None, None, None] for c, z in zip(
            codes.split(list(segments), 1), zero.unbind(1), strict=True)], 1)
        tables = {ONE_ROW: 4, BY_SAMPLE: 4, BY_ROW: tokens * samples}[kind]
        self.scale = torch.rand((tables, count), generator=g) * 0.05 + 0.01
        self.zero = torch.randint(90, 166, (tables, count), generator=g).to(torch.uint8)
        self.times = torch.tensor([2]) if kind == ONE_ROW else torch.randint(0, 4, (samples,), generator=g)
        self.weight_scale = torch.rand((rows, count), generator=g) * 0.02 + 0.001
        shape = (samples * tokens, channels) if frame is None else (samples, channels, frame.high, frame.wide)
        self.x = torch.randn(shape, generator=g) * 2
        ties = torch.rand(shape, generator=g) < 0.1
        self.x = torch.where(ties, (torch.randint(-9, 9, shape, generator=g) + 0.5) * self.expanded(self.scale), self.x)
        if frame is not None:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.bias, self.shared = torch.randn(rows, generator=g), torch.randn((samples, rows), generator=g)
        self.generator = g

    def expanded(self, table: Tensor) -> Tensor:
        """A table's rows at the times of the input, shaped to broadcast against it."""
        if self.kind == BY_ROW:
            found = table
        else:
            found = table[self.times]
            found = found.repeat_interleave(self.tokens, 0) if self.frame is None and len(found) > 1 else found
        wide = found.repeat_interleave(torch.tensor(self.segments), 1)
        return wide if self.frame is None else wide[:, :, None, None]

    def codes(self) -> Tensor:
        """Activation codes by the codec."""
        return encode(self.x, self.expanded(reciprocal(self.scale)), self.expanded(self.zero.float()), 255)

    def sums(self) -> Tensor:
        """``sum (code_a - zero_a) (code_w - zero_w)`` of every segment, int64 ``[S, M, N]``."""
        left = (self.codes() - self.expanded(self.zero.float())).double()
        out = []
        for a, w in zip(left.split(list(self.segments), 1), self.values.split(list(self.segments), 1), strict=True):
            if self.frame is None:
                out.append((a @ w[:, :, 0, 0].double().T).long())
            else:
                y = torch.nn.functional.conv2d(a, w.double(), padding=self.frame.pad, stride=self.frame.stride)
                out.append(y.permute(0, 2, 3, 1).flatten(0, 2).long())
        return torch.stack(out)

    def output(self, sums: Tensor, extra: Extra) -> tuple[Tensor, Tensor]:
        """(float64 output ``[M, N]``, bound on the float32 epilogue's rounding)."""
        scale = self.scale[self.times] if self.kind != BY_ROW else self.scale
        per = sums.shape[1] // len(scale)
        scale = scale.double().repeat_interleave(per, 0)
        parts = [sums[s].double() * scale[:, s : s + 1] * self.weight_scale[:, s].double() for s in range(len(sums))]
        y, size = sum(parts), sum(p.abs() for p in parts)
        if extra.bias is not None:
            y, size = y + extra.bias.double(), size + extra.bias.double().abs()
        if extra.shared is not None:
            own = extra.shared.double().repeat_interleave(sums.shape[1] // len(extra.shared), 0)
            y, size = (y * own, size * own.abs()) if extra.gate else (y + own, size + own.abs())
        if extra.residual is not None:
            added = extra.residual.double().flatten(0, -2)
            y, size = y + added, size + added.abs()
        return y, (len(sums) + 6) * 2.0**-24 * size + 2.0**-149

    def tables(self) -> Tables:
        """As the kernel gets them."""
        weights = self.values.split(list(self.segments), 1)
        total = torch.stack([w.sum((1, 2, 3)) for w in weights]).int()
        return Tables(self.scale, self.zero, self.times, self.kind, self.weight_scale, total)

    def run(self, config: Config, extra: Extra) -> dict[str, Any]:
        """Encode, unpack and multiply by the kernels, and compare."""
        a = triton_encode.encode(self.x, reciprocal(self.scale), self.zero, self.times, self.kind, self.segments, 255,
                                 frame=self.frame, per_sample=self.tokens)
        w = unpacked(self.rows, self.weight_zero, self.bits, self.segments, self.values[0, 0].numel())
        want = self.sums()
        kept = torch.zeros(want.shape, dtype=torch.int32)
        y = triton_int8.product(a, w, self.tables(), self.widths, torch.float32, frame=self.frame,
                                per_sample=self.tokens, extra=extra, config=config, sums=kept)
        exact, bound = self.output(want, extra)
        error = (y.flatten(0, -2).double() - exact).abs()
        codes = self.frame is not None or torch.equal(kept_codes(a, self.segments), self.codes() - 128)
        return {"equal": torch.equal(kept.long(), want), "sums": want.numel(), "codes": codes,
                "ratio": float((error / bound).max())}


def kept_codes(a: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Rows without the padding of segments."""
    parts = a.split(list(packing.padded(segments)), 1)
    return torch.cat([p[:, :c] for p, c in zip(parts, segments, strict=True)], 1).float()


def unpacked(rows: Tensor, zero: Tensor, bits: int, segments: tuple[int, ...], taps: int) -> Tensor:
    """int8 rows as the product takes them: the file's bytes (8 bits), or by the kernel."""
    data = packing.pack(rows, bits)
    if bits == 8:
        return packing.int8_rows(data)
    out = torch.empty(rows.shape, dtype=torch.int8)
    triton_unpack.unpack(out, data, bits, zero, None, segments, packing.padded(segments), taps, False)
    return out


def mixed_rows() -> bool:
    """Bit classes with an order, and symmetric 1-bit rows whose padding does not count."""
    g = torch.Generator().manual_seed(5)
    bits = torch.tensor([2, 1, 3, 1, 2, 4, 3])
    spec = WeightSpec(grid=Grid(bits=2), row_bits=tuple(bits.tolist()), binary="symmetric")
    zero = torch.stack([torch.randint(0, 2 ** int(b), (2,), generator=g) if b > 1 else torch.ones(2) for b in bits])
    codes = torch.stack([torch.randint(0, 2 ** int(b), (40, 3, 3), generator=g) * (2 if b == 1 else 1) for b in bits])
    rows = packing.weight_rows(codes.to(torch.uint8), (33, 7), zero.to(torch.uint8))
    out = torch.full(rows.shape, 99, dtype=torch.int8)
    for b in sorted(set(bits.tolist())):
        members = (bits == b).nonzero().flatten()
        data = packing.pack_class(rows[members], b, spec)
        triton_unpack.unpack(out, data, b, zero.to(torch.uint8), members.to(torch.int16), (33, 7), (64, 32), 9, b == 1)
    wanted = rows.int() - torch.cat([zero[:, :1].expand(-1, 576), zero[:, 1:].expand(-1, 288)], 1).int()
    return bool(torch.equal(out.int(), wanted))


def at_once() -> dict[str, int]:
    """Weights of several layers by one launch, of every number of bits."""
    found = {"weights": 0, "unequal": 0, "distinct": 0}
    for given in packed_rows.cases():
        for got, want in zip(int8_ops._weights_cuda(*given), int8_ops._weights_plain(*given), strict=True):
            found["weights"] += want.numel()
            found["unequal"] += int((got != want).sum())
            found["distinct"] = max(found["distinct"], len(want.unique()))
    return found


def repeated() -> bool:
    """Pixels that are read two and three times in each direction."""
    case = Case((33, 7), 9, 4, ONE_ROW, 40, Frame(2, 3, 4, (3, 3), 1, 1))
    tables = (reciprocal(case.scale), case.zero, case.times, ONE_ROW, case.segments, 255)
    equal = []
    for times in (2, 3):
        frame = Frame(2, 3 * times, 4 * times, (3, 3), 1, 1)
        large = torch.nn.functional.interpolate(case.x, scale_factor=times)
        given = (case.x, large.contiguous(memory_format=torch.channels_last))
        equal.append(torch.equal(*[triton_encode.encode(x, *tables, frame=frame) for x in given]))
    return all(equal)


def cases() -> list[tuple[Case, Config, bool]]:
    """Layers, how the product is cut, and whether everything is added."""
    out: list[tuple[Case, Config, bool]] = []
    seeds = itertools.count(1)
    for tma in (False, True):
        config = Config(**SMALL, tma=tma)
        for kind in (ONE_ROW, BY_SAMPLE, BY_ROW):
            out.append((Case((37,), 21, 4, kind, next(seeds)), config, True))
        out.append((Case((64, 32), 17, 8, ONE_ROW, next(seeds)), config, False))
        out.append((Case((40, 7, 1), 9, 3, BY_SAMPLE, next(seeds)), config, True))
        for kind in (ONE_ROW, BY_SAMPLE):
            frame = Frame(2, 5, 4, (3, 3), 1, 1, shared=kind == ONE_ROW)
            out.append((Case((33,), 18, 4, kind, next(seeds), frame), config, True))
        wide = Config(**{**SMALL, "bk": 64}, tma=tma)  # 352 channels: the last block goes beyond their end
        out.append((Case((352,), 7, 8, ONE_ROW, next(seeds), Frame(1, 3, 4, (3, 3), 1, 1)), wide, True))
        out.append((Case((32, 5), 8, 2, ONE_ROW, next(seeds), Frame(1, 6, 7, (3, 3), 1, 2)), config, True))
        out.append((Case((32,), 8, 8, ONE_ROW, next(seeds), Frame(2, 3, 3, (1, 1), 0, 1)), config, False))
        split = replace(config, split_k=3)
        out.append((Case((150,), 21, 4, ONE_ROW, next(seeds)), split, True))
        out.append((Case((33,), 18, 4, ONE_ROW, next(seeds), Frame(2, 5, 4, (3, 3), 1, 1)), split, True))
        out.append((Case((32,), 8, 2, ONE_ROW, next(seeds), Frame(1, 6, 7, (3, 3), 1, 2)), split, False))
        out.append((Case((64,), 9, 3, BY_SAMPLE, next(seeds)), split, True))  # of which nothing is split
    return out


@triton.jit
def half_up(x, inverse, zero, top):  # type: ignore[no-untyped-def]
    """A fault: rounding that is not half to even."""
    code = tl.floor(x * inverse + 0.5) + zero
    return (tl.minimum(tl.maximum(code, 0.0), top) - 128.0).to(tl.int8)


FAULTS = ("zero-point", "half-up", "border", "segment-order", "nibbles", "stale-time", "tap-order", "sum-of-weights")


def plant(name: str) -> None:
    """A fault in what the kernels are given or do."""
    product, encoded, pack = triton_int8.product, triton_encode.encode, packing.pack

    def faulty(a: Tensor, w: Tensor, tables: Tables, *rest: Any, **options: Any) -> Tensor:
        change: dict[str, Any] = {
            "zero-point": {"zero_point": tables.zero_point + 1}, "stale-time": {"times": (tables.times + 1) % 4},
            "segment-order": {"scale": tables.scale.flip(1), "zero_point": tables.zero_point.flip(1)},
            "sum-of-weights": {"weight_sum": tables.weight_sum + 1},
        }.get(name, {})
        w = w.flip(1) if name == "tap-order" else w
        return product(a, w, tables._replace(**change), *rest, **options)

    def borderless(*args: Any, **options: Any) -> Tensor:
        out, frame = encoded(*args, **options), options["frame"]
        if frame is not None and frame.pad:
            out.view(-1, frame.pitch, out.shape[1])[:, : frame.pad] = 0
        return out

    if name == "half-up":
        triton_encode_kernels.centred = half_up
    elif name == "border":
        triton_encode.encode = borderless
    elif name == "nibbles":
        packing.pack = lambda codes, bits: pack(codes, bits) if bits == 8 else (pack(codes, bits) << 4) | (
            pack(codes, bits) >> 4)
    else:
        triton_int8.product = faulty


def main() -> None:
    """Print what was compared, and the worst of it."""
    if len(sys.argv) > 1:
        plant(sys.argv[1])
    found, gated, added = [], 0, 0
    for case, config, everything in cases():
        residual = None
        if everything:
            shape = case.sums().shape[1:]
            residual = torch.randn(shape, generator=case.generator)
        gate = everything and len(found) % 2 == 0
        extra = Extra(case.bias, case.shared, residual, gate) if everything else Extra(case.bias)
        found.append(case.run(config, extra))
        gated, added = gated + gate, added + (everything and not gate)
    sys.stdout.write(json.dumps({
        "cases": len(found), "sums": sum(f["sums"] for f in found), "unequal": sum(not f["equal"] for f in found),
        "codes": all(f["codes"] for f in found), "ratio": max(f["ratio"] for f in found), "mixed_rows": mixed_rows(),
        "repeated": repeated(), "at_once": at_once(), "gated": gated, "added": added,
    }) + "\n")


if __name__ == "__main__":
    main()
