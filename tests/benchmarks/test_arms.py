"""The runs behind the tables are ones that `quality.py` takes, each is named once, and the runner keeps their order."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bitbrush

Script = Callable[[str], ModuleType]


def test_every_run_is_a_recipe_with_settings_that_it_knows(script: Script) -> None:
    arms, quality = script("arms"), script("quality")
    checked = 0
    for run in arms.bars() + arms.ablations():
        words = run.words()
        flags = {name: words[i + 1] for i, name in enumerate(words) if name in ("--preset", "--correct")}
        settings = quality.parse_set([words[i + 1] for i, name in enumerate(words) if name == "--set"])
        weights, activations = quality.parse_bits(run.bits)
        recipe = bitbrush.read_recipe(run.recipe, preset=flags.get("--preset"), correct=flags.get("--correct"),
                                      weights=weights, activations=activations, settings=settings)  # fmt: skip
        known = {step.label for step in recipe.steps}
        assert all(key.partition(".")[0] in known for key in settings), run.name
        checked += 1
    assert checked > 120


def test_names_are_unique_and_what_is_waited_for_exists(script: Script) -> None:
    runs = script("arms").bars() + script("arms").ablations()
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    waiting = [run for run in runs if run.after]
    assert len(waiting) > 15 and all(run.after in names for run in waiting)
    assert all(names.index(run.after) < names.index(run.name) for run in waiting)


def test_the_tables_find_every_arm_that_their_bars_compare(script: Script) -> None:
    """An arm that a bar names, of a method that is listed here, is one of the runs."""
    arms, text = script("arms"), Path(script("bars").__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'(?:arm|mine)="([a-z0-9-]+)"', text))
    assert len(named) >= 8 and named <= {run.arm for run in arms.bars()}


def runner_of(arms: ModuleType, runs: list[Any], folder: Path, fails: str = "", budget: float = 60.0) -> Any:
    """A runner whose processes are notes in ``order``; the run ``fails`` does."""
    args = argparse.Namespace(budget=budget, gpus=["0"], slots=2, work=folder, zoo=None, out=None, smoke=True)
    runner = arms.Runner(runs, args)
    runner.order, arms.SECONDS = [], 0.01

    def call(run: Any, gpu: str) -> int:
        runner.order.append(run.arm)
        if run.arm != fails:
            (folder / run.facts).parent.mkdir(exist_ok=True)
            (folder / run.facts).write_text("{}")
        return int(run.arm == fails)

    runner.call, runner.log = call, lambda run: Path(__file__)
    return runner


def test_runs_wait_for_the_artifact_they_share_steps_with(script: Script, tmp_path: Path) -> None:
    arms = script("arms")
    first = arms.Run("m", "r", "w4a8", "a")
    runs = [arms.Run("m", "r", "w4a8", "b", after=first.name), first,
            arms.Run("m", "r", "w4a8", "c", after="elsewhere")]
    runner = runner_of(arms, runs, tmp_path)
    assert runner.run() == 0 and sorted(runner.order) == ["a", "b", "c"]
    assert runner.order.index("a") < runner.order.index("b")


def test_what_waits_for_a_failed_run_is_left_out(script: Script, tmp_path: Path) -> None:
    arms = script("arms")
    first = arms.Run("m", "r", "w4a8", "a")
    second = arms.Run("m", "r", "w4a8", "b", after=first.name)
    runs = [arms.Run("m", "r", "w4a8", "c", after=second.name), second, first, arms.Run("m", "r", "w4a8", "d")]
    runner = runner_of(arms, runs, tmp_path, fails="a")
    assert runner.run() == 3 and sorted(runner.order) == ["a", "d"] and not runner.waiting


def test_the_artifact_waited_for_is_the_one_that_is_written(script: Script) -> None:
    arms, quality = script("arms"), script("quality")
    for run in arms.bars() + arms.ablations():
        weights, activations = quality.parse_bits(run.bits)
        seed = run.seeds[0] if run.ablation else 0
        arm = quality.Arm(run.recipe, weights, activations, run.arm, seed)
        assert run.facts == f"{run.model}/{arm.key}.facts.json"


def test_a_slot_is_one_process_and_survives_what_fails(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a slot share a process, a run that fails or kills it does not stop the others, and each has its log."""
    arms = script("arms")
    (tmp_path / "serving.py").write_text(SERVER)
    monkeypatch.setattr(arms, "HERE", tmp_path)
    runs = [arms.Run("m", "r", "w4a8", arm) for arm in ("a", "fails", "b", "dies", "c")]
    args = argparse.Namespace(budget=60.0, gpus=["7"], slots=1, work=tmp_path, zoo=None, out=None, smoke=False)
    runner = arms.Runner(runs, args)
    assert runner.run() == 2 and runner.failed == [runs[1].name, runs[3].name]
    said = {run.arm: runner.log(run).read_text().split() for run in runs}
    assert said["a"] == said["b"] == said["fails"] and said["a"][0] == "7" and said["c"][0] == "7"
    assert said["c"] != said["a"] and all(worker.poll() == 0 for worker in runner.workers.values())


SERVER = """
import json, os, sys
for line in sys.stdin:
    asked = json.loads(line)
    arm = asked["words"][asked["words"].index("--arm") + 1]
    open(asked["log"], "a").write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()}")
    if arm == "dies":
        os._exit(3)
    print(int(arm == "fails"), flush=True)
"""


def test_nothing_begins_after_the_budget(script: Script, tmp_path: Path) -> None:
    arms = script("arms")
    runner = runner_of(arms, [arms.Run("m", "r", "w4a8", "a")], tmp_path, budget=-1.0)
    assert runner.run() == 0 and len(runner.waiting) == 1 and not runner.order


def test_what_has_its_results_where_they_go_is_not_run_again(script: Script, tmp_path: Path) -> None:
    """What another run waits for is, if it has them or not."""
    arms = script("arms")
    args = argparse.Namespace(names=["emoji-sd-dgq-w4a8"], missing=False, do="run", smoke=False, out=tmp_path)
    runs = arms.chosen(args)
    first, second, third = runs[:3]
    assert third.after == first.name
    for run in (first, second):
        for seed in run.seeds:
            (tmp_path / f"{run.name}-s{seed}.json").write_text("{}")
    assert arms.chosen(args) == [run for run in runs if run != second]
