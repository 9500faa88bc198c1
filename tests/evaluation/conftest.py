"""Small pipelines shared by the tests of evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel

from bitbrush import assets
from bitbrush.evaluation import Comparison, EmojiClip, compare


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine more threads wait for each other, up to six times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emoji() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(assets.path("emoji-sd-tiny"), dtype=torch.float32)


@pytest.fixture(scope="session")
def evaluator() -> EmojiClip:
    return EmojiClip.load()


def _unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def ddpm() -> DDPMPipeline:
    return DDPMPipeline(unet=_unet(), scheduler=DDPMScheduler())


@pytest.fixture
def ddim() -> DDIMPipeline:
    return DDIMPipeline(unet=_unet(), scheduler=DDIMScheduler())


def _worse() -> DDIMPipeline:
    unet = _unet()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.02)
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())


@pytest.fixture
def worse() -> DDIMPipeline:
    """``ddim`` with slightly wrong weights."""
    return _worse()


@pytest.fixture(scope="session")
def result() -> Comparison:
    """``ddim`` against itself and against ``worse``, the latter given as a function."""
    ddim = DDIMPipeline(unet=_unet(), scheduler=DDIMScheduler())
    arms = {"same": ddim, "worse": _worse}
    return compare(ddim, arms, prompts=None, n=5, seeds=(0, 1), steps=3, batch=2, baseline="worse")


class Counter:
    """A progress display that counts."""

    def __init__(self) -> None:
        self.total, self.done, self.depth = 0, 0, 0

    def start(self, label: str, total: int) -> None:
        self.total, self.depth = total, self.depth + 1

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n

    def finish(self) -> None:
        self.depth -= 1

    def say(self, text: str) -> None: ...


@pytest.fixture
def counter() -> Counter:
    return Counter()
