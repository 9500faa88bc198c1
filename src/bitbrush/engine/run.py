"""One run of a recipe: everything mutable is here, and the loop below is also the resume code.

    for step in recipe:
        for unit in step.units(run):
            result = journal.find(step, unit) or step.run_unit(run, unit, generator(seed, step, unit))
            commit the result if it is new
            step.apply(run, unit, result)

A unit's randomness comes from a generator derived from (seed, step, unit), so there is no random state to save. A unit
changes nothing but through its result; the result is durable before it is applied. So a run that is killed anywhere and
resumed makes the same bytes as one that was not (on the CPU; on a GPU within the noise of its kernels).

Long units may keep their inner state with `Run.save_carry` every so often and take it up again with `Run.load_carry`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.engine.cache import Cache
from bitbrush.engine.journal import Journal, generator
from bitbrush.engine.memo import Memo
from bitbrush.engine.planning import make_plan
from bitbrush.engine.progress import Progress
from bitbrush.engine.recipe import Recipe
from bitbrush.engine.step import Step
from bitbrush.engine.tape import Tape
from bitbrush.errors import InterruptedRun, NumericsError
from bitbrush.network import wrap
from bitbrush.network.survey import Survey, example_inputs, survey
from bitbrush.numbers.grid import LayerSpec, Plan


@dataclass
class Run:
    """A recipe being applied to a denoiser.

    Args:
        recipe: The checked recipe.
        model: The denoiser; it is changed in place.
        pipeline: The pipeline it belongs to, or None for a bare model.
        journal: The run directory, open and locked.
        seed: Seed of everything random.
        prompts: Calibration prompts (empty for unconditional pipelines).
        progress: Where to say how far it is.
        tokens: Length of the text condition.
        memory: Bytes that recordings may take.
        cache: Results of other runs that began alike.
    """

    recipe: Recipe
    model: nn.Module
    pipeline: Any
    journal: Journal
    seed: int
    prompts: list[str]
    progress: Progress
    tokens: int = 77
    memory: int = 2 << 30
    cache: Cache | None = None
    plan: Plan = field(default_factory=Plan)
    kept_float: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    done: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.survey: Survey = survey(self.model, tokens=self.tokens)
        planned = make_plan(self.survey, self.recipe)
        self.plan, self.kept_float = planned.plan, planned.kept_float
        scratch = self.journal.folder / "scratch"
        self.journal.disk.make(scratch)
        self.tape = Tape(scratch, self.device, self.memory, next(self.model.parameters()).dtype)
        self.memos: dict[str, Memo] = {}
        self.clock = self._wrap_and_check()

    # ---- the loop ----------------------------------------------------------------------------------------------
    def execute(self) -> None:
        """Run every step; units already in the journal are restored instead of done."""
        for step in self.recipe.steps:
            units = step.units(self)
            self.progress.start(step.label, len(units))
            try:
                for unit in units:
                    self._one(step, unit)
                    self.progress.advance(1, unit)
            except KeyboardInterrupt as stop:
                raise InterruptedRun(
                    "interrupted; everything up to the last finished unit is saved", where=f"step {step.label}",
                    why="Ctrl-C or SIGTERM", try_=f"bitbrush resume {self.journal.output}",
                ) from stop
            finally:
                self.progress.finish()

    def _one(self, step: Step, unit: str) -> None:
        result = self.journal.find(step.label, unit)
        if result is None and self.cache is not None:
            result = self.cache.find(step.label, unit)
            if result is not None:
                self.journal.commit(step.label, unit, result, 0.0)
        if result is None:
            start = time.perf_counter()
            with self._peak(step.label):
                result = step.run_unit(self, unit, generator(self.seed, step.label, unit))
            seconds = time.perf_counter() - start
            cost = self.costs.setdefault(step.label, {"seconds": 0.0})
            cost["seconds"] = round(cost["seconds"] + seconds, 3)
            self.journal.commit(step.label, unit, result, seconds)
            if self.cache is not None:
                self.cache.keep(step.label, unit, result)
        if result.plan:
            self.change_plan(result.plan)
        step.apply(self, unit, result)
        self.done.append({"step": step.label, "unit": unit, **result.notes})

    @contextmanager
    def _peak(self, label: str) -> Iterator[None]:
        """Note the most GPU memory that a step needed at once. Costs are facts of this machine, not of the result."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        peak = torch.cuda.max_memory_allocated(self.device)
        cost = self.costs.setdefault(label, {"seconds": 0.0})
        cost["peak_memory"] = max(cost.get("peak_memory", 0), peak)

    # ---- the model ---------------------------------------------------------------------------------------------
    def layers(self) -> dict[str, wrap.QuantLayer]:
        """Quantized layers by name, in execution order."""
        found = wrap.layers(self.model)
        return {name: found[name] for name in self.plan.layers if name in found}

    def change_plan(self, changes: dict[str, LayerSpec]) -> None:
        """Replace specs: the layers named are wrapped anew, without codes or tables; all others keep theirs.

        What such a layer is to hold comes with the same result, or is fitted afterwards.
        """
        self.plan = self.plan.with_layers(changes)
        wrap.rewrap(self.model, self.plan, changes, self.clock)

    def set_timesteps(self, timesteps: list[float]) -> None:
        """Give timed tables their time grid (ascending)."""
        if any(s.activation is not None and s.activation.timed for s in self.plan.layers.values()):
            self.plan = self.plan.model_copy(update={"timesteps": tuple(sorted(timesteps))})
            self.clock = wrap.wrap(self.model, self.plan)

    def memo(self, name: str) -> Memo:
        """The memo of one face of the network; it lives as long as the run."""
        return self.memos.setdefault(name, Memo(self.memory))

    def forget(self, name: str) -> None:
        """Drop a memo whose face of the network has changed."""
        self.memos.pop(name, None)

    def forget_all(self) -> None:
        """Drop every memo: the whole network answers otherwise now, or the memory is wanted."""
        self.memos.clear()

    def save_carry(self, step: str, unit: str, tensors: dict[str, Tensor], iteration: int) -> None:
        """Make the state inside a long unit durable."""
        self.journal.save_carry(step, unit, tensors, iteration)

    def load_carry(self, step: str, unit: str) -> tuple[int, dict[str, Tensor]] | None:
        """The state to go on from: (iteration, tensors), or None."""
        return self.journal.load_carry(step, unit)

    def _wrap_and_check(self) -> Any:
        args, kwargs = example_inputs(
            self.model, batch=1, tokens=self.tokens, device=self.device, generator=generator(self.seed, "wrap", ""),
            dtype=next(self.model.parameters()).dtype,
        )
        with torch.no_grad():
            before = self.model(*args, **kwargs).sample
            clock = wrap.wrap(self.model, self.plan)
            after = self.model(*args, **kwargs).sample
        if not torch.isfinite(before).all():
            where = find_nonfinite(self.model, args, kwargs)
            raise NumericsError("the model answers NaN or Inf", where=where, why="before any quantization",
                                try_="check the weights, or load the model in another dtype")
        if not torch.equal(before, after):
            raise NumericsError("wrapping changed the model's output", why="float face differs from the original",
                                try_="report this with the model's config")
        return clock


def find_nonfinite(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Name of the first module (in execution order, inner ones first) whose output is not finite, with the timestep."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_m: nn.Module, _a: Any, out: Any) -> None:
            tensor = out if isinstance(out, Tensor) else None
            if tensor is not None and not found and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
    when = f", timestep {float(torch.as_tensor(timestep).flatten()[0]):g}" if timestep is not None else ""
    return (found[0] if found else "output") + when
