"""The rotation of channels: orthogonal, its own matrix written out, the same wherever it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitbrush.numbers.rotation import block_size, rotate, signs, unrotate

SIZES = [1, 2, 3, 16, 24, 48, 96, 320, 640]


def hadamard(n: int) -> Tensor:
    """Sylvester's construction."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


@pytest.mark.parametrize("channels", SIZES)
def test_it_is_the_matrix(channels: int) -> None:
    n = block_size(channels)
    matrix = torch.diag(signs(channels).double()) @ torch.block_diag(*[hadamard(n)] * (channels // n))
    assert channels % n == 0 and (channels // n) % 2 == 1
    assert torch.allclose(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64))
    x = torch.randn(3, 5, channels)
    assert torch.allclose(rotate(x).double(), x.double() @ matrix, atol=1e-5)
    assert torch.allclose(unrotate(rotate(x)), x, atol=1e-5) and torch.allclose(rotate(unrotate(x)), x, atol=1e-5)
    assert rotate(x).shape == x.shape and rotate(x.half()).dtype == torch.float32


def test_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(7, 96)
    assert torch.equal(rotate(x)[2], rotate(x[2:3])[0]) and torch.equal(rotate(x)[2], rotate(x[2]))


def test_the_signs_are_part_of_the_format() -> None:
    """They may never change: artifacts do not store them."""
    text = "".join("+" if s > 0 else "-" for s in signs(64).tolist())
    assert text == SIGNS and signs(7).tolist() == signs(64)[:7].tolist()
    assert 0.4 < float((signs(4096) > 0).float().mean()) < 0.6


SIGNS = "-+--++---++++--+-++++--++--+-++-----+-+---+-++-+----+++++-----+-"


def test_an_outlier_channel_is_spread() -> None:
    """Incoherence max|x| / mean|x| a row falls; the energy stays."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=g)
    x[:, 5] += 30
    turned = rotate(x)

    def incoherence(t: Tensor) -> Tensor:
        return t.abs().amax(1) / t.abs().mean(1)

    assert bool((incoherence(turned) < 0.4 * incoherence(x)).all())
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-5)
