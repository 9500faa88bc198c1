"""diffusers' Attention on the CPU: layers that read the same input are one product.

Queries, keys and values of a self-attention, keys and values of a cross-attention are layers of one input, and
calibration has given them the same table for it. Then the input is encoded once, the weights are unpacked at once, and
one product makes all of them, with every number what it is without: small layers wait for operations, not for sums. And
attention over few keys is two products (`attended`).

The packed rows of the layers lie in one buffer of which their own are views, so that nothing is stored twice. A block's
class is exchanged as in `bitbrush.kernels.blocks`; whatever is not plain goes the class's own way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.kernels import cpu_onednn, cpu_plain
from bitbrush.kernels.blocks import FusedBlock, bare, plain_processor, watched
from bitbrush.kernels.joined import shared
from bitbrush.numbers import packing

if TYPE_CHECKING:
    from bitbrush.kernels.cpu_plain import Facts
    from bitbrush.network.layers import QuantLayer

KERNEL = "cpu-int8"
FEW_KEYS, MOST_SCORES = 128, 2**24
"""Up to how many keys, and how many scores (64 MB), attention is two products."""
VECTOR = 16
"""Numbers that a processor takes at a time."""
_SELF, _CONTEXT = ("to_q", "to_k", "to_v"), ("to_k", "to_v")


# ---- which attentions ------------------------------------------------------------------------------------------------
def fits(attn: Any) -> bool:
    """Whether an attention is of the plain form, whatever it is given."""
    return bare(attn) and attn.to_k is not None and attn.to_out is not None


def _ready(attn: Any, names: tuple[str, ...]) -> bool:
    """Whether the parts are now what they were: plain, all run by this kernel, watched by nobody."""
    held = attn._modules
    if type(attn.processor) is not plain_processor() or any(name not in held for name in names):
        return False
    layers = [held[name] for name in names]
    if not all(hasattr(layer, "declare_packed") and layer.face == "packed" for layer in layers) or watched(layers):
        return False
    return all(runs(layer) for layer in layers)


def runs(layer: Any) -> bool:
    """Whether this kernel runs a layer now."""
    from bitbrush import kernels

    quantizer = layer._modules.get("input")
    return quantizer is not None and quantizer.enabled and kernels.chosen(layer, "cpu") == KERNEL


# ---- layers of one input ---------------------------------------------------------------------------------------------
@torch.no_grad()
def join(layers: list[QuantLayer]) -> Facts | None:
    """Of several layers as of one, rows below one another; None where their inputs' tables or their kinds differ."""
    if not all(alike(layers[0], layer) for layer in layers):
        return None
    with torch.inference_mode(False):
        _share(layers)
        parts = [known for layer in layers if (known := cpu_plain.facts(layer)) is not None]
        first = parts[0]
        name = f"codes{first.shape.bits[0]}"
        rows = shared([layer._buffers[name] for layer in layers])  # type: ignore[misc]
        rows = packing.int8_rows(rows)[:, : first.length] if first.shape.bits == [8] else rows
        biases = [known.bias for known in parts if known.bias is not None]
        rescales = [known.rescale for known in parts if known.rescale is not None]
        made = first._replace(
            stored=rows, weight_zero=torch.cat([known.weight_zero for known in parts]),
            weight_scale=torch.cat([known.weight_scale for known in parts]),
            rescale=torch.cat(rescales) if rescales else None, sums=torch.cat([known.sums for known in parts]),
            reach=max(known.reach for known in parts),
            bias=torch.cat(biases) if biases else None, source=sum((known.source for known in parts), ()),
        )  # fmt: skip
    for layer in layers:
        layer.__dict__.pop("_cpu_facts", None)  # found again where one of them is called alone
    return made


def alike(one: QuantLayer, other: QuantLayer) -> bool:
    """Whether two packed layers can be one product: plain ones, of one kind, with the same table of the input."""
    a, b = cpu_plain.facts(one), cpu_plain.facts(other)
    if a is None or b is None or not (a.bare and b.bare):
        return False
    if one.input is None or other.input is None or one.input.spec != other.input.spec:
        return False
    tables = a.scale == b.scale and a.zero == b.zero and a.timed == b.timed and one.input.clock is other.input.clock
    return tables and a.shape == b.shape and a.length == b.length and (a.bias is None) == (b.bias is None)


def _share(layers: list[QuantLayer]) -> None:
    """Put the packed rows into one buffer, and give the layers views of it."""
    (name,) = {f"codes{bits}" for layer in layers for bits in cpu_plain.kept_shape(layer).bits}
    whole, start = shared([layer._buffers[name] for layer in layers]), 0  # type: ignore[misc]
    for layer in layers:
        stop = start + layer.out_channels_
        if layer._buffers[name]._base is not whole:  # type: ignore[union-attr]
            layer._buffers[name] = whole[start:stop]
        start = stop


class JoinedAttention(FusedBlock):
    """An Attention that makes one product of layers that read the same."""

    passes_codes = False

    def join(self: Any) -> None:
        """See `join`; where the weights are on the CPU."""
        self.joined = {}
        own = self.to_q.in_features == self.to_k.in_features and not self.is_cross_attention
        names = _SELF if own else _CONTEXT
        if not own and self.readers is not None:  # all that read the prompt are one product
            return
        if not _ready(self, names) or cpu_onednn.engine() == "absent":
            return
        layers = [self._modules[name] for name in names]
        if any(layer.weight_scale.device.type != "cpu" for layer in layers):
            return
        made = join(layers)
        if made is not None:
            self.joined[names] = made

    def forward(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:
        """The attention's output; see `diffusers.models.attention_processor.Attention`."""
        x, context = hidden_states, encoder_hidden_states
        joined = self.joined or self.readers is not None
        if attention_mask is None and not kwargs and joined and not torch.compiler.is_compiling():
            found = _attended(self, x, context)
            if found is not None:
                return found
        out: Tensor = super().forward(x, context, attention_mask, **kwargs)
        return out


def _attended(attn: Any, x: Tensor, context: Tensor | None) -> Tensor | None:
    """``[B, L, C]``; None where the class's own forward has to do it."""
    names, seen = (_SELF, x) if context is None else (_CONTEXT, context)
    if x.ndim != 3 or seen.ndim != 3 or x.device.type != "cpu" or not _ready(attn, names):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or seen.requires_grad):
        return None
    readers = None if context is None else attn.readers
    together = [attn.to_k, attn.to_v]
    parts = _joined(attn, names, seen) if readers is None else readers.take(together, seen, lambda: seen)
    if parts is None:
        return None
    parts = parts if context is None else [attn.to_q(x), *parts]
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
    last, drop = attn.to_out
    found: Tensor = drop(last(attended(q, k, v).transpose(1, 2).flatten(2)))
    return found


def _joined(attn: Any, names: tuple[str, ...], seen: Tensor) -> list[Tensor] | None:
    """Outputs of an attention's own layers of one input."""
    if names in attn.joined and attn.joined[names].stale():
        attn.join()
    known: Facts | None = attn.joined.get(names)
    made = None if known is None else cpu_plain.product(known, attn.to_k, seen)
    return None if made is None else list(made.split([attn._modules[name].out_features for name in names], dim=-1))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention ``[B, heads, L, size]`` of float tensors of that shape, without mask.

    Over few keys (the words of a prompt, for twice as many queries) as two batched products with all scores between
    them: torch's attention goes through keys and queries by blocks, and takes longer there. Sums are in another order.
    """
    (b, heads, length, size), keys = q.shape, k.shape[2]
    if keys > min(FEW_KEYS, length // 2) or q.dtype != torch.float32 or b * heads * length * keys > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
    more = -keys % VECTOR  # keys of no weight: rows of scores that are whole vectors
    left = q.reshape(b * heads, length, size)
    right, values = (F.pad(t, (0, 0, 0, more)).reshape(b * heads, keys + more, size) for t in (k, v))
    base = F.pad(q.new_zeros(keys), (0, more), value=-torch.inf)
    scores = torch.baddbmm(base, left, right.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(torch.softmax(scores, -1, out=scores), values).view(b, heads, length, size)
