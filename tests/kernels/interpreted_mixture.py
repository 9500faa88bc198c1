"""Runs the kernels of mixtures in Triton's interpreter and compares them with the torch form; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. With ``faults`` as argument each
seeded fault by itself, which must show: codes cut off, one code too many, members the other way round, the shares of
another sample, gradients at the clamped ends.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from bitbrush.kernels import triton_mixture, triton_mixture_kernels
from bitbrush.numbers.mixture import FusedMixture, mixture

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOPS = (15, 63, 255)
FORMS = {  # shapes of x, of shares and of scales, without K; what may be None is the batch
    "a tensor": ((None, 7, 11), (1, 1, 1), (1, 1, 1)), "samples": ((None, 7, 11), (None, 1, 1), (1, 1, 1)),
    "scales of samples": ((None, 7, 11), (1, 1, 1), (None, 1, 1)),
    "both": ((None, 3, 5, 4), (None, 1, 1, 1), (None, 1, 1, 1)),
    "long": ((None, 1030), (None, 1), (1, 1)), "vector": ((None,), (None,), (1,)),
    "segments": ((None, 3, 5, 7), (None, 1, 1, 1), (1, 3, 1, 1)),
    "segments of tokens": ((None, 9, 40), (None, 1, 1), (1, 1, 40)),
    "segments of rows": ((None, 67), (None, 1), (1, 67)),
    "channels": ((None, 4, 5, 6), (None, 4, 1, 1), (None, 1, 1, 1)),
    "channels of tokens": ((None, 70, 9), (None, 1, 9), (None, 1, 1)),
    "channels for all": ((None, 6, 2, 3), (1, 6, 1, 1), (1, 1, 1, 1)),
    "one pixel": ((None, 33, 1, 1), (None, 1, 1, 1), (1, 33, 1, 1)),
}  # fmt: skip
FAULTS = {
    "rounding": ("x * inverse + 12582912.0", "tl.floor(x * inverse) + 12582912.0"),
    "end": ("low, low + top", "low, low + top + 1.0"), "order": ("share_at + k *", "share_at + (COUNT - 1 - k) *"),
    "sample": ("sample * share_b", "(sample // 2) * share_b"), "free": ("code <= high", "code < high"),
}  # fmt: skip


def fault(name: str) -> None:
    """Load the kernels with a few words changed."""
    source, (before, after) = inspect.getsource(triton_mixture_kernels), FAULTS[name]
    assert before in source, before
    file = Path(tempfile.mkdtemp()) / f"faulty_{name}.py"
    file.write_text(source.replace(before, after))
    sys.path.insert(0, str(file.parent))
    faulty = importlib.import_module(file.stem)
    for kernel in ("forward", "backward"):
        setattr(triton_mixture_kernels, kernel, getattr(faulty, kernel))


def sized(shape: tuple[int | None, ...], batch: int) -> tuple[int, ...]:
    """A shape with its batch."""
    return tuple(batch if size is None else size for size in shape)


def example(form: str, batch: int, count: int, top: int, seed: int) -> list[Tensor]:
    """x, share, scale, zero-point, grad: ties, zeros, values at the clamped ends and far beyond; scales are powers of
    two with odd seeds; tables are cut out of larger ones, as the learners hand them over."""
    g = torch.Generator().manual_seed(seed)
    shape, of_share, of_scale = (sized(part, batch) for part in FORMS[form])
    share = torch.softmax(torch.randn((*of_share, count + 3), generator=g), dim=-1)[..., 1 : count + 1].movedim(-1, 0)
    scale = torch.rand((count, *of_scale, 3), generator=g)[..., 1] * 0.2 + 0.05
    scale = torch.exp2(torch.log2(scale).round()) if seed % 2 else scale
    zero = torch.randint(0, top + 1, scale.shape, generator=g).float()
    x = torch.randn(shape, generator=g) * (top + 1) * 0.1
    pick = torch.rand(shape, generator=g)
    step, low = scale[seed % count], -zero[seed % count]
    ends = low + torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, float(top))
    ends += torch.randint(-1, 2, shape, generator=g) * 0.5
    x = torch.where(pick < 0.2, (torch.randint(-9, 9, shape, generator=g) + 0.5) * step, x)
    x = torch.where((pick >= 0.2) & (pick < 0.5), ends * step, x)
    x.view(-1)[::53] = 0.0
    if x.numel() > 300:
        x.view(-1)[100:104] = torch.tensor([torch.inf, -torch.inf, 3e38, -6e4])
    return [x, share, scale, zero, torch.randn(shape, generator=g)]


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 as the interpreter writes it: to bfloat16 without rounding, unlike a GPU."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The values in the orders of memory that layers see."""
    return [x, x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 and x.shape[2] > 1 else [x]


def gradients(given: list[Tensor], top: int, needs: tuple[bool, ...], form: FusedMixture | None, **how: Any) -> Any:
    """(mixture, gradients of what needs them)."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(given[:4], needs, strict=True)]
    out = mixture(leaves[0], leaves[1], leaves[2], leaves[3], top, form, **how)
    out.backward(given[4])
    return out.detach(), [leaf.grad for leaf in leaves]


def compare(given: list[Tensor], top: int, needs: tuple[bool, ...], through: bool, found: dict[str, float]) -> None:
    """One case, in float32 and in the dtype of x."""
    fused = FusedMixture(lambda *tensors: True, triton_mixture.forward, triton_mixture.backward)
    x, dtype = given[0], given[0].dtype
    plain, want = gradients(given, top, needs, None, straight_through=through)
    ours, got = gradients(given, top, needs, fused, straight_through=through)
    wide = mixture(x.float(), *given[1:4], top)
    assert torch.equal(plain, wide.to(dtype)) and ours.stride() == x.stride() and bool(ours.isfinite().all())
    found["layouts"] += not x.is_contiguous()
    found["wrong"] += int((truncated(wide, dtype) != ours).sum())
    found["cases"] += 1
    found["values"] += x.numel()
    if needs[0]:
        exact = gradients([given[0].float(), *given[1:4], given[4].float()], top, needs, None, straight_through=through)
        found["wrong_dx"] += int((truncated(exact[1][0], dtype) != got[0]).sum())
        found["none_through"] += not through and not bool(got[0].any())
    sizes = [given[4].float().abs().sum() * part for part in ((top + 1) * float(given[2].max()), top + 1, 1)]
    for a, b, size, need in zip(want[1:], got[1:], sizes, needs[1:], strict=True):
        assert (a is not None) == (b is not None) == need
        if need:
            assert a.shape == b.shape and b.dtype == torch.float32 and bool(b.isfinite().all())
            found["tables"] += 1
            found["worst_table"] = max(found["worst_table"], float(((a - b).abs() / size).max()))


def compare_all(forms: list[str], sizes: list[tuple[int, int]]) -> dict[str, float]:
    """Every form, with (batch, count); dtypes, bits and what is wanted in turn. The counts."""
    names = ("cases", "layouts", "values", "wrong", "wrong_dx", "tables", "none_through")
    found: dict[str, float] = dict.fromkeys(names, 0) | {"worst_table": 0.0}
    for i, (form, (batch, count)) in enumerate(itertools.product(forms, sizes)):
        dtype, top = DTYPES[i % 3], TOPS[(i + i // 3) % 3]
        x, *tables, grad = example(form, batch, count, top, i)
        for lying in layouts(x.to(dtype)):
            needs = (True, True, True, i % 4 == 0) if i % 6 else (i % 4 == 0, True, False, False)
            compare([lying, *tables, grad.to(dtype)], top, needs, i % 7 != 1, found)
    return found


def main() -> None:
    """Compare everything and print the counts; with an argument, those of each fault in a few forms."""
    if "faults" not in sys.argv:
        found: dict[str, Any] = compare_all(list(FORMS), [(1, 1), (1, 8), (3, 1), (3, 2), (3, 8)])
    else:
        found = {}
        for name in FAULTS:
            fault(name)
            found[name] = compare_all(["samples", "both", "channels"], [(3, 3)])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
