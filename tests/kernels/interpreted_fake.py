"""Runs the fused kernels in Triton's interpreter and compares them with the torch form; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. ``fault`` as argument replaces the
rounding by half-up, which must show.
"""

from __future__ import annotations

import itertools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bitbrush.kernels import triton_fake, triton_fake_kernels
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.codec import decode, encode, expand_weight_scale, reciprocal
from bitbrush.numbers.grid import Grid, LayerSpec, WeightSpec
from bitbrush.numbers.straight_through import Fused, FusedWeight, fake_quantize, fake_rows, fake_weight
from bitbrush.steps.tuning_learners import rows_of

SHAPES = ((1,), (3, 7, 11), (2, 6, 5, 4), (1, 4099), (3, 2048), (2, 2049))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def half_up() -> None:
    """The seeded fault."""

    @triton.jit
    def wrong(v):  # type: ignore[no-untyped-def]
        return tl.floor(v + 0.5)

    triton_fake_kernels.half_even = wrong


def example(shape: tuple[int, ...], by_sample: bool, top: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values with exact ties, clipped ones, zeros and infinities, and their tables."""
    g = torch.Generator().manual_seed(seed)
    table = (shape[0], *[1] * (len(shape) - 1)) if by_sample else ()
    scale = torch.exp2(torch.randint(-4, 0, table, generator=g).float()) if seed % 2 else torch.rand(
        table, generator=g) * 0.2 + 0.05
    zero = torch.randint(0, top + 1, table, generator=g).float()
    x = torch.randn(shape, generator=g) * (top + 1) * 0.1
    ties = torch.rand(shape, generator=g) < 0.2
    x = torch.where(ties, (torch.randint(-9, 9, shape, generator=g) + 0.5) * scale, x)
    x.view(-1)[:: 53] = 0.0
    if x.numel() > 300:
        x.view(-1)[100:103] = torch.tensor([torch.inf, -torch.inf, 3e38])
    return x, scale, zero


def truncated(x: Tensor) -> Tensor:
    """Float32 to bfloat16 without rounding: what the interpreter does, unlike a GPU."""
    return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32).to(torch.bfloat16)


def weight_layers(seed: int) -> list[QuantLayer]:
    """A convolution and two linear layers: mixed bits with symmetric 1-bit rows, segments, rows of several blocks."""
    torch.manual_seed(seed)
    mixed = tuple((1, 2, 3, 4, 8)[(i + seed) % 5] for i in range(9))
    plans = ((nn.Conv2d(7, 9, 3), mixed, (4, 3)), (nn.Linear(13, 6), (), ()), (nn.Linear(2500, 3), (), (2100, 400)),
             (nn.Conv2d(1, 4, 1), (), ()))
    layers: list[QuantLayer] = []
    for i, (module, row_bits, segments) in enumerate(plans):
        weight = WeightSpec(grid=Grid(bits=1 if i == 3 else 4), row_bits=row_bits, binary="symmetric")
        spec = LayerSpec(weight=weight, segments=segments)
        layer: QuantLayer = (QuantConv2d.wrap(module, spec, None, 1) if isinstance(module, nn.Conv2d)
                             else QuantLinear.wrap(module, spec, None, 1))
        shape, binary = layer.weight_scale.shape, layer.binary_rows()
        top = torch.as_tensor(layer.top()).float().reshape(-1, 1).expand(shape[0], 1)
        zero = (torch.rand(shape) * (top + 1)).floor()
        if binary is not None:
            zero = torch.where(binary.reshape(-1, 1), 1.0, zero)
        layer.weight_scale = torch.exp2(torch.randint(-3, 1, shape).float()) if seed % 2 else torch.rand(shape) + 0.1
        layer.weight_zero_point = zero.to(torch.uint8)
        layers.append(layer)
    return layers


def compare_weights(found: dict[str, float]) -> None:
    """All layers at once by the kernels against each by itself in torch."""
    fused = FusedWeight(triton_fake.weight_forward, triton_fake.weight_backward)
    for seed, rounding, scales in itertools.product((0, 1, 2), ("nearest", "offset"), (True, False)):
        layers = weight_layers(seed)
        tables = [layer.weight_scale.clone().requires_grad_(scales) for layer in layers]
        weights, offsets, plain = [], [], []
        for layer, table in zip(layers, tables, strict=True):
            shape, scale = layer.weight.shape, expand_weight_scale(table, layer.segments, layer.weight.ndim)
            w = torch.randn(shape) * 3
            w = torch.where(torch.rand(shape) < 0.2, (torch.randint(-5, 5, shape) + 0.5) * scale.detach(), w)
            w.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e30, -1e30])
            weights.append(w.requires_grad_())
            offsets.append(torch.randint(0, 2, shape, dtype=torch.uint8) if rounding == "offset" else None)
            plain.append(fake_weight(w, scale, layer.scale_tables()[1], layer.top(), offsets[-1], layer.binary_rows()))
        ours = fake_rows(
            torch.cat([w.flatten() for w in weights]), torch.cat([t.flatten() for t in tables]), rows_of(layers),
            torch.cat([o.flatten() for o in offsets if o is not None]) if rounding == "offset" else None, fused,
        )
        want = torch.cat([p.flatten() for p in plain])
        grad, leaves = torch.randn(want.shape), weights + (tables if scales else [])
        expected, got = torch.autograd.grad(want, leaves, grad), torch.autograd.grad(ours, leaves, grad)
        found["weights"] += want.numel()
        found["weight_wrong"] += int((ours != want).sum())
        count = len(weights)
        found["weight_wrong_dw"] += sum(int((a != b).sum()) for a, b in zip(expected[:count], got[:count], strict=True))
        for a, b in zip(expected[count:], got[count:], strict=True):
            found["weight_worst_table"] = max(found["weight_worst_table"], float(((a - b).abs() / a.abs().max()).max()))


def main() -> None:
    """Compare everything and print the counts."""
    if "fault" in sys.argv:
        half_up()
    found = {"cases": 0, "values": 0, "wrong": 0, "wrong_dx": 0, "worst_table": 0.0, "layouts": 0,
             "weights": 0, "weight_wrong": 0, "weight_wrong_dw": 0, "weight_worst_table": 0.0}
    compare_weights(found)
    fused = Fused(lambda x, scale, zero: True, triton_fake.forward, triton_fake.backward)
    cases = itertools.product(SHAPES, (False, True), DTYPES, (1, 15, 255))
    for i, (shape, by_sample, dtype, top) in enumerate(cases):
        x, scale, zero = example(shape, by_sample, top, i)
        x = x.to(dtype)
        if len(shape) == 4 and i % 2:
            x = x.contiguous(memory_format=torch.channels_last)
            found["layouts"] += 1
        assert triton_fake.dense(x) and triton_fake.rows(x, scale) == (shape[0] if by_sample else 1)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        results = []
        for form in (None, fused):
            leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
            y = fake_quantize(leaves[0], leaves[1], leaves[2], top, form)
            y.backward(grad)
            results.append((y.detach(), *(leaf.grad for leaf in leaves)))
        wide = decode(encode(x, reciprocal(scale), zero, top), scale, zero)
        plain, ours = results
        assert torch.equal(plain[0], wide.to(dtype))
        want = plain[0] if dtype != torch.bfloat16 else truncated(wide)
        found["wrong"] += int((want != ours[0]).sum())
        found["wrong_dx"] += int((plain[1] != ours[1]).sum())
        for a, b in zip(plain[2:], ours[2:], strict=True):
            finite = torch.isfinite(a)
            size = grad.float().abs().sum() * (top + 1)
            found["worst_table"] = max(found["worst_table"], float(((a - b).abs() / size)[finite].max()))
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(finite, torch.isfinite(b))
        found["cases"] += 1
        found["values"] += x.numel()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
