"""DGQ's groups: which dimension, which members, and ranges that hold what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitbrush.errors import InternalError
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import Grid
from bitbrush.numbers.ranges import affine_parameters
from bitbrush.steps.range_groups import Dimension, Extremes, choose, clustered, hulls, spread

TIMES = (100.0, 900.0)


def inputs(seed: int, samples: int = 16, tokens: int = 24, channels: int = 12) -> Tensor:
    return torch.randn(samples, tokens, channels, generator=torch.Generator().manual_seed(seed))


def seen(x: Tensor, channel_dim: int = -1, times: tuple[float, ...] = TIMES, batch: int = 4) -> Extremes:
    found = Extremes()
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        found.add(part, [times[(start + i) % len(times)] for i in range(len(part))], channel_dim)
    return found


# ---- extremes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_extremes_are_those_of_every_index(batch: int) -> None:
    x, ran = inputs(0), 0
    found = seen(x, batch=batch)
    of_time = torch.tensor([TIMES[i % 2] for i in range(len(x))])
    for time in (None, *TIMES):
        here = x if time is None else x[of_time == time]
        for dimension, over in (("channel", (0, 1)), ("pixel", (0, 2))):
            low, high = found.ends(dimension, time)  # type: ignore[arg-type]
            assert torch.equal(low, here.amin(dim=over)) and torch.equal(high, here.amax(dim=over))
            ran += 1
    assert ran == 6 and found.samples == 16


def test_pictures_have_places_and_channels() -> None:
    x = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    found = seen(x, channel_dim=1)
    assert [len(found.ends(d)[0]) for d in ("channel", "pixel")] == [5, 12]
    assert torch.equal(found.ends("pixel")[1], x.amax(dim=(0, 1)).flatten())


def test_pixels_that_do_not_match_and_times_that_were_not_seen() -> None:
    found = seen(inputs(0))
    with pytest.raises(InternalError, match="no extremes"):
        found.ends("channel", 5.0)
    found.add(inputs(1, tokens=7)[:1], [100.0 + 1], -1)
    with pytest.raises(InternalError, match="number of pixels"):
        found.ends("pixel")
    only = Extremes(pixels=False)
    only.add(inputs(0)[:1], [1.0], -1)
    assert list(only.spreads()) == ["channel"]
    with pytest.raises(InternalError, match="no extremes"):
        only.ends("pixel")


# ---- the dimension -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plant", ["offset", "scale"])
def test_planted_outliers_decide_the_dimension(plant: str) -> None:
    """Of 20 draws each; for zero-mean outliers, too, with 16 samples. Turning the data round turns the choice round."""
    right: dict[Dimension, int] = {"channel": 0, "pixel": 0}
    for seed in range(20):
        x = inputs(seed, tokens=24, channels=24)
        x[..., 3] = x[..., 3] + 20 if plant == "offset" else x[..., 3] * 20
        for turned, want in ((x, "channel"), (x.transpose(1, 2), "pixel")):
            right[want] += choose(seen(turned).spreads()) == want  # type: ignore[index]
    assert right == {"channel": 20, "pixel": 20}


def test_equal_spreads_take_pixels() -> None:
    assert choose({"channel": 2.0, "pixel": 2.0}) == "pixel" and choose({"channel": 2.0}) == "channel"
    assert spread(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 7.0])) == 7.0


# ---- the groups --------------------------------------------------------------------------------------------------
def test_planted_outliers_share_a_group_with_no_other() -> None:
    for count in (2, 3, 8):
        x = inputs(2)
        x[..., [1, 7]] += 30
        groups = clustered(*seen(x).ends("channel"), count)
        others = set(groups.tolist()) - {int(groups[1]), int(groups[7])}
        assert sum(int(g) in others for g in groups) == 10 and (count > 3 or groups[1] == groups[7])
        assert sorted(set(groups.tolist())) == list(range(int(groups.max()) + 1)) and groups.max() < count


def test_permuted_channels_permute_the_groups() -> None:
    low, high = seen(inputs(3)).ends("channel")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    low[:4] -= 5
    a, b = clustered(low, high, 2), clustered(low[order], high[order], 2)
    same_a, same_b = (g[:, None] == g[None] for g in (a[order], b))
    assert torch.equal(same_a, same_b)


def test_one_group_and_as_many_as_indices() -> None:
    low, high = seen(inputs(4)).ends("channel")
    assert clustered(low, high, 1).tolist() == [0] * 12
    assert clustered(low, high, 12).tolist() == clustered(low, high, 99).tolist() == list(range(12))
    flat = torch.zeros(5)
    assert clustered(flat, flat + 1, 3).tolist() == [0] * 5, "constant layers are one group"
    a, b = hulls(low, high, clustered(low, high, 1))
    assert float(a) == float(low.min()) and float(b) == float(high.max())


def test_the_same_seed_gives_the_same_groups() -> None:
    low, high = seen(inputs(5, channels=64)).ends("channel")
    assert torch.equal(clustered(low, high, 8), clustered(low, high, 8))


# ---- the ranges --------------------------------------------------------------------------------------------------
def test_ranges_hold_what_was_seen_and_are_no_wider_than_the_whole() -> None:
    x, grid, ran = inputs(6), Grid(bits=6), 0
    x[..., [1, 7]] *= 9
    found = seen(x)
    groups = clustered(*found.ends("channel"), 4)
    whole = float(affine_parameters(*(e[None] for e in (x.min(), x.max())), grid)[0])
    for time in TIMES:
        low, high = hulls(*found.ends("channel", time), groups)
        assert (low <= 0).all() and (high >= 0).all()
        scale, zero = affine_parameters(low, high, grid)
        assert (scale <= whole * 1.0001).all()
        here = x[torch.tensor([TIMES[i % 2] == time for i in range(len(x))])]
        s, z = scale[groups], zero[groups]
        back = decode(encode(here, reciprocal(s), z, grid.levels - 1), s, z)
        assert ((back - here).abs() <= s * 1.0001).all()
        ran += here.numel()
    assert ran == x.numel()
