"""Random quantized layers and a pairwise grid of cases, shared by the tests of layers and kernels.

Test files load it by path (tests are imported without packages).
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.codec import expand_weight_scale
from bitbrush.numbers.grid import GROUPED, ActivationSpec, Grid, LayerSpec, WeightSpec
from bitbrush.numbers.ranges import affine_parameters, search
from bitbrush.numbers.straight_through import encode_weight

TIMES = (1.0, 250.0, 500.0, 999.0)
GROUPS = 5

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": ("linear", "conv"),
    "weight_bits": (4, 3, 8, 1, 2, 5, 6, 7, "mixed", "sign", "mixed sign"),
    "weight_signed": (False, True),
    "activation_bits": (8, 6, 4),
    "activation_signed": (False, True),
    "segments": ((), (40, 24), (33, 1, 30)),
    "rows": (16, 1, 33),
    "kernel": ((3, 3), (1, 1), (5, 3)),
    "stride": ((1, 1), (2, 2), (2, 1)),
    "padding": ((0, 0), (1, 1), (2, 1)),
    "dilation": ((1, 1), (2, 1)),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "layout": ("contiguous", "channels_last", "strided", "expanded", "unbatched"),
    "mode": ("static", "timed", "timed_batch", "tensor", "token", "token_group", "channel", "timed channel",
             "timed_batch channel_group", "pixel_group"),
    "input_scale": (False, True),
    "low_rank": (0, 3),
    "bias": (True, False),
}
ALWAYS: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()}


def pairwise(seed: int = 0) -> list[dict[str, Any]]:
    """Cases in which every pair of values of every two factors occurs at least once (greedy, seeded)."""
    rng = random.Random(seed)
    names = list(FACTORS)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(FACTORS[a]))
        for j in range(len(FACTORS[b]))
    }
    out: list[dict[str, Any]] = []
    while missing:
        best: tuple[int, dict[str, int]] = (-1, {})
        seeded = rng.choice(sorted(missing))
        for _ in range(12):
            pick = {name: rng.randrange(len(FACTORS[name])) for name in names}
            pick[seeded[0]], pick[seeded[2]] = seeded[1], seeded[3]
            new = sum((a, pick[a], b, pick[b]) in missing for a, b in itertools.combinations(names, 2))
            best = max(best, (new, pick), key=lambda item: item[0])
        pick = best[1]
        missing -= {(a, pick[a], b, pick[b]) for a, b in itertools.combinations(names, 2)}
        out.append({name: FACTORS[name][pick[name]] for name in names})
    return out


def square(case: dict[str, Any]) -> dict[str, Any]:
    """A case whose stride and padding are the same on all sides, without dilation: what most networks have."""
    stride, padding = case["stride"][1], min(case["padding"][0], 1 if min(case["kernel"]) > 1 else 0)
    return {**case, "stride": (stride, stride), "padding": (padding, padding), "dilation": (1, 1)}


def spec_of(case: dict[str, Any]) -> LayerSpec:
    """The layer spec of a case; 64 channels."""
    mixed, sign = "mixed" in str(case["weight_bits"]), "sign" in str(case["weight_bits"])
    cycle = (2, 1, 3) if sign else (4, 3, 7, 2)
    row_bits = tuple(cycle[i % len(cycle)] for i in range(case["rows"])) if mixed else ()
    bits = 4 if mixed else 1 if sign else case["weight_bits"]
    signed = case["weight_signed"] and not mixed
    mode, groups = case["mode"], str(case["mode"]).rpartition(" ")[2]
    groups = groups if groups in GROUPED else ""
    activation = ActivationSpec(
        grid=Grid(bits=case["activation_bits"], signed=case["activation_signed"]),
        mode="dynamic" if mode in ("tensor", "token", "token_group") else "static",
        group=40 if mode == "token_group" else 0,
        granularity=groups or (mode if mode.startswith("token") else "channel" if "channel" in mode else "tensor"),
        timed=mode.startswith("timed"),
        groups=GROUPS if groups else 0,
        pixels=(7 if case["kind"] == "linear" else 72) if groups == "pixel_group" else 0,
    )
    weight = WeightSpec(
        grid=Grid(bits=bits, signed=signed), row_bits=row_bits, binary="symmetric" if sign else "affine"
    )
    return LayerSpec(
        weight=weight, activation=activation, segments=() if groups else case["segments"],
        input_scale=case["input_scale"], low_rank=min(case["low_rank"], case["rows"]),
    )


def make_module(case: dict[str, Any], generator: torch.Generator) -> nn.Module:
    """The float module of a case, with random weights of its dtype."""
    rows, bias = case["rows"], case["bias"]
    if case["kind"] == "linear":
        module: nn.Module = nn.Linear(64, rows, bias=bias)
    else:
        module = nn.Conv2d(
            64, rows, case["kernel"], stride=case["stride"], padding=case["padding"], dilation=case["dilation"],
            bias=bias,
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.05)
    return module.to(case["dtype"]).requires_grad_(False)


def quantize_weight(layer: QuantLayer, generator: torch.Generator) -> Tensor:
    """Give a wrapped layer codes: per row and segment min-max ranges, rounding up or down at random.

    Symmetric 1-bit rows get their mean magnitude; an input scale is drawn from [0.2, 5].
    """
    spec = layer.spec.weight
    assert spec is not None
    if layer.input_scale is not None:
        spread = torch.rand(layer.input_scale.shape, generator=generator) * 2 - 1
        layer.set_input_scale(torch.exp(spread * math.log(5)))
    if layer.low_rank is not None:
        up, down = layer.low_rank()
        layer.set_low_rank(*(torch.randn(t.shape, generator=generator) * 0.3 for t in (up, down)))
    weight = layer.scaled_weight()
    bits = torch.tensor(spec.row_bits or [spec.grid.bits] * layer.out_channels_)
    scales, zeros = [], []
    for part in weight.float().split(list(layer.segments), dim=1):
        scale, zero = torch.ones(layer.out_channels_), torch.zeros(layer.out_channels_)
        for b in sorted(set(bits.tolist())):
            s, z = search(part.flatten(1), Grid(bits=b, signed=spec.grid.signed), method="minmax")
            if spec.halved(b):
                s, z = part.flatten(1).abs().mean(dim=1), torch.ones_like(z)
            scale, zero = torch.where(bits == b, s, scale), torch.where(bits == b, z, zero)
        scales.append(scale)
        zeros.append(zero)
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    if 8 in spec.bit_classes():
        zero = torch.full_like(zero, 128) if spec.grid.signed else zero
    big, offset = (expand_weight_scale(t, layer.segments, weight.ndim) for t in (scale, zero))
    learned = torch.rand(weight.shape, generator=generator) * 0.9 - 0.45  # stands for learned rounding
    codes = encode_weight(weight + learned * big, big, offset, layer.top(), binary=layer.binary_rows())
    layer.set_weight(codes, scale, zero)
    layer.face = "sim"
    return codes.to(torch.uint8)


def set_ranges(layer: QuantLayer, generator: torch.Generator) -> None:
    """Random static tables, one row a time and one column a segment."""
    quantizer = layer.input
    if quantizer is None or quantizer.spec.mode == "dynamic":
        return
    shape = tuple(quantizer.scale.shape)
    low = -torch.rand(shape, generator=generator) * 2.5 - 0.1
    high = torch.rand(shape, generator=generator) * 2.5 + 0.1
    quantizer.set_scale(*affine_parameters(low, high, quantizer.spec.grid))
    if quantizer.group_of is not None:  # one group stays empty
        quantizer.set_groups(torch.randint(GROUPS - 1, quantizer.group_of.shape, generator=generator))


def build(case: dict[str, Any], seed: int = 0) -> tuple[QuantLayer, QuantLayer, Tensor]:
    """(layer in sim face, its packed copy, the codes); both share one clock."""
    case = {**ALWAYS, **case}
    generator = torch.Generator().manual_seed(seed)
    module, clock = make_module(case, generator), Clock(TIMES)
    wrapper = QuantLinear if case["kind"] == "linear" else QuantConv2d
    layer = wrapper.wrap(module, spec_of(case), clock, len(TIMES))
    codes = quantize_weight(layer, generator)
    set_ranges(layer, generator)
    return layer, packed_copy(layer), codes


def packed_copy(layer: QuantLayer) -> QuantLayer:
    """A packed copy that shares the clock."""
    packed = copy.deepcopy(layer)
    packed.pack()
    if packed.input is not None and layer.input is not None:
        packed.input._clock = layer.input._clock
    return packed


def make_input(case: dict[str, Any], seed: int = 0, batch: int = 2) -> Tensor:
    """An input with outliers in the layout of a case."""
    case = {**ALWAYS, **case}
    g = torch.Generator().manual_seed(seed + 77)
    shape = (batch, 7, 64) if case["kind"] == "linear" else (batch, 64, 9, 8)
    layout = case["layout"]
    timed = case["mode"].startswith("timed") or case["mode"] == "pixel_group"
    if layout == "unbatched" and case["kind"] == "linear" and not timed:
        shape = shape[1:]
    x = torch.randn(shape, generator=g)
    x.view(-1)[:: 97] *= 6
    x = x.to(case["dtype"])
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x[:1].expand(x.shape) if layout == "expanded" else x


def timestep(case: dict[str, Any]) -> Tensor:
    """The clock's time of a case: two different ones for a batch of mixed times."""
    mixed = str(case.get("mode")).startswith("timed_batch")
    return torch.tensor([990.0, 260.0]) if mixed else torch.tensor(480)
