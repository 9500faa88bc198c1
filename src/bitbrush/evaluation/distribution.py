"""FID, sFID, KID, Inception score, precision, recall, density, coverage: sets of features to figures.

FID, KID, the Inception score, precision and recall are torch-fidelity's functions on features; sFID is its FID on
spatial features. Density and coverage are in neither torch-fidelity 0.4 nor torchmetrics 1.9, so they are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.evaluation.feature_sets import ROWS, FeatureSet, Gaussian, Singles
from bitbrush.evaluation.optional import fidelity
from bitbrush.evaluation.references import Statistics

SEED = 2020  # torch-fidelity's own, so that its command line gives the same numbers
KID_SUBSET = 1000  # torch-fidelity's default
CELLS = 2**24  # distances held at a time: 64 MiB


@dataclass(frozen=True)
class Figure:
    """One number and all that has to stand beside it.

    Args:
        metric: ``"FID"``, ``"KID"``, ...
        value: The number.
        spread: Standard deviation over subsets (KID) or splits (Inception score); None for others.
        extractor: The network whose features were compared.
        standard: It is Inception with the published weights.
        width: Number of features compared.
        count: Number of pictures.
        reference: What they were compared with; None for the Inception score.
        reference_count: Their number, if known.
        warning: A sentence on too few pictures, or None.
        settings: Subset size, neighbours and the like.
    """

    metric: str
    value: float
    spread: float | None
    extractor: str
    standard: bool
    width: int
    count: int
    reference: str | None
    reference_count: int | None
    warning: str | None
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``FID`` for the published Inception weights, else ``FID in features of ...``."""
        return self.metric if self.standard else f"{self.metric} in features of: {self.extractor}"

    def to_json(self) -> dict[str, Any]:
        """All fields and the label."""
        return asdict(self) | {"label": self.label}


@dataclass(frozen=True)
class Floor:
    """What a figure shows when nothing was changed but the seed of the noise.

    Args:
        metric: As in ``Figure``.
        value: A candidate's figure within this distance of full precision's says nothing.
        meaning: How it was found, in words.
        figures: The figures it was found from.
    """

    metric: str
    value: float
    meaning: str
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"figures": [figure.to_json() for figure in self.figures]}


def fid(features: FeatureSet, reference: FeatureSet | Statistics, *, spatial: bool = False) -> tuple[Figure]:
    """Frechet distance of Gaussians (Heusel et al. 2017); with ``spatial`` the sFID of Nash et al. (2021).

    Raises:
        InputError: Features of different networks, or no spatial features.
        Unavailable: torch-fidelity is not there.
    """
    ours, theirs = features.gaussian(spatial=spatial), _gaussian(reference, spatial)
    _same_features(features, reference, len(ours.mu), len(theirs.mu))
    return (_figure("sFID" if spatial else "FID", frechet(ours, theirs), features, reference, width=len(ours.mu)),)


def frechet(first: Gaussian, second: Gaussian) -> float:
    """The Frechet distance of two Gaussians of one width by torch-fidelity.

    Raises:
        Unavailable: torch-fidelity is not there.
    """
    module = fidelity("metric_fid")
    return float(module.fid_statistics_to_metric(asdict(first), asdict(second), False)[module.KEY_METRIC_FID])


def kid(
    features: FeatureSet,
    reference: FeatureSet | Statistics,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = SEED,
) -> tuple[Figure]:
    """Kernel distance (Binkowski et al. 2018): mean over random subsets, and their standard deviation as spread.

    The kernel is (x.y / d + 1)^3. The estimate is unbiased for every size of the subsets.

    Args:
        subset_size: Pictures in a subset; without it 1,000, but at most half of the smaller set: subsets of nearly all
            pictures have nearly no spread.

    Raises:
        InputError: The reference is stored statistics, features of different networks, or unusable settings.
        Unavailable: torch-fidelity is not there.
    """
    module = fidelity("metric_kid")
    other = _pictures(reference, "KID")
    _same_features(features, other, features.pooled.shape[1], other.pooled.shape[1])
    fewest = min(features.count, other.count)
    size = min(KID_SUBSET, max(fewest // 2, 2)) if subset_size is None else subset_size
    _positive("KID", subsets=subsets, subset_size=size - 1, pictures_beyond_a_subset=fewest - size + 1)
    found = module.kid_features_to_metric(
        torch.from_numpy(features.pooled), torch.from_numpy(other.pooled),
        kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False,
    )  # fmt: skip
    settings = {"subsets": subsets, "subset_size": size, "seed": seed}
    spread = found[module.KEY_METRIC_KID_STD]
    return (_figure("KID", found[module.KEY_METRIC_KID_MEAN], features, other, spread=spread, settings=settings),)


def inception_score(features: FeatureSet, *, splits: int = 10, seed: int = SEED) -> tuple[Figure]:
    """exp of the mean divergence of p(class | picture) from p(class) (Salimans et al. 2016), mean over splits.

    Raises:
        InputError: The network has no logits, or there are fewer than two pictures a split.
        Unavailable: torch-fidelity is not there.
    """
    module = fidelity("metric_isc")
    if features.logits is None:
        raise InputError(
            "there is no Inception score of these features", where=features.source,
            why=f"{features.extractor} gives no logits", try_="leave it out, or take an extractor that gives them",
        )  # fmt: skip
    _positive("the Inception score", splits=splits, pictures_a_split=features.count // max(splits, 1) - 1)
    found = module.isc_features_to_metric(torch.from_numpy(features.logits), splits, True, seed)
    return (
        _figure(
            "Inception score", found[module.KEY_METRIC_ISC_MEAN], features, None,
            spread=found[module.KEY_METRIC_ISC_STD], settings={"splits": splits, "seed": seed},
        ),
    )  # fmt: skip


def precision_recall(
    features: FeatureSet, reference: FeatureSet | Statistics, *, neighbours: int = 3
) -> tuple[Figure, Figure]:
    """Precision and recall (Kynkaanniemi et al. 2019): the share of pictures inside the other set's k-nearest balls.

    Raises:
        InputError: The reference is stored statistics, features of different networks, or too few pictures.
        Unavailable: torch-fidelity is not there.
    """
    module = fidelity("metric_prc")
    other = _neighbourly(features, reference, neighbours, "precision and recall")
    found = module.prc_features_to_metric(
        torch.from_numpy(features.pooled), torch.from_numpy(other.pooled), prc_neighborhood=neighbours,
        prc_batch_size=_rows(max(features.count, other.count)), save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    settings = {"neighbours": neighbours}
    return (
        _figure("precision", found[module.KEY_METRIC_PRECISION], features, other, settings=settings),
        _figure("recall", found[module.KEY_METRIC_RECALL], features, other, settings=settings),
    )


def density_coverage(
    features: FeatureSet, reference: FeatureSet | Statistics, *, neighbours: int = 5
) -> tuple[Figure, Figure]:
    """Density and coverage (Naeem et al. 2020), with balls around the reference's pictures only.

    r_i is the distance of real picture i to its k-th nearest real one. Density is the number of balls that a generated
    picture lies in, over k, on average; coverage the share of balls with a generated picture in them.

    Raises:
        InputError: As for ``precision_recall``.
    """
    other = _neighbourly(features, reference, neighbours, "density and coverage")
    real, ours = torch.from_numpy(other.pooled), torch.from_numpy(features.pooled)
    inside, covered = 0, 0
    for rows in real.split(_rows(max(len(real), len(ours)))):
        radius = _distances(rows, real).kthvalue(neighbours + 1, dim=1).values  # the nearest is the picture itself
        hits = _distances(rows, ours) < radius[:, None]
        inside, covered = inside + int(hits.sum()), covered + int(hits.any(dim=1).sum())
    settings = {"neighbours": neighbours}
    return (
        _figure("density", inside / (neighbours * len(ours)), features, other, settings=settings),
        _figure("coverage", covered / len(real), features, other, settings=settings),
    )


def sfid(features: FeatureSet, reference: FeatureSet | Statistics) -> tuple[Figure]:
    """``fid`` of spatial features."""
    return fid(features, reference, spatial=True)


def prdc(features: FeatureSet, reference: FeatureSet | Statistics) -> tuple[Figure, ...]:
    """Precision, recall, density and coverage."""
    return precision_recall(features, reference) + density_coverage(features, reference)


METRICS: dict[str, Callable[..., tuple[Figure, ...]]] = {"fid": fid, "sfid": sfid, "kid": kid, "prdc": prdc}


def measure(
    metric: str, features: FeatureSet, reference: FeatureSet | Statistics | None = None, **settings: int
) -> tuple[Figure, ...]:
    """The figures of one metric by its short name: fid, sfid, kid, prdc (with a reference), is (without).

    Raises:
        InputError: An unknown name, no reference where one is needed, or as the metric's function says.
        Unavailable: A package is not there; other metrics go on.
    """
    if metric == "is":
        return inception_score(features, **settings)
    if metric not in METRICS or reference is None:
        raise InputError(
            f"{metric} needs a reference" if metric in METRICS else f"there is no distribution metric {metric!r}",
            where="bitbrush.evaluation.distribution",
            why=f"known: is, {', '.join(METRICS)}; all but is compare with a reference",
            try_="give a folder of pictures, stored statistics, or the full-precision pictures",
        )
    return METRICS[metric](features, reference, **settings)


def floor(
    metric: str,
    first: FeatureSet,
    second: FeatureSet,
    reference: FeatureSet | Statistics | None = None,
    **settings: int,
) -> tuple[Floor, ...]:
    """The noise floor of a metric from two full-precision runs that differ in the seed of the noise alone.

    Against a reference, and for the Inception score: by how much the two figures differ. Without one: the metric of
    one run against the other, which is what a candidate without any damage, drawn with other seeds, would show.

    Args:
        first, second: Features of the two runs, of equal count (FID depends on it).

    Raises:
        InputError: The counts differ, or as for ``measure``.
    """
    if first.count != second.count:
        raise InputError(
            "the two runs of a noise floor need equally many pictures", where=f"{first.source}; {second.source}",
            why=f"{first.count} and {second.count}: FID falls with their number", try_="draw equally many",
        )  # fmt: skip
    if reference is None and metric != "is":
        found = measure(metric, first, second, **settings)
        meaning = "full precision against full precision with other seeds"
        return tuple(Floor(figure.metric, figure.value, meaning, (figure,)) for figure in found)
    meaning = "difference of two full-precision runs with different seeds"
    pairs = zip(
        measure(metric, first, reference, **settings), measure(metric, second, reference, **settings), strict=True
    )
    return tuple(Floor(a.metric, abs(a.value - b.value), meaning, (a, b)) for a, b in pairs)


def warning(metric: str, count: int, width: int) -> str | None:
    """A sentence where there are fewer than twice as many pictures as features, else None."""
    if count >= 2 * width:
        return None
    harm = {"FID": "reads too high and depends on their number", "sFID": "reads too high and depends on their number"}
    return (
        f"{count:,} pictures are fewer than twice the {width:,} features: {metric} "
        f"{harm.get(metric, 'is uncertain')}; compare equal counts only, beside the noise floor."
    )


def _figure(
    metric: str,
    value: float,
    features: FeatureSet,
    reference: FeatureSet | Statistics | None,
    *,
    width: int | None = None,
    spread: float | None = None,
    settings: dict[str, int] | None = None,
) -> Figure:
    width = width or features.pooled.shape[1]
    other = reference.count if reference is not None else None
    fewest = min(features.count, other if other is not None else features.count)
    return Figure(
        metric, float(value), spread, features.extractor, features.standard, width, features.count,
        reference.source if reference is not None else None, other, warning(metric, fewest, width), settings or {},
    )  # fmt: skip


def _gaussian(reference: FeatureSet | Statistics, spatial: bool) -> Gaussian:
    if isinstance(reference, FeatureSet):
        return reference.gaussian(spatial=spatial)
    found = reference.spatial if spatial else reference.pooled
    if found is None:
        raise InputError(
            "the reference has no statistics of spatial features", where=reference.source,
            why="sFID needs mu_s and sigma_s", try_="leave sFID out, or give a folder of pictures",
        )  # fmt: skip
    return found


def _pictures(reference: FeatureSet | Statistics, metric: str) -> FeatureSet:
    if isinstance(reference, FeatureSet):
        return reference
    raise InputError(
        f"{metric} cannot be computed from stored statistics", where=reference.source,
        why="mean and covariance do not tell the features of single pictures",
        try_="give a folder of pictures, or leave it out",
    )  # fmt: skip


def _same_features(features: FeatureSet, reference: FeatureSet | Statistics, ours: int, theirs: int) -> None:
    if ours == theirs and reference.extractor in (None, features.extractor):
        return
    raise InputError(
        "the reference was made with another feature extractor", where=reference.source,
        why=f"{reference.extractor or 'it'} gives {theirs} features, {features.extractor} {ours}",
        try_="make both with one extractor",
    )  # fmt: skip


def _neighbourly(features: FeatureSet, reference: FeatureSet | Statistics, neighbours: int, metric: str) -> FeatureSet:
    other = _pictures(reference, metric)
    _same_features(features, other, features.pooled.shape[1], other.pooled.shape[1])
    _positive(metric, neighbours=neighbours, pictures_beyond=min(features.count, other.count) - neighbours)
    return other


def _positive(metric: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(
                f"{metric} cannot be computed with these settings",
                where="bitbrush.evaluation.distribution",
                why=f"{name.replace('_', ' ')}: {number}, at least 1 is needed",
                try_="give more pictures, or fewer subsets, splits or neighbours",
            )


def _rows(columns: int) -> int:
    return max(1, CELLS // max(columns, 1))


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances [r, n] by float64, since the matrix product inside loses half of the digits."""
    left = rows.double()
    return torch.cat([torch.cdist(left, part.double()).float() for part in others.split(ROWS)], dim=1)


def as_features(features: Singles, *, extractor: str, source: str, logits: Singles | None = None) -> FeatureSet:
    """Features that somebody else computed, [n, d], as a set; never ``standard``."""
    return FeatureSet(np.asarray(features, np.float32), logits, None, extractor, False, source)
