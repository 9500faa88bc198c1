"""Launches that are worked out once: Triton is asked again wherever a build could be another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitbrush.kernels import launching
from bitbrush.kernels.launching import Described, Launch
from interpreter import TRITON


class Build:
    """What Triton compiles, as far as it is launched."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, *args))


class Kernel:
    """A kernel ``(x, y, count, top, SIZE, TYPE)``."""

    arg_names = ("x", "y", "count", "top", "SIZE", "TYPE")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Build:
            self.asked.append((grid, args, options))
            return Build(self.launched)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "_is_build", lambda made: isinstance(made, Build))
    return Kernel()


OPTIONS = {"TYPE": "int8", "num_warps": 4, "SIZE": 16}


def _same(found: tuple[Any, ...], want: tuple[Any, ...]) -> bool:
    return len(found) == len(want) and all(a is b or (not isinstance(a, Tensor) and a == b)
                                           for a, b in zip(found, want, strict=True))  # fmt: skip


def test_a_build_is_asked_for_once_and_launched_with_all_that_the_kernel_takes(kernel: Kernel) -> None:
    launch, (x, y) = Launch(kernel, (3, 2), (7, 1.5), OPTIONS), torch.zeros(2, 64)
    launch((x, y))
    assert len(kernel.asked) == 1 and not kernel.launched
    grid, args, options = kernel.asked[0]
    assert grid == (3, 2) and _same(args, (x, y, 7, 1.5)) and options == OPTIONS
    others = torch.ones(2, 64).unbind()
    launch(others)
    launch((x, y), ((x, y), y))  # as tuples or descriptors
    assert len(kernel.asked) == 1 and len(kernel.launched) == 2
    assert _same(kernel.launched[0], ((3, 2, 1), *others, 7, 1.5, 16, "int8"))
    assert _same(kernel.launched[1][1][0:2], (x, y)) and _same(kernel.launched[1][2:], (y, 7, 1.5, 16, "int8"))


def test_other_types_and_other_addresses_are_left_to_triton(kernel: Kernel) -> None:
    launch, x = Launch(kernel, (1,), (7, 1.5), OPTIONS), torch.zeros(65)
    for _ in range(2):
        launch((x, x))
        launch((x, x.int()))
    assert len(kernel.asked) == 2 and len(kernel.launched) == 2
    for tensors in ((x[1:], x), (x, x[1:])):  # 4 bytes further on
        for _ in range(2):
            launch(tensors)
    assert len(kernel.asked) == 6 and len(kernel.launched) == 2
    launch((x, x))
    assert len(kernel.asked) == 6 and len(kernel.launched) == 3


def test_where_triton_gives_no_build_it_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_is_build", lambda made: False)  # as in the interpreter
    kernel, x = Kernel(), torch.zeros(16)
    for _ in range(3):
        Launch(kernel, (1,), (7, 1.5), OPTIONS)((x, x))
    assert len(kernel.asked) == 3 and not kernel.launched


@TRITON
def test_a_descriptor_is_that_of_triton_and_keeps_no_tensor() -> None:
    from triton.compiler import CompiledKernel
    from triton.tools.tensor_descriptor import TensorDescriptor

    first, second = torch.zeros(2, 64, 32, dtype=torch.int8).unbind()
    describe = Described(first, [16, 32])
    made = describe(second)
    assert isinstance(made, TensorDescriptor) and made.base is second
    assert vars(made) == vars(TensorDescriptor.from_tensor(second, [16, 32]))
    assert describe._parts["base"] is None and describe(first) is not made and made.base is second
    with pytest.raises(AssertionError):
        Described(torch.zeros(64, 24, dtype=torch.int8), [16, 32])  # rows that do not begin at 16 bytes
    assert not launching._is_build(None) and hasattr(CompiledKernel, "__getitem__")
