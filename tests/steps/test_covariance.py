"""H = mean x x^T: independent of how the data is split, mergeable, in the order of the weight's columns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bitbrush.errors import InputError
from bitbrush.numbers.codebook import to_groups
from bitbrush.steps.additive import Target
from bitbrush.steps.covariance import Covariance


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_running_covariance_equals_that_of_all_data() -> None:
    data = torch.randn(300, 12, generator=seeded())
    expected = (data.double().T @ data.double()) / 300
    for pieces in ((300,), (1, 299), (100, 100, 100), (7, 150, 143)):
        for budget in (1, 4 * 12 * 5, 1 << 20):
            running = Covariance(12, budget=budget)
            for piece in data.split(pieces):
                running.add(piece.reshape(1, -1, 12))
            torch.testing.assert_close(running.mean(torch.float64), expected, rtol=1e-6, atol=1e-7)
            assert running.count == 300 and torch.equal(running.mean(), running.mean().T)


def test_shards_merge_by_their_samples() -> None:
    data = torch.randn(300, 12, generator=seeded())
    whole, first, second = Covariance(12), Covariance(12), Covariance(12)
    whole.add(data)
    first.add(data[:40])
    second.add(data[40:])
    first.merge(second)
    assert first.count == 300
    torch.testing.assert_close(first.mean(torch.float64), whole.mean(torch.float64), rtol=1e-6, atol=1e-7)


def test_a_share_of_the_samples() -> None:
    data = torch.randn(20000, 6, generator=seeded()) * torch.arange(1, 7)
    part = Covariance(6, share=0.25, generator=seeded(1))
    for piece in data.split(5000):
        part.add(piece)
    assert part.count == 5000
    error = (part.mean() - data.T @ data / 20000).abs() / (torch.arange(1, 7)[:, None] * torch.arange(1, 7))
    assert 0 < float(error.max()) < 0.06
    again = Covariance(6, share=0.25, generator=seeded(1))
    for piece in data.split(5000):
        again.add(piece)
    assert torch.equal(again.mean(), part.mean())
    with pytest.raises(InputError):
        Covariance(6, share=0.5)
    with pytest.raises(InputError):
        Covariance(6).mean()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 2), (2, 1), (0, 1), (1, 2)), ((1, 1), (1, 1), (0, 0), (1, 1))],
)
def test_convolution_patches_are_in_the_order_of_the_weight(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """H of the patches equals the permuted H of torch's unfold, and gives the convolution's own output energy."""
    g = seeded()
    x, w = torch.randn(3, 8, 9, 7, generator=g), torch.randn(5, 8, *kernel, generator=g)
    size = 8 * kernel[0] * kernel[1]
    taken = Covariance(size, budget=4 * size * 10)
    taken.add_conv(x, kernel, stride, padding, dilation)
    unfolded = functional.unfold(x, kernel, dilation, padding, stride)
    rows = unfolded.transpose(1, 2).reshape(-1, 8, *kernel).permute(0, 2, 3, 1).flatten(1).double()
    torch.testing.assert_close(taken.mean(torch.float64), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    energy = functional.conv2d(x.double(), w.double(), None, stride, padding, dilation).square().sum() / len(rows)
    found = Target(to_groups(w, 8), taken.mean(torch.float64)).energy()
    torch.testing.assert_close(found, energy, rtol=1e-6, atol=0)
    some = Covariance(size, share=0.5, generator=seeded(1))
    some.add_conv(x, kernel, stride, padding, dilation)
    assert some.count == round(0.5 * len(rows))
    with pytest.raises(InputError):
        taken.add_conv(x[:, :4], kernel)
