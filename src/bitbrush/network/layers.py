"""Linear and Conv2d with three faces.

A `QuantLinear` or `QuantConv2d` stands in place of the original module. It has

    float    the untouched weight and bias: the teacher. There is no second copy of the model.
    sim      ``decode`` of the stored codes, ``decode(encode(x))`` of the input, then the ordinary float operation.
    packed   the same numbers from packed bytes; the float weight is gone. A kernel is chosen by `bitbrush.kernels`;
             the reference kernel is equal to ``sim`` bit for bit, because both multiply the same decoded values.

The weight is stored as *codes*. `pack` packs those codes; nothing is ever quantized twice. While a step trains, it puts
the relaxed weight into ``trial_weight`` (a bias into ``trial_bias``) and the sim face uses it; a forward never changes
state. A trained bias is a buffer, ``trained_bias``, until `pack` makes it the layer's; float keeps the teacher's.

With ``LayerSpec.input_scale`` the layer computes with ``x * input_scale``, and the codes are those of the *scaled*
weight ``W / input_scale``: the product is the same, the ranges are not (smoothing). Only `prepare` multiplies. With
``LayerSpec.low_rank`` a branch in 16 bits stands beside the product; the codes are those of what it leaves over. With
``LayerSpec.rotation`` (linear layers) both are then rotated by one orthogonal matrix (`numbers.rotation`).

Both classes derive from the torch class they replace, with ``weight`` as a read-only property that decodes: adapters
(LoRA through PEFT) then accept the layer as a base. A merge cannot be written back; the plug-in refuses it by name.

Tensors of a packed layer (these names are the file format, see docs/format.md), N rows, S segments, T times:

    codes{b}           uint8 [N_b, row_bytes]   packed rows of each bit class b
    weight_scale       float32 [N, S]           weight_zero_point  uint8 [N, S]
    row_order          int16 [N]                only with mixed bits: original row of each stored row (see format.md)
    input.scale        float32 [T, S]           input.inverse_scale float32, input.zero_point uint8
    input.group_of     uint8 [C] or [pixels]    only with groups of channels or pixels, S of them: which one each is in
    input_scale        float32 [C]              only with LayerSpec.input_scale
    low_rank.up, .down float16                  only with LayerSpec.low_rank (`network.low_rank`); bias: the original
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.low_rank import LowRank, branch
from bitbrush.network.unfolding import UnfoldedInput
from bitbrush.numbers import packing
from bitbrush.numbers.codec import decode, expand_weight_scale
from bitbrush.numbers.grid import LayerSpec, WeightSpec
from bitbrush.numbers.rotation import rotate, unrotate
from bitbrush.numbers.straight_through import BINARY_TOP

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
    input_scale: Tensor | None
    trained_bias: Tensor | None
    input: ActivationQuantizer | None
    low_rank: LowRank | None
    kernel_size: tuple[int, ...]
    in_channels_: int
    out_channels_: int

    def _setup(self, spec: LayerSpec, rows: int, channels: int, clock: Clock | None, times: int) -> None:
        self.spec, self.face = spec, "float"
        self.out_channels_, self.in_channels_ = rows, channels
        self.rotated = spec.rotation != "none"  # off while a proof looks at the weight alone
        self.kernel = "reference"  # which kernel runs the packed face; set by kernels.use
        self.kernel_of: dict[str, str] = {}  # where that is "auto": by kind of device
        self.trial_weight: Tensor | None = None
        self.trial_bias: Tensor | None = None
        self._row_tables: dict[Any, Tensor] = {}  # by what and where: of mixed bits, and what a kernel keeps
        self.float_weight = None
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("trained_bias", None, persistent=False)
        if spec.input_scale:
            self.register_buffer("input_scale", torch.ones(channels))
        else:
            self.input_scale = None
        kernel = self.kernel_hw if isinstance(self, nn.Conv2d) else ()
        self.low_rank = LowRank(spec.low_rank, (rows, channels, *kernel)) if spec.low_rank else None
        self.input = None
        if spec.activation is not None:
            at_input = spec.activation.position == "input"
            segments = spec.segments if len(spec.segments) > 1 and at_input else ()
            places = self.kernel_hw[0] * self.kernel_hw[1] if spec.activation.unfolded else 1
            wide = channels * int(getattr(self, "groups", 1)) * places if at_input else rows
            times = times if spec.activation.timed else 1
            self.input = ActivationQuantizer(spec.activation, segments, clock, times, channels=wide)
        if spec.weight is not None:
            self._declare_tables(spec.weight)
        self.register_load_state_dict_post_hook(_made_again)

    def _declare_tables(self, spec: WeightSpec) -> None:
        shape = (self.out_channels_, len(self.segments))
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

    def _weight_shape(self, rows: Tensor) -> Tensor:
        return rows if isinstance(self, nn.Conv2d) else rows.reshape(rows.shape[0], -1)

    # ---- weight ------------------------------------------------------------------------------------------------
    def scale_tables(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) float32, shaped to broadcast against the weight."""
        ndim = 4 if isinstance(self, nn.Conv2d) else 2
        scale = expand_weight_scale(self.weight_scale, self.segments, ndim)
        return scale, expand_weight_scale(self.weight_zero_point.float(), self.segments, ndim)

    def top(self) -> int | Tensor:
        """Largest weight code, 2 in symmetric 1-bit rows; a tensor ``[N, 1, ..]`` where rows differ in bits."""
        spec = self.spec.weight
        if spec is None:
            raise InternalError("a layer without weight grid has no codes")
        if not spec.row_bits:
            return BINARY_TOP if spec.halved(spec.grid.bits) else spec.grid.levels - 1
        return self._by_row("top", [float(BINARY_TOP if spec.halved(b) else (1 << b) - 1) for b in spec.row_bits])

    def binary_rows(self) -> Tensor | None:
        """True in symmetric 1-bit rows, bool ``[N, 1, (1, 1)]``; None where the layer has no such row."""
        spec = self.spec.weight
        if spec is None or not any(spec.halved(bits) for bits in spec.bit_classes()):
            return None
        return self._by_row("binary", [spec.halved(b) for b in spec.row_bits or [spec.grid.bits] * self.out_channels_])

    def _by_row(self, what: str, values: list[Any]) -> Tensor:
        """A value a row, shaped to broadcast; kept, so that a CUDA graph may be captured after the first call."""
        key = f"{what} {self.weight_scale.device}"
        if key not in self._row_tables:
            ones = [1] * (3 if isinstance(self, nn.Conv2d) else 1)
            with torch.inference_mode(False):  # what is kept must serve training, too
                self._row_tables[key] = torch.tensor(values, device=self.weight_scale.device).reshape(-1, *ones)
        return self._row_tables[key]

    def scaled_weight(self) -> Tensor:
        """The weight that is quantized, float32, no gradients: ``float_weight``, divided by ``input_scale``, rotated as
        the input is, and less the low-rank branch, where the layer has them."""
        if self.float_weight is None:
            raise InternalError("the float weight is gone", where=type(self).__name__, why="the layer is packed")
        weight = self.float_weight.detach().float()
        weight = weight if self.input_scale is None else weight / self._per_channel(self.input_scale)
        weight = rotate(weight) if self.rotated else weight
        return weight if self.low_rank is None else weight - self.low_rank.weight()

    def _per_channel(self, table: Tensor) -> Tensor:
        """``[C]`` shaped to broadcast against the weight."""
        return table.reshape(1, -1, 1, 1) if isinstance(self, nn.Conv2d) else table.reshape(1, -1)

    def set_input_scale(self, scale: Tensor) -> None:
        """Store factors ``[C]`` for the input's channels. Codes found before, of another weight, are forgotten."""
        if self.input_scale is None:
            raise InternalError("the layer's spec has no input scale", where=type(self).__name__)
        table = scale.detach().to(device=self.input_scale.device, dtype=torch.float32).clone()
        if table.shape != self.input_scale.shape or not bool((torch.isfinite(table) & (table > 0)).all()):
            raise InternalError("an input scale must be one positive finite factor a channel",
                                where=type(self).__name__, why=f"{list(table.shape)} for {self.in_channels_} channels")
        if not torch.equal(table, self.input_scale):
            self.codes = None
        self.input_scale = table

    def set_low_rank(self, up: Tensor, down: Tensor) -> None:
        """Store the factors ``[N, r]`` and ``[r, C, ..]`` of the branch. Codes found before are forgotten."""
        if self.low_rank is None:
            raise InternalError("the layer's spec has no low-rank branch", where=type(self).__name__)
        self.low_rank.set(up, down)
        self.codes = None

    def set_bias(self, bias: Tensor) -> None:
        """Store a trained bias ``[N]`` for the sim face, in the dtype of the layer's; `pack` makes it the layer's."""
        if self.bias is None or bias.shape != self.bias.shape:
            raise InternalError("the layer has no bias of this shape", where=type(self).__name__,
                                why=f"{list(bias.shape)} given, {None if self.bias is None else list(self.bias.shape)}")
        self.trained_bias = bias.detach().to(device=self.bias.device, dtype=self.bias.dtype).clone()

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Store the codes (weight's shape, uint8) and their tables ``[N, S]``."""
        device, codes = self.weight_scale.device, codes.detach().to(self.weight_scale.device, torch.uint8)
        self.codes = codes.clone(memory_format=torch.contiguous_format)  # 1x1 weights have ambiguous strides
        self.weight_scale = scale.detach().float().to(device).contiguous()
        self.weight_zero_point = zero_point.detach().to(device=device, dtype=torch.uint8).contiguous()
        self._check_binary_rows()

    def weight_tables(self) -> tuple[Tensor, Tensor]:
        """Copies of what turns codes into the weight: scale and zero_point, ``[N, S]``."""
        return self.weight_scale.clone(), self.weight_zero_point.clone()

    def take_weight(self, former: QuantLayer) -> None:
        """Store the codes and tables of another layer with the same weight spec, if it has any."""
        if former.codes is not None:
            self.set_weight(former.codes, former.weight_scale, former.weight_zero_point)

    def _check_binary_rows(self) -> None:
        """Symmetric 1-bit rows hold the codes 0 and 2 around the zero-point 1; anything else could not be packed."""
        binary = self.binary_rows()
        if binary is None or self.codes is None:
            return
        good = (self.codes == 0) | (self.codes == BINARY_TOP) | ~binary
        if not bool(good.all()) or not bool((self.weight_zero_point[binary.flatten()] == 1).all()):
            raise InternalError("a symmetric 1-bit row has other codes than 0 and 2 around zero-point 1",
                                where=type(self).__name__)

    def stored_codes(self) -> Tensor:
        """The weight's codes (weight's shape, uint8), from the packed bytes once packed."""
        if self.codes is not None:
            return self.codes
        if self.face != "packed" or self.spec.weight is None:
            raise InternalError("the layer has no codes yet", where=type(self).__name__)
        parts = [packing.unpack_class(getattr(self, f"codes{bits}"), bits, self.row_length, self.spec.weight)
                 for bits in self.spec.weight.bit_classes()]  # fmt: skip
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.spec.weight.row_bits:
            rows = torch.empty_like(rows).index_copy_(0, self.row_order.long(), rows)  # type: ignore[operator]
        return self._weight_shape(packing.rows_to_weight(rows, self.segments, self.kernel_hw))

    def decoded_weight(self) -> Tensor:
        """Weight that the sim and packed faces multiply with (the scaled one where there is an input scale, without a
        branch's part): float32, or the float weight as it is where it is not quantized."""
        if self.spec.weight is None:
            if self.float_weight is None:
                raise InternalError("a layer without weight grid lost its float weight")
            return self.float_weight if self.input_scale is None else self.scaled_weight()
        scale, zero = self.scale_tables()
        return decode(self.stored_codes(), scale, zero)

    @property
    def weight(self) -> Tensor:
        """The weight as a float tensor: the original one while it is there, else `restored_weight`. Read-only."""
        if self.float_weight is not None:
            return self.float_weight
        decoded = self.restored_weight()
        return decoded.to(self.bias.dtype) if self.bias is not None else decoded

    def restored_weight(self) -> Tensor:
        """The decoded weight, a branch's part with it, for an input without scale and rotation: float32."""
        decoded = self.decoded_weight()
        decoded = decoded if self.low_rank is None else decoded + self.low_rank.weight()
        decoded = unrotate(decoded) if self.rotated else decoded
        return decoded if self.input_scale is None else decoded * self._per_channel(self.input_scale)

    # ---- forward -----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in the face it shows."""
        if self.face == "float" and self.float_weight is not None:
            return self.operation(x, self.float_weight)
        if self.face == "packed":
            from bitbrush import kernels

            return kernels.run(self, x)
        return self.computed(x, self.weight_in_use().to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, and have what the kernel keeps where the weight is now."""
        from bitbrush import kernels

        super()._apply(fn, recurse)
        self._row_tables.clear()
        kernels.prepare(self)
        return self

    def computed(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output that the sim face and the reference kernel give for a decoded weight."""
        return self.finish(self.with_branch(self.operation(self.quantize_input(x), weight), x))

    def with_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """The product ``y`` for the input ``x``, and what the low-rank branch adds to it where there is one."""
        return y if self.low_rank is None else y + branch(self, self.prepare(x).to(x.dtype))

    def weight_in_use(self) -> Tensor:
        """The weight that the sim face multiplies with: one that is trained, or the decoded one."""
        return self.trial_weight if self.trial_weight is not None else self.decoded_weight()

    def prepare(self, x: Tensor) -> Tensor:
        """What is encoded: ``x * input_scale``, rotated where the spec says so, in float32; or ``x`` itself."""
        if self.input_scale is not None:
            x = x.float() * self.input_scale.reshape([-1, 1, 1] if isinstance(self, nn.Conv2d) else [-1])
        return rotate(x) if self.rotated else x

    def quantize_input(self, x: Tensor) -> Tensor:
        """``decode(encode(prepare(x)))``, or ``prepare(x)`` where the input is not quantized; in the dtype of ``x``."""
        prepared = self.prepare(x)
        if self.input is None or self.input.spec.position == "output":
            return prepared.to(x.dtype)
        quantized: Tensor = self.input(prepared, self.channel_dim % x.ndim)
        return quantized.to(x.dtype)

    def finish(self, y: Tensor) -> Tensor:
        """Quantize the output where the spec says ``position = "output"`` (PTQ4DM's form)."""
        if self.input is None or self.input.spec.position == "input":
            return y
        return self.input(y, self.channel_dim % y.ndim)

    def bias_in_use(self, x: Tensor) -> Tensor | None:
        """The bias of the face shown; a trained one comes in the dtype of ``x``."""
        trained = self.trial_bias if self.trial_bias is not None else self.trained_bias
        return self.bias if trained is None or self.face != "sim" else trained.to(x.dtype)

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float operation with a given weight and `bias_in_use`."""
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
                order = torch.empty(self.out_channels_, dtype=packing.order_dtype(self.out_channels_), device=device)
                self.register_buffer("row_order", order)
        self._finish_packing()

    def _finish_packing(self) -> None:
        """Show the packed face. What only the sim face has goes, the empty buffers too: offloading hooks cannot move a
        buffer that is None. A trained bias becomes the layer's."""
        if self.trained_bias is not None:
            self.bias = nn.Parameter(self.trained_bias, requires_grad=False)
        self.trial_weight = self.trial_bias = None
        for name in ("codes", "trained_bias"):
            self.__dict__.get("_buffers", {}).pop(name, None)
            self._non_persistent_buffers_set.discard(name)
            self.__dict__[name] = None
        self.face = "packed"

    def pack(self) -> None:
        """Pack the stored codes and free the float weight. The bytes hold exactly `stored_codes`."""
        spec = self.spec.weight
        if spec is None:
            self._finish_packing()
            return
        self._check_binary_rows()
        codes = self.stored_codes().reshape(self.out_channels_, -1, *self.kernel_hw)
        rows = packing.weight_rows(codes, self.segments, self.weight_zero_point)
        self.declare_packed(device=rows.device)
        if spec.row_bits:
            bits_of = torch.tensor(spec.row_bits, device=rows.device)
            order = torch.argsort(bits_of, stable=True)
            self.register_buffer("row_order", order.to(packing.order_dtype(len(order))))
            for bits in spec.bit_classes():
                members = rows[order[bits_of[order] == bits]]
                setattr(self, f"codes{bits}", packing.pack_class(members, bits, spec))
        else:
            setattr(self, f"codes{spec.grid.bits}", packing.pack_class(rows, spec.grid.bits, spec))
        self.float_weight = None

    def packed_bytes(self) -> int:
        """Bytes that this layer takes in memory and on disk."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))


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
        return F.linear(x, weight, self.bias_in_use(x))


class QuantConv2d(UnfoldedInput, QuantLayer, nn.Conv2d):  # type: ignore[override]
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
        return self._conv_forward(x, weight, self.bias_in_use(x))


def _made_again(layer: Any, _keys: object) -> None:
    """What was kept of a layer, when other tensors have been loaded into it and its quantizer."""
    layer._apply(lambda tensor: tensor)


def _adopt(layer: LayerT, module: nn.Module) -> LayerT:
    layer.float_weight = module.weight  # type: ignore[assignment]
    layer.bias = module.bias  # type: ignore[assignment]
    layer.train(module.training)
    return layer
