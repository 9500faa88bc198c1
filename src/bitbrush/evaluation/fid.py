"""Frechet distance between Gaussians fitted to features (Heusel et al. 2017), on CIFAR-10 features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bitbrush.errors import InputError, NumericsError
from bitbrush.evaluation.extractors import zoo_classifier
from bitbrush.evaluation.feature_sets import FeatureSet, Gaussian, fit
from bitbrush.evaluation.references import load_statistics
from bitbrush.evaluation.statistics import Estimate

Floats = NDArray[np.float64]
CLASSIFIER, STATISTICS = "cifar10-classifier.safetensors", "cifar10-stats.safetensors"


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of S sigma2 S with S = sigma1^(1/2): symmetric, so
    that no complex root and no added epsilon is needed.

    Args:
        mu1, mu2: Means [d].
        sigma1, sigma2: Covariances [d, d].

    Raises:
        NumericsError: A covariance is not positive semi-definite, or a number is not finite.
    """
    a, b = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    first, second = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if not all(np.isfinite(x).all() for x in (a, b, first, second)):
        raise NumericsError(
            "the features' mean or covariance is not finite",
            where="bitbrush.evaluation.fid",
            why="a picture or a network that holds NaN",
            try_="look at the pictures",
        )
    values, vectors = np.linalg.eigh((first + first.T) / 2)
    root = (vectors * np.sqrt(_not_negative(values))) @ vectors.T
    product = root @ second @ root
    cross = np.sqrt(_not_negative(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    return float(((a - b) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def cifar_fid(
    pictures: Tensor,
    evaluators_folder: Path | str,
    reference: str = "train",
    *,
    small: bool = False,
    device: str = "cpu",
    resamples: int = 20,
    seed: int = 0,
) -> Estimate:
    """FID of 32x32 pictures against the real CIFAR-10 pictures, in the 384 features of the zoo's classifier.

    Args:
        pictures: [n, 3, 32, 32] in [-1, 1]; rounded to 8 bits first.
        evaluators_folder: Holds ``cifar10-classifier.safetensors`` and ``cifar10-stats.safetensors``.
        reference: ``"train"`` (50,000 pictures) or ``"test"`` (10,000).
        small: Allow fewer pictures than a covariance of full rank needs.
        device: Where the classifier runs.
        resamples: Bootstrap samples. The interval is value +- 1.96 standard errors: percentiles would be too high,
            because a resample holds fewer different pictures and FID falls with their number.
        seed: Seed of the resampling.

    Raises:
        InputError: Too few pictures, another size, or an unknown reference.
        ArtifactError: An evaluator file cannot be read.
    """
    if reference not in ("train", "test"):
        raise InputError(
            f"there is no reference {reference!r}",
            where="bitbrush.evaluation.fid",
            why='the statistics file holds "train" and "test"',
            try_='pass reference="train"',
        )
    features = cifar_features(pictures, evaluators_folder, device=device)
    file = Path(evaluators_folder) / STATISTICS
    return fid_with_interval(features, file, reference, small=small, resamples=resamples, seed=seed)


def fid_with_interval(
    features: FeatureSet, statistics: Path, reference: str = "train", *, small: bool = False, resamples: int = 20,
    seed: int = 0,
) -> Estimate:  # fmt: skip
    """``cifar_fid`` of features that are there already, against a file of statistics."""
    count, width = features.pooled.shape
    if count <= width and not small:
        raise InputError(
            f"FID in {width} features needs at least {width + 1} pictures",
            where="bitbrush.evaluation.fid",
            why=f"{count} pictures are given, and their covariance has not full rank",
            try_="draw more pictures, or pass small=True and say so in the result",
        )
    real = load_statistics(statistics, reference).pooled
    rng = np.random.default_rng(seed)
    value = _distance(fit(features.pooled), real)
    samples = (features.pooled[rng.integers(count, size=count)] for _ in range(resamples))
    drawn = [_distance(fit(sample), real) for sample in samples]
    error = 1.96 * float(np.std(drawn, ddof=1)) if resamples > 1 else 0.0
    return Estimate(value, value - error, value + error)


def cifar_features(pictures: Tensor, evaluators_folder: Path | str, *, device: str = "cpu") -> FeatureSet:
    """Pooled features [n, 384] of pictures [n, 3, 32, 32] in [-1, 1], at least two, after rounding to 8 bits."""
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, 32, 32) or len(pictures) < 2:
        raise InputError(
            "the CIFAR-10 classifier needs at least two pictures of 32x32 pixels in three colours",
            where="bitbrush.evaluation.fid",
            why=f"the shape is {tuple(pictures.shape)}",
            try_="use FID in these features for CIFAR-10 models only",
        )
    return zoo_classifier(Path(evaluators_folder) / CLASSIFIER, device=device).extract(pictures, source="pictures")


def _distance(ours: Gaussian, theirs: Gaussian) -> float:
    return frechet_distance(ours.mu, ours.sigma, theirs.mu, theirs.sigma)


def _not_negative(values: Floats) -> Floats:
    """Eigenvalues of a positive semi-definite matrix: rounding below 0 becomes 0, anything else is an error."""
    if values.min() < -1e-4 * max(float(np.abs(values).max()), 1e-12):
        raise NumericsError(
            "a covariance is not positive semi-definite",
            where="bitbrush.evaluation.fid",
            why=f"its eigenvalues go from {values.min():.3g} to {values.max():.3g}",
            try_="check the statistics file",
        )
    return np.clip(values, 0.0, None)
