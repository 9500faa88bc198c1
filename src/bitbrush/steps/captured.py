"""A function on tensors of fixed shapes as a CUDA graph: one launch for hundreds of small kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitbrush.steps.loop import side_stream

WARM = 2
"""Calls of a shape that are not replayed: libraries allocate and choose their kernels in these."""

Outputs = tuple[Tensor, ...]
_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Replay:
    graph: torch.cuda.CUDAGraph
    inputs: Outputs
    outputs: Outputs


class Captured:
    """Calls ``function``; on CUDA it is captured after a few calls, once for each shape of the inputs, and replayed.

    What it returns is overwritten by the next call of the same shape. Everything else that the function reads or writes
    must stay where it is in memory. On other devices, and on tensors without data, it is called as it is.

    Args:
        function: Tensors to tensors; it asks the device for no value, and no shape in it depends on one.
        device: Where its tensors are.
    """

    def __init__(self, function: Callable[..., Outputs], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls: Counter[_Key] = Counter()
        self.replays: dict[_Key, _Replay] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        if self.device.type != "cuda":
            return self.function(*inputs)
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        self.calls[key] += 1
        if self.calls[key] <= WARM:
            return self._aside(inputs)
        if key not in self.replays:
            self.replays[key] = self._capture(inputs)
        found = self.replays[key]
        for held, given in zip(found.inputs, inputs, strict=True):
            held.copy_(given)
        found.graph.replay()
        return found.outputs

    def _aside(self, inputs: Outputs) -> Outputs:
        side, here = side_stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            outputs = self.function(*inputs)
        here.wait_stream(side)
        for tensor in (*inputs, *outputs):  # their memory may not be given away before both streams are done with it
            tensor.record_stream(side)
            tensor.record_stream(here)
        return outputs

    def _capture(self, inputs: Outputs) -> _Replay:
        held, graph = tuple(t.clone() for t in inputs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*held)
        return _Replay(graph, held, outputs)
