"""Stand-ins for the correction's tests: smooth networks, and trajectories of them as calibration would record them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from bitbrush.steps import chain

STEPS_TAKEN = 6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
ONE_STEP: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**DDIM),
    "ddim-v": lambda: DDIMScheduler(**DDIM, prediction_type="v_prediction"),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "euler-v": lambda: EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"),
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    **ONE_STEP, "dpm": lambda: DPMSolverMultistepScheduler(**BETAS),
    "ddpm": lambda: DDPMScheduler(**BETAS, clip_sample=False),
    "ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
}


def estimate(step: int, u: Tensor) -> Tensor:
    """A smooth stand-in for a network, differing in channels and steps."""
    rows = torch.arange(1.0, u.shape[1] + 1).reshape(1, -1, 1, 1)
    return torch.tanh(u * (0.5 + 0.1 * rows)) + 0.05 * rows * torch.cos(u + step)


class Chain:
    """Trajectories of `estimate` as calibration would record them, noise included."""

    def __init__(self, scheduler: Any, n: int = 8, seed: int = 0, network: chain.Network = estimate) -> None:
        self.scheduler, walked = scheduler, copy.deepcopy(scheduler)
        walked.set_timesteps(STEPS_TAKEN)
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 3, 6, 6, generator=noise) * getattr(walked, "init_noise_sigma", 1.0)
        self.rows: list[tuple[Tensor, Tensor]] = []
        for i, t in enumerate(walked.timesteps):
            u = walked.scale_model_input(x, t)
            self.rows.append((u, network(i, u)))
            x = step(walked, self.rows[-1][1], t, x, noise)

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        return self.rows[i]

    def walk(self, network: chain.Network, **choices: Any) -> chain.Walk:
        return chain.walk(self.moments, network, self.scheduler, STEPS_TAKEN, **choices)


def step(scheduler: Any, e: Tensor, t: Tensor, x: Tensor, noise: torch.Generator) -> Tensor:
    stochastic = isinstance(scheduler, DDPMScheduler | EulerAncestralDiscreteScheduler)
    out: Tensor = scheduler.step(e, t, x, **({"generator": noise} if stochastic else {})).prev_sample
    return out


def coarse(i: int, u: Tensor) -> Tensor:
    """A quantized stand-in: too small, rounded, with an offset."""
    return 0.85 * torch.round(estimate(i, u) * 4) / 4 + 0.05
