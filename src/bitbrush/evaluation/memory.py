"""What a network's weights really take in memory, and how many weights they stand for, whoever quantized them.

A tensor subclass (torchao, quanto) says that it is a big float tensor and holds small ones; a bitsandbytes weight keeps
its scales in an object beside it. So tensors are followed to the plain ones inside, and each piece of memory counts
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from torch import Tensor, nn

DEPTH = 4
"""How far objects beside a weight are followed: a quantization state, the nested state in it, its tensors."""


def plain_tensors(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The plain tensors that something is made of, each maybe more than once.

    A tensor subclass that names its parts (``__tensor_flatten__``) is its parts. Of any other tensor, what lies in its
    attributes counts beside it: ``Params4bit.quant_state``, ``Int8Params.SCB``.
    """
    if isinstance(value, Tensor):
        inner = _parts(value)
        if inner:
            for part in inner:
                yield from plain_tensors(part, depth - 1)
            return
        yield value
        yield from _beside(vars(value), depth)
    elif isinstance(value, dict):
        yield from _beside(value, depth)
    elif isinstance(value, list | tuple):
        yield from _beside(dict(enumerate(value)), depth)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _beside(vars(value), depth)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors inside a subclass; empty for a plain tensor or parameter."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return []
    found = (getattr(tensor, str(name)) for name in flatten(tensor)[0])
    return [part for part in found if isinstance(part, Tensor)]


def _beside(attributes: dict[Any, Any], depth: int) -> Iterator[Tensor]:
    if depth < 1:
        return
    for name, value in attributes.items():
        if name not in ("grad", "_grad", "module") and not callable(value):
            yield from plain_tensors(value, depth - 1)


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Plain tensors of a module itself, not of its children: parameters, buffers, and tensors it keeps as attributes
    (``Linear8bitLt.state``, tables made at the first call)."""
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        yield from plain_tensors(tensor)
    for name, value in vars(module).items():
        if name not in _OF_MODULES and (isinstance(value, Tensor) or _is_state(value)):
            yield from plain_tensors(value)


_OF_MODULES = ("_parameters", "_buffers", "_modules")


def _is_state(value: Any) -> bool:
    """Whether an attribute may be a place of tensors: an object of the quantizer's or a dict, not a config."""
    if isinstance(value, dict):
        return any(isinstance(item, Tensor) for item in value.values())
    return type(value).__module__.partition(".")[0] in ("bitsandbytes", "sdnq", "torchao", "optimum")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, every piece of memory once."""
    seen: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        place = (str(tensor.device), tensor.data_ptr(), size) if size and not tensor.is_meta else (id(tensor),)
        seen[place] = size
    return sum(seen.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a network and of what belongs to them."""
    return bytes_of(tensor for module in model.modules() for tensor in own_tensors(module))


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the float weight that a linear or convolution layer stands for; empty for any other module.

    It follows from the layer's sizes: a packed weight has another shape.
    """
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    size: Any = getattr(module, "kernel_size", None)
    if isinstance(size, tuple) and isinstance(getattr(module, "in_channels", None), int):
        rows, channels, groups = (int(getattr(module, name)) for name in ("out_channels", "in_channels", "groups"))
        return (rows, channels // groups, *size)
    return ()


def parameter_count(model: nn.Module) -> int:
    """Parameters of the float network that this one stands for.

    Linear and convolution layers count by their sizes, other modules by their parameters. A layer that was wrapped with
    its inside kept (an adapter) counts with what was added.
    """
    total = 0
    for module in model.modules():
        shape = weight_shape(module)
        if shape:
            bias = getattr(module, "bias", None)
            total += prod(shape) + (bias.numel() if isinstance(bias, Tensor) else 0)
        else:
            total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return total
