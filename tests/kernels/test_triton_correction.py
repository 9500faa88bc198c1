"""A correction's kernels: Triton's interpreter against the torch form, and what fits."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from bitbrush.kernels import triton_correction
from bitbrush.network import correction
from bitbrush.network.correction import Correction, CorrectionSpec
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
    assert not triton_correction.fits(picture, 3), "not on CUDA"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trajectories with the kernels and without: the same numbers, and a call out of turn is said by a later one."""
    if triton_correction.build() is None:
        pytest.skip("Triton cannot build here")
    fused, ran = correction._fused, 0
    for dtype, memory in itertools.product(triton_correction.DTYPES, (torch.contiguous_format, torch.channels_last)):
        made = [Correction(CorrectionSpec(scheduler="X", timesteps=(9.0, 6.5, 3.0), channels=4)) for _ in range(2)]
        made[0].scale.normal_(1, 0.1)
        made[0].bias.normal_()
        made[0].shift.normal_()
        made[1].load_state_dict(made[0].state_dict())
        for time in (9, 9, 6.5, 3, 6.5, 9):
            x = torch.randn(3, 4, 7, 5, device="cuda").to(dtype).contiguous(memory_format=memory)
            seen = []
            for its, form in zip(made, (fused, lambda *_: None), strict=True):
                monkeypatch.setattr(correction, "_fused", form)
                its.to("cuda")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    seen.append((its.enter(x, torch.tensor(time, device="cuda")), its.leave(x), its.state.clone()))
            assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), (dtype, time)
            ran += 1
        torch.cuda.synchronize()
        assert all(its.warned for its in made) or made[0]._arrivals.latest(made[0].state) is not None
    assert ran == 36
