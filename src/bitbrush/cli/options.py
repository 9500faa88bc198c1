"""Options that several commands share, and how a command begins."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitbrush.cli.render import Screen

Json = Annotated[bool, typer.Option("--json", help="Write one JSON object instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the notes of libraries.")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="Text file with one prompt a line; else the bundled ones.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; CUDA where there is one.")]
Kernel = Annotated[
    str, typer.Option("--kernel", help="What computes packed layers: reference, auto (the device's best) or a name.")
]
Graph = Annotated[
    bool, typer.Option("--graph", help="On CUDA, launch a step as one graph: with --kernel auto many times as fast.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
Guidance = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; no effect without prompts.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn at once.")]


def heavy(as_json: bool, debug: bool) -> Screen:
    """The screen of a command that loads models: imports the large libraries, seconds long, and quietens them."""
    from bitbrush.cli.quiet import quiet_loading

    screen = Screen(as_json, debug)
    with screen.waiting("Loading torch and diffusers"):
        quiet_loading(debug=debug)
        importlib.import_module("bitbrush.api")
    return screen


def read_prompt_file(screen: Screen, path: Path | None) -> list[str] | None:
    """The prompts of a file; repeated ones are noted. None without a file."""
    if path is None:
        return None
    from bitbrush.prompts import read_prompts

    prompts = read_prompts(path)
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        screen.note(f"{path}: {repeated:,} of {len(prompts):,} prompts are repeated")
    return prompts


def command_line(name: str, words: list[str], options: dict[str, object]) -> str:
    """The command with everything that was chosen, defaults written out, as it could be typed again."""
    pairs = [part for key, value in options.items() if value is not None for part in (key, str(value))]
    return shlex.join(["bitbrush", name, *words, *pairs])
