"""diffusers' ResnetBlock2D on codes; see `bitbrush.kernels.blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitbrush.kernels.blocks import FusedBlock, first_reason, group_normed, projected, ready, watched


def unfit(block: Any) -> str | None:
    """Why a block cannot be computed on codes, whatever it is given."""
    if block.time_embedding_norm != "default" or block.output_scale_factor != 1:
        return "a time embedding that scales, or a scaled output"
    if block.upsample is not None or block.downsample is not None:
        return "it changes the size of pictures"
    norms = (block.norm1, block.norm2)
    if not all(type(norm) is nn.GroupNorm and norm.affine for norm in norms) or type(block.nonlinearity) is not nn.SiLU:
        return "a norm other than GroupNorm, or an activation other than SiLU"
    if block.dropout.p > 0 and block.training:
        return "it drops values"
    return first_reason({"conv1": block.conv1, "conv2": block.conv2})


class FusedResnet(FusedBlock):
    """A ResnetBlock2D that encodes where it normalises."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output; see `diffusers.models.resnet.ResnetBlock2D`."""
        convs = (self.conv1, self.conv2)
        plain = bool(args or kwargs) or input_tensor.ndim != 4 or watched((self.norm1, self.norm2, *convs))
        if plain or not ready(convs, input_tensor) or (temb is not None and len(temb) != len(input_tensor)):
            out: Tensor = self.plain_class.forward(self, input_tensor, temb, *args, **kwargs)
            return out
        shared = None
        if self.time_emb_proj is not None and temb is not None:
            shared = projected(self, temb, self.gpu_readers)
        h = group_normed(self.norm1, self.conv1, input_tensor, input_tensor, silu=True, shared=shared)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return group_normed(self.norm2, self.conv2, h, h, silu=True, residual=shortcut)
