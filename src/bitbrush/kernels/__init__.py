"""How a packed layer is computed: one reference on every device, and kernels that must agree with it.

`run` is what a packed layer calls. `use` chooses the kernel for every layer of a model and returns which runs where and
why; a forward chooses nothing. Where layers run on int8 codes, the blocks that hold them pass codes on (`blocks`).
Attentions whose operands are quantized are chosen for and named likewise (`attend`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bitbrush.errors import InputError
from bitbrush.kernels import (
    attention_ops,
    blocks,
    building,
    cpu,
    cpu_blocks,
    cpu_lookup,
    gpu,
    gpu_decode,
    reference,
    sums,
)

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

Kernel = Callable[["QuantLayer", Tensor], Tensor]

KERNELS: dict[str, Kernel] = {
    "reference": reference.run, "cpu-int8": cpu.run, "cpu-lookup": cpu_lookup.run, "cuda-int8": gpu.run,
    "cuda-decode": gpu_decode.run,
}
"""Kernels by name; each takes (packed layer, input) and returns the layer's output."""


PROVEN: dict[str, Kernel] = {**KERNELS, "cpu-lookup": cpu_lookup.looked_up}
"""What a proof runs: the arithmetic of each kernel, also where a kernel would leave an input to the reference."""


BEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu-int8",), "cuda": ("cuda-int8", "cuda-decode")}
"""What ``auto`` takes on a kind of device: the first that can run a layer."""
AUTO = "auto"


def run(layer: QuantLayer, x: Tensor) -> Tensor:
    """The output of a packed layer by the kernel chosen for it."""
    return KERNELS[chosen(layer, x.device.type)](layer, x)


def attend(processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Attention ``[B, heads, L, size]`` of a packed processor by the kernel chosen for it; None: the reference, which
    is the processor's own."""
    if chosen(processor, q.device.type) != attention_ops.KERNEL or attention_ops.leaves(processor, q, k, v, mask):
        return None
    return attention_ops.run(processor, q, k, v)


def chosen(layer: QuantLayer | Any, device_type: str) -> str:
    """Name of the kernel that runs a layer (or the processor of an attention) on a kind of device."""
    return layer.kernel if layer.kernel != AUTO else layer.kernel_of.get(device_type, "reference")


LEAVES: dict[str, Callable[[QuantLayer, Tensor], bool]] = {
    "cpu-int8": cpu.leaves, "cpu-lookup": cpu_lookup.leaves, "cuda-int8": gpu.leaves,
}
"""Kernels that leave some inputs to the reference, with what says which."""


def taken(layer: QuantLayer, x: Tensor) -> str:
    """Name of the kernel whose arithmetic `run` gives for this input: the one chosen, or the reference where that
    leaves the input to it."""
    name = chosen(layer, x.device.type)
    leaves = LEAVES.get(name)
    return "reference" if leaves is not None and leaves(layer, x) else name


def known(name: str) -> None:
    """Raises InputError where there is no kernel of this name."""
    if name not in KERNELS and name != AUTO:
        raise InputError(f"no kernel named {name!r}", why=f"known: {', '.join([AUTO, *KERNELS])}",
                         try_="bitbrush doctor")


def why_not(name: str, layer: QuantLayer | Any, device_type: str) -> str | None:
    """Why kernel ``name`` cannot run this layer (or processor of an attention) on a device, or None when it can."""
    known(name)
    if attention_ops.has_operands(layer):
        return attention_ops.why_not(name, layer, device_type)
    refusals = {"cpu-int8": cpu.why_not, "cpu-lookup": cpu_lookup.why_not, "cuda-int8": gpu.why_not,
                "cuda-decode": gpu_decode.why_not}
    return refusals[name](layer, device_type) if name in refusals else None


def unwise(name: str, layer: QuantLayer | Any, device_type: str) -> str | None:
    """Why ``auto`` does not take a kernel for this layer: it cannot run it, or takes longer than the reference."""
    slow = name == "cpu-int8" and not attention_ops.has_operands(layer) and sums.grouped(layer)
    reason = why_not(name, layer, device_type)
    return reason or ("a sum for each group of channels takes longer on a CPU than the reference" if slow else None)


def use(model: nn.Module, name: str, device_type: str | None = None) -> dict[str, str]:
    """Choose kernel ``name`` for every packed layer and attention that it can run; the others keep the reference.

    Args:
        name: Of a kernel; ``auto``: on every kind of device the best that can run the layer.
        device_type: What the answer is about, and where kernel ``name`` must run. Left out: the kind of device that
            the kernel is for, or with ``auto`` that on which the model is.

    Returns:
        Name of a layer, or of an attention with quantized operands, to ``name``, or to the reason why the reference
        runs instead.
    """
    answer: dict[str, str] = {}
    blocks.unfuse(model)
    building.unwatch(model)
    forget: Any = getattr(model, "clear_graphs", None)  # of `bitbrush.network.graphs`: they hold the former choice
    if forget is not None:
        forget()
    if device_type is None:
        kind = name.partition("-")[0]
        device_type = kind if kind in BEST else next((t.device.type for t in model.buffers()), "cpu")
    for layer_name, module in model.named_modules():
        if not hasattr(module, "declare_packed") and not attention_ops.has_operands(module):
            continue
        module.kernel_of = best(module) if name == AUTO else {}
        wanted = name if name != AUTO else module.kernel_of.get(device_type, BEST.get(device_type, ("reference",))[0])
        reason = (unwise if name == AUTO else why_not)(wanted, module, device_type)
        module.kernel = name if name == AUTO or reason is None else "reference"
        answer[layer_name.removesuffix(".processor")] = wanted if reason is None else f"reference: {reason}"
        prepare(module)
    if name in (AUTO, blocks.KERNEL):
        blocks.fuse(model)
    if name in (AUTO, "cpu-int8"):
        cpu_blocks.fuse(model)
    if name in (AUTO, *BEST["cuda"]):
        building.watch(model)
    return answer


def best(layer: QuantLayer | Any) -> dict[str, str]:
    """The best kernel that can run a layer, for every kind of device that has one."""
    able = {kind: [name for name in names if unwise(name, layer, kind) is None] for kind, names in BEST.items()}
    return {kind: names[0] for kind, names in able.items() if names}


def prepare(layer: QuantLayer | Any) -> None:
    """Make what the chosen kernel keeps of a layer where its weight is now, so that no graph has to."""
    if attention_ops.has_operands(layer):
        attention_ops.prepare(layer)
        return
    if layer.face != "packed" or layer.spec.weight is None:
        return
    if chosen(layer, layer.weight_scale.device.type) == "cuda-int8":
        gpu.prepare(layer)
