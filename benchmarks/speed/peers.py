"""Other libraries on the same network, each in a process of its own: called as its documentation says.

The network is bf16 with random weights on the GPU, quantized there by the library, then timed in every way: eager,
compiled by blocks, compiled as a whole, each also in a CUDA graph. The fastest takes turns with the bf16 network in a
CUDA graph, eager: that one needs no compiling, and the strongest bf16 way is timed by the part ``steps-sdxl`` of the
same run. SDNQ is GPL-3.0: called here by its public API, never imported
by the package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import held
import torch
import torch._inductor.config
from torch import nn

from speed import networks, ours, quiet, steps
from speed.models import Model
from speed.quiet import Section
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


def run(
    record: Record, peer: Peer, model: Model, device: str, *, smoke: bool, way_s: float, compiling: str = "auto",
    lock: Path | None = None,
) -> None:
    """One peer on one model; a compiled way may take ``way_s`` seconds (its parent looks at that)."""
    torch._dynamo.config.recompile_limit = 1024  # blocks share one code object: beyond the limit they would stay eager
    torch._dynamo.config.accumulated_recompile_limit = 4096
    reason = absent(peer)
    if reason is not None:
        record.fail(model.name, f"left out: {reason}")
    else:
        record.measure(model.name, 0 if smoke else 60, lambda: measure(
            record, peer, model, device, smoke=smoke, compiling=compiling, way_s=way_s, section=quiet.section(lock)))
    record.finish()


@torch.no_grad()
def measure(
    record: Record, peer: Peer, model: Model, device: str, *, smoke: bool, compiling: str, way_s: float,
    section: Section,
) -> Item:
    """The peer's step in every way, and turns with eager bf16; kept after each way, since the next may take long."""
    dtype = torch.float32 if smoke else torch.bfloat16
    torch.backends.cudnn.benchmark = True
    arguments = model.arguments(device, dtype)
    base = steps.Step(networks.build(model, None, device, dtype), {}, {})
    with section():  # its first calls, too: there cuDNN chooses kernels for the convolutions of both networks
        steps.attempt(base, "eager", base.net, arguments, device, smoke=smoke)  # type: ignore[arg-type]
    if not base.calls:
        raise RuntimeError(f"bf16: {base.ways['eager']['error']}")
    net = networks.build(model, None, device, dtype)
    whole = networks.weight_bytes(net)
    net = peer.apply(net) or net
    taken = Counter(type(module).__name__ + _weight(module) for module in net.modules() if has_matrix(module))
    item: Item = {
        "call": peer.call, "version": version(peer.distribution), "layers": dict(taken), "batch": model.batch,
        "bf16_weight_bytes": whole, "weight_bytes": held.total(held.tensors(net)),
        "output": ours.output(lambda: net(**arguments)), "bf16_ways": base.ways,
    }  # fmt: skip
    step = steps.Step(net, {}, {})
    forwards = steps.forwards(net, compilations(compiling, smoke=smoke), smoke=smoke)
    for number, (name, forward) in enumerate(forwards.items()):
        record.begin(model.name, name, way_s if name != "eager" else None, list(forwards)[number + 1 :])
        steps.attempt(step, name, forward, arguments, device, smoke=smoke, section=section)
        if not step.calls:
            continue
        best = step.strongest()
        step.calls = {best: step.calls[best]}  # the memory of the others' graphs is free again
        if best != item.get("strongest"):
            with section():
                turns = steps.beside(peer.name, step, {"bf16": base}, device, also="", smoke=smoke)
            item |= {"strongest": best, "turns": turns}
        record.keep(model.name, item | {"ways": dict(step.ways)})
    if not step.calls:
        raise RuntimeError("; ".join(str(way.get("error")) for way in step.ways.values()))
    return item | {"ways": step.ways}


def compilations(compiling: str, *, smoke: bool) -> tuple[str, ...]:
    """Compiled ways, the quickest to compile first: what is stopped at one of them would not end the next."""
    chosen = (steps.BY_BLOCKS, steps.WHOLE) if compiling == "auto" else steps.WAYS[compiling][1]
    tunes = bool(torch._inductor.config.coordinate_descent_tuning)  # as torchao's quantize_ sets it
    return (steps.UNTUNED, *chosen) if tunes and steps.BY_BLOCKS in chosen and not smoke else chosen


def has_matrix(module: nn.Module) -> bool:
    """Linear layers and convolutions, whatever class they are of by now."""
    weight = module._parameters.get("weight", None)
    return weight is not None and weight.ndim >= 2


def _weight(module: nn.Module) -> str:
    kind = type(module._parameters["weight"])
    return "" if kind is nn.Parameter else f" with {kind.__name__}"
