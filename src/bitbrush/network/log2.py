"""The softmax of attention on a logarithmic grid whose scale is found at run time (DGQ, Ryu et al. 2025).

A softmax has a few large values and many small ones, over orders of magnitude. A ``log2`` grid holds powers of two
times delta, the largest value at hand: every octave below it has one code, so the relative error of a value does not
depend on its size, nor on the bits; those say how many octaves there are. In cross-attention the start token of the
text takes most of every row; left float (``exempt``), delta is the largest value of the words.

The released code takes one delta for the whole batch, so that a picture depends on the prompts beside it; that is
``scope = "tensor"``. Rows are not normalized again afterwards, there or here.

For comparison delta may be static, fitted from samples (`numbers.ranges.search_log2`): larger values are then clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.network.activation import ActivationQuantizer, fused_rounds
from bitbrush.network.clock import Clock
from bitbrush.numbers.codec import encode_log2, round_trip_log2
from bitbrush.numbers.grid import ActivationSpec, LayerSpec
from bitbrush.numbers.straight_through import fake_log2


class Log2Quantizer(ActivationQuantizer):
    """Quantizes softmax weights ``[B, heads, T, T']`` to ``delta * 2**-code``. It has nothing to train, and no tables
    unless delta is static: then ``scale`` ``[T or 1, 1]`` holds it.

    Args:
        spec: Grid and scope.
        exempt: Columns that stay float and have no part in delta: ``()``, or ``(0,)``, that of the start token.
        clock, rows: Of a static delta a timestep.
    """

    def __init__(
        self, spec: ActivationSpec, exempt: tuple[int, ...] = (), clock: Clock | None = None, rows: int = 1
    ) -> None:
        super().__init__(spec, (), clock, rows)
        self.exempt = exempt

    def delta(self, x: Tensor) -> Tensor:
        """The largest value that is quantized, of each sample ``[B, 1, 1, 1]``, head ``[B, heads, 1, 1]`` or in all
        ``[1, 1, 1, 1]``, float32; 0 where there is none. A static one: that of each sample's timestep."""
        if self.spec.mode == "static":
            return self.parameters_for(x, x.ndim - 1)[0]
        dims = {"sample": (1, 2, 3), "head": (2, 3), "tensor": (0, 1, 2, 3)}[self.spec.scope]
        x = self._split(x.detach())[1]
        return x.float().amax(dims, keepdim=True) if x.shape[-1] else x.new_zeros(1, 1, 1, 1, dtype=torch.float32)

    def codes(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Codes of what is quantized, float32 integers ``[B, heads, T, T' - exempt]``."""
        return encode_log2(self._split(x)[1], self.delta(x) if delta is None else delta, self.top)

    def round_trip(self, x: Tensor, delta: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Values of the grid, straight-through where a gradient is wanted; otherwise on CUDA by one kernel.

        Args:
            x: ``[B, heads, T, T']``.
            delta: As `delta` gives it for all that ``x`` is a part of; None: ``x`` is everything.
            dtype: Of the answer; None: that of ``x``.
        """
        delta, dtype = self.delta(x) if delta is None else delta, dtype or x.dtype
        if torch.is_grad_enabled() and x.requires_grad:
            kept, rest = self._split(x)
            rest = fake_log2(rest, delta, self.top)
        else:
            rounds = fused_rounds(x)
            if rounds is not None and rounds.fits_log2(x, delta):
                return rounds.log2(x, delta, self.top, len(self.exempt), dtype)
            kept, rest = self._split(x)
            rest = round_trip_log2(rest, delta, self.top).to(x.dtype)
        return (torch.cat([kept, rest], dim=-1) if kept.shape[-1] else rest).to(dtype)

    def forward(self, x: Tensor, channel_dim: int) -> Tensor:
        """`round_trip` of weights in one piece; ``channel_dim`` is for the interface."""
        return self.round_trip(x) if self.enabled else x

    def parts(self, x: Tensor, channel_dim: int, row: int = 0) -> tuple[Tensor, ...]:
        """What a static delta is fitted to: all columns that are quantized."""
        return (self._split(x)[1],)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(columns that stay float, columns that are quantized)."""
        first = len(self.exempt)  # `check_log2`: they are the first ones
        return x[..., :first], x[..., first:]

    def extra_repr(self) -> str:
        """Bits, scope and what is left out, for ``print(model)``."""
        of = f"a delta per {self.spec.scope}" if self.spec.mode == "dynamic" else "a static delta"
        return f"{self.spec.grid.bits} bit log2, {of}, exempt {list(self.exempt)}"


def check_log2(name: str, spec: LayerSpec) -> None:
    """Raise `InputError` for a logarithmic grid, or its settings, where they mean nothing.

    Args:
        name: Of a layer, or of an operand of attention (``<attention>:softmax``).
        spec: Its spec.
    """
    a = spec.activation
    if a is None:
        return
    log2 = a.grid.kind == "log2"
    reasons = {
        "it is for values between 0 and a maximum, those of the softmax of attention":
            log2 and not name.endswith(":softmax"),
        "a maximum found at run time has no rows over time": log2 and a.mode == "dynamic" and a.timed,
        "a static scale is one for all, scope is for maxima found at run time":
            log2 and a.mode == "static" and a.scope != "sample",
        "its values are not negative, its codes not signed": log2 and a.grid.signed,
        "what shares a scale is said by scope, not by granularity": log2 and a.granularity != "tensor",
        "operands of attention are inputs of its products": log2 and a.position != "input",
        "scope says what shares the scale of a log2 grid, and this grid is affine": not log2 and a.scope != "sample",
        "only the start token's column can be exempt, [0]": spec.exempt not in ((), (0,)),
        "only of a softmax on a log2 grid, and of k, can the start token be exempt":
            not log2 and bool(spec.exempt) and not name.endswith(":k"),
    }
    for why, holds in reasons.items():
        if holds:
            raise InputError("a logarithmic grid cannot be used like this", where=name, why=why,
                             try_='"*:softmax" = { activation = { mode = "dynamic", grid = "log2" } }')
