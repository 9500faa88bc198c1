"""Kernels that are launched again and again: what does not change from call to call is worked out once.

Triton works out at every launch which build its arguments ask for: of every argument the type, of numbers whether they
are 1 or divide by 16, of tensors whether they begin at 16 bytes; then it looks options up and checks globals. For the
30 arguments of a product this takes as long as everything else. Here numbers are fixed beforehand, so that what is
left to ask are the types of tensors and where they begin. The build is then launched by its own ``build[grid](...)``.

Importing this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes: what Triton asks of a tensor's address."""


class Launch:
    """A kernel with its grid, its numbers and its options.

    Args:
        kernel: Its parameters are pointers first, then numbers, then constants.
        grid: Programs, one to three dimensions.
        numbers: Values of the parameters behind the pointers, up to the constants: numbers, or tuples of them.
        options: The constants and Triton's own options, by name.
    """

    __slots__ = ("_builds", "_grid", "_kernel", "_numbers", "_options", "_rest")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._kernel, self._grid, self._numbers, self._options = kernel, grid, numbers, options
        constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self._rest = numbers + constants
        self._builds: dict[Any, Any] = {}

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[Any] | None = None) -> None:
        """Launch on the device of the first tensor.

        Args:
            tensors: All that the kernel is given.
            pointers: The same as the kernel takes them, in tuples or descriptors; None: as they are.
        """
        given, first = tensors if pointers is None else pointers, tensors[0]
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            self._launch(tensors, given)
            return
        with torch.cuda.device_of(first):
            self._launch(tensors, given)

    def _launch(self, tensors: Sequence[Tensor], given: Sequence[Any]) -> None:
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if addresses % ALIGNED:
            self._by_triton(given)
            return
        kinds = (tensors[0].get_device(), *[tensor.dtype for tensor in tensors])
        build = self._builds.get(kinds)
        if build is not None:
            build(*given, *self._rest)
            return
        made = self._by_triton(given)
        if _is_build(made):
            sizes = (*self._grid, 1, 1)
            self._builds[kinds] = made[sizes[:3]]

    def _by_triton(self, given: Sequence[Any]) -> Any:
        """Triton's own launch; gives the build that it chose, or compiled."""
        return self._kernel[self._grid](*given, *self._numbers, **self._options)


def _is_build(made: object) -> bool:
    """Whether this is a build that can be launched: in the interpreter there is none."""
    if made is None:
        return False
    from triton.compiler import CompiledKernel

    return isinstance(made, CompiledKernel)


class Described:
    """Makes descriptors of one block for tensors of one shape, which are checked once.

    Args:
        like: A tensor of that shape, type and strides.
        block: Sizes that are copied at once.
        swizzled: For kernels in Gluon, which say how a block of int8 rows lies in shared memory: rows of 32 to 128
            bytes, exchanged so that the tensor cores read them without conflicts.
    """

    __slots__ = ("_kind", "_parts")

    def __init__(self, like: Tensor, block: list[int], swizzled: bool = False) -> None:
        checked = _swizzled(like, block) if swizzled else _plain(like, block)
        self._kind, self._parts = type(checked), {**vars(checked), "base": None}

    def __call__(self, tensor: Tensor) -> Any:
        """The descriptor of a tensor; whoever launches checks where it begins."""
        made = object.__new__(self._kind)
        vars(made).update(self._parts)
        made.base = tensor
        return made


def _plain(like: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(like, block)


def _swizzled(like: Tensor, block: list[int]) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=min(block[-1], 128), element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(like, block, layout)
