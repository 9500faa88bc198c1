"""The small ResNet behind both evaluators: the image tower of the emoji CLIP and the CIFAR-10 classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitbrush.errors import ArtifactError


class Block(nn.Module):
    """conv 3x3, batch norm, ReLU, conv 3x3, batch norm, plus shortcut, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.b1 = nn.BatchNorm2d(channels_out)
        self.c2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.b2 = nn.BatchNorm2d(channels_out)
        self.sc: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.sc = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[n, C_in, H, W] to [n, C_out, H / stride, W / stride]."""
        y = torch.relu(self.b1(self.c1(x)))
        return torch.relu(self.b2(self.c2(y)) + self.sc(x))


class ResNet(nn.Module):
    """A stem, eight blocks of widths w, 2w, 4w, 8w, mean over space, a linear head.

    Args:
        width: w of the first two blocks.
        stem_stride: Stride of the first convolution.
        outputs: Width of the head.
        logit_scale: Whether the file holds the (unused) scalar ``logit_scale`` of CLIP training.
    """

    def __init__(self, width: int, stem_stride: int, outputs: int, *, logit_scale: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width * 2 ** (i // 2) for i in range(8)]
        strides = [2 if i in (2, 4, 6) else 1 for i in range(8)]
        self.body = nn.Sequential(*(Block(widths[max(i - 1, 0)], widths[i], strides[i]) for i in range(8)))
        self.head = nn.Linear(widths[-1], outputs)
        if logit_scale:
            self.logit_scale = nn.Parameter(torch.zeros(()))

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] to pooled features [n, 8w]."""
        return self.body(self.stem(pictures)).mean(dim=(2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] to the head's outputs [n, outputs]."""
        return self.head(self.features(pictures))


def cifar_classifier(file: Path) -> ResNet:
    """The CIFAR-10 classifier whose 384 pooled features serve FID. Input 32x32."""
    return load_resnet(ResNet(48, 1, 10), file)


def clip_image_tower(file: Path) -> ResNet:
    """The image tower of the emoji CLIP, 256 outputs. Input 64x64."""
    return load_resnet(ResNet(32, 2, 256, logit_scale=True), file)


def load_resnet(network: ResNet, file: Path) -> ResNet:
    """Fills ``network`` from a safetensors file, every key exactly; float32, evaluation mode, no gradients.

    Raises:
        ArtifactError: The file is missing, is no safetensors file, or holds other tensors.
    """
    try:
        network.load_state_dict(read_tensors(file), strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            "the evaluator's file does not hold this network", where=str(file), why=str(error), try_="restore the file"
        ) from error
    return network.float().eval().requires_grad_(False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: The file is missing or is no safetensors file.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            "an evaluator's file cannot be read", where=str(file), why=str(error), try_="restore the file"
        ) from error
