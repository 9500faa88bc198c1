"""The one definition of additive codebooks: `decode`, the order of a weight's columns, and what it costs to store.

A weight matrix ``[N, n]`` is cut into G = n / g groups of g consecutive columns. Each group is a sum of K vectors, one
from each of K codebooks of 2**B vectors, times the scale of its row (VQDM, Egiazarian et al. 2024; AQLM):

    W[i, J_j] = scale[i] * (C_1[c_ij1] + C_2[c_ij2] + ... + C_K[c_ijK])

The arithmetic is pinned, so that simulation, reference and kernels agree bit for bit:

* codebooks and scales are taken to float32 first, whatever they are stored in;
* the K vectors are added in float32, one after another, in the order of the codebooks: ((C_1 + C_2) + C_3) + ...;
* then comes one multiplication by the scale of the row. No multiplication feeds an addition, hence nothing can be
  contracted to a fused multiply-add.

**Order of columns.** A convolution's filter ``[C_out, C_in, kh, kw]`` becomes a row in the order (kh, kw, C_in), the
channel fastest: a group is g consecutive input channels at one kernel position. A linear weight is its own matrix.

**Storage.** Codes are planar: for each codebook the N * G codes in row order, as planes of 8, 4, 2 or 1 bits (see
`bitbrush.numbers.packing`), each plane padded to a byte and no further, so that B = 8 costs exactly one byte a code.
Codebooks and scales are float16: scales hold the rows' magnitude, so codebook entries are about 1 and keep their
precision (a row norm as the scale would leave entries of 1/sqrt(n)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from bitbrush.errors import InputError, NumericsError
from bitbrush.numbers.packing import pack_plane, planes, unpack_plane

HALF_BITS = 16
"""Bits of a stored codebook entry and of a stored scale."""


def decode(codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor:
    """The weight matrix ``[N, G*g]`` in float32; differentiable in ``codebooks`` and ``scale``.

    Args:
        codes: ``[N, G, K]``, any integer dtype, values below 2**B.
        codebooks: ``[K, 2**B, g]``, any floating dtype.
        scale: ``[N]``, any floating dtype.
    """
    return (add_codewords(codes, codebooks) * scale.float()[:, None, None]).flatten(1)


def add_codewords(codes: Tensor, codebooks: Tensor) -> Tensor:
    """``C_1[c_1] + ... + C_K[c_K]`` in float32, in that order: codes ``[..., K]`` to ``[..., g]``, without scales."""
    books = codebooks.float()
    total = functional.embedding(_index(codes[..., 0]), books[0])
    for k in range(1, len(books)):
        total = total + functional.embedding(_index(codes[..., k]), books[k])
    return total


def _index(codes: Tensor) -> Tensor:
    """Codes in a dtype that may index: a uint8 tensor would be read as a mask."""
    return codes if codes.dtype in (torch.int32, torch.int64) else codes.int()


# ---- order of columns ----------------------------------------------------------------------------------------------
def to_groups(weight: Tensor, group: int, name: str | None = None) -> Tensor:
    """A weight ``[C_out, C_in, kh, kw]`` as the matrix ``[C_out, kh*kw*C_in]``; ``[N, n]`` as it is.

    Raises:
        InputError: The input channels are not a multiple of ``group``; ``name`` is the layer to be named there.
    """
    channels = weight.shape[1]
    if group < 1 or channels % group:
        raise InputError(
            f"the weight cannot be cut into groups of {group}",
            where=name,
            why=f"its {channels} input channels are not a multiple of {group}",
            try_=f"leave this layer out, or choose a group size that divides {channels}",
        )
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def from_groups(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `to_groups`: the weight of ``shape``, with the standard strides.

    The copy is explicit: with channels-last strides a convolution may take another algorithm, which rounds otherwise.
    """
    if len(shape) == 2:
        return matrix.reshape(tuple(shape))
    outputs, channels, high, wide = shape
    weight = matrix.reshape(outputs, high, wide, channels).permute(0, 3, 1, 2)
    return weight.clone(memory_format=torch.contiguous_format)


# ---- storage -------------------------------------------------------------------------------------------------------
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[N, G, K]`` below ``2**bits`` (1 to 8) as bytes ``[K, index_bytes(N*G, bits)]`` uint8."""
    rows = codes.to(torch.uint8).permute(2, 0, 1).flatten(1)
    parts, shift = [], 0
    for width in planes(bits):
        parts.append(pack_plane((rows >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(parts, dim=1)


def unpack_codes(data: Tensor, bits: int, rows: int, groups: int) -> Tensor:
    """Inverse of `pack_codes`: codes ``[rows, groups, K]`` uint8."""
    length, start, shift = rows * groups, 0, 0
    out = torch.zeros(len(data), length, dtype=torch.uint8, device=data.device)
    for width in planes(bits):
        size = -(-length * width // 8)
        out |= unpack_plane(data[:, start : start + size], width, length) << shift
        start, shift = start + size, shift + width
    return out.reshape(-1, rows, groups).permute(1, 2, 0).contiguous()


def index_bytes(length: int, bits: int) -> int:
    """Bytes of ``length`` packed codes of one codebook."""
    return sum(-(-length * width // 8) for width in planes(bits))


def to_half(values: Tensor, name: str | None = None) -> Tensor:
    """Codebooks, scales or factors as they are stored, float16.

    Raises:
        NumericsError: A value is not finite in float16.
    """
    half = values.detach().to(torch.float16)
    if not bool(half.isfinite().all()):
        raise NumericsError(
            "a table does not fit float16",
            where=name,
            why=f"the largest magnitude is {float(values.detach().abs().max()):.3g}, float16 ends at 65504",
            try_="leave this layer in full precision",
        )
    return half


@dataclass(frozen=True)
class StoredBits:
    """Bits of layers that share one set of codebooks, as stored: equal to the bytes of the tensors times 8."""

    index: int
    codebooks: int
    scales: int
    weights: int

    @property
    def total(self) -> int:
        """All bits."""
        return self.index + self.codebooks + self.scales

    @property
    def total_bytes(self) -> int:
        """All bytes."""
        return self.total // 8

    @property
    def per_weight(self) -> float:
        """Bits a weight, codebooks and scales included."""
        return self.total / self.weights


def bits_of(shapes: Sequence[Sequence[int]], count: int, bits: int, group: int) -> StoredBits:
    """Bits of the weights of ``shapes`` that share one set of ``count`` codebooks of ``2**bits`` vectors.

    VQDM: K*B/g a weight for the codes, ``K * 2**B * g * 16`` once for the codebooks, 16 a row for the scales.

    Args:
        shapes: ``[N, n]`` or ``[C_out, C_in, kh, kw]`` of each layer; n (or C_in) is a multiple of ``group``.
        count: Codebooks, K.
        bits: Bits of a code, B, 1 to 8.
        group: Weights in a group, g.
    """
    weights = [prod(shape) for shape in shapes]
    return StoredBits(
        index=8 * count * sum(index_bytes(number // group, bits) for number in weights),
        codebooks=count * (1 << bits) * group * HALF_BITS,
        scales=HALF_BITS * sum(shape[0] for shape in shapes),
        weights=sum(weights),
    )
