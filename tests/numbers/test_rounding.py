"""AdaRound's functions."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitbrush.numbers import rounding
from bitbrush.numbers.codec import encode_offset, reciprocal


@pytest.mark.parametrize("iterations", [100, 2500, 20_000])
def test_beta_schedule(iterations: int) -> None:
    at = [rounding.beta_at(round(share * iterations), iterations) for share in (0, 0.2, 0.6, 1)]
    assert at == pytest.approx([20, 20, 11, 2])
    every = [rounding.beta_at(i, iterations) for i in range(iterations + 1)]
    assert all(a >= b for a, b in itertools.pairwise(every)) and min(every) >= 2


def test_beta_other_ends() -> None:
    assert rounding.beta_at(0, 1, warmup=0.0) == 20.0
    assert rounding.beta_at(10, 10, warmup=1.0) == pytest.approx(20.0)
    assert rounding.beta_at(50, 100, warmup=0.0, start=10, end=0) == pytest.approx(5.0)


def test_initial_alpha_restores_the_fraction() -> None:
    w = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    inverse = reciprocal(torch.full((64, 1), 0.037))
    scaled = w * inverse
    h = rounding.rectified_sigmoid(rounding.initial_alpha(w, inverse))
    assert torch.allclose(h, scaled - scaled.floor(), atol=2e-6)
    relaxed = encode_offset(w, inverse, torch.tensor(128.0), 255, h)
    assert torch.allclose((relaxed - 128)[relaxed.gt(0) & relaxed.lt(255)],
                          scaled[relaxed.gt(0) & relaxed.lt(255)], atol=2e-5)
    assert torch.isfinite(rounding.initial_alpha(torch.tensor([0.0, 1.0, -3.0]), torch.tensor(1.0))).all()


def test_harden_decides_as_h_does() -> None:
    alpha = torch.linspace(-8, 8, 4001)
    hard = rounding.harden(alpha)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard, (rounding.rectified_sigmoid(alpha) >= 0.5).float())
    w = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    hard = rounding.harden(rounding.initial_alpha(w, torch.tensor(3.0)))
    fraction = w * 3 - torch.floor(w * 3)
    sure = (fraction - 0.5).abs() > 1e-5
    assert torch.equal(hard[sure], (fraction >= 0.5).float()[sure])  # untrained, it is rounding to nearest


def test_rectified_sigmoid_reaches_its_ends() -> None:
    h = rounding.rectified_sigmoid(torch.tensor([-10.0, -2.5, 0.0, 2.5, 10.0]))
    assert h.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-2) and h[0] == 0 and h[-1] == 1


@pytest.mark.parametrize("beta", [2.0, 11.0, 20.0])
def test_regulariser(beta: float) -> None:
    assert rounding.regulariser(torch.tensor([0.0, 1.0, 1.0]), beta) == 0
    assert rounding.regulariser(torch.full((7,), 0.5), beta) == pytest.approx(7.0)
    h = torch.tensor([0.1, 0.3, 0.8])
    assert rounding.regulariser(h, beta) == pytest.approx(float((1 - (2 * h - 1).abs() ** beta).sum()))
    alpha = torch.tensor([0.4, -0.4], requires_grad=True)
    rounding.regulariser(rounding.rectified_sigmoid(alpha), beta).backward()
    assert alpha.grad is not None and alpha.grad[0] < 0 < alpha.grad[1]  # a descent pushes both away from 1/2
