"""Runs the encode for many layers and their product in Triton's interpreter, compares with the definition, prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. An argument names a fault to plant:
every layer by the first one's table, the table's first row whatever the time.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from bitbrush.kernels import joined_ops, triton_encode, triton_int8, tuning
from bitbrush.kernels.triton_int8 import Config


def plant(name: str) -> None:
    """A fault in what the kernels are given."""
    encode, product = triton_encode.encode_each, triton_int8.product

    def wrong(table: torch.Tensor) -> torch.Tensor:
        return (table[:1] if name == "first-table" else table[:, :1]).expand_as(table).contiguous()

    triton_encode.encode_each = lambda x, inverse, zero, *rest: encode(x, wrong(inverse), wrong(zero), *rest)
    triton_int8.product = lambda a, w, tables, *rest, **how: product(
        a, w, tables._replace(scale=wrong(tables.scale), zero_point=wrong(tables.zero_point)), *rest, **how)


def main() -> None:
    """Print what was compared."""
    for fault in sys.argv[1:]:
        plant(fault)
    found = dict.fromkeys(("cases", "codes", "codes_unequal", "outputs", "outputs_unequal"), 0)
    for seed, (layers, tma, own) in enumerate(((3, True, False), (2, False, False), (4, True, True), (1, True, False),
                                               (3, True, True))):  # an input for all, or one each
        g = torch.Generator().manual_seed(seed)
        tuning.config = lambda problem, device, run, tma=tma: Config(16, 32, 32, 2, 4, 2, tma=tma)
        rows, channels, n, width = 21, 40, 40, 64
        x, times = torch.randn((layers * rows, channels), generator=g).half(), torch.tensor([2])
        x = x.reshape(layers, rows, channels) if own else x[:rows]
        scale = torch.rand((layers, 4), generator=g) * 0.02 + 0.01
        zero = torch.randint(90, 166, (layers, 4), generator=g).to(torch.float32 if seed == 1 else torch.uint8)
        factor = torch.rand((layers, channels), generator=g) + 0.5 if seed % 2 else None
        args = (x, 1 / scale, zero, times, 255, factor)
        codes, want = joined_ops._each_cuda(*args), joined_ops._each_plain(*args)
        w = torch.randint(-128, 128, (layers * n, width), dtype=torch.int8, generator=g)
        w[:, channels:] = 0
        of_weight = (torch.rand((layers * n, 1), generator=g) * 0.01, w.sum(1, dtype=torch.int32)[None])
        bias = torch.randn(layers * n, generator=g) if seed % 2 else None
        given = (want, w, scale, zero, times, *of_weight, width, bias, torch.float16)
        got, right = joined_ops._stacked_cuda(*given), joined_ops._stacked_plain(*given)
        assert got.shape == right.shape == (layers, rows, n)
        found["cases"] += 1
        found["codes"] += want.numel()
        found["codes_unequal"] += int((codes != want).sum())
        found["outputs"] += right.numel()
        found["outputs_unequal"] += int((got != right).sum())
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
