"""Attention operands as quantizable sites: q, k, v and the softmax output of both matrix products.

`QuantAttention` is a diffusers attention processor. In float face it calls the processor it replaced; otherwise it
computes attention explicitly, with a quantizer on each operand that the plan names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.errors import InputError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.layers import Face
from bitbrush.numbers.grid import LayerSpec

OPERANDS = ("q", "k", "v", "softmax")


class QuantAttention(nn.Module):
    """Attention processor with quantized operands.

    Args:
        original: The processor in use before; it is the float face.
        specs: Operand name (``q``, ``k``, ``v``, ``softmax``) to spec; operands not named stay float.
        clock: For timed tables.
        times: Rows of timed tables.
    """

    def __init__(self, original: Any, specs: dict[str, LayerSpec], clock: Clock, times: int) -> None:
        super().__init__()
        self.original = original
        self.face: Face = "float"
        for name in OPERANDS:
            spec = specs[name].activation if name in specs else None
            rows = times if spec is not None and spec.timed else 1
            self.add_module(name, ActivationQuantizer(spec, (), clock, rows) if spec is not None else None)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:
        """The processor's contract, spelled out: diffusers looks at this signature to decide what to pass."""
        out: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        return out

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:
        """Same contract as ``AttnProcessor2_0.__call__`` of diffusers."""
        if self.face == "float":
            out: Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
            return out
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape if hidden_states.ndim == 4 else None
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if picture is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(picture)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        if context is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch = x.shape[0]
        q, k, v = (_heads(t, attn.heads) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        scores = self._quantized("q", q) @ self._quantized("k", k).transpose(-1, -2) * (q.shape[-1] ** -0.5)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], batch)
            scores = scores + mask.view(batch, attn.heads, -1, mask.shape[-1])
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        out = self._quantized("softmax", weights) @ self._quantized("v", v)
        return out.transpose(1, 2).flatten(2)

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, name)
        return x if quantizer is None else quantizer(x, x.ndim - 1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def install_operands(attention: Any, specs: dict[str, LayerSpec], clock: Clock, times: int) -> None:
    """Give a diffusers ``Attention`` module a `QuantAttention` processor."""
    unknown = sorted(set(specs) - set(OPERANDS))
    if unknown or not hasattr(attention, "set_processor"):
        raise InputError(
            "not an attention operand", where=", ".join(unknown) or type(attention).__name__,
            why=f"operands are {', '.join(OPERANDS)} of a diffusers Attention module",
            try_="name operands as '<attention module>:q'",
        )
    device = attention.to_q.weight.device
    former = attention.processor
    original = former.original if isinstance(former, QuantAttention) else former
    attention.set_processor(QuantAttention(original, specs, clock, times).to(device))
