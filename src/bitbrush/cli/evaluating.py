"""`bitbrush eval`: what quantization cost, for pipelines quantized by anyone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitbrush.cli import render
from bitbrush.cli.options import (
    Batch,
    Debug,
    Device,
    Guidance,
    Json,
    Kernel,
    Prompts,
    Steps,
    command_line,
    heavy,
    read_prompt_file,
)
from bitbrush.cli.render import Screen
from bitbrush.cli.rich_progress import Reporter
from bitbrush.errors import InputError

Metrics = Annotated[
    str | None,
    typer.Option("--metrics", help="Of psnr,ssim,lpips,clip,r1,fid,sfid,kid,is,prdc; else those that need no weights."),
]
Work = Annotated[
    Path | None, typer.Option("--work", help="Folder that keeps pictures and features: a stopped run goes on.")
]
Real = Annotated[
    Path | None, typer.Option("--real", help="Folder of real pictures, or file of statistics, for fid and the like.")
]
Extractor = Annotated[
    str | None, typer.Option("--extractor", help="Of features: inception, or the file of the zoo's classifier.")
]
Evaluator = Annotated[
    str | None, typer.Option("--evaluator", help="Of clip: emoji, or folder or cached hub id of transformers' CLIP.")
]


def evaluate_command(
    outputs: Annotated[list[str], typer.Argument(metavar="OUT [OUT2 ...]", help="Quantized pipelines, by anyone.")],
    reference: Annotated[str, typer.Option("--reference", help="The full-precision pipeline.")],
    prompts: Prompts = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many pictures of each.")] = 512,
    metrics: Metrics = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Sampling seeds, such as 0,1,2.")] = "0",
    steps: Steps = 25,
    guidance: Guidance = 4.0,
    batch: Batch = 16,
    sampler: Annotated[Literal["own", "ddim"], typer.Option("--sampler", help="ddim: unconditional ones.")] = "own",
    autocast: Annotated[
        Literal["bfloat16", "float16"] | None, typer.Option("--autocast", help="Draw under autocast.")
    ] = None,
    real: Real = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a file of statistics: train or test.")] = None,
    resize: Annotated[
        Literal["crop", "stretch"] | None, typer.Option("--resize", help="Real pictures of another resolution.")
    ] = None,
    extractor: Extractor = None,
    evaluator: Evaluator = None,
    captions: Annotated[Path | None, typer.Option("--captions", help="What r1 chooses among, one a line.")] = None,
    lpips_weights: Annotated[Path | None, typer.Option("--lpips-weights", help="Backbone, .safetensors.")] = None,
    floor: Annotated[bool, typer.Option("--floor/--no-floor", help="Draw FP with other seeds too.")] = True,
    speed: Annotated[bool, typer.Option("--speed", help="Measure size, memory and time.")] = False,
    inside: Annotated[bool, typer.Option("--inside", help="Look at activations, weights and errors inside.")] = False,
    token: Annotated[str | None, typer.Option("--token", help="Word whose attention maps are compared inside.")] = None,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Pictures in the report.")] = 8,
    eight_bits: Annotated[bool, typer.Option("--eight-bits", help="Store pictures with 256 levels.")] = False,
    work: Work = None,
    device: Device = None,
    kernel: Kernel = "reference",
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page.")] = Path("report.html"),
    data: Annotated[Path | None, typer.Option("--data", help="Write all numbers to this JSON file too.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what quantization cost, honestly.

    Every pipeline draws the same prompts from the same noise. Paired and distribution metrics, text alignment, tests,
    and beside every figure what full precision with other seeds shows. A metric whose weights are not there is left
    out and says so; nothing is downloaded.
    """
    screen = Screen(as_json, debug)
    texts, closed = read_prompt_file(screen, prompts), read_prompt_file(screen, captions)
    numbers = _seeds(seeds)
    if not outputs:
        raise InputError("no pipeline was given", where="bitbrush eval", why="there is nothing to compare",
                         try_="bitbrush eval OUT --reference MODEL")
    screen = heavy(as_json, debug)
    shown: dict[str, object] = {"--reference": reference, "--prompts": prompts, "-n": n, "--metrics": metrics}
    shown |= {"--seeds": seeds, "--steps": steps, "--guidance": guidance, "--batch": batch, "--real": real}
    shown |= {"--extractor": extractor, "--evaluator": evaluator, "--device": device, "-o": output}
    shown |= {"--kernel": kernel} if kernel != "reference" else {}
    options: dict[str, Any] = {
        "n": n, "metrics": None if metrics is None else _names(metrics), "seeds": numbers, "steps": steps,
        "guidance": guidance, "batch": batch, "sampler": sampler, "autocast": autocast, "device": device, "work": work,
        "real": real, "resize": resize, "extractor": extractor, "evaluator": evaluator, "captions": closed,
        "perceptual": lpips_weights, "floor": floor, "speed": speed, "inside": inside, "token": token, "keep": keep,
        "eight_bits": eight_bits, "kernel": kernel,
    }  # fmt: skip
    with screen.progress() as progress:
        found = run(outputs, reference, output, data, texts, split, options, command_line("eval", outputs, shown),
                    progress)
    screen.show({"report": str(output), **found.to_json()}, *([] if as_json else tables(found, output)))


def run(
    outputs: Sequence[str], reference: str, page: Path, data: Path | None, prompts: list[str] | None,
    split: str | None, options: dict[str, Any], command: str, progress: Reporter,
) -> Any:  # fmt: skip
    """Evaluates, writes the page and, where a file is named, the numbers; returns the evaluation.

    Raises:
        InputError, ArtifactError: A pipeline, the prompts or an option cannot be used.
    """
    import torch

    import bitbrush
    from bitbrush.cli import pictures
    from bitbrush.evaluation.arms import Arm, draws_from_text
    from bitbrush.evaluation.evaluate import speaks_emoji
    from bitbrush.evaluation.references import load_statistics

    started = time.monotonic()
    names = pictures.unique_names(outputs)
    for output in [*outputs, reference]:
        pictures.check_result(output)
    chosen = options | {"autocast": getattr(torch, options["autocast"]) if options["autocast"] else None}
    if split is not None and options["real"] is not None:
        chosen["real"] = load_statistics(options["real"], split)
    texts = _texts(prompts, draws_from_text(reference), lambda: speaks_emoji(Arm("FP", reference)), progress)
    found = bitbrush.evaluate(names, reference=reference, prompts=texts, progress=progress, **chosen)
    histories = {name: history for name, output in names.items() if (history := pictures.read_history(output))}
    extras: dict[str, Any] = {"model": reference.rstrip("/").rpartition("/")[2], "command": command,
                              "seconds": time.monotonic() - started}
    extras |= {"device": pictures.machine(), "histories": histories}
    extras |= pictures.about({found.reference: reference, **names})
    found.save(page, extras)
    if data is not None:
        found.to_json(data)
    return found


def tables(found: Any, page: object) -> list[Any]:
    """Numbers, tests, what is missing and why, notes, and where the page lies."""
    from rich.text import Text

    from bitbrush.cli.text import clean
    from bitbrush.evaluation.table import differences, numbers, warnings

    settings = found.settings
    columns, rows = numbers(found)
    turned = [list(line) for line in zip(columns, *rows, strict=True)]  # a metric a line: labels are long
    title = f"{settings['n']} pictures, {settings['steps']} steps, the same noise; 95 % intervals over prompts"
    parts = [render.table(title, turned[0], turned[1:])]
    tested = differences(found)
    if tested is not None:
        parts.append(render.table("Do they differ? p after Holm's correction, below 0.05 they do", *tested, left=2))
    for missing in found.missing:
        parts.append(Text(clean(f"not computed: {missing.key}: {missing.what}"), style="yellow"))
        parts += [Text(clean(f"  {word}: {text}")) for word, text in
                  (("where", missing.where), ("why", missing.why), ("try", missing.try_)) if text]
    parts += [Text(clean(note), style="yellow") for note in (*warnings(found), *found.notes)]
    return [*parts, Text(f"report: {clean(page)}")]


def _texts(prompts: list[str] | None, wanted: bool, emoji: Any, progress: Reporter) -> list[str] | None:
    """The prompts given; the bundled ones for models that speak of emoji; None for an unconditional pipeline."""
    if wanted and prompts is None and not emoji():
        raise InputError("prompts are missing", where="bitbrush eval", why="the pipeline draws from text, and the "
                         "bundled prompts are names of emoji, which it was not trained on", try_="--prompts FILE")
    from bitbrush.cli import pictures

    return pictures.prompts_or_bundled(prompts, wanted, progress)


def _names(metrics: str) -> list[str]:
    return [name for part in metrics.split(",") if (name := part.strip().lower())]


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError("the seeds could not be read", where=f"--seeds {text}", why="expected whole numbers",
                         try_="--seeds 0,1,2") from error
