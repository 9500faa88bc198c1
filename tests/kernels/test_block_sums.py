"""Blocks on codes whose layers have several sums: segments, or groups of channels that lie anywhere."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.network import wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from fused_blocks import TIME, compared
from operations import Operations
from packed import conditioned, pack

pytestmark = pytest.mark.usefixtures("pretended")

SUMS = 3


def made(model: nn.Module, kind: str, bits: int) -> Any:
    """A model whose layers inside of blocks have segments or groups, packed with random codes."""

    def spec(name: str, layer: Any) -> LayerSpec:
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        inside = "block" in name and not any(part in name for part in ("time_emb_proj", "norm"))
        groups = SUMS if inside and kind == "groups" else 0
        parts = (channels - 17, 5, 12) if inside and kind == "segments" else ()
        return LayerSpec(
            weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)), segments=parts, input_scale=inside,
            activation=ActivationSpec(timed=True, groups=groups, granularity="channel_group" if groups else "tensor"),
        )

    pack(model, spec)
    return model


def unet(kind: str, bits: int) -> Any:
    """A small UNet, and what it is given."""
    g = torch.Generator().manual_seed(2)
    given = torch.randn((2, 4, 8, 8), generator=g), TIME, torch.randn((2, 5, 24), generator=g)
    return made(conditioned(1, 24, 8, linear=True), kind, bits), given


def dit(kind: str, bits: int) -> Any:
    """A small DiT, and what it is given."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, activation_fn="gelu-approximate",
    ).eval().requires_grad_(False)  # fmt: skip
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    return made(model, kind, bits), (x, TIME.expand(2), torch.tensor([3, 10]))


def counted(model: Any, given: tuple[Tensor, ...]) -> Counter[str]:
    """Operations of all blocks, which give what their layers give."""
    operations = Operations()
    assert all(len(want.unique()) > 100 for _, want in compared(model, given, operations))
    return operations.count


@pytest.mark.parametrize("kind, bits", [("segments", 8), ("segments", 4), ("groups", 8), ("groups", 4)])
def test_a_fused_block_gives_what_its_layers_give(kind: str, bits: int) -> None:
    count = counted(*unet(kind, bits))
    transformers = 5
    assert count["int8_gated"] == 0 and count["geglu_encode"] >= transformers
    assert count["layer_norm_encode"] >= 3 * transformers and count["int8_joined"] >= transformers
    assert (count["group_norm"] > 0) == (kind == "groups") and (count["group_norm_encode"] > 0) == (kind == "segments")


@pytest.mark.parametrize("kind, bits", [("segments", 4), ("groups", 8)])
def test_blocks_of_a_dit_do_so_too(kind: str, bits: int) -> None:
    count = counted(*dit(kind, bits))
    assert (count["layer_norm_encode"], count["gelu_encode"], count["int8_joined"]) == (4, 2, 2)


def test_layers_that_sum_other_channels_are_not_joined() -> None:
    model, given = dit("groups", 8)
    layer = model.transformer_blocks[0].attn1.to_k
    layer.input.set_groups(layer.input.group_of.roll(1))
    assert len(layer.input.group_sizes()) == SUMS
    count = counted(model, given)
    assert (count["layer_norm_encode"], count["int8_joined"]) == (4 + 2, 2 - 1)


def test_groups_that_are_loaded_are_seen() -> None:
    model, given = dit("groups", 4)
    other = copy.deepcopy(model)
    for layer in wrap.layers(other).values():
        if layer.input.group_of is not None:
            layer.input.set_groups(layer.input.group_of.roll(3))
    kernels.use(model, "cuda-int8")
    with torch.no_grad():
        before = model(*given).sample
        model.load_state_dict(other.state_dict())
        after = model(*given).sample
        kernels.use(other, "cuda-int8")
        assert torch.equal(after, other(*given).sample) and not torch.equal(after, before)
