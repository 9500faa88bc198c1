"""Layers that read one tensor, encoded at once and multiplied by size (here in plain torch): the numbers without, what
is kept, and whom it serves. The kernels: Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import reading
from bitbrush import kernels
from bitbrush.kernels import gpu_readers
from bitbrush.kernels.gpu_readers import Readers
from bitbrush.network import wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from interpreter import TRITON, interpreted
from packed import conditioned, pack

pytestmark = pytest.mark.usefixtures("pretended")


def network(bits: int = 8, timed: bool = True) -> UNet2DConditionModel:
    """Six transformer blocks and twelve resnets of two sizes, each layer with tables of its own."""
    unet = conditioned(2, 24, 8, linear=True)
    pack(unet, LayerSpec(weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)),
                         activation=ActivationSpec(timed=timed)))  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for layer in wrap.layers(unet).values():
        factor = torch.rand(layer.input.scale.shape, generator=generator) + 0.5
        layer.input.set_scale(layer.input.scale * factor, layer.input.zero_point)
    kernels.use(unet, "cuda-int8")
    return unet


def readers(model: nn.Module) -> list[Readers]:
    """Those of a network, each once."""
    return reading.readers(model, "gpu_readers")


def crossing(unet: Any) -> Any:
    """The block whose readers tests change."""
    return unet.down_blocks[0].attentions[0].transformer_blocks[0]


def inputs(time: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, prompt = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 24)))
    return x, torch.tensor(time), prompt


def alone(unet: nn.Module, *given: Any) -> Tensor:
    """The answer without anything that layers share."""
    return reading.alone(unet, "gpu_readers", *given)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("timed", [True, False])
def test_the_numbers_are_those_without(bits: int, timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, made, real = network(bits, timed), [], gpu_readers._stacked
    monkeypatch.setattr(gpu_readers, "_stacked",
                        lambda layers, each: (made.append(len(layers)), real(layers, each))[1])
    for time in (500, 1, 999, 500):
        got = unet(*inputs(time)).sample
        assert torch.equal(got, alone(unet, *inputs(time)))
        assert all(each.made is None for each in readers(unet))  # all parts were taken
    assert sorted(made) == [12, 12]  # found once: twelve resnets, two layers of each of six cross-attentions
    assert all(len(each.joined.products) == 2 for each in readers(unet))


@torch.no_grad()
def test_weights_that_are_unpacked_are_several_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a large network's are not in memory all at once; layers of a block stay together."""
    monkeypatch.setattr(gpu_readers, "UNPACKED", 2 * 2 * 24 * 64)
    unet, given = network(4), inputs()
    assert torch.equal(unet(*given).sample, alone(unet, *given))
    (shared,) = [each for each in readers(unet) if crossing(unet) in each.blocks]
    parts = [product.joined.parts for product in shared.joined.products]
    assert sum(parts) == 12 and len(parts) > 2 and all(part % 2 == 0 for part in parts)
    pair = crossing(unet).joined["keys and values of the context"]
    assert any(pair.codes.data_ptr() >= p.joined.codes.data_ptr() for p in shared.joined.products)
    assert {pair.codes.untyped_storage().data_ptr()} <= {
        p.joined.codes.untyped_storage().data_ptr() for p in shared.joined.products}  # stored once


def test_what_was_made_serves_its_tensor_at_its_time_alone() -> None:
    unet = network()
    block = crossing(unet)
    shared, clock = block.gpu_readers, block.attn2.to_k.input.clock
    layers, prompt = [block.attn2.to_k, block.attn2.to_v], inputs()[2]

    def taken(layer: Any, source: Tensor) -> Tensor:
        found = shared.take([layer], source, lambda: source)
        assert found is not None and torch.equal(found[0], layer(source))
        return found[0]

    with torch.no_grad():
        with clock.at(1.0):
            first = taken(layers[0], prompt)
            assert len(shared.made.parts) == 11
        with clock.at(999.0):  # a forward that was left in its middle
            second = taken(layers[1], prompt)
            assert len(shared.made.parts) == 11
            prompt.mul_(2)  # written to since
            assert not torch.equal(taken(layers[0], prompt), first) and len(shared.made.parts) == 11
            assert not torch.equal(taken(layers[1], prompt.clone()), second)
            assert shared.take([nn.Linear(2, 2)], prompt, lambda: prompt) is None
    assert shared.take(layers, prompt.requires_grad_(), lambda: prompt) is None


CHANGES: list[Callable[[Any], object]] = [
    lambda attn: attn.to_v.weight_scale.mul_(2),
    lambda attn: attn.to_v.input.set_scale(attn.to_v.input.scale * 2, attn.to_v.input.zero_point),
    lambda attn: attn.to_v._apply(lambda tensor: tensor.clone()) and attn.to_v.weight_scale.mul_(3),
    lambda attn: attn.to_v.codes8.view(torch.int8).neg_(),
    lambda attn: attn.to_k.register_forward_hook(lambda module, args, out: out * 2),
    lambda attn: setattr(attn.to_v.input, "enabled", False),
    lambda attn: setattr(attn.to_k, "kernel", "reference"),
    lambda attn: setattr(attn, "to_k", nn.Sequential(attn.to_k)),
]


@torch.no_grad()
@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_a_change_of_one_reader_is_followed(change: int) -> None:
    unet, given = network(), inputs()
    before = unet(*given).sample
    CHANGES[change](crossing(unet).attn2)
    got = unet(*given).sample
    assert torch.equal(got, alone(unet, *given))
    assert torch.equal(got, before) == (change >= 5)  # a rounding less is lost in the next one


@torch.no_grad()
def test_rows_are_stored_once_whoever_joins_them() -> None:
    unet = network()
    size = sum(held.untyped_storage().nbytes() for held in _storages(unet))
    unet(*inputs())
    assert sum(held.untyped_storage().nbytes() for held in _storages(unet)) == size
    held = {tensor.untyped_storage().data_ptr() for tensor in _storages(unet)}
    products = [product.joined for each in readers(unet) for product in each.joined.products]
    products += [pair for m in unet.modules() for pair in m.__dict__.get("joined", {}).values()]
    assert len(products) == 4 + 12 and all(p.codes.untyped_storage().data_ptr() in held for p in products)


def _storages(model: nn.Module) -> list[Tensor]:
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}.values())


@torch.no_grad()
def test_copies_have_readers_of_their_own() -> None:
    unet, given = network(), inputs()
    want = unet(*given).sample
    other = copy.deepcopy(unet)
    assert torch.equal(other(*given).sample, want)
    assert len(readers(other)) == 2 and not set(map(id, readers(other))) & set(map(id, readers(unet)))
    own = set(other.modules())
    assert all(layer in own for each in readers(other) for layer in (*each.layers, *each.blocks))
    kernels.use(unet, "reference")
    assert readers(unet) == []


def test_layers_of_other_tables_are_left_out() -> None:
    unet = network()
    blocks = [m for m in unet.modules() if m.__dict__.get("gpu_readers") is not None and hasattr(m, "attn2")]
    crossing(unet).attn2.to_v.input.set_scale(torch.ones(2, 1), torch.zeros(2, 1))  # rows are fewer
    kernels.use(unet, "cuda-int8")
    left = [m for m in blocks if m.__dict__.get("gpu_readers") is None]
    assert len(blocks) == 6 and left == [crossing(unet)]


# ---- kernels ---------------------------------------------------------------------------------------------------------
@TRITON
def test_kernels_give_what_the_definitions_give() -> None:
    found = interpreted("interpreted_readers.py")
    assert found["cases"] == 5 and found["codes"] > 4000 and found["outputs"] > 5000
    assert found["codes_unequal"] == found["outputs_unequal"] == 0


@TRITON
@pytest.mark.parametrize("fault", ["first-table", "stale"])
def test_a_planted_fault_shows(fault: str) -> None:
    found = interpreted("interpreted_readers.py", fault)
    assert found["codes_unequal"] > 100 and found["outputs_unequal"] > 100
