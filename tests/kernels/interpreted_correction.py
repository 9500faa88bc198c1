"""Runs a correction's kernels in Triton's interpreter beside the same in torch; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. As argument a seeded fault, which must
show: ``row`` (the next row's numbers), ``channel`` (another channel's).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from bitbrush.kernels import triton_correction, triton_correction_kernels
from bitbrush.network import correction
from bitbrush.network.correction import Correction, CorrectionSpec

TIMES = (9.0, 6.5, 3.0, 0.0)
ORDERS = ((9, 9, 6.5, 6.5, 3, 0), (6.5, 3), (9, 3, 0), (12, 9, 6.5), (9, 6.5, 9, 6.5, 3), (9, 6.5, 3, 0, 9))
SHAPES = ((1, 4, 8, 8), (3, 4, 5, 7), (2, 3, 40), (5, 2))
FAULTS = {"row": ("tl.maximum(row, 0.0).to(tl.int32)", "(tl.maximum(row, 0.0).to(tl.int32) + 1) % 4"),
          "channel": ("(at // inner) % channels", "(at // inner + 1) % channels")}  # fmt: skip


def fault(name: str) -> None:
    """Load the kernels with one expression changed."""
    source = inspect.getsource(triton_correction_kernels)
    before, after = FAULTS[name]
    assert source.count(before) == 2
    file = Path(tempfile.mkdtemp()) / "faulty_kernels.py"
    file.write_text(source.replace(before, after))
    sys.path.insert(0, str(file.parent))
    import faulty_kernels  # type: ignore[import-not-found]

    for kernel in ("turn", "shifted", "corrected"):
        setattr(triton_correction_kernels, kernel, getattr(faulty_kernels, kernel))


def made(channels: int) -> Correction:
    """One with random tables."""
    g = torch.Generator().manual_seed(channels)
    found = Correction(CorrectionSpec(scheduler="X", timesteps=TIMES, channels=channels))
    for name in correction.TABLES:
        getattr(found, name).copy_(torch.randn(len(TIMES), channels, generator=g))
    return found


def fused() -> Any:
    """The launchers, asked for tensors of the host."""

    def fits(x: Tensor, most: int) -> bool:
        return triton_correction.places(x) > 0

    return triton_correction.Corrector(
        fits, triton_correction.turn, triton_correction.shifted, triton_correction.corrected
    )


def compare(shape: tuple[int, ...], dtype: torch.dtype, last: bool, order: tuple[float, ...]) -> list[int]:
    """(values, wrong ones, corrected calls) of a trajectory."""
    one, other = made(shape[1]), made(shape[1])
    g = torch.Generator().manual_seed(0)
    values = wrong = on = 0
    for i, time in enumerate(order):
        # values that every dtype holds: the interpreter writes bfloat16 without rounding, unlike a GPU
        x = torch.randint(-64, 64, shape, generator=g).float().div(16).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        now = torch.full((shape[0] if i % 2 else 1,), time, dtype=torch.float32)
        pairs = []
        for its, kernels in ((one, None), (other, fused())):
            correction._fused = lambda *_, kernels=kernels: kernels  # type: ignore[assignment, misc]
            seen = its.enter(x, now)
            pairs.append((seen, its.leave(x), its.state.clone()))
        assert pairs[0][2].tolist() == pairs[1][2].tolist(), (order, i)
        on += int(pairs[0][2][0] >= 0)
        for a, b in zip(pairs[0][:2], pairs[1][:2], strict=True):
            values, wrong = values + a.numel(), wrong + int((a != b).sum())
            assert a.dtype == b.dtype == dtype and a.stride() == b.stride()
    return [values, wrong, on]


def mixed() -> bool:
    """Whether a batch of several times is left out."""
    its = made(4)
    now = torch.tensor([9.0, 6.5])
    triton_correction.turn(now, its.timesteps, its.state)
    return its.state.tolist() == [-2.0, 9.0]


def main() -> None:
    """Everything."""
    warnings.simplefilter("ignore")
    torch.cuda.device_of = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    if len(sys.argv) > 1:
        fault(sys.argv[1])
    cases, total = 0, [0, 0, 0]
    for shape, dtype, last, order in itertools.product(SHAPES, (torch.float32, torch.float16), (False, True), ORDERS):
        if not last or len(shape) == 4:
            total = [a + b for a, b in zip(total, compare(shape, dtype, last, order), strict=True)]
            cases += 1
    found = {"cases": cases, "values": total[0], "wrong": total[1], "on": total[2], "mixed": mixed()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
