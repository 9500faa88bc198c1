"""Pictures that take each other's place: radio buttons and style rules, no script.

The style rules are made of numbers alone. Pictures lie on each other in one cell of a grid; the checked button shows
one of them, or all side by side.
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from torch import Tensor

from bitbrush.evaluation.pairs import CAP_DB, psnr
from bitbrush.evaluation.result import Evaluation
from bitbrush.report.pictures import amplification, difference_png, png
from bitbrush.report.text import number

FIRST, WORST = 8, 4  # pictures shown: the first ones, and the worst of each candidate
COARSE = 128  # pictures with smaller sides are enlarged pixel by pixel


def album(evaluation: Evaluation) -> dict[str, Any] | None:
    """The first pictures and each candidate's worst ones, for the page. None without pictures of the reference."""
    reference = evaluation.pictures.get(evaluation.reference)
    arms = [arm for arm in evaluation.arms if arm in evaluation.pictures]
    if reference is None or not len(reference) or len(arms) < 2:
        return None
    places = {picture: i for i, picture in enumerate(evaluation.kept or range(len(reference))) if i < len(reference)}
    factor = amplification([evaluation.pictures[arm] - reference for arm in arms[1:]])
    tiles = _Tiles(evaluation, arms, places, factor)
    groups = [{"title": "The first pictures", "arm": "", "tiles": tiles.of(_first(evaluation, places))}]
    for arm in arms[1:]:
        worst = [picture for picture in evaluation.worst.get(arm, []) if picture in places][:WORST]
        groups.append({"title": "Farthest from the reference:", "arm": arm, "tiles": tiles.of(worst)})
    return {
        "arms": arms,
        "groups": [group for group in groups if group["tiles"]],
        "factor": factor,
        "coarse": max(reference.shape[-2:]) < COARSE,
        "total": evaluation.settings.get("n"),
    }


def _first(evaluation: Evaluation, places: dict[int, int]) -> list[int]:
    """The kept pictures that are kept for being the first: 0, 1, 2, ... without a gap; else those that are no worst."""
    run: list[int] = []
    while len(run) in places:
        run.append(len(run))
    worst = {picture for found in evaluation.worst.values() for picture in found}
    return (run or [picture for picture in places if picture not in worst])[:FIRST]


class _Tiles:
    """Tiles of one album; a picture shown twice is encoded once."""

    def __init__(self, evaluation: Evaluation, arms: list[str], places: dict[int, int], factor: int) -> None:
        self._evaluation, self._arms, self._places, self._factor = evaluation, arms, places, factor
        self._made: dict[int, dict[str, Any]] = {}

    def of(self, pictures: list[int]) -> list[dict[str, Any]]:
        for picture in pictures:
            if picture not in self._made:
                self._made[picture] = self._tile(picture)
        return [self._made[picture] for picture in pictures]

    def _tile(self, picture: int) -> dict[str, Any]:
        place, found = self._places[picture], self._evaluation
        reference = found.pictures[found.reference][place]
        shots: list[dict[str, Any]] = [{"src": png(reference), "difference": "", "note": "", "best": False}]
        distances = [self._psnr(arm, picture, place) for arm in self._arms[1:]]
        for arm, distance in zip(self._arms[1:], distances, strict=True):
            other = found.pictures[arm][place]
            best = len(distances) > 1 and distance == max(distances) and distances.count(distance) == 1
            note = f"{number(distance, 1)} dB" if distance < CAP_DB else "equal"
            grey = _grey(difference_png(other, reference, self._factor))
            shots.append({"src": png(other), "difference": grey, "note": note, "best": best})
        prompt = found.prompts[place] if place < len(found.prompts) else ""
        return {"number": picture, "prompt": prompt, "shots": shots}

    def _psnr(self, arm: str, picture: int, place: int) -> float:
        """As measured, or from the pictures kept, where it was not asked for."""
        seeds = self._evaluation.per_picture.get(arm, {}).get("psnr") or [[]]
        if picture < len(seeds[0]):
            return seeds[0][picture]
        pictures = self._evaluation.pictures
        one: Tensor = psnr(pictures[arm][place : place + 1], pictures[self._evaluation.reference][place : place + 1])
        return float(one[0])


def _grey(uri: str) -> str:
    """A PNG without colours as one with one channel; a third of the bytes."""
    data = base64.b64decode(uri.partition(",")[2])
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("L").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def rules(arms: int) -> str:
    """Style rules of an album of ``arms`` pictures a tile: which button shows what. On paper all stand side by side."""
    lines = []
    for i in range(arms):
        on, chosen = f"#flip-{i}:checked~", "background:#fff;color:var(--ink);box-shadow:0 1px 3px #1c243038"
        lines.append(f"{on}.album .a{i}{{visibility:visible}}")
        lines.append(f"{on}.tools label[for=flip-{i}]{{{chosen}}}")
        lines.append(f"#flip-{i}:focus-visible~.tools label[for=flip-{i}]{{outline:2px solid var(--accent)}}")
    return "@media screen{" + "".join(lines) + "}"
