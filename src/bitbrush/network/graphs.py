"""CUDA graphs of a denoiser: from the third call on, the host launches one graph instead of a thousand kernels.

A packed SDXL is 1,200 operations a step, each of which takes Python and the driver longer than the GPU. `enable` lets a
model answer calls by replaying what was captured of an earlier one. The first call with new shapes runs as always (it
builds kernels and chooses cuts), the second is captured, later ones copy their inputs in, replay, and copy the answer
out. Timesteps are data: rows of scale tables are looked up on the device, so one graph serves all of them.

A call is answered without a graph wherever a replay could leave something out: on another device, with gradients or
under autocast, while compiling or capturing, with inputs that are neither tensors on the device nor plain constants,
where somebody hooked a part of the model, offloads it, or replaced one (adapters, processors: these also make new
graphs), and where a timestep outside the table has to raise (``lookup = "exact"``). A changed number inside a part (a
strength that a library keeps as an attribute) is not seen: call ``model.clear_graphs()`` after such a change.

The model gets a class that derives from its own and has its name, as `bitbrush.kernels.blocks` does with blocks.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitbrush.errors import Notice
from bitbrush.kernels import building
from bitbrush.network import correction
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import once

Run = Callable[[], Any]
Recorder = Callable[[Run, Any], tuple[Callable[[], None], Any]]
"""``(run, memory pool) -> (replay, what run answered)``: the answer's tensors are written again by every replay."""
PLAIN = (type(None), bool, int, float, str)
"""Types of inputs that become part of a graph."""


@dataclass
class _Graph:
    """One captured call: where inputs are copied to, and what a replay writes; no replay where capturing failed."""

    inputs: list[Tensor]
    replay: Callable[[], None] | None = None
    output: Any = None


class Graphs:
    """The captured calls of one model.

    Args:
        model: The denoiser.
        keep: Graphs that are kept, each of a signature (shapes, dtypes, constants); the least used goes first.
        record, kind: How a call is captured, and on what kind of device; for tests.
    """

    def __init__(self, model: nn.Module, keep: int = 4, record: Recorder | None = None, kind: str = "cuda") -> None:
        self.keep, self.record, self.kind = keep, record or _record, kind
        self.names = list(inspect.signature(model.forward).parameters)
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next calls are first ones again."""
        self.known: OrderedDict[Any, _Graph | None] = OrderedDict()
        self.parts: _Parts | None = None
        self.pool: Any = None

    def __deepcopy__(self, memo: Any) -> Graphs:
        """A copy of the model has graphs of its own."""
        new = copy.copy(self)
        new.clear()
        return new

    def call(self, model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model answers."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(self.kind):
            return plain(*args, **kwargs)
        device = next((t.device for t in model.parameters()), None) or next(t.device for t in model.buffers())
        if device.type != self.kind or (self.kind == "cuda" and torch.cuda.is_current_stream_capturing()):
            return plain(*args, **kwargs)
        if self.parts is None or self.parts.changed():
            self.clear()
            self.parts = _Parts(model)
        if not self.parts.quiet(model):
            return plain(*args, **kwargs)
        args, kwargs, timestep = self._timed(args, kwargs, device)
        leaves, shape = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(t.device != device for t in tensors) or not all(isinstance(x, (Tensor, *PLAIN)) for x in leaves):
            return plain(*args, **kwargs)
        self.parts.notice(model, timestep)
        key = (shape, torch.is_inference_mode_enabled(), self.parts.state(model), tuple(
            (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves))
        if key not in self.known:
            self.known[key] = None
            while len(self.known) > self.keep:
                self.known.popitem(last=False)
            return plain(*args, **kwargs)
        self.known.move_to_end(key)
        graph = self.known[key] = self.known[key] or self._captured(plain, leaves, shape)
        if graph.replay is None:
            return plain(*args, **kwargs)
        for place, given in zip(graph.inputs, tensors, strict=True):
            once(place).copy_(once(given))
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, graph.output)

    def _captured(self, plain: Callable[..., Any], leaves: list[Any], shape: Any) -> _Graph:
        with torch.inference_mode(False):  # tensors that may be written to in any mode
            places = [_place(x) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(places, shape)
        graph = _Graph([place for place in places if isinstance(place, Tensor)])
        if self.pool is None and self.kind == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        try:
            graph.replay, graph.output = self.record(lambda: plain(*args, **kwargs), self.pool)
        except RuntimeError as error:
            warnings.warn("bitbrush could not capture a CUDA graph for inputs like these, which run without one: "
                          f"{str(error).splitlines()[0]}", Notice, stacklevel=4)
        return graph

    def _timed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """The arguments with the timestep as a tensor on the device (a number would become part of the graph), and
        that tensor; None where the model takes none."""
        place = self.names.index("timestep") if "timestep" in self.names else len(args)
        given = kwargs.get("timestep", args[place] if place < len(args) else None)
        if given is None:
            return args, kwargs, None
        if not isinstance(given, Tensor):  # as diffusers makes a tensor of a number
            given = torch.tensor(given, dtype=torch.float64 if isinstance(given, float) else torch.int64)
        given = once(given).to(device).expand(given.shape)
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": given}, given
        return (*args[:place], given, *args[place + 1 :]), kwargs, given


def _place(x: Tensor) -> Tensor:
    """What a graph reads instead of an input; a timestep for all samples stays one."""
    one = once(x)
    return torch.empty_like(one).copy_(one).expand(x.shape)


class _Parts:
    """What of a model a graph depends on, as it was when its first call was seen."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        self.attributes = [(m.__dict__, m.__dict__["processor"]) for m in modules if "processor" in m.__dict__]
        self.hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.forwards = [m.__dict__ for m in modules]
        timed: list[Any] = [m for m in modules if isinstance(m, ActivationQuantizer) and m.clock is not None]
        self.lookups = {m.spec.lookup for m in timed}

    def changed(self) -> bool:
        """Whether a part was put in, taken out or replaced."""
        return any(tuple(now.values()) != then for now, then in self.children) or any(
            now.get("processor") is not then for now, then in self.attributes
        )

    def quiet(self, model: nn.Module) -> bool:
        """Whether nobody wants to see or to change what happens inside, and no timestep has to raise."""
        if any(self.hooks) or any("forward" in own for own in self.forwards) or "exact" in self.lookups:
            return False
        ours = {*building.call_hooks(model), *building.own_hooks(model)}
        return all(key in ours for hooks in (model._forward_pre_hooks, model._forward_hooks) for key in hooks)

    def notice(self, model: nn.Module, timestep: Any) -> None:
        """Say what a forward would say of this timestep: a graph cannot."""
        clock: Any = getattr(model, "bitbrush_clock", None)
        if clock is not None and isinstance(timestep, Tensor):
            clock.check(timestep, self.lookups)
        found = correction.find(model)
        if found is not None:
            found.notice()

    def state(self, model: nn.Module) -> Any:
        """What else decides how a call runs."""
        found = correction.find(model)
        return model.training, found is not None and found.leaves_out()


class Graphed(nn.Module):
    """What the class of such a model is mixed with."""

    plain_class: type[nn.Module]
    graphs: Graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, by a graph where there is one."""
        return self.graphs.call(self, super().__call__, args, kwargs)

    def clear_graphs(self) -> None:
        """Forget what was captured."""
        self.graphs.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.clear_graphs()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; what was captured may hold the old numbers."""
        self.clear_graphs()
        return super().load_state_dict(*args, **kwargs)


@cache
def _mixed(base: Any) -> Any:
    return type(base.__name__, (Graphed, base), {"plain_class": base, "__module__": base.__module__})


def enable(model: nn.Module, *, keep: int = 4) -> None:
    """Answer calls of a denoiser on CUDA by graphs; on other devices nothing changes.

    Args:
        model: Anything with a ``forward``; changed in place.
        keep: How many signatures (shapes, dtypes, constants) keep a graph; each holds its inputs and answer, and all
            share one pool of memory between.
    """
    disable(model)
    made: Any = model
    made.__dict__["graphs"] = Graphs(model, keep)
    made.__class__ = _mixed(made.__class__)


def disable(model: nn.Module) -> None:
    """Give a model its own class back."""
    if isinstance(model, Graphed):
        made: Any = model
        made.__class__ = model.plain_class
        del made.__dict__["graphs"]


def _record(run: Run, pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture a call on CUDA; nothing runs until the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()
    return graph.replay, output
