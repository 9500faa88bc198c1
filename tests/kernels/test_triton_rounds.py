"""One-pass round trips: Triton's interpreter against the torch form, what fits, and where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitbrush.errors import InternalError
from bitbrush.kernels import triton_rounds
from bitbrush.kernels.triton_rounds import Matrix, Rounds
from bitbrush.network import activation, log2
from bitbrush.network.activation import ActivationQuantizer, fused_rounds
from bitbrush.network.log2 import Log2Quantizer
from bitbrush.numbers.codec import decode, encode, round_trip_log2
from bitbrush.numbers.grid import ActivationSpec, Grid
from interpreter import TRITON, interpreted


@TRITON
def test_interpreted_kernels_equal_the_torch_form() -> None:
    found = interpreted("interpreted_rounds.py")
    assert found["cases"] == 138 and found["left"] == 12 and found["values"] > 100_000 and found["wrong"] == 0
    assert found["log2_cases"] == 270 and found["log2_values"] > 700_000 and found["log2_wrong"] == 0


@TRITON
def test_faults_would_show() -> None:
    assert interpreted("interpreted_rounds.py", "rows")["wrong"] > 1000
    assert interpreted("interpreted_rounds.py", "edge")["log2_wrong"] > 100


def test_how_tensors_lie_beside_tables() -> None:
    tokens, picture = torch.zeros(4, 9, 6), torch.zeros(4, 6, 3, 5)
    last = picture.contiguous(memory_format=torch.channels_last)
    cases = {
        "channels of tokens": (tokens, (1, 1, 6), Matrix(1, 36, 6, 6, True)),
        "of samples": (tokens, (4, 1, 6), Matrix(4, 9, 6, 6, True)),
        "tokens": (tokens, (4, 9, 1), Matrix(4, 9, 6, 9, False)),
        "channels of pictures": (picture, (1, 6, 1, 1), Matrix(1, 24, 15, 6, False)),
        "channels last": (last, (1, 6, 1, 1), Matrix(1, 60, 6, 6, True)),
        "pixels": (picture, (4, 1, 3, 5), Matrix(4, 6, 15, 15, True)),
        "pixels, channels last": (last, (1, 1, 3, 5), Matrix(1, 60, 6, 15, False)),
        "one pixel": (picture[:, :, :1, :1].contiguous(), (1, 6, 1, 1), Matrix(1, 4, 6, 6, True)),
        "a tensor": (tokens, (1, 1, 1), None), "a sample": (tokens, (4, 1, 1), None),
        "other dimensions": (tokens, (6,), None), "another size": (tokens, (1, 1, 5), None),
        "gaps": (tokens[..., ::2], (1, 1, 3), None), "apart": (picture, (1, 6, 1, 5), None),
        "samples inside": (tokens.transpose(0, 1).contiguous().transpose(0, 1), (4, 1, 6), None),
    }  # fmt: skip
    for name, (x, shape, want) in cases.items():
        assert triton_rounds.matrix(x, torch.zeros(shape)) == want, name
    assert len(cases) == 15
    with pytest.raises(InternalError, match="does not lie beside"):
        triton_rounds.tables(tokens, *[torch.zeros(4, 1, 1)] * 3, 255)


def test_blocks_divide_columns_where_they_can() -> None:
    counts = (1024, 320, 96, 77, 4, 1030)
    assert [triton_rounds._columns(count) for count in counts] == [512, 64, 32, 128, 4, 512]


def test_deltas_that_fit() -> None:
    x = torch.zeros(3, 2, 5, 7)
    shapes = ((3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 1, 1), (1, 2, 1, 1), (3, 2, 5, 1), (3, 1, 5, 1), (3,), ())
    assert [triton_rounds._stretches(x, torch.zeros(shape)) for shape in shapes] == [3, 6, 1, 0, 30, 0, 0, 1]
    assert not triton_rounds.fits_log2(x, torch.zeros(())) and not triton_rounds.fits(x, x, x)  # on the CPU
    assert fused_rounds(x) is None


def test_quantizers_hand_over_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels' scales and logarithms without gradients; with gradients neither."""
    asked: list[Any] = []

    def fits(x: Any, *tables: Any) -> bool:
        asked.append(tuple(tables[0].shape))
        return False

    unused: Any = None
    for module in (activation, log2):
        monkeypatch.setattr(module, "fused_rounds", lambda x: Rounds(fits, unused, fits, unused))
    channels = ActivationQuantizer(ActivationSpec(granularity="channel"), channels=3)
    logarithms = Log2Quantizer(ActivationSpec(grid=Grid(bits=4, kind="log2"), mode="dynamic"), (0,))
    x = torch.rand(2, 1, 4, 3)
    for wanted in (False, True):
        channels(x.requires_grad_(wanted), 3)
        assert logarithms.round_trip(x, None, torch.bfloat16).dtype == torch.bfloat16
    assert asked == [(1, 1, 1, 3), (2, 1, 1, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_on_a_gpu() -> None:
    rounds = triton_rounds.build()
    if rounds is None:
        pytest.skip("Triton cannot build here")
    ran = 0
    for dtype in triton_rounds.DTYPES:
        for shape in ((1, 33, 1, 1), (8, 33, 1, 1), (1, 1, 17, 19), (8, 1, 17, 19)):
            x = (torch.randn(8, 33, 17, 19, device="cuda") * 3).to(dtype)
            scale, zero = torch.rand(shape, device="cuda") * 0.1 + 0.01, torch.full(shape, 121.0, device="cuda")
            for lying in (x, x.contiguous(memory_format=torch.channels_last)):
                want = decode(encode(lying, 1 / scale, zero, 255), scale, zero).to(dtype)
                assert rounds.fits(lying, scale, zero)
                assert torch.equal(rounds.tables(lying, scale, 1 / scale, zero, 255), want)
                ran += 1
        for exempt, top in ((0, 15), (1, 255)):
            x = torch.softmax(torch.randn(5, 4, 37, 77, device="cuda") * 9, -1).to(dtype)
            delta = x[..., exempt:].float().amax((1, 2, 3), keepdim=True)
            want = torch.cat([x[..., :exempt].float(), round_trip_log2(x[..., exempt:], delta, top)], -1)
            assert rounds.fits_log2(x, delta)
            assert torch.equal(rounds.log2(x, delta, top, exempt, torch.bfloat16), want.bfloat16())
            ran += 1
    assert ran == 30
