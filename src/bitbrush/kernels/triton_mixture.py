"""Mixtures of quantizers (`bitbrush.numbers.mixture`) on CUDA: all members in one pass, forward and backward.

Tables (shares, scales, zero-points) may differ over samples, over channels, or both. ``x`` is seen as rows and columns
of memory so that an entry serves a row, or a column:

    no table of channels         a row is a sample, or all of x
    channels behind samples      a row is a channel of a sample (pictures in order)
    channels innermost           a column is a channel; a program stays in one sample (tokens, pictures channels last)

Backward writes dx, and for each table, member, entry and block a sum; torch adds the blocks, and the entries that share
a number. Nothing depends on the order in which blocks run, and there are no synchronisations.

Bits: forward and dx do what the torch form does in float32, in the order of the members, with
``enable_fp_fusion=False``, so they are equal. Reciprocals are IEEE divisions, as `bitbrush.numbers.codec.reciprocal`.

Importing this module does not import Triton: `build` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitbrush.errors import InternalError
from bitbrush.kernels.triton_fake import DTYPES, dense, works
from bitbrush.numbers.mixture import FusedMixture, Wanted

MOST_PROGRAMS = 65_535
"""Along the second and third dimension of a grid."""
BLOCK, EACH = 1024, 8
"""Values of a program, and of a thread: with more, backward needs so many registers that few programs run at once."""
COLUMNS = 32
"""Of a block whose columns are channels: few, so that few blocks of rows are left to add. Longer rows have a program
each: the tables of one row are read once a thread, those of several once a value."""


@dataclass(frozen=True)
class Layout:
    """How ``x`` lies in memory beside its tables: ``[samples, rows, columns]``.

    Args:
        samples: 1 where rows count samples, too.
        rows, columns: Of one of them.
        entries: (samples, channels) that tables are spread over: an entry each.
        channel: Dimension of channels in the tables; 0 where no table has any.
        along: Whether entries follow the columns.
    """

    samples: int
    rows: int
    columns: int
    entries: tuple[int, int]
    channel: int
    along: bool

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block, powers of two."""
        columns = min(_power(self.columns), COLUMNS if self.along else BLOCK)
        return 1 if columns > COLUMNS else min(_power(self.rows), BLOCK // columns), columns

    @property
    def warps(self) -> int:
        """Of a program."""
        rows, columns = self.block
        return max(1, rows * columns // (32 * EACH))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs over rows, columns and samples."""
        rows, columns = self.block
        return -(-self.rows // rows), -(-self.columns // columns), self.samples


@functools.cache
def build() -> FusedMixture | None:
    """The fused form, or None where Triton cannot build it."""
    def attempt() -> None:
        one = torch.ones((1, 1, 1), device="cuda")
        forward(one[0], one, one, one, 255)
        backward(one[0], one[0], one, one, one, 255, (True, True, True, True))

    return FusedMixture(fits, forward, backward) if works(attempt) else None


def fits(x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether the kernels take these shapes, dtypes and devices."""
    tables = (share, scale, zero_point)
    if not x.is_cuda or x.dtype not in DTYPES or any(t.dtype != torch.float32 or not t.is_cuda for t in tables):
        return False
    return layout(x, *tables) is not None


def layout(x: Tensor, *tables: Tensor) -> Layout | None:
    """How ``x`` ``[B, ..]`` lies beside tables ``[K, B or 1, ..]``; None where the kernels are not for it."""
    if x.ndim == 0 or x.numel() == 0 or not dense(x) or len({len(t) for t in tables}) > 1 or len(tables[0]) == 0:
        return None
    sizes = (1, *x.shape)
    if any(t.ndim != x.ndim + 1 or any(here not in (1, size) for here, size in zip(t.shape[1:], x.shape, strict=True))
           for t in tables):
        return None
    wide = sorted({d for t in tables for d in range(2, t.ndim) if t.shape[d] > 1})
    if len(wide) > 1:
        return None
    found = _of_channels(x, wide[0], sizes[wide[0]]) if wide else _of_samples(x, any(t.shape[1] > 1 for t in tables))
    return found if found is not None and max(found.grid[1:]) <= MOST_PROGRAMS else None


def _of_samples(x: Tensor, each: bool) -> Layout | None:
    count = len(x) if each else 1
    return Layout(1, count, x.numel() // count, (count, 1), 0, False) if _outermost(x) or count == 1 else None


def _of_channels(x: Tensor, channel: int, count: int) -> Layout | None:
    entries, each = (len(x), count), x.numel() // (len(x) * count)
    stride = x.stride(channel - 1)
    if not _outermost(x) or stride not in (1, each):
        return None
    if stride == 1:
        return Layout(len(x), each, count, entries, channel, True)
    return Layout(1, len(x) * count, each, entries, channel, False)


def _outermost(x: Tensor) -> bool:
    """Whether samples follow each other in memory."""
    return len(x) == 1 or x.stride(0) * len(x) == x.numel()


def forward(x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """The mixture in the dtype and layout of ``x``; see `bitbrush.numbers.mixture.FusedMixture`."""
    from bitbrush.kernels import triton_mixture_kernels as kernels

    how = _layout(x, share, scale, zero_point)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.forward[how.grid](x, out, share, scale, zero_point, **_numbers(how, top, share, scale, zero_point))
    return out


def backward(
    grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, top: int, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Gradients to x, share, scale and zero-point, of tables float32 in their shapes; None where not wanted."""
    from bitbrush.kernels import triton_mixture_kernels as kernels

    tables = (share, scale, zero_point)
    how = _layout(x, *tables)
    dx = torch.empty_like(x)  # has the strides of x, because x is dense
    if grad.stride() != dx.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(dx).copy_(grad)
    blocks = how.grid[0] if how.along else how.grid[1]
    part = torch.empty((sum(wanted[1:]), len(share), blocks, *how.entries), dtype=torch.float32, device=x.device)
    flags = dict(zip(("DX", "SHARE", "SCALE", "ZERO"), wanted, strict=True))
    with torch.cuda.device_of(x):
        kernels.backward[how.grid](grad, x, dx, part, *tables, **flags, **_numbers(how, top, *tables))
    parts = iter(part)
    sums = (_summed(next(parts), t, how) if want else None for t, want in zip(tables, wanted[1:], strict=True))
    return (dx if wanted[0] else None, *sums)


def _summed(part: Tensor, table: Tensor, how: Layout) -> Tensor:
    """Sums ``[K, blocks, samples, channels]`` in the shape of a table."""
    kept = (1, table.shape[1], table.shape[how.channel] if how.channel else 1)
    over = [d for d, size in enumerate(kept, 1) if part.shape[d] != size]
    return (part.sum(dim=over) if over else part).reshape(table.shape)


def _layout(x: Tensor, *tables: Tensor) -> Layout:
    how = layout(x, *tables)
    if how is None:
        raise InternalError("tables of a mixture do not lie beside the tensor", where="triton_mixture",
                            why=f"{[list(t.shape) for t in tables]} for {list(x.shape)}")
    return how


def _numbers(how: Layout, top: int, *tables: Tensor) -> dict[str, Any]:
    """What the kernels are given besides tensors, by name; tables are read where they are, whatever their strides."""
    rows, columns = how.block
    strides = {
        f"{name}_{axis}": table.stride(d) if d and table.shape[d] > 1 else 0
        for name, table in zip(("share", "scale", "zero"), tables, strict=True)
        for axis, d in (("b", 1), ("c", how.channel))
    }
    steps = {f"{name}_k": table.stride(0) for name, table in zip(("share", "scale", "zero"), tables, strict=True)}
    return {
        "rows": how.rows, "columns": how.columns, "channels": how.entries[1], "top": float(top), **strides, **steps,
        "COUNT": len(tables[0]), "ALONG": how.along, "BR": rows, "BC": columns, "num_warps": how.warps,
        "enable_fp_fusion": False,
    }


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()
