"""Attention with the encode behind it: the op is its separate operations, the kernel is the op; when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from bitbrush.kernels import attend_ops
from bitbrush.kernels.triton_attend import Cut, cut
from bitbrush.kernels.triton_int8 import BY_SAMPLE, ONE_ROW
from bitbrush.numbers.codec import encode
from interpreter import TRITON, interpreted

OPS = torch.ops.bitbrush


@TRITON
def test_codes_rarely_differ_by_one() -> None:
    """Probabilities are rounded to half precision before they are multiplied, as in any flash attention."""
    found = interpreted("interpreted_attend.py")
    assert len(found) == 6
    for entry in found:
        assert entry["codes"] > 2000 and entry["distinct"] > 80
        assert entry["most"] <= 1 and entry["unequal"] <= 1e-2 * entry["codes"], entry


@TRITON
@pytest.mark.parametrize("fault", ["keys", "heads", "row"])
def test_a_planted_fault_shows(fault: str) -> None:
    assert all(entry["unequal"] > 0.2 * entry["codes"] for entry in interpreted("interpreted_attend.py", fault))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_attention_then_the_encode(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 16).to(dtype).transpose(1, 2) for length in (10, 7, 7))
    inverse, zero, times = torch.tensor([[1.0], [40.0]]), torch.tensor([[0], [131]]).byte(), torch.tensor([1])
    factor = torch.rand(64) + 0.5
    made = OPS.attend_encode(q, k, v, inverse, zero, times, 255, factor)
    heads = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype).transpose(1, 2).reshape(20, 64)
    assert torch.equal(made, (encode(heads.float() * factor, inverse[1], zero[1].float(), 255) - 128).to(torch.int8))


def test_it_is_one_operation_to_a_compiler() -> None:
    counter = CompileCounter()
    q = torch.randn(1, 2, 5, 16)
    given = (torch.ones(1, 1), torch.full((1, 1), 128).byte(), torch.zeros(1, dtype=torch.int64), 255, None)
    call = torch.compile(lambda q: OPS.attend_encode(q, q, q, *given), backend=counter, fullgraph=True)
    assert torch.equal(call(q), OPS.attend_encode(q, q, q, *given))
    assert (counter.frame_count, counter.op_count) == (1, 1)


@pytest.mark.parametrize("heads, keys, size, kind, dtype, taken", [
    (20, 77, 64, ONE_ROW, torch.bfloat16, True), (20, 1024, 64, ONE_ROW, torch.bfloat16, True),
    (10, 4096, 64, ONE_ROW, torch.bfloat16, False), (8, 77, 80, ONE_ROW, torch.float16, True),
    (8, 77, 40, ONE_ROW, torch.bfloat16, False), (8, 1024, 80, ONE_ROW, torch.bfloat16, False),
    (20, 77, 64, BY_SAMPLE, torch.bfloat16, False), (20, 77, 64, ONE_ROW, torch.float32, False),
    (1, 77, 16, ONE_ROW, torch.bfloat16, False),
])  # fmt: skip
def test_it_is_taken_where_it_is_the_fastest(
    heads: int, keys: int, size: int, kind: int, dtype: torch.dtype, taken: bool
) -> None:
    q, k = (torch.empty((2, heads, length, size), dtype=dtype, device="meta") for length in (64, keys))
    assert attend_ops.fits(q, k, kind) is taken


def test_a_prompts_keys_are_one_step() -> None:
    assert cut(77) == Cut(64, 128, 4, 1) and cut(33) == Cut(64, 64, 4, 1) and cut(1024) == Cut(64, 64, 4, 3)
