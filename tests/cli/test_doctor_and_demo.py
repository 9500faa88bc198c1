"""`doctor`, and the parts of `demo` that need no run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bitbrush import assets
from bitbrush.cli import demo, doctor, main
from bitbrush.errors import InputError


def test_doctor(capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["python"].startswith("3.") and report["versions"]["torch"]
    assert report["devices"][0]["device"] == "cpu"
    runs = {(row["kernel"], row["device"]): row for row in report["kernels"]}
    assert runs["reference", "cpu"]["runs"]
    assert all(row["runs"] or row["why_not"] for row in report["kernels"])
    assert report["plugin"]["registered"]
    assert report["memory"]["available_bytes"] > 0 and report["disk"]["free_bytes"] > 0
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out and "torch" in out and "registered" in out


def test_doctor_names_problems() -> None:
    report: dict[str, Any] = {
        "versions": dict.fromkeys(doctor.PACKAGES, "1"),
        "plugin": {"registered": True},
        "memory": {"available_bytes": 8e9},
        "disk": {"free_bytes": 8e9},
    }
    assert doctor.problems(report) == []
    bad = copy.deepcopy(report)
    bad["versions"]["diffusers"] = None
    bad["plugin"]["registered"] = False
    bad["memory"]["available_bytes"] = bad["disk"]["free_bytes"] = 1e9
    assert len(doctor.problems(bad)) == 4


def test_demo_never_writes_over_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._free_folder() == Path("bitbrush-demo")
    Path("bitbrush-demo").mkdir()
    Path("bitbrush-demo-2").mkdir()
    assert demo._free_folder() == Path("bitbrush-demo-3")
    assert demo._checked(Path("bitbrush-demo")) == Path("bitbrush-demo")
    Path("bitbrush-demo/x").touch()
    with pytest.raises(InputError, match="not empty"):
        demo._checked(Path("bitbrush-demo"))
    assert main(["demo", "--output", "bitbrush-demo"]) == 3


def test_demo_draws_prompts_that_calibration_does_not_use() -> None:
    prompts = assets.prompts("evaluation")
    assert not set(prompts) & set(assets.prompts("calibration"))
    chosen = demo.chosen_prompts()
    assert len(set(chosen)) == demo.PICTURES and set(chosen) <= set(prompts)
    assert set(chosen) & set(assets.prompts("heldout")) and not set(chosen) <= set(assets.prompts("heldout"))


def test_demo_presets_are_in_the_recipe_files() -> None:
    for recipe in demo.ARMS:
        assert "calibrate.samples = " in demo._preset(recipe)
    assert "weights.iterations = " in demo._preset("qdiffusion")


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ({"gain_db": {"value": 1.0}, "seconds": 360.0, "peak_memory": 3_999_999_999}, [True, True, True]),
        ({"gain_db": {"value": 0.99}, "seconds": 360.1, "peak_memory": 4_000_000_000}, [False, False, False]),
        ({"gain_db": {"value": float("nan")}, "seconds": 1.0, "peak_memory": 1}, [True, True, False]),
    ],
)
def test_demo_says_whether_its_promises_were_kept(numbers: dict[str, Any], kept: list[bool]) -> None:
    found = demo.promises(numbers)
    assert [promise["kept"] for promise in found] == kept
    assert [promise["what"] for promise in found] == ["time", "peak memory", "PSNR over plain rounding"]
