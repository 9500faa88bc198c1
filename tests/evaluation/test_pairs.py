"""PSNR and SSIM against hand-computed values and identities."""

from __future__ import annotations

import math

import pytest
import torch

from bitbrush.errors import InputError
from bitbrush.evaluation import psnr, ssim


def pictures(n: int = 2, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand() -> None:
    x = torch.zeros(3, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), d) for d in (0.2, 0.02, 2.0)])
    assert psnr(x, y).tolist() == pytest.approx([20.0, 40.0, 0.0], abs=1e-5)  # 10 log10(4 / d^2)


def test_psnr_is_capped() -> None:
    x = pictures()
    assert psnr(x, x).tolist() == [100.0, 100.0]
    assert psnr(x, x + 1e-9).tolist() == [100.0, 100.0]


def test_mean_of_decibels_is_not_the_decibels_of_the_mean() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    y[0], y[1] = 0.2, 0.02
    assert float(psnr(x, y).mean()) == pytest.approx(30.0, abs=1e-4)
    assert 10 * math.log10(4 / float((x - y).square().mean())) == pytest.approx(22.967, abs=1e-3)


def test_ssim_identities() -> None:
    x, y = pictures(), pictures(seed=1)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    assert torch.allclose(ssim(x, y), ssim(y, x))
    assert float(ssim(x, y).max()) < 0.2
    assert float(ssim(x, -x).max()) < 0


def test_ssim_of_constants_by_hand() -> None:
    """Without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2, on 0 to 1."""
    a, b, c1 = 0.75, 0.45, 0.0001
    found = ssim(torch.full((1, 3, 16, 16), 2 * a - 1), torch.full((1, 3, 16, 16), 2 * b - 1))
    assert float(found) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


def test_ssim_of_one_window_by_hand() -> None:
    """An 11x11 picture has one window; its weighted moments are written out here."""
    x, y = (pictures(1, 11, seed)[:, :1].double() / 2 + 0.5 for seed in (0, 1))
    g = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    w = torch.outer(g, g) / torch.outer(g, g).sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert float(ssim(2 * x - 1, 2 * y - 1)) == pytest.approx(float(expected), abs=1e-9)


def test_pictures_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="belong together"):
        psnr(pictures(2), pictures(3))
    with pytest.raises(InputError, match="smaller than the window"):
        ssim(pictures(size=10), pictures(size=10))
