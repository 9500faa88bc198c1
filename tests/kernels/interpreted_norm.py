"""Runs the kernels of norms, GEGLU and encode in Triton's interpreter, compares with the definition, prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. Codes must be equal where a norm is
exact (`norm_cases.exact`), elsewhere within one and rarely different. Arguments: a fault to plant, and the kind of
cases that it must show in, which alone are run then.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor

import norm_cases
from bitbrush.kernels import (
    int8_ops,
    norm_ops,
    triton_activated_kernels,
    triton_encode_kernels,
    triton_norm,
    triton_norm_kernels,
)
from bitbrush.kernels import triton_norm_small as small
from bitbrush.kernels import triton_norm_small_kernels as small_kernels


def merged() -> float:
    """Largest error of mean and deviation, of deviations, where the mean is 1000 of them."""
    g = norm_cases.drawn(99)
    x = torch.randn((2, 40, 9, 31), generator=g) + 1000
    mean, square, chunk = triton_norm.group_sums(x.contiguous(memory_format=torch.channels_last), 4)
    pixels = 9 * 31
    many = torch.tensor([min(chunk, pixels - n * chunk) * 10.0 for n in range(mean.shape[1])]).double()[None, :, None]
    found = (many * mean).sum(1) / (pixels * 10)
    variance = (square + many * (mean - found[:, None]) ** 2).sum(1) / (pixels * 10)
    groups = x.reshape(2, 4, -1).double()
    off = torch.stack([found - groups.mean(2), variance.sqrt() - groups.std(2, correction=0)])
    return float(off.abs().max() / groups.std())


def alone() -> float:
    """Largest difference of a GroupNorm without codes, of the numbers' spread."""
    g, off = norm_cases.drawn(98), []
    for dtype, silu in ((torch.float16, False), (torch.float32, True)):
        x = (torch.randn((2, 60, 9, 7), generator=g) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.randn(60, generator=g).to(dtype) for _ in range(2))
        made = triton_norm.group_norm_float(x, weight, bias, 4, 1e-5, silu)
        want = norm_ops._group_norm_float_plain(x, weight, bias, 4, 1e-5, silu)
        off.append(float((made.float() - want.float()).abs().max() / want.float().std()))
    return max(off)


@triton.jit
def half_up(x, inverse, zero, top):  # type: ignore[no-untyped-def]
    """A fault: rounding that is not half to even."""
    code = tl.floor(x * inverse + 0.5) + zero
    return (tl.minimum(tl.maximum(code, 0.0), top) - 128.0).to(tl.int8)


def plant(name: str) -> None:
    """A fault in what the kernels are given or do."""
    layer, group = triton_norm.layer_norm, triton_norm.group_norm

    def consumers(x: Tensor, weight: Any, bias: Any, eps: float, given: Any, tops: Any, *rest: Any) -> Tensor:
        return layer(x, weight, bias, eps, given[::-1], tops[::-1], *rest)

    def sample(*args: Any) -> Tensor:
        return layer(*args[:6], args[6] and tuple(part.roll(1, 0) for part in args[6]), *args[7:])

    def unsorted(*args: Any) -> Tensor:
        *before, places = args
        return layer(*before, None if places is None else places & 255 | places.sort().values >> 8 << 8)

    def shifted(*args: Any) -> Tensor:
        out, frame = group(*args), args[11]
        return out.roll(1, 0) if frame is not None else out

    if name == "consumers":
        triton_norm.layer_norm = consumers
    elif name == "sample":
        triton_norm.layer_norm = sample
    elif name == "unsorted":
        triton_norm.layer_norm = unsorted
    elif name == "place":
        triton_norm.group_norm = shifted
    elif name == "sums":
        sums = triton_norm.group_sums
        triton_norm.group_sums = lambda x, groups: (lambda m, s, c: (m, s * 1.01, c))(*sums(x, groups))
    elif name == "tile":
        held = small.cut
        small.cut = lambda *given: (lambda how: how and how._replace(tiles=max(how.own, how.tiles - 1)))(held(*given))
    elif name == "gelu":
        triton_activated_kernels.gelu = triton_norm_kernels.silu
    elif name == "tanh":
        triton_activated_kernels.gelu_tanh = triton_norm_kernels.gelu
    elif name == "half-up":
        assert small_kernels.centred is triton_encode_kernels.centred  # imported before, so that encodes alone err
        triton_encode_kernels.centred = half_up


def main() -> None:
    """Print what was compared, and the worst of it."""
    fault, kind = sys.argv[1:] or (None, None)
    if fault is not None:
        plant(fault)

    def run(op: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        home, name = (int8_ops, "encode") if op == "int8_encode" else (norm_ops, op.removesuffix("_encode"))
        return getattr(home, f"_{name}_cuda")(*args), getattr(home, f"_{name}_plain")(*args)

    found: dict[str, Any] = {"results": norm_cases.compared(run, kind)}
    sys.stdout.write(json.dumps(found if fault else {**found, "merged": merged(), "alone": alone()}) + "\n")


if __name__ == "__main__":
    main()
