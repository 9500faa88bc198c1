"""Pictures of a comparison as data URIs: the pictures themselves and their amplified differences."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bitbrush.evaluation.compare import Comparison
from bitbrush.evaluation.eight_bits import to_levels
from bitbrush.evaluation.pairs import psnr
from bitbrush.report.text import number

MAX_SIDE = 320  # pixels of a thumbnail
MAX_ROWS = 16
FACTORS = (16, 8, 4, 2, 1)


def grid(comparison: Comparison, prompts: list[str], total: int) -> dict[str, Any] | None:
    """Rows of cells for the page: full precision, then each candidate and its difference. ``None`` without pictures."""
    reference = comparison.pictures.get(comparison.reference)
    if reference is None or not len(reference):
        return None
    shown = min(len(reference), MAX_ROWS)
    reference = reference[:shown]
    arms = {arm: comparison.pictures[arm][:shown] for arm in comparison.candidates if arm in comparison.pictures}
    factor = amplification([arm - reference for arm in arms.values()])
    decibels = {arm: psnr(pictures, reference).tolist() for arm, pictures in arms.items()}
    rows = []
    for i in range(shown):
        best = max((values[i] for values in decibels.values()), default=0.0)
        cells = [_cell(png(reference[i]), "reference", comparison.reference)]
        for arm, pictures in arms.items():
            found = decibels[arm][i]
            first = len(arms) > 1 and found == best
            cells.append(_cell(png(pictures[i]), "candidate", arm, f"{number(found, 1)} dB", best=first))
            cells.append(_cell(difference_png(pictures[i], reference[i], factor), "difference", arm))
        rows.append({"prompt": prompts[i] if i < len(prompts) else f"picture {i + 1}", "cells": cells})
    return {"rows": rows, "arms": list(arms), "factor": factor, "shown": shown, "total": total}


def _cell(src: str, kind: str, arm: str, note: str = "", *, best: bool = False) -> dict[str, Any]:
    return {"src": src, "kind": kind, "arm": arm, "note": note, "best": best}


def amplification(differences: list[Tensor]) -> int:
    """The largest factor of 1, 2, 4, 8, 16 under which 95 % of the differences still fit; one for all arms."""
    if not differences:
        return 1
    largest = max(float(torch.quantile(d.abs().amax(dim=1).flatten()[:1_000_000], 0.95)) for d in differences) / 2
    return next((factor for factor in FACTORS if factor * largest <= 1), 1)


def difference_png(picture: Tensor, reference: Tensor, factor: int) -> str:
    """White where equal, black from a difference of 1/factor of the full range on (largest of the three colours)."""
    shade = 1 - (factor * (picture - reference).abs().amax(dim=0) / 2).clamp(0, 1)
    return png((shade * 2 - 1).expand(3, -1, -1))


def pixels(picture: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in [-1, 1] as bytes [H, W, 3]."""
    found: NDArray[np.uint8] = to_levels(picture).permute(1, 2, 0).contiguous().numpy()
    return found


def png(picture: Tensor) -> str:
    """[3, H, W] in [-1, 1] as a PNG data URI, at most 320 pixels a side."""
    scale = MAX_SIDE / max(picture.shape[-2:])
    if scale < 1:
        side = [max(1, round(s * scale)) for s in picture.shape[-2:]]
        picture = F.interpolate(picture[None].float(), size=side, mode="area")[0]
    buffer = io.BytesIO()
    Image.fromarray(pixels(picture)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
