"""Tensors to scales and zero-points: min-max, percentile, and a search over shrunken ranges.

Every range contains 0. A flat tensor (all values equal ``c``) is represented exactly: scale ``|c|`` (1 where ``c`` is
0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitbrush.numbers.codec import decode, decode_log2, encode, encode_log2, reciprocal
from bitbrush.numbers.grid import Grid

Method = Literal["minmax", "percentile", "mse"]

_TINY = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max
_QUANTILE_VALUES = 1 << 24  # torch.quantile takes no more


def affine_parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero-point (both float32, zero-point integer-valued) of the range ``[low, high]`` widened to contain 0.

    Signed grids use ``max(|low|, |high|) / (2**(bits-1) - 1)`` with the zero-point at ``2**(bits-1)`` (for 1 bit the
    divisor is 1), so that both ends are representable.
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    if grid.signed:
        bound = torch.maximum(-low, high)
        scale = _divided(bound, max(grid.mid - 1, 1))
        flat, size = bound <= 0, bound
        zero_point = torch.full_like(scale, grid.mid)
    else:
        scale = _divided((high - low).clamp_max(_LARGEST), grid.levels - 1)  # the difference may pass float32's range
        size = torch.maximum(-low, high)
        flat = size <= 0
        zero_point = torch.round(-low * reciprocal(scale.clamp_min(_TINY))).clamp(0, grid.levels - 1)
    scale = torch.where(scale < _TINY, size, scale)  # a range below the smallest normal number: one step spans it
    scale = torch.where(flat | (scale < _TINY), torch.ones_like(scale), scale)
    return scale, zero_point


def _divided(values: Tensor, by: int) -> Tensor:
    """The quotient, rounded once on every device: by a number, CUDA multiplies with its rounded reciprocal."""
    return values / torch.full((), by, dtype=torch.float32, device=values.device)


def flat_parameters(value: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero-point that represent the constant ``value`` exactly: scale ``|value|``, one step from zero."""
    magnitude = value.float().abs()
    scale = torch.where(magnitude < _TINY, torch.ones_like(magnitude), magnitude)
    negative = (value < 0).float()
    zero_point = torch.full_like(scale, float(grid.mid)) if grid.signed else negative
    return scale, zero_point


def search(
    values: Tensor, grid: Grid, *, method: Method = "mse", points: int = 80, step: float = 0.01, power: float = 2.4,
    central_share: float = 0.999, symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point for each row of ``values`` ``[R, M]``.

    ``minmax``: the exact range. ``percentile``: the range of the central ``central_share`` of the values, as
    much left out above as below (of rows longer than 2**24, every k-th value is looked at). ``mse``: of the ranges
    shrunk by ``1 - i * step`` (i = 0 .. points-1), the one with the least mean ``|x - decode(encode(x))| ** power``
    (Q-Diffusion's released search: 80 points, step 0.01, power 2.4). The first candidate is min-max, so a search never
    ends worse than it. ``symmetric`` searches ``[-T, T]``, one-sided where all values of a row have one sign.

    Returns:
        scale ``[R]`` and zero_point ``[R]``, float32.
    """
    values = values.float()
    low, high = values.amin(dim=1), values.amax(dim=1)
    flat = low == high
    if method == "percentile":
        stride = -(-values.shape[1] // _QUANTILE_VALUES)
        low, high = (torch.quantile(values[:, ::stride], q, dim=1) for q in _ends(central_share))
    if symmetric:  # [-T, T], one-sided where all values have one sign
        bound = torch.maximum(-low, high)
        low, high = torch.where(low < 0, -bound, 0.0), torch.where(high > 0, bound, 0.0)
    scale, zero_point = affine_parameters(low, high, grid)
    if method == "mse":
        scale, zero_point = _shrink(values, low, high, grid, points, step, power)
    flat_scale, flat_zero = flat_parameters(values[:, 0], grid)
    return torch.where(flat, flat_scale, scale), torch.where(flat, flat_zero, zero_point)


def _ends(central_share: float) -> tuple[float, float]:
    return (1 - central_share) / 2, (1 + central_share) / 2


def _shrink(
    values: Tensor, low: Tensor, high: Tensor, grid: Grid, points: int, step: float, power: float
) -> tuple[Tensor, Tensor]:
    best_scale, best_zero = affine_parameters(low, high, grid)
    best = error(values, best_scale, best_zero, grid, power)
    for i in range(1, points):
        factor = 1.0 - i * step
        if factor <= 0:
            break
        scale, zero = affine_parameters(low * factor, high * factor, grid)
        loss = error(values, scale, zero, grid, power)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def error(values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, power: float = 2.0) -> Tensor:
    """Mean ``|x - decode(encode(x))| ** power`` of each row of ``values`` ``[R, M]``; shape ``[R]``."""
    s, z = scale[:, None], zero_point[:, None]
    delta = values - decode(encode(values, reciprocal(s), z, grid.levels - 1), s, z)
    return delta.abs().pow(power).mean(dim=1)


LOG2_QUANTILES = (0.999, 0.9999, 0.99999)
"""Candidates for the static delta of a ``log2`` grid (DGQ's released code)."""


def search_log2(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The static delta of a ``log2`` grid for each row of ``values`` ``[R, M]``: of `LOG2_QUANTILES` the one with the
    least mean squared error; 1 for a row of zeros.

    Returns:
        delta ``[R]`` and zeros ``[R]`` (such a grid has no zero-point), float32.
    """
    ordered = values.float().sort(dim=1).values
    best, least = torch.ones_like(ordered[:, 0]), torch.full_like(ordered[:, 0], torch.inf)
    for quantile in LOG2_QUANTILES:
        place = min(ordered.shape[1] - 1, round(quantile * (ordered.shape[1] - 1)))
        delta = torch.where(ordered[:, place] > 0, ordered[:, place], 1.0)[:, None]
        error = (decode_log2(encode_log2(ordered, delta, grid.levels - 1), delta) - ordered).square().mean(dim=1)
        best, least = torch.where(error < least, delta[:, 0], best), torch.minimum(error, least)
    return best, torch.zeros_like(best)
