"""What a finetuning trains in the layers: weights (all of them, or low-rank adapters), weight scales, biases.

The relaxed form is `fake_weight` (on CUDA `fake_rows`, for all layers at once: layers are small, and what takes time is
the number of kernels): it equals ``decode(encode_weight(...))`` exactly, and `harden` stores the codes of
that same `encode_weight`. So the sim face answers after hardening what the network answered in training, bit for bit
where the arithmetic is deterministic.

Weights live in the space in which they are quantized, divided by ``input_scale`` where a layer has one; an adapter is
an addition to the weight before that division (MPQ-DM section 3.6: ``Q((W + dW) / delta)``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.kernels import triton_fake
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers.codec import expand_weight_scale, reciprocal
from bitbrush.numbers.straight_through import FusedWeight, Rows, encode_weight, fake_rows, fake_weight


class TuningSettings(Protocol):
    """What the learners of this file read from their step."""

    @property
    def weights(self) -> Literal["none", "full", "lora"]: ...
    @property
    def rounding(self) -> Literal["nearest", "offset"]: ...
    @property
    def rank(self) -> int: ...
    @property
    def adapter(self) -> Literal["shared", "tap"]: ...
    @property
    def base(self) -> Literal["float", "quantized"]: ...
    @property
    def weight_scale(self) -> bool: ...
    @property
    def lr_weights(self) -> float: ...
    @property
    def lr_weight_scale(self) -> float: ...
    @property
    def scale_aware(self) -> Literal["none", "rate", "gradient"]: ...


@dataclass(frozen=True)
class _Kept:
    """What of a layer does not move: its start, and the constants of its rounding."""

    base: Tensor
    codes: Tensor
    table: Tensor
    offset: Tensor | None
    mean_scale: float


@dataclass(frozen=True)
class _Flat:
    """The same of all layers, flat, one layer after another; ``divisor`` is the input scale of every weight."""

    rows: Rows
    sizes: list[int]
    base: Tensor
    table: Tensor
    offset: Tensor | None
    divisor: Tensor | None
    fused: FusedWeight


class WeightLearner:
    """Weights of several layers behind a straight-through quantizer; zero-points stay.

    ``weights = "full"`` trains the weight itself, ``"lora"`` an addition ``B A`` that is merged before quantization
    (QALoRA, EfficientDM eq. 6): A is Kaiming-uniform, B zero, so training starts at the stored weight. ``"none"``
    leaves the weight as it is (for weight scales alone).

    With ``rounding = "offset"`` codes are ``floor(w / s) + offset``, where the offset in {0, 1} is frozen to what the
    stored codes were rounded with (AdaRound's decision; QuEST section 3.5): training starts exactly at the stored
    codes, and a code changes when w crosses a multiple of s. Where a stored code is not within one step of the weight,
    it cannot be reached; `starts_elsewhere` counts those.

    Weight scales are trained as ``s = s0 * exp(theta)``, as activation scales are.

    Args:
        layers: Layers with stored codes and their float weights.
        settings: The step.
        generator: For the adapters' start.
    """

    def __init__(self, layers: dict[str, QuantLayer], settings: TuningSettings, generator: torch.Generator) -> None:
        self.layers, self.settings = layers, settings
        self.kept = {name: _keep(layer, settings) for name, layer in layers.items()}
        self.zeros = {name: layer.scale_tables()[1] for name, layer in layers.items()}
        self.fused = fused_weight(next(iter(layers.values())).weight_scale.device)
        self.trained: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            base = self.kept[name].base
            if settings.weights == "full":
                self.trained[f"weight/{name}"] = nn.Parameter(base.clone())
            elif settings.weights == "lora":
                first, second = adapter_start(base.shape, settings.rank, settings.adapter, generator)
                if self.fused is not None and second.ndim == 4:
                    first, second = by_tap(first), by_tap(second)
                self.trained[f"first/{name}"] = nn.Parameter(first.to(base.device))
                self.trained[f"second/{name}"] = nn.Parameter(second.to(base.device))
            if settings.weight_scale:
                self.trained[f"weight_scale/{name}"] = nn.Parameter(torch.zeros_like(_free(layer)))
        self.flat = None if self.fused is None else self._flatten(self.fused)

    @property
    def starts_elsewhere(self) -> int:
        """How many codes of the relaxed form differ from the stored ones before any training."""
        with torch.no_grad():
            return sum(int((self._encoded(n) != self.kept[n].codes).sum()) for n in self.layers)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights or adapters, and one theta a weight scale."""
        return self.trained

    def rates(self) -> dict[str, float]:
        """``lr_weights``, times the layer's mean weight scale with ``scale_aware = "rate"``; ``lr_weight_scale``."""
        aware = self.settings.scale_aware == "rate"
        found = {}
        for key in self.trained:
            kind, _, name = key.partition("/")
            factor = self.kept[name].mean_scale if aware else 1.0
            found[key] = self.settings.lr_weight_scale if kind == "weight_scale" else self.settings.lr_weights * factor
        return found

    def relax(self, progress: Tensor) -> Tensor:
        """Quantized weights with gradients into ``trial_weight``; no penalty."""
        if self.flat is None:
            for name, layer in self.layers.items():
                layer.trial_weight = self._with(fake_weight, name)
            return torch.zeros((), device=progress.device)
        flat = self.flat
        weight = fake_rows(self._flat_weight(flat), self._flat_table(flat), flat.rows, flat.offset, flat.fused)
        for (name, layer), part in zip(self.layers.items(), weight.split(flat.sizes), strict=True):
            layer.trial_weight = part.view(self.kept[name].base.shape)
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Store codes and scales."""
        changed = total = 0
        for name, layer in self.layers.items():
            layer.trial_weight = None
            with torch.no_grad():
                codes, table = self._encoded(name), self._table(name)
            changed, total = changed + int((codes != self.kept[name].codes).sum()), total + codes.numel()
            layer.set_weight(codes, table, layer.weight_zero_point)
        return {"codes_changed": round(changed / max(total, 1), 6)}

    def restore(self) -> None:
        """Codes and scales as they were."""
        for name, layer in self.layers.items():
            layer.set_weight(self.kept[name].codes, self.kept[name].table, layer.weight_zero_point)

    def release(self) -> None:
        """No relaxed weights stay behind."""
        for layer in self.layers.values():
            layer.trial_weight = None

    def result(self) -> dict[str, Tensor]:
        """Codes, scales and zero-points of every layer."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found[f"{name}/codes"], found[f"{name}/scale"] = layer.stored_codes(), layer.weight_scale
            found[f"{name}/zero_point"] = layer.weight_zero_point
        return found

    # ---- inside ------------------------------------------------------------------------------------------------
    def _encoded(self, name: str) -> Tensor:
        return self._with(encode_weight, name).to(torch.uint8)

    def _with(self, function: Callable[..., Tensor], name: str) -> Tensor:
        """`fake_weight` or `encode_weight` of the layer's weight as it is now."""
        layer, kept, weight = self.layers[name], self.kept[name], self._weight(name)
        scale = expand_weight_scale(self._table(name), layer.segments, weight.ndim)
        return function(weight, scale, self.zeros[name], layer.top(), kept.offset, layer.binary_rows())

    def _table(self, name: str) -> Tensor:
        """Scales ``[N, S]``."""
        theta, table = self.trained.get(f"weight_scale/{name}"), self.kept[name].table
        return table if theta is None else table * theta.exp()

    def _weight(self, name: str) -> Tensor:
        base = self.kept[name].base
        if self.settings.weights == "none":
            return base
        moving, divisor = self._moving(name), _divisor(self.layers[name], base)
        if self.settings.weights == "full":
            return moving
        return base + (moving if divisor is None else moving / divisor)

    def _moving(self, name: str) -> Tensor:
        """What is trained of a weight, in its shape: the weight itself, or the change by its adapter."""
        factor = self.kept[name].mean_scale if self.settings.scale_aware == "gradient" else None
        keys = ("weight",) if self.settings.weights == "full" else ("first", "second")
        parts = [_with_gradient(self.trained[f"{key}/{name}"], factor) for key in keys]
        return parts[0] if len(parts) == 1 else merged(parts[0], parts[1], self.kept[name].base.shape)

    # ---- all layers at once: the same operations on the same numbers -----------------------------------------------
    def _flatten(self, fused: FusedWeight) -> _Flat:
        """What does not move; the bases of the layers become parts of the flat one."""
        bases = {name: kept.base for name, kept in self.kept.items()}
        base, sizes = _joined(bases.values()), [b.numel() for b in bases.values()]
        for (name, kept), part in zip(self.kept.items(), base.split(sizes), strict=True):
            self.kept[name] = replace(kept, base=part.view(kept.base.shape))
        divisor = offset = None
        if self.settings.weights == "lora" and any(layer.input_scale is not None for layer in self.layers.values()):
            divisors = ((_divisor(self.layers[name], b), b) for name, b in bases.items())
            divisor = _joined(torch.ones_like(b) if d is None else d.expand_as(b) for d, b in divisors)
        if self.settings.rounding == "offset":
            offset = _joined(kept.offset for kept in self.kept.values() if kept.offset is not None)
        table = _joined(kept.table for kept in self.kept.values())
        return _Flat(rows_of(self.layers.values()), sizes, base, table, offset, divisor, fused)

    def _flat_weight(self, flat: _Flat) -> Tensor:
        if self.settings.weights == "none":
            return flat.base
        moving = _joined(self._moving(name) for name in self.layers)
        if self.settings.weights == "full":
            return moving
        return flat.base + (moving if flat.divisor is None else moving / flat.divisor)

    def _flat_table(self, flat: _Flat) -> Tensor:
        if not self.settings.weight_scale:
            return flat.table
        thetas = (self.trained[f"weight_scale/{name}"].expand_as(kept.table) for name, kept in self.kept.items())
        return flat.table * _joined(thetas).exp()


class BiasLearner:
    """Biases of several layers.

    Args:
        layers: Layers that have a bias.
        rates: Learning rate of each layer's.
    """

    def __init__(self, layers: dict[str, QuantLayer], rates: dict[str, float]) -> None:
        self.layers, self.given = layers, rates
        self.start = {name: layer.trained_bias for name, layer in layers.items()}
        self.trained = {f"bias/{n}": nn.Parameter(_bias(layer).detach().float().clone()) for n, layer in layers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """One bias a layer."""
        return self.trained

    def rates(self) -> dict[str, float]:
        """As given."""
        return {f"bias/{name}": self.given[name] for name in self.layers}

    def relax(self, progress: Tensor) -> Tensor:
        """Biases into ``trial_bias`` (as a view: a module would register a parameter); no penalty."""
        for name, layer in self.layers.items():
            layer.trial_bias = self.trained[f"bias/{name}"].view(-1)
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Store the trained biases."""
        for name, layer in self.layers.items():
            layer.trial_bias = None
            layer.set_bias(self.trained[f"bias/{name}"])
        return {}

    def restore(self) -> None:
        """The biases before."""
        for name, layer in self.layers.items():
            layer.trained_bias = self.start[name]

    def release(self) -> None:
        """No trial biases stay behind."""
        for layer in self.layers.values():
            layer.trial_bias = None

    def result(self) -> dict[str, Tensor]:
        """The trained biases, where there are any."""
        return {f"{n}/bias": layer.trained_bias for n, layer in self.layers.items() if layer.trained_bias is not None}


def adapter_start(
    shape: torch.Size, rank: int, adapter: Literal["shared", "tap"], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The two factors of an adapter for a weight ``[N, C]`` or ``[N, C, kh, kw]``: Kaiming-uniform, and zeros.

    The first is ``[rank, C, ..]``. The second is ``[N, rank]`` where all taps of a kernel share it (EfficientDM: a 1x1
    convolution) and ``[N, rank, kh, kw]`` where every tap has its own (MPQ-DM).
    """
    inputs = math.prod(shape[1:])
    first = (torch.rand((rank, *shape[1:]), generator=generator) * 2 - 1) / math.sqrt(inputs)
    taps = shape[2:] if adapter == "tap" else ()
    return first, torch.zeros(shape[0], rank, *taps)


def by_tap(factor: Tensor) -> Tensor:
    """A factor ``[.., .., kh, kw]`` as ``[kh * kw, .., ..]``: one batched product without copies."""
    return factor.flatten(2).permute(2, 0, 1).contiguous()


def merged(first: Tensor, second: Tensor, shape: torch.Size) -> Tensor:
    """The change of the weight, in its shape: ``B A``, for every tap; factors of taps also in the form of `by_tap`."""
    if second.ndim == 4:
        return torch.einsum("nruv,rcuv->ncuv", second, first)
    if second.ndim == 3:
        return torch.bmm(second, first).permute(1, 2, 0).reshape(shape)
    return (second @ first.flatten(1)).reshape(shape)


def rows_of(layers: Iterable[QuantLayer]) -> Rows:
    """The rows of the layers' weights, flat, one layer after another; every segment is a row."""
    length, zero, top, binary = [], [], [], []
    for layer in layers:
        shape, device = layer.weight_zero_point.shape, layer.weight_zero_point.device
        taps, halved = math.prod(layer.kernel_hw), layer.binary_rows()
        length.append(torch.tensor([count * taps for count in layer.segments], device=device).expand(shape))
        zero.append(layer.weight_zero_point.float())
        top.append(torch.as_tensor(layer.top(), dtype=torch.float32, device=device).reshape(-1, 1).expand(shape))
        blank = torch.zeros((), dtype=torch.bool, device=device)
        binary.append((blank if halved is None else halved).reshape(-1, 1).expand(shape))
    lengths, found = _joined(length), _joined(binary)
    return Rows(
        lengths.cumsum(0) - lengths, lengths.int(), int(lengths.max()), _joined(zero), _joined(top),
        found if bool(found.any()) else None,
    )


def fused_weight(device: torch.device) -> FusedWeight | None:
    """The fused kernels for weights on a device; None on the CPU and without Triton."""
    return triton_fake.build_weight() if device.type == "cuda" else None


def mean_scale(layer: QuantLayer) -> float:
    """Mean of a layer's weight scales (EfficientDM eq. 8, evaluated once)."""
    return float(layer.weight_scale.mean())


def _keep(layer: QuantLayer, settings: TuningSettings) -> _Kept:
    base = layer.scaled_weight() if settings.base == "float" else layer.decoded_weight()
    codes, (scale, zero) = layer.stored_codes().clone(), layer.scale_tables()
    offset = None
    if settings.rounding == "offset":
        offset = (codes.float() - zero - torch.floor(base * reciprocal(scale))).clamp(0, 1).to(torch.uint8)
    return _Kept(base.detach(), codes, layer.weight_scale.clone(), offset, mean_scale(layer))


def _divisor(layer: QuantLayer, like: Tensor) -> Tensor | None:
    """A layer's input scale, shaped to broadcast against its weight."""
    return None if layer.input_scale is None else layer.input_scale.reshape(1, -1, *([1] * (like.ndim - 2)))


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _free(layer: QuantLayer) -> Tensor:
    """The entries of a layer's scale table that are free: one row where all rows share their scale."""
    shared = layer.spec.weight is not None and layer.spec.weight.granularity == "tensor"
    return layer.weight_scale[:1] if shared else layer.weight_scale


def _bias(layer: QuantLayer) -> Tensor:
    found = layer.trained_bias if layer.trained_bias is not None else layer.bias
    if found is None:
        raise InternalError("the layer has no bias", where=type(layer).__name__)
    return found


class _GradientScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _with_gradient(x: Tensor, factor: float | None) -> Tensor:
    """``x``; its gradient is multiplied by ``factor``."""
    if factor is None:
        return x
    out: Tensor = _GradientScale.apply(x, factor)
    return out
