"""The experiment on what corrections do to the noise in pictures: its figures, and a run of every arm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

Script = Callable[[str], ModuleType]


def test_energy_is_told_by_frequency(script: Script) -> None:
    """A wave of 1/4 cycle a pixel is in the band from 1/6 to 1/3, a mean in none, and noise in all."""
    energy = script("correction_noise").energy
    wave = torch.cos(torch.arange(32.0) * torch.pi / 2).expand(2, 3, 32, 32)
    found = energy(wave + 5.0)
    assert found.argmax() == 2 and found[2] == pytest.approx(float(found.sum()), rel=1e-6)
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(energy(2 * noise) / energy(noise), torch.full((4,), 4.0, dtype=torch.float64))
    assert energy(noise).sum() == pytest.approx(32**4, rel=0.02)


def test_every_arm_runs(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = script("correction_noise")
    monkeypatch.setattr(sys, "argv", ["correction_noise.py", "--smoke", "--out", str(tmp_path / "out.json")])
    with torch.enable_grad():  # what the script switches off is on again afterwards
        module.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["arms"]) == ["plain", "tac", "tac-even", "tac-mean", "tac-state"] and found["steps"] == 4
    assert found["arms"]["plain"]["gain"] == 0 and not found["arms"]["tac-even"]["shifted"]
    assert all(len(arm["energy"]) == 4 for arm in found["arms"].values())
