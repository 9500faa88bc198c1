"""Several pipelines against one reference: same prompts, same noise, paired picture by picture."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.fid import cifar_fid
from bitbrush.evaluation.pairs import WINDOW, psnr, ssim
from bitbrush.evaluation.sampling import Progress, denoiser, draw_with_trajectory, takes_prompt, with_ddim
from bitbrush.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_share,
    bootstrap_worst,
    paired_difference,
)

REFERENCE = "FP"
FEW_PICTURES = 30  # below this a bootstrap interval is too narrow to be trusted, and the result says so


@dataclass
class Comparison:
    """What ``compare`` measured. Everything but ``pictures`` is plain data, in ``to_json`` and back.

    Attributes:
        reference: Name of the reference arm.
        baseline: Name of the arm that stands for plain rounding, if there is one.
        metrics: arm -> metric -> Estimate. Metrics: psnr, psnr_worst5, ssim (to the reference); clip, clip_difference
            (paired, to the reference), r1_heldout, r1_seen; fid. Where one does not apply it is absent.
        per_picture: arm -> metric -> [seeds][n], for paired differences between any two arms.
        timesteps: The sampling steps' timesteps [steps].
        step_errors: arm -> per step {value, low, high} of ||x_q - x_fp|| / ||x_fp||, mean over pictures.
        seconds_per_picture: arm -> wall time of drawing alone.
        settings: What was asked for.
        notes: What was left out or deserves a warning, in sentences.
        prompts: Prompts of the kept pictures; empty for an unconditional pipeline.
        pictures: arm -> the first pictures of the first seed [k, 3, H, W] in [-1, 1]. Not in the JSON form.
    """

    reference: str
    baseline: str | None
    metrics: dict[str, dict[str, Estimate]]
    per_picture: dict[str, dict[str, list[list[float]]]]
    timesteps: list[float]
    step_errors: dict[str, list[Estimate]]
    seconds_per_picture: dict[str, float]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def candidates(self) -> list[str]:
        """All arms but the reference, in the order given."""
        return [arm for arm in self.metrics if arm != self.reference]

    def paired(self, metric: str, arm: str, other: str) -> Estimate:
        """Mean of ``metric`` of ``arm`` minus that of ``other``, picture by picture, with its interval.

        Raises:
            InputError: One of the arms has no such metric picture by picture.
        """
        missing = [name for name in (arm, other) if metric not in self.per_picture.get(name, {})]
        if missing:
            raise InputError(
                f"there is no {metric} picture by picture of {missing[0]!r}",
                where="Comparison.paired",
                why=f"it has {', '.join(self.per_picture.get(missing[0], {})) or 'none'}",
                try_="choose psnr, ssim or clip, and arms of this comparison",
            )
        return paired_difference(self.per_picture[arm][metric], self.per_picture[other][metric])

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        return {
            "reference": self.reference,
            "baseline": self.baseline,
            "metrics": {arm: {k: v.to_json() for k, v in found.items()} for arm, found in self.metrics.items()},
            "per_picture": self.per_picture,
            "timesteps": self.timesteps,
            "step_errors": {arm: [step.to_json() for step in curve] for arm, curve in self.step_errors.items()},
            "seconds_per_picture": self.seconds_per_picture,
            "settings": self.settings,
            "notes": self.notes,
            "prompts": self.prompts,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """The inverse of ``to_json``; without pictures."""
        plain = dict(data)
        plain["metrics"] = {a: {k: Estimate(**v) for k, v in m.items()} for a, m in data["metrics"].items()}
        plain["step_errors"] = {a: [Estimate(**s) for s in curve] for a, curve in data["step_errors"].items()}
        return cls(**plain)


def compare(
    reference: Any,
    candidates: Mapping[str, Any | Callable[[], Any]],
    *,
    prompts: Sequence[str] | None,
    n: int,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 16,
    evaluator: EmojiClip | None = None,
    fid_evaluators: Path | str | None = None,
    sampler: str = "own",
    baseline: str | None = None,
    keep: int = 8,
    tracked: int = 64,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Draws ``n`` pictures a seed with every pipeline, from the same noise, and measures what the candidates cost.

    All pictures of the reference and of one candidate are held in memory at a time.

    Args:
        reference: The full-precision pipeline.
        candidates: Name to pipeline, or to a function that returns one (called when its turn comes, dropped
            afterwards).
        prompts: Picture i is drawn from ``prompts[i]``; ``None`` for unconditional pipelines.
        n: Pictures a seed.
        seeds: Sampling seeds. Intervals are over prompts, with all seeds of a prompt together.
        steps, guidance, batch, autocast: As for ``draw``.
        evaluator: The emoji CLIP, for emoji models only: its score says nothing about other pictures.
        fid_evaluators: Folder of the CIFAR-10 evaluator, for CIFAR-10 models only.
        sampler: ``"own"`` (the pipeline's scheduler) or ``"ddim"`` (unconditional pipelines; the protocol of
            cifar10-ddpm).
        baseline: Which candidate stands for plain rounding; the report compares the others with it.
        keep: Pictures of the first seed to keep for the report.
        tracked: Pictures a seed whose latents are kept for the error per step (rounded up to whole batches).
        progress: Started once with the number of pictures to draw, told of every batch.

    Raises:
        InputError: Names or numbers that do not fit, and as for ``draw``.
        NumericsError: A picture is not finite.
    """
    settings: dict[str, Any] = {
        "n": n, "seeds": list(seeds), "steps": steps, "guidance": guidance if prompts is not None else None,
        "batch": batch, "sampler": sampler, "tracked": min(n, -(-tracked // batch) * batch), "keep": min(keep, n),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }  # fmt: skip
    _check(candidates, settings, baseline)
    arms: dict[str, Any] = {REFERENCE: reference, **candidates}
    state = _State(prompts, settings, evaluator, fid_evaluators, autocast, progress)
    result = Comparison(REFERENCE, baseline, {}, {}, [], {}, {}, settings)
    if progress is not None:
        progress.start("draw and compare", len(arms) * len(seeds) * n)
    try:
        for name, arm in arms.items():
            state.measure(result, name, _pipeline(arm, sampler))
            gc.collect()
    finally:
        if progress is not None:
            progress.finish()
    result.prompts = list(prompts[: min(keep, n)]) if prompts is not None else []
    settings["device"], settings["scheduler"] = state.device, state.scheduler
    result.notes += state.notes
    return result


@dataclass
class _Drawn:
    pictures: list[Tensor]  # a seed each, [n, 3, H, W]
    latents: list[Tensor]  # a seed each, [steps, tracked, C, H, W]


class _State:
    """What the arms share while a comparison runs."""

    def __init__(
        self,
        prompts: Sequence[str] | None,
        settings: dict[str, Any],
        evaluator: EmojiClip | None,
        fid_evaluators: Path | str | None,
        autocast: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.prompts = None if prompts is None else list(prompts)
        self.settings, self.evaluator, self.fid_evaluators = settings, evaluator, fid_evaluators
        self.autocast, self.progress = autocast, progress
        self.first: _Drawn | None = None
        self.device = self.scheduler = ""
        self.notes = self._warnings()

    def _warnings(self) -> list[str]:
        n, notes = self.settings["n"], []
        if n < FEW_PICTURES:
            what = "prompts" if self.prompts is not None else "pictures"
            notes.append(f"Only {n} {what}: the intervals are too narrow to be trusted below {FEW_PICTURES}.")
        if self.evaluator is not None and self.prompts is not None:
            known = int(self.evaluator.is_caption(self.prompts[:n]).sum())
            if known < n:
                notes.append(
                    f"{n - known} of {n} prompts are not emoji captions: "
                    + ("R@1 is left out." if known == 0 else "they are left out of R@1.")
                )
        return notes

    def measure(self, result: Comparison, name: str, pipeline: Any) -> None:
        """Draws one arm and writes its numbers into ``result``. The reference comes first."""
        if takes_prompt(pipeline) != (self.prompts is not None):
            raise InputError(
                "the arm and the prompts do not belong together",
                where=name,
                why=f"{type(pipeline).__name__} {'needs prompts' if self.prompts is None else 'takes no prompts'}",
                try_="compare pipelines of one kind, and pass prompts for text-to-image only",
            )
        started = time.perf_counter()
        drawn, times = self._draw(pipeline)
        seconds = time.perf_counter() - started
        if self.first is None:
            self.first = drawn
            self.device = str(denoiser(pipeline).device)
            self.scheduler = type(pipeline.scheduler).__name__
            result.timesteps = times
        elif times != result.timesteps:
            raise InputError(
                "two arms sample at different timesteps",
                where=name,
                why=f"{len(times)} steps from {times[:1]}, the reference has {len(result.timesteps)}",
                try_="give all arms the scheduler of the reference",
            )
        result.seconds_per_picture[name] = seconds / (self.settings["n"] * len(self.settings["seeds"]))
        result.pictures[name] = drawn.pictures[0][: self.settings["keep"]].clone()
        samples = self._per_picture(drawn, is_reference=drawn is self.first)
        result.per_picture[name] = samples
        result.metrics[name] = self._metrics(samples, result.per_picture[REFERENCE], drawn)
        if drawn is not self.first:
            result.step_errors[name] = _step_errors(drawn.latents, self.first.latents)

    def _draw(self, pipeline: Any) -> tuple[_Drawn, list[float]]:
        s, drawn, times = self.settings, _Drawn([], []), torch.empty(0)
        for seed in s["seeds"]:
            pictures, times, latents = draw_with_trajectory(
                pipeline, prompts=self.prompts, n=s["n"], tracked=s["tracked"], seed=seed, steps=s["steps"],
                guidance=s["guidance"] or 0.0, batch=s["batch"], progress=self.progress, autocast=self.autocast,
            )  # fmt: skip
            drawn.pictures.append(pictures)
            drawn.latents.append(latents)
        return drawn, times.tolist()

    def _per_picture(self, drawn: _Drawn, *, is_reference: bool) -> dict[str, list[list[float]]]:
        samples: dict[str, list[list[float]]] = {}
        if self.first is not None and not is_reference:
            pairs = list(zip(drawn.pictures, self.first.pictures, strict=True))
            samples["psnr"] = [psnr(ours, theirs).tolist() for ours, theirs in pairs]
            if min(pairs[0][0].shape[-2:]) >= WINDOW:
                samples["ssim"] = [ssim(ours, theirs).tolist() for ours, theirs in pairs]
        if self.evaluator is not None and self.prompts is not None:
            texts = self.prompts[: self.settings["n"]]
            samples["clip"] = [self.evaluator.score(p, texts).tolist() for p in drawn.pictures]
        return samples

    def _metrics(
        self, samples: dict[str, list[list[float]]], reference: dict[str, list[list[float]]], drawn: _Drawn
    ) -> dict[str, Estimate]:
        metrics = {name: bootstrap_mean(values) for name, values in samples.items()}
        if "psnr" in samples:
            metrics["psnr_worst5"] = bootstrap_worst(samples["psnr"])
            if "clip" in samples:
                metrics["clip_difference"] = paired_difference(samples["clip"], reference["clip"])
        if self.evaluator is not None and self.prompts is not None:
            metrics |= self._retrieval(self.evaluator, drawn)
        if self.fid_evaluators is not None:
            metrics["fid"] = cifar_fid(torch.cat(drawn.pictures), self.fid_evaluators, device=self.device)
        return metrics

    def _retrieval(self, evaluator: EmojiClip, drawn: _Drawn) -> dict[str, Estimate]:
        texts = (self.prompts or [])[: self.settings["n"]]
        known, heldout = evaluator.is_caption(texts), evaluator.is_heldout(texts)
        found = {}
        for name, members in (("r1_heldout", known & heldout), ("r1_seen", known & ~heldout)):
            if bool(members.any()):
                chosen = [text for text, wanted in zip(texts, members.tolist(), strict=True) if wanted]
                found[name] = bootstrap_share([evaluator.hits(p[members], chosen).tolist() for p in drawn.pictures])
        return found


def _step_errors(latents: list[Tensor], reference: list[Tensor]) -> list[Estimate]:
    """Per sampling step the mean over pictures of ||x_q - x_fp|| / ||x_fp||."""
    if not latents[0].numel():
        return []
    ratios = []
    for ours, theirs in zip(latents, reference, strict=True):
        ratios.append(
            torch.linalg.vector_norm(ours - theirs, dim=(2, 3, 4)) / torch.linalg.vector_norm(theirs, dim=(2, 3, 4))
        )
    table = torch.stack(ratios, dim=1)  # [steps, seeds, tracked]
    return [bootstrap_mean(step.numpy(), resamples=500) for step in table]


def _pipeline(arm: Any, sampler: str) -> Any:
    """A pipeline as it is; anything else is a function that returns one (a pipeline is callable too)."""
    from diffusers import DiffusionPipeline

    pipeline = arm if isinstance(arm, DiffusionPipeline) or not callable(arm) else arm()
    return with_ddim(pipeline) if sampler == "ddim" else pipeline


def _check(candidates: Mapping[str, Any], settings: dict[str, Any], baseline: str | None) -> None:
    wrong = {
        f"a candidate is called {REFERENCE!r}": REFERENCE in candidates,
        f"the baseline {baseline!r} is not among the candidates": baseline is not None and baseline not in candidates,
        f"n is {settings['n']}, batch is {settings['batch']}": min(settings["n"], settings["batch"]) < 1,
        "no sampling seed is given": not settings["seeds"],
        f"the sampler is {settings['sampler']!r}": settings["sampler"] not in ("own", "ddim"),
    }
    for why, holds in wrong.items():
        if holds:
            raise InputError(
                "this comparison cannot be made",
                where="bitbrush.evaluation.compare",
                why=why,
                try_=f"name candidates other than {REFERENCE}, n, batch and seeds of at least one; sampler own or ddim",
            )
