"""Progressive calibration (PCR, Tang et al. 2024, stage 2): each call of the sampler fitted behind the quantized ones.

The trajectories are those of the calibrate step, its prompts and its noise, but sampled by the quantized network. At a
call, a first pass over all of them (weights quantized, activations not) shows every quantizer what it is given there;
the row of that timestep is fitted, and the call is made again with activations quantized. That second answer goes to
the scheduler, whatever it is: its history and its random numbers are never copied. So a call costs two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbrush.network import wrap
from bitbrush.network.pipelines import answered
from bitbrush.steps.calibrate import calibration
from bitbrush.steps.fit import quantizers
from bitbrush.steps.student import student
from bitbrush.steps.watch import Watcher

if TYPE_CHECKING:
    from bitbrush.engine.run import Run
    from bitbrush.steps.fit import Fit


def walk(
    fit: Fit, run: Run, generator: torch.Generator, wanted: set[int]
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Sample with the quantized network and fit the ``wanted`` rows of all timed tables on the way, in place.

    A timestep that the scheduler visits more than once is fitted at the first visit. The last call counts, too.

    Args:
        fit: Method, values and number of samples.
        run: Its model is changed: the tables get their rows.
        generator: For the values that are kept.
        wanted: Rows of the time grid; the others must hold good tables already.

    Returns:
        Extremes a timestep for each quantizer, and the number of trajectories.
    """
    source = calibration(run)
    timed = {name: q for name, q in quantizers(run, "static").items() if q.spec.timed}
    grid, left = list(run.plan.timesteps), set(wanted)
    history: dict[str, dict[str, list[float]]] = {}
    count = source.some(run, fit.samples)

    def answer(timestep: float, call: Callable[[], Tensor]) -> Tensor:
        row = min(range(len(grid)), key=lambda i: abs(grid[i] - timestep))
        if row in left:
            left.remove(row)
            watchers = _watched(fit, run, generator, timestep, call)
            for name, watcher in watchers.items():
                _extend(history.setdefault(name, {"timesteps": [], "low": [], "high": []}), watcher.history())
            grids = {name: q.spec.grids()[row % len(q.spec.grids())] for name, q in timed.items()}
            found = fit.rows({name: watchers[name].values_by_segment()[0] for name in timed}, grids)
            for name, q in timed.items():
                scale, zero = q.scale.clone(), q.zero_point.clone()
                scale[row], zero[row] = found[name][0], found[name][1].to(torch.uint8)
                q.set_scale(scale, zero)
            run.progress.advance(1)
        return call()

    run.progress.start("activation ranges, step by step", len(wanted))
    try:
        with student(run, {}), answered(run.model, answer, source.rows_together(run)):
            source.sample(run, list(range(count)))
    finally:
        run.progress.finish()
    return {name: _ascending(found) for name, found in history.items()}, count


def _watched(
    fit: Fit, run: Run, generator: torch.Generator, timestep: float, call: Callable[[], Tensor]
) -> dict[str, Watcher]:
    """What every quantizer is given in a call whose activations are not quantized."""
    watchers = {n: fit.watcher(q, generator) for n, q in quantizers(run).items()}
    for watcher in watchers.values():
        watcher.time = timestep
    try:
        with wrap.float_activations(run.model):
            call()
    finally:
        for watcher in watchers.values():
            watcher.handle.remove()
    return watchers


def _extend(known: dict[str, list[float]], found: dict[str, list[float]]) -> None:
    for key, values in found.items():
        known[key] += values


def _ascending(history: dict[str, list[float]]) -> dict[str, list[float]]:
    order = sorted(range(len(history["timesteps"])), key=lambda i: history["timesteps"][i])
    return {key: [values[i] for i in order] for key, values in history.items()}
