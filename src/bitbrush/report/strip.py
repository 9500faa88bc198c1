"""One picture of a comparison: a row an arm, a column a prompt, the distance to full precision under each picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bitbrush.evaluation.compare import Comparison
from bitbrush.evaluation.pairs import psnr
from bitbrush.report.pictures import pixels
from bitbrush.report.plots import INK, LINE, MUTED
from bitbrush.report.text import inert

SIDE, GAP, LEFT, TOP, CAPTION = 128, 14, 172, 58, 24
MAX_COLUMNS = 6


def strip(comparison: Comparison, labels: Mapping[str, tuple[str, str]], columns: int = MAX_COLUMNS) -> bytes:
    """The strip as a PNG.

    Args:
        comparison: With pictures of every arm named in ``labels``.
        labels: Arm to its name and a second line under it; the rows, in this order. The reference is among them.
        columns: How many pictures, taken at equal distances, so that nobody picks them.
    """
    reference = comparison.pictures[comparison.reference]
    count = min(columns, len(reference))
    chosen = [i * len(reference) // count for i in range(count)]
    size = (LEFT + count * (SIDE + GAP) - GAP + 8, TOP + len(labels) * (SIDE + CAPTION))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for column, i in enumerate(chosen):
        prompt = comparison.prompts[i] if i < len(comparison.prompts) else f"picture {i + 1}"
        _prompt(draw, LEFT + column * (SIDE + GAP), prompt)
    for row, (arm, (name, second)) in enumerate(labels.items()):
        top = TOP + row * (SIDE + CAPTION)
        draw.text((8, top + SIDE / 2 - 12), name, INK, _font(17, bold=True), "lm")
        draw.text((8, top + SIDE / 2 + 13), second, MUTED, _font(14), "lm")
        notes = [] if arm == comparison.reference else psnr(comparison.pictures[arm], reference).tolist()
        _row(image, draw, comparison.pictures[arm], chosen, top, notes)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _row(
    image: Image.Image, draw: ImageDraw.ImageDraw, pictures: Tensor, chosen: Sequence[int], top: int,
    notes: Sequence[float],
) -> None:  # fmt: skip
    for column, i in enumerate(chosen):
        left = LEFT + column * (SIDE + GAP)
        picture = Image.fromarray(pixels(pictures[i])).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        mask = Image.new("L", (4 * SIDE, 4 * SIDE))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * SIDE - 1, 4 * SIDE - 1), 40, 255)
        image.paste(picture, (left, top), mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        draw.rounded_rectangle((left, top, left + SIDE - 1, top + SIDE - 1), 10, outline=LINE)
        if notes:
            draw.text((left + SIDE / 2, top + SIDE + 10), f"{notes[i]:.1f} dB", MUTED, _font(13), "mm")


def _prompt(draw: ImageDraw.ImageDraw, left: int, prompt: str) -> None:
    lines = textwrap.wrap(inert(prompt), 17, max_lines=2, placeholder=" ...")
    for number, line in enumerate(reversed(lines)):
        draw.text((left + SIDE / 2, TOP - 16 - 18 * number), line, INK, _font(13), "mm")


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)
