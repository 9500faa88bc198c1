"""Time in whole pipelines: what a packed denoiser answers depends on the call, under every scheduler and every history.

Each scenario is run on a model that has a history and on a fresh one made from the same tensors; all bits are equal.
What a call should answer is known from models with one row for all timesteps: the row that the lookup's rule says.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

import small
import tiny
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.numbers.grid import Lookup, Plan

BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),  # timesteps between whole numbers
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),  # visits a timestep twice
}
LOOKUPS: tuple[Lookup, ...] = ("nearest", "ceil")
NOTICE = "bitbrush says this once"
STEPS = 5


def brute(times: Sequence[float], now: float, lookup: Lookup) -> int:
    """The row by the rule, one grid time after the other."""
    if lookup == "ceil":
        return next((i for i, t in enumerate(times) if t >= now), len(times) - 1)
    return min(range(len(times)), key=lambda i: (abs(times[i] - now), i))  # the earlier one in the middle


@dataclass
class Made:
    """Parts of a quantized pipeline, from which fresh models are made."""

    parts: dict[str, Any]
    plan: Plan
    state: dict[str, Tensor]

    def unet(self, times: Sequence[float] = tiny.TIMES, lookup: Lookup = "nearest", row: int | None = None) -> Any:
        """A fresh packed model; with ``row``: without a clock, that row of every table for all timesteps."""
        change: dict[str, Any] = {"lookup": lookup, "timed": row is None}
        layers = {}
        for name, spec in self.plan.layers.items():
            assert spec.activation is not None and spec.activation.timed
            layers[name] = spec.model_copy(update={"activation": spec.activation.model_copy(update=change)})
        plan = Plan(layers=layers, timesteps=tuple(times) if row is None else ())
        model = tiny.text_unet(seed=1)
        wrap.declare(model, plan)
        state = self.state if row is None else {
            k: t[row : row + 1] if k.endswith(("input.scale", "input.inverse_scale", "input.zero_point")) else t
            for k, t in self.state.items()
        }
        model.load_state_dict(state)
        return model

    @functools.cached_property
    def single(self) -> list[Any]:
        """A model for each row that has no other. They keep nothing between calls."""
        return [self.unet(row=i) for i in range(len(tiny.TIMES))]

    def pipe(self, unet: nn.Module, scheduler: str, kind: Any = StableDiffusionPipeline) -> Any:
        """A pipeline around a model."""
        parts = {**self.parts, "unet": unet, "scheduler": SCHEDULERS[scheduler]()}
        pipe = kind(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module")
def made() -> Made:
    pipe, plan = tiny.quantized_pipeline("text")
    return Made(dict(pipe.components), plan, {k: t.clone() for k, t in pipe.unet.state_dict().items()})


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{NOTICE}")
        yield


@dataclass
class Seen:
    """What a denoiser was asked, what it answered, and which rows one of its layers took."""

    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # sample, timestep, text
    answers: list[Tensor] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Timesteps of the calls, one each."""
        return [float(t) for _, t, _ in self.calls]


@contextmanager
def watching(unet: Any) -> Iterator[Seen]:
    """Note every call of a model."""
    seen, layer = Seen(), wrap.layers(unet)["conv_in"]

    def asked(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append((args[0].clone(), torch.as_tensor(args[1]).clone(), kwargs["encoder_hidden_states"].clone()))

    def row(_module: nn.Module, _args: Any) -> None:
        assert layer.input is not None
        found = layer.input.rows()
        assert found is not None
        seen.rows.append(found.tolist())

    handles = [
        unet.register_forward_pre_hook(asked, with_kwargs=True), layer.register_forward_pre_hook(row),
        unet.register_forward_hook(lambda _m, _a, out: seen.answers.append(out[0].clone())),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def draw(pipe: Any, seed: int = 0, steps: int = STEPS, guidance: float = 4.0, **more: Any) -> Tensor:
    """Latents of two pictures."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    more = {"latents": noise, **more}
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        more = {**more, "image": more.pop("latents"), "generator": torch.Generator().manual_seed(seed)}
    out = pipe(small.PROMPTS[:2], num_inference_steps=steps, guidance_scale=guidance, output_type="latent", **more)
    assert isinstance(out.images, Tensor) and bool(torch.isfinite(out.images).all())
    return out.images


def visited(scheduler: str, steps: int = STEPS) -> list[float]:
    """The timesteps of a schedule, in order."""
    made = SCHEDULERS[scheduler]()
    made.set_timesteps(steps)
    return [float(t) for t in made.timesteps]


@torch.no_grad()
def call(unet: Any, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    answer: Tensor = unet(sample, timestep, encoder_hidden_states=text).sample
    return answer


# ---- step counts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_other_step_counts_follow_the_lookup_and_say_so_once(made: Made, scheduler: str, lookup: Lookup) -> None:
    """Each call answers what a model answers that has nothing but the row of the rule."""
    unet, compared, rows = made.unet(lookup=lookup), 0, set[int]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps in (3, 7):
            with watching(unet) as seen:
                draw(made.pipe(unet, scheduler), steps=steps)
            assert seen.times == visited(scheduler, steps) and len(seen.answers) == len(seen.calls) >= steps
            for asked, answer, row in zip(seen.calls, seen.answers, seen.rows, strict=True):
                expected = brute(tiny.TIMES, float(asked[1]), lookup)
                assert row == [expected] and torch.equal(call(made.single[expected], *asked), answer)
                rows.add(expected)
                compared += 1
            other = made.single[expected - 1]
            assert not torch.equal(call(other, *asked), answer), "rows differ, or nothing was compared"
    assert compared == len(visited(scheduler, 3)) + len(visited(scheduler, 7)) >= 10 and len(rows) >= 4
    said = [str(w.message) for w in caught if NOTICE in str(w.message)]
    off = next(t for t in visited(scheduler, 3) if t not in tiny.TIMES)
    took = tiny.TIMES[brute(tiny.TIMES, off, lookup)]
    assert len(said) == 1, said
    assert f"timestep {off:g} " in said[0] and f"lookup = {lookup}" in said[0] and f"timestep {took:g} " in said[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_calibrated_step_count_says_nothing_and_takes_each_row(made: Made, scheduler: str) -> None:
    """A grid of the scheduler's own timesteps, those between whole numbers, too: all three lookups are one."""
    grid, answers = sorted(set(visited(scheduler))), []
    assert len(grid) == len(tiny.TIMES)
    lookups: tuple[Lookup, ...] = ("exact", *LOOKUPS)
    for lookup in lookups:
        unet = made.unet(grid, lookup)
        with warnings.catch_warnings(), watching(unet) as seen:
            warnings.filterwarnings("error", message=f".*{NOTICE}")
            answers.append(draw(made.pipe(unet, scheduler)))
        assert [row for (row,) in seen.rows] == [grid.index(t) for t in visited(scheduler)]
        assert sorted({row for (row,) in seen.rows}) == list(range(len(grid)))
    assert len(answers) == 3 and all(torch.equal(a, answers[0]) for a in answers)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_exact_tables_refuse_other_step_counts(made: Made, scheduler: str) -> None:
    grid, looked = sorted(set(visited(scheduler))), 0
    unet = made.unet(grid, "exact")
    for steps in (4, 7):
        off = next(t for t in visited(scheduler, steps) if t not in grid)
        with pytest.raises(InputError, match="not on the time grid") as caught:
            draw(made.pipe(unet, scheduler), steps=steps)
        assert small.complete(caught.value) and f"{off:g}" in str(caught.value.where)
        assert unet.bitbrush_clock.now is None
        looked += 1
    assert looked == 2
    right = draw(made.pipe(unet, scheduler))
    assert torch.equal(right, draw(made.pipe(made.unet(grid, "exact"), scheduler)))


def test_a_copy_says_it_again_and_batches_say_it_too(made: Made) -> None:
    """What was said belongs to a model; one sample off the grid in a batch is enough; on the grid nothing is said."""
    unet, counts = made.unet(), []
    text = torch.randn(2, tiny.TOKENS, 16)
    for model, times in ((unet, [500, 999]), (unet, [500, 501]), (unet, [3, 4]), (made.unet(), [3, 3])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(model, torch.randn(2, 4, 8, 8), torch.tensor(times), text)
        counts.append(len([w for w in caught if NOTICE in str(w.message)]))
        assert not caught or "timestep 501 " in str(caught[0].message) or times == [3, 3]
    assert counts == [0, 1, 0, 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NOTICE}")
        with unet.bitbrush_clock.at(7), torch.no_grad():  # blocks called by themselves: no pipeline, no notice
            wrap.layers(unet)["conv_in"](torch.randn(1, 4, 8, 8))


# ---- histories -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_img2img_starts_in_the_middle(made: Made, scheduler: str) -> None:
    unet, compared = made.unet(), 0
    draw(made.pipe(unet, "ddim"), seed=9)
    for strength in (0.3, 0.6, 0.8):
        pipe = made.pipe(unet, scheduler, StableDiffusionImg2ImgPipeline)
        with watching(unet) as seen:
            ours = draw(pipe, steps=10, strength=strength)
        whole = visited(scheduler, 10)
        assert 1 <= len(seen.times) < len(whole) and seen.times == whole[-len(seen.times) :]
        assert [row for (row,) in seen.rows] == [brute(tiny.TIMES, t, "nearest") for t in seen.times]
        fresh = made.pipe(made.unet(), scheduler, StableDiffusionImg2ImgPipeline)
        assert torch.equal(ours, draw(fresh, steps=10, strength=strength))
        compared += 1
    assert compared == 3


@torch.no_grad()
def two_calls(pipe: Any, seed: int = 0) -> Tensor:
    """Guidance as some pipelines do it: a call without the prompt, then one with it."""
    pipe.scheduler.set_timesteps(STEPS)
    text, empty = pipe.encode_prompt(small.PROMPTS[:2], "cpu", 1, True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        u = pipe.scheduler.scale_model_input(x, t)
        without, given = (call(pipe.unet, u, t, condition) for condition in (empty, text))
        x = pipe.scheduler.step(without + 4.0 * (given - without), t, x).prev_sample
    return x


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_guidance_with_none_one_or_two_calls(made: Made, scheduler: str) -> None:
    """The number of calls a step does not matter to the rows, whichever way came before."""
    ways: dict[str, tuple[int, Callable[[Any], Tensor]]] = {
        "off": (1, lambda pipe: draw(pipe, guidance=1.0)), "doubled batch": (1, draw), "two calls": (2, two_calls),
    }
    fresh, rows = {name: way(made.pipe(made.unet(), scheduler)) for name, (_, way) in ways.items()}, []
    unet, compared = made.unet(), 0
    order = [list(ways)[i] for i in (0, 1, 0, 2, 1, 2, 0)]  # each way after each other one
    assert len(set(itertools.pairwise(order))) == 6
    for name in order:
        with watching(unet) as seen:
            assert torch.equal(ways[name][1](made.pipe(unet, scheduler)), fresh[name]), (order, compared)
        each = ways[name][0]
        assert seen.times == [t for t in visited(scheduler) for _ in range(each)]
        rows.append(seen.rows[::each])
        compared += 1
    assert compared == 7 and all(r == rows[0] for r in rows) and len(rows[0]) == len(visited(scheduler))
    assert not torch.equal(fresh["off"], fresh["doubled batch"])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batches_of_mixed_timesteps(made: Made, scheduler: str) -> None:
    """A sample gets the row of its own timestep, whatever the others' are; bits, in a batch of the same size."""
    unet, compared = made.unet(), 0
    draw(made.pipe(unet, scheduler), seed=3)
    g = torch.Generator().manual_seed(0)
    times = torch.tensor(visited(scheduler, 8))
    sample = torch.randn(len(times), 4, 8, 8, generator=g)
    text = torch.randn(len(times), tiny.TOKENS, 16, generator=g)
    for order in (torch.arange(len(times)), torch.randperm(len(times), generator=g)):
        now = times[order]
        with watching(unet) as seen:
            seen_answer = call(unet, sample, now, text)
        expected = [brute(tiny.TIMES, t, "nearest") for t in now.tolist()]
        assert seen.rows == [expected] and len(set(expected)) >= 3
        assert torch.equal(seen_answer, call(made.unet(), sample, now, text))
        answers = [call(model, sample, now, text) for model in made.single]
        for i, row in enumerate(expected):
            assert torch.equal(seen_answer[i], answers[row][i])
            compared += 1
    assert compared == 2 * len(times) >= 16


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_pipelines_share_a_model(made: Made, scheduler: str) -> None:
    """Pipelines of other schedulers and step counts draw between the steps of this one."""
    others = [name for name in SCHEDULERS if name != scheduler]
    alone = {name: draw(made.pipe(made.unet(), name), seed=i, steps=3 + i % 2) for i, name in enumerate(others)}
    expected, unet = draw(made.pipe(made.unet(), scheduler), seed=7), made.unet()
    pipes, compared = {name: made.pipe(unet, name) for name in others}, list[str]()

    def between(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        i = step % len(others)
        name = others[i]
        assert unet.bitbrush_clock.now is None
        assert torch.equal(draw(pipes[name], seed=i, steps=3 + i % 2), alone[name])
        compared.append(name)
        return tensors

    assert torch.equal(draw(made.pipe(unet, scheduler), seed=7, callback_on_step_end=between), expected)
    assert len(compared) == len(visited(scheduler)) and set(compared) == set(others)


class Stopped(Exception):
    """Raised in the middle of a call."""


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_aborted_call_before_this_one(made: Made, scheduler: str) -> None:
    """Stopped between two steps, and inside a forward, where the time was set: nothing of it is left."""
    expected, unet, aborted = draw(made.pipe(made.unet(), scheduler)), made.unet(), 0
    layers = wrap.layers(unet)

    def stop(*_: Any) -> Any:
        raise Stopped

    def after(step: int) -> Callable[..., Any]:
        return lambda _pipe, i, _t, tensors: stop() if i == step else tensors

    for step in (0, 2):
        with pytest.raises(Stopped):
            draw(made.pipe(unet, scheduler), seed=5, steps=8, callback_on_step_end=after(step))
        aborted += 1
        assert unset(unet) and torch.equal(draw(made.pipe(unet, scheduler)), expected)
    for name in ("conv_in", "mid_block.resnets.0.conv1", "conv_out"):
        handle = layers[name].register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            draw(made.pipe(unet, scheduler), seed=5, steps=8)
        handle.remove()
        aborted += 1
        assert unset(unet) and torch.equal(draw(made.pipe(unet, scheduler)), expected)
    assert aborted == 5


def unset(unet: Any) -> bool:
    """Whether every layer of a model refuses to run by itself, with an error that helps."""
    raised = 0
    for layer in wrap.layers(unet).values():
        wide = layer.in_channels_
        with pytest.raises(InputError, match="clock is not set") as caught:
            layer(torch.randn(1, wide, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(1, wide))
        assert small.complete(caught.value)
        raised += 1
    return raised > 30 and unet.bitbrush_clock.now is None


# ---- compiling -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "form"), [("groups", "torch.compile(unet)"), ("bits", "unet.compile()")])
def test_a_fresh_model_is_compiled_once(kind: str, form: str) -> None:
    """The first call of a model that was never run eagerly captures what all later timesteps use; answers are equal."""
    change: dict[str, Any] = (
        {"time_groups": (0, 0, 1, 2, 2)} if kind == "groups" else {"time_bits": (8, 6, 6, 6, 8)}
    )
    plain, captured = small.least_unet(), list[int]()
    layers = {}
    for name, spec in tiny.plan_for(plain).layers.items():
        assert spec.activation is not None
        layers[name] = spec.model_copy(update={"activation": spec.activation.model_copy(update=change)})
    plan = Plan(layers=layers, timesteps=tiny.TIMES)
    donor = tiny.quantized_model(copy.deepcopy(plain), plan.model_copy(update={"layers": tiny.plan_for(plain).layers}))
    state = donor.state_dict()
    if kind == "groups":
        state = {k: t[[0, 2, 4]] if ".input." in k else t for k, t in state.items()}
    else:
        state = {k: t.clamp(max=63) if k.endswith("input.zero_point") else t for k, t in state.items()}

    def fresh() -> Any:
        model = copy.deepcopy(plain)
        wrap.declare(model, plan)
        model.load_state_dict(state)
        return model

    def backend(graph: Any, _inputs: Any) -> Any:
        captured.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model = fresh()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True) if form.startswith("torch") else model
    if compiled is model:
        model.compile(backend=backend, fullgraph=True)
    outs, times = [tiny.run(compiled, 999.0)], (999.0, 500.0, 37.5, 1.0, 999.0)
    first = len(captured)
    outs += [tiny.run(compiled, t) for t in times[1:]]
    torch._dynamo.reset()
    assert len(captured) == first >= 1 and all(torch.equal(o, tiny.run(fresh(), t))
                                               for o, t in zip(outs, times, strict=True))
    assert len({float(o.abs().sum()) for o in outs}) == 4
