"""Values of a GPU are looked at when they have arrived; of the host at once. A stand-in has the GPU's part."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch

from bitbrush.network.arrivals import Arrivals


class Event:
    """Of a copy that is under way until ``done``."""

    made: ClassVar[list[Event]] = []

    def __init__(self) -> None:
        self.done = False
        Event.made.append(self)

    def record(self, stream: object) -> None:
        """Nothing."""

    def query(self) -> bool:
        """Whether it has ended."""
        return self.done


class OnGpu:
    """A tensor of a GPU: copies say how they were asked for."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> OnGpu:
        """Itself."""
        return self

    def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
        """The value on the host."""
        assert device == "cpu" and non_blocking
        return torch.tensor([self.value])


def test_the_host_is_answered_at_once() -> None:
    found = Arrivals().latest(torch.tensor([3.0]), "it")
    assert found is not None and found[0].tolist() == [3.0] and found[1] == "it"


def test_a_gpu_is_answered_by_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    Event.made.clear()
    arrivals, gpu = Arrivals(), lambda value: value if isinstance(value, torch.Tensor) else OnGpu(value)
    ask: Any = arrivals.latest
    assert ask(gpu(1.0), "first") is None and len(Event.made) == 1
    assert ask(gpu(2.0), "second") is None and len(Event.made) == 1, "one at a time"
    Event.made[0].done = True
    value, about = ask(gpu(3.0), "third")
    assert value.tolist() == [1.0] and about == "first" and len(Event.made) == 2
    Event.made[1].done = True
    value, about = ask(gpu(4.0), "fourth")
    assert value.tolist() == [3.0] and about == "third"
    assert copy.deepcopy(arrivals)._under_way is None
