"""Finetuning whole runs: what may move, what may not, never worse than the start, and the same bytes after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bitbrush.engine.journal import generator
from bitbrush.engine.progress import Silent
from bitbrush.engine.run import Run
from bitbrush.errors import NumericsError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.pipelines import sample_latents
from bitbrush.steps import loop, teaching
from bitbrush.steps.finetune import PRESETS, Finetune
from bitbrush.steps.losses import Objective
from bitbrush.steps.student import student
from small import (
    FIT,
    HEAD,
    PACK,
    RANGES,
    SPLIT,
    TIMED,
    WALKS,
    begin,
    complete,
    execute,
    killed_and_resumed,
    least_pipeline,
    loops_made,
    note,
    recipe,
    resumed,
)

W4A4 = HEAD.replace("activations = 8", "activations = 4")
GUIDED = WALKS.replace("trajectories = 4", "trajectories = 2\nguidance = 3.0")
START = WALKS + SPLIT + FIT + RANGES
LORA = {
    "weights": "lora", "rank": 4, "scale_aware": "rate", "lr_weights": 0.05, "lr_scales": 0.01, "iterations": 12,
    "batch": 4, "evaluate_every": 6, "checkpoint": 4,
}
FULL = {**LORA, "weights": "full", "lr_weights": 2e-3, "scale_aware": "none", "bias": True, "rounding": "offset"}


def tune(base: dict[str, Any] = LORA, **changes: Any) -> str:
    """The step as TOML."""
    lines = []
    for key, value in {"id": "tune", **base, **changes}.items():
        table = "{ " + ", ".join(f"{k} = {v}" for k, v in value.items()) + " }" if isinstance(value, dict) else ""
        lines.append(f"{key} = {table or json.dumps(value)}")
    return '[[step]]\ndo = "finetune"\n' + "\n".join(lines) + "\n"


def contents(run: Run) -> dict[str, Tensor]:
    """Every number of the quantized network and of its teacher."""
    found: dict[str, Tensor] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for name, layer in run.layers().items():
        found |= {f"{name}/codes": layer.stored_codes().clone(), f"{name}/scale": layer.weight_scale.clone(),
                  f"{name}/zero_point": layer.weight_zero_point.clone()}
        bias = layer.trained_bias if layer.trained_bias is not None else layer.bias
        if bias is not None:
            found[f"{name}/bias"] = bias.detach().clone()
    for name, module in run.model.named_modules():
        if isinstance(module, ActivationQuantizer):
            found |= {f"{name}/scale": module.scale.clone(), f"{name}/zero_point": module.zero_point.clone()}
    return found


def changed(a: Run, b: Run) -> set[str]:
    """Names of what differs between two runs."""
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys() and len(one) > 60
    return {name for name in one if not torch.equal(one[name], two[name])}


def pair(folder: Path, head: str, start: str, *steps: str, pipe: Any = least_pipeline) -> list[Run]:
    """Runs of the same model with ever more steps: without any, with the first, with the first two ..."""
    runs = []
    for count in range(len(steps) + 1):
        (folder / str(count)).mkdir()
        runs.append(execute(folder / str(count), pipe(), head + start + "".join(steps[:count])))
    return runs


def plain() -> Any:
    return tiny.pipeline("unconditional")


def text() -> Any:
    return tiny.pipeline("text")


# ---- it trains ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", [LORA, FULL], ids=["lora", "full"])
def test_the_loss_falls_at_w4a4(base: dict[str, Any], tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), TIMED + START + tune(base, iterations=40))
    found = note(run)
    assert found["kept"] == "trained" and found["loss_end"] < 0.8 * found["loss_start"] and found["best_at"] > 0
    assert found["losses"]["output"] == [found["loss_start"], found["loss_end"]]
    assert 0 < found["codes_changed"] < 0.5 and found["groups"] == found["rows"] == 16
    assert found["trained"] > 100 and found["trained_share"] > 0
    json.dumps(run.done, allow_nan=False)
    for module in run.model.modules():
        assert getattr(module, "trial_weight", None) is None and getattr(module, "trial_scale", None) is None
    assert all(p.requires_grad for p in run.model.parameters()), "as the pipeline came"


def test_the_networks_answer_after_hardening_is_that_of_the_best_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss measured on relaxed weights is, bit for bit, that of the stored codes."""
    seen: dict[int, float] = {}
    look = loop._Loop.look

    def spy(self: Any, probe: Any, iteration: int) -> float:
        seen[iteration] = look(self, probe, iteration)
        return seen[iteration]

    monkeypatch.setattr(loop._Loop, "look", spy)
    text_ = TIMED + START + tune(iterations=12, evaluate_every=5, weight_scale=True, zero_points=True, bias=True)
    found = note(execute(tmp_path, least_pipeline(), text_))
    assert sorted(seen) == [0, 5, 10, 12] and found["best_at"] == min(seen, key=lambda k: seen[k])
    assert found["loss_end"] == float(f"{min(seen.values()):.6g}") and found["loss_start"] == float(f"{seen[0]:.6g}")


def test_all_parts_of_mpqdm_together(tmp_path: Path) -> None:
    """Guided estimate and relations over windows of two steps; adapters a tap; scales and zero-points a timestep."""
    step = tune(adapter="tap", weight_scale=True, zero_points=True, window=2, losses={"guided": 1.0, "relation": 25.0},
                relation_pool=4, iterations=8, frozen="conv_in | conv_out | time_embedding.*")
    before, after = pair(tmp_path, TIMED, GUIDED + SPLIT + FIT + RANGES, step, pipe=text)
    found = note(after)
    assert found["groups"] == 4 and found["rows"] == 16 and set(found["losses"]) == {"guided", "relation"}
    total = found["losses"]["guided"][1] + 25 * found["losses"]["relation"][1]
    assert found["kept"] == "trained" and found["loss_end"] == pytest.approx(total, rel=1e-4)
    moved = changed(before, after)
    assert {name.rpartition("/")[2] for name in moved} >= {"codes", "scale"}
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding")) for name in moved)


# ---- what moves --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pipe", [plain, text])
def test_quests_stages_move_only_their_own(pipe: Any, tmp_path: Path) -> None:
    losses = {"output": 1.0, "layers": 1.0}
    guided, gentle = pipe is text, {**FULL, "lr_weights": 1e-3}  # at 2e-3 eight iterations better nothing on some CPUs
    one = tune(gentle, id="one", layers="time_proj", scales="own", losses=losses, order="sequential", iterations=16)
    two = tune(gentle, id="two", layers="qkv_ff", scales="not_time", losses=losses, iterations=16)
    head = TIMED + '"*:q | *:k | *:v | *:softmax" = { activation = { bits = 8, timed = true } }\n'
    start, first, second = pair(tmp_path, head, (GUIDED if guided else WALKS) + SPLIT + FIT + RANGES, one, two,
                                pipe=pipe)
    for a, b, preset in ((start, first, "time_proj"), (first, second, "qkv_ff")):
        moved = changed(a, b)
        trained = {name for name in moved if name.endswith(("/codes", "/bias"))}
        owners = {name.rpartition("/")[0] for name in trained}
        assert owners and all(PRESETS[preset](name) for name in owners), preset
        assert {name.rpartition("/")[2] for name in trained} == {"codes", "bias"}, "weights and biases"
        scales = moved - trained
        assert scales and all(name.endswith("/scale") for name in scales)
        owners = {name.rpartition("/")[0] for name in scales}
        if preset == "time_proj":
            assert all(name.endswith("time_emb_proj.input") for name in owners)
        else:
            assert not any("time_emb" in name for name in owners) and any("processor.q" in name for name in owners)
            assert {"conv_in.input", "conv_out.input"} <= owners
    assert all(e["loss_end"] <= e["loss_start"] for e in second.done if e["step"] in ("one", "two"))


def test_gradients_reach_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    """From the noise estimate through the quantized network to the attention layers; frozen parameters get none."""
    run = execute(tmp_path, text(), TIMED + GUIDED + SPLIT + FIT + RANGES)
    reached = 0
    for losses in ({"output": 1.0}, {"guided": 1.0}, {"relation": 1.0}, {"features": 1.0}):
        step = Finetune(do="finetune", weights="lora", rank=2, layers="qkv_ff", window=2, losses=losses, scales="none")
        chosen = step.chosen(run)
        objective = Objective(run.model, teaching.load(run, 2), step.losses, list(chosen), 3.0)
        learner = step.learner(run, chosen, generator(0, "a", "b"))
        with torch.no_grad():
            for p in learner.parameters().values():
                p.add_(torch.randn_like(p) * 0.02)
        with student(run, chosen):
            learner.relax(torch.tensor(0.0))
            objective.total(objective.parts(torch.tensor([0, 1]))).backward()
        grads = {name: p.grad for name, p in learner.parameters().items()}
        assert len(grads) == 2 * len(chosen) > 20
        assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
        assert sum(bool(g.any()) for g in grads.values() if g is not None) > 0.9 * len(grads), losses
        assert all(p.grad is None for p in run.model.parameters())
        learner.release()
        reached += 1
    assert reached == 4


def test_only_timesteps_that_are_visited_move(tmp_path: Path) -> None:
    """Sequential training that ends after the first two of four timesteps."""
    run, _ = pair(tmp_path, TIMED, START, tune(iterations=1))
    step = Finetune(do="finetune", weights="none", scales="all", lr_scales=0.05)
    lessons = teaching.load(run, 1)
    learner = step.learner(run, step.chosen(run), generator(0, "a", "b"))
    objective = Objective(run.model, lessons, {"output": 1.0}, [], 1.0)
    index = lessons.schedule(8, 4, "sequential", generator(0, "a", "b"))[:4]
    before = {n: q.scale.clone() for n, q in step.quantizers(run, step.chosen(run)).items()}
    with student(run, {}):
        worker = loop._Loop(learner, lambda g: objective.total(objective.parts(g)), index,
                            loop.Budget(4, 9, 1.0, "constant", 1e-12))
        for k in range(4):
            worker.iterate(k)
    learner.harden()
    assert list(run.plan.timesteps) == sorted(run.plan.timesteps) and len(run.plan.timesteps) == 4
    rows = [(q.scale != before[n]).any(dim=1).tolist() for n, q in step.quantizers(run, step.chosen(run)).items()]
    assert len(rows) > 10 and all(not row[0] and not row[1] for row in rows), "the cleanest two never came"
    assert sum(row[2] and row[3] for row in rows) > 0.9 * len(rows)


def test_a_short_schedule_looks_up_the_same_timesteps() -> None:
    """100 trained steps, 20 at inference: step j of the short one is the t of step 5 j of the long one."""
    long = [float(t) for t in range(990, -1, -10)]
    clock = Clock(tuple(sorted(long)))
    looked = 0
    for j, t in enumerate(range(990, -1, -50)):
        with clock.at(float(t)):
            row = int(clock.rows("nearest"))
        assert clock.timesteps[row] == t == long[5 * j] and row == 99 - 5 * j
        looked += 1
    assert looked == 20


# ---- never worse -------------------------------------------------------------------------------------------------
def test_a_wild_learning_rate_keeps_the_start(tmp_path: Path) -> None:
    before, after = pair(tmp_path, TIMED, START, tune(FULL, lr_weights=1e4, lr_scales=30.0, evaluate_every=2))
    found = note(after)
    assert found["kept"] == "start" and found["loss_end"] == found["loss_start"] and found["best_at"] == 0
    assert not changed(before, after)


@pytest.mark.parametrize("spoilt", [1, 5])
def test_nan_ends_the_unit_at_the_best(spoilt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that turn NaN at some iteration: named, and what was best before is kept."""
    step, said, count = loop._Loop._step, [], []

    class Said(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    def spoiling(self: Any) -> None:
        step(self)
        count.append(1)
        if len(count) == spoilt:
            for p in self.tensors:
                p.data.fill_(float("nan"))

    monkeypatch.setattr(loop._Loop, "_step", spoiling)
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, TIMED + START + tune(evaluate_every=2)))
    run.progress = Said()
    run.execute()
    run.journal.release()
    found = note(run)
    stopped = spoilt + 1
    assert found["diverged_at"] == stopped == len(count) and found["best_at"] in range(0, stopped, 2)
    assert found["loss_end"] <= found["loss_start"] and (spoilt > 1) is (found["kept"] == "trained")
    assert said == [f"tune, model: the loss is not finite at iteration {stopped}; going back to iteration "
                    f"{found['best_at']}"]
    assert all(torch.isfinite(t).all() for t in contents(run).values())
    json.dumps(run.done, allow_nan=False)


def test_nan_before_training_is_named(tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline(), TIMED + START)
    layer = run.layers()["mid_block.resnets.0.conv1"]
    layer.weight_scale.fill_(float("nan"))
    step = Finetune(do="finetune", losses={"output": 1.0, "layers": 1.0})
    with pytest.raises(NumericsError, match="loss output, layers is NaN") as caught:
        step.run_unit(run, "model", generator(0, "a", "b"))
    assert complete(caught.value) and "mid_block.resnets.0.conv1" in (caught.value.where or "")
    assert layer.trial_weight is None and "timestep" in (caught.value.where or "")


# ---- the run -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stop", "base"),
    [(3, LORA), (4, FULL), (7, LORA), (11, FULL), (7, LORA | {"replay": 3}), (11, LORA | {"replay": 4})],
)
def test_killed_and_resumed_ends_with_the_same_bytes(
    stop: int, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best so far comes from before the kill where training got worse after it: it is part of the state."""
    step = tune(base, weight_scale=True, zero_points=True, evaluate_every=3, lr_scales=0.05, window=2)
    asked = TIMED + START + step
    whole, again = killed_and_resumed(tmp_path, monkeypatch, asked, stop)
    assert not changed(whole, again)
    assert note(again) == note(whole)
    assert not changed(whole, resumed(tmp_path, asked)), "and from the journal alone"


def test_previews_in_between_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling with another number of steps while training: clocks, tables and features are where they were."""
    monkeypatch.setattr(loop, "REPORT", 1)
    step = tune(losses={"output": 1.0, "relation": 5.0}, window=2, iterations=6, zero_points=True)
    (tmp_path / "quiet").mkdir()
    quiet = execute(tmp_path / "quiet", least_pipeline(), TIMED + START + step)
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, TIMED + START + step))
    previews: list[int] = []

    class Previewing(Silent):
        def __init__(self) -> None:
            self.depth: list[str] = []

        def start(self, label: str, total: int) -> None:
            self.depth.append(label)

        def finish(self) -> None:
            self.depth.pop()

        def advance(self, n: int = 1, note: str = "") -> None:
            if self.depth[-1] == "tune: model":
                sample_latents(run.pipeline, None, [torch.Generator().manual_seed(0)], steps=7, guidance=1.0)
                previews.append(1)

    run.progress = Previewing()
    run.execute()
    run.journal.release()
    assert len(previews) >= 6 and not changed(quiet, run)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in run.model.modules()) == 2, "the clock's two"


def test_rows_in_a_file_give_the_same_bytes(tmp_path: Path) -> None:
    runs = []
    for memory in (1 << 30, 0):
        folder = tmp_path / str(memory)
        folder.mkdir()
        run = begin(folder, least_pipeline(), recipe(folder, TIMED + START + tune()), memory=memory)
        run.execute()
        run.journal.release()
        runs.append(run)
    assert not changed(*runs)


def test_frozen_tensors_and_the_teacher_stay(tmp_path: Path) -> None:
    before, after = pair(tmp_path, TIMED, START, tune(frozen="conv_in | conv_out", scales="all", weight_scale=True))
    moved = changed(before, after)
    kinds = {name.rpartition("/")[2] for name in moved}
    assert kinds == {"codes", "scale"}, "no float weight, bias, norm or zero-point"
    assert not any(name.startswith(("conv_in", "conv_out")) for name in moved)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    with torch.no_grad(), wrap.show(after.model, "float"):
        assert torch.equal(after.model(x, t).sample, least_pipeline().unet(x, t).sample)


def test_packed_and_proven(tmp_path: Path) -> None:
    """The whole way: finetuned, packed, verified; trained biases go along."""
    run = execute(tmp_path, least_pipeline(), TIMED + START + tune(FULL, layers="all", zero_points=True) + PACK)
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())
    assert note(run)["kept"] == "trained" and {layer.face for layer in run.layers().values()} == {"packed"}
    (tmp_path / "sim").mkdir()
    sim = execute(tmp_path / "sim", least_pipeline(), TIMED + START + tune(FULL, layers="all", zero_points=True))
    wrap.set_face(sim.model, "sim")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    with torch.no_grad():
        assert torch.equal(run.model(x, t).sample, sim.model(x, t).sample)


def test_half_precision_model(tmp_path: Path) -> None:
    pipe = text()
    pipe.to(torch.bfloat16)
    run = execute(tmp_path, pipe, TIMED + GUIDED + SPLIT + FIT + RANGES + tune(FULL, layers="ff", iterations=6) + PACK)
    assert note(run)["loss_end"] <= note(run)["loss_start"]
    out = tiny.run(run.model)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_iteration_is_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and eager training agree but for rounding; rows in a file are trained on without a graph."""
    step = tune(FULL, losses={"guided": 1.0, "layers": 1.0, "relation": 5.0}, window=2, iterations=40, zero_points=True)
    found: dict[str, tuple[bool, dict[str, Any]]] = {}
    peaks: list[float] = []
    loops = loops_made(monkeypatch)
    for name, memory, warm in (("graph", 1 << 30, loop.WARM), ("eager", 1 << 30, 99), ("file", 0, loop.WARM)):
        monkeypatch.setattr(loop, "WARM", warm)
        (tmp_path / name).mkdir()
        asked = recipe(tmp_path / name, TIMED + GUIDED + SPLIT + FIT + RANGES + step)
        run = begin(tmp_path / name, text().to("cuda"), asked, memory=memory)
        run.execute()
        run.journal.release()
        found[name] = (loops[-1].graph is not None, note(run))
        peaks.append(run.costs[note(run)["step"]]["peak_memory"])
    assert [found[n][0] for n in ("graph", "eager", "file")] == [True, False, False]
    ends = [n["loss_end"] / n["loss_start"] for _, n in found.values()]
    assert all(end < 0.9 for end in ends) and max(ends) - min(ends) < 0.1
    assert len(peaks) == 3 and min(peaks) > 0


def test_an_update_with_gradients_that_are_not_finite_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in one backward spoils neither the parameters nor Adam's moments; the history says how often."""
    plain, calls = Objective.total, [0]

    def spoilt(self: Objective, parts: dict[str, Tensor]) -> Tensor:
        found = plain(self, parts)
        if not torch.is_grad_enabled():
            return found
        calls[0] += 1
        return found * float("nan") if calls[0] in (3, 5) else found

    monkeypatch.setattr(Objective, "total", spoilt)
    run = execute(tmp_path, least_pipeline(), TIMED + START + tune(iterations=40))
    found = note(run)
    assert calls[0] == 40 and found["updates_left_out"] == 2 and "diverged_at" not in found
    assert found["kept"] == "trained" and found["loss_end"] < 0.8 * found["loss_start"]
