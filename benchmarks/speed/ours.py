"""Every call of bitbrush's kernels, and of nothing else: when their interface moves, this file does.

The kernels are torch ops that importing ``bitbrush.kernels.int8_ops`` registers, with a plain form on the CPU, which is
what a smoke run sees.
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
from bitbrush.errors import InputError
from bitbrush.numbers import codec, packing
from speed.shapes import Shape

OFFSET = 128
SCALE, ZERO = 8 / 255, 131
TOP, EPS = 255, 1e-5
ONE_ROW = 0
"""What ``kind`` of the ops says where one row of scales serves all samples."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """What an int8 layer of one segment takes.

    Attributes:
        shape: Of the layer.
        codes: int8 activation codes less 128, ``[M, K]``, of a convolution ``[B, H, W, C]``: for the reference.
        laid: The same as the product wants them.
        integers: int8 ``[N, K]``, K in the order (kh, kw, channel).
        packed: Rows of codes below 8 bits, else None.
        bits: Of a weight.
        scale: float32 ``[1, 1]`` of the activation.
        zero: uint8 ``[1, 1]`` of the activation.
        times: int64 ``[1]``, the row of the tables that is in force.
        w_scale: float32 ``[N, 1]``.
        w_zero: uint8 ``[N, 1]``.
        w_sum: int32 ``[1, N]``, sums of the rows' integers.
        bias: ``[N]``.
        residual: ``[M, N]`` or None.
    """

    shape: Shape
    codes: Tensor
    laid: Tensor
    integers: Tensor
    packed: Tensor | None
    bits: int
    scale: Tensor
    zero: Tensor
    times: Tensor
    w_scale: Tensor
    w_zero: Tensor
    w_sum: Tensor
    bias: Tensor
    residual: Tensor | None


def available() -> str | None:
    """Why there are no kernels here, or None."""
    try:
        importlib.import_module("bitbrush.kernels.int8_ops")
    except ImportError as error:
        return f"no bitbrush.kernels.int8_ops ({error})"
    there = all(hasattr(torch.ops.bitbrush, name) for name in ("int8_encode", "int8_weight", "int8_product"))
    return None if there else "bitbrush.kernels.int8_ops does not register what is called here"


def frame(shape: Shape) -> list[int]:
    """The convolution's frame as the ops take it: batch, high, wide, kh, kw, pad, stride, shared border."""
    if not shape.kernel:
        return []
    size = shape.kernel
    return [shape.batch, shape.height, shape.width, size, size, size // 2, shape.stride, 1]


# ---- product -----------------------------------------------------------------------------------------------------
def operands(shape: Shape, bits: int, device: str, dtype: torch.dtype, *, residual: bool, seed: int = 0) -> Operands:
    """Random codes for a shape, on the device."""
    drawn = torch.Generator(device).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=drawn).to(dtype)

    n, k, middle = shape.outer, shape.inner, 1 << bits - 1
    codes = torch.randint(int(bits == 8), 1 << bits, (n, k), dtype=torch.uint8, device=device, generator=drawn)
    integers = (codes.to(torch.int16) - middle).to(torch.int8)
    places = (shape.batch, shape.height, shape.width, shape.channels) if shape.kernel else (shape.rows, k)
    x = noise(*places)
    scale, zero = torch.full((1, 1), SCALE, device=device), torch.full((1, 1), ZERO, dtype=torch.uint8, device=device)
    times = torch.zeros(1, dtype=torch.int64, device=device)
    laid = encode(x.permute(0, 3, 1, 2) if shape.kernel else x, codec.reciprocal(scale), zero, times, frame(shape))
    return Operands(
        shape, encode_in_torch(x, codec.reciprocal(scale)[0], zero[0]), laid, integers,
        packing.pack(codes, bits) if bits < 8 else None, bits, scale, zero, times,
        w_scale=torch.full((n, 1), 1.0 / (0.58 * middle * k**0.5), device=device),
        w_zero=torch.full((n, 1), middle, device=device, dtype=torch.uint8),
        w_sum=integers.sum(1, dtype=torch.int32).reshape(1, n), bias=noise(n),
        residual=noise(shape.rows, n) if residual else None,
    )  # fmt: skip


def call(x: Operands, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The layer as a call without arguments: below 8 bits the weight is unpacked in every call, as a model does."""
    ops, where, taps = torch.ops.bitbrush, frame(x.shape), max(1, x.shape.kernel**2)
    channels = x.shape.channels if x.shape.kernel else x.shape.inner

    def work() -> Tensor:
        weight = x.integers
        if x.packed is not None:
            weight = ops.int8_weight([x.packed], [x.bits], x.w_zero, None, [channels], taps, False)
        out: Tensor = ops.int8_product(
            x.laid, weight, x.scale, x.zero, x.times, ONE_ROW, x.w_scale, x.w_sum, [channels], where,
            1 if where else x.shape.rows, x.bias, None, x.residual, dtype,
        )
        return out

    return work


def reference(x: Operands, rows: int) -> Tensor:
    """The first rows of the layer's output, float32, from exact sums: of a linear layer those of the input, of a
    convolution those of the first picture (at most 8 rows of it)."""
    zero, w = ZERO - OFFSET, x.integers.double()
    if not x.shape.kernel:
        sums = (x.codes[:rows].double() - zero) @ w.T
    else:
        size, s = x.shape.kernel, x.shape
        picture = F.pad((x.codes[:1].double() - zero).permute(0, 3, 1, 2), [size // 2] * 4)
        columns = F.unfold(picture[:, :, : size + 7 * s.stride], size, stride=s.stride)[0]  # (C, kh, kw) by places
        columns = columns.reshape(s.channels, size * size, -1).transpose(0, 1).flatten(0, 1)
        sums = columns.T[:rows] @ w.T
    out = sums * (x.scale[0] * x.w_scale[:, 0]).double() + x.bias.double()
    return (out if x.residual is None else out + x.residual[: len(out)].double()).float()


def error(x: Operands, dtype: torch.dtype, rows: int = 64) -> float:
    """Largest difference of a call to the reference over its first rows, by the largest output."""
    made = call(x, dtype)().reshape(-1, x.shape.outer)[:rows].float()
    wanted = reference(x, rows)
    return float((made[: len(wanted)] - wanted).abs().max() / wanted.abs().max())


# ---- encode ------------------------------------------------------------------------------------------------------
def encode(x: Tensor, inverse: Tensor, zero: Tensor, times: Tensor, where: list[int]) -> Tensor:
    """int8 codes of rows ``[M, C]``, or of a picture ``[B, C, H, W]`` laid out in its frame, by the kernel.

    Args:
        x: What is encoded.
        inverse, zero: ``[1, 1]``.
        times: int64 ``[1]``, the row of the tables.
        where: See `frame`.
    """
    channels = x.shape[1] if where else x.shape[-1]
    rows = x if where else x.reshape(-1, channels)
    out: Tensor = torch.ops.bitbrush.int8_encode(
        rows, inverse, zero, times, ONE_ROW, [channels], TOP, where, 1 if where else rows.shape[0], None
    )
    return out


def norm_encode(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, inverse: Tensor, zero: Tensor, times: Tensor,
    where: list[int], *, consumers: int = 1, definition: bool = False,
) -> Tensor:
    """int8 codes of a picture after GroupNorm and SiLU, or of tokens after LayerNorm, by the kernel or by what defines
    it (in plain torch on any device). For the rest see `encode`.

    Args:
        consumers: Of tokens: how many layers get codes of their own, one below the other.
    """
    ops = importlib.import_module("bitbrush.kernels.norm_ops")
    if where:
        group = ops._group_norm_plain if definition else torch.ops.bitbrush.group_norm_encode
        tables = (inverse, zero, times, [x.shape[1]], TOP)
        pictures: Tensor = group(x, weight, bias, groups, EPS, True, *tables, where, None)
        return pictures
    layer = ops._layer_norm_plain if definition else torch.ops.bitbrush.layer_norm_encode
    tables = ([table] * consumers for table in (inverse, zero, times))
    rows: Tensor = layer(x, weight, bias, EPS, *tables, [TOP] * consumers, [None] * consumers)
    return rows


def geglu_encode(x: Tensor, inverse: Tensor, zero: Tensor, times: Tensor, *, definition: bool = False) -> Tensor:
    """int8 codes of ``hidden * gelu(gate)``, hidden and gate the halves of ``x``. For the rest see `norm_encode`."""
    ops = importlib.import_module("bitbrush.kernels.norm_ops")
    gated = ops._geglu_plain if definition else torch.ops.bitbrush.geglu_encode
    out: Tensor = gated(x, inverse, zero, times, TOP, None)
    return out


def encode_in_torch(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """Codes less 128 in plain torch, channels last, tables ``[1]``."""
    return (codec.encode(x, inverse, zero.float(), TOP) - OFFSET).to(torch.int8)


def encode_in_graph(x: Tensor, inverse: Tensor, zero: Tensor, where: list[int]) -> Tensor:
    """What a compiled model has in the encode's place, for the compiler to join with what stands before it.

    Args:
        x: Rows ``[.., C]``, or a picture ``[B, C, H, W]``.
        inverse, zero: ``[1]``, float32.
        where: See `frame`.
    """
    from bitbrush.kernels import int8_ops

    codes = codec.encode(x, inverse, zero, TOP)
    codes = codes.permute(0, 2, 3, 1) if where else codes.reshape(-1, codes.shape[-1])
    return int8_ops.laid_out(codes, zero, [codes.shape[-1]], int8_ops.frame_of(where))


# ---- whole models ------------------------------------------------------------------------------------------------
def choose(net: nn.Module, device: str, *, smoke: bool) -> dict[str, int]:
    """Choose the kernel of every packed layer as a user does; layers of each kernel, or reason."""
    try:
        chosen = kernels.use(net, "auto", device)
    except InputError:
        if not smoke:
            raise
        chosen = kernels.use(net, "reference", device)
    return dict(Counter(chosen.values()))


def blocks(net: nn.Module) -> int:
    """How many blocks pass codes on."""
    return len(kernels.blocks.fused(net))


def output(work: Callable[[], Any]) -> dict[str, Any]:
    """Whether what a step gives is finite, and how large it is."""
    out = work()
    out = out[0] if isinstance(out, tuple | list) else out
    return {"finite": bool(torch.isfinite(out).all()), "size": float(out.float().abs().mean())}
