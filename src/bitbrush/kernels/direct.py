"""This package's operations, called without torch's dispatcher where nothing but it would notice.

The dispatcher turns every argument into its own form and back into Python's, which takes longer than to launch a
kernel. An operation on a GPU is its CUDA form itself while no gradient is wanted, no graph is traced or compiled, no
mode looks at operations and every tensor is a plain one. Otherwise it is the operation in ``torch.ops.bitbrush``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

OPS: Any = SimpleNamespace()
"""Operations by name, as in ``torch.ops.bitbrush``; modules that define some put them here (`register`)."""

PLAIN = frozenset({Tensor, nn.Parameter, int, float, bool, list, tuple, type(None), torch.dtype})
"""Types of arguments. Any other one is the dispatcher's: a tensor that is traced, or one with a class of its own."""


def register(name: str, cuda: Callable[..., Any], place: int = 0) -> None:
    """Make an operation of ``torch.ops.bitbrush`` known by its CUDA form; argument ``place`` is a tensor."""
    operation = getattr(torch.ops.bitbrush, name)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and on_gpu(args[place]) and unseen() and PLAIN.issuperset(map(type, args)):
            return cuda(*args)
        return operation(*args)

    setattr(OPS, name, call)


def on_gpu(tensor: Tensor) -> bool:
    """Whether an operation on this tensor runs its CUDA form."""
    return tensor.is_cuda


def unseen() -> bool:
    """Whether nothing looks at operations: no gradient, tracing, mode or transform."""
    return not (torch.is_grad_enabled() or torch.jit.is_tracing() or _modes() or _functions() or _transform())


def _one() -> int:
    return 1


# where a version of torch has none of these, the dispatcher is not left out
_modes: Callable[[], Any] = getattr(torch._C, "_len_torch_dispatch_stack", _one)
_functions: Callable[[], Any] = getattr(torch._C, "_len_torch_function_stack", _one)
_transform: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", _one)
