"""`bitbrush.evaluate`: what quantization cost, for pipelines quantized by anyone.

Pictures are drawn once into a folder, part by part, arm after arm; every metric reads them from there. So no more than
a part of two arms is held, a stopped run goes on, and another metric draws nothing.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitbrush.errors import ArtifactError, InputError, NumericsError
from bitbrush.evaluation.arms import Arm, check_kernel, is_pipeline
from bitbrush.evaluation.asked import Asked, Tools, default_metrics, open_tools, versions
from bitbrush.evaluation.drawing import Drawer, Drawn
from bitbrush.evaluation.measuring import Measured, Meter, chosen, step_errors
from bitbrush.evaluation.references import Resize
from bitbrush.evaluation.result import OTHER_SEEDS, REFERENCE, Evaluation, Missing
from bitbrush.evaluation.sampling import Progress
from bitbrush.evaluation.spreading import Spread
from bitbrush.evaluation.store import PictureStore
from bitbrush.evaluation.testing import Compared, tests
from bitbrush.evaluation.text import Judge, evaluator_label, has_emoji_vocabulary
from bitbrush.evaluation.values import few, picture_floors, picture_values

WHERE = "bitbrush.evaluate"
INSIDE_PICTURES = 8
WORST_FIRST = (("psnr", False), ("lpips", True), ("ssim", False))  # metric, whether the highest are the worst


def evaluate(
    candidates: Mapping[str, Any] | Any, *, reference: Any, prompts: Sequence[str] | None = None, n: int = 512,
    metrics: Sequence[str] | None = None, seeds: Sequence[int] = (0,), steps: int = 25, guidance: float = 4.0,
    batch: int = 16, sampler: str = "own", autocast: torch.dtype | None = None, device: str | None = None,
    work: Path | str | None = None, real: Any = None, resize: Resize | None = None, extractor: Any = None,
    evaluator: Any = None, captions: Sequence[str] | None = None, perceptual: Any = None, floor: bool = True,
    speed: bool = False, inside: bool = False, token: str | None = None, keep: int = 8, tracked: int = 64,
    eight_bits: bool = False, kernel: str = "reference", progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Draws ``n`` pictures a seed with every arm, from the same noise, and measures what the candidates cost.

    One candidate is in memory at a time, and a part of the pictures of two arms. A metric whose package or weights are
    not there is not computed and not replaced: it stands in ``missing``, and the others go on.

    Args:
        candidates: Name to pipeline, folder, hub id, or function that returns a pipeline (called when its turn comes,
            dropped afterwards); or one of these alone, which is then called ``candidate``.
        reference: The full-precision pipeline, in the same forms.
        prompts: Picture i is drawn from ``prompts[i]``; None for unconditional pipelines.
        n: Pictures a seed.
        metrics: Of psnr, ssim, lpips, clip, r1, fid, sfid, kid, is, prdc. None: psnr and ssim, clip and r1 where an
            evaluator is given or the model speaks of emoji, fid and kid where an extractor is given.
        seeds: Sampling seeds. Intervals and tests are over prompts, with all seeds of a prompt together.
        steps, guidance, batch, sampler, autocast: As for ``bitbrush.evaluation.draw``; sampler ``"own"`` or ``"ddim"``.
        device: Where paths are opened; None: CUDA where there is one. Objects stay where they are.
        work: Folder of pictures and features; a run that was stopped goes on, another metric draws nothing. None: a
            temporary one.
        real: What distributions are compared with: a folder of pictures, a file of statistics, or what
            ``references`` makes of these. None: the reference arm's pictures.
        resize: ``"crop"`` or ``"stretch"`` real pictures of another resolution; None: they are refused.
        extractor: Of distribution metrics: an ``Extractor``, ``"inception"``, the file of the zoo's classifier, or a
            network. None: Inception with the published weights, if they are in the cache.
        evaluator: Of clip and r1: ``"emoji"``, an ``EmojiClip``, folder or hub id of transformers' CLIP in the cache.
            None: the emoji CLIP for models with its vocabulary, else OpenAI's.
        captions: The closed set that r1 chooses among; None: the evaluator's own.
        perceptual: Of lpips: a ``PerceptualDistance`` or a .safetensors file; None: the published weights.
        floor: Draw full precision once more with other seeds: the noise floor beside every figure, and the control of
            the tests.
        speed: Measure size, memory, time and bit operations of every arm.
        inside: Look at activations, weights and errors inside every candidate.
        token: Word of a prompt whose attention maps are compared inside; None: the last word of the first prompt.
        keep: Pictures of the first seed that the result keeps, and as many of the worst of each candidate at most.
        tracked: Pictures a seed whose latents are kept for the error per step (in whole batches).
        eight_bits: Store pictures with 256 levels a colour: a quarter of the disk, and paired metrics compare these.
        kernel: What computes the packed layers of candidates that are folders of bitbrush, as for ``bitbrush.load``.
        progress: Told of every batch.

    Raises:
        InputError: What is asked for does not fit; before anything is drawn wherever that can be told.
        ArtifactError: A folder is damaged.
        NumericsError: A picture is not finite.
    """
    named = candidates if isinstance(candidates, Mapping) else {"candidate": candidates}
    arms = {name: Arm(str(name), given, device=device, sampler=sampler, kernel=kernel) for name, given in
            {REFERENCE: reference, **named}.items()}
    asked = Asked(
        None if prompts is None else list(prompts), n, tuple(dict.fromkeys(metrics or ())), tuple(seeds), steps,
        guidance, batch, sampler, autocast, floor, keep, tracked, eight_bits, speed, inside, token,
    )  # fmt: skip
    asked.check(named, WHERE)
    check_kernel(kernel, arms.values(), WHERE)
    for arm in arms.values():
        arm.check(prompts=asked.prompts is not None)
    if metrics is None:
        text = evaluator is not None or (prompts is not None and speaks_emoji(arms[REFERENCE]))
        asked = replace(asked, metrics=default_metrics(text=text, features=extractor is not None))
    tools = open_tools(asked, arms[REFERENCE], extractor=extractor, evaluator=evaluator, perceptual=perceptual,
                       real=real, resize=resize, speaks_emoji=lambda: speaks_emoji(arms[REFERENCE]))
    with folder(work) as place:
        return Run(asked, arms, tools, place, progress, captions).execute()


@contextmanager
def folder(work: Path | str | None) -> Iterator[Path]:
    """The folder of pictures and features: the given one, or one that is gone after the block."""
    if work is not None:
        yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="bitbrush-") as made:
        yield Path(made)


def speaks_emoji(arm: Arm) -> bool:
    """Whether an arm has the emoji models' vocabulary: the emoji CLIP says nothing about others."""
    if arm.folder is not None:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(arm.folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return has_emoji_vocabulary(found)
    if is_pipeline(arm.given):
        return has_emoji_vocabulary(getattr(arm.given, "tokenizer", None))
    with arm.turn():
        return has_emoji_vocabulary(getattr(arm.pipeline(), "tokenizer", None))


class Run:
    """One evaluation under way.

    Args:
        asked: The settings, checked.
        arms: Name to arm, the reference first.
        tools: The networks of the metrics.
        place: Folder of pictures and features.
        progress: Told of every batch.
        captions: The closed set of r1.
    """

    def __init__(
        self, asked: Asked, arms: Mapping[str, Arm], tools: Tools, place: Path, progress: Progress | None,
        captions: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.asked, self.arms, self.tools, self.captions = asked, dict(arms), tools, captions
        self.progress = progress
        self.drawn: dict[str, Drawn] = {}
        self.spread = Spread(asked, tools, place / "features", self._advance)
        store = PictureStore(place / "pictures", eight_bits=asked.eight_bits)
        self.drawer = Drawer(asked, store, progress, self.spread.prepare)
        candidates = [name for name in self.arms if name != REFERENCE]
        self.result = Evaluation(REFERENCE, candidates, {**asked.to_json(), "metrics": list(asked.metrics)})

    def execute(self) -> Evaluation:
        """Draws, measures, tests. Errors as for ``evaluate``."""
        total = (len(self.arms) + self.asked.floor) * len(self.asked.seeds) * self.asked.n
        with self._bar("draw", total):
            for name, arm in self.arms.items():
                with arm.turn():
                    self._draw(name, arm)
        passes = len(self.drawn) * (2 if self.tools.extractor is not None else 1)
        with self._bar("measure", passes * len(self.asked.seeds) * self.asked.n):
            measured = self._measure()
        self._test(measured)
        self._tell()
        return self.result

    def _draw(self, name: str, arm: Arm) -> None:
        self.drawn[name] = self.drawer.draw(arm, self.asked.seeds)
        if name == REFERENCE and self.asked.floor:
            self.drawn[OTHER_SEEDS] = self.drawer.draw(arm, self.asked.floor_seeds)
        if arm.opaque:
            self.result.notes.append(f"Pictures of {name} are never used again: {arm.opaque}.")
        if name != REFERENCE and arm.digest() == self.arms[REFERENCE].digest():
            self.result.notes.append(f"{name} holds the same numbers as full precision: its pictures are the same.")
        if self.asked.speed:
            self._cost(name, arm)
        if self.asked.inside and name != REFERENCE:
            self._inside(name, arm)

    def _measure(self) -> dict[str, Measured]:
        reference = self.drawn[REFERENCE]
        judge = None
        if self.tools.evaluator is not None and self.asked.texts is not None:
            judge = Judge(self.tools.evaluator, self.asked.texts, self.captions)
            self._speak_of_captions(judge)
        device = reference.device if reference.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
        meter = Meter(self.asked, self.tools, reference.shape(), device, judge, self._advance)
        measured = {name: meter.measure(drawn, None if name == REFERENCE else reference)
                    for name, drawn in self.drawn.items()}
        for name, drawn in self.drawn.items():
            self.spread.add(name, drawn)
        self._values(measured)
        self.result.missing += meter.missing + self.tools.missing + self.spread.missing
        self._show(measured)
        return measured

    def _values(self, measured: Mapping[str, Measured]) -> None:
        names = {}
        if self.tools.perceptual is not None:
            names["lpips"] = self.tools.perceptual.name
        if self.tools.evaluator is not None:
            names["clip"] = evaluator_label(self.tools.evaluator)
        first, other = measured[REFERENCE], measured.get(OTHER_SEEDS)
        floors = picture_floors(other, first) if other is not None else {}
        figures = self.spread.values(self.result.arms, REFERENCE, OTHER_SEEDS)
        for name in self.result.arms:
            baseline = {} if name == REFERENCE else first.samples
            self.result.per_picture[name] = measured[name].samples
            self.result.values[name] = picture_values(measured[name], baseline, names, floors) + figures[name]

    def _show(self, measured: Mapping[str, Measured]) -> None:
        """Worst pictures, kept pictures, errors per step."""
        result, asked, reference = self.result, self.asked, self.drawn[REFERENCE]
        result.timesteps = reference.timesteps()
        first = min(asked.keep, asked.n)
        for name in result.candidates:
            result.step_errors[name] = step_errors(self.drawn[name], reference)
            result.worst[name] = _worst(measured[name], first)
        result.kept = list(dict.fromkeys([*range(first), *(i for worst in result.worst.values() for i in worst)]))
        result.prompts = [] if asked.prompts is None else [asked.prompts[i] for i in result.kept]
        result.pictures = {name: chosen(self.drawn[name], result.kept) for name in result.arms}

    def _test(self, measured: Mapping[str, Measured]) -> None:
        compared = Compared(measured, self.spread.sets, self.result.candidates, len(self.asked.seeds))
        self.result.tests = tests(compared)

    def _tell(self) -> None:
        """Settings that were found on the way, and warnings."""
        asked, tools, reference = self.asked, self.tools, self.drawn[REFERENCE]
        settings = self.result.settings
        settings |= {"device": reference.device, "scheduler": reference.scheduler, "eight_bits": asked.eight_bits}
        chosen = {name: arm.kernel for name, arm in self.arms.items() if arm.kernel != "reference"}
        settings |= {"kernel": chosen} if chosen else {}
        settings["floor_seeds"] = list(asked.floor_seeds) if asked.floor else []
        settings["extractor"] = tools.extractor.to_json() if tools.extractor is not None else None
        settings["evaluator"] = evaluator_label(tools.evaluator) if tools.evaluator is not None else None
        settings["distribution_reference"] = getattr(self.spread.real, "source", None)
        settings["versions"] = versions()
        warning = few(asked.n, "pictures" if asked.prompts is None else "prompts")
        self.result.notes[:0] = [] if warning is None else [warning]

    def _speak_of_captions(self, judge: Judge) -> None:
        known = {i for members in judge.groups().values() for i in members}
        if self.asked.wants("r1") and not judge.captions:
            self.result.missing.append(Missing(
                "r1", "retrieval needs a closed set of captions", judge.label,
                "only the emoji CLIP brings one", "pass captions=, the texts that a picture is told apart by",
            ))  # fmt: skip
        elif self.asked.wants("r1") and len(known) < self.asked.n:
            kind = "emoji captions" if self.captions is None else "among the captions"
            self.result.notes.append(
                f"{self.asked.n - len(known)} of {self.asked.n} prompts are not {kind}: "
                + ("R@1 is left out." if not known else "they are left out of R@1.")
            )

    def _cost(self, name: str, arm: Arm) -> None:
        asked = self.asked
        found = self._part(
            "speed", "cost", "measure", arm.pipeline(), folder=arm.path, prompts=asked.texts, steps=asked.steps,
            guidance=asked.guidance, batch=min(asked.batch, asked.n), autocast=asked.autocast, progress=self.progress,
        )  # fmt: skip
        if found is not None:
            self.result.cost[name] = found

    def _inside(self, name: str, arm: Arm) -> None:
        asked, original = self.asked, self.arms[REFERENCE]
        with original.turn():
            found = self._part(
                "inside", "inside", "look", arm.pipeline(), original.pipeline(), prompts=asked.texts,
                n=min(asked.n, INSIDE_PICTURES), seed=asked.seeds[0], steps=asked.steps, guidance=asked.guidance,
                autocast=asked.autocast, token=asked.token, progress=self.progress,
            )  # fmt: skip
        if found is not None:
            self.result.inside[name] = found

    def _part(self, key: str, module: str, function: str, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """What another part of the evaluation finds, as plain data; None and a ``Missing`` where it cannot."""
        try:
            call: Callable[..., Any] = getattr(importlib.import_module(f"bitbrush.evaluation.{module}"), function)
            found: dict[str, Any] = call(*args, **kwargs).to_json()
        except (InputError, ArtifactError, NumericsError) as error:
            self.result.missing.append(Missing(key, error.what, error.where, error.why, error.try_))
            return None
        return found

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[None]:
        if self.progress is None:
            yield
            return
        self.progress.start(label, total)
        try:
            yield
        finally:
            self.progress.finish()

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            self.progress.advance(count)


def _worst(measured: Measured, count: int) -> list[int]:
    """Numbers of the worst 5 % of the first seed (at least one, at most ``count``), worst first."""
    for key, highest in WORST_FIRST:
        if key in measured.samples:
            values = measured.samples[key][0]
            order = sorted(range(len(values)), key=lambda i: (values[i], i), reverse=highest)
            return order[: min(count, max(1, round(0.05 * len(values))))]
    return []
