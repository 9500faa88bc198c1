"""Calls answered by a graph: the same numbers, the right call captured, and none where a replay would leave something
out. On a CPU a stand-in for a graph runs the captured call again on the captured inputs; a GPU has the real thing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.errors import InputError, Notice
from bitbrush.network import correction, graphs, wrap
from bitbrush.network.correction import CorrectionSpec
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from packed import fill

TIMES = (1.0, 500.0, 999.0)


class Recorder:
    """A graph's stand-in: a replay calls again, with what lies in the inputs now, and writes into the first answer."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        answer = run()

        def replay() -> None:
            self.replays += 1
            for place, new in zip(*(torch.utils._pytree.tree_leaves(t) for t in (answer, run())), strict=True):
                place.copy_(new)

        return replay, answer


def network(**activation: Any) -> UNet2DConditionModel:
    """A small UNet with a scale a timestep on every layer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16,
        attention_head_dim=8, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=8, signed=True)),
                     activation=ActivationSpec(timed=True, **activation))  # fmt: skip
    names = [name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    wrap.declare(unet, Plan(layers=dict.fromkeys(names, spec), timesteps=TIMES))
    drawn = torch.Generator().manual_seed(1)
    for layer in wrap.layers(unet).values():
        fill(layer, drawn)
    return unet


def enabled(model: Any, keep: int = 4) -> Recorder:
    """Graphs on the CPU."""
    recorder = Recorder()
    graphs.enable(model)
    model.__dict__["graphs"] = graphs.Graphs(model, keep, recorder, "cpu")
    return recorder


def inputs(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 8, generator=drawn), torch.randn(batch, 5, 16, generator=drawn)


@torch.no_grad()
def answer(model: Any, seed: int, time: Any, batch: int = 2, **more: Any) -> Tensor:
    x, text = inputs(seed, batch)
    out: Tensor = model(x, time, encoder_hidden_states=text, return_dict=False, **more)[0]
    return out


def test_replays_are_the_model_at_every_timestep() -> None:
    """Two calls run, then one graph serves new inputs and timesteps, given as numbers or tensors."""
    model = network()
    plain, recorder, compared = copy.deepcopy(model), enabled(model), 0
    for i, time in enumerate((999, 500, 1, 999, 500)):
        for given in (time, torch.tensor(time), torch.tensor(time)):
            assert torch.equal(answer(model, i, given), answer(plain, i, time))
            compared += 1
    assert compared == 15 and recorder.captures == 1 and recorder.replays == 14
    assert type(model).__name__ == "UNet2DConditionModel" and isinstance(model, UNet2DConditionModel)
    assert not torch.equal(answer(plain, 0, 999), answer(plain, 0, 1)), "the tables matter here"


def test_a_timestep_expanded_over_the_batch_stays_one_row() -> None:
    """As DiT's pipeline gives it; one a sample is another signature."""
    model = network()
    plain, recorder, rows = copy.deepcopy(model), enabled(model), []
    clock = next(iter(wrap.layers(model).values())).input._clock[0]
    hook = model.conv_out.register_forward_pre_hook(lambda *_: rows.append(len(clock.rows("nearest"))))
    for seed, time in enumerate((999, 500, 1)):
        assert torch.equal(answer(model, seed, torch.tensor([time]).expand(2)), answer(plain, seed, time))
    assert recorder.captures == 0 and rows == [1, 1, 1]  # somebody looks in
    hook.remove()
    for seed, time in enumerate((999, 500, 1)):
        assert torch.equal(answer(model, seed, torch.tensor([time]).expand(2)), answer(plain, seed, time))
    assert recorder.captures == 1 and recorder.replays == 2
    (known,) = [graph for graph in model.graphs.known.values() if graph is not None]
    assert [place.stride() for place in known.inputs if place.shape == (2,)] == [(0,)]


def test_answers_stay_what_they_were() -> None:
    model = network()
    enabled(model)
    first = [answer(model, seed, 500) for seed in range(4)]
    kept = [t.clone() for t in first]
    answer(model, 9, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_graph_a_signature_and_only_so_many() -> None:
    model = network()
    recorder = enabled(model, keep=2)
    for batch in (1, 2, 1, 2):
        answer(model, 0, 500, batch)
    assert recorder.captures == 2 and len(model.graphs.known) == 2
    answer(model, 0, 500, 3)
    assert len(model.graphs.known) == 2, "the least used went"
    x, text = inputs(0)
    with torch.no_grad():
        for _ in range(2):
            found = model(x, 500, encoder_hidden_states=text)
    assert torch.equal(found.sample, answer(model, 0, 500)), "another return type has a graph of its own"


@pytest.mark.parametrize("reason", ["hook inside", "hook on the model", "forward", "gradient", "autocast", "compiling"])
def test_no_graph_where_a_replay_would_leave_something_out(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(), []
    recorder = enabled(model)
    if reason == "hook inside":
        model.mid_block.register_forward_hook(lambda *given: seen.append(1))
    elif reason == "hook on the model":
        model.register_forward_pre_hook(lambda *given: seen.append(1))
    elif reason == "forward":
        usual = model.mid_block.forward
        model.mid_block.forward = lambda *a, **k: seen.append(1) or usual(*a, **k)
    elif reason == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, text = inputs(0)
    for _ in range(3):
        with torch.set_grad_enabled(reason == "gradient"), torch.autocast("cpu", enabled=reason == "autocast"):
            model(x, 500, encoder_hidden_states=text)
    assert recorder.captures == 0
    assert len(seen) == (3 if reason in ("hook inside", "hook on the model", "forward") else 0)


def test_a_timestep_outside_an_exact_table_raises_every_time() -> None:
    model = network(lookup="exact")
    recorder = enabled(model)
    for _ in range(3):
        answer(model, 0, 500)
        with pytest.raises(InputError, match="not on the time grid"):
            answer(model, 0, 501)
    assert recorder.captures == 0


def test_a_replay_says_once_that_a_timestep_is_not_on_the_grid() -> None:
    model = network()
    recorder = enabled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        for _ in range(3):
            answer(model, 0, 500)
    with pytest.warns(Notice, match="timestep 700"):
        answer(model, 0, 700)
    assert recorder.replays == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        answer(model, 0, 701)


@pytest.mark.parametrize("change", ["part", "processor", "kernel", "move", "load", "clear"])
def test_a_changed_model_is_captured_anew(change: str) -> None:
    model = network()
    recorder = enabled(model)
    for _ in range(3):
        answer(model, 0, 500)
    if change == "part":
        model.conv_act = nn.Tanh()
    elif change == "processor":
        attention = next(m for name, m in model.named_modules() if name.endswith("attn1"))
        attention.processor = type(attention.processor)()
    elif change == "kernel":
        kernels.use(model, "reference")
    elif change == "move":
        model.to(torch.float32)
    elif change == "load":
        model.load_state_dict(model.state_dict())
    else:
        model.clear_graphs()
    assert recorder.captures == 1
    found = [answer(model, 1, 500) for _ in range(3)]
    graphs.disable(model)
    assert recorder.captures == 2 and all(torch.equal(t, answer(model, 1, 500)) for t in found)
    assert type(model) is UNet2DConditionModel


def test_a_correction_follows_its_trajectory_through_replays() -> None:
    model = network()
    spec = CorrectionSpec(scheduler="DDIMScheduler", timesteps=(999.0, 500.0, 1.0), channels=4)
    drawn = torch.Generator().manual_seed(1)
    tables = {name: torch.rand(3, 4, generator=drawn) for name in ("scale", "bias", "shift")}
    correction.install(model, spec, tables)
    plain, compared = copy.deepcopy(model), 0
    recorder = enabled(model)
    for start in (0, 0, 0):
        for time in (999, 500, 1)[start:]:
            assert torch.equal(answer(model, compared, time), answer(plain, compared, time))
            compared += 1
    assert compared == 9 and recorder.replays == 8


def test_what_cannot_be_captured_runs_without_and_says_so() -> None:
    model = network()
    plain = copy.deepcopy(model)
    enabled(model)

    def fail(run: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model.graphs.record = fail
    answer(model, 0, 500)
    with pytest.warns(Notice, match="could not capture a CUDA graph.*not permitted"):
        assert torch.equal(answer(model, 1, 500), answer(plain, 1, 500))
    assert torch.equal(answer(model, 2, 1), answer(plain, 2, 1))


def test_copies_have_graphs_of_their_own() -> None:
    model = network()
    recorder = enabled(model)
    for _ in range(3):
        answer(model, 0, 500)
    other = copy.deepcopy(model)
    assert not other.graphs.known and len(model.graphs.known) == 1
    assert torch.equal(answer(other, 3, 1), answer(model, 3, 1)) and recorder.captures == 1


def test_nothing_changes_on_a_cpu() -> None:
    model = network()
    plain = copy.deepcopy(model)
    graphs.enable(model)
    assert all(torch.equal(answer(model, i, 500), answer(plain, i, 500)) for i in range(4))
    assert not model.graphs.known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """Bit for bit, in any mode, and with fewer launches than calls would take."""
    model = network().cuda()
    plain, compared = copy.deepcopy(model), 0
    graphs.enable(model)
    for i, time in enumerate((999, 500, 1, 999, 500, 1)):
        x, text = (t.cuda() for t in inputs(i))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got, want = (net(x, time, encoder_hidden_states=text).sample for net in (model, plain))
            assert torch.equal(got, want)
            compared += 1
    assert compared == 12 and sum(getattr(graph, "replay", None) is not None for graph in model.graphs.known.values())
