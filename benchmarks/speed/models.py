"""The networks whose steps are timed: configs as the models' own repositories have them, and inputs of one step.

Weights are random: how long a step takes hangs on shapes alone. No hub is asked for anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from bitbrush.network.clock import once

diffusers.utils.logging.set_verbosity_error()  # else every network in bf16 is warned of
Inputs = dict[str, Any]
Noise = Callable[..., Tensor]

SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "addition_embed_type_num_heads": 64,
    "projection_class_embeddings_input_dim": 2816, "norm_num_groups": 32,
}  # fmt: skip
SD15 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32,
}  # fmt: skip
DIT = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "attention_bias": True, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "dropout": 0.0,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 0, "num_single_layers": 8, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
EMOJI = {
    "sample_size": 32, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (128, 256, 384),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8, "cross_attention_dim": 256, "norm_num_groups": 32,
}  # fmt: skip
FLUX_TOKENS, FLUX_TEXT = 4096, 512
TEXT = 77


@dataclasses.dataclass(frozen=True)
class Model:
    """A network to be timed.

    Attributes:
        name: In files and on the command line.
        title: On the page.
        kind: Class of diffusers.
        config: Its arguments.
        batch: Samples of a step.
        inputs: (model, noise) to the keyword arguments of a forward.
        small: What a smoke run changes in the config.
        tokens: Of a picture, where the network takes tokens, and of a text.
    """

    name: str
    title: str
    kind: str
    config: dict[str, Any]
    batch: int
    inputs: Callable[[Model, Noise], Inputs]
    small: dict[str, Any]
    tokens: tuple[int, int] = (0, TEXT)

    @property
    def pictures(self) -> bool:
        """Whether its tensors are pictures, for which channels_last is a choice."""
        return self.kind.startswith("UNet")

    def shrunk(self) -> Model:
        """The same network, tiny."""
        tokens = (min(self.tokens[0], 16), min(self.tokens[1], 5))
        return dataclasses.replace(self, config=self.config | self.small, batch=min(self.batch, 2), tokens=tokens)

    def on_meta(self) -> nn.Module:
        """The network without data."""
        with torch.device("meta"):
            net: nn.Module = getattr(diffusers, self.kind)(**self.config)
        return net.eval().requires_grad_(False)

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Random arguments of a step, on the device; pictures are channels_last."""
        drawn = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            if device == "meta":
                return torch.empty(shape, device="meta", dtype=dtype)
            made = torch.randn(shape, generator=drawn).to(device, dtype)
            return made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made

        found = self.inputs(self, noise)
        return {name: _placed(value, device) for name, value in found.items()} | {"return_dict": False}


def _placed(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {name: _placed(one, device) for name, one in value.items()}
    return once(value).to(device).expand(value.shape) if isinstance(value, Tensor) else value


def _unet(model: Model, noise: Noise) -> Inputs:
    config, batch = model.config, model.batch
    size, wide = config["sample_size"], config["cross_attention_dim"]
    found: Inputs = {
        "sample": noise(batch, config["in_channels"], size, size),
        "timestep": torch.tensor(481),
        "encoder_hidden_states": noise(batch, model.tokens[1], wide),
    }
    if config.get("addition_embed_type") == "text_time":
        text = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        ids = torch.tensor([8.0 * size, 8.0 * size, 0.0, 0.0, 8.0 * size, 8.0 * size]).repeat(batch, 1)
        found["added_cond_kwargs"] = {"text_embeds": noise(batch, text), "time_ids": ids}
    return found


def _dit(model: Model, noise: Noise) -> Inputs:
    size, batch = model.config["sample_size"], model.batch
    return {
        "hidden_states": noise(batch, model.config["in_channels"], size, size),
        "timestep": torch.tensor([481]).expand(batch),  # as the pipeline does
        "class_labels": torch.full((batch,), 207),
    }


def _flux(model: Model, noise: Noise) -> Inputs:
    config, batch, (tokens, text) = model.config, model.batch, model.tokens
    return {
        "hidden_states": noise(batch, tokens, config["in_channels"]),
        "encoder_hidden_states": noise(batch, text, config["joint_attention_dim"]),
        "pooled_projections": noise(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5), "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


def _tiny() -> dict[str, Any]:
    from bitbrush import assets

    config = json.loads((assets.path("emoji-sd-tiny") / "unet" / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def find(name: str) -> Model:
    """A model by its name."""
    return MODELS[name]()


_TINY_UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
              "norm_num_groups": 8}  # fmt: skip
_TINY_CROSS = _TINY_UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}  # fmt: skip
MODELS: dict[str, Callable[[], Model]] = {
    "sdxl": lambda: Model(
        "sdxl", "SDXL UNet, 1024 x 1024, batch 2", "UNet2DConditionModel", SDXL, 2, _unet,
        _TINY_UNET | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                      "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1),
                      "attention_head_dim": (2, 4), "addition_time_embed_dim": 8,
                      "projection_class_embeddings_input_dim": 80},
    ),
    "sd15": lambda: Model(
        "sd15", "SD 1.5 UNet, 512 x 512, batch 2", "UNet2DConditionModel", SD15, 2, _unet,
        _TINY_CROSS,
    ),
    "dit": lambda: Model(
        "dit", "DiT-XL/2, 256 x 256, batch 2", "DiTTransformer2DModel", DIT, 2, _dit,
        {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "sample_size": 8},
    ),
    "flux": lambda: Model(
        "flux", "FLUX-dev-like, 8 single blocks, 1024 x 1024, batch 1", "FluxTransformer2DModel", FLUX, 1, _flux,
        {"num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
         "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}, tokens=(FLUX_TOKENS, FLUX_TEXT),
    ),
    "emoji": lambda: Model(
        "emoji", "emoji-sd UNet, batch 32", "UNet2DConditionModel", EMOJI, 32, _unet, _TINY_CROSS, tokens=(0, 24),
    ),
    "emoji-tiny": lambda: Model(
        "emoji-tiny", "emoji-sd-tiny UNet, batch 32", "UNet2DConditionModel", _tiny(), 32, _unet, _TINY_CROSS,
    ),
}  # fmt: skip
"""Models by name, the most telling first."""
