"""A whole step of a network: bf16 and every packed form, eager, compiled, and each of that in a CUDA graph.

Compiled means one graph of the whole network, or every block for itself, as diffusers' regional compilation does:
blocks of a kind share their code. A packed SDXL is 16,000 operations to Dynamo as a whole, since the encodes that no
block takes over are written out for the compiler to join with what stands before them; so these forms are compiled by
blocks unless ``--compile`` says otherwise. bf16 is compiled both ways, and so are forms whose activations stay float.

The strongest bf16 way, by time on the wall, is the baseline. Its graph stays while the packed forms are timed, and
takes turns with each: an item holds its own baseline. GPU time is that of a replay between two events, which is the
time of the kernels without the gaps between launches; wall time is that of many steps one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bitbrush.network import graphs
from bitbrush.network.layers import QuantLayer
from speed import networks, ours, timing
from speed.models import Inputs, Model
from speed.quiet import Section
from speed.record import Item, Record, told

WARM, WALL_STEPS, ROUNDS = 3, 10, 11
BY_BLOCKS, WHOLE = "compiled by blocks", "compiled"
UNTUNED, UNTUNED_OPTIONS = "compiled by blocks, not tuned", {"options": {"coordinate_descent_tuning": False}}
"""For libraries that have the compiler try dozens of configurations of every kernel by coordinate descent, one after
the other: minutes for SDXL, before anything is timed."""
LOADED = "eager, `load(graph=True)`"
"""As a user gets graphs: inputs are copied in, the answer out, and the timestep is looked at, in every call."""
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "Upsample2D", "Downsample2D", "FluxSingleTransformerBlock")
"""Classes of diffusers that are compiled for themselves."""
WAYS = {"auto": ((BY_BLOCKS, WHOLE), (BY_BLOCKS,)), "both": ((BY_BLOCKS, WHOLE),) * 2, "whole": ((WHOLE,),) * 2,
        "blocks": ((BY_BLOCKS,),) * 2, "none": ((), ())}  # fmt: skip
"""What ``--compile`` says to how float activations, and how those in codes, are compiled."""
SECONDS = {"sdxl": 105.0, "sd15": 70.0, "dit": 45.0, "flux": 45.0, "emoji": 40.0, "emoji-tiny": 40.0}
"""What an item may take, mostly compiling; less is not started. See `run`."""


@dataclasses.dataclass
class Step:
    """A network and the ways in which its step was run.

    Attributes:
        ways: Name to what was measured of it, or the error it ended in.
        calls: Ways that work; replays of graphs where there is a GPU.
    """

    net: nn.Module | None
    ways: dict[str, dict[str, Any]]
    calls: dict[str, Callable[[], Any]]

    def strongest(self) -> str:
        """The way that takes the shortest time on the wall, of those that can be called again."""
        known = {name: self.ways[name]["wall_ms"] for name in self.calls}
        return min(known, key=lambda name: known[name])


def run(record: Record, model: Model, device: str, *, smoke: bool, wanted: list[str], compiling: str = "auto") -> None:
    """Every wanted form of one model; bf16 first, again where only other forms are missing."""
    dtype = torch.float32 if smoke else torch.bfloat16
    seconds = 0.0 if smoke else SECONDS.get(model.name, 60.0)
    forms = [networks.FORMS[name] for name in wanted]
    if all(record.has(form.name) for form in forms) and record.has("bf16"):
        record.finish()
        return
    kept: dict[str, Step] = {}
    arguments = model.arguments(device, dtype)
    torch.backends.cudnn.benchmark = True

    def measured(form: networks.Form | None) -> Item:
        with torch.no_grad():
            return _measure(model, form, arguments, kept, device, smoke=smoke, compiling=compiling)

    torch._dynamo.config.recompile_limit = 1024  # networks of one class share their code
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # a baseline of another process is none, so it is measured again
    if record.measure("bf16", seconds, lambda: measured(None), again=True) is not None:
        for form in forms:
            if form.like and form.like not in kept and not record.has(form.name):
                like = networks.FORMS[form.like]
                record.measure(like.name, seconds, lambda like=like: measured(like), again=True)
            record.measure(form.name, seconds, lambda form=form: measured(form))
            _release()
    else:
        record.left_out += [name for name in wanted if not record.has(name)]
    record.finish()


def _measure(
    model: Model, form: networks.Form | None, arguments: Inputs, kept: dict[str, Step], device: str, *, smoke: bool,
    compiling: str,
) -> Item:
    """One form: its network, its ways, and turns with what it is compared to."""
    begin = time.perf_counter()
    dtype = torch.float32 if smoke else torch.bfloat16
    net = networks.build(model, form, device, dtype)
    item: Item = {"weight_bytes": networks.weight_bytes(net), "batch": model.batch}
    if form is not None:
        item["kernels"] = ours.choose(net, device, smoke=smoke)
        item["blocks"] = ours.blocks(net)
    item["build_s"] = round(time.perf_counter() - begin, 1)
    item["output"] = ours.output(lambda: net(**arguments))
    encodes = form is not None and form.activations < 16
    step = ways(net, arguments, device, smoke=smoke, compiling=WAYS[compiling][encodes])
    item |= {"ways": step.ways, "strongest": step.strongest()}
    name = "bf16" if form is None else form.name
    item["turns"] = beside(name, step, kept, device, also=form.like if form is not None else "", smoke=smoke)
    if form is None or any(other.like == name for other in networks.FORMS.values()):
        kept[name] = step
    return item


def ways(net: nn.Module, arguments: Inputs, device: str, *, smoke: bool, compiling: tuple[str, ...]) -> Step:
    """A network's step in every way that works: eager, and as ``compiling`` names."""
    step = Step(net, {}, {})
    for name, forward in forwards(net, compiling, smoke=smoke).items():
        attempt(step, name, forward, arguments, device, smoke=smoke)
    if device == "cuda" and any(isinstance(part, QuantLayer) for part in net.modules()):
        step.ways[LOADED] = loaded(net, arguments, device)
    if not step.calls:
        raise RuntimeError("; ".join(str(way.get("error")) for way in step.ways.values()))
    return step


def forwards(net: nn.Module, compiling: tuple[str, ...], *, smoke: bool) -> dict[str, Callable[..., Any]]:
    """A network's forward, eager and as ``compiling`` names; nothing is compiled before the first call."""
    choice: dict[str, Any] = {"dynamic": False} | ({"backend": "eager"} if smoke else {})
    made: dict[str, Callable[..., Any]] = {"eager": net}
    for name in compiling:
        if name == WHOLE:
            made[name] = torch.compile(net, **choice)
        else:
            made[name] = by_blocks(net, choice | (UNTUNED_OPTIONS if name == UNTUNED else {}))
    return made


def attempt(
    step: Step, name: str, forward: Callable[..., Any], arguments: Inputs, device: str, *, smoke: bool,
    section: Section = contextlib.nullcontext,
) -> None:
    """Run and time one way, in a timing ``section`` of its process; what it raises is written down."""
    begin = time.perf_counter()
    try:
        with _counted() as counted:
            _time(step, name, lambda: forward(**arguments), device, smoke=smoke, section=section)
        step.ways[name] |= {"first_s": round(time.perf_counter() - begin, 1), **counted}
    except Exception as error:  # noqa: BLE001 - a way that does not work is a result
        step.ways.setdefault(name, {})["error"] = told(error)


def loaded(net: nn.Module, arguments: Inputs, device: str) -> dict[str, Any]:
    """Time on the wall of a packed network that answers by graphs of its own, and whether it answers as without."""
    try:
        eager = ours.output(lambda: net(**arguments))
        graphs.enable(net)
        for _ in range(WARM):
            answer = ours.output(lambda: net(**arguments))
        way: dict[str, Any] = {"wall_ms": timing.wall(lambda: net(**arguments), device, steps=WALL_STEPS) * 1e3}
        return way | {"captured": sum(getattr(one, "replay", None) is not None for one in net.graphs.known.values()),
                      "as_eager": answer == eager}  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a way that does not work is a result
        return {"error": told(error)}
    finally:
        graphs.disable(net)


def _time(
    step: Step, name: str, call: Callable[[], Any], device: str, *, smoke: bool, section: Section
) -> None:
    """A way launched by the host, and where there is a GPU the same in a graph. Calls that compile or look for the best
    kernel come before the section that is timed."""
    for _ in range(1 if smoke else WARM):
        call()
    steps = 1 if smoke else WALL_STEPS
    with section():
        step.ways[name] = {"wall_ms": timing.wall(call, device, steps=steps) * 1e3}
        step.calls[name] = call
        if device == "cuda":
            _time_graph(step, name, call, device, steps=steps)


def _time_graph(step: Step, name: str, call: Callable[[], Any], device: str, *, steps: int) -> None:
    try:
        graph, out = timing.captured(call, warm=1)
    except Exception as error:  # noqa: BLE001 - see above
        step.ways[f"{name}, graph"] = {"error": told(error)}
        torch.cuda.synchronize()
        return
    graph.kept = out
    gpu = timing.numbers([timing.seconds(graph.replay, device) * 1e3 for _ in range(5)])
    step.ways[name]["gpu_ms"] = gpu["median"]
    step.ways[f"{name}, graph"] = {"wall_ms": timing.wall(graph.replay, device, steps=steps) * 1e3,
                                   "gpu_ms": gpu["median"]}  # fmt: skip
    step.calls[f"{name}, graph"] = graph.replay


def by_blocks(net: nn.Module, choice: dict[str, Any]) -> Callable[..., Any]:
    """A network's forward with every block compiled for itself, as ``Module.compile`` does, and as they were after each
    call: the network's other ways must not find them."""
    found = [module for module in net.modules() if type(module).__name__ in BLOCKS]
    compiled = [torch.compile(module._call_impl, **choice) for module in found]

    def forward(**arguments: Any) -> Any:
        for module, one in zip(found, compiled, strict=True):
            module.__dict__["_compiled_call_impl"] = one
        try:
            return net(**arguments)
        finally:
            for module in found:
                module.__dict__.pop("_compiled_call_impl", None)

    return forward


@contextlib.contextmanager
def _counted() -> Iterator[dict[str, Any]]:
    """Graphs that Dynamo captures inside, and where it broke off."""
    counters = torch._dynamo.utils.counters
    before, found = int(counters["stats"]["unique_graphs"]), dict[str, Any]()
    counters["graph_break"].clear()
    yield found
    found |= {"graphs": int(counters["stats"]["unique_graphs"]) - before,
              "graph_breaks": sum(counters["graph_break"].values())}  # fmt: skip


def beside(
    name: str, step: Step, kept: dict[str, Step], device: str, *, also: str, smoke: bool
) -> dict[str, dict[str, float | str]]:
    """Milliseconds of the strongest way of each, in turns: GPU (median, quartiles) and wall.

    Returns:
        ``name``, ``bf16`` and ``also`` to ``way``, ``gpu_ms``, ``gpu_low``, ``gpu_high``, ``wall_ms``.
    """
    parties = {other: kept[other] for other in ("bf16", also) if other in kept} | {name: step}
    chosen = {other: one.strongest() for other, one in parties.items()}
    calls = {other: one.calls[chosen[other]] for other, one in parties.items()}
    rounds, steps = (1, 1) if smoke else (ROUNDS, WALL_STEPS)
    gpu = timing.turns(calls, device, rounds)
    wall = {other: list[float]() for other in calls}
    for _ in range(1 if smoke else 3):
        for other, call in calls.items():
            wall[other].append(timing.wall(call, device, steps=steps) * 1e3)
    found: dict[str, dict[str, float | str]] = {}
    for other in calls:
        ms = {key: value * 1e3 for key, value in timing.numbers(gpu[other]).items()}
        found[other] = {"way": chosen[other], "gpu_ms": ms["median"], "gpu_low": ms["low"], "gpu_high": ms["high"],
                        "wall_ms": timing.numbers(wall[other])["median"]}  # fmt: skip
    return found


def _release() -> None:
    """Free what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
