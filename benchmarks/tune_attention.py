"""Attention on codes in every cut, beside torch's flash attention in bf16 and the written-out form that it replaces.

    python benchmarks/tune_attention.py [--out FOLDER] [--budget SECONDS]              # a CUDA device with Triton
    TRITON_INTERPRET=1 python benchmarks/tune_attention.py --smoke                     # tiny shapes in the interpreter

What it is for: to choose the rule of `bitbrush.kernels.triton_attention.cut`. ``codes`` is what a step takes, three
encodes with it; ``cuts`` have the codes. Times are of CUDA graphs of many launches, median of five. Written after every
shape.
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

from bitbrush.kernels import attention_ops, triton_attention
from bitbrush.kernels.triton_attention import Cut, Table
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


def measured(shape: tuple[int, ...], device: str, small: bool) -> dict[str, Any]:
    """Microseconds of one attention."""
    batch, heads, queries, keys, size = shape
    q, k, v = (torch.randn((batch, n, heads * size), device=device, dtype=torch.bfloat16).unflatten(-1, (heads, size))
               .transpose(1, 2) for n in (queries, keys, keys))
    made, times = processor(device), {}
    codes_q, codes_k, codes_v, scale, zero, rows, *rest = attention_ops.given(made, q, k, v)
    tables = [Table(*each) for each in zip(scale, zero, rows, strict=True)]
    times["flash"] = graph_time(lambda: F.scaled_dot_product_attention(q, k, v), device)
    times["written_out"] = graph_time(lambda: made._product(q, k, v, None), device)
    times["codes"] = graph_time(lambda: attention_ops.run(made, q, k, v), device)
    cuts = []
    for cut in (Cut(16, 32, 4, 2),) if small else CUTS:
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
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    with torch.no_grad():
        for shape in ((1, 2, 19, 21, 40),) if args.smoke else SHAPES:
            if time.monotonic() - start > args.budget:
                continue
            rows.append(measured(shape, "cpu" if args.smoke else "cuda", args.smoke))
            print(f"{shape!s:28s} {rows[-1]['us']}  best {rows[-1]['cuts'][0]}", flush=True)
            if not args.smoke:
                keep(args.out, "tune_attention", rows)


if __name__ == "__main__":
    main()
