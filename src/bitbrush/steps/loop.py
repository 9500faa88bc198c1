"""The optimisation loop of a reconstruction or a finetuning: Adam, resumable, on CUDA one graph replay an iteration.

Blocks are small, so on a GPU an iteration is bound by kernel launches; capturing it once as a CUDA graph makes it
several times faster. What changes between iterations (rows of the minibatch, progress, learning rates) lives in tensors
that the graph reads. Data that lie in a file cannot be read inside a graph: with ``capture=False`` nothing is captured.

A `Refresh` changes the data now and then, by the parameters of that moment. A saved state holds what was changed where
that is small, else these parameters, so that a resumed run makes the same data again.

An update whose gradients are not finite is left out and counted. On CUDA the backward of attention does not go through
cuDNN, which answers NaN where a row of scores is far below zero (PyTorch issue 196678); low-bit networks meet that.

A `Probe` measures the parameters now and then. The best ones so far are kept (they are part of the saved state, so a
resumed run ends with the same bytes), and the loop ends with them. A probe that answers NaN or Inf ends the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from bitbrush.engine.store import Store
from bitbrush.steps.learners import Learner

if TYPE_CHECKING:
    from bitbrush.engine.run import Run

WARM = 3
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
REPORT = 25
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Budget:
    """Iterations, iterations between two saved states, the learning rate with its schedule, and Adam's epsilon."""

    iterations: int
    checkpoint: int
    lr: float
    schedule: Schedule
    eps: float = 1e-8

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration; ``linear`` and ``cosine`` fall to 0."""
        done = iteration / max(self.iterations, 1)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "cosine":
            return 0.5 * self.lr * (1 + math.cos(math.pi * done))
        return self.lr


@dataclass(frozen=True)
class Probe:
    """A measurement by which the best parameters are kept: the loss that decides, and the iterations in between."""

    measure: Callable[[], float]
    every: int


@dataclass(frozen=True)
class Refresh:
    """New data every so many iterations.

    Args:
        make: Makes them, in place, for the parameters as they are (relaxed) at an iteration.
        every: Iterations in between.
        at_start: Before the first iteration, too.
        changed: The tensors that ``make`` changes, where they are small enough for the saved state; else none.
    """

    make: Callable[[int], None]
    every: int
    at_start: bool = False
    changed: dict[str, Tensor] = field(default_factory=dict)

    def due(self, iteration: int) -> bool:
        """Whether new data are wanted before an iteration."""
        return iteration % self.every == 0 and (iteration > 0 or self.at_start)


def optimise(
    learner: Learner, loss_at: Callable[[Tensor], Tensor], index: Tensor, budget: Budget, run: Run,
    unit: tuple[str, str], *, probe: Probe | None = None, refresh: Refresh | None = None, capture: bool = True,
) -> dict[str, Any]:
    """Minimise ``loss_at(rows) + penalty`` over the learner's parameters.

    Args:
        learner: Parameters and their relaxed form.
        loss_at: Loss of a minibatch given by its rows ``[batch]``.
        index: Rows of every iteration, ``[iterations, batch]``.
        budget: Iterations and learning rate.
        run: For the device, the progress bar and the state inside a unit.
        unit: (step, unit), the key of that state.
        probe: Measures before the first iteration, every so often, and after the last; the parameters end as the best.
        refresh: Makes new data now and then. What ``probe`` measures must not depend on them.
        capture: On CUDA, capture an iteration as a graph; False where ``loss_at`` reads data from a file.

    Returns:
        Facts: ``updates_left_out``, where there were any; with a probe ``best_at`` (iterations done at the best), and
        ``diverged_at`` where it was not finite.
    """
    if budget.iterations == 0:
        return {}
    loop = _Loop(learner, loss_at, index.to(run.device), budget, capture, refresh)
    begin = loop.load(run.load_carry(*unit))
    run.progress.advance(begin)
    facts: dict[str, Any] = {}
    if probe is not None and begin == 0:
        loop.look(probe, 0)
    for k in range(begin, budget.iterations):
        if refresh is not None and refresh.due(k):
            loop.renew(refresh, k)
        loop.iterate(k)
        done, last = k + 1, k + 1 == budget.iterations
        if done % REPORT == 0 or last:
            run.progress.advance(REPORT if done % REPORT == 0 else done % REPORT)
        if probe is not None and (done % probe.every == 0 or last):
            value = loop.look(probe, done)
            run.progress.advance(0, f"loss {value:.4g}")
            if not math.isfinite(value):
                facts["diverged_at"] = done
                run.progress.say(f"{unit[0]}, {unit[1]}: the loss is not finite at iteration {done}; going back to "
                                 f"iteration {loop.best_at}")
                break
        if done % budget.checkpoint == 0 and not last:
            run.save_carry(*unit, loop.state(), done)
    if int(loop.left_out):
        facts["updates_left_out"] = int(loop.left_out)
    if probe is not None:
        facts["best_at"] = loop.return_to_best()
    return facts


def on_device(*stores: Store) -> bool:
    """Whether the rows of all stores lie on their device: what a CUDA graph needs to read them."""
    return all(store.data is None or store.data.device == store.device for store in stores)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loops: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


class _Loop:
    def __init__(
        self, learner: Learner, loss_at: Callable[[Tensor], Tensor], index: Tensor, budget: Budget,
        capture: bool = True, refresh: Refresh | None = None,
    ) -> None:
        self.learner, self.loss_at, self.index, self.budget, self.refresh = learner, loss_at, index, budget, refresh
        self.names = list(learner.parameters())
        self.tensors = list(learner.parameters().values())
        device = index.device
        self.rows = index[0].clone()
        self.progress = torch.zeros((), device=device)
        self.left_out = torch.zeros((), device=device)
        self.cuda = device.type == "cuda"
        self.captures = self.cuda and capture
        self.adam = self._optimizer(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0
        self.best: list[Tensor] = []
        self.best_loss, self.best_at = math.inf, 0
        self.renewed: list[Tensor] = []
        self.renewed_at = 0

    def _optimizer(self, device: torch.device) -> torch.optim.Adam:
        """One group of parameters for each learning rate; the rates lie in one tensor, of which groups hold views."""
        given = self.learner.rates()
        of = {name: given.get(name, 1.0) for name in self.names}
        factors = sorted(set(of.values()))
        self.factors = torch.tensor(factors, device=device)
        self.rate = self.factors * self.budget.lr
        groups = [
            {"params": [p for n, p in zip(self.names, self.tensors, strict=True) if of[n] == factor], "lr": rate}
            for factor, rate in zip(factors, self.rate.unbind(), strict=True)
        ]
        how: dict[str, Any] = {"capturable": True, "fused": True} if self.cuda else {"foreach": False}
        return torch.optim.Adam(groups, lr=self.rate[0], eps=self.budget.eps, **how)

    def iterate(self, k: int) -> None:
        """Iteration number ``k``."""
        self.rows.copy_(self.index[k])
        self.progress.fill_(k / self.budget.iterations)
        torch.mul(self.factors, self.budget.rate(k), out=self.rate)
        self.done += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.captures and self.done > WARM and self.budget.iterations - k > WARM:
            self._capture()
        else:
            self._warm()

    # ---- the best so far ---------------------------------------------------------------------------------------
    def look(self, probe: Probe, iteration: int) -> float:
        """Measure the parameters as they are; keep them when they are better than any before."""
        with torch.no_grad():
            self.learner.relax(self.progress)
            value = probe.measure()
        if value < self.best_loss or not self.best:  # NaN compares false
            self.best = [p.detach().clone() for p in self.tensors]
            self.best_loss, self.best_at = value, iteration
        return value

    def return_to_best(self) -> int:
        """Put the best parameters back; returns after how many iterations they were found."""
        for p, best in zip(self.tensors, self.best, strict=True):
            p.data.copy_(best)
        return self.best_at

    def renew(self, refresh: Refresh, iteration: int) -> None:
        """New data by the parameters as they are; these are remembered, unless the state holds the data."""
        if not refresh.changed:
            self.renewed, self.renewed_at = [p.detach().clone() for p in self.tensors], iteration
        self.progress.fill_(iteration / self.budget.iterations)
        with torch.no_grad():
            self.learner.relax(self.progress)
            refresh.make(iteration)

    # ---- state -------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Parameters, Adam's moments, and the best so far."""
        out = {f"p/{n}": p.detach().clone() for n, p in zip(self.names, self.tensors, strict=True)}
        for name, p in zip(self.names, self.tensors, strict=True):
            for key, value in self.adam.state[p].items():
                out[f"{key}/{name}"] = value.clone()
        for name, best in zip(self.names, self.best, strict=False):
            out[f"best/{name}"] = best
        for name, renewed in zip(self.names, self.renewed, strict=False):
            out[f"renewed/{name}"] = renewed
        if self.renewed:
            out["renewed"] = torch.tensor(self.renewed_at)
        for name, changed in ({} if self.refresh is None else self.refresh.changed).items():
            out[f"changed/{name}"] = changed.clone()
        out["left_out"] = self.left_out.clone()
        if self.best:
            out["best"] = torch.tensor([self.best_loss, self.best_at], dtype=torch.float64)
        return out

    def load(self, found: tuple[int, dict[str, Tensor]] | None) -> int:
        """Take a saved state up, and make the data that it had; returns the iteration to begin with."""
        if found is None:
            return 0
        iteration, saved = found
        if self.refresh is not None:
            self._load_data(self.refresh, saved)
        for name, p in zip(self.names, self.tensors, strict=True):
            p.data.copy_(saved[f"p/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {
                k: saved[f"{k}/{name}"].to(p.device if self.cuda or k != "step" else "cpu").clone() for k in keys
            }
        self.left_out.copy_(saved["left_out"])
        if "best" in saved:
            self.best = [saved[f"best/{n}"].to(p.device) for n, p in zip(self.names, self.tensors, strict=True)]
            self.best_loss, self.best_at = float(saved["best"][0]), int(saved["best"][1])
        return iteration

    def _load_data(self, refresh: Refresh, saved: dict[str, Tensor]) -> None:
        for name, changed in refresh.changed.items():
            changed.copy_(saved[f"changed/{name}"])
        if "renewed" in saved:
            for name, p in zip(self.names, self.tensors, strict=True):
                p.data.copy_(saved[f"renewed/{name}"])
            self.renew(refresh, int(saved["renewed"]))

    # ---- one iteration -----------------------------------------------------------------------------------------
    def _step(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        penalty = self.learner.relax(self.progress)  # first: it puts the relaxed form into the modules
        with sdpa_kernel(ATTENTION) if self.cuda else nullcontext():
            loss = self.loss_at(self.rows) + penalty
            loss.backward(inputs=self.tensors)  # and no gradients of norms and biases that are not trained
        norm = get_total_norm([g for p in self.tensors if (g := p.grad) is not None], foreach=self.cuda)
        bad = ~norm.isfinite()
        self.left_out += bad
        if self.cuda:
            self.adam.found_inf = bad.float()  # type: ignore[attr-defined]  # the fused kernel then changes nothing
        if self.cuda or not bool(bad):
            self.adam.step()

    def _warm(self) -> None:
        if not self.captures:
            self._step()
            return
        self.learner.release()  # no graph of an iteration before, made on another stream, may be alive
        side = side_stream(self.index.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self.learner.release()
        self.adam.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        graph.replay()
