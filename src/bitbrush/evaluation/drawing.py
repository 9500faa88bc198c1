"""The pictures of every arm: drawn once into a store, part by part, with the latents of the first ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbrush.engine.disk import write_bytes
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.arms import Arm, check_prompts
from bitbrush.evaluation.asked import Asked
from bitbrush.evaluation.sampling import Progress, denoiser, draw_with_trajectory
from bitbrush.evaluation.store import PICTURES, PictureSet, PictureStore

LATENTS, TIMESTEPS = "latents", "timesteps"
MADE = "made.json"  # beside the facts: what was seen of the pipeline when it drew


@dataclass
class Drawn:
    """The pictures of one arm.

    Args:
        sets: One a seed.
        scheduler, device: Of the pipeline that drew them.
        seconds: Spent on drawing, now.
        count: Pictures drawn now; the others were there.
    """

    sets: list[PictureSet]
    scheduler: str = ""
    device: str = ""
    seconds: float = 0.0
    count: int = 0

    @property
    def seconds_per_picture(self) -> float:
        """Of the pictures that were drawn now; 0 where all were there."""
        return self.seconds / self.count if self.count else 0.0

    def timesteps(self) -> list[float]:
        """Of the sampling steps [steps]; empty where no latents were kept."""
        first = next(iter(self.sets[0].parts(TIMESTEPS)), None) if TIMESTEPS in self.sets[0].tensors() else None
        return [] if first is None else [float(t) for t in first[0]]

    def shape(self) -> tuple[int, ...]:
        """Of a picture: 3, H, W."""
        return tuple(next(iter(self.sets[0].parts())).shape[1:])


@dataclass
class Drawer:
    """Draws arms; all have to agree with the first one, the reference, in resolution and timesteps.

    Args:
        asked: The settings.
        store: Where pictures lie.
        progress: Told of pictures.
        seen: Called with height and width of the reference as soon as its first pictures are there.
    """

    asked: Asked
    store: PictureStore
    progress: Progress | None
    seen: Callable[[int, int], None]
    _shape: tuple[int, ...] | None = None
    _times: list[float] = field(default_factory=list)

    def draw(self, arm: Arm, seeds: Sequence[int]) -> Drawn:
        """The pictures of an arm that has its turn; what is there is not drawn again.

        Raises:
            InputError: It does not fit the prompts or the reference.
            NumericsError: A picture is not finite.
            ArtifactError: Pictures of an earlier run are damaged.
        """
        drawn = Drawn([])
        for seed in seeds:
            facts = {"arm": arm.digest(), "device": _device(arm), **self.asked.facts(seed)}
            found = self.store.drawn(
                facts, self.asked.n, partial(self._part, arm, drawn, seed),
                batch=self.asked.batch, advance=self._advance,
            )  # fmt: skip
            drawn.sets.append(found)
            _say_made(drawn, found.folder)
        self._agree(arm.name, drawn.shape(), drawn.timesteps())
        return drawn

    def _part(self, arm: Arm, drawn: Drawn, seed: int, part: range) -> dict[str, Tensor]:
        asked, pipeline = self.asked, arm.pipeline()
        check_prompts(arm.name, type(pipeline), asked.prompts is not None)
        drawn.scheduler, drawn.device = type(pipeline.scheduler).__name__, str(denoiser(pipeline).device)
        started = time.perf_counter()
        pictures, times, latents = draw_with_trajectory(
            pipeline, prompts=asked.prompts, indices=part, tracked=len(part) if part.start < asked.kept_latents else 0,
            seed=seed, steps=asked.steps, guidance=asked.guidance, batch=asked.batch, autocast=asked.autocast,
        )  # fmt: skip
        drawn.seconds, drawn.count = drawn.seconds + time.perf_counter() - started, drawn.count + len(part)
        self._agree(arm.name, tuple(pictures.shape[1:]), times.tolist())
        tensors = {PICTURES: pictures}
        if latents.numel():
            tensors |= {LATENTS: latents.transpose(0, 1), TIMESTEPS: times.repeat(len(part), 1)}
        return tensors

    def _agree(self, name: str, shape: tuple[int, ...], times: list[float]) -> None:
        if self._shape is None:
            self.seen(*shape[-2:])
            self._shape = shape
        self._times = self._times or times
        if times and times != self._times:
            raise InputError(
                "two arms sample at different timesteps", where=name,
                why=f"{len(times)} steps from {times[:1]}, the reference has {len(self._times)} from {self._times[:1]}",
                try_="give all arms the scheduler of the reference",
            )  # fmt: skip
        if shape != self._shape:
            raise InputError(
                "two arms draw pictures of different size", where=name,
                why=f"{shape[2]}x{shape[1]} pixels, the reference {self._shape[2]}x{self._shape[1]}",
                try_="compare pipelines of one resolution",
            )  # fmt: skip

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            self.progress.advance(count)


def _device(arm: Arm) -> str:
    """Where an arm draws, as far as that decides about last bits: kinds of processors round differently."""
    found = getattr(arm.given, "device", None)
    kind = found.type if isinstance(found, torch.device) else torch.device(arm.device).type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _say_made(drawn: Drawn, folder: Path) -> None:
    """Scheduler and device beside the pictures; read back where nothing was drawn."""
    path = folder / MADE
    if drawn.scheduler:
        text = json.dumps({"scheduler": drawn.scheduler, "device": drawn.device}).encode()
        if not path.exists() or path.read_bytes() != text:
            write_bytes(path, text)
        return
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ArtifactError("a note beside pictures cannot be read", where=str(path), why=str(error),
                            try_="remove the folder; its pictures are drawn again") from error
    drawn.scheduler, drawn.device = str(made.get("scheduler", "")), str(made.get("device", ""))
