"""Tests of a difference: exact where all flips are tried, of the right level, finding what differs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.evaluation.distribution import as_features
from bitbrush.evaluation.paired import RESAMPLES, difference, holm, sign_flip


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_flips_of_few_prompts_are_tried() -> None:
    values = np.array([1.0, 2.0, -0.5, 3.0, 0.25])
    sums = [abs(float(np.dot(signs, values))) for signs in product((1, -1), repeat=5)]
    expected = np.mean([total >= abs(values.sum()) - 1e-12 for total in sums])
    assert sign_flip(values) == pytest.approx(expected)
    assert sign_flip([1.0, 2, 3, 4, 5, 6]) == 2 / 2**6, "the least that six prompts allow"
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0 and sign_flip([1.0]) == 1.0


def test_many_prompts_are_flipped_by_a_seed() -> None:
    values = normal(40, seed=0) + 0.3
    assert sign_flip(values) == sign_flip(values) and abs(sign_flip(values) - sign_flip(values, seed=1)) < 0.02
    assert sign_flip(normal(40, seed=1) + 2) == 1 / (RESAMPLES + 1)


def test_seeds_of_a_prompt_flip_together() -> None:
    """Three copies of one seed are no more evidence than one."""
    values = normal(30, seed=2) + 0.2
    assert sign_flip(values.repeat(3, 1)) == sign_flip(values)


def test_the_level_of_flips_is_kept() -> None:
    found = np.array([sign_flip(normal(12, seed=i)) for i in range(300)])
    assert 0.02 <= (found < 0.05).mean() <= 0.09


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_swaps_are_those_of_the_definition() -> None:
    """The quadratic form against energy distances computed anew after every swap."""
    a, b = normal(5, 3, seed=3), normal(5, 3, seed=4) + 0.7

    def statistic(x: Tensor, y: Tensor) -> float:
        return float(2 * torch.cdist(x, y).sum() - torch.cdist(x, x).sum() - torch.cdist(y, y).sum())

    values = []
    for signs in product((False, True), repeat=5):
        swap = torch.tensor(signs)[:, None]
        values.append(statistic(torch.where(swap, b, a), torch.where(swap, a, b)))
    expected = np.mean([value >= statistic(a, b) - 1e-4 for value in values])
    found = difference(a, b)
    assert found.p == pytest.approx(expected) and found.exact and found.prompts == 5


def test_equal_pictures_do_not_differ() -> None:
    a = normal(50, 4, seed=5)
    found = difference(a, a.clone())
    assert found.p == 1.0 and found.value.value == found.value.low == found.value.high == 0


def test_other_seeds_show_no_difference_and_damage_does() -> None:
    """Prompts with features of their own; noise around them; a shift of a third of the noise in all features."""
    prompts = 3 * normal(64, 32, seed=6)
    null = [difference(prompts + normal(64, 32, seed=100 + i), prompts + normal(64, 32, seed=200 + i), seed=i).p
            for i in range(100)]
    assert 0.01 <= np.mean(np.array(null) < 0.05) <= 0.11
    hurt = [difference(prompts + normal(64, 32, seed=100 + i), prompts + 0.33 + normal(64, 32, seed=200 + i)).p
            for i in range(10)]
    assert np.mean(np.array(hurt) < 0.05) >= 0.9


def test_the_same_noise_finds_what_other_seeds_cannot() -> None:
    prompts, noise = 3 * normal(64, 32, seed=7), normal(64, 32, seed=8)
    shifted = prompts + noise + 0.02
    other = prompts + normal(64, 32, seed=9)
    assert difference(shifted, prompts + noise).p < 0.001 < 0.05 < difference(shifted, other).p


def test_several_seeds_are_more_evidence_where_they_are_independent() -> None:
    prompts = 3 * normal(40, 16, seed=10).repeat(3, 1)
    a, b = prompts + normal(120, 16, seed=11), prompts + 0.25 + normal(120, 16, seed=12)
    assert difference(a, b, seeds=3).p < difference(a[:40], b[:40]).p
    assert difference(a, b, seeds=3).prompts == 40


def test_blocks_bound_the_memory_and_keep_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(60, 8, seed=13), normal(60, 8, seed=14) + 0.8
    whole = difference(a, b)
    monkeypatch.setattr("bitbrush.evaluation.paired.BLOCK", 16)
    parts = difference(a, b)
    assert whole.p == parts.p == 1 / (RESAMPLES + 1)
    assert parts.value.value == pytest.approx(whole.value.value, rel=0.5)


def test_the_interval_holds_the_value() -> None:
    found = difference(normal(80, 8, seed=15), normal(80, 8, seed=16) + 1).value
    assert 0 < found.low < found.value < found.high < 1


def test_features_must_belong_together() -> None:
    a = as_features(normal(6, 3, seed=0).numpy(), extractor="one", source="a")
    b = as_features(normal(6, 3, seed=1).numpy(), extractor="two", source="b")
    for wrong in ((a, b, 1), (normal(6, 3, seed=0), normal(5, 3, seed=0), 1), (a, a, 4), (a, a, 6)):
        with pytest.raises(InputError, match="cannot be tested") as caught:
            difference(wrong[0], wrong[1], seeds=wrong[2])
        assert caught.value.where and caught.value.why and caught.value.try_
    with pytest.raises(InputError, match="finite"):
        sign_flip([float("nan"), 1.0])
    assert difference(a, a).features == "one"
