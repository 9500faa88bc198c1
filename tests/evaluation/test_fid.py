"""The Frechet distance against its closed forms, and the evaluator network's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitbrush.errors import ArtifactError, InputError, NumericsError
from bitbrush.evaluation import cifar_fid, frechet_distance
from bitbrush.evaluation.eight_bits import round_to_8_bits
from bitbrush.evaluation.features import ResNet, cifar_classifier
from bitbrush.evaluation.fid import cifar_features


def test_equal_gaussians() -> None:
    a = np.random.default_rng(0).normal(size=(20, 8))
    sigma = np.cov(a, rowvar=False)
    assert frechet_distance(a.mean(0), sigma, a.mean(0), sigma) == pytest.approx(0, abs=1e-9)


def test_commuting_covariances_by_hand() -> None:
    """Diagonal covariances: |d mu|^2 + sum (sqrt a - sqrt b)^2."""
    a, b, mu = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0]), np.array([1.0, 0.0, -2.0])
    assert frechet_distance(mu, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(5 + 1 + 0 + 4)


def test_general_covariances_against_the_matrix_root() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    s1, s2 = (np.cov(rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12)), rowvar=False) for _ in range(2))
    expected = np.trace(s1 + s2 - 2 * scipy_linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(np.zeros(12), s1, np.zeros(12), s2) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances() -> None:
    s = np.zeros((4, 4))
    s[0, 0] = 4.0
    assert frechet_distance(np.zeros(4), s, np.zeros(4), np.zeros((4, 4))) == pytest.approx(4.0)


def test_bad_statistics_are_named() -> None:
    with pytest.raises(NumericsError, match="finite"):
        frechet_distance([np.nan], [[1.0]], [0.0], [[1.0]])
    with pytest.raises(NumericsError, match="semi-definite"):
        frechet_distance([0.0], [[-1.0]], [0.0], [[1.0]])


def test_rounding_to_8_bits() -> None:
    levels = torch.arange(256) / 127.5 - 1
    assert torch.allclose(round_to_8_bits(levels), levels)
    assert torch.allclose(round_to_8_bits(levels[1:-1] + 0.003), levels[1:-1])
    assert round_to_8_bits(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the zoo's, with random weights and the statistics of random pictures."""
    folder = tmp_path_factory.mktemp("evaluators")
    torch.manual_seed(0)
    save_file(ResNet(48, 1, 10).half().state_dict(), folder / "cifar10-classifier.safetensors")
    features = torch.from_numpy(cifar_features(noise(60), folder).pooled).double()
    mu, sigma = features.mean(0).float(), features.T.cov().float()
    stats = {f"{kind}.{name}": t.clone() for kind in ("train", "test") for name, t in (("mu", mu), ("sigma", sigma))}
    save_file(stats, folder / "cifar10-stats.safetensors")
    return folder


def noise(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_cifar_fid_of_the_reference_itself_is_zero(evaluators: Path) -> None:
    found = cifar_fid(noise(60), evaluators, small=True, resamples=2)
    assert found.value == pytest.approx(0, abs=1e-3) and found.low <= found.value <= found.high
    assert cifar_fid(noise(60) * 0.3, evaluators, "test", small=True, resamples=0).value > found.value


def test_cifar_fid_refuses(evaluators: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 385"):
        cifar_fid(noise(8), evaluators)
    with pytest.raises(InputError, match="no reference"):
        cifar_fid(noise(8), evaluators, "validation")
    with pytest.raises(InputError, match="32x32"):
        cifar_fid(torch.zeros(4, 3, 16, 16), evaluators)
    with pytest.raises(ArtifactError, match="cannot be read"):
        cifar_fid(noise(8), tmp_path)


def test_loading_is_strict(tmp_path: Path) -> None:
    state = ResNet(48, 1, 10).state_dict()
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ArtifactError, match="extra"):
        cifar_classifier(tmp_path / "more.safetensors")
    state.pop("head.bias")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ArtifactError, match=r"head\.bias"):
        cifar_classifier(tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "less.safetensors").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read"):
        cifar_classifier(tmp_path / "cut.safetensors")
