"""Runs joined and gated products in Triton's interpreter and compares them with their plain definitions; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. An argument names a fault to plant.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from bitbrush.kernels import int8_ops, joined_ops, triton_int8, tuning
from bitbrush.kernels.triton_int8 import Config, Next, Tables

DTYPES = (torch.float16, torch.float32, torch.float16)
"""Not bfloat16: the interpreter cuts values off to it instead of rounding."""


def int8(g: torch.Generator, *shape: int) -> Tensor:
    """Random int8."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)


def table(g: torch.Generator, kind: torch.dtype, sums: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero-point, times) of a table of four rows."""
    zero = torch.randint(90, 166, (4, sums), generator=g).to(kind)
    return torch.rand((4, sums), generator=g) * 0.002 + 0.001, zero, torch.randint(0, 4, (1,), generator=g)


def weight(g: torch.Generator, rows: int, *widths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, scale, sum, bias)."""
    w = int8(g, rows, sum(widths))
    scale, bias = torch.rand((rows, len(widths)), generator=g) * 0.01, torch.randn(rows, generator=g)
    return w, scale, torch.stack([part.sum(1, dtype=torch.int32) for part in w.split(widths, 1)]), bias


def joined(seed: int, parts: int, m: int, n: int, widths: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Unequal outputs of one product."""
    g = torch.Generator().manual_seed(seed)
    a, (w, scale_w, total, bias) = int8(g, parts * m, sum(widths)), weight(g, parts * n, *widths)
    kinds = (torch.uint8, torch.float32, torch.uint8)
    rows = [list(t) for t in zip(*(table(g, kind, len(widths)) for kind in kinds[:parts]), strict=True)]
    args = (a, w, *rows, scale_w, total, widths, parts, bias if seed % 2 else None, dtype)
    got, want = joined_ops._joined_cuda(*args), joined_ops._joined_plain(*args)  # type: ignore[arg-type]
    return {"count": want.numel(), "unequal": int((got != want).sum())}


def gated(seed: int, m: int, n: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Unequal codes of one product, by how much, and how many are neither the least nor the largest."""
    g = torch.Generator().manual_seed(seed)
    a, (w, scale_w, total, bias), tables = int8(g, m, width), weight(g, 2 * n, width), table(g, torch.uint8)
    inverse, zero = 1 / torch.tensor([[0.5], [0.011]]), torch.tensor([[3.0], [101.0]])
    if seed % 2:
        zero = int8_ops.with_tops(zero, torch.tensor([[255], [191]]))
    factor = torch.rand(n, generator=g) + 0.5 if seed % 2 else None
    args = (a, w, *tables, scale_w, total, width, bias if seed % 3 else None, inverse, zero, torch.tensor([1]), 255,
            factor, dtype)
    got, want = joined_ops._gated_cuda(*args).int(), joined_ops._gated_plain(*args).int()
    edges = (want[:, :n] == -128) | (want[:, :n] == 127)
    return {"count": want.numel(), "unequal": int((got != want).sum()), "worst": int((got - want).abs().max()),
            "inner": int((~edges).sum())}


def plant(name: str) -> None:
    """A fault in what the kernels are given."""
    product, given = triton_int8.product, triton_int8.gated

    def third_as_second(a: Tensor, w: Tensor, tables: Tables, *rest: Any, **options: Any) -> Tensor:
        others = tables.others[:1] * len(tables.others)
        return product(a, w, tables._replace(others=others), *rest, **options)

    def rows_of_the_first(a: Tensor, *rest: Any, **options: Any) -> Tensor:
        parts = 1 + len(rest[1].others)
        return product(a.chunk(parts)[0].repeat(parts, 1), *rest, **options)

    def halves(a: Tensor, w: Tensor, *rest: Any, **options: Any) -> Tensor:
        return given(a, w.roll(len(w) // 2, 0), *rest, **options)

    def stale(*args: Any, **options: Any) -> Tensor:
        then: Next = args[-1]
        return given(*args[:-1], then._replace(times=then.times * 0), **options)

    if name in ("third-as-second", "rows-of-the-first"):
        triton_int8.product = third_as_second if name == "third-as-second" else rows_of_the_first
    else:
        triton_int8.gated = {"halves": halves, "stale": stale}[name]


def main() -> None:
    """Print what was compared, and the worst of it."""
    if len(sys.argv) > 1:
        plant(sys.argv[1])
    seeds = itertools.count(1)
    found: dict[str, list[dict[str, Any]]] = {"joined": [], "gated": []}
    for tma in (False, True):
        cut = Config(16, 32, 32, 2, 4, 2, tma=tma)
        tuning.config = lambda problem, device, run, cut=cut: cut  # type: ignore[assignment]
        for parts, widths, dtype in zip((3, 3, 2), ([64], [32, 96, 32], [64]), DTYPES, strict=True):
            found["joined"].append(joined(next(seeds), parts, 21, 40, widths, dtype))  # tiles end within a part
        for (m, n, width), dtype in zip(((21, 40, 32), (16, 32, 96), (5, 16, 64)), DTYPES, strict=True):
            found["gated"].append(gated(next(seeds), m, n, width, dtype))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
