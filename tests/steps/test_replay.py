"""Replay: whose steps are walked, what the targets are, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from bitbrush.engine.journal import generator
from bitbrush.network import wrap
from bitbrush.network.pipelines import sample_latents
from bitbrush.steps import teaching
from bitbrush.steps.replay import Replay
from bitbrush.steps.student import student
from small import FIT, RANGES, SPLIT, TIMED, execute, least_pipeline

PLAIN = '[[step]]\ndo = "calibrate"\nsamples = "all"\ntrajectories = 4\nsteps = 4\nbatch = 3\n'
GUIDED = PLAIN + "guidance = 3.0\n"


def walked(folder: Path, pipe: Any, calibrate: str, share: float = 0.5) -> tuple[Any, Any, Any, Any]:
    """Run, lessons before and after one walk, and the replay."""
    run = execute(folder, pipe, TIMED + calibrate + SPLIT + FIT + RANGES)
    before, lessons = teaching.load(run, 1), teaching.load(run, 1)
    replay = Replay(run, lessons, share, "tune", autocast=False)
    with student(run, {}):
        replay.walk(7)
    return run, before, lessons, replay


@pytest.mark.parametrize(("pipe", "calibrate"), [(least_pipeline, PLAIN), (lambda: tiny.pipeline("text"), GUIDED)],
                         ids=["plain", "guided"])
def test_rows_are_the_students_walk_with_the_float_networks_answers(pipe: Any, calibrate: str, tmp_path: Path) -> None:
    run, before, after, replay = walked(tmp_path, pipe(), calibrate)
    members = list(replay.row_of)
    assert members == [2, 3] and after.table.shape == (4, 4, 2 if calibrate == GUIDED else 1)
    mine = after.table[2:].flatten()
    others = after.table[:2].flatten()
    assert torch.equal(after.sample.data[others], before.sample.data[others])
    assert torch.equal(after.output.data[others], before.output.data[others])
    args, kwargs = after.inputs(mine)
    with torch.no_grad(), wrap.show(run.model, "float"):
        answer = run.model(*args, **kwargs).sample
    torch.testing.assert_close(after.output.data[mine], answer, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.timesteps, before.timesteps)
    # the same walk by the pipeline alone: the sim face from the same noise ends where the rows say
    seeds = [generator(run.seed, "tune 7", f"noise {i}") for i in members]
    prompts = [run.prompts[i] for i in members] if calibrate == GUIDED else None
    seen: list[torch.Tensor] = []
    hook = run.model.register_forward_pre_hook(
        lambda _m, a, k: seen.append((a[0] if a else k["sample"]).clone()), with_kwargs=True)
    with wrap.show(run.model, "sim"):
        sample_latents(run.pipeline, prompts, seeds, steps=4, guidance=3.0)
    hook.remove()
    assert len(seen) == 4
    for step, given in enumerate(seen):
        rows = after.table[2:, step].T.flatten()
        torch.testing.assert_close(after.sample.data[rows], given, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after.sample.data[mine], before.sample.data[mine])


def test_what_is_measured_is_never_replaced(tmp_path: Path) -> None:
    _, _, lessons, replay = walked(tmp_path, least_pipeline(), PLAIN)
    kept = replay.kept()
    still = set(lessons.table[:2].flatten().tolist())
    assert kept.tolist() == [int(row) in still for row in lessons.groups.flatten()] and kept.sum() == 8
    probe = lessons.probe(6, kept)
    assert len(probe) == 6 and bool(kept[probe].all())
    assert len(lessons.moments[probe].unique()) == 4


def test_moments_that_the_tape_does_not_have_are_left_out(tmp_path: Path) -> None:
    some = PLAIN.replace('samples = "all"', "samples = 8")
    _, before, after, replay = walked(tmp_path, least_pipeline(), some)
    there = after.table[list(replay.row_of.values())].flatten()
    assert 0 < int((there >= 0).sum()) < there.numel()
    changed = (after.sample.data != before.sample.data).flatten(1).any(dim=1)
    assert set(changed.nonzero()[:, 0].tolist()) == set(there[there >= 0].tolist())
