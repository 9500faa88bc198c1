"""`encode` and `decode` against golden values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitbrush.numbers import codec

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "codec.json"


def _floats(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())


def test_golden_codes_and_values() -> None:
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    values = 0
    for case in cases:
        x, scale, zero = _floats(case["x"]), _floats([case["scale"]]), torch.tensor(float(case["zero_point"]))
        codes = codec.encode(x, codec.reciprocal(scale), zero, 2 ** case["bits"] - 1)
        assert codes.dtype == torch.float32 and codes.int().tolist() == case["codes"]
        assert torch.equal(codec.decode(codes, scale, zero), _floats(case["values"]))
        values += len(case["x"])
    assert (len(cases), values) == (180, 4800)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_inputs_are_encoded_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    scale, zero = torch.tensor(0.0137), torch.tensor(121.0)
    want = codec.encode(x.float(), codec.reciprocal(scale), zero, 255)
    got = codec.encode(x, codec.reciprocal(scale), zero, 255)
    assert torch.equal(got, want) and got.dtype == torch.float32
    if dtype == torch.float16:  # the same in half arithmetic is another function: the test can tell them apart
        assert int((torch.round(x * (1 / scale).half()) + 121 != want).sum()) > 0


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    codes = codec.encode(x, torch.tensor(1.0), torch.tensor(8.0), 15)
    assert codes.tolist() == [8, 10, 10, 12, 8, 6, 6]


def test_reciprocal_is_the_ieee_quotient() -> None:
    scale = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) * 10 + 1e-30
    assert np.array_equal(codec.reciprocal(scale).numpy(), np.float32(1) / scale.numpy())


def test_decode_encode_is_idempotent_and_keeps_zero() -> None:
    ran = 0
    for bits in range(1, 9):
        for zero_value in range(0, 2**bits, max(2**bits // 5, 1)):
            zero, scale = torch.tensor(float(zero_value)), torch.tensor(0.37)
            codes = torch.arange(2**bits).float()
            value = codec.decode(codes, scale, zero)
            assert torch.equal(codec.encode(value, codec.reciprocal(scale), zero, 2**bits - 1), codes)
            assert codec.decode(codec.encode(torch.zeros(1), codec.reciprocal(scale), zero, 2**bits - 1),
                                scale, zero).item() == 0.0
            ran += 1
    assert ran == 44


def test_rows_of_different_bits_clamp_at_their_own_top() -> None:
    x = torch.full((3, 4), 100.0)
    top = torch.tensor([[3.0], [15.0], [255.0]])
    codes = codec.encode(x, torch.tensor(1.0), torch.zeros(3, 1), top)
    assert codes[:, 0].tolist() == [3, 15, 100]
    assert codec.encode(-x, torch.tensor(1.0), torch.zeros(3, 1), top).eq(0).all()


def test_encode_offset_agrees_with_floor_and_hard_offsets() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(5))
    inverse, zero = codec.reciprocal(torch.tensor(0.11)), torch.tensor(7.0)
    down = codec.encode_offset(x, inverse, zero, 15, torch.zeros(()))
    up = codec.encode_offset(x, inverse, zero, 15, torch.ones(()))
    near = codec.encode(x, inverse, zero, 15)
    assert bool(((near == down) | (near == up)).all()) and bool((up - down).abs().le(1).all())
    soft = codec.encode_offset(x, inverse, zero, 15, torch.full((), 0.25))
    inside = (down > 0) & (up < 15)
    assert torch.equal(soft[inside], down[inside] + 0.25)


def test_tables_reach_the_right_channels() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert codec.expand_weight_scale(table, (2, 1), 2).tolist() == [[1, 1, 2], [3, 3, 4]]
    assert codec.expand_weight_scale(table, (2, 1), 4).shape == (2, 3, 1, 1)
    assert codec.expand_weight_scale(table[:, :1], (3,), 4).shape == (2, 1, 1, 1)
    assert codec.expand_activation_scale(table, (2, 1), 4, 1).shape == (2, 3, 1, 1)
    assert codec.expand_activation_scale(table, (2, 1), 3, 2).tolist() == [[[1, 1, 2]], [[3, 3, 4]]]
    assert codec.expand_activation_scale(table[:1], (2, 1), 1, 0).tolist() == [1, 1, 2]
    assert codec.expand_activation_scale(table[:, :1], (), 3, 2).shape == (2, 1, 1)
    by_channel = codec.expand_activation_scale(table, (1, 1), 4, 1)  # one segment a channel: the table as it is
    assert by_channel.shape == (2, 2, 1, 1) and by_channel.data_ptr() == table.data_ptr()


def _values() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    ties, far = torch.arange(-600, 600) + 0.5, torch.tensor([1e30, -1e30, 0.0, 3e9, -3e9, torch.inf, -torch.inf])
    return torch.cat([torch.randn(40_000, generator=g) * 50, ties, far])


TABLES = [(1.0, 128, 255), (0.37, 3, 15), (1e-3, 0, 255), (2.0, 255, 255), (0.37, 3, 255), (0.37, 101, 255)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encode_bytes_is_encode(dtype: torch.dtype) -> None:
    x = _values().to(dtype)
    for scale, zero, top in TABLES:
        inverse = codec.reciprocal(torch.tensor(scale))
        got = codec.encode_bytes(x, inverse, zero, top, torch.empty(x.shape, dtype=torch.uint8))
        want = codec.encode(x, inverse, torch.tensor(float(zero)), top)
        assert torch.equal(((got.int() + zero) % 256).float(), want)


@pytest.mark.parametrize("quantizes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_codes_are_encode_in_the_order_of_the_input(
    dtype: torch.dtype, quantizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's quantization, which must be there, and without it; whatever the strides are."""
    assert codec._quantizes()
    monkeypatch.setattr(codec, "_quantizes", lambda: quantizes)
    x = _values().to(dtype)[:41_200].reshape(2, 4, 50, 103)
    sliced, expanded = x[..., 1:100].permute(3, 0, 1, 2), x[:, :1].expand(2, 3, 50, 103)
    for given in (x, x.permute(0, 2, 3, 1), x[:, 1:3], sliced, expanded):
        for scale, zero, top in TABLES:
            inverse = codec.reciprocal(torch.tensor(scale))
            want = codec.encode(given, inverse, torch.tensor(float(zero)), top).int()
            for less in (0, 128):
                got = codec.encode_shifted(given, inverse, zero, top, less)
                assert got.dtype == torch.uint8 and torch.equal((got.int() + less) % 256, want)
                assert got.stride() == torch.empty_like(given).stride()
