"""Errors in decibels, and how sure a difference is."""

from __future__ import annotations

import math

import pytest
import torch

from bitbrush.steps import nearer


def test_decibels_are_those_of_the_share_and_end_at_the_floor() -> None:
    error, power = torch.tensor([1.0, 0.1, 4.0, 0.0]), torch.tensor([1.0, 10.0, 0.4, 3.0])
    found = nearer.decibels(error, power)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.0, -20.0, 10.0, nearer.FLOOR_DB], abs=1e-5)
    assert nearer.decibels(torch.tensor([0.01])).tolist() == pytest.approx([-20.0], abs=1e-5)


def test_a_gain_is_sure_beyond_two_standard_errors() -> None:
    before = torch.zeros(4, dtype=torch.float64)
    found = nearer.gain(before, torch.tensor([-1.0, -3.0, -1.0, -3.0], dtype=torch.float64))
    assert found.value == 2.0 and found.error == pytest.approx((4 / 3) ** 0.5 / 2) and found.sure
    assert str(found) == "+2.00 dB +- 0.58" and found.note() == {"gain_db": 2.0, "error_db": 0.5774}
    assert not nearer.gain(before, torch.tensor([-1.0, 3.0, -4.0, 0.0], dtype=torch.float64)).sure
    assert not nearer.gain(before, before).sure, "nothing is not a gain"


def test_one_trajectory_is_never_sure() -> None:
    found = nearer.gain(torch.zeros(1), torch.tensor([-9.0]))
    assert found.value == 9.0 and math.isinf(found.error) and not found.sure
    assert str(found) == "+9.00 dB" and found.note() == {"gain_db": 9.0, "error_db": None}
