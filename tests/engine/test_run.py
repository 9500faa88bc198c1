"""Whole runs: determinism, resuming inside a long unit, damaged units, NaN named by layer and timestep, estimates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbrush
import tiny
from bitbrush.engine import run as run_module
from bitbrush.engine.journal import Journal
from bitbrush.engine.run import find_nonfinite
from bitbrush.errors import InputError, NumericsError
from bitbrush.network import wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from bitbrush.steps import loop
from small import (
    CALIBRATE,
    FIT,
    HEAD,
    PACK,
    RANGES,
    ROUND,
    SPLIT,
    WHOLE,
    Killed,
    begin,
    execute,
    least_pipeline,
    recipe,
)

MIXED = (
    HEAD.replace("weights = 4", "weights = 2").replace("weight = {}", 'weight = { binary = "symmetric" }')
    + CALIBRATE
    + SPLIT
    + '[[step]]\ndo = "smooth"\nsamples = 5\n'
    + FIT
    + RANGES
    + '[[step]]\ndo = "allocate"\nsamples = 6\npoints = 4\nstep = 0.2\nextra = 0.1\nrank = "random"\n'
    + PACK
)


def specs(run: run_module.Run) -> list[LayerSpec]:
    return list(run.plan.layers.values())


def state(run: run_module.Run) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_seed_decides(tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        states.append(state(execute(tmp_path / str(i), least_pipeline(), seed=seed)))
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_units_follow_the_recipe(tmp_path: Path) -> None:
    run = execute(tmp_path, least_pipeline())
    done = [(entry["step"], entry["unit"]) for entry in run.done]
    assert len(done) == len(set(done)) and len(run.tape) == 12
    assert list(dict.fromkeys(step for step, _ in done)) == [step.label for step in run.recipe.steps]
    assert {layer.face for layer in run.layers().values()} == {"packed"}
    assert all(p["ok"] for entry in run.done for p in entry.get("proof", {}).values())


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_killed_inside_a_long_unit(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise at an iteration of the second unit that is trained: the resumed run goes on from the last saved state."""
    text = WHOLE.replace("iterations = 4", "iterations = 6\ncheckpoint = 2")
    (tmp_path / "whole").mkdir()
    want = state(execute(tmp_path / "whole", least_pipeline(), text))
    calls: list[tuple[int, int]] = []
    iterate = loop._Loop.iterate

    def dying(self: Any, k: int) -> None:
        if not calls or calls[-1][0] != id(self):
            calls.append((id(self), k))
        if len(calls) == 2 and k == stop and not dead:
            dead.append(True)
            raise Killed
        iterate(self, k)

    dead: list[bool] = []
    monkeypatch.setattr(loop._Loop, "iterate", dying)
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, text))
    with pytest.raises(Killed):
        run.execute()
    run.journal.release()
    assert len(list(run.journal.folder.glob("carry-*"))) == min(stop // 2, 2)
    calls.clear()
    again = begin(tmp_path, least_pipeline(), recipe(tmp_path, text), resume=True)
    again.execute()
    assert calls[0][1] == stop // 2 * 2, "it begins at the saved iteration"
    assert same(state(again), want)
    again.journal.release()


def test_damaged_units_are_done_again_with_the_same_outcome(tmp_path: Path) -> None:
    """Flip, cut or delete a unit file of a run that was stopped near its end."""
    text = WHOLE.replace(PACK, "")
    (tmp_path / "whole").mkdir()
    whole = execute(tmp_path / "whole", least_pipeline(), text)
    want = {n: layer.stored_codes().clone() for n, layer in whole.layers().items()}
    scales = {n: layer.input.scale.clone() for n, layer in whole.layers().items() if layer.input is not None}
    units = len(whole.done)
    chosen = [0, 1, 2, 3, units // 2, units - 2, units - 1]
    execute(tmp_path, least_pipeline(), text)
    ran = 0
    for number, how in zip(chosen, ("flip", "cut", "delete") * 3, strict=False):
        path = tmp_path / "out" / ".run" / "units" / f"{number:05d}.safetensors"
        data = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]) if how == "flip" else data[:-5])
        run = begin(tmp_path, least_pipeline(), recipe(tmp_path, text), resume=True)
        run.execute()
        run.journal.release()
        assert path.read_bytes() == data, "the same bytes again"
        assert all(torch.equal(layer.stored_codes(), want[n]) for n, layer in run.layers().items())
        assert all(torch.equal(run.layers()[n].input.scale, scales[n]) for n in scales)  # type: ignore[union-attr]
        ran += 1
    assert ran == len(chosen) == 7


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Loop, "iterate", stop)
    with pytest.raises(bitbrush.errors.InterruptedRun) as caught:
        execute(tmp_path, least_pipeline())
    assert caught.value.exit_code == 130 and "resume" in (caught.value.try_ or "")


@pytest.mark.parametrize("kind", ["killed before", "killed after", "damaged"])
def test_smooth_and_allocate_resume_to_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at every fifth unit, before and after it became durable; and with unit files damaged."""
    (tmp_path / "whole").mkdir()
    whole = execute(tmp_path / "whole", least_pipeline(channels=12), MIXED)
    want, units = state(whole), len(whole.done)
    labels = [entry["step"] for entry in whole.done]
    assert {"smooth", "allocate"} <= set(labels) and any(s.weight and s.weight.row_bits for s in specs(whole))
    points = sorted({*range(labels.index("smooth"), units, 5), labels.index("smooth") + 1, labels.index("allocate"),
                     labels.index("pack") - 1})
    ran = 0
    for at in points[::2] if kind == "damaged" else points:
        folder = tmp_path / f"{kind}{at}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            commit, done = Journal.commit, []

            def dying(self: Journal, *args: Any, at: int = at, done: list[int] = done, commit: Any = commit) -> None:
                if kind != "killed before" or len(done) < at:
                    commit(self, *args)
                done.append(1)
                if len(done) > at:
                    raise KeyboardInterrupt

            patch.setattr(Journal, "commit", dying)
            run = begin(folder, least_pipeline(channels=12), recipe(folder, MIXED))
            with pytest.raises(bitbrush.errors.InterruptedRun):
                run.execute()
            run.journal.release()
        if kind == "damaged":
            path = folder / "out" / ".run" / "units" / f"{at:05d}.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
        again = begin(folder, least_pipeline(channels=12), recipe(folder, MIXED), resume=True)
        again.execute()
        again.journal.release()
        assert same(state(again), want) and again.plan == whole.plan and again.done == whole.done, at
        ran += 1
    assert ran >= 5


# ---- NaN ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.to_v",
        "conv_out",
        "up_blocks.0.resnets.0.norm1",
    ],
)
def test_nan_in_a_layer_is_named(name: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline("unconditional")
    with torch.no_grad():
        pipe.unet.get_submodule(name).weight.view(-1)[3] = float("nan")
    with pytest.raises(NumericsError) as caught:
        begin(tmp_path, pipe, recipe(tmp_path))
    assert (caught.value.where or "").split(",")[0] == name and "timestep" in (caught.value.where or "")


def test_nan_at_one_timestep_is_named(tmp_path: Path) -> None:
    """Nothing is wrong at the first look; one layer overflows late in the trajectory."""
    pipe = tiny.pipeline("unconditional")
    now: list[float] = []
    run = begin(tmp_path, pipe, recipe(tmp_path))
    pipe.unet.register_forward_pre_hook(lambda _m, args: now.append(float(args[1])))
    layer: Any = run.model.get_submodule("mid_block.resnets.0.conv1")
    forward = layer.forward
    layer.forward = lambda x: forward(x) * (float("inf") if now[-1] < 400 else 1.0)
    with pytest.raises(NumericsError) as caught:
        run.execute()
    run.journal.release()
    assert caught.value.where == "mid_block.resnets.0.conv1, timestep 333"


def test_find_nonfinite_takes_every_form_of_time() -> None:
    model = tiny.plain_unet()
    with torch.no_grad():
        model.conv_in.weight.fill_(float("nan"))
    x = torch.randn(2, 3, 8, 8)
    for args, kwargs in (((x, 7), {}), ((x, torch.tensor([7, 7])), {}), ((x,), {"timestep": torch.tensor(7.0)})):
        assert find_nonfinite(model, args, kwargs) == "conv_in, timestep 7"


# ---- the model ---------------------------------------------------------------------------------------------------
def test_a_changed_plan_wraps_only_the_layers_it_names(tmp_path: Path) -> None:
    """All others keep codes, tables and identity; the time grid and its clock stay; the output moves with the layer."""
    layers = HEAD.replace("activation = {}", "activation = { timed = true }")
    text = layers + '"*:q | *:k" = { activation = {} }\n' + CALIBRATE + FIT + RANGES
    run = execute(tmp_path, tiny.pipeline("unconditional"), text)
    before, clock, hooks = run.layers(), run.clock, len(run.model._forward_pre_hooks)
    tables = {n: m.state_dict() for n, m in before.items()}
    codes = {n: layer.stored_codes() for n, layer in before.items()}
    operand = next(name for name in run.plan.layers if name.endswith(":q"))
    processors = {n: m.processor for n, m in run.model.named_modules() if hasattr(m, "set_processor")}
    name = "mid_block.resnets.0.conv1"
    wide = LayerSpec(weight=WeightSpec(grid=Grid(bits=6)), activation=run.plan.layers[name].activation)
    run.change_plan({name: wide, operand: LayerSpec(activation=ActivationSpec(grid=Grid(bits=6)))})
    after, kept = run.layers(), 0
    assert run.plan.layers[name] == wide == after[name].spec and after[name] is not before[name]
    assert after[name].codes is None and after[name].weight is before[name].weight
    assert after[name].input is not None and after[name].input.scale.shape == (3, 1)
    for other, layer in after.items():
        if other != name:
            assert layer is before[other] and torch.equal(layer.stored_codes(), codes[other])
            assert all(torch.equal(v, tables[other][k]) for k, v in layer.state_dict().items())
            kept += 1
    assert kept == len(before) - 1 > 20
    assert run.clock is clock is run.model.bitbrush_clock and len(run.model._forward_pre_hooks) == hooks
    owner = operand.partition(":")[0]
    for other, processor in processors.items():
        current: Any = run.model.get_submodule(other).processor  # type: ignore[union-attr]
        assert (current is processor) == (other != owner)
    new: Any = run.model.get_submodule(owner).processor  # type: ignore[union-attr]
    assert new.q.spec.grid.bits == 6 and new.k.spec.grid.bits == 8 and new.v is None and len(processors) > 1
    with pytest.raises(InputError, match="cannot run"):
        run.change_plan({name: LayerSpec(sorted_channels=True)})


def test_a_changed_time_grid_wraps_all(tmp_path: Path) -> None:
    layers = HEAD.replace("activation = {}", "activation = { timed = true }")
    run = execute(tmp_path, least_pipeline(), layers + CALIBRATE + FIT)
    before = run.layers()
    run.set_timesteps([5.0, 1.0, 3.0, 2.0])
    after = run.layers()
    assert run.plan.timesteps == (1.0, 2.0, 3.0, 5.0) and all(after[n] is not before[n] for n in before)
    assert all(layer.input is not None and layer.input.scale.shape[0] == 4 for layer in after.values()) and after


def test_timed_scales(tmp_path: Path) -> None:
    """A table of scales a timestep, from the calibration's own time grid."""
    text = (
        HEAD.replace("activation = {}", "activation = { timed = true }")
        + CALIBRATE
        + SPLIT
        + FIT
        + ROUND
        + RANGES
        + PACK
    )
    run = execute(tmp_path, least_pipeline(), text)
    assert len(run.plan.timesteps) == 3 and list(run.plan.timesteps) == sorted(run.plan.timesteps)
    tables = [layer.input for layer in run.layers().values()]
    assert tables and all(t is not None and t.scale.shape[0] == 3 for t in tables)
    moving = [t for t in tables if t is not None and not torch.equal(t.scale[0], t.scale[-1])]
    assert len(moving) > len(tables) / 2
    low = {n: min(v) for e in run.done for n, v in ((k, r["low"]) for k, r in e.get("ranges", {}).items())}
    assert len(low) == len(tables)
    json.dumps(run.done, allow_nan=False)


def test_half_precision_model(tmp_path: Path) -> None:
    pipe = tiny.pipeline("text")
    pipe.to(torch.bfloat16)
    run = execute(tmp_path, pipe)
    out = tiny.run(run.model)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    assert {layer.face for layer in wrap.layers(run.model).values()} == {"packed"}


def test_prompts_that_are_missing(tmp_path: Path) -> None:
    run = begin(
        tmp_path,
        tiny.pipeline("text"),
        recipe(tmp_path, WHOLE.replace("trajectories = 4", "trajectories = 9").replace("batch = 2", "batch = 9")),
    )
    with pytest.raises(InputError, match="9 prompts are needed, 8 are there"):
        run.execute()
    run.journal.release()


def test_estimates_are_numbers(tmp_path: Path) -> None:
    """The tape's estimate is what the tape takes, but for headers."""
    (tmp_path / "r.toml").write_text(WHOLE)
    for kind in ("text", "unconditional"):
        pipe = tiny.pipeline(kind)  # type: ignore[arg-type]
        planned = bitbrush.dry_run(pipe, tmp_path / "r.toml", prompts=["a"] * 4)
        found = planned["inspection"]["estimates"]
        keys = ("seconds", "tape_bytes", "peak_bytes", "forwards", "macs_per_second")
        assert all(isinstance(found[key], (int, float)) and found[key] > 0 for key in keys)
        folder = tmp_path / kind
        folder.mkdir()
        run = execute(folder, pipe, HEAD + CALIBRATE)
        size = sum(path.stat().st_size for path, _ in run.tape.shards)
        assert abs(found["tape_bytes"] - size) < 0.1 * size
        held = sum(t.nbytes for batch in run.tape.batches() for t in batch.values())
        assert found["tape_bytes"] == held
        assert planned["recipe"].startswith('name = "small"')
        totals = planned["inspection"]["totals"]
        assert 0 < totals["packed_bytes"] < totals["float_bytes"] and 4 < totals["average_bits"] < 32
