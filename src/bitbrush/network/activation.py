"""The quantizer of one activation: static tables (over time and channel segments) or scales found at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from bitbrush.network.clock import Clock
from bitbrush.numbers.codec import decode, encode, expand_activation_scale, fake, reciprocal
from bitbrush.numbers.grid import ActivationSpec
from bitbrush.numbers.ranges import affine_parameters


def round_trip(x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
    """``decode(encode(x))`` in the dtype of ``x``; on CUDA in one fused kernel where one scale serves the whole tensor.

    Both forms do the same float32 operations in the same order, so they give the same bits (tests on a GPU compare).
    """
    one = scale.numel() == 1 and x.is_cuda and x.is_contiguous() and not torch.compiler.is_compiling()
    fused = _fused() if one and has_triton() else None
    if fused is not None:
        flat = fused(x.reshape(-1), scale.reshape(()), inverse.reshape(()), zero.reshape(()), top)
        return flat.view(x.shape)
    return _plain_round_trip(x, scale, inverse, zero, top)


def _plain_round_trip(x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
    return decode(encode(x, inverse, zero, top), scale, zero).to(x.dtype)


@functools.cache
def _fused() -> Callable[..., Tensor] | None:
    """The compiled form, or None where it cannot be built (Triton needs a C compiler at run time)."""
    compiled = torch.compile(_plain_round_trip, dynamic=True)
    one = torch.ones((), device="cuda")
    try:
        compiled(torch.ones(64, device="cuda"), one, one, one, 255)
    except (RuntimeError, OSError):
        return None
    return compiled


class ActivationQuantizer(nn.Module):
    """Quantizes an activation as its spec says.

    Static scales are buffers ``scale``, ``inverse_scale`` (float32) and ``zero_point`` (uint8), all ``[T, S]`` with T
    rows over time (1 unless timed) and S channel segments. Dynamic scales are computed from the tensor at hand.

    Args:
        spec: Grid and partition.
        segments: Channel counts of the segments; empty means one segment.
        clock: Where timed tables look their row up; required when ``spec.timed``.
        rows: T, number of rows of the table.
    """

    scale: Tensor
    inverse_scale: Tensor
    zero_point: Tensor

    def __init__(
        self, spec: ActivationSpec, segments: tuple[int, ...] = (), clock: Clock | None = None, rows: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.segments = spec, segments
        self._clock = (clock,)  # in a tuple: shared by all layers, owned by the model
        self.enabled = True
        self.trial_scale: Tensor | None = None  # set while a step trains the scale
        if spec.mode == "static":
            shape = (rows, max(len(segments), 1))
            self.register_buffer("scale", torch.ones(shape, device=device))
            self.register_buffer("inverse_scale", torch.ones(shape, device=device))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8, device=device))

    @property
    def top(self) -> int:
        """Largest code."""
        return self.spec.grid.levels - 1

    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Store scales ``[T, S]`` (and zero-points) with their reciprocals."""
        device = self.scale.device
        self.scale = scale.detach().float().to(device).contiguous()
        self.inverse_scale = reciprocal(self.scale)
        if zero_point is not None:
            self.zero_point = zero_point.detach().to(device=device, dtype=torch.uint8).contiguous()

    def rows(self) -> Tensor | None:
        """Row of the table for each sample, or None when the table has one row for all times."""
        clock = self._clock[0]
        return clock.rows(self.spec.lookup) if self.spec.timed and clock is not None else None

    def parameters_for(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, inverse_scale, zero_point), float32, shaped to broadcast against ``x``."""
        if self.spec.mode == "dynamic":
            scale, zero = self._dynamic(x, channel_dim)
            return scale, reciprocal(scale), zero
        tables = (self.scale, self.inverse_scale, self.zero_point.float())
        row = self.rows()
        if row is not None:
            tables = tuple(t.index_select(0, row) for t in tables)  # type: ignore[assignment]
        a, b, c = (expand_activation_scale(t, self.segments, x.ndim, channel_dim) for t in tables)
        return a, b, c

    def encode(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of ``x`` (float32 integers) with the (scale, zero_point) that decode them."""
        scale, inverse, zero = self.parameters_for(x, channel_dim)
        return encode(x, inverse, zero, self.top), scale, zero

    def forward(self, x: Tensor, channel_dim: int) -> Tensor:
        """``decode(encode(x))`` in the dtype of ``x``."""
        if not self.enabled:
            return x
        if self.trial_scale is not None:
            return self._trial(x, channel_dim).to(x.dtype)
        scale, inverse, zero = self.parameters_for(x, channel_dim)
        if torch.is_grad_enabled() and x.requires_grad:
            return fake(x, scale, zero, self.top).to(x.dtype)
        return round_trip(x, scale, inverse, zero, self.top)

    def _trial(self, x: Tensor, channel_dim: int) -> Tensor:
        scale, zero = self.trial_scale, self.zero_point.float()
        row = self.rows()
        if scale is None:
            return x
        if row is not None:
            scale, zero = scale.index_select(0, row), zero.index_select(0, row)
        s = expand_activation_scale(scale, self.segments, x.ndim, channel_dim)
        return fake(x, s, expand_activation_scale(zero, self.segments, x.ndim, channel_dim), self.top)

    def _dynamic(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        dims = [channel_dim] if self.spec.granularity == "token" else list(range(x.ndim))
        parts = x.float().split(list(self.segments), dim=channel_dim) if self.segments else (x.float(),)
        scales, zeros = [], []
        for part in parts:
            s, z = affine_parameters(part.amin(dims, keepdim=True), part.amax(dims, keepdim=True), self.spec.grid)
            if len(parts) > 1:
                shape = [-1] * x.ndim
                shape[channel_dim] = part.shape[channel_dim]
                s, z = s.expand(shape), z.expand(shape)
            scales.append(s)
            zeros.append(z)
        return torch.cat(scales, channel_dim), torch.cat(zeros, channel_dim)

    def extra_repr(self) -> str:
        """Bits, mode and partition, for ``print(model)``."""
        time = ", timed" if self.spec.timed else ""
        return f"{self.spec.grid.bits} bit, {self.spec.mode} per {self.spec.granularity}{time}"
