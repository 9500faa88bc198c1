"""Launches the int8 products of layers and convolutions. The encode: `triton_encode`; weights: `triton_unpack`.

**Product.** ``a`` holds int8 codes less 128, rows of ``length_a`` bytes; ``w`` int8 ``[N, K]``, K in the order
(segment, kh, kw, channel) of a packed row. Each segment has an int32 accumulator and a scale of its own; the epilogue
is float32 and adds bias, a row a sample (a time embedding) and a residual before the one rounding. Layers of one size
that read the same input, or inputs of one shape, can be one product (JOINED); GEGLU and the next layer's encode can be
part of it (`gated`).

**Convolutions** read a *frame*: the input's pixels in channels-last order with a border that holds the zero-point's
code. Rows of pixels share their border: a frame has ``pad`` pixels before each row of pixels and ``pad`` rows before
each picture, and what follows a row is what precedes the next. Kernel position (i, j) is then the input ``i * pitch +
j`` rows further on, so that a convolution is a product with kh * kw shifts and no bounds inside. Either m counts the
frame's rows (copied by the tensor memory accelerator; what falls on the border is not stored), or outputs (gathered).

Importing this module does not import Triton.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitbrush.kernels import gluon_int8, triton_split
from bitbrush.kernels.launching import Described, Launch
from bitbrush.numbers.packing import padded

LINEAR, FLAT, GATHERED = 0, 1, 2
HALVES = 2
"""In `_Cut.described`, behind codes and weights: the weights as two halves of rows."""
ONE_ROW, BY_SAMPLE, BY_ROW, JOINED, STACKED = 0, 1, 2, 3, 4
"""Which row of the activation's tables serves an output: the same for all, one a sample, one a row, or the same for all
outputs of a layer where several are one product, with tables of their own (JOINED) or in one tensor (STACKED)."""


class Frame(NamedTuple):
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
    def lines(self) -> int:
        """Rows of the frame from that of the first output to that of the last, without a stride."""
        return ((self.batch - 1) * self.height + self.out[0] - 1) * self.pitch + self.out[1]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), whole = self.kernel, 2 * self.pad
        return (self.high + whole - kh) // self.stride + 1, (self.wide + whole - kw) // self.stride + 1


@dataclass(frozen=True)
class Config:
    """How a product is cut: tile sizes, rows of tiles that share a column, warps, pipeline stages, whether the tensor
    memory accelerator copies, how many programs are to fit a processor at once, where it is written out in Gluon its
    flow (`gluon_int8`), and how many programs share the sums of a tile (`triton_split`)."""

    bm: int = 128
    bn: int = 128
    bk: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = True
    together: int = 2
    flow: str = ""
    split_k: int = 1

    @property
    def registers(self) -> int | None:
        """Of a thread, at most, where the compiler has to be told: it takes 130 of them for convolutions in tiles of
        128 x 128, and of 65536 in a processor that leaves one program what two could share."""
        most = 65536 // (32 * self.warps * self.together)
        return most if most <= 128 else None


_USUAL = Config()


class Tables(NamedTuple):
    """What turns sums into values: see docs/format.md.

    Args:
        scale, zero_point: Of the activation, float32 and uint8 or float32 ``[T, S]``, ``[rows, S]`` (BY_ROW), or
            ``[parts, T]`` (STACKED, one segment).
        times: int64: ``[1]`` (ONE_ROW, JOINED, STACKED), ``[samples]`` (BY_SAMPLE).
        kind: One of these.
        weight_scale: float32 ``[N, S]``.
        weight_sum: int32 ``[S, N]``: of ``code - zero_point`` over each segment.
        others: (scale, zero_point, times) of the layers after the first (JOINED).
    """

    scale: Tensor
    zero_point: Tensor
    times: Tensor
    kind: int
    weight_scale: Tensor
    weight_sum: Tensor
    others: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()

    @property
    def parts(self) -> int:
        """Layers in one product."""
        return self.scale.shape[0] if self.kind == STACKED else 1 + len(self.others)


class Extra(NamedTuple):
    """What is added before the one rounding: ``bias [N]``, ``shared [samples, N]`` (or multiplied by: a ``gate``),
    ``residual`` like the output."""

    bias: Tensor | None = None
    shared: Tensor | None = None
    residual: Tensor | None = None
    gate: bool = False


class Next(NamedTuple):
    """What encodes the output of a gated product for the layer that follows: `encode` with one row of the tables."""

    inverse: Tensor
    zero_point: Tensor
    times: Tensor
    top: int
    factor: Tensor | None = None


def fitting(config: Config, widths: tuple[int, ...], frame: Frame | None) -> Config:
    """The config with a block of columns that the segments can be cut into, and without what they do not allow.

    A block may go beyond the end of a single segment, where ``a`` has bounds: convolutions pay for it at every tap, so
    they do where it is at most a tenth; of several, those in Gluon. Of narrower blocks more are on their way.
    """
    taps, alone = 1 if frame is None else frame.kernel[0] * frame.kernel[1], len(widths) == 1
    ragged = bool(config.flow) and not alone
    bk = gluon_int8.block(config.bk, widths) if ragged else config.bk
    while not ragged and any(width % bk for width in widths) and not (
        alone and (taps == 1 or -(-widths[0] // bk) * bk * 10 <= widths[0] * 11)
    ):
        bk //= 2
    splits = alone and config.flow != gluon_int8.TURNS
    split_k = triton_split.parts(config.split_k, taps * -(-widths[0] // bk)) if splits else 1
    if config.flow:
        return gluon_int8.fitted(replace(config, split_k=split_k), bk)
    tma = config.tma and (frame is None or frame.stride == 1) and bk >= 32
    return replace(config, bk=bk, tma=tma, stages=max(config.stages, min(config.stages * config.bk // bk, 8)),
                   split_k=split_k)  # fmt: skip


def product(
    a: Tensor, w: Tensor, tables: Tables, widths: tuple[int, ...], dtype: torch.dtype, *, frame: Frame | None = None,
    per_sample: int = 1, extra: Extra | None = None, config: Config | None = None, sums: Tensor | None = None,
) -> Tensor:
    """The output of a linear layer ``[M, N]``, of several ``[parts, M, N]``, or of a convolution ``[B, H', W', N]``.

    Args:
        a: int8 ``[M, length_a]``, or a frame ``[frame.rows, length_a]``; the rows of each layer in turn (JOINED).
        w: int8 ``[N, length_w]``.
        widths: Padded channels of each segment.
        per_sample: Rows of a sample (linear layers).
        sums: int32 ``[S, M, N]`` to which the corrected sums are written, for tests (of one part).
    """
    extra, config = extra or Extra(), config or _USUAL
    n, kind, parts = w.shape[0], tables.kind, tables.parts
    per_sample = tables.scale.shape[1] if kind == STACKED else per_sample  # rows of a part's table
    key = (a.shape, a.stride(), w.shape, w.stride(), widths, frame, per_sample, kind, parts,
           *[t is None for t in extra[:3]], extra.gate, sums is None, a.device, early(a.device))  # fmt: skip
    known = _PRODUCTS.get(key)
    if known is None or known.asked is not config:
        known = _PRODUCTS[key] = _cut_product(a, w, tables, widths, frame, per_sample, extra, config, sums is not None)
    shape: tuple[int, ...] = (a.shape[0], n) if frame is None else (frame.batch, *frame.out, n)
    if kind in (JOINED, STACKED):
        shape = (parts, a.shape[0] // parts, n // parts)
    y = torch.empty(shape, dtype=dtype, device=a.device)
    if not y.numel():
        return y
    bias, shared, residual = (y if t is None else t for t in extra[:3])
    into = kept = y if sums is None else sums
    if known.merge is not None:
        into = torch.empty((known.split_k, y.numel() // n, n), dtype=torch.int32, device=a.device)
    given: tuple[Any, ...] = tables[:3]
    of_weight = (tables.weight_scale, tables.weight_sum)
    tensors = (a, w, y, into, bias, residual, shared, *given, *of_weight)
    if kind == JOINED:
        given = tuple(zip(given, *tables.others, strict=True))
        tensors = (*tensors, *[t for other in tables.others for t in other])
    known.launch(tensors, (*known.operands(a, w), y, into, bias, residual, shared, *given, *of_weight))
    if known.merge is not None:
        known.merge((into, y, kept, bias, residual, shared, *given, *of_weight))
    return y


class _Cut(NamedTuple):
    """A product as it is launched: by which config, what describes which of its operands where they are copied so, and
    what adds its parts where it is split."""

    asked: Config
    launch: Launch
    described: tuple[tuple[int, Described], ...]
    split_k: int = 1
    merge: Launch | None = None

    def operands(self, a: Tensor, w: Tensor) -> tuple[Any, ...]:
        """Codes and weights as the kernel takes them."""
        if not self.described:
            return a, w
        return tuple([describe(_paired(w) if i == HALVES else (a, w)[i]) for i, describe in self.described])


_PRODUCTS: dict[Any, _Cut] = {}
_GATED: dict[Any, _Cut] = {}


def _cut_product(
    a: Tensor, w: Tensor, tables: Tables, widths: tuple[int, ...], frame: Frame | None, per_sample: int, extra: Extra,
    asked: Config, keep: bool,
) -> _Cut:
    from bitbrush.kernels import triton_int8_kernels as kernels

    config = fitting(asked if tables.kind == ONE_ROW else replace(asked, split_k=1), widths, frame)
    parts = tables.parts
    if frame is None:
        m = out_rows = a.shape[0] // parts
        spatial, (out_h, out_w), place = LINEAR, (1, 1), Frame(1, 1, 1)
    else:
        out_h, out_w = frame.out
        out_rows, place = frame.batch * out_h * out_w, frame
        spatial = FLAT if config.tma else GATHERED
        m = frame.lines if config.tma else out_rows
    columns = w.shape[0] // parts
    place_of = (m, columns, out_rows, m if parts > 1 else 0, per_sample, place.pitch, place.height, out_h, out_w)
    width = widths[0] if len(widths) == 1 else widths
    options = {
        "COUNT": len(widths), "WIDTH": widths[0] if frame is not None and len(widths) == 1 else 0,
        "KH": place.kernel[0], "KW": place.kernel[1], "TABLE": tables.kind, "PARTS": parts, "SPATIAL": spatial,
        "BIAS": extra.bias is not None, "RESIDUAL": extra.residual is not None, "KEEP": keep,
        "SHARED": (extra.shared is not None) << extra.gate, "SPLIT_K": config.split_k,
    }
    outputs = (out_rows, columns, per_sample if frame is None else out_h * out_w)
    merge = triton_split.merge(outputs, options, launched(a.device)) if config.split_k > 1 else None
    tiles = -(-m // config.bm) * -(-columns // config.bn) * parts * config.split_k
    if config.flow:
        made = gluon_int8.product(a, w, config, (*place_of, width), tiles, options, processors(a.device))
        return _Cut(asked, *made, config.split_k, merge)
    numbers = (*place_of, place.stride, a.stride(0), w.stride(0), width)
    launch = Launch(kernels.product, (tiles,), numbers, {**options, "TMA": config.tma, **_cut(config, a.device)})
    return _Cut(asked, launch, _operands(a, w, config), config.split_k, merge)


def gated(
    a: Tensor, w: Tensor, tables: Tables, width: int, dtype: torch.dtype, then: Next, *, bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Codes less 128 of ``hidden * gelu(gate)``, int8 ``[M, padded(N)]``.

    Args:
        a: int8 ``[M, width]``.
        w: int8 ``[2 N, width]``: N rows of hidden channels, then N of gates; ``bias`` ``[2 N]`` likewise.
        tables: ONE_ROW.
        dtype: To which product, gelu and their product are rounded.
    """
    config = config or _USUAL
    key = (a.shape, a.stride(), w.shape, w.stride(), width, dtype, then.top, bias is None, then.factor is None,
           a.device, early(a.device))  # fmt: skip
    known = _GATED.get(key)
    if known is None or known.asked is not config:
        known = _GATED[key] = _cut_gated(a, w, width, dtype, then, bias is not None, config)
    y = torch.empty((a.shape[0], padded((w.shape[0] // 2,))[0]), dtype=torch.int8, device=a.device)
    if not y.numel():
        return y
    rest = (y, y if bias is None else bias, *tables[:3], tables.weight_scale, tables.weight_sum,
            y if then.factor is None else then.factor, then.inverse, then.zero_point, then.times)  # fmt: skip
    known.launch((a, w, *rest), (*known.operands(a, w), *rest))
    return y


def _cut_gated(
    a: Tensor, w: Tensor, width: int, dtype: torch.dtype, then: Next, bias: bool, asked: Config
) -> _Cut:
    import triton.language as tl

    from bitbrush.kernels import triton_int8_kernels as kernels

    config = fitting(asked, (width,), None)
    m, n = a.shape[0], w.shape[0] // 2
    (length,) = padded((n,))
    options = {"BIAS": bias, "FACTOR": then.factor is not None, "TYPE": getattr(tl, str(dtype).removeprefix("torch."))}
    tiles = -(-m // config.bm) * -(-length // (config.bn // 2))
    if config.flow:
        numbers: tuple[Any, ...] = (float(then.top), m, n, length, width)
        return _Cut(asked, *gluon_int8.gated(a, w, config, numbers, tiles, options, processors(a.device)))
    numbers = (float(then.top), m, n, a.stride(0), w.stride(0), length, width)
    launch = Launch(kernels.gated, (tiles,), numbers, {**options, "TMA": config.tma, **_cut(config, a.device)})
    return _Cut(asked, launch, _operands(a, w, config, paired=True))


def _cut(config: Config, device: torch.device) -> dict[str, Any]:
    return {
        "BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP": config.group, "THREADS": 32 * config.warps,
        "num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers,
        "enable_fp_fusion": False, **launched(device),
    }


def launched(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that can be launched `early`."""
    return {"EARLY": True, "launch_pdl": True} if early(device) else {"EARLY": False}


@cache
def early(device: torch.device) -> bool:
    """Whether a kernel is launched while the one before it still runs, for whose end it then waits itself: this hides
    the time of a launch. ``BITBRUSH_EARLY=1``, on GPUs that can; asked once."""
    return os.environ.get("BITBRUSH_EARLY") == "1" and overlaps(device)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a GPU can launch a kernel while the one before it still runs."""
    return device.type == "cuda" and torch.version.cuda is not None and _capability(device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _operands(a: Tensor, w: Tensor, config: Config, paired: bool = False) -> tuple[tuple[int, Described], ...]:
    """What describes the operands for copies (nothing: pointers do): two halves of w's rows at once where paired."""
    if not config.tma or not a.numel() or not w.numel():
        return ()
    left = Described(a, [config.bm, config.bk])
    if paired:
        return (0, left), (HALVES, Described(_paired(w), [2, config.bn // 2, config.bk]))
    return (0, left), (1, Described(w, [config.bn, config.bk]))


def _paired(w: Tensor) -> Tensor:
    return w.unflatten(0, (2, -1))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
