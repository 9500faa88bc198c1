"""A whole comparison, on pipelines small enough to know the answer."""

from __future__ import annotations

import json

import pytest
import torch

from bitbrush.errors import InputError
from bitbrush.evaluation import Comparison, compare, psnr, trajectory


def test_an_equal_pipeline_costs_nothing(result: Comparison) -> None:
    same = result.metrics["same"]
    assert same["psnr"].to_json() == {"value": 100.0, "low": 100.0, "high": 100.0}
    assert same["ssim"].value == pytest.approx(1.0)
    assert all(step.value == 0 for step in result.step_errors["same"])


def test_a_worse_pipeline_is_measured(result: Comparison) -> None:
    worse = result.metrics["worse"]
    assert worse["psnr"].low <= worse["psnr"].value <= worse["psnr"].high < 100
    assert worse["psnr_worst5"].value <= worse["psnr"].value
    curve = [step.value for step in result.step_errors["worse"]]
    assert len(curve) == len(result.timesteps) == 3 and curve[0] == 0 and 0 < curve[1] < curve[2]
    gain = result.paired("psnr", "same", "worse")
    assert gain.value == pytest.approx(100 - worse["psnr"].value)


def test_step_errors_are_relative_distances_of_the_trajectories(ddim, worse, result: Comparison) -> None:
    ratios = []
    for seed in (0, 1):
        theirs, ours = (trajectory(p, prompts=None, n=5, seed=seed, steps=3, batch=2)[1] for p in (ddim, worse))
        ratios.append((ours - theirs).flatten(2).norm(dim=2) / theirs.flatten(2).norm(dim=2))
    expected = torch.stack(ratios).mean(dim=(0, 2)).tolist()
    assert [step.value for step in result.step_errors["worse"]] == pytest.approx(expected, rel=1e-4)


def test_values_are_those_of_the_kept_pictures(result: Comparison) -> None:
    kept = result.pictures
    assert kept["FP"].shape == kept["worse"].shape == (5, 3, 16, 16)
    expected = psnr(kept["worse"], kept["FP"]).tolist()
    assert result.per_picture["worse"]["psnr"][0] == pytest.approx(expected)
    assert [len(seed) for seed in result.per_picture["worse"]["psnr"]] == [5, 5]


def test_json_round_trip(result: Comparison) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    again = Comparison.from_json(data)
    assert again.to_json() == result.to_json() and again.pictures == {}
    assert result.candidates == ["same", "worse"]
    assert data["settings"]["seeds"] == [0, 1] and data["settings"]["guidance"] is None
    assert set(data["seconds_per_picture"]) == {"FP", "same", "worse"}


def test_few_pictures_are_noted(result: Comparison) -> None:
    assert any("Only 5 pictures" in note for note in result.notes)


def test_deterministic(ddim, worse, result: Comparison) -> None:
    again = compare(ddim, {"same": ddim, "worse": worse}, prompts=None, n=5, seeds=(0, 1), steps=3, batch=2)
    assert again.metrics == result.metrics


def test_emoji_scores_and_strange_prompts(emoji, evaluator, counter) -> None:
    prompts = ["superhero", "a cathedral at night"]
    found = compare(
        emoji, {"same": emoji}, prompts=prompts, n=2, steps=2, batch=2, evaluator=evaluator, keep=1, progress=counter
    )
    assert found.metrics["same"]["clip_difference"].value == 0
    assert "clip_difference" not in found.metrics["FP"] and "clip" in found.metrics["FP"]
    assert "r1_seen" in found.metrics["FP"] and "r1_heldout" not in found.metrics["FP"]
    assert any("1 of 2 prompts are not emoji captions" in note for note in found.notes)
    assert found.prompts == ["superhero"] and len(found.pictures["same"]) == 1
    assert (counter.total, counter.done, counter.depth) == (4, 8, 0), "four are drawn, then four are measured"


def test_no_evaluator_no_score(emoji) -> None:
    found = compare(emoji, {}, prompts=["superhero"], n=1, steps=1)
    assert found.metrics == {"FP": {}}


def test_ddim_sampler(ddpm) -> None:
    found = compare(ddpm, {"same": ddpm}, prompts=None, n=2, steps=2, sampler="ddim")
    assert found.settings["scheduler"] == "DDIMScheduler" and found.metrics["same"]["psnr"].value == 100


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"seeds": ()}, {"sampler": "euler"}, {"baseline": "other"}, {"candidates": {"FP": None}}]
)
def test_wrong_settings_are_refused_before_anything_is_drawn(ddim, wrong) -> None:
    arguments = {"candidates": {"same": ddim}, "prompts": None, "n": 2, "steps": 1} | wrong
    with pytest.raises(InputError, match="cannot be made"):
        compare(ddim, arguments.pop("candidates"), **arguments)


def test_arms_must_fit_the_prompts_and_each_other(ddim, ddpm, emoji) -> None:
    with pytest.raises(InputError, match="prompts do not belong"):
        compare(ddim, {}, prompts=["superhero"], n=1, steps=1)
    with pytest.raises(InputError, match="prompts do not belong"):
        compare(ddim, {"text": emoji}, prompts=None, n=1, steps=1)
    ddpm.scheduler.register_to_config(timestep_spacing="trailing")
    with pytest.raises(InputError, match="different timesteps"):
        compare(ddim, {"other": ddpm}, prompts=None, n=1, steps=2)


def test_unknown_paired_metric(result: Comparison) -> None:
    with pytest.raises(InputError, match="picture by picture"):
        result.paired("clip", "same", "worse")


def test_pictures_are_finite_numbers(result: Comparison) -> None:
    assert all(bool(torch.isfinite(p).all()) for p in result.pictures.values())
