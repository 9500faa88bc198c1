"""Walks of a packed network's chain beside recorded trajectories of the float one: what corrections are fitted with."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitbrush.engine.run import Run
from bitbrush.engine.tape import Tape
from bitbrush.errors import InputError
from bitbrush.network.pipelines import takes_prompt
from bitbrush.steps import chain

if TYPE_CHECKING:
    from bitbrush.steps.correct import Trajectories


class Chains:
    """Walks beside recorded trajectories.

    Args:
        run: With the packed network and the scheduler.
        source: What recorded them.
        limit: How many of them; None: all.
    """

    def __init__(self, run: Run, source: Trajectories, limit: int | None) -> None:
        sampler = source.sampler(run)
        self.recorded, self.scheduler, self.steps = Recorded(run, source, limit), run.pipeline.scheduler, sampler.steps
        self.options, self.guidance = _step_options(run.pipeline), sampler.guidance
        self.factors, self.why = chain.folding(self.scheduler, self.steps)
        self.progress = run.progress

    def halves(self) -> tuple[Chains, Chains]:
        """Beside the first half of the trajectories, and beside the others."""
        count = self.recorded.count // 2
        first, others = copy.copy(self), copy.copy(self)
        first.recorded, others.recorded = self.recorded.part(slice(count)), self.recorded.part(slice(count, None))
        return first, others

    def walk(self, rule: chain.Rule | None = None, given: chain.Walk | None = None) -> chain.Walk:
        """Fitting, with given tables, or without a correction; the innermost bar moves with each step."""
        return chain.walk(self.recorded.moments, self._network, self.scheduler, self.steps, rule=rule,
                          given=given, options=self.options, guidance=self.guidance)

    def _network(self, step: int, x: Tensor) -> Tensor:
        answers = self.recorded.network(step, x)
        self.progress.advance(1)
        return answers

    def fits(self, rule: chain.Rule) -> int:
        """How many walks `fitted` takes."""
        return 2 if rule.shifts_input and self.factors is None else 1

    def fitted(self, rule: chain.Rule) -> tuple[chain.Walk, str]:
        """A walk that fits, and why its input term is the network's alone.

        Where the scheduler cannot be told of the input term, the fit is made with and without that term, and the one
        with the smaller error at the last input is kept.
        """
        found = self.walk(rule)
        if self.fits(rule) == 1:
            return found, ""
        without = self.walk(replace(rule, input_term=False))  # half of the input term: the network alone sees it
        if without.error[-1] <= found.error[-1]:
            return without, f"{self.why}; without its part for the scheduler the input term does not help"
        return found, self.why


class Recorded:
    """The recorded trajectories as `chain.walk` asks for them."""

    def __init__(self, run: Run, source: Trajectories, limit: int | None) -> None:
        sampler = source.sampler(run)
        times = chain.timesteps_of(run.pipeline.scheduler, sampler.steps)
        self.run = run
        self.tape = Tape(run.tape.scratch, run.device, run.tape.budget, run.tape.dtype)
        for unit in source.units(run):
            self.tape.add(run.journal.path_of(source.label, unit), source.label)
        table = self.tape.table()
        if table.shape[1] != len(times) or bool((table < 0).any()):
            raise InputError("the recorded trajectories are not whole", where="step correct",
                             why=f"expected {len(times)} timesteps in each, found {table.shape[1]}",
                             try_="use a scheduler that visits each timestep once, such as DDIMScheduler")
        self.table = table[:limit]

    @property
    def count(self) -> int:
        """How many trajectories."""
        return len(self.table)

    def part(self, rows: slice) -> Recorded:
        """Some of them."""
        some = copy.copy(self)
        some.table = self.table[rows]
        return some

    def moments(self, step: int) -> tuple[Tensor, Tensor]:
        """(input, estimate) of the float network."""
        halves = [self._read(step, half) for half in range(self.table.shape[2])]
        sample = torch.cat([batch["sample"] for batch in halves[0]])
        estimates = torch.cat([batch["output"] for half in halves for batch in half])
        found = sample.to(self.run.device).float(), estimates.to(self.run.device).float()
        if found[0].shape[1:] != found[1].shape[1:]:
            raise InputError("the estimate has another shape than the sample", where="step correct",
                             why="the network also predicts a variance", try_="leave the correction out")
        return found

    def network(self, step: int, x: Tensor) -> Tensor:
        """The packed network's estimate for other inputs, under the recorded conditions."""
        parts = []
        with torch.no_grad():
            for half in range(self.table.shape[2]):
                start = 0
                for batch in self._read(step, half):
                    stop = start + len(batch["timestep"])
                    args, kwargs = self.tape.inputs({**batch, "sample": x[start:stop]})
                    parts.append(self.run.model(*args, **kwargs).sample.float())
                    start = stop
        return torch.cat(parts)

    def _read(self, step: int, half: int) -> list[dict[str, Tensor]]:
        return list(self.tape.select(self.table[:, step, half].tolist(), size=self.tape.batch))


def _step_options(pipeline: Any) -> dict[str, Any]:
    """What the pipeline's call passes on to the scheduler's step, as `pipelines.sample_latents` asks for it."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    wanted = {"eta": 0.0, "use_clipped_model_output": True} if not takes_prompt(pipeline) else {}
    return {name: value for name, value in wanted.items() if name in accepted}
