"""A correction's three steps on CUDA, a kernel each (`bitbrush.network.correction`): whose turn it is, the shift of the
sample, scale and bias of the estimate. In operations of torch they are forty, of which each costs a small network's
step a thousandth.

The same float32 operations in the same order, ``enable_fp_fusion=False``, so the same bits; a test on a GPU compares
them. Importing this module does not import Triton: `build` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitbrush.kernels.triton_fake import DTYPES, works

OFF = -2
"""A position from which no row is next."""
MOST = 4096
"""Timesteps, and samples, that one program looks at."""
BLOCK = 1024


@dataclass(frozen=True)
class Corrector:
    """The launchers.

    Args:
        fits: ``(x, most) -> bool``: whether they take x, and as many timesteps or samples.
        turn: ``(timestep [1] or [B], timesteps [T], state [2])``: writes the row whose turn it is (or OFF) and the
            timestep.
        shifted: ``(x, state, shift [T, C]) -> x - shift[row]`` in the dtype of x ``[B, C, ..]``.
        corrected: ``(x, state, scale, bias) -> scale[row] * x + bias[row]``, likewise.
    """

    fits: Callable[[Tensor, int], bool]
    turn: Callable[[Tensor, Tensor, Tensor], None]
    shifted: Callable[[Tensor, Tensor, Tensor], Tensor]
    corrected: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def build() -> Corrector | None:
    """The launchers, or None where Triton cannot build them."""

    def attempt() -> None:
        one, state = torch.ones((1, 1), device="cuda"), torch.zeros(2, device="cuda")
        turn(one[0], one[0], state)
        shifted(one, state, one)
        corrected(one, state, one, one)

    return Corrector(fits, turn, shifted, corrected) if works(attempt) else None


def fits(x: Tensor, most: int) -> bool:
    """On CUDA, of a dtype known here, batch and channels first in either order of memory; and ``most`` numbers are few
    enough for one program."""
    here = x.is_cuda and x.dtype in DTYPES and most <= MOST
    return here and x.numel() > 0 and x.ndim > 1 and places(x) > 0


def places(x: Tensor) -> int:
    """Values that lie one after the other before the channel changes; 0 in another order of memory."""
    if x.is_contiguous():
        return x[0, 0].numel()
    return 1 if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else 0


def turn(timestep: Tensor, timesteps: Tensor, state: Tensor) -> None:
    """Find the row."""
    from bitbrush.kernels import triton_correction_kernels as kernels

    count, samples = len(timesteps), timestep.numel()
    with torch.cuda.device_of(state):
        kernels.turn[(1,)](
            timestep, timesteps, state, samples, count, OFF=OFF, TIMES=_power(count), BATCH=_power(samples)
        )


def shifted(x: Tensor, state: Tensor, shift: Tensor) -> Tensor:
    """The sample that the network is to see."""
    from bitbrush.kernels import triton_correction_kernels as kernels

    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.shifted[(-(-x.numel() // BLOCK),)](
            x, out, state, shift, x.numel(), x.shape[1], places(x), BLOCK=BLOCK, enable_fp_fusion=False
        )
    return out


def corrected(x: Tensor, state: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The corrected estimate."""
    from bitbrush.kernels import triton_correction_kernels as kernels

    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.corrected[(-(-x.numel() // BLOCK),)](
            x, out, state, scale, bias, x.numel(), x.shape[1], places(x), BLOCK=BLOCK, enable_fp_fusion=False
        )
    return out


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
