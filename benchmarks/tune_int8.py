"""Every cut of the int8 product at shapes of SDXL and FLUX, beside cuBLAS and cuDNN in bf16 and ``torch._int_mm``.

    python benchmarks/tune_int8.py [--out FOLDER] [--budget SECONDS] [--only TEXT]     # a CUDA device with Triton
    TRITON_INTERPRET=1 python benchmarks/tune_int8.py --smoke                          # tiny shapes in the interpreter

What it is for: to choose `bitbrush.kernels.tuning.CANDIDATES` and its rule. Times are of CUDA graphs of many launches
(no gaps of the launching), median of five; TOP/s count multiply-adds as two. Written after every shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import triton_int8
from bitbrush.kernels.triton_int8 import ONE_ROW, Config, Extra, Frame, Tables, fitting
from bitbrush.kernels.tuning import CANDIDATES
from bitbrush.numbers.packing import padded

RESULTS = Path(__file__).parent / "results" / "speed"
PRODUCTS = (
    (2048, 10240, 1280), (8192, 5120, 640), (2048, 1280, 5120), (8192, 640, 2560), (2048, 1280, 1280),
    (8192, 640, 640), (4608, 12288, 3072), (4608, 3072, 3072), (4608, 3072, 15360), (154, 1280, 2048),
)
"""(M, N, K): SDXL at 1024 and batch 2, then FLUX's single block, then keys and values of the prompt."""
CONVOLUTIONS = (
    (2, 128, 320, 320), (2, 64, 640, 640), (2, 32, 1280, 1280), (2, 128, 960, 320), (2, 64, 1920, 640),
    (2, 32, 2560, 1280), (2, 64, 320, 640), (2, 128, 640, 320),
)
"""(batch, side, channels, rows), 3x3."""
MORE = (Config(128, 128, 128, 8, 8, 3, persistent=True), Config(128, 256, 64, 8, 8, 4),
        Config(64, 256, 128, 8, 8, 3), Config(256, 64, 128, 8, 8, 4),
        Config(256, 128, 64, 8, 8, 4), Config(128, 128, 256, 8, 8, 2),
        Config(256, 256, 64, 8, 8, 3), Config(128, 256, 128, 4, 8, 3), Config(128, 256, 128, 16, 8, 3))


def graph_time(run: Callable[[], Any], device: str) -> float:
    """Microseconds of one run."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    run()
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[1:])


def tables(rows: int, columns: int, device: str) -> Tables:
    """One segment, one row."""
    scale = torch.rand((1, 1), device=device) * 0.01 + 0.01
    return Tables(scale, torch.full((1, 1), 120, dtype=torch.uint8, device=device),
                  torch.zeros(1, dtype=torch.int64, device=device), ONE_ROW, torch.rand((columns, 1), device=device),
                  torch.zeros((1, columns), dtype=torch.int32, device=device))


def int8(shape: tuple[int, ...], device: str) -> Tensor:
    """Random int8."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def cuts(widths: tuple[int, ...], frame: Frame | None) -> list[Config]:
    """What is tried, without repetitions."""
    return list(dict.fromkeys(fitting(c, widths, frame) for c in (*CANDIDATES, *MORE)))


def measured(a: Tensor, w: Tensor, table: Tables, width: int, frame: Frame | None, small: bool) -> list[dict[str, Any]]:
    """Time of every cut that runs, fastest first."""
    device, bias = a.device.type, torch.zeros(w.shape[0], device=a.device)
    out = []
    tried = [Config(16, 16, 32, 2, 4, 2)] if small else cuts((width,), frame)
    for cut in tried:
        def run(cut: Config = cut) -> Tensor:
            return triton_int8.product(a, w, table, (width,), torch.bfloat16, frame=frame, extra=Extra(bias),
                                       config=cut)

        try:
            out.append({"us": round(graph_time(run, device), 2), **asdict(cut)})
        except Exception as error:  # noqa: BLE001 - a cut that the GPU cannot hold is a result here
            out.append({"error": f"{type(error).__name__}: {str(error)[:80]}", **asdict(cut)})
            torch.cuda.synchronize() if device == "cuda" else None
    return sorted(out, key=lambda row: row.get("us", float("inf")))


def product(shape: tuple[int, ...], device: str, small: bool) -> dict[str, Any]:
    """One linear shape."""
    m, n, k = shape
    a, w = int8((m, k), device), int8((n, k), device)
    found = measured(a, w, tables(m, n, device), k, None, small)
    x, weight = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((m, k), (n, k)))
    peers = {"bf16": graph_time(lambda: torch.nn.functional.linear(x, weight), device)}
    if m > 16:
        peers["int_mm"] = graph_time(lambda: torch._int_mm(a, w.t()), device)
    return {"kind": "product", "shape": shape, "flops": 2 * m * n * k, "peers": peers, "cuts": found}


def convolution(shape: tuple[int, ...], device: str, small: bool) -> dict[str, Any]:
    """One 3x3 shape."""
    batch, side, channels, rows = shape
    frame, width = Frame(batch, side, side, (3, 3), 1, 1), padded((channels,))[0]
    a, w = int8((frame.rows, width), device), int8((rows, 9 * width), device)
    found = measured(a, w, tables(1, rows, device), width, frame, small)
    kind = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn((batch, channels, side, side), **kind).contiguous(memory_format=torch.channels_last)
    weight = torch.randn((rows, channels, 3, 3), **kind).contiguous(memory_format=torch.channels_last)
    peers = {"bf16": graph_time(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)}
    flops = 2 * batch * side * side * rows * channels * 9
    return {"kind": "convolution", "shape": shape, "flops": flops, "peers": peers, "cuts": found}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    best = next((c for c in row["cuts"] if "us" in c), None)
    if best is None:
        return f"{row['kind']:12s} {row['shape']!s:28s} nothing ran: {row['cuts'][0]['error']}"
    cut = "x".join(str(best[k]) for k in ("bm", "bn", "bk"))
    cut += f" w{best['warps']} s{best['stages']}" + " tma" * best["tma"] + " persistent" * best["persistent"]
    peers = "  ".join(f"{k} {v:.1f} us ({v / best['us']:.2f} x)" for k, v in row["peers"].items())
    return (f"{row['kind']:12s} {row['shape']!s:28s} {best['us']:9.1f} us {row['flops'] / best['us'] / 1e6:7.0f} TOP/s"
            f"  {peers}   {cut}")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no new shape is begun")
    parser.add_argument("--only", default="", help="product or convolution")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    torch.backends.cudnn.benchmark = True
    small: tuple[Any, ...] = (((40, 24, 64),), ((1, 6, 32, 16),))
    shapes = [(product, s) for s in (small[0] if args.smoke else PRODUCTS)]
    shapes += [(convolution, s) for s in (small[1] if args.smoke else CONVOLUTIONS)]
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for measure, shape in shapes:
        if time.monotonic() - start > args.budget or args.only not in measure.__name__:
            continue
        rows.append(measure(shape, device, args.smoke))
        print(line(rows[-1]), flush=True)
        if not args.smoke:
            args.out.mkdir(parents=True, exist_ok=True)
            facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                     "command": "python benchmarks/tune_int8.py", "rows": rows}
            (args.out / "tune_int8.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
