"""Blocks on codes: the same values as layer by layer, and the class's own way wherever something is asked of them."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bitbrush import kernels
from bitbrush.kernels import blocks, gpu, gpu_weights
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer, QuantLinear
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from fused_blocks import compared
from operations import Operations
from packed import conditioned, fill, pack

pytestmark = pytest.mark.usefixtures("pretended")

FUSED = {"group_norm_encode": 30, "layer_norm_encode": 18, "int8_joined": 6, "int8_gated": 6, "int8_encode_each": 2,
         "int8_stacked": 4}  # fmt: skip
"""Operations of one call of `network`: 12 residual blocks, 6 transformer blocks with projections around them, of two
sizes each; what reads the time embedding and what reads the prompt. One block makes pictures larger."""


def network(bits: int = 4, linear: bool = True, layers: int = 2, **options: Any) -> UNet2DConditionModel:
    """A small UNet with cross-attention, packed with random codes; a row of scales a timestep."""
    unet = conditioned(layers, 24, 8, linear=linear)
    spec = LayerSpec(
        weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)),
        activation=ActivationSpec(timed=True, **options.pop("activation", {})), **options,
    )
    pack(unet, spec)
    return unet


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep, the prompt's embedding."""
    generator = torch.Generator().manual_seed(2)
    x, prompt = (torch.randn(size, generator=generator).to(dtype) for size in ((batch, 4, 8, 8), (batch, 5, 24)))
    return x, torch.tensor(500), prompt


def called(unet: nn.Module, *given: Any, **more: Any) -> tuple[Tensor, Counter[str]]:
    """Output and operations."""
    operations = Operations()
    with operations:
        out = unet(*given, **more).sample
    return out, operations.count


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("other", [False, True])
def test_a_fused_block_gives_what_its_layers_give(bits: int, other: bool) -> None:
    unet = network(bits, linear=not other, input_scale=other)
    operations = Operations()
    assert len(list(compared(unet, inputs(), operations))) == 25
    assert all(operations.count[name] >= count for name, count in FUSED.items())


def test_blocks_take_bits_that_change_over_time() -> None:
    """Each row's largest code is its own, in every encode that a block joins with what stands before it."""
    unet = network(8, activation={"time_bits": (8, 7, 8)})
    for layer in wrap.layers(unet).values():  # zero-points of 7 bits lie in the middle of their codes, too
        zero = layer.input.zero_point.clone()
        zero[1] //= 2
        layer.input.set_scale(layer.input.scale, zero)
    clock, operations = next(iter(wrap.layers(unet).values())).input._clock[0], Operations()
    assert len(list(compared(unet, inputs(), operations))) == 25
    assert all(operations.count[name] >= count for name, count in FUSED.items())
    one = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    codes = {}
    for time in (1, 500):
        with clock.at(torch.tensor(time)), torch.no_grad():
            codes[time] = gpu.input_codes(one, torch.linspace(-40, 40, 320).reshape(1, 10, 32))
    assert int(codes[500].max()) == 127 and int(codes[1].max()) == 255


def test_a_norm_outside_of_blocks_keeps_its_pictures_in_order_and_its_name() -> None:
    unet = network(8)
    kernels.use(unet, "cuda-int8")
    norms = [m for m in unet.modules() if isinstance(m, blocks.FusedBlock) and isinstance(m, torch.nn.GroupNorm)]
    assert norms == [unet.conv_norm_out] and type(unet.conv_norm_out).__name__ == "GroupNorm"
    x = torch.randn(1, unet.conv_norm_out.num_channels, 4, 4)
    kept = unet.conv_norm_out(x)  # on a CPU it is torch's
    blocks.unfuse(unet)
    assert type(unet.conv_norm_out) is torch.nn.GroupNorm and torch.equal(unet.conv_norm_out(x), kept)


@torch.no_grad()
def test_the_whole_network_is_as_near_to_float_as_without() -> None:
    unet = network(8)
    reference, _ = called(unet, *inputs())
    kernels.use(unet, "cuda-int8")
    got, count = called(unet, *inputs())
    assert {name: count[name] for name in FUSED} == FUSED
    assert float((got - reference).norm() / reference.norm()) < 0.1
    kernels.use(unet, "reference")
    again, count = called(unet, *inputs())
    assert torch.equal(again, reference) and not blocks.fused(unet) and count["int8_gated"] == 0


@torch.no_grad()
@pytest.mark.parametrize("bits, at_once", [(8, 0), (4, 6), (3, 6)])
def test_a_block_unpacks_its_weights_at_once(bits: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(bits)
    kernels.use(unet, "cuda-int8")
    got, count = called(unet, *inputs())
    assert count["int8_weights"] == at_once
    monkeypatch.setattr(gpu_weights, "held", lambda found, like: {})
    want, alone = called(unet, *inputs())
    assert torch.equal(got, want) and alone["int8_weight"] - count["int8_weight"] == 6 * at_once


@torch.no_grad()
def test_weights_that_are_not_alike_or_too_many_are_unpacked_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(4)
    kernels.use(unet, "cuda-int8")
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    layers = [block.attn1.to_out[0], block.attn2.to_q, block.ff.net[2]]
    found = gpu_weights.together([block.joined["queries, keys and values"], *layers])
    assert found is not None and len(found.members) == 4 and (found.bits, found.halved) == (4, False)
    assert gpu_weights.held(found, torch.empty(0, device="meta")) == {}  # weights that lie elsewhere
    conv = unet.down_blocks[0].resnets[0].conv1
    assert gpu_weights.together([layers[0], conv]) is None and gpu_weights.together([]) is None
    layers[1].spec = layers[1].spec.model_copy(update={"weight": WeightSpec(grid=Grid(bits=3))})
    assert gpu_weights.together(layers).members == (layers[0], layers[2])
    monkeypatch.setattr(gpu_weights, "MOST", 100)
    assert gpu_weights.together(layers) is None


@torch.no_grad()
def test_half_precision_and_channels_last() -> None:
    unet = network(4).to(torch.bfloat16)
    reference, _ = called(unet, *inputs(dtype=torch.bfloat16))
    kernels.use(unet, "cuda-int8")
    x, time, prompt = inputs(dtype=torch.bfloat16)
    outputs = [called(unet, each, time, prompt)[0] for each in (x, x.to(memory_format=torch.channels_last))]
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    assert float((outputs[0] - outputs[1]).float().norm() / outputs[0].float().norm()) < 0.1
    assert float((outputs[0] - reference).float().norm() / reference.float().norm()) < 0.2


@torch.no_grad()
def test_whatever_asks_for_more_gets_the_classes_own_way() -> None:
    unet = network()
    kernels.use(unet, "cuda-int8")
    x, time, prompt = inputs()
    _, plain = called(unet, x, time, prompt)
    ran = 0
    _, count = called(unet, x, torch.tensor([500, 1]), prompt)  # samples at different times
    assert not any(count[name] for name in FUSED)
    mask = torch.ones(2, 5)
    _, count = called(unet, x, time, prompt, encoder_attention_mask=mask)
    assert count["int8_gated"] == 0 and count["group_norm_encode"] == FUSED["group_norm_encode"]
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    for part in (block.norm1, block.attn1, block.ff.net[0], block.attn2.to_k):
        seen: list[Any] = []
        hook = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        _, count = called(unet, x, time, prompt)
        hook.remove()
        assert seen and count["int8_gated"] == plain["int8_gated"] - 1
        ran += 1
    for part in (block.norm3, block.attn1.to_out[0]):  # as offloading does
        own, seen = part.forward, []
        part.forward = lambda *args, own=own, seen=seen: seen.append(1) or own(*args)
        _, count = called(unet, x, time, prompt)
        del part.forward
        assert seen and count["int8_gated"] == plain["int8_gated"] - 1
        ran += 1
    block.attn1.set_processor(AttnProcessor())
    _, count = called(unet, x, time, prompt)
    assert count["int8_gated"] == plain["int8_gated"] - 1
    layer = block.attn2.to_q
    layer.input.enabled = False
    _, count = called(unet, x, time, prompt)
    assert count["int8_gated"] == plain["int8_gated"] - 1 and ran == 6


def test_gradients_take_the_reference() -> None:
    unet = network()
    kernels.use(unet, "cuda-int8")
    x, time, prompt = inputs()
    out, count = called(unet, x.requires_grad_(), time, prompt)
    assert not any(count[name] for name in FUSED) and out.requires_grad


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": {"mode": "dynamic", "granularity": "token"}}, "scales that change"),
        ({"low_rank": 2}, "low-rank branch"),
        ({"rotation": "hadamard"}, "rotation"),
    ],
)
def test_reasons_by_name(options: dict[str, Any], reason: str) -> None:
    assert reason in (blocks.unfit_layer(_layer(options), "to_q") or "")
    assert "not a packed layer" in (blocks.unfit_layer(nn.Linear(2, 2), "to_q") or "")


def _layer(options: dict[str, Any]) -> QuantLayer:
    spec = LayerSpec(
        weight=WeightSpec(grid=Grid(bits=4)), activation=ActivationSpec(**options.pop("activation", {})), **options
    )
    layer = QuantLinear.wrap(nn.Linear(32, 32), spec, None, 1)
    layer.declare_packed()
    return layer


@torch.no_grad()
def test_joined_layers_share_their_bytes_wherever_they_are(tmp_path: Path) -> None:
    unet = network(8)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    size = sum(tensor.untyped_storage().nbytes() for tensor in _storages(unet))
    kernels.use(unet, "cuda-int8")
    for moved in (unet, copy.deepcopy(unet), unet.to(torch.bfloat16).to(torch.float32)):
        block = moved.down_blocks[0].attentions[0].transformer_blocks[0]
        whole = block.joined["queries, keys and values"].codes
        starts = [layer.codes8.data_ptr() for layer in (block.attn1.to_q, block.attn1.to_k)]
        assert whole.data_ptr() == starts[0] < starts[1] < whole.data_ptr() + whole.numel()
        assert sum(tensor.untyped_storage().nbytes() for tensor in _storages(moved)) == size
    after = unet.state_dict()
    assert after.keys() == before.keys() and len(before) > 500
    codes = [name for name in before if "codes" in name]
    assert len(codes) > 100 and all(torch.equal(after[name], before[name]) for name in codes)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("assign", [False, True])
def test_what_is_kept_of_weights_goes_when_others_are_loaded(bits: int, assign: bool) -> None:
    unet, other, given = network(bits), network(bits), inputs()
    for layer in wrap.layers(other).values():
        fill(layer, torch.Generator().manual_seed(layer.in_channels_))
    for each in (unet, other):
        kernels.use(each, "cuda-int8")
    before, _ = called(unet, *given)
    want, _ = called(other, *given)
    unet.load_state_dict(other.state_dict(), assign=assign)
    got, count = called(unet, *given)
    assert torch.equal(got, want) and not torch.equal(got, before)
    assert {name: count[name] for name in FUSED} == FUSED


@torch.no_grad()
def test_what_is_kept_follows_every_change() -> None:
    def changed(unet: UNet2DConditionModel, what: str) -> UNet2DConditionModel:
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        if what == "dtype":
            unet.to(torch.bfloat16)
        elif what == "scale":
            block.ff.net[2].input.set_scale(block.ff.net[2].input.scale * 2)
        elif what == "buffers":  # as offloading moves them, one by one
            for layer in wrap.layers(unet).values():
                for held in (layer._buffers, layer.input._buffers):
                    held.update({name: tensor.clone() for name, tensor in held.items() if "codes" not in name})
        elif what == "kernel":
            kernels.use(unet, "reference")
            kernels.use(unet, "cuda-int8")
        elif what == "copy":
            unet = copy.deepcopy(unet)
        return unet

    plain, _ = called(_used(), *inputs())
    for what in ("dtype", "scale", "buffers", "kernel", "copy"):
        given = inputs(dtype=torch.bfloat16 if what == "dtype" else torch.float32)
        unet = _used()
        called(unet, *inputs())
        called(unet, inputs()[0], torch.tensor(1), inputs()[2])  # another row of the tables
        got, count = called(changed(unet, what), *given)
        want, _ = called(changed(_used(), what), *given)
        assert torch.equal(got, want) and {name: count[name] for name in FUSED} == FUSED, what
        assert torch.equal(got, plain) == (what not in ("dtype", "scale"))


def _used() -> UNet2DConditionModel:
    unet = network(8)
    kernels.use(unet, "cuda-int8")
    return unet


@torch.no_grad()
def test_parts_that_are_put_in_later_are_seen() -> None:
    unet, given = _used(), inputs()
    _, plain = called(unet, *given)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    own = block.attn1.to_q
    block.attn1.to_q = nn.Linear(own.in_features, own.out_features, bias=False)  # as adapters are
    _, count = called(unet, *given)
    assert count["int8_gated"] == plain["int8_gated"] - 1
    block.attn1.to_q = own
    block.ff.net[0] = nn.Identity()  # without the projection that is looked for
    with pytest.raises(RuntimeError):  # the class's own way, where shapes do not fit
        called(unet, *given)
    layer = block.attn2.to_k
    before = gpu.facts(layer)
    assert gpu.facts(layer) is before
    layer.spec = layer.spec.model_copy(update={"weight": WeightSpec(grid=Grid(bits=4))})
    assert before.whole and not gpu.facts(layer).whole


def _storages(model: nn.Module) -> list[Tensor]:
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}.values())


def test_a_network_is_one_graph() -> None:
    unet, counter, frames = network(layers=1), CompileCounter(), []
    kernels.use(unet, "cuda-int8")
    torch._dynamo.reset()
    graph = torch.compile(unet, backend=counter, fullgraph=True)
    x, _, prompt = inputs()
    with torch.no_grad():
        for time in (999, 500, 1):
            given = (x, torch.tensor(time), prompt)
            assert torch.equal(graph(*given).sample, unet(*given).sample)
            frames.append(counter.frame_count)
    assert len(set(frames)) == 1  # nothing is compiled again at another timestep


@torch.no_grad()
def test_blocks_are_fewer_operations() -> None:
    unet = network()
    kernels.use(unet, "cuda-int8")
    called(unet, *inputs())  # joins what is joined at the first call
    _, fused = called(unet, *inputs())
    blocks.unfuse(unet)
    _, plain = called(unet, *inputs())
    assert plain.total() > 200 and fused.total() < 0.75 * plain.total(), (plain.total(), fused.total())


@torch.no_grad()
def test_larger_pictures_are_made_as_they_are_encoded() -> None:
    unet = network()
    kernels.use(unet, "cuda-int8")
    block, x = unet.up_blocks[0].upsamplers[0], torch.randn(2, unet.up_blocks[0].upsamplers[0].channels, 3, 5)
    clock = next(iter(wrap.layers(unet).values())).input._clock[0]
    for size, repeats in ((None, 0), ((6, 10), 0), ((7, 9), 1)):  # diffusers asks for a size where 2 does not divide it
        operations = Operations("aten")
        with operations, clock.at(torch.tensor(500)):
            got = block(x, size)
        with clock.at(torch.tensor(500)):
            want = block.plain_class.forward(block, x, size)
        assert operations.count["upsample_nearest2d.vec"] + operations.count["upsample_nearest2d"] == repeats
        assert torch.equal(got, want) and len(got.unique()) > 100


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_nothing_is_copied_around_transformer_blocks(linear: bool) -> None:
    """Pictures lie in the order of tokens: neither convolutions nor linear layers around the blocks need a copy, and
    both add the picture that came in as they write."""
    unet = network(linear=linear).to(memory_format=torch.channels_last)
    kernels.use(unet, "cuda-int8")
    clock, checked = next(iter(wrap.layers(unet).values())).input._clock[0], 0
    for block in (module for module in unet.modules() if isinstance(module, blocks.FusedBlock)):
        if block.plain_class is not Transformer2DModel:
            continue
        x = torch.randn(2, block.norm.num_channels, 8, 8).contiguous(memory_format=torch.channels_last)
        operations = Operations("aten")
        with operations, clock.at(torch.tensor(500)):
            out = block(x, encoder_hidden_states=inputs()[2]).sample
        seen = {name for name, count in operations.count.items() if count}
        assert out.is_contiguous(memory_format=torch.channels_last) and not seen & {"clone", "copy_", "add"}
        checked += 1
    assert checked == 6


def test_classes_keep_their_names_and_come_back() -> None:
    unet = network()
    kinds = [type(module) for module in unet.modules()]
    kernels.use(unet, "auto")
    named = [type(module).__name__ for module in unet.modules()]
    assert named == [kind.__name__ for kind in kinds] and len(blocks.fused(unet)) == 25
    assert all(isinstance(module, kind) for module, kind in itertools.zip_longest(unet.modules(), kinds))
    kernels.use(unet, "auto")  # twice is once
    assert len(blocks.fused(unet)) == 25
    kernels.use(unet, "reference")
    assert [type(module) for module in unet.modules()] == kinds
