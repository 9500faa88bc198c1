"""A correction's kernels: Triton's interpreter against the torch form, and what fits."""

from __future__ import annotations

import torch

from bitbrush.kernels import triton_correction
from interpreter import TRITON, interpreted


@TRITON
def test_interpreted_kernels_equal_the_torch_form() -> None:
    found = interpreted("interpreted_correction.py")
    assert found["cases"] == 72 and found["values"] > 50_000 and found["on"] > 200
    assert found["wrong"] == 0 and found["mixed"]


@TRITON
def test_faults_would_show() -> None:
    assert interpreted("interpreted_correction.py", "row")["wrong"] > 1000
    assert interpreted("interpreted_correction.py", "channel")["wrong"] > 1000


def test_what_fits() -> None:
    picture = torch.zeros(2, 4, 6, 5)
    shapes = {
        picture: 30, picture.contiguous(memory_format=torch.channels_last): 1, torch.zeros(2, 4, 7): 7,
        torch.zeros(3, 8): 1, picture.transpose(2, 3): 0, picture[..., ::2]: 0,
    }  # fmt: skip
    assert [triton_correction.places(x) for x in shapes] == list(shapes.values()) and len(shapes) == 6
    assert not triton_correction.fits(picture, torch.zeros(1), torch.zeros(3)), "not on CUDA"
