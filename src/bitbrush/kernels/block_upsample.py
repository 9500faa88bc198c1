"""diffusers' Upsample2D on codes; see `bitbrush.kernels.blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitbrush.kernels import direct, gpu, int8_ops
from bitbrush.kernels.blocks import FusedBlock, first_reason, ready, watched


def unfit(block: Any) -> str | None:
    """Why a block cannot be computed on codes, whatever it is given."""
    if not block.use_conv or block.use_conv_transpose or block.name != "conv" or not block.interpolate:
        return "no convolution behind repeated pixels"
    if block.norm is not None:
        return "a norm before the convolution"
    reason = first_reason({"conv": block.conv})
    return reason or ("a 1x1 convolution" if gpu.facts(block.conv).pointwise else None)


class FusedUpsample(FusedBlock):
    """An Upsample2D whose encode reads each pixel four times, in the place of a picture four times as large."""

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output; see `diffusers.models.upsampling.Upsample2D`."""
        x, conv = hidden_states, self.conv
        high, wide = 2 * x.shape[2], 2 * x.shape[3]
        other = args or kwargs or (output_size is not None and tuple(output_size) != (high, wide))
        seen = x[:, :, :1, :1].expand(-1, -1, high, wide)  # of its shape; nothing reads what is there
        if other or watched([conv]) or not ready([conv], seen):
            out: Tensor = self.plain_class.forward(self, x, output_size, *args, **kwargs)
            return out
        given, known = gpu.given_input(conv, seen), gpu.facts(conv)
        codes = direct.OPS.int8_encode(
            x, given.inverse, given.encoding, given.times, given.kind, known.counts, known.top,
            int8_ops.numbers_of(given.frame), given.per_sample, gpu.input_scale(conv),
            gpu.places(conv),
        )
        return gpu.multiply(conv, codes, given, seen)
