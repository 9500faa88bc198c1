"""How far two sets of pictures are apart, picture by picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.errors import InputError

PEAK = 2.0  # pictures lie in [-1, 1]
CAP_DB = 100.0
WINDOW, SIGMA = 11, 1.5


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, 10 log10(peak^2 / MSE) with peak 2, at most 100 dB.

    Average these values for a set of pictures: the decibels of the mean error would read up to 3 dB lower.

    Args:
        pictures: [n, C, H, W] in [-1, 1].
        reference: The same shape.

    Returns:
        [n] in dB, float64.

    Raises:
        InputError: The shapes differ.
    """
    _check(pictures, reference)
    error = (pictures.double() - reference.double()).square().flatten(1).mean(dim=1)
    floor = PEAK**2 / 10 ** (CAP_DB / 10)
    return 10 * torch.log10(PEAK**2 / error.clamp_min(floor))


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03.

    Computed on intensities from 0 to 1, as it is defined: its luminance term is a ratio of means.
    Windows lie wholly inside the picture; the mean is over windows and channels.

    Args:
        pictures: [n, C, H, W] in [-1, 1], H and W at least 11.
        reference: The same shape.

    Returns:
        [n] in [-1, 1], float64.

    Raises:
        InputError: The shapes differ, or the pictures are smaller than the window.
    """
    _check(pictures, reference)
    if min(pictures.shape[-2:]) < WINDOW:
        raise InputError(
            "the pictures are smaller than the window of SSIM",
            where="bitbrush.evaluation.pairs.ssim",
            why=f"{pictures.shape[-2]}x{pictures.shape[-1]} pixels; the window has {WINDOW}x{WINDOW}",
            try_="compare larger pictures, or use PSNR",
        )
    return torch.cat([_ssim(x, y) for x, y in zip(pictures.split(32), reference.split(32), strict=True)])


def _ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    x, y = (pictures.double() + 1) / 2, (reference.double() + 1) / 2
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of every window of [n, C, H, W], as two one-dimensional passes."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-(offset**2) / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    rows = kernel.view(1, 1, WINDOW, 1).expand(channels, 1, WINDOW, 1)
    columns = kernel.view(1, 1, 1, WINDOW).expand(channels, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)


def _check(pictures: Tensor, reference: Tensor) -> None:
    if pictures.shape != reference.shape or pictures.ndim != 4:
        raise InputError(
            "two sets of pictures do not belong together",
            where="bitbrush.evaluation.pairs",
            why=f"their shapes are {tuple(pictures.shape)} and {tuple(reference.shape)}",
            try_="draw both with the same prompts, seeds and size",
        )
