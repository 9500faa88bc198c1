"""diffusers' BasicTransformerBlock on codes; see `bitbrush.kernels.blocks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.kernels import attend_ops, gpu, joined, joined_ops  # noqa: F401 - their operations are registered by their modules
from bitbrush.kernels.blocks import FusedBlock, first_reason, ready, watched
from bitbrush.kernels.gpu import Given
from bitbrush.kernels.joined import Joined
from bitbrush.numbers import packing

_OPS = torch.ops.bitbrush
_SELF, _CONTEXT = "queries, keys and values", "keys and values of the context"


def unfit(block: Any) -> str | None:
    """Why a block cannot be computed on codes, whatever it is given."""
    if block.norm_type != "layer_norm" or block.pos_embed is not None or block.only_cross_attention:
        return "a norm that depends on time, positions, or no self-attention"
    if hasattr(block, "fuser") or block.attn2 is None or block._chunk_size is not None:
        return "a part that is not in every block of its kind"
    if not all(type(norm) is nn.LayerNorm for norm in (block.norm1, block.norm2, block.norm3)):
        return "a norm other than LayerNorm"
    odd = _odd_attention(block.attn1) or _odd_attention(block.attn2) or _odd_feed_forward(block.ff)
    return odd or first_reason(_layers(block))


def _odd_attention(attn: Any) -> str | None:
    """Why an attention is not plain."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if type(attn.processor) is not AttnProcessor2_0:
        return f"attention by {type(attn.processor).__name__}"
    parts = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.add_k_proj)
    if any(part is not None for part in parts) or attn.residual_connection or attn.rescale_output_factor != 1:
        return "an attention with norms or residuals of its own"
    return "it drops values" if attn.to_out[1].p > 0 and attn.training else None


def _odd_feed_forward(ff: Any) -> str | None:
    from diffusers.models.activations import GEGLU

    if type(ff.net[0]) is not GEGLU or len(ff.net) > 4:
        return f"a feed-forward layer with {type(ff.net[0]).__name__}"
    dropped = any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in ff.net)
    return "it drops values" if dropped else None


def _layers(block: Any) -> dict[str, Any]:
    named = {f"{name}.{to}": getattr(getattr(block, name), to)
             for name in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v")}  # fmt: skip
    named |= {f"{name}.to_out.0": getattr(block, name).to_out[0] for name in ("attn1", "attn2")}
    return named | {"ff.net.0.proj": block.ff.net[0].proj, "ff.net.2": block.ff.net[2]}


class FusedTransformer(FusedBlock):
    """A BasicTransformerBlock whose products pass codes to one another."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
        class_labels: Any = None, added_cond_kwargs: Any = None,
    ) -> Tensor:
        """The block's output; see `diffusers.models.attention.BasicTransformerBlock`."""
        asked = attention_mask is not None or encoder_attention_mask is not None or bool(cross_attention_kwargs)
        if asked or encoder_hidden_states is None or hidden_states.ndim != 3 or not _plain_now(self, hidden_states):
            out: Tensor = self.plain_class.forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )
            return out
        x = _self_attention(self, hidden_states)
        x = _cross_attention(self, x, encoder_hidden_states)
        return _feed_forward(self, x)

    def join(self: Any) -> None:
        """Queries, keys and values as one product, and those of the context, where the weights are on a GPU."""
        from bitbrush import kernels

        self.joined = {}
        for name, layers in (
            (_SELF, [self.attn1.to_q, self.attn1.to_k, self.attn1.to_v]), (_CONTEXT, [self.attn2.to_k, self.attn2.to_v])
        ):
            packed = all(hasattr(layer, "declare_packed") for layer in layers)
            device = layers[0].weight_scale.device.type if packed else ""
            if packed and all(kernels.chosen(layer, device) == "cuda-int8" for layer in layers) and joined.able(layers):
                self.joined[name] = joined.join(layers)


def _plain_now(block: Any, x: Tensor) -> bool:
    """Whether nobody has changed the block's attentions or looks into it, and all of it is run by this kernel."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if any(type(attn.processor) is not AttnProcessor2_0 for attn in (block.attn1, block.attn2)):
        return False
    inner, layers = (block.norm1, block.norm2, block.norm3, block.attn1, block.attn2, block.ff), _layers(block).values()
    return block._chunk_size is None and not watched((*inner, block.ff.net[0], *layers)) and ready(layers, x)


# ---- parts -----------------------------------------------------------------------------------------------------------
def _normed(norm: nn.LayerNorm, layers: list[Any], x: Tensor) -> tuple[Tensor, list[Given]]:
    """Codes of the norm for each layer, one below the other, and what encoded them."""
    given = [gpu.given_input(layer, x) for layer in layers]
    codes = _OPS.layer_norm_encode(
        x, norm.weight, norm.bias, norm.eps, [g.inverse for g in given], [g.zero_point for g in given],
        [g.times for g in given], [layer.input.top for layer in layers], [layer.input_scale for layer in layers],
    )
    return codes, given


def _products(layers: list[Any], join: Joined | None, codes: Tensor, given: list[Given], x: Tensor) -> list[Tensor]:
    """Each layer's output ``[B, L, N]`` for its codes: of one product where the layers are joined."""
    if join is None or join.codes.device != codes.device:  # offloading moves the layers' tensors one by one
        own = codes.reshape(len(layers), -1, codes.shape[-1]).unbind(0)
        return [gpu.multiply(layer, c, g, x) for layer, c, g in zip(layers, own, given, strict=True)]
    out = join.multiply(codes, given, x.dtype)
    return list(out.reshape(*x.shape[:-1], len(layers), -1).unbind(-2))


def _attended(attn: Any, parts: list[Tensor], x: Tensor) -> Tensor:
    """``x`` and what the heads make of queries, keys and values, through the last layer."""
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
    last = attn.to_out[0]
    given = gpu.given_input(last, x)
    if attend_ops.fits(q, k, given.kind):
        codes = _OPS.attend_encode(q, k, v, given.inverse, given.zero_point, given.times, last.input.top,
                                   last.input_scale)  # fmt: skip
        return gpu.multiply(last, codes, given, x, residual=x)
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
    heads = found.transpose(1, 2).flatten(2)
    given = gpu.given_input(last, heads)
    return gpu.multiply(last, gpu.input_rows(last, heads, given), given, heads, residual=x)


def _self_attention(block: Any, x: Tensor) -> Tensor:
    attn = block.attn1
    layers = [attn.to_q, attn.to_k, attn.to_v]
    codes, given = _normed(block.norm1, layers, x)
    return _attended(attn, _products(layers, block.joined.get(_SELF), codes, given, x), x)


def _cross_attention(block: Any, x: Tensor, context: Tensor) -> Tensor:
    attn = block.attn2
    layers = [attn.to_k, attn.to_v]
    codes, given = _normed(block.norm2, [attn.to_q], x)
    query = _products([attn.to_q], None, codes, given, x)
    given = [gpu.given_input(layer, context) for layer in layers]
    codes = torch.cat([gpu.input_rows(layer, context, g) for layer, g in zip(layers, given, strict=True)])
    return _attended(attn, query + _products(layers, block.joined.get(_CONTEXT), codes, given, context), x)


def _feed_forward(block: Any, x: Tensor) -> Tensor:
    first, last = block.ff.net[0].proj, block.ff.net[2]
    codes, (given,) = _normed(block.norm3, [first], x)
    behind = gpu.given_input(last, x)
    gated = _OPS.int8_gated(
        codes, gpu.int8_weight(first), given.scale, given.zero_point, given.times, first.weight_scale,
        gpu.weight_sum(first), packing.padded(first.segments)[0], first.bias, behind.inverse, behind.zero_point,
        behind.times, last.input.top, last.input_scale, x.dtype,
    )
    return gpu.multiply(last, gated, behind, x, residual=x)
