"""Mixtures in one pass: Triton's interpreter against the torch form, what fits, and where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitbrush.errors import InternalError
from bitbrush.kernels import triton_mixture
from bitbrush.kernels.triton_mixture import Layout
from bitbrush.network import activation
from bitbrush.network.activation import ActivationQuantizer, fused_mixture
from bitbrush.numbers.grid import ActivationSpec, Grid
from bitbrush.numbers.mixture import FusedMixture, mixture
from cuda_driver import hopper
from interpreter import TRITON, interpreted


@TRITON
def test_interpreted_kernels_equal_the_torch_form() -> None:
    """Forward and dx bit for bit; sums relative to the most that they could be."""
    found = interpreted("interpreted_mixture.py")
    assert found["cases"] == 13 * 5 + 20 and found["layouts"] == 20 and found["values"] > 30_000
    assert found["wrong"] == found["wrong_dx"] == 0
    assert found["tables"] == 170 and 0 < found["worst_table"] < 1e-7 and found["none_through"] == 12


@TRITON
def test_faults_would_show() -> None:
    found = interpreted("interpreted_mixture.py", "faults")
    assert set(found) == {"rounding", "end", "order", "sample", "free"} and all(f["cases"] == 5 for f in found.values())
    assert all(found[name]["wrong"] > 300 for name in ("rounding", "end", "order", "sample"))
    others = [found[name] for name in found if name != "rounding"]
    assert all(other["wrong_dx"] > 30 and other["worst_table"] > 1e-3 for other in others)


def test_how_tensors_lie_beside_tables() -> None:
    tokens, picture = torch.zeros(4, 9, 6), torch.zeros(4, 6, 3, 5)
    last, wide = picture.contiguous(memory_format=torch.channels_last), torch.zeros(2, 2, 70_000, 1)
    cases = {
        "all": (tokens, (1, 1, 1), (1, 1, 1), Layout(1, 1, 216, (1, 1), 0, False)),
        "samples": (tokens, (4, 1, 1), (1, 1, 1), Layout(1, 4, 54, (4, 1), 0, False)),
        "scales of samples": (last, (1, 1, 1, 1), (4, 1, 1, 1), Layout(1, 4, 90, (4, 1), 0, False)),
        "segments": (picture, (4, 1, 1, 1), (1, 6, 1, 1), Layout(1, 24, 15, (4, 6), 2, False)),
        "segments, channels last": (last, (4, 1, 1, 1), (1, 6, 1, 1), Layout(4, 15, 6, (4, 6), 2, True)),
        "channels": (tokens, (4, 1, 6), (4, 1, 1), Layout(4, 9, 6, (4, 6), 3, True)),
        "one pixel": (picture[..., :1, :1].contiguous(), (1, 6, 1, 1), (1, 1, 1, 1), Layout(4, 1, 6, (4, 6), 2, True)),
        "gaps": (tokens[..., ::2], (4, 1, 1), (1, 1, 1), None), "pixels": (picture, (1, 1, 3, 5), (1, 1, 1, 1), None),
        "two kinds": (picture, (1, 6, 1, 1), (1, 1, 3, 1), None), "dimensions": (tokens, (1,), (1,), None),
        "another size": (tokens, (1, 1, 5), (1, 1, 1), None), "nothing": (tokens[:0], (1, 1, 1), (1, 1, 1), None),
        "samples inside": (tokens.transpose(0, 1).contiguous().transpose(0, 1), (4, 1, 1), (1, 1, 1), None),
        "between": (torch.zeros(2, 5, 4, 3), (1, 1, 4, 1), (1, 1, 1, 1), None),
        "too many programs": (torch.zeros(70_000, 2), (1, 2), (1, 1), None),
    }  # fmt: skip
    for name, (x, share, scale, want) in cases.items():
        tables = (torch.zeros(3, *share), torch.zeros(3, *scale), torch.zeros(3, *scale))
        assert triton_mixture.layout(x, *tables) == want, name
        assert not triton_mixture.fits(x, *tables), "on the CPU"
    assert len(cases) == 16 and triton_mixture.layout(tokens, torch.zeros(0, 1, 1, 1)) is None
    assert triton_mixture.layout(wide, torch.zeros(1, 2, 1, 1, 1)) is not None
    with pytest.raises(InternalError, match="do not lie beside"):
        triton_mixture.forward(tokens[..., ::2], *[torch.zeros(3, 1, 1, 1)] * 3, 15)
    assert fused_mixture(tokens) is None


def test_blocks_hold_as_many_values_as_there_are() -> None:
    """(rows, columns of a block, warps)."""
    cases = {(1, 1 << 17, False): (1, 1024, 4), (96, 16, False): (64, 16, 4), (5, 77, False): (1, 128, 1),
             (2, 3, False): (2, 4, 1), (96, 256, False): (1, 256, 1), (4096, 320, True): (32, 32, 4),
             (9, 6, True): (16, 8, 1), (1, 512, True): (1, 32, 1)}  # fmt: skip
    for (rows, columns, along), want in cases.items():
        found = Layout(1, rows, columns, (1, 1), 0, along)
        assert (*found.block, found.warps) == want
    assert Layout(3, 4096, 320, (3, 320), 2, True).grid == (128, 10, 3) and len(cases) == 8


@pytest.mark.parametrize("by_channel", [False, True])
def test_quantizers_hand_over_what_they_mix(monkeypatch: pytest.MonkeyPatch, by_channel: bool) -> None:
    """Tables as the learners give them, cut out of larger ones: shapes that have a layout."""
    asked: list[Any] = []

    def fits(x: torch.Tensor, *tables: torch.Tensor) -> bool:
        asked.append([tuple(t.shape) for t in tables])
        return triton_mixture.layout(x, *tables) is None

    unused: Any = None
    monkeypatch.setattr(activation, "fused_mixture", lambda x: FusedMixture(fits, unused, unused))
    q = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)), () if by_channel else (4, 2))
    share, table = torch.rand(3, 2, 8, 6)[:, 1], torch.rand(8, 20)[:, 3:5]
    if by_channel:
        share, table = torch.rand(3, 8, 9)[..., 1:7], torch.rand(8, 3)
    q.trial_mixture = lambda: (share if by_channel else share[..., 0], table + 0.1, table.round())
    for x, dim in ((torch.rand(3, 6, 5, 4), 1), (torch.rand(3, 5, 6), 2), (torch.rand(3, 6), 1)):
        assert q(x, dim).shape == x.shape
    of_channels, rest = [(6, 1, 1), (1, 6), (6,)], [(1, 1, 1), (1, 1), (1,)]
    for found, wide, one in zip(asked, of_channels, rest, strict=True):
        want = [(8, 3, *wide), (8, 3, *one)] if by_channel else [(8, 3, *one), (8, 1, *wide)]
        assert found == [*want, want[1]]


@TRITON
def test_launches_reach_their_builds_and_few_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own look-up of builds, with tables anywhere in larger ones; where rows or columns are 1, too."""
    ran = 0
    with hopper(tmp_path, monkeypatch) as driver:
        for start in range(5):
            share, table = torch.rand(4, 8, 40)[:, :, start], torch.rand(8, 40 + start)[:, start : start + 1]
            tables = [share.t().reshape(8, 4, 1, 1, 1), *[table.reshape(8, 1, 1, 1, 1)] * 2]
            x = torch.rand(4, 16, 8, 8 * (start + 2))
            triton_mixture.backward(x, x, *tables, 15, (True, True, True, False))
            ran += triton_mixture.forward(x, *tables, 15).shape == x.shape
        assert driver.launched == ["backward", "forward"] * 5 and len(driver.made) == 2 and ran == 5
        for shape, of_share in (((1,), (1,)), ((3, 1), (3, 1)), ((2, 32), (1, 32)), ((1, 6, 1, 1), (1, 6, 1, 1))):
            x, one = torch.rand(shape), torch.rand((2, *[1] * len(shape)))
            found = triton_mixture.backward(x, x, torch.rand(2, *of_share), one, one, 15, (True, True, True, True))
            assert [part.shape for part in found if part is not None] == [shape, (2, *of_share), one.shape, one.shape]
            ran += triton_mixture.forward(x, torch.rand(2, *of_share), one, one, 15).shape == shape
        x = torch.rand(4, 6)
        none = triton_mixture.backward(x, x, one[:, 0, 0], one[:, 0, 0], one[:, 0, 0], 15, (True, False, False, False))
        assert [part is None for part in none] == [False, True, True, True]
    assert ran == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_on_a_gpu() -> None:
    fused = triton_mixture.build()
    if fused is None:
        pytest.skip("Triton cannot build here")
    ran = 0
    for dtype in triton_mixture.DTYPES:
        for of_share, of_scale in (((8, 1), (1, 1)), ((8, 1), (1, 33)), ((8, 33), (8, 1))):
            share = torch.softmax(torch.randn(8, *of_share, 1, 1, device="cuda"), 0)
            scale = torch.rand(8, *of_scale, 1, 1, device="cuda") * 0.1 + 0.01
            zero = torch.randint(0, 64, scale.shape, device="cuda").float()
            for memory in (torch.contiguous_format, torch.channels_last):
                x = (torch.randn(8, 33, 17, 19, device="cuda") * 3).to(dtype).contiguous(memory_format=memory)
                assert fused.fits(x, share, scale, zero)
                found = []
                for form in (fused, None):
                    leaves = [t.clone().requires_grad_() for t in (x, share, scale, zero)]
                    out = mixture(leaves[0], leaves[1], leaves[2], leaves[3], 63, form)
                    found.append((out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))))
                assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
                for a, b in zip(found[0][2:], found[1][2:], strict=True):
                    assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
                ran += 1
    assert ran == 18
