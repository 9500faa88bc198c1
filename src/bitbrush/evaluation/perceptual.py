"""LPIPS (Zhang et al. 2018) by torchmetrics' network, with weights from the user's cache or a given file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.optional import Unavailable, torchmetrics, torchvision
from bitbrush.evaluation.weights import Published, Weights, find

Net = Literal["alex", "vgg"]
MIN_SIDE = {"alex": 32, "vgg": 16}
BACKBONES = {
    "alex": Published("the AlexNet weights of LPIPS", "alexnet-owt-7be5be79.pth"),
    "vgg": Published("the VGG-16 weights of LPIPS", "vgg16-397923af.pth"),
}
ENTRIES = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights"}  # in torchvision.models


@dataclass(frozen=True)
class PerceptualDistance:
    """A learned distance of two pictures. Make it with ``lpips``.

    Args:
        name: ``LPIPS (alex)`` only with the published weights; else it says whose weights they are.
        standard: The weights are the published ones.
        network: Two batches float32 [n, 3, H, W] in [-1, 1] to [n, 1, 1, 1].
        min_side: The least height and width.
        device: Where it runs.
    """

    name: str
    standard: bool
    network: nn.Module
    min_side: int
    device: str = "cpu"

    def __call__(self, pictures: Tensor, reference: Tensor, *, batch: int = 32) -> Tensor:
        """Distance of each picture to its reference.

        Args:
            pictures: [n, 3, H, W] in [-1, 1].
            reference: The same shape.

        Returns:
            [n], 0 for equal pictures, float64, on the CPU.

        Raises:
            InputError: The shapes differ or are too small.
        """
        if pictures.shape != reference.shape or pictures.ndim != 4 or pictures.shape[1] != 3:
            why = f"their shapes are {tuple(pictures.shape)} and {tuple(reference.shape)}, wanted: [n, 3, H, W] twice"
            raise InputError(
                "two sets of pictures do not belong together", where=self.name, why=why,
                try_="draw both with the same prompts, seeds and size",
            )  # fmt: skip
        if min(pictures.shape[2:]) < self.min_side:
            raise InputError(
                f"the pictures are too small for {self.name}", where="bitbrush.evaluation.perceptual",
                why=f"{pictures.shape[3]}x{pictures.shape[2]} pixels, at least {self.min_side}x{self.min_side}",
                try_="use SSIM, or compare larger pictures",
            )  # fmt: skip
        parts = zip(pictures.split(batch), reference.split(batch), strict=True)
        with torch.no_grad():
            found = [self.network(self._ready(a), self._ready(b)).flatten().double().cpu() for a, b in parts]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def _ready(self, pictures: Tensor) -> Tensor:
        return pictures.to(self.device).float().clamp(-1, 1)


def lpips(net: Net = "alex", *, weights: Path | str | None = None, device: str = "cpu") -> PerceptualDistance:
    """LPIPS version 0.1 by torchmetrics, which brings its linear layers and opens them itself.

    Args:
        net: ``"alex"`` (what papers report) or ``"vgg"``.
        weights: A .safetensors file of the backbone in torchvision's names; the distance is then named after it.
            Without one, the published file in the cache of torch's hub, opened by torchvision.

    Raises:
        InputError: Another ``net``.
        Unavailable: torchmetrics, the weights, or, for the published ones, torchvision are not there. The message
            names the file and the place.
        ArtifactError: The file is not safetensors or holds other tensors.
    """
    if net not in BACKBONES:
        raise InputError(
            f"there is no LPIPS network {net!r}", where="bitbrush.evaluation.perceptual",
            why=f"known: {', '.join(BACKBONES)}", try_='use "alex"',
        )  # fmt: skip
    module = torchmetrics("functional.image.lpips")
    found = find(BACKBONES[net], weights)
    network = _published(module, net, found) if found.tensors is None else build(module, net, _backbone(net, found))
    other = f"learned distance, {net}, weights of {found.path.name} ({found.digest})"
    name = f"LPIPS ({net})" if found.published else other
    return PerceptualDistance(name, found.published, network.to(device), MIN_SIDE[net], device)


def build(module: Any, net: Net, backbone: nn.Sequential) -> Any:
    """torchmetrics' LPIPS network on ``backbone``, in evaluation mode, without gradients.

    torchmetrics asks torchvision for the layers of the backbone; here it is handed these instead, so that torchvision
    need not be installed. The linear layers are its own, and it loads them.
    """
    before = module._get_tv_model_features
    module._get_tv_model_features = lambda *args, **kwargs: backbone
    try:
        return module._NoTrainLpips(pretrained=True, net=net, pnet_rand=False)
    finally:
        module._get_tv_model_features = before


def _published(module: Any, net: Net, found: Weights) -> Any:
    """torchmetrics' network with torchvision's weights. torchvision looks into the cache under the name in its address.

    Raises:
        Unavailable: torchvision is not there, or would fetch another file than the one that was found.
        ArtifactError: The file does not hold the backbone.
    """
    instead = f"give the tensors of {found.path} as .safetensors, which serves without torchvision"
    models = torchvision("models", f"{found.path.name} is a pickle, which only torchvision's own code opens", instead)
    address = getattr(models, ENTRIES[net]).DEFAULT.url
    if address.rpartition("/")[2] != found.path.name:
        raise Unavailable(
            "torchvision has other weights for LPIPS", where=str(found.path),
            why=f"it would fetch {address}, and nothing is downloaded on its own", try_=instead,
        )  # fmt: skip
    try:
        return module._NoTrainLpips(pretrained=True, net=net, pnet_rand=False)
    except (RuntimeError, OSError) as error:
        raise _no_backbone(net, found, error) from error


def _backbone(net: Net, found: Weights) -> nn.Sequential:
    """The layers with the tensors of a file in torchvision's names (``features.3.weight``), all of them."""
    layers, prefix = LAYERS[net](), "features."
    tensors = {name.removeprefix(prefix): t for name, t in (found.tensors or {}).items() if name.startswith(prefix)}
    try:
        layers.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise _no_backbone(net, found, error) from error
    return layers


def _no_backbone(net: Net, found: Weights, error: Exception) -> ArtifactError:
    return ArtifactError(
        "the file does not hold the backbone of LPIPS", where=str(found.path), why=str(error).splitlines()[-1].strip(),
        try_=f"put torchvision's {BACKBONES[net].file} into {BACKBONES[net].cache.parent}, or give its tensors as "
        ".safetensors",
    )  # fmt: skip


def alexnet_layers() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014) in torchvision's order."""
    layers: list[nn.Module] = []
    shapes = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
    for place, (channels_in, channels_out, kernel, stride, padding) in enumerate(shapes):
        layers += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if place in (0, 1, 4) else []
    return nn.Sequential(*layers)


def vgg16_layers() -> nn.Sequential:
    """The convolutions of VGG-16 (Simonyan and Zisserman 2015) in torchvision's order."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


LAYERS: dict[str, Callable[[], nn.Sequential]] = {"alex": alexnet_layers, "vgg": vgg16_layers}
