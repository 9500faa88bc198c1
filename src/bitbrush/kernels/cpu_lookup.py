"""Products with additive codebooks by looking sums up, on the CPU: no weight is decoded.

With the input in groups x_J of g channels, every codeword's product with every group is computed once,

    T[j, m, k] = <C_m[k], x_J>           y[i] = scale[i] * sum_j sum_m T[j, m, c_ijm]   (+ bias)

and a row of the layer adds up n K / g table entries where a product has n multiplications. The table is made for a few
inputs (tokens, or pixels of a convolution) at a time, so that it stays in the cache; an entry is then a short row, one
number for each of these inputs.

It pays for few inputs of large layers: the reference decodes the whole weight for each forward, whatever their number,
but then multiplies densely. `run` looks up where `pays` says so and leaves the rest to the reference;
`benchmarks/lookup.py` measures both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbrush.kernels import reference
from bitbrush.numbers.codebook import decode, from_groups

if TYPE_CHECKING:
    from bitbrush.network.codebook_layers import CodebookConv2d, CodebookLayer
    from bitbrush.network.layers import QuantLayer

FEW = 16
"""Inputs of a forward (tokens, pixels) up to which looking up may pay."""
TABLE_BYTES = 1 << 23
"""Of the table for one part of the inputs: what a cache holds."""
LINE = 16
"""float32 values of a cache line: fewer inputs at a time cost as much."""


def why_not(layer: QuantLayer, device_type: str) -> str | None:
    """Why this kernel cannot run a packed layer on a device, or None when it can."""
    if device_type != "cpu":
        return f"the kernel runs on the CPU, not on {device_type}"
    if layer.spec.weight is None or not layer.spec.weight.additive:
        return "the weight is not made of additive codebooks"
    if layer.spec.activation is not None and layer.spec.activation.unfolded:
        return "the input is quantized unfolded: simulated only"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode}"
    return None


def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer: looked up where that pays, else the reference's."""
    return reference.run(layer, x) if leaves(layer, x) else looked_up(layer, x)


def leaves(layer: QuantLayer, x: Tensor) -> bool:
    """Whether `run` leaves an input to the reference: where looking up does not pay, or is not possible."""
    return not pays(layer, x.numel() // layer.in_channels_) or _cannot(x)


def pays(layer: QuantLayer, inputs: int) -> bool:
    """Whether looking up is the faster way: few inputs, a table that fits the cache, and rows enough to use it.

    A table costs ``2**B g`` multiplications for each of the K n / g places that a row looks up.
    """
    made = cast("CodebookLayer", layer)
    (count, words, group), places = made.weight_spec.table_shape, made.code_shape[1]
    table = 4 * count * words * places * inputs
    return inputs <= FEW and table <= TABLE_BYTES and 4 * layer.out_channels_ >= words * group


def looked_up(layer: QuantLayer, x: Tensor) -> Tensor:
    """Output of a packed layer from looked-up sums, in float32.

    Of inputs in other dtypes, and where a gradient is wanted, the reference makes the output: it rounds the decoded
    weight to the dtype, which a sum of table entries cannot. So it does for a model that was moved to another device.
    """
    if _cannot(x):
        return reference.run(layer, x)
    given = layer.quantize_input(x)
    if isinstance(layer, nn.Conv2d):
        conv = cast("CodebookConv2d", layer)
        y = torch.stack([_picture(conv, picture) for picture in (given if given.ndim == 4 else given[None])])
        y = y if layer.bias is None else y + layer.bias.float()[:, None, None]
        return layer.finish(layer.with_branch(y if given.ndim == 4 else y[0], x))
    rows = given.reshape(-1, given.shape[-1])
    y = product(cast("CodebookLayer", layer), rows).reshape(*given.shape[:-1], layer.out_channels_)
    return layer.finish(layer.with_branch(y if layer.bias is None else y + layer.bias.float(), x))


def _cannot(x: Tensor) -> bool:
    return x.dtype != torch.float32 or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad)


def product(layer: CodebookLayer, rows: Tensor) -> Tensor:
    """``rows @ W.T``, ``[T, N]`` float32; rows ``[T, n]`` in the order of the weight's groups."""
    books = layer.book()().float()
    count, words, group = books.shape
    codes = layer.stored_codes()
    groups = codes.shape[1]
    first = torch.arange(groups * count, dtype=torch.int32).reshape(groups, count) * words
    index = (codes.int() + first).flatten(1)
    wide = max(LINE, TABLE_BYTES // (4 * groups * count * words) // LINE * LINE)
    scale = layer.weight_scale.float()[:, None]
    parts = []
    for part in rows.split(wide):
        table = books.flatten(0, 1) @ part.reshape(len(part), groups, group).permute(1, 2, 0)  # [G, K * 2**B, T]
        parts.append((F.embedding_bag(index, table.flatten(0, 1), mode="sum") * scale).T)
    return torch.cat(parts) if parts else rows.new_zeros(0, layer.out_channels_)


def _picture(layer: CodebookConv2d, picture: Tensor) -> Tensor:
    """``[N, H', W']`` of a picture ``[C, H, W]``, without bias."""
    kernel, dilation, stride = layer.kernel_hw, layer.dilation, layer.stride
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    framed = F.pad(picture, (left, right, top, bottom))
    patches = F.unfold(framed[None], kernel, dilation=dilation, stride=stride)[0]
    rows = patches.reshape(layer.in_channels_, kernel[0] * kernel[1], -1).permute(2, 1, 0).flatten(1)
    size = [(framed.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return product(layer, rows).T.reshape(layer.out_channels_, size[0], size[1])


def magnitude(layer: QuantLayer) -> Tensor:
    """What bounds a row's partial sums in place of the weight's magnitude, in the weight's shape: the magnitudes of the
    codewords add up, whether or not they cancel."""
    made = cast("CodebookLayer", layer)
    books, scale = made.book()().float().abs(), made.weight_scale.float().abs()
    return from_groups(decode(made.stored_codes(), books, scale), made.weight_shape)
