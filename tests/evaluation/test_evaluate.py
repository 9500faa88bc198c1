"""Whole evaluations on pipelines small enough to know the answer: drawn once, resumed, complete, refused in time."""

from __future__ import annotations

import json
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbrush
import small
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.progress import Silent
from bitbrush.errors import InputError
from bitbrush.evaluation import EmojiClip, draw, psnr, sampling
from bitbrush.evaluation.asked import METRICS
from bitbrush.evaluation.evaluate import evaluate
from bitbrush.evaluation.extractors import from_module
from bitbrush.evaluation.perceptual import PerceptualDistance
from bitbrush.evaluation.result import OTHER_SEEDS, Evaluation, Missing

QUICK: dict[str, Any] = {"n": 6, "steps": 2, "batch": 4, "progress": None}
PROMPTS = ["red apple", "blue car", "green tree", "a cat", "the sun", "old house"]


@pytest.fixture
def pipes() -> dict[str, Any]:
    """A pipeline, the same with slightly and with clearly wrong weights."""
    return {"fp": tiny.pipeline("unconditional"), "near": wrong(1.001), "far": wrong(1.05)}


def wrong(factor: float) -> Any:
    pipe = tiny.pipeline("unconditional")
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(factor)
    return pipe


class Counted:
    """Counts the pictures that are drawn; the picture numbered ``stop`` kills the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.count, self.stop = 0, stop
        call = sampling._Call._draw

        def counting(of: Any, indices: Any) -> Tensor:
            if self.stop is not None and self.count >= self.stop:
                raise small.Killed
            self.count += len(indices)
            return call(of, indices)

        monkeypatch.setattr(sampling._Call, "_draw", counting)


class Cells(nn.Module):
    """A feature extractor without weights: mean colours of four cells, and logits."""

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        cells = torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1)
        return {"features": cells, "logits": 3 * cells[:, :5]}


def test_numbers_are_those_of_the_pictures(pipes: dict[str, Any]) -> None:
    found = evaluate({"near": pipes["near"], "far": pipes["far"]}, reference=pipes["fp"], metrics=["psnr"], **QUICK)
    theirs, ours = (draw(pipes[name], prompts=None, n=6, steps=2, batch=4) for name in ("fp", "far"))
    expected = psnr(ours, theirs)
    value = found.value("far", "psnr")
    assert value is not None and value.value == pytest.approx(float(expected.mean())) and value.count == 6
    assert found.per_picture["far"]["psnr"][0] == pytest.approx(expected.tolist())
    assert value.low <= value.value <= value.high and value.floor is not None and value.floor < value.value
    assert found.worst["far"] == [int(expected.argmin())] and found.kept[:6] == list(range(6))
    assert torch.equal(found.pictures["far"][:6], ours) and found.prompts == []
    assert found.arms == ["FP", "near", "far"] and found.values["FP"] == []
    assert len(found.timesteps) == 2 and [len(curve) for curve in found.step_errors.values()] == [2, 2]
    assert any("Only 6 pictures" in note for note in found.notes) and "Only 6" in (value.warning or "")


def test_pictures_are_drawn_once_and_another_metric_draws_nothing(
    pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    first = evaluate({"far": pipes["far"]}, reference=pipes["fp"], metrics=["psnr"], work=tmp_path, **QUICK)
    assert counted.count == 3 * 6, "two arms, and full precision with other seeds"
    more = evaluate({"far": wrong(1.05)}, reference=pipes["fp"], metrics=["psnr", "kid", "is"], extractor=Cells(),
                    work=tmp_path, **QUICK)
    assert counted.count == 3 * 6 and more.value("far", "kid") is not None
    assert more.per_picture["far"]["psnr"] == first.per_picture["far"]["psnr"]
    assert more.settings["scheduler"] == first.settings["scheduler"] == "DDPMScheduler"
    evaluate({"far": pipes["near"]}, reference=pipes["fp"], metrics=["psnr"], work=tmp_path, **QUICK)
    assert counted.count == 4 * 6, "another model under the same name is another set"


def test_full_precision_twice_is_noted(pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    found = evaluate({"same": tiny.pipeline("unconditional")}, reference=pipes["fp"], metrics=["psnr"], **QUICK)
    assert counted.count == 2 * 6 and found.value("same", "psnr").value == 100.0  # type: ignore[union-attr]
    assert any("the same numbers as full precision" in note for note in found.notes)
    assert not any(test.significant for test in found.tests) and {t.p for t in found.tests if t.second == "FP"} >= {1.0}


def test_a_killed_run_goes_on(pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate({"far": pipes["far"]}, reference=pipes["fp"], **QUICK)
    counted = Counted(monkeypatch, stop=10)
    with pytest.raises(small.Killed):
        evaluate({"far": pipes["far"]}, reference=pipes["fp"], work=tmp_path, **QUICK)
    counted.stop = None
    resumed = evaluate({"far": pipes["far"]}, reference=pipes["fp"], work=tmp_path, **QUICK)
    assert counted.count == 18 and resumed.to_json() == whole.to_json()


def test_two_runs_give_the_same_numbers(pipes: dict[str, Any]) -> None:
    options = {**QUICK, "metrics": ["psnr", "ssim", "kid", "is", "prdc"], "extractor": Cells(), "seeds": (3, 5)}
    runs = [evaluate({"far": lambda: wrong(1.05)}, reference=pipes["fp"], **options).to_json() for _ in range(2)]
    assert runs[0] == runs[1] and runs[0]["settings"]["floor_seeds"] == [6, 8]
    assert [len(rows) for rows in runs[0]["per_picture"]["far"]["psnr"]] == [6, 6]


def test_one_candidate_at_a_time(pipes: dict[str, Any]) -> None:
    alive: list[int] = []
    now = 0

    def make() -> Any:
        nonlocal now
        now += 1
        alive.append(now)
        pipe = wrong(1.01)

        def gone() -> None:
            nonlocal now
            now -= 1

        weakref.finalize(pipe.unet, gone)
        return pipe

    evaluate({"a": make, "b": make}, reference=pipes["fp"], **QUICK)
    assert alive == [1, 1] and now == 0


def test_a_single_candidate_and_progress(pipes: dict[str, Any], counter: Any) -> None:
    found = evaluate(pipes["far"], reference=pipes["fp"], **{**QUICK, "progress": counter}, floor=False)
    assert found.candidates == ["candidate"] and counter.depth == 0 and counter.done == 12 + 12
    assert found.value("candidate", "psnr").floor is None  # type: ignore[union-attr]
    assert not any(OTHER_SEEDS in (test.first, test.second) for test in found.tests)


def test_tests_of_a_difference(pipes: dict[str, Any]) -> None:
    options = {**QUICK, "n": 24, "batch": 12, "metrics": ["psnr"], "extractor": Cells()}
    found = evaluate({"near": pipes["near"], "far": pipes["far"]}, reference=pipes["fp"], **options)
    tests = {(t.key, t.first, t.second): t for t in found.tests}
    assert set(tests) == {
        ("psnr", "near", "far"), ("features", "near", "FP"), ("features", "far", "FP"),
        ("features_other_seeds", "near", OTHER_SEEDS), ("features_other_seeds", "far", OTHER_SEEDS),
        ("features", OTHER_SEEDS, "FP"),
    }  # fmt: skip
    assert tests["psnr", "near", "far"].significant and tests["psnr", "near", "far"].difference.value > 0
    assert tests["features", "far", "FP"].significant and tests["features", "far", "FP"].prompts == 24
    control = tests["features", OTHER_SEEDS, "FP"]
    assert control.detail["control"] and not control.significant and control.adjusted == control.p
    others = [t for t in found.tests if not t.detail.get("control")]
    assert min(t.adjusted for t in others) == pytest.approx(min(1.0, len(others) * min(t.p for t in others)))
    assert all("Cells" in t.detail["features"] for t in found.tests if t.key.startswith("features"))


def test_distributions(pipes: dict[str, Any]) -> None:
    extractor = from_module(Cells(), name="cells")
    options = {**QUICK, "n": 24, "batch": 12, "metrics": ["fid", "sfid", "kid", "is", "prdc"], "extractor": extractor}
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], **options)
    keys = [value.key for value in found.values["far"]]
    assert keys == ["fid", "kid", "is", "precision", "recall", "density", "coverage"]
    assert [value.key for value in found.values["FP"]] == ["is"]
    fid = found.value("far", "fid")
    assert fid is not None and fid.floor is not None and fid.label == "FID in features of: cells" and fid.count == 24
    assert fid.detail["to_other_seeds"] > 0 and "same noise" in fid.detail["noise"] and fid.warning is None
    assert [m.key for m in found.missing] == ["sfid"] and "spatial" in found.missing[0].what
    assert found.settings["extractor"]["name"] == "cells"


def test_real_pictures_as_the_reference(pipes: dict[str, Any], tmp_path: Path) -> None:
    from bitbrush.cli.pictures import save_pictures

    save_pictures(torch.rand(9, 3, 8, 8) * 2 - 1, tmp_path / "real" / "a.png")
    options = {**QUICK, "metrics": ["kid", "fid"], "extractor": Cells(), "real": tmp_path / "real"}
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], work=tmp_path / "work", **options)
    value = found.value("FP", "kid")
    assert value is not None and "9 pictures of 8x8" in value.detail["reference"] and value.floor is not None
    assert value.warning is not None and "fewer than twice" in value.warning
    again = evaluate({"far": pipes["far"]}, reference=pipes["fp"], work=tmp_path / "work", **options)
    assert again.to_json() == found.to_json()


def test_real_pictures_of_another_resolution_are_refused_early(
    pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitbrush.cli.pictures import save_pictures

    save_pictures(torch.rand(4, 3, 16, 16) * 2 - 1, tmp_path / "a.png")
    counted = Counted(monkeypatch)
    options = {**QUICK, "metrics": ["kid"], "extractor": Cells(), "real": tmp_path}
    with pytest.raises(InputError, match="another resolution") as caught:
        evaluate({"far": pipes["far"]}, reference=pipes["fp"], **options)
    assert small.complete(caught.value) and counted.count == 4, "one part"
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], resize="stretch", **options)
    assert found.value("far", "kid") is not None


def test_text(emoji_tokens: Any, evaluator: EmojiClip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmojiClip, "load", lambda **_: evaluator)
    seen = next(c for c in evaluator.captions if c not in evaluator.heldout)
    prompts = [seen, *PROMPTS[1:]]
    found = evaluate({"q": tiny.quantized_pipeline("text")[0]}, reference=emoji_tokens, prompts=prompts, **QUICK)
    assert found.settings["metrics"] == ["psnr", "ssim", "clip", "r1"], "the model speaks of emoji"
    clip = found.value("q", "clip")
    assert clip is not None and clip.label == "CLIP score by the emoji CLIP" and clip.floor is not None
    assert found.value("FP", "clip") is not None and found.value("FP", "clip_difference") is None
    change = found.value("q", "clip_difference")
    assert change is not None
    assert change.value == pytest.approx(clip.value - found.value("FP", "clip").value, abs=1e-6)  # type: ignore[union-attr]
    assert any("prompts are not emoji captions: they are left out of R@1" in note for note in found.notes)
    assert {(t.key, t.second) for t in found.tests if t.first == "q"} >= {("clip", "FP"), ("features", "FP")}
    assert found.prompts == prompts


@pytest.fixture
def emoji_tokens() -> Any:
    return tiny.pipeline("text")


def test_what_is_missing_does_not_stop_the_others(
    pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics = ["psnr", "ssim", "lpips", "fid", "kid"]
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], metrics=metrics, **QUICK)
    assert found.value("far", "psnr") is not None
    assert {m.key for m in found.missing} == {"lpips", "fid", "kid", "ssim"}, "8x8 pictures are too small for SSIM"
    assert all(m.what and m.where and m.why and m.try_ for m in found.missing)
    assert "weights-inception" in next(m.where or "" for m in found.missing if m.key == "fid")


def test_a_learned_distance_is_named_after_its_weights(pipes: dict[str, Any]) -> None:
    class Distance(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    given = PerceptualDistance("learned distance, test", False, Distance(), 4)
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], metrics=["lpips"], perceptual=given, **QUICK)
    mean, worst = found.value("far", "lpips"), found.value("far", "lpips_worst5")
    assert mean is not None and worst is not None
    assert mean.label == "learned distance, test" and worst.label == "learned distance, test, worst 5 %"
    assert mean.better == "lower" and worst.value == max(found.per_picture["far"]["lpips"][0])
    assert worst.low <= worst.value <= worst.high  # type: ignore[operator]
    assert found.worst["far"][0] == found.per_picture["far"]["lpips"][0].index(worst.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"n": 0}, {"batch": 0}, {"steps": 0}, {"seeds": ()}, {"seeds": (1, 1)}, {"sampler": "euler"}, {"keep": -1},
        {"metrics": ["psnr", "fidd"]}, {"metrics": ["clip"]}, {"candidates": {"FP": None}}, {"candidates": {" ": None}},
        {"candidates": {OTHER_SEEDS: None}},
        {"prompts": ["a"]}, {"candidates": {"x": 3}}, {"candidates": {"x": "no/such/folder"}},
        {"extractor": "no-such-file", "metrics": ["kid"]}, {"extractor": 3, "metrics": ["kid"]},
        {"real": "no-such-folder"}, {"real": 3},
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_drawn(
    bad: dict[str, Any], pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    options = {"candidates": {"far": pipes["far"]}, "reference": pipes["fp"], **QUICK, **bad}
    with pytest.raises(InputError) as caught:
        evaluate(options.pop("candidates"), **options)
    assert small.complete(caught.value) and counted.count == 0
    if bad.get("metrics") == ["psnr", "fidd"]:
        assert "fidd" in str(caught.value.why) and all(name in str(caught.value.why) for name in METRICS)


def test_arms_must_agree(pipes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="different size"):
        evaluate({"small": small_picture()}, reference=pipes["fp"], **QUICK)
    text = tiny.pipeline("text")
    with pytest.raises(InputError, match="do not belong together"):
        evaluate({"text": lambda: text}, reference=pipes["fp"], **QUICK)


def small_picture() -> Any:
    pipe = tiny.pipeline("unconditional")
    pipe.unet.register_to_config(sample_size=16)
    return pipe


def test_cost_and_inside_are_called_as_agreed(pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    def part(name: str, function: str) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, []).append((len(args), sorted(kwargs)))
            return types.SimpleNamespace(to_json=lambda: {"part": name})

        module = types.ModuleType(f"bitbrush.evaluation.{name}")
        setattr(module, function, call)
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)

    part("cost", "measure")
    part("inside", "look")
    found = evaluate({"far": pipes["far"]}, reference=pipes["fp"], speed=True, inside=True, token="red", **QUICK)
    assert found.cost == {"FP": {"part": "cost"}, "far": {"part": "cost"}}
    assert found.inside == {"far": {"part": "inside"}}
    assert calls["cost"][0] == (1, ["autocast", "batch", "folder", "guidance", "progress", "prompts", "steps"])
    assert calls["inside"] == [(2, ["autocast", "guidance", "n", "progress", "prompts", "seed", "steps", "token"])]


def test_a_result_is_evaluated_with_the_kernel_asked_for(tmp_path: Path) -> None:
    pipe, plan = tiny.quantized_pipeline("unconditional")
    given = {"reference": tiny.pipeline("unconditional"), "metrics": ["psnr"], "device": "cpu", **QUICK}
    folder, work = save(pipe, tmp_path / "q", plan), tmp_path / "work"
    plain, fast = (evaluate({"q": folder}, kernel=kernel, work=work, **given) for kernel in ("reference", "auto"))
    assert fast.settings["kernel"] == {"q": "auto"} and "kernel" not in plain.settings
    with pytest.raises(InputError, match="has nothing to compute"):
        evaluate({"q": pipe}, kernel="auto", **given)


def test_the_result_in_all_its_forms(pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bitbrush.evaluate({"fa\x1b[31mr": pipes["far"]}, reference=pipes["fp"], **{**QUICK, "progress": Silent()})
    table = found.table()
    assert repr(table) == str(table) and "PSNR, dB" in table and "noise floor" in table and "(control)" in table
    assert "\x1b" not in table and "\\u001b" in table
    data = found.to_json(tmp_path / "new" / "e.json")
    stored = json.loads((tmp_path / "new" / "e.json").read_text())
    assert stored == json.loads(json.dumps(data)) and Evaluation.from_json(stored).to_json() == data
    written: list[Any] = []
    write = lambda *args: written.append(args) or args[0]  # noqa: E731
    monkeypatch.setattr(bitbrush.report, "write_evaluation", write, raising=False)
    assert found.save(tmp_path / "r.html", {"model": "m"}) == tmp_path / "r.html"
    assert written == [(tmp_path / "r.html", found, {"model": "m"})]
    found.missing.append(Missing("fid", "weights <b>are</b> missing", None, None, None))
    assert "not computed: fid: weights" in found.table()


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
