"""Save, load, save: the same numbers and the same bytes, in every dtype, on every route."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file

import tiny
from bitbrush.artifact import digest, manifest
from bitbrush.artifact.diffusers_plugin import attach, register
from bitbrush.artifact.load import load
from bitbrush.artifact.save import save
from bitbrush.errors import ArtifactError, BitbrushError, InputError
from bitbrush.network import wrap
from bitbrush.network.attention import QuantAttention

HERE = Path(__file__).resolve().parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VARIANTS: list[dict[str, Any]] = [
    {"kind": "text", "bits": 4},
    {"kind": "text", "bits": 3, "mixed": True},
    {"kind": "text", "bits": 5, "split": False, "timed": False},
    {"kind": "text", "bits": 4, "attention": True},
    {"kind": "text", "bits": 1, "activations": 4},
    {"kind": "unconditional", "bits": 2},
    {"kind": "unconditional", "bits": 4, "mixed": True},
    {"kind": "unconditional", "bits": 6, "dynamic": True},
    {"kind": "unconditional", "bits": 7, "timed": False, "attention": True},
    {"kind": "unconditional", "bits": 8},
]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    register()  # any number of times


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in manifest.list_files(folder)[0]}


def without_paths(data: dict[str, bytes]) -> dict[str, bytes]:
    """Contents as plain diffusers would write them, had it not noted the folder a config was loaded from."""
    out = {}
    for name, content in data.items():
        if name.endswith(("config.json", "model_index.json")):
            value = {k: v for k, v in json.loads(content).items() if k != "_name_or_path"}
            content = json.dumps(value, sort_keys=True).encode()
        out[name] = content
    return out


# ---- bit-equal -------------------------------------------------------------------------------------------------
def test_every_variant_loads_bit_equal(saved: Callable[..., Any]) -> None:
    for variant in VARIANTS:
        made = saved(**variant)
        loaded = load(made.folder)
        assert type(loaded) is type(made.pipe)
        assert torch.equal(tiny.run(loaded.unet), made.output), variant
        before, after = made.pipe.unet.state_dict(), loaded.unet.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        assert loaded.unet.config.quantization_config.plan == made.plan
        assert list(loaded.unet.config.quantization_config.plan.layers) == list(made.plan.layers), "execution order"
        assert loaded.unet.is_quantized and loaded.unet.quantization_method == "bitbrush"
        faces = {m.face for m in loaded.unet.modules() if isinstance(m, QuantAttention)}
        assert faces == ({"packed"} if variant.get("attention") else set())
    assert len(VARIANTS) == 10


def test_other_resolutions_and_batches_equal_the_simulation(saved: Callable[..., Any]) -> None:
    cases = 0
    for kind in ("text", "unconditional"):
        made = saved(kind, 4)
        loaded = load(made.folder).unet
        simulated = tiny.quantized_pipeline(kind, 4, pack=False)[0].unet
        channels = loaded.config.in_channels
        for batch, height, width in ((1, 8, 8), (3, 8, 8), (2, 16, 16), (1, 12, 20), (2, 4, 4)):
            sample = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
            words = {"encoder_hidden_states": torch.randn(batch, 7, 16)} if kind == "text" else {}
            for time in (3, 640, torch.linspace(0, 999, batch)):
                timestep = torch.as_tensor(time, dtype=torch.float32)
                a, b = (tiny.run(m, timestep, sample=sample, **words) for m in (loaded, simulated))
                assert a.shape == sample.shape and torch.equal(a, b)
                cases += 1
    assert cases == 30


def test_fresh_processes(saved: Callable[..., Any], tmp_path: Path) -> None:
    made = saved("text", 4)
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = {
        task: subprocess.Popen(
            [sys.executable, str(HERE / "fresh_process.py"), task, str(made.folder), str(tmp_path / task)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for task in ("plain", "closure")
    }
    expected = {"out": made.output, **made.pipe.unet.state_dict()}
    for task, process in running.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        got = load_file(tmp_path / task)
        assert len(got) >= len(expected) - 1 and all(torch.equal(value, expected[key]) for key, value in got.items())
    assert len(running) == 2


def test_pipelines_draw_the_same_pictures(saved: Callable[..., Any]) -> None:
    cases = 0
    for kind, arguments in (("text", {"prompt": ["red apple", "a cat"], "guidance_scale": 4.0}), ("unconditional", {})):
        made, pictures = saved(kind, 4), []
        for pipe in (made.pipe, load(made.folder)):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(3)
            out = pipe(num_inference_steps=3, output_type="np", generator=generator, **arguments).images
            pictures.append(torch.as_tensor(out))
        assert torch.equal(*pictures)
        cases += 1
    assert cases == 2


# ---- dtypes ----------------------------------------------------------------------------------------------------
def test_dtypes_keep_the_codes_and_the_float32_scales(saved: Callable[..., Any], tmp_path: Path) -> None:
    cases = 0
    for kind, cls in (("text", UNet2DConditionModel), ("unconditional", UNet2DModel)):
        made = saved(kind, 4, mixed=True, attention=kind == "text")
        reference = made.pipe.unet.state_dict()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model = cls.from_pretrained(made.folder / "unet", torch_dtype=dtype)
            assert model.dtype == dtype
            for name, tensor in model.state_dict().items():
                kept = "scale" in name.rsplit(".", 1)[-1] or not reference[name].is_floating_point()
                assert tensor.dtype == (reference[name].dtype if kept else dtype), name
                assert torch.equal(tensor, reference[name] if kept else reference[name].to(dtype)), name
            error = (tiny.run(model).float() - made.output).abs().mean() / made.output.abs().mean()
            assert error < (1e-9 if dtype == torch.float32 else 0.1)
            again = tmp_path / f"{kind}{dtype}"
            model.save_pretrained(again)
            assert torch.equal(tiny.run(cls.from_pretrained(again, torch_dtype=dtype)), tiny.run(model))
            cls.from_pretrained(again)  # half-precision biases into float32: the digest covers what was read
            cases += 1
    assert cases == 6


def test_casts_are_refused(saved: Callable[..., Any]) -> None:
    unet = load(saved("text", 4).folder).unet
    calls: list[Callable[[], Any]] = [
        unet.half, unet.float, lambda: unet.to(torch.float16), lambda: unet.to("cpu", torch.bfloat16),
        lambda: unet.to(dtype=torch.float16),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"not supported|unsupported"):
            call()
    assert len(calls) == 5 and unet.to("cpu") is unet


# ---- bytes -----------------------------------------------------------------------------------------------------
def test_saving_what_was_loaded_gives_the_same_bytes(saved: Callable[..., Any], tmp_path: Path) -> None:
    cases = 0
    for variant in VARIANTS[:2] + VARIANTS[5:7]:
        made = saved(**variant)
        first = files(made.folder)
        extras = {name: first[name] for name in ("proof.json", "recipe.toml", "history.json")}
        ours = load(made.folder)
        save(ours, tmp_path / f"ours{cases}", made.plan, extras)
        assert files(tmp_path / f"ours{cases}") == first
        load(made.folder).save_pretrained(tmp_path / f"theirs{cases}")  # diffusers' own
        theirs = files(tmp_path / f"theirs{cases}")
        assert theirs == {name: first[name] for name in first if name not in extras and name != manifest.NAME}
        DiffusionPipeline.from_pretrained(made.folder).save_pretrained(tmp_path / f"plain{cases}")
        plain = files(tmp_path / f"plain{cases}")
        assert plain[WEIGHTS] == first[WEIGHTS] and without_paths(plain) == without_paths(theirs)
        text = b"".join(content for name, content in first.items() if not name.endswith("tokenizer.json"))
        assert str(made.folder).encode() not in text and b"/tmp" not in text and b"/home" not in text
        cases += 1
    assert cases == 4


def test_two_runs_give_the_same_bytes(saved: Callable[..., Any], tmp_path: Path) -> None:
    made = saved("unconditional", 4)
    pipe, plan = tiny.quantized_pipeline("unconditional", 4)
    save(pipe, tmp_path / "again", plan, {k: v for k, v in files(made.folder).items() if k in (
        "proof.json", "recipe.toml", "history.json")})
    assert files(tmp_path / "again") == files(made.folder)


def test_bare_models(tmp_path: Path) -> None:
    for kind, cls in (("text", UNet2DConditionModel), ("unconditional", UNet2DModel)):
        pipe, plan = tiny.quantized_pipeline(kind, 4)
        folder = save(pipe.unet, tmp_path / kind, plan)
        model = load(folder)
        assert type(model) is cls and torch.equal(tiny.run(model), tiny.run(pipe.unet))
        assert sorted(files(folder)) == ["bitbrush.json", "config.json", "diffusion_pytorch_model.safetensors"]
        save(model, tmp_path / f"{kind}2", plan)
        assert files(tmp_path / f"{kind}2") == files(folder)


def test_packed_bits_on_disk(saved: Callable[..., Any]) -> None:
    """A code of b bits takes b bits: the file's tensors are as large as rows of padded codes and tables demand."""
    for bits in (2, 4, 8):
        made = saved("unconditional", bits)
        for name, layer in wrap.layers(made.pipe.unet).items():
            width = 8 if name in ("conv_in", "conv_out") else bits
            codes = layer.state_dict()[f"codes{width}"]
            assert codes.numel() == layer.out_channels_ * -(-layer.row_length * width // 128) * 16, name
    with pytest.raises(InputError, match="not packed"):
        attach(tiny.quantized_pipeline("unconditional", 4, pack=False)[0].unet, made.plan)


# ---- shards ----------------------------------------------------------------------------------------------------
def test_sharded_checkpoints(saved: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import modeling_utils

    made = saved("text", 4, mixed=True)
    made.pipe.unet.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) >= 4
    for parallel in (False, True):
        monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
        assert torch.equal(tiny.run(UNet2DConditionModel.from_pretrained(tmp_path)), made.output)
        for shard in shards:
            whole = shard.read_bytes()
            data = bytearray(whole)
            data[-3] ^= 4
            shard.write_bytes(data)
            with pytest.raises(ArtifactError):
                UNet2DConditionModel.from_pretrained(tmp_path)
            shard.write_bytes(whole)


def test_sharded_artifacts_have_every_shard_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = tiny.quantized_pipeline("unconditional", 4)
    original = UNet2DModel.save_pretrained
    monkeypatch.setattr(UNet2DModel, "save_pretrained", lambda self, folder, **kw: original(
        self, folder, **{**kw, "max_shard_size": "60KB"}))
    folder = save(pipe, tmp_path / "out", plan)
    assert sum(name.endswith(".safetensors") for name in manifest.check(folder).files) >= 2
    assert torch.equal(tiny.run(load(folder).unet), tiny.run(pipe.unet))


# ---- copies and dequantizing -----------------------------------------------------------------------------------
def test_deep_copies_are_independent(saved: Callable[..., Any], tmp_path: Path) -> None:
    made = saved("text", 4)
    for original in (made.pipe.unet, load(made.folder).unet):
        twin = copy.deepcopy(original)
        assert twin.bitbrush_clock is not original.bitbrush_clock
        assert torch.equal(tiny.run(twin), made.output)
        with original.bitbrush_clock.at(1.0):
            assert torch.equal(tiny.run(twin), made.output), "the copy has a clock of its own"
        assert twin.bitbrush_clock.now is None and original.bitbrush_clock.now is None
        twin.save_pretrained(tmp_path / "twin")
        assert torch.equal(tiny.run(UNet2DConditionModel.from_pretrained(tmp_path / "twin")), made.output)
        with pytest.raises(InputError, match="cannot be fused"):
            twin.fuse_lora()
        with torch.no_grad():
            twin.conv_in.bias += 1
        assert torch.equal(tiny.run(original), made.output)


def test_dequantize_gives_an_ordinary_model(saved: Callable[..., Any], tmp_path: Path) -> None:
    cases = 0
    for variant in (VARIANTS[1], VARIANTS[3], VARIANTS[8]):
        made = saved(**variant)
        model = load(made.folder).unet
        weights = {name: layer.decoded_weight() for name, layer in wrap.layers(model).items()}
        with wrap.float_activations(model):
            expected = tiny.run(model)
        plain = model.dequantize()
        assert not wrap.layers(plain) and not plain.is_quantized and "quantization_config" not in plain.config
        assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in weights.items())
        assert (tiny.run(plain) - expected).abs().max() < 1e-5
        plain.save_pretrained(tmp_path / str(cases))
        again = type(plain).from_pretrained(tmp_path / str(cases)).half()
        assert again.dtype == torch.float16
        cases += 1
    assert cases == 3


def test_digest_depends_on_everything(saved: Callable[..., Any]) -> None:
    made = saved("unconditional", 4)
    state = made.pipe.unet.state_dict()
    lines = {name: digest.tensor_line(name, tensor) for name, tensor in state.items()}
    whole = digest.combine(made.plan, lines)
    shuffled = dict(reversed(lines.items()))
    assert digest.combine(made.plan, shuffled) == whole == digest.of_model(made.pipe.unet, made.plan)
    seen = {whole, digest.combine(saved("unconditional", 2).plan, lines)}
    for name, tensor in state.items():
        other = tensor.clone().reshape(-1)
        other[-1] = other[-1] + 1
        seen.add(digest.combine(made.plan, {**lines, name: digest.tensor_line(name, other.reshape(tensor.shape))}))
    assert len(seen) == len(state) + 2


def test_wrong_use(saved: Callable[..., Any], tmp_path: Path) -> None:
    made = saved("text", 4)
    with pytest.raises(InputError, match="cannot be named"):
        save(made.pipe, tmp_path / "x", made.plan, {"../proof.json": b""})
    with pytest.raises(InputError, match="safetensors only"):
        made.pipe.unet.save_pretrained(tmp_path / "y", safe_serialization=False)
    with pytest.raises(BitbrushError, match="outside diffusers"):
        (tmp_path / "z").mkdir()
        (tmp_path / "z" / "config.json").write_text('{"_class_name": "Adam"}')
        (tmp_path / "z" / manifest.NAME).write_bytes(manifest.describe(tmp_path / "z", ["config.json"]).to_bytes())
        load(tmp_path / "z")
    assert isinstance(made.pipe, StableDiffusionPipeline | DDPMPipeline)
