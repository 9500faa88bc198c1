"""Factors fitted for the next state, and shrinking by the standard error over trajectories."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bitbrush.steps import chain
from chains import DDIM, ONE_STEP, SCHEDULERS, STEPS_TAKEN, Chain, coarse, estimate

STATE = chain.Rule(l1=0.0, l2=0.0, tau=0.0, fit="state")
SHRUNK = dataclasses.replace(STATE, significance=2.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- shrinking ---------------------------------------------------------------------------------------------------
def test_what_is_within_its_errors_is_exactly_none() -> None:
    values = torch.tensor([0.0, 1.0, -2.0, 4.0, -4.0, 1e9, 3.0])
    errors = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, torch.inf])
    expected = torch.tensor([0.0, 0.0, 0.0, 3.0, -3.0, 1e9, 0.0])
    assert torch.equal(chain.shrunk(values, errors, 2.0), expected)
    assert torch.equal(chain.shrunk(values[:-1], torch.zeros(6), 2.0), values[:-1]), "without an error nothing shrinks"


def test_the_error_of_a_ratio_is_its_spread_over_repetitions() -> None:
    draws = normal(2, 4000, 32, seed=1)
    below = 1 + 0.2 * draws[0].abs()
    above = 0.9 * below + 0.05 * draws[1]
    spread = (above.sum(1) / below.sum(1)).std()
    told = chain.ratio_error(above, below)
    assert told.square().mean().sqrt() == pytest.approx(float(spread), rel=0.05)
    assert torch.isinf(chain.ratio_error(above[:3, :1], below[:3, :1])).all(), "one trajectory says nothing"


def pixels_agree(n: int, size: float, seed: int) -> Tensor:
    """A factor of its own for each trajectory, ``[n, 1, 1, 1]``: what 32 pictures of many pixels are."""
    return 1 + size * normal(n, 1, 1, 1, seed=seed)


def test_noise_of_the_trajectories_is_no_factor() -> None:
    """The published fit follows the noise; the shrunk one hardly ever, and little where it does."""
    rough = dataclasses.replace(SHRUNK, significance=0.0)
    published, kept = [], []
    for seed in range(40):
        e = normal(16, 1, 8, 8, seed=seed)
        q = pixels_agree(16, 0.05, 1000 + seed) * e
        published.append(chain.output_scale(q, e, rough).item() - 1)
        kept.append(chain.output_scale(q, e, SHRUNK).item() - 1)
    moved = torch.tensor(kept)
    assert torch.tensor(published).abs().min() > 1e-5
    assert (moved == 0).float().mean() >= 0.85
    assert moved.square().mean() < 0.25 * torch.tensor(published).square().mean()


def test_a_planted_factor_is_kept() -> None:
    e = normal(32, 2, 8, 8)
    q = torch.tensor([0.8, 1.0]).reshape(1, 2, 1, 1) * pixels_agree(32, 0.02, 5) * e
    found = chain.output_scale(q, e, SHRUNK)
    assert found[0].item() == pytest.approx(1.25, rel=0.02)
    assert abs(found[1].item() - 1) < 0.01


def test_halves_of_a_guided_call_are_one_trajectory() -> None:
    """Twice the same pictures are no more evidence: the error is that of n trajectories, not of 2 n."""
    e = normal(12, 1, 8, 8)
    q = pixels_agree(12, 0.05, 3) * 0.97 * e
    twice = [torch.cat([t, t]) for t in (q, e)]
    once = chain.output_scale(q, e, SHRUNK)
    assert torch.allclose(chain.output_scale(*twice, SHRUNK, 12), once)
    assert abs(chain.output_scale(*twice, SHRUNK).item() - 1) > abs(once.item() - 1) >= 0


@pytest.mark.parametrize("granularity", ["channel", "scalar"])
@pytest.mark.parametrize("relative", ["mean", "sum"])
def test_shrinking_goes_with_every_form_of_the_fit(granularity: Any, relative: Any) -> None:
    rule = chain.Rule(relative=relative, granularity=granularity, significance=1e-6)
    e = normal(8, 3, 8, 8)
    q = 0.9 * e + 0.05 * normal(8, 3, 8, 8, seed=1)
    unshrunk = chain.output_scale(q, e, dataclasses.replace(rule, significance=0.0))
    assert torch.allclose(chain.output_scale(q, e, rule), unshrunk, atol=1e-6), "the same number, hardly shrunk"
    strict = chain.output_scale(q, e, dataclasses.replace(rule, significance=1e9))
    assert torch.equal(strict, torch.ones(3))


@pytest.mark.parametrize("relative", ["mean", "sum"])
@pytest.mark.parametrize("significance", [0.0, 2.0])
def test_the_fit_stays_on_the_device_of_the_estimates(relative: Any, significance: float) -> None:
    """A constant made on the CPU beside them stops the run on a GPU; tensors without data show it anywhere."""
    q, e = (torch.empty(8, 3, 16, 16, device="meta") for _ in range(2))
    rule = chain.Rule(relative=relative, significance=significance)
    assert chain.output_scale(q, e, rule, 4).device.type == "meta"
    assert chain.input_bias(q, rule).device.type == "meta"


def test_an_input_shift_is_shrunk_too() -> None:
    spread = normal(16, 1, 1, 1, seed=2)
    spread = (spread - spread.mean()) / spread.std() * 4  # standard error of the mean: 1
    difference = torch.cat([spread + mean for mean in (0.0, 1.9, 4.0, -4.0)], 1).expand(16, 4, 6, 6)
    expected = torch.tensor([0.0, 0.0, 3.0, -3.0])
    assert torch.allclose(chain.input_bias(difference, SHRUNK), expected, atol=1e-5)
    assert torch.allclose(chain.input_bias(difference, STATE)[2:], torch.tensor([4.0, -4.0])), "as it is without"


def test_without_a_significance_all_is_as_published() -> None:
    """Numbers of the published form, from before there was another."""
    e, q = normal(4, 3, 8, 8, seed=11), normal(4, 3, 8, 8, seed=12)
    q = 0.8 * e + 0.3 * q
    double_e, double_q = (t.transpose(0, 1).flatten(1).double() for t in (e, q))
    kept = double_e.abs() >= 0.5 * double_e.abs().mean(1, keepdim=True)
    q_kept = torch.where(kept, double_q, 0.0)
    ratio, count = q_kept / torch.where(kept, double_e, 1.0), kept.sum(1).double()
    above = 0.5 * (q_kept * double_e).sum(1) + 0.5 * ratio.sum(1) + 0.1 * count
    below = 0.5 * q_kept.square().sum(1) + 0.5 * ratio.square().sum(1) + 0.1 * count
    assert torch.equal(chain.output_scale(q, e, chain.Rule()), (above / below).float())


# ---- the next state ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [STATE, SHRUNK])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_equal_network_needs_no_correction(name: str, rule: chain.Rule) -> None:
    found = Chain(SCHEDULERS[name]()).walk(estimate, rule=rule)
    assert torch.allclose(found.scale, torch.ones_like(found.scale), atol=1e-5)
    assert found.shift.abs().max() <= 1e-6 and found.bias.abs().max() <= 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("a", [0.8, 1.25])
def test_a_planted_scale_is_found(name: str, a: float) -> None:
    found = Chain(SCHEDULERS[name]()).walk(lambda i, u: a * estimate(i, u), rule=SHRUNK)
    assert torch.allclose(found.scale, torch.full_like(found.scale, 1 / a), atol=1e-3)
    assert found.error[-1] < 1e-3


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_planted_input_bias_is_removed(name: str) -> None:
    """A constant joins the estimate once: the shift finds it whole, as every trajectory has the same."""
    recorded = Chain(SCHEDULERS[name](), n=16)
    push = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1)

    def pushed(i: int, u: Tensor) -> Tensor:
        return estimate(i, u) + push if i == 1 else estimate(i, u)

    rule = dataclasses.replace(SHRUNK, l2=1e9)  # K = 1
    plain, found = recorded.walk(pushed), recorded.walk(pushed, rule=rule)
    a_step = chain._probe(recorded.scheduler, STEPS_TAKEN, 1, 0.0, 1.0)
    planted = push.flatten() * a_step * chain.input_scale(recorded.scheduler, STEPS_TAKEN, 2)
    assert torch.allclose(found.shift[2], planted, rtol=1e-3, atol=1e-5)
    assert found.error[-1] < 1e-3 * plain.error[-1] + 1e-4


@pytest.mark.parametrize("name", ONE_STEP)
def test_the_factor_makes_the_next_error_least(name: str) -> None:
    """Any other factor at that step leaves a larger error in the state after it."""
    recorded, at, looked = Chain(SCHEDULERS[name](), n=16), 3, 0
    found = recorded.walk(coarse, rule=dataclasses.replace(STATE, granularity="scalar", clamp=1e6))
    for change in (-0.05, -0.01, 0.01, 0.05):
        tables = chain.Walk(found.scale.clone(), found.bias, found.shift)
        tables.scale[at] += change
        assert recorded.walk(coarse, given=tables).error[at + 1] > found.error[at + 1]
        looked += 1
    assert looked == 4 and found.error[at] > 0


@pytest.mark.parametrize("name", ONE_STEP)
def test_looking_at_the_next_state_beats_looking_at_the_estimate(name: str) -> None:
    recorded, held_out = Chain(SCHEDULERS[name](), n=16), Chain(SCHEDULERS[name](), n=16, seed=9)
    tables = [recorded.walk(coarse, rule=dataclasses.replace(STATE, fit=fit, input_term=False))  # type: ignore[arg-type]
              for fit in ("state", "guided")]
    errors = [held_out.walk(coarse, given=table).error[-1] for table in tables]
    assert errors[0] < errors[1] < held_out.walk(coarse).error[-1]


def test_a_multistep_scheduler_is_fitted_on_the_estimates() -> None:
    recorded = Chain(SCHEDULERS["dpm"]())
    state, branches = (recorded.walk(coarse, rule=dataclasses.replace(STATE, fit=fit))  # type: ignore[arg-type]
                       for fit in ("state", "branches"))
    assert torch.equal(state.scale, branches.scale) and torch.equal(state.shift, branches.shift)


# ---- balance -----------------------------------------------------------------------------------------------------
EVEN = chain.Rule(fit="even", significance=2.0, clamp=2.0)
CLIPPED = DDIMScheduler(**{**DDIM, "clip_sample": True, "clip_sample_range": 10.0})
EVERY = {**SCHEDULERS, "clipped": lambda: copy.deepcopy(CLIPPED)}


def noisy(i: int, u: Tensor, size: float = 0.5, a: float = 1.0) -> Tensor:
    """a e + noise that is the same in every call of a step."""
    return a * estimate(i, u) + size * normal(*u.shape, seed=100 + i)


@pytest.mark.parametrize("rule", [EVEN, dataclasses.replace(EVEN, significance=0.0)])
@pytest.mark.parametrize("name", EVERY)
def test_balance_leaves_an_equal_network_alone(name: str, rule: chain.Rule) -> None:
    found = Chain(EVERY[name]()).walk(estimate, rule=rule)
    assert torch.allclose(found.scale, torch.ones_like(found.scale), atol=1e-4)
    assert found.bias.abs().max() <= 1e-4 and not found.shift.any() and max(found.error) < 1e-3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("a", [0.8, 1.25])
def test_balance_finds_a_planted_factor_and_constant(name: str, a: float) -> None:
    push = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1) * (name != "clipped")  # there the two do not part
    recorded = Chain(EVERY[name](), n=16)
    plain, found = (recorded.walk(lambda i, u: a * (estimate(i, u) - push), rule=rule) for rule in (None, EVEN))
    moving = found.scale[: -1 if name == "ddpm" else None]
    assert torch.allclose(moving, torch.full_like(moving, 1 / a), atol=0.01)
    assert torch.allclose(found.bias[:-1], push.flatten().expand(STEPS_TAKEN - 1, 3), atol=0.02)
    assert found.error[-1] < 0.02 * plain.error[-1]


@pytest.mark.parametrize("a", [1.0, 0.8])
def test_noise_in_the_estimate_does_not_shrink_the_balanced_factor(a: float) -> None:
    """q = a e + noise: least squares falls short of 1 / a by the noise's share, the balanced factor does not."""
    e = normal(64, 2, 16, 16)
    q = a * e + 0.4 * normal(*e.shape, seed=1)
    rule = dataclasses.replace(STATE, clamp=2.0)
    even = dataclasses.replace(EVEN, significance=0.0)
    scale, constant = chain.even_terms(lambda k, b: wide(k) * q + wide(b), e, e, even)
    assert torch.allclose(scale, torch.full((2,), 1 / a), atol=0.01)
    assert constant.abs().max() < 0.01
    least = chain.output_scale(q, e, rule)
    assert torch.allclose(least, torch.full((2,), a / (a**2 + 0.16)), atol=0.01) and bool((least < 0.93 / a).all())


def wide(row: Tensor) -> Tensor:
    return row.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("name", ["ddim", "clipped", "euler", "dpm"])
def test_along_a_chain_noise_does_not_move_the_balanced_factor(name: str) -> None:
    """The chain carries the noise on and the network answers to it; least squares takes the answer for an error."""
    recorded = Chain(EVERY[name](), n=64)
    even, least = (recorded.walk(noisy, rule=rule) for rule in (EVEN, dataclasses.replace(SHRUNK, fit="guided")))
    away = [(found.scale[1:] - 1).abs().mean().item() for found in (even, least)]
    assert away[0] < 0.5 * away[1]


@pytest.mark.parametrize("name", ["ddim", "clipped", "euler"])
def test_the_next_error_is_balanced(name: str) -> None:
    """After the first step: mean 0, and nothing of the float estimate left in it."""
    recorded = Chain(EVERY[name](), n=32)
    rule = dataclasses.replace(EVEN, significance=1e-9, clamp=1e6)
    states: dict[str, list[Tensor]] = {"float": [], "even": [], "plain": []}

    def watched(into: str, network: chain.Network) -> chain.Network:
        def call(i: int, u: Tensor) -> Tensor:
            states[into].append(u / chain.input_scale(recorded.scheduler, STEPS_TAKEN, i))
            return network(i, u)
        return call

    recorded.walk(watched("float", estimate))
    recorded.walk(watched("even", coarse), rule=rule)
    recorded.walk(watched("plain", coarse))
    e = recorded.moments(0)[1]
    left = {}
    for into in ("even", "plain"):
        error = states[into][1] - states["float"][1]
        left[into] = [error.mean((0, 2, 3)).abs().max(), (error * (e - e.mean((0, 2, 3), keepdim=True))).mean().abs()]
    assert all(a < 0.01 * b for a, b in zip(left["even"], left["plain"], strict=True))


def test_balance_takes_the_input_term_as_its_constant() -> None:
    recorded = Chain(SCHEDULERS["ddim"](), n=16)
    both, without = (recorded.walk(coarse, rule=dataclasses.replace(EVEN, input_term=term)) for term in (True, False))
    assert both.bias.any() and not both.shift.any() and not without.bias.any() and not without.shift.any()


def test_a_step_that_ignores_the_estimate_is_left_alone() -> None:
    """DDIM's last step may be x' = x."""
    scheduler = DDIMScheduler(**{**DDIM, "steps_offset": 0, "set_alpha_to_one": False})
    found = Chain(scheduler, n=16).walk(coarse, rule=EVEN)
    assert torch.equal(found.scale[-1], torch.ones(3)) and not found.bias[-1].any() and found.bias[0].any()


@pytest.mark.parametrize("name", ["ddim", "euler", "clipped", "dpm"])
def test_balanced_tables_serve_trajectories_that_were_not_fitted(name: str) -> None:
    tables = Chain(EVERY[name](), n=16).walk(coarse, rule=EVEN)
    held_out = Chain(EVERY[name](), n=16, seed=9)
    assert held_out.walk(coarse, given=tables).error[-1] < 0.8 * held_out.walk(coarse).error[-1]


def test_one_balanced_factor_for_all_channels() -> None:
    found = Chain(SCHEDULERS["ddim"](), n=16).walk(coarse, rule=dataclasses.replace(EVEN, granularity="scalar"))
    assert all(row.unique().numel() == 1 for row in (*found.scale, *found.bias)) and (found.scale != 1).any()


def test_one_trajectory_balances_nothing() -> None:
    e = normal(1, 2, 16, 16)
    scale, constant = chain.even_terms(lambda k, b: wide(k) * 0.8 * e + wide(b), e, e, EVEN)
    assert torch.equal(scale, torch.ones(2)) and not constant.any()
