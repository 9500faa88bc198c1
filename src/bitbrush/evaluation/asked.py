"""What an evaluation was asked for, checked before anything is drawn, and the networks that its metrics need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bitbrush
from bitbrush.errors import BitbrushError, InputError
from bitbrush.evaluation.arms import Arm
from bitbrush.evaluation.digests import Opaque, file_digest, module_digest, text_digest
from bitbrush.evaluation.extractors import Extractor, from_module, inception, zoo_classifier
from bitbrush.evaluation.optional import Unavailable
from bitbrush.evaluation.perceptual import PerceptualDistance, lpips
from bitbrush.evaluation.references import PictureFolder, Resize, Statistics, load_statistics
from bitbrush.evaluation.result import OTHER_SEEDS, REFERENCE, Missing
from bitbrush.evaluation.text import Evaluator, open_evaluator

PAIRED = ("psnr", "ssim", "lpips")
TEXT = ("clip", "r1")
DISTRIBUTION = ("fid", "sfid", "kid", "is", "prdc")
METRICS = PAIRED + TEXT + DISTRIBUTION
FEW = 30  # below this a bootstrap interval is too narrow to be trusted, and the result says so


@dataclass(frozen=True)
class Asked:
    """The settings of one evaluation.

    Args:
        prompts: Picture i is drawn from ``prompts[i]``; None for unconditional pipelines.
        n: Pictures a seed.
        metrics: Short names.
        seeds: Sampling seeds.
        steps, guidance, batch, sampler, autocast: As for ``draw``.
        floor: Full precision is drawn with other seeds too.
        keep: Pictures of the first seed to keep, and as many of the worst of each candidate.
        tracked: Pictures a seed whose latents are kept, for the error per step.
        eight_bits: Pictures are stored with 256 levels a colour.
        speed, inside: Measure cost; look inside.
        token: Word of a prompt whose attention maps are compared, inside.
    """

    prompts: list[str] | None
    n: int
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    batch: int
    sampler: str
    autocast: torch.dtype | None
    floor: bool
    keep: int
    tracked: int
    eight_bits: bool = False
    speed: bool = False
    inside: bool = False
    token: str | None = None

    @property
    def texts(self) -> list[str] | None:
        """The prompts of the pictures."""
        return None if self.prompts is None else self.prompts[: self.n]

    @property
    def floor_seeds(self) -> tuple[int, ...]:
        """As many other seeds: the next ones."""
        return tuple(seed + max(self.seeds) - min(self.seeds) + 1 for seed in self.seeds)

    @property
    def kept_latents(self) -> int:
        """``tracked`` in whole batches, whatever ``n`` is."""
        return -(-self.tracked // self.batch) * self.batch

    def wants(self, *names: str) -> bool:
        """Whether one of these metrics is asked for."""
        return any(name in self.metrics for name in names)

    def check(self, candidates: Mapping[str, Any], where: str) -> None:
        """Refuses what cannot be done.

        Raises:
            InputError: Names or numbers that do not fit.
        """
        unknown = [name for name in self.metrics if name not in METRICS]
        taken = [name for name in (REFERENCE, OTHER_SEEDS) if name in candidates]
        wrong = {
            f"a candidate is called {taken}": bool(taken),
            "a candidate has no name": any(not str(name).strip() for name in candidates),
            f"n is {self.n}, batch is {self.batch}, steps is {self.steps}": min(self.n, self.batch, self.steps) < 1,
            f"keep is {self.keep}, tracked is {self.tracked}": min(self.keep, self.tracked) < 0,
            "no sampling seed is given": not self.seeds,
            f"the seeds are {list(self.seeds)}": len(set(self.seeds)) < len(self.seeds),
            f"the sampler is {self.sampler!r}": self.sampler not in ("own", "ddim"),
            f"{', '.join(map(repr, unknown))}: no such metric (known: {', '.join(METRICS)})": bool(unknown),
            f"{self.n} pictures of {len(self.prompts or ())} prompts: a prompt is never used twice in silence":
                self.prompts is not None and len(self.prompts) < self.n,
            "a token is looked at inside, where inside is asked for": self.token is not None and not self.inside,
            "metrics of text need prompts": self.wants(*TEXT) and self.prompts is None,
        }  # fmt: skip
        for why, holds in wrong.items():
            if holds:
                raise InputError(
                    "this comparison cannot be made", where=where, why=why,
                    try_=f"name candidates other than {REFERENCE}; metrics of this list; n, batch, steps and different "
                    "seeds, at least one; a prompt a picture; sampler own or ddim",
                )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "n": self.n, "seeds": list(self.seeds), "steps": self.steps,
            "guidance": self.guidance if self.prompts is not None else None, "batch": self.batch,
            "sampler": self.sampler, "tracked": min(self.n, self.kept_latents), "keep": min(self.keep, self.n),
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
        }  # fmt: skip

    def facts(self, seed: int) -> dict[str, Any]:
        """What decides about pictures beside the arm itself."""
        made = versions()
        settings = {key: value for key, value in self.to_json().items() if key not in ("n", "seeds", "keep", "batch")}
        texts = None if self.prompts is None else text_digest(self.prompts)
        return {**settings, "tracked": self.kept_latents, "seed": seed, "prompts": texts, "versions": made}


@dataclass
class Tools:
    """The networks that the metrics need. What is not there is in ``missing``, and is None here.

    Args:
        extractor: Features of distribution metrics and of the test.
        extractor_key: What its features follow from; None: features are not kept.
        evaluator: For metrics of text.
        perceptual: LPIPS.
        real: What distributions are compared with; None: the reference arm's pictures.
    """

    extractor: Extractor | None = None
    extractor_key: str | None = None
    evaluator: Evaluator | None = None
    perceptual: PerceptualDistance | None = None
    real: PictureFolder | Statistics | None = None
    missing: list[Missing] = field(default_factory=list)

    def absent(self, keys: Sequence[str], error: BitbrushError) -> None:
        """Notes that metrics are not there, and why."""
        self.missing += [Missing(key, error.what, error.where, error.why, error.try_) for key in keys]


def default_metrics(*, text: bool, features: bool) -> tuple[str, ...]:
    """PSNR and SSIM need nothing; text and distributions where there is a network for them."""
    return ("psnr", "ssim", *(TEXT if text else ()), *(("fid", "kid") if features else ()))


def open_tools(
    asked: Asked, reference: Arm, *, extractor: Any, evaluator: Any, perceptual: Any, real: Any, resize: Resize | None,
    speaks_emoji: Callable[[], bool],
) -> Tools:  # fmt: skip
    """Opens the networks of the metrics that are asked for, each where it is there.

    Raises:
        InputError: What was given is of the wrong kind, or a folder has no pictures.
        ArtifactError: A file that was given cannot be read.
    """
    tools, device = Tools(), _device(reference)
    wanted = [name for name in asked.metrics if name in DISTRIBUTION]
    if wanted or extractor is not None:
        try:
            tools.extractor, tools.extractor_key = open_extractor(extractor, device)
        except Unavailable as error:
            tools.absent(wanted or ["features"], error)
    if asked.wants("lpips"):
        try:
            given = isinstance(perceptual, PerceptualDistance)
            tools.perceptual = perceptual if given else lpips(weights=perceptual, device=device)
        except Unavailable as error:
            tools.absent(["lpips"], error)
    wanted = [name for name in asked.metrics if name in TEXT]
    if asked.prompts is not None and (wanted or evaluator is not None):
        try:
            tools.evaluator = open_evaluator(evaluator, speaks_emoji=speaks_emoji, device=device)
        except Unavailable as error:
            tools.absent(wanted or ["clip"], error)
    tools.real = open_real(real, resize)
    return tools


def open_extractor(given: Any, device: str) -> tuple[Extractor, str | None]:
    """The extractor that was asked for, and what its features follow from (None where that cannot be told).

    Args:
        given: An ``Extractor``, ``"inception"`` (also None: the published weights), the file of the zoo's classifier,
            or a network, which takes pictures float32 [n, 3, H, W] in [-1, 1].

    Raises:
        Unavailable: The published weights or torch-fidelity are not there.
        InputError, ArtifactError: What was given cannot be used.
    """
    if isinstance(given, Extractor):
        return given, None
    if given is None or given == "inception":
        return (found := inception(device=device)), found.name
    if isinstance(given, str | Path):
        if not Path(given).is_file():
            raise InputError("there is no such feature extractor", where=str(given), why="there is no such file",
                             try_='give "inception", the file of the zoo\'s classifier, or a network')
        return zoo_classifier(given, device=device), file_digest(Path(given))
    if isinstance(given, nn.Module):
        found = from_module(given, name=f"a given {type(given).__name__}", device=device)
        try:
            return found, module_digest(given)
        except Opaque:
            return found, None
    raise InputError("this is no feature extractor", where="extractor", why=f"a {type(given).__name__}",
                     try_="give a network, a file, \"inception\", or an Extractor")


def open_real(given: Any, resize: Resize | None) -> PictureFolder | Statistics | None:
    """The reference of the distribution metrics: a folder of pictures, or a file of statistics.

    Raises:
        InputError, ArtifactError: It cannot be used.
    """
    if given is None or isinstance(given, PictureFolder | Statistics):
        return given
    if not isinstance(given, str | Path):
        raise InputError("this is no reference", where="real", why=f"a {type(given).__name__}",
                         try_="give a folder of pictures or a file of statistics")
    if Path(given).is_file():
        return load_statistics(given)
    return PictureFolder.open(given, resize=resize)



def versions() -> dict[str, str]:
    """What decides about the last bits of pictures."""
    made = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"bitbrush": bitbrush.__version__, **made}


def _device(reference: Arm) -> str:
    found = getattr(reference.given, "device", None)
    return str(found) if isinstance(found, torch.device) else reference.device
