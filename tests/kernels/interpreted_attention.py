"""Runs attention on codes in Triton's interpreter and compares its integers with the definition; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. Sums of q and k must be equal; codes of
the softmax may differ by one, where an exponential or a sum differs in its last bit; sums of these codes and v must be
equal, and the output is then the same. ``fault NAME`` plants one that must show.
"""

from __future__ import annotations

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

from attention_cases import Case
from bitbrush.kernels import triton_attention, triton_attention_kernels
from bitbrush.kernels.triton_attention import Cut, Table

SMALL = Cut(16, 32, 4, 2)


def cases() -> list[tuple[Case, Cut | None, torch.dtype]]:
    """Ragged sizes: queries and keys that are no multiple of a block, heads that fill no power of two."""
    full = torch.float32
    return [
        (Case(2, 3, 37, 45, 40, seed=1), SMALL, full), (Case(1, 2, 16, 77, 64, seed=2), SMALL, torch.float16),
        (Case(1, 2, 33, 31, 80, zero=True, seed=3), SMALL, full), (Case(2, 1, 5, 1, 8, seed=4), SMALL, full),
        (Case(1, 2, 20, 64, 40, bits=6, seed=5), SMALL, full), (Case(1, 1, 18, 70, 160, seed=6), SMALL, full),
        (Case(1, 2, 70, 130, 40, bits=4, zero=True, seed=7), None, full), (Case(2, 1, 130, 65, 64, seed=8), None, full),
    ]  # fmt: skip


@triton.jit
def half_up(v):  # type: ignore[no-untyped-def]
    """A fault: half of the values are rounded wrongly."""
    return tl.floor(v).to(tl.int32)


@triton.jit
def one_more(v):  # type: ignore[no-untyped-def]
    """A fault: every code is one too large."""
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B3FFFFF


@triton.jit
def with_padding(q, base, k_ptr, k_sum_ptr, key, d, keys, row_k, shift_q, factor, root,  # type: ignore[no-untyped-def]
                 SIZE: tl.constexpr):
    """A fault: keys behind the last one take part in the softmax."""
    real = key < keys
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * row_k + d[None, :], mask=real[:, None] & (d < SIZE)[None, :],
                other=0)
    sums = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    sums += base[:, None] + (shift_q * tl.load(k_sum_ptr + key, mask=real, other=0))[None, :]
    return sums, (sums.to(tl.float32) * factor) * root


@triton.jit
def padded_codes(scores, most, share, zero, top, real):  # type: ignore[no-untyped-def]
    """A fault: keys behind the last one have the zero-point's code."""
    value = tl.exp(scores - most[:, None]) * share[:, None]
    return triton_attention_kernels.half_even(tl.minimum(value, top - zero.to(tl.float32))) + (zero - 128)


FAULTS = ("zero-q", "zero-k", "zero-v", "zero-p", "stale-time", "floor", "one-more", "padded-scores", "padded-codes",
          "order-of-keys", "heads")


def plant(name: str) -> None:
    """A fault in what the kernel is given or does."""
    run, laid_out, kernels = triton_attention.attention, triton_attention.laid_out, triton_attention_kernels

    def faulty(q: Tensor, k: Tensor, v: Tensor, tables: list[Table], *rest: Any, **options: Any) -> Tensor:
        tables = list(tables)
        if name.startswith("zero-"):
            i = "qkvp".index(name[-1])
            tables[i] = replace(tables[i], zero_point=tables[i].zero_point + 1)
        elif name == "stale-time":
            tables = [replace(table, times=table.times - 1) for table in tables]
        elif name == "heads":
            q = q.roll(1, 1)
        return run(q, k, v, tables, *rest, **options)

    if name in ("floor", "one-more"):
        kernels.half_even = half_up if name == "floor" else one_more
    elif name.startswith("padded"):
        setattr(kernels, *(("_scores", with_padding) if name == "padded-scores" else ("_codes", padded_codes)))
    elif name == "order-of-keys":
        triton_attention.laid_out = lambda *args: (lambda v, *sums: (v.roll(1, 2), *sums))(*laid_out(*args))
    else:
        triton_attention.attention = faulty


def main() -> None:
    """Print what was compared, and the worst of it."""
    if len(sys.argv) > 1:
        plant(sys.argv[1])
    found = [case.compared("cpu", config, dtype) for case, config, dtype in cases()]
    sys.stdout.write(json.dumps({
        "cases": len(found), "codes": sum(f["codes"] for f in found), "apart": sum(f["apart"] for f in found),
        "most": max(f["most"] for f in found), "kinds": max(f["kinds"] for f in found),
        **{f"{key}_equal": sum(f[key] for f in found) for key in ("sums", "totals", "output")},
    }) + "\n")


if __name__ == "__main__":
    main()
