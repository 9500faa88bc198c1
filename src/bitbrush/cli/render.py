"""Results on the screen: tables for people, or one JSON object with ``--json``.

Results go to standard output, everything else (notes, bars, errors) to standard error. Text from outside (prompts,
layer names, paths, messages) is never read as markup and cannot steer the terminal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitbrush.cli.rich_progress import Reporter, reporter
from bitbrush.cli.text import clean, clock, share, size
from bitbrush.errors import BitbrushError

PIPE_WIDTH = 140  # columns where the output is no terminal


@dataclass(frozen=True)
class Screen:
    """Where one command writes.

    Args:
        as_json: Results and errors are one JSON object on standard output.
        debug: Tracebacks and the notes of libraries are shown.
    """

    as_json: bool = False
    debug: bool = False

    def show(self, data: Mapping[str, Any], *tables: RenderableType) -> None:
        """Write a result: ``data`` with ``--json``, else the tables."""
        if self.as_json:
            sys.stdout.write(to_json(data) + "\n")
            return
        console = Console(file=sys.stdout)
        if not console.is_terminal:
            console.width = max(console.width, PIPE_WIDTH)
        for table in tables:
            console.print(table, soft_wrap=isinstance(table, Text))  # a path stays in one piece

    def note(self, text: str) -> None:
        """A line beside the result."""
        Console(stderr=True, highlight=False).print(Text(clean(text)), soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A moving line on standard error while something takes seconds; nothing where that is no terminal."""
        console = Console(stderr=True, highlight=False)
        with console.status(Text(clean(text), style="dim")) if console.is_terminal else nullcontext():
            yield

    @contextmanager
    def progress(self) -> Iterator[Reporter]:
        """A progress reporter on standard error; its bars are gone when the block ends, however it ends."""
        made = reporter(Console(stderr=True, highlight=False))
        try:
            yield made
        finally:
            made.close()

    def error(self, error: BitbrushError) -> None:
        """The error in its four parts."""
        if self.as_json:
            sys.stdout.write(to_json(error.to_dict()) + "\n")
            return
        console = Console(stderr=True, highlight=False)
        console.print(Text(error.family, style="bold red"))
        for line in clean(error).splitlines():
            console.print(Text(line), soft_wrap=True)


def to_json(data: Mapping[str, Any]) -> str:
    """JSON as the standard has it: a number that is not finite becomes null, a path its text."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> RenderableType:
    """A plain table: the first ``left`` columns to the left, numbers to the right."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(clean("" if cell is None else cell)) for cell in row))
    return Group(Text(f"\n{clean(title)}", style="bold"), grid)


def facts(title: str, pairs: Mapping[str, object]) -> RenderableType:
    """A table of names and values; rows without a value are left out."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None:
            grid.add_row(Text(clean(name)), Text(clean(value)))
    return Group(Text(f"\n{clean(title)}", style="bold"), grid)


def inspection_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Layers, what stays float and why, totals and estimates of `bitbrush.inspect`."""
    codebooks = "codebook_bits" in report["totals"]  # what they add is not in the bits of a code
    rows = [
        (
            row["name"],
            row["kind"],
            "x".join(str(n) for n in row["shape"]),
            share(row["share_of_weights"]),
            share(row["share_of_compute"]),
            _bits(row["weight_bits"], row["activation_bits"]),
            *((f"{row['stored_bits']:.2f}",) if codebooks else ()),
            row["note"],
        )
        for row in report["rows"]
    ]
    columns = ("layer", "kind", "shape", "weights", "compute", "bits", *(("stored",) if codebooks else ()), "note")
    title = f"{report['network']} of {report['source']}, recipe {report['recipe']}, layers in the order they run"
    parts: list[RenderableType] = [table(title, columns, rows, left=3)]
    kept = report["kept_float"]
    if kept:
        lines = [(row["name"], f"{row['parameters']:,}", share(row["share"]), row["why"]) for row in kept]
        parts.append(table("What stays float", ("part", "parameters", "share", "why"), lines))
    parts.append(facts("Totals", readable(report["totals"])))
    estimates = dict(report["estimates"])
    advice = estimates.pop("advice", None)
    device = estimates.pop("device", "")
    parts.append(facts(f"Estimates on {device}, rough" if device else "Estimates, rough", readable(estimates)))
    if advice:
        parts.append(Text(clean(advice), style="yellow"))
    return parts


def _bits(weights: int | None, activations: int | None) -> str:
    return f"W{weights or 16}A{activations or 16}"


NAMES = {
    "float_bytes": "size in bfloat16",
    "packed_bytes": "size packed",
    "average_bits": "bits a weight on average",
    "codebook_bits": "bits a weight in codebooks, with them",
    "codebook_sets": "sets of codebooks",
    "codes_bytes": "codes",
    "codebooks_bytes": "codebooks",
    "scales_bytes": "their scales",
    "macs": "multiply-adds a sample",
    "seconds": "time",
    "peak_bytes": "memory",
    "tape_bytes": "disk for calibration",
    "forwards": "work, in forwards of one sample",
    "macs_per_second": "multiply-adds a second",
}


def readable(values: Mapping[str, Any]) -> dict[str, object]:
    """Names and numbers as people read them: ``peak_bytes`` as a size, ``seconds`` as a time."""
    return {NAMES.get(name, name.replace("_", " ")): _value(name, value) for name, value in values.items()}


def _value(name: str, value: Any) -> object:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        if name.endswith("bytes") or name == "peak_memory":
            return size(value)
        if name == "seconds" or name.endswith("_seconds"):
            return clock(value)
        if name.startswith("macs"):
            return f"{value / 1e9:.3g} G"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return to_json(value) if isinstance(value, Mapping) else str(value)


def result_tables(summary: Mapping[str, Any]) -> list[RenderableType]:
    """What `bitbrush.quantize` or `resume` did."""
    flat = {name: value for name, value in summary.items() if not isinstance(value, (Mapping, list))}
    packed, parameters = flat.pop("packed_bytes", None), flat.pop("parameters", None)
    shown = readable(flat)
    if packed and parameters:
        shown["denoiser packed"] = f"{size(packed)}, {share(packed / (2 * parameters))} of bfloat16"
    proof = summary["proof"]
    model = proof.get("model", {})
    pairs: dict[str, object] = {
        "layers": f"{len(proof.get('layers', ()))}, {'every one proven' if proof.get('ok') else 'NOT every one proven'}"
    }
    if "equal" in model:
        different = f"largest difference {model.get('max_difference', math.nan):.3g}"
        pairs["whole network"] = "equal bit for bit" if model["equal"] else different
    if "sqnr_simulated_vs_float_db" in model:
        pairs["against full precision"] = f"{model['sqnr_simulated_vs_float_db']:.1f} dB (signal to error, one forward)"
    return [facts("Done", shown), facts("Proof: packed computes what was simulated", pairs)]


def dry_run_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """The expanded recipe, then what `inspection_tables` shows."""
    return [Text(clean(report["recipe"])), *inspection_tables(report["inspection"])]


METRICS = {
    "psnr": ("PSNR, dB", 2),
    "psnr_worst5": ("worst 5 %, dB", 2),
    "ssim": ("SSIM", 3),
    "clip": ("CLIP", 3),
    "clip_difference": ("CLIP - FP", 3),
    "r1_heldout": ("R@1 held-out", 3),
    "r1_seen": ("R@1 seen", 3),
    "fid": ("FID", 2),
}


def comparison_tables(comparison: Mapping[str, Any], page: object) -> list[RenderableType]:
    """A row a pipeline, a column a metric with its 95 % interval, the notes, and where the page lies."""
    parts = [metric_table(comparison)]
    parts += [Text(clean(note), style="yellow") for note in comparison.get("notes", ())]
    parts.append(Text(f"report: {clean(page)}"))
    return parts


def metric_table(comparison: Mapping[str, Any]) -> RenderableType:
    """Mean and 95 % interval of every metric that some arm has."""
    arms = comparison["metrics"]
    names = [name for name in METRICS if any(name in found for found in arms.values())]
    columns = ["", *(METRICS[name][0] for name in names), "s a picture"]
    seconds = comparison["seconds_per_picture"]
    rows = [
        [arm, *(_estimate(found.get(name), METRICS[name][1]) for name in names), f"{seconds.get(arm, 0.0):.2f}"]
        for arm, found in arms.items()
    ]
    settings = comparison["settings"]
    title = f"{settings['n']} pictures, {settings['steps']} steps, same noise: mean, and its 95 % interval over prompts"
    return table(title, columns, rows)


def _estimate(estimate: Mapping[str, float] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}\n{low} to {high}"


def recipe_table(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Names, titles and presets of the recipes."""
    return table(
        "Recipes", ("name", "what", "presets"), [(r["name"], r["title"], ", ".join(r["presets"])) for r in rows], left=3
    )


def doctor_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """What `bitbrush doctor` found; problems last."""
    devices = [(d["device"], d["name"], d["note"], size(d["memory_bytes"])) for d in report["devices"]]
    kernels = [(k["kernel"], k["device"], "yes" if k["runs"] else f"no: {k['why_not']}") for k in report["kernels"]]
    versions = {name: version or "not installed" for name, version in report["versions"].items()}
    plugin = "registered" if report["plugin"]["registered"] else "NOT registered"
    place = {
        "plug-in in diffusers": plugin,
        "memory free": f"{size(report['memory']['available_bytes'])} of {size(report['memory']['total_bytes'])}",
        "disk free": f"{size(report['disk']['free_bytes'])} at {report['disk']['folder']}",
    }
    problems = report["problems"]
    return [
        facts("Versions", versions),
        table("Devices", ("device", "name", "note", "memory"), devices, left=3),
        table("Kernels, for a typical W4A8 layer", ("kernel", "device", "runs"), kernels, left=3),
        facts("Here", place),
        Text("\n" + "\n".join(f"problem: {clean(p)}" for p in problems) if problems else "\nAll is well."),
    ]


def demo_tables(outcome: Mapping[str, Any]) -> list[RenderableType]:
    """The table of metrics, the gain, time and memory against what was promised, and last where the report lies."""
    gain = outcome["gain_db"]
    pairs = {
        "Q-Diffusion over plain rounding": f"{gain['value']:+.2f} dB PSNR ({gain['low']:+.2f} to {gain['high']:+.2f})",
        "time": clock(outcome["seconds"]),
        **{f"  {part}": clock(seconds) for part, seconds in outcome.get("parts", {}).items()},
        "processor time": clock(outcome["cpu_seconds"]) if "cpu_seconds" in outcome else None,
        "peak memory": size(outcome["peak_memory"]),
    }
    notes = [Text(clean(note), style="yellow") for note in outcome.get("notes", ())]
    rows = [(p["what"], p["bar"], p["found"], "yes" if p["kept"] else "NO") for p in outcome.get("promises", ())]
    promised = [table("Promised on two CPU cores", ("", "promise", "found", "kept"), rows)] if rows else []
    return [
        metric_table(outcome),
        *notes,
        facts("Outcome", pairs),
        *promised,
        Text(f"\nreport: {clean(outcome['report'])}"),
    ]
