"""Pictures to numbers: drawing by a fixed protocol, PSNR, SSIM, FID, the emoji CLIP, all with intervals."""

from __future__ import annotations

from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.compare import Comparison, compare
from bitbrush.evaluation.evaluate import evaluate
from bitbrush.evaluation.fid import cifar_fid, frechet_distance
from bitbrush.evaluation.paired import Difference, difference, holm, sign_flip
from bitbrush.evaluation.pairs import psnr, ssim
from bitbrush.evaluation.result import Evaluation
from bitbrush.evaluation.sampling import draw, draw_with_trajectory, noise_generator, trajectory, with_ddim
from bitbrush.evaluation.statistics import Estimate, bootstrap_mean, paired_difference

__all__ = [
    "Comparison",
    "Difference",
    "EmojiClip",
    "Estimate",
    "Evaluation",
    "bootstrap_mean",
    "cifar_fid",
    "compare",
    "difference",
    "draw",
    "draw_with_trajectory",
    "evaluate",
    "frechet_distance",
    "holm",
    "noise_generator",
    "paired_difference",
    "psnr",
    "sign_flip",
    "ssim",
    "trajectory",
    "with_ddim",
]
