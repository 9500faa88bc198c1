"""A low-rank branch beside a quantized product: what few large singular vectors hold, in 16 bits (SVDQuant).

    layer(x) = Q(y) Q(R)^T + y L2^T L1^T + b        y = x * input_scale, unrounded; R = W / input_scale - L1 L2

L1 ``[N, r]`` (``up``) and L2 ``[r, C]`` or ``[r, C, kh, kw]`` (``down``) are float16 numbers, and every face but the
float one computes with those numbers, in the dtype of the layer's input. Of a convolution L2 is a convolution of r rows
with the layer's kernel, stride, padding and dilation, and L1 is 1x1.

The codes of such a layer are those of R (`QuantLayer.scaled_weight`), so whatever fits or trains weights does so for
what the branch leaves over. Tensors of a packed layer (see docs/format.md):

    low_rank.up        float16 [N, r]
    low_rank.down      float16 [r, C] or [r, C, kh, kw]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbrush.errors import InputError, InternalError
from bitbrush.network.dtypes import HalfTables
from bitbrush.numbers.codebook import to_half
from bitbrush.numbers.grid import LayerSpec

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

HALF_BYTES = 2


class LowRank(HalfTables):
    """The two factors; zeros until they are set.

    Args:
        rank: r.
        shape: Of the weight, ``[N, C]`` or ``[N, C, kh, kw]``.
    """

    up: Tensor
    down: Tensor

    def __init__(self, rank: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("up", torch.zeros(shape[0], rank, dtype=torch.float16))
        self.register_buffer("down", torch.zeros(rank, *shape[1:], dtype=torch.float16))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The stored factors. A call, because offloading hooks bring a module's tensors when it is called."""
        return self.up, self.down

    def set(self, up: Tensor, down: Tensor) -> None:
        """Store the factors, rounded to float16.

        Raises:
            InternalError: Other shapes.
            NumericsError: A value is not finite in float16.
        """
        if up.shape != self.up.shape or down.shape != self.down.shape:
            raise InternalError("these are not factors of the layer's branch", where=type(self).__name__,
                                why=f"{list(up.shape)} and {list(down.shape)} given, {list(self.up.shape)} and "
                                f"{list(self.down.shape)} expected")
        device = self.up.device
        self.up, self.down = (to_half(t, "a low-rank branch").to(device).contiguous().clone() for t in (up, down))

    def weight(self) -> Tensor:
        """``L1 L2`` of the stored factors, float32, in the shape of the layer's weight."""
        return product(self.up, self.down)

    def extra_repr(self) -> str:
        """The rank, for ``print(model)``."""
        return f"rank {self.up.shape[1]}"


def product(up: Tensor, down: Tensor) -> Tensor:
    """``L1 L2`` in float32: ``[N, C]`` or ``[N, C, kh, kw]``."""
    return (up.float() @ down.float().flatten(1)).reshape(len(up), *down.shape[1:])


def branch(layer: QuantLayer, x: Tensor) -> Tensor:
    """What the branch of a layer adds to its output for an input that has been scaled but not rounded.

    In the dtype of ``x``, the product with L2 first.
    """
    if layer.low_rank is None:
        raise InternalError("the layer has no low-rank branch", where=type(layer).__name__)
    up, down = (table.to(x.dtype) for table in layer.low_rank())
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(layer._conv_forward(x, down, None), up[:, :, None, None])
    return F.linear(F.linear(x, down), up)


def check(name: str, spec: LayerSpec, groups: int, shape: tuple[int, int]) -> None:
    """Raise `InputError` for a low-rank branch where there cannot be one.

    Args:
        name: Of the layer.
        spec: Its spec.
        groups: Of a convolution.
        shape: Output rows, and input features (channels times kernel positions).
    """
    if not spec.low_rank:
        return
    reasons = {
        "the weight is not quantized: there is nothing that a branch could carry": spec.weight is None,
        f"it is a convolution with groups = {groups}": groups != 1,
        f"a weight of {shape[0]} x {shape[1]} has no rank {spec.low_rank}": spec.low_rank > min(shape),
    }
    for why, holds in reasons.items():
        if holds:
            raise InputError("the layer cannot have this low-rank branch", where=name, why=why,
                             try_="leave the layer out of the low_rank step's `branch`, or take a smaller rank")


def branch_bytes(shape: tuple[int, ...], spec: LayerSpec) -> int:
    """Bytes of the two factors of a layer with a weight of this shape."""
    features = 1
    for count in shape[1:]:
        features *= count
    return HALF_BYTES * spec.low_rank * (shape[0] + features)
