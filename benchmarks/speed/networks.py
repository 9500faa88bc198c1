"""A model as a packed bitbrush network with random codes, made as an artifact is loaded: no quantization runs.

The network is built without data, its layers are declared packed, and then every tensor is drawn where it is to stay: a
packed network never exists in float.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import packing
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from speed.models import Model
from speed.shapes import spread

TIMESTEPS = tuple(float(1 + 40 * i) for i in range(25))
INPUT_RANGE = 8.0
SEGMENTED = 256
"""Fewest input channels of a layer that is split into segments."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a network is quantized.

    Attributes:
        name: In files.
        title: On the page.
        weights: Bits of a weight; 3 with codebooks means three of 8 bits for every 8 weights.
        activations: Bits, 16 where inputs stay float.
        timed: A row of scales a timestep.
        segments: Most segments of a layer's input.
        codebooks: Whether weights are additive codebooks.
        groups: Of each input's channels, anywhere among them, with scales of their own (DGQ).
        like: The form that this one is timed beside, besides bf16.
    """

    name: str
    title: str
    weights: int
    activations: int = 16
    timed: bool = False
    segments: int = 1
    codebooks: bool = False
    groups: int = 0
    like: str = ""


FORMS = {
    form.name: form
    for form in (
        Form("w8a8", "W8A8, static", 8, 8),
        Form("w4a8", "W4A8, static", 4, 8, like="w8a8"),
        Form("vq3", "VQ, 3 bits, weights only", 3, codebooks=True),
        Form("w8a8-times", "W8A8, a scale a timestep", 8, 8, timed=True, like="w8a8"),
        Form("w8a8-segments8", "W8A8, 8 segments", 8, 8, segments=8, like="w8a8"),
        Form("w4a8-groups8", "W4A8, 8 groups of channels, their scales a timestep (DGQ)", 4, 8, timed=True, groups=8,
             like="w4a8"),
        Form("w4", "W4, weights only", 4),
    )
}


def spec(form: Form, name: str, module: nn.Module) -> LayerSpec:
    """How one layer is quantized. Layers outside of the blocks (first, last, embeddings) have weights of 8 bits."""
    inside = re.search(r"\.\d+(\.|$)", name) is not None
    channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    activation = None
    if form.activations < 16:
        groups = form.groups if inside and channels >= SEGMENTED // 8 and "time_emb_proj" not in name else 0
        activation = ActivationSpec(grid=Grid(bits=form.activations), timed=form.timed, groups=groups,
                                    granularity="channel_group" if groups else "tensor")
    if form.codebooks and inside and channels % 8 == 0 and "time_emb_proj" not in name:
        return LayerSpec(weight=WeightSpec(grid=Grid(kind="codebook", bits=8), codebooks=form.weights, group=8))
    bits = (4 if form.codebooks else form.weights) if inside else 8
    parts = spread(int(channels), form.segments) if form.segments > 1 and channels >= SEGMENTED else ()
    return LayerSpec(weight=WeightSpec(grid=Grid(bits=bits, signed=bits == 8)), activation=activation, segments=parts)


def plan(form: Form, net: nn.Module) -> Plan:
    """All linear and convolution layers of a network."""
    layers = {
        name: spec(form, name, module) for name, module in net.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    return Plan(layers=layers, timesteps=TIMESTEPS if form.timed else ())


def build(model: Model, form: Form | None, device: str, dtype: torch.dtype) -> nn.Module:
    """The network on a device, packed in a form or (None) in float; pictures' weights are channels_last."""
    net = model.on_meta().to(dtype)
    if form is not None:
        wrap.declare(net, plan(form, net))
    draw(net, device)
    net = net.to(device).eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last) if model.pictures and form is None else net


def draw(net: nn.Module, device: str) -> None:
    """Random data on the device for every tensor that has none."""
    drawn = torch.Generator(device).manual_seed(0)
    for module in net.modules():
        if isinstance(module, QuantLayer):
            _fill(module, device, drawn)
    for module in net.modules():
        _draw(module, device, drawn)
    net.to(device)


def _draw(module: nn.Module, device: str, drawn: torch.Generator) -> None:
    """Random numbers for what has no data: weights of unit gain, norms about 1."""
    for tensors in (module._parameters, module._buffers):
        for name, old in tensors.items():
            if old is None or not old.is_meta:
                continue
            size = tuple(old.shape)
            if not old.is_floating_point():
                tensors[name] = torch.zeros(size, dtype=old.dtype, device=device)  # type: ignore[assignment]
                continue
            new = torch.randn(size, device=device, dtype=old.dtype, generator=drawn)
            new = new * 0.05 + (name == "weight") if old.ndim < 2 else new * (old[0].numel() ** -0.5)
            tensors[name] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new  # type: ignore[assignment]


def _fill(layer: QuantLayer, device: str, drawn: torch.Generator) -> None:
    """Random codes and tables of a packed layer; padding holds what the format says."""
    weight = layer.spec.weight
    if weight is None:
        return
    bits, fan_in = weight.grid.bits, layer.in_channels_ * layer.kernel_hw[0] * layer.kernel_hw[1]
    buffers: dict[str, Any] = layer._buffers
    held: Tensor = buffers[f"codes{bits}"]
    rows = torch.rand(layer.out_channels_, 1, device=device, generator=drawn) + 0.5
    if weight.additive:
        book: Tensor = layer.codebooks._buffers["values"]  # type: ignore[union-attr, assignment]
        made = torch.randn(book.shape, device=device, generator=drawn) * (book.shape[0] * fan_in) ** -0.5
        layer.codebooks._buffers["values"] = made.half()  # type: ignore[union-attr]
        buffers["weight_scale"] = rows.flatten().half()
        buffers[f"codes{bits}"] = _bytes(held, device, drawn)
    else:
        wide, middle = len(layer.segments), weight.grid.mid
        zero = torch.full((layer.out_channels_, wide), middle, dtype=torch.uint8, device=device)
        buffers["weight_zero_point"] = zero
        buffers["weight_scale"] = rows.expand(-1, wide).contiguous() / (0.58 * middle * fan_in**0.5)
        padded = any(channels % packing.SEGMENT_ALIGN for channels in layer.segments)
        buffers[f"codes{bits}"] = (
            _packed(layer, weight, zero, device, drawn) if padded else _bytes(held, device, drawn)
        )
    if layer.input is not None:
        _fill_input(layer.input, device, drawn)


def _bytes(like: Tensor, device: str, drawn: torch.Generator) -> Tensor:
    return torch.randint(0, 256, tuple(like.shape), dtype=torch.uint8, device=device, generator=drawn)


def _packed(layer: QuantLayer, weight: WeightSpec, zero: Tensor, device: str, drawn: torch.Generator) -> Tensor:
    bits = weight.grid.bits
    size = (layer.out_channels_, layer.in_channels_, *layer.kernel_hw)
    codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, device=device, generator=drawn)
    return packing.pack_class(packing.weight_rows(codes, layer.segments, zero), bits, weight)


def _fill_input(quantizer: ActivationQuantizer, device: str, drawn: torch.Generator) -> None:
    buffers: dict[str, Any] = quantizer._buffers
    size = tuple(buffers["scale"].shape)
    scale = (torch.rand(size, device=device, generator=drawn) * 0.2 + 0.9) * (INPUT_RANGE / 255)
    buffers["scale"], buffers["inverse_scale"] = scale, 1 / scale
    zero = torch.randint(120, 137, size, device=device, generator=drawn)
    buffers["zero_point"] = zero.to(torch.uint8)
    if quantizer.group_of is not None:
        members, groups = len(quantizer.group_of), quantizer.spec.groups
        same = torch.Generator(device).manual_seed(members)  # layers that read one tensor have the same groups
        buffers["group_of"] = torch.randint(0, groups, (members,), dtype=torch.uint8, device=device, generator=same)


def weight_bytes(net: nn.Module) -> int:
    """All bytes that stand for the network: codes, scales, tables, biases, norms."""
    return sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
