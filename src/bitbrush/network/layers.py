"""Linear and Conv2d with three faces.

A `QuantLinear` or `QuantConv2d` stands in place of the original module. It has

    float    the untouched weight and bias: the teacher. There is no second copy of the model.
    sim      ``decode`` of the stored codes, ``decode(encode(x))`` of the input, then the ordinary float operation.
    packed   the same numbers from packed bytes; the float weight is gone. A kernel is chosen by `bitbrush.kernels`;
             the reference kernel is equal to ``sim`` bit for bit, because both multiply the same decoded values.

The weight is stored as *codes*. `pack` packs those codes; nothing is ever quantized twice. While a step trains, it puts
the relaxed weight into ``trial_weight`` and the sim face uses it; a forward never changes state.

Both classes derive from the torch class they replace, with ``weight`` as a read-only property that decodes: adapters
(LoRA through PEFT) then accept the layer as a base. A merge cannot be written back; the plug-in refuses it by name.

Tensors of a packed layer (these names are the file format, see docs/format.md), N rows, S segments, T times:

    codes{b}           uint8 [N_b, row_bytes]   packed rows of each bit class b
    weight_scale       float32 [N, S]           weight_zero_point  uint8 [N, S]
    row_order          int32 [N]                only with mixed bits: original row of each stored row
    input.scale        float32 [T, S]           input.inverse_scale float32, input.zero_point uint8
    bias               as in the original
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.numbers import packing
from bitbrush.numbers.codec import decode, expand_weight_scale
from bitbrush.numbers.grid import LayerSpec

Face = Literal["float", "sim", "packed"]
LayerT = TypeVar("LayerT", bound="QuantLayer")


class QuantLayer(nn.Module):
    """What `QuantLinear` and `QuantConv2d` share: the faces, the stored codes, packing."""

    spec: LayerSpec
    face: Face
    bias: Tensor | None
    float_weight: Tensor | None
    codes: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor
    input: ActivationQuantizer | None
    kernel_size: tuple[int, ...]
    in_channels_: int
    out_channels_: int

    def _setup(self, spec: LayerSpec, rows: int, channels: int, clock: Clock | None, times: int) -> None:
        self.spec, self.face = spec, "float"
        self.out_channels_, self.in_channels_ = rows, channels
        self.kernel = "reference"  # which kernel runs the packed face; set by kernels.use
        self.trial_weight: Tensor | None = None
        self.float_weight = None
        self.register_buffer("codes", None, persistent=False)
        self.input = None
        if spec.activation is not None:
            segments = spec.segments if len(spec.segments) > 1 and spec.activation.position == "input" else ()
            self.input = ActivationQuantizer(spec.activation, segments, clock, times if spec.activation.timed else 1)
        if spec.weight is not None:
            shape = (rows, len(self.segments))
            self.register_buffer("weight_scale", torch.ones(shape))
            self.register_buffer("weight_zero_point", torch.zeros(shape, dtype=torch.uint8))

    # ---- shape -------------------------------------------------------------------------------------------------
    @property
    def segments(self) -> tuple[int, ...]:
        """Input channels of each segment; one segment when the layer is not split."""
        return self.spec.segments or (self.in_channels_,)

    @property
    def kernel_hw(self) -> tuple[int, int]:
        """Kernel height and width, (1, 1) for linear layers."""
        size = getattr(self, "kernel_size", (1, 1))
        return (size[0], size[1])

    @property
    def channel_dim(self) -> int:
        """Channel dimension of the input: 1 for pictures, last for tokens."""
        return -3 if isinstance(self, nn.Conv2d) else -1

    @property
    def row_length(self) -> int:
        """Codes in a packed row, padding included."""
        return packing.row_length(self.segments, self.kernel_hw)

    def _weight_shape(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(self, nn.Conv2d) else tensor.reshape(tensor.shape[0], -1)

    # ---- weight ------------------------------------------------------------------------------------------------
    def scale_tables(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) float32, shaped to broadcast against the weight."""
        ndim = 4 if isinstance(self, nn.Conv2d) else 2
        scale = expand_weight_scale(self.weight_scale, self.segments, ndim)
        return scale, expand_weight_scale(self.weight_zero_point.float(), self.segments, ndim)

    def top(self) -> int | Tensor:
        """Largest weight code; a tensor ``[N, 1, ..]`` where rows differ in bits."""
        spec = self.spec.weight
        if spec is None:
            raise InternalError("a layer without weight grid has no codes")
        if not spec.row_bits:
            return spec.grid.levels - 1
        ndim = 4 if isinstance(self, nn.Conv2d) else 2
        bits = torch.tensor(spec.row_bits, device=self.weight_scale.device)
        return ((1 << bits) - 1).float().reshape(-1, *([1] * (ndim - 1)))

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Store the codes (weight's shape, uint8) and their tables ``[N, S]``."""
        device = self.weight_scale.device
        codes = codes.detach().to(device=device, dtype=torch.uint8)
        self.codes = codes.clone(memory_format=torch.contiguous_format)  # 1x1 weights have ambiguous strides
        self.weight_scale = scale.detach().float().to(device).contiguous()
        self.weight_zero_point = zero_point.detach().to(device=device, dtype=torch.uint8).contiguous()

    def stored_codes(self) -> Tensor:
        """The weight's codes (weight's shape, uint8), from the packed bytes once packed."""
        if self.codes is not None:
            return self.codes
        if self.face != "packed" or self.spec.weight is None:
            raise InternalError("the layer has no codes yet", where=type(self).__name__)
        parts = [
            packing.unpack(getattr(self, f"codes{bits}"), bits, self.row_length)
            for bits in self.spec.weight.bit_classes()
        ]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.spec.weight.row_bits:
            rows = torch.empty_like(rows).index_copy_(0, self.row_order.long(), rows)  # type: ignore[operator]
        return self._weight_shape(packing.rows_to_weight(rows, self.segments, self.kernel_hw))

    def decoded_weight(self) -> Tensor:
        """Float32 weight that the sim and packed faces multiply with."""
        if self.spec.weight is None:
            if self.float_weight is None:
                raise InternalError("a layer without weight grid lost its float weight")
            return self.float_weight
        scale, zero = self.scale_tables()
        return decode(self.stored_codes(), scale, zero)

    @property
    def weight(self) -> Tensor:
        """The weight as a float tensor: the original one while it is there, else decoded. Read-only."""
        if self.float_weight is not None:
            return self.float_weight
        decoded = self.decoded_weight()
        return decoded.to(self.bias.dtype) if self.bias is not None else decoded

    # ---- forward -----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in the face it shows."""
        if self.face == "float" and self.float_weight is not None:
            return self.operation(x, self.float_weight)
        if self.face == "packed":
            from bitbrush import kernels

            return kernels.run(self, x)
        weight = self.trial_weight if self.trial_weight is not None else self.decoded_weight()
        return self.finish(self.operation(self.quantize_input(x), weight.to(x.dtype)))

    def quantize_input(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``, or ``x`` where the input is not quantized."""
        if self.input is None or self.input.spec.position == "output":
            return x
        return self.input(x, self.channel_dim % x.ndim)

    def finish(self, y: Tensor) -> Tensor:
        """Quantize the output where the spec says ``position = "output"`` (PTQ4DM's form)."""
        if self.input is None or self.input.spec.position == "input":
            return y
        return self.input(y, self.channel_dim % y.ndim)

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float operation with a given weight."""
        raise InternalError("QuantLayer is abstract", where=type(self).__name__)

    # ---- packing -----------------------------------------------------------------------------------------------
    def declare_packed(self, device: torch.device | str | None = None) -> None:
        """Create the packed buffers with their final shapes (uninitialised) and show the packed face."""
        spec = self.spec.weight
        if spec is not None:
            counts = {b: spec.row_bits.count(b) for b in spec.bit_classes()} if spec.row_bits else None
            for bits in spec.bit_classes():
                rows = counts[bits] if counts else self.out_channels_
                shape = (rows, packing.row_bytes(self.row_length, bits))
                self.register_buffer(f"codes{bits}", torch.empty(shape, dtype=torch.uint8, device=device))
            if spec.row_bits:
                order = torch.empty(self.out_channels_, dtype=torch.int32, device=device)
                self.register_buffer("row_order", order)
        self._drop_codes()
        self.face = "packed"

    def _drop_codes(self) -> None:
        """Forget the unpacked codes, the (empty) buffer too: offloading hooks cannot move a buffer that is None."""
        self.__dict__.get("_buffers", {}).pop("codes", None)
        self._non_persistent_buffers_set.discard("codes")
        self.__dict__["codes"] = None

    def pack(self) -> None:
        """Pack the stored codes and free the float weight. The bytes hold exactly `stored_codes`."""
        spec = self.spec.weight
        if spec is None:
            self._drop_codes()
            self.face = "packed"
            return
        codes = self.stored_codes().reshape(self.out_channels_, -1, *self.kernel_hw)
        rows = packing.weight_rows(codes, self.segments, self.weight_zero_point)
        self.declare_packed(device=rows.device)
        if spec.row_bits:
            bits_of = torch.tensor(spec.row_bits, device=rows.device)
            order = torch.argsort(bits_of, stable=True)
            self.register_buffer("row_order", order.to(torch.int32))
            for bits in spec.bit_classes():
                setattr(self, f"codes{bits}", packing.pack(rows[order[bits_of[order] == bits]], bits))
        else:
            setattr(self, f"codes{spec.grid.bits}", packing.pack(rows, spec.grid.bits))
        self.float_weight = None

    def packed_bytes(self) -> int:
        """Bytes that this layer takes in memory and on disk."""
        tensors = [*self.buffers(), *self.parameters()]
        return sum(t.numel() * t.element_size() for t in tensors)


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc, override]
    """`torch.nn.Linear` with three faces."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, spec: LayerSpec, clock: Clock | None = None,
        times: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None)
        self._setup(spec, out_features, in_features, clock, times)

    @classmethod
    def wrap(cls, module: nn.Linear, spec: LayerSpec, clock: Clock | None, times: int) -> QuantLinear:
        """Take over a module's weight and bias (the same tensors, no copy), in float face."""
        layer = cls(module.in_features, module.out_features, False, spec, clock, times).to(module.weight.device)
        return _adopt(layer, module)

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x W^T + b``."""
        return F.linear(x, weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):  # type: ignore[override]
    """`torch.nn.Conv2d` with three faces."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain Conv2d when called like one: PEFT builds its adapter convolutions with the base layer's type."""
        if args and isinstance(args[0], int):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self, like: nn.Conv2d, spec: LayerSpec, clock: Clock | None = None, times: int = 1, bias: bool | None = None
    ) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                     "padding_mode", "transposed", "output_padding"):
            setattr(self, name, getattr(like, name))
        self._reversed_padding_repeated_twice = list(like._reversed_padding_repeated_twice)
        has_bias = like.bias is not None if bias is None else bias
        zeros = nn.Parameter(torch.zeros(like.out_channels), requires_grad=False) if has_bias else None
        self.register_parameter("bias", zeros)
        self._setup(spec, like.out_channels, like.in_channels // like.groups, clock, times)

    @classmethod
    def wrap(cls, module: nn.Conv2d, spec: LayerSpec, clock: Clock | None, times: int) -> QuantConv2d:
        """Take over a module's weight and bias (the same tensors, no copy), in float face."""
        return _adopt(cls(module, spec, clock, times, bias=False).to(module.weight.device), module)

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolution; padding with zeros is padding with the zero-point's code, which decodes to 0."""
        return self._conv_forward(x, weight, self.bias)


def _adopt(layer: LayerT, module: nn.Module) -> LayerT:
    layer.float_weight = module.weight  # type: ignore[assignment]
    layer.bias = module.bias  # type: ignore[assignment]
    layer.train(module.training)
    return layer
