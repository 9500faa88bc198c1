"""Runs the one-pass round trips in Triton's interpreter and compares them with the torch form; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. As argument a seeded fault, and what it
must show in is run alone: ``rows`` (an entry of a table for the wrong row), ``edge`` (octaves end one float32 number
higher).
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from bitbrush.kernels import triton_fake_kernels, triton_rounds
from bitbrush.numbers.codec import decode, encode, reciprocal, round_trip_log2

TINY = 2.0**-126
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = {  # shapes of x and of the table; B, C, H, W or B, T, C
    "channels of tokens": ((3, 7, 40), (1, 1, 40)), "of few tokens": ((5, 40), (1, 40)),
    "wide": ((2, 3, 1030), (1, 1, 1030)),
    "channels of samples": ((3, 7, 40), (3, 1, 40)), "channels of pictures": ((3, 10, 6, 5), (1, 10, 1, 1)),
    "of pictures, samples": ((3, 10, 6, 5), (3, 10, 1, 1)), "one pixel": ((3, 33, 1, 1), (1, 33, 1, 1)),
    "pixels": ((2, 5, 6, 7), (1, 1, 6, 7)), "pixels of samples": ((2, 5, 6, 7), (2, 1, 6, 7)),
    "tokens": ((2, 9, 48), (2, 9, 1)), "same tokens": ((2, 9, 48), (1, 9, 1)), "heads": ((2, 3, 5, 8), (1, 3, 1, 1)),
    "groups of tokens": ((2, 5, 48), (2, 5, 48)),
}  # fmt: skip
LOG2 = {  # shapes of x and of delta
    "samples": ((3, 2, 7, 24), (3, 1, 1, 1)), "heads": ((2, 3, 5, 33), (2, 3, 1, 1)),
    "all": ((2, 2, 9, 65), (1, 1, 1, 1)),
    "heads of one": ((1, 3, 5, 33), (1, 3, 1, 1)), "long": ((2, 1, 70, 70), (2, 1, 1, 1)),
}  # fmt: skip


def fault(name: str) -> None:
    """Load the kernels with one word changed."""
    source = inspect.getsource(triton_fake_kernels)
    before, after = {"rows": ("row % entries", "(row + 1) % entries"), "edge": ("0x4AFB0C", "0x4AFB0B")}[name]
    assert source.count(before) == 1 or name == "edge"
    at = source.rindex(before)
    changed = source[:at] + after + source[at + len(before) :]
    file = Path(tempfile.mkdtemp()) / "faulty_kernels.py"
    file.write_text(changed)
    sys.path.insert(0, str(file.parent))
    import faulty_kernels  # type: ignore[import-not-found]

    for kernel in ("tables", "log2"):
        setattr(triton_fake_kernels, kernel, getattr(faulty_kernels, kernel))


def given(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 as the interpreter writes it: to bfloat16 without rounding, unlike a GPU."""
    if dtype != torch.bfloat16:
        return wide.to(dtype)
    return (wide.contiguous().view(torch.int32) & -0x10000).view(torch.float32).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The values in the orders of memory that layers see."""
    found = [x]
    if x.ndim == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
        found.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    return found


def compare_tables(found: dict[str, int]) -> None:
    """Every kind of table in every layout that fits."""
    for i, ((shape, of), dtype, top) in enumerate(itertools.product(TABLES.values(), DTYPES, (1, 255))):
        g = torch.Generator().manual_seed(i)
        exact = torch.exp2(torch.randint(-4, 0, of, generator=g).float())
        scale = exact if i % 2 else torch.rand(of, generator=g) + 0.05
        zero = torch.randint(0, top + 1, of, generator=g).float()
        x = torch.randn(shape, generator=g) * (top + 1) * 0.1
        ties = torch.rand(shape, generator=g) < 0.2
        x = torch.where(ties, (torch.randint(-9, 9, shape, generator=g) + 0.5) * scale, x)
        x.view(-1)[::53] = 0.0
        for lying in layouts(x.to(dtype)):
            if triton_rounds.matrix(lying, scale) is None:
                found["left"] += 1
                continue
            got = triton_rounds.tables(lying, scale, reciprocal(scale), zero, top)
            want = given(decode(encode(lying, reciprocal(scale), zero, top), scale, zero), dtype)
            assert got.dtype == dtype and got.stride() == lying.stride()
            found["cases"] += 1
            found["values"] += want.numel()
            found["wrong"] += int((want != got).sum())


def weights(shape: tuple[int, ...], of: tuple[int, ...], i: int) -> tuple[Tensor, Tensor]:
    """(x, delta): values over many octaves, at both sides of their ends, subnormal ones, zeros; a delta of 0."""
    g = torch.Generator().manual_seed(i)
    exact = torch.exp2(torch.randint(-3, 1, of, generator=g).float())
    delta = torch.rand(of, generator=g) * 0.9 + 0.05 if i % 3 else exact
    if delta.numel() > 1:
        delta.view(-1)[-1] = 0.0
    octave = torch.randint(0, 40 if i % 2 else 149, shape, generator=g).float()
    x = torch.exp2(-octave) * torch.rand(shape, generator=g)
    end = (torch.tensor([0x3504F2, 0x3504F3, 0x3504F4, 0x3504F5]) + (127 << 23)).int().view(torch.float32)
    ends = end[torch.randint(0, 4, shape, generator=g)] * torch.exp2(-octave.clamp_max(120) - 1)
    x = torch.where(torch.rand(shape, generator=g) < 0.5, ends, x)
    x.view(-1)[::17] = 0.0
    x.view(-1)[1::29] = 1e-42
    return torch.where(delta > 0, torch.minimum(x, delta.expand(shape)), 0.0), delta


def compare_log2(found: dict[str, int]) -> None:
    """All kinds of delta, with and without a start token, in and to every dtype."""
    cases = itertools.product(LOG2.values(), DTYPES, DTYPES, (1, 15, 255), (0, 1))
    for i, ((shape, of), dtype, wanted, top, exempt) in enumerate(cases):
        x, delta = weights(shape, of, i)
        x = x.to(dtype)
        assert triton_rounds._stretches(x, delta) == delta.numel()
        got = triton_rounds.log2(x, delta, top, exempt, wanted)
        want = round_trip_log2(x, delta, top)
        want[..., :exempt] = x[..., :exempt].float()
        assert got.dtype == wanted
        found["log2_cases"] += 1
        good = torch.ones_like(want, dtype=torch.bool)
        if torch.bfloat16 in (dtype, wanted):  # of which the interpreter has subnormal numbers wrong
            good = ((x == 0) | (x.float() >= TINY)) & ((want == 0) | (want >= TINY))
        found["log2_values"] += int(good.sum())
        found["log2_wrong"] += int((given(want, wanted) != got)[good].sum())


def main() -> None:
    """Compare everything and print the counts."""
    for name in sys.argv[1:]:
        fault(name)
    names = ("cases", "values", "wrong", "left", "log2_cases", "log2_values", "log2_wrong")
    found = dict.fromkeys(names, 0)
    if sys.argv[1:] != ["edge"]:  # of octaves
        compare_tables(found)
    if sys.argv[1:] != ["rows"]:  # of tables
        compare_log2(found)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
