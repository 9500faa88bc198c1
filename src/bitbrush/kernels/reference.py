"""The reference kernel: decode, then the float operation. Any device, any spec; equal to the sim face bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer


def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer from decoded weights and decoded inputs, in the dtype of ``x``."""
    return layer.computed(x, layer.decoded_weight().to(x.dtype))
