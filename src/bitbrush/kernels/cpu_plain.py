"""Packed layers of the plain kind on the CPU, in the fewest operations: what `cpu_fused` computes for all kinds.

Plain: one static scale (or one for all samples at their time), one K segment, rows of the same bits. Small layers wait
longer for what is looked up and for one more pass over a tensor than for their product. So all that follows from the
layer alone is found once (`Facts`), and its tensors are asked at every call whether they are still the same.

Beside its packed bytes a layer keeps the integer sum of every weight row, four bytes a row: to find it again takes as
long as a small product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import cpu_float, cpu_onednn
from bitbrush.kernels.cpu_layout import Shape, framed, kept_shape, windows
from bitbrush.kernels.cpu_weights import plain_rows
from bitbrush.numbers import packing
from bitbrush.numbers.codec import encode_shifted

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer


class Facts(NamedTuple):
    """What `run` needs of a layer.

    ``scale``, ``zero``, ``inverse``: the input's table, one entry a row. ``stored``: packed rows; of 8 bits, int8 as
    they are wanted. ``rescale``: weight scales ``[N]``, times the input's where that is one for all times. ``sums``:
    of weight rows, int32 ``[N]``; ``reach``: their largest sum of magnitudes. ``bare``: a product of the input as it
    lies, nothing around it. ``source``: the tensors that all this was read from or is a view of, and their versions.
    """

    shape: Shape
    scale: list[float]
    zero: list[int]
    inverse: tuple[Tensor, ...]
    timed: bool
    stored: Tensor
    length: int
    weight_zero: Tensor
    weight_scale: Tensor
    rescale: Tensor | None
    sums: Tensor
    reach: int
    bias: Tensor | None
    bare: bool
    source: tuple[tuple[dict[str, Any], str, Tensor, int], ...]

    def rows(self) -> Tensor:
        """The weight, int8 ``[N, K]``."""
        return _rows(self.stored, self.shape, self.weight_zero, self.length)

    def rescaled(self, row: int) -> Tensor:
        """What sums are multiplied by at a row of the table: both scales' products ``[N]``."""
        return self.weight_scale * self.scale[row] if self.rescale is None else self.rescale

    def stale(self) -> bool:
        """Whether a tensor was replaced or written to since."""
        for held, name, t, version in self.source:  # noqa: SIM110 - a generator takes twice as long
            if held.get(name) is not t or t._version != version:
                return True
        return False


def _rows(stored: Tensor, shape: Shape, zero: Tensor, length: int) -> Tensor:
    return stored if shape.bits == [8] else plain_rows(stored, shape.bits[0], shape.halved[0], zero, length)


# ---- what is found once ----------------------------------------------------------------------------------------------
def facts(layer: QuantLayer) -> Facts | None:
    """Of a plain layer; None of any other."""
    kept: Facts | int | None = layer.__dict__.get("_cpu_facts", 0)
    if kept is None or (isinstance(kept, Facts) and not kept.stale()):
        return kept
    layer.__dict__["_cpu_facts"] = found = _found(layer)
    return found


def _plain(layer: QuantLayer, shape: Shape) -> bool:
    spec, quantizer = layer.spec, layer.input
    if quantizer is None or quantizer.spec.mode != "static" or quantizer.spec.time_bits or spec.weight is None:
        return False
    if quantizer.spec.granularity != "tensor":  # groups: see `sums`
        return False
    if spec.input_scale or spec.rotation != "none" or spec.weight.row_bits:
        return False
    return len(shape.segments) == 1 and len(shape.bits) == 1


def _found(layer: QuantLayer) -> Facts | None:
    shape, quantizer = kept_shape(layer), layer.input
    if quantizer is None or not _plain(layer, shape):
        return None
    names: list[tuple[dict[str, Any], str]] = []
    names += [(quantizer._buffers, name) for name in ("scale", "inverse_scale", "zero_point")]
    names += [(layer._buffers, name) for name in (f"codes{shape.bits[0]}", "weight_zero_point", "weight_scale")]
    names += [] if layer.bias is None else [(layer._parameters, "bias")]
    tensors_of: list[Any] = [held[name] for held, name in names]
    if any(t.is_inference() for t in tensors_of):
        return None  # such tensors do not say when they are written to
    source = tuple((held, name, t, t._version) for (held, name), t in zip(names, tensors_of, strict=True))
    (scale, inverse, zero), stored, length = (t.flatten() for t in tensors_of[:3]), tensors_of[3], layer.row_length
    stored = packing.int8_rows(stored)[:, :length] if shape.bits == [8] else stored
    weight_scale = tensors_of[5].detach().view(-1)
    weight = _rows(stored, shape, tensors_of[4], length)
    return Facts(
        shape, scale.tolist(), [int(z) for z in zero.tolist()], inverse.unbind(), quantizer.spec.timed, stored, length,
        tensors_of[4], weight_scale, weight_scale * float(scale) if len(scale) == 1 else None,
        weight.sum(dim=1, dtype=torch.int32), cpu_float.reach(weight),
        None if layer.bias is None else layer.bias.detach().float(), _bare(shape), source,
    )  # fmt: skip


def _bare(shape: Shape) -> bool:
    aligned = shape.segments[0] % packing.SEGMENT_ALIGN == 0
    return aligned and shape.kernel == [1, 1] and shape.stride == [1, 1] and not any(shape.frame)


def kept_bytes(model: nn.Module) -> int:
    """Bytes that layers and joined layers of a model keep beside its parameters and buffers, every piece once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    for module in model.modules():
        joined = [*module.__dict__.get("joined", {}).values(), getattr(module.__dict__.get("readers"), "joined", None)]
        for known in (module.__dict__.get("_cpu_facts"), *joined):
            for tensor in known if isinstance(known, Facts) else ():
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


# ---- the layer -------------------------------------------------------------------------------------------------------
def run(layer: QuantLayer, x: Tensor) -> Tensor | None:
    """Output of a plain layer in the dtype of ``x``, without a low-rank branch; pictures leave in channels-last order.
    None where it is not plain, or where samples are at different times."""
    known, conv = facts(layer), isinstance(layer, nn.Conv2d)
    if known is None or (conv and x.ndim != 4):
        return None
    row = row_now(layer) if known.timed else 0
    if row is None:
        return None
    if known.bare:
        y = _pointwise(known, x.permute(0, 2, 3, 1) if conv else x, row)
    else:
        y = _framed(known, x.permute(0, 2, 3, 1) if conv else x.reshape(x.shape[:-1].numel(), 1, 1, -1), row)
    y = y if x.dtype == torch.float32 else y.to(x.dtype)
    return y.permute(0, 3, 1, 2) if conv else y if known.bare else y.view(*x.shape[:-1], -1)


def product(known: Facts, layer: QuantLayer, x: Tensor) -> Tensor | None:
    """What `run` gives for tokens ``[.., C]``, of facts that hold for several layers, of which ``layer`` is one."""
    row = row_now(layer) if known.timed else 0
    return None if row is None or x.numel() == 0 else _pointwise(known, x, row).to(x.dtype)


def row_now(layer: QuantLayer) -> int | None:
    """The row of the table that serves all samples now."""
    at = None if layer.input is None else layer.input.rows()
    every = [0] if at is None else at.tolist()
    return every[0] if all(r == every[0] for r in every) else None


def _pointwise(known: Facts, pixels: Tensor, row: int) -> Tensor:
    """``[.., N]`` of ``[.., C]``."""
    c, n = pixels.shape[-1], known.weight_scale.shape[0]
    made = _in_floats(known, pixels if pixels.ndim == 4 else pixels.reshape(-1, 1, 1, c), row)
    if made is not None:
        return made.view(*pixels.shape[:-1], n)
    few = cpu_onednn.few(pixels.numel() // c, c, n)
    codes = encode_shifted(pixels, known.inverse[row], known.zero[row], known.shape.extremes[0],
                           cpu_onednn.OFFSET if few else 0)  # fmt: skip
    return _product(known, codes.reshape(-1, c), row, few).view(*pixels.shape[:-1], n)


def _framed(known: Facts, pixels: Tensor, row: int) -> Tensor:
    """``[B, H', W', N]`` of ``[B, H, W, C]``."""
    shape, n = known.shape, known.weight_scale.shape[0]
    made = _in_floats(known, pixels, row)
    if made is not None:
        return made
    few = shape.few(pixels, n)
    codes = framed(pixels, known.inverse[row], known.zero[row], shape.extremes[0], shape.frame,
                   cpu_onednn.OFFSET if few else 0)  # fmt: skip
    seen = windows(codes, shape.kernel, shape.stride, shape.dilation)
    return _product(known, seen.flatten(0, 2), row, few).view(*seen.shape[:3], n)


def _in_floats(known: Facts, pixels: Tensor, row: int) -> Tensor | None:
    """``[B, H', W', N]`` of ``[B, H, W, C]`` by `cpu_float`, where that is exact and faster."""
    shape, zero, top = known.shape, known.zero[row], known.shape.extremes[0]
    if not cpu_float.wanted(shape, pixels, known.weight_scale.shape[0]):
        return None
    if not cpu_float.exact(known.reach, zero, top):
        return None
    sums = cpu_float.sums(cpu_float.encode(pixels, known.inverse[row], zero, top), known.rows(), shape)
    return cpu_onednn.rescaled(sums, known.rescaled(row), known.bias)


def _product(known: Facts, codes: Tensor, row: int, few: bool) -> Tensor:
    """``[M, N]`` of codes ``[M, K]``, as `cpu_onednn.few_product` wants them where outputs are few."""
    zero, scale = known.zero[row], known.scale[row]
    if few:
        return cpu_onednn.few_product(codes.view(torch.int8), zero, known.rows(), known.rescaled(row), known.bias,
                                      known.sums)  # fmt: skip
    split = cpu_onednn.must_split(*known.shape.extremes)
    return cpu_onednn.product(codes, zero, known.rows().t(), scale, known.weight_scale, known.bias, split)
