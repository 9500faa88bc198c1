"""Attention on codes, where a plan quantizes all four operands: a torch op, and which attentions it serves.

    bitbrush::int8_attention    codes of q, k and v to attention: Triton on CUDA, plain torch elsewhere

With integer sums ``S = sum (code_q - zero_q) (code_k - zero_k)``, everything in float32 but the integers:

    scores = (S * (scale_q * scale_k)) * size**-0.5          p = softmax(scores)          codes of p by the codec
    y = (sum (code_p - zero_p) (code_v - zero_v) * scale_p) * scale_v                     one rounding to the dtype

That is what `bitbrush.network.attention` simulates, less its rounding: in half precision that rounds the decoded
operands, scores and probabilities to the dtype, which is not done here. Codes of q, k and v and all sums are equal on
every device; a code of the softmax may differ by one where exponentials or their sum differ in a last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitbrush.kernels import gpu_decode, int8_ops, triton_attention
from bitbrush.kernels.triton_attention import Kept, Table
from bitbrush.kernels.triton_int8 import ONE_ROW
from bitbrush.numbers.codec import encode

if TYPE_CHECKING:
    from bitbrush.network.activation import ActivationQuantizer

KERNEL = "cuda-int8"
OPERANDS = ("q", "k", "v", "softmax")
MOST_KEYS = 33_025
"""The sum of so many products of codes up to 255 fits int32."""
MOST_SIZE = 256
"""Channels of a head."""
_OPS = torch.ops.bitbrush
_LIBRARY = torch.library.Library("bitbrush", "FRAGMENT")
_LIBRARY.define(
    "int8_attention(Tensor q, Tensor k, Tensor v, Tensor[] scale, Tensor[] zero_point, Tensor[] times, Tensor inverse, "
    "int top, int batch, int heads, int size, ScalarType dtype) -> Tensor"
)


# ---- which attentions ------------------------------------------------------------------------------------------------
def has_operands(module: nn.Module) -> bool:
    """Whether a module is a processor of attention with quantized operands (`bitbrush.network.attention`)."""
    return hasattr(module, "training_softmax")


def why_not(name: str, processor: Any, device_type: str) -> str | None:
    """Why kernel ``name`` cannot compute an attention, or None when it can. The reference computes all."""
    if name == "reference":
        return None
    if name != KERNEL:
        return f"only {KERNEL} computes attention on codes"
    return gpu_decode.no_triton(device_type) or unable(processor)


def unable(processor: Any) -> str | None:
    """Why an attention cannot be computed on codes on any device, or None when it can."""
    return next(filter(None, (_odd(name, getattr(processor, name)) for name in OPERANDS)), None)


def _odd(name: str, quantizer: ActivationQuantizer | None) -> str | None:
    """Why an operand of attention does not go into an int8 product."""
    if quantizer is None:
        return f"{name} stays float, and a product on codes needs both its operands quantized"
    spec = quantizer.spec
    if spec.grid.kind == "log2":
        octaves = 1 << spec.grid.bits
        return f"{name} on a log2 grid: powers of two over {octaves} octaves, which are left to a product of floats"
    if spec.mode != "static" or spec.granularity != "tensor":
        return f"{name} has scales found at run time, or more than one"
    if spec.time_bits:
        return f"{name} has bits that change over time"
    return f"{name}: the start token stays float" if quantizer.exempt else None


def leaves(processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why this call is left to the reference, or None.

    Args:
        q, k, v: ``[B, heads, L or L', size]``.
        mask: Of the attention.
    """
    quantizers = [getattr(processor, name) for name in OPERANDS]
    if processor.face != "packed" or unable(processor) is not None:
        return "the attention is simulated"
    if not all(quantizer.enabled for quantizer in quantizers):
        return "an operand is switched off"
    if any(t is not None for m in quantizers for t in (m.trial_scale, m.trial_zero_point, m.trial_rows,
                                                       m.trial_mixture)):
        return "scales are being trained"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return "a gradient is wanted"
    if mask is not None:
        return "a mask"
    if q.shape[-1] > MOST_SIZE or k.shape[2] > MOST_KEYS or v.shape != k.shape:
        return f"heads of more than {MOST_SIZE} channels, or more than {MOST_KEYS} keys"
    return "samples at different times" if any(len(_times(processor, m)) > 1 for m in quantizers) else None


def _times(processor: Any, quantizer: ActivationQuantizer) -> Tensor:
    """Row of an operand's table for each sample, or the first one where there is one row."""
    rows = quantizer.rows()
    return _first_row(processor, quantizer.scale.device) if rows is None else rows


def _first_row(processor: Any, device: torch.device) -> Tensor:
    """int64 ``[1]``, kept: graphs need not fill it."""
    kept: dict[str, Tensor] = processor.first_rows
    if str(device) in kept:
        return kept[str(device)]
    with torch.inference_mode(False), torch.no_grad():
        found = torch.zeros(1, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling():
        kept[str(device)] = found
    return found


def prepare(processor: Any) -> None:
    """Make what is kept of an attention where its tables are now, so that no graph has to."""
    for quantizer in (getattr(processor, name) for name in OPERANDS):
        if quantizer is not None and quantizer.spec.mode == "static" and not quantizer.scale.is_meta:
            _first_row(processor, quantizer.scale.device)


# ---- a call ----------------------------------------------------------------------------------------------------------
def given(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What the operation is given for q, k and v ``[B, heads, L or L', size]``."""
    quantizers = [getattr(processor, name) for name in OPERANDS]
    times = [_times(processor, quantizer) for quantizer in quantizers]
    codes = [_codes(m, time, x) for m, time, x in zip(quantizers[:3], times[:3], (q, k, v), strict=True)]
    last = quantizers[3]
    return (*codes, [m.scale for m in quantizers], [m.zero_point for m in quantizers], times, last.inverse_scale,
            last.top, q.shape[0], q.shape[1], q.shape[3], q.dtype)


def run(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention ``[B, heads, L, size]`` on codes, in the dtype of q."""
    y: Tensor = _OPS.int8_attention(*given(processor, q, k, v))
    return y.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def _codes(quantizer: ActivationQuantizer, times: Tensor, x: Tensor) -> Tensor:
    """Codes less 128 of ``[B, heads, L, size]`` as rows of all heads, padded: by one kernel, or written out where a
    compiler can join it with what stands before."""
    rows = x.transpose(1, 2).flatten(2).flatten(0, 1)
    counts = [rows.shape[1]]
    if torch.compiler.is_compiling():
        zero = quantizer.zero_point.float().index_select(0, times)
        inverse = quantizer.inverse_scale.index_select(0, times)
        return int8_ops.laid_out(encode(rows, inverse, zero, quantizer.top), zero, counts, None)
    codes: Tensor = _OPS.int8_encode(rows, quantizer.inverse_scale, quantizer.zero_point, times, ONE_ROW, counts,
                                     quantizer.top, [], 1, None)
    return codes


# ---- the operation ---------------------------------------------------------------------------------------------------
def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor],
    inverse: Tensor, top: int, batch: int, heads: int, size: int, dtype: torch.dtype,
) -> Tensor:
    tables = [Table(*each) for each in zip(scale, zero_point, times, strict=True)]
    return triton_attention.attention(q, k, v, tables, inverse, top, batch, heads, size, dtype)


def _attention_plain(
    q: Tensor, k: Tensor, v: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor],
    inverse: Tensor, top: int, batch: int, heads: int, size: int, dtype: torch.dtype,
) -> Tensor:
    tables = [Table(*each) for each in zip(scale, zero_point, times, strict=True)]
    totals = plain_parts(q, k, v, tables, inverse, top, batch, heads, size).totals
    return plain_output(totals, tables, batch, dtype)


def plain_parts(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Table], inverse: Tensor, top: int, batch: int, heads: int, size: int
) -> Kept:
    """The integers of the definition, from exact products of float64."""
    zero = [_now(table.zero_point, table) for table in tables]
    values = [_values(codes, batch, heads, size) + (128 - z) for codes, z in zip((q, k, v), zero[:3], strict=True)]
    sums = (values[0] @ values[1].transpose(1, 2)).to(torch.int32)
    scores = (sums.float() * (_now(tables[0].scale, tables[0]) * _now(tables[1].scale, tables[1]))) * size**-0.5
    codes = encode(torch.softmax(scores, -1), _now(inverse, tables[3]), zero[3], top)
    return Kept(sums, codes.to(torch.uint8), plain_totals(codes, values[2], zero[3]))


def plain_totals(codes: Tensor, v: Tensor, zero: Tensor) -> Tensor:
    """int32 sums of ``(code_p - zero_p)`` and v less its zero-point (float64 integers)."""
    return ((codes.double() - zero) @ v).to(torch.int32)


def plain_output(totals: Tensor, tables: list[Table], batch: int, dtype: torch.dtype) -> Tensor:
    """``[B, L, heads * size]`` of int32 sums ``[B * heads, L, size]``."""
    y = (totals.float() * _now(tables[3].scale, tables[3])) * _now(tables[2].scale, tables[2])
    return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2).to(dtype)


def _now(table: Tensor, of: Table) -> Tensor:
    """The row ``[T, 1]`` that counts, float32 ``[1, 1]``."""
    return table.index_select(0, of.times).float()


def _values(codes: Tensor, batch: int, heads: int, size: int) -> Tensor:
    """Rows of codes as float64 ``[B * heads, L, size]``."""
    whole = codes[:, : heads * size].double().reshape(batch, -1, heads, size)
    return whole.transpose(1, 2).flatten(0, 1)


def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, scale: list[Tensor], zero_point: list[Tensor], times: list[Tensor],
    inverse: Tensor, top: int, batch: int, heads: int, size: int, dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((batch, q.shape[0] // batch, heads * size), dtype=dtype)


_LIBRARY.impl("int8_attention", _attention_cuda, "CUDA")
_LIBRARY.impl("int8_attention", _attention_plain, "CPU")
torch.library.register_fake("bitbrush::int8_attention", _attention_shape, lib=_LIBRARY)
