"""Tiny pipelines with random weights, built from configs without any download, and quantized ones made from them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import bitbrush.assets
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.network.survey import Survey, example_inputs, survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import encode, expand_weight_scale, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec

Kind = Literal["text", "unconditional"]
TIMES = (1.0, 250.0, 500.0, 750.0, 999.0)
TOKENS = 24


def tokenizer() -> CLIPTokenizer:
    """The small tokenizer of emoji-sd-tiny (2050 tokens, 24 long)."""
    folder = Path(bitbrush.assets.__file__).parent / "emoji-sd-tiny" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder)


def text_unet(seed: int = 0) -> UNet2DConditionModel:
    """A text-conditional UNet of fewer than 200,000 parameters; its up blocks have shortcut convolutions."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 28),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    ).eval()


def plain_unet(seed: int = 0) -> UNet2DModel:
    """An unconditional UNet with attention, fewer than 200,000 parameters."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=8,
    ).eval()


def text_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline that draws 32 x 32 pictures of noise."""
    unet = text_unet(seed)
    config = CLIPTextConfig(
        vocab_size=2050, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=2048, eos_token_id=2049, pad_token_id=2049, projection_dim=16,
    )
    text_encoder = CLIPTextModel(config).eval()
    channels, blocks = (8, 8, 8), (1, 1, 1)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, num_encoder_blocks=blocks,
        num_decoder_blocks=blocks, upsampling_scaling_factor=2,
    ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )
    return _quiet(StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ))


def unconditional_pipeline(seed: int = 0) -> DDPMPipeline:
    """A DDPMPipeline that draws 8 x 8 pictures of noise."""
    return _quiet(DDPMPipeline(unet=plain_unet(seed), scheduler=DDPMScheduler(num_train_timesteps=1000)))


def pipeline(kind: Kind, seed: int = 0) -> Any:
    """The tiny pipeline of a kind, full precision."""
    return text_pipeline(seed) if kind == "text" else unconditional_pipeline(seed)


def inputs(model: nn.Module, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments of the denoiser's forward, without the timestep."""
    model = getattr(model, "_orig_mod", model)  # a compiled model hides the signature
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = example_inputs(model, batch=batch, tokens=TOKENS, generator=generator, dtype=dtype)
    return {"sample": args[0], **kwargs}


def run(model: nn.Module, timestep: float = 500, **changes: Any) -> Tensor:
    """The denoiser's output on seeded inputs, without gradients."""
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    with torch.no_grad():
        out = model(timestep=torch.tensor(timestep), **{**inputs(model, dtype=dtype), **changes}).sample
    assert isinstance(out, Tensor)
    return out


def plan_for(
    model: nn.Module, weights: int = 4, activations: int = 8, *, timed: bool = True, dynamic: bool = False,
    mixed: bool = False, split: bool = True, attention: bool = False,
) -> Plan:
    """Every layer quantized; optionally timed or dynamic activations, mixed bits by row, attention operands."""
    found: Survey = survey(model, tokens=TOKENS)
    layers = {}
    for site in found.layers():
        edge = site.name in ("conv_in", "conv_out")
        rows = tuple((3, weights, 8)[i % 3] for i in range(site.shape[0])) if mixed and not edge else ()
        mode: Literal["static", "dynamic"] = "dynamic" if dynamic else "static"
        activation = ActivationSpec(grid=Grid(bits=activations), mode=mode, timed=timed and not dynamic)
        weight = WeightSpec(grid=Grid(bits=8 if edge else weights), row_bits=rows)
        layers[site.name] = LayerSpec(
            weight=weight, activation=activation, segments=site.boundary if split and len(site.boundary) > 1 else ()
        )
    if attention:
        operand = LayerSpec(activation=ActivationSpec(grid=Grid(bits=8), timed=timed))
        layers.update({f"{site.name}:{name}": operand for site in found.attentions() for name in ("q", "softmax")})
    return Plan(layers=layers, timesteps=TIMES if timed and not dynamic else ())


def quantized_model(model: Any, plan: Plan, *, pack: bool = True) -> Any:
    """Wrap a float model, fit min-max scales, store the codes, and pack (or show the sim face)."""
    wrap.wrap(model, plan)
    _fit_activations(model, plan)
    for layer in wrap.layers(model).values():
        fit_weight(layer)
    wrap.set_face(model, "sim")
    if pack:
        for layer in wrap.layers(model).values():
            layer.pack()
        wrap.set_face(model, "packed")
    return model


def quantized_pipeline(kind: Kind = "text", bits: int = 4, *, seed: int = 0, pack: bool = True, **choices: Any) -> Any:
    """(pipeline with a packed denoiser, plan); ``choices`` go to `plan_for`."""
    pipe = pipeline(kind, seed)
    plan = plan_for(pipe.unet, bits, **choices)
    quantized_model(pipe.unet, plan, pack=pack)
    return pipe, plan


def fit_weight(layer: QuantLayer) -> None:
    """Min-max scales for each row and segment, rounding to nearest."""
    spec = layer.spec.weight
    if spec is None:
        return
    weight = layer.weight.detach().float()
    bits = torch.tensor(spec.row_bits or (spec.grid.bits,) * len(weight))
    scale, zero = torch.ones(len(weight), len(layer.segments)), torch.zeros(len(weight), len(layer.segments))
    for i, part in enumerate(weight.split(list(layer.segments), dim=1)):
        for width in bits.unique().tolist():
            rows = bits == width
            scale[rows, i], zero[rows, i] = ranges.search(part[rows].flatten(1), Grid(bits=width), method="minmax")
    wide, wide_zero = (expand_weight_scale(t, layer.segments, weight.ndim) for t in (scale, zero))
    layer.set_weight(encode(weight, reciprocal(wide), wide_zero, layer.top()), scale, zero)


def packed_pair(
    kind: str, spec: LayerSpec, fill: Callable[[ActivationQuantizer], None], module: nn.Module | None = None
) -> tuple[Clock, Any, Any]:
    """(clock, a layer of 24 input channels in sim face, its packed copy); ``fill`` sets the scales."""
    clock, g = Clock(TIMES), torch.Generator().manual_seed(4)
    module = module or (nn.Linear(24, 9) if kind == "linear" else nn.Conv2d(24, 9, 3, padding=1))
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
        p.requires_grad_(False)
    wrapper: Any = QuantLinear if kind == "linear" else QuantConv2d
    layer = wrapper.wrap(module, spec, clock, len(TIMES))
    fit_weight(layer)
    fill(layer.input)
    layer.face = "sim"
    packed = copy.deepcopy(layer)
    packed.pack()
    packed.input._clock = layer.input._clock
    return clock, layer, packed


def timed_with(plan: Plan, every: int = 1, **choices: Any) -> Plan:
    """The plan with these choices in every ``every``-th entry, where its activation is timed."""
    layers = {}
    for i, (name, spec) in enumerate(plan.layers.items()):
        activation = spec.activation
        if activation is not None and activation.timed and i % every == 0:
            activation = activation.model_copy(update=choices)
        layers[name] = spec.model_copy(update={"activation": activation})
    return plan.model_copy(update={"layers": layers})


def packed_network(pipe: Any, plan: Plan, fill: Callable[[ActivationQuantizer, int], None]) -> dict[float, Tensor]:
    """Wraps and packs the denoiser; ``fill`` sets scales by quantizer and number. The simulated answer a timestep."""
    wrap.wrap(pipe.unet, plan)
    for i, quantizer in enumerate(m for m in pipe.unet.modules() if isinstance(m, ActivationQuantizer)):
        fill(quantizer, i)
    for layer in wrap.layers(pipe.unet).values():
        fit_weight(layer)
    wrap.set_face(pipe.unet, "sim")
    simulated = {t: run(pipe.unet, t) for t in TIMES}
    for layer in wrap.layers(pipe.unet).values():
        layer.pack()
    wrap.set_face(pipe.unet, "packed")
    return simulated


def _fit_activations(model: nn.Module, plan: Plan) -> None:
    """Static scales from min and max of seeded inputs at the plan's timesteps (attention operands: a fixed range)."""
    from bitbrush.network.activation import ActivationQuantizer

    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, layer: QuantLayer) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            parts = args[0].split(list(layer.segments), dim=layer.channel_dim)
            seen[name].append(torch.stack([torch.stack([part.amin(), part.amax()]) for part in parts]))

        return hook

    found = wrap.layers(model)
    handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in found.items()]
    for i, time in enumerate(plan.timesteps or (500.0,)):
        run(model, time, sample=inputs(model, seed=i)["sample"])
    for handle in handles:
        handle.remove()
    inside = {id(layer.input) for layer in found.values()}
    for name, layer in found.items():
        if layer.input is not None and layer.input.spec.mode == "static":
            table = torch.stack(seen[name]) if layer.input.spec.timed else torch.stack(seen[name]).mean(0)[None]
            _set(layer.input, table)
    others: Iterable[nn.Module] = (m for m in model.modules() if id(m) not in inside)
    for module in others:
        if isinstance(module, ActivationQuantizer):
            _set(module, torch.tensor([-4.0, 4.0]).repeat(module.scale.shape[0], 1, 1))


def _set(quantizer: Any, table: Tensor) -> None:
    scale, zero = ranges.affine_parameters(table[..., 0], table[..., 1], quantizer.spec.grid)
    quantizer.set_scale(scale, zero)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
