"""Ranges: contain 0, are exact for flat tensors, and the search finds what brute force finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import Grid
from bitbrush.numbers.ranges import affine_parameters, error, flat_parameters, search

GRIDS = [Grid(bits=b, signed=s) for b in range(1, 9) for s in (False, True)]
METHODS = ("minmax", "percentile", "mse")


def _round_trip(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    s, z = scale[:, None], zero[:, None]
    return decode(encode(values, reciprocal(s), z, grid.levels - 1), s, z)


class _Divisors(TorchDispatchMode):
    """Collects what tensors are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten.div:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_scale_is_divided_by_a_number(grid: Grid) -> None:
    """CUDA multiplies with the number's rounded reciprocal, the CPU divides: scales would differ by device."""
    with _Divisors() as divisors:
        affine_parameters(torch.tensor([-1.0]), torch.tensor([2.0]), grid)
    assert divisors.found and all(isinstance(each, torch.Tensor) for each in divisors.found)


def _rows(seed: int, rows: int = 12, length: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=g)
    x[1] = x[1].abs() + 3
    x[2] = -x[2].abs() - 0.5
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 7] = 1e6
    x[6] = x[6].sign() * x[6].abs().pow(5)
    x[7] = 0
    x[7, 3] = 2.5
    return x


def test_parameters_are_valid_and_contain_zero() -> None:
    ran = 0
    for grid, method, seed in itertools.product(GRIDS, METHODS, range(2)):
        x = _rows(seed)
        scale, zero = search(x, grid, method=method, central_share=0.98)
        assert scale.dtype == torch.float32 and bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
        assert torch.equal(zero, zero.round()) and bool(((zero >= 0) & (zero < grid.levels)).all())
        if grid.signed:
            assert bool((zero == grid.mid).all())
        assert _round_trip(torch.zeros_like(x), scale, zero, grid).eq(0).all()  # 0 is exact
        ran += 1
    assert ran == 96


def test_minmax_errors_stay_below_half_a_step() -> None:
    """Everything inside the range of the codes is at most half a scale away from its value."""
    ran = 0
    for grid, seed in itertools.product(GRIDS, range(20)):
        x = _rows(100 + seed)
        scale, zero = search(x, grid, method="minmax")
        low, high = (0 - zero) * scale, (grid.levels - 1 - zero) * scale
        inside = (x >= low[:, None]) & (x <= high[:, None])
        distance = (x - _round_trip(x, scale, zero, grid)).abs()
        assert bool((distance <= scale[:, None] * 0.500001)[inside].all())
        if grid.bits > 1:  # the ends are representable up to the rounding of the zero-point
            span = torch.maximum(x.amax(1).clamp_min(0) - high, low - x.amin(1).clamp_max(0))
            assert bool((span <= scale * 0.500001).all())
        ran += 1
    assert ran == 320


def test_flat_rows_are_exact() -> None:
    constants = [0.0, 1.0, 1e-30, 1e-37, 3.14159, 65504.0, 1e38, 2.0**-126, 0.1, 7e-5]
    values = torch.tensor([sign * c for c in constants for sign in (1.0, -1.0)])
    ran = exact = 0
    for grid, method in itertools.product(GRIDS, METHODS):
        x = values[:, None].expand(-1, 17).contiguous()
        scale, zero = search(x, grid, method=method)
        back = _round_trip(x, scale, zero, grid)
        possible = values <= 0 if grid.signed and grid.bits == 1 else values == values  # symmetric 1 bit: -scale and 0
        assert torch.equal(back[possible], x[possible]), (grid, method)
        assert torch.equal(scale, torch.where(values == 0, torch.ones(()), values.abs()))
        ran, exact = ran + len(values), exact + int(possible.sum())
    assert (ran, exact) == (960, 933)
    tiny = torch.full((1, 5), 1e-45)  # below the smallest normal float: 0, never a division by nearly nothing
    assert _round_trip(tiny, *search(tiny, GRIDS[0]), GRIDS[0]).eq(0).all()


def test_flat_row_among_others() -> None:
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    x[2] = -0.7
    scale, zero = search(x, Grid(bits=4))
    assert torch.equal(_round_trip(x, scale, zero, Grid(bits=4))[2], x[2])
    s, z = flat_parameters(torch.tensor([-0.7, 0.0, 5.0]), Grid(bits=4))
    assert s.tolist() == [pytest.approx(0.7), 1.0, 5.0] and z.tolist() == [1.0, 0.0, 0.0]


def test_search_is_never_worse_than_minmax() -> None:
    ran = 0
    for grid, seed, power in itertools.product(GRIDS, range(4), (2.0, 2.4)):
        x = _rows(200 + seed)[:4]
        best, plain = search(x, grid, method="mse", power=power), search(x, grid, method="minmax")
        assert bool((error(x, *best, grid, power) <= error(x, *plain, grid, power)).all())
        ran += 1
    assert ran == 128


def test_search_equals_brute_force() -> None:
    """The least error over 80 shrunken ranges, each tried alone in float64 sums."""
    ran = 0
    for grid, seed in itertools.product([Grid(bits=b, signed=s) for b in (2, 4, 8) for s in (False, True)], range(3)):
        x = torch.randn(1, 200, generator=torch.Generator().manual_seed(seed))
        scale, zero = search(x, grid, method="mse")
        losses = []
        for i in range(80):
            s, z = affine_parameters(x.amin(1) * (1.0 - i * 0.01), x.amax(1) * (1.0 - i * 0.01), grid)
            y = _round_trip(x, s, z, grid)
            losses.append((float((x.double() - y.double()).abs().pow(2.4).mean()), float(s), float(z)))
        mine = float((x.double() - _round_trip(x, scale, zero, grid).double()).abs().pow(2.4).mean())
        assert mine == pytest.approx(min(losses)[0], rel=1e-5)
        assert any(s == float(scale) and z == float(zero) for _, s, z in losses)
        ran += 1
    assert ran == 18


def test_symmetric_search_keeps_both_ends_alike() -> None:
    x = _rows(77)
    scale, _ = search(x, Grid(bits=4), method="minmax", symmetric=True)
    bound = x.abs().amax(1)
    sided = ((x < 0).any(1) & (x > 0).any(1)).float() + 1  # [-T, T] where both signs occur, else one side of it
    assert torch.allclose(scale, bound * sided / 15)


def test_percentile_equals_numpy() -> None:
    x = torch.randn(6, 1001, generator=torch.Generator().manual_seed(9))
    x[:, 0] = 50
    grid, ran = Grid(bits=8), 0
    for p in (0.9, 0.99, 0.999):
        scale, zero = search(x, grid, method="percentile", central_share=p)
        low, high = (np.quantile(x.numpy(), q, axis=1) for q in ((1 - p) / 2, (1 + p) / 2))
        want = affine_parameters(torch.from_numpy(low).float(), torch.from_numpy(high).float(), grid)
        assert torch.allclose(scale, want[0], rtol=1e-5) and torch.equal(zero, want[1])
        assert bool((scale < 50 / 255).all())
        ran += 1
    assert ran == 3


def test_parameters_of_given_ranges() -> None:
    low, high = torch.tensor([-1.0, 0.5, -2.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0])
    scale, zero = affine_parameters(low, high, Grid(bits=4))
    assert torch.allclose(scale, torch.tensor([4 / 15, 2 / 15, 2 / 15, 1.0]))
    assert zero.tolist() == [4.0, 0.0, 15.0, 0.0]
    scale, zero = affine_parameters(low, high, Grid(bits=4, signed=True))
    assert torch.allclose(scale, torch.tensor([3 / 7, 2 / 7, 2 / 7, 1.0])) and zero.tolist() == [8.0] * 4


@pytest.mark.parametrize("bits,floor", [(3, 12.5), (4, 18.0), (8, 38.0)])
def test_quality_floor(bits: int, floor: float) -> None:
    """Signal to noise of Gaussian rows, so that an agreeing but bad pair cannot pass."""
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(bits))
    noise = (x - _round_trip(x, *search(x, Grid(bits=bits)), Grid(bits=bits))).pow(2).mean()
    assert float(10 * torch.log10(x.pow(2).mean() / noise)) > floor
