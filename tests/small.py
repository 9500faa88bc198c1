"""Runs of recipes on the tiny pipelines, everything at its smallest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.disk import Disk
from bitbrush.engine.journal import Journal
from bitbrush.engine.progress import Silent
from bitbrush.engine.recipe import Recipe
from bitbrush.engine.run import Run
from bitbrush.errors import BitbrushError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.steps import loop

PROMPTS = ["red apple", "blue car", "green tree", "a cat", "the sun", "old house", "big fish", "tall man"]

HEAD = """
name = "small"
weights = 4
activations = 8
[layers]
"*" = { weight = {}, activation = {} }
"conv_in | conv_out" = { weight = { bits = 8 } }
"""
TIMED = HEAD.replace("activations = 8", "activations = 4").replace("activation = {}", "activation = { timed = true }")
CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = 12\ntrajectories = 4\nsteps = 3\nbatch = 2\n'
# all four moments of four walks
WALKS = '[[step]]\ndo = "calibrate"\nsamples = 16\ntrajectories = 4\nsteps = 4\nbatch = 4\n'
SPLIT = '[[step]]\ndo = "split"\n'
FIT = '[[step]]\ndo = "fit"\nid = "weights-fit"\nwhat = "weights"\npoints = 8\nstep = 0.08\n'
ROUND = '[[step]]\ndo = "reconstruct"\nid = "weights"\ntrain = "rounding"\niterations = 4\nbatch = 4\nlr = 0.02\n'
RANGES = '[[step]]\ndo = "fit"\nid = "activations-fit"\nwhat = "activations"\nmethod = "minmax"\nvalues = 32\n'
SCALES = (
    '[[step]]\ndo = "reconstruct"\nid = "activations"\ntrain = "activation_scale"\niterations = 4\nbatch = 4\n'
    'inputs = "float"\nlr = 0.001\n'
)
PACK = '[[step]]\ndo = "pack"\n[[step]]\ndo = "verify"\n'
WHOLE = HEAD + CALIBRATE + SPLIT + FIT + ROUND + RANGES + SCALES + PACK


def recipe(folder: Path, text: str = WHOLE, **choices: Any) -> Recipe:
    """A recipe from TOML text, checked."""
    path = folder / "small.toml"
    path.write_text(text)
    return read_recipe(path, **choices)


def begin(
    folder: Path,
    pipe: Any,
    asked: Recipe,
    *,
    resume: bool = False,
    disk: Disk | None = None,
    seed: int = 0,
    memory: int = 1 << 30,
) -> Run:
    """An opened run of ``asked`` on a pipeline, journal in ``folder/out``."""
    journal = Journal(folder / "out", disk or Disk())
    journal.open({}, {"model": "tiny"}, resume=resume)
    return Run(asked, pipe.unet, pipe, journal, seed, list(PROMPTS), Silent(), tiny.TOKENS, memory=memory)


def execute(folder: Path, pipe: Any, text: str = WHOLE, *, seed: int = 0, **choices: Any) -> Run:
    """A finished run (not yet saved), its lock given back."""
    run = begin(folder, pipe, recipe(folder, text, **choices), seed=seed)
    try:
        run.execute()
    finally:
        run.journal.release()
    return run


class Killed(BaseException):
    """What a test raises to kill a run."""


def kill_training(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """The first training dies at iteration ``stop``, later ones live; returns the iterations begun, in order."""
    iterate, began = loop._Loop.iterate, list[int]()

    def dying(self: Any, k: int) -> None:
        began.append(k)
        if k == stop and len(began) == stop + 1:
            raise Killed
        iterate(self, k)

    monkeypatch.setattr(loop._Loop, "iterate", dying)
    return began


def killed_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, stop: int, checkpoint: int = 4
) -> tuple[Run, Run]:
    """(a run that was left alone, one whose training died at iteration ``stop``, resumed): the same bytes."""
    (folder / "whole").mkdir()
    whole = execute(folder / "whole", least_pipeline(), text)
    began = kill_training(monkeypatch, stop)
    run = begin(folder, least_pipeline(), recipe(folder, text))
    with pytest.raises(Killed):
        run.execute()
    run.journal.release()
    assert len(list(run.journal.folder.glob("carry-*"))) == min(stop // checkpoint, 2)
    again = resumed(folder, text)
    assert began[stop + 1] == stop // checkpoint * checkpoint, "it begins at the saved iteration"
    files = {p.name: p.read_bytes() for p in (folder / "whole" / "out" / ".run" / "units").glob("*")}
    assert len(files) == len(whole.done) >= 3 and again.plan == whole.plan
    assert all((again.journal.folder / "units" / name).read_bytes() == data for name, data in files.items())
    return whole, again


def resumed(folder: Path, text: str) -> Run:
    """A run that goes on from its journal to its end."""
    run = begin(folder, least_pipeline(), recipe(folder, text), resume=True)
    run.execute()
    run.journal.release()
    return run


def captured_and_eager(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> list[dict[str, Any]]:
    """What `tune` notes on a CUDA device where an iteration is one graph, and where it is none."""
    loops, notes, captured = loops_made(monkeypatch), [], []
    for name, warm in (("graph", loop.WARM), ("eager", 99)):
        monkeypatch.setattr(loop, "WARM", warm)
        (folder / name).mkdir()
        notes.append(note(execute(folder / name, tiny.pipeline("text").to("cuda"), text)))
        captured.append(loops[-1].graph is not None)
    assert captured == [True, False]
    return notes


def note(run: Run) -> dict[str, Any]:
    """What the step `tune` says of itself."""
    return next(entry for entry in run.done if entry["step"] == "tune")


def tables(run: Run) -> dict[str, torch.Tensor]:
    """Scales and zero-points of all activation quantizers."""
    found = {n: m for n, m in run.model.named_modules() if isinstance(m, ActivationQuantizer)}
    return {f"{n}/{k}": getattr(m, k).clone() for n, m in found.items() for k in ("scale", "zero_point")}


def loops_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every optimisation loop that is made from now on, in order."""
    loops: list[Any] = []
    make = loop._Loop.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        loops.append(self)

    monkeypatch.setattr(loop._Loop, "__init__", spy)
    return loops


def least_unet(seed: int = 0, channels: int = 4) -> UNet2DModel:
    """A UNet of a dozen layers, two of them shortcut convolutions of an up block."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(channels,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    ).eval()


def least_pipeline(seed: int = 0, channels: int = 4) -> DDIMPipeline:
    """The smallest pipeline that can be quantized, for tests that repeat a run hundreds of times."""
    pipe = DDIMPipeline(unet=least_unet(seed, channels), scheduler=DDIMScheduler(num_train_timesteps=1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def complete(error: BitbrushError) -> bool:
    """Whether an error says all of what, where, why and what to try."""
    return all((error.what, error.where, error.why, error.try_))
