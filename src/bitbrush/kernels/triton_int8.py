"""Launches the int8 kernels: product (linear layers and convolutions), unpack. The encode: `triton_encode`.

**Product.** ``a`` holds int8 codes less 128, rows of ``length_a`` bytes; ``w`` int8 ``[N, K]``, K in the order
(segment, kh, kw, channel) of a packed row. Each segment has an int32 accumulator and a scale of its own; the epilogue
is float32 and adds bias, a row a sample (a time embedding) and a residual before the one rounding.

**Convolutions** read a *frame*: the input's pixels in channels-last order with a border that holds the zero-point's
code. Rows of pixels share their border: a frame has ``pad`` pixels before each row of pixels and ``pad`` rows before
each picture, and what follows a row is what precedes the next. Kernel position (i, j) is then the input ``i * pitch +
j`` rows further on, so that a convolution is a product with kh * kw shifts and no bounds inside. Either m counts the
frame's rows (copied by the tensor memory accelerator; what falls on the border is not stored), or outputs (gathered).

Importing this module does not import Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bitbrush.numbers.packing import plane_starts

LINEAR, FLAT, GATHERED = 0, 1, 2
ONE_ROW, BY_SAMPLE, BY_ROW = 0, 1, 2
"""Which row of the activation's tables serves an output: the same for all, one a sample, one a row."""


@dataclass(frozen=True)
class Frame:
    """Geometry of a convolution's input in memory.

    Args:
        batch, high, wide: Of the pictures.
        kernel: (kh, kw).
        pad: Zero-point pixels around, the same on all sides.
        stride: Of the convolution.
        shared: Whether neighbours share the border between them: not where pictures have zero-points of their own.
    """

    batch: int
    high: int
    wide: int
    kernel: tuple[int, int] = (1, 1)
    pad: int = 0
    stride: int = 1
    shared: bool = True

    @property
    def _between(self) -> int:
        return self.pad * (1 if self.shared else 2)

    @property
    def pitch(self) -> int:
        """Rows of the frame from one row of pixels to the next."""
        return self.wide + self._between

    @property
    def height(self) -> int:
        """Rows of pixels from one picture to the next."""
        return self.high + self._between

    @property
    def rows(self) -> int:
        """Rows of the frame, one a pixel; the last row of pixels is border alone."""
        return (self.batch * self.height + self.pad + (self.pad > 0)) * self.pitch

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), whole = self.kernel, 2 * self.pad
        return (self.high + whole - kh) // self.stride + 1, (self.wide + whole - kw) // self.stride + 1


@dataclass(frozen=True)
class Config:
    """How a product is cut: tile sizes, rows of tiles that share a column, warps, pipeline stages, copies by the tensor
    memory accelerator, and whether a program goes through several tiles."""

    bm: int = 128
    bn: int = 128
    bk: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = True
    persistent: bool = False


@dataclass(frozen=True)
class Tables:
    """What turns sums into values: see docs/format.md.

    Args:
        scale, zero_point: Of the activation, float32 and uint8 or float32 ``[T, S]``, or ``[rows, S]`` (BY_ROW).
        times: int64: ``[1]`` (ONE_ROW), ``[samples]`` (BY_SAMPLE).
        kind: ONE_ROW, BY_SAMPLE or BY_ROW.
        weight_scale: float32 ``[N, S]``.
        weight_sum: int32 ``[S, N]``: of ``code - zero_point`` over each segment.
    """

    scale: Tensor
    zero_point: Tensor
    times: Tensor
    kind: int
    weight_scale: Tensor
    weight_sum: Tensor


@dataclass(frozen=True)
class Extra:
    """What is added before the one rounding: ``bias [N]``, ``shared [samples, N]``, ``residual`` like the output."""

    bias: Tensor | None = None
    shared: Tensor | None = None
    residual: Tensor | None = None


def fitting(config: Config, widths: tuple[int, ...], frame: Frame | None) -> Config:
    """The config with a block of columns that the segments can be cut into, and without what they do not allow."""
    taps = 1 if frame is None else frame.kernel[0] * frame.kernel[1]
    bk = config.bk
    if taps > 1 or len(widths) > 1:
        while any(width % bk for width in widths):
            bk //= 2
    tma = config.tma and (frame is None or frame.stride == 1) and bk >= 32
    return replace(config, bk=bk, tma=tma)


def product(
    a: Tensor, w: Tensor, tables: Tables, widths: tuple[int, ...], dtype: torch.dtype, *, frame: Frame | None = None,
    per_sample: int = 1, extra: Extra | None = None, config: Config | None = None, sums: Tensor | None = None,
) -> Tensor:
    """The output of a linear layer ``[M, N]`` or a convolution ``[B, H', W', N]``.

    Args:
        a: int8 ``[M, length_a]``, or a frame ``[frame.rows, length_a]``.
        w: int8 ``[N, length_w]``.
        widths: Padded channels of each segment.
        per_sample: Rows of a sample (linear layers).
        sums: int32 ``[S, M, N]`` to which the corrected sums are written, for tests.
    """
    from bitbrush.kernels import triton_int8_kernels as kernels

    extra, config = extra or Extra(), fitting(config or Config(), widths, frame)
    n = w.shape[0]
    if frame is None:
        m = out_rows = a.shape[0]
        shape: tuple[int, ...] = (m, n)
        spatial, (out_h, out_w), place = LINEAR, (1, 1), Frame(1, 1, 1)
    else:
        out_h, out_w = frame.out
        out_rows, place = frame.batch * out_h * out_w, frame
        spatial, shape = (FLAT if config.tma else GATHERED), (frame.batch, out_h, out_w, n)
        m = ((frame.batch - 1) * frame.height + out_h - 1) * frame.pitch + out_w if config.tma else out_rows
    y = torch.empty(shape, dtype=dtype, device=a.device)
    if not y.numel():
        return y
    left, right = _operands(a, w, config)
    tiles = -(-m // config.bm) * -(-n // config.bn)
    programs = min(tiles, processors(a.device)) if config.persistent else 0
    with torch.cuda.device_of(a):
        kernels.product[(programs or tiles,)](
            left, right, y, y if sums is None else sums, *(y if t is None else t for t in (
                extra.bias, extra.residual, extra.shared)),
            tables.scale, tables.zero_point, tables.times, tables.weight_scale, tables.weight_sum,
            m, n, out_rows, per_sample, place.pitch, place.height, out_h, out_w, place.stride, a.stride(0), w.stride(0),
            WIDTHS=widths, KH=place.kernel[0], KW=place.kernel[1], TABLE=tables.kind, SPATIAL=spatial, TMA=config.tma,
            BIAS=extra.bias is not None, RESIDUAL=extra.residual is not None, SHARED=extra.shared is not None,
            KEEP=sums is not None, BM=config.bm, BN=config.bn, BK=config.bk, GROUP=config.group, PROGRAMS=programs,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )
    return y


def _operands(a: Tensor, w: Tensor, config: Config) -> tuple[Any, Any]:
    if not config.tma:
        return a, w
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(a, [config.bm, config.bk]), TensorDescriptor.from_tensor(w, [config.bn, config.bk])
    )


def unpack(
    out: Tensor, data: Tensor, bits: int, zero_point: Tensor, order: Tensor | None, counts: tuple[int, ...],
    widths: tuple[int, ...], taps: int, halved: bool,
) -> None:
    """Write ``code - zero_point`` of one bit class (below 8 bits) into its rows of ``out`` int8 ``[N, K]``.

    Args:
        data: uint8 ``[N_b, row_bytes]``.
        zero_point: uint8 ``[N, S]``.
        order: The row of ``out`` of each packed row; None: the same.
        halved: Symmetric 1-bit rows.
    """
    from bitbrush.kernels import triton_int8_kernels as kernels

    length, rows, columns, height = out.shape[1], data.shape[0], 256, 16
    ends = tuple(accumulate(width * taps for width in widths))
    with torch.cuda.device_of(out):
        kernels.unpack[(-(-rows // height), -(-length // columns))](
            data, zero_point, data if order is None else order, out, rows, length, data.stride(0),
            *plane_starts(length, bits), zero_point.shape[1],
            ENDS=ends, REAL=tuple(zip(counts, widths, strict=True)), BITS=bits, ORDER=order is not None,
            HALVED=halved, BR=height, BK=columns, num_warps=4,
        )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
