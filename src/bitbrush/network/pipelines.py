"""What bitbrush has to know of diffusers pipelines: which module denoises, what a call takes, how to run it seeded."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
) -> Tensor:
    """Run the pipeline's own call, one trajectory a generator, mostly for the sake of hooks on its denoiser.

    Returns:
        The final latents, float32 on the CPU, one a generator; pictures where the pipeline always decodes.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    wanted: dict[str, Any] = {"num_inference_steps": steps, "generator": generators}
    if prompts is not None:
        wanted |= {"prompt": prompts, "guidance_scale": guidance, "output_type": "latent"}
    else:
        wanted |= {"batch_size": len(generators), "output_type": "np", "eta": 0.0, "use_clipped_model_output": True}
    with torch.no_grad(), quiet(pipeline):
        out = pipeline(**{name: value for name, value in wanted.items() if name in accepted})
    return torch.as_tensor(out[0]).detach().float().cpu()


def influence(pipeline: Any, steps: int) -> dict[float, float]:
    """How far the sample at the end moves with the denoiser's answer at each timestep, all other answers held.

    A scheduler is linear in what it is given, so this is its response to one small answer a timestep: for DDIM with
    noise estimates, the differences of ``sigma / alpha`` between steps. What the network makes of a sample that has
    moved does not count. The pipeline's own scheduler is not touched.

    Args:
        pipeline: Whose scheduler.
        steps: Sampling steps.

    Returns:
        Timestep to absolute influence; calls at one timestep add up.
    """
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    times = list(scheduler.timesteps)
    small = 1e-3  # far from where a scheduler clips
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "generator" in known:  # the same noise in every row
        extra["generator"] = [torch.Generator("cpu").manual_seed(0) for _ in range(len(times) + 1)]
    sample = torch.zeros(len(times) + 1, 1, 1, 1)
    for k, timestep in enumerate(times):
        answer = torch.zeros_like(sample)
        answer[k] = small
        sample = scheduler.step(answer, timestep, sample, **extra, return_dict=False)[0]
    moved = ((sample[:-1] - sample[-1]).flatten() / small).abs()
    found: dict[float, float] = {}
    for timestep, value in zip(times, moved.tolist(), strict=True):
        found[float(timestep)] = found.get(float(timestep), 0.0) + value
    return found


@contextmanager
def answered(model: nn.Module, answer: Callable[[float, Callable[[], Tensor]], Tensor], size: int) -> Iterator[None]:
    """Inside the block calls of the denoiser are answered by ``answer(timestep, call)``.

    ``call()`` runs the denoiser on the inputs of this call, at most ``size`` samples at a time, and returns its output;
    it may be called more than once. Hooks of the denoiser run once around all of that. A sampler may so be given many
    trajectories at once, whatever fits into the memory of the denoiser.
    """
    former, forward = model.__dict__.get("forward"), model.forward

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        shapes: list[Any] = []

        def call() -> Tensor:
            parts = [_part(model, forward, (args, kwargs), a, size) for a in range(0, len(given["sample"]), size)]
            shapes[:] = [parts[0]]
            return torch.cat([first_output(part) for part in parts])

        result = answer(float(torch.as_tensor(given["timestep"]).flatten()[0]), call)
        like = shapes[0]
        return (result, *like[1:]) if isinstance(like, tuple) else type(like)(sample=result)

    model.__dict__["forward"] = replaced
    try:
        yield
    finally:
        model.__dict__.pop("forward")
        if former is not None:
            model.__dict__["forward"] = former


def first_output(out: Any) -> Tensor:
    """The sample that a denoiser answers with."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return tensor


def _part(model: nn.Module, forward: Callable[..., Any], given: Any, start: int, size: int) -> Any:
    """The denoiser's answer to samples ``start .. start + size`` of a call; what is shared by all samples stays."""
    (args, kwargs), count = given, len(given[0][0] if given[0] else given[1]["sample"])

    def cut(leaf: Any) -> Any:
        own = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count
        return leaf[start : start + size] if own else leaf

    clock = getattr(model, "bitbrush_clock", None)
    now = None if clock is None else clock.now
    a, k = pytree.tree_map(cut, (args, kwargs))
    with clock.at(cut(now)) if now is not None and clock is not None else nullcontext():
        return forward(*a, **k)
