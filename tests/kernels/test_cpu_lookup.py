"""Looked-up sums against the reference: linear layers, convolutions, the proof, and what is left to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.kernels import cpu_lookup, reference
from bitbrush.kernels.proof import prove_layer
from bitbrush.network.codebook_layers import CodebookConv2d, CodebookLayer, CodebookLinear
from bitbrush.network.layers import QuantLinear
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec


def _weight(count: int = 3, bits: int = 4, group: int = 8) -> WeightSpec:
    return WeightSpec(grid=Grid(kind="codebook", bits=bits), codebooks=count, group=group)


def _filled(layer: CodebookLayer, seed: int = 0) -> CodebookLayer:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, layer.weight_spec.grid.levels, layer.code_shape, generator=draw)
    books = torch.randn(layer.weight_spec.table_shape, generator=draw)
    layer.set_codes(codes, books, torch.rand(layer.out_channels_, generator=draw) + 0.1)
    return layer


def _linear(rows: int = 40, channels: int = 48, spec: LayerSpec | None = None, bias: bool = True) -> CodebookLayer:
    spec = spec or LayerSpec(weight=_weight())
    return _filled(CodebookLinear.wrap(nn.Linear(channels, rows, bias=bias), spec, None, 1))


def _conv(**more: Any) -> CodebookLayer:
    return _filled(CodebookConv2d.wrap(nn.Conv2d(16, 24, **more), LayerSpec(weight=_weight(count=2, bits=5)), None, 1))


def _checked(layer: CodebookLayer, x: Tensor) -> Tensor:
    """The looked-up output of the packed layer; the float64 product is within float32 rounding of it."""
    layer.pack()
    with torch.no_grad():
        got, want = cpu_lookup.looked_up(layer, x), reference.run(layer, x)
    assert got.shape == want.shape and got.dtype == torch.float32 and not torch.equal(got, torch.zeros_like(got))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    return got


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 37, 48), (0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    layer = _linear(bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if x.numel():
        _checked(layer, x)
    else:
        layer.pack()
        assert cpu_lookup.looked_up(layer, x).shape == (0, 40)


@pytest.mark.parametrize("more", [
    {"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
])
def test_convolutions(more: dict[str, Any]) -> None:
    layer = _conv(**more)
    x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(2))
    got = _checked(layer, x)
    with torch.no_grad():
        assert torch.allclose(cpu_lookup.looked_up(layer, x[1]), got[1], rtol=1e-6, atol=1e-6)


def test_tables_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _linear()
    x = torch.randn(53, 48, generator=torch.Generator().manual_seed(3))
    whole = _checked(layer, x)
    monkeypatch.setattr(cpu_lookup, "TABLE_BYTES", 1)  # a cache line of inputs at a time
    with torch.no_grad():
        parts = cpu_lookup.looked_up(layer, x)
    assert torch.allclose(parts, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))


def test_factors_and_quantized_inputs_are_those_of_the_layer() -> None:
    spec = LayerSpec(weight=_weight(), input_scale=True,
                     activation=ActivationSpec(grid=Grid(bits=6), mode="dynamic", granularity="token"))
    layer = _linear(spec=spec)
    codes, books, scale = layer.stored_codes(), layer.book()(), layer.weight_scale
    layer.set_input_scale(torch.linspace(0.5, 2.0, 48))
    layer.set_codes(codes, books, scale)
    _checked(layer, torch.randn(7, 48, generator=torch.Generator().manual_seed(4)))


def test_the_proof_runs_it_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound and identity probe hold for codewords that cancel; a wrong order of the codebooks is found."""
    layer = _linear(rows=24, channels=32)
    codes = layer.stored_codes()
    books = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(5))
    books[1] = 1e-3 * books[1] - books[0] * 0.999  # sums far below their terms
    layer.set_codes(codes, books, layer.weight_scale)
    tables = layer.weight_tables()
    layer.pack()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(6))
    found = prove_layer(codes, layer, x, tables)
    ours = found["kernels"]["cpu-lookup"]
    assert found["ok"] and ours["ok"] and ours["identity"]["equal"] == ours["identity"]["total"] == 24 * 32, found
    assert 0 < ours["max_error_over_bound"] <= 1
    stored = layer.stored_codes
    monkeypatch.setattr(layer, "stored_codes", lambda: stored().flip(2))
    assert not prove_layer(codes, layer, x, tables)["kernels"]["cpu-lookup"]["ok"]


def test_what_it_leaves_to_the_reference() -> None:
    """Other dtypes, gradients, many inputs, and layers of integers: the reference, said by name where it is chosen."""
    layer = _linear(rows=512, channels=64, spec=LayerSpec(weight=_weight(bits=8)), bias=False)
    layer.pack()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.equal(cpu_lookup.looked_up(layer, x.bfloat16()), reference.run(layer, x.bfloat16()))
        assert cpu_lookup.pays(layer, 4) and torch.equal(cpu_lookup.run(layer, x), cpu_lookup.looked_up(layer, x))
        many = x.repeat(50, 1)
        assert not cpu_lookup.pays(layer, 200) and torch.equal(cpu_lookup.run(layer, many), reference.run(layer, many))
    assert not cpu_lookup.pays(_linear(rows=40, spec=LayerSpec(weight=_weight(bits=8))), 4)  # rows too few for a table
    moving = x.clone().requires_grad_()
    assert torch.equal(cpu_lookup.looked_up(layer, moving), reference.run(layer, moving))
    scalar = QuantLinear.wrap(nn.Linear(64, 8), LayerSpec(weight=WeightSpec(grid=Grid(bits=4))), None, 1)
    model = nn.Sequential(layer, scalar)
    assert kernels.use(model, "cpu-lookup") == {
        "0": "cpu-lookup", "1": "reference: the weight is not made of additive codebooks"}
    assert layer.kernel == "cpu-lookup" and "not on cuda" in str(cpu_lookup.why_not(layer, "cuda"))
    with torch.no_grad():
        assert torch.equal(layer(x), cpu_lookup.looked_up(layer, x))


def test_a_model_that_was_moved_elsewhere_is_left_to_the_reference() -> None:
    layer = _linear()
    layer.pack()
    chosen = kernels.use(layer, "cpu-lookup")
    assert set(chosen.values()) == {"cpu-lookup"} and cpu_lookup.pays(layer, 2)
    x = torch.zeros(2, 48, device="meta")
    assert layer.to("meta")(x).device == x.device
