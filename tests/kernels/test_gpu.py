"""Packed layers as the CUDA kernel computes them: its operations in plain torch on the CPU over the grid of cases; the
same layers through Triton's interpreter; compiled graphs; what is refused."""

from __future__ import annotations

import collections
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bitbrush
from bitbrush import kernels
from bitbrush.engine.progress import Silent
from bitbrush.kernels import cpu, cpu_fused, gpu, gpu_decode, int8_ops, sums
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLayer
from bitbrush.numbers.grid import ActivationSpec, LayerSpec, WeightSpec
from interpreter import TRITON, interpreted
from small import least_pipeline

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernel in its plain form, whose epilogue is in the pinned order."""
    monkeypatch.setattr(cpu_fused, "takes", lambda layer, x: False)


@pytest.mark.usefixtures("plain")
def test_outputs_equal_the_integer_kernel_of_the_cpu(builder: ModuleType) -> None:
    cases = builder.pairwise(3) + [builder.square(case) for case in builder.pairwise(4)]
    ran, skipped = collections.Counter(), collections.Counter()
    for i, case in enumerate(cases):
        _, packed, _ = builder.build(case, i)
        reason = gpu.unable(packed)
        if reason is not None:
            skipped[reason] += 1
            continue
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            want, got = cpu.run(packed, x), gpu.run(packed, x)
            if not gpu.leaves(packed, x):
                sums = zip(gpu.accumulators(packed, x), cpu.accumulators(packed, x), strict=True)
                assert all(torch.equal(a, b) for a, b in sums), case
                assert torch.equal(gpu.input_codes(packed, x), cpu.input_codes(packed, x)), case
        assert got.dtype == want.dtype and torch.equal(got, want), case
        ran[case["kind"]] += 1
    assert ran.total() + skipped.total() == len(cases) and ran["linear"] >= 30 and ran["conv"] >= 20
    assert "a convolution with dilation, or with padding or stride that differ by side" in skipped


def test_codes_written_out_in_a_graph_are_those_of_the_operation(builder: ModuleType) -> None:
    ran = values = 0
    for i, case in enumerate(map(builder.square, builder.pairwise(5))):
        _, packed, _ = builder.build(case, i)
        x = builder.make_input(case, i)
        if gpu.unable(packed) is not None or gpu.leaves(packed, x):
            continue
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            given = gpu.given_input(packed, x)
            want, got = gpu.input_rows(packed, x, given), gpu.codes_in_graph(packed, x, given.frame)
        if given.frame is not None and not given.frame.shared:  # below the last picture nothing is ever read
            count = given.frame.batch * given.frame.height * given.frame.pitch
            want, got = want[:count], got[:count]
        assert torch.equal(got, want), case
        ran, values = ran + 1, values + want.numel()
    assert ran >= 40 and values > 100_000


@TRITON
def test_layers_in_the_interpreter_equal_the_integer_kernel_of_the_cpu() -> None:
    found = interpreted("interpreted_layers.py", timeout=500)
    assert found["unequal"] == [] and found["linear"] >= 15 and found["conv"] >= 15
    assert found["decoded"] >= 100


def test_decoded_weights_are_those_of_the_reference(builder: ModuleType) -> None:
    ran = 0
    for i, case in enumerate(builder.pairwise(9)):
        _, packed, _ = builder.build(case, i)
        weight, want = gpu_decode.weight(packed, case["dtype"]), packed.decoded_weight().to(case["dtype"])
        assert torch.equal(weight, want), case
        if weight.ndim == 4:
            assert weight.permute(0, 2, 3, 1).is_contiguous()
        ran += 1
    assert ran >= 60


def _layer(**options: object) -> QuantLayer:
    spec = LayerSpec(weight=WeightSpec(), activation=ActivationSpec())
    return QuantConv2d.wrap(nn.Conv2d(32, 32, **{"kernel_size": 3, **options}), spec, Clock((1.0,)), 1)


def test_reasons_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.why_not(_layer(), "cpu") == "the kernel runs on CUDA, not on cpu"
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: False)
    assert gpu.why_not(_layer(), "cuda") == "Triton is not installed"
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: True)
    assert gpu.why_not(_layer(padding=1), "cuda") is None and gpu.why_not(_layer(stride=2, padding=1), "cuda") is None
    other = "a convolution with dilation, or with padding or stride that differ by side"
    for options in ({"dilation": 2}, {"padding": (1, 0)}, {"stride": (2, 1)}):
        assert gpu.why_not(_layer(**options), "cuda") == other
    assert gpu.why_not(_layer(padding=3), "cuda") == "a convolution with more padding than kernel"
    assert gpu.why_not(_layer(groups=4), "cuda") == "a convolution with groups = 4"
    assert kernels.use(nn.Sequential(_layer(padding=1)), "cuda-int8") == {"0": "cuda-int8"}
    assert kernels.use(nn.Sequential(_layer(padding=1)), "cuda-int8", "cpu") == {
        "0": "reference: the kernel runs on CUDA, not on cpu",
    }


def test_auto_chooses_by_device_and_says_why_not(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: True)
    _, able, _ = builder.build({"kind": "conv", "padding": (1, 1)})
    _, unable, _ = builder.build({"kind": "linear", "mode": "channel"})
    model = nn.Sequential(able, unable)
    assert kernels.use(model, "auto", "cuda") == {
        "0": "cuda-int8", "1": "cuda-decode",
    }
    assert kernels.use(model, "auto", "cpu") == {
        "0": "cpu-int8", "1": "reference: a scale a channel cannot leave the integer sum: simulated only",
    }
    chosen = [[kernels.chosen(layer, kind) for kind in ("cpu", "cuda", "mps")] for layer in model]
    assert chosen == [["cpu-int8", "cuda-int8", "reference"], ["reference", "cuda-decode", "reference"]]
    x = builder.make_input({"kind": "conv"})
    with able.input._clock[0].at(1.0), torch.no_grad():
        assert torch.equal(able(x), cpu.run(able, x)) and kernels.taken(able, x) == "cpu-int8"
        assert kernels.taken(able, x.requires_grad_()) == "cpu-int8"  # no gradient is wanted here
    kernels.use(model, "reference")
    assert kernels.chosen(able, "cuda") == "reference"


@pytest.mark.parametrize(("kind", "mode"), [
    ("linear", "timed"), ("conv", "timed"), ("linear", "timed channel_group"), ("conv", "timed channel_group"),
    ("linear", "timed pixel_group")])
def test_a_compiled_graph_has_no_break_and_is_compiled_once(builder: ModuleType, kind: str, mode: str) -> None:
    case = {"kind": kind, "mode": mode, "padding": (1, 1), "segments": (40, 24)}
    _, packed, _ = builder.build(case)
    packed.kernel, clock, x = "cuda-int8", packed.input._clock[0], builder.make_input(case)
    kernels.prepare(packed)
    counter = CompileCounter()
    graph = torch.compile(packed, backend=counter, fullgraph=True)
    for time in (1.0, 250.0, 999.0):
        with clock.at(torch.tensor(time)), torch.no_grad():
            got, want = graph(x), packed(x)
        assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_a_network_is_one_graph_for_all_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: True)
    unet = bitbrush.quantize(least_pipeline(), "rtn", 4, 8, progress=Silent()).pipeline.unet
    monkeypatch.setattr(gpu, "why_not", lambda layer, kind: gpu.unable(layer))
    assert set(kernels.use(unet, "cuda-int8").values()) == {"cuda-int8"}
    counter = CompileCounter()
    graph, x = torch.compile(unet, backend=counter, fullgraph=True), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for time in (900, 500, 3):
            assert torch.equal(graph(x, torch.tensor(time)).sample, unet(x, torch.tensor(time)).sample)
    assert counter.frame_count == 1


def test_shapes_for_tracing_are_those_that_come_out(builder: ModuleType) -> None:
    ran = 0
    for i, case in enumerate(builder.pairwise(6)[:24]):
        _, packed, _ = builder.build(case, i)
        x = builder.make_input(case, i)
        if gpu.unable(packed) is not None or gpu.leaves(packed, x):
            continue
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            given = gpu.given_input(packed, x)
            a, w = gpu.input_rows(packed, x, given), gpu.int8_weight(packed)
            tables = (given.scale, given.zero_point, given.times, given.kind, sums.weight_scale(packed),
                      gpu.weight_sum(packed))
            rest = (list(gpu.facts(packed).widths), int8_ops.numbers_of(given.frame), given.per_sample,
                    packed.bias, None, None, x.dtype)
            real = torch.ops.bitbrush.int8_product(a, w, *tables, *rest)
            traced: Tensor = int8_ops._product_shape(a.to("meta"), w.to("meta"), *tables, *rest)
        assert traced.shape == real.shape and traced.dtype == real.dtype
        ran += 1
    assert ran >= 8


def test_sums_of_weights_are_those_of_the_integers_that_are_multiplied(builder: ModuleType) -> None:
    ran = 0
    for i, case in enumerate(builder.pairwise(9)):
        _, packed, _ = builder.build(case, i)
        if gpu.unable(packed) is not None:
            continue
        taps, found = packed.kernel_hw[0] * packed.kernel_hw[1], gpu.weight_sum(packed)
        widths = [taps * width for width in gpu.facts(packed).widths]
        parts = gpu.int8_weight(packed)[:, : sum(widths)].split(widths, 1)
        assert torch.equal(found, torch.stack([part.sum(1, dtype=torch.int32) for part in parts]))
        assert found.dtype == torch.int32 and found.is_contiguous()
        ran += 1
    assert ran >= 8
