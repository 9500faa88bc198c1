"""The traps of plugging into diffusers, each with a test: registration, refusals, adapters, offloading, compiling."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    AutoModel,
    DDPMPipeline,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers import auto
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.quantizers import auto as transformers_auto

import bitbrush.artifact.diffusers_plugin as plugin
import tiny
from bitbrush.artifact.load import load
from bitbrush.errors import ArtifactError, InputError


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny float pipeline."""
    folder = tmp_path_factory.mktemp("float")
    tiny.text_pipeline().save_pretrained(folder)
    return folder


# ---- config and registration -----------------------------------------------------------------------------------
def test_registration() -> None:
    for _ in range(3):
        plugin.register()
    assert auto.AUTO_QUANTIZER_MAPPING["bitbrush"] is plugin.BitbrushQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitbrush"] is plugin.BitbrushConfig
    assert transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitbrush"] is plugin.BitbrushConfig
    assert sum(value is plugin.BitbrushQuantizer for value in auto.AUTO_QUANTIZER_MAPPING.values()) == 1


def test_a_future_register_quantizer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    def register_quantizer(name: str) -> Callable[[Any], Any]:
        return lambda cls: used.append((name, cls)) or cls  # type: ignore[func-returns-value]

    monkeypatch.setattr(auto, "register_quantizer", register_quantizer, raising=False)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "bitbrush")
    plugin.register()
    plugin.register()
    assert used == [("bitbrush", plugin.BitbrushQuantizer)]


def test_config_round_trip(saved: Callable[..., Any]) -> None:
    made = saved("text", 3, mixed=True)
    config = made.pipe.unet.config.quantization_config
    data = config.to_dict()
    json.dumps(data)
    assert isinstance(config, QuantizationConfigMixin) and config.quant_method.value == "bitbrush"
    assert data["quant_method"] == "bitbrush" and type(data["quant_method"]) is str
    again = plugin.BitbrushConfig.from_dict(json.loads(json.dumps(data, sort_keys=True)))
    assert again.to_dict() == data and again.plan == made.plan
    config_again, unused = plugin.BitbrushConfig.from_dict(data, return_unused_kwargs=True, other=1)
    assert config_again.to_dict() == data and unused == {"other": 1}
    assert f"{len(made.plan.layers)} layers" in repr(config) and "bitbrush" in str(config) and len(repr(config)) < 500
    assert len(config.to_json_string()) < 500 and dict(config)["digest"] == config.digest


def test_quantizer_properties(saved: Callable[..., Any]) -> None:
    quantizer = load(saved("text", 4).folder).unet.hf_quantizer
    assert (quantizer.is_serializable, quantizer.is_trainable, quantizer.is_compileable) == (True, False, True)


# ---- what is not ours: quantizing while loading -----------------------------------------------------------------
def test_quantizing_while_loading_is_refused(floating: Path) -> None:
    config = plugin.BitbrushConfig
    attempts: list[Callable[[], Any]] = [
        lambda: UNet2DConditionModel.from_pretrained(floating / "unet", quantization_config=config()),
        lambda: AutoModel.from_pretrained(floating / "unet", quantization_config=config()),
        lambda: StableDiffusionPipeline.from_pretrained(
            floating, quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config()})
        ),
        lambda: StableDiffusionPipeline.from_pretrained(
            floating,
            quantization_config=PipelineQuantizationConfig(
                quant_backend="bitbrush", quant_kwargs={"digest": ""}, components_to_quantize=["unet"]
            ),
        ),
        lambda: UNet2DConditionModel.from_single_file(
            str(floating / "unet" / "diffusion_pytorch_model.safetensors"), config=str(floating / "unet"),
            quantization_config=config(),
        ),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="bitbrush quantize") as caught:
            attempt()
        assert caught.value.where and caught.value.why and caught.value.try_
    assert len(attempts) == 5


def test_text_encoders_are_refused(floating: Path) -> None:
    both = [
        PipelineQuantizationConfig(quant_mapping={"text_encoder": plugin.BitbrushConfig()}),
        PipelineQuantizationConfig(
            quant_backend="bitbrush", quant_kwargs={"digest": ""}, components_to_quantize=["text_encoder"]
        ),
    ]
    for config in both:
        with pytest.raises(InputError, match="does not quantize transformers models"):
            StableDiffusionPipeline.from_pretrained(floating, quantization_config=config)
    assert len(both) == 2


def test_a_config_passed_with_an_artifact_yields_to_the_artifacts(saved: Callable[..., Any]) -> None:
    made = saved("text", 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = UNet2DConditionModel.from_pretrained(made.folder / "unet", quantization_config=plugin.BitbrushConfig())
    assert any("will be used" in str(w.message) for w in seen) and torch.equal(tiny.run(model), made.output)


def test_single_files_stay_diffusers_own(floating: Path, tmp_path: Path) -> None:
    """A float checkpoint in one file loads as ever while bitbrush is registered; in the original SD layout too."""
    expected = UNet2DConditionModel.from_pretrained(floating / "unet")
    state = expected.state_dict()
    original = {f"model.diffusion_model.{to_original(name)}": tensor for name, tensor in state.items()}
    assert len(set(original)) == len(state)
    save_file(original, tmp_path / "sd.safetensors")
    save_file(state, tmp_path / "diffusers.safetensors")
    for name in ("sd", "diffusers"):
        file = str(tmp_path / f"{name}.safetensors")
        model = UNet2DConditionModel.from_single_file(file, config=str(floating), subfolder="unet")
        assert torch.equal(tiny.run(model), tiny.run(expected)), name


def to_original(name: str) -> str:
    """A key of the two-level tiny UNet in the layout of the original Stable Diffusion checkpoints."""
    for old, new in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"), ("down_blocks.0.attentions.0", "input_blocks.1.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"), ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"), ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"), ("up_blocks.1.attentions.0", "output_blocks.2.1"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"), ("up_blocks.1.attentions.1", "output_blocks.3.1"),
    ):  # fmt: skip
        if name.startswith(old + "."):
            name = new + name[len(old) :]
            break
    for old, new in (
        (".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".time_emb_proj.", ".emb_layers.1."),
        (".norm2.", ".out_layers.0."), (".conv2.", ".out_layers.3."), (".conv_shortcut.", ".skip_connection."),
    ):  # fmt: skip
        if ".transformer_blocks." not in name:
            name = name.replace(old, new)
    return name


# ---- devices ---------------------------------------------------------------------------------------------------
def test_device_maps(saved: Callable[..., Any]) -> None:
    made, plain = saved("text", 4), saved("unconditional", 4)
    cases = 0
    for device_map in ("cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        for dtype in (None, torch.float32):
            model = UNet2DConditionModel.from_pretrained(
                made.folder / "unet", device_map=device_map, **({"torch_dtype": dtype} if dtype else {})
            )
            assert torch.equal(tiny.run(model), made.output)
            cases += 1
    assert torch.equal(tiny.run(UNet2DModel.from_pretrained(plain.folder / "unet", device_map="cpu")), plain.output)
    assert torch.equal(tiny.run(load(made.folder, device_map="cpu").unet), made.output)
    assert cases == 6


def test_disk_offloading_is_refused(saved: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved("text", 4).folder / "unet"
    with pytest.raises(InputError, match="offloaded to disk"):
        UNet2DConditionModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder=str(tmp_path))
    with pytest.raises((ArtifactError, InputError), match="not loaded"):
        UNet2DConditionModel.from_pretrained(folder, offload_state_dict=True)


def test_model_offloading(saved: Callable[..., Any]) -> None:
    made, cpu = saved("text", 4), torch.device("cpu")
    unet = load(made.folder).unet
    unet, hook = accelerate.cpu_offload_with_hook(unet, cpu)  # what enable_model_cpu_offload installs
    for time in (500, 20, 500):
        assert torch.equal(tiny.run(unet, time), tiny.run(made.pipe.unet, time))
        hook.offload()
    unet = accelerate.cpu_offload(load(made.folder).unet, execution_device=cpu)  # ... enable_sequential_cpu_offload
    assert any(parameter.is_meta for parameter in unet.parameters())
    assert torch.equal(tiny.run(unet), made.output) and torch.equal(tiny.run(unet), made.output)


def test_a_clock_that_is_elsewhere_than_its_table(saved: Callable[..., Any]) -> None:
    """Offloading moves the model after the clock was set: the time follows."""
    clock = load(saved("text", 4).folder).unet.bitbrush_clock
    clock.set(torch.tensor(250.0, device="cpu"))
    clock.timesteps = clock.timesteps.to("meta")
    assert clock.rows("ceil").is_meta  # an error about two devices before


# ---- adapters --------------------------------------------------------------------------------------------------
def adapter(folder: Path, targets: list[str]) -> Path:
    """A random LoRA of the tiny text UNet, saved as diffusers saves it."""
    torch.manual_seed(5)
    model = tiny.text_unet()
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model))
    return folder


def test_lora_on_linear_layers(saved: Callable[..., Any], tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", ["to_q", "to_v", "ff.net.0.proj"])
    made = saved("text", 4)
    pipe = load(made.folder)
    pipe.load_lora_weights(lora)
    changed = tiny.run(pipe.unet)
    assert (changed - made.output).abs().max() > 1e-3
    reference = tiny.quantized_pipeline("text", 4, pack=False)[0]  # the same numbers, simulated
    reference.load_lora_weights(lora)
    assert torch.equal(tiny.run(reference.unet), changed)
    fusing: list[Callable[[], Any]] = [
        pipe.fuse_lora, pipe.unet.fuse_lora, lambda: pipe.fuse_lora(components=["unet"], lora_scale=0.5),
        pipe.fuse_qkv_projections, pipe.unet.fuse_qkv_projections,
    ]
    for fuse in fusing:
        with pytest.raises(InputError, match="cannot be fused") as caught:
            fuse()
        assert caught.value.why and caught.value.try_
    with pytest.raises(InputError, match="LoRA adapters cannot be saved"):
        pipe.unet.save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match="LoRA adapters cannot be saved"):
        plugin.attach(pipe.unet, made.plan)
    assert len(fusing) == 5 and torch.equal(tiny.run(pipe.unet), changed), "nothing was half fused"
    pipe.unload_lora_weights()
    assert torch.equal(tiny.run(pipe.unet), made.output)
    pipe.unet.save_pretrained(tmp_path / "y")
    assert torch.equal(tiny.run(UNet2DConditionModel.from_pretrained(tmp_path / "y")), made.output)


def test_lora_on_convolutions(saved: Callable[..., Any], tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", ["conv1", "conv_shortcut", "proj_in", "proj_out"])
    made = saved("text", 4)
    pipe = load(made.folder)
    pipe.load_lora_weights(lora)
    assert (tiny.run(pipe.unet) - made.output).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(tiny.run(pipe.unet), made.output)


# ---- compiling -------------------------------------------------------------------------------------------------
def test_compiled_over_changing_timesteps(tmp_path: Path) -> None:
    """fullgraph, one compilation for all timesteps, equal to eager. One level, so that tracing takes seconds."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    ).eval()
    plan = tiny.plan_for(model, 4)
    plugin.attach(tiny.quantized_model(model, plan), plan)
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert any(len(spec.segments) == 2 for spec in plan.layers.values())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    outputs = [tiny.run(compiled, 1.0)]
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    times = (1.0, 37.0, 250.0, 500.0, 731.0, 999.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs += [tiny.run(compiled, time) for time in times[1:]]
    assert stats["unique_graphs"] == graphs and not torch._dynamo.utils.counters["graph_break"]
    assert all(torch.equal(out, tiny.run(loaded, time)) for out, time in zip(outputs, times, strict=True))
    assert len({float(out.abs().sum()) for out in outputs}) == len(times) and loaded.bitbrush_clock.now is None
    torch._dynamo.reset()


def test_unconditional_pipelines_offload_too(saved: Callable[..., Any]) -> None:
    made = saved("unconditional", 4)
    pipe = load(made.folder)
    assert isinstance(pipe, DDPMPipeline)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert torch.equal(tiny.run(pipe.unet), made.output)
