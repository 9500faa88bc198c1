"""Several pipelines against one reference: same prompts, same noise, paired picture by picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbrush.errors import InputError
from bitbrush.evaluation.arms import Arm
from bitbrush.evaluation.asked import Asked, Tools
from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.evaluate import Run, folder
from bitbrush.evaluation.extractors import zoo_classifier
from bitbrush.evaluation.fid import CLASSIFIER, STATISTICS, fid_with_interval
from bitbrush.evaluation.result import REFERENCE, Evaluation
from bitbrush.evaluation.sampling import Progress
from bitbrush.evaluation.statistics import Estimate, paired_difference
from bitbrush.loading import default_device

PAIRED = ("psnr", "ssim")
METRICS = (*PAIRED, "clip", "r1")
SHOWN = ("psnr", "psnr_worst5", "ssim", "clip", "clip_difference", "r1_heldout", "r1_seen")
SETTINGS = ("n", "seeds", "steps", "guidance", "batch", "sampler", "tracked", "keep", "autocast", "device", "scheduler")


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

    A thin call of the evaluator (`bitbrush.evaluate`): paired metrics, the emoji CLIP, FID with an interval, without
    noise floor. Pictures lie in a temporary folder meanwhile.

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
        progress: Told of every batch, first of drawing, then of measuring.

    Raises:
        InputError: Names or numbers that do not fit, and as for ``draw``.
        NumericsError: A picture is not finite.
    """
    judged = evaluator is not None and prompts is not None
    asked = Asked(None if prompts is None else list(prompts), n, METRICS if judged else PAIRED,
                  tuple(seeds), steps, guidance, batch, sampler, autocast, False, keep, tracked)
    asked.check(candidates, "bitbrush.evaluation.compare")
    if baseline is not None and baseline not in candidates:
        raise InputError("this comparison cannot be made", where="bitbrush.evaluation.compare",
                         why=f"the baseline {baseline!r} is not among the candidates", try_="name one of them")
    arms = {name: Arm(name, given, sampler=sampler) for name, given in {REFERENCE: reference, **candidates}.items()}
    for arm in arms.values():
        arm.check(prompts=prompts is not None)
    tools = Tools(evaluator=evaluator if judged else None)
    if fid_evaluators is not None:
        tools.extractor = zoo_classifier(Path(fid_evaluators) / CLASSIFIER, device=_device(reference))
    with folder(None) as place:
        run = Run(asked, arms, tools, place, progress)
        found = run.execute()
        result = _comparison(found, run, baseline)
        if fid_evaluators is not None:
            for name, features in run.spread.sets.items():
                result.metrics[name]["fid"] = fid_with_interval(features, Path(fid_evaluators) / STATISTICS)
    return result


def _comparison(found: Evaluation, run: Run, baseline: str | None) -> Comparison:
    """The evaluation in the form of the first release: fewer numbers, and the first pictures only."""
    metrics = {
        arm: {value.key: Estimate(value.value, value.low, value.high) for value in values
              if value.key in SHOWN and value.low is not None and value.high is not None}
        for arm, values in found.values.items()
    }  # fmt: skip
    kept = int(found.settings["keep"])
    settings = {key: found.settings[key] for key in SETTINGS}
    return Comparison(
        found.reference, baseline, metrics, found.per_picture, found.timesteps, found.step_errors,
        {arm: run.drawn[arm].seconds_per_picture for arm in found.arms}, settings, found.notes,
        found.prompts[:kept], {arm: pictures[:kept] for arm, pictures in found.pictures.items()},
    )  # fmt: skip


def _device(reference: Any) -> str:
    found = getattr(reference, "device", None)
    return str(found) if isinstance(found, torch.device) else default_device()
