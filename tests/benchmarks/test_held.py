"""What a network holds: layers of a library that nobody knows, in the three forms that libraries take."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Script = Callable[[str], ModuleType]


class Packed(nn.Module):
    """A layer of buffers: 12 x 8 codes of a byte, 12 scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(12, 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(12))


class State:
    """What hangs on a parameter: scales, and one of the layer's own codes once more."""

    def __init__(self, codes: Tensor) -> None:
        self.scales = torch.ones(6)
        self.again = codes


class Wrapped(Tensor):
    """A tensor that says it is 12 x 8 floats and holds bytes and scales."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if "detach" in str(func) else NotImplemented


for kind in (Packed, State, Wrapped):
    kind.__module__ = "somebodys.layers"


def network() -> nn.Sequential:
    """A linear layer, a convolution, a norm: 96 + 12, 36 and 8 parameters."""
    return nn.Sequential(nn.Linear(8, 12), nn.Conv2d(2, 2, 3, bias=False), nn.LayerNorm(4))


def form(name: str) -> nn.Sequential:
    """The network with its linear layer in one of the forms."""
    found = network()
    if name == "module":
        found[0] = Packed()
    elif name == "subclass":
        wrapped = Wrapped(torch.zeros(12, 8, dtype=torch.uint8), torch.ones(12))
        found[0].weight = nn.Parameter(wrapped, requires_grad=False)
    else:
        found[0] = Packed()
        found[0].codes.state = State(found[0].codes)  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(("name", "quantized"), [("module", 96 + 48), ("subclass", 96 + 48 + 48), ("beside", 168)])
def test_every_byte_counts_once(script: Script, name: str, quantized: int) -> None:
    found = script("held").layers(form(name), network(), "somebodys")
    assert found["quantized_bytes"] == quantized  # the subclass keeps its float bias of 12
    assert found["weight_bytes"] == quantized + 4 * (36 + 8)
    assert found["parameters"] == 152
    assert found["bits_floats_at_16"] == pytest.approx((8 * quantized + 16 * 44) / 152)
    assert found["bits_held"] == pytest.approx(8 * (quantized + 4 * 44) / 152)


def test_layers_are_told_by_their_kind(script: Script) -> None:
    found = script("held").layers(form("subclass"), network(), "somebodys")
    assert found["kinds"] == {
        "Linear": {"layers": 1, "of": 1, "weights": 96, "of_weights": 96},
        "Conv2d": {"layers": 0, "of": 1, "weights": 0, "of_weights": 36},
    }
    assert found["classes"] == {"Linear with Wrapped": 1}
    assert (found["weights"], found["of_weights"]) == (96, 132)


def test_a_float_network_holds_itself(script: Script) -> None:
    found = script("held").layers(network(), network(), "somebodys")
    assert found["weights"] == found["quantized_bytes"] == 0
    assert (found["bits_floats_at_16"], found["bits_held"]) == (16, 32)


def test_whatever_hangs_on_a_tensor_counts(script: Script) -> None:
    tensor = torch.zeros(3)
    tensor.note = SimpleNamespace(big=torch.zeros(100))  # type: ignore[attr-defined]
    tensor.table = torch.zeros(5)  # type: ignore[attr-defined]
    held = script("held")
    assert held.total(held.parts(tensor, set())) == 12 + 20 + 400
