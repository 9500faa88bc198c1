"""What a quantized network really holds: which layers a library took over, and every byte that stands for weights.

Counted on the tensors themselves, without a library's word for it: packed codes, scales, zero points, tables, and the
tensors that libraries hang on a parameter (a quantization state, a tensor subclass' parts). Count before the first
call, since some layers then keep work space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

FLOAT_BITS = 16
"""What a parameter that stays float is counted at in ``bits_floats_at_16``, whatever dtype the run held it in."""


def layers(network: nn.Module, reference: nn.Module, package: str) -> dict[str, Any]:
    """The layers of ``network`` that are of the library ``package``, by the kinds of the same layers of ``reference``.

    Args:
        network: The quantized denoiser.
        reference: The same denoiser in full precision; says what a layer was (``Linear``, ``Conv2d``), and how many
            weights it has.
        package: Top-level name of the library's modules (``"torchao"``).

    Returns:
        ``kinds`` {kind: {layers, of, weights, of_weights}}, ``classes`` {class and weight's class and dtype: layers},
        ``weights``, ``of_weights`` and ``weight_bytes``, ``quantized_bytes``, ``bits_floats_at_16``, ``bits_held``.
    """
    known = {name: module for name, module in reference.named_modules() if has_matrix(module)}
    taken = {name: module for name, module in network.named_modules() if name in known and is_of(module, package)}
    kinds: dict[str, dict[str, int]] = {}
    for name, module in known.items():
        row = kinds.setdefault(type(module).__name__, {"layers": 0, "of": 0, "weights": 0, "of_weights": 0})
        row["of"] += 1
        row["of_weights"] += weights(module)
        row["layers"] += name in taken
        row["weights"] += weights(module) * (name in taken)
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    quantized = [tensor for module in taken.values() for tensor in tensors(module)]
    everything = total(tensors(network))
    inside = total(quantized)
    others = parameters - sum(own(known[name]) for name in taken)
    return {
        "kinds": kinds,
        "classes": dict(Counter(class_of(module) for module in taken.values())),
        "weights": sum(row["weights"] for row in kinds.values()),
        "of_weights": sum(row["of_weights"] for row in kinds.values()),
        "parameters": parameters,
        "weight_bytes": everything,
        "quantized_bytes": inside,
        "bits_floats_at_16": (8 * inside + FLOAT_BITS * others) / parameters,
        "bits_held": 8 * everything / parameters,
    }


def has_matrix(module: nn.Module) -> bool:
    """A layer with a weight that multiplies: linear, convolution, embedding."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2


def is_of(module: nn.Module, package: str) -> bool:
    """The layer's class, or that of its weight, is defined in ``package``."""
    classes = [type(module), type(module._parameters.get("weight"))]
    return any(kind.__module__.partition(".")[0] == package for kind in classes)


def class_of(module: nn.Module) -> str:
    """The class of a layer, and that of its weight where it is none of torch's own."""
    weight = module._parameters.get("weight")
    name = type(module).__name__
    return name if type(weight) in (nn.Parameter, type(None)) else f"{name} with {type(weight).__name__}"


def weights(module: nn.Module) -> int:
    weight = module.weight
    return weight.numel() if isinstance(weight, Tensor) else 0


def own(module: nn.Module) -> int:
    """Weights and bias."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def total(found: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of tensors; memory that several share counts once."""
    return sum({(t.device, t.data_ptr(), t.nbytes): t.nbytes for t in found}.values())


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """All plain tensors that the parameters and buffers of a module consist of."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from parts(tensor, set())


def parts(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """The plain tensors inside a tensor, or inside an object that hangs on one."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        flatten = getattr(thing, "__tensor_flatten__", None)
        if flatten is None:
            yield thing.detach().data
        else:
            for name in flatten()[0]:
                yield from parts(getattr(thing, name), seen)
    for value in getattr(thing, "__dict__", {}).values():
        if isinstance(value, Tensor) or type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
            yield from parts(value, seen)
