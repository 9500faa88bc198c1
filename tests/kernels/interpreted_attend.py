"""Runs attention with the encode behind it in Triton's interpreter, compares with the definition, prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. ``fault NAME`` plants one that must
show. No bfloat16, which the interpreter cannot multiply.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from bitbrush.kernels import attend_ops, int8_ops, triton_attend
from bitbrush.kernels.triton_attend import Cut
from bitbrush.numbers.codec import reciprocal

CASES = (
    (2, 3, 70, 77, 64, torch.float16, None), (1, 4, 33, 5, 16, torch.float16, None),
    (2, 2, 64, 128, 80, torch.float32, None), (1, 2, 70, 200, 64, torch.float16, None),
    (1, 2, 37, 130, 48, torch.float32, Cut(32, 32, 4, 2)), (1, 2, 64, 64, 32, torch.float32, Cut(64, 32, 4, 1)),
)
"""(samples, heads, queries, keys, channels of a head, dtype, cut)."""


def inputs(case: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """As a fused block gives them: views of what joined products write."""
    samples, heads, queries, keys, size, dtype, _ = case
    g = torch.Generator().manual_seed(seed)

    def drawn(length: int, parts: int) -> list[Tensor]:
        x = torch.randn((samples, length, parts, heads * size), generator=g).to(dtype)
        return [part.unflatten(-1, (heads, size)).transpose(1, 2) for part in x.unbind(-2)]

    scale = (torch.rand((3, 1), generator=g) + 1) * 2 / 255
    zero = torch.randint(80, 170, (3, 1), generator=g, dtype=torch.uint8)
    if seed % 3 == 1:
        zero = int8_ops.with_tops(zero, torch.tensor([[255], [15], [191]]))
    factor = torch.rand(heads * size, generator=g) + 0.5 if seed % 2 else None
    return (*drawn(queries, 3)[:1], *drawn(keys, 2), reciprocal(scale), zero, torch.tensor([2]), 255, factor)


def main() -> None:
    """Run the cases, with a fault or without, and print what was found."""
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment, misc]
    fault, found = sys.argv[1] if len(sys.argv) > 1 else "", []
    for seed, case in enumerate(CASES):
        args = list(inputs(case, seed))
        want = attend_ops._plain(*args)
        if fault == "keys":
            args[1] = args[1].roll(1, 2)
        elif fault == "heads":
            args[2] = args[2].roll(1, 1)
        elif fault == "row":
            args[5] = torch.tensor([1])
        off = (triton_attend.attend(*args, case[-1]).int() - want.int()).abs()
        found.append({"codes": off.numel(), "unequal": int((off > 0).sum()), "most": int(off.max()),
                      "distinct": len(want.unique())})  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
