"""calibrate: denoiser inputs from real trajectories of the pipeline's own scheduler, stratified over time.

``times = "uniform"``: as many samples from every sampling step (Q-Diffusion, section 3.1 of its method page).
``times = "normal"``: t ~ Normal(mean * T, std * T), clamped, each x_t with its own t (PTQ4DM, NDTC; T counts sampling
steps and t = 0 is the cleanest). Under classifier-free guidance both halves of a call are kept, each with its own
condition. Every sample carries its ``trajectory`` (a number within the step) and ``half`` (0 = unconditional or only,
1 = conditional), so that later steps can walk along trajectories (`Tape.table`).
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitbrush.engine.journal import generator as derived
from bitbrush.engine.run import Run, find_nonfinite
from bitbrush.engine.step import Step, UnitResult
from bitbrush.errors import InputError, NumericsError
from bitbrush.network import wrap
from bitbrush.network.pipelines import sample_latents, takes_prompt

FEWEST, MOST = 16, 64
"""Trajectories run together, where a recipe does not say."""
LIVE, ROOM = 16, 8 << 30
"""Outputs of the largest layer that are alive at once, roughly; bytes that they may take."""


class Calibrate(Step):
    """Fill the tape.

    Args:
        samples: Denoiser calls kept (a guided step counts one for each half); ``all`` keeps every step of every
            trajectory.
        trajectories: Sampling runs they come from, each from its own noise.
        prompts: Fewest prompts; given fewer than ``trajectories``, they are used again. Left out: one a trajectory.
        steps: Sampling steps of a trajectory.
        guidance: Guidance scale of the trajectories.
        times: How samples spread over the steps.
        mean, std: Of the normal distribution, as shares of the number of steps.
        batch: Trajectories run together; left out, `MOST` on a GPU where the model is small enough, else `FEWEST`.
    """

    samples: Annotated[int, Field(ge=1)] | Literal["all"] = 256
    trajectories: int = Field(default=32, ge=1)
    prompts: int | None = Field(default=None, ge=1)
    steps: int = Field(default=25, ge=1)
    guidance: float = 4.0
    times: Literal["uniform", "normal"] = "uniform"
    mean: float = 0.4
    std: float = Field(default=0.4, gt=0)
    batch: int | None = Field(default=None, ge=1)

    @property
    def not_after(self) -> tuple[str, ...]:
        """A new time grid discards what was fitted."""
        return ("smooth", "fit weights", "codebooks", "fit activations", "pack")

    @property
    def sees_activations(self) -> bool:
        """The float network is sampled."""
        return False

    def needs_prompts(self) -> int:
        """One a trajectory, or the fewest that are enough."""
        return min(self.prompts or self.trajectories, self.trajectories)

    def units(self, run: Run) -> list[str]:
        """Batches of trajectories, those from which something is kept."""
        plan, last, size = self.schedule(run), self.trajectories, self.together(run)
        batches = [(a, min(a + size, last) - 1) for a in range(0, last, size)]
        return [f"trajectories {a}-{b}" for a, b in batches if any(plan[a : b + 1])]

    def together(self, run: Run) -> int:
        """Trajectories run together: by the kind of device and the model alone, so that a resumed run does the same.

        A small model on a GPU waits for kernel launches, whatever the batch.
        """
        if self.batch is not None:
            return self.batch
        if run.device.type == "cpu":
            return FEWEST
        outputs = max((4 * site.macs // max(1, prod(site.shape[1:])) for site in run.survey.layers()), default=0)
        size = MOST
        while size > FEWEST and LIVE * outputs * self.halves(run) * size > ROOM:
            size //= 2
        return size

    def rows_together(self, run: Run) -> int:
        """Samples of a call of the denoiser that go through it together when trajectories are sampled."""
        return max(run.tape.batch, self.together(run) * self.halves(run))

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Sample one batch of trajectories and keep the scheduled moments."""
        low, high = (int(part) for part in unit.split()[1].split("-"))
        members = list(range(low, high + 1))
        wanted = [self.schedule(run)[i] for i in members]
        keeper = Keeper(run.model, wanted, self.timesteps(run), self.halves(run), first=low)
        if low == 0 and takes_prompt(run.pipeline) and len(run.prompts) < self.trajectories:
            run.progress.say(f"{len(run.prompts):,} prompts for {self.trajectories:,} calibration trajectories: each "
                             "is used more than once, with other noise")
        with keeper, wrap.show(run.model, "float"):
            self.sample(run, members)
        tensors = keeper.tensors()
        times = tensors["timestep"]
        counts = {f"{t:g}": int((times == t).sum()) for t in times.unique().tolist()}
        return UnitResult(tensors, notes={"samples": len(times), "timesteps": counts})

    def sample(self, run: Run, members: list[int], noise: str = "") -> Tensor:
        """Sample trajectories by their numbers, in the face that the network shows; returns the final latents.

        ``noise``: whose noise it is, where not this step's.
        """
        seeds = [derived(run.seed, noise or self.label, f"noise {i}") for i in members]
        prompts = self._prompts(run, members)
        return sample_latents(run.pipeline, prompts, seeds, steps=self.steps, guidance=self.guidance)

    def some(self, run: Run, samples: int) -> int:
        """Trajectories whose calls make up ``samples`` samples; at least one, at most all."""
        return max(1, min(self.trajectories, samples // (len(self.timesteps(run)) * self.halves(run))))

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Put the shard on the tape; the time grid becomes known with the first."""
        run.tape.add(run.journal.path_of(self.label, unit), self.label)
        if unit == self.units(run)[0]:
            run.set_timesteps(self.timesteps(run))

    def timesteps(self, run: Run) -> list[float]:
        """The scheduler's timesteps in sampling order; one that it visits twice (PNDM, Heun) counts once."""
        run.pipeline.scheduler.set_timesteps(self.steps)
        return list(dict.fromkeys(float(t) for t in run.pipeline.scheduler.timesteps))

    def schedule(self, run: Run) -> list[set[int]]:
        """For each trajectory, the sampling steps (0 = noisiest) kept from it."""
        steps = len(self.timesteps(run))
        if self.samples == "all":
            return [set(range(steps)) for _ in range(self.trajectories)]
        count = max(1, self.samples // self.halves(run))
        if self.times == "uniform":
            moments = [i * steps // count for i in range(count)]
        else:
            draw = torch.randn(count, generator=derived(run.seed, self.label, "times"))
            clean = (draw * self.std * steps + self.mean * steps).floor().clamp(0, steps - 1)
            moments = sorted(int(steps - 1 - t) for t in clean.tolist())
        plan: list[set[int]] = [set() for _ in range(self.trajectories)]
        for k, moment in enumerate(moments):
            free = next((j for d in range(self.trajectories) if moment not in plan[j := (k + d) % self.trajectories]),
                        None)
            if free is None:
                raise InputError(
                    f"{self.samples} calibration samples cannot come from {self.trajectories} trajectories",
                    where=f"step {self.label}", why=f"each gives one sample a sampling step ({self.steps} steps)",
                    try_=f"--set {self.label}.trajectories={self.trajectories * 2}",
                )
            plan[free].add(moment)
        return plan

    def halves(self, run: Run) -> int:
        """Samples of one moment of one trajectory: two under classifier-free guidance."""
        return 2 if takes_prompt(run.pipeline) and self.guidance > 1 else 1

    def _prompts(self, run: Run, members: list[int]) -> list[str] | None:
        if not takes_prompt(run.pipeline):
            return None
        if len(run.prompts) < self.needs_prompts():
            raise InputError(
                f"{self.needs_prompts()} prompts are needed, {len(run.prompts)} are there",
                where=f"step {self.label}", why=f"{self.trajectories} trajectories start from them",
                try_=f"give more prompts, or --set {self.label}.prompts={len(run.prompts)} to use each more than once",
            )
        return [run.prompts[i % len(run.prompts)] for i in members]


def calibration(run: Run) -> Calibrate:
    """The recipe's first calibrate step: prompts, noise, steps and guidance of its trajectories."""
    return next(step for step in run.recipe.steps if isinstance(step, Calibrate))


class Keeper:
    """A hook on the denoiser that keeps scheduled calls, by the timestep they are given."""

    def __init__(
        self, model: nn.Module, wanted: list[set[int]], timesteps: list[float], halves: int, first: int = 0
    ) -> None:
        self.model, self.wanted, self.halves, self.first = model, wanted, halves, first
        self.kept: Counter[tuple[int, int]] = Counter()  # (trajectory, moment): schedulers may come to one twice
        self.step_of = {t: i for i, t in enumerate(timesteps)}
        self.rows: list[dict[str, Tensor]] = []
        self.handle: Any = None

    def __enter__(self) -> None:
        self.handle = self.model.register_forward_hook(self._keep, with_kwargs=True)

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        answer = self.answer(out)
        timestep = torch.as_tensor(given["timestep"]).float().reshape(-1)
        if not torch.isfinite(answer).all():
            self.handle.remove()
            where = find_nonfinite(module, (given["sample"], given["timestep"]),
                                   {k: v for k, v in kwargs.items() if k not in ("sample", "timestep")})
            raise NumericsError("the float model answers NaN or Inf", where=where, why="seen while calibrating",
                                try_="load the model in another dtype (bf16 instead of fp16), or check its weights")
        moment = self.step_of[float(timestep[0])]
        batch = given["sample"].shape[0]
        chosen = []
        for j in range(batch):
            member = j % len(self.wanted)
            if moment in self.wanted[member] and self.kept[member, moment] < self.halves:
                self.kept[member, moment] += 1
                chosen.append(j)
        if not chosen:
            return
        index = torch.tensor(chosen, device=answer.device)
        row = {"sample": given["sample"][index], "output": answer[index],
               "timestep": timestep.to(answer.device).expand(batch)[index],
               "trajectory": self.first + index % len(self.wanted), "half": index // len(self.wanted)}
        for key, value in _conditions(given):
            row[key] = value[index] if value.shape[0] == batch else value.expand(batch, *value.shape[1:])[index]
        self.rows.append({k: v.detach().cpu() for k, v in row.items()})

    def answer(self, out: Any) -> Tensor:
        """What is kept as the denoiser's answer to a call."""
        tensor: Tensor = out.sample if hasattr(out, "sample") else out[0]
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All kept calls, in sampling order."""
        return {key: torch.cat([row[key] for row in self.rows]).contiguous() for key in self.rows[0]}


def _conditions(given: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Condition tensors of a call, nested ones by dotted name."""
    found = []
    for key, value in given.items():
        if key in ("sample", "timestep"):
            continue
        if isinstance(value, Tensor):
            found.append((key, value))
        elif isinstance(value, dict):
            found += [(f"{key}.{inner}", t) for inner, t in value.items() if isinstance(t, Tensor)]
    return found
