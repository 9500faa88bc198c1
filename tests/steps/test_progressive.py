"""Progressive calibration (PCR): the naive loop bit for bit, causal, and the float one where nothing is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler
from pydantic import ValidationError
from torch import Tensor

import tiny
from bitbrush.engine.journal import generator
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.pipelines import answered, first_output, sample_latents
from bitbrush.steps import progressive
from bitbrush.steps.calibrate import Calibrate
from bitbrush.steps.fit import Fit, quantizers, tables
from bitbrush.steps.watch import Watcher
from small import FIT, HEAD, PACK, SPLIT, TIMED, begin, complete, execute, least_pipeline, recipe

STEPS = 4
CALIBRATE = f'[[step]]\ndo = "calibrate"\nsamples = 12\ntrajectories = 3\nsteps = {STEPS}\nbatch = 2\nguidance = 3.0\n'
RANGES = '[[step]]\ndo = "fit"\nid = "ranges"\nwhat = "activations"\nmethod = "minmax"\nvalues = 16\nsamples = 99\n'
PROGRESSIVE = RANGES + 'inputs = "progressive"\n'
SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler": EulerAncestralDiscreteScheduler}


def text(scheduler: str = "ddim") -> Any:
    pipe = tiny.text_pipeline()
    kind: Any = SCHEDULERS[scheduler]
    form = {"skip_prk_steps": True} if scheduler == "pndm" else {}  # as Stable Diffusion has it
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **form)
    return pipe


def prepared(folder: Path, pipe: Any, head: str = TIMED) -> Run:
    """A run with fitted weights, tables not yet fitted."""
    return execute(folder, pipe, head + CALIBRATE + SPLIT + FIT)


def fit_of(**choices: Any) -> Fit:
    given = {"do": "fit", "id": "ranges", "what": "activations", "method": "minmax", "values": 16, "samples": 99}
    return Fit(**{**given, "inputs": "progressive", **choices})


def source(run: Run) -> Calibrate:
    return next(step for step in run.recipe.steps if isinstance(step, Calibrate))


class Stop(Exception):
    pass


def naive(run: Run, fit: Fit) -> dict[str, Tensor]:
    """The same, with every trajectory sampled from its beginning for every timestep: O(N^2) calls."""
    grid, done, calibrate = list(run.plan.timesteps), set[int](), source(run)
    while len(done) < len(grid):
        def answer(t: float, call: Any) -> Tensor:
            row = grid.index(t)
            if row in done:
                return call()
            watchers = {n: Watcher(q, fit.values, generator(1, "x", str(row)))
                        for n, q in quantizers(run, "static").items()}
            for watcher in watchers.values():
                watcher.time = t
            with wrap.float_activations(run.model):
                call()
            for name, watcher in watchers.items():
                watcher.handle.remove()
                q = quantizers(run)[name]
                scale, zero = q.scale.clone(), q.zero_point.clone()
                found = fit.row(watcher.values_by_segment()[0], q.spec.grid)
                scale[row], zero[row] = found[0], found[1].to(torch.uint8)
                q.set_scale(scale, zero)
            done.add(row)
            raise Stop

        try:
            with wrap.show(run.model, "sim"), answered(run.model, answer, 100):
                calibrate.sample(run, list(range(calibrate.trajectories)))
        except Stop:
            continue
    return tables(quantizers(run, "static"))


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_linear_calibration_equals_the_naive_loop(scheduler: str, tmp_path: Path) -> None:
    """Invariant 4, with schedulers that keep a history or draw noise, and with the denoiser's batch in parts."""
    run = prepared(tmp_path, text(scheduler))
    calls: list[int] = []
    handle = run.model.get_submodule("conv_in").register_forward_pre_hook(lambda _m, a: calls.append(len(a[0])))
    fit_of().run_unit(run, "all activations", generator(0, "a", "b"))
    found = tables(quantizers(run, "static"))
    handle.remove()
    rows, visits = len(run.plan.timesteps), STEPS + (scheduler == "pndm")
    assert rows == STEPS and sum(calls) == 6 * (rows + visits), "a pass to fit, a pass to go on"
    want = naive(run, fit_of())
    assert len(want) > 60 and all(torch.equal(found[n], t) for n, t in want.items())


def test_parts_of_a_batch_give_the_same_bits(tmp_path: Path) -> None:
    """Calls in parts, with a batch of mixed times and nested conditions, equal one call."""
    run = prepared(tmp_path, text())
    given = tiny.inputs(run.model, batch=5)
    times, compared = torch.tensor([1.0, 250.0, 501.0, 751.0, 751.0]), 0
    for timestep in (times, torch.tensor(251)):
        with torch.no_grad(), wrap.show(run.model, "sim"):
            want = run.model(timestep=timestep, **given).sample
            for size in (1, 2, 5, 9):
                with answered(run.model, lambda _t, call: call(), size):
                    got = run.model(timestep=timestep, **given)
                    assert torch.allclose(got.sample, want, atol=1e-5) and type(got).__name__ == "UNet2DConditionOutput"
                    pair = run.model(timestep=timestep, return_dict=False, **given)
                    assert isinstance(pair, tuple) and torch.equal(first_output(pair), got.sample)
                compared += 1
    assert compared == 8 and "forward" not in run.model.__dict__


def test_identity_quantizers_give_the_float_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 1: float weights, activations that nothing rounds: ranges are those of the float trajectories."""
    head = TIMED.replace("weight = {}, ", "").replace('"conv_in | conv_out" = { weight = { bits = 8 } }\n', "")
    run = execute(tmp_path, text(), head + CALIBRATE.replace("samples = 12", 'samples = "all"') + SPLIT)
    from bitbrush.network.activation import ActivationQuantizer

    monkeypatch.setattr(ActivationQuantizer, "forward", lambda _self, x, _dim: x)
    float_ = fit_of(inputs="float").run_unit(run, "all activations", generator(0, "a", "b")).notes["ranges"]
    ours = fit_of().run_unit(run, "all activations", generator(0, "a", "b")).notes["ranges"]
    compared = 0
    assert ours.keys() == float_.keys()
    for name, want in float_.items():
        assert ours[name]["timesteps"] == want["timesteps"] == list(run.plan.timesteps)
        for key in ("low", "high"):
            assert ours[name][key] == pytest.approx(want[key], rel=2e-4, abs=2e-4)
            compared += len(want[key])
    assert compared == len(float_) * 2 * STEPS > 200


def test_the_first_call_needs_no_progression(tmp_path: Path) -> None:
    """Invariant 2: the row of the noisiest step is that of float trajectories, the last is another."""
    run = execute(tmp_path, text(), TIMED + CALIBRATE.replace("samples = 12", 'samples = "all"') + SPLIT + FIT)
    one = fit_of(inputs="float").run_unit(run, "all activations", generator(0, "a", "b")).tensors
    two = fit_of().run_unit(run, "all activations", generator(0, "a", "b")).tensors
    scales = [name for name in one if name.endswith("/scale")]
    first = [torch.allclose(one[n][-1], two[n][-1], rtol=1e-5) for n in scales]
    last = [torch.allclose(one[n][0], two[n][0], rtol=1e-5) for n in scales]
    assert len(scales) > 30 and all(first) and sum(last) < 0.5 * len(last)


@pytest.mark.parametrize("changed", [0, 2])
def test_causality(changed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 3: other scales at call j change no range of a call up to j, and those of all calls after it."""
    run = prepared(tmp_path, text())
    before = fit_of().run_unit(run, "all activations", generator(0, "a", "b")).notes["ranges"]
    rows_of, count = Fit.rows, len(quantizers(run, "static"))
    seen: list[int] = []

    def spoilt(self: Fit, values: dict[str, Tensor], grids: Any) -> dict[str, tuple[Tensor, Tensor]]:
        seen.append(len(values))
        wrong = 3 if len(seen) - 1 == changed else 1
        return {name: (scale * wrong, zero) for name, (scale, zero) in rows_of(self, values, grids).items()}

    monkeypatch.setattr(Fit, "rows", spoilt)
    after = fit_of().run_unit(run, "all activations", generator(0, "a", "b")).notes["ranges"]
    assert seen == [count] * STEPS
    for call in range(STEPS):
        row = STEPS - 1 - call
        same = [before[n]["high"][row] == after[n]["high"][row] and before[n]["low"][row] == after[n]["low"][row]
                for n in before if "time_emb" not in n]
        assert all(same) if call <= changed else sum(same) < 0.3 * len(same), call


def test_a_run_with_static_tables_beside_and_packing(tmp_path: Path) -> None:
    head = TIMED + '"time_embedding.*" = { activation = { bits = 8 } }\n'
    run = execute(tmp_path, text(), head + CALIBRATE + SPLIT + FIT + PROGRESSIVE + PACK)
    note = next(entry for entry in run.done if entry["step"] == "ranges")
    assert note["trajectories"] == 3 and set(note["ranges"]) == set(quantizers(run))
    rows = {len(t) for n, t in tables(quantizers(run, "static")).items() if n.startswith("time_embedding")}
    assert rows == {1}
    assert all(bool((t != 1).all()) for n, t in tables(quantizers(run, "static")).items() if n.endswith("/scale"))
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) > 30 and all(p["ok"] for p in proofs.values())


def test_resumed_from_the_journal(tmp_path: Path) -> None:
    asked = TIMED + CALIBRATE + SPLIT + FIT + PROGRESSIVE
    first = execute(tmp_path, least_pipeline(), asked)
    again = begin(tmp_path, least_pipeline(), recipe(tmp_path, asked), resume=True)
    again.execute()
    again.journal.release()
    one, two = (tables(quantizers(run, "static")) for run in (first, again))
    assert len(one) > 20 and all(torch.equal(one[n], two[n]) for n in one)


def test_samples_limit_the_trajectories(tmp_path: Path) -> None:
    run = prepared(tmp_path, text())
    counts = [source(run).some(run, samples) for samples in (1, 8, 16, 23, 24, 999)]
    assert counts == [1, 1, 2, 2, 3, 3], "a trajectory has 4 steps of 2 halves"
    assert progressive.walk(fit_of(samples=8), run, generator(0, "a", "b"), set())[1] == 1


def test_final_latents_come_back() -> None:
    pipe = DDIMPipeline(unet=least_pipeline().unet, scheduler=DDIMScheduler())
    made = sample_latents(pipe, None, [torch.Generator().manual_seed(i) for i in range(2)], steps=2, guidance=1.0)
    latents = sample_latents(text(), ["a", "b"], [torch.Generator().manual_seed(i) for i in range(2)], steps=2,
                             guidance=2.0)
    assert made.shape == (2, 8, 8, 1) and latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Fit(do="fit", what="weights", inputs="progressive")
    static = HEAD + CALIBRATE + SPLIT + FIT + PROGRESSIVE
    with pytest.raises(InputError, match="progressive calibration needs") as caught:
        begin(tmp_path, least_pipeline(), recipe(tmp_path, static))
    assert complete(caught.value)
