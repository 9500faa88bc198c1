"""The public functions from end to end on tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbrush
import tiny
from bitbrush import kernels
from bitbrush.artifact import manifest
from bitbrush.engine.disk import Disk
from bitbrush.engine.progress import Silent
from bitbrush.errors import ArtifactError, BitbrushError, InputError, NumericsError, ResourceError
from bitbrush.network import wrap
from bitbrush.network.attention import QuantAttention
from small import PROMPTS, WHOLE, complete, least_pipeline

SMALL: dict[str, Any] = {"calibrate.samples": 12, "calibrate.trajectories": 8, "calibrate.steps": 3}
TRAIN: dict[str, Any] = {
    **SMALL,
    "weights.iterations": 2,
    "weights.batch": 2,
    "activations.iterations": 2,
    "activations.batch": 2,
    "weights-fit.points": 4,
}
SETTINGS = {"rtn": SMALL, "rtn-dynamic": {}, "ptq4dm": SMALL, "qdiffusion": TRAIN}


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def quantize(
    target: Any, recipe: str = "rtn", weights: int | None = 4, activations: int | None = 8, **choices: Any
) -> Any:
    given = {"settings": SETTINGS[recipe], "prompts": PROMPTS, "progress": Silent(), **choices}
    return bitbrush.quantize(target, recipe, weights, activations, **given)


def artifact(folder: Path) -> dict[str, bytes]:
    manifest.check(folder)
    return {name: (folder / name).read_bytes() for name in manifest.list_files(folder)[0]}


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.pipeline("text").save_pretrained(folder)
    return folder


# ---- every recipe ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["rtn", "rtn-dynamic", "ptq4dm", "qdiffusion"])
@pytest.mark.parametrize("kind", ["text", "unconditional"])
def test_every_recipe_end_to_end(recipe: str, kind: tiny.Kind, tmp_path: Path) -> None:
    pipe, out = tiny.pipeline(kind), tmp_path / "out"
    before = tiny.run(pipe.unet)
    result = quantize(pipe, recipe, output=out)
    assert result.pipeline is pipe and result.output == out and result.seconds > 0 and result.peak_memory > 1e7
    after = tiny.run(pipe.unet)
    assert (
        not torch.equal(after, before)
        and torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.9
    )
    assert result.proof["ok"] and len(result.proof["layers"]) == len(wrap.layers(pipe.unet)) > 25
    assert result.proof["model"]["equal"] is True
    loaded = bitbrush.load(out)
    assert torch.equal(tiny.run(loaded.unet), after)
    history = json.loads((out / "history.json").read_text())
    assert history == json.loads(json.dumps(result.history, allow_nan=False))
    assert history["recipe"] == recipe and 4 < history["average_bits"] < 12 and history["units"]
    kept = len(wrap.layers(pipe.unet)) + len(history["kept_float"])
    assert kept == len(
        [m for m in tiny.pipeline(kind).unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    )
    assert bitbrush.read_recipe(out / "recipe.toml") == result.recipe
    assert [p.name for p in (out / ".run").iterdir()] == ["journal.jsonl"]


def test_a_path_gives_what_the_object_gives(saved_pipeline: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in saved_pipeline.rglob("*") if p.is_file()}
    by_path = quantize(str(saved_pipeline), output=tmp_path / "a", device="cpu")
    by_object = quantize(tiny.pipeline("text"), output=tmp_path / "b")
    assert artifact(tmp_path / "a") == artifact(tmp_path / "b")
    assert by_path.recipe == by_object.recipe
    assert before == {p: p.read_bytes() for p in saved_pipeline.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="overwrite the model"):
        by_path.save_pretrained(saved_pipeline)


def test_same_seed_same_hash(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        quantize(least_pipeline(), "qdiffusion", output=tmp_path / name, seed=seed)
    a, b, c = (artifact(tmp_path / name) for name in "abc")
    assert a == b and a["bitbrush.json"] != c["bitbrush.json"] and len(a) >= 6


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    result = quantize(tiny.pipeline("text"))
    assert result.output is None
    for name in ("a", "b", "a"):
        result.save_pretrained(tmp_path / name)
    loaded = bitbrush.load(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "c")
    a, b = artifact(tmp_path / "a"), artifact(tmp_path / "b")
    assert a == b and a["bitbrush.json"]
    weights = [n for n in a if n.startswith("unet/")]
    assert weights and all((tmp_path / "c" / n).read_bytes() == a[n] for n in weights)


def test_a_bare_model(tmp_path: Path) -> None:
    result = quantize(tiny.text_unet(), "rtn-dynamic", output=tmp_path / "out", prompts=None)
    assert result.proof["ok"] and torch.equal(tiny.run(bitbrush.load(tmp_path / "out")), tiny.run(result.pipeline))
    for recipe in ("rtn", "ptq4dm", "qdiffusion"):
        for ask in (quantize, lambda m, r: bitbrush.dry_run(m, r, 4, 8)):
            with pytest.raises(InputError, match="needs a pipeline") as caught:
                ask(tiny.text_unet(), recipe)
            assert complete(caught.value) and "rtn-dynamic" in (caught.value.try_ or "")


# ---- bits and presets ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_width(bits: int, tmp_path: Path) -> None:
    pipe = least_pipeline()
    result = quantize(pipe, "qdiffusion", bits, 8, output=tmp_path / "out")
    widths = {
        n: layer.spec.weight.grid.bits for n, layer in wrap.layers(pipe.unet).items() if layer.spec.weight is not None
    }
    assert set(widths.values()) <= {bits, 8} and bits in widths.values() and result.proof["ok"]
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(bitbrush.load(tmp_path / "out").unet(x, 5).sample, pipe.unet(x, 5).sample)


def test_a_kernel_may_be_chosen_on_loading(tmp_path: Path) -> None:
    quantize(least_pipeline(), "rtn", 8, 8, output=tmp_path / "out")
    plain, auto = (bitbrush.load(tmp_path / "out", kernel=name).unet for name in ("reference", "auto"))
    chosen = {kernels.chosen(m, "cpu") for m in auto.modules() if hasattr(m, "declare_packed")}
    assert chosen == {"cpu-int8"}
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = plain(x, 5).sample, auto(x, 5).sample
    assert want.shape == got.shape and float((want - got).abs().max()) <= 1e-2 * float(want.abs().max())
    with pytest.raises(InputError, match="no kernel named 'fastest'"):
        bitbrush.load(tmp_path / "out", kernel="fastest")


def test_sixteen_bits_are_float(tmp_path: Path) -> None:
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        want = least_pipeline().unet(x, 5).sample
    ran = 0
    for recipe in ("rtn", "rtn-dynamic", "ptq4dm", "qdiffusion"):
        pipe = least_pipeline()
        result = quantize(pipe, recipe, 16, 16, output=tmp_path / recipe)
        with torch.no_grad():
            assert torch.equal(pipe.unet(x, 5).sample, want), recipe
            again = bitbrush.load(tmp_path / recipe).unet(x, 5).sample  # weights mapped from a file lie less aligned
            assert torch.allclose(again, want, rtol=0, atol=1e-6)
        assert not result.plan.layers and result.history["average_bits"] == 32
        ran += 1
    for weights, activations in ((16, 8), (4, 16)):
        pipe = least_pipeline()
        result = quantize(pipe, "qdiffusion", weights, activations)
        assert result.proof["ok"]
        for layer in wrap.layers(pipe.unet).values():
            assert (layer.spec.weight is None) == (weights == 16)
            assert (layer.spec.activation is None) == (activations == 16)
        ran += 1
    assert ran == 6


def test_presets() -> None:
    pipe = tiny.pipeline("unconditional")
    quantize(pipe, "ptq4dm", 8, 8, preset="output")
    positions = [
        layer.spec.activation.position for layer in wrap.layers(pipe.unet).values() if layer.spec.activation is not None
    ]
    assert set(positions) == {"output"} and wrap.layers(pipe.unet)["conv_out"].spec.activation is None
    pipe = tiny.pipeline("unconditional")
    result = quantize(pipe, "qdiffusion", preset="attention")
    processors = [m for m in pipe.unet.modules() if isinstance(m, QuantAttention)]
    assert len(processors) == 4 and all(
        getattr(p, o) is not None for p in processors for o in ("q", "k", "v", "softmax")
    )
    assert {p.face for p in processors} == {"packed"} and result.proof["model"]["equal"]
    shown = bitbrush.read_recipe("qdiffusion", preset="demo")
    assert next(s for s in shown.steps if s.do == "calibrate").samples < 200  # type: ignore[attr-defined]


def test_a_recipe_file_and_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(WHOLE)
    result = bitbrush.quantize(
        least_pipeline(), tmp_path / "mine.toml", 5, 7, settings={"weights.iterations": 1}, progress=Silent()
    )
    assert (result.recipe.name, result.recipe.weights, result.recipe.activations) == ("small", 5, 7)
    step = next(s for s in result.recipe.steps if s.label == "weights")
    assert step.iterations == 1  # type: ignore[attr-defined]


# ---- prompts -----------------------------------------------------------------------------------------------------
def test_prompts() -> None:
    for ask in (quantize, lambda m, **k: bitbrush.dry_run(m, "rtn", 4, 8, settings=SMALL, **k)):
        with pytest.raises(InputError, match="8 prompts are needed, 3 were given") as caught:
            ask(tiny.pipeline("text"), prompts=["a", "b", "c"])
        assert complete(caught.value)
    said = Said()
    quantize(tiny.pipeline("text"), prompts=None, progress=said)
    assert len([line for line in said.lines if "bundled" in line]) == 1  # said once
    said = Said()
    quantize(tiny.pipeline("unconditional"), prompts=None, progress=said)
    assert not any("bundled" in line for line in said.lines)
    a, b = (quantize(tiny.pipeline("text"), prompts=p) for p in (PROMPTS, PROMPTS[::-1]))
    assert not torch.equal(tiny.run(a.pipeline.unet), tiny.run(b.pipeline.unet))


# ---- outputs, resume -----------------------------------------------------------------------------------------------
def test_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name in ("full", "full/mine.txt"):
        with pytest.raises(InputError) as caught:
            quantize(least_pipeline(), output=tmp_path / name)
        assert complete(caught.value) and (tmp_path / "full" / "mine.txt").read_text() == "mine"
    quantize(least_pipeline(), output=tmp_path / "done")
    before = artifact(tmp_path / "done")
    with pytest.raises(InputError, match="not empty"):
        quantize(least_pipeline(), output=tmp_path / "done")
    with pytest.raises(InputError, match="nothing to resume") as caught:
        bitbrush.resume(tmp_path / "done", least_pipeline())
    assert "complete" in (caught.value.why or "") and artifact(tmp_path / "done") == before
    with pytest.raises(InputError, match="nothing to resume") as caught:
        bitbrush.resume(tmp_path / "never")
    assert complete(caught.value)


class Stopping(Disk):
    """The disk fills up after some operations."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _op(self, kind: str, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "full")


def stopped(out: Path, target: Any, at: int = 150, **choices: Any) -> None:
    with pytest.raises(ResourceError) as caught:
        quantize(target, output=out, disk=Stopping(at), **choices)
    assert complete(caught.value) and "resume" in (caught.value.try_ or "")


def test_what_is_refused_before_the_first_unit_leaves_nothing_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = {"calibrate.samples": 10**6, "calibrate.trajectories": 1}
    with pytest.raises(InputError, match="cannot come from 1 traject") as caught:
        quantize(tiny.pipeline("text"), output=out, settings=few)
    assert complete(caught.value) and list(out.iterdir()) == []
    assert quantize(tiny.pipeline("text"), output=out).proof["ok"]


def test_resume(saved_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(str(saved_pipeline), output=tmp_path / "whole", device="cpu")
    monkeypatch.chdir(saved_pipeline.parent)
    stopped(tmp_path / "out", "tiny", device="cpu")
    with pytest.raises(InputError, match="unfinished run"):
        quantize(str(saved_pipeline), output=tmp_path / "out")
    with pytest.raises(ArtifactError):
        bitbrush.load(tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # a path that was relative is still found
    result = bitbrush.resume(tmp_path / "out", progress=Silent())
    assert result.proof["ok"] and artifact(tmp_path / "out") == artifact(tmp_path / "whole")
    stopped(tmp_path / "object", tiny.pipeline("text"))
    with pytest.raises(InputError, match="began with a pipeline object"):
        bitbrush.resume(tmp_path / "object")
    bitbrush.resume(tmp_path / "object", tiny.pipeline("text"), progress=Silent())
    assert artifact(tmp_path / "object") == artifact(tmp_path / "whole")


def test_a_changed_run_is_refused_and_the_change_named(tmp_path: Path) -> None:
    """Every field of the fingerprint, changed in the record or in the world."""
    out = tmp_path / "out"
    stopped(out, tiny.pipeline("text"))
    record = out / ".run" / "run.json"
    text = record.read_text()
    fields = json.loads(text)["fingerprint"]
    assert set(fields) >= {"model", "pipeline", "recipe", "prompts", "seed", "device", "bitbrush", "torch", "diffusers"}
    ran = 0
    for field in fields:
        data = json.loads(text)
        data["fingerprint"][field] = "other"
        record.write_text(json.dumps(data))
        with pytest.raises(InputError) as caught:
            bitbrush.resume(out, tiny.pipeline("text"))
        assert f"{field}: other ->" in (caught.value.why or "") and complete(caught.value)
        ran += 1
    record.write_text(text)
    other: dict[str, Any] = {"model": tiny.pipeline("text", 1)}
    other["pipeline"] = tiny.pipeline("text")
    other["pipeline"].scheduler.register_to_config(beta_end=0.013)
    for field, pipe in other.items():
        with pytest.raises(InputError, match=f"{field}: "):
            bitbrush.resume(out, pipe)
        ran += 1
    changes = {
        "recipe": lambda asked: asked.update(recipe=asked["recipe"].replace("points = 25", "points = 26")),
        "seed": lambda asked: asked.update(seed=5),
        "prompts": lambda asked: asked["prompts"].reverse(),
    }
    for field, change in changes.items():
        data = json.loads(text)
        change(data["asked"])
        record.write_text(json.dumps(data))
        with pytest.raises(InputError, match=f"{field}: "):
            bitbrush.resume(out, tiny.pipeline("text"))
        ran += 1
    record.write_text(text[:50])
    with pytest.raises(ArtifactError, match="record is damaged"):
        bitbrush.resume(out, tiny.pipeline("text"))
    assert ran == len(fields) + 5 >= 14
    record.write_text(text)
    assert bitbrush.resume(out, tiny.pipeline("text"), progress=Silent()).proof["ok"]


def test_a_model_is_not_quantized_twice(tmp_path: Path) -> None:
    pipe = least_pipeline()
    quantize(pipe, output=tmp_path / "out")
    half = least_pipeline()
    stopped(tmp_path / "half", half, at=60)  # a run that failed has wrapped the model
    for target in (pipe, pipe.unet, half, str(tmp_path / "out"), str(tmp_path / "out" / "unet")):
        with pytest.raises(InputError, match="already quantized") as caught:
            quantize(target, "rtn-dynamic")
        assert complete(caught.value)


# ---- refused -----------------------------------------------------------------------------------------------------
def test_nan_names_layer_and_timestep(tmp_path: Path) -> None:
    pipe = tiny.pipeline("text")
    with torch.no_grad():
        pipe.unet.mid_block.resnets[1].conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError) as caught:
        quantize(pipe, output=tmp_path / "out")
    assert (caught.value.where or "").startswith("mid_block.resnets.1.conv2, timestep") and caught.value.exit_code == 6


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000, total=1, used=1))
    with pytest.raises(ResourceError, match="GB are needed") as caught:
        quantize(least_pipeline(), output=tmp_path / "out")
    assert complete(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [None, 3, object(), torch.nn.Linear(2, 2)], ids=lambda t: type(t).__name__)
def test_what_is_not_a_model(target: Any) -> None:
    for ask in (quantize, bitbrush.inspect, bitbrush.dry_run):
        with pytest.raises(InputError):
            ask(target, recipe="rtn-dynamic")


# ---- looking only --------------------------------------------------------------------------------------------------
def test_inspect_and_dry_run_change_nothing(saved_pipeline: Path) -> None:
    pipe = tiny.pipeline("text")
    before = tiny.run(pipe.unet)
    seen = bitbrush.inspect(pipe)
    planned = bitbrush.dry_run(pipe, "qdiffusion", 4, 8, settings=TRAIN, prompts=PROMPTS)
    assert torch.equal(tiny.run(pipe.unet), before) and not wrap.layers(pipe.unet)
    assert sum(row["share_of_weights"] for row in seen.rows) + seen.kept_float[-1]["share"] == pytest.approx(1)
    assert sum(row["share_of_compute"] for row in seen.rows) == pytest.approx(1)
    split = [row for row in seen.rows if row["segments"]]
    assert len(split) == 4 and all(sum(row["segments"]) == row["shape"][1] for row in split)
    assert all(isinstance(v, (int, float)) for k, v in seen.totals.items()) and str(seen).count("\n") > 50
    assert seen.estimates["seconds"] > 0 and seen.estimates["tape_bytes"] > 0 and seen.estimates["peak_bytes"] > 0
    assert (
        json.loads(json.dumps(planned))["recipe"] == bitbrush.read_recipe("qdiffusion", 4, 8, settings=TRAIN).to_toml()
    )
    from_path = bitbrush.inspect(str(saved_pipeline)).to_json()
    assert from_path["totals"] == seen.to_json()["totals"] and from_path["rows"] == seen.rows
    bare = bitbrush.inspect(str(saved_pipeline / "unet"), recipe="rtn-dynamic")
    assert {item["why"] for item in bare.kept_float} >= {"the baseline leaves the ends of the network float"}


def test_a_packed_size_is_estimated_well(tmp_path: Path) -> None:
    for recipe in ("rtn-dynamic", "qdiffusion"):
        estimated = bitbrush.inspect(tiny.pipeline("text"), recipe=recipe).totals["packed_bytes"]
        quantize(tiny.pipeline("text"), recipe, output=tmp_path / recipe)
        size = (tmp_path / recipe / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        header = int.from_bytes(
            (tmp_path / recipe / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:8], "little"
        )
        assert abs(estimated - (size - header - 8)) < 0.05 * size, recipe


def test_every_error_is_a_bitbrush_error() -> None:
    for family in (InputError, ArtifactError, ResourceError, NumericsError):
        assert issubclass(family, BitbrushError)
