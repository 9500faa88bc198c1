"""Timestep-aware correction (Yao et al., ECCV 2024, arXiv 2407.03917): the arithmetic, and the walk along the chain.

Two chains start from the same noise: the float one (x_t with its estimate e_t, recorded) and the quantized one (xq_t).

* **Input.** b_t = mean of xq_t - x_t, by channel; the network is given xq_t - b_t.
* **Estimate.** K_t, by channel, minimises
  (1 - l1) mean (K q - e)^2 + l1 sum ((K q - e) / e)^2 + l2 (K - 1)^2 over the elements with abs(e) >= tau mean abs(e).
* **Next state.** A choice of ours (``Rule.fit = "state"``): K_t is fitted for the error that the scheduler's step
  leaves, not for that of the estimate. With x' = a x + c e (below) and d = xq_t - x_t less what the input term takes
  off, the next error is a d + c (K q - e): K q is compared with e - (a / c) d, and what is left does not go with q.
* **Balance.** A choice of ours (``Rule.fit = "even"``): K_t and a constant k_t on the estimate, by channel, leave the
  next error r = step(K q + k, xq_t) - step(e, x_t) with mean r = 0 and mean r (e - mean e) = 0: no shift, and as much
  of the float estimate in the next state as the float chain has. Noise in q does not enter, and what the network
  answers to the chain's own error is judged by what it does to that error. The step is the scheduler's own, clipping
  and history included, so nothing is folded and the input is left alone (`bitbrush.steps.balance`).
* **Shrinking.** A choice of ours (``Rule.significance`` = z): a number v with standard error s over trajectories
  becomes v max(0, 1 - (z s / v)^2), the positive part of James and Stein's rule (1961). Within z errors it is nothing.
* **In order.** Corrections change all later inputs, so step t is fitted on a chain that has those of all earlier steps.

**Folding.** The method also puts xq_t - b_t into the scheduler's update; otherwise the bias stays in the chain. For a
scheduler of one step that is linear, x' = a x + c e + noise (DDIM, DDPM, Euler; any prediction type; no clipping), with
B_t = b_t / s_t in the scheduler's scale (the network is given s_t x: ``scale_model_input``):

    a (x - B) + c e  =  a x + c (e - (a / c) B)        (noise left out)

so adding k_t = -(a / c) B_t to the estimate does the same, and no scheduler is changed. For epsilon and DDIM,
a = sqrt(abar' / abar) and c = sqrt(1 - abar') - sqrt(abar' (1 - abar) / abar); for Euler a = 1 and c = sigma' - sigma.
Both are read off the scheduler itself, step by step, and their linearity is checked. Where it does not hold (multistep
schedulers keep a history of estimates, clipping) the input term stays at the network.

**Shared noise.** What a recorded trajectory did between t and t' is known, so the quantized chain takes
x'_q = step(eq, xq) + (x' - step(e, x)), both steps with equally seeded generators: noise that a scheduler adds is the
recorded noise, and everything that the two chains share drops out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from bitbrush.errors import InputError, NumericsError
from bitbrush.steps.balance import balanced

ONE_STEP = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
"""Schedulers whose update looks at the present estimate only (and may add noise)."""
FEWEST = 100
"""Elements below which K stays 1."""

Moments = Callable[[int], tuple[Tensor, Tensor]]
"""Step number to (what the float network was given ``[n, C, H, W]``, its estimates), float32. Estimates are
``[n, C, H, W]``, or with guidance ``[2 n, C, H, W]``: the unconditional half first."""
Network = Callable[[int, Tensor], Tensor]
"""Step number and input to the quantized network's estimates, float32."""


@dataclass(frozen=True)
class Rule:
    """How coefficients are fitted; the meaning stands with `bitbrush.steps.correct.Correct`."""

    l1: float = 0.5
    l2: float = 0.1
    tau: float = 0.5
    relative: Literal["mean", "sum"] = "mean"
    granularity: Literal["channel", "scalar"] = "channel"
    clamp: float = 2.0
    input_term: bool = True
    fit: Literal["branches", "guided", "state", "even"] = "branches"
    significance: float = 0.0

    @property
    def shifts_input(self) -> bool:
        """Whether the network is given another input; ``even`` tells the step before instead."""
        return self.input_term and self.fit != "even"


@dataclass
class Walk:
    """Tables ``[T, C]`` (float32), and the chain's error: root mean square of xq_t - x_t at each step.

    ``last`` ``[n]``: its mean square for each trajectory, at the last step's input.
    """

    scale: Tensor
    bias: Tensor
    shift: Tensor
    error: list[float] = field(default_factory=list)
    last: Tensor = field(default_factory=lambda: torch.zeros(0))

    def tables(self) -> dict[str, Tensor]:
        """The tables by name."""
        return {"scale": self.scale, "bias": self.bias, "shift": self.shift}


def output_scale(q: Tensor, e: Tensor, rule: Rule, trajectories: int | None = None) -> Tensor:
    """K, float32 ``[C]``, in closed form; q and e ``[n, C, H, W]`` are the quantized estimate and what it should be.

    1 where fewer than `FEWEST` elements are left by the mask; K - 1 is shrunk by its standard error where the rule has
    a significance; clamped to [1 / clamp, clamp].

    Args:
        trajectories: How many there are, where n is a multiple of it (two halves of guided calls); None: n.
    """
    flat_q, flat_e = (_by_channel(t, rule.granularity).double() for t in (q, e))
    size = flat_e.abs()
    kept = (size >= rule.tau * size.mean(1, keepdim=True)) & (size > 0)
    flat_q = torch.where(kept, flat_q, 0.0)
    ratio = flat_q / torch.where(kept, flat_e, 1.0)
    count = kept.sum(1).double()
    weight = rule.l1 * (count if rule.relative == "sum" else 1.0)
    above = (1 - rule.l1) * (flat_q * flat_e).sum(1) + weight * ratio.sum(1) + rule.l2 * count
    below = (1 - rule.l1) * flat_q.square().sum(1) + weight * ratio.square().sum(1) + rule.l2 * count
    usable = (count >= FEWEST) & (below > 0)
    found = torch.where(usable, above / torch.where(usable, below, 1.0), 1.0)
    if rule.significance > 0:
        per = torch.as_tensor(weight, dtype=ratio.dtype, device=ratio.device).reshape(-1, 1)
        each = (1 - rule.l1) * flat_q, per * ratio, rule.l2 * kept
        parts = each[0] * flat_e + each[1] + each[2], each[0] * flat_q + each[1] * ratio + each[2]
        n = trajectories or len(q)
        error = ratio_error(*(part.reshape(len(part), len(q) // n, n, -1).sum((1, 3)) for part in parts))
        found = 1 + shrunk(found - 1, error, rule.significance)
    return found.clamp(1 / rule.clamp, rule.clamp).float().expand(q.shape[1]).clone()


def ratio_error(above: Tensor, below: Tensor) -> Tensor:
    """Standard error ``[C]`` of sum(above) / sum(below), by the jackknife over n trajectories (Tukey, 1958).

    Args:
        above, below: ``[C, n]``: what each trajectory adds to the sums.
    """
    n = above.shape[1]
    if n < 2:
        return torch.full_like(above[:, 0], torch.inf)
    rest_above, rest_below = (t.sum(1, keepdim=True) - t for t in (above, below))
    without = torch.where(rest_below > 0, rest_above / torch.where(rest_below > 0, rest_below, 1.0), 1.0)
    return (without.var(1, correction=0) * (n - 1)).sqrt()


def shrunk(value: Tensor, error: Tensor, significance: float) -> Tensor:
    """value max(0, 1 - (significance error / value)^2): exactly 0 within ``significance`` standard errors of 0."""
    share = significance * error / value.abs()  # 0 / 0 is NaN, and not below 1
    return torch.where(share < 1, value * (1 - share.square()), 0.0)


def input_bias(difference: Tensor, rule: Rule) -> Tensor:
    """b, float32 ``[C]``: the mean of ``difference`` ``[n, C, H, W]``, or 0 unless it is over two standard errors.

    Where the rule has a significance, the mean is shrunk by that many errors instead (`shrunk`).

    The error is that of the mean over trajectories: pixels of one picture are no independent samples.
    """
    means = difference.double().flatten(2).mean(2)
    if rule.granularity == "scalar":
        means = means.mean(1, keepdim=True)
    mean = means.mean(0)
    error = means.std(0) / len(means) ** 0.5 if len(means) > 1 else torch.full_like(mean, torch.inf)
    return _told(mean, error, rule).float().expand(difference.shape[1]).clone()


def even_terms(
    after: Callable[[Tensor, Tensor], Tensor], target: Tensor, e: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(K, k), float32 ``[C]``, with mean r = 0 and mean r (e - mean e) = 0 for r = after(K, k) - target, by channel.

    Each is shrunk by its standard error over trajectories where the rule has a significance; without one K is as found,
    and k is 0 unless it exceeds two errors. K is clamped to [1 / clamp, clamp] before k is found.

    Args:
        after: (K, k), both ``[C]``, to the next state of the quantized chain, ``[n, C, H, W]``.
        target: The float chain's next state.
        e: Its (guided) estimate: the instrument.
    """
    one, scalar = torch.ones(e.shape[1], device=e.device), rule.granularity == "scalar"
    scale, none = one, torch.zeros_like(one)
    if rule.clamp > 1 and e[:, 0].numel() >= FEWEST:
        dims = (0, 1, 2, 3) if scalar else (0, 2, 3)

        def centred(v: Tensor) -> Tensor:  # what a constant does must not look like a factor's uncertainty
            error = after(v, none) - target
            return error - error.mean(dims, keepdim=True)

        found, error = balanced(centred, e - e.mean(dims, keepdim=True), one, target, scalar=scalar)
        found = 1 + shrunk(found - 1, error, rule.significance) if rule.significance > 0 else found
        scale = found.clamp(1 / rule.clamp, rule.clamp).float()
    if not rule.input_term:
        return scale, none
    constant, error = balanced(lambda v: after(scale, v) - target, torch.ones_like(e), none, target, scalar=scalar)
    return scale, _told(constant, error, rule).float()


def _told(mean: Tensor, error: Tensor, rule: Rule) -> Tensor:
    """A mean less what may be chance: shrunk by its errors, or 0 unless it is over two."""
    if rule.significance > 0:
        return shrunk(mean, error, rule.significance)
    return torch.where(mean.abs() > 2 * error, mean, 0.0)


def timesteps_of(scheduler: Any, steps: int) -> list[float]:
    """The scheduler's timesteps in sampling order. Raises InputError where one is visited twice (PNDM, Heun)."""
    walked = copy.deepcopy(scheduler)
    walked.set_timesteps(steps)
    found = [float(t) for t in walked.timesteps]
    if any(a <= b for a, b in pairwise(found)):
        raise InputError(
            f"a correction cannot be fitted for {type(scheduler).__name__}", where="step correct",
            why="it visits a timestep twice, so a timestep does not say where a trajectory stands",
            try_="use DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler",
        )
    return found


def folding(scheduler: Any, steps: int) -> tuple[Tensor | None, str]:
    """Factors f_t, float64 ``[T]``, by which b_t becomes the estimate's constant k_t = f_t b_t; or None, and why."""
    name = type(scheduler).__name__
    if name not in ONE_STEP:
        return None, f"{name} is not known to look at the present estimate only"
    factors = []
    for i in range(len(timesteps_of(scheduler, steps))):
        noise, *seen = (
            _probe(scheduler, steps, i, x, e) for x, e in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (100.0, -50.0))
        )
        a, c, mixed = (value - noise for value in seen)
        if abs(mixed - (100 * a - 50 * c)) > 1e-3 * (abs(100 * a) + abs(50 * c)):
            return None, f"this {name} clips, so its update is not linear"
        idle = abs(c) < 1e-6 * abs(a)  # DDIM's last step may be x' = x, whatever the estimate
        factors.append(0.0 if idle else -a / c / input_scale(scheduler, steps, i))
    return torch.tensor(factors, dtype=torch.float64), ""


def input_scale(scheduler: Any, steps: int, index: int) -> float:
    """s_t: what the scheduler multiplies x_t with before the network is given it."""
    fresh, time = _at(scheduler, steps, index)
    return float(fresh.scale_model_input(torch.ones(1, 1, 1, 1), time))


def walk(
    moments: Moments, network: Network, scheduler: Any, steps: int, *, rule: Rule | None = None,
    given: Walk | None = None, options: dict[str, Any] | None = None, guidance: float = 1.0,
) -> Walk:
    """Walk the quantized chain beside the recorded one, and fit the tables on the way, noisiest step first.

    Args:
        moments, network: The recorded chain, and the quantized network (without a correction).
        scheduler: Copied, not changed.
        rule: How to fit; None: nothing is fitted. Where `folding` finds no factors, ``state`` is as ``branches``.
        given: Tables to walk with instead; None and no rule: without any correction.
        options: Further arguments of the scheduler's ``step``, where it takes them.
        guidance: Scale by which the halves of the estimates are combined, where there are two.

    Raises:
        NumericsError: The quantized chain is no longer finite.
    """
    first, _ = moments(0)
    times, channels, device = timesteps_of(scheduler, steps), first.shape[1], first.device
    factors = folding(scheduler, steps)[0]
    flat = torch.zeros(len(times), channels)
    out = Walk(torch.ones_like(flat), flat.clone(), flat.clone())
    if given is not None:
        out = Walk(given.scale, given.bias, given.shift)
    chains = [copy.deepcopy(scheduler) for _ in range(2)]
    for chain in chains:
        chain.set_timesteps(steps, device=device)
    state = first / input_scale(scheduler, steps, 0)
    following: Tensor | None = None  # what the float chain's step gave, without the recorded noise
    for i in range(len(times)):
        time, scale = chains[0].timesteps[i], input_scale(scheduler, steps, i)
        sample, e = moments(i)
        x = sample / scale
        if following is not None:
            state = state + (x - following)
        given_x, given_q = (chain.scale_model_input(s, time) for chain, s in zip(chains, (x, state), strict=True))
        difference = given_q - given_x
        out.error.append(float(difference.square().mean().sqrt()) / scale)
        if rule is not None and rule.shifts_input and i > 0:
            out.shift[i] = input_bias(difference, rule).cpu()
            if factors is not None:
                out.bias[i] = (factors[i] * out.shift[i].double()).float()
        q = network(i, given_q - _wide(out.shift[i], given_q))
        if not torch.isfinite(q).all():
            raise NumericsError("the quantized network answers NaN or Inf", where=f"timestep {times[i]:g}",
                                why="seen while fitting the correction", try_="quantize with more bits")
        e_guided, q_guided = (guided(t, len(sample), guidance) for t in (e, q))
        following = _step(chains[0], e_guided, time, x, options)
        if rule is not None and rule.fit == "even":
            after = _after(chains[1], q_guided, time, state, options)
            out.scale[i], out.bias[i] = (v.cpu() for v in even_terms(after, following, e_guided, rule))
        elif rule is not None:
            left = difference - _wide(out.shift[i], difference)
            carried = None if factors is None else float(factors[i]) * left
            out.scale[i] = _factor(rule, (q, e), (q_guided, e_guided), carried, len(sample)).cpu()
        state = _after(chains[1], q_guided, time, state, options, keep=True)(out.scale[i], out.bias[i])
    out.last = (difference / scale).square().flatten(1).mean(1).cpu()
    return out


def guided(estimates: Tensor, n: int, guidance: float) -> Tensor:
    """The estimate that a scheduler is given, from one half or two."""
    if len(estimates) == n:
        return estimates
    first, second = estimates.chunk(2)
    return first + guidance * (second - first)


def _factor(
    rule: Rule, halves: tuple[Tensor, Tensor], combined: tuple[Tensor, Tensor], carried: Tensor | None, n: int
) -> Tensor:
    """K from what the rule looks at: (q, e) of both halves or guided.

    Args:
        carried: -(a / c) d, the chain error as an estimate that would undo it; None: not known for this scheduler.
        n: Trajectories.
    """
    if rule.fit == "state" and carried is not None:
        return output_scale(combined[0], combined[1] + carried, rule, n)
    return output_scale(*(combined if rule.fit == "guided" else halves), rule, n)


def _after(
    scheduler: Any, q: Tensor, time: Tensor, state: Tensor, options: dict[str, Any] | None, *, keep: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """(K, k) to the state after this step; ``keep``: the scheduler itself moves on, else a copy does at every call."""

    def after(scale: Tensor, constant: Tensor) -> Tensor:
        moved = scheduler if keep else copy.deepcopy(scheduler)
        return _step(moved, _wide(scale, q) * q + _wide(constant, q), time, state, options)

    return after


def _step(scheduler: Any, estimate: Tensor, time: Tensor, x: Tensor, options: dict[str, Any] | None) -> Tensor:
    """One step; noise, where the scheduler adds any, is the same in every call."""
    accepted = inspect.signature(scheduler.step).parameters
    wanted = {**(options or {}), "generator": torch.Generator(x.device).manual_seed(0)}
    after: Tensor = scheduler.step(estimate, time, x, **{k: v for k, v in wanted.items() if k in accepted}).prev_sample
    return after


def _at(scheduler: Any, steps: int, index: int) -> tuple[Any, Tensor]:
    """A fresh copy that stands before step ``index``, and its timestep."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(steps)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(index)
    return fresh, fresh.timesteps[index]


def _probe(scheduler: Any, steps: int, index: int, x: float, estimate: float) -> float:
    fresh, time = _at(scheduler, steps, index)
    fresh.scale_model_input(torch.full((1, 1, 1, 1), x), time)
    parts = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (estimate, x))
    e, state = parts
    return float(_step(fresh, e, time, state, None))


def _by_channel(t: Tensor, granularity: str) -> Tensor:
    return t.reshape(1, -1) if granularity == "scalar" else t.transpose(0, 1).flatten(1)


def _wide(row: Tensor, like: Tensor) -> Tensor:
    return row.to(like.device).reshape(1, -1, 1, 1)
