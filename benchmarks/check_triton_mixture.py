"""Checks the one-pass kernels of mixtures of quantizers (`bitbrush.numbers.mixture`) on a GPU, and times them.

    python benchmarks/check_triton_mixture.py [--out FOLDER] [--smoke]

As `check_triton_fake` does it: values and dx bit for bit against the torch form, the tables' gradients against float64
sums, twice, and from a CUDA graph; with tables for samples, segments and channels. ``--smoke`` runs small shapes,
without a GPU the torch form against itself. The exit status is 1 where bits differ or a sum is off.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from check_triton_fake import DTYPES, captured, ended, good, same, seconds
from torch import Tensor

from bitbrush.kernels import triton_mixture
from bitbrush.numbers.codec import decode, reciprocal
from bitbrush.numbers.mixture import FusedMixture, mixture

MIXED = {  # shapes of x, of each share and of each scale
    "picture": ((32, 128, 32, 32), (32, 1, 1, 1), (1, 1, 1, 1)), "linear": ((32, 512), (32, 1), (1, 1)),
    "same time": ((32, 256, 16, 16), (1, 1, 1, 1), (1, 1, 1, 1)),
    "two segments": ((32, 384, 16, 16), (32, 1, 1, 1), (1, 384, 1, 1)),
    "deep segments": ((32, 512, 4, 4), (32, 1, 1, 1), (1, 512, 1, 1)),
    "channels": ((32, 256, 16, 16), (32, 256, 1, 1), (32, 1, 1, 1)),
    "tokens": ((8, 1024, 640), (8, 1, 1), (1, 1, 1)), "channels of tokens": ((8, 1024, 320), (8, 1, 320), (8, 1, 1)),
    "ragged": ((3, 77, 67), (3, 1, 1), (1, 1, 67)),
}  # fmt: skip
SMALL_MIXED = {
    "picture": ((3, 8, 5, 4), (3, 1, 1, 1), (1, 1, 1, 1)), "two segments": ((3, 6, 5, 4), (3, 1, 1, 1), (1, 6, 1, 1)),
    "channels of tokens": ((2, 9, 10), (2, 1, 10), (2, 1, 1)),
}  # fmt: skip


def mixed_example(kind: str, smoke: bool, dtype: torch.dtype, count: int, top: int, seed: int) -> list[Tensor]:
    """(x, share, scale, zero_point, grad) with ties, values at and beyond the clamped ends, zeros and infinities."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator(device).manual_seed(seed)
    shape, of_share, of_scale = (SMALL_MIXED if smoke else MIXED)[kind]
    share = torch.softmax(torch.randn((count, *of_share), generator=g, device=device), 0)
    scale = torch.rand((count, *of_scale), generator=g, device=device) * 0.02 + 0.01
    scale = torch.exp2(torch.log2(scale).round()) if seed % 2 else scale  # exact ties
    zero = torch.randint(0, top + 1, scale.shape, generator=g, device=device).float()
    x = torch.randn(shape, generator=g, device=device) * (top + 1) * 0.01
    pick, step, low = torch.rand(shape, generator=g, device=device), scale[seed % count], -zero[seed % count]
    x = torch.where(pick < 0.1, (torch.round(x / step) + 0.5) * step, x)
    x = torch.where(pick > 0.9, (low + torch.where(pick > 0.95, 0.0, top + 0.5)) * step, x)
    x.view(-1)[::97] = 0.0
    if x.numel() > 1000:
        x.view(-1)[100:103] = torch.tensor([torch.inf, -torch.inf, 3e38], device=device)
    grad = torch.randn(shape, generator=g, device=device).to(dtype)
    x = x.to(dtype)
    if x.ndim == 4 and seed % 3 == 1:
        x = x.contiguous(memory_format=torch.channels_last)
    return [x, share, scale, zero, grad]


def run_mixed(case: list[Tensor], top: int, fused: FusedMixture | None) -> tuple[Tensor, ...]:
    """(y, dx, dshare, dscale, dzero)."""
    leaves = [t.detach().requires_grad_() for t in case[:4]]
    y = mixture(leaves[0], leaves[1], leaves[2], leaves[3], top, fused)
    return (y.detach(), *torch.autograd.grad(y, leaves, case[4]))


def mixed_error(case: list[Tensor], top: int, found: tuple[Tensor, ...]) -> float:
    """The worst error of a table's gradient against float64 sums, relative to the sum of magnitudes."""
    x, share, scale, zero, grad = case
    worst = 0.0
    for k in range(len(share)):
        v, whole = x.float() * reciprocal(scale[k]), grad.double()
        code = torch.round(v) + zero[k]
        inside, end = (code >= 0) & (code <= top), code.clamp(0, top)
        terms = (whole * decode(end, scale[k], zero[k]),
                 share[k] * whole * torch.where(inside, torch.round(v) - v, end - zero[k]),
                 torch.where(inside, torch.zeros_like(whole), -(share[k] * whole * scale[k])))
        for term, got, table in zip(terms, found, (share, scale, zero), strict=True):
            exact, size = term.sum_to_size(table[k].shape), term.abs().sum_to_size(table[k].shape) + 1e-30
            worst = max(worst, float(((got[k].double() - exact).abs() / size).max()))
    return worst


def compare_mixed(case: list[Tensor], top: int, fused: FusedMixture | None, repeats: int) -> dict[str, Any]:
    """Counts of wrong bits, the worst relative error of the sums, and microseconds of both forms."""
    plain, ours = run_mixed(case, top, None), run_mixed(case, top, fused)
    found = {
        "values": case[0].numel(), "fits": fused is None or fused.fits(*case[:4]),
        "wrong_forward": int((ours[0] != plain[0]).sum()), "wrong_dx": int((ours[1] != plain[1]).sum()),
        "table_error": mixed_error(case, top, ours[2:]), "strides_kept": ours[0].stride() == case[0].stride(),
    }
    if fused is not None:
        again, replayed = run_mixed(case, top, fused), captured(lambda: run_mixed(case, top, fused))
        found["repeatable"] = all(same(a, b) for a, b in zip(ours, again, strict=True))
        found["graph_equal"] = all(same(a, b) for a, b in zip(ours, replayed, strict=True))
    for name, form in (("torch", None), ("fused", fused)):
        both = seconds(lambda form=form: run_mixed(case, top, form), repeats)  # type: ignore[misc]
        found[f"{name}_both_us"] = round(both * 1e6, 1)
    return found


def check_mixtures(fused: FusedMixture | None, smoke: bool) -> list[dict[str, Any]]:
    """All cases of mixtures, printed."""
    rows: list[dict[str, Any]] = []
    print(f"{'mixture':24}{'dtype':6}{'K':>3}{'top':>5} {'values':>10} {'wrong':>6} {'wrong dx':>9} {'sums':>8}  "
          "torch us   fused us")
    cases = itertools.product(SMALL_MIXED if smoke else MIXED, DTYPES.items(), (1, 8))
    for i, (name, (kind, dtype), count) in enumerate(cases):
        top = (15, 63, 255)[(i + i // 3) % 3]
        case = mixed_example(name, smoke, dtype, count, top, i)
        found = compare_mixed(case, top, fused, 2 if smoke else 10)
        rows.append({"shape": list(case[0].shape), "name": name, "kind": "mixture", "dtype": kind, "count": count,
                     "top": top, "ok": good(found), **found})
        print(f"{name:24}{kind:6}{count:3}{top:5} {found['values']:10} {found['wrong_forward']:6} "
              f"{found['wrong_dx']:9} {found['table_error']:8.1e}  {found['torch_both_us']:8}   "
              f"{found['fused_both_us']:8}{'' if good(found) else '  WRONG'}")
    return rows


def main() -> int:
    """Run every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes; needs no GPU")
    parser.add_argument("--out", type=Path, help="folder for triton_mixture.json")
    args = parser.parse_args()
    fused = triton_mixture.build()
    if fused is None and not args.smoke:
        print("Triton cannot build here (no CUDA device, no Triton, or no C compiler): use --smoke")
        return 1
    rows = check_mixtures(fused, args.smoke)
    return ended(rows, fused is not None, args.out and args.out / "triton_mixture.json")


if __name__ == "__main__":
    sys.exit(main())
