"""Blocks of a DiT on codes: the same values as layer by layer, and the class's own way wherever something is asked."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import reading
from bitbrush import kernels
from bitbrush.kernels import blocks
from bitbrush.network import wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from fused_blocks import compared
from operations import Operations
from packed import fill, pack

pytestmark = pytest.mark.usefixtures("pretended")

LAYERS = 3
FUSED = {"layer_norm_encode": 2 * LAYERS, "int8_joined": LAYERS, "gelu_encode": LAYERS, "int8_encode_each": 3,
         "int8_stacked": 3}  # fmt: skip
"""Operations of one call of `network`: of each block, and the three layers that modulate all of them."""


def network(bits: int = 8, activation: str = "gelu-approximate", **options: Any) -> DiTTransformer2DModel:
    """A small DiT, packed with random codes; a row of scales a timestep."""
    torch.manual_seed(0)
    made = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=LAYERS, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, activation_fn=activation,
    ).eval().requires_grad_(False)  # fmt: skip
    pack(made, LayerSpec(weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)),
                         activation=ActivationSpec(timed=True), **options))  # fmt: skip
    return made


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep for all, as the pipeline expands it, and a class of each sample."""
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(2)).to(dtype)
    return x, torch.tensor([500]).expand(2), torch.tensor([3, 10])


def called(dit: nn.Module, *given: Any) -> tuple[Tensor, Counter[str]]:
    """Output and operations."""
    operations = Operations()
    with operations, torch.no_grad():
        out = dit(*given).sample
    return out, operations.count


@pytest.mark.parametrize("bits, activation, scaled", [(8, "gelu-approximate", False), (4, "gelu", True)])
def test_a_fused_block_gives_what_its_layers_give(bits: int, activation: str, scaled: bool) -> None:
    dit = network(bits, activation, input_scale=scaled)
    operations = Operations()
    found = list(compared(dit, inputs(), operations))
    assert len(found) == LAYERS and all(want.std() > 0.1 for _, want in found)
    assert all(operations.count[name] >= count for name, count in FUSED.items()), operations.count


def test_the_whole_network_is_few_operations_and_the_time_is_read_once() -> None:
    dit, given = network(), inputs()
    kernels.use(dit, "cuda-int8")
    out, count = called(dit, *given)
    assert {name: count[name] for name in FUSED} == FUSED
    alone = len([name for name in wrap.layers(dit) if "transformer_blocks" not in name])
    assert count["int8_product"] == 3 * LAYERS + alone + 2  # the last norm asks the first block's embedding again
    again, _ = called(dit, *given)
    assert torch.equal(out, again) and torch.equal(out, reading.alone(dit, "gpu_readers", *given))
    (shared,) = reading.readers(dit, "gpu_readers")
    assert shared.made is None  # every block has taken its part
    for time, labels in ((999, given[2]), (500, given[2].flip(0))):  # what was made for one is not served to another
        others = (given[0], torch.tensor([time]).expand(2), labels)
        other, _ = called(dit, *others)
        assert not torch.equal(out, other) and torch.equal(other, reading.alone(dit, "gpu_readers", *others))
    kernels.use(dit, "reference")
    want, count = called(dit, *given)
    assert not count["gelu_encode"] and float((out - want).std() / want.std()) < 0.05


def test_half_precision() -> None:
    dit = network().to(torch.bfloat16)
    kernels.use(dit, "reference")
    want, _ = called(dit, *inputs(torch.bfloat16))
    kernels.use(dit, "cuda-int8")
    out, count = called(dit, *inputs(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and count["gelu_encode"] == LAYERS
    assert float((out - want).float().std() / want.float().std()) < 0.1


def test_whatever_asks_for_more_gets_the_classes_own_way() -> None:
    dit = network()
    kernels.use(dit, "cuda-int8")
    block, seen = dit.transformer_blocks[1], []
    asked = 0
    for part in (block.norm1, block.norm1.norm, block.norm1.emb.time_proj, block.norm1.linear, block.attn1, block.norm3,
                 block.ff.net[0], block.attn1.to_q):  # fmt: skip
        hook = part.register_forward_hook(lambda *given: seen.append(given))
        _, count = called(dit, *inputs())
        hook.remove()
        # a layer of its own that is looked into is called; the block goes on around it
        inside = part is block.norm1.linear
        assert count["gelu_encode"] == LAYERS - (not inside) and len(seen) == (asked := asked + 1), part
    block.attn1.set_processor(AttnProcessor())
    assert called(dit, *inputs())[1]["gelu_encode"] == LAYERS - 1
    x, _, labels = inputs()
    _, count = called(dit, x, torch.tensor([500, 999]), labels)  # samples at different times
    assert not count["gelu_encode"]


def test_reasons_by_name() -> None:
    dit = network(activation="geglu")
    assert set(blocks.fuse(dit).values()) == {"a feed-forward layer with GEGLU"}
    dit = network()
    first, second, third = dit.transformer_blocks
    first.attn1.set_processor(AttnProcessor())
    second.norm3 = nn.RMSNorm(96)
    third.ff.net[2] = nn.Linear(384, 96)
    assert list(blocks.fuse(dit).values()) == [
        "attention by AttnProcessor", "a norm other than LayerNorm", "ff.net.2 is not a packed layer"]
    assert not blocks.fused(dit)


class Doubled(nn.Sequential):
    """An adapter in a layer's place."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out * 2


CHANGES: list[Callable[[Any], object]] = [
    lambda norm: fill(norm.emb.timestep_embedder.linear_1, torch.Generator().manual_seed(9)),
    lambda norm: norm.emb.timestep_embedder.linear_2.weight_scale.mul_(2),
    lambda norm: norm.emb.class_embedder.embedding_table.weight.mul_(3),
    lambda norm: norm.linear._apply(lambda tensor: tensor.clone()) and norm.linear.weight_scale.mul_(3),
    lambda norm: norm.emb.timestep_embedder.linear_2.register_forward_hook(lambda module, args, out: out * 2),
    lambda norm: setattr(norm.emb.timestep_embedder, "linear_1", Doubled(norm.emb.timestep_embedder.linear_1)),
    lambda norm: setattr(norm.emb.timestep_embedder, "act", nn.Identity()),
    lambda norm: setattr(norm, "linear", nn.Sequential(norm.linear)),
]


@torch.no_grad()
@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_a_change_of_one_block_is_followed(change: int) -> None:
    dit, given = network(), inputs()
    kernels.use(dit, "cuda-int8")
    before, _ = called(dit, *given)
    CHANGES[change](dit.transformer_blocks[1].norm1)
    after, _ = called(dit, *given)
    assert torch.equal(after, reading.alone(dit, "gpu_readers", *given))
    assert torch.equal(before, after) == (change == len(CHANGES) - 1)


@torch.no_grad()
def test_rows_of_all_blocks_are_stored_once_and_copies_have_their_own() -> None:
    def stored(model: nn.Module) -> int:
        held = {t.untyped_storage().data_ptr(): t for t in model.state_dict().values()}
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    dit, given = network(4), inputs()
    kernels.use(dit, "cuda-int8")
    size = stored(dit)
    want, _ = called(dit, *given)
    assert stored(dit) == size
    other = copy.deepcopy(dit)
    assert torch.equal(called(other, *given)[0], want)
    (mine,), (own,) = (reading.readers(model, "gpu_readers") for model in (dit, other))
    layers, inside = [layer for stage in (*own.before, own) for layer in stage.layers], set(other.modules())
    assert mine is not own and len(layers) == 3 * LAYERS and all(layer in inside for layer in layers)


def test_a_network_is_one_graph() -> None:
    dit, counter, frames = network(), CompileCounter(), []
    kernels.use(dit, "cuda-int8")
    torch._dynamo.reset()
    graph = torch.compile(dit, backend=counter, fullgraph=True)
    x, _, labels = inputs()
    with torch.no_grad():
        for time in (999, 500, 1):
            given = (x, torch.tensor([time]).expand(2), labels)
            assert torch.equal(graph(*given).sample, dit(*given).sample)
            frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # nothing is compiled again at another timestep
