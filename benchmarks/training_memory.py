"""GPU memory of finetuning beside that of training the float denoiser; used by `quality.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bitbrush.network.survey import example_inputs


def memory(
    folder: Path, text: bool, recipe: dict[str, Any], costs: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Peak memory of the finetune steps beside that of one training step of the float denoiser at the same batch."""
    tuned = {s["id"]: s["batch"] for s in recipe["step"] if s["do"] == "finetune"}
    peaks = {name: costs[name]["peak_memory"] for name in tuned if "peak_memory" in costs.get(name, {})}
    if not peaks:
        return {}
    worst = max(peaks, key=lambda name: peaks[name])
    one = training_step(folder, text, tuned[worst])
    return {"finetune_peak_memory": peaks[worst], "training_step_memory": one, "memory_ratio": peaks[worst] / one}


def training_step(folder: Path, text: bool, batch: int) -> int:
    """Peak bytes of one training step (Adam, bf16 autocast) of the float denoiser on a GPU, nothing else on it."""
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    unet = pipe.unet.to("cuda").train()
    tokens = pipe.tokenizer.model_max_length if text else 0
    args, kwargs = example_inputs(unet, batch=batch, tokens=tokens, device="cuda")
    adam = torch.optim.Adam(unet.parameters(), fused=True)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = (unet(*args, **kwargs).sample.float() - args[0]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.cuda.max_memory_allocated() - base
