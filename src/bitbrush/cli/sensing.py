"""`bitbrush sensitivity`: its options, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from bitbrush.cli.options import heavy, read_prompt_file
from bitbrush.cli.render import Screen, table
from bitbrush.cli.text import clean, share
from bitbrush.errors import InputError

WORST = 12
TITLES = {"psnr": "PSNR, dB", "lpips": "LPIPS", "clip": "CLIP - FP"}
DIGITS = {"psnr": 2, "lpips": 3, "clip": 3}


def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a float diffusers pipeline.")],
    weights: Annotated[str, typer.Option("--weights", "-w", help="Bits, or several: 4,3,2. 16 = float.")] = "4",
    activations: Annotated[int, typer.Option("--activations", "-a", help="Bits of the inputs; 16 = float.")] = 8,
    by: Annotated[str, typer.Option("--by", help="layer or block: what is rounded at once.")] = "layer",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with one prompt a line; else the bundled ones.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", help="Classifier-free guidance.")] = 4.0,
    metric: Annotated[str, typer.Option("--metric", help="psnr, lpips or clip: what ranks the layers.")] = "psnr",
    layers: Annotated[str, typer.Option("--layers", help='Pattern, such as "up_blocks.* | conv_out".')] = "*",
    lpips_weights: Annotated[
        Path | None, typer.Option("--lpips-weights", help="Backbone of LPIPS as .safetensors; else the cache's.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn at once.")] = 8,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; CUDA where it is.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file.")] = Path("sensitivity.json"),
    plot: Annotated[Path | None, typer.Option("--plot", help="A heat map, .svg or .png.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Of finished rows and pictures; OUTPUT's name with .run by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object instead of tables.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the notes of libraries.")] = False,
) -> None:
    """Damage to the picture, layer by layer.

    Rounds one layer (or block) at a time, draws the same pictures again, and ranks the layers by what changed. A run
    that is stopped goes on when the same command is given again.
    """
    widths = read_bits(weights)
    check_plot(plot)
    texts = read_prompt_file(Screen(as_json, debug), prompts)
    screen = heavy(as_json, debug)
    import bitbrush
    from bitbrush.report import heat

    rows = folder or output.with_suffix(".run")
    with screen.progress() as progress:
        found = bitbrush.sensitivity(
            model, widths, activations, by=by, prompts=texts, n=n, seed=seed, steps=steps, guidance=guidance,
            batch=batch, metric=metric, layers=layers, evaluator=_evaluator(model, metric), device=device,
            lpips_weights=lpips_weights, folder=rows, output=output, progress=progress,
        )  # fmt: skip
    data = found.to_json()
    if plot is not None:
        heat.save(plot, data)
    places = {"output": str(output), "plot": str(plot) if plot is not None else None, "folder": str(rows)}
    screen.show({**places, **data}, *([] if as_json else tables(found, places)))


def read_bits(text: str) -> list[int]:
    """``"4,3,2"`` as numbers.

    Raises:
        InputError: Something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError("the bit widths could not be read", where=f"--weights {text}",
                         why="expected numbers from 1 to 8, or 16, with commas between", try_="--weights 4,3,2"
                         ) from error  # fmt: skip


def check_plot(path: Path | None) -> None:
    """Before anything slow: the picture's ending is known."""
    if path is not None and path.suffix not in (".svg", ".png"):
        raise InputError("a heat map is written as .svg or .png", where=f"--plot {path}",
                         why=f"the name ends in {path.suffix or 'nothing'}", try_=f"--plot {path.with_suffix('.svg')}"
                         )  # fmt: skip


def _evaluator(model: str, metric: str) -> Any:
    """The emoji CLIP where that was asked for and knows the pipeline's words."""
    if metric != "clip":
        return None
    from bitbrush.evaluation import EmojiClip
    from bitbrush.evaluation.arms import Arm
    from bitbrush.evaluation.evaluate import speaks_emoji

    return EmojiClip.load() if speaks_emoji(Arm("FP", model, device="cpu")) else None  # the tokenizer tells


def tables(found: Any, places: Mapping[str, str | None]) -> list[RenderableType]:
    """The worst layers of each width, how far the proxies agree, and where everything lies."""
    parts: list[RenderableType] = []
    everything = {row["weight_bits"]: row for row in found.baseline["all"]}
    total = sum(row["parameters"] for row in found.rows) / len(found.weights)
    for bits in found.weights:
        rows = [_row(i, row, found.metric, total) for i, row in enumerate(found.worst(WORST, bits), start=1)]
        rows.append(_row("", everything[bits], found.metric, total))
        what = "blocks" if found.settings["by"] == "block" else "layers"
        title = f"W{bits}A{found.activations}: the {min(WORST, len(rows) - 1)} {what} that hurt most when rounded alone"
        columns = ("", "layer", TITLES[found.metric], "95 %", "own error", "noise error", "weights")
        parts.append(table(title, columns, rows, left=2))
        parts.append(Text(clean(_agreement(found, bits)), style="dim"))
    lines = [f"{name}: {place}" for name, place in places.items() if place is not None]
    lines[-1] += " (finished rows; the same command goes on there)"
    return [*parts, Text(clean("\n".join(lines)))]


def _row(rank: object, row: Mapping[str, Any], metric: str, total: float) -> tuple[object, ...]:
    value, digits = row.get(metric), DIGITS[metric]
    numbers = ("not finite", "-") if value is None else (
        f"{value['value']:.{digits}f}", f"{value['low']:.{digits}f} to {value['high']:.{digits}f}")  # fmt: skip
    errors = ("-" if row[key] is None else f"{100 * row[key]:.2f} %" for key in ("output_error", "noise_error"))
    return (rank, row["layer"], *numbers, *errors, share(row["parameters"] / total))


def _agreement(found: Any, bits: int) -> str:
    """How far the cheap numbers rank as the pictures do; +1 is the same order."""
    known = found.rank_correlation[str(bits)]
    sign = 1 if found.metric == "lpips" else -1
    words = []
    for proxy, name in (("output_error", "own error"), ("noise_error", "noise error")):
        rho = known.get(f"{proxy}~{found.metric}")
        words.append(f"{name} {'-' if rho is None else f'{sign * rho:+.2f}'}")
    return f"rank correlation of damage with {', '.join(words)} ({known['n']} of them)"
