"""Blocks of diffusers around int8 layers on the CPU, in fewer passes over pictures; numbers as without.

    Attention                layers that read the same are one product (`cpu_attention`), those that read the prompt
                             one for all attentions (`cpu_readers`)
    ResnetBlock2D            SiLU and additions write where their operand lies, which nobody else holds; nothing is
                             divided by one; all projections of the time embedding are one product (`cpu_readers`)
    BasicTransformerBlock    residuals are added, and GEGLU's gate multiplied, in place
    Transformer2DModel       tokens go to the last projection as the channels-last picture that they are

Where pictures leave in channels-last order now and did not before, a norm behind may sum in another order. Classes are
exchanged as in `bitbrush.kernels.blocks`; whatever is not plain in a call goes the class's own way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.kernels import cpu_attention, cpu_readers
from bitbrush.kernels.blocks import FusedBlock, mix, plain_processor, projected, watched


class InPlace(FusedBlock):
    """What is common to blocks that save passes."""

    passes_codes = False

    def plain_now(self: Any, x: Tensor, parts: tuple[str, ...], ndim: int = 4) -> bool:
        """Whether a call on ``x`` may write into what parts of the block answer."""
        if x.device.type != "cpu" or x.ndim != ndim or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        held = [self._modules[name] for name in parts]
        return not watched(part for part in held if part is not None)


class LeanResnet(InPlace):
    """A ResnetBlock2D that adds and activates in place."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output; see `diffusers.models.resnet.ResnetBlock2D`."""
        x, layers = input_tensor, ("conv1", "conv2")
        plain = not args and not kwargs and self.plain_now(x, ("norm1", "norm2", "nonlinearity", "dropout", *layers))
        if not plain or not all(hasattr(self._modules[name], "declare_packed") for name in layers) or self.training:
            out: Tensor = super().forward(x, temb, *args, **kwargs)
            return out
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and temb is not None:
            h += projected(self, temb, self.readers)[:, :, None, None]
        elif temb is not None:
            h += temb
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class LeanTransformer(InPlace):
    """A BasicTransformerBlock that adds residuals, and multiplies by its gate, in place."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
        class_labels: Any = None, added_cond_kwargs: Any = None,
    ) -> Tensor:
        """The block's output; see `diffusers.models.attention.BasicTransformerBlock`."""
        x, asked = hidden_states, bool(cross_attention_kwargs) or self._chunk_size is not None
        if asked or self.training or not self.plain_now(x, ("ff",), 3) or not self._writes():
            out: Tensor = super().forward(
                x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )
            return out
        h = self.attn1(self.norm1(x), encoder_hidden_states=None, attention_mask=attention_mask)
        h += x
        context, mask = encoder_hidden_states, encoder_attention_mask
        x = self.attn2(self.norm2(h), encoder_hidden_states=context, attention_mask=mask)
        x += h
        y, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)
        h = self.ff.net[2](F.gelu(gate).mul_(y))
        h += x
        return h

    def _writes(self: Any) -> bool:
        """Whether what is written to was made by packed layers just now, and nobody looks at what is passed over, or
        keeps it."""
        net, attentions = self.ff.net, (self.attn1, self.attn2)
        last = [net[0].proj, net[2], *(attn.to_out[0] for attn in attentions)]
        if watched((net[0], net[1], *attentions, *last)):
            return False
        plain = all(type(attn.processor) is plain_processor() for attn in attentions)
        return plain and all(hasattr(layer, "declare_packed") for layer in last)


class LeanSpatial(InPlace):
    """A Transformer2DModel whose last projection reads tokens as the picture that they are."""

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        x, packed = hidden_states, hasattr(self.proj_out, "declare_packed")
        if not packed or not isinstance(self.proj_out, nn.Conv2d) or not self.plain_now(residual, ("proj_out",)):
            above: Any = super()
            out: Tensor = above._get_output_for_continuous_inputs(x, residual, batch_size, height, width, inner_dim)
            return out
        y: Tensor = self.proj_out(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        y += residual
        return y


def _fits_resnet(block: Any) -> bool:
    """Whether a ResnetBlock2D is of the plain form, whatever it is given."""
    plain = block.time_embedding_norm == "default" and block.output_scale_factor == 1
    kinds = type(block.norm1), type(block.norm2), type(block.nonlinearity)
    same_size = block.upsample is None and block.downsample is None
    return plain and same_size and kinds == (nn.GroupNorm, nn.GroupNorm, nn.SiLU)


def _fits_transformer(block: Any) -> bool:
    """Whether a BasicTransformerBlock is of the plain form, whatever it is given."""
    from diffusers.models.activations import GEGLU

    plain = block.norm_type == "layer_norm" and block.pos_embed is None and not block.only_cross_attention
    net = block.ff.net
    return plain and block.attn2 is not None and not hasattr(block, "fuser") and type(net[0]) is GEGLU and len(net) == 3


def _fits_spatial(block: Any) -> bool:
    return bool(block.is_input_continuous and not block.use_linear_projection)


@cache
def _kinds() -> dict[type, tuple[Any, Any]]:
    """diffusers' classes: what takes their place, and what says whether it can."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return {ResnetBlock2D: (LeanResnet, _fits_resnet), Transformer2DModel: (LeanSpatial, _fits_spatial),
            BasicTransformerBlock: (LeanTransformer, _fits_transformer),
            Attention: (cpu_attention.JoinedAttention, cpu_attention.fits)}  # fmt: skip


@cache
def _mixed(mixed: Any, now: Any, base: Any) -> Any:
    """``mixed`` before the class that a block has now: diffusers' own, or that of a block fused for a GPU, which then
    has the calls that are not for a CPU."""
    codes = bool(getattr(now, "passes_codes", False))
    return type(base.__name__, (mixed, now),
                {"plain_class": base, "__module__": base.__module__, "passes_codes": codes})  # fmt: skip


def fuse(model: nn.Module) -> None:
    """Exchange the classes of the blocks that can save something."""
    if not any(hasattr(module, "declare_packed") for module in model.modules()):
        return
    module: Any
    for module in list(model.modules()):
        base: Any = module.plain_class if isinstance(module, FusedBlock) else module.__class__
        mixed, fits = _kinds().get(base, (None, None))
        if mixed is None or not fits(module):
            continue
        made = _mixed(mixed, module.__class__, base)
        if isinstance(module, FusedBlock):
            module.__class__ = made
        else:
            mix(module, made)
    _share(model)


def _share(model: nn.Module) -> None:
    """One product of all projections of the time embedding, and of all that read the prompt."""
    found: list[Any] = [module for module in model.modules() if isinstance(module, FusedBlock)]
    resnets = [block for block in found if isinstance(block, LeanResnet) and block.time_emb_proj is not None]
    for bare in (True, False):
        cpu_readers.share([(each, each.time_emb_proj) for each in resnets if each.skip_time_act == bare])
    cpu_readers.share([(attn, attn.to_k, attn.to_v) for attn in found
                       if isinstance(attn, cpu_attention.JoinedAttention) and attn.is_cross_attention])
