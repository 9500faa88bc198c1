"""Groups of timesteps: a row of a timed table serves several, in simulation, training, fit, packed, proven, on disk."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush import kernels
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import layer_bytes
from bitbrush.errors import BitbrushError, InputError
from bitbrush.kernels import cpu
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.fit import Fit, quantizers, samples_of
from bitbrush.steps.learners import ScaleLearner, SharedTables, held_tables
from bitbrush.steps.watch import Watcher
from small import FIT, HEAD, SPLIT, complete, execute, least_pipeline

TIMES = tiny.TIMES
GROUPS = (0, 2, 1, 1, 2)
OFF_GRID = [-3.0, 1.0, 100.0, 125.5, 126.0, 400.0, 625.0, 990.0, 2000.0]
KINDS: list[dict[str, Any]] = [{}, {"segments": (4, 2)}, {"granularity": "channel"}, {"lookup": "ceil"}]


def grouped(plan: Plan, groups: tuple[int, ...] = GROUPS, every: int = 1) -> Plan:
    """The plan with these groups in every ``every``-th timed activation."""
    return tiny.timed_with(plan, every, time_groups=groups)


def fill(quantizer: ActivationQuantizer, seed: int = 0) -> None:
    """Rows of random ranges."""
    g = torch.Generator().manual_seed(seed)
    shape = quantizer.scale.shape
    low, high = -torch.rand(shape, generator=g) * 2, torch.rand(shape, generator=g) * 3
    quantizer.set_scale(*ranges.affine_parameters(low, high, quantizer.spec.grid))


def pair(
    clock: Clock, groups: tuple[int, ...] = GROUPS, segments: tuple[int, ...] = (), bits: int = 4, seed: int = 0,
    **spec: Any,
) -> tuple[ActivationQuantizer, ActivationQuantizer]:
    """A quantizer with groups, and a plain one that holds the row of its group at every timestep."""
    chosen = ActivationSpec(grid=Grid(bits=bits), timed=True, time_groups=groups, **spec)
    made = ActivationQuantizer(chosen, segments, clock, len(TIMES), channels=6)
    fill(made, seed)
    plain = ActivationQuantizer(chosen.model_copy(update={"time_groups": ()}), segments, clock, len(TIMES), channels=6)
    plain.set_scale(made.scale[list(groups)], made.zero_point[list(groups)])
    return made, plain


# ---- the quantizer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choices", KINDS)
def test_a_table_of_groups_is_the_expanded_table(choices: Any) -> None:
    """The same codes, values and gradients, at each time, between times, and in batches of mixed times."""
    clock, compared = Clock(TIMES), 0
    made, plain = pair(clock, **choices)
    columns = {"segments": 2, "granularity": 6}.get(next(iter(choices), ""), 1)
    assert made.scale.shape == made.zero_point.shape == (3, columns) and plain.scale.shape == (5, columns)
    times = [*(torch.tensor(t) for t in OFF_GRID), torch.tensor(OFF_GRID)]
    for t in times:
        x, tables = torch.randn(9, 6, 3, 3) * 3, []
        with clock.at(t):
            times_of, rows = made.times(), made.rows()
            assert times_of is not None and rows is not None
            assert rows.tolist() == [GROUPS[i] for i in times_of.tolist()] and rows.dtype == torch.int64
            for quantizer in (made, plain):
                free = x.clone().requires_grad_()
                out = quantizer(free, 1)
                out.square().sum().backward()
                assert free.grad is not None
                with torch.no_grad():
                    tables.append([out.detach(), quantizer(x, 1), free.grad, *quantizer.encode(x, 1)])
        assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
        assert torch.equal(tables[0][0], tables[0][1])
        compared += 1
    assert compared == 10


def test_one_group_is_a_static_quantizer_and_a_group_a_timestep_a_timed_one() -> None:
    """Invariant 1 of ADP-DM."""
    clock, compared = Clock(TIMES), 0
    one, _ = pair(clock, (0,) * 5)
    static = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)))
    static.set_scale(one.scale, one.zero_point)
    each, timed = pair(clock, (0, 1, 2, 3, 4))
    assert one.scale.shape == (1, 1) and torch.equal(each.scale, timed.scale)
    for t in TIMES:
        x = torch.randn(2, 6, 4, 4) * 3
        with clock.at(t):
            assert torch.equal(one(x, 1), static(x, 1)) and torch.equal(each(x, 1), timed(x, 1))
        compared += 1
    assert compared == 5


def test_without_groups_rows_are_those_of_the_time_grid() -> None:
    clock = Clock(TIMES)
    plain = ActivationQuantizer(ActivationSpec(timed=True), (), clock, 5)
    assert ActivationQuantizer(ActivationSpec(), (), clock, 1).rows() is None
    with clock.at(torch.tensor([999.0, 250.0])):
        rows, times = plain.rows(), plain.times()
    assert rows is not None and times is not None and torch.equal(rows, times) and rows.tolist() == [4, 1]
    assert clock._tables == {} and clock._alone == {}


def test_the_groups_are_kept_and_not_stored() -> None:
    """Built at the first call, even one in inference mode; then used as it is, in training too, and in copies."""
    clock = Clock(TIMES)
    made, _ = pair(clock)
    with torch.inference_mode(), clock.at(250.0):
        made(torch.randn(1, 6, 2, 2), 1)
    (kept,) = clock._alone.values()
    assert kept.tolist() == list(GROUPS) and not kept.is_inference() and set(made.state_dict()) == {
        "scale", "inverse_scale", "zero_point",
    }
    x = torch.randn(1, 6, 2, 2, requires_grad=True)
    with clock.at(torch.tensor([250.0])):
        made(x, 1).sum().backward()
    assert next(iter(clock._alone.values())) is kept and x.grad is not None
    assert copy.deepcopy(made).spec.time_groups == GROUPS


def test_groups_of_all_layers_are_looked_up_at_once(made: tuple[Any, Plan, dict[float, Tensor], Path]) -> None:
    """One lookup a forward, however many layers and tables there are; a table that is new to the clock is found too."""
    pipe = made[0]
    model = copy.deepcopy(pipe.unet)
    asked = [layer.input for layer in wrap.layers(model).values() if layer.input is not None]
    seen = []
    with Operations() as counted, torch.no_grad(), model.bitbrush_clock.at(250.0):
        model.bitbrush_clock._found, model.bitbrush_clock.said = {}, True
        for quantizer in asked:
            rows, times = quantizer.rows(), quantizer.times()
            if quantizer.spec.time_groups:
                assert rows is not None and times is not None
                seen.append(rows.tolist() == [quantizer.spec.time_groups[i] for i in times.tolist()])
        other = model.bitbrush_clock.groups((1, 0, 0, 0, 0), "nearest")
    assert len(seen) > 20 and all(seen) and other.tolist() == [0]
    assert counted.found["aten::index_select"] == 2 and counted.found["aten::searchsorted"] == 1


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.found[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_one_compiled_graph_serves_all_groups() -> None:
    clock, compared = Clock(TIMES), 0
    made, plain = pair(clock)
    x = torch.randn(2, 6, 4, 4) * 3
    compiled = torch.compile(lambda a: made(a, 1), fullgraph=True, backend="aot_eager")
    for t in TIMES:
        with torch.no_grad(), clock.at(t):
            assert torch.equal(compiled(x), plain(x, 1))
            compared += 1
    assert compared == 5


# ---- a mixture while a step trains -------------------------------------------------------------------------------
@pytest.mark.parametrize("choices", KINDS)
def test_a_trial_mixture_is_the_sum_by_shares(choices: Any) -> None:
    """One-hot shares: the quantizer itself (invariant 2); else the sum of what each candidate makes of the input."""
    clock, compared = Clock(TIMES), 0
    made, _ = pair(clock, **choices)
    tables = (made.scale, made.zero_point.float())
    cases = [(torch.randn(5, 6, 3, 4) * 3, 1), (torch.randn(5, 7, 6) * 3, -1), (torch.randn(5, 6) * 3, 1)]
    for x, dim in cases:
        with clock.at(torch.tensor(TIMES)), torch.no_grad():
            rows = made.rows()
            assert rows is not None
            hard = made(x, dim)
            made.trial_mixture = lambda rows=rows: (nn.functional.one_hot(rows, 3).float(), *tables)  # type: ignore[misc]
            assert torch.equal(made(x, dim), hard)
            for count in (1, 5):
                share = torch.rand(count, 3).softmax(dim=1)
                made.trial_mixture = lambda share=share: (share, *tables)  # type: ignore[misc]
                want = torch.zeros_like(x)
                for k in range(3):
                    alone, _ = pair(clock, (0,) * 5, **choices)
                    alone.set_scale(made.scale[k : k + 1], made.zero_point[k : k + 1])
                    want += share[:, k].view(-1, *([1] * (x.ndim - 1))) * alone(x, dim)
                assert torch.allclose(made(x, dim), want, atol=1e-5)
                compared += 1
            made.enabled = False
            assert made(x, dim) is x
            made.enabled, made.trial_mixture = True, None
            assert torch.equal(made(x, dim), hard)
    assert compared == 6


def test_a_mixture_of_one_picture_without_batch() -> None:
    clock = Clock(TIMES)
    made, _ = pair(clock, segments=(4, 2))
    x, share = torch.randn(6, 3, 3), torch.tensor([[0.2, 0.5, 0.3]])
    made.trial_mixture = lambda: (share, made.scale, made.zero_point.float())
    assert torch.equal(made(x, -3), made(x[None], 1)[0]) and made(x.half(), -3).dtype == torch.float16


# ---- training ----------------------------------------------------------------------------------------------------
def test_learned_tables_of_groups_add_up_over_their_timesteps() -> None:
    """Scale and zero-point of a group: the sum of the gradients of its timesteps in an expanded table."""
    clock, x, times = Clock(TIMES), torch.randn(10, 6, 3, 3) * 4, torch.tensor(TIMES).repeat(2)
    found, compared = [], 0
    for quantizer in pair(clock, segments=(4, 2)):
        learner = ScaleLearner({"q": quantizer}, zero_points=True)
        learner.relax(torch.tensor(0.0))
        with clock.at(times):
            shared = quantizer(x, 1)
            quantizer.trial_rows = None
            assert torch.equal(quantizer(x, 1), shared), "and by its own trial tables"
            (shared * x.cos()).sum().backward()
        assert learner.zero is not None and learner.theta.grad is not None and learner.zero.grad is not None
        found.append((shared.detach(), learner.theta.grad.view(-1, 2), learner.zero.grad.view(-1, 2)))
        learner.harden()
        assert set(learner.result()) == {"q/scale", "q/zero_point"}
    assert torch.equal(found[0][0], found[1][0])
    for mine, expanded in zip(found[0][1:], found[1][1:], strict=True):
        want = torch.zeros(3, 2).index_add(0, torch.tensor(GROUPS), expanded)
        assert mine.shape == (3, 2) and bool((mine != 0).any()) and torch.allclose(mine, want, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared == 2


def test_shared_tables_of_members_with_other_groups() -> None:
    """Two groupings, none, one row for all times, scales a channel and another lookup, in one flat tensor."""
    clock, compared = Clock(TIMES), 0
    first, second = pair(clock), pair(clock, (0, 0, 1, 1, 1), segments=(4, 2), seed=1)
    third = pair(clock, (1, 0, 1, 0, 2), seed=2, granularity="channel")
    other = pair(clock, (3, 2, 1, 0, 0), seed=3, lookup="ceil")
    static = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)))
    fill(static, 4)
    every = [first[0], second[1], static, second[0], third[0], other[0], first[1], other[1]]
    tables = SharedTables(every)
    assert [lookup.members for lookup in tables.lookups] == [[0, 1, 3, 4, 6], [5, 7]]
    assert all(lookup.places is not None for lookup in tables.lookups)
    assert tables.lookups[0].places is not None and tables.lookups[0].places.shape == (1 + 2 + 2 + 6 + 1, 5)
    x = torch.randn(9, 6, 3, 3) * 3
    for t in (*OFF_GRID, torch.tensor(OFF_GRID)):
        with clock.at(t), torch.no_grad():
            want = [quantizer(x, 1) for quantizer in every]
            with held_tables(every):
                got = [quantizer(x, 1) for quantizer in every]
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert torch.equal(want[0], want[6]) and torch.equal(want[1], want[3]) and torch.equal(want[5], want[7])
        compared += 1
    assert compared == 10
    assert all(lookup.places is None for lookup in SharedTables([first[1], second[1], static]).lookups)


# ---- fit ---------------------------------------------------------------------------------------------------------
def test_which_samples_a_row_is_fitted_to() -> None:
    grid, times = torch.tensor(TIMES), torch.tensor([999.0, 1.0, 250.0, 520.0, 999.0, 250.0])
    plain, made = ActivationSpec(timed=True), ActivationSpec(timed=True, time_groups=GROUPS)
    each = samples_of(plain, grid, times)
    assert [row.nonzero().flatten().tolist() for row in each] == [[1], [2, 5], [3], [3], [0, 4]]
    rows = samples_of(made, grid, times)
    assert [row.nonzero().flatten().tolist() for row in rows] == [[1], [3], [0, 2, 4, 5]]
    assert bool((rows.sum(dim=0) == 1).all()), "every sample belongs to one group"
    near = samples_of(made, grid, torch.tensor([520.0, 500.0, 1.0, 999.0]))  # 520 counts; 1 is not lent to 250's group
    assert [row.nonzero().flatten().tolist() for row in near] == [[2], [0, 1], [3]]
    few = samples_of(made, grid, torch.tensor([999.0, 250.0]))  # group 1 has none of its own, group 0 neither
    assert [row.nonzero().flatten().tolist() for row in few] == [[1], [0, 1], [0, 1]]


TIMED = HEAD.replace("activation = {}", "activation = { timed = true }")
CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = "all"\ntrajectories = 3\nsteps = 5\nbatch = 2\nguidance = 1.0\n'
RANGES = '[[step]]\ndo = "fit"\nid = "ranges"\nwhat = "activations"\nmethod = "minmax"\nvalues = 64\nsamples = 99\n'


def test_a_fit_of_groups_in_a_run(tmp_path: Path) -> None:
    """Min-max: a group's range is that of its timesteps together; the weights keep their codes through the change."""
    run, compared = execute(tmp_path, least_pipeline(), TIMED + CALIBRATE + SPLIT + FIT + RANGES), 0
    codes = {name: layer.stored_codes().clone() for name, layer in run.layers().items()}
    before = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in quantizers(run).items()}
    fit = next(step for step in run.recipe.steps if isinstance(step, Fit) and step.what == "activations")
    run.change_plan({n: s for n, s in grouped(run.plan).layers.items() if s != run.plan.layers[n]})
    assert all(torch.equal(layer.stored_codes(), codes[name]) for name, layer in run.layers().items())
    result = fit.run_unit(run, "all activations", torch.Generator().manual_seed(0))
    fit.apply(run, "all activations", result)
    for name, quantizer in quantizers(run).items():
        assert quantizer.scale.shape == (3, before[name][0].shape[1]) and quantizer.spec.time_groups == GROUPS
        low, high = (-before[name][1].float() * before[name][0], (255 - before[name][1].float()) * before[name][0])
        for group in range(3):
            here = [i for i, g in enumerate(GROUPS) if g == group]
            scale, zero = quantizer.scale[group], quantizer.zero_point[group].float()
            slack = 1.1 * scale
            assert bool((-zero * scale - low[here].amin(0)).abs().le(slack).all()), (name, group)
            assert bool(((255 - zero) * scale - high[here].amax(0)).abs().le(slack).all()), (name, group)
            compared += 1
    assert compared == 3 * len(run.plan.layers) > 30
    wrap.set_face(run.model, "sim")
    with torch.no_grad():
        answers = [run.model(torch.randn(1, 1, 8, 8), t).sample for t in run.plan.timesteps]
    assert len(answers) == 5 and all(bool(torch.isfinite(a).all()) for a in answers)


@pytest.mark.parametrize("choices", [{}, {"ema": 0.9}, {"method": "minmax"}])
@pytest.mark.parametrize("counts", [(3, 3, 3, 3, 3), (1, 4, 2, 2, 5), (6, 3, 3, 3, 3)])
def test_a_row_is_the_search_over_its_samples(counts: tuple[int, ...], choices: Any, tmp_path: Path) -> None:
    """Whether groups have as many samples as each other (the last case: 6 each) or not."""
    clock, g = Clock(TIMES), torch.Generator().manual_seed(1)
    fit = Fit(do="fit", what="activations", points=20, step=0.04, extremes_from=9, **choices)
    made, _ = pair(clock, segments=(4, 2))
    times = torch.cat([torch.full((n,), t) for n, t in zip(counts, TIMES, strict=True)])
    times = times[torch.randperm(len(times), generator=g)]
    watcher = Watcher(made, 32, g, extremes=False)
    watcher.times = times
    run: Any = type("R", (), {"plan": Plan(timesteps=TIMES)})()
    with clock.at(times), torch.no_grad():
        made(torch.randn(len(times), 6, 5, 5, generator=g) * (1 + times.view(-1, 1, 1, 1) / 300), 1)
    values = watcher.values_by_segment()[0]
    scale, zero = fit._table(run, made, watcher)
    assert scale.shape == zero.shape == (3, 2)
    for group in range(3):
        here = torch.tensor([GROUPS[TIMES.index(t)] == group for t in times.tolist()])
        want = fit.row(values[:, here], made.spec.grid)
        assert torch.allclose(scale[group], want[0], rtol=1e-6) and torch.equal(zero[group], want[1])


def test_progressive_calibration_is_refused(tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), TIMED + CALIBRATE + SPLIT + FIT + RANGES)
    run.change_plan(grouped(run.plan).layers)
    fit = next(step for step in run.recipe.steps if isinstance(step, Fit) and step.what == "activations")
    with pytest.raises(InputError, match="a group of timesteps") as caught:
        fit.model_copy(update={"inputs": "progressive"}).run_unit(run, "all activations", torch.Generator())
    assert complete(caught.value)


# ---- refusals ----------------------------------------------------------------------------------------------------
def test_refusals() -> None:
    with pytest.raises(ValidationError):
        ActivationSpec(timed=True, time_groups=(0, -1))
    refused = 0
    for spec in (ActivationSpec(time_groups=GROUPS), ActivationSpec(timed=True, mode="dynamic", time_groups=GROUPS),
                 ActivationSpec(timed=True, time_groups=GROUPS, time_bits=(8,) * 5)):
        assert LayerSpec(activation=spec).unsupported() == ["activation.time_groups"]
        refused += 1
    assert LayerSpec(activation=ActivationSpec(timed=True, time_groups=GROUPS)).unsupported() == []
    cases = {
        (0, 1): ("groups a timestep do not fit the time grid", "2 entries for 5 timesteps"),
        (0, 1, 3, 3, 0): ("not numbered 0 .. K-1", "no timestep is in group 2, but one is in group 3"),
        (1,) * 5: ("not numbered 0 .. K-1", "no timestep is in group 0, but one is in group 1"),
        (0, 0, 0, 0, 10**15): ("not numbered 0 .. K-1", f"no timestep is in group 1, but one is in group {10**15}"),
    }
    for groups, (what, why) in cases.items():
        plan = grouped(tiny.plan_for(tiny.text_unet()), groups)
        for change in (wrap.wrap, wrap.declare):
            with pytest.raises(InputError, match=what) as caught:
                change(tiny.text_unet(), plan)
            assert caught.value.why == why and complete(caught.value) and caught.value.where in plan.layers
            refused += 1
    assert refused == 11


def test_plans_without_groups_keep_their_json() -> None:
    """Digests of what was saved before stay valid; a plan with groups comes back as it was."""
    plan = tiny.plan_for(tiny.text_unet(), attention=True)
    assert "time_groups" not in json.dumps(plan.to_json())
    made = grouped(plan, every=2)
    again = Plan.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and again != plan
    assert json.dumps(made.to_json()).count("time_groups") == sum("time_groups" in json.dumps(s)
                                                                  for s in made.to_json()["specs"]) > 0


def test_bytes_of_tables() -> None:
    """Nine bytes an entry: float32 scale and reciprocal, uint8 zero-point."""
    spec = LayerSpec(weight=WeightSpec(), activation=ActivationSpec(timed=True), segments=(24, 8))
    few = spec.model_copy(update={"activation": ActivationSpec(timed=True, time_groups=GROUPS)})
    sizes = [layer_bytes((16, 32), s, bias=False, times=5) for s in (spec, few)]
    assert sizes[0] - sizes[1] == 9 * 2 * (5 - 3)


# ---- packed ------------------------------------------------------------------------------------------------------
def layer_of(kind: str, segments: tuple[int, ...], granularity: Any = "tensor") -> tuple[Clock, Any, Any]:
    """(clock, layer in sim face, its packed copy)."""
    activation = ActivationSpec(grid=Grid(bits=6), timed=True, time_groups=GROUPS, granularity=granularity)
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4)), segments=segments, activation=activation)
    return tiny.packed_pair(kind, spec, fill)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("segments", [(), (16, 8)])
def test_packed_and_proven_at_every_time(kind: str, segments: tuple[int, ...]) -> None:
    clock, layer, packed = layer_of(kind, segments)
    codes, proven = layer.stored_codes(), 0
    assert layer.input.scale.shape == (3, len(segments) or 1)
    for times in [*TIMES, torch.tensor([999.0, 250.0])]:
        x = torch.randn(2, 7, 24) * 2 if kind == "linear" else torch.randn(2, 24, 5, 5) * 2
        with torch.no_grad(), clock.at(times):
            assert torch.equal(packed(x), layer(x))
            result = prove_layer(codes, packed, x)
            assert result["ok"] and set(result["kernels"]) == set(kernels.KERNELS), result
            assert "skipped" not in result["kernels"]["cpu-int8"]
            assert torch.allclose(cpu.run(packed, x), layer(x), atol=1e-4)
        proven += 1
    assert proven == 6


def test_scales_a_channel_are_proven() -> None:
    clock, layer, packed = layer_of("conv", (), "channel")
    with torch.no_grad(), clock.at(torch.tensor([999.0, 1.0])):
        result = prove_layer(layer.stored_codes(), packed, torch.randn(2, 24, 5, 5))
    assert result["ok"] and layer.input.scale.shape == (3, 24)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_proof_has_a_second_opinion(kind: str) -> None:
    """A quantizer that took another group's row would be found out."""
    clock, layer, packed = layer_of(kind, ())
    clock._alone = {f"{GROUPS} cpu": torch.tensor((0, 1, 1, 1, 2))}
    x, found = torch.randn(2, 24, 24) if kind == "linear" else torch.randn(2, 24, 5, 5), []
    for t in TIMES:
        with torch.no_grad(), clock.at(t):
            found.append(prove_layer(layer.stored_codes(), packed, x)["ok"])
    assert found == [True, False, True, True, True]


# ---- the whole network -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Plan, dict[float, Tensor], Path]:
    """(pipeline, plan, simulated answers a timestep, the artifact's folder); every second table has groups."""
    pipe = tiny.pipeline("text")
    plan = grouped(tiny.plan_for(pipe.unet, attention=True), every=2)
    simulated = tiny.packed_network(pipe, plan, fill)
    folder = tmp_path_factory.mktemp("groups") / "made"
    save(pipe, folder, plan)
    return pipe, plan, simulated, folder


def test_network_packs_saves_and_loads(made: tuple[Any, Plan, dict[float, Tensor], Path]) -> None:
    pipe, plan, simulated, folder = made
    assert not torch.equal(simulated[250.0], simulated[500.0])
    assert all(torch.equal(tiny.run(pipe.unet, t), simulated[t]) for t in TIMES)
    used = kernels.use(pipe.unet, "cpu-int8")
    assert sum(reason == "cpu-int8" for reason in used.values()) > 30
    assert torch.allclose(tiny.run(pipe.unet, 250.0), simulated[250.0], atol=0.1)
    kernels.use(pipe.unet, "reference")
    loaded = type(pipe.unet).from_pretrained(folder / "unet")
    assert all(torch.equal(tiny.run(loaded, t), simulated[t]) for t in TIMES)
    whole = type(pipe).from_pretrained(folder)
    assert torch.equal(tiny.run(whole.unet, 750.0), simulated[750.0])
    tables = [q for q in loaded.modules() if isinstance(q, ActivationQuantizer)]
    rows, others = ({q.scale.shape[0] for q in tables if bool(q.spec.time_groups) is own} for own in (True, False))
    assert rows == {3} and others == {5}
    operands = [n for n, s in plan.layers.items() if wrap.is_operand(n) and s.activation and s.activation.time_groups]
    assert operands, "attention operands have groups, too"
    state = loaded.state_dict()
    assert not any("groups" in name or "tops" in name for name in state)
    assert all(torch.equal(state[n], t) for n, t in pipe.unet.state_dict().items())


def test_an_artifact_with_other_groups_is_refused(
    made: tuple[Any, Plan, dict[float, Tensor], Path], tmp_path: Path
) -> None:
    """Other groups change the digest; groups that do not fit are named before any weight is read."""
    pipe, _, _, folder = made
    for path in (folder / "unet").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    good, refused = json.loads((tmp_path / "config.json").read_text()), 0
    for groups in ([0, 2, 1, 1, 1], [0, 1], [0, 1, 3, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, -1, 0], [], [0.5, 1, 2, 1, 0]):
        config = copy.deepcopy(good)
        changed = 0
        for spec in config["quantization_config"]["plan"]["specs"]:
            if "time_groups" in (spec["activation"] or {}):
                spec["activation"]["time_groups"] = groups
                changed += 1
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BitbrushError):
            type(pipe.unet).from_pretrained(tmp_path)
        refused += changed > 0
    assert refused == 7
    (tmp_path / "config.json").write_text(json.dumps(good))
    type(pipe.unet).from_pretrained(tmp_path)


def test_codes_are_those_of_the_groups_row(made: tuple[Any, Plan, dict[float, Tensor], Path]) -> None:
    """By the definition of a code, with the tables as they lie in the file."""
    pipe, plan, _, _ = made
    names = [n for n, s in plan.layers.items() if s.activation and s.activation.time_groups and not wrap.is_operand(n)]
    found, compared = wrap.layers(pipe.unet), 0
    for name in names[:6]:
        quantizer: Any = found[name].input
        x = torch.randn(2, 5, sum(found[name].segments))
        for i, t in enumerate(TIMES):
            with pipe.unet.bitbrush_clock.at(t), torch.no_grad():
                scale, zero = (table[GROUPS[i]] for table in (quantizer.scale, quantizer.zero_point.float()))
                if len(found[name].segments) > 1:
                    counts = torch.tensor(found[name].segments)
                    scale, zero = scale.repeat_interleave(counts), zero.repeat_interleave(counts)
                want = decode(encode(x, reciprocal(scale), zero, quantizer.top), scale, zero)
                assert torch.equal(quantizer(x, 2), want), (name, t)
            compared += 1
    assert compared == 30
