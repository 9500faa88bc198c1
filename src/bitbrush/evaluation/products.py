"""Which operation computes the product of each layer, seen by torch's profiler: what runs below a class's name.

Of everything that a layer calls, the operations that are products (matrix products, convolutions, and those of other
libraries that are named so) are looked at, innermost first, and the one that took longest is the layer's. On a GPU the
kernel that it launched is named, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "bitbrush layer "
PRODUCT = re.compile(r"(^|_)([a-z0-9]*(mm|mv|matmul)|q?linear|q?conv(?!ert)[a-z0-9]*|gem[mv][a-z0-9]*|dot)(_|$)")
"""In names of operations, word by word."""
LONGEST_NAME = 90


class ProductWatch:
    """Profiles the first call of a denoiser inside the block, unless a profiler runs already. Hooks are gone after it.

    Args:
        model: The denoiser.
        layers: Its layers by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.found: dict[str, dict[str, str]] = {}
        self.done = False
        self._handles: list[Any] = []
        self._profile: profile | None = None
        self._open: dict[str, Any] = {}

    def __enter__(self) -> ProductWatch:
        self._handles = [
            self.model.register_forward_pre_hook(lambda *_: self._start(), prepend=True),
            self.model.register_forward_hook(lambda *_: self._stop(), always_call=True),
        ]
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
            self._handles.append(layer.register_forward_hook(lambda *_, name=name: self._end(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop()

    def _start(self) -> None:
        if self.done or torch._C._autograd._profiler_enabled():  # somebody else profiles: theirs would end with ours
            return
        self.done = True
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(activities=kinds)
        self._profile.__enter__()

    def _begin(self, name: str) -> None:
        if self._profile is not None:
            mark = record_function(MARK + name)
            mark.__enter__()
            self._open[name] = mark

    def _end(self, name: str) -> None:
        mark = self._open.pop(name, None)
        if mark is not None:
            mark.__exit__(None, None, None)

    def _stop(self) -> None:
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        done.__exit__(None, None, None)
        for event in done.events():
            if event.name.startswith(MARK):
                found = _longest(event)
                if found is not None:
                    self.found[event.name.removeprefix(MARK)] = found


def _longest(event: Any) -> dict[str, str] | None:
    """Operation, and on a GPU kernel, of the product that took longest below an event."""
    products = list(_products(event))
    if not products:
        return None
    best = max(products, key=lambda each: (each.device_time_total, each.cpu_time_total))
    kernels = sorted(_kernels(best), key=lambda kernel: -kernel.duration)
    return {"operation": best.name} | ({"gpu_kernel": kernels[0].name[:LONGEST_NAME]} if kernels else {})


def _products(event: Any) -> Iterator[Any]:
    """Innermost product operations below an event."""
    for child in event.cpu_children:
        inner = list(_products(child))
        if inner:
            yield from inner
        elif PRODUCT.search(child.name.rpartition("::")[2]):
            yield child


def _kernels(event: Any) -> Iterator[Any]:
    yield from event.kernels
    for child in event.cpu_children:
        yield from _kernels(child)
