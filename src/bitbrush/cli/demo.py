"""`bitbrush demo`: the whole path on the bundled model, in minutes on two CPU cores.

Full precision, plain rounding (recipe ``rtn``) and Q-Diffusion (preset ``demo``) draw the same prompts from the same
noise. Both results are saved packed and loaded back by plain diffusers before anything is drawn.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from bitbrush import assets
from bitbrush.cli.pictures import about, read_history, summary
from bitbrush.cli.rich_progress import Reporter
from bitbrush.errors import InputError

MODEL = "emoji-sd-tiny"
WEIGHT_BITS, ACTIVATION_BITS = 4, 8
PICTURES, STEPS, GUIDANCE = 12, 20, 4.0
ARMS: dict[str, str | None] = {"rtn": None, "qdiffusion": "demo"}  # recipe -> preset
FOLDER = "bitbrush-demo"


def run_demo(output: Path | None, *, seed: int, progress: Reporter) -> dict[str, Any]:
    """Quantize twice, compare, write ``report.html``.

    Args:
        output: A new or empty folder; the next free ``bitbrush-demo`` in the working folder when None.
        seed: Seed of calibration and of the drawn noise.
        progress: Told of every step.

    Returns:
        ``report`` (path), ``metrics``, ``gain_db`` over plain rounding with its interval, ``seconds``, ``peak_memory``.

    Raises:
        InputError: ``output`` is not empty.
    """
    started = time.monotonic()
    folder = _free_folder() if output is None else _checked(output)
    seconds = {}
    for recipe, preset in ARMS.items():
        seconds[recipe] = _quantize(folder / recipe, recipe, preset, seed, progress)
    comparison = _compare(folder, seed, progress)
    gain = comparison.paired("psnr", "qdiffusion", "rtn")
    numbers: dict[str, Any] = {
        "gain_db": gain.to_json(),
        "quantize_seconds": seconds,
        "seconds": time.monotonic() - started,
        "peak_memory": peak_memory(),
    }
    report = folder / "report.html"
    _write_report(report, comparison, folder, numbers)
    return {"report": str(report.absolute()), "output": str(folder.absolute()), **numbers, **summary(comparison)}


def _quantize(folder: Path, recipe: str, preset: str | None, seed: int, progress: Reporter) -> float:
    import bitbrush

    progress.say(f"{recipe}: quantizing {MODEL} to W{WEIGHT_BITS}A{ACTIVATION_BITS}")
    result = bitbrush.quantize(
        str(assets.path(MODEL)),
        recipe,
        WEIGHT_BITS,
        ACTIVATION_BITS,
        prompts=assets.prompts("calibration"),
        seed=seed,
        output=folder,
        preset=preset,
        progress=progress,
    )
    return float(result.seconds)


def _compare(folder: Path, seed: int, progress: Reporter) -> Any:
    from bitbrush.evaluate import EmojiClip, compare

    prompts = assets.prompts("evaluation")
    chosen = [prompts[i * len(prompts) // PICTURES] for i in range(PICTURES)]  # some held out, most seen
    return compare(
        _load(assets.path(MODEL)),
        {recipe: _load(folder / recipe) for recipe in ARMS},
        prompts=chosen,
        n=PICTURES,
        seeds=(seed,),
        steps=STEPS,
        guidance=GUIDANCE,
        batch=4,
        evaluator=EmojiClip.load(),
        baseline="rtn",
        keep=PICTURES,
        progress=progress,
    )


def _load(folder: Path) -> Any:
    """By plain diffusers: importing bitbrush has registered the quantizer."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _write_report(report: Path, comparison: Any, folder: Path, numbers: dict[str, Any]) -> None:
    from bitbrush.report.html import write_report

    folders = {comparison.reference: assets.path(MODEL), **{recipe: folder / recipe for recipe in ARMS}}
    histories = {recipe: read_history(folder / recipe) or {} for recipe in ARMS}
    extras = {
        "title": f"bitbrush demo: {MODEL} at W{WEIGHT_BITS}A{ACTIVATION_BITS}",
        "model": MODEL,
        "command": "bitbrush demo",
        "seconds": numbers["seconds"],
        "peak_memory": numbers["peak_memory"],
        **about(folders),
    }
    write_report(report, comparison, histories, extras)


def _free_folder() -> Path:
    number, folder = 1, Path(FOLDER)
    while folder.exists():
        number += 1
        folder = Path(f"{FOLDER}-{number}")
    return folder


def _checked(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            "the output folder is not empty",
            where=str(output),
            why="an existing result is never overwritten",
            try_="name a new folder, or leave --output out",
        )
    return output


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
