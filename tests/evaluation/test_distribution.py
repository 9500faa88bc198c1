"""Distribution metrics: equal to torch-fidelity's own run on folders and to closed forms, honest about few pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitbrush.errors import InputError
from bitbrush.evaluation import frechet_distance
from bitbrush.evaluation.distribution import (
    METRICS,
    as_features,
    density_coverage,
    fid,
    floor,
    inception_score,
    kid,
    measure,
    precision_recall,
    sfid,
    warning,
)
from bitbrush.evaluation.extractors import Extractor, zoo_classifier
from bitbrush.evaluation.feature_sets import FeatureSet, Gaussian
from bitbrush.evaluation.optional import Unavailable, fidelity
from bitbrush.evaluation.references import PictureFolder, Statistics
from folders import noise_features, pictures, write_classifier, write_folder

NAME = "bitbrush-test-classifier"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    return zoo_classifier(write_classifier(tmp_path_factory.mktemp("zoo") / "cifar10-classifier.safetensors"))


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return write_folder(root / "a", pictures(40, seed=1)), write_folder(root / "b", pictures(50, seed=2, scale=0.6))


@pytest.fixture(scope="module")
def sets(extractor: Extractor, two_folders: tuple[Path, Path]) -> tuple[FeatureSet, FeatureSet]:
    opened = [PictureFolder.open(folder) for folder in two_folders]
    a, b = (extractor.extract(folder.batches(16), source=folder.source) for folder in opened)
    return a, b


@pytest.fixture(scope="module")
def theirs(extractor: Extractor, two_folders: tuple[Path, Path]) -> Iterator[dict[str, float]]:
    """torch-fidelity's ``calculate_metrics`` on the two folders, with the classifier as its custom extractor."""
    base = fidelity("feature_extractor_base").FeatureExtractorBase
    registry, utils, datasets = fidelity("registry"), fidelity("utils"), fidelity("datasets")

    class Classifier(base):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = extractor.run(levels.float() / 127.5 - 1)
            found = {"features": output.pooled, "logits": output.logits}
            return tuple(found[name] for name in self.features_list)

    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:  # the two functions that reading a folder takes of it
            transforms = SimpleNamespace(Compose=lambda steps: steps[-1])
            patch.setattr(utils, "torchvision", SimpleNamespace(transforms=transforms))
            patch.setattr(datasets, "F", SimpleNamespace(pil_to_tensor=_to_tensor))
        registry.register_feature_extractor(NAME, Classifier)
        a, b = map(str, two_folders)
        yield fidelity("metrics").calculate_metrics(
            input1=a, input2=b, feature_extractor=NAME, fid=True, kid=True, isc=True, prc=True, cuda=False,
            cache=False, verbose=False, batch_size=16, kid_subset_size=20, kid_subsets=30, isc_splits=4,
            save_cpu_ram=True,
        )  # fmt: skip
        registry.FEATURE_EXTRACTORS_REGISTRY.pop(NAME)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_equal_to_torch_fidelitys_own_run(theirs: dict[str, float], sets: tuple[FeatureSet, FeatureSet]) -> None:
    a, b = sets
    (distance,) = fid(a, b)
    (kernel,) = kid(a, b, subsets=30, subset_size=20)
    (score,) = inception_score(a, splits=4)
    precision, recall = precision_recall(a, b)
    assert distance.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kernel.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert kernel.spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert score.spread == pytest.approx(theirs["inception_score_std"], rel=1e-2)
    assert precision.value == pytest.approx(theirs["precision"]) and recall.value == pytest.approx(theirs["recall"])
    assert distance.value > 1e-3 and kernel.value > 1e-6 and score.value > 1.0001  # not equal because all is zero
    assert 0 < precision.value <= 1 and 0 < recall.value < 1


def test_fid_is_the_closed_form_of_the_other_code(sets: tuple[FeatureSet, FeatureSet]) -> None:
    a, b = sets
    for figure, spatial in ((fid(a, b)[0], False), (sfid(a, b)[0], True)):
        first, second = a.gaussian(spatial=spatial), b.gaussian(spatial=spatial)
        assert figure.value == pytest.approx(frechet_distance(first.mu, first.sigma, second.mu, second.sigma), rel=1e-4)
    assert sfid(a, b)[0].width == 448 and fid(a, b)[0].width == 384


def test_fid_of_gaussians_by_hand() -> None:
    """Diagonal covariances: |d mu|^2 + sum (sqrt a - sqrt b)^2."""
    stats = Statistics(Gaussian(np.array([1.0, 0.0]), np.diag([4.0, 9.0])), None, "by hand")
    drawn = as_features(noise_features(200_000, 2), extractor="identity", source="noise")
    assert fid(drawn, stats)[0].value == pytest.approx(1 + 1 + 4, rel=0.01)


def test_density_and_coverage_by_hand() -> None:
    """On a line: real 0, 1, 2, 10 with k = 1 have radii 1, 1, 1, 8; ties do not count as inside."""
    real = as_features(np.array([[0.0], [1.0], [2.0], [10.0]]), extractor="x", source="real")
    ours = as_features(np.array([[0.5], [1.5], [30.0], [-1.0]]), extractor="x", source="ours")
    density, coverage = density_coverage(ours, real, neighbours=1)
    # 0.5 lies in the balls of 0 and 1; 1.5 in those of 1 and 2; 10 reaches from 2 to 18: neither; -1 on the edge of 0's
    assert density.value == pytest.approx(4 / 4) and coverage.value == pytest.approx(3 / 4)


def test_density_and_coverage_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = as_features(noise_features(300), extractor="x", source="a")
    b = as_features(noise_features(200, seed=1), extractor="x", source="b")
    whole = [figure.value for figure in density_coverage(a, b)]
    monkeypatch.setattr("bitbrush.evaluation.distribution.CELLS", 7 * 300)
    assert [figure.value for figure in density_coverage(a, b)] == whole
    assert 0.7 < whole[0] < 1.3 and whole[1] > 0.9  # one distribution: both near 1


def test_far_sets_have_neither_precision_nor_coverage() -> None:
    a = as_features(noise_features(30, shift=50), extractor="x", source="a")
    b = as_features(noise_features(30), extractor="x", source="b")
    assert [figure.value for figure in measure("prdc", a, b)] == [0, 0, 0, 0]


def test_everything_stands_beside_a_figure(sets: tuple[FeatureSet, FeatureSet]) -> None:
    a, b = sets
    figure = kid(a, b)[0]
    assert (figure.count, figure.reference_count, figure.width) == (40, 50, 384)
    assert figure.settings == {"subsets": 100, "subset_size": 20, "seed": 2020}  # half of the pictures
    assert figure.warning is not None and "40 pictures are fewer than twice the 384 features" in figure.warning
    assert figure.label == "KID in features of: CIFAR-10 classifier of the zoo" and not figure.standard
    assert figure.to_json()["label"] == figure.label and "50 pictures of 32x32" in str(figure.reference)


def test_few_pictures_are_warned_of() -> None:
    assert warning("FID", 11, 6) is not None and warning("FID", 12, 6) is None
    a = as_features(noise_features(40), extractor="x", source="a")
    few = as_features(noise_features(8, seed=1), extractor="x", source="b")
    assert fid(a, a)[0].warning is None
    assert "8 pictures" in str(fid(a, few)[0].warning)  # too few on the other side counts too


def test_noise_floor(sets: tuple[FeatureSet, FeatureSet]) -> None:
    a, b = (as_features(noise_features(400, seed=seed), extractor="x", source=f"seed {seed}") for seed in (0, 1))
    worse = as_features(noise_features(400, seed=2, shift=0.5), extractor="x", source="worse")
    reference = as_features(noise_features(2000, seed=3), extractor="x", source="real")
    (between,) = floor("fid", a, b)
    assert 0 < between.value < 0.5 < measure("fid", worse, b)[0].value and len(between.figures) == 1
    (against,) = floor("fid", a, b, reference)
    assert against.value == pytest.approx(abs(fid(a, reference)[0].value - fid(b, reference)[0].value))
    assert [part.metric for part in floor("prdc", a, b)] == ["precision", "recall", "density", "coverage"]
    assert floor("is", sets[0], sets[0])[0].value == 0 and len(between.to_json()["figures"]) == 1
    with pytest.raises(InputError, match="equally many"):
        floor("fid", a, reference)


def test_unusable_input_is_refused(sets: tuple[FeatureSet, FeatureSet]) -> None:
    a, b = sets
    stats = Statistics(Gaussian(np.zeros(384), np.eye(384)), None, "stats.npz")
    x, y = (as_features(noise_features(9), extractor=name, source=name) for name in ("x", "y"))
    for metric in ("kid", "prdc"):
        with pytest.raises(InputError, match=r"stats\.npz"):
            measure(metric, a, stats)
    with pytest.raises(InputError, match="mu_s"):
        sfid(a, stats)
    with pytest.raises(InputError, match="another feature extractor"):
        fid(x, y)
    with pytest.raises(InputError, match="another feature extractor"):
        fid(x, stats)
    with pytest.raises(InputError, match="no logits"):
        inception_score(x)
    with pytest.raises(InputError, match="no spatial features"):
        sfid(x, x)
    with pytest.raises(InputError, match="pictures beyond: 0"):
        precision_recall(x, x, neighbours=9)
    with pytest.raises(InputError, match="pictures beyond a subset"):
        kid(x, x, subset_size=10)
    with pytest.raises(InputError, match="subset size"):
        kid(x, x, subset_size=1)
    with pytest.raises(InputError, match="pictures a split"):
        inception_score(a, splits=30)
    with pytest.raises(InputError, match="no distribution metric 'fdi'"):
        measure("fdi", a, b)
    with pytest.raises(InputError, match="needs a reference"):
        measure("fid", a)


def test_without_the_package_other_metrics_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_fidelity" else find_spec(name))
    a = replace(as_features(noise_features(9), extractor="x", source="a"), spatial=noise_features(9, 8))
    for metric in METRICS:
        with pytest.raises(Unavailable, match="torch-fidelity is not installed") as caught:
            measure(metric, a, a)
        assert "bitbrush[eval]" in str(caught.value)
    assert len(density_coverage(a, a)) == 2
