"""Other libraries on the same network, each in a process of its own: called as its documentation says.

The network is bf16 with random weights on the GPU, quantized there by the library, then timed in every way that ours is
(`steps.ways`), in turns with the bf16 network in a CUDA graph, eager: that one needs no compiling, and the strongest
bf16 way is timed by the part ``sdxl`` of the same run. SDNQ is GPL-3.0: called here by its public API, never imported
by the package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import held
import torch
from torch import nn

from speed import networks, ours, steps
from speed.models import Model
from speed.record import Item, Record, told, version


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way of quantizing with a library.

    Attributes:
        name: In files and on the command line.
        module: That must be importable.
        distribution: Whose version is told.
        call: What a user writes.
        apply: Quantizes a network on the GPU in place (or gives another).
    """

    name: str
    module: str
    distribution: str
    call: str
    apply: Callable[[nn.Module], nn.Module | None]


def _torchao(config: str, **chosen: Any) -> Callable[[nn.Module], None]:
    def apply(net: nn.Module) -> None:
        import torchao.quantization as q

        q.quantize_(net, getattr(q, config)(**chosen), filter_fn=_wide)

    return apply


def _wide(module: nn.Module, name: str) -> bool:
    """Linear layers that torchao's kernels take: sizes are multiples of 64, and the input is tokens, not one row a
    sample (``torch._int_mm`` wants more than 16 rows)."""
    if not isinstance(module, nn.Linear) or any(part in name for part in ("time_emb", "add_emb")):
        return False
    return module.in_features % 64 == 0 and module.out_features % 64 == 0


def _nf4(net: nn.Module) -> None:
    import bitsandbytes as bnb

    for name, layer in list(net.named_modules()):
        if type(layer) is nn.Linear:
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                    compute_dtype=torch.bfloat16, quant_type="nf4")  # fmt: skip
            new.load_state_dict(layer.state_dict())
            place, _, own = name.rpartition(".")
            setattr(net.get_submodule(place), own, new.to(next(layer.parameters()).device))  # quantizes


def _quanto(net: nn.Module) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(net, weights=qint8)
    freeze(net)


def _sdnq(net: nn.Module) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    made: nn.Module = sdnq_post_load_quant(net, weights_dtype="int8", quant_conv=True, use_quantized_matmul=True,
                                           use_quantized_matmul_conv=True)  # fmt: skip
    return made


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torchao-int8", "torchao", "torchao", "quantize_(net, Int8DynamicActivationInt8WeightConfig())",
             _torchao("Int8DynamicActivationInt8WeightConfig")),
        Peer("torchao-float8", "torchao", "torchao", "quantize_(net, Float8DynamicActivationFloat8WeightConfig())",
             _torchao("Float8DynamicActivationFloat8WeightConfig")),
        Peer("sdnq-int8", "sdnq", "sdnq", 'sdnq_post_load_quant(net, weights_dtype="int8", quant_conv=True, '
             "use_quantized_matmul=True, use_quantized_matmul_conv=True)", _sdnq),
        Peer("quanto-int8", "optimum.quanto", "optimum-quanto", "quantize(net, weights=qint8); freeze(net)", _quanto),
        Peer("bitsandbytes-nf4", "bitsandbytes", "bitsandbytes",
             'bitsandbytes.nn.Linear4bit(..., compute_dtype=torch.bfloat16, quant_type="nf4") for every nn.Linear',
             _nf4),
        Peer("torchao-int4", "torchao", "torchao", "quantize_(net, Int4WeightOnlyConfig(group_size=128))",
             _torchao("Int4WeightOnlyConfig", group_size=128)),
    )
}
"""By name, the most telling first."""


def absent(peer: Peer) -> str | None:
    """Why a library cannot be imported here, found without importing it; None where it is there."""
    try:
        found = importlib.util.find_spec(peer.module)
    except (ImportError, ValueError) as error:
        return told(error)
    return None if found is not None else f"{peer.distribution} is not installed here"


def run(record: Record, peer: Peer, model: Model, device: str, *, smoke: bool, compiling: str = "auto") -> None:
    """One peer on one model."""
    reason = absent(peer)
    if reason is not None:
        record.fail(model.name, f"left out: {reason}")
    else:
        record.measure(model.name, 0 if smoke else 60,
                       lambda: measure(peer, model, device, smoke=smoke, compiling=compiling))
    record.finish()


@torch.no_grad()
def measure(peer: Peer, model: Model, device: str, *, smoke: bool, compiling: str) -> Item:
    """The peer's step in every way, and turns with eager bf16."""
    dtype = torch.float32 if smoke else torch.bfloat16
    torch.backends.cudnn.benchmark = True
    arguments = model.arguments(device, dtype)
    base = steps.ways(networks.build(model, None, device, dtype), arguments, device, smoke=smoke, compiling=())
    net = networks.build(model, None, device, dtype)
    whole = networks.weight_bytes(net)
    net = peer.apply(net) or net
    taken = Counter(type(module).__name__ + _weight(module) for module in net.modules() if has_matrix(module))
    item: Item = {
        "call": peer.call, "version": version(peer.distribution), "layers": dict(taken), "batch": model.batch,
        "bf16_weight_bytes": whole, "weight_bytes": held.total(held.tensors(net)),
        "output": ours.output(lambda: net(**arguments)),
    }  # fmt: skip
    how = (steps.WHOLE,) if compiling == "auto" else steps.WAYS[compiling][1]
    step = steps.ways(net, arguments, device, smoke=smoke, compiling=how)
    item |= {"ways": step.ways, "strongest": step.strongest(), "bf16_ways": base.ways}
    item["turns"] = steps.beside(peer.name, step, {"bf16": base}, device, also="", smoke=smoke)
    return item


def has_matrix(module: nn.Module) -> bool:
    """Linear layers and convolutions, whatever class they are of by now."""
    weight = module._parameters.get("weight", None)
    return weight is not None and weight.ndim >= 2


def _weight(module: nn.Module) -> str:
    kind = type(module._parameters["weight"])
    return "" if kind is nn.Parameter else f" with {kind.__name__}"
