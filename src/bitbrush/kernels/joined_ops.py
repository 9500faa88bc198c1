"""Products that take a neighbour's work with them, as torch ops: Triton on CUDA, the definition elsewhere.

    bitbrush::int8_joined    layers of one input and one size as one product: queries, keys and values
    bitbrush::int8_stacked   the same, of many, with their tables in one tensor: all readers of the prompt
    bitbrush::int8_encode_each    one input's codes for many layers, or those of an input each
    bitbrush::int8_gated     a product, GEGLU of its two halves, and the codes of the next layer

They are for linear layers whose activation tables have one row at a time (ONE_ROW): `scale` and `inverse` float32
``[T, S]``, `zero_point` uint8 or float32 ``[T, S]``, `times` int64 ``[1]``; those of many layers ``[layers, T]``. All
but `int8_joined` are for layers of one sum (S = 1). They give the same integers and the same
roundings as `int8_ops` one after the other, which is their definition here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from bitbrush.kernels import direct, int8_ops, triton_encode, triton_int8, tuning
from bitbrush.kernels.triton_int8 import JOINED, ONE_ROW, STACKED, Config, Extra, Next, Tables
from bitbrush.numbers import packing

_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "int8_joined(Tensor a, Tensor w, Tensor[] scale, Tensor[] zero_point, Tensor[] times, Tensor weight_scale, "
    "Tensor weight_sum, int[] widths, int parts, Tensor? bias, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "int8_stacked(Tensor a, Tensor w, Tensor scale, Tensor zero_point, Tensor times, Tensor weight_scale, "
    "Tensor weight_sum, int width, Tensor? bias, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "int8_encode_each(Tensor x, Tensor inverse, Tensor zero_point, Tensor times, int top, Tensor? factor) -> Tensor"
)
_LIBRARY.define(
    "int8_gated(Tensor a, Tensor w, Tensor scale, Tensor zero_point, Tensor times, Tensor weight_scale, "
    "Tensor weight_sum, int width, Tensor? bias, Tensor next_inverse, Tensor next_zero_point, Tensor next_times, "
    "int next_top, Tensor? factor, ScalarType dtype) -> Tensor"
)


# ---- joined ----------------------------------------------------------------------------------------------------------
def _joined_cuda(
    a: Tensor, w: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor], weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], parts: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    _divides(w, scale, parts)
    first, *others = zip(scale, zero_point, times, strict=True)
    tables = Tables(*first, JOINED, weight_scale, weight_sum, tuple(others))
    return _tuned(a, w, tables, tuple(widths), bias, dtype)


def _tuned(
    a: Tensor, w: Tensor, tables: Tables, widths: tuple[int, ...], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product ``[parts, M, N]`` of several layers, in its fastest cut."""

    def run(config: Config) -> Tensor:
        return triton_int8.product(a, w, tables, widths, dtype, extra=Extra(bias), config=config)

    parts = tables.parts
    problem = tuning.Problem(a.shape[0] // parts, w.shape[0], widths, 1, 1, parts)
    return run(tuning.config(problem, a.device, run))


def _divides(w: Tensor, scale: list[Tensor], parts: int) -> None:
    if w.shape[0] % parts or len(scale) != parts or parts < 2:
        raise ValueError(f"{parts} parts of {w.shape[0]} rows with {len(scale)} tables")


def _joined_plain(
    a: Tensor, w: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor], weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], parts: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    """Part by part.

    Args:
        a: int8 ``[parts * M, K]``: the codes of part p are rows ``p * M`` and following.
        w: int8 ``[parts * N, K]``.
        scale, zero_point, times: Of each part's codes.
        weight_scale: float32 ``[parts * N, S]``.
        weight_sum: int32 ``[S, parts * N]``.
        widths: Padded channels of each sum, the same for all parts; together K.
        bias: ``[parts * N]``.

    Returns:
        ``[parts, M, N]``: what each gives lies by itself, as libraries' attention wants it (of queries, keys and values
        side by side torch copies two).
    """
    _divides(w, scale, parts)
    return _one_by_one(a, w, scale, zero_point, times, weight_scale, weight_sum, widths, bias, dtype)


def _one_by_one(
    a: Tensor, w: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor], weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    parts = len(scale)
    inputs, n, out = a.chunk(parts), w.shape[0] // parts, []
    for p in range(parts):
        rows = slice(p * n, (p + 1) * n)
        out.append(int8_ops._product_plain(
            inputs[p], w[rows], scale[p], zero_point[p], times[p], ONE_ROW, weight_scale[rows], weight_sum[:, rows],
            widths, [], 1, None if bias is None else bias[rows], None, None, dtype,
        ))
    return torch.stack(out)


# ---- stacked ---------------------------------------------------------------------------------------------------------
def _stacked_cuda(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    return _tuned(a, w, Tables(scale, zero_point, times, STACKED, weight_scale, weight_sum), (width,), bias, dtype)


def _stacked_plain(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    """See `_joined_plain`; ``scale``, ``zero_point`` ``[parts, T]``, ``times`` ``[1]`` for all."""
    scales, zeros = ([row[:, None] for row in table] for table in (scale, zero_point))
    return _one_by_one(a, w, scales, zeros, [times] * len(scale), weight_scale, weight_sum, [width], bias, dtype)


def _stacked_shape(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    parts = scale.shape[0]
    return a.new_empty((parts, a.shape[0] // parts, w.shape[0] // parts), dtype=dtype)


def _each_cuda(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None
) -> Tensor:
    return triton_encode.encode_each(x.contiguous(), inverse, zero_point, times, top, factor)


def _each_plain(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None
) -> Tensor:
    """int8 codes less 128 ``[P * R, padded(C)]`` of ``x [R, C]`` for P layers, or of ``x [P, R, C]``, an input of each.

    Args:
        inverse, zero_point: ``[P, T]``.
        factor: float32 ``[P, C]``.
    """
    factors: list[Tensor | None] = [None] * len(inverse) if factor is None else list(factor)
    inputs = x if x.ndim == 3 else [x] * len(inverse)
    return torch.cat([
        int8_ops._encode_plain(own, i[:, None], z[:, None], times, ONE_ROW, [x.shape[-1]], top, [], 1, f)
        for own, i, z, f in zip(inputs, inverse, zero_point, factors, strict=True)
    ])  # fmt: skip


def _each_shape(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None
) -> Tensor:
    return x.new_empty((inverse.shape[0] * x.shape[-2], *packing.padded((x.shape[-1],))), dtype=torch.int8)


# ---- gated -----------------------------------------------------------------------------------------------------------
def _gated_cuda(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, next_inverse: Tensor, next_zero_point: Tensor, next_times: Tensor, next_top: int,
    factor: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    tables = Tables(scale, zero_point, times, ONE_ROW, weight_scale, weight_sum)
    then = Next(next_inverse, next_zero_point, next_times, next_top, factor)

    def run(config: Config) -> Tensor:
        return triton_int8.gated(a, w, tables, width, dtype, then, bias=bias, config=config)

    problem = tuning.Problem(a.shape[0], w.shape[0], (width,), 1, 1, gated=True)
    return run(tuning.config(problem, a.device, run))


def _gated_plain(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, next_inverse: Tensor, next_zero_point: Tensor, next_times: Tensor, next_top: int,
    factor: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    """Product, GEGLU, encode: each with its own rounding to ``dtype``.

    Args:
        a: int8 ``[M, K]``.
        w: int8 ``[2 N, K]``: N rows of hidden channels, then N of gates.
        bias: ``[2 N]``.
        next_inverse, next_zero_point, next_times, next_top, factor: Of the next layer's encode (`int8_encode`).

    Returns:
        Codes less 128 of ``hidden * gelu(gate)``, int8 ``[M, padded(N)]``.
    """
    both = int8_ops._product_plain(a, w, scale, zero_point, times, ONE_ROW, weight_scale, weight_sum, [width], [], 1,
                                   bias, None, None, dtype)
    hidden, gate = both.chunk(2, 1)
    return int8_ops._encode_plain(hidden * gelu(gate), next_inverse, next_zero_point, next_times, ONE_ROW,
                                  [hidden.shape[1]], next_top, [], 1, factor)


# ---- shapes ----------------------------------------------------------------------------------------------------------
def _joined_shape(
    a: Tensor, w: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor], weight_scale: Tensor,
    weight_sum: Tensor, widths: list[int], parts: int, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((parts, a.shape[0] // parts, w.shape[0] // parts), dtype=dtype)


def _gated_shape(
    a: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor, times: Tensor, weight_scale: Tensor, weight_sum: Tensor,
    width: int, bias: Tensor | None, next_inverse: Tensor, next_zero_point: Tensor, next_times: Tensor, next_top: int,
    factor: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], packing.padded((w.shape[0] // 2,))[0]), dtype=torch.int8)


for _name, _cuda, _plain, _shape in (
    ("int8_joined", _joined_cuda, _joined_plain, _joined_shape),
    ("int8_stacked", _stacked_cuda, _stacked_plain, _stacked_shape),
    ("int8_encode_each", _each_cuda, _each_plain, _each_shape),
    ("int8_gated", _gated_cuda, _gated_plain, _gated_shape),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _plain, "CPU")
    torch.library.register_fake(f"bitbrush::{_name}", _shape, lib=_LIBRARY)
    direct.register(_name, _cuda)
