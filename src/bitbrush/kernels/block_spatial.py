"""What stands around the transformer blocks in diffusers' Transformer2DModel, on codes; see `bitbrush.kernels.blocks`.

Its forward calls two methods for pictures: one normalises and projects, the other projects back and adds the picture
that came in. Both are replaced; between them nothing changes. Pictures stay in channels-last order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitbrush.kernels import gpu
from bitbrush.kernels.blocks import FusedBlock, first_reason, group_normed, ready, watched


def unfit(block: Any) -> str | None:
    """Why the projections cannot be computed on codes, whatever they are given."""
    if not block.is_input_continuous:
        return "its input is no picture of numbers"
    if type(block.norm) is not nn.GroupNorm or not block.norm.affine:
        return "a norm other than GroupNorm"
    return first_reason({"proj_in": block.proj_in, "proj_out": block.proj_out})


class FusedSpatial(FusedBlock):
    """A Transformer2DModel that encodes where it normalises, and adds where it projects back."""

    def _operate_on_continuous_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
        layer, norm, x = self.proj_in, self.norm, hidden_states
        if watched((norm, layer)) or not ready([layer], x):
            out: tuple[Tensor, int] = self.plain_class._operate_on_continuous_inputs(self, x)
            return out
        seen = x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2)
        y = group_normed(norm, layer, x, seen, silu=False)
        tokens = y.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else y
        return tokens, x.shape[1] if self.use_linear_projection else tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        layer, x = self.proj_out, hidden_states
        conv = isinstance(layer, nn.Conv2d)
        seen = x.unflatten(1, (height, width)).permute(0, 3, 1, 2) if conv else x
        if watched([layer]) or not ready([layer], seen):
            out: Tensor = self.plain_class._get_output_for_continuous_inputs(
                self, x, residual, batch_size, height, width, inner_dim)
            return out
        given = gpu.given_input(layer, seen)
        added = residual if conv else residual.flatten(2).transpose(1, 2)
        y = gpu.multiply(layer, gpu.input_rows(layer, seen, given), given, seen, residual=added)
        return y if conv else y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
