"""What a proof looks up a second time: rows of an activation's tables, the groups of its channels, unfolded inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.numbers.codec import expand_activation_scale

if TYPE_CHECKING:
    from bitbrush.network.activation import ActivationQuantizer
    from bitbrush.network.layers import QuantLayer


def rows_of(quantizer: Any) -> list[int]:
    """Row of the time grid for each sample, found one by one: a second opinion on `Clock.rows`."""
    clock = quantizer._clock[0]
    if clock is None or clock.now is None:
        raise InternalError("the clock is not set, so a timed layer cannot be proven")
    grid: list[float] = clock.timesteps.tolist()
    rows = []
    for now in clock.now.tolist():
        if quantizer.spec.lookup == "ceil":
            rows.append(next((i for i, t in enumerate(grid) if t >= now), len(grid) - 1))
        else:
            rows.append(min(range(len(grid)), key=lambda i, now=now: (abs(grid[i] - now), i)))  # type: ignore[misc]
    return rows


def spread(quantizer: ActivationQuantizer, table: Tensor, x: Tensor, channel: int, rows: list[int]) -> Tensor:
    """Rows ``[B or 1, S]`` shaped to broadcast against ``x``; groups are looked up here a second time."""
    if quantizer.group_of is None:
        return expand_activation_scale(table, quantizer.segments, x.ndim, channel)
    of = quantizer.group_of.tolist()
    labels = [of[row] for row in rows] if quantizer.spec.groups_timed else [of] * len(table)
    wide = torch.stack([torch.stack([entries[k] for k in own]) for entries, own in zip(table, labels, strict=True)])
    of_channels = quantizer.spec.granularity == "channel_group"
    shape = [n if (d == channel if of_channels else 0 < d != channel) else 1 for d, n in enumerate(x.shape)]
    return wide.reshape([len(wide), *shape[1:]] if channel else shape)


def summed(layer: QuantLayer) -> list[Tensor]:
    """Channels of each integer sum, int64: those of a segment, or those of a group, looked up one by one."""
    quantizer = layer.input
    if quantizer is None or quantizer.spec.granularity != "channel_group" or quantizer.group_of is None:
        return list(torch.arange(layer.in_channels_).split(list(layer.segments)))
    of = quantizer.group_of.tolist()
    return [torch.tensor([c for c, k in enumerate(of) if k == group], dtype=torch.int64)
            for group in range(quantizer.spec.groups)]


def unfolded(layer: QuantLayer, x: Tensor) -> Tensor:
    """What each output of a convolution reads, kernel place by kernel place: a second opinion on torch's unfolding."""
    conv: Any = layer
    padded = F.pad(x, conv._reversed_padding_repeated_twice)
    (height, width), (kh, kw) = places(conv, x), conv.kernel_hw
    (dh, dw), (sh, sw) = conv.dilation, conv.stride
    seen = [padded[..., i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw]
            for i in range(kh) for j in range(kw)]  # fmt: skip
    return torch.stack(seen, dim=-3).flatten(-4, -3).flatten(-2)


def places(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of a convolution's output: those of a convolution of zeros."""
    zeros = torch.zeros(1, conv.in_channels, *x.shape[-2:])
    out = conv._conv_forward(zeros, torch.zeros(1, conv.in_channels, *conv.kernel_size), None)
    return out.shape[-2], out.shape[-1]
