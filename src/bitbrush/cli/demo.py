"""`bitbrush demo`: the whole path on the bundled model, in minutes on two CPU cores.

Full precision, plain rounding (recipe ``rtn``) and Q-Diffusion, both in their preset ``demo``, draw the same prompts
from the same noise. Both results are saved packed and loaded back by plain diffusers before anything is drawn.
"""

from __future__ import annotations

import os
import time
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitbrush import assets
from bitbrush.cli.pictures import about, machine, read_history, summary
from bitbrush.cli.rich_progress import Reporter
from bitbrush.cli.text import clock, size
from bitbrush.errors import InputError

MODEL = "emoji-sd-tiny"
WEIGHT_BITS, ACTIVATION_BITS = 4, 8
PICTURES, STEPS, GUIDANCE, BATCH = 12, 20, 4.0, 4
ARMS = {"rtn": "demo", "qdiffusion": "demo"}  # recipe -> preset
BASELINE, METHOD = "rtn", "qdiffusion"
LABELS = {
    "FP": ("Full precision", "bfloat16 weights"),
    "rtn": ("Plain rounding", "W4A8"),
    "qdiffusion": ("Q-Diffusion", "W4A8"),
}
FOLDER = "bitbrush-demo"
SECONDS, MEMORY, GAIN_DB = 360.0, 4e9, 1.0  # what the demo promises on two CPU cores


def run_demo(output: Path | None, *, seed: int, progress: Reporter, command: str = "bitbrush demo") -> dict[str, Any]:
    """Quantize twice, compare, write ``report.html`` and ``strip.png``.

    Args:
        output: A new or empty folder; the next free ``bitbrush-demo`` in the working folder when None.
        seed: Seed of calibration and of the drawn noise.
        progress: Told of every step.
        command: What was typed; it stands in the report.

    Returns:
        ``report`` (path), ``metrics``, ``gain_db`` over plain rounding with its interval, ``seconds`` in all and by
        part, ``cpu_seconds``, ``peak_memory``, and ``promises`` with what became of them.

    Raises:
        InputError: ``output`` is not empty.
    """
    from bitbrush.engine import disk
    from bitbrush.engine.estimate import peak_memory
    from bitbrush.report.strip import strip

    started, worked = time.monotonic(), _processor_seconds()
    folder = _free_folder() if output is None else _checked(output)
    progress.say(f"Demo: {MODEL} to W{WEIGHT_BITS}A{ACTIVATION_BITS}, some five minutes on two CPU cores, in {folder}")
    parts = {recipe: _quantize(folder / recipe, recipe, seed, progress) for recipe in ARMS}
    progress.say(f"Drawing {PICTURES} prompts with full precision, {' and '.join(ARMS)}, from the same noise")
    begun = time.monotonic()
    comparison = _compare(folder, seed, progress)
    numbers: dict[str, Any] = {
        "gain_db": comparison.paired("psnr", METHOD, BASELINE).to_json(),
        "parts": parts | {"drawing and measuring": time.monotonic() - begun},
        "seconds": time.monotonic() - started,
        "cpu_seconds": _processor_seconds() - worked,
        "peak_memory": peak_memory(str(comparison.settings["device"])),
    }
    numbers["promises"] = promises(numbers)
    report = folder / "report.html"
    _write_report(report, comparison, folder, numbers, command)
    disk.write_bytes(folder / "strip.png", strip(comparison, LABELS))
    return {"report": str(report.absolute()), "output": str(folder.absolute()), **numbers, **summary(comparison)}


def promises(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo promises on two CPU cores, what came out, and whether that keeps the promise."""
    gain, seconds, memory = numbers["gain_db"]["value"], numbers["seconds"], numbers["peak_memory"]
    return [
        _promise("time", f"within {clock(SECONDS)}", clock(seconds), seconds <= SECONDS),
        _promise("peak memory", f"under {size(MEMORY)}", size(memory), memory < MEMORY),
        _promise("PSNR over plain rounding", f"at least {GAIN_DB:.0f} dB", f"{gain:+.2f} dB", gain >= GAIN_DB),
    ]


def _promise(what: str, bar: str, found: str, kept: bool) -> dict[str, Any]:
    return {"what": what, "bar": bar, "found": found, "kept": kept}


def _quantize(folder: Path, recipe: str, seed: int, progress: Reporter) -> float:
    import bitbrush

    progress.say(f"\n{recipe}: quantizing {MODEL} to W{WEIGHT_BITS}A{ACTIVATION_BITS}, preset {ARMS[recipe]}")
    result = bitbrush.quantize(
        str(assets.path(MODEL)),
        recipe,
        WEIGHT_BITS,
        ACTIVATION_BITS,
        prompts=assets.prompts("calibration"),
        seed=seed,
        output=folder,
        preset=ARMS[recipe],
        progress=progress,
    )
    return float(result.seconds)


def _compare(folder: Path, seed: int, progress: Reporter) -> Any:
    from bitbrush.evaluation import EmojiClip, compare

    return compare(
        _load(assets.path(MODEL)),
        {recipe: _load(folder / recipe) for recipe in ARMS},
        prompts=chosen_prompts(),
        n=PICTURES,
        seeds=(seed,),
        steps=STEPS,
        guidance=GUIDANCE,
        batch=BATCH,
        evaluator=EmojiClip.load(),
        baseline=BASELINE,
        keep=PICTURES,
        progress=progress,
    )


def chosen_prompts() -> list[str]:
    """The middle one of every twelfth of the evaluation prompts: some held out, most seen in training."""
    prompts = assets.prompts("evaluation")
    return [prompts[(2 * i + 1) * len(prompts) // (2 * PICTURES)] for i in range(PICTURES)]


def _load(folder: Path) -> Any:
    """By plain diffusers: importing bitbrush has registered the quantizer."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _write_report(report: Path, comparison: Any, folder: Path, numbers: dict[str, Any], command: str) -> None:
    from bitbrush.report.html import write_report

    folders = {comparison.reference: assets.path(MODEL), **{recipe: folder / recipe for recipe in ARMS}}
    histories = {recipe: read_history(folder / recipe) or {} for recipe in ARMS}
    settings: dict[str, str] = {f"Preset {ARMS[recipe]} of {recipe}": _preset(recipe) for recipe in ARMS}
    extras = {
        "title": f"bitbrush demo: {MODEL} at W{WEIGHT_BITS}A{ACTIVATION_BITS}",
        "model": MODEL,
        "command": command,
        "seconds": numbers["seconds"],
        "cpu_seconds": numbers["cpu_seconds"],
        "parts": numbers["parts"],
        "peak_memory": numbers["peak_memory"],
        "promises": numbers["promises"],
        "device": machine(),
        "settings": settings,
        **about(folders),
    }
    write_report(report, comparison, histories, extras)


def _preset(recipe: str) -> str:
    """What the preset changes, from the recipe file."""
    data = tomllib.loads((files("bitbrush") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8"))
    return ", ".join(f"{key} = {value}" for key, value in data["preset"][ARMS[recipe]].get("set", {}).items())


def _processor_seconds() -> float:
    """Processor time of this process, user and system."""
    times = os.times()
    return times.user + times.system


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
