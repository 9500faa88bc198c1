"""Arguments, parts, and the order in which they are measured within the budget."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speed import ceilings, kernels, memory, models, networks, peers, processes, record, steps, summary
from speed.record import Budget, Record

RESULTS = processes.HERE / "results" / "speed"
SMOKE = Path("work-speed") / "results"
BUDGET, SMOKE_BUDGET = 540.0, 150.0
SMOKE_COMPILES = ("flux",)
"""Models that a smoke run traces; tracing takes most of its time."""
WAY = 150.0
"""Seconds that a compiled way of a peer may take."""
SAME_RUN = datetime.timedelta(hours=2)
SMOKE_CHILD = "ceilings"
"""The part that a smoke run, too, measures in a process of its own."""

KERNEL_PARTS: dict[str, Callable[..., None]] = {
    "ceilings": ceilings.run, "conv": kernels.convolutions, "gemm": kernels.products, "encode": kernels.encodes,
    "layers": kernels.layers,
}  # fmt: skip
FORMS = {
    "sdxl": ("w8a8", "w4a8", "vq3", "w8a8-times", "w8a8-segments8", "w4a8-groups8", "w4"), "sd15": ("w8a8", "w4a8"),
    "dit": ("w8a8", "w4a8"), "flux": ("w8a8", "w4a8"), "emoji": ("w8a8", "w4a8"),
    "emoji-tiny": ("w8a8", "w4a8"),
}  # fmt: skip
"""Forms of each model, the most telling first."""
PARTS = (
    "ceilings", "conv", "gemm", "steps-sdxl", "encode", "steps-sd15", "memory", "layers",
    *(f"peer-{name}" for name in peers.PEERS), "steps-flux", "steps-dit", "steps-emoji", "steps-emoji-tiny",
)  # fmt: skip
"""All parts, the most telling first."""


def arguments(words: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parsed, with what a smoke run makes different."""
    parser = argparse.ArgumentParser("speed.py", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}; groups: kernels, steps, "
                        "peers; default: all, in this order")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="every part tiny on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"results, found again by the next call (default: "
                        f"benchmarks/results/speed; of a smoke run {SMOKE})")  # fmt: skip
    parser.add_argument("--budget", type=float, help=f"seconds for the whole run ({BUDGET:g}; with --smoke "
                        f"{SMOKE_BUDGET:g})")  # fmt: skip
    parser.add_argument("--forms", nargs="+", choices=["bf16", *networks.FORMS],
                        help="of a model's step and of memory (all)")
    parser.add_argument("--compile", choices=steps.WAYS, default="auto", help="how steps are compiled; auto: bf16 "
                        "whole and by blocks, forms with codes of activations by blocks, peers by blocks, then "
                        "whole")  # fmt: skip
    parser.add_argument("--way", type=float, default=WAY, help=f"seconds that a compiled way of a peer may take, its "
                        f"turns included ({WAY:g}); what was timed before is kept")  # fmt: skip
    parser.add_argument("--together", type=int, default=1, metavar="N", help="peers measured side by side (1): they "
                        "compile at the same time and are timed in turn, the others stopped; reckon with 20 GB of "
                        "the GPU each")  # fmt: skip
    parser.add_argument("--warm", type=float, default=0.0, metavar="SECONDS", help="before anything is timed, run all "
                        "parts side by side for at most so long, to compile what they need on all cores (0: do not); "
                        "they need the memory of all")  # fmt: skip
    parser.add_argument("--site", type=Path, help="folder with a folder for each library that a peer needs (torchao, "
                        "sdnq, ..), put first on the path of its process")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget what --out has of these parts")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.parts = chosen(args.parts, parser)
    args.out = args.out or (SMOKE if args.smoke else RESULTS)
    if args.budget is None:
        args.budget = SMOKE_BUDGET if args.smoke else BUDGET
    return args


def run_name(folder: Path) -> str:
    """Of this run: a new one, or the one that the folder holds, where that is hours old at most and of the same card.
    A machine that allows calls of minutes gives one run in several calls."""
    file, now, card = folder / "run.json", datetime.datetime.now(datetime.UTC).replace(microsecond=0), card_name()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        begun = datetime.datetime.fromisoformat(found["run"])
        if found["card"] == card and datetime.timedelta() <= now - begun <= SAME_RUN:
            return str(found["run"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record.write(file, {"run": now.isoformat(), "card": card})
    return now.isoformat()


def card_name() -> str:
    """A digest of what tells this card from others of its kind; empty without one."""
    try:
        words = ["nvidia-smi", "--query-gpu=uuid,driver_version", "--format=csv,noheader"]
        text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chosen(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Parts by name or by group, in the order given."""
    groups = {"kernels": tuple(KERNEL_PARTS), "steps": tuple(p for p in PARTS if p.startswith("steps-")),
              "peers": tuple(p for p in PARTS if p.startswith("peer-"))}  # fmt: skip
    found: list[str] = []
    for word in words or PARTS:
        if word not in PARTS and word not in groups:
            parser.error(f"no part {word!r}; there are {', '.join((*PARTS, *groups))}")
        found += groups.get(word, (word,))
    return list(dict.fromkeys(found))


def run(args: argparse.Namespace) -> int:
    """Every part that is not complete, until the time is up; then the table."""
    budget = Budget(args.budget)
    if not args.smoke and not torch.cuda.is_available():
        print("speed.py times a GPU, and there is none here: --smoke shows that everything runs", file=sys.stderr)
        return 2
    args.run = args.run or run_name(args.out)
    for part in args.parts if args.fresh else ():
        (args.out / f"{part}.json").unlink(missing_ok=True)
    if args.warm:
        missing = [part for part in args.parts if not is_complete(part, args)]
        ended = processes.warmed(missing, args, min(args.warm, budget.left()))
        print(f"warm: {len(ended)} of {len(missing)} parts, {budget.left():.0f} s left", file=sys.stderr, flush=True)
    late: list[str] = []
    beside: list[str] = []
    for part in args.parts:
        if is_complete(part, args):
            print(f"{part}: complete in {args.out}", file=sys.stderr, flush=True)
        elif budget.left() < (1 if args.smoke else processes.START):
            late.append(part)
        elif args.together > 1 and part.startswith("peer-"):
            beside.append(part)
        elif args.smoke and part != SMOKE_CHILD:
            work(part, args, budget)
        else:
            for some in [[form] for form in forms(part, args)] if part == "memory" else [args.forms]:
                processes.in_process(part, args, budget, some)
    processes.together(beside, args, budget)
    if late:
        print(f"no time left for {', '.join(late)}: call again, what is there is kept", file=sys.stderr)
    print("\n".join(summary.table(summary.load(args.out))))
    return 0


def is_complete(part: str, args: argparse.Namespace) -> bool:
    """Whether a part's file says that nothing is missing (and is of the same kind of run)."""
    found = record.load(args.out / f"{part}.json")
    if found is None or not found.get("complete") or found["smoke"] != args.smoke:
        return False
    known = {*found["items"], *found["errors"]}
    return "bf16" in found["errors"] or {*forms(part, args)} <= known


def forms(part: str, args: argparse.Namespace) -> list[str]:
    """Forms that are asked for of a model's step (which always has bf16 beside), or of memory; else none."""
    kind, _, name = part.partition("-")
    every = memory.FORMS if kind == "memory" else FORMS[name] if kind == "steps" else ()
    return [form for form in every if args.forms is None or form in args.forms]


def work(part: str, args: argparse.Namespace, budget: Budget) -> None:
    """Measure a part here."""
    device = "cpu" if args.smoke else "cuda"
    made = Record(part, args.out, budget, run=args.run, smoke=args.smoke, command=command(part, args))
    kind, _, name = part.partition("-")
    if part in KERNEL_PARTS:
        KERNEL_PARTS[part](made, device, smoke=args.smoke)
        return
    model = models.find(name if kind == "steps" else "sdxl")
    model = model.shrunk() if args.smoke else model
    options: dict[str, Any] = {"smoke": args.smoke}
    compiling = args.compile if not args.smoke or model.name in SMOKE_COMPILES else "none"
    if kind == "steps":
        steps.run(made, model, device, wanted=forms(part, args), compiling=compiling, **options)
    elif kind == "memory":
        memory.run(made, model, device, wanted=forms(part, args), **options)
    else:
        peers.run(made, peers.PEERS[name], model, device, compiling=compiling, way_s=args.way, lock=args.lock,
                  **options)


def command(part: str, args: argparse.Namespace) -> str:
    """What gives a part's results again."""
    return f"python benchmarks/speed.py {part}" + (" --smoke" if args.smoke else "") + (
        f" --compile {args.compile}" if args.compile != "auto" else "") + (
        f" --together {args.together}" if args.together > 1 and part.startswith("peer-") else "")


def main(description: str | None) -> int:
    """Parse and run; a child measures its part and prints nothing else."""
    args = arguments(description=description)
    if not args.child:
        return run(args)
    signal.alarm(math.ceil(args.budget) + 8)  # where the parent is gone, nobody else would end it
    try:
        for part in args.parts:
            work(part, args, Budget(args.budget))
    except record.Foreign as error:
        print(error, file=sys.stderr, flush=True)
        return processes.FOREIGN
    return 0
