"""Operations without the dispatcher: only where nothing but it would notice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from bitbrush.kernels import direct, int8_ops
from operations import Operations

ROWS = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
TABLES = (torch.full((1, 1), 10.0), torch.full((1, 1), 128, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))


class Function(TorchFunctionMode):
    """Sees every function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Other(Tensor):
    """A tensor of a class of its own."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a CUDA form was called for, on the CPU."""
    found: list[str] = []

    def cuda(*args: Any) -> Tensor:
        found.append("cuda")
        return int8_ops._encode_plain(*args)

    monkeypatch.setattr(direct, "OPS", SimpleNamespace())
    monkeypatch.setattr(direct, "on_gpu", lambda tensor: True)
    direct.register("int8_encode", cuda)
    return found


def encoded(x: Tensor, factor: Tensor | None = None) -> Tensor:
    codes: Tensor = direct.OPS.int8_encode(x, *TABLES, 0, (32,), 255, [], 1, factor)
    return codes


@torch.no_grad()
def test_a_plain_call_does_without_and_gives_the_same(ran: list[str]) -> None:
    want = torch.ops.bitbrush.int8_encode(ROWS, *TABLES, 0, (32,), 255, [], 1, None)
    assert torch.equal(encoded(ROWS), want) and ran == ["cuda"]
    assert torch.equal(encoded(nn.Parameter(ROWS, requires_grad=False)), want) and len(ran) == 2
    with torch.inference_mode():
        assert torch.equal(encoded(ROWS), want) and len(ran) == 3


def test_on_a_cpu_and_with_gradients_it_is_the_operation(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    want = encoded(ROWS)
    assert not ran
    monkeypatch.setattr(direct, "on_gpu", lambda tensor: tensor.is_cuda)
    with torch.no_grad():
        assert torch.equal(encoded(ROWS), want) and not ran


@torch.no_grad()
def test_whoever_looks_at_operations_sees_them(ran: list[str]) -> None:
    want, operations = torch.ops.bitbrush.int8_encode(ROWS, *TABLES, 0, (32,), 255, [], 1, None), Operations()
    with operations:
        assert torch.equal(encoded(ROWS), want)
    assert operations.count["int8_encode"] == 1 and not ran
    with Function():
        assert torch.equal(encoded(ROWS), want) and not ran
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert encoded(mode.from_tensor(ROWS)).shape == (4, 32) and not ran
    assert "int8_encode" in str(make_fx(lambda x: encoded(x))(ROWS).graph) and not ran
    assert "int8_encode" in str(torch.jit.trace(lambda x: encoded(x), ROWS, check_trace=False).graph) and not ran
    assert torch.equal(encoded(ROWS.as_subclass(Other)), want) and not ran
    factor = torch.ones(32).as_subclass(Other)
    assert torch.equal(encoded(ROWS, factor), want) and not ran  # any argument
    assert torch.func.functionalize(lambda x: encoded(x))(ROWS).shape == want.shape and not ran
    assert torch.equal(encoded(ROWS), want) and ran == ["cuda"]


@torch.no_grad()
def test_a_compiled_graph_has_the_operation(ran: list[str]) -> None:
    seen: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(encoded, backend=backend, fullgraph=True)(ROWS)
    assert len(seen) == 1 and "int8_encode" in seen[0] and not ran
