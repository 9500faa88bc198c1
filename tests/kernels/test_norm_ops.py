"""The ops that join a norm or a GEGLU with the encode, in plain torch: equal to the separate operations of a model, and
one operation to a compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from bitbrush.kernels import norm_ops  # noqa: F401 - registers the ops
from bitbrush.kernels.triton_int8 import Frame
from bitbrush.numbers.codec import encode, reciprocal

OPS = torch.ops.bitbrush
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _tables(segments: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of three times, the second in force."""
    scale = torch.rand(3, segments) * 0.02 + 0.01
    return reciprocal(scale), torch.randint(90, 166, (3, segments)).to(torch.uint8), torch.tensor([1])


def _codes(x: Tensor, inverse: Tensor, zero: Tensor, time: int = 1, segment: int = 0, top: int = 255) -> Tensor:
    codes = encode(x, inverse[time, segment], zero[time, segment].float(), top)
    return (codes - 128).to(torch.int8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_is_that_of_torch_then_each_consumers_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 5, 48), (48,), (48,)))
    first, second, factor = _tables(), _tables(), torch.rand(48)
    both = ([a, b] for a, b in zip(first, second, strict=True))
    made = OPS.layer_norm_encode(x, weight, bias, 1e-5, *both, [255, 200], [None, factor])
    normed = F.layer_norm(x, (48,), weight, bias, 1e-5).reshape(10, 48)
    assert made.shape == (20, 64) and made.dtype == torch.int8
    assert torch.equal(made[:10, :48], _codes(normed, *first[:2]))
    assert torch.equal(made[10:, :48], _codes(normed.float() * factor, *second[:2], top=200))
    assert (made[:10, 48:] == int(first[1][1]) - 128).all() and (made[10:, 48:] == int(second[1][1]) - 128).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_group_norm_alone_is_that_of_torch_channels_last(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 64, 4, 5), (64,), (64,)))
    want = F.group_norm(x.float(), 8, weight.float(), bias.float(), 1e-5).to(dtype)
    made = OPS.group_norm(x, weight, bias, 8, 1e-5, False)
    assert torch.equal(made, want) and made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(OPS.group_norm(x, weight, bias, 8, 1e-5, True), F.silu(want.float()).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_is_that_of_torch_then_rows_or_a_frame(dtype: torch.dtype, silu: bool) -> None:
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 64, 4, 5), (64,), (64,)))
    inverse, zero, times = _tables()
    normed = F.group_norm(x.float(), 8, weight.float(), bias.float(), 1e-5).to(dtype)
    want = _codes(F.silu(normed) if silu else normed, inverse, zero).permute(0, 2, 3, 1)
    args = (x, weight, bias, 8, 1e-5, silu, inverse, zero, times, [64], 255)
    assert torch.equal(OPS.group_norm_encode(*args, [], None), want.flatten(0, 2))
    frame = Frame(2, 4, 5, (3, 3), 1)
    made = OPS.group_norm_encode(*args, [2, 4, 5, 3, 3, 1, 1, 1], None)
    assert made.shape == (frame.rows, 64)
    pictures = made[: 2 * frame.height * frame.pitch].reshape(2, frame.height, frame.pitch, 64)
    assert torch.equal(pictures[:, 1:, 1:], want)
    assert (pictures[:, 0] == int(zero[1]) - 128).all() and (pictures[:, :, 0] == int(zero[1]) - 128).all()
    memory = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(OPS.group_norm_encode(memory, *args[1:], [2, 4, 5, 3, 3, 1, 1, 1], None), made)


def test_segments_have_tables_of_their_own() -> None:
    torch.manual_seed(2)
    x, factor = torch.randn(1, 48, 3, 3), torch.rand(48)
    inverse, zero, times = _tables(2)
    affine = torch.ones(48), torch.zeros(48)
    made = OPS.group_norm_encode(x, *affine, 4, 1e-5, False, inverse, zero, times, [32, 16], 255, [], factor)
    normed = (F.group_norm(x, 4, eps=1e-5) * factor[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)
    assert made.shape == (9, 64)
    assert torch.equal(made[:, :32], _codes(normed[:, :32], inverse, zero))
    assert torch.equal(made[:, 32:48], _codes(normed[:, 32:], inverse, zero, segment=1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_geglu_rounds_as_its_parts_do(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, factor = torch.randn(2, 3, 80).to(dtype), torch.rand(40)
    inverse, zero, times = _tables()
    hidden, gate = x.reshape(6, 80).chunk(2, 1)
    made = OPS.geglu_encode(x, inverse, zero, times, 255, factor)
    assert made.shape == (6, 64)
    assert torch.equal(made[:, :40], _codes((hidden * F.gelu(gate)).float() * factor, inverse, zero))
    assert (made[:, 40:] == int(zero[1]) - 128).all()


def test_a_compiler_sees_one_operation_each() -> None:
    torch.manual_seed(4)
    inverse, zero, times = _tables()
    one, affine = ([inverse], [zero], [times]), (torch.ones(32), torch.zeros(32))
    calls = {
        "layer_norm_encode": (torch.randn(2, 3, 32), None, None, 1e-5, *one, [255], [None]),
        "group_norm_encode": (torch.randn(2, 32, 4, 4), *affine, 4, 1e-5, True, inverse, zero, times, [32], 255,
                              [2, 4, 4, 3, 3, 1, 1, 1], None),
        "geglu_encode": (torch.randn(2, 3, 64), inverse, zero, times, 255, None),
    }  # fmt: skip
    for name, args in calls.items():
        op = getattr(OPS, name)
        torch.library.opcheck(op.default, args)
        counter = CompileCounter()
        compiled = torch.compile(lambda *args, op=op: op(*args) + 0, backend=counter, fullgraph=True)
        assert torch.equal(compiled(*args), op(*args))
        assert counter.frame_count == 1 and counter.op_count == 2
    assert len(calls) == 3
