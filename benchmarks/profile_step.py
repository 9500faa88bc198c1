"""Where the time of a step goes: its kernels by name, with launches and microseconds.

    python benchmarks/profile_step.py sd15 bf16 w8a8              # a CUDA device
    python benchmarks/profile_step.py sd15 w8a8 --smoke           # a shrunk model on the CPU, to see that it runs

A step is one call of the denoiser as `benchmarks/speed.py` makes it, random weights and codes, eager, replayed from a
CUDA graph: the sum of the kernels beside the time of a replay is what the gaps between them cost. Names lose their
template arguments; those of Triton's kernels are the functions'. Launches are summed by name, and by name and grid,
which tells the shapes apart. Results: ``profile-MODEL.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))

from speed import models, networks, ours, timing

RESULTS = Path(__file__).parent / "results" / "speed"
STEPS, SHOWN, GRIDS = 5, 24, 200
Launch = tuple[str, str, float]


def replayed(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], float]:
    """What a profile looks at, and the milliseconds of a replay (0 without a GPU)."""
    if device != "cuda":
        call()
        return call, 0.0
    graph, _ = timing.captured(call)
    graph.replay()
    return graph.replay, 1e3 * statistics.median(timing.seconds(graph.replay, device) for _ in range(STEPS))


def kernels(call: Callable[[], Any], device: str) -> list[Launch]:
    """Every launch of `STEPS` steps; on a CPU every operation."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return launches(json.loads(path.read_text(encoding="utf-8")), cuda)


def launches(trace: dict[str, Any], cuda: bool) -> list[Launch]:
    """(name, grid, microseconds) of the trace's kernels; with ``cuda`` false of its operations, each with
    those it calls."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    return [(short(event["name"]), " x ".join(map(str, event.get("args", {}).get("grid", []))), float(event["dur"]))
            for event in trace["traceEvents"] if event.get("cat") in kinds and "dur" in event]  # fmt: skip


def summed(found: list[Launch], by_grid: bool) -> list[dict[str, Any]]:
    """Launches and microseconds a step of each name, or of each name and grid; the longest first."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, grid, time in found:
        entry = sums[name, grid if by_grid else ""]
        entry[0] += 1 / STEPS
        entry[1] += time / STEPS
    rows = [{"name": name, "launches": round(count, 1), "us": round(time, 1)} | ({"grid": grid} if by_grid else {})
            for (name, grid), (count, time) in sums.items()]  # fmt: skip
    return sorted(rows, key=lambda row: -row["us"])


def short(name: str) -> str:
    """A kernel's name without return type, namespaces' details and arguments."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    name = re.split(r"[<(]", name, maxsplit=1)[0] or name
    return name.replace("at::native::", "")[:70]


@torch.no_grad()
def measured(model: Any, name: str, device: str, smoke: bool) -> dict[str, Any]:
    """One form of one model."""
    dtype = torch.float32 if smoke else torch.bfloat16
    form = None if name == "bf16" else networks.FORMS[name]
    net = networks.build(model, form, device, dtype)
    if form is not None:
        ours.choose(net, device, smoke=smoke)
    given = model.arguments(device, dtype)
    call, milliseconds = replayed(lambda: net(**given), device)
    rows = kernels(call, device)
    return {"ms": round(milliseconds, 3), "kernels_ms": round(sum(row[2] for row in rows) / STEPS / 1e3, 3),
            "launches": round(len(rows) / STEPS), "kernels": summed(rows, by_grid=False),
            "grids": summed(rows, by_grid=True)[:GRIDS]}  # fmt: skip


def table(name: str, found: dict[str, Any]) -> str:
    """The longest kernels of a form."""
    head = f"{name}: {found['ms']} ms a replay, {found['kernels_ms']} ms in {found['launches']} kernels"
    rows = [*found["kernels"][:SHOWN], *found["grids"][:SHOWN]]
    return "\n".join([head, *(f"  {row['us']:9.1f} us  {row['launches']:6.1f} x  {row['name']}  {row.get('grid', '')}"
                              for row in rows)])  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("forms", nargs="+", choices=["bf16", *networks.FORMS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = "cpu" if args.smoke or not torch.cuda.is_available() else "cuda"
    model = models.find(args.model)
    model = model.shrunk() if args.smoke else model
    found: dict[str, Any] = {}
    for name in args.forms:
        found[name] = measured(model, name, device, args.smoke)
        print(table(name, found[name]), flush=True)
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found |= {"device": device_name, "torch": torch.__version__,
              "command": f"python benchmarks/profile_step.py {args.model} {' '.join(args.forms)}"}  # fmt: skip
    if not args.smoke:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"profile-{args.model}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
