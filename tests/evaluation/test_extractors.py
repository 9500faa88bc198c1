"""Feature extractors: the same in batches, from disk and from torch-fidelity's network; names that are true."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitbrush.errors import ArtifactError, InputError, NumericsError
from bitbrush.evaluation.extractors import INCEPTION, from_module, inception, zoo_classifier
from bitbrush.evaluation.feature_sets import INDEX, FeatureSet, fit
from bitbrush.evaluation.features import cifar_classifier
from bitbrush.evaluation.optional import Unavailable, fidelity
from bitbrush.evaluation.weights import Published, find, read
from folders import pictures, write_cached, write_classifier


class Means(nn.Module):
    """Features that are known: the mean of every colour; what came in is kept."""

    def __init__(self, *, whole: bool = False, batch_sizes: list[int] | None = None) -> None:
        super().__init__()
        self.whole, self.batch_sizes = whole, batch_sizes

    def forward(self, shown: Tensor) -> Tensor | dict[str, Tensor]:
        if self.batch_sizes is not None:
            self.batch_sizes.append(len(shown))
        features = shown.mean(dim=(2, 3))
        return (
            {"features": features, "logits": features * 3, "spatial": shown[:, :, :2, :2]} if self.whole else features
        )


def test_a_users_network() -> None:
    sizes: list[int] = []
    extractor = from_module(Means(batch_sizes=sizes), name="colour means", eight_bits=False, batch=4)
    shown = torch.rand(10, 3, 16, 16) * 2 - 1
    found = extractor.extract(shown, source="noise")
    assert np.allclose(found.pooled, shown.mean(dim=(2, 3)).numpy(), atol=1e-6) and found.pooled.dtype == np.float32
    assert (extractor.width, extractor.logits, extractor.spatial) == (3, 0, 0)
    assert sizes == [2, 4, 4, 2] and found.extractor == "colour means" and not found.standard
    whole = from_module(Means(whole=True), name="means and more")
    parts = whole.extract(iter(shown.split(3)), source="noise")
    assert (whole.width, whole.logits, whole.spatial) == (3, 3, 12)
    assert parts.logits is not None and parts.spatial is not None and parts.spatial.shape == (10, 12)


def test_rounding_to_8_bits_is_declared_and_done() -> None:
    shown = torch.full((2, 3, 8, 8), 0.001)
    rough, exact = (from_module(Means(), name="means", eight_bits=eight) for eight in (True, False))
    assert rough.extract(shown, source="x").pooled[0, 0] == pytest.approx(1 / 255, abs=1e-6)
    assert exact.extract(shown, source="x").pooled[0, 0] == pytest.approx(0.001, abs=1e-6)


def test_the_zoos_classifier(tmp_path: Path) -> None:
    file = write_classifier(tmp_path / "c.safetensors")
    extractor, network, shown = zoo_classifier(file, batch=5), cifar_classifier(file), pictures(12)
    found = extractor.extract(shown, source="x")
    assert np.allclose(found.pooled, network.features(shown).numpy(), atol=1e-5)
    assert found.logits is not None and np.allclose(found.logits, network(shown).numpy(), atol=1e-3)
    said = extractor.to_json()
    assert (said["width"], said["size"], said["resizing"], said["eight_bits"]) == (384, (32, 32), "none", True)
    assert found.spatial is not None and found.spatial.shape == (12, extractor.spatial)
    assert np.allclose(found.spatial, network.body[:6](network.stem(shown))[:, :7].flatten(1).numpy(), atol=1e-5)
    with pytest.raises(InputError, match="32x32"):
        extractor.extract(pictures(4, size=16), source="x")


def test_features_on_disk_are_the_same(tmp_path: Path) -> None:
    extractor = from_module(Means(whole=True), name="means", batch=4)
    shown, done = pictures(10), []
    held = extractor.extract(shown, source="x")
    mapped = extractor.extract(shown.split(3), source="x", count=10, folder=tmp_path / "f", advance=done.append)
    again = FeatureSet.open(tmp_path / "f")
    for other in (mapped, again):
        assert isinstance(other.pooled, np.memmap) and np.array_equal(other.pooled, held.pooled)
        assert other.logits is not None and np.array_equal(other.logits, held.logits)
        assert (other.extractor, other.source, other.standard, other.count) == ("means", "x", False, 10)
    assert sum(done) == 10 and not list((tmp_path / "f").glob(".*"))
    before = (tmp_path / "f" / "pooled.npy").read_bytes()
    again.pooled[0] = 7
    assert (tmp_path / "f" / "pooled.npy").read_bytes() == before


def test_unfinished_and_changed_folders_are_named(tmp_path: Path) -> None:
    extractor = from_module(Means(), name="means")
    with pytest.raises(InputError, match="9 said, 4 given"):
        extractor.extract([pictures(4)], source="x", count=9, folder=tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        FeatureSet.open(tmp_path)
    extractor.extract(pictures(4), source="x", folder=tmp_path)
    np.save(tmp_path / "pooled.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(ArtifactError, match=r"expected float32 \(4, 3\)"):
        FeatureSet.open(tmp_path)
    (tmp_path / INDEX).write_text("[1]")
    with pytest.raises(ArtifactError, match="cannot be read"):
        FeatureSet.open(tmp_path)
    with pytest.raises(InputError, match="count="):
        extractor.extract([pictures(4)], source="x", folder=tmp_path)


def test_gaussian_in_blocks_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features far from zero, where sums of squares would lose the variance."""
    features = (np.random.default_rng(0).normal(size=(53, 5)) + 1000).astype(np.float32)
    monkeypatch.setattr("bitbrush.evaluation.feature_sets.ROWS", 7)
    found = fit(features)
    assert np.allclose(found.mu, features.astype(np.float64).mean(0), rtol=1e-12)
    assert np.allclose(found.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


class Broken(nn.Module):
    def forward(self, shown: Tensor) -> Tensor:
        if len(shown) > 2:
            return shown.mean(dim=(2, 3)) * float("nan")
        return shown.mean(dim=(2, 3))


def test_networks_and_pictures_that_do_not_serve() -> None:
    with pytest.raises(InputError, match="no features"):
        from_module(nn.Identity(), name="identity")
    with pytest.raises(InputError, match="cannot be run"):
        from_module(nn.Linear(5, 5), name="linear")
    for name in ("", "  ", "my Inception"):
        with pytest.raises(InputError, match="name of its own"):
            from_module(Means(), name=name)
    with pytest.raises(NumericsError, match="not finite"):
        from_module(Broken(), name="broken").extract(pictures(5), source="x")
    with pytest.raises(InputError, match="changed its width"):
        from_module(nn.Flatten(), name="pixels").extract(pictures(5), source="x")
    with pytest.raises(InputError, match="at least two"):
        from_module(Means(), name="means").extract(pictures(1), source="x")
    with pytest.raises(InputError, match="at least two"):
        from_module(Means(), name="means").extract([], source="x")
    with pytest.raises(InputError, match="does not take"):
        from_module(Means(), name="means").extract(torch.zeros(4, 1, 8, 8), source="x")


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """torch-fidelity's network with random weights, and its tensors as a file."""
    module = fidelity("feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    file = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file(network.state_dict(), file)
    return network, file


def test_inception_with_random_weights_is_theirs_and_not_called_so(random_inception: tuple[nn.Module, Path]) -> None:
    network, file = random_inception
    extractor, shown = inception(file, batch=2), pictures(3, size=24)
    found = extractor.extract(shown, source="x")
    pooled, logits = network(((shown + 1) * 127.5).round().to(torch.uint8))
    assert np.allclose(found.pooled, pooled.numpy(), rtol=1e-4, atol=1e-6)
    assert found.logits is not None and np.allclose(found.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert found.pooled.shape[1] == 2048 and found.spatial is not None and found.spatial.shape == (3, 7 * 17 * 17)
    middle: list[Tensor] = []  # "mixed_6/conv" of the TensorFlow graph: block 6d, its branch of one convolution
    hook = network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda _m, _i, out: middle.append(out))
    network(((shown + 1) * 127.5).round().to(torch.uint8))
    hook.remove()
    assert middle[0].shape == (3, 192, 17, 17) and np.abs(found.spatial).max() > 0
    assert np.allclose(found.spatial, middle[0][:, :7].flatten(1).numpy(), rtol=1e-4, atol=1e-6)
    assert (
        not extractor.standard and "not the published ones" in extractor.name and "random.safetensors" in extractor.name
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when anything asks torch's hub for a file."""

    def refuse(address: str, *args: object, **kwargs: object) -> None:
        raise AssertionError(f"asked for {address}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(fidelity("feature_extractor_inceptionv3"), "load_state_dict_from_url", refuse)


@pytest.mark.usefixtures("offline")
def test_weights_come_from_the_cache(
    random_inception: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the file carries the digest of its bytes; torch-fidelity's constructor opens it."""
    network, _ = random_inception
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Unavailable, match="TORCH_HOME") as caught:
        inception()
    assert INCEPTION.file in str(caught.value) and str(tmp_path / "checkpoints") in str(caught.value)
    published = write_cached(tmp_path / "checkpoints", "inception", network.state_dict())
    monkeypatch.setattr("bitbrush.evaluation.extractors.INCEPTION", published)
    extractor, shown = inception(batch=2), pictures(2, size=24)
    pooled, _ = network(((shown + 1) * 127.5).round().to(torch.uint8))
    assert np.allclose(extractor.extract(shown, source="x").pooled, pooled.numpy(), rtol=1e-4, atol=1e-6)
    assert extractor.standard and "not the published" not in extractor.name


@pytest.mark.usefixtures("offline")
def test_other_bytes_in_the_cache_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / INCEPTION.file
    torch.save({"a": Runs(tmp_path / "ran")}, file)
    with pytest.raises(Unavailable, match="not the published ones") as caught:
        inception()
    assert str(file) in str(caught.value) and "6726825d" in str(caught.value) and not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()


def test_published_bytes_of_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = write_cached(tmp_path / "checkpoints", "inception", {"a": torch.ones(2)})
    monkeypatch.setattr("bitbrush.evaluation.extractors.INCEPTION", published)
    with pytest.raises(ArtifactError, match="does not hold this network") as caught:
        inception()
    assert published.file in str(caught.value)


def test_a_given_file_is_never_the_published_one(tmp_path: Path) -> None:
    """Whatever digest its name carries."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    found = find(Published("a", "a-00000000.pth"), tmp_path / "a.safetensors")
    named = find(Published("a", f"a-{found.digest}.pth"), tmp_path / "a.safetensors")
    assert not found.published and not named.published and named.tensors is not None and len(found.digest) == 8


class Runs:
    """Makes a folder when it is unpickled freely."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_weights(tmp_path: Path, random_inception: tuple[nn.Module, Path]) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="does not hold this network"):
        inception(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(random_inception[1].read_bytes()[:1000])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "pickle.safetensors")
    for name in ("cut.safetensors", "empty.safetensors", "pickle.safetensors"):
        with pytest.raises(ArtifactError, match="cannot be read") as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Unavailable, match=r"gone\.safetensors"):
        inception(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_a_given_pickle_is_refused_with_a_line_that_converts_it(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"mine{suffix}"
    torch.save({"a": Runs(tmp_path / "ran")}, file)
    with pytest.raises(ArtifactError, match=r"must be \.safetensors") as caught:
        inception(file)
    assert str(file) in str(caught.value) and INCEPTION.file in str(caught.value) and not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(2)}, file)
    line = str(caught.value.try_).splitlines()[0]
    code = line.removeprefix('python -c "').removesuffix('"')
    assert code != line
    exec(code, {})
    assert read(tmp_path / "mine.safetensors")["a"].tolist() == [1, 1]
