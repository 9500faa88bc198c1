"""Folders of small pictures, the zoo's classifier with random weights, and a cache of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bitbrush.evaluation.features import ResNet
from bitbrush.evaluation.weights import Published


def pictures(n: int, *, seed: int = 0, size: int = 32, scale: float = 1.0) -> torch.Tensor:
    """Smooth coloured noise [n, 3, size, size] on 8-bit levels in [-1, 1]."""
    rough = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * scale
    smooth = torch.nn.functional.interpolate(rough, size=(size, size), mode="bilinear").clamp(-1, 1)
    return ((smooth + 1) * 127.5).round() / 127.5 - 1


def write_folder(folder: Path, shown: torch.Tensor) -> Path:
    """``shown`` as PNG files 0000.png, 0001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(shown):
        levels = ((picture.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(levels).save(folder / f"{i:04d}.png")
    return folder


def write_classifier(file: Path) -> Path:
    """The zoo's classifier with random weights and batch-norm statistics that are not those of a new layer."""
    torch.manual_seed(0)
    network = ResNet(48, 1, 10).train()
    with torch.no_grad():
        network(pictures(64, seed=9))
        network.head.weight.mul_(1000)  # so that classes differ
    save_file(network.eval().state_dict(), file)
    return file


def write_cached(folder: Path, name: str, state: dict[str, torch.Tensor]) -> Published:
    """``state`` as a file NAME-DIGEST.pth, as torch's hub would hold it if these were published weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "unnamed")
    digest = hashlib.sha256((folder / "unnamed").read_bytes()).hexdigest()[:8]
    (folder / "unnamed").rename(folder / f"{name}-{digest}.pth")
    return Published(f"the {name} weights", f"{name}-{digest}.pth")


def noise_features(n: int, width: int = 6, *, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, width)) + shift).astype(np.float32)
