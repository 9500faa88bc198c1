"""The choice of calibration steps by structural risk."""

from __future__ import annotations

import pytest
import torch

from bitbrush.steps.risk import Rounds, choose


def rounds(index: torch.Tensor, steps: int, uncertainty: torch.Tensor | None, **more: float) -> Rounds:
    moments = torch.arange(steps).repeat(3)
    return Rounds(index, moments, 4, None if uncertainty is None else lambda: uncertainty,
                  torch.Generator().manual_seed(1), **more)


def visits(found: Rounds, index: torch.Tensor) -> list[int]:
    """Runs all rounds; the step of each."""
    out = []
    for start in range(0, len(index), found.length):
        found.begin(start)
        here = found.moments[index[start : start + found.length]].unique()
        assert len(here) == 1, "all groups of a round are of one step"
        out.append(int(here))
    return out


def test_equal_uncertainty_visits_every_step_once_before_any_twice() -> None:
    index = torch.zeros(4 * 14, 5, dtype=torch.long)
    order = visits(rounds(index, 7, torch.ones(7)), index)
    assert order == [6, 5, 4, 3, 2, 1, 0] * 2, "from the cleanest, as the released code does"


def test_without_penalty_the_most_uncertain_step_is_always_taken() -> None:
    index = torch.zeros(4 * 6, 2, dtype=torch.long)
    planted = torch.tensor([0.1, 0.9, 0.2, 0.3])
    assert visits(rounds(index, 4, planted, penalty=0.0), index) == [1] * 6
    index = torch.zeros(4 * 6, 2, dtype=torch.long)
    assert visits(rounds(index, 4, planted, penalty=2.0), index) == [1, 3, 2, 0, 1, 3]


def test_the_penalty_is_in_units_of_the_spread() -> None:
    """Scores, hence choices, do not change when all uncertainties are multiplied or moved."""
    values, counts = torch.tensor([0.3, 0.5, 0.1, 0.45]), torch.tensor([2, 3, 0, 1])
    base = choose(values, counts)
    assert [choose(values * f + c, counts) for f, c in ((100.0, 0.0), (7.0, 3.0))] == [base, base]
    spread = float(values.double().std(correction=0))
    want = (values.double() - 0.5 * spread * counts).argmax()
    assert base == int(want)


def test_random_rounds_follow_the_normal_distribution() -> None:
    index = torch.zeros(4 * 3000, 1, dtype=torch.long)
    order = torch.tensor(visits(rounds(index, 10, None), index))
    clean = 9 - order  # counted from the cleanest
    inner = clean[(clean > 0) & (clean < 9)].double()
    assert 3.5 < float(clean.double().mean()) < 4.5 and len(inner) > 1500
    share_first = float((clean == 0).double().mean())
    assert 0.17 < share_first < 0.28, "P(z < 0.1) = 0.227 is clamped to the cleanest"
    assert len(order) == 3000


@pytest.mark.parametrize("cut", [4, 8, 16])
def test_a_search_that_goes_on_chooses_the_same(cut: int) -> None:
    """Counts come from the schedule so far, which the saved state holds."""
    values = torch.tensor([0.3, 0.5, 0.1, 0.45])
    whole = torch.zeros(24, 3, dtype=torch.long)
    want = visits(rounds(whole, 4, values), whole)
    part = torch.zeros(24, 3, dtype=torch.long)
    part[:cut] = whole[:cut]
    again = rounds(part, 4, values)
    for start in range(cut, 24, 4):
        again.begin(start)
    assert torch.equal(part, whole) and len(want) == 6
