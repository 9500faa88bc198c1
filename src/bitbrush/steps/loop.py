"""The optimisation loop of a reconstruction: Adam, resumable, and on CUDA one graph replay an iteration.

Blocks are small, so on a GPU an iteration is bound by kernel launches; capturing it once as a CUDA graph makes it
several times faster. What changes between iterations (rows of the minibatch, progress, learning rate) lives in tensors
that the graph reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bitbrush.steps.learners import Learner

if TYPE_CHECKING:
    from bitbrush.engine.run import Run

WARM = 3
REPORT = 25


@dataclass(frozen=True)
class Budget:
    """Iterations, iterations between saved states, and the learning rate with its schedule."""

    iterations: int
    checkpoint: int
    lr: float
    schedule: Literal["constant", "cosine"]

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration."""
        if self.schedule == "constant":
            return self.lr
        return 0.5 * self.lr * (1 + math.cos(math.pi * iteration / max(self.iterations, 1)))


def optimise(
    learner: Learner, loss_at: Callable[[Tensor], Tensor], index: Tensor, budget: Budget, run: Run,
    unit: tuple[str, str],
) -> None:
    """Minimise ``loss_at(rows) + penalty`` over the learner's parameters.

    Args:
        learner: Parameters and their relaxed form.
        loss_at: Loss of a minibatch given by its rows ``[batch]``.
        index: Rows of every iteration, ``[iterations, batch]``.
        budget: Iterations and learning rate.
        run: For the device, the progress bar and the state inside a unit.
        unit: (step, unit), the key of that state.
    """
    if budget.iterations == 0:
        return
    loop = _Loop(learner, loss_at, index.to(run.device), budget)
    begin = loop.load(run.load_carry(*unit))
    run.progress.advance(begin)
    for k in range(begin, budget.iterations):
        loop.iterate(k)
        if (k + 1) % REPORT == 0 or k + 1 == budget.iterations:
            run.progress.advance(REPORT if (k + 1) % REPORT == 0 else (k + 1) % REPORT)
        if (k + 1) % budget.checkpoint == 0 and k + 1 < budget.iterations:
            run.save_carry(*unit, loop.state(), k + 1)


class _Loop:
    def __init__(
        self, learner: Learner, loss_at: Callable[[Tensor], Tensor], index: Tensor, budget: Budget
    ) -> None:
        self.learner, self.loss_at, self.index, self.budget = learner, loss_at, index, budget
        self.names = list(learner.parameters())
        self.tensors = list(learner.parameters().values())
        device = index.device
        self.rows = index[0].clone()
        self.progress = torch.zeros((), device=device)
        self.rate = torch.tensor(budget.lr, device=device)
        self.cuda = device.type == "cuda"
        self.adam = torch.optim.Adam(self.tensors, lr=self.rate, capturable=self.cuda, foreach=self.cuda)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def iterate(self, k: int) -> None:
        """Iteration number ``k``."""
        self.rows.copy_(self.index[k])
        self.progress.fill_(k / self.budget.iterations)
        self.rate.fill_(self.budget.rate(k))
        self.done += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.cuda and self.done > WARM and self.budget.iterations - k > WARM:
            self._capture()
        else:
            self._warm()

    def state(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments."""
        out = {f"p/{n}": p.detach().clone() for n, p in zip(self.names, self.tensors, strict=True)}
        for name, p in zip(self.names, self.tensors, strict=True):
            for key, value in self.adam.state[p].items():
                out[f"{key}/{name}"] = value.clone()
        return out

    def load(self, found: tuple[int, dict[str, Tensor]] | None) -> int:
        """Take a saved state up; returns the iteration to begin with."""
        if found is None:
            return 0
        iteration, saved = found
        for name, p in zip(self.names, self.tensors, strict=True):
            p.data.copy_(saved[f"p/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {
                k: saved[f"{k}/{name}"].to(p.device if self.cuda or k != "step" else "cpu").clone() for k in keys
            }
        return iteration

    def _step(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        penalty = self.learner.relax(self.progress)  # first: it puts the relaxed form into the modules
        loss = self.loss_at(self.rows) + penalty
        loss.backward()
        self.adam.step()

    def _warm(self) -> None:
        if not self.cuda:
            self._step()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self.adam.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        graph.replay()
