"""Intervals cover, pair, and are seeded."""

from __future__ import annotations

import numpy as np
import pytest

from bitbrush.errors import InputError
from bitbrush.evaluation import Estimate, bootstrap_mean, paired_difference
from bitbrush.evaluation.statistics import bootstrap_share, bootstrap_worst


def test_the_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    found = [bootstrap_mean(rng.normal(3, 2, 60), resamples=400) for _ in range(400)]
    covered = np.mean([e.low <= 3 <= e.high for e in found])
    assert 0.91 <= covered <= 0.98


def test_seeded() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(0, 10, 200)
    shifted = base + 0.1 + rng.normal(0, 0.01, 200)
    difference = paired_difference(shifted, base)
    assert difference.value == pytest.approx(0.1, abs=0.01) and difference.high - difference.low < 0.01
    assert bootstrap_mean(shifted).high - bootstrap_mean(shifted).low > 1


def test_several_seeds_of_a_prompt_are_not_more_prompts() -> None:
    values = np.random.default_rng(3).normal(size=100)
    once, thrice = bootstrap_mean(values), bootstrap_mean(np.tile(values, (3, 1)))
    assert once.low == pytest.approx(thrice.low) and once.high == pytest.approx(thrice.high)


def test_worst_share() -> None:
    assert bootstrap_worst(np.arange(100.0)).value == 2.0  # mean of 0, 1, 2, 3, 4
    assert bootstrap_worst([7.0, 9.0]).value == 7.0


def test_share() -> None:
    found = bootstrap_share([True] * 30 + [False] * 10)
    assert found.value == 0.75 and 0.55 < found.low < found.high < 0.92


def test_estimate_is_plain_data() -> None:
    assert Estimate(1.0, 0.5, 1.5).to_json() == {"value": 1.0, "low": 0.5, "high": 1.5}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], np.zeros((2, 2, 2))])
def test_no_mean_of_nothing(values) -> None:
    with pytest.raises(InputError, match="no mean"):
        bootstrap_mean(values)


def test_pairs_need_the_same_pictures() -> None:
    with pytest.raises(InputError, match="paired difference"):
        paired_difference([1.0, 2.0], [1.0])
