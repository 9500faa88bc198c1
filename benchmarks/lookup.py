"""CPU: looked-up sums (`bitbrush.kernels.cpu_lookup`) beside the reference, by size of the layer and number of inputs.

    PYTHONPATH=src python benchmarks/lookup.py [--smoke] [--out benchmarks/results/kernels]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.kernels import cpu_lookup, reference
from bitbrush.network.codebook_layers import CodebookLinear
from bitbrush.numbers.grid import Grid, LayerSpec, WeightSpec

LAYERS = [(320, 320), (1280, 1280), (2880, 320), (5760, 640)]  # columns and rows; the last two are those of 3x3 kernels
INPUTS = [1, 4, 16, 64, 256, 1024]
REPEATS = 7


def packed(features: int, rows: int, bits: int) -> CodebookLinear:
    """A packed layer of random codewords, three of them a group."""
    generator = torch.Generator().manual_seed(0)
    spec = LayerSpec(weight=WeightSpec(grid=Grid(kind="codebook", bits=bits), codebooks=3))
    layer = CodebookLinear.wrap(nn.Linear(features, rows), spec, None, 1)
    codes = torch.randint(0, 1 << bits, (rows, features // 8, 3), generator=generator)
    books, scale = torch.randn(3, 1 << bits, 8, generator=generator), torch.rand(rows, generator=generator)
    layer.set_codes(codes, books, scale / features**0.5)
    layer.pack()
    return layer


def milliseconds(kernel: kernels.Kernel, layer: CodebookLinear, x: Tensor) -> float:
    """The fastest of a few forwards."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        kernel(layer, x)
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken[1:])


@torch.no_grad()
def measure(smoke: bool) -> list[dict[str, Any]]:
    """One row a layer, bits and number of inputs."""
    rows = []
    for features, count in LAYERS[:1] if smoke else LAYERS:
        for bits in (6, 8):
            layer = packed(features, count, bits)
            for inputs in INPUTS[:2] if smoke else INPUTS:
                x = torch.randn(inputs, features, generator=torch.Generator().manual_seed(1))
                found = {"features": features, "rows": count, "bits": bits, "inputs": inputs,
                         "reference_ms": milliseconds(reference.run, layer, x),
                         "lookup_ms": milliseconds(cpu_lookup.looked_up, layer, x),
                         "run_ms": milliseconds(cpu_lookup.run, layer, x)}
                rows.append(found)
                print(f"{features:6} x {count:5}  {bits} bits  {inputs:5} inputs   "
                      f"reference {found['reference_ms']:8.2f} ms   looked up {found['lookup_ms']:8.2f} ms   "
                      f"run {found['run_ms']:8.2f} ms")
    return rows


def main() -> None:
    """Measure, print, and write ``cpu-lookup.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="folder for the JSON (a smoke run writes none unless it is given)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.smoke)
    out = args.out or (None if args.smoke else str(Path(__file__).parent / "results" / "kernels"))
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        facts = {"machine": platform.processor() or platform.machine(), "threads": args.threads, "rows": rows,
                 "torch": torch.__version__, "command": f"python benchmarks/lookup.py --threads {args.threads}"}
        (Path(out) / "cpu-lookup.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
