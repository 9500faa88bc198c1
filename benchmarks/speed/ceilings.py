"""What the machine can do, measured: a copy, a bf16 product, ``torch._int_mm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speed import timing
from speed.record import Item, Record

LARGE, SIDE = 1 << 31, 8192
SMALL, SMALL_SIDE = 1 << 20, 128


def run(record: Record, device: str, *, smoke: bool) -> None:
    """Measure all three."""
    side = SMALL_SIDE if smoke else SIDE
    for name, work in (
        ("copy", lambda: copy(SMALL if smoke else LARGE, device)),
        ("bf16", lambda: product(side, device, "bf16")),
        ("int8", lambda: product(side, device, "int8")),
        ("fp8", lambda: product(side, device, "fp8")),
    ):
        record.measure(name, 5, work)
    record.finish()


def copy(size: int, device: str) -> Item:
    """Bytes a second of a copy of ``size`` bytes on the device, read and written both counted."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time = timing.kernels({"copy": [lambda: target.copy_(source)]}, device, rounds=9)["copy"]
    return {"time_us": time, "bytes": 2 * size, "rate": 2 * size / time["median"] * 1e6}


def product(side: int, device: str, kind: str) -> Item:
    """Operations a second of a square product of random numbers."""
    work = _product(side, device, kind)
    time = timing.kernels({kind: [work]}, device, rounds=9)[kind]
    return {"time_us": time, "side": side, "rate": 2 * side**3 / time["median"] * 1e6}


def _product(side: int, device: str, kind: str) -> Callable[[], Any]:
    def noise() -> Tensor:
        return torch.randn(side, side, device=device)

    if kind == "bf16":
        a, b = noise().bfloat16(), noise().bfloat16()
        return lambda: a @ b.T
    if kind == "int8":
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.T)
    a, b = noise().to(torch.float8_e4m3fn), noise().to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)
