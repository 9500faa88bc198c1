"""Integer sums in float32: equal to int64's up to the bound, and used only where the bound holds."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from bitbrush.kernels import cpu, cpu_float, cpu_onednn, proof
from bitbrush.kernels.cpu_layout import Shape

EDGE = cpu_onednn.FLOAT_EXACT - 1


def shape(c: int, kernel: list[int], stride: list[int], dilation: list[int], pad: list[int], top: int = 255) -> Shape:
    return Shape([c], kernel, stride, dilation, [pad[1], pad[1], pad[0], pad[0]], [8], [0], [top, 128])


def test_sums_are_those_of_int64() -> None:
    g, ran = torch.Generator().manual_seed(0), 0
    for kernel, stride, dilation, pad in (([1, 1], [1, 1], [1, 1], [0, 0]), ([1, 1], [2, 2], [1, 1], [0, 0]),
                                          ([3, 3], [1, 1], [1, 1], [1, 1]), ([3, 3], [2, 1], [1, 1], [1, 0]),
                                          ([5, 3], [1, 2], [2, 1], [2, 1])):  # fmt: skip
        for c, wide in ((32, 32), (5, 16)):
            given = shape(c, kernel, stride, dilation, pad)
            codes = torch.randint(-200, 56, (2, 9, 10, c), generator=g)
            weight = torch.randint(-128, 128, (7, kernel[0], kernel[1], c), generator=g)
            packed = torch.zeros(7, kernel[0], kernel[1], wide, dtype=torch.int8)
            packed[..., :c] = weight
            got = cpu_float.sums(codes.float(), packed.flatten(1), given)
            want = torch.nn.functional.conv2d(codes.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(),
                                              None, stride, pad, dilation).permute(0, 2, 3, 1)  # fmt: skip
            assert torch.equal(got.double(), want) and got.is_contiguous()
            assert got.shape[1:3] == given.places(codes)
            ran += 1
    assert ran == 10


def test_the_bound_is_that_of_float32() -> None:
    """A row that reaches 2**24 - 1 is exact, one that reaches 2**24 is not taken: the sum after it may be rounded."""
    weight = torch.tensor([[100, -128, 27], [-1, 0, 1]], dtype=torch.int8)
    assert cpu_float.reach(weight) == 255 and cpu_float.reach(torch.zeros(0, 4, dtype=torch.int8)) == 0
    assert cpu_float.exact(EDGE // 255, 0, 255) and not cpu_float.exact(EDGE // 255 + 2, 0, 255)
    assert cpu_float.exact(EDGE // 130, 125, 255) and cpu_float.exact(EDGE // 130, 130, 255)
    assert not cpu_float.exact(EDGE // 130, 124, 255), "codes up to 131 above their zero-point"
    k = EDGE // (255 * 128)
    columns = torch.full((1, k), -128, dtype=torch.int8)
    assert cpu_float.exact(cpu_float.reach(columns), 0, 255)
    got = cpu_float.sums(torch.full((3, 1, 1, k), 255.0), columns, shape(k, [1, 1], [1, 1], [1, 1], [0, 0]))
    assert got.flatten().tolist() == [-255 * 128 * k] * 3


def test_codes_are_those_of_the_definition_less_the_zero_point() -> None:
    from bitbrush.numbers import codec

    x, looked = torch.cat([torch.linspace(-3, 3, 999), torch.tensor([1e30, -1e30, torch.inf, -torch.inf])]), 0
    inverse = codec.reciprocal(torch.tensor(0.021))
    for zero, top in ((0, 255), (128, 255), (255, 255), (7, 15)):
        want = codec.encode(x, inverse, torch.tensor(float(zero)), top) - zero
        assert torch.equal(cpu_float.encode(x, inverse, zero, top), want)
        looked += 1
    assert looked == 4


def test_when_float32_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.zeros(2, 32, 32, 64), ([1, 1], [1, 1], [1, 1], [0, 0])
    wide, narrow = shape(64, *plain), shape(64, *plain)._replace(extremes=[255, 15])
    for engine, want in (("exact", [False, False, False]), ("saturates", [True, False, True])):
        monkeypatch.setattr(cpu_onednn, "engine", lambda engine=engine: engine)
        found = [cpu_float.wanted(wide, x, 512), cpu_float.wanted(narrow, x, 512), cpu_float.wanted(narrow, x[:1], 64)]
        assert found == want
    uneven = wide._replace(frame=[0, 1, 0, 1])
    assert not cpu_float.wanted(uneven, x, 512), "torch's convolution pads both sides alike"


def test_sums_that_may_not_fit_are_left_to_integers(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are proven on either side of the bound; beyond it nothing goes through float32."""
    if cpu_onednn.engine() == "absent":
        pytest.skip("torch has no onednn::qlinear_pointwise here")
    monkeypatch.setattr(cpu_onednn, "engine", lambda: "saturates")
    calls: list[int] = []
    made = cpu_float.sums
    monkeypatch.setattr(cpu_float, "sums", lambda codes, weight, shape: calls.append(1) or made(codes, weight, shape))
    used = []
    for mode in ("static", "tensor"):  # plain layers, and the general way
        for bound in (cpu_onednn.FLOAT_EXACT, 1 << 16):
            case = {"kind": "linear", "mode": mode, "weight_bits": 8, "weight_signed": True}
            _, packed, codes = builder.build(case, 1)
            with monkeypatch.context() as patch:
                patch.setattr(cpu_onednn, "FLOAT_EXACT", bound)
                calls.clear()
                cpu.run(packed, builder.make_input(case, 1))
                used.append(bool(calls))
                assert proof.prove_layer(codes, packed, builder.make_input(case, 1))["kernels"]["cpu-int8"]["ok"]
    assert used == [True, False] * 2
