"""decode(encode(x)) on CUDA in one pass, and its straight-through backward in one pass; of activations and of weights.

The kernels for activations see ``x`` as ``[R, M]``: R = 1 with one scale for the tensor, R = batch with one scale a
sample. Forward writes the decoded values in the dtype of ``x``. Backward reads grad and ``x``, computes the codes
again, writes dx and, where scales or zero-points are trained, one partial sum a block; the partial sums are added by
torch. Nothing depends on the order in which blocks run, so results are the same on every run, and there are no
synchronisations: both can be captured in a CUDA graph.

Weights come flat, those of many layers together (`bitbrush.numbers.straight_through.Rows`): one program a row, which
goes through it block by block and so has the sum for the row's scale at its end.

Bits: the operations are those of `bitbrush.numbers.codec` in float32 in the same order. The product with the stored
reciprocal must not be contracted with what follows, hence ``enable_fp_fusion=False``; rounding is half to even, made
from ``floor`` so that Triton's interpreter runs the same code. ``benchmarks/check_triton_fake.py`` compares the bits on
a GPU.

Importing this module does not import Triton: `build` does.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

from bitbrush.numbers.straight_through import Fused, FusedWeight, Rows

BLOCK = 2048
WEIGHT_BLOCK = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def build() -> Fused | None:
    """The fused form, or None where it cannot be built (Triton needs a C compiler at run time)."""
    def attempt() -> None:
        one = torch.ones((1, 1), device="cuda")
        forward(one, one, one, one, 255)
        backward(one, one, one, one, one, 255, True)

    return Fused(fits, forward, backward) if works(attempt) else None


@functools.cache
def build_weight() -> FusedWeight | None:
    """The fused form for weights, or None where it cannot be built."""
    def attempt() -> None:
        one = torch.ones(1, device="cuda")
        rows = Rows(one.long() - 1, one.int(), 1, one, one, one.bool())
        weight_forward(one, one, one, rows, one.byte())
        weight_backward(one, one, one, one, rows, one.byte(), True)

    return FusedWeight(weight_forward, weight_backward) if works(attempt) else None


def works(attempt: Callable[[], None]) -> bool:
    """Whether Triton is there and compiles what is attempted."""
    if not has_triton_package() or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    try:
        from bitbrush.kernels.triton_fake_kernels import ERRORS
    except ImportError:
        return False
    try:
        attempt()
    except (RuntimeError, OSError, subprocess.SubprocessError, *ERRORS):
        return False
    return True


def fits(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """One scale and zero-point a tensor or a sample; ``x`` on CUDA, without gaps in memory, of a dtype known here."""
    if not x.is_cuda or x.dtype not in DTYPES or x.numel() == 0:
        return False
    count = rows(x, scale)
    if count == 0 or rows(x, zero_point) != count or not dense(x):
        return False
    return count == 1 or x.stride(0) * count == x.numel()


def dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.ndim) if x.shape[d] > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def rows(x: Tensor, table: Tensor) -> int:
    """R: 1, or the batch size where the table has one entry a sample; 0 for any other table."""
    if table.numel() == 1:
        return 1
    return x.shape[0] if table.ndim == x.ndim and table.numel() == table.shape[0] == x.shape[0] else 0


def forward(x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """``decode(encode(x))`` in the dtype and layout of ``x``; see `bitbrush.numbers.straight_through.Fused`."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    count, length, grid = _grid(x, scale)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.forward[grid](
            x, out, *_tables(count, scale, inverse, zero_point), length, float(top), BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, top: int, tables: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dscale, dzero); the last two float32 in the shape of ``scale``, or None unless ``tables``."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    count, length, grid = _grid(x, scale)
    dx = torch.empty_like(x)  # has the strides of x, because x is dense
    if grad.stride() != dx.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(dx).copy_(grad)
    partial = torch.empty((2, count, grid[0] if tables else 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.backward[grid](
            grad, x, dx, partial[0], partial[1], *_tables(count, scale, inverse, zero_point), length, float(top),
            TABLES=tables, BLOCK=BLOCK, enable_fp_fusion=False,
        )
    if not tables:
        return dx, None, None
    sums = partial.sum(dim=2) if partial.shape[2] > 1 else partial[..., 0]
    return dx, sums[0].reshape(scale.shape), sums[1].reshape(scale.shape)


def weight_forward(weight: Tensor, scale: Tensor, inverse: Tensor, rows: Rows, offset: Tensor | None) -> Tensor:
    """``decode(encode_weight(weight))``, flat; see `bitbrush.numbers.straight_through.FusedWeight`."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    weight, scale = weight.detach().contiguous(), scale.detach().contiguous()
    out = torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        kernels.weight_forward[(len(rows.start),)](
            weight, weight if offset is None else offset, out, rows.start, rows.length, scale, inverse,
            rows.zero_point, rows.top, rows.top if rows.binary is None else rows.binary.view(torch.uint8),
            OFFSET=offset is not None, BINARY=rows.binary is not None, BLOCK=_block(rows), enable_fp_fusion=False,
        )
    return out


def weight_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, inverse: Tensor, rows: Rows, offset: Tensor | None, tables: bool
) -> tuple[Tensor, Tensor | None]:
    """(dweight, dscale), flat; the latter None unless ``tables``."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    weight, grad = weight.detach().contiguous(), grad.contiguous()
    dw, ds = torch.empty_like(weight), torch.empty_like(scale) if tables else None
    with torch.cuda.device_of(weight):
        kernels.weight_backward[(len(rows.start),)](
            grad, weight, weight if offset is None else offset, dw, dw if ds is None else ds, rows.start, rows.length,
            inverse, rows.zero_point, rows.top, rows.top if rows.binary is None else rows.binary.view(torch.uint8),
            OFFSET=offset is not None, BINARY=rows.binary is not None, TABLES=tables, BLOCK=_block(rows),
            enable_fp_fusion=False,
        )
    return dw, ds


def _block(rows: Rows) -> int:
    """Elements a program takes at a time: a power of two, not much more than the longest row."""
    return min(WEIGHT_BLOCK, 1 << max(rows.longest - 1, 1).bit_length())


def _grid(x: Tensor, scale: Tensor) -> tuple[int, int, tuple[int, int]]:
    count = rows(x, scale)
    length = x.numel() // count
    return count, length, (-(-length // BLOCK), count)


def _tables(count: int, *tables: Tensor) -> Any:
    return (table.detach().float().reshape(count).contiguous() for table in tables)
