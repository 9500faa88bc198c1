"""The products and convolutions of a step, their operations and bytes, found by running the network on meta tensors.

Operations are 2 a multiply-accumulate. Bytes are the fewest that a form of the layer has to move: every input read
once, every output written once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from speed.models import Model


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """One product or convolution.

    Attributes:
        rows: M, places of the output of all samples.
        inner: K of the product, kernel x kernel x channels.
        outer: N, channels of the output.
        kernel, stride, height, width, batch: Of a convolution's input; kernel 0 is a linear layer.
    """

    rows: int
    inner: int
    outer: int
    kernel: int = 0
    stride: int = 1
    height: int = 0
    width: int = 0
    batch: int = 0

    @property
    def flops(self) -> int:
        """Operations."""
        return 2 * self.rows * self.inner * self.outer

    @property
    def inputs(self) -> int:
        """Numbers in the input."""
        if not self.kernel:
            return self.rows * self.inner
        return self.batch * self.height * self.width * self.channels

    @property
    def outputs(self) -> int:
        """Numbers in the output."""
        return self.rows * self.outer

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.inner // max(self.kernel**2, 1)

    @property
    def name(self) -> str:
        """In files and tables."""
        if not self.kernel:
            return f"{self.rows} x {self.inner} x {self.outer}"
        wide = f"{self.batch} x {self.height} x {self.width}"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels} to {self.outer}, {wide}"

    def bytes(self, weight_bits: float, input_bytes: float, *, residual: bool = False) -> float:
        """Fewest bytes: input, weight, output (and residual) in 16 bits."""
        outputs = self.outputs * (4 if residual else 2)
        return self.inputs * input_bytes + self.inner * self.outer * weight_bits / 8 + outputs


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a step consists of.

    Attributes:
        counts: Calls of each shape.
        names: Layer to shape, in order of execution.
        encoded: Numbers of the distinct tensors that layers take.
        attention: Operations of attention, ``q k^T`` and the product with v.
        attention_numbers: In q, k, v and what comes out.
        parameters: Of the network.
    """

    counts: dict[Shape, int]
    names: dict[str, Shape]
    encoded: int
    attention: int
    attention_numbers: int
    parameters: int

    @property
    def flops(self) -> int:
        """Operations with weights."""
        return sum(shape.flops * count for shape, count in self.counts.items())


def trace(model: Model) -> Trace:
    """Run a model's network without data. The batch is the model's."""
    net = model.on_meta()
    names: dict[str, Shape] = {}
    counts: dict[Shape, int] = {}
    seen: dict[int, Tensor] = {}  # kept, so that no two tensors have the same id
    heads: list[tuple[int, ...]] = []
    handles = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[id(args[0])] = args[0]
            names[name] = shape = _shape(module, args[0], out)
            counts[shape] = counts.get(shape, 0) + 1  # a layer may be called twice

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            handles.append(module.register_forward_hook(record(name)))
    with torch.no_grad(), _Attention(heads):
        net.float()(**model.arguments("meta", torch.float32))
    for handle in handles:
        handle.remove()
    return Trace(
        counts, names, sum(x.numel() for x in seen.values()),
        sum(4 * b * h * q * k * d for b, h, q, k, d in heads),
        sum(2 * b * h * d * (q + k) for b, h, q, k, d in heads),
        sum(p.numel() for p in net.parameters()),
    )  # fmt: skip


class _Attention(torch.overrides.TorchFunctionMode):
    """Notes (batch, heads, queries, keys, width) of every attention."""

    def __init__(self, found: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q = args[0] if args else kwargs["query"]
            k = args[1] if len(args) > 1 else kwargs["key"]
            self.found.append((q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3]))
        return func(*args, **kwargs)


def _shape(module: nn.Module, x: Tensor, out: Tensor) -> Shape:
    if isinstance(module, nn.Conv2d):
        size, stride = int(module.kernel_size[0]), int(module.stride[0])
        rows = out.numel() // module.out_channels
        inner = module.in_channels // module.groups * size * size
        return Shape(rows, inner, module.out_channels, size, stride, x.shape[2], x.shape[3], x.shape[0])
    features: int = module.in_features  # type: ignore[assignment]
    return Shape(x.numel() // features, features, out.shape[-1])


def costliest(counts: dict[Shape, int], *, convolutions: bool, most: int, rows: int = 0) -> list[Shape]:
    """Shapes by the operations that a step spends on them, most first.

    Args:
        counts: Layers of each shape.
        convolutions: Wider than 1x1, or products (1x1 convolutions are not asked for).
        most: How many.
        rows: Fewest rows.
    """
    wanted = [s for s in counts if (s.kernel > 1 if convolutions else s.kernel == 0) and s.rows >= rows]
    return sorted(wanted, key=lambda s: (-s.flops * counts[s], s))[:most]


def floor(found: Trace, ceilings: dict[str, float], weight_bits: float, *, packed: bool) -> dict[str, float]:
    """Seconds under which no step can come, in parts.

    A layer takes its operations at the machine's rate or its bytes at the copy's, whichever is more. bf16: what stands
    between the layers reads and writes every tensor that a layer takes once, 2 bytes each. Packed, it reads 2 bytes and
    writes 1, and the layer reads that one; attention stays in bf16.

    Args:
        found: The step.
        ceilings: ``copy`` bytes/s, ``bf16`` and ``int8`` operations/s.
        weight_bits: Bits of a weight.
        packed: int8 products of codes, else bf16.
    """
    rate, wide = (ceilings["int8"], 1.0) if packed else (ceilings["bf16"], 2.0)
    layers = sum(
        count * max(shape.flops / rate, shape.bytes(weight_bits, wide) / ceilings["copy"])
        for shape, count in found.counts.items()
    )
    between = found.encoded * (2 + wide) / ceilings["copy"]
    attention = max(found.attention / ceilings["bf16"], 2 * found.attention_numbers / ceilings["copy"])
    return {"layers": layers, "between": between, "attention": attention, "all": layers + between + attention}


def spread(size: int, most: int, align: int = 32) -> tuple[int, ...]:
    """``size`` channels in at most ``most`` segments of nearly the same size, multiples of ``align``; empty: one."""
    blocks = size // align
    count = min(most, blocks)
    if count < 2 or size % align:
        return ()
    return tuple(align * (blocks // count + (i < blocks % count)) for i in range(count))


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean, None of nothing."""
    found = list(values)
    return math.exp(sum(math.log(v) for v in found) / len(found)) if found else None
