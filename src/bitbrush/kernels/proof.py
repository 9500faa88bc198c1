"""The proof that a packed layer is its simulation: equalities first, then a computed bound.

For one packed layer and one probe input, `prove_layer` checks

* codes: what is unpacked from the bytes equals the codes that the simulation used, one by one;
* bytes: packing those codes again gives the same bytes, so the padding is as the format says, too;
* tables: scales and zero-points (codebooks and scales) equal the simulation's where they are given; scales are float32,
  positive and finite (codebooks and their scales float16 and finite), stored reciprocals are the reciprocals;
* activation codes: `numbers.codec` and the kernel agree on every code of the input, with the row of a timed table
  looked up a second time, independently;
* accumulators: the int32 sums of an integer kernel equal an int64 reference made from the simulation's codes; a second
  input is made that drives the heaviest rows to their largest sums, where overflow and saturation would show;
* outputs: ``|y - y64|`` is below a bound that is computed for each element, not guessed. Float kernels:
  ``(K + 2) u sum |a_k w_k| + half ulp(y)``. Integer kernels sum exactly, so only the epilogue is rounded:
  ``(S + 4) u (sum_s |acc_s scale_s| + |bias|) + half ulp(y)``, thousands of times tighter;
* identity: a float kernel fed an identity matrix times a power of two must return the decoded weight bit for bit. One
  wrong code among thousands can hide below a bound, not here.

``u`` is 2**-24 on the CPU and 2**-22 elsewhere, where tensor cores may truncate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.errors import InternalError
from bitbrush.kernels import bounds, cpu, gpu, proof_codebook, proof_tables, tuning
from bitbrush.kernels.bounds import half_ulp
from bitbrush.numbers import packing
from bitbrush.numbers.codec import decode, encode, expand_weight_scale, reciprocal
from bitbrush.numbers.rotation import rotate, unrotate

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

INTEGER_KERNELS = {"cpu-int8": cpu, "cuda-int8": gpu}
IDENTITY_BUDGET = 2**29
"""Multiply-adds above which the identity probe of a layer is skipped, and said so."""
PROBE = 4.0
"""The power of two that the identity matrix is multiplied with."""

Json = dict[str, Any]


def prove_layer(
    layer_sim_codes: Tensor | None, layer: QuantLayer, x: Tensor, tables: tuple[Tensor, Tensor] | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Json:
    """Prove one packed layer on one probe input; see the module's text for the checks.

    Args:
        layer_sim_codes: Codes of the simulation, uint8, in the weight's shape (additive codebooks: ``[N, G, K]``); None
            where the weight is float.
        layer: The layer in packed face. A timed layer needs its clock set.
        x: A probe input in the dtype the layer will be used with.
        tables: The simulation's `QuantLayer.weight_tables`; without them the packed layer's own tables are taken on
            trust.
        branch: The factors of the simulation's low-rank branch, likewise.

    Returns:
        JSON-able numbers and ``ok``: codes, bytes, tables, activation_codes, and for each kernel what it was tested
        for, or under ``skipped`` why it cannot run this layer.
    """
    if layer.face != "packed" or layer.codes is not None:
        raise InternalError("only a packed layer can be proven", where=type(layer).__name__)
    with torch.no_grad(), _full_precision(x.device), tuning.untimed():
        probe = _Probe(layer_sim_codes, layer, x, tables)
        result: Json = {
            "codes": _stored(layer_sim_codes, layer),
            "bytes": _bytes(layer_sim_codes, layer, probe),
            "tables": _tables(layer, tables, branch),
            "activation_codes": _compare(probe.quantized_values(), layer.quantize_input(x)) if probe.input else None,
            "kernels": {},
        }
        for name in kernels.KERNELS:
            reason = kernels.why_not(name, layer, x.device.type)
            result["kernels"][name] = {"skipped": reason} if reason else _kernel(name, probe)
    parts = [result[key] for key in ("codes", "bytes", "tables", "activation_codes")] + [*result["kernels"].values()]
    result["ok"] = all(part is None or part.get("ok", True) for part in parts)
    return result


# ---- equalities ------------------------------------------------------------------------------------------------------
def _compare(want: Tensor, got: Tensor) -> Json:
    if want.shape != got.shape:
        return {"equal": 0, "total": want.numel(), "ok": False}
    equal = int((want.cpu() == got.cpu()).sum())
    return {"equal": equal, "total": want.numel(), "ok": equal == want.numel()}


def _stored(codes: Tensor | None, layer: QuantLayer) -> Json | None:
    return None if codes is None else _compare(codes.to(torch.uint8), layer.stored_codes())


def _bytes(codes: Tensor | None, layer: QuantLayer, probe: _Probe) -> Json | None:
    """The packed bytes against those of packing the simulation's codes now."""
    spec = layer.spec.weight
    if codes is None or spec is None:
        return None
    if spec.additive:
        return _compare(proof_codebook.packed(codes, spec), getattr(layer, f"codes{spec.grid.bits}"))
    wide = codes.cpu().reshape(codes.shape[0], -1, *layer.kernel_hw)
    rows = packing.weight_rows(wide, layer.segments, probe.table_zero.to(torch.uint8))
    bits_of = torch.tensor(spec.row_bits or [spec.grid.bits] * rows.shape[0])
    parts = [
        _compare(packing.pack_class(rows[bits_of == bits], bits, spec), getattr(layer, f"codes{bits}"))
        for bits in spec.bit_classes()
    ]
    equal, total = (sum(part[key] for part in parts) for key in ("equal", "total"))
    return {"equal": equal, "total": total, "ok": all(part["ok"] for part in parts)}


def _tables(
    layer: QuantLayer, expected: tuple[Tensor, Tensor] | None, branch: tuple[Tensor, Tensor] | None = None
) -> Json:
    """Scales as expected, float32, positive, finite; stored reciprocals equal to reciprocals computed here; the factors
    of a branch as expected."""
    whole, of_branch = bounds.factors_hold(layer, branch)
    good, entries = True, 0
    additive = proof_codebook.additive(layer) is not None
    if additive:
        good, entries = proof_codebook.tables_hold(layer, expected)
    elif expected is not None:
        good = torch.equal(expected[0].cpu(), layer.weight_scale.cpu())
        good = good and torch.equal(expected[1].cpu().long(), layer.weight_zero_point.cpu().long())
    pairs = [layer.weight_scale] if layer.spec.weight is not None and not additive else []
    if layer.input is not None and layer.input.spec.mode == "static":
        pairs.append(layer.input.scale)
        stored = layer.input.inverse_scale
        good = good and stored.dtype == torch.float32 and torch.equal(stored.cpu(), reciprocal(layer.input.scale.cpu()))
    if layer.input_scale is not None:
        pairs.append(layer.input_scale)
    for table in pairs:
        good = good and table.dtype == torch.float32 and bool(torch.isfinite(table).all()) and bool((table > 0).all())
    return {"ok": good and whole, "entries": of_branch + entries + sum(table.numel() for table in pairs)}


class _Probe:
    """One layer, one input, and everything exact about their product (float64 and int64 on the CPU)."""

    def __init__(
        self, codes: Tensor | None, layer: QuantLayer, x: Tensor, tables: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.layer, self.x = layer, x
        self.conv = isinstance(layer, nn.Conv2d)
        self.input = layer.input is not None and layer.input.spec.position == "input" and layer.input.enabled
        self.bias = None if layer.bias is None else layer.bias.detach().cpu().double()
        self.factors = self._factors()
        self.prepared = x.cpu() if self.factors is None else x.cpu().float() * self.factors
        self.prepared = rotate(self.prepared) if layer.rotated else self.prepared
        self.unfolds = self.input and layer.input is not None and layer.input.spec.unfolded
        self.prepared = proof_tables.unfolded(layer, self.prepared) if self.unfolds else self.prepared
        ndim = 4 if self.conv else 2
        if codes is None:
            self.weight = layer.decoded_weight().cpu()
        elif proof_codebook.additive(layer) is not None:
            self.weight = proof_codebook.weight(codes, layer, tables)
        else:
            given = tables or (layer.weight_scale, layer.weight_zero_point)
            self.codes, self.table_scale, self.table_zero = codes.cpu(), given[0].cpu().float(), given[1].cpu().float()
            self.scale = expand_weight_scale(self.table_scale, layer.segments, ndim)
            self.zero = expand_weight_scale(self.table_zero, layer.segments, ndim)
            self.weight = decode(self.codes, self.scale, self.zero)
        if self.input:
            self.a_scale, self.a_inverse, self.a_zero = self._activation_tables()
            self.a_codes = encode(self.prepared, self.a_inverse, self.a_zero, self._largest_code())

    def _factors(self) -> Tensor | None:
        """The layer's input scale shaped to broadcast against the input, on the CPU."""
        table = self.layer.input_scale
        return None if table is None else table.cpu()[:, None, None] if self.conv else table.cpu()

    def _activation_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        quantizer, x = self.layer.input, self.x
        if quantizer is None:
            raise InternalError("the layer's input is not quantized")
        channel = self.layer.channel_dim % x.ndim
        if quantizer.spec.mode == "dynamic":
            a, b, c = quantizer.parameters_for(self.prepared.to(x.device), channel)
            return a.cpu(), b.cpu(), c.cpu()
        rows = [0]
        if quantizer.spec.timed:
            groups = quantizer.spec.time_groups
            rows = [groups[row] if groups else row for row in proof_tables.rows_of(quantizer)]
        tables = (quantizer.scale.cpu(), reciprocal(quantizer.scale.cpu()), quantizer.zero_point.cpu().float())
        channel = self.prepared.ndim - 2 if self.unfolds else channel
        a, b, c = (proof_tables.spread(quantizer, t[rows], self.prepared, channel, rows) for t in tables)
        return a, b, c

    def _largest_code(self) -> int | Tensor:
        """Largest activation code, one a sample where bits change over time."""
        quantizer = self.layer.input
        if quantizer is None or not quantizer.spec.time_bits:
            return (1 << _activation_bits(self.layer)) - 1
        tops = torch.tensor([2.0 ** quantizer.spec.time_bits[row] - 1 for row in proof_tables.rows_of(quantizer)])
        return tops.reshape(-1, *([1] * (self.x.ndim - 1)))

    def quantized_values(self) -> Tensor:
        """What the float operation of a simulated layer multiplies, in the dtype of the input."""
        return decode(self.a_codes, self.a_scale, self.a_zero).to(self.x.dtype)

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        """Float64 linear or convolution without bias."""
        if self.unfolds and isinstance(self.layer, nn.Conv2d):
            return (w.double().flatten(1) @ a.double()).unflatten(-1, proof_tables.places(self.layer, self.x))
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(a.double(), w.double(), None)
        return F.linear(a.double(), w.double())

    def per_channel(self, values: Tensor) -> Tensor:
        """``[N]`` shaped to broadcast against the output."""
        return values[:, None, None] if self.conv else values

    def accumulators(self) -> list[Tensor]:
        """int64 sums of each segment or group, shape of the output; integers below 2**53 are exact in float64."""
        a, w = self.a_codes - self.a_zero, self.codes.float() - self.zero
        dim = self.layer.channel_dim % self.x.ndim
        found = []
        for of in proof_tables.summed(self.layer):
            some = of if len(of) else torch.zeros(1, dtype=torch.int64)  # torch convolves no channels to no outputs
            acc = self.product(a.index_select(dim, some), w.index_select(1, some)).round().long()
            found.append(acc if len(of) else torch.zeros_like(acc))
        return found

    def exact_float(self, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y64, bound before the last rounding) of a float kernel with these operands in the input's dtype, and with
        sums of the magnitude given, where it is not the weight's."""
        a = self.quantized_values() if self.input else self.prepared.to(self.x.dtype)
        w = self.weight.to(self.x.dtype)
        y, size = self.product(a, w), self.product(a.abs(), w.abs() if magnitude is None else magnitude)
        partial = half_ulp(y, self.x.dtype) if self.x.dtype != torch.float32 else torch.zeros_like(y)
        if self.bias is not None:
            y, size = y + self.per_channel(self.bias), size + self.per_channel(self.bias).abs()
        bound = (self.weight[0].numel() + 2) * _unit(self.x.device) * size + partial
        return (y, bound) if self.layer.low_rank is None else self._with_branch(y, bound)

    def exact_integer(self) -> tuple[Tensor, Tensor]:
        """(y64, bound before the last rounding) of an integer kernel: only the epilogue is float32."""
        dim, summed = self.layer.channel_dim % self.x.ndim, proof_tables.summed(self.layer)
        y, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        of_weight = self.table_scale.double().expand(-1, len(summed))
        for s, (of, acc) in enumerate(zip(summed, self.accumulators(), strict=True)):
            act = self.a_scale.double()
            act = act.index_select(dim, of[:1]) if len(of) and act.shape[dim] > 1 else act.narrow(dim, 0, 1)
            if isinstance(self.layer, nn.Conv2d) and act.shape[-2:].numel() > 1:
                act = act[..., :: int(self.layer.stride[0]), :: int(self.layer.stride[1])]
            part = acc.double() * act * self.per_channel(of_weight[:, s])
            y, size = y + part, size + part.abs()
        if self.bias is not None:
            y, size = y + self.per_channel(self.bias), size + self.per_channel(self.bias).abs()
        bound = (len(summed) + 4) * _unit(self.x.device) * size
        return (y, bound) if self.layer.low_rank is None else self._with_branch(y, bound)

    def _with_branch(self, y: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """A product that is rounded to the dtype of the input and has the low-rank branch added to it then."""
        extra, more = bounds.branch(self.layer, self.prepared.to(self.x.dtype), _unit(self.x.device))
        return y + extra, bound + more + half_ulp(y.abs() + bound, self.x.dtype)


def _activation_bits(layer: QuantLayer) -> int:
    return layer.spec.activation.grid.bits if layer.spec.activation is not None else 8


# ---- kernels ---------------------------------------------------------------------------------------------------------
def _kernel(name: str, probe: _Probe) -> Json:
    layer, x = probe.layer, probe.x
    module = INTEGER_KERNELS.get(name)
    result: Json = {}
    if module is None:
        with _quantizer(layer, enabled=probe.input):
            y = kernels.PROVEN[name](layer, x)
        y64, bound = probe.exact_float(proof_codebook.magnitude(name, layer))
        result["identity"] = identity_probe(probe, name)
    else:
        y = kernels.PROVEN[name](layer, x)
        y64, bound = probe.exact_integer()
        result["activation_codes"] = _compare(probe.a_codes.to(torch.uint8), module.input_codes(layer, x))
        result["accumulators"] = _accumulators(probe, module.accumulators(layer, x))
        stress = _Probe(probe.codes, layer, stress_input(probe), (probe.table_scale, probe.table_zero))
        result["largest_sums"] = _accumulators(stress, module.accumulators(layer, stress.x))
    ratio = bound_ratio(y, y64, bound)
    result["max_error_over_bound"] = ratio if math.isfinite(ratio) else None
    shape_and_type = y.shape == y64.shape and y.dtype == x.dtype
    result["ok"] = shape_and_type and ratio <= 1 and all(v.get("ok", True) for v in result.values() if type(v) is dict)
    return result


def _accumulators(probe: _Probe, got: list[Tensor]) -> Json:
    want = probe.accumulators()
    if probe.conv:
        got = [acc.permute(0, 3, 1, 2) if probe.x.ndim == 4 else acc.squeeze(0).permute(2, 0, 1) for acc in got]
    parts = [_compare(w, g) for w, g in zip(want, got, strict=False)]
    whole = len(want) == len(got) and all(acc.dtype == torch.int32 for acc in got)
    return {
        "equal": sum(p["equal"] for p in parts),
        "total": sum(w.numel() for w in want),
        "largest": max((int(w.abs().max()) for w in want if w.numel()), default=0),
        "ok": whole and all(p["ok"] for p in parts),
    }


def stress_input(probe: _Probe) -> Tensor:
    """An input that clips every code towards the sign of the heaviest rows' weights: the largest sums there are."""
    layer, x = probe.layer, probe.x
    signs = torch.sign(probe.codes - probe.zero)
    heavy = (probe.codes - probe.zero).abs().flatten(1).sum(1).argsort(descending=True)
    signs = signs[heavy[torch.arange(x.shape[0] if x.ndim > 1 else 1) % len(heavy)]]
    if isinstance(layer, nn.Conv2d):
        (kh, kw), (dh, dw) = layer.kernel_hw, layer.dilation
        picture = signs.new_zeros(*signs.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
        picture[:, :, ::dh, ::dw] = signs
        signs = picture
    else:
        signs = signs.reshape(*signs.shape[:1], *([1] * (x.ndim - 2)), -1) if x.ndim > 1 else signs[0]
    values = signs * torch.finfo(torch.float16).max
    values = unrotate(values) if layer.rotated else values
    if probe.factors is not None:  # small factors must not keep the input from the ends of its range
        largest = torch.finfo(x.dtype).max
        values = (values / probe.factors).clamp(-largest, largest)
    if layer.input is not None and layer.input.spec.granularity == "pixel_group":  # of as many pixels as it is for
        values = values.expand(x.shape)
    return values.to(dtype=x.dtype, device=x.device)


def bound_ratio(y: Tensor, y64: Tensor, bound: Tensor) -> float:
    """Largest ``|y - y64| / bound``; infinite where ``y`` is not finite although the exact value fits its dtype."""
    if y.shape != y64.shape:
        return math.inf
    if y.numel() == 0:
        return 0.0
    wide = y.detach().cpu().double()
    limit = bound + half_ulp(torch.maximum(wide.nan_to_num(0.0, 0.0, 0.0).abs(), y64.abs()), y.dtype)
    overflow = (wide == torch.sign(y64) * math.inf) & (y64.abs() + limit >= torch.finfo(y.dtype).max)
    ratio = torch.where(overflow, torch.zeros_like(y64), (wide - y64).abs() / limit)
    return float(torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf).max())


def identity_probe(probe: _Probe, name: str) -> Json:
    """Feed a float kernel ``PROBE`` times an identity matrix: the output must be the decoded weight, bit for bit.

    An input scale is replaced by powers of two near it for the probe: it counts, and products stay exact. A bias, a
    low-rank branch and a rotation are left out.
    """
    layer = probe.layer
    (rows, channels, kh, kw), outputs = (*probe.weight.shape, 1, 1)[:4], 1
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.stride + layer.dilation) == {1}
        if not plain or isinstance(layer.padding, str):
            return {"skipped": "a convolution with stride, dilation, groups or another padding mode"}
        outputs = (kh + 2 * int(layer.padding[0])) * (kw + 2 * int(layer.padding[1]))
    if channels * channels * kh * kw * rows * outputs > IDENTITY_BUDGET:
        return {"skipped": f"{rows} x {channels} x {kh} x {kw} is too large for the probe"}
    eye = torch.eye(channels, dtype=probe.x.dtype, device=probe.x.device) * PROBE
    factors = None if layer.input_scale is None else exact_factors(layer.input_scale)
    want = (probe.weight.to(probe.x.dtype) * PROBE).cpu()
    if factors is not None:
        want = (want.float() * factors.cpu().reshape(1, -1, *([1] * (want.ndim - 2)))).to(want.dtype)
    if isinstance(layer, nn.Conv2d):
        picture = eye.new_zeros(channels, channels, 2 * kh - 1, 2 * kw - 1)
        picture[:, :, kh - 1, kw - 1] = eye
        eye = picture
    with _quantizer(layer, enabled=False), _alone(layer), _input_scale(layer, factors):
        got = kernels.PROVEN[name](layer, eye).cpu()
    if isinstance(layer, nn.Conv2d):
        (top, left), (h, w) = (int(layer.padding[0]), int(layer.padding[1])), (kh, kw)
        got = got[:, :, top : top + h, left : left + w].flip(2, 3)
    return _compare(want, got.transpose(0, 1))


@contextmanager
def _quantizer(layer: QuantLayer, *, enabled: bool) -> Iterator[None]:
    before = None if layer.input is None else layer.input.enabled
    if layer.input is not None:
        layer.input.enabled = enabled
    try:
        yield
    finally:
        if layer.input is not None and before is not None:
            layer.input.enabled = before


@contextmanager
def _alone(layer: QuantLayer) -> Iterator[None]:
    bias, branch = layer.bias, layer.low_rank
    layer.bias = layer.low_rank = None
    try:
        yield
    finally:
        layer.bias, layer.low_rank = bias, branch


def exact_factors(input_scale: Tensor) -> Tensor:
    """Powers of two near the factors of an input scale, between 1/64 and 64."""
    return torch.exp2(torch.log2(input_scale).round().clamp(-6, 6))


@contextmanager
def _input_scale(layer: QuantLayer, factors: Tensor | None) -> Iterator[None]:
    before, rotated = layer.input_scale, layer.rotated
    layer.input_scale, layer.rotated = factors, False
    try:
        yield
    finally:
        layer.input_scale, layer.rotated = before, rotated


def _unit(device: torch.device) -> float:
    return 2.0**-24 if device.type == "cpu" else 2.0**-22


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Reduced-precision products of GPUs off inside the block: the bound is one of float32 sums."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = (matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction,
             matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        (matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction,
         matmul.allow_bf16_reduced_precision_reduction) = saved
