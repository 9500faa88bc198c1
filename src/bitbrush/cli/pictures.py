"""What `sample` and `compare` do: open pipelines, draw, save pictures and the report."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitbrush
from bitbrush import assets
from bitbrush.cli.rich_progress import Reporter
from bitbrush.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from bitbrush.evaluation import Comparison, EmojiClip

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def open_pipeline(name: str, device: str | None = None, **options: Any) -> Any:
    """A pipeline ready to draw, as `bitbrush.evaluation.arms.open_pipeline` opens it."""
    from bitbrush.evaluation import arms

    return arms.open_pipeline(name, device, **options)


def sample(
    name: str,
    output: Path,
    *,
    prompts: Sequence[str] | None,
    n: int | None,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    device: str | None,
    kernel: str = "reference",
    graph: bool = False,
    progress: Reporter,
) -> list[Path]:
    """Draw ``n`` pictures (one a prompt by default; prompts are taken in turn) and save them.

    Args:
        kernel, graph: As for `bitbrush.load`; of a result.

    Returns:
        The files: ``output`` itself, or ``stem-000.png`` and so on where there are several.

    Raises:
        InputError: The ending is no picture format, or prompts do not fit the pipeline.
    """
    _check_suffix(output)
    pipeline = open_pipeline(name, device, kernel=kernel, graph=graph)
    from bitbrush.evaluation.sampling import draw, takes_prompt

    if takes_prompt(pipeline) != bool(prompts):
        wants = takes_prompt(pipeline)
        raise InputError(
            "a prompt is missing" if wants else "this pipeline takes no prompt",
            where=name,
            why=f"a {type(pipeline).__name__} draws {'from text' if wants else 'unconditionally'}",
            try_='--prompt "red apple"' if wants else "leave --prompt out; -n says how many pictures",
        )

    count = n or len(prompts or ()) or 1
    texts = [prompts[i % len(prompts)] for i in range(count)] if prompts else None
    progress.start("draw", count)
    drawn = draw(
        pipeline, prompts=texts, n=count, seed=seed, steps=steps, guidance=guidance, batch=batch, progress=progress
    )
    progress.finish()
    return save_pictures(drawn, output)


def save_pictures(drawn: Tensor, output: Path) -> list[Path]:
    """Save pictures ``[n, 3, H, W]`` in [-1, 1]; each file appears whole or not at all."""
    from PIL import Image

    from bitbrush.engine import disk
    from bitbrush.evaluation.eight_bits import to_levels

    bytes_ = to_levels(drawn).permute(0, 2, 3, 1).cpu().numpy()
    several = len(bytes_) > 1
    paths = []
    for index, pixels in enumerate(bytes_):
        path = output.with_stem(f"{output.stem}-{index:03}") if several else output
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format=Image.registered_extensions()[path.suffix.lower()])
        disk.write_bytes(path, encoded.getvalue())
        paths.append(path)
    return paths


def compare(
    outputs: Sequence[str],
    reference: str,
    page: Path,
    *,
    prompts: list[str] | None,
    n: int,
    seed: int,
    steps: int,
    guidance: float,
    batch: int,
    device: str | None,
    progress: Reporter,
    command: str = "bitbrush compare",
) -> dict[str, Any]:
    """Draw the same pictures with the reference and every output, measure, write the page; the numbers as plain data.

    Raises:
        InputError: A pipeline or the prompts cannot be used, or fewer prompts than pictures were given.
    """
    from bitbrush.evaluation import compare as measure
    from bitbrush.prompts import check_enough
    from bitbrush.report.html import write_report

    started = time.monotonic()
    names = unique_names(outputs)
    for output in outputs:
        check_result(output)
    original = open_pipeline(reference, device)
    texts = choose_prompts(original, prompts, progress)
    if texts is not None:
        check_enough(texts, n)
    comparison = measure(
        original,
        {name: _opener(output, device) for name, output in names.items()},
        prompts=texts,
        n=n,
        seeds=(seed,),
        steps=steps,
        guidance=guidance,
        batch=batch,
        evaluator=emoji_evaluator(original),
        baseline=next((name for name in names if "rtn" in name.lower()), None),
        progress=progress,
    )
    histories = {name: history for name, output in names.items() if (history := read_history(output)) is not None}
    extras: dict[str, Any] = {"model": reference, "command": command, "seconds": time.monotonic() - started}
    extras |= {"device": machine(), **about({comparison.reference: reference, **names})}
    write_report(page, comparison, histories, extras)
    return summary(comparison)


def about(folders: Mapping[str, str | Path]) -> dict[str, Any]:
    """What the report says of file sizes and versions: ``sizes`` (bytes), ``sizes_of``, ``stored_as``, ``versions``.

    Args:
        folders: Arm to folder; the reference comes first.
    """
    sizes = {name: count for name, folder in folders.items() if (count := denoiser_bytes(Path(folder)))}
    stored = denoiser_dtype(Path(next(iter(folders.values()))))
    sizes_of = "the denoiser's weights on disk" + (f"; full precision is stored as {stored}" if stored else "")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    own = {"bitbrush": bitbrush.__version__, "python": platform.python_version()}
    return {"sizes": sizes, "sizes_of": sizes_of, "stored_as": stored, "versions": own | versions}


def machine() -> str:
    """Processor, threads that torch uses, and the GPU where there is one."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {torch.get_num_threads()} threads{gpu}"


def processor() -> str:
    """The processor's name, as the system knows it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def denoiser_bytes(folder: Path) -> int:
    """Bytes of the denoiser's weights on disk; 0 where the folder is not on this machine."""
    return sum(file.stat().st_size for name in ("unet", "transformer") for file in folder.glob(f"{name}/*.safetensors"))


def denoiser_dtype(folder: Path) -> str:
    """The floating type that most of the denoiser's numbers are stored in; empty where there is no file here."""
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for name in ("unet", "transformer"):
        for path in folder.glob(f"{name}/*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    counts[part.get_dtype()] += math.prod(part.get_shape())
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(counts.most_common(1)[0][0], "") if counts else ""


def summary(comparison: Comparison) -> dict[str, Any]:
    """The numbers of a comparison without those of single pictures."""
    data = comparison.to_json()
    return {name: value for name, value in data.items() if name not in ("per_picture", "prompts")}


def check_result(name: str) -> None:
    """What can be said of a folder before minutes of drawing; see `bitbrush.evaluation.arms.check_folder`."""
    from bitbrush.evaluation import arms

    arms.check_folder(name)


def _opener(output: str, device: str | None) -> Any:
    return lambda: open_pipeline(output, device)


def choose_prompts(pipeline: Any, prompts: list[str] | None, progress: Reporter) -> list[str] | None:
    """The prompts given, the bundled ones (which is said), or None for an unconditional pipeline."""
    from bitbrush.evaluation.sampling import takes_prompt

    return prompts_or_bundled(prompts, takes_prompt(pipeline), progress)


def prompts_or_bundled(prompts: list[str] | None, wanted: bool, progress: Reporter) -> list[str] | None:
    """The same for what is known to draw from text, or not."""
    if not wanted:
        if prompts is not None:
            progress.say("The pipeline is unconditional: the prompts are not used.")
        return None
    if prompts is None:
        progress.say("No --prompts given: using the bundled evaluation prompts (names of emoji).")
        return assets.prompts("evaluation")
    return prompts


def unique_names(outputs: Sequence[str]) -> dict[str, str]:
    """A short name for each folder: its own, with its parents where two are alike.

    Raises:
        InputError: The same folder twice.
    """
    folders = [Path(output).resolve() for output in outputs]
    if len(set(folders)) < len(folders):
        raise InputError(
            "the same folder was given twice", where=", ".join(outputs), why="each is compared once", try_="drop one"
        )
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return {"/".join(folder.parts[-depth:]): output for folder, output in zip(folders, outputs, strict=True)}


def read_history(output: str | Path) -> dict[str, Any] | None:
    """``history.json`` of a result, or None where there is none."""
    path = Path(output) / "history.json"
    if not path.is_file():
        return None
    try:
        history: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(
            "a history file cannot be read", where=str(path), why=str(error), try_="quantize again"
        ) from error
    return history


def emoji_evaluator(pipeline: Any) -> EmojiClip | None:
    """The emoji CLIP for pipelines that speak the emoji models' vocabulary; its score says nothing about others."""
    from bitbrush.evaluation import EmojiClip
    from bitbrush.evaluation.text import has_emoji_vocabulary

    if not has_emoji_vocabulary(getattr(pipeline, "tokenizer", None)):
        return None
    return EmojiClip.load(device=str(pipeline.device))


def _check_suffix(output: Path) -> None:
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(
            "this is not a picture format",
            where=f"-o {output}",
            why=f"the name ends in {output.suffix or 'nothing'}; known: {', '.join(SUFFIXES)}",
            try_=f"-o {output.with_suffix('.png')}",
        )
