"""Codes with error feedback: GPTQ where groups are single columns, and better than k-means' codes where H says so."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitbrush.numbers.codebook import decode
from bitbrush.steps import additive, feedback
from bitbrush.steps.additive import Settings, Target
from bitbrush.steps.beam import row_losses

SMALL = Settings(count=2, bits=4, group=4, beam=4, epochs=1, steps=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(rows: int, columns: int) -> Target:
    """Inputs with a mean far from 0, as after an activation."""
    x = torch.randn(4 * columns, columns, generator=seeded(1)).relu() + 0.3 * torch.rand(columns, generator=seeded(2))
    return Target(torch.randn(rows, columns, generator=seeded(3)), x.T @ x / len(x))


def gptq(weight: Tensor, covariance: Tensor, levels: Tensor, damping: float) -> Tensor:
    """Frantar et al. 2022, algorithm 1, one column after another in the order of the inputs' energy."""
    order = covariance.diagonal().argsort(descending=True, stable=True)
    h = covariance.double()
    h = (h + damping * h.diagonal().mean() * torch.eye(len(h)))[order[:, None], order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, codes = weight.double()[:, order], torch.empty(weight.shape, dtype=torch.int64)
    for i, column in enumerate(order):
        chosen = (left[:, i, None] - levels).abs().argmin(dim=1)
        codes[:, column] = chosen
        left[:, i:] -= ((left[:, i] - levels[chosen]) / upper[i, i])[:, None] * upper[i, i:]
    return codes


def test_groups_of_one_column_are_gptq() -> None:
    target, levels = correlated(6, 40), torch.linspace(-3, 3, 16)
    books, scale = levels[None, :, None], torch.ones(6)
    found = feedback.encode(target.weight, target.covariance, books, scale, beam=1, damping=0.01)
    expected = gptq(target.weight, target.covariance, levels.double(), 0.01)
    assert found.shape == (6, 40, 1) and torch.equal(found[:, :, 0].long(), expected)
    assert not torch.equal(expected, (target.weight[..., None] - levels).abs().argmin(dim=2))


def test_an_h_without_correlation_changes_nothing() -> None:
    weight, books = torch.randn(5, 8, generator=seeded()), torch.randn(1, 32, 4, generator=seeded(1))
    for h in (torch.eye(8), torch.zeros(8, 8)):
        found = feedback.encode(weight, h, books, torch.ones(5), beam=1, damping=0.01)
        nearest = torch.cdist(weight.reshape(5, 2, 4), books[0].expand(5, -1, -1)).argmin(2)
        assert torch.equal(found[:, :, 0].long(), nearest)


def test_the_diagonal_is_cut_into_blocks() -> None:
    matrix = torch.arange(36.0).reshape(6, 6)
    found = feedback.corners(matrix, 2)
    assert torch.equal(found, torch.stack([matrix[i : i + 2, i : i + 2] for i in (0, 2, 4)]))


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 groups, in blocks of 16, of 4 (the last one short), and of 1."""
    target, books = correlated(6, 40), torch.randn(2, 16, 4, generator=seeded(4))
    found = []
    for size in (16, 4, 1):
        monkeypatch.setattr(feedback, "BLOCK", size)
        found.append(feedback.encode(target.weight, target.covariance, books, torch.ones(6), beam=4, damping=0.01))
    assert found[0].shape == (6, 10, 2) and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_full_beam_finds_the_best_sum() -> None:
    points, books = torch.randn(7, 4, generator=seeded()), torch.randn(3, 4, 4, generator=seeded(1))
    states = torch.tensor(list(itertools.product(range(4), repeat=3)))
    every = torch.stack([books[k][states[:, k]] for k in range(3)]).sum(dim=0)
    best = torch.cdist(points, every).amin(dim=1)
    found = feedback.sums(points, books, 64)
    total = sum(books[k][found[:, k]] for k in range(3))
    torch.testing.assert_close((points - total).norm(dim=1), best)
    narrow = sum(books[k][feedback.sums(points, books, 1)[:, k]] for k in range(3))
    assert bool(((points - narrow).norm(dim=1) >= best - 1e-6).all())


def test_rows_only_get_better_and_the_fit_ends_lower() -> None:
    target = correlated(32, 48)
    solution = additive.start([target], SMALL, seeded())
    fed = additive.feed([target], solution, SMALL)
    before, after = (row_losses(target.weight - s.weight(), target.covariance) for s in (solution, fed))
    assert bool((after <= before).all()) and float(after.sum()) < 0.5 * float(before.sum())
    assert fed.codes[0].dtype == solution.codes[0].dtype
    ends = [additive.fit([target], Settings(**{**vars(SMALL), "feedback": share, "epochs": 3}), seeded())[1][-1]
            for share in (0.01, 0.0)]
    assert ends[0] < ends[1]
    same = additive.feed([target], solution, Settings(**{**vars(SMALL), "feedback": 0.0}))
    assert same is solution


def test_rows_of_zeros_are_encoded() -> None:
    target = correlated(4, 16)
    weight = target.weight.clone()
    weight[1] = 0
    books, scale = torch.randn(2, 8, 4, generator=seeded()), torch.tensor([1.0, 0.0, 2.0, 1.0])
    codes = feedback.encode(weight, target.covariance, books, scale, beam=2, damping=0.01)
    assert bool(decode(codes, books, scale).isfinite().all()) and int(codes.max()) < 8


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_factor_is_of_the_inverse(damping: float) -> None:
    h = correlated(1, 12).covariance
    upper = feedback.factor(h, damping).double()
    again = torch.linalg.inv(upper.T @ upper) - damping * h.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(again, h.double(), rtol=1e-4, atol=1e-4)
