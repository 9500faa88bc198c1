"""Input covariances of many layers from one pass of the network: shared where inputs are, and with bounded memory.

Layers that are given the very same tensor (q, k and v of an attention; k and v of every attention to the text) have one
H. Which they are is found by looking, not by name: one sample is sent through the network, and what layers are given is
compared by identity (and by the tensor's version, as an operation in place makes another input of it).

Tokens and pixels are subsampled: a layer with n features keeps about ``max(least, per_feature * n)`` samples, evenly
over all calls, whatever the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.engine.run import Run
from bitbrush.network.layers import QuantLayer
from bitbrush.steps.covariance import Covariance

HELD = 8 + 4
"""Bytes of an entry of H while it is in use: the sum in float64, the mean in float32."""


@dataclass(frozen=True)
class Inputs:
    """Layers with the same inputs: the first stands for all. ``positions``: tokens or output pixels of one sample."""

    layers: tuple[str, ...]
    positions: int


def features(layer: QuantLayer) -> int:
    """Columns of the weight matrix: input channels times kernel positions."""
    high, wide = layer.kernel_hw
    return layer.in_channels_ * high * wide


def held_bytes(layers: list[QuantLayer]) -> int:
    """Bytes that the covariances of these layers take, if none of them is shared."""
    return sum(HELD * features(layer) ** 2 for layer in layers)


def same_inputs(run: Run, layers: dict[str, QuantLayer]) -> list[Inputs]:
    """Which of the layers share their inputs, in the order of ``layers``; one sample of the tape is sent through the
    network, in the face that it shows."""
    seen: dict[str, list[tuple[Any, ...]]] = {name: [] for name in layers}
    positions: dict[str, int] = {}
    held: list[Tensor] = []  # while they live, no other tensor can have their identity

    def looker(name: str, layer: QuantLayer) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            x = args[0]
            held.append(x)
            seen[name].append((id(x), x._version, *_reading(layer), name if layer.input_scale is not None else ""))
            positions[name] = positions.get(name, 0) + out[0].numel() // layer.out_channels_

        return look

    with _hooked({name: (layer, looker(name, layer)) for name, layer in layers.items()}, after=True), torch.no_grad():
        batch = next(iter(run.tape.select([0])))
        args, kwargs = run.tape.inputs(batch)
        run.model(*args, **kwargs)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, keys in seen.items():
        groups.setdefault(tuple(keys), []).append(name)
    return [Inputs(tuple(names), positions[names[0]]) for key, names in groups.items() if key]


def _reading(layer: QuantLayer) -> tuple[Any, ...]:
    """What else decides which samples a layer makes of its input: all of a convolution's geometry."""
    if isinstance(layer, nn.Conv2d):
        return (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return ()


def recorder(layer: QuantLayer, covariance: Covariance) -> Callable[..., None]:
    """A forward pre-hook that adds what the layer is given; outside of autocast, which would round the products."""

    def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = layer.prepare(args[0].detach())
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(layer, nn.Conv2d):
                covariance.add_conv(x, *(_pair(n) for n in (layer.kernel_size, layer.stride, layer.padding,
                                                            layer.dilation)))
            else:
                covariance.add(x)

    return add


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def record(
    run: Run, layers: dict[str, QuantLayer], walk: Callable[[], None], samples: int, generator: torch.Generator, *,
    least: int, per_feature: int,
) -> dict[str, Covariance]:
    """Covariances of the layers by name; layers with the same inputs have the same object.

    Args:
        run: Its model shows the face that inputs are taken from.
        layers: Those to be looked at.
        walk: Runs the network.
        samples: How many samples of the denoiser the walk consists of.
        generator: For the choice of tokens.
        least, per_feature: At least how many tokens are kept of a layer, and for each of its features.
    """
    found: dict[str, Covariance] = {}
    hooks: dict[str, tuple[QuantLayer, Callable[..., None]]] = {}
    for group in same_inputs(run, layers):
        first = layers[group.layers[0]]
        size = features(first)
        share = min(1.0, max(least, per_feature * size) / (samples * group.positions))
        one = Covariance(size, share=share, generator=generator, device=run.device)
        hooks[group.layers[0]] = (first, recorder(first, one))
        found |= dict.fromkeys(group.layers, one)
    with _hooked(hooks), torch.no_grad():
        walk()
    return found


@contextmanager
def _hooked(hooks: dict[str, tuple[QuantLayer, Callable[..., None]]], after: bool = False) -> Iterator[None]:
    handles = [
        layer.register_forward_hook(hook) if after else layer.register_forward_pre_hook(hook)
        for layer, hook in hooks.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
