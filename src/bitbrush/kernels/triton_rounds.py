"""Round trips without gradients on CUDA in one pass, where `bitbrush.kernels.triton_fake` does not serve: scales that
differ over channels, pixels or tokens, and ``log2`` grids.

Tables. ``x`` lies in memory as ``[samples, rows, columns]``: either the entries of the table follow the columns
(channels of tokens, pixels of a picture), or each stretch of columns has one entry (channels of a picture, tokens). No
index is divided a value, but one a row.

Logarithms. ``x`` ``[.., T, T']`` with one delta for a stretch of it; the first columns may stay as they are. The value
is written in the dtype that the next product wants, which else takes another pass.

Bits: the operations of `bitbrush.numbers.codec` in float32 in the same order, ``enable_fp_fusion=False``, divisions
rounded as IEEE has it, subnormal numbers kept. A test on a GPU compares them.

Importing this module does not import Triton: `build` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitbrush.errors import InternalError
from bitbrush.kernels.triton_fake import BLOCK, DTYPES, dense, works

MOST_SAMPLES = 65_535
"""Programs along the last dimension of a grid."""
LEAST_COLUMNS, MOST_COLUMNS = 32, 512
"""Of a block: below, stretches are too short to be read at full speed."""


@dataclass(frozen=True)
class Rounds:
    """The launchers.

    Args:
        fits: ``(x, scale, zero_point) -> bool``: whether `tables` takes these shapes, dtypes and devices.
        tables: ``(x, scale, inverse_scale, zero_point, top) -> decode(encode(x))`` in the dtype of ``x``.
        fits_log2: ``(x, delta) -> bool``: whether `log2` takes them.
        log2: ``(x, delta, top, exempt, dtype) -> round_trip_log2(x)`` in ``dtype``, but the first columns as they are.
    """

    fits: Callable[[Tensor, Tensor, Tensor], bool]
    tables: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    fits_log2: Callable[[Tensor, Tensor], bool]
    log2: Callable[[Tensor, Tensor, int, int, torch.dtype], Tensor]


@dataclass(frozen=True)
class Matrix:
    """How ``x`` lies in memory beside a table: ``[samples, rows, columns]``.

    Args:
        entries: Of the table, for a sample.
        along: Whether they follow the columns (``entries == columns``); else they follow the rows, again and again.
    """

    samples: int
    rows: int
    columns: int
    entries: int
    along: bool


@functools.cache
def build() -> Rounds | None:
    """The launchers, or None where Triton cannot build them."""
    def attempt() -> None:
        one = torch.ones((1, 2, 1), device="cuda")
        tables(one, one, one, one, 255)
        log2(one[None], one[:, :1, :, None], 255, 0, torch.bfloat16)

    return Rounds(fits, tables, fits_log2, log2) if works(attempt) else None


# ---- tables ----------------------------------------------------------------------------------------------------------
def fits(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether scale and zero-point have one shape, and entries that lie beside those of ``x`` (`matrix`)."""
    if not x.is_cuda or x.dtype not in DTYPES or x.numel() == 0 or scale.shape != zero_point.shape:
        return False
    return matrix(x, scale) is not None


def matrix(x: Tensor, table: Tensor) -> Matrix | None:
    """How ``x`` lies beside a table ``[B or 1, ..]`` with as many dimensions; None where it does not, or where one
    entry serves a sample (`bitbrush.kernels.triton_fake`)."""
    if x.ndim < 2 or table.ndim != x.ndim or not dense(x):
        return None
    if any(here not in (1, size) for here, size in zip(table.shape, x.shape, strict=True)):
        return None
    samples = table.shape[0]
    if samples > MOST_SAMPLES or (samples > 1 and x.stride(0) * samples != x.numel()):
        return None
    fast = sorted((d for d in range(x.ndim) if x.shape[d] > 1), key=x.stride)
    wide = [d for d in range(x.ndim - 1, 0, -1) if table.shape[d] > 1]
    if not wide:
        return None
    place = fast.index(wide[0])
    if fast[place : place + len(wide)] != wide:
        return None
    inner, entries = math.prod(x.shape[d] for d in fast[:place]), table[0].numel()
    columns = entries if inner == 1 else inner
    return Matrix(samples, x.numel() // (samples * columns), columns, entries, inner == 1)


def tables(x: Tensor, scale: Tensor, inverse: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """``decode(encode(x))`` in the dtype and layout of ``x``, for what `fits`."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    how = matrix(x, scale)
    if how is None:
        raise InternalError("a table of scales does not lie beside the tensor", where="triton_rounds.tables",
                            why=f"{list(scale.shape)} for {list(x.shape)}")
    columns = _columns(how.columns)
    rows = BLOCK // columns
    out = torch.empty_like(x)
    flat = (t.detach().float().contiguous() for t in (scale, inverse, zero_point))
    with torch.cuda.device_of(x):
        kernels.tables[(-(-how.rows // rows), -(-how.columns // columns), how.samples)](
            x, out, *flat, how.rows, how.columns, how.entries, float(top), ALONG=how.along, BR=rows, BC=columns,
            enable_fp_fusion=False,
        )
    return out


def _columns(count: int) -> int:
    """Columns of a block: the largest power of two that divides them, where that is not too small."""
    whole = min(count & -count, MOST_COLUMNS)
    return whole if whole >= LEAST_COLUMNS else min(1 << (count - 1).bit_length(), MOST_COLUMNS)


# ---- logarithms ------------------------------------------------------------------------------------------------------
def fits_log2(x: Tensor, delta: Tensor) -> bool:
    """``x`` contiguous on CUDA, of a dtype known here; one delta for all, or for each index of leading dimensions."""
    if not x.is_cuda or x.dtype not in DTYPES or x.numel() == 0 or not x.is_contiguous():
        return False
    return _stretches(x, delta) > 0


def _stretches(x: Tensor, delta: Tensor) -> int:
    """Of how many stretches of ``x`` delta ``[.., 1, 1]`` has one entry each; 0 where it is something else."""
    if delta.numel() == 1:
        return 1
    leading = 1 + max(d for d, size in enumerate(delta.shape) if size > 1)
    known = delta.ndim == x.ndim and delta.shape[:leading] == x.shape[:leading]
    return delta.numel() if known and delta.numel() <= MOST_SAMPLES else 0


def log2(x: Tensor, delta: Tensor, top: int, exempt: int, dtype: torch.dtype) -> Tensor:
    """``round_trip_log2(x, delta, top)`` in ``dtype``; the first ``exempt`` columns as they are. For what fits."""
    from bitbrush.kernels import triton_fake_kernels as kernels

    count = _stretches(x, delta)
    length = x.numel() // count
    out = torch.empty_like(x, dtype=dtype)
    with torch.cuda.device_of(x):
        kernels.log2[(-(-length // BLOCK), count)](
            x, out, delta.detach().float().contiguous(), length, x.shape[-1], top, EXEMPT=exempt, BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return out
