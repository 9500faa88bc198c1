"""Time is a value: lookups, hooks, exceptions, mixed batches, shared models."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from bitbrush.errors import InputError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.numbers.grid import ActivationSpec

TIMES = (1.0, 250.0, 500.0, 999.0)


class Denoiser(nn.Module):
    """One timed quantizer behind a denoiser's signature."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.input = ActivationQuantizer(ActivationSpec(timed=True), (), clock, len(TIMES))
        self.input.set_scale(torch.tensor([[0.01], [0.03], [0.07], [0.2]]), torch.tensor([[0], [20], [128], [255]]))
        clock.attach(self)

    def forward(self, sample: Tensor, timestep: Tensor | float | int, fail: bool = False) -> Tensor:
        """The quantized sample; raises when asked to."""
        if fail:
            raise RuntimeError("stopped by the test")
        return self.input(sample, 1)


def _model() -> tuple[Denoiser, Clock]:
    clock = Clock(TIMES)
    return Denoiser(clock), clock


def _expected(model: Denoiser, x: Tensor, row: int) -> Tensor:
    single = ActivationQuantizer(ActivationSpec())
    single.set_scale(model.input.scale[row : row + 1], model.input.zero_point[row : row + 1])
    return single(x, 1)


def test_lookups_equal_brute_force() -> None:
    rng, ran = random.Random(0), 0
    grids = [TIMES, (5.0,), (0.0, 1.0, 2.0), tuple(float(t) for t in range(1, 1000, 40)), (0.25, 0.5)]
    for grid in grids:
        clock = Clock(grid)
        times = [*grid, -10.0, 0.0, 1e4, *((a + b) / 2 for a, b in itertools.pairwise(grid))]
        times += [rng.uniform(-5, 1005) for _ in range(60)]
        with clock.at(torch.tensor(times)):
            nearest, above = clock.rows("nearest").tolist(), clock.rows("ceil").tolist()
        for t, row, up in zip(torch.tensor(times).tolist(), nearest, above, strict=True):
            assert row == min(range(len(grid)), key=lambda i: (abs(grid[i] - t), i))  # the earlier one in the middle
            assert up == next((i for i, g in enumerate(grid) if g >= t), len(grid) - 1)
            ran += 1
    assert ran == sum(2 * len(g) - 1 + 63 for g in grids) == 380


def test_exact_lookup() -> None:
    clock = Clock(TIMES)
    with clock.at(torch.tensor([250, 999, 1])):
        assert clock.rows("exact").tolist() == [1, 3, 0]
    with clock.at(torch.tensor([250, 251])), pytest.raises(InputError, match="timestep 251"):
        clock.rows("exact")


def test_an_empty_grid_raises() -> None:
    clock = Clock()
    with clock.at(251), pytest.raises(InputError, match="grid is empty"):
        clock.rows("nearest")


@pytest.mark.parametrize(
    "now", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.tensor(500, dtype=torch.int32),
            torch.tensor([500]).expand(2)],
)
def test_every_form_of_a_timestep(now: Tensor | float | int) -> None:
    model, clock = _model()
    x = torch.randn(2, 3, 4, 4)
    want = _expected(model, x, 2)
    assert torch.equal(model(x, now), want)
    assert torch.equal(model(x, timestep=now), want)
    assert torch.equal(model(sample=x, timestep=now), want)
    assert clock.now is None
    with clock.at(now):
        assert clock.rows("nearest").shape == (1,)  # one value for the batch is one row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_grid_stays_as_it_is_in_half_precision(dtype: torch.dtype) -> None:
    """999 is 1000 in bfloat16: rows of close timesteps would be mistaken, and each call warned of."""
    clock = Clock((993.0, 995.0, 997.0, 999.0)).to(dtype)
    assert clock.timesteps.tolist() == [993.0, 995.0, 997.0, 999.0]
    with clock.at(torch.tensor([994.0, 996.0, 999.0])):
        assert clock.rows("nearest").tolist() == [0, 1, 3]


def test_unset_clock_raises_with_a_hint() -> None:
    model, clock = _model()
    with pytest.raises(InputError) as caught:
        model.input(torch.randn(1, 3, 2, 2), 1)
    assert "clock" in caught.value.what and "clock.at" in (caught.value.try_ or "")
    with clock.at(3):
        model.input(torch.randn(1, 3, 2, 2), 1)
    with pytest.raises(InputError):
        model.input(torch.randn(1, 3, 2, 2), 1)


def test_cleared_after_an_exception() -> None:
    model, clock = _model()
    x = torch.randn(2, 3, 4, 4)
    for fail_first in (True, False):
        with pytest.raises(RuntimeError, match="stopped by the test"):
            model(x, 999, fail=True)
        assert clock.now is None, fail_first
        with pytest.raises(InputError):
            model.input(x, 1)
        assert torch.equal(model(x, 1), _expected(model, x, 0))  # nothing of 999 is left


def test_at_restores_what_was_before() -> None:
    clock = Clock(TIMES)
    with clock.at(250):
        with clock.at(torch.tensor([1, 999])):
            assert clock.rows("nearest").tolist() == [0, 3]
        assert clock.rows("nearest").tolist() == [1]
        with pytest.raises(KeyError), clock.at(999):
            raise KeyError
        assert clock.rows("nearest").tolist() == [1]
    assert clock.now is None


def test_scenarios_equal_a_fresh_model() -> None:
    """Repeated, reversed, skipped, aborted, doubled (guidance), mixed batches: what came before does not matter."""
    x, ran = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 0
    orders: list[list[float]] = [
        [999, 500, 250, 1], [1, 250, 500, 999], [999, 999, 500, 500], [999, 1], [500], [250, 250, 250, 999],
        [740, 741, 12, 400], [999, 500, 999, 500],
    ]
    for order in orders:
        model, _ = _model()
        for t in order:
            with pytest.raises(RuntimeError):
                model(x * 3, 1000 - t, fail=True)
            fresh, _ = _model()
            assert torch.equal(model(x, t), fresh(x, t))
            doubled = model(torch.cat([x, x]), t)
            assert torch.equal(doubled, torch.cat([fresh(x, t)] * 2))
            ran += 1
    assert ran == sum(map(len, orders)) == 27


def test_mixed_batch_equals_sample_by_sample() -> None:
    model, _ = _model()
    times = torch.tensor([999, 3, 260, 480, 620])
    x = torch.randn(5, 3, 4, 4)
    whole = model(x, times)
    for i, t in enumerate(times):
        assert torch.equal(whole[i : i + 1], model(x[i : i + 1], t))


def test_two_models_do_not_share_time() -> None:
    (first, a), (second, b) = _model(), _model()
    x = torch.randn(1, 3, 2, 2)
    with a.at(999):
        assert torch.equal(second(x, 1), _expected(second, x, 0))
        assert torch.equal(first.input(x, 1), _expected(first, x, 3))
        assert b.now is None


def test_clock_is_no_part_of_the_state() -> None:
    model, clock = _model()
    assert list(clock.state_dict()) == []
    assert not any("clock" in key or "timesteps" in key for key in model.state_dict())
