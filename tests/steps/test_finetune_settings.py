"""Settings of a finetuning: which layers its presets mean, what is refused and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.planning import make_plan
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention
from bitbrush.network.survey import survey
from bitbrush.steps import teaching
from bitbrush.steps.finetune import PRESETS, Finetune
from bitbrush.steps.losses import Objective
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, SPLIT, complete, execute, least_pipeline, recipe

START = CALIBRATE + SPLIT + FIT + RANGES


def tune(**settings: Any) -> str:
    """The step as TOML."""
    lines = []
    for key, value in {"id": "tune", "iterations": 2, **settings}.items():
        table = "{ " + ", ".join(f"{k} = {v}" for k, v in value.items()) + " }" if isinstance(value, dict) else ""
        lines.append(f"{key} = {table or json.dumps(value)}")
    return '[[step]]\ndo = "finetune"\n' + "\n".join(lines) + "\n"


# ---- the choice of layers ----------------------------------------------------------------------------------------
def test_presets(tmp_path: Path) -> None:
    """The sets of QuEST in diffusers' names; the shares that they train are reported."""
    found: dict[str, dict[str, set[str]]] = {}
    for kind, pipe in (("text", tiny.text_pipeline), ("plain", tiny.unconditional_pipeline)):
        (tmp_path / kind).mkdir()
        run = execute(tmp_path / kind, pipe(), HEAD)
        names = set(run.layers())
        found[kind] = {"all": set(Finetune(do="finetune").chosen(run)), "names": names}
        for preset in PRESETS:
            wanted = {n for n in names if PRESETS[preset](n)}
            found[kind][preset] = wanted
            step = Finetune(do="finetune", layers=preset)
            if wanted:
                assert set(step.chosen(run)) == wanted
            else:
                with pytest.raises(InputError, match=f"layers = '{preset}' selects no quantized layer") as caught:
                    step.chosen(run)
                assert complete(caught.value)
        some = Finetune(do="finetune", layers="mid_block.* | conv_in", frozen="*.conv1").chosen(run)
        assert "conv_in" in some and all(n == "conv_in" or n.startswith("mid_block.") for n in some)
        assert not any(n.endswith("conv1") for n in some) and len(some) > 4
    for kind, sets in found.items():
        assert sets["all"] == sets["names"] and len(sets["names"]) > 30
        assert {n.rpartition(".")[2] for n in sets["time_proj"]} == {"time_emb_proj"}
        assert sets["time_mlp"] == {"time_embedding.linear_1", "time_embedding.linear_2"}
        assert sets["time"] == sets["time_proj"] | sets["time_mlp"] and sets["qkv_ff"] == sets["qkv"] | sets["ff"]
        assert sets["qkv"] < sets["attention"] and not sets["attention"] & sets["time"], kind
    leaves = {".".join(n.split(".")[-2:]) for n in found["text"]["qkv"]}
    assert leaves == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"}
    assert {n.rpartition(".")[2] for n in found["plain"]["qkv"]} == {"to_q", "to_k", "to_v"}
    assert {n.rpartition("ff.net.")[2] for n in found["text"]["ff"]} == {"0.proj", "2"} and not found["plain"]["ff"]


def test_nothing_to_do(tmp_path: Path) -> None:
    for changes in ({"iterations": 0}, {"weights": "none", "scales": "none"}):
        (tmp_path / str(len(changes))).mkdir()
        run = execute(tmp_path / str(len(changes)), least_pipeline(), HEAD + START + tune(**changes))
        assert not [entry for entry in run.done if entry["step"] == "tune"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"losses": {"outptu": 1.0}}, "outptu"),
        ({"losses": {"output": -1.0}}, "negative"),
        ({"losses": {"output": 0.0}}, "positive"),
        ({"zero_points": True, "scales": "none"}, "zero_points needs scales"),
        ({"weights": "some"}, "weights"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        recipe(tmp_path, HEAD + START + tune(**changes))
    assert says in str(caught.value)


def test_order_of_steps(tmp_path: Path) -> None:
    for steps in (CALIBRATE + tune() + FIT + RANGES, FIT + tune(), START + PACK + tune()):
        with pytest.raises(InputError, match="tune"):
            recipe(tmp_path, HEAD + steps)
    asked = recipe(tmp_path, HEAD + START + tune(losses={"output": 1.0, "layers": 0.5}))
    (tmp_path / "again").mkdir()
    assert recipe(tmp_path / "again", asked.to_toml()).steps == asked.steps, "TOML there and back"


# ---- the softmax -------------------------------------------------------------------------------------------------
OPERANDS = '"*:q | *:k | *:v | *:softmax" = { activation = { bits = 4 } }\n'


def test_frozen_operands(tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.text_pipeline(), HEAD + OPERANDS)

    def quantizers(**settings: Any) -> set[str]:
        step = Finetune(do="finetune", scales="all", **settings)
        return set(step.quantizers(run, step.chosen(run)))

    whole = quantizers()
    operands = {name for name in whole if ".processor." in name}
    assert len(operands) == 4 * len(run.survey.attentions()) > 16
    softmax = {name for name in operands if name.endswith(".softmax")}
    assert quantizers(frozen="*:softmax") == quantizers(softmax="float") == whole - softmax
    assert quantizers(frozen="mid_block.*:q") == whole - {n for n in operands if n.startswith("mid_block.") and
                                                          n.endswith(".q")}
    assert not any(name.startswith("mid_block.") for name in quantizers(frozen="mid_block.*"))


@pytest.mark.parametrize("form", ["exact", "float"])
def test_float_softmax_in_training(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels in the student's training forwards only; no softmax scale moves; the measured loss is exact."""
    calls: list[bool] = []
    fused = functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return fused(*args, **kwargs)

    found: dict[str, Any] = {}
    for name, last in (("start", ""), ("tuned", tune(softmax=form, scales="all", iterations=4, evaluate_every=2,
                                                     batch=4, lr_scales=0.02))):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", spy)
            found[name] = execute(tmp_path / name, tiny.text_pipeline(), HEAD + OPERANDS + START + last)
    assert sum(calls) == (4 * 8 if form == "float" else 0), "iterations x attentions"
    before, after = ({n: m.scale.clone() for n, m in found[name].model.named_modules()
                      if isinstance(m, ActivationQuantizer)} for name in ("start", "tuned"))
    moved = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"input", "q", "k", "v"} | ({"softmax"} if form == "exact" else set())
    note = next(entry for entry in found["tuned"].done if entry["step"] == "tune")
    assert note["kept"] == "trained" and note["loss_end"] < note["loss_start"]
    processors = [m for m in found["tuned"].model.modules() if isinstance(m, QuantAttention)]
    assert {p.training_softmax for p in processors} == {"exact"}
    wrap.set_face(found["tuned"].model, "sim")
    step = Finetune(do="finetune")
    objective = Objective(found["tuned"].model, teaching.load(found["tuned"], 1), step.losses, ["conv_in"], 1.0)
    measured = objective.measure(objective.lessons.probe(64), 4)["total"]
    assert note["loss_end"] == pytest.approx(measured, rel=1e-4), "what is stored, with the softmax rounded"


def test_quest_trains_with_a_float_softmax() -> None:
    asked = read_recipe("quest")
    tuned = [step for step in asked.steps if isinstance(step, Finetune)]
    assert [step.softmax for step in tuned] == ["float", "float"]
    make_plan(survey(tiny.text_unet(), tokens=tiny.TOKENS), asked)
