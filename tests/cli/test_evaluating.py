"""`bitbrush eval`: options arrive as given, the tables show what was found, errors have four parts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bitbrush
import bitbrush.report
import small
from bitbrush import assets
from bitbrush.cli import evaluating, main
from bitbrush.errors import InputError
from bitbrush.evaluation.result import Evaluation, Missing


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Two tiny unconditional pipelines of one resolution."""
    found = {}
    for name, seed in (("fp", 0), ("quantized", 1)):
        small.least_pipeline(seed).save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the page was asked to show."""
    written: list[Any] = []
    monkeypatch.setattr(bitbrush.report, "write_evaluation", lambda *args: written.append(args), raising=False)
    return written


def test_a_whole_run(folders: dict[str, str], pages: list[Any], tmp_path: Path, capsys: Any) -> None:
    page, data = tmp_path / "r.html", tmp_path / "numbers.json"
    words = ["eval", folders["quantized"], "--reference", folders["fp"], "-n", "4", "--steps", "2", "--batch", "2"]
    words += ["--metrics", "psnr, ssim", "--seeds", "1,2", "--device", "cpu", "--work", str(tmp_path / "w")]
    assert main([*words, "-o", str(page), "--data", str(data)]) == 0
    captured = capsys.readouterr()
    assert "PSNR, dB" in captured.out and "noise floor" in captured.out and f"report: {page}" in captured.out
    assert "not computed: ssim" in captured.out and "too small" in captured.out
    assert "draw: 24 to do" in captured.err and "measure: 24 in" in captured.err
    path, found, extras = pages[0]
    assert path == page and found.candidates == ["quantized"] and found.settings["seeds"] == [1, 2]
    assert extras["model"] == Path(folders["fp"]).name and "-n 4" in extras["command"]
    assert set(extras["sizes"]) == {"FP", "quantized"}
    assert Evaluation.from_json(json.loads(data.read_text())).to_json() == found.to_json()
    assert main([*words, "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == json.loads(data.read_text())["values"]


def test_options_arrive(
    folders: dict[str, str], pages: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fake(candidates: Any, **options: Any) -> Evaluation:
        asked.update(options, candidates=candidates)
        return Evaluation("FP", list(candidates), {"n": 1, "steps": 1})

    monkeypatch.setattr(bitbrush, "evaluate", fake, raising=False)
    words = ["eval", folders["quantized"], "--reference", folders["fp"], "--autocast", "bfloat16", "--no-floor"]
    words += ["--speed", "--inside", "--token", "apple", "--real", str(tmp_path), "--resize", "crop"]
    words += ["--extractor", "inception", "--evaluator", "emoji"]
    words += ["--lpips-weights", "a.safetensors", "--keep", "3", "--eight-bits", "--sampler", "ddim", "--guidance", "2"]
    assert main(words) == 0
    assert asked["candidates"] == {"quantized": folders["quantized"]} and asked["prompts"] is None
    expected = {
        "n": 512, "metrics": None, "seeds": [0], "steps": 25, "guidance": 2.0, "batch": 16, "sampler": "ddim",
        "autocast": torch.bfloat16, "work": None, "real": tmp_path, "resize": "crop", "extractor": "inception",
        "evaluator": "emoji", "captions": None, "perceptual": Path("a.safetensors"), "floor": False, "speed": True,
        "inside": True, "token": "apple", "keep": 3, "eight_bits": True, "device": None,
    }  # fmt: skip
    assert {key: asked[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["--metrics", "psnr,fidd"], "fidd"), (["--seeds", "a"], "seeds could not be read"),
        (["--real", "none"], "no pictures"), (["--extractor", "none", "--metrics", "kid"], "no such feature extractor"),
    ],
)  # fmt: skip
def test_errors_have_four_parts(
    words: list[str], say: str, folders: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "r.html"
    given = ["eval", folders["quantized"], "--reference", folders["fp"], "-n", "2", "--steps", "1", "--device", "cpu"]
    assert main([*given, *words, "-o", str(out)]) == 3
    shown = capsys.readouterr().err
    assert say in shown and all(part in shown for part in ("what:", "where:", "why:", "try:")) and not out.exists()
    assert "Traceback" not in shown


def test_what_is_no_pipeline_is_refused_before_it_draws(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    for output, reference in ((str(tmp_path / "none"), folders["fp"]), (folders["quantized"], str(tmp_path / "none"))):
        assert main(["eval", output, "--reference", reference, "-n", "2"]) == 3
        captured = capsys.readouterr()
        assert "no such result" in captured.err and "draw" not in captured.err.partition("error")[0]


def test_prompts() -> None:
    said: list[str] = []
    progress: Any = SimpleNamespace(say=said.append)
    assert evaluating._texts(["a"], False, lambda: True, progress) is None and "not used" in said.pop()
    assert evaluating._texts(["a"], True, lambda: False, progress) == ["a"] and not said
    bundled = evaluating._texts(None, True, lambda: True, progress)
    assert bundled == assets.prompts("evaluation") and "bundled" in said.pop()
    with pytest.raises(InputError, match="prompts are missing") as caught:
        evaluating._texts(None, True, lambda: False, progress)
    assert small.complete(caught.value)


def test_what_is_missing_is_shown_with_its_remedy(capsys: Any) -> None:
    from bitbrush.cli.render import Screen

    found = Evaluation("FP", ["a"], {"n": 1, "steps": 1}, notes=["a \x1b[31mnote"])
    found.missing.append(Missing("fid", "the weights are not there", "cache", "no such file", "put them there"))
    Screen().show({}, *evaluating.tables(found, "r.html"))
    out = capsys.readouterr().out
    assert "not computed: fid" in out and "where: cache" in out and "try: put them there" in out
    assert "\x1b[31mnote" not in out and "report: r.html" in out
