"""Layers that read one tensor as one product on the CPU: the numbers without, what is kept, and whom it serves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reading
from bitbrush import kernels
from bitbrush.kernels import cpu_attention, cpu_onednn, cpu_plain
from bitbrush.kernels.cpu_readers import Readers
from packed import attentions, inputs, network

pytestmark = pytest.mark.skipif(cpu_onednn.engine() == "absent", reason="torch has no onednn::qlinear_pointwise here")


@pytest.fixture(autouse=True)
def torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in the order of diffusers' own: another one could move a code."""
    monkeypatch.setattr(cpu_attention, "FEW_KEYS", 0)


def readers(model: nn.Module) -> list[Readers]:
    """Those of a network, each once."""
    return reading.readers(model, "readers")


def alone(unet: nn.Module, *given: Any) -> Tensor:
    """The answer without anything that layers share."""
    return reading.alone(unet, "readers", *given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("timed", [True, False])
def test_the_numbers_are_those_without(bits: int, timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, products = network(bits, timed, alike=True), []
    kernels.use(unet, "cpu-int8")
    monkeypatch.setattr(cpu_plain, "product", lambda known, layer, x, real=cpu_plain.product: products.append(
        len(known.weight_scale)) or real(known, layer, x))
    x, _, prompt = inputs()
    sizes = sorted(len(each.layers) for each in readers(unet))
    assert sizes == [8, 8]  # two of each of four cross-attentions; eight resnets
    for time in (500, 20, 980):
        with torch.no_grad():
            products.clear()
            got = unet(x, torch.tensor(time), prompt).sample
        wide = [sum(layer.out_channels_ for layer in each.layers) for each in readers(unet)]
        assert all(products.count(n) == 1 for n in wide)
        assert torch.equal(got, alone(unet, x, torch.tensor(time), prompt))
        assert all(each.made is None for each in readers(unet))  # all parts were taken


def test_what_was_made_serves_its_tensor_alone() -> None:
    unet = network(alike=True, timed=False)
    kernels.use(unet, "cpu-int8")
    attn = attentions(unet)[1]
    shared: Readers = attn.readers
    _, _, prompt = inputs()
    with torch.no_grad():
        first = shared.take([attn.to_k], prompt, lambda: prompt)
        assert first is not None and torch.equal(first[0], attn.to_k(prompt)) and len(shared.made.parts) == 7
        prompt.mul_(2)  # written to since
        second = shared.take([attn.to_v], prompt, lambda: prompt)
        assert second is not None and torch.equal(second[0], attn.to_v(prompt)) and len(shared.made.parts) == 7
        other = [prompt.clone()]
        third = shared.take([attn.to_k], other[0], lambda: other[0])
        assert third is not None and torch.equal(third[0], attn.to_k(other[0]))
        again = shared.take([attn.to_k], other[0], lambda: other[0])  # taken before: made again
        assert again is not None and torch.equal(again[0], third[0])
    other.clear()
    assert shared.made.source() is None  # nothing holds the prompt


CHANGES: list[Callable[[Any], object]] = [
    lambda attn: attn.to_v.weight_scale.mul_(2),
    lambda attn: attn.to_v.input.set_scale(attn.to_v.input.scale * 2, attn.to_v.input.zero_point),
    lambda attn: attn.to_v._apply(lambda tensor: tensor.clone()) and attn.to_v.weight_scale.mul_(3),
    lambda attn: attn.to_k.register_forward_hook(lambda module, args, out: out * 2),
    lambda attn: setattr(attn.to_v.input, "enabled", False),
    lambda attn: setattr(attn.to_k, "kernel", "reference"),
    lambda attn: setattr(attn, "to_k", nn.Sequential(attn.to_k)),
]


@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_a_change_of_one_reader_is_followed(change: int) -> None:
    unet = network(alike=True)
    kernels.use(unet, "cpu-int8")
    x, time, prompt = inputs()
    with torch.no_grad():
        before = unet(x, time, prompt).sample
        CHANGES[change](attentions(unet)[1])
        got = unet(x, time, prompt).sample
    assert torch.equal(got, alone(unet, x, time, prompt)) and torch.equal(got, before) == (change in (5, 6))


def test_copies_have_readers_of_their_own() -> None:
    unet = network(alike=True)
    kernels.use(unet, "cpu-int8")
    given = inputs()
    with torch.no_grad():
        want = unet(*given).sample
        other = copy.deepcopy(unet)
        assert torch.equal(other(*given).sample, want)
    assert len(readers(other)) == 2 and not set(map(id, readers(other))) & set(map(id, readers(unet)))
    assert all(layer in set(other.modules()) for each in readers(other) for layer in each.layers)
    make, given = readers(unet)[0].__reduce__()
    assert make(*given).layers == readers(unet)[0].layers and make(*given).made is None
    kernels.use(unet, "reference")
    assert readers(unet) == []


def test_kept_bytes_count_what_is_shared_once() -> None:
    unet = network(alike=True)
    kernels.use(unet, "cpu-int8")
    before = cpu_plain.kept_bytes(unet)
    with torch.no_grad():
        unet(*inputs())
    made = cpu_plain.kept_bytes(unet) - before
    rows = sum(layer.out_channels_ for each in readers(unet) for layer in each.layers)
    assert 0 < made < 40 * rows
