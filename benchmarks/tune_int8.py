"""Every cut of the int8 products at shapes of SDXL, SD 1.5 and FLUX; bf16 (cuBLAS, cuDNN) and ``torch._int_mm`` beside.

    python benchmarks/tune_int8.py [--out FOLDER] [--budget SECONDS] [--only TEXT]     # a CUDA device with Triton
    TRITON_INTERPRET=1 python benchmarks/tune_int8.py --smoke                          # tiny shapes in the interpreter

What it is for: to choose `bitbrush.kernels.tuning.CANDIDATES` and its rule, and to see what joining saves: layers of
one size as one product beside one product each, and a product with GEGLU and encode in it beside the three in turn
(GEGLU and encode as operations of their own, and as the compiler joins them). Each time is of a CUDA graph of many
launches (no gaps of the launching), median of five; ``early`` is the fastest cut's where a kernel is launched before
the one ahead ends (``BITBRUSH_EARLY``). TOP/s count multiply-adds as two. Written after every shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import triton_encode, triton_int8
from bitbrush.kernels.gluon_int8 import PAIR, TURNS
from bitbrush.kernels.triton_int8 import JOINED, ONE_ROW, Config, Extra, Frame, Next, Tables, fitting
from bitbrush.kernels.tuning import CANDIDATES, GATHERED, Problem, flows
from bitbrush.numbers.codec import encode
from bitbrush.numbers.packing import padded

RESULTS = Path(__file__).parent / "results" / "speed"
PRODUCTS = (
    (2048, 10240, 1280), (8192, 5120, 640), (2048, 1280, 5120), (8192, 640, 2560), (2048, 1280, 1280),
    (8192, 640, 640), (4608, 12288, 3072), (4608, 3072, 3072), (4608, 3072, 15360), (154, 1280, 2048),
    (8192, 320, 320), (8192, 320, 1280), (2048, 640, 640), (2048, 640, 2560), (512, 1280, 1280),
)
"""(M, N, K): SDXL at 1024 and batch 2, then FLUX's single block, keys and values of the prompt, SD 1.5 at 512."""
CONVOLUTIONS = (
    (2, 128, 320, 320), (2, 64, 640, 640), (2, 32, 1280, 1280), (2, 128, 960, 320), (2, 64, 1920, 640),
    (2, 32, 2560, 1280), (2, 64, 320, 640), (2, 128, 640, 320), (2, 64, 320, 320), (2, 32, 640, 640),
    (2, 16, 1280, 1280), (2, 8, 1280, 1280), (2, 64, 960, 320),
)
"""(batch, side, channels, rows), 3x3."""
LAYERS = ((2048, 1280, 1280, 3), (8192, 640, 640, 3), (154, 1280, 2048, 2), (154, 640, 2048, 2))
"""(M, N, K, layers): queries, keys and values; keys and values of the prompt. Each layer has codes of its own."""
GATES = ((2048, 10240, 1280), (8192, 5120, 640))
"""(M, 2 N, K)."""
MORE = (
    Config(128, 128, 128, 8, 8, 3, together=1),  # what the limit of registers is worth
    Config(128, 128, 128, 16, 8, 3), Config(128, 128, 64, 8, 4, 6), Config(128, 64, 128, 8, 4, 3, together=3),
    Config(64, 256, 64, 8, 4, 3), Config(128, 256, 128, 8, 8, 3, together=1),
    Config(64, 16, 128, 8, 4, 8, together=1), Config(128, 128, 64, 8, 8, 4, tma=False),
)  # fmt: skip
FLOWS = (
    Config(64, 256, 128, 8, 8, 4, flow=TURNS), Config(128, 192, 128, 8, 8, 4, flow=PAIR),
    Config(256, 128, 128, 8, 8, 3, flow=PAIR), Config(256, 192, 128, 8, 8, 3, flow=PAIR),
    Config(128, 256, 128, 8, 8, 4, flow=PAIR), Config(128, 64, 128, 8, 8, 6, flow=PAIR),
    Config(128, 64, 128, 8, 8, 6, flow=TURNS),
)  # fmt: skip
"""Beside those of `tuning.FLOWS`; not for gated products."""


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


def tables(columns: int, device: str) -> Tables:
    """One segment, one row."""
    scale = torch.rand((1, 1), device=device) * 0.01 + 0.01
    return Tables(scale, torch.full((1, 1), 120, dtype=torch.uint8, device=device),
                  torch.zeros(1, dtype=torch.int64, device=device), ONE_ROW, torch.rand((columns, 1), device=device),
                  torch.zeros((1, columns), dtype=torch.int32, device=device))


def int8(shape: tuple[int, ...], device: str) -> Tensor:
    """Random int8."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def cuts(widths: tuple[int, ...], frame: Frame | None, gated: bool = False) -> list[Config]:
    """What is tried, without repetitions."""
    written_out = (*flows(Problem(1, 1, widths, 1, 1, gated=gated)), *(() if gated else FLOWS))
    return list(dict.fromkeys(fitting(c, widths, frame) for c in (*CANDIDATES, *GATHERED, *MORE, *written_out)))


def measured(run: Callable[[Config], Any], tried: list[Config], device: str) -> list[dict[str, Any]]:
    """Time of every cut that runs, fastest first; the first one's also where kernels are launched early."""
    out = []
    for cut in [Config(16, 32, 32, 2, 4, 2)] if device == "cpu" else tried:
        try:
            out.append({"us": round(graph_time(lambda cut=cut: run(cut), device), 2), **asdict(cut)})
        except Exception as error:  # noqa: BLE001 - a cut that the GPU cannot hold is a result here
            out.append({"error": f"{type(error).__name__}: {str(error)[:80]}", **asdict(cut)})
            torch.cuda.synchronize() if device == "cuda" else None
    out.sort(key=lambda row: row.get("us", float("inf")))
    if "us" in out[0]:
        os.environ["BITBRUSH_EARLY"] = "1"
        triton_int8.early.cache_clear()
        try:
            out[0]["early_us"] = round(graph_time(lambda: run(chosen(out)), device), 2)
        finally:
            del os.environ["BITBRUSH_EARLY"]
            triton_int8.early.cache_clear()
    return out


def chosen(found: list[dict[str, Any]]) -> Config:
    """The fastest cut."""
    return Config(**{key: value for key, value in found[0].items() if key in Config.__dataclass_fields__})


def bf16(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random values."""
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def product(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """One linear shape."""
    m, n, k = shape
    a, w, table = int8((m, k), device), int8((n, k), device), tables(n, device)
    extra = Extra(torch.zeros(n, device=device))
    found = measured(lambda cut: triton_int8.product(a, w, table, (k,), torch.bfloat16, extra=extra, config=cut),
                     cuts((k,), None), device)
    x, weight = bf16(device, (m, k), (n, k))
    peers = {"bf16": graph_time(lambda: torch.nn.functional.linear(x, weight), device)}
    if m > 16:
        peers["int_mm"] = graph_time(lambda: torch._int_mm(a, w.t()), device)
    return {"kind": "product", "shape": shape, "flops": 2 * m * n * k, "peers": peers, "cuts": found}


def convolution(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """One 3x3 shape."""
    batch, side, channels, rows = shape
    frame, width = Frame(batch, side, side, (3, 3), 1, 1), padded((channels,))[0]
    a, w, table = int8((frame.rows, width), device), int8((rows, 9 * width), device), tables(rows, device)
    extra = Extra(torch.zeros(rows, device=device))
    found = measured(lambda cut: triton_int8.product(a, w, table, (width,), torch.bfloat16, frame=frame, extra=extra,
                                                     config=cut), cuts((width,), frame), device)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in bf16(
        device, (batch, channels, side, side), (rows, channels, 3, 3)))
    peers = {"bf16": graph_time(lambda: torch.nn.functional.conv2d(x, weight, padding=1), device)}
    flops = 2 * batch * side * side * rows * channels * 9
    return {"kind": "convolution", "shape": shape, "flops": flops, "peers": peers, "cuts": found}


def joined(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Layers of one size as one product; beside it one product each, in the cut that is the fastest for them."""
    m, n, k, parts = shape
    a, w, one, dtype = int8((parts * m, k), device), int8((parts * n, k), device), tables(n, device), torch.bfloat16
    each = [(one.scale, one.zero_point, one.times)] * (parts - 1)
    table = tables(parts * n, device)._replace(kind=JOINED, others=tuple(each))
    found = measured(lambda cut: triton_int8.product(a, w, table, (k,), dtype, config=cut), cuts((k,), None), device)
    left, right = a.chunk(parts), w.chunk(parts)
    single = chosen(measured(lambda cut: triton_int8.product(left[0], right[0], one, (k,), dtype, config=cut),
                             cuts((k,), None), device))

    def in_turn() -> None:
        for p in range(parts):
            triton_int8.product(left[p], right[p], one, (k,), dtype, config=single)

    x, weight = bf16(device, (m, k), (parts * n, k))
    peers = {"in turn": graph_time(in_turn, device),
             "bf16 joined": graph_time(lambda: torch.nn.functional.linear(x, weight), device)}
    return {"kind": "joined", "shape": shape, "flops": 2 * m * n * k * parts, "peers": peers, "cuts": found}


def gated(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """A product with GEGLU and the next layer's encode in it; beside it the three in turn."""
    m, n, k = shape
    a, w, table, bias = int8((m, k), device), int8((n, k), device), tables(n, device), torch.zeros(n, device=device)
    dtype, half = torch.bfloat16, (n // 2,)
    then = Next(1 / table.scale, table.zero_point, table.times, 255)
    found = measured(lambda cut: triton_int8.gated(a, w, table, k, dtype, then, bias=bias, config=cut),
                     cuts((k,), None, gated=True), device)
    single = chosen(measured(lambda cut: triton_int8.product(a, w, table, (k,), dtype, extra=Extra(bias), config=cut),
                             cuts((k,), None), device))

    def values() -> Tensor:
        return triton_int8.product(a, w, table, (k,), dtype, extra=Extra(bias), config=single)

    def written_out(both: Tensor) -> Tensor:
        hidden, gate = both.chunk(2, 1)
        y = hidden * torch.nn.functional.gelu(gate)
        return (encode(y, then.inverse, then.zero_point.float(), 255) - 128).to(torch.int8)

    def in_turn() -> Tensor:
        hidden, gate = values().chunk(2, 1)
        return triton_encode.encode(hidden * torch.nn.functional.gelu(gate), then.inverse, then.zero_point, then.times,
                                    ONE_ROW, half, 255)

    after = torch.compile(written_out) if device == "cuda" else written_out
    peers = {"in turn": graph_time(in_turn, device), "compiled": graph_time(lambda: after(values()), device),
             "product alone": graph_time(values, device)}
    return {"kind": "gated", "shape": shape, "flops": 2 * m * n * k, "peers": peers, "cuts": found}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    best = next((c for c in row["cuts"] if "us" in c), None)
    if best is None:
        return f"{row['kind']:12s} {row['shape']!s:28s} nothing ran: {row['cuts'][0]['error']}"
    cut = "x".join(str(best[k]) for k in ("bm", "bn", "bk"))
    cut += f" w{best['warps']} s{best['stages']} {best['flow'] or 'tma' * best['tma']}, early {best['early_us']:.1f} us"
    peers = "  ".join(f"{k} {v:.1f} us ({v / best['us']:.2f} x)" for k, v in row["peers"].items())
    return (f"{row['kind']:12s} {row['shape']!s:28s} {best['us']:9.1f} us {row['flops'] / best['us'] / 1e6:7.0f} TOP/s"
            f"  {peers}   {cut}")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no new shape is begun")
    parser.add_argument("--only", default="", help="product, convolution, joined or gated")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    torch.backends.cudnn.benchmark = True
    shapes: list[tuple[Callable[..., dict[str, Any]], tuple[int, ...]]] = []
    for kind, small, given in ((gated, (40, 48, 64), GATES), (joined, (40, 24, 64, 3), LAYERS),
                               (product, (40, 24, 64), PRODUCTS), (convolution, (1, 6, 32, 16), CONVOLUTIONS)):
        shapes += [(kind, shape) for shape in ((small,) if args.smoke else given)]
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for measure, shape in shapes:
        if time.monotonic() - start > args.budget or args.only not in measure.__name__:
            continue
        rows.append(measure(shape, device))
        print(line(rows[-1]), flush=True)
        if not args.smoke:
            keep(args.out, "tune_int8", rows)


def keep(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write what is known of a run of ``benchmarks/NAME.py``."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
             "command": f"python benchmarks/{name}.py", "rows": rows}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
