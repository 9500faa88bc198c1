"""Lessons from the student's own walk: where its errors lead it, the float network says what it should have answered.

Trajectories on the tape are the float network's, and a student trained on these alone has never seen the x_t that its
own earlier answers lead to; at two bits that is where sampling fails. So a share of the trajectories is walked again
now and then, by the student as it is: its answers go to the scheduler, the float network's answers to the same inputs
become the targets, and both replace the rows that were there, in place. (The imitation learning literature calls this
dataset aggregation: Ross et al. 2011, arXiv:1011.0686. None of the quantization papers has it.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitbrush.network import wrap
from bitbrush.network.pipelines import answered
from bitbrush.steps.calibrate import Keeper, calibration
from bitbrush.steps.reconstruct import half_precision
from bitbrush.steps.teaching import Lessons

if TYPE_CHECKING:
    from bitbrush.engine.run import Run


class Replay:
    """Walks the last trajectories of the lessons again.

    Args:
        run: Model, pipeline, tape; its first calibrate step gives prompts, steps and guidance.
        lessons: Rows to replace: of the moments that the tape has.
        share: Of the trajectories of that step, those that are replaced; at least one.
        label: Names the noise.
        autocast: Walk in bf16 autocast on CUDA.
    """

    def __init__(self, run: Run, lessons: Lessons, share: float, label: str, autocast: bool) -> None:
        self.run, self.lessons, self.label, self.autocast = run, lessons, label, autocast
        self.source = calibration(run)
        found = enumerate(lessons.trajectories)
        own = [(row, number) for row, (source, number) in found
               if source == self.source.label and row >= lessons.held_out]
        self.row_of = {number: row for row, number in own[len(own) - max(1, int(len(own) * share)):]}

    def kept(self) -> Tensor:
        """Which groups are never replaced, bool ``[G]`` on the CPU: what is measured must not change meanwhile."""
        return ~self.lessons.groups_of(list(self.row_of.values()))

    def walk(self, iteration: int) -> None:
        """Sample with the network as it is, from noise that belongs to the iteration, and replace the rows."""
        members, times = list(self.row_of), self.source.timesteps(self.run)
        keeper = _Judged(self.run.model, [set(range(len(times)))] * len(members), times, self.source.halves(self.run))
        with half_precision(self.run.device, self.autocast), keeper, \
                answered(self.run.model, keeper.judge, self.run.tape.batch):
            self.source.sample(self.run, members, noise=f"{self.label} {iteration}")
        found = keeper.tensors()
        moment = torch.tensor([keeper.step_of[t] for t in found["timestep"].tolist()])
        row = torch.tensor(list(self.row_of.values()))[found["trajectory"]]
        index = self.lessons.table[row, moment, found["half"]]
        there = index >= 0
        self.lessons.sample.put(index[there], found["sample"][there])
        self.lessons.output.put(index[there], found["output"][there])


class _Judged(Keeper):
    """Keeps what the student is given and what the float network answers to it."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.judgement: Tensor | None = None

    def judge(self, _timestep: float, call: Callable[[], Tensor]) -> Tensor:
        """The student's answer, for the scheduler; the float network's is kept."""
        with wrap.show(self.model, "float"):
            self.judgement = call()
        return call()

    def answer(self, out: Any) -> Tensor:
        """What the float network answered to the call."""
        return super().answer(out) if self.judgement is None else self.judgement
