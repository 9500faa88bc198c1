"""Numbers of single pictures, from stored sets, part by part: to the reference, and to the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.evaluation.asked import Asked, Tools
from bitbrush.evaluation.drawing import LATENTS, Drawn
from bitbrush.evaluation.pairs import WINDOW, psnr, ssim
from bitbrush.evaluation.result import Missing
from bitbrush.evaluation.statistics import Estimate, bootstrap_mean
from bitbrush.evaluation.text import Judge

Samples = dict[str, list[list[float]]]
THUMBNAIL = 8
THUMBNAILS = f"mean colours of {THUMBNAIL}x{THUMBNAIL} cells"


@dataclass
class Measured:
    """Numbers of one arm's pictures.

    Args:
        samples: psnr, ssim, lpips, clip: [seeds][n].
        hits: r1 keys: [seeds][members], 1 where the nearest caption is a picture's own.
        embedded: What the test of a difference may compare, [seeds * n, d], and what they are.
        embedded_by: Its name.
    """

    samples: Samples = field(default_factory=dict)
    hits: Samples = field(default_factory=dict)
    embedded: Tensor | None = None
    embedded_by: str = ""


class Meter:
    """Measures arm after arm.

    Args:
        asked, tools: The settings and the networks.
        shape: Of a picture: 3, H, W.
        device: Where pictures are compared.
        judge: For text; None without.
        advance: Told of pictures.
    """

    def __init__(
        self, asked: Asked, tools: Tools, shape: Sequence[int], device: str, judge: Judge | None,
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.asked, self.tools, self.device, self.judge, self.advance = asked, tools, device, judge, advance
        self.missing: list[Missing] = []
        self.paired: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        side, lpips = min(shape[-2:]), tools.perceptual
        if asked.wants("psnr"):
            self.paired["psnr"] = psnr
        if asked.wants("ssim") and self._large_enough("ssim", "SSIM", side, WINDOW):
            self.paired["ssim"] = ssim
        if lpips is not None and self._large_enough("lpips", lpips.name, side, lpips.min_side):
            self.paired["lpips"] = lpips

    def measure(self, drawn: Drawn, reference: Drawn | None) -> Measured:
        """One arm, to the reference where one is given."""
        found = Measured()
        embedded: list[Tensor] = []
        for place, own in enumerate(drawn.sets):
            others = reference.sets[place].parts() if reference is not None else iter(())
            rows: dict[str, list[float]] = {}
            for part, pictures in zip(own.ranges(), own.parts(), strict=True):
                numbers = self._pairs(pictures, next(others)) if reference is not None else {}
                vectors, scores = self._embed(pictures, part)
                embedded.append(vectors)
                if scores is not None and self.asked.wants("clip"):
                    numbers["clip"] = scores
                for key, values in numbers.items():
                    rows.setdefault(key, []).extend(values.tolist())
                self.advance(len(pictures))
            for key, row in rows.items():
                found.samples.setdefault(key, []).append(row)
        found.embedded = torch.cat(embedded)
        found.embedded_by = THUMBNAILS if self.judge is None else f"picture tower of {self.judge.label}"
        if self.judge is not None and self.asked.wants("r1"):
            found.hits = self._retrieval(self.judge, found.embedded)
        return found

    def _pairs(self, pictures: Tensor, reference: Tensor) -> dict[str, Tensor]:
        ours, theirs = pictures.to(self.device), reference.to(self.device)
        return {key: metric(ours, theirs).cpu() for key, metric in self.paired.items()}

    def _embed(self, pictures: Tensor, part: range) -> tuple[Tensor, Tensor | None]:
        if self.judge is None:
            return F.adaptive_avg_pool2d(pictures.to(self.device), THUMBNAIL).flatten(1).cpu(), None
        return self.judge.look(pictures, part)

    def _retrieval(self, judge: Judge, embedded: Tensor) -> Samples:
        seeds = embedded.split(self.asked.n)
        groups = judge.groups().items()
        return {key: [judge.hits(each, members).double().tolist() for each in seeds] for key, members in groups}

    def _large_enough(self, key: str, name: str, side: int, least: int) -> bool:
        if side < least:
            self.missing.append(Missing(key, f"the pictures are too small for {name}", "bitbrush.evaluation",
                                        f"{side} pixels, at least {least}", "use PSNR, or compare larger pictures"))
        return side >= least


def step_errors(drawn: Drawn, reference: Drawn) -> list[Estimate]:
    """For each sampling step the mean over pictures of ||x_q - x_fp|| / ||x_fp||; empty where no latents were kept."""
    table = []
    for ours, theirs in zip(drawn.sets, reference.sets, strict=True):
        ratios = []
        for part in ours.ranges():
            if not (ours.has(part, LATENTS) and theirs.has(part, LATENTS)):
                break
            x, y = ours.part(part, LATENTS).flatten(2), theirs.part(part, LATENTS).flatten(2)
            ratios.append(torch.linalg.vector_norm(x - y, dim=2) / torch.linalg.vector_norm(y, dim=2))
        if ratios:
            table.append(torch.cat(ratios).T)
    if not table:
        return []
    return [bootstrap_mean(step.numpy(), resamples=500) for step in torch.stack(table, dim=1)]


def chosen(drawn: Drawn, numbers: Sequence[int]) -> Tensor:
    """Pictures of the first seed with these numbers, in this order [k, 3, H, W]."""
    own = drawn.sets[0]
    found: dict[int, Tensor] = {}
    for part in own.ranges():
        members = [i for i in numbers if i in part]
        if members:
            pictures = own.part(part)
            found |= {i: pictures[i - part.start].clone() for i in members}
    if not found:
        return torch.empty(0, *drawn.shape())
    return torch.stack([found[i] for i in numbers])
