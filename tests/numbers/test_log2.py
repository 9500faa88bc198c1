"""The logarithmic grid: exact codes and values, relative error, zeros, gradients, and what its spec may say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.network.log2 import check_log2
from bitbrush.numbers.codec import decode_log2, encode_log2, octaves, round_trip_log2
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan
from bitbrush.numbers.straight_through import fake_log2

ONE = torch.ones(())


def spec(bits: int = 4, **choices: Any) -> ActivationSpec:
    return ActivationSpec(**{"grid": Grid(kind="log2", bits=bits), "mode": "dynamic", **choices})


def spread(count: int = 20_000, low: float = -149, seed: int = 0) -> Tensor:
    """Numbers from 2**low to 1, their logarithms spread evenly."""
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(low * torch.rand(count, generator=g, dtype=torch.float64)).float()


def values(x: Tensor, delta: Tensor, bits: int) -> Tensor:
    return decode_log2(encode_log2(x, delta, 2**bits - 1), delta)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_exactly_rounded_logarithm(bits: int) -> None:
    """Against float64, over all of float32's range, and at every float32 number beside a half octave."""
    half = (2.0 ** -(torch.arange(0, 126) + 0.5).double()).float()
    beside = torch.cat([torch.nextafter(half, half * 0), half, torch.nextafter(half, half * 2)])
    x, top, compared = torch.cat([spread(), beside, 2.0 ** -torch.arange(0, 127)]), 2**bits - 1, 0
    for delta in (1.0, 0.7, 2.0**-20, 0.3e-30):
        part = x[x <= delta]
        given = torch.tensor(delta)
        ratio = ((part * 2.0**64) / given).double() * 2.0**-64
        want = torch.round(-torch.log2(ratio)).clamp(0, top)
        assert torch.equal(encode_log2(part, given, top).double(), want)
        compared += len(part)
    assert compared > 40_000


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_short_way_is_the_definition_bit_for_bit(bits: int) -> None:
    """Half octaves, zeros, numbers below float32's normal ones, a delta that clips, every dtype, a view."""
    half = (2.0 ** -(torch.arange(0, 126) + 0.5).double()).float()
    beside = torch.cat([torch.nextafter(half, half * 0), half, torch.nextafter(half, half * 2)])
    x, compared = torch.cat([spread(), beside, 2.0 ** -torch.arange(0.0, 150.0), torch.zeros(3), torch.ones(1)]), 0
    for delta in (1.0, 0.7, 2.0**-20, 0.3e-30, 1e-44, 0.0):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            part = (x if delta else torch.zeros(9)).to(dtype)
            before = part.clone()
            got = round_trip_log2(part, torch.tensor(delta), 2**bits - 1)
            assert torch.equal(got, values(part, torch.tensor(delta), bits)) and got.dtype == torch.float32
            assert torch.equal(part, before), "the values given are not written over"
            compared += len(part)
    rows = spread(4 * 6 * 10).reshape(4, 6, 10).transpose(1, 2)[..., 1:]
    delta = rows.amax((1, 2), keepdim=True)
    assert torch.equal(round_trip_log2(rows, delta, 2**bits - 1), values(rows, delta, bits))
    assert compared > 300_000


def test_against_the_formula_in_float32() -> None:
    """``round(-log2(x / delta))`` as the released code computes it: a code differs beside a half octave alone."""
    x, delta = spread(200_000, -60), torch.tensor(1.0)
    mine, theirs = octaves(x, delta), torch.round(-torch.log2(x / delta))
    other = mine != theirs
    exact = -torch.log2(x[other].double())
    assert float(other.double().mean()) < 1e-4 and bool(((exact % 1 - 0.5).abs() < 1e-5).all())


def test_values_are_delta_times_powers_of_two() -> None:
    """Item 7 of the page; exact down to where float32 ends."""
    compared = 0
    for delta in (1.0, 0.37, 2.0**-30):
        code = torch.arange(256.0)
        got = decode_log2(code, torch.tensor(delta))
        exact = torch.tensor([math.ldexp(float(torch.tensor(delta)), -q) for q in range(256)], dtype=torch.float64)
        assert torch.equal(got[:90].double(), exact[:90])
        assert torch.equal(got, exact.float())
        compared += 1
    assert compared == 3


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_relative_error(bits: int) -> None:
    x = spread(low=-30)
    delta = x.max()
    got = values(x, delta, bits)
    inside = x >= delta * 2.0 ** -(2**bits - 0.5)
    error = (got.double() / x.double() - 1)[inside]
    assert float(error.min()) > -0.2930 and float(error.max()) < 0.4143
    assert float(got[x == delta][0]) == float(delta), "the maximum is exact"
    if bits >= 4:
        assert float(error.min()) < -0.29 and float(error.max()) > 0.41 and 0.01 < float(error.mean()) < 0.03


def test_bits_give_range_and_not_precision() -> None:
    """Values that 4 bits reach have the same codes with 8."""
    x = spread(low=-15)
    found = [encode_log2(x, ONE, 2**bits - 1) for bits in (4, 5, 6, 8)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_scaling_scales_the_values() -> None:
    x, ran = spread(low=-12), 0
    for factor in (0.5, 2.0**-40, 8.0):
        assert torch.equal(values(x * factor, x.max() * factor, 4), values(x, x.max(), 4) * factor)
        ran += 1
    got, want = values(x * 0.3, (x * 0.3).max(), 4), values(x, x.max(), 4) * 0.3
    assert float((got / want - 1).abs().median()) < 1e-6 and float((got == want).float().mean()) > 0.9
    assert ran == 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_zeros_and_tiny_numbers(bits: int) -> None:
    top = 2**bits - 1
    x = torch.tensor([1.0, 0.0, 1e-45, 1e-40])
    code = encode_log2(x, ONE, top)
    assert code[0] == 0 and code[1] == top and bool((code[2:] <= top).all())
    assert bool(torch.isfinite(values(x, ONE, bits)).all())
    nothing = torch.zeros(3)
    assert torch.equal(values(nothing, torch.zeros(()), bits), nothing)
    small = torch.tensor([1e-45, 0.0])
    assert float(values(small, small.max(), bits)[0]) == float(small[0])
    assert bool(values(x, torch.tensor(math.nan), bits).isnan().all()), "a NaN is not hidden"


def test_delta_broadcasts_and_dtypes_agree() -> None:
    x = spread(24).reshape(2, 3, 4)
    delta = x.amax((1, 2), keepdim=True)
    whole = values(x, delta, 4)
    assert torch.equal(whole, torch.stack([values(part, part.max(), 4) for part in x]))
    half = x.half()
    delta = half.float().amax()
    assert torch.equal(values(half, delta, 4), values(half.float(), delta, 4))


def test_gradients() -> None:
    """1 where the value is inside the range, 0 below it and for zeros; forward is the codec, delta gets nothing."""
    x = torch.tensor([1.0, 0.9, 2**-3.6, 2**-4.4, 1e-30, 0.0, 0.25]).requires_grad_(True)
    delta = torch.tensor(1.0, requires_grad=True)
    out = fake_log2(x, delta, 3)
    assert torch.equal(out, values(x.detach(), ONE, 2))
    weight = torch.arange(1.0, 8.0)
    (out * weight).sum().backward()
    inside = torch.tensor([1.0, 1, 0, 0, 0, 0, 1])
    assert x.grad is not None and torch.equal(x.grad, weight * inside) and delta.grad is None
    half = x.detach().half().requires_grad_(True)
    fake_log2(half, ONE, 3).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.float16 and torch.equal(half.grad.float(), inside)


# ---- the spec ----------------------------------------------------------------------------------------------------
def test_json_has_what_is_new_only_where_it_is_used() -> None:
    old = LayerSpec(activation=ActivationSpec(mode="dynamic"))
    data = Plan(layers={"a": old}).to_json()
    assert "scope" not in json.dumps(data) and Plan.from_json(data).layers["a"] == old
    ran = 0
    for scope in ("sample", "head", "tensor"):
        for exempt in ((), (0,)):
            made = Plan(layers={"a:softmax": LayerSpec(activation=spec(scope=scope), exempt=exempt)})
            text = json.dumps(made.to_json())
            assert ("scope" in text) == (scope != "sample") and Plan.from_json(json.loads(text)) == made
            ran += 1
    assert ran == 6
    data["specs"][0]["activation"]["scope"] = "prompt"
    with pytest.raises(ValueError, match="scope"):
        Plan.from_json(data)


REFUSED: dict[str, tuple[str, LayerSpec]] = {
    "not a softmax": ("a:q", LayerSpec(activation=spec())),
    "a layer": ("a", LayerSpec(activation=spec())),
    "static, by head": ("a:softmax", LayerSpec(activation=spec(mode="static", scope="head"))),
    "timed": ("a:softmax", LayerSpec(activation=spec(timed=True))),
    "signed": ("a:softmax", LayerSpec(activation=spec(grid=Grid(kind="log2", signed=True)))),
    "a token": ("a:softmax", LayerSpec(activation=spec(granularity="token"))),
    "output": ("a:softmax", LayerSpec(activation=spec(position="output"))),
    "affine scope": ("a:softmax", LayerSpec(activation=ActivationSpec(mode="dynamic", scope="head"))),
    "another column": ("a:softmax", LayerSpec(activation=spec(), exempt=(1,))),
    "affine exempt": ("a:softmax", LayerSpec(activation=ActivationSpec(mode="dynamic"), exempt=(0,))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused(case: str) -> None:
    name, refused = REFUSED[case]
    with pytest.raises(InputError) as caught:
        check_log2(name, refused)
    assert caught.value.where == name and caught.value.why and caught.value.try_
    named = case in ("not a softmax", "a layer", "static, by head", "affine exempt")
    assert bool(refused.unsupported()) == (not named), "what a name says is not the spec's to know"


def test_what_is_allowed() -> None:
    for allowed in (LayerSpec(), LayerSpec(activation=spec()), LayerSpec(activation=spec(scope="head"), exempt=(0,))):
        check_log2("a:softmax", allowed)
        assert not allowed.unsupported()
    for static in (spec(mode="static"), spec(mode="static", timed=True)):
        check_log2("a:softmax", LayerSpec(activation=static, exempt=(0,)))
        assert not LayerSpec(activation=static, exempt=(0,)).unsupported()
    k = LayerSpec(activation=ActivationSpec(timed=True), exempt=(0,))
    check_log2("a:k", k)
    assert not k.unsupported()
    for wrong in ("a:q", "a:v", "a"):
        with pytest.raises(InputError, match="logarithmic grid") as caught:
            check_log2(wrong, k)
        assert "and of k" in (caught.value.why or "")
