"""Launches the encode: an input to int8 codes less 128, as rows or in the frame of a convolution.

Importing this module does not import Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels.launching import Launch
from bitbrush.kernels.triton_int8 import Frame, early, launched
from bitbrush.numbers import packing

CHUNK = 16
"""Channels that a thread encodes at a time: 16 bytes of codes."""
CHUNKS, WARPS = 128, 4
"""Of a program: one chunk a thread, so that registers allow as many threads as a processor has places for."""


def segment_places(counts: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(where it begins in the output, padding before it, end of its channels in the input) of each segment."""
    found, start, out = [], 0, 0
    for count, width in zip(counts, packing.padded(counts), strict=True):
        found.append((out, out - start, start + count))
        start, out = start + count, out + width
    return tuple(found)


def border_lines(frame: Frame) -> int:
    """Lines of a frame after the last picture's."""
    return frame.pad + (frame.pad > 0)


def encode(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, kind: int, counts: tuple[int, ...],
    top: int, *, frame: Frame | None = None, per_sample: int = 1, factor: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Codes less 128, int8 ``[R, sum(padded(counts))]``, or a frame of them.

    Args:
        x: ``[R, C]`` contiguous, or pictures ``[B, C, H, W]`` whose pixels lie one after the other (channels last).
            Pictures smaller than the frame's by a whole factor are repeated, pixel by pixel.
        inverse, zero_point, times, kind: As in `triton_int8.Tables`.
        counts: Channels of each segment.
        top: Largest code, where the table of zero-points does not hold it.
        factor: ``input_scale`` float32 ``[C]``.
        places: `bitbrush.kernels.sums.places`, where segments are groups of channels that lie anywhere.
    """
    key = (x.shape, counts, kind, top, frame, per_sample, factor is None, places is None, x.device, early(x.device))
    known = _KNOWN.get(key)
    if known is None:
        known = _KNOWN[key] = _cut(x, kind, counts, top, frame, per_sample, factor is not None, places is not None)
    size, launch = known
    out = torch.empty(size, dtype=torch.int8, device=x.device)
    if out.numel():
        launch((x, out, x if factor is None else factor, inverse, zero_point, times, x if places is None else places))
    return out


def encode_each(
    x: Tensor, inverse: Tensor, zero_point: Tensor, times: Tensor, top: int, factor: Tensor | None
) -> Tensor:
    """Codes less 128, int8 ``[P * R, padded(C)]``, of ``x [R, C]``, contiguous, for P layers; or of ``[P, R, C]``, the
    input of each.

    Args:
        inverse, zero_point: ``[P, T]``.
        times: int64 ``[1]``.
        factor: ``input_scale`` float32 ``[P, C]``.
    """
    (rows, channels), (layers, height) = x.shape[-2:], inverse.shape
    (length,) = packing.padded((channels,))
    out = torch.empty((layers * rows, length), dtype=torch.int8, device=x.device)
    if not out.numel():
        return out
    key = (x.shape, inverse.shape, top, factor is None, x.device, early(x.device))
    launch = _EACH.get(key)
    if launch is None:
        launch = _EACH[key] = _cut_each(x, layers, height, length, top, factor is not None)
    launch((x, out, x if factor is None else factor, inverse, zero_point, times))
    return out


_EACH: dict[Any, Launch] = {}


def _cut_each(x: Tensor, layers: int, height: int, length: int, top: int, factor: bool) -> Launch:
    from bitbrush.kernels import triton_encode_kernels as kernels

    rows, channels = x.shape[-2:]
    options = {"CHANNELS": channels, "LENGTH": length, "OWN": x.ndim == 3, "FACTOR": factor, "CHUNKS": CHUNKS,
               "num_warps": WARPS, "enable_fp_fusion": False, **launched(x.device)}  # fmt: skip
    grid = (-(-rows * length // CHUNK // CHUNKS), layers)
    return Launch(kernels.encode_each, grid, (float(top), rows, height), options)


_KNOWN: dict[Any, tuple[tuple[int, int], Launch]] = {}


def _cut(
    x: Tensor, kind: int, counts: tuple[int, ...], top: int, frame: Frame | None, per_sample: int, factor: bool,
    listed: bool,
) -> tuple[tuple[int, int], Launch]:
    from bitbrush.kernels import triton_encode_kernels as kernels

    place = frame or Frame(1, 1, 1)
    rows = x.shape[0] if frame is None else frame.rows
    samples = max(1, -(-rows // per_sample)) if frame is None else frame.batch
    length = sum(packing.padded(counts))
    chunks = (rows if frame is None else frame.pitch) * length // CHUNK
    grid = (-(-chunks // CHUNKS), 1, 1)
    if frame is not None:
        grid = (grid[0], frame.height + border_lines(frame), frame.batch)
    numbers = (float(top), rows, samples, per_sample, place.pitch, place.height,
               place.pad, place.high, place.wide)  # fmt: skip
    options = {
        "PLACES": () if listed else segment_places(counts), "COUNT": len(counts),
        "CHANNELS": sum(counts), "LENGTH": length, "TABLE": kind,
        "SPATIAL": frame is not None, "TIMES": 1 if frame is None else frame.high // x.shape[2],
        "FACTOR": factor, "CHUNKS": CHUNKS, "num_warps": WARPS,
        "enable_fp_fusion": False, **launched(x.device),
    }
    return (rows, length), Launch(kernels.encode, grid, numbers, options)
