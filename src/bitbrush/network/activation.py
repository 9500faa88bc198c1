"""The quantizer of one activation: static tables (over time and channel segments) or scales found at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from bitbrush.errors import InputError, InternalError
from bitbrush.network.clock import Clock
from bitbrush.numbers.codec import clamp, decode, encode, expand_activation_scale, reciprocal
from bitbrush.numbers.grid import GROUPED, ActivationSpec
from bitbrush.numbers.ranges import affine_parameters
from bitbrush.numbers.straight_through import Fused, fake_quantize

if TYPE_CHECKING:
    from bitbrush.kernels.triton_rounds import Rounds
    from bitbrush.numbers.mixture import FusedMixture


def round_trip(x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: int | Tensor) -> Tensor:
    """``decode(encode(x))`` in the dtype of ``x``; on CUDA in one kernel where all samples have as many codes, and
    scales belong to the tensor, samples, channels, pixels or tokens.

    All forms do the same float32 operations in the same order, so they give the same bits (tests on a GPU compare).
    """
    fused = fused_form(x)
    if fused is not None and isinstance(top, int) and fused.fits(x, scale, zero):
        return fused.forward(x, scale, inverse, zero, top)
    rounds = fused_rounds(x)
    if rounds is not None and isinstance(top, int) and rounds.fits(x, scale, zero):
        return rounds.tables(x, scale, inverse, zero, top)
    return decode(encode(x, inverse, zero, top), scale, zero).to(x.dtype)


def fused_form(x: Tensor) -> Fused | None:
    """The fused kernels for tensors on the device of ``x``; None on the CPU, without Triton, and while compiling."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    from bitbrush.kernels import triton_fake

    return triton_fake.build()


def fused_rounds(x: Tensor) -> Rounds | None:
    """The one-pass round trips without gradients for tensors on the device of ``x``; None as for `fused_form`."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    from bitbrush.kernels import triton_rounds

    return triton_rounds.build()


def fused_mixture(x: Tensor) -> FusedMixture | None:
    """The fused kernels of mixtures for tensors on the device of ``x``; None as for `fused_form`."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    from bitbrush.kernels import triton_mixture

    return triton_mixture.build()


class ActivationQuantizer(nn.Module):
    """Quantizes an activation as its spec says.

    Static scales are buffers ``scale``, ``inverse_scale`` (float32) and ``zero_point`` (uint8), all ``[T, S]`` with T
    rows over time (1 unless timed) and S channel segments; with granularity ``channel`` every channel is a segment.
    Dynamic scales are computed from the tensor at hand, those of groups of a token's channels in `_by_group`. With
    ``spec.time_bits`` the largest code is looked up in a table like the scale (`row_tops`, not stored: it follows from
    the spec). With ``spec.time_groups`` T is the number of groups, and the row of a sample is the group of its timestep
    (`rows`).

    With groups of channels or pixels the tables have a column a group, and the buffer ``group_of`` (uint8) says the
    group of each channel or pixel; see `expand`. Pixels are counted row by row. With ``spec.groups_timed`` it has a row
    a timestep, like the tables. An unfolded input comes as ``[B, C * kh * kw, places]``, and so has as many channels.

    While a step trains them, ``trial_scale`` and ``trial_zero_point`` (float, both ``[T, S]``, either may be None)
    stand in for the tables; the trial zero-point is rounded (straight-through) and clamped to the codes before use.
    ``trial_rows`` takes the place of all of that: it gives the rows in force, ``[B or 1, S]`` each, of scale, its
    reciprocal and integer zero-point, so that a step may look the rows of many quantizers up at once.
    ``trial_mixture`` comes before both: it gives shares ``[B or 1, K]`` with the scales and integer-valued zero-points
    ``[K, S]`` of K candidates, and the answer is the sum of what the candidates make of the input, by their shares.
    With shares a channel, ``[B or 1, K, C]``, all channels have the same candidates, ``[K, B or 1]``.
    ``straight_through`` says whether gradients pass through the rounding of a mixture.

    Args:
        spec: Grid and partition.
        segments: Channel counts of the segments; empty means one segment.
        clock: Where timed tables look their row up; required when ``spec.timed``.
        rows: Timesteps of the grid that a timed table is for; the table has one row for each, or one a group (K).
        channels: Channels of the activation; needed for granularity ``channel`` only.
    """

    scale: Tensor
    inverse_scale: Tensor
    zero_point: Tensor
    group_of: Tensor | None

    def __init__(
        self, spec: ActivationSpec, segments: tuple[int, ...] = (), clock: Clock | None = None, rows: int = 1,
        device: torch.device | str | None = None, channels: int = 0,
    ) -> None:
        super().__init__()
        if spec.granularity == "channel":
            segments = (1,) * channels
        self.spec, self.segments = spec, segments
        self._clock = (clock,)  # in a tuple: shared by all layers, owned by the model
        self.enabled = True
        self.trial_scale: Tensor | None = None  # set while a step trains the scale
        self.trial_zero_point: Tensor | None = None  # float; set while a step trains the zero-point
        self.trial_rows: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
        self.trial_mixture: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
        self.straight_through = True  # otherwise only while a step searches as ADP-DM's released code does
        self._tops: dict[str, Tensor] = {}  # by what and where; see `row_tops`
        self._sizes: tuple[int, ...] | None = None  # see `group_sizes`
        self.exempt: tuple[int, ...] = ()  # of operands of attention: what is not quantized
        self.place = ""  # the layer's name, where known, for errors
        if spec.granularity in GROUPED:
            members = spec.pixels or channels
            places = (rows, members) if spec.groups_timed else (members,)
            self.register_buffer("group_of", torch.zeros(places, dtype=torch.uint8, device=device))
        else:
            self.group_of = None  # no empty buffer: offloading hooks cannot move one
        if spec.mode == "static":
            shape = (spec.table_rows(rows) if spec.time_groups else rows, spec.groups or max(len(segments), 1))
            self.register_buffer("scale", torch.ones(shape, device=device))
            self.register_buffer("inverse_scale", torch.ones(shape, device=device))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8, device=device))

    @property
    def top(self) -> int:
        """Largest code (of the widest row)."""
        return (1 << self.spec.most_bits) - 1

    def row_tops(self) -> int | Tensor:
        """Largest code of every row, float32 ``[T, 1]``; a number where it is the same for all.

        The table is kept, so that a CUDA graph may be captured after the first call.
        """
        bits = self.spec.time_bits
        if not bits:
            return self.top
        device = self.scale.device
        key = f"{bits} {device}"
        if key not in self._tops:
            with torch.inference_mode(False):  # what is kept must serve training, too
                self._tops[key] = torch.tensor([[float((1 << b) - 1)] for b in bits], device=device)
        return self._tops[key]

    def top_for(self, ndim: int, channel_dim: int) -> int | Tensor:
        """Largest code at the time of this call; where bits change over time, shaped to broadcast against an activation
        of ``ndim`` dimensions."""
        tops = self.row_tops()
        row = None if isinstance(tops, int) else self.times()
        if isinstance(tops, int) or row is None:
            return tops
        return expand_activation_scale(tops.index_select(0, row), (), ndim, channel_dim)

    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Store scales ``[T, S]`` (and zero-points) with their reciprocals."""
        device = self.scale.device
        self.scale = scale.detach().float().to(device).contiguous()
        self.inverse_scale = reciprocal(self.scale)
        if zero_point is not None:
            self.zero_point = zero_point.detach().to(device=device, dtype=torch.uint8).contiguous()

    def set_groups(self, labels: Tensor) -> None:
        """Store the group of each channel or pixel, integers ``0 .. groups - 1``."""
        if self.group_of is None or labels.shape != self.group_of.shape:
            raise InternalError("labels of groups do not fit the quantizer", where=self.place or type(self).__name__,
                                why=f"{list(labels.shape)} given")
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.spec.groups:
            raise InternalError("a label of a group is out of range", where=self.place or type(self).__name__,
                                why=f"{int(labels.min())} to {int(labels.max())}, of {self.spec.groups} groups")
        self.group_of = labels.detach().to(device=self.group_of.device, dtype=torch.uint8).clone()
        self._sizes = None

    def group_sizes(self) -> tuple[int, ...]:
        """Channels or pixels of each group, where they are the same at all times. Kept, for graphs to be compiled."""
        if self._sizes is None:
            if self.group_of is None or self.group_of.ndim > 1:
                raise InternalError("there are no groups for all times", where=self.place or type(self).__name__)
            self._sizes = tuple(torch.bincount(self.group_of.int(), minlength=self.spec.groups).tolist())
        return self._sizes

    @property
    def clock(self) -> Clock | None:
        """Where the time of the current call stands; None where the table has one row for all times."""
        return self._clock[0] if self.spec.timed else None

    def times(self) -> Tensor | None:
        """Row of the time grid for each sample, or None when the table has one row for all times."""
        return None if self.clock is None else self.clock.rows(self.spec.lookup)

    def rows(self) -> Tensor | None:
        """Row of the table for each sample: of the time grid, or its group; None when one row holds for all times."""
        if self.clock is None or not self.spec.time_groups:
            return self.times()
        return self.clock.groups(self.spec.time_groups, self.spec.lookup)

    def keep(self) -> None:
        """Make the tables that are kept, where the scales are. A forward does it too, but one that is being compiled
        would be compiled again at the next call, which finds them."""
        if self.spec.mode == "static" and not self.scale.is_meta:
            self.row_tops()
            if self.spec.time_groups and self.clock is not None:
                self.clock.know(self.spec.time_groups, self.scale.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the scales, and have their tables where they are now."""
        super()._apply(fn, recurse)
        self._sizes = None  # other labels may have been loaded
        self.keep()
        return self

    def parameters_for(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, inverse_scale, zero_point), float32, shaped to broadcast against ``x``."""
        if self.spec.mode == "dynamic":
            scale, zero = self._dynamic(x, channel_dim)
            return scale, reciprocal(scale), zero
        tables = (self.scale, self.inverse_scale, self.zero_point.float())
        row = self.rows()
        if row is not None:
            tables = tuple(t.index_select(0, row) for t in tables)  # type: ignore[assignment]
        if self._elsewhere(x.shape, channel_dim):
            hull = self._hull(tables[0], tables[2], row)
            a, b, c = (expand_activation_scale(t, (), x.ndim, channel_dim) for t in hull)
            return a, b, c
        a, b, c = (self.expand(t, x.shape, channel_dim) for t in tables)
        return a, b, c

    def expand(self, table: Tensor, shape: torch.Size, channel_dim: int, front: int = 0) -> Tensor:
        """Rows ``[R, S]`` of a table, shaped to broadcast against an activation.

        Args:
            table: A row for all, or one for each index of the first dimension.
            shape: Of the activation ``[B, ..]``.
            channel_dim: Counted from the front.
            front: Dimensions before the batch, 1 where candidates come first.

        Raises:
            InputError: Groups of pixels, and another number of pixels than they were made for.
        """
        if self.group_of is None:
            return expand_activation_scale(table, self.segments, len(shape), channel_dim)
        wide = self._by_member(table, self.group_of, front)  # [R, channels or pixels]
        if self.spec.granularity == "channel_group":
            return expand_activation_scale(wide, (wide.shape[1],), len(shape), channel_dim)
        places = [1 if d <= front or d == channel_dim else n for d, n in enumerate(shape)]
        if math.prod(places) != wide.shape[1]:
            raise self._other_pixels(math.prod(places))
        return wide.reshape([*(wide.shape[:1] if channel_dim else places[:1]), *places[1:]])

    def _by_member(self, table: Tensor, labels: Tensor, front: int) -> Tensor:
        """``[R, channels or pixels]`` of rows ``[R, K]``."""
        row = self.rows() if self.spec.groups_timed else None
        if row is None:
            return table.index_select(1, (labels[0] if self.spec.groups_timed else labels).int())
        if front:
            raise InternalError("groups a timestep have no candidates", where=self.place or type(self).__name__)
        count = max(len(table), len(row))
        return table.expand(count, -1).gather(1, labels.index_select(0, row).long().expand(count, -1))

    def _elsewhere(self, shape: torch.Size, channel_dim: int) -> bool:
        """Whether the input has another number of pixels than the groups were made for, and that is allowed."""
        if self.spec.granularity != "pixel_group" or self.spec.fallback == "refuse":
            return False
        return math.prod(shape[1:]) // shape[channel_dim] != self.spec.pixels

    def _hull(self, scale: Tensor, zero: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, inverse_scale, zero_point) ``[R, 1]`` of the range that spans those of all groups ``[R, K]``."""
        tops = self.row_tops()
        top = tops if isinstance(tops, int) or row is None else tops.index_select(0, row)
        low, high = (-zero * scale).amin(1, keepdim=True), ((top - zero) * scale).amax(1, keepdim=True)
        wide = (high - low) / top
        return wide, reciprocal(wide), torch.round(-low * reciprocal(wide))

    def _other_pixels(self, given: int) -> InputError:
        return InputError(
            "the layer's groups of pixels are for another size of the input", where=self.place or "an activation",
            why=f"it was calibrated for {self.spec.pixels} pixels and is given {given}",
            try_="use the size and the length of text of the calibration, or quantize with dimension = \"channel\" or "
                 "fallback = \"tensor\" in the group step",
        )

    def parts(self, x: Tensor, channel_dim: int, row: int = 0) -> tuple[Tensor, ...]:
        """The values of ``x`` ``[B, ..]`` that each column of the tables serves, ``[B, ..]`` each (not of granularity
        ``channel``). A group without members has none. With groups a timestep those of the ``row`` given."""
        if self.group_of is None:
            return x.split(list(self.segments), channel_dim) if self.segments else (x,)
        dim = channel_dim
        if self.spec.granularity == "pixel_group":
            x, dim = (x.flatten(2), 2) if channel_dim == 1 else (x.flatten(1, -2), 1)
            if x.shape[dim] != self.spec.pixels:
                raise self._other_pixels(x.shape[dim])
        labels = self.group_of[row] if self.spec.groups_timed else self.group_of
        members = [(labels == k).nonzero().flatten() for k in range(self.spec.groups)]
        return tuple(x.index_select(dim, here) for here in members)

    def encode(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of ``x`` (float32 integers) with the (scale, zero_point) that decode them."""
        scale, inverse, zero = self.parameters_for(x, channel_dim)
        return encode(x, inverse, zero, self.top_for(x.ndim, channel_dim)), scale, zero

    def forward(self, x: Tensor, channel_dim: int) -> Tensor:
        """``decode(encode(x))`` in the dtype of ``x``."""
        if not self.enabled:
            return x
        if self.trial_mixture is not None:
            return self._mixed(x, channel_dim, *self.trial_mixture())
        top = self.top_for(x.ndim, channel_dim)
        trial = self.trial_tables(x.shape, channel_dim)
        if trial is not None:
            scale, inverse, zero = trial
            return fake_quantize(x, scale, zero, top, fused_form(x), inverse)
        scale, inverse, zero = self.parameters_for(x, channel_dim)
        if torch.is_grad_enabled() and x.requires_grad:
            return fake_quantize(x, scale, zero, top, fused_form(x))
        return round_trip(x, scale, inverse, zero, top)

    def _mixed(self, x: Tensor, channel_dim: int, share: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """``sum_k share_k Q(x; scale_k, zero_k)``; shapes as `trial_mixture` gives them."""
        from bitbrush.numbers.mixture import mixture

        dim = channel_dim % x.ndim + 1  # behind that of the candidates
        by_row = [share.shape[1], len(share), *([1] * (x.ndim - 1))]
        if share.ndim == 2:
            shares = share.t().reshape(by_row)
            shape = torch.Size((1, *x.shape))
            a, b = (self.expand(t, shape, dim, front=1) for t in (scale, zero))
        else:
            by_channel = [*by_row[:dim], share.shape[2], *by_row[dim + 1 :]]
            shares = share.transpose(0, 1).reshape(by_channel)
            a, b = scale.reshape(by_row), zero.reshape(by_row)
        return mixture(x, shares, a, b, self.top, fused_mixture(x), straight_through=self.straight_through)

    def trial_tables(self, shape: torch.Size, channel_dim: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(scale, inverse_scale, zero_point) while a step trains them, shaped to broadcast against an activation of
        this shape; None while none does."""
        if self.trial_rows is not None:
            rows = self.trial_rows()
        elif self.trial_scale is not None or self.trial_zero_point is not None:
            rows = self._trial()
        else:
            return None
        a, b, c = (self.expand(t, shape, channel_dim) for t in rows)
        return a, b, c

    def _trial(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the trial tables at the time of this call, ``[B or 1, S]``."""
        scale = self.scale if self.trial_scale is None else self.trial_scale
        zero = self.zero_point.float()
        if self.trial_zero_point is not None:
            free = self.trial_zero_point
            zero = clamp(free + (torch.round(free) - free).detach(), self.row_tops())
        row = self.rows()
        if row is not None:
            scale, zero = scale.index_select(0, row), zero.index_select(0, row)
        return scale, reciprocal(scale.detach()), zero

    def _by_group(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of every group of consecutive channels of every token or pixel, in the shape of ``x``.

        The last group may be short: it is filled up with zeros, and every range contains 0.
        """
        count = x.shape[channel_dim]
        size = min(self.spec.group, count)
        behind = [0, 0] * (x.ndim - 1 - channel_dim)
        whole = x.float() if count % size == 0 else torch.nn.functional.pad(x.float(), [*behind, 0, -count % size])
        parts = whole.unflatten(channel_dim, (-1, size))
        dim = channel_dim + 1
        tables = affine_parameters(parts.amin(dim, keepdim=True), parts.amax(dim, keepdim=True), self.spec.grid)
        s, z = (t.expand(parts.shape).flatten(channel_dim, dim).narrow(channel_dim, 0, count) for t in tables)
        return s, z

    def _dynamic(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        if self.spec.granularity == "token_group":
            return self._by_group(x, channel_dim)
        dims = [channel_dim] if self.spec.granularity == "token" else list(range(x.ndim))
        if self.spec.granularity == "sample" and channel_dim > 0:  # without a batch all is one sample
            dims = dims[1:]
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
        bits = "/".join(str(b) for b in sorted(set(self.spec.time_bits or (self.spec.grid.bits,))))
        groups = f", {self.spec.groups} groups" if self.spec.groups else ""
        groups += f" of {self.spec.group}" if self.spec.group else ""
        return f"{bits} bit, {self.spec.mode} per {self.spec.granularity}{groups}{time}"
