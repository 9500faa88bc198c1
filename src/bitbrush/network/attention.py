"""Attention operands as quantizable sites: q, k, v and the softmax output of both matrix products.

`QuantAttention` is a diffusers attention processor. In float face it calls the processor it replaced; otherwise it
computes attention explicitly, with a quantizer on each operand that the plan names.

The explicit form makes tensors with a number for each pair of positions. So it runs in parts, over samples and, where
one sample is too large, over heads; in training each part is computed again in backward instead of being kept. Scales
are looked up once, while the clock stands, so a part that is computed again finds the same ones. Without gradients q, k
and v are rounded before, whole. Where the softmax is
not quantized, training takes the fused kernels of ``scaled_dot_product_attention``; `softmax_in_training` makes it take
them although it is.

In packed face `bitbrush.kernels.attention_ops` computes it on codes instead, where that is chosen and can be.

A softmax on a ``log2`` grid has one delta for all heads of a sample. Where the heads of a sample are in several parts,
a first pass over the parts finds it: scores and softmax are computed twice, and still no more than a part exists at a
time (`_known`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitbrush.errors import InputError
from bitbrush.network.activation import ActivationQuantizer, fused_form, round_trip
from bitbrush.network.clock import Clock
from bitbrush.network.layers import Face
from bitbrush.network.log2 import Log2Quantizer
from bitbrush.network.temporary import holding
from bitbrush.numbers.grid import GROUPED, LayerSpec
from bitbrush.numbers.straight_through import fake_quantize

OPERANDS = ("q", "k", "v", "softmax")
PART = 64 << 20
"""Bytes that the float32 scores of one part may take; a handful of tensors of that size exist at a time."""
FEWER = 4
"""Times as much without gradients on CUDA, where launching many small parts takes the host longer than the GPU."""

SoftmaxForm = Literal["exact", "float"]


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
        self.training_softmax: SoftmaxForm = "exact"
        self.kernel = "reference"  # how the packed face computes; set by kernels.use
        self.kernel_of: dict[str, str] = {}  # where that is "auto": by kind of device
        self.first_rows: dict[str, Tensor] = {}  # by device; see kernels.attention_ops
        for name in OPERANDS:
            spec = specs[name].activation if name in specs else None
            rows = times if spec is not None and spec.timed else 1
            quantizer = None if spec is None else ActivationQuantizer(spec, (), clock, rows)
            if spec is not None and spec.grid.kind == "log2":
                quantizer = Log2Quantizer(spec, specs[name].exempt, clock, rows)
            if quantizer is not None:
                quantizer.exempt = specs[name].exempt
            self.add_module(name, quantizer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tables, and have what a kernel keeps where they are now."""
        super()._apply(fn, recurse)
        if self.kernel != "reference":
            from bitbrush import kernels

            kernels.prepare(self)
        return self

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
        q, k, v = (_heads(t, attn.heads) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], len(x))
            mask = mask.view(len(x), attn.heads, -1, mask.shape[-1])
        return self._product(q, k, v, mask).transpose(1, 2).flatten(2)

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of ``[B, heads, T, d]``; the mask ``[B, heads, T or 1, T']`` is added to the scores."""
        quantizers: list[ActivationQuantizer | None] = [getattr(self, name) for name in OPERANDS]
        if any(m is not None and (m._forward_pre_hooks or m._forward_hooks) for m in quantizers):
            return _explicit(q, k, v, mask, *quantizers)  # somebody watches what they are given: in one piece
        if self.face == "packed":
            from bitbrush import kernels

            found = kernels.attend(self, q, k, v, mask)
            if found is not None:
                return found
        roundings = [self._rounding(name, t) for name, t in zip(OPERANDS, (q, k, v, q), strict=True)]
        of_q, of_k, of_v, of_softmax = roundings
        tables = [t for r in roundings if r is not None and r.tables is not None for t in r.tables]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tables))
        approximate = torch.is_grad_enabled() and self.training_softmax == "float"
        fused = self.face == "sim" and (approximate or (wanted and of_softmax is None))
        if fused or not wanted:  # whole, not part by part
            q, k, v = _rounded(of_q, q), _rounded_k(of_k, k), _rounded(of_v, v)
            of_q = of_k = of_v = None
        if fused:
            return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype))
        most = PART * FEWER if q.is_cuda and not wanted else PART
        sizes = _sizes(q, k, of_softmax is not None and _spans_batch(of_softmax), most)
        counts = -(-q.shape[0] // sizes[0]), -(-q.shape[1] // sizes[1])
        cuts = [_cut(t, sizes, counts) for t in (q, k, v, mask)]
        cuts += [_cut_rounding(r, sizes, counts) for r in (of_q, of_k, of_v)]
        cuts.append(_cut_rounding(_known(of_softmax, cuts, counts), sizes, counts))
        parts = []
        for operands in zip(*cuts, strict=True):
            if wanted and not torch.compiler.is_compiling():
                parts.append(checkpoint(_explicit, *operands, use_reentrant=False, preserve_rng_state=False,
                                        determinism_check="none"))
            else:
                parts.append(_explicit(*operands))
        return _joined(parts, counts[1])

    def _rounding(self, name: str, like: Tensor) -> _Rounding | None:
        """How an operand is rounded in this forward. The softmax is not there yet: ``like`` has its dimensions."""
        quantizer: ActivationQuantizer | None = getattr(self, name)
        if quantizer is None or not quantizer.enabled:
            return None
        like, dim = _words(quantizer, like)[1] if name == "k" else like, like.ndim - 1
        top = quantizer.top_for(like.ndim, dim)
        if name == "softmax" and quantizer.spec.mode == "dynamic":
            return _Rounding(quantizer, None, top)
        trial = quantizer.trial_tables(like.shape, dim)
        if trial is not None:
            return _Rounding(quantizer, trial, top, trial=True)
        return _Rounding(quantizer, quantizer.parameters_for(like, dim), top)


class _Rounding(NamedTuple):
    """How one operand is rounded in one forward.

    ``tables`` are (scale, reciprocal, zero_point), shaped ``[B or 1, ..]``, or (delta,) of a `Log2Quantizer`; None for
    a softmax whose scales are found at run time, in the part. ``top``: the largest code, shaped likewise where bits
    change over time. ``trial``: the tables are being trained.
    """

    quantizer: ActivationQuantizer
    tables: tuple[Tensor, ...] | None
    top: int | Tensor
    trial: bool = False


def _spans_batch(rounding: _Rounding) -> bool:
    """Whether the scale depends on all samples at once, and there is no first pass to find it (`_known`)."""
    if isinstance(rounding.quantizer, Log2Quantizer):
        return False
    return rounding.tables is None and rounding.quantizer.spec.granularity in ("tensor", "sample")


def _known(rounding: _Rounding | None, cuts: list[list[Any]], counts: tuple[int, int]) -> _Rounding | None:
    """The rounding of a softmax with its deltas, where no part alone sees all that shares one of them.

    A maximum is exact in any order, and the first pass computes every part as the second one will: the delta is that of
    attention in one piece, and its largest value is represented exactly. It has no gradient.

    Args:
        rounding: Of the softmax.
        cuts: The parts of q, k, v, mask and of the roundings of q, k and v.
        counts: Parts of the batch, and of the heads of a sample.
    """
    if rounding is None or rounding.tables is not None or not isinstance(rounding.quantizer, Log2Quantizer):
        return rounding
    scope = rounding.quantizer.spec.scope
    shared = [dim for dim in {"head": (), "sample": (1,), "tensor": (0, 1)}[scope] if counts[dim] > 1]
    if not shared:
        return rounding
    with torch.no_grad():
        found = [rounding.quantizer.delta(_weights(q, k, mask, of_q, of_k))
                 for q, k, _, mask, of_q, of_k, _ in zip(*cuts, strict=True)]
    return rounding._replace(tables=(_joined(found, counts[1]).amax(shared, keepdim=True),))


def _rounded(
    rounding: _Rounding | ActivationQuantizer | None, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``x`` rounded, in its dtype; ``dtype`` is what it is wanted in next, where that saves a pass."""
    if rounding is None:
        return x
    if isinstance(rounding, ActivationQuantizer):
        out: Tensor = rounding(x, x.ndim - 1)
        return out
    tables, top = rounding.tables, rounding.top
    if isinstance(rounding.quantizer, Log2Quantizer):
        return rounding.quantizer.round_trip(x, None if tables is None else tables[0], dtype)
    scale, inverse, zero = rounding.quantizer.parameters_for(x, x.ndim - 1) if tables is None else tables
    if rounding.trial or (torch.is_grad_enabled() and x.requires_grad):
        return fake_quantize(x, scale, zero, top, fused_form(x), inverse)
    return round_trip(x, scale, inverse, zero, top)


def _rounded_k(rounding: _Rounding | ActivationQuantizer | None, k: Tensor) -> Tensor:
    """k ``[B, heads, T', d]``; the start token's row stays as it is where it is exempt."""
    if rounding is None:
        return k
    start, words = _words(rounding.quantizer if isinstance(rounding, _Rounding) else rounding, k)
    return torch.cat([start, _rounded(rounding, words)], dim=-2) if start.shape[-2] else _rounded(rounding, words)


def _words(quantizer: ActivationQuantizer, k: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of k that stay float, the others); a text of one token has no others."""
    first = len(quantizer.exempt) if k.shape[-2] > len(quantizer.exempt) else 0
    return k[..., :first, :], k[..., first:, :]


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *roundings: _Rounding | ActivationQuantizer | None
) -> Tensor:
    """Attention with the scores written out, every operand rounded as given (q, k, v, softmax)."""
    of_softmax = roundings[3]
    logarithms = isinstance(getattr(of_softmax, "quantizer", of_softmax), Log2Quantizer)
    kept = torch.float32 if logarithms else v.dtype  # they come first: float16 has few bits of small weights
    weights = _weights(q, k, mask, roundings[0], roundings[1], kept)
    return _rounded(of_softmax, weights, v.dtype).to(v.dtype) @ _rounded(roundings[2], v)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, of_q: _Rounding | ActivationQuantizer | None,
    of_k: _Rounding | ActivationQuantizer | None, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The softmax of the scores, computed in float32 and rounded once to ``dtype``."""
    scores = _rounded(of_q, q) @ _rounded_k(of_k, k).transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if scores.is_cuda and scores.dtype == dtype and not (torch.is_grad_enabled() and scores.requires_grad):
        return torch._softmax(scores, -1, False)  # float32 within; autocast would have it write that, too
    return torch.softmax(scores.float(), dim=-1).to(dtype)


def attention_weights(attention: Any, q: Tensor, k: Tensor) -> Tensor:
    """What a diffusers ``Attention`` multiplies v with, operands rounded where its processor rounds them.

    Args:
        attention: The module, inside a forward of its denoiser where a timed table is looked up. Masks are not known.
        q, k: What its ``to_q`` and ``to_k`` answered, ``[B, T, heads * d]`` and ``[B, T', heads * d]``.

    Returns:
        ``[B, heads, T, T']``, float32.
    """
    q, k = _heads(q, attention.heads), _heads(k, attention.heads)
    q = q if attention.norm_q is None else attention.norm_q(q)
    k = k if attention.norm_k is None else attention.norm_k(k)
    processor = attention.processor
    if not isinstance(processor, QuantAttention) or processor.face == "float":
        return _weights(q, k, None, None, None)
    of_q, of_k, of_softmax = (processor._rounding(n, t) for n, t in (("q", q), ("k", k), ("softmax", q)))
    return _rounded(of_softmax, _weights(q, k, None, of_q, of_k)).float()


def _sizes(q: Tensor, k: Tensor, whole: bool, most: int) -> tuple[int, int]:
    """(samples, heads) of a part, so that its scores keep to ``most`` bytes: one head of one sample at least."""
    batch, heads = q.shape[:2]
    one = 4 * q.shape[2] * k.shape[2]
    if whole or batch * heads * one <= most:
        return batch, heads
    return (most // (heads * one), heads) if heads * one <= most else (1, max(1, most // one))


def _cut(t: Tensor | None, sizes: tuple[int, int], counts: tuple[int, int]) -> list[Any]:
    """The parts of ``[B or 1, heads or 1, ..]``, sample after sample; what broadcasts serves every part."""
    if t is None:
        return [None] * (counts[0] * counts[1])
    return [part for rows in _split(t, 0, sizes[0], counts[0]) for part in _split(rows, 1, sizes[1], counts[1])]


def _split(t: Tensor, dim: int, size: int, count: int) -> list[Tensor]:
    return [t] * count if count == 1 or t.shape[dim] == 1 else list(t.split(size, dim))


def _cut_rounding(rounding: _Rounding | None, sizes: tuple[int, int], counts: tuple[int, int]) -> list[Any]:
    if rounding is None or rounding.tables is None:
        return [rounding] * (counts[0] * counts[1])
    cuts = [_cut(t, sizes, counts) for t in rounding.tables]
    top = rounding.top
    tops = _cut(top, sizes, counts) if isinstance(top, Tensor) else [top] * len(cuts[0])
    parts = zip(zip(*cuts, strict=True), tops, strict=True)
    return [rounding._replace(tables=tables, top=part) for tables, part in parts]


def _joined(parts: list[Tensor], heads: int) -> Tensor:
    """Parts in the order of `_cut`, ``heads`` of them a sample, as one tensor."""
    if heads > 1:
        parts = [torch.cat(parts[i : i + heads], dim=1) for i in range(0, len(parts), heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def softmax_in_training(model: nn.Module, form: SoftmaxForm) -> AbstractContextManager[None]:
    """Inside the block, forwards that want gradients compute attention this way.

    ``exact``: as without gradients. ``float``: q, k and v are rounded, the softmax is not. That approximates the
    network by fused kernels; forwards under ``no_grad`` stay exact, and so does what is stored.
    """
    return holding((m for m in model.modules() if isinstance(m, QuantAttention)), "training_softmax", form)


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
    by_channel = [name for name, s in specs.items() if s.activation is not None
                  and s.activation.granularity in ("channel", "token_group", *GROUPED)]
    if by_channel:
        raise InputError("attention operands have no scales a channel or a group", where=", ".join(by_channel),
                         why="only the inputs and outputs of layers have a fixed number of channels",
                         try_="granularity = \"tensor\" for the operands")
    apart = [name for name, s in specs.items() if s.exempt]
    if apart and not attention.is_cross_attention:
        raise InputError("only cross-attention has a start token", where=f"{', '.join(apart)}: exempt",
                         why="the columns of self-attention are positions of the picture",
                         try_="exempt = [0] for the softmax of cross-attention alone, such as \"*attn2:softmax\"")
    device = attention.to_q.weight.device
    former = attention.processor
    original = former.original if isinstance(former, QuantAttention) else former
    attention.set_processor(QuantAttention(original, specs, clock, times).to(device))
