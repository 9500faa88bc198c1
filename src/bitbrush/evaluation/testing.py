"""Which tests an evaluation makes, and Holm's correction over all of them.

Candidate against candidate: each metric of single pictures, by flips. Candidate against full precision: CLIP score by
flips, features by swaps, with the same noise and with other seeds. PSNR, SSIM and LPIPS to full precision differ from
those of full precision itself by definition, so there is no test of them. Controls: full precision with other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from bitbrush.evaluation.feature_sets import FeatureSet
from bitbrush.evaluation.measuring import Measured
from bitbrush.evaluation.paired import ENUMERATED, difference, holm, sign_flip
from bitbrush.evaluation.result import OTHER_SEEDS, REFERENCE, PairedTest
from bitbrush.evaluation.statistics import paired_difference

FEATURES, FEATURES_OTHER = "features", "features_other_seeds"
SAMPLES = ("psnr", "ssim", "lpips", "clip")


@dataclass
class Compared:
    """What the tests compare.

    Args:
        measured: Arm to its numbers; the reference's, and ``OTHER_SEEDS`` where full precision was drawn again.
        features: Arm to features, where an extractor is there; else what ``measured`` embedded is compared.
        candidates: Names of the candidates.
        seeds: Pictures a prompt.
    """

    measured: Mapping[str, Measured]
    features: Mapping[str, FeatureSet]
    candidates: Sequence[str]
    seeds: int


def tests(compared: Compared) -> list[PairedTest]:
    """All tests, corrected. Fewer than two prompts allow none."""
    if len(next(iter(_table(compared.measured[REFERENCE])), [])) < 2:
        return []
    found = [
        test
        for first, second in combinations(compared.candidates, 2)
        for key in SAMPLES
        if (test := _flips(compared, key, first, second)) is not None
    ]
    control: list[PairedTest] = []
    for arm in compared.candidates:
        clip = _flips(compared, "clip", arm, REFERENCE)
        found += [clip] if clip is not None else []
        found += [_swaps(compared, FEATURES, arm, REFERENCE)]
        if OTHER_SEEDS in compared.measured:
            found += [_swaps(compared, FEATURES_OTHER, arm, OTHER_SEEDS)]
    if OTHER_SEEDS in compared.measured:
        clip = _flips(compared, "clip", OTHER_SEEDS, REFERENCE)
        control += [clip] if clip is not None else []
        control += [_swaps(compared, FEATURES, OTHER_SEEDS, REFERENCE)]
    return [*_corrected(found), *_corrected([_control(test) for test in control])]


def _flips(compared: Compared, key: str, first: str, second: str) -> PairedTest | None:
    ours, theirs = (compared.measured[arm].samples.get(key) for arm in (first, second))
    if ours is None or theirs is None:
        return None
    p = sign_flip(np.asarray(ours) - np.asarray(theirs))
    prompts = len(ours[0])
    detail = {"test": "sign flips over prompts", "exact": prompts <= ENUMERATED}
    return PairedTest(key, first, second, paired_difference(ours, theirs), p, p, prompts, detail)


def _swaps(compared: Compared, key: str, first: str, second: str) -> PairedTest:
    ours, theirs = (compared.features.get(arm) for arm in (first, second))
    if ours is not None and theirs is not None:
        found, name = difference(ours, theirs, seeds=compared.seeds), ours.extractor
    else:
        x, y = (compared.measured[arm] for arm in (first, second))
        if x.embedded is None or y.embedded is None:
            raise ValueError(f"no features of {first} and {second}")
        found, name = difference(x.embedded, y.embedded, seeds=compared.seeds), x.embedded_by
    noise = "other seeds" if OTHER_SEEDS in (first, second) else "the same noise"
    detail: dict[str, Any] = {"test": "swaps over prompts", "statistic": "energy distance as a share", "features": name,
                              "noise": noise, "exact": found.exact}
    return PairedTest(key, first, second, found.value, found.p, found.p, found.prompts, detail)


def _control(test: PairedTest) -> PairedTest:
    return replace(test, detail={**test.detail, "control": True})


def _corrected(found: list[PairedTest]) -> list[PairedTest]:
    adjusted = holm([test.p for test in found])
    return [replace(test, adjusted=p) for test, p in zip(found, adjusted, strict=True)]


def _table(measured: Measured) -> list[list[float]]:
    tables = list(measured.samples.values())
    if tables:
        return tables[0]
    return [] if measured.embedded is None else [[0.0] * len(measured.embedded)]
