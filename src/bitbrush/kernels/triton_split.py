"""Products whose sums are split: few tiles of long rows leave most processors idle (split-K).

``split_k`` programs have a part of a tile's steps each and write int32 sums; a second kernel adds these, which is exact
in any order, and finishes as the product itself would. The 3x3 convolutions of SD 1.5's smaller pictures are such: 512
outputs of 1,280 columns are 50 tiles of 128 x 128 for 132 processors, each with 11,520 to 23,040 products a sum.

Importing this module does not import Triton.
"""

from __future__ import annotations

from typing import Any

from bitbrush.kernels.launching import Launch

BR, BC, WARPS = 8, 128, 4
"""Of a program that adds: 16 bytes of each part for two of a thread's eight numbers."""
FINISH = ("BIAS", "RESIDUAL", "SHARED", "KEEP")
MOST, STEPS = 8, 4
"""Parts of a sum, and steps of one, at least."""


def parts(wanted: int, steps: int) -> int:
    """How many there are of ``wanted`` parts of equal length, so that none is empty."""
    return -(-steps // -(-steps // wanted))


def merge(outputs: tuple[int, int, int], options: dict[str, Any], launched: dict[str, Any]) -> Launch:
    """What adds parts: of (partial, y, sums, bias, residual, shared, scale, zero_point, times, weight_scale,
    weight_sum). Takes on what ``options`` of the product say of what is added and kept: parts are of sums alone.

    Args:
        outputs: Rows, columns, rows of a sample.
        launched: Options of a launch.
    """
    from bitbrush.kernels import triton_split_kernels as kernels

    own = {name: options[name] for name in FINISH} | {"SPLIT_K": options["SPLIT_K"], "BR": BR, "BC": BC}
    options |= dict.fromkeys(FINISH, False) | {"SHARED": 0}
    rows, columns, _ = outputs
    grid = (-(-rows // BR), -(-columns // BC))
    return Launch(kernels.merge, grid, outputs, {**own, "num_warps": WARPS, "enable_fp_fusion": False, **launched})
