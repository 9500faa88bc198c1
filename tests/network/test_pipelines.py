"""What schedulers make of an answer."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import diffusers
import pytest
import torch

from bitbrush.network.pipelines import influence


def ddim(**changes: object) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   set_alpha_to_one=False, clip_sample=False, **changes)  # type: ignore[arg-type]


def test_ddim_is_the_difference_of_sigma_over_alpha() -> None:
    """x / alpha moves by the differences of sigma / alpha times the estimate (DDIM, Song et al. 2021, eq. 13)."""
    scheduler = ddim()
    before = copy.deepcopy(scheduler.__dict__)
    found = influence(SimpleNamespace(scheduler=scheduler), 10)
    noise = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    times = [int(t) for t in sorted(found, reverse=True)]
    assert times == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    ends = [float(noise[t]) for t in times] + [float(noise[0])]
    last = float(scheduler.final_alpha_cumprod.sqrt())
    want = [last * (a - b) for a, b in itertools.pairwise(ends)]
    assert [found[float(t)] for t in times] == pytest.approx(want, rel=1e-3)
    assert before.keys() == scheduler.__dict__.keys() and scheduler.num_inference_steps is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "PNDM",
                                  "HeunDiscrete", "UniPCMultistep"])
def test_every_scheduler_moves_more_at_noisy_times(name: str) -> None:
    """Stochastic schedulers draw the same noise for all answers, so that only the answers count."""
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ddim().config)
    found = influence(SimpleNamespace(scheduler=scheduler), 8)
    times = sorted(found)
    assert len(times) >= 8 and all(v > 0 and torch.tensor(v).isfinite() for v in found.values())
    half = len(times) // 2
    assert sum(found[t] for t in times[half:]) > 2 * sum(found[t] for t in times[:half])
    assert influence(SimpleNamespace(scheduler=scheduler), 8) == found, "and it is repeatable"


def test_clipping_is_not_met() -> None:
    """clip_sample cuts estimates of pictures beyond 1; the probe is small."""
    one, two = (influence(SimpleNamespace(scheduler=diffusers.DDIMScheduler(clip_sample=c)), 5) for c in (True, False))
    assert one == pytest.approx(two) and len(one) == 5
