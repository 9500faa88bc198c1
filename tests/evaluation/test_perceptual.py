"""LPIPS plumbing, with random weights on both sides and never under that name; PSNR and SSIM equal torchmetrics'."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation import psnr, ssim
from bitbrush.evaluation.optional import Unavailable, torchmetrics
from bitbrush.evaluation.perceptual import BACKBONES, LAYERS, build, lpips
from bitbrush.evaluation.weights import read
from folders import pictures, write_cached


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AlexNet's and VGG's convolutions with random weights, in torchvision's names, with a classifier beside them."""
    folder, files = tmp_path_factory.mktemp("backbones"), {}
    for net, layers in LAYERS.items():
        torch.manual_seed(0)
        state = {f"features.{name}": tensor for name, tensor in layers().state_dict().items()}
        files[net] = folder / f"{net}.safetensors"
        save_file(state | {"classifier.6.bias": torch.zeros(10)}, files[net])
    return files


def by_hand(net: str, file: Path, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Zhang et al. 2018: unit-normalised features of every stage, squared differences, weighted, averaged, summed."""
    layers = LAYERS[net]().eval()
    layers.requires_grad_(False).load_state_dict(
        {name[9:]: t for name, t in read(file).items() if name.startswith("features.")}
    )
    folder = Path(torchmetrics("functional.image.lpips").__file__).parent / "lpips_models"
    heads = torch.load(folder / f"{net}.pth", map_location="cpu", weights_only=True)
    taps = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}[net]
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y, total = (a - shift) / scale, (b - shift) / scale, torch.zeros(len(a))
    for place, layer in enumerate(layers[:-1]):
        x, y = layer(x), layer(y)
        if place in taps:
            u, v = (z / (z.square().sum(1, keepdim=True) + 1e-8).sqrt() for z in (x, y))
            weights = heads[f"lin{taps.index(place)}.model.1.weight"].view(1, -1, 1, 1)
            total += (weights * (u - v).square()).sum(1).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_distance_is_the_papers_and_not_called_lpips(backbones: dict[str, Path], net: str) -> None:
    distance = lpips(net, weights=backbones[net])  # type: ignore[arg-type]
    a, b = pictures(3, size=48), pictures(3, seed=1, size=48)
    found = distance(a, b, batch=2)
    assert torch.allclose(found.float(), by_hand(net, backbones[net], a, b), rtol=1e-3, atol=1e-7)
    assert found.min() > 1e-5 and found.dtype == torch.float64 and distance(a, a).tolist() == [0, 0, 0]
    assert not distance.standard and "LPIPS" not in distance.name and f"{net}.safetensors" in distance.name


def test_equal_to_torchmetrics_class_with_the_same_weights(backbones: dict[str, Path]) -> None:
    """Their functional code, with a network that was filled with a whole state, not with backbone and heads."""
    module = torchmetrics("functional.image.lpips")
    ours, theirs = lpips("alex", weights=backbones["alex"]), build(module, "alex", LAYERS["alex"]())
    theirs.load_state_dict(ours.network.state_dict())
    a, b = pictures(2), pictures(2, seed=1)
    assert torch.allclose(module._lpips_update(a, b, theirs, False).double(), ours(a, b), rtol=1e-5)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's hub; the test fails when anything is downloaded."""

    def refuse(address: str, *args: object, **kwargs: object) -> None:
        raise AssertionError(f"asked for {address}")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "checkpoints"


def torchvision_with(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A torchvision that knows AlexNet with ``file``, in torchvision's own way: an address, and torch's hub."""

    class Features(nn.Module):
        def __init__(self, weights: Any) -> None:
            super().__init__()
            self.features = LAYERS["alex"]()
            state = torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True)
            self.load_state_dict({name: t for name, t in state.items() if name.startswith("features.")})

    root, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    entry = SimpleNamespace(url=f"https://example.invalid/models/{file}")
    for name, value in (("AlexNet_Weights", SimpleNamespace(DEFAULT=entry)), ("alexnet", Features)):
        setattr(models, name, value)
    root.models = models  # type: ignore[attr-defined]
    for module in (root, models):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torchmetrics("functional.image.lpips"), "_TORCHVISION_AVAILABLE", True)


def test_published_weights_come_from_the_cache(
    backbones: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchmetrics("functional.image.lpips")  # imported before torchvision is there: it is a stand-in's place
    published = write_cached(cache, "alexnet", read(backbones["alex"]))
    monkeypatch.setitem(BACKBONES, "alex", published)
    torchvision_with(monkeypatch, published.file)
    distance, given = lpips("alex"), lpips("alex", weights=backbones["alex"])
    a, b = pictures(2), pictures(2, seed=1)
    assert torch.equal(distance(a, b), given(a, b)) and distance(a, b).min() > 0
    assert distance.standard and distance.name == "LPIPS (alex)" and not given.standard


def test_another_file_of_torchvisions_is_not_fetched(
    backbones: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchmetrics("functional.image.lpips")
    monkeypatch.setitem(BACKBONES, "alex", write_cached(cache, "alexnet", read(backbones["alex"])))
    torchvision_with(monkeypatch, "alexnet-newer-00000000.pth")
    with pytest.raises(Unavailable, match="alexnet-newer-00000000"):
        lpips("alex")


def test_without_torchvision_a_safetensors_file_serves(
    backbones: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchmetrics("functional.image.lpips")
    published = write_cached(cache, "alexnet", read(backbones["alex"]))
    monkeypatch.setitem(BACKBONES, "alex", published)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchvision" else found(name))
    with pytest.raises(Unavailable, match=r"torchvision cannot be imported") as caught:
        lpips("alex")
    assert published.file in str(caught.value) and str(cache) in str(caught.value)
    assert ".safetensors, which serves without torchvision" in str(caught.value)
    assert lpips("alex", weights=backbones["alex"]).network is not None


def test_the_published_name_needs_the_published_bytes(backbones: dict[str, Path], cache: Path) -> None:
    with pytest.raises(Unavailable, match="TORCH_HOME") as caught:
        lpips("alex")
    assert BACKBONES["alex"].file in str(caught.value) and str(cache) in str(caught.value)
    cache.mkdir()
    torch.save(read(backbones["alex"]), cache / BACKBONES["alex"].file)
    with pytest.raises(Unavailable, match="not the published ones") as caught:
        lpips("alex")  # the file's name does not make it so
    assert "7be5be79" in str(caught.value) and str(cache / BACKBONES["alex"].file) in str(caught.value)


def test_files_and_pictures_that_do_not_serve(backbones: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not hold"):
        lpips("vgg", weights=backbones["alex"])
    torch.save(read(backbones["alex"]), tmp_path / "alex.pth")
    with pytest.raises(ArtifactError, match=r"must be \.safetensors"):
        lpips("alex", weights=tmp_path / "alex.pth")
    with pytest.raises(InputError, match="no LPIPS network"):
        lpips("squeeze")  # type: ignore[arg-type]
    distance = lpips("alex", weights=backbones["alex"])
    with pytest.raises(InputError, match="belong together"):
        distance(pictures(2), pictures(3))
    with pytest.raises(InputError, match="too small"):
        distance(pictures(2, size=16), pictures(2, size=16))
    assert distance(pictures(0 + 1)[:0], pictures(1)[:0]).tolist() == []


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="torchmetrics is not installed"):
        lpips("alex")


def test_a_broken_torchvision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> nn.Module:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(Unavailable, match="torchvision::nms") as caught:
        lpips("alex")
    assert "both builds must match" in str(caught.value)


def test_psnr_and_ssim_equal_torchmetrics() -> None:
    theirs = torchmetrics("functional.image")
    a = pictures(3, size=40)
    b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)
    dims = {"reduction": "none", "dim": (1, 2, 3)}
    their_psnr = theirs.peak_signal_noise_ratio(b.double(), a.double(), data_range=2.0, **dims)
    x, y = (b.double() + 1) / 2, (a.double() + 1) / 2
    _, full = theirs.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", return_full_image=True)
    inside = (
        full[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    )  # windows wholly inside, as in the paper; theirs reflects borders
    assert torch.allclose(psnr(b, a), their_psnr.double(), rtol=1e-4) and 10 < float(psnr(b, a).mean()) < 30
    assert torch.allclose(ssim(b, a), inside, rtol=1e-4) and 0.1 < float(ssim(b, a).mean()) < 0.95
