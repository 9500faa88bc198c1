"""diffusers' BasicTransformerBlock of a DiT on codes: norms that the timestep and the class modulate (adaLN-zero); see
`bitbrush.kernels.blocks`.

Every block makes scales, shifts and gates of timestep and class by three layers of its own, which wait for nothing that
the network computes: the first block that is called makes those of all (`gpu_modulation`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from bitbrush.kernels import direct, gpu, gpu_weights, norm_ops  # noqa: F401 - the operations are registered by their module
from bitbrush.kernels.block_transformer import (
    Heads,
    attended,
    heads_of,
    joined_where_run,
    normed,
    odd_attention,
    odd_feed_forward,
    products,
    unpacked_where_run,
)
from bitbrush.kernels.blocks import FusedBlock, first_reason, plain_processor, ready, watched
from bitbrush.kernels.gpu_modulation import Modulations
from bitbrush.kernels.gpu_weights import Held
from bitbrush.kernels.joined import Joined

_SELF = "queries, keys and values"


def unfit(block: Any) -> str | None:
    """Why a block cannot be computed on codes, whatever it is given."""
    from diffusers.models.activations import GELU
    from diffusers.models.normalization import AdaLayerNormZero

    if hasattr(block, "fuser") or block.attn2 is not None or block._chunk_size is not None:
        return "a part that is not in every block of its kind"
    if block.pos_embed is not None or block.only_cross_attention:
        return "positions, or no self-attention"
    first = block.norm1
    if type(first) is not AdaLayerNormZero or first.emb is None:
        return f"a norm that is modulated by {type(first).__name__}"
    if type(first.norm) is not nn.LayerNorm or type(block.norm3) is not nn.LayerNorm:
        return "a norm other than LayerNorm"
    odd = odd_feed_forward(block.ff, GELU) or odd_attention(block.attn1)
    return odd or first_reason(_layers(block))


def _layers(block: Any) -> dict[str, Any]:
    """Those whose input is encoded by what stands before them."""
    named = {f"attn1.{to}": getattr(block.attn1, to) for to in ("to_q", "to_k", "to_v")}
    named |= {"attn1.to_out.0": block.attn1.to_out[0]}
    return named | {"ff.net.0.proj": block.ff.net[0].proj, "ff.net.2": block.ff.net[2]}


class FusedAdaptive(FusedBlock):
    """A BasicTransformerBlock with adaLN-zero whose products pass codes to one another."""

    norm_types = ("ada_norm_zero",)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
        class_labels: Any = None, added_cond_kwargs: Any = None,
    ) -> Tensor:
        """The block's output; see `diffusers.models.attention.BasicTransformerBlock`."""
        x = hidden_states
        able = attention_mask is None and not cross_attention_kwargs and x.ndim == 3
        parts = _plain_now(self, x) if able else None
        if parts is None:
            out: Tensor = self.plain_class.forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )
            return out
        shift, scale, gate, shift2, scale2, gate2 = _modulation(parts, self.gpu_readers, timestep, class_labels, x)
        held = gpu_weights.held(self.unpacked, x)
        x = _self_attention(parts, self.joined.get(_SELF), x, held, scale, shift, gate)
        return _feed_forward(parts, x, held, scale2, shift2, gate2)

    def join(self: Any) -> None:
        """Queries, keys and values as one product, where the weights are on a GPU."""
        made = joined_where_run([self.attn1.to_q, self.attn1.to_k, self.attn1.to_v])
        self.joined = {} if made is None else {_SELF: made}
        self.unpacked = unpacked_where_run(made, [self.attn1.to_out[0], self.ff.net[0].proj, self.ff.net[2]])


class _Parts(NamedTuple):
    """The block's parts as they are now: whoever puts others in shall be seen."""

    adaptive: Any
    norm: Any
    own: Heads
    ff: Any
    act: Any
    last: Any

    def layers(self) -> tuple[Any, ...]:
        """All that are given codes."""
        return (*self.own[1:], self.act._modules["proj"], self.last)

    def others(self) -> tuple[Any, ...]:
        """All that somebody may look into, but those."""
        first, emb = self.adaptive._modules, self.adaptive.emb
        inside = (emb, *emb._modules.values(), *emb.timestep_embedder._modules.values())
        return (self.adaptive, first["norm"], self.norm, self.own.module, self.ff, self.act, *filter(None, inside))


def _plain_now(block: Any, x: Tensor) -> _Parts | None:
    """The block's parts, or None where somebody has changed its attention or looks into it, or where not all of it is
    run by this kernel."""
    held = block._modules
    try:
        net = held["ff"]._modules["net"]._modules
        parts = _Parts(held["norm1"], held["norm3"], heads_of(held["attn1"]), held["ff"], net["0"], net["2"])
        layers, others = parts.layers(), parts.others()
    except (KeyError, AttributeError):  # another module stands where one of the class's own did
        return None
    if type(parts.own.module.processor) is not plain_processor() or block._chunk_size is not None:
        return None
    return None if watched(others) or watched(layers) or not ready(layers, x) else parts


# ---- parts -----------------------------------------------------------------------------------------------------------
def _modulation(parts: _Parts, shared: Any, timestep: Any, labels: Any, x: Tensor) -> tuple[Tensor, ...]:
    """(shift, scale, gate) ``[B, C]`` of the attention's norm and of the feed-forward layer's."""
    norm, made = parts.adaptive, None
    if isinstance(shared, Modulations) and isinstance(timestep, Tensor) and isinstance(labels, Tensor):
        made = shared.of(norm, timestep, labels, x.dtype)
    if made is None:
        made = norm.linear(norm.silu(norm.emb(timestep, labels, hidden_dtype=x.dtype)))
        made = made.to(x.dtype).unflatten(1, (6, -1)).transpose(0, 1).contiguous()
    return made.unbind(0)


def _self_attention(
    parts: _Parts, join: Joined | None, x: Tensor, held: Held, scale: Tensor, shift: Tensor, gate: Tensor
) -> Tensor:
    attn = parts.own
    layers = [attn.q, attn.k, attn.v]
    codes, given = normed(parts.adaptive._modules["norm"], layers, x, scale, shift, join=join)
    return attended(attn, products(layers, join, codes, given, x, held), x, held, gate)


def _feed_forward(parts: _Parts, x: Tensor, held: Held, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
    first, last = parts.act._modules["proj"], parts.last
    (codes,), (given,) = normed(parts.norm, [first], x, scale, shift)
    hidden = gpu.multiply(first, codes, given, x, weight=gpu_weights.of(held, first))
    behind = gpu.given_input(last, x)
    activated = direct.OPS.gelu_encode(
        hidden, parts.act.approximate == "tanh", behind.inverse, behind.encoding, behind.times, gpu.facts(last).top,
        gpu.input_scale(last), *gpu.sorting(last),
    )
    weight = gpu_weights.of(held, last)
    return gpu.multiply(last, activated, behind, x, shared=gate, residual=x, gate=True, weight=weight)
