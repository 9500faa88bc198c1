"""Calibration: which moments, from which trajectories, and that each sample is what the sampler saw."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

import tiny
from bitbrush.errors import InputError
from bitbrush.steps import calibrate
from bitbrush.steps.calibrate import Calibrate
from small import CALIBRATE, HEAD, begin, complete, execute, least_pipeline, recipe


def step(**choices: Any) -> Calibrate:
    return Calibrate(do="calibrate", id="calibrate", **choices)


def schedule(pipe: Any, seed: int = 0, **choices: Any) -> list[set[int]]:
    run: Any = SimpleNamespace(pipeline=pipe, seed=seed)
    return step(**choices).schedule(run)


def counts(plan: list[set[int]]) -> Counter[int]:
    return Counter(moment for one in plan for moment in one)


def text(**choices: Any) -> str:
    keys = {"samples": 12, "trajectories": 4, "steps": 3, "batch": 2, **choices}
    body = "".join(f"{k} = {v!r}\n" for k, v in keys.items())
    return HEAD + '[[step]]\ndo = "calibrate"\n' + body.replace("'", '"')


# ---- the schedule ------------------------------------------------------------------------------------------------
def test_uniform_counts_are_equal() -> None:
    ran = 0
    pipe = least_pipeline()
    for steps, samples, trajectories in ((5, 20, 4), (5, 40, 8), (25, 50, 3), (10, 10, 1), (7, 49, 7), (1, 6, 6)):
        plan = schedule(pipe, steps=steps, samples=samples, trajectories=trajectories)
        assert len(plan) == trajectories
        assert counts(plan) == dict.fromkeys(range(steps), samples // steps)
        sizes = [len(one) for one in plan]
        assert max(sizes) - min(sizes) <= 1 + (samples % trajectories > 0), "no trajectory gives all"
        ran += 1
    for steps, samples in ((25, 512), (7, 20), (30, 8)):  # where it does not divide: strided, within one
        found = counts(schedule(pipe, steps=steps, samples=samples, trajectories=64))
        values = [found[i] for i in range(steps)]
        assert sum(values) == samples and max(values) - min(values) <= 1
        ran += 1
    assert ran == 9


def test_guidance_halves_the_moments() -> None:
    pipe = tiny.pipeline("text")
    for guidance, moments in ((4.0, 10), (1.0, 20)):
        plan = schedule(pipe, steps=5, samples=20, trajectories=5, guidance=guidance)
        assert sum(counts(plan).values()) == moments


def test_normal_times_are_the_clamped_normal() -> None:
    """Mean and spread of the clean-side index, so that a mirrored t would be seen."""
    pipe, ran = least_pipeline(), 0
    for mean, std in ((0.4, 0.4), (0.2, 0.1), (0.7, 0.2)):
        steps, n = 50, 6000
        plan = schedule(pipe, steps=steps, samples=n, trajectories=1500, times="normal", mean=mean, std=std)
        found = counts(plan)
        clean = torch.tensor([steps - 1 - moment for moment in found.elements()], dtype=torch.float)
        draw = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
        want = (draw * std * steps + mean * steps).floor().clamp(0, steps - 1)
        assert len(clean) == n and min(found) >= 0 and max(found) < steps
        assert abs(clean.mean() - want.mean()) < 0.03 * steps and abs(clean.std() - want.std()) < 0.03 * steps
        if mean != 0.5:
            assert abs(clean.mean() - (steps - 1 - want.mean())) > 0.03 * steps  # not mirrored
        ran += 1
    assert ran == 3
    same = [schedule(pipe, seed=s, steps=9, samples=30, trajectories=9, times="normal") for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_too_few_trajectories() -> None:
    with pytest.raises(InputError) as caught:
        schedule(least_pipeline(), steps=3, samples=10, trajectories=3)
    assert "--set calibrate.trajectories=6" in (caught.value.try_ or "") and caught.value.where == "step calibrate"
    schedule(least_pipeline(), steps=3, samples=9, trajectories=3)
    with pytest.raises(InputError):  # many normal times at the clamped end
        schedule(least_pipeline(), steps=5, samples=40, trajectories=9, times="normal", mean=0.0, std=0.01)


def test_fewer_samples_than_trajectories(tmp_path: Path) -> None:
    """Batches from which nothing is kept are not drawn."""
    run = execute(tmp_path, least_pipeline(), text(samples=2, trajectories=8, batch=2))
    assert len(run.tape) == 2 and len(run.done) == 1


# ---- the samples -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text", "unconditional"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_each_sample_is_what_the_network_answered(kind: tiny.Kind, guidance: float, tmp_path: Path) -> None:
    pipe = tiny.pipeline(kind)
    run = execute(tmp_path, pipe, text(guidance=guidance))
    assert len(run.tape) == 12
    ran = 0
    for batch in run.tape.batches(1):
        args, kwargs = run.tape.inputs(batch)
        with torch.no_grad():
            again = tiny.pipeline(kind).unet(*args, **kwargs).sample
        assert torch.allclose(again, batch["output"], atol=1e-5)
        with torch.no_grad():
            shifted = tiny.pipeline(kind).unet(args[0], args[1] - 300, **kwargs).sample
        assert not torch.allclose(shifted, batch["output"], atol=1e-5)
        ran += 1
    assert ran == 12
    keys = {"sample", "timestep", "output", "trajectory", "half"}
    assert set(next(run.tape.batches(1))) == keys | ({"encoder_hidden_states"} if kind == "text" else set())


def test_both_halves_with_their_own_condition(tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.pipeline("text"), text(samples=18))
    rows = [{k: v[0] for k, v in b.items()} for b in run.tape.batches(1)]
    keys = [(float(r["timestep"]), tuple(r["sample"].flatten()[:6].tolist())) for r in rows]
    assert len(rows) == 18 and set(Counter(keys).values()) == {2}  # the same x_t and t twice
    empties = 0
    for key in set(keys):
        a, b = (r for r, k in zip(rows, keys, strict=True) if k == key)
        assert not torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])
        empties += 1
    unconditional = Counter(tuple(r["encoder_hidden_states"].flatten()[:40].tolist()) for r in rows)
    assert empties == 9 and unconditional.most_common(1)[0][1] == 9  # one empty prompt for all, a prompt for each


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_samples_know_their_trajectory_and_half(guidance: float, tmp_path: Path) -> None:
    """The trajectory is told from its prompt, the unconditional half from the empty one; numbers count over batches."""
    pipe = tiny.pipeline("text")
    halves = 2 if guidance > 1 else 1
    run = execute(tmp_path, pipe, text(samples=12 * halves, trajectories=4, batch=3, guidance=guidance))
    empty, *asked = (pipe.encode_prompt([p], "cpu", 1, False)[0][0] for p in ("", *run.prompts[:4]))
    seen, ran = Counter[tuple[int, int]](), 0
    for batch in run.tape.batches(1):
        number, half = int(batch["trajectory"]), int(batch["half"])
        want = empty if halves == 2 and half == 0 else asked[number]
        assert torch.allclose(batch["encoder_hidden_states"][0], want, atol=1e-5), (number, half)
        assert {batch[k].dtype for k in ("trajectory", "half")} == {torch.int64}
        seen[number, half] += 1
        ran += 1
    assert ran == 12 * halves and seen == {(i, h): 3 for i in range(4) for h in range(halves)}
    table = run.tape.table()
    assert table.shape == (4, 3, halves) and sorted(table.flatten().tolist()) == list(range(ran))


def test_the_table_walks_along_trajectories(tmp_path: Path) -> None:
    """Over several shards: x_t and the answer of one entry, put through the scheduler, give x_t of the next."""
    pipe = least_pipeline()
    run = execute(tmp_path, pipe, text(samples=15, trajectories=3, steps=5, batch=2))
    rows, ran = list(run.tape.batches(1)), 0
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    table = run.tape.table()
    assert table.shape == (3, 5, 1) and len(run.tape.shards) == 2
    for number, walk in enumerate(table[:, :, 0].tolist()):
        assert [float(rows[i]["timestep"]) for i in walk] == [float(t) for t in scheduler.timesteps]
        for i, j in itertools.pairwise(walk):
            now, after = rows[i], rows[j]
            assert int(now["trajectory"]) == int(after["trajectory"]) == number
            stepped = scheduler.step(
                now["output"], int(now["timestep"]), now["sample"], eta=0.0, use_clipped_model_output=True
            )
            assert torch.allclose(stepped.prev_sample, after["sample"], atol=1e-5)
            ran += 1
    assert ran == 12


def test_two_calibrations_do_not_share_trajectories(tmp_path: Path) -> None:
    again = text(samples=4, trajectories=2, steps=2, batch=2).removeprefix(HEAD)
    run = execute(tmp_path, least_pipeline(), text(samples=6, trajectories=2, steps=3, batch=2)
                  + again.replace('do = "calibrate"', 'do = "calibrate"\nid = "more"'))
    table = run.tape.table()
    times = run.tape.column("timestep").unique()
    assert table.shape == (4, len(times), 1) and sorted(table[table >= 0].tolist()) == list(range(10))
    assert (table[:2] >= 0).sum() == 6 and (table[2:] >= 0).sum() == 4


def test_samples_lie_on_the_pipelines_own_trajectory(tmp_path: Path) -> None:
    """x_t of one trajectory and its outputs, put through the scheduler, give the next x_t."""
    pipe = least_pipeline()
    run = execute(tmp_path, pipe, text(samples=5, trajectories=1, steps=5, batch=1))
    rows = list(run.tape.batches(1))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    assert [float(r["timestep"]) for r in rows] == [float(t) for t in scheduler.timesteps]
    for now, after in itertools.pairwise(rows):
        stepped = scheduler.step(
            now["output"], int(now["timestep"]), now["sample"], eta=0.0, use_clipped_model_output=True
        )
        assert torch.allclose(stepped.prev_sample, after["sample"], atol=1e-5)
    assert len(rows) == 5


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_other_schedulers(scheduler: Any, tmp_path: Path) -> None:
    """Some come to a timestep twice (PNDM, Heun), some have fractional ones: still as many samples from each."""
    pipe = tiny.pipeline("text")
    extra = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **extra)
    pipe.scheduler.set_timesteps(6)
    visited = [float(t) for t in pipe.scheduler.timesteps]
    distinct = list(dict.fromkeys(visited))
    run = execute(tmp_path, pipe, text(samples=4 * len(distinct), trajectories=4, steps=6, batch=4))
    found = Counter(float(t) for b in run.tape.batches() for t in b["timestep"])
    assert found == dict.fromkeys(distinct, 4), (found, visited)
    assert len(distinct) >= 6 and (len(distinct) < len(visited)) == (
        scheduler in (PNDMScheduler, HeunDiscreteScheduler)
    )


def test_batches_of_trajectories_change_no_sample(tmp_path: Path) -> None:
    """The noise belongs to the trajectory, not to the batch."""
    tapes = []
    for batch in (1, 3):
        (tmp_path / str(batch)).mkdir()
        run = execute(tmp_path / str(batch), least_pipeline(), text(batch=batch, samples=9))
        rows = sorted((float(b["timestep"]), b["sample"].flatten().tolist()) for b in run.tape.batches(1))
        tapes.append(torch.tensor([[t, *x] for t, x in rows]))
    assert torch.allclose(tapes[0], tapes[1], atol=1e-4) and len(tapes[0]) == 9


def test_units_are_bounded_pieces(tmp_path: Path) -> None:
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, text(trajectories=5, samples=10, batch=2)))
    assert run.recipe.steps[0].units(run) == ["trajectories 0-1", "trajectories 2-3", "trajectories 4-4"]
    assert run.recipe.prompts_needed() == 5 and CALIBRATE
    run.journal.release()


def test_fewer_prompts_than_trajectories_serve_again_with_other_noise(tmp_path: Path) -> None:
    pipe = tiny.pipeline("text")
    choices = {"trajectories": 6, "samples": 12, "batch": 3, "steps": 2, "prompts": 2, "guidance": 1.0}
    run = begin(tmp_path, pipe, recipe(tmp_path, text(**choices)))
    run.prompts = run.prompts[:4]
    assert run.recipe.prompts_needed() == 2
    run.execute()
    batches = list(run.tape.batches())
    batch = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    first = batch["timestep"] == batch["timestep"].max()
    order = batch["trajectory"][first].argsort()
    noise, condition = (batch[k][first][order] for k in ("sample", "encoder_hidden_states"))
    assert len(noise) == 6 and len({tuple(x.flatten().tolist()) for x in noise}) == 6
    assert torch.equal(condition[:2], condition[4:]) and len({tuple(c.flatten().tolist()) for c in condition}) == 4
    run.journal.release()


def test_fewer_prompts_than_are_wanted_are_refused(tmp_path: Path) -> None:
    run = begin(tmp_path, tiny.pipeline("text"), recipe(tmp_path, text(trajectories=6, prompts=5)))
    run.prompts = run.prompts[:4]
    with pytest.raises(InputError, match="5 prompts are needed, 4 are there") as caught:
        run.execute()
    assert complete(caught.value)
    run.journal.release()


def test_how_many_run_together_follows_from_device_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe says; else few on a CPU, and on a GPU as many as the model's outputs leave room for."""
    run = execute(tmp_path, least_pipeline(), text(samples=2, trajectories=4))
    step = Calibrate(do="calibrate", trajectories=200)
    assert Calibrate(do="calibrate", batch=5).together(run) == 5 and step.together(run) == calibrate.FEWEST
    assert step.units(run)[0] == "trajectories 0-15"
    monkeypatch.setattr(run, "device", torch.device("cuda"))
    found = []
    for room in (1 << 40, 40_000_000, 1):
        monkeypatch.setattr(calibrate, "ROOM", room)
        found.append(step.together(run))
    assert found[0] == calibrate.MOST and found[-1] == calibrate.FEWEST and sorted(found, reverse=True) == found
