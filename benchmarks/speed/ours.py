"""Every call of bitbrush's kernels, and of nothing else: when their interface moves, this file does.

The kernels are torch ops that importing ``bitbrush.kernels.ops`` registers. A smoke run without them takes plain torch
in their place, which shows that the benchmark runs and times nothing of bitbrush.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.numbers import packing
from speed.shapes import Shape

OFFSET = 128
SCALE = 8 / 255
FUSED = ("group_norm_silu_encode", "layer_norm_encode")
"""Ops that encode what a norm gives, where the package has them."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """What an int8 layer takes: codes, and tables of S segments.

    Attributes:
        shape: Of the layer.
        a: int8 ``[M, K]``, of a convolution ``[B, H, W, C]``.
        weight: int8 ``[N, K]`` with 8 bits, else packed rows uint8; K in the order (kh, kw, channel).
        bits: Of a weight.
        a_scale: float32 ``[S]``.
        a_zero: int32 ``[S]``.
        w_scale: float32 ``[N, S]``.
        w_zero: uint8 ``[N, S]``.
        w_sum: int32 ``[S, N]``, sums of the rows' integers.
        bias: ``[N]``.
        residual: ``[M, N]`` or None.
        segments: Channels of each; empty is one.
    """

    shape: Shape
    a: Tensor
    weight: Tensor
    bits: int
    a_scale: Tensor
    a_zero: Tensor
    w_scale: Tensor
    w_zero: Tensor
    w_sum: Tensor
    bias: Tensor
    residual: Tensor | None
    segments: tuple[int, ...] = ()


def available() -> str | None:
    """Why there are no kernels here, or None."""
    try:
        importlib.import_module("bitbrush.kernels.ops")
    except ImportError as error:
        return f"no bitbrush.kernels.ops ({error})"
    return None if hasattr(torch.ops.bitbrush, "int8_linear") else "bitbrush.kernels.ops registers no int8_linear"


def operands(shape: Shape, bits: int, device: str, dtype: torch.dtype, *, residual: bool, seed: int = 0) -> Operands:
    """Random codes for a shape, on the device."""
    drawn = torch.Generator(device).manual_seed(seed)

    def whole(low: int, high: int, size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, size, dtype=kind, device=device, generator=drawn)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=drawn).to(dtype)

    places = (shape.batch, shape.height, shape.width, shape.channels) if shape.kernel else (shape.rows, shape.inner)
    n, k = shape.outer, shape.inner
    if bits == 8:
        weight, integers = (w := whole(-127, 128, (n, k), torch.int8)), w
    else:
        codes = whole(0, 1 << bits, (n, k), torch.uint8)
        weight, integers = packing.pack(codes, bits), codes.to(torch.int8) - (1 << bits - 1)
    middle = 1 << bits - 1
    return Operands(
        shape, whole(-128, 128, places, torch.int8), weight, bits,
        a_scale=torch.full((1,), SCALE, device=device), a_zero=torch.full((1,), 131, device=device, dtype=torch.int32),
        w_scale=torch.full((n, 1), 1.0 / (0.58 * middle * k**0.5), device=device),
        w_zero=torch.full((n, 1), middle, device=device, dtype=torch.uint8),
        w_sum=integers.sum(1, dtype=torch.int32).reshape(1, n), bias=noise(n),
        residual=noise(shape.rows, n) if residual else None,
    )  # fmt: skip


def call(x: Operands, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The layer as a call without arguments."""
    if available() is not None:
        return lambda: stand_in(x, dtype)
    return (lambda: _conv(x, dtype)) if x.shape.kernel else (lambda: _linear(x, dtype))


def _linear(x: Operands, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.bitbrush.int8_linear(
        x.a, x.weight, x.bits, list(x.segments) or [x.shape.inner], x.a_scale, x.a_zero, x.w_scale, x.w_zero, x.w_sum,
        x.bias, x.residual, dtype,
    )
    return out


def _conv(x: Operands, dtype: torch.dtype) -> Tensor:
    size, stride = x.shape.kernel, x.shape.stride
    out: Tensor = torch.ops.bitbrush.int8_conv2d(
        x.a, x.weight, x.bits, list(x.segments) or [x.shape.channels], x.a_scale, x.a_zero, x.w_scale, x.w_zero,
        x.w_sum, x.bias, x.residual, dtype, [size, size], [stride, stride], [size // 2, size // 2],
    )
    return out


def encode(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """int8 codes of ``x``, by the kernel or in its place."""
    if available() is None:
        out: Tensor = torch.ops.bitbrush.encode(x, inverse, zero)
        return out
    return encode_in_torch(x, inverse, zero)


def encode_in_torch(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """The same in torch's own operations, which a compiler may fuse into what stands before."""
    codes = torch.round(x.float() * inverse) + zero
    return (codes.clamp(0, 255) - OFFSET).to(torch.int8)


def fused() -> dict[str, Callable[..., Tensor]]:
    """Encodes fused with a norm that the package has, by name."""
    if available() is not None:
        return {}
    return {name: getattr(torch.ops.bitbrush, name) for name in FUSED if hasattr(torch.ops.bitbrush, name)}


def reference(x: Operands, rows: int) -> Tensor:
    """The first rows of the layer's output, float32: of a linear layer rows of the input, of a convolution those of
    the first picture."""
    zero, scale = int(x.a_zero[0]) - OFFSET, x.a_scale[0] * x.w_scale[:, 0]
    codes = x.weight if x.bits == 8 else packing.unpack(x.weight, x.bits, x.shape.inner)
    w = codes.double() - (0 if x.bits == 8 else float(x.w_zero[0, 0]))
    if not x.shape.kernel:
        sums = (x.a[:rows].double() - zero) @ w.T
    else:
        size, s = x.shape.kernel, x.shape
        picture = F.pad((x.a[:1].double() - zero).permute(0, 3, 1, 2), [size // 2] * 4)
        columns = F.unfold(picture[:, :, : size + 7 * s.stride], size, stride=s.stride)[0]  # (C, kh, kw) by places
        columns = columns.reshape(s.channels, size * size, -1).transpose(0, 1).flatten(0, 1)
        sums = columns.T[:rows] @ w.T
    out = sums * scale.double() + x.bias.double()
    return (out if x.residual is None else out + x.residual[: len(out)].double()).float()


def stand_in(x: Operands, dtype: torch.dtype) -> Tensor:
    """What stands for a kernel in a smoke run: the right numbers, slowly."""
    outputs = reference(x, x.shape.rows)
    return outputs.to(dtype)


def error(x: Operands, dtype: torch.dtype, rows: int = 64) -> float:
    """Largest difference of a call to the reference over its first rows, by the largest output."""
    made = call(x, dtype)().reshape(-1, x.shape.outer)[:rows].float()
    wanted = reference(x, rows)[: len(made)]
    return float((made[: len(wanted)] - wanted).abs().max() / wanted.abs().max())


def choose(net: nn.Module, device: str, *, smoke: bool) -> dict[str, int]:
    """Choose the kernel of every packed layer as a user does; layers of each kernel, or reason."""
    if smoke and "auto" not in kernels.KERNELS and available() is not None:
        chosen = kernels.use(net, "reference", device)
    else:
        chosen = kernels.use(net, "auto", device)
    return dict(Counter(chosen.values()))


def layer_error(net: nn.Module, work: Callable[[], Any]) -> dict[str, Any]:
    """Whether what a step gives is finite, and how large it is."""
    out = work()
    out = out[0] if isinstance(out, tuple | list) else out
    return {"finite": bool(torch.isfinite(out).all()), "size": float(out.float().abs().mean())}
