"""What every linear and convolution layer of a denoiser is, whoever made it: whose, how many bits, and what runs it.

bitbrush's layers say so themselves. Of others' the class of the module or of its weight is what can be known from
outside; bits of weights are those that the largest tensor inside really takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.evaluation.memory import own_tensors, plain_tensors, weight_shape
from bitbrush.network.layers import QuantLayer

FLOAT_BITS = 16
"""What a float number counts in bit operations, whatever its type: half precision is what quantization competes
with."""
PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "optimum": "quanto", "sdnq": "sdnq",
            "bitbrush": "bitbrush"}  # fmt: skip
"""First word of a class's module to the library's name."""


@dataclass(frozen=True)
class Ran:
    """One layer in one call.

    Args:
        layer: Its name.
        kind: Class of the module, with the class of its weight where that is not a plain tensor.
        kernel: What computed it: a kernel of bitbrush by name; ``simulated`` or ``float`` for its other faces; for
            other layers the library with the class, and the dtype of a plain float one.
        library: Who quantized it; ``none`` for a float layer.
        weight_bits, activation_bits: 16 stands for float.
        macs: Multiply-accumulates for one sample.
        product: What `products.ProductWatch` saw: ``operation``, and on a GPU ``gpu_kernel``.
    """

    layer: str
    kind: str
    kernel: str
    library: str
    weight_bits: float
    activation_bits: float
    macs: int
    product: dict[str, str] = field(default_factory=dict)


def library_of(module: nn.Module) -> str:
    """Who quantized a layer: ``bitbrush``, ``torchao``, ``bitsandbytes``, ``quanto``, ``sdnq``, ``gguf``, ``none``."""
    if isinstance(module, QuantLayer):
        return "bitbrush" if module.face != "float" else "none"
    weight = getattr(module, "weight", None)
    for kind in (type(module), type(weight)):
        found = PACKAGES.get(kind.__module__.partition(".")[0])
        if found is not None:
            return found
        if ".gguf" in kind.__module__:
            return "gguf"
    return "none"


def weight_bits(module: nn.Module) -> float:
    """Bits of a weight without its scales: what was asked for (bitbrush), or what the layer's largest tensor takes."""
    if isinstance(module, QuantLayer):
        spec = module.spec.weight
        if spec is None or module.face == "float":
            return FLOAT_BITS
        if spec.additive:
            return spec.codebooks * spec.grid.bits / spec.group
        return sum(spec.row_bits) / len(spec.row_bits) if spec.row_bits else spec.grid.bits
    if library_of(module) == "none":
        return FLOAT_BITS
    sizes = [tensor.numel() * tensor.element_size() for tensor in _of_weight(module)]
    return round(8 * max(sizes, default=0) / prod(weight_shape(module)), 3)


def activation_bits(module: nn.Module) -> float:
    """Bits of the input that the product is made from; 16 = float."""
    if isinstance(module, QuantLayer):
        quantized = module.spec.activation is not None and module.face != "float"
        return module.spec.activation.average_bits if quantized and module.spec.activation else FLOAT_BITS
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Linear8bitLt":
        return 8
    if getattr(module, "activation_qtype", None) is not None:  # quanto
        return float(getattr(module.activation_qtype, "bits", FLOAT_BITS))
    dynamic = getattr(weight, "act_quant_kwargs", None) is not None or "ActivationQuantized" in type(weight).__name__
    asked = getattr(weight, "activation_quantization", None)  # torchao's intx: "int8_asym_per_token"
    return 8 if dynamic or (isinstance(asked, str) and asked.startswith("int8")) else FLOAT_BITS


def _of_weight(module: nn.Module) -> list[Tensor]:
    weight = getattr(module, "weight", None)
    found = list(plain_tensors(weight)) if isinstance(weight, Tensor) else []
    return found or list(own_tensors(module))


def kind_of(module: nn.Module) -> str:
    """Class of the module, and of its weight where that says more."""
    weight = getattr(module, "weight", None) if not isinstance(module, QuantLayer) else None
    plain = weight is None or type(weight) in (Tensor, nn.Parameter)
    return type(module).__name__ if plain else f"{type(module).__name__}[{type(weight).__name__}]"


def kernel_of(module: nn.Module, x: Tensor) -> str:
    """What computes a layer for this input."""
    if isinstance(module, QuantLayer):
        if module.face == "packed":
            return kernels.taken(module, x)
        return "simulated" if module.face == "sim" else f"float ({_dtype(x)})"
    library = library_of(module)
    if library == "none":
        return f"float ({_dtype(x)})"
    return f"{library}: {kind_of(module)}"


def _dtype(x: Tensor) -> str:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return str(dtype).removeprefix("torch.")


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and 2-D convolution layers by name, quantized or not, in registration order."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        shape = weight_shape(module)
        inside = any(name.startswith(f"{other}.") for other in found)  # an adapter's parts belong to the adapter
        if name and len(shape) in (2, 4) and not inside and not getattr(module, "transposed", False):
            found[name] = module
    return found


class LayerWatch:
    """Notes of every layer what ran it, at its first call inside the block. Hooks are gone afterwards.

    Args:
        model: The denoiser.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ran: dict[str, Ran] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LayerWatch:
        for name, module in quantizable(self.model).items():
            self._handles.append(module.register_forward_hook(self._note(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if name not in self.ran and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                shape = weight_shape(module)
                macs = prod(shape) * (out.numel() // (len(out) * shape[0]))
                self.ran[name] = Ran(name, kind_of(module), kernel_of(module, args[0]), library_of(module),
                                     weight_bits(module), activation_bits(module), macs)  # fmt: skip

        return hook


def bit_operations(layers: Iterable[Ran]) -> int:
    """Multiply-accumulates times bits of the weight times bits of the input, of one sample in one call."""
    return round(sum(ran.macs * ran.weight_bits * ran.activation_bits for ran in layers))


def as_seen(ran: Ran, product: dict[str, str]) -> Ran:
    """With the product that the profiler saw: integers times integers have 8 bits, whatever a library calls them."""
    integers = "_int_mm" in product.get("operation", "") and ran.activation_bits == FLOAT_BITS
    return replace(ran, product=product, activation_bits=8 if integers else ran.activation_bits)


def float_product(ran: Ran) -> bool:
    """Whether the profiler saw one of torch's float products compute a layer, not one of integers or of another
    library."""
    operation = ran.product.get("operation", "")
    return operation.startswith("aten::") and "int" not in operation and "scaled" not in operation
