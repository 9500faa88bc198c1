"""Opening what a user names: every half, foreign or dangerous folder gives an error in four parts."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitbrush
import tiny
from bitbrush.errors import InputError
from bitbrush.loading import open_model
from small import complete


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.pipeline("text").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(target: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        open_model(target, "cpu")
    assert complete(caught.value), caught.value
    return caught.value


class Bomb:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (pytest.fail, ("a pickle was loaded",))


def bomb(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


# ---- what opens --------------------------------------------------------------------------------------------------
def test_pipeline_folders_model_folders_and_objects(whole: Path) -> None:
    opened = open_model(whole, "cpu")
    assert type(opened.pipeline).__name__ == "StableDiffusionPipeline" and opened.model is opened.pipeline.unet
    assert opened.tokens == tiny.TOKENS and opened.source == str(whole)
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    bare = open_model(str(whole / "unet"), "cpu")
    assert bare.pipeline is None and bare.tokens == 77
    assert torch.equal(tiny.run(bare.model), tiny.run(opened.model))
    pipe, unet = tiny.pipeline("unconditional"), tiny.text_unet()
    assert open_model(pipe).model is pipe.unet and open_model(unet).model is unet


def test_pickles_beside_safetensors_are_left_alone(copy: Path) -> None:
    bomb(copy / "unet" / "diffusion_pytorch_model.bin")
    bomb(copy / "text_encoder" / "pytorch_model.bin")
    assert open_model(copy, "cpu").pipeline is not None


# ---- missing and half --------------------------------------------------------------------------------------------
def test_missing(tmp_path: Path) -> None:
    for target in (tmp_path / "absent", str(tmp_path / "a" / "b"), "./absent", "absent", "~/absent", "a/b/c"):
        assert refused(target).what == "no such model"
    assert "neither model_index.json nor config.json" in (refused(tmp_path).why or "")


def test_every_component_that_is_missing(whole: Path, tmp_path: Path) -> None:
    ran = 0
    for part in sorted(p for p in whole.iterdir() if p.is_dir()):
        folder = Path(shutil.copytree(whole, tmp_path / part.name))
        shutil.rmtree(folder / part.name)
        assert refused(folder).what == f"the model folder lacks {part.name}/"
        ran += 1
    assert ran == 5


def test_every_file_that_is_missing_empty_or_cut(whole: Path, tmp_path: Path) -> None:
    """A download that stopped: never a traceback, never half a model."""
    needed = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ]
    ran = 0
    for name in needed:
        for how in ("missing", "empty", "cut"):
            folder = Path(shutil.copytree(whole, tmp_path / f"{ran}"))
            data = (folder / name).read_bytes()
            if how == "missing":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(b"" if how == "empty" else data[: len(data) * 2 // 3])
            error = refused(folder)
            assert str(folder) in (error.where or ""), (name, how)
            shutil.rmtree(folder)
            ran += 1
    assert ran == 24


def test_bare_folders_that_are_half(whole: Path, tmp_path: Path) -> None:
    ran = 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        for how in ("missing", "empty", "cut", "garbage"):
            folder = Path(shutil.copytree(whole / "unet", tmp_path / f"{ran}"))
            data = (folder / name).read_bytes()
            if how == "missing":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes({"empty": b"", "cut": data[:-9], "garbage": b"\xff" * 100}[how])
            refused(folder)
            ran += 1
    assert ran == 8


def test_weights_of_another_shape(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].contiguous()
    save_file(tensors, path)
    refused(copy)


def test_weights_that_are_missing(copy: Path) -> None:
    for part in ("unet", "vae"):
        path = copy / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[3]
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        assert name in refused(copy).what or part == "vae"
        if part == "unet":
            assert name in refused(copy / "unet").what
            save_file(tensors, path)


# ---- pickles, code -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_a_pickle_where_safetensors_belong(suffix: str, whole: Path, tmp_path: Path) -> None:
    ran = 0
    for part in ("unet", "vae", "text_encoder"):
        folder = Path(shutil.copytree(whole, tmp_path / part))
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        bomb(folder / part / f"{stem}{suffix}")
        assert "only a pickle" in refused(folder).what
        if part == "unet":
            assert "only a pickle" in refused(folder / "unet").what
        ran += 1
    bomb(tmp_path / f"model{suffix}")
    assert "only .safetensors" in refused(tmp_path / f"model{suffix}").what
    assert ran == 3


def test_code_in_a_model_folder(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "unet" / "mine.py").write_text("print('RUN')\nclass Mine: pass\n")
    (copy / "mine.py").write_text("print('RUN')\nclass Mine: pass\n")
    index = json.loads((copy / "model_index.json").read_text())
    for change in ({"unet": ["mine", "Mine"]}, {"extra": ["mine", "Mine"]}, {"_class_name": ["mine", "Mine"]}):
        (copy / "model_index.json").write_text(json.dumps({**index, **change}))
        (copy / "extra").mkdir(exist_ok=True)
        refused(copy)
    assert "RUN" not in capfd.readouterr().out


def test_a_custom_component_is_named(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["my_package", "MyUNet"]}))
    error = refused(copy)
    assert error.what == "component unet comes from 'my_package'" and "never" not in error.what


def test_classes_that_do_not_exist(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    for change in (
        {"unet": ["diffusers", "UNet9DModel"]},
        {"_class_name": "NoSuchPipeline"},
        {"_class_name": None},
        {"unet": ["diffusers", "AutoencoderTiny"]},
    ):
        (copy / "model_index.json").write_text(json.dumps({**index, **change}))
        refused(copy)
    for text in ("[1, 2]", "null", "3", '"x"'):
        (copy / "model_index.json").write_text(text)
        refused(copy)


def test_other_networks(tmp_path: Path) -> None:
    tiny.pipeline("text").vae.save_pretrained(tmp_path / "vae")
    assert "AutoencoderTiny" in refused(tmp_path / "vae").what
    (tmp_path / "odd").mkdir()
    for text in ("[]", "{}", "null", "{", '{"_class_name": 3}', '{"_class_name": ["UNet2DModel"]}'):
        (tmp_path / "odd" / "config.json").write_text(text)
        refused(tmp_path / "odd")


# ---- single files, artifacts ---------------------------------------------------------------------------------------
def test_single_files_that_cannot_be_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "foreign.safetensors")
    data = (tmp_path / "foreign.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-3])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello, this is not a checkpoint")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in ("cut", "empty", "text"):
        assert "cannot be loaded" in refused(tmp_path / f"{name}.safetensors").what
    assert "only .safetensors" in refused(tmp_path / "model.gguf").what


def test_an_artifact_is_not_a_model(tmp_path: Path) -> None:
    bitbrush.quantize(tiny.text_unet(), "rtn-dynamic", output=tmp_path / "out")
    assert refused(tmp_path / "out").what == "the model is already quantized"
