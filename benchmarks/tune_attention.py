"""Attention on codes in every cut, beside torch's flash attention in bf16 and the written-out form that it replaces.

    python benchmarks/tune_attention.py [--out FOLDER] [--budget SECONDS]              # a CUDA device with Triton
    TRITON_INTERPRET=1 python benchmarks/tune_attention.py --smoke                     # tiny shapes in the interpreter

What it is for: to choose the rules of `bitbrush.kernels.triton_attention.cut` and `attend_ops.fits`. ``codes`` is what
a step takes, three encodes with it; ``cuts`` have the codes; ``attend_encode`` has float operands and gives codes.
Times are of CUDA graphs of many launches, median of five. Written after every shape.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tune_int8 import RESULTS, graph_time, keep

from bitbrush.kernels import attend_ops, attention_ops, triton_attention  # noqa: F401 - the first registers its operation
from bitbrush.kernels.triton_attention import Cut, Table
from bitbrush.kernels.triton_int8 import ONE_ROW
from bitbrush.network.attention import OPERANDS, QuantAttention
from bitbrush.network.clock import Clock
from bitbrush.numbers.grid import ActivationSpec, LayerSpec

SHAPES = (
    (2, 10, 4096, 4096, 64), (2, 20, 1024, 1024, 64), (2, 10, 4096, 77, 64), (2, 20, 1024, 77, 64),
    (2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80), (2, 8, 256, 256, 160), (2, 8, 4096, 77, 40), (2, 8, 64, 77, 160),
)
"""(samples, heads, queries, keys, channels of a head): SDXL at 1024, SD 1.5 at 512, batch 2."""
CUTS = tuple(Cut(bm, bn, warps, stages) for bm, warps in ((64, 4), (128, 8), (128, 4)) for bn in (32, 64, 128)
             for stages in (2, 3, 4))  # fmt: skip


def processor(device: str) -> QuantAttention:
    """A processor with 8 bits an operand."""
    made = QuantAttention(None, dict.fromkeys(OPERANDS, LayerSpec(activation=ActivationSpec())), Clock(), 1).to(device)
    for name in OPERANDS:
        quantizer, softmax = getattr(made, name), name == "softmax"
        quantizer.set_scale(torch.full_like(quantizer.scale, (0.1 if softmax else 8.0) / 255),
                            torch.full_like(quantizer.zero_point, 0 if softmax else 128))
    made.face = "packed"
    return made


def encoded(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, float]:
    """Of float operands and the encode of what follows: as one operation, and in turn."""
    table = (torch.full((1, 1), 40.0, device=device), torch.full((1, 1), 131, dtype=torch.uint8, device=device),
             torch.zeros(1, dtype=torch.int64, device=device))
    width, ops = q.shape[1] * q.shape[3], torch.ops.bitbrush

    def in_turn() -> Tensor:
        rows = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
        return ops.int8_encode(rows, *table, ONE_ROW, [width], 255, [], 1, None)

    return {"attend_encode": graph_time(lambda: ops.attend_encode(q, k, v, *table, 255, None), device),
            "flash, encode": graph_time(in_turn, device)}


def measured(shape: tuple[int, ...], device: str, small: bool, floats: bool = False) -> dict[str, Any]:
    """Microseconds of one attention; with ``floats`` without the cuts of the one on codes."""
    batch, heads, queries, keys, size = shape
    q, k, v = (torch.randn((batch, n, heads * size), device=device, dtype=torch.bfloat16).unflatten(-1, (heads, size))
               .transpose(1, 2) for n in (queries, keys, keys))
    made, times = processor(device), {}
    codes_q, codes_k, codes_v, scale, zero, rows, *rest = attention_ops.given(made, q, k, v)
    tables = [Table(*each) for each in zip(scale, zero, rows, strict=True)]
    times["flash"] = graph_time(lambda: F.scaled_dot_product_attention(q, k, v), device)
    times["written_out"] = graph_time(lambda: made._product(q, k, v, None), device)
    times["codes"] = graph_time(lambda: attention_ops.run(made, q, k, v), device)
    times |= encoded(q, k, v, device)
    cuts = []
    for cut in () if floats else (Cut(16, 32, 4, 2),) if small else CUTS:
        def run(cut: Cut = cut) -> Tensor:
            return triton_attention.attention(codes_q, codes_k, codes_v, tables, *rest, config=cut)

        try:
            cuts.append({"us": round(graph_time(run, device), 2), **asdict(cut)})
        except Exception as error:  # noqa: BLE001 - a cut that the GPU cannot hold is a result here
            cuts.append({"error": f"{type(error).__name__}: {str(error)[:80]}", **asdict(cut)})
            torch.cuda.synchronize() if device == "cuda" else None
    cuts.sort(key=lambda row: row.get("us", float("inf")))
    return {"shape": shape, "us": {name: round(us, 2) for name, us in times.items()}, "cuts": cuts,
            "rule": asdict(triton_attention.cut(queries, size))}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no new shape is begun")
    parser.add_argument("--floats", action="store_true", help="without the cuts of the one on codes")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    with torch.no_grad():
        for shape in ((1, 2, 19, 21, 40),) if args.smoke else SHAPES:
            if time.monotonic() - start > args.budget:
                continue
            rows.append(measured(shape, "cpu" if args.smoke else "cuda", args.smoke, args.floats))
            print(f"{shape!s:28s} {rows[-1]['us']}  best {rows[-1]['cuts'][:1]}", flush=True)
            if not args.smoke:
                keep(args.out, "tune_attention", rows)


if __name__ == "__main__":
    main()
