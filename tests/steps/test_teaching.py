"""Batches from the tape: whole windows, every row once, the tape's own values, conditions kept once each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.steps import teaching
from small import HEAD, begin, complete, execute, least_pipeline, recipe

GUIDED = '[[step]]\ndo = "calibrate"\nsamples = 32\ntrajectories = 4\nsteps = 4\nbatch = 2\n'
PLAIN = '[[step]]\ndo = "calibrate"\nsamples = 20\ntrajectories = 4\nsteps = 5\nbatch = 3\n'
SPARSE = PLAIN.replace("samples = 20", "samples = 7")


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return execute(tmp_path_factory.mktemp("guided"), tiny.pipeline("text"), HEAD + GUIDED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return execute(tmp_path_factory.mktemp("plain"), least_pipeline(), HEAD + PLAIN)


def rows_of(run: Run) -> dict[str, torch.Tensor]:
    batches = list(run.tape.batches())
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


# ---- windows -----------------------------------------------------------------------------------------------------
def test_windows_are_whole_and_do_not_overlap() -> None:
    table = torch.arange(3 * 20 * 2).reshape(3, 20, 2)
    groups, moments = teaching.windows(table, 2)
    assert groups.shape == (30, 2, 2) and moments.bincount().tolist() == [3] * 10, "10 a trajectory of 20 steps"
    assert sorted(groups.flatten().tolist()) == list(range(120)), "every row exactly once"
    assert torch.equal(groups[10 + 3], table[1, 6:8]) and int(moments[13]) == 3


def test_windows_with_gaps() -> None:
    table = torch.arange(2 * 7 * 1).reshape(2, 7, 1)
    table[0, 3] = -1
    groups, moments = teaching.windows(table, 3)
    assert groups.squeeze(-1).tolist() == [[0, 1, 2], [8, 9, 10], [11, 12, 13]] and moments.tolist() == [0, 0, 1]
    every = teaching.windows(torch.arange(4 * 25).reshape(4, 25, 1), 2)[0].flatten() % 25
    assert every.bincount().tolist() == [2] + [4] * 23 + [2], "the last step too, in the windows of every other one"
    assert len(teaching.windows(table, 7)[0]) == 1 and len(teaching.windows(table, 8)[0]) == 0
    both = torch.arange(8).reshape(1, 4, 2)
    both[0, 1, 1] = -1
    assert teaching.windows(both, 1)[0].tolist() == [[[0, 1]], [[4, 5]], [[6, 7]]], "half a step is no group"


# ---- rows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [1 << 30, 3000, 0])
@pytest.mark.parametrize("window", [1, 2])
def test_rows_are_the_tapes(guided: Run, window: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "memory", memory)
    lessons, tape = teaching.load(guided, window), rows_of(guided)
    table = guided.tape.table()
    assert lessons.groups.shape == (16 // window, window, 2) and lessons.halves == 2 and lessons.width == 2 * window
    looked = 0
    for g in range(len(lessons)):
        rows = lessons.rows(torch.tensor([g]))
        trajectory, moment = divmod(g, 4 // window)
        want = table[trajectory, moment * window : (moment + 1) * window].flatten()
        (sample, timestep), kwargs = lessons.inputs(rows)
        assert torch.equal(sample, tape["sample"][want]) and torch.equal(timestep, tape["timestep"][want])
        assert torch.equal(kwargs["encoder_hidden_states"], tape["encoder_hidden_states"][want])
        assert torch.equal(lessons.output.take(rows), tape["output"][want])
        assert torch.equal(sample[0::2], sample[1::2]) and set(kwargs) == {"encoder_hidden_states"}
        assert int(lessons.moments[g]) == moment and (timestep.diff() <= 0).all()
        looked += 1
    assert looked == 16 // window
    assert len(lessons.conditions["encoder_hidden_states"]) == 5, "four prompts and the empty one, once each"
    stores = (lessons.sample, lessons.output, *lessons.conditions.values())
    assert any(store._file is not None for store in stores) is (memory < 1 << 30) and len(stores) == 3


def test_only_rows_of_whole_windows_are_kept(plain: Run) -> None:
    lessons = teaching.load(plain, 2)
    assert len(lessons) == 8 and len(lessons.sample) == len(lessons.timesteps) == 16
    assert sorted(lessons.groups.flatten().tolist()) == list(range(16)) and not lessons.conditions
    assert len(teaching.load(plain, 1)) == 20 and len(teaching.load(plain, 5)) == 4


def test_a_limit_on_samples(plain: Run) -> None:
    lessons = teaching.load(plain, 5, limit=15)
    assert len(lessons) == 3 and torch.equal(lessons.sample.take(torch.arange(15)), rows_of(plain)["sample"][:15])


@pytest.mark.parametrize(("text", "window"), [(PLAIN, 6), (SPARSE, 4)])
def test_no_whole_window(text: str, window: int, tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), HEAD + text)
    with pytest.raises(InputError, match=f"{window} consecutive sampling steps") as caught:
        teaching.load(run, window)
    assert complete(caught.value)


def test_without_calibration(tmp_path: Path) -> None:
    run: Any = begin(tmp_path, least_pipeline(), recipe(tmp_path, HEAD))
    with pytest.raises(InputError, match="no calibration samples"):
        teaching.load(run, 1)
    run.journal.release()


# ---- order -------------------------------------------------------------------------------------------------------
def test_shuffled_takes_every_group_in_turn(plain: Run) -> None:
    lessons = teaching.load(plain, 1)
    index = lessons.schedule(10, 4, "shuffled", torch.Generator().manual_seed(1))
    assert index.shape == (10, 4) and index.flatten().bincount().tolist() == [2] * 20
    assert torch.equal(index, lessons.schedule(10, 4, "shuffled", torch.Generator().manual_seed(1)))
    assert not torch.equal(index, lessons.schedule(10, 4, "shuffled", torch.Generator().manual_seed(2)))
    assert all(len(set(row)) == 4 for row in index.tolist())
    assert lessons.schedule(3, 99, "shuffled", torch.Generator()).shape == (3, 20), "not more than there are"


def test_sequential_goes_from_noisy_to_clean(plain: Run) -> None:
    lessons = teaching.load(plain, 1)
    index = lessons.schedule(12, 3, "sequential", torch.Generator().manual_seed(1))
    moments = lessons.moments[index]
    assert index.shape == (12, 3) and (moments == moments[:, :1]).all(), "one timestep an iteration"
    visited = moments[:, 0].tolist()
    assert visited == sorted(visited) and set(visited) == {0, 1, 2, 3, 4}
    times = lessons.timesteps[lessons.rows(index.flatten())].view(12, 3)
    assert (times.diff(dim=0) <= 0).all() and float(times[0, 0]) > float(times[-1, 0])
    assert lessons.schedule(2, 3, "sequential", torch.Generator()).shape == (2, 3), "fewer iterations than timesteps"


def test_the_probe_is_spread_over_time(plain: Run) -> None:
    lessons = teaching.load(plain, 1)
    for count, want in ((5, [0, 1, 2, 3, 4]), (10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (99, sorted([0, 1, 2, 3, 4] * 4))):
        assert lessons.moments[lessons.probe(count)].tolist() == want
    assert len(lessons.probe(1)) == 1 and len(teaching.load(plain, 5).probe(1)) == 1


# ---- held out ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_trajectories_that_are_held_out_are_measured_and_not_trained_on(order: Any, window: int, plain: Run) -> None:
    lessons = teaching.load(plain, window, held_out=0.3)
    mine = set(lessons.table[0].flatten().tolist())
    assert lessons.held_out == 1
    assert [bool(h) for h in lessons.held] == [bool(set(g.flatten().tolist()) & mine) for g in lessons.groups]
    index = lessons.schedule(40, 3, order, torch.Generator().manual_seed(0))
    assert set(index.flatten().tolist()) == set((~lessons.held).nonzero()[:, 0].tolist())
    probe = lessons.probe(99)
    assert sorted(probe.tolist()) == lessons.held.nonzero()[:, 0].tolist() and len(probe) == 5 // window


def test_none_is_held_out_where_a_timestep_would_lose_its_last_group(tmp_path: Path, plain: Run) -> None:
    sparse = execute(tmp_path, least_pipeline(), HEAD + SPARSE)
    assert teaching.load(sparse, 1, held_out=0.5).held_out == 0
    for share, want in ((0.0, 0), (0.24, 0), (0.5, 2), (0.99, 3)):
        lessons = teaching.load(plain, 1, held_out=share)
        assert (lessons.held_out, int(lessons.held.sum())) == (want, 5 * want)
    assert len(teaching.load(plain, 1).probe(99)) == 20, "then everything may be measured"
