"""The arithmetic of timing, on a GPU that is made up: calls cost what they say, graphs replay what they captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

Script = Callable[[str], ModuleType]


class Gpu:
    """A clock that calls advance; launches cost the host ``gap`` more each, replays cost it once."""

    def __init__(self, gap: float = 0.0) -> None:
        self.now, self.host, self.gap = 0.0, 0.0, gap
        self.capturing: list[Callable[[], None]] | None = None
        self.launched = 0
        self.refuses = False

    def kernel(self, seconds: float) -> Callable[[], str]:
        def work() -> None:
            self.now += seconds

        def launch() -> str:
            if self.capturing is not None:
                if self.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.capturing.append(work)
            else:
                self.launched += 1
                self.host += self.gap
                work()
            return "out"

        return launch

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1000

        class Graph:
            def __init__(self) -> None:
                self.works: list[Callable[[], None]] = []

            def replay(self) -> None:
                gpu.host += gpu.gap
                for work in self.works:
                    work()

        @contextlib.contextmanager
        def graph(into: Graph) -> Iterator[None]:
            gpu.capturing = into.works
            try:
                yield
            finally:
                gpu.capturing = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": lambda: None, "Stream": lambda: stream,
            "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
            "get_device_properties": lambda i: SimpleNamespace(L2_cache_size=50_000_000),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(gap=1e-3)
    made.install(monkeypatch)
    return made


def test_a_call_costs_what_it_says(script: Script, gpu: Gpu) -> None:
    timing = script("speed.timing")
    found = timing.kernels({"slow": [gpu.kernel(30e-6)] * 3, "fast": [gpu.kernel(10e-6)] * 4}, "cuda", rounds=5)
    assert found["slow"]["median"] == pytest.approx(30.0) and found["fast"]["median"] == pytest.approx(10.0)
    assert found["fast"]["rounds"] == 5
    uneven = timing.kernels({"both": [gpu.kernel(10e-6), gpu.kernel(30e-6)]}, "cuda", rounds=3)
    assert uneven["both"]["low"] == pytest.approx(20.0)  # over different data: the mean


def test_data_rotates_past_the_cache(script: Script, gpu: Gpu) -> None:
    sets = script("speed.timing").sets
    assert sets(10_000_000, "cuda") == 12 and sets(40_000_000, "cuda") == 4 and sets(200_000_000, "cuda") == 1
    assert sets(1, "cpu") == 1 and sets(1, "cuda") == 12


def test_turns_rotate(script: Script) -> None:
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = script("speed.timing").turns(works, "cpu", 3)
    assert "".join(order) == "abcbcacab" and [len(times) for times in found.values()] == [3, 3, 3]


def test_quartiles(script: Script) -> None:
    numbers = script("speed.timing").numbers
    assert numbers([1.0, 2.0, 3.0, 4.0, 100.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert numbers([7.0]) == {"low": 7.0, "median": 7.0, "high": 7.0}


class Net(nn.Module):
    """Launches kernels."""

    def __init__(self, launches: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.launches = launches

    def forward(self) -> Any:
        """All of them."""
        return [launch() for launch in self.launches][-1]


def wall(gpu: Gpu) -> Callable[..., float]:
    """Time on the wall: of the host, which launches, or of the GPU, whichever is longer."""
    def measure(work: Callable[[], Any], device: str, *, steps: int) -> float:
        host, now = gpu.host, gpu.now
        for _ in range(steps):
            work()
        return max(gpu.host - host, gpu.now - now) / steps

    return measure


def test_a_graph_is_the_strongest_way_of_a_step_bound_by_launches(
    script: Script, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = script("speed.steps")
    monkeypatch.setattr(steps.timing, "wall", wall(gpu))
    step = steps.ways(Net([gpu.kernel(1e-4)] * 20), {}, "cuda", smoke=False, compiling=())
    assert step.ways["eager"] == pytest.approx(step.ways["eager"] | {"wall_ms": 20.0, "gpu_ms": 2.0})
    assert step.ways["eager, graph"]["wall_ms"] == pytest.approx(2.0) and step.strongest() == "eager, graph"
    kept = {"bf16": step, "w8a8": steps.ways(Net([gpu.kernel(1e-4)] * 10), {}, "cuda", smoke=False, compiling=())}
    own = steps.ways(Net([gpu.kernel(5e-5)] * 30), {}, "cuda", smoke=False, compiling=())
    found = steps.beside("w4a8", own, kept, "cuda", also="w8a8", smoke=False)
    assert {name: round(one["gpu_ms"], 6) for name, one in found.items()} == {"bf16": 2.0, "w8a8": 1.0, "w4a8": 1.5}
    assert {one["way"] for one in found.values()} == {"eager, graph"}
    assert set(steps.beside("vq3", own, kept, "cuda", also="", smoke=False)) == {"bf16", "vq3"}


def test_a_step_that_cannot_be_captured_is_timed_without(
    script: Script, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = script("speed.steps")
    monkeypatch.setattr(steps.timing, "wall", wall(gpu))
    gpu.refuses = True
    step = steps.ways(Net([gpu.kernel(1e-4)] * 3), {}, "cuda", smoke=False, compiling=())
    assert step.strongest() == "eager" and "gpu_ms" not in step.ways["eager"]
    assert "not permitted" in step.ways["eager, graph"]["error"]


def test_a_network_that_does_not_run_is_an_error(script: Script, gpu: Gpu) -> None:
    steps = script("speed.steps")

    def broken() -> None:
        raise ValueError("no kernel for this")

    with pytest.raises(RuntimeError, match="no kernel for this"):
        steps.ways(Net([broken]), {}, "cuda", smoke=False, compiling=())


def test_forms_are_timed_beside_what_they_are_compared_to(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A later run measures its baselines again, and keeps what is known where there is no time for that."""
    steps, models, record = script("speed.steps"), script("speed.models"), script("speed.record")
    measured: list[str] = []

    def measure(model: Any, form: Any, arguments: Any, kept: Any, device: str, **chosen: Any) -> dict[str, Any]:
        name = "bf16" if form is None else form.name
        measured.append(name)
        kept[name] = None
        return {"beside": [other for other in kept if other != name]}

    monkeypatch.setattr(steps, "_measure", measure)
    model = models.find("sdxl").shrunk()

    def run(name: str, wanted: list[str], seconds: float = 100.0) -> Any:
        made = record.Record("steps-sdxl", tmp_path, record.Budget(seconds), run=name, smoke=True, command="c")
        measured.clear()
        steps.run(made, model, "cpu", smoke=True, wanted=wanted)
        return made

    assert run("r1", ["w8a8"]).items["w8a8"]["beside"] == ["bf16"] and measured == ["bf16", "w8a8"]
    later = run("r2", ["w8a8", "w4a8"])
    assert measured == ["bf16", "w8a8", "w4a8"] and later.items["w4a8"]["beside"] == ["bf16", "w8a8"]
    assert {item["run"] for item in later.items.values()} == {"r2"}
    run("r3", ["w8a8", "w4a8"])
    assert measured == []  # nothing is missing
    monkeypatch.setitem(steps.SECONDS, "sdxl", 50.0)
    made = record.Record("steps-sdxl", tmp_path, record.Budget(1.0), run="r4", smoke=True, command="c")
    steps.run(made, model, "cpu", smoke=False, wanted=["w8a8", "vq3"])
    assert measured == [] and made.left_out == ["bf16", "vq3"]
    assert {name: item["run"] for name, item in made.items.items()} == dict.fromkeys(["bf16", "w8a8", "w4a8"], "r2")


class ResnetBlock2D(nn.Module):
    """Of the name of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer."""
        return self.inner(x)


class Blocks(nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResnetBlock2D() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_share_their_code_and_are_left_as_they_were(script: Script) -> None:
    steps, net, x = script("speed.steps"), Blocks(), torch.randn(2, 4)
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        forward = steps.by_blocks(net, {"backend": backend, "dynamic": False})
        assert torch.equal(forward(x=x), net(x)) and len(seen) == 1
        assert all(block._compiled_call_impl is None for block in net.blocks)
        forward(x=x)
        assert torch.equal(torch.compile(net, backend=backend, dynamic=False)(x), net(x)) and len(seen) == 2
        assert seen[1] > seen[0]
