"""A correction in an artifact: stored with the tensors, restored by every way of loading, covered by every hash."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitbrush.artifact.diffusers_plugin as plugin
import tiny
from bitbrush.artifact.load import load
from bitbrush.artifact.save import save
from bitbrush.errors import ArtifactError
from bitbrush.network import correction
from bitbrush.network.correction import CorrectionSpec

TIMES = (831.0, 665.0, 499.0, 333.0, 167.0, 1.0)
SPEC = CorrectionSpec(scheduler="DDIMScheduler", timesteps=TIMES, channels=4, guidance=4.0)
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def tables() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.2 * torch.randn(6, 4, generator=generator) for name in correction.TABLES}
    drawn["scale"] += 1
    drawn["shift"][0], drawn["bias"][0] = 0, 0
    return drawn


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(artifact, the pipeline it was saved from, its plan)."""
    plugin.register()
    pipe, plan = tiny.quantized_pipeline("text", 4)
    correction.install(pipe.unet, SPEC, tables())
    return save(pipe, tmp_path_factory.mktemp("correction") / "out", plan), pipe, plan


def draw(pipe: Any, steps: int = 6) -> Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bitbrush")
        out = pipe("red apple", latents=noise, num_inference_steps=steps, guidance_scale=4.0, output_type="latent")
    assert isinstance(out.images, Tensor)
    return out.images


def test_every_way_of_loading_restores_it(made: tuple[Path, Any, Any]) -> None:
    folder, pipe, _ = made
    expected, looked = draw(pipe), 0
    unets: list[Callable[[], Any]] = [
        lambda: load(folder).unet,
        lambda: StableDiffusionPipeline.from_pretrained(folder).unet,
        lambda: UNet2DConditionModel.from_pretrained(folder / "unet"),
        lambda: AutoModel.from_pretrained(str(folder / "unet")),
        lambda: UNet2DConditionModel.from_pretrained(folder / "unet", device_map={"": "cpu"}),
    ]
    for make in unets:
        unet = make()
        found = correction.of(unet)
        assert found.spec == SPEC and all(torch.equal(getattr(found, k), v) for k, v in tables().items())
        assert torch.equal(found.timesteps, torch.tensor(TIMES)) and not any(b.is_meta for b in found.buffers())
        other = tiny.pipeline("text")
        other.unet = unet
        assert torch.equal(draw(other), expected)
        looked += 1
    assert looked == 5
    correction.remove(other.unet)
    assert not torch.equal(draw(other), expected), "the correction does something"


def test_saving_again_gives_the_same_bytes(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, _, plan = made
    again = save(load(folder), tmp_path / "again", plan)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) > 8 and WEIGHTS in files
    assert [f for f in files if (folder / f).read_bytes() != (again / f).read_bytes()] == []
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.unet.save_pretrained(tmp_path / "unet")
    assert (tmp_path / "unet" / WEIGHTS.name).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_what_is_stored(made: tuple[Path, Any, Any]) -> None:
    folder, *_ = made
    stored = {k: v for k, v in load_file(folder / WEIGHTS).items() if k.startswith(correction.NAME)}
    assert {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()} == {
        f"bitbrush_correction.{name}": (torch.float32, (6, 4)) for name in ("scale", "bias", "shift")
    }
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert config["correction"] == SPEC.model_dump(mode="json")
    plain, plan = tiny.quantized_pipeline("text", 4)
    assert "correction" not in plugin.attach(plain.unet, plan).to_dict()


def test_without_one_nothing_has_changed(saved: Callable[..., Any]) -> None:
    config = saved("text", 4).pipe.unet.config.quantization_config
    data = config.to_dict()
    assert config.correction is None and set(data) == {"quant_method", "format_version", "bitbrush_version", "plan",
                                                       "digest"}
    assert correction.find(load(saved("text", 4).folder).unet) is None


def test_damage_is_an_error(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            data = load_file(folder / WEIGHTS)
            change(data)
            save_file(data, folder / WEIGHTS, {"format": "pt"})

        return apply

    def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            path = folder / "unet" / "config.json"
            data = json.loads(path.read_text())
            change(data["quantization_config"])
            path.write_text(json.dumps(data))

        return apply

    name = correction.NAME
    cases = [
        tensors(lambda d: d[f"{name}.bias"].add_(1e-3)), tensors(lambda d: d[f"{name}.scale"].neg_()),
        tensors(lambda d: d[f"{name}.shift"].fill_(torch.nan)), tensors(lambda d: d.pop(f"{name}.shift")),
        tensors(lambda d: d.update({f"{name}.scale": torch.ones(5, 4)})),
        config(lambda c: c.pop("correction")), config(lambda c: c["correction"].update(scheduler="Other")),
        config(lambda c: c["correction"].update(timesteps=[1.0, 2.0])), config(lambda c: c.update(correction=[1])),
        config(lambda c: c["correction"].update(channels=5)), config(lambda c: c["correction"].update(extra=1)),
        config(lambda c: c["correction"].update(guidance=2.0)),
    ]
    for i, damage in enumerate(cases):
        folder = tmp_path / str(i)
        shutil.copytree(made[0], folder)
        damage(folder)
        for attempt in (lambda f=folder: load(f), lambda f=folder: StableDiffusionPipeline.from_pretrained(f)):
            with pytest.raises(ArtifactError) as caught:
                attempt()
            assert caught.value.where and caught.value.why and caught.value.try_
    assert len(cases) == 12


def test_half_precision_keeps_the_tables(made: tuple[Path, Any, Any]) -> None:
    folder, *_ = made
    pipe = load(folder, torch_dtype=torch.bfloat16)
    found = correction.of(pipe.unet)
    assert {getattr(found, name).dtype for name in correction.TABLES} == {torch.float32}
    assert all(torch.equal(getattr(found, k), v) for k, v in tables().items())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    out = pipe("red apple", latents=noise, num_inference_steps=6, output_type="latent").images
    assert out.dtype == torch.bfloat16 and bool(torch.isfinite(out).all())


def test_a_loaded_pipeline_knows_its_scheduler(made: tuple[Path, Any, Any]) -> None:
    pipe = load(made[0])
    config = dict(pipe.scheduler.config)

    class Other(DDIMScheduler):
        pass

    draw(pipe)
    pipe.scheduler = Other.from_config(config)
    with pytest.raises(UserWarning, match="leaves the stored correction out"):
        draw(pipe)


def test_dequantizing_takes_it_off(made: tuple[Path, Any, Any]) -> None:
    unet = load(made[0]).unet
    before = len(unet._forward_hooks), len(unet._forward_pre_hooks)
    unet.dequantize()
    assert correction.find(unet) is None and not any(correction.NAME in name for name in unet.state_dict())
    assert (len(unet._forward_hooks), len(unet._forward_pre_hooks)) < before


def test_config_round_trip(made: tuple[Path, Any, Any]) -> None:
    config = made[1].unet.config.quantization_config
    again = plugin.BitbrushConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again.to_dict() == config.to_dict() and again.correction == SPEC
    assert config.__deepcopy__({}).to_dict() == config.to_dict()
