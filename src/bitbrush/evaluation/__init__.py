"""Pictures to numbers: drawing by a fixed protocol, PSNR, SSIM, FID, the emoji CLIP, all with intervals."""

from __future__ import annotations

from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.compare import Comparison, compare
from bitbrush.evaluation.fid import cifar_fid, frechet_distance
from bitbrush.evaluation.pairs import psnr, ssim
from bitbrush.evaluation.sampling import draw, draw_with_trajectory, noise_generator, trajectory, with_ddim
from bitbrush.evaluation.statistics import Estimate, bootstrap_mean, paired_difference

__all__ = [
    "Comparison",
    "EmojiClip",
    "Estimate",
    "bootstrap_mean",
    "cifar_fid",
    "compare",
    "draw",
    "draw_with_trajectory",
    "frechet_distance",
    "noise_generator",
    "paired_difference",
    "psnr",
    "ssim",
    "trajectory",
    "with_ddim",
]
