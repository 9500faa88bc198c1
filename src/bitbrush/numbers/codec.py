"""The one definition of a low-bit number: `encode` and `decode`.

    code  = clamp(round(x * (1 / scale)) + zero_point, 0, 2**bits - 1)
    value = (code - zero_point) * scale

Simulation *is* ``decode(encode(x))``; packing stores *those* codes; every kernel is tested against these functions.
Nothing else in the package rounds or clamps values onto a grid.

The arithmetic is pinned so that two devices and two releases agree on every code:

* ``x`` is taken to float32 first, whatever the compute dtype is;
* the division is a multiplication with the float32 reciprocal of the scale (`reciprocal`), which is computed once, by
  an IEEE division, and then kept;
* rounding is half to even (``torch.round``);
* scales are float32 and positive, zero-points are integers, so 0 is exactly representable (but
  in symmetric 1-bit rows, whose codes are 0 and 2 around the zero-point 1);
* a channel that is constant ``c`` gets scale ``|c|`` and codes 0 or +-1, hence it is exact, never an epsilon floor.

The learned form of weight rounding (AdaRound, Nagel et al. 2020, eq. 22) replaces the rounding by
``floor(x / scale) + h`` with ``h`` in [0, 1]: `encode_offset`. After hardening ``h`` is 0 or 1 and the codes are as
stored as any others.

Grids of kind ``log2`` hold powers of two times one number delta, for values from 0 to delta (`encode_log2`,
`decode_log2`): code ``round(-log2(x / delta))``, value ``delta * 2**-code``. Logarithms and powers are taken from the
bits of float32 numbers, so they are exact: no device's ``log2`` or ``exp2`` has a say.

The forms with gradients are in `bitbrush.numbers.straight_through`.

Shapes: ``scale`` and ``zero_point`` broadcast against ``x``; `expand_weight_scale` and `expand_activation_scale` bring
the tables ``[N, S]`` and ``[T, S]`` into that form.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

_MANTISSA, _BIAS = 23, 127
"""Of float32: bits of the mantissa, and what is added to the exponent."""
_ROUND_UP = (1 << _MANTISSA) - 0x3504F4
"""Carries a mantissa above that of sqrt(2), 0x3504F3.33.., into the exponent."""
_LIFT = 2.0**64
_MIDDLE = 1.5 * 2.0**_MANTISSA
"""Even; the neighbours of a float32 number near it are integers."""
_ROUNDER = torch.tensor(_MIDDLE)


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` in float32, the stored factor by which values are encoded."""
    return torch.ones((), dtype=torch.float32, device=scale.device) / scale.float()


def encode(x: Tensor, inverse_scale: Tensor, zero_point: Tensor, top: int | Tensor) -> Tensor:
    """Codes of ``x`` as float32 integers in ``0 .. top``.

    Args:
        x: Values, any floating dtype and shape.
        inverse_scale: `reciprocal` of the scale, float32, broadcastable to ``x``.
        zero_point: Integer-valued float32, broadcastable to ``x``.
        top: Largest code, ``2**bits - 1``; a tensor where rows differ in bits.
    """
    code = torch.round(x.float() * inverse_scale) + zero_point
    return clamp(code, top)


def encode_bytes(x: Tensor, inverse_scale: Tensor, zero_point: int, top: int, out: Tensor) -> Tensor:
    """Codes of ``x`` less the zero-point, modulo 256: `encode` with one scale for all of ``x``, in fewer passes.

    Adding 1.5 * 2**23 rounds a float32 number below 2**22 half to even, and leaves the integer in the low bits of the
    mantissa; what is larger is clamped either way. So nothing is converted but the low byte is taken.

    Args:
        x: Values, any floating dtype.
        inverse_scale: `reciprocal` of the scale, float32 without dimensions (a number would have to be converted).
        zero_point: 0 .. 255.
        top: Largest code.
        out: uint8 in the shape of ``x``; ``out + zero_point``, modulo 256, are the codes.
    """
    code = torch.mul(x.float(), inverse_scale).add_(_ROUNDER).clamp_(_MIDDLE - zero_point, _MIDDLE - zero_point + top)
    return out.copy_(code.view(torch.int32))


def encode_shifted(x: Tensor, inverse_scale: Tensor, zero_point: int, top: int, less: int) -> Tensor:
    """Codes of ``x`` less an offset, modulo 256: `encode` with one scale for all of ``x``, in the fewest passes.

    torch's quantization of float32 clamps, shifts and narrows in one pass. It adds the zero-point before it rounds,
    which moves some ties; so it is given integers.

    Args:
        x: Values, any floating dtype, strides and shape.
        inverse_scale: `reciprocal` of the scale, float32 without dimensions.
        zero_point: 0 .. 255.
        top: Largest code.
        less: The offset: 0, or 128 for bytes that read as int8.

    Returns:
        uint8 in the shape of ``x``, dense, with its dimensions in memory in the order of those of ``x``.
    """
    if top == 255 and _quantizes():
        return _quantized(x, inverse_scale, zero_point, less)
    out = encode_bytes(x, inverse_scale, zero_point, top, torch.empty_like(x, dtype=torch.uint8))
    shift = (zero_point - less) % 256
    return out.add_(shift) if shift else out


def _quantized(x: Tensor, inverse_scale: Tensor, zero_point: int, less: int) -> Tensor:
    rounded = torch.mul(x.float(), inverse_scale).round_()
    row = rounded if rounded.is_contiguous() else rounded.as_strided((rounded.numel(),), (1,))  # dense, as it was made
    made = torch.quantize_per_tensor(row, 1.0, zero_point - less, torch.qint8 if less else torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, rounded.shape, rounded.stride())


@functools.cache
def _quantizes() -> bool:
    """Whether torch quantizes integers as they are, the largest and the remainders of its vectors too; tried once a
    process. Some release will have its last quantized tensor: then `encode_bytes` does it."""
    far = torch.tensor([-torch.inf, -1e30, -3e9, -(2.0**31), -1e4, -0.5, 0.5, 1e4, 2.0**31, 3e9, 1e30, torch.inf])
    x, one = torch.cat([torch.arange(-300, 300) / 2, far]), torch.ones(())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of that release; torch says it once a process
            pairs = [(zero, less) for zero in (0, 1, 127, 128, 255) for less in (0, 128)]
            return all(_is_encode(x[zero % 13 :], one, zero, less) for zero, less in pairs)
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False


def _is_encode(x: Tensor, inverse: Tensor, zero: int, less: int) -> bool:
    want = encode(x, inverse, inverse * zero, 255).int()
    return torch.equal((_quantized(x, inverse, zero, less).int() + less) % 256, want)


def encode_offset(x: Tensor, inverse_scale: Tensor, zero_point: Tensor, top: int | Tensor, offset: Tensor) -> Tensor:
    """Codes with the rounding decision given: ``clamp(floor(x / scale) + offset + zero_point)``.

    ``offset`` in {0, 1} gives integers; a soft offset in [0, 1] gives the relaxed codes that AdaRound trains.
    """
    return clamp(torch.floor(x.float() * inverse_scale) + offset + zero_point, top)


def decode(code: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values ``(code - zero_point) * scale`` in float32."""
    return (code.float() - zero_point) * scale


def clamp(code: Tensor, top: int | Tensor) -> Tensor:
    """Codes limited to ``0 .. top``."""
    if isinstance(top, Tensor):
        return torch.minimum(code.clamp_min(0), top)
    return code.clamp(0, top)


def octaves(x: Tensor, delta: Tensor) -> Tensor:
    """``round(-log2(x / delta))``, the exact integer as float32; infinity where ``x`` is 0.

    The quotient is ``x * 2**64 / delta`` in float32 (the factor keeps what matters from being subnormal); its logarithm
    is rounded by its mantissa: up from the first float32 number above sqrt(2). That root is irrational, so there are no
    ties. Where delta is 0 all of its ``x`` are 0, and it divides as 1.
    """
    ratio = x.float() * _LIFT / torch.where(delta > 0, delta, 1.0)
    exponent = (ratio.view(torch.int32) + _ROUND_UP) >> _MANTISSA
    return torch.where(ratio > 0, (_BIAS + 64 - exponent).float(), torch.inf)


def encode_log2(x: Tensor, delta: Tensor, top: int) -> Tensor:
    """Codes ``clamp(round(-log2(x / delta)), 0, top)`` of a ``log2`` grid as float32 integers; ``top`` where x is 0.

    Args:
        x: Values in ``0 .. delta``, any floating dtype and shape.
        delta: The value of code 0, float32, not negative, broadcastable to ``x``.
        top: Largest code, ``2**bits - 1``.
    """
    return clamp(octaves(x, delta), top)


def decode_log2(code: Tensor, delta: Tensor) -> Tensor:
    """Values ``delta * 2**-code`` in float32: an exact power of two, and one product."""
    code = code.int()
    first = code.clamp_max(_BIAS - 1)  # of a code above 126 the power is not a normal number: two factors
    return delta * (_power(-first) * _power((first - code).clamp_min(1 - _BIAS)))


def round_trip_log2(x: Tensor, delta: Tensor, top: int) -> Tensor:
    """``decode_log2(encode_log2(x, delta, top), delta)`` bit for bit, without the codes: a third of the passes over
    memory, which is what it takes to simulate attention.

    The exponent of the quotient, rounded by its mantissa, is clamped where it stands in the float32 number: what is
    left is the power of two. 0 has the smallest exponent, and so the largest code.
    """
    ratio = x.float() * _LIFT
    ratio /= torch.where(delta > 0, delta, 1.0)
    bits = ratio.view(torch.int32)
    bits += _ROUND_UP
    bits &= -(1 << _MANTISSA)
    bits.clamp_(max(0, _BIAS + 64 - top) << _MANTISSA, (_BIAS + 64) << _MANTISSA)
    ratio *= 1 / _LIFT
    return delta * ratio


def _power(exponent: Tensor) -> Tensor:
    """``2**exponent`` as float32, exactly, for int32 exponents from -126 to 127."""
    return ((exponent + _BIAS) << _MANTISSA).view(torch.float32)


def expand_weight_scale(table: Tensor, segments: tuple[int, ...], ndim: int) -> Tensor:
    """A weight table ``[N, S]`` as ``[N, C, 1, 1]`` (or ``[N, C]``), or ``[N, 1, ...]`` when there is one segment."""
    table = _spread(table, segments)
    return table.reshape(*table.shape, *([1] * (ndim - 2)))


def expand_activation_scale(table: Tensor, segments: tuple[int, ...], ndim: int, channel_dim: int) -> Tensor:
    """Rows ``[B or 1, S]`` of an activation table, shaped to broadcast against an activation of ``ndim`` dimensions.

    ``channel_dim`` is 1 for pictures ``[B, C, H, W]`` and ``ndim - 1`` for tokens ``[B, ..., C]``.
    """
    table = _spread(table, segments)
    shape = [1] * ndim
    shape[0], shape[channel_dim] = table.shape
    if ndim == 1:
        shape = [table.shape[1]]
    return table.reshape(shape)


def _spread(table: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Columns of a table ``[R, S]`` repeated for their channels, ``[R, C]``; shapes stay static for compilers."""
    if table.shape[1] == 1 or table.shape[1] == sum(segments):  # one scale for all, or one a channel already
        return table
    return torch.cat([table[:, s : s + 1].expand(-1, count) for s, count in enumerate(segments)], dim=1)
