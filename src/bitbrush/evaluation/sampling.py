"""Pictures and trajectories, drawn so that two pipelines can be compared picture by picture.

The pipeline's own ``__call__`` and scheduler do the work. Only the initial noise is fixed: picture ``i`` starts from a
CPU generator seeded from ``(seed, i)``, so that it depends neither on the batch size nor on which other pictures are
drawn, up to the rounding of floating point sums (and except where a pipeline mixes its batch, as ranges taken over a
batch do).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitbrush.errors import InputError, NumericsError
from bitbrush.kernels import building
from bitbrush.network.pipelines import denoiser_name, quiet, takes_prompt


class Progress(Protocol):
    """What this package asks of a progress display."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def finish(self) -> None: ...


def noise_generator(seed: int, index: int) -> torch.Generator:
    """A CPU generator for picture ``index`` of the draw ``seed``: the first 63 bits of SHA-256 of ``"seed:index"``."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def denoiser(pipeline: Any) -> nn.Module:
    """The network that runs at every sampling step: ``pipeline.unet`` or ``pipeline.transformer``."""
    module: nn.Module = getattr(pipeline, denoiser_name(pipeline))
    return module


def with_ddim(pipeline: Any) -> Any:
    """The same denoiser under DDIM (``clip_sample=True``): the protocol for ``cifar10-ddpm``.

    The modules are shared, not copied; the pipeline given is not changed.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    if takes_prompt(pipeline):
        raise InputError(
            "only an unconditional pipeline can be put under DDIM here",
            where=type(pipeline).__name__,
            why="a text-to-image pipeline is compared with the scheduler of its own folder",
            try_='leave sampler at "own"',
        )
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    return DDIMPipeline(unet=denoiser(pipeline), scheduler=scheduler)


def draw(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None,
    n: int | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 16,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Draws pictures by the protocol.

    Args:
        pipeline: A diffusers pipeline, text-to-image or unconditional.
        prompts: Picture ``i`` is drawn from ``prompts[i]``; ``None`` for an unconditional pipeline.
        n: Number of pictures; they are the pictures 0 to n - 1.
        seed: Seed of the initial noise, together with the picture's index.
        steps: Sampling steps.
        guidance: Scale of classifier-free guidance; text-to-image only.
        batch: Pictures a call.
        indices: Which pictures to draw instead, for a draw in several parts.
        progress: Told of every finished batch.
        autocast: Run under autocast to this dtype (the protocol: bfloat16 on a GPU).

    Returns:
        Pictures [n, 3, H, W], float32, in [-1, 1], on the CPU.

    Raises:
        InputError: Prompts missing, too few, or given to an unconditional pipeline.
        NumericsError: A picture holds NaN or infinity.
    """
    chosen = _indices(pipeline, prompts, n, indices)
    call = _Call(pipeline, prompts, seed, steps, guidance, autocast)
    return torch.cat([pictures for _, pictures in call.batches(chosen, batch, progress)])


def trajectory(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None,
    n: int | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 16,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The latents that the denoiser sees at each sampling step. Arguments and errors as for ``draw``.

    Captured by a forward pre-hook on the denoiser. Under classifier-free guidance only the conditional half is kept.
    Schedulers that scale the model's input (Euler) show it scaled.

    Returns:
        Timesteps [steps], float32, and latents x_t [steps, n, C, H, W], float32, on the CPU. The first step's latents
        are the initial noise.
    """
    chosen = _indices(pipeline, prompts, n, indices)
    return draw_with_trajectory(
        pipeline, prompts=prompts, indices=chosen, tracked=len(chosen), seed=seed, steps=steps, guidance=guidance,
        batch=batch, progress=progress, autocast=autocast,
    )[1:]  # fmt: skip


def draw_with_trajectory(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None,
    n: int | None = None,
    tracked: int,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 16,
    indices: Sequence[int] | None = None,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``draw`` and ``trajectory`` in one pass; latents are kept of the first ``tracked`` pictures only.

    Returns:
        Pictures [n, 3, H, W], timesteps [steps] and latents [steps, min(tracked, n), C, H, W]. With ``tracked`` 0 the
        last two are empty.
    """
    chosen = _indices(pipeline, prompts, n, indices)
    call = _Call(pipeline, prompts, seed, steps, guidance, autocast)
    pictures: list[Tensor] = []
    latents: list[Tensor] = []
    times = torch.empty(0)
    for part in _split_at(chosen, tracked):
        keep = sum(len(p) for p in pictures) < tracked
        with _recording(denoiser(pipeline), keep) as seen:
            for members, drawn in call.batches(part, batch, progress):
                pictures.append(drawn)
                if keep:
                    times = torch.tensor([t for t, _ in seen])
                    latents.append(torch.stack([x[-len(members) :] for _, x in seen]))
                    seen.clear()
    return torch.cat(pictures), times, torch.cat(latents, dim=1) if latents else torch.empty(0)


class _Call:
    """One way of calling one pipeline; draws batch after batch."""

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str] | None,
        seed: int,
        steps: int,
        guidance: float,
        autocast: torch.dtype | None,
    ) -> None:
        self.pipeline, self.prompts, self.seed = pipeline, prompts, seed
        self.autocast = autocast
        accepted = inspect.signature(type(pipeline).__call__).parameters
        wanted = {"num_inference_steps": steps, "output_type": "pt", "guidance_scale": guidance}
        wanted |= {
            "eta": 0.0,
            "use_clipped_model_output": True,
        }  # DDIM's, where accepted
        if prompts is None:
            wanted.pop("guidance_scale")
        self.arguments = {name: value for name, value in wanted.items() if name in accepted}

    def batches(
        self, indices: Sequence[int], batch: int, progress: Progress | None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yields (indices, pictures) of one call after another."""
        with quiet(self.pipeline):
            for first in range(0, len(indices), batch):
                members = indices[first : first + batch]
                with building.reporting(progress):
                    pictures = self._draw(members)
                if progress is not None:
                    progress.advance(len(members))
                yield members, pictures

    @torch.no_grad()
    def _draw(self, indices: Sequence[int]) -> Tensor:
        arguments = dict(self.arguments, generator=[noise_generator(self.seed, i) for i in indices])
        if self.prompts is None:
            arguments["batch_size"] = len(indices)
        else:
            arguments["prompt"] = [self.prompts[i] for i in indices]
        with autocasting(self.pipeline, self.autocast):
            images = self.pipeline(**arguments).images
        pictures = torch.as_tensor(images).float().cpu() * 2 - 1
        bad = [i for i, picture in zip(indices, pictures, strict=True) if not bool(torch.isfinite(picture).all())]
        if bad:
            raise NumericsError(
                "the pipeline drew a picture that holds NaN or infinity",
                where=f"picture {bad[0]} (seed {self.seed}) of {type(self.pipeline).__name__}",
                why=f"{len(bad)} of the {len(indices)} pictures of this batch are not finite",
                try_="draw it in float32 (no autocast), or quantize with more bits",
            )
        return pictures


def _indices(
    pipeline: Any, prompts: Sequence[str] | None, n: int | None, indices: Sequence[int] | None
) -> Sequence[int]:
    if indices is None:
        if n is None:
            raise InputError("the number of pictures is missing", where="bitbrush.evaluation.draw", try_="pass n")
        indices = range(n)
    where, text = type(pipeline).__name__, takes_prompt(pipeline)
    if len(indices) < 1 or (n is not None and n != len(indices)) or min(indices) < 0:
        raise InputError(
            "the pictures to draw are not a set of at least one picture",
            where=where,
            why=f"n is {n}, and {len(indices)} indices are given",
            try_="pass n >= 1, or indices alone",
        )
    if text and (prompts is None or max(indices) >= len(prompts)):
        raise InputError(
            "there are fewer prompts than pictures to draw",
            where=where,
            why=f"picture {max(indices)} needs a prompt of its own, {0 if prompts is None else len(prompts)} are given",
            try_="give more prompts, or draw fewer pictures",
        )
    if not text and prompts is not None:
        raise InputError(
            "prompts are given to a pipeline that takes none",
            where=where,
            why="it draws unconditionally",
            try_="pass prompts=None",
        )
    return indices


def _split_at(indices: Sequence[int], k: int) -> list[Sequence[int]]:
    return [part for part in (indices[:k], indices[k:]) if len(part)]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, Tensor]:
    """(timestep, sample) of a denoiser's call."""
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    time = args[1] if len(args) > 1 and "timestep" not in kwargs else kwargs["timestep"]
    return float(torch.as_tensor(time).flatten()[0]), torch.as_tensor(sample)


@contextmanager
def _recording(module: nn.Module, keep: bool) -> Iterator[list[tuple[float, Tensor]]]:
    """Collects (timestep, input) of every forward of ``module`` while it lasts."""
    seen: list[tuple[float, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time, sample = given(args, kwargs)
        seen.append((time, sample.detach().float().cpu()))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True) if keep else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def autocasting(pipeline: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to a dtype on the pipeline's device; nothing for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(pipeline.device.type, dtype=dtype)
