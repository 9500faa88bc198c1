"""Blocks around int8 layers on the CPU: the numbers that they give without, and the class's own way when asked more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bitbrush import kernels
from bitbrush.kernels import blocks, cpu_attention, cpu_blocks, cpu_onednn
from packed import attentions, inputs, network

pytestmark = pytest.mark.skipif(cpu_onednn.engine() == "absent", reason="torch has no onednn::qlinear_pointwise here")


@pytest.fixture(autouse=True)
def torch_attends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in the order of diffusers' own: another one could move a code."""
    if "attended" not in request.node.name:
        monkeypatch.setattr(cpu_attention, "FEW_KEYS", 0)


@pytest.mark.parametrize("keys", [77, 1, 128])
def test_attended_over_few_keys(keys: int) -> None:
    drawn = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, n, 4, 12, generator=drawn).transpose(1, 2) * 2 for n in (300, keys, keys))
    want = scaled_dot_product_attention(*(t.double() for t in (q, k, v)))
    got = cpu_attention.attended(q, k, v)
    assert got.shape == want.shape and (got - want).abs().max() < 2e-5
    torchs = scaled_dot_product_attention(q, k, v)
    assert keys == 1 or not torch.equal(got, torchs)  # of one key the softmax is 1
    for few in ((q[:, :, :1], k, v), [t.bfloat16() for t in (q, k, v)]):  # torch's own
        assert torch.equal(cpu_attention.attended(*few), scaled_dot_product_attention(*few))
    assert cpu_attention.attended(q[:0], k[:0], v[:0]).shape == (0, 4, 300, 12)


def test_attended_inside_a_network() -> None:
    """The prompt's five words are few."""
    unet = network()
    with torch.no_grad():
        got, want = both(unet, *inputs())
    assert (got - want).norm() < 0.02 * want.norm()


def both(unet: nn.Module, *given: Any, name: str = "cpu-int8", **more: Any) -> tuple[Tensor, Tensor]:
    """The answers of the blocks as `use` leaves them, and of diffusers' own."""
    kernels.use(unet, name)
    got = unet(*given, **more).sample
    blocks.unfuse(unet)
    return got, unet(*given, **more).sample


@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_without(bits: int, timed: bool, dtype: torch.dtype) -> None:
    unet = network(bits, timed, linear=timed).to(dtype)
    with torch.no_grad():
        got, want = both(unet, *inputs(dtype=dtype), name="auto" if bits == 3 else "cpu-int8")
    assert got.dtype == dtype and torch.equal(got, want)


def test_what_is_exchanged_and_given_back() -> None:
    unet = network()
    before = [type(module) for module in unet.modules()]
    kinds = cpu_attention.JoinedAttention, cpu_blocks.LeanResnet, cpu_blocks.LeanTransformer, cpu_blocks.LeanSpatial
    for name, passing in (("cpu-int8", 0), ("auto", 17)):
        kernels.use(unet, name)
        assert [sum(isinstance(module, kind) for module in unet.modules()) for kind in kinds] == [8, 8, 4, 4]
        assert len(blocks.fused(unet)) == passing  # those that a GPU would compute on codes
        assert [type(module).__name__ for module in unet.modules()] == [kind.__name__ for kind in before]
    kernels.use(unet, "reference")
    assert [type(module) for module in unet.modules()] == before


def test_layers_of_one_input_share_one_buffer_and_are_stored_as_before() -> None:
    unet = network()
    want = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kernels.use(unet, "cpu-int8")
    for attn in attentions(unet):
        layers = [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]
        assert len({layer.codes4.untyped_storage().data_ptr() for layer in layers}) == len(attn.joined) == 1
    assert all(torch.equal(tensor, want[name]) for name, tensor in unet.state_dict().items())
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        assert torch.equal(copied(*inputs()).sample, unet(*inputs()).sample)


def test_layers_with_tables_of_their_own_are_not_joined() -> None:
    unet = network()
    for attn in attentions(unet):
        attn.to_v.input.scale.mul_(2)
        attn.to_v.input.inverse_scale.mul_(0.5)
    with torch.no_grad():
        got, want = both(unet, *inputs())
    kernels.use(unet, "cpu-int8")
    assert torch.equal(got, want) and not any(attn.joined for attn in attentions(unet))


CHANGES: list[Callable[[Any], object]] = [
    lambda attn: attn.to_v.codes4.copy_(attn.to_v.codes4.flip(0)),
    lambda attn: attn.to_v.weight_scale.mul_(2),
    lambda attn: attn.to_v.input.set_scale(attn.to_v.input.scale * 2, attn.to_v.input.zero_point),
    lambda attn: attn.load_state_dict({name: tensor.flip(0) for name, tensor in attn.state_dict().items()}),
    lambda attn: attn.to_v._apply(lambda tensor: tensor.clone()) and attn.to_v.weight_scale.mul_(3),
    lambda attn: attn.to_k.register_forward_hook(lambda module, args, out: out * 2),
    lambda attn: attn.set_processor(AttnProcessor()),
    lambda attn: setattr(attn.to_v.input, "enabled", False),
    lambda attn: setattr(attn.to_k, "kernel", "reference"),
]


@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_an_attention_follows_what_is_done_to_its_parts(change: int) -> None:
    unet = network()
    kernels.use(unet, "cpu-int8")
    with torch.no_grad():
        before = unet(*inputs()).sample
        for attn in attentions(unet):
            CHANGES[change](attn)
        got = unet(*inputs()).sample
        blocks.unfuse(unet)
        want = unet(*inputs()).sample
    assert torch.equal(got, want)
    assert change in (6, 8) or not torch.equal(got, before)  # another way to the same numbers


def test_masks_gradients_and_times_that_differ_go_the_own_way() -> None:
    unet, (x, time, prompt) = network(), inputs()
    mask = torch.ones(2, 5)
    mask[:, 3:] = 0
    with torch.no_grad():
        for given, more in (((x, time, prompt), {"encoder_attention_mask": mask}),
                            ((x, torch.tensor([1, 999]), prompt), {})):  # fmt: skip
            got, want = both(unet, *given, **more)
            assert torch.equal(got, want)
    kernels.use(unet, "cpu-int8")
    wanted = x.clone().requires_grad_()
    unet(wanted, time, prompt).sample.sum().backward()
    assert wanted.grad is not None and bool(torch.isfinite(wanted.grad).all())


def test_a_given_tensor_is_never_written_to() -> None:
    unet, (x, time, prompt) = network(), inputs()
    kernels.use(unet, "cpu-int8")
    seen: list[tuple[Tensor, Tensor]] = []
    for module in unet.modules():
        if isinstance(module, cpu_blocks.InPlace | cpu_attention.JoinedAttention):
            module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].clone())))
    with torch.no_grad():
        unet(x, time, prompt)
    assert len(seen) == 24 and all(torch.equal(given, copied) for given, copied in seen)
