"""``--correct tac``: from the option to a picture drawn with the stored correction."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from typer.testing import CliRunner

import bitbrush
import small
from bitbrush.cli.app import app
from bitbrush.engine.progress import Silent
from bitbrush.errors import InputError
from bitbrush.network import correction
from bitbrush.report.html import _history

QUICK = {"calibrate.samples": 12, "calibrate.trajectories": 4, "calibrate.steps": 3, "trajectories.samples": 4}
OPTIONS = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline on disk, whose DDIM scheduler does not clip."""
    made = tmp_path_factory.mktemp("least") / "pipe"
    pipe = small.least_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    pipe.save_pretrained(made)
    return made


def quantize(folder: Path, out: Path, *more: str) -> Any:
    words = ["quantize", str(folder), "-o", str(out), "--recipe", "rtn", "--device", "cpu", "--json", *OPTIONS]
    result = CliRunner().invoke(app, [*words, "--correct", "tac", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_quantize_and_draw(folder: Path, tmp_path: Path) -> None:
    summary = quantize(folder, tmp_path / "out", "--set", "correct.l1=0.25")
    assert summary["correction"] == "tac, for DDIMScheduler, 3 steps: estimate and input"
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history["correction"]["in_words"] == summary["correction"] and history["correction"]["samples"] == 4
    assert all("correction" not in unit for unit in history["units"])
    assert _history("arm", history)["correction"] == summary["correction"]
    assert "l1 = 0.25" in (tmp_path / "out" / "recipe.toml").read_text()
    pictures = []
    for pipe in (bitbrush.load(tmp_path / "out"), DDIMPipeline.from_pretrained(tmp_path / "out")):
        assert correction.of(pipe.unet).scale.shape == (3, 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="bitbrush")
            pictures.append(draw(pipe))
    correction.remove(pipe.unet)
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != draw(pipe)).any()


def draw(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_the_api_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "cli")
    result = bitbrush.quantize(folder, "rtn", correct="tac", settings=dict(QUICK), device="cpu", progress=Silent(),
                               output=tmp_path / "api")
    assert result.history["correction"]["method"] == "tac" and correction.find(result.pipeline.unet) is not None
    files = sorted(p.relative_to(tmp_path / "cli") for p in (tmp_path / "cli").rglob("*.*") if ".run" not in p.parts)
    assert len(files) >= 7
    assert [f for f in files if (tmp_path / "cli" / f).read_bytes() != (tmp_path / "api" / f).read_bytes()] == []


def test_a_dry_run_shows_the_steps(folder: Path) -> None:
    plain, corrected = (bitbrush.dry_run(folder, "rtn", correct=c, device="cpu") for c in (None, "tac"))
    assert 'do = "correct"' in corrected["recipe"] and 'do = "trajectories"' in corrected["recipe"]
    forwards = [report["inspection"]["estimates"]["forwards"] for report in (plain, corrected)]
    assert forwards[1] - forwards[0] == 3 * 32 * 25


def test_refusals(folder: Path) -> None:
    attempts = [
        (folder, "rtn-dynamic", "tac", "calibrate step"), (folder / "unet", "rtn", "tac", "needs a pipeline"),
        (folder, "rtn", "ptqd", "'ptqd'"),
    ]
    for target, recipe, method, words in attempts:
        with pytest.raises(InputError, match=words) as caught:
            bitbrush.quantize(target, recipe, correct=method, device="cpu", progress=Silent())
        assert small.complete(caught.value)
    assert len(attempts) == 3
