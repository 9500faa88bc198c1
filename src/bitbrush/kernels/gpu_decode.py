"""Packed weights on CUDA, decoded in one pass to the dtype of the input, then torch's own product or convolution.

For what has no integer form: weights whose input stays float, sums of codewords, simulated partitions. A decoded value
is computed in float32 as `bitbrush.numbers` defines it and rounded once, so the weight is the reference's bit for bit;
no float32 copy of it is made. It lies in memory in the order (kh, kw, channel), which is that of the packed rows and of
convolutions in channels-last layout.

    bitbrush::decode_affine      (code - zero_point) * scale
    bitbrush::decode_codebook    (C_1[c_1] + ... + C_K[c_K]) * scale
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton_package

from bitbrush.kernels.launching import Launch
from bitbrush.kernels.triton_int8 import early, launched
from bitbrush.numbers import packing
from bitbrush.numbers.codebook import decode as decode_codebook
from bitbrush.numbers.codebook import unpack_codes
from bitbrush.numbers.codec import decode, expand_weight_scale

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

BLOCK, WARPS = 256, 4
"""Groups of codebooks that a program decodes, two a thread: 32 registers, so that a processor is full of threads, which
wait for codes and then for codewords."""
_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "decode_affine(Tensor[] codes, int[] bits, Tensor scale, Tensor zero_point, Tensor? order, int[] counts, "
    "int[] kernel, bool halved, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "decode_codebook(Tensor codes, int bits, Tensor codebooks, Tensor scale, int groups, ScalarType dtype) -> Tensor"
)
_OPS = torch.ops.bitbrush


# ---- the layer -------------------------------------------------------------------------------------------------------
def why_not(layer: QuantLayer, device_type: str) -> str | None:
    """Why this kernel cannot run a packed layer on a device, or None when it can."""
    return no_triton(device_type) or ("the weight is not quantized" if layer.spec.weight is None else None)


def no_triton(device_type: str) -> str | None:
    """Why no Triton kernel runs on a device, or None."""
    if device_type != "cuda":
        return f"the kernel runs on CUDA, not on {device_type}"
    return None if has_triton_package() else "Triton is not installed"


def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer from decoded weights and decoded inputs, in the dtype of ``x``."""
    return layer.computed(x, weight(layer, x.dtype))


def weight(layer: QuantLayer, dtype: torch.dtype) -> Tensor:
    """The decoded weight, ``[N, C]`` or ``[N, C, kh, kw]`` in channels-last layout."""
    spec = layer.spec.weight
    if spec is None:
        raise ValueError("the weight of this layer is not quantized")
    kh, kw = layer.kernel_hw
    if spec.additive:
        of_books: Any = layer
        books, scale = of_books.book()(), layer.weight_scale
        codes, groups = getattr(layer, f"codes{spec.grid.bits}"), kh * kw * layer.in_channels_ // spec.group
        flat: Tensor = _OPS.decode_codebook(codes, spec.grid.bits, books.to(codes.device), scale, groups, dtype)
    else:
        classes = spec.bit_classes()
        flat = _OPS.decode_affine(
            [getattr(layer, f"codes{bits}") for bits in classes], list(classes), layer.weight_scale,
            layer.weight_zero_point, layer.row_order if spec.row_bits else None, list(layer.segments), [kh, kw],
            spec.halved(1), dtype,
        )
    if not isinstance(layer, nn.Conv2d):
        return flat
    return flat.reshape(layer.out_channels_, kh, kw, -1).permute(0, 3, 1, 2)


# ---- affine ----------------------------------------------------------------------------------------------------------
def _affine_cuda(
    codes: list[Tensor], bits: list[int], scale: Tensor, zero_point: Tensor, order: Tensor | None, counts: list[int],
    kernel: list[int], halved: bool, dtype: torch.dtype,
) -> Tensor:
    from bitbrush.kernels import triton_decode_kernels as kernels

    taps, segments = kernel[0] * kernel[1], tuple(counts)
    widths, total = packing.padded(segments), sum(segments)
    out = torch.empty((scale.shape[0], taps * total), dtype=dtype, device=scale.device)
    length, first, height, columns = taps * sum(widths), 0, 8, 256
    ends = tuple(accumulate(width * taps for width in widths))
    for data, width in zip(codes, bits, strict=True):
        mine = None if order is None else order[first : first + data.shape[0]]
        starts = packing.plane_starts(length, width)
        with torch.cuda.device_of(out):
            kernels.affine[(-(-data.shape[0] // height), -(-length // columns))](
                data, scale, zero_point, data if mine is None else mine, out, data.shape[0], length, data.stride(0),
                out.shape[1], *starts, len(segments), ENDS=ends,
                REAL=tuple((c, w, total) for c, w in zip(segments, widths, strict=True)),
                STARTS=(0, *accumulate(segments))[: len(segments)], BITS=width, ORDER=mine is not None,
                HALVED=halved and width == 1, BR=height, BK=columns, num_warps=4, enable_fp_fusion=False,
            )
        first += data.shape[0]
    return out


def _affine_plain(
    codes: list[Tensor], bits: list[int], scale: Tensor, zero_point: Tensor, order: Tensor | None, counts: list[int],
    kernel: list[int], halved: bool, dtype: torch.dtype,
) -> Tensor:
    segments = tuple(counts)
    length = packing.row_length(segments, (kernel[0], kernel[1]))
    rows = torch.cat([packing.unpack(data, b, length) << int(halved and b == 1)
                      for data, b in zip(codes, bits, strict=True)])
    if order is not None:
        rows = torch.empty_like(rows).index_copy_(0, order.long(), rows)
    wide = packing.rows_to_weight(rows, segments, (kernel[0], kernel[1]))
    tables = (expand_weight_scale(t, segments, 4) for t in (scale, zero_point.float()))
    return decode(wide, *tables).permute(0, 2, 3, 1).flatten(1).to(dtype)


def _affine_shape(
    codes: list[Tensor], bits: list[int], scale: Tensor, zero_point: Tensor, order: Tensor | None, counts: list[int],
    kernel: list[int], halved: bool, dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty((scale.shape[0], kernel[0] * kernel[1] * sum(counts)), dtype=dtype)


# ---- codebooks -------------------------------------------------------------------------------------------------------
def _codebook_cuda(
    codes: Tensor, bits: int, codebooks: Tensor, scale: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    whole, device = codebooks.is_contiguous(), codes.device
    out = torch.empty((scale.shape[0], groups * codebooks.shape[2]), dtype=dtype, device=device)
    key = (scale.shape[0], groups, bits, codebooks.shape, codes.stride(0), whole, device, early(device))
    launch = _CODEBOOKS.get(key)
    if launch is None:
        launch = _CODEBOOKS[key] = _cut_codebooks(codes, bits, codebooks, scale.shape[0], groups)
    launch((codes, codebooks if whole else codebooks.contiguous(), scale, out))
    return out


_CODEBOOKS: dict[Any, Launch] = {}


def _cut_codebooks(codes: Tensor, bits: int, codebooks: Tensor, rows: int, groups: int) -> Launch:
    """A launch for codes of ``rows * groups`` groups, of which a program decodes `BLOCK`."""
    from bitbrush.kernels import triton_decode_kernels as kernels

    (books, _, size), count = codebooks.shape, rows * groups
    starts = packing.plane_starts(count, bits, lambda length, width: -(-length * width // 8))
    copied = {} if codebooks.is_contiguous() else {"EARLY": False, "launch_pdl": False}  # by the kernel ahead
    options = {
        "GROUPS": groups, "BOOKS": books, "BITS": bits, "SIZE": size, "WIDE": 1 << (size - 1).bit_length(),
        "BG": BLOCK, "EVEN": count % BLOCK == 0, "num_warps": WARPS, "enable_fp_fusion": False,
        **launched(codes.device), **copied,
    }
    return Launch(kernels.codebook, (-(-count // BLOCK),), (count, codes.stride(0), *starts), options)


def _codebook_plain(
    codes: Tensor, bits: int, codebooks: Tensor, scale: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    return decode_codebook(unpack_codes(codes, bits, scale.shape[0], groups), codebooks, scale).to(dtype)


def _codebook_shape(
    codes: Tensor, bits: int, codebooks: Tensor, scale: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((scale.shape[0], groups * codebooks.shape[2]), dtype=dtype)


for _name, _cuda, _plain, _shape in (
    ("decode_affine", _affine_cuda, _affine_plain, _affine_shape),
    ("decode_codebook", _codebook_cuda, _codebook_plain, _codebook_shape),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _LIBRARY.impl(_name, _plain, "CPU")
    torch.library.register_fake(f"bitbrush::{_name}", _shape, lib=_LIBRARY)
