"""Kernels are built side by side before a network's first call: those that the call looks for, by the same keys."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import cuda_driver
from bitbrush import kernels
from bitbrush.errors import Notice
from bitbrush.kernels import building, tuning
from bitbrush.network import graphs, wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from interpreter import TRITON
from packed import pack

GIVEN = (torch.zeros(2, 4, 16, 16, dtype=torch.bfloat16), torch.tensor(500.0),
         torch.zeros(2, 24, 32, dtype=torch.bfloat16))  # fmt: skip


@pytest.fixture(scope="module")
def packed() -> UNet2DConditionModel:
    """A UNet of one transformer, with 4-bit weights and a scale a timestep on every layer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4, signed=True)), activation=ActivationSpec(timed=True))
    pack(unet, spec)
    return unet.bfloat16()


@pytest.fixture
def network(packed: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(packed)


class Listener:
    """Hears of every build that Triton made or found on disk."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.found: list[str] = []

    def __call__(self, *, metadata: dict[str, Any], cache_hit: bool, **_rest: Any) -> None:
        (self.found if cache_hit else self.made).append(metadata["hash"])

    def clear(self) -> None:
        self.made, self.found = [], []


@pytest.fixture
def listener() -> Iterator[Listener]:
    from triton import knobs

    before, heard = knobs.compilation.listener, Listener()
    knobs.compilation.listener = heard
    yield heard
    knobs.compilation.listener = before


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_driver.Driver]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(building.THREADS, "2")
    with cuda_driver.hopper(tmp_path / "triton", monkeypatch) as made:
        yield made


@TRITON
@torch.no_grad()
def test_a_call_finds_every_kernel_built_by_the_keys_it_looks_for(
    network: Any, driver: cuda_driver.Driver, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITBRUSH_TUNE", "0")
    assert set(kernels.use(network, "cuda-int8", "cpu").values()) == {"cuda-int8"}
    listener.clear()  # of what sums of weights took
    driver.made.clear(), driver.launched.clear()
    hook, looked = network._forward_pre_hooks[building.own_hooks(network)[0]], []
    real = hook.__class__.__call__

    def watched(self: Any, *args: Any) -> None:
        real(self, *args)
        looked.append((list(listener.made), list(listener.found), list(driver.launched)))

    monkeypatch.setattr(hook.__class__, "__call__", watched)
    network(*GIVEN)
    (built, met, launched), = looked
    assert len(set(built)) == len(built) >= 15 and not met and not set(launched) - {"unpack"}
    assert listener.made == built  # the call proper built nothing
    assert len(listener.found) >= 15 and set(listener.found) == set(built)
    assert {"product", "encode", "group_norm", "layer_norm", "gated"} <= set(driver.launched)
    assert len(driver.made) == len(built) + len(listener.found)  # what launches them was made ahead, too
    cuda_driver.another_process()
    hook.seen.clear()
    listener.clear()
    network(*GIVEN)
    assert not listener.made and len(listener.found) >= 2 * len(built)


@TRITON
@torch.no_grad()
def test_every_cut_that_is_tried_is_built_ahead(
    network: Any, driver: cuda_driver.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    monkeypatch.delenv("BITBRUSH_TUNE", raising=False)
    kernels.use(network, "cuda-int8", "cpu")
    building.unwatch(network)
    driver.launched.clear()
    with building.noted() as found:
        network(*GIVEN)
    assert set(driver.launched) <= {"unpack"}  # built for sums of weights
    assert not building.noting() and knobs.runtime.jit_cache_hook is None
    assert not list(Path(tuning._file(torch.device("cpu")).parent).glob("*.json"))  # no cut was chosen
    asked: set[Any] = set()

    def hook(*, fn: Any, key: Any, **_rest: Any) -> bool:
        asked.add((fn.jit_function.cache_key, key))
        return True

    monkeypatch.setattr(tuning, "_time", lambda cut, run: (run(cut), float(cut.bm))[1])
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    network(*GIVEN)
    products = [key for key in asked if found.get(key) and found[key].kernel.__name__ == "product"]
    assert asked <= set(found) and len(asked) >= 20 and len(products) >= 10


@TRITON
@torch.no_grad()
def test_nothing_is_kept_of_launches_that_are_left_out(network: Any, driver: cuda_driver.Driver) -> None:
    kernels.use(network, "cuda-int8", "cpu")
    building.unwatch(network)
    layers = list(wrap.layers(network).values())
    for layer in layers:
        layer._row_tables.clear()
    with building.noted():
        network(*GIVEN)
    assert len(layers) >= 15 and not any(layer._row_tables for layer in layers)


@TRITON
@torch.no_grad()
def test_builds_that_fail_are_left_to_the_call(
    network: Any, driver: cuda_driver.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.compiler

    monkeypatch.setenv("BITBRUSH_TUNE", "0")
    kernels.use(network, "cuda-int8", "cpu")
    building.unwatch(network)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(triton.compiler, "compile", failing)
    with pytest.warns(Notice, match=r"could not build (\d+) of \1 kernels ahead"):
        assert building.prepare(network, *GIVEN) >= 15


# ---- when ------------------------------------------------------------------------------------------------------------
class Parts(nn.Module):
    """A network of torch's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y


Parts.__module__ = "bitbrush.parts"
X = torch.ones(2, 4)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes for which kernels were built ahead."""
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(building.direct, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(building, "able", lambda: True)
    monkeypatch.delenv(building.THREADS, raising=False)
    monkeypatch.setattr(building, "prepare", lambda model, *args, **kwargs: found.append(
        tuple(next(iter((*args, *kwargs.values()))).shape)))  # fmt: skip
    return found


@pytest.fixture
def model() -> nn.Module:
    made = Parts().eval()
    building.watch(made)
    return made


def test_once_for_inputs_of_a_shape(model: nn.Module, prepared: list[Any]) -> None:
    with torch.no_grad():
        for x in (X, X + 1, X[:1], X):
            model(x)
    with torch.inference_mode():
        model(x=torch.ones(3, 4))
    assert prepared == [(2, 4), (1, 4), (3, 4)]


def test_not_where_it_is_switched_off_or_somebody_would_notice(
    prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(change: Any = lambda model: None, wanted: int = 0, grad: bool = False) -> None:
        made = Parts().eval()
        building.watch(made)
        change(made)
        prepared.clear()
        with torch.set_grad_enabled(grad):
            made(X)
        assert len(prepared) == wanted

    check(wanted=1)
    check(grad=True)
    check(lambda model: model.train())
    check(lambda model: model.part.register_forward_pre_hook(lambda *_: None))
    check(lambda model: setattr(model.part, "forward", lambda x: x))
    check(lambda model: setattr(model.part, "processor", type("Mine", (), {"__module__": "mine"})()))
    check(lambda model: setattr(model, "part", type("Mine", (nn.Linear,), {"__module__": "mine"})(4, 4)))
    check(lambda model: building.unwatch(model))
    monkeypatch.setenv(building.THREADS, "0")
    check()
    monkeypatch.delenv(building.THREADS)
    monkeypatch.setattr(building, "_capturing", lambda: True)
    check()
    monkeypatch.undo()
    check()  # on a CPU


def test_a_call_that_cannot_be_made_twice_is_made_once(
    model: nn.Module, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(building, "prepare", failing)
    with torch.no_grad(), pytest.warns(Notice, match="one after the other: out of memory$"):
        assert torch.equal(model(X), model.part(X))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


@TRITON
def test_hooks_on_the_model_see_the_call_proper_alone() -> None:
    made, seen = Parts().eval(), []
    made.bitbrush_clock = type("Clock", (nn.Module,), {})()
    made.bitbrush_clock._hooks = [made.register_forward_pre_hook(lambda *_: seen.append("clock")),
                                  made.register_forward_hook(lambda *_: seen.append("clock"), always_call=True)]
    made.register_forward_pre_hook(lambda *_: seen.append("before"), prepend=True)
    made.register_forward_hook(lambda *_: seen.append("after"))
    building.watch(made)
    for x in (X, torch.ones(2, 5)):  # the second one does not fit
        try:
            building.prepare(made, x)
        except RuntimeError:
            seen.append("raised")
    assert seen == ["clock"] * 4 + ["raised"]
    seen.clear()
    made(X)
    assert seen == ["before", "clock", "clock", "after"] and len(building.own_hooks(made)) == 1


@TRITON
def test_the_model_is_called_with_lists_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:

    class Taking(nn.Module):
        def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
            return x + more.pop(0)

    more = [X]
    assert building.able() and building.prepare(Taking(), X, more=more) == 0 and len(more) == 1
    monkeypatch.setattr(building, "able", lambda: False)
    assert building.prepare(Taking(), X, more=[]) == 0  # not called


def test_a_compiled_model_has_it_left_out(model: nn.Module, prepared: list[Any]) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), model.part(X)) and not prepared


def test_using_a_kernel_watches_and_using_another_does_not(packed: UNet2DConditionModel) -> None:
    network = copy.deepcopy(packed)
    before = list(network._forward_pre_hooks)
    for _ in range(2):
        kernels.use(network, "auto")
        (own,) = building.own_hooks(network)
        assert list(network._forward_pre_hooks) == [own, *before]  # before the clock is set
    twin = copy.deepcopy(network)
    (other,) = building.own_hooks(twin)
    assert twin._forward_pre_hooks[other] is not network._forward_pre_hooks[own]
    assert building.unwatched(network) and graphs._Parts(network).quiet(network)
    kernels.use(network, "reference")
    assert list(network._forward_pre_hooks) == before and building.own_hooks(twin)
    assert own not in network._forward_pre_hooks_with_kwargs


# ---- the bar ---------------------------------------------------------------------------------------------------------
class Told:
    """A progress that notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def start(self, label: str, total: int) -> None:
        self.heard.append((label, total))

    def advance(self, n: int = 1) -> None:
        self.heard.append(n)

    def finish(self) -> None:
        self.heard.append("finish")


def _advance(bar: building._Bar, times: int) -> None:
    for _ in range(times):
        bar.advance()
    bar.finish()


def test_a_bar_is_shown_once_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    _advance(building._Bar(told, 3), 3)
    assert not told.heard  # all of it lay in the cache
    now = iter([0.0, 0.5, 1.5, 1.6])
    monkeypatch.setattr(building.time, "monotonic", lambda: next(now))
    _advance(building._Bar(told, 4), 4)
    assert told.heard == [("build kernels", 4), 2, 1, 1, "finish"]


def test_diffusers_switch_of_its_bars_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging

    shown = building._Tqdm()
    for on in (True, False):
        monkeypatch.setattr(logging, "_tqdm_active", on)
        shown.start("build kernels", 2)
        assert isinstance(shown.bar, logging.EmptyTqdm) != on
        shown.advance(2)
        shown.finish()
    assert capsys.readouterr() == ("", "")  # not a terminal


def test_threads_are_cores_or_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(building.THREADS, raising=False)
    assert building.threads() >= 1
    for asked, wanted in (("0", 0), ("3", 3)):
        monkeypatch.setenv(building.THREADS, asked)
        assert building.threads() == wanted
    with building.reporting(told := Told()):
        assert building._PROGRESS.get() is told
    assert building._PROGRESS.get() is None
