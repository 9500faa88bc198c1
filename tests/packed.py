"""Packed layers with random codes, made as an artifact is loaded: nothing is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import packing
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec

TIMES = (1.0, 500.0, 999.0)


def conditioned(layers: int, prompt: int, head: int, *, linear: bool) -> UNet2DConditionModel:
    """A small UNet with cross-attention: residual blocks a level, channels of the prompt and of a head, and whether
    linear layers stand around its transformers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=prompt, attention_head_dim=head, norm_num_groups=8, use_linear_projection=linear,
    ).eval().requires_grad_(False)  # fmt: skip


def pack(model: nn.Module, spec: LayerSpec | Callable[[str, Any], LayerSpec]) -> None:
    """Every linear layer and convolution of a model becomes a packed one, with random codes and scales for `TIMES`.

    Args:
        spec: Of all, or what gives that of a name and layer.
    """
    layers = {name: spec if isinstance(spec, LayerSpec) else spec(name, module)
              for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}  # fmt: skip
    wrap.declare(model, Plan(layers=layers, timesteps=TIMES))
    generator = torch.Generator().manual_seed(1)
    for layer in wrap.layers(model).values():
        fill(layer, generator)


def fill(layer: QuantLayer, generator: torch.Generator) -> None:
    """Random codes and tables of a packed layer; layers of as many channels have the same groups of them."""
    weight, buffers = layer.spec.weight, layer._buffers
    bits, middle = weight.grid.bits, weight.grid.mid
    shape = (layer.out_channels_, layer.in_channels_, *layer.kernel_hw)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    layer.weight_zero_point.fill_(middle)
    layer.weight_scale.copy_((torch.rand(layer.weight_scale.shape, generator=generator) + 0.5) / (middle * 30))
    rows = packing.weight_rows(codes, layer.segments, layer.weight_zero_point)
    buffers[f"codes{bits}"] = packing.pack_class(rows, bits, weight)
    table = layer.input
    table.set_scale(torch.rand(table.scale.shape, generator=generator) * 0.01 + 0.03,
                    torch.randint(110, 140, table.scale.shape, generator=generator))
    if table.group_of is not None:
        table.set_groups(torch.arange(len(table.group_of)) * 5 % 7 % table.spec.groups)
    if layer.input_scale is not None:
        layer.input_scale.copy_(torch.rand(layer.input_scale.shape, generator=generator) + 0.5)


def network(bits: int = 4, timed: bool = True, linear: bool = False, alike: bool = False, **options: Any) -> Any:
    """A small UNet with cross-attention, packed with random codes; one table for layers of a block that read the same,
    with ``alike`` also for all that read the prompt, and for all that read the time embedding."""
    unet = conditioned(1, 32, 4, linear=linear)
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)), activation=ActivationSpec(timed=timed),
                     **options)  # fmt: skip
    pack(unet, spec)
    for attn in attentions(unet):
        like = attn.to_k.input
        for layer in (attn.to_v, *([] if attn.is_cross_attention else [attn.to_q])):
            layer.input.set_scale(like.scale.clone(), like.zero_point.clone())
    names = (("attn2.to_k", "attn2.to_v"), ("time_emb_proj",)) if alike else ()
    for ends in names:
        layers = [module for name, module in unet.named_modules() if name.endswith(ends)]
        for layer in layers:
            layer.input.set_scale(layers[0].input.scale.clone(), layers[0].input.zero_point.clone())
    return unet


def attentions(unet: nn.Module) -> list[Any]:
    """Its attentions, a self-attention and a cross-attention in turn."""
    return [module for name, module in unet.named_modules() if name.rpartition(".")[2] in ("attn1", "attn2")]


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep, the prompt's embedding."""
    generator = torch.Generator().manual_seed(2)
    x, prompt = (torch.randn(size, generator=generator).to(dtype) for size in ((batch, 4, 8, 8), (batch, 5, 32)))
    return x, torch.tensor(500), prompt
