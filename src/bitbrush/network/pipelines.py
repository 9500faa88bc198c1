"""What bitbrush has to know of diffusers pipelines: which module denoises, what a call takes, how to run it seeded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitbrush.errors import InputError

DENOISERS = ("unet", "transformer")


def denoiser_name(pipeline: Any) -> str:
    """Attribute of the pipeline's denoiser: ``unet`` or ``transformer``."""
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise InputError(
        f"a {type(pipeline).__name__} has no denoiser", why=f"none of {', '.join(DENOISERS)} is a module",
        try_="use a text-to-image or an unconditional diffusers pipeline",
    )


def takes_prompt(pipeline: Any) -> bool:
    """Whether the pipeline's call takes prompts (text-to-image) or not (unconditional)."""
    return "prompt" in inspect.signature(type(pipeline).__call__).parameters


def text_tokens(pipeline: Any) -> int:
    """Length of the text condition, 77 where there is no tokenizer to ask."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    length = getattr(tokenizer, "model_max_length", 77)
    return int(length) if isinstance(length, int) and length < 10_000 else 77


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar inside the block."""
    missing = object()
    before = getattr(pipeline, "_progress_bar_config", missing)
    pipeline.set_progress_bar_config(**(before if isinstance(before, dict) else {}) | {"disable": True})
    try:
        yield
    finally:
        if before is missing:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before


def sample_latents(
    pipeline: Any, prompts: list[str] | None, generators: list[torch.Generator], *, steps: int, guidance: float
) -> None:
    """Run the pipeline's own call, one trajectory a generator, for the sake of hooks on its denoiser.

    Latents are not decoded where the pipeline can leave that out.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    wanted: dict[str, Any] = {"num_inference_steps": steps, "generator": generators}
    if prompts is not None:
        wanted |= {"prompt": prompts, "guidance_scale": guidance, "output_type": "latent"}
    else:
        wanted |= {"batch_size": len(generators), "output_type": "np", "eta": 0.0, "use_clipped_model_output": True}
    with torch.no_grad(), quiet(pipeline):
        pipeline(**{name: value for name, value in wanted.items() if name in accepted})
