"""The estimate before a run: its size follows the recipe, and it says when a CPU is the wrong place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bitbrush
from bitbrush import assets
from bitbrush.engine import estimate


def found(**options: Any) -> dict[str, Any]:
    return bitbrush.inspect(str(assets.path("emoji-sd-tiny")), device="cpu", **options).estimates


@pytest.fixture(autouse=True)
def _rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate measured with two free cores of the machine that the figures below come from."""
    monkeypatch.setattr(estimate, "network_rate", lambda *_: 21e9)


def test_measured_runs_are_met() -> None:
    """Seconds on two free cores: rtn 100; qdiffusion with 64 samples, batch 8: 70 at 20 iterations, 120 at 60."""
    assert found(recipe="rtn")["seconds"] == pytest.approx(100, rel=0.3)
    common = {"calibrate.samples": 64, "calibrate.trajectories": 6, "weights.batch": 8, "activations.iterations": 0}
    for iterations, seconds in ((20, 70), (60, 120)):
        settings = {**common, "weights.iterations": iterations}
        assert found(settings=settings)["seconds"] == pytest.approx(seconds, rel=0.3)


def test_a_full_recipe_on_a_cpu_is_advised_against() -> None:
    full, demo = found(), found(preset="demo")
    assert full["seconds"] > 3600 and "--preset demo" in full["advice"] and "--device cuda" in full["advice"]
    assert demo["seconds"] < 360 and demo["advice"] is None and demo["peak_bytes"] < 4e9
    words = estimate.in_words(full)
    assert words.startswith("Estimate on cpu: ") and " h, " in words and words.endswith(full["advice"])
    assert " min, " in estimate.in_words(demo)


def test_a_recipe_without_data_is_quick() -> None:
    plain = found(recipe="rtn-dynamic")
    assert plain["seconds"] < 30 and plain["tape_bytes"] == 0 and "disk" not in estimate.in_words(plain)


def test_measuring_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    threads = torch.get_num_threads()
    assert 1e8 < found(recipe="rtn")["macs_per_second"] < 1e14
    assert torch.get_num_threads() == threads
