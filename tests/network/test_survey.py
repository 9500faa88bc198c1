"""Surveys: execution order, boundaries of concatenated inputs, compute, blocks; other networks are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderTiny, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import tiny
from bitbrush.errors import InputError
from bitbrush.network.survey import Survey, example_inputs, survey


def xl_unet() -> UNet2DConditionModel:
    """The shape of SDXL: size and crop conditions ("text_time"), linear projections, transformers of several layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 6),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    ).eval()


def class_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=(8, 12),
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=5,
    ).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "text": tiny.text_unet,
    "plain": tiny.plain_unet,
    "xl": xl_unet,
    "class": class_unet,
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Survey]:
    model = MODELS[request.param]()
    return model, survey(model, tokens=5)


def test_every_layer_once(pair: tuple[nn.Module, Survey]) -> None:
    model, found = pair
    want = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = [site.name for site in found.layers()]
    assert set(names) == want and len(names) == len(want) >= 30
    parameters = sum(s.parameters for s in found.layers()) + sum(found.other.values())
    assert parameters == sum(p.numel() for p in model.parameters())
    assert [site.order for site in found.sites] == list(range(len(found.sites)))


def test_execution_order(pair: tuple[nn.Module, Survey]) -> None:
    """Against the order of a real forward, on real tensors."""
    model, found = pair
    seen: list[str] = []
    handles = [
        m.register_forward_hook(lambda _m, _a, _o, n=n: seen.append(n))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    args, kwargs = example_inputs(model, batch=1, tokens=5)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    assert [site.name for site in found.layers()] == seen
    at = {name: seen.index(next(n for n in seen if n.startswith(name))) for name in ("conv_in", "down", "mid", "up")}
    assert at["conv_in"] < at["down"] < at["mid"] < at["up"] < seen.index("conv_out") == len(seen) - 1
    registered = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert registered != seen  # what makes tracing necessary


def test_boundaries(pair: tuple[nn.Module, Survey]) -> None:
    """Deep features first, then the skip connection, on every shortcut of an up block and on nothing else."""
    model, found = pair
    skips: dict[str, int] = {}

    def watch(name: str, block: nn.Module) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
            states = kwargs.get("res_hidden_states_tuple", args[1] if len(args) > 1 else ())
            assert isinstance(states, tuple)
            for i, state in zip(range(len(block.resnets)), reversed(states), strict=False):  # type: ignore[arg-type]
                skips[f"{name}.resnets.{i}"] = state.shape[1]

        return hook

    handles = [
        b.register_forward_pre_hook(watch(f"up_blocks.{i}", b), with_kwargs=True) for i, b in enumerate(model.up_blocks)
    ]  # type: ignore[arg-type]
    args, kwargs = example_inputs(model, batch=1, tokens=5)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    ran = 0
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            site = next(s for s in found.layers() if s.name == f"{name}.conv_shortcut")
            want = (module.in_channels - skips[name], skips[name]) if name in skips else ()
            assert site.boundary == want and sum(want) in (0, site.shape[1])
            ran += 1
    assert {s.name for s in found.sites if s.boundary} == {f"{name}.conv_shortcut" for name in skips} and ran > len(
        skips
    )
    assert len(skips) >= 4


def test_macs_by_hand() -> None:
    found = {site.name: site for site in survey(tiny.text_unet(), tokens=24).layers()}
    half, full = 4 * 4, 8 * 8
    cases = {
        "conv_in": 4 * 16 * 9 * full,
        "conv_out": 16 * 4 * 9 * full,
        "time_embedding.linear_1": 16 * 64,
        "down_blocks.0.resnets.0.conv1": 16 * 16 * 9 * full,
        "down_blocks.0.resnets.0.time_emb_proj": 64 * 16,
        "down_blocks.0.downsamplers.0.conv": 16 * 16 * 9 * half,
        "down_blocks.1.resnets.0.conv_shortcut": 16 * 28 * half,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 16 * 16 * full,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 16 * 16 * 24,  # of the text, 24 tokens
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": 28 * 4 * 28 * half,
        "up_blocks.1.resnets.0.conv_shortcut": (28 + 16) * 16 * full,
    }
    for name, macs in cases.items():
        assert found[name].macs == macs, name
    assert len(cases) == 11


def test_blocks_partition_the_layers(pair: tuple[nn.Module, Survey]) -> None:
    model, found = pair
    members = [name for block in found.blocks.values() for name in block]
    assert sorted(members) == sorted(s.name for s in found.layers())
    order = {site.name: site.order for site in found.layers()}
    starts = [order[block[0]] for block in found.blocks.values()]
    assert starts == sorted(starts) and members == sorted(members, key=order.__getitem__)  # no block interrupts another
    kinds = {type(model.get_submodule(name)).__name__ for name in found.blocks}
    assert {"ResnetBlock2D", "Conv2d", "Linear"} <= kinds and kinds & {"BasicTransformerBlock", "Attention"}
    for name, block in found.blocks.items():
        assert all(member == name or member.startswith(f"{name}.") for member in block)
    assert [s.block in found.blocks for s in found.attentions()] == [True] * len(found.attentions())


def test_a_survey_takes_no_memory_and_changes_nothing() -> None:
    model = tiny.text_unet().to("meta")
    assert survey(model, tokens=5) == survey(tiny.text_unet(), tokens=5)
    real = tiny.text_unet()
    before = {k: v.clone() for k, v in real.state_dict().items()}
    survey(real)
    assert all(torch.equal(before[k], v) for k, v in real.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in real.modules())


def test_sample_values() -> None:
    assert survey(tiny.plain_unet()).sample_values == 2 * 3 * 64 + 1
    assert survey(tiny.text_unet(), tokens=24).sample_values == 2 * 4 * 64 + 1 + 24 * 16
    assert survey(xl_unet(), tokens=5).sample_values == 2 * 4 * 64 + 1 + 5 * 12 + 10 + 6


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        AutoencoderTiny(),
        DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=4, num_layers=1, sample_size=4, in_channels=2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_other_networks_are_refused(model: nn.Module) -> None:
    with pytest.raises(InputError) as caught:
        survey(model)
    assert type(model).__name__ in caught.value.what and "UNet2DModel" in (caught.value.why or "") and caught.value.try_


def test_unknown_condition_is_refused() -> None:
    model = tiny.text_unet()
    model.register_to_config(addition_embed_type="image")
    with pytest.raises(InputError, match="condition type 'image'"):
        survey(model)
