"""diffusers' BasicTransformerBlock of a UNet on codes; see `bitbrush.kernels.blocks`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.kernels import (  # noqa: F401 - the operations are registered by their modules
    attend_ops,
    direct,
    gpu,
    gpu_weights,
    joined,
    joined_ops,
)
from bitbrush.kernels.blocks import FusedBlock, bare, first_reason, plain_processor, ready, watched
from bitbrush.kernels.gpu import Given
from bitbrush.kernels.gpu_weights import Held, Together
from bitbrush.kernels.joined import Joined

_OPS = direct.OPS
_SELF, _CONTEXT = "queries, keys and values", "keys and values of the context"


def unfit(block: Any) -> str | None:
    """Why a block cannot be computed on codes, whatever it is given."""
    from diffusers.models.activations import GEGLU

    if block.norm_type != "layer_norm" or block.pos_embed is not None or block.only_cross_attention:
        return "a norm that depends on time, positions, or no self-attention"
    if hasattr(block, "fuser") or block.attn2 is None or block._chunk_size is not None:
        return "a part that is not in every block of its kind"
    if not all(type(norm) is nn.LayerNorm for norm in (block.norm1, block.norm2, block.norm3)):
        return "a norm other than LayerNorm"
    odd = odd_attention(block.attn1) or odd_attention(block.attn2) or odd_feed_forward(block.ff, GEGLU)
    return odd or first_reason(_layers(block))


def odd_attention(attn: Any) -> str | None:
    """Why an attention is not plain."""
    if type(attn.processor) is not plain_processor():
        return f"attention by {type(attn.processor).__name__}"
    if not bare(attn):
        return "an attention with norms or residuals of its own"
    return "it drops values" if attn.to_out[1].p > 0 and attn.training else None


def odd_feed_forward(ff: Any, kind: type) -> str | None:
    """Why a feed-forward layer is not plain, with an activation of that kind."""
    if type(ff.net[0]) is not kind or len(ff.net) > 4:
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
        able = not asked and encoder_hidden_states is not None and hidden_states.ndim == 3
        parts = _plain_now(self, hidden_states) if able else None
        if parts is None or encoder_hidden_states is None:
            out: Tensor = self.plain_class.forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )
            return out
        held = gpu_weights.held(self.unpacked, hidden_states)
        x = _self_attention(parts, self.joined.get(_SELF), hidden_states, held)
        x = _cross_attention(parts, self.joined.get(_CONTEXT), self.gpu_readers, x, encoder_hidden_states, held)
        return _feed_forward(parts, x, held)

    def join(self: Any) -> None:
        """Queries, keys and values as one product, and those of the context, where the weights are on a GPU."""
        self.joined = {}
        for name, layers in (
            (_SELF, [self.attn1.to_q, self.attn1.to_k, self.attn1.to_v]), (_CONTEXT, [self.attn2.to_k, self.attn2.to_v])
        ):
            made = joined_where_run(layers)
            if made is not None:
                self.joined[name] = made
        rest = [self.attn1.to_out[0], self.attn2.to_q, self.attn2.to_out[0], self.ff.net[0].proj, self.ff.net[2]]
        self.unpacked = unpacked_where_run(self.joined.get(_SELF), rest)


def joined_where_run(layers: list[Any]) -> Joined | None:
    """The layers as one, where all of them are run by this kernel and can be joined."""
    return joined.join(layers) if _run_here(layers) and joined.able(layers) else None


def unpacked_where_run(join: Joined | None, layers: list[Any]) -> Together | None:
    """What is unpacked at once of joined layers and others, where all of those are run by this kernel."""
    if not _run_here(layers):
        return None
    return gpu_weights.together(layers if join is None else [join, *layers])


def _run_here(layers: list[Any]) -> bool:
    from bitbrush import kernels

    packed = all(hasattr(layer, "declare_packed") for layer in layers)
    device = layers[0].weight_scale.device.type if packed else ""
    return packed and all(kernels.chosen(layer, device) == "cuda-int8" for layer in layers)


class Heads(NamedTuple):
    """An attention, and its layers."""

    module: Any
    q: Any
    k: Any
    v: Any
    last: Any


class _Parts(NamedTuple):
    """The block's parts as they are now: whoever puts others in shall be seen."""

    norms: tuple[Any, Any, Any]
    own: Heads
    cross: Heads
    ff: tuple[Any, Any]
    first: Any
    last: Any

    def layers(self) -> tuple[Any, ...]:
        """All that multiply."""
        return (*self.own[1:], *self.cross[1:], self.first, self.last)


def heads_of(attn: Any) -> Heads:
    """An attention and its layers as they are now; KeyError or AttributeError where others stand in their place."""
    held = attn._modules
    return Heads(attn, held["to_q"], held["to_k"], held["to_v"], held["to_out"]._modules["0"])


def _parts(block: Any) -> _Parts:
    held = block._modules
    ff, net = held["ff"], held["ff"]._modules["net"]._modules
    return _Parts((held["norm1"], held["norm2"], held["norm3"]), heads_of(held["attn1"]), heads_of(held["attn2"]),
                  (ff, net["0"]), net["0"]._modules["proj"], net["2"])  # fmt: skip


def _plain_now(block: Any, x: Tensor) -> _Parts | None:
    """The block's parts, or None where somebody has changed its attentions or looks into it, or where not all of it is
    run by this kernel."""
    kind = plain_processor()
    try:
        parts = _parts(block)
    except (KeyError, AttributeError):  # another module stands where one of the class's own did
        return None
    if type(parts.own.module.processor) is not kind or type(parts.cross.module.processor) is not kind:
        return None
    layers = parts.layers()
    if block._chunk_size is not None or watched((*parts.norms, parts.own.module, parts.cross.module, *parts.ff)):
        return None
    return None if watched(layers) or not ready(layers, x) else parts


# ---- parts -----------------------------------------------------------------------------------------------------------
def normed(
    norm: nn.LayerNorm, layers: list[Any], x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
    join: Joined | None = None,
) -> tuple[list[Tensor], list[Given]]:
    """Codes of the norm (and its modulation) for the layers, and what encoded them.

    Args:
        join: The layers as one product.

    Returns:
        Codes of all layers, one below the other, in one tensor; or a tensor of each layer's, where they have several
        sums that are not known to be over the same channels.
    """
    given = [gpu.given_input(layer, x) for layer in layers]
    if join is None and any(map(gpu.several, layers)):
        return [_normed(norm, [la], x, [g], scale, shift) for la, g in zip(layers, given, strict=True)], given
    return [_normed(norm, layers, x, given, scale, shift)], given


def _normed(
    norm: nn.LayerNorm, layers: list[Any], x: Tensor, given: list[Given], scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Codes for layers whose sums are over the same channels."""
    weights = norm._parameters
    codes: Tensor = _OPS.layer_norm_encode(
        x, weights["weight"], weights["bias"], norm.eps, [g.inverse for g in given], [g.encoding for g in given],
        [g.times for g in given], [gpu.facts(layer).top for layer in layers],
        [gpu.input_scale(layer) for layer in layers], scale, shift, *gpu.sorting(layers[0]),
    )
    return codes


def products(
    layers: list[Any], join: Joined | None, codes: list[Tensor], given: list[Given], x: Tensor, held: Held
) -> list[Tensor]:
    """Each layer's output ``[B, L, N]`` for its codes: of one product where the layers are joined.

    Args:
        codes: A tensor of each layer's, or one of all.
        held: Weights that are unpacked already (`gpu_weights.held`).
    """
    first = codes[0]
    if join is None or join.codes.device != first.device:  # offloading moves the layers' tensors one by one
        own = codes if len(codes) == len(layers) else first.reshape(len(layers), -1, first.shape[-1]).unbind(0)
        return [gpu.multiply(layer, c, g, x, weight=gpu_weights.of(held, layer))
                for layer, c, g in zip(layers, own, given, strict=True)]  # fmt: skip
    out = join.multiply(first, given, x.dtype, gpu_weights.of(held, join))
    return list(out.reshape(len(layers), *x.shape[:-1], -1).unbind(0))


def attended(attn: Heads, parts: list[Tensor], x: Tensor, held: Held, gate: Tensor | None = None) -> Tensor:
    """``x`` and what the heads make of queries, keys and values, through the last layer.

    Args:
        held: See `products`.
        gate: ``[B, C]``, what that is multiplied by.
    """
    heads, last = attn.module.heads, attn.last
    weight = gpu_weights.of(held, last)
    added: dict[str, Any] = {"shared": gate, "residual": x, "gate": gate is not None, "weight": weight}
    q, k, v = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]
    given = gpu.given_input(last, x)
    if attend_ops.fits(q, k, given.kind) and not gpu.several(last):
        codes = _OPS.attend_encode(q, k, v, given.inverse, given.encoding, given.times, gpu.facts(last).top,
                                   gpu.input_scale(last))  # fmt: skip
        return gpu.multiply(last, codes, given, x, **added)
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
    side = found.transpose(1, 2).flatten(2)
    given = gpu.given_input(last, side)
    codes = gpu.input_rows(last, side, given)
    return gpu.multiply(last, codes, given, side, **added)


def _self_attention(parts: _Parts, join: Joined | None, x: Tensor, held: Held) -> Tensor:
    attn = parts.own
    layers = [attn.q, attn.k, attn.v]
    codes, given = normed(parts.norms[0], layers, x, join=join)
    return attended(attn, products(layers, join, codes, given, x, held), x, held)


def _cross_attention(
    parts: _Parts, join: Joined | None, readers: Any, x: Tensor, context: Tensor, held: Held
) -> Tensor:
    attn = parts.cross
    layers = [attn.k, attn.v]
    codes, given = normed(parts.norms[1], [attn.q], x)
    query = products([attn.q], None, codes, given, x, held)
    taken = None if readers is None else readers.take(layers, context, lambda: context)
    if taken is not None:
        return attended(attn, query + taken, x, held)
    given = [gpu.given_input(layer, context) for layer in layers]
    codes = [gpu.input_rows(layer, context, g) for layer, g in zip(layers, given, strict=True)]
    codes = codes if join is None else [torch.cat(codes)]
    return attended(attn, query + products(layers, join, codes, given, context, held), x, held)


def _feed_forward(parts: _Parts, x: Tensor, held: Held) -> Tensor:
    first, last = parts.first, parts.last
    weight, weight_behind = gpu_weights.of(held, first), gpu_weights.of(held, last)
    (codes,), (given,) = normed(parts.norms[2], [first], x)
    behind = gpu.given_input(last, x)
    if gpu.several(first) or gpu.several(last):
        both = gpu.multiply(first, codes, given, x, weight=weight)
        made = _OPS.geglu_encode(both, behind.inverse, behind.encoding, behind.times, gpu.facts(last).top,
                                 gpu.input_scale(last), *gpu.sorting(last))  # fmt: skip
        return gpu.multiply(last, made, behind, x, residual=x, weight=weight_behind)
    gated = _OPS.int8_gated(
        codes, gpu.int8_weight(first) if weight is None else weight, given.scale, given.zero_point, given.times,
        first._buffers["weight_scale"], gpu.weight_sum(first), gpu.facts(first).widths[0], first._parameters["bias"],
        behind.inverse, behind.encoding, behind.times, gpu.facts(last).top, gpu.input_scale(last), x.dtype,
    )
    return gpu.multiply(last, gated, behind, x, residual=x, weight=weight_behind)
