"""Exact int8 products on the CPU: accumulators against int64, refusals by name, the longest sum, compiled graphs."""

from __future__ import annotations

import collections
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bitbrush import kernels
from bitbrush.kernels import cpu, reference
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec


def _int64(layer: QuantLayer, codes: Tensor, x: Tensor) -> list[Tensor]:
    """Sums of code products in Python-sized integers: no float, no im2col of the kernel's."""
    a, _, zero = layer.input.encode(layer.prepare(x), layer.channel_dim % x.ndim)
    left = (a - zero).long()
    weight = codes.long() - torch.cat(
        [layer.weight_zero_point[:, s : s + 1].long().expand(-1, c) for s, c in enumerate(layer.segments)], 1
    ).reshape(codes.shape[0], -1, *([1] * (codes.ndim - 2)))
    out = []
    for of in _summed(layer):
        w = weight[:, of]
        if isinstance(layer, nn.Conv2d):
            part = left[:, of]
            (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
            part = nn.functional.pad(part, (pw, pw, ph, ph))
            kh, kw = layer.kernel_size
            h, wd = (part.shape[2] - dh * (kh - 1) - 1) // sh + 1, (part.shape[3] - dw * (kw - 1) - 1) // sw + 1
            total = torch.zeros(part.shape[0], h, wd, codes.shape[0], dtype=torch.int64)
            for i in range(kh):
                for j in range(kw):
                    seen = part[:, :, i * dh :: sh, j * dw :: sw][:, :, :h, :wd]
                    total += (seen.permute(0, 2, 3, 1)[..., None, :] * w[:, :, i, j]).sum(-1)
            out.append(total)
        else:
            out.append((left[..., of][..., None, :] * w).sum(-1))
    return out


def _summed(layer: QuantLayer) -> list[Tensor]:
    """Channels of each sum: of a segment, or of a group."""
    if layer.input.group_of is None or layer.input.spec.granularity == "pixel_group":
        return list(torch.arange(layer.in_channels_).split(layer.segments))
    return [(layer.input.group_of == group).nonzero().flatten() for group in range(layer.input.spec.groups)]


def test_accumulators_equal_int64(builder: ModuleType) -> None:
    cases, ran, values, skipped = builder.pairwise(3), 0, 0, collections.Counter()
    for i, case in enumerate(cases):
        _, packed, codes = builder.build(case, i)
        reason = cpu.why_not(packed, "cpu")
        if reason is not None:
            skipped[reason] += 1
            continue
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)):
            got, want = cpu.accumulators(packed, x), _int64(packed, codes, x)
        assert len(got) == len(want) == len(_summed(packed))
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.int32 and torch.equal(g.long(), w), case
            values += w.numel()
        ran += 1
    assert ran + skipped.total() == len(cases) and ran >= 40 and values > 50_000
    assert set(skipped) <= {
        "8-bit weights with free zero-points do not fit int8", "scales a pixel in a convolution larger than 1x1",
        "a scale a channel cannot leave the integer sum: simulated only",
        "groups of a token's channels that are not the segments of the weight: a scale cannot leave the sum",
    }


def test_outputs_are_close_to_the_reference_and_keep_dtype_and_layout(builder: ModuleType) -> None:
    ran = 0
    for i, case in enumerate(builder.pairwise(4)):
        _, packed, _ = builder.build(case, i)
        if cpu.why_not(packed, "cpu") is not None:
            continue
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            want = reference.run(packed, x)
            packed.kernel = "cpu-int8"
            got = packed(x)
        assert got.dtype == want.dtype and got.shape == want.shape
        scale = float(want.float().abs().max())
        assert float((got.float() - want.float()).abs().max()) <= scale * 16 * torch.finfo(x.dtype).eps, case
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            assert got.is_contiguous(memory_format=torch.channels_last)
        ran += 1
    assert ran >= 40


def _linear(spec: LayerSpec, channels: int = 32) -> QuantLayer:
    return QuantLinear.wrap(nn.Linear(channels, 4), spec, Clock((1.0,)), 1)


def _conv(spec: LayerSpec, **kwargs: object) -> QuantLayer:
    return QuantConv2d.wrap(nn.Conv2d(32, 32, **{"kernel_size": 3, **kwargs}), spec, Clock((1.0,)), 1)


W4, A8 = WeightSpec(), ActivationSpec()
BOTH = LayerSpec(weight=W4, activation=A8)
TOKEN = LayerSpec(weight=W4, activation=ActivationSpec(mode="dynamic", granularity="token"))
FREE8 = WeightSpec(grid=Grid(bits=8))
SYMMETRIC8 = WeightSpec(grid=Grid(bits=8, signed=True))


def test_reasons_by_name() -> None:
    cases: list[tuple[QuantLayer, str, str | None]] = [
        (_linear(BOTH), "cpu", None),
        (_linear(BOTH), "cuda", "the kernel runs on the CPU, not on cuda"),
        (_linear(LayerSpec(weight=W4)), "cpu", "weight only: the input stays float"),
        (_linear(LayerSpec(activation=A8)), "cpu", "the weight is not quantized"),
        (_linear(LayerSpec(weight=W4, activation=ActivationSpec(position="output"))), "cpu",
         "the output is quantized, not the input"),
        (_linear(LayerSpec(weight=FREE8, activation=A8)), "cpu", "8-bit weights with free zero-points do not fit int8"),
        (_linear(LayerSpec(weight=SYMMETRIC8, activation=A8)), "cpu", None),
        (_linear(LayerSpec(weight=WeightSpec(row_bits=(4, 4, 8, 2)), activation=A8)), "cpu",
         "8-bit weights with free zero-points do not fit int8"),
        (_conv(BOTH, groups=4), "cpu", "a convolution with groups = 4"),
        (_conv(BOTH, padding=1, padding_mode="reflect"), "cpu", "padding mode reflect"),
        (_conv(BOTH, padding="same"), "cpu", None),
        (_conv(TOKEN), "cpu", "scales a pixel in a convolution larger than 1x1"),
        (_conv(TOKEN, kernel_size=1), "cpu", None),
        (_conv(TOKEN, kernel_size=1, padding=1), "cpu", "scales a pixel in a convolution larger than 1x1"),
        (_linear(TOKEN), "cpu", None),
        (_linear(LayerSpec(weight=SYMMETRIC8, activation=A8), 65_793), "cpu", None),
        (_linear(LayerSpec(weight=SYMMETRIC8, activation=A8), 65_794), "cpu",
         "K = 65,794 exceeds 65,793, the longest int32 sum for W8A8"),
        (_linear(LayerSpec(weight=SYMMETRIC8, activation=A8, segments=(65_793, 65_793)), 2 * 65_793), "cpu", None),
    ]
    for layer, device, reason in cases:
        assert cpu.why_not(layer, device) == reason
    assert len(cases) == 18


def test_longest_sum_by_bits() -> None:
    ran = 0
    for bits in range(1, 9):
        for signed in (False, True):
            for a_bits in (4, 6, 8):
                spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=bits, signed=signed)),
                                 activation=ActivationSpec(grid=Grid(bits=a_bits)))
                most = 2 ** (bits - 1) if signed else min(2**bits - 1, 128)
                assert cpu.longest(_linear(spec)) == (2**31 - 1) // ((2**a_bits - 1) * most)
                ran += 1
    assert ran == 48


@pytest.mark.parametrize("activation_zero,weight_code", [(0, 0), (255, 0), (0, 255), (255, 255)])
def test_longest_sum_holds_for_the_worst_codes(activation_zero: int, weight_code: int) -> None:
    k = 65_793
    layer = _linear(LayerSpec(weight=SYMMETRIC8, activation=A8), k)
    codes = torch.full((4, k), weight_code, dtype=torch.uint8)
    layer.set_weight(codes, torch.ones(4, 1), torch.full((4, 1), 128))
    layer.input.set_scale(torch.ones(1, 1), torch.full((1, 1), activation_zero))
    layer.pack()
    code = 255 - activation_zero
    (acc,) = cpu.accumulators(layer, torch.full((2, k), float(code - activation_zero)))
    assert acc.unique().tolist() == [(code - activation_zero) * (weight_code - 128) * k]


@pytest.mark.parametrize("exact", [True, False])
def test_int8_product_both_ways(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine's own product cannot be trusted: float32 blocks of 1,024."""
    if not exact:
        monkeypatch.setattr(cpu, "int_mm_is_exact", lambda: False)
    ran = 0
    for m, k, n in ((1, 1, 1), (3, 5, 7), (17, 33, 9), (2, 1025, 3), (5, 4097, 4), (0, 8, 4), (4, 2048, 1)):
        for fill in (None, (-128, -128), (127, 127), (127, -128)):
            a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
            if fill is not None:
                a, w = torch.full_like(a, fill[0]), torch.full_like(w, fill[1])
            got = cpu.int8_product(a, w)
            assert got.dtype == torch.int32 and torch.equal(got.long(), a.long() @ w.long().T)
            ran += 1
    assert ran == 28


def test_switched_off_input_and_gradients_take_the_reference(builder: ModuleType) -> None:
    _, packed, _ = builder.build({"kind": "linear"})
    x = builder.make_input({"kind": "linear"})
    packed.kernel = "cpu-int8"
    y = packed(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None and torch.equal(y, reference.run(packed, x))
    packed.input.enabled = False
    with torch.no_grad():
        assert torch.equal(packed(x), reference.run(packed, x))


def test_use_chooses_and_reports(builder: ModuleType) -> None:
    model = nn.Sequential(builder.build({"kind": "linear"})[1], builder.build({"weight_bits": 8})[1])
    chosen = kernels.use(model, "cpu-int8")
    assert chosen == {"0": "cpu-int8", "1": "reference: 8-bit weights with free zero-points do not fit int8"}
    assert [layer.kernel for layer in model] == ["cpu-int8", "reference"]
    assert set(kernels.use(model, "reference").values()) == {"reference"}


def test_same_result_for_one_and_two_threads(builder: ModuleType) -> None:
    _, packed, _ = builder.build({"kind": "conv", "padding": (1, 1), "segments": (40, 24)}, 8)
    packed.kernel, x, before = "cpu-int8", builder.make_input({"kind": "conv"}), torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(packed(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


def test_compiled_graph_is_whole_and_equal_over_changing_times(builder: ModuleType) -> None:
    ran = 0
    for case in ({"kind": "conv", "mode": "timed", "segments": (40, 24)}, {"kind": "linear", "mode": "token"}):
        for kernel in ("reference", "cpu-int8"):
            _, packed, _ = builder.build(case)
            packed.kernel, clock, x = kernel, packed.input._clock[0], builder.make_input(case)

            def step(x: Tensor, t: Tensor, layer: QuantLayer = packed, clock: Clock = clock) -> Tensor:
                clock.set(t)
                y: Tensor = layer(x)
                clock.clear()
                return y

            torch._dynamo.reset()
            counter = CompileCounter()
            compiled = torch.compile(step, fullgraph=True, backend=counter)
            with torch.no_grad():
                for t in (480, 260, 990):
                    assert torch.equal(compiled(x, torch.tensor(t)), step(x, torch.tensor(t)))
            assert counter.frame_count == 1
            ran += 1
    assert ran == 4
