"""finetune: train chosen parameters of the whole denoiser against the float network, on trajectories of the tape.

One step serves six papers. QuEST trains the weights, biases and activation scales of few layers by layer outputs and
the noise estimate. EfficientDM trains low-rank adapters that are merged before quantization, with the weight scales and
the activation tables, by the guided estimate. MPQ-DM adds the relations between pixels, averaged over a window of
steps. TDQ trains small networks that give the activation scales of a timestep. ADP-DM finds the timesteps that share a
scale. VQDM trains everything but the codes: codebooks, scales of rows, biases and normalisation layers.
The student is the sim face of the whole network; the teacher is the float face, whose own trajectories `calibrate` has
recorded, so x_t and the teacher's answers need not be computed again.

The unit never ends worse than it starts: the parameters are measured before, every ``evaluate_every`` iterations and
after, on rows spread over time; the best are hardened, and if even these do not beat the stored start, that is kept.

What is trained differs from what is stored only by the straight-through form; weights that are not trained are decoded
once for the unit (float32: in bf16 the layer would convert them back and forth).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bitbrush.engine.journal import generator as derived
from bitbrush.engine.planning import check_pattern, matches, site_names
from bitbrush.engine.run import Run, find_nonfinite
from bitbrush.engine.step import Step, UnitResult, short
from bitbrush.errors import InputError, NumericsError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import SoftmaxForm, softmax_in_training
from bitbrush.network.layers import QuantLayer
from bitbrush.network.norms import find as find_norms
from bitbrush.network.pipelines import influence
from bitbrush.network.survey import Survey
from bitbrush.numbers.grid import Plan
from bitbrush.steps import teaching
from bitbrush.steps.calibrate import calibration
from bitbrush.steps.channel_groups import ChannelGroupLearner, check_channels
from bitbrush.steps.layer_sets import PRESETS as PRESETS
from bitbrush.steps.layer_sets import leaf, site_of
from bitbrush.steps.learners import Learner, Together, held_tables
from bitbrush.steps.loop import Budget, Probe, Refresh, Schedule, optimise
from bitbrush.steps.losses import LossName, Objective
from bitbrush.steps.reconstruct import half_precision
from bitbrush.steps.replay import Replay
from bitbrush.steps.risk import Rounds
from bitbrush.steps.student import student
from bitbrush.steps.time_groups import Clustering, GroupLearner, grouped
from bitbrush.steps.tuning import apply_tuned, check_weights, moving_weights, together

UNIT = "model"
SEARCHED = ("groups", "channel_groups")
MOVES = {"steps_regrouped", "codebooks_moved"}
"""Facts that say how far something went, besides ``codes_changed``."""
EPSILON = 1e-12
"""Adam's: the losses are means, so gradients are small; the papers' code adds sums, beside which 1e-8 is nothing."""


class Finetune(Step):
    """Train parameters of the whole network.

    Args:
        weights: ``none``, ``full`` (the weights themselves) or ``lora`` (adapters merged before quantization). Layers
            on additive codebooks are left out, and a line says so.
        layers: Which layers: ``time_proj``, ``time_mlp``, ``time``, ``qkv``, ``ff``, ``qkv_ff``, ``attention``,
            ``all``, or a pattern as in a recipe's ``[layers]``. See `PRESETS`.
        frozen: Pattern of layers that are left alone all the same, their activation scales too; ``*:softmax`` and the
            like leave those scales alone, with ``norms`` names of normalisation layers those.
        bias: Train the biases of these layers, at ``lr_weights``.
        norms: Train scale and shift of all normalisation layers but frozen ones.
        codebooks: Train the codebooks of these layers, with the codes fixed (VQDM, `codebook_learner`); a shared set is
            trained once, and all its layers must be among these.
        rounding: ``nearest``, or ``offset``: floor plus the 0/1 decision that the stored codes were rounded with.
        rank, adapter: Of ``lora``; ``shared``: one second factor for all taps of a kernel (EfficientDM), ``tap``: one
            a tap (MPQ-DM).
        base: What adapters are added to: the ``float`` weight, or the ``quantized`` one.
        weight_scale: Train the weight scales of these layers (of rows on additive codebooks), as s0 exp(theta).
        scales: Which static activation scales are trained, as s0 exp(theta) (a choice of ours): ``none``, ``own``
            (inputs of these layers), ``not_time`` (all, attention operands too, but not the time embedding's), ``all``.
        scale_form: ``table``: every row of a table is trained by itself; ``network``: the rows of a timed table come
            from one small network of the timestep (TDQ, `time_networks`), which is folded into the table at the end.
            ``groups``: timesteps of a layer's input are put into groups, a row each (ADP-DM, `time_groups`); the result
            changes the plan. ``channel_groups``: channels of an input choose among few ranges of each timestep
            (`channel_groups`, simulated only). Zero-points follow from the ranges. Tables that a form is not for (one
            row for all times, operands of attention with ``groups``, a scale a tensor) are trained as ever.
        warm_start: Of the networks: iterations that regress the logarithm of the fitted table first.
        groups: How many groups at most, or ranges. Without iterations: those of the clustering, the mean of the ranges.
        cluster: Where a search of groups begins: contiguous ``runs`` of timesteps, or ``kmeans`` of ranges.
        entropy: Of both: weight of the entropy at the end, in units of the loss at the start; it rises from 0.
        straight_through: Of both: gradients pass through rounding to earlier layers (in ADP-DM's code they do not).
        zero_points: Train the zero-points of the same quantizers.
        softmax: ``exact``, or ``float``: in training the softmax of attention is not rounded (fused kernels: less
            memory and time), and its scale is not trained. What is measured and stored rounds it either way.
        lr_weights: Adam's rate for weights, adapters and biases.
        lr_scales, lr_weight_scale: Rates relative to each scale; ``lr_scales`` is the networks' rate, too.
        lr_codebooks: Of codebook entries, which are about 1.
        lr_norms: Of the parameters of normalisation layers.
        lr_zero_points: In codes.
        lr_groups: Of the logits of groups.
        scale_aware: ``rate``: ``lr_weights`` times the layer's mean weight scale (EfficientDM's code, 1/2500);
            ``gradient``: the gradient times that (its equation 8; Adam takes it out again).
        losses: Loss to weight: ``output``, ``guided``, ``layers``, ``relation``, ``features``. See `losses`.
        guidance: For ``guided``; left out, that of the calibrate step.
        importance: Exponent p of a timestep's weight in ``output`` and ``guided``: the p-th power of its influence on
            the final sample (`network.pipelines.influence`), divided by the mean. 0 weighs all alike, as the papers
            do; 2 weighs squared errors as the sampler adds them up.
        relation_pool: Pool the features of ``relation`` to at most so many pixels a side; 0 does not.
        window: Consecutive sampling steps of a group.
        iterations: Adam steps.
        batch: Rows of the denoiser an iteration; groups have window * halves rows, at least one group is taken.
        order: ``shuffled``; ``sequential`` from noisy to clean; for groups of timesteps ``risk``, where each round of
            iterations learns from the step of the largest structural risk, or ``random`` steps a round (`risk`).
        round_length: Iterations of a round.
        risk_penalty: What a round takes from the risk of its step; left out, a share of the spread of the risks.
        schedule: ``constant``, ``linear`` or ``cosine`` (both to 0).
        samples: Calibration samples used; left out, all.
        held_out: Share of the trajectories (rounded down) that is not trained on: what is measured, and so which state
            is kept, then says how the network does on others.
        replay: Iterations between two replays, in which the student itself walks some of the trajectories and the float
            network answers to where it comes (`replay`); 0 trains on the float network's trajectories alone.
        replay_share: Which share of the trajectories.
        evaluate_every: Iterations between two measurements.
        evaluate_rows: About how many rows are measured.
        checkpoint: Iterations between two saved states.
        autocast: On CUDA, train in bf16 autocast (measured losses, parameters and codes stay float32).
    """

    weights: Literal["none", "full", "lora"] = "full"
    layers: str = "all"
    frozen: str = ""
    bias: bool = False
    norms: bool = False
    codebooks: bool = False
    rounding: Literal["nearest", "offset"] = "nearest"
    rank: int = Field(default=32, ge=1)
    adapter: Literal["shared", "tap"] = "shared"
    base: Literal["float", "quantized"] = "float"
    weight_scale: bool = False
    scales: Literal["none", "own", "not_time", "all"] = "own"
    scale_form: Literal["table", "network", "groups", "channel_groups"] = "table"
    warm_start: int = Field(default=500, ge=0)
    groups: int = Field(default=8, ge=1)
    cluster: Clustering = "runs"
    entropy: float = Field(default=1.0, ge=0)
    straight_through: bool = True
    zero_points: bool = False
    softmax: SoftmaxForm = "exact"
    lr_weights: float = Field(default=1e-5, gt=0)
    lr_scales: float = Field(default=1e-3, gt=0)
    lr_weight_scale: float = Field(default=1e-4, gt=0)
    lr_codebooks: float = Field(default=1e-3, gt=0)
    lr_norms: float = Field(default=1e-3, gt=0)
    lr_zero_points: float = Field(default=5e-4, gt=0)
    lr_groups: float = Field(default=0.05, gt=0)
    scale_aware: Literal["none", "rate", "gradient"] = "none"
    losses: dict[LossName, float] = Field(default={"output": 1.0}, min_length=1)
    guidance: float | None = None
    importance: float = Field(default=0.0, ge=0)
    relation_pool: int = Field(default=0, ge=0)
    window: int = Field(default=1, ge=1)
    iterations: int = Field(default=2000, ge=0)
    batch: int = Field(default=16, ge=1)
    order: teaching.Order = "shuffled"
    round_length: int = Field(default=25, ge=1)
    risk_penalty: float | None = Field(default=None, ge=0)
    schedule: Schedule = "linear"
    samples: int | None = Field(default=None, ge=1)
    held_out: float = Field(default=1 / 32, ge=0, lt=1)
    replay: int = Field(default=0, ge=0)
    replay_share: float = Field(default=0.5, gt=0, lt=1)
    evaluate_every: int = Field(default=200, ge=1)
    evaluate_rows: int = Field(default=64, ge=1)
    checkpoint: int = Field(default=500, ge=1)
    autocast: bool = True

    @model_validator(mode="after")
    def _sensible(self) -> Finetune:
        if self.zero_points and self.scales == "none":
            raise ValueError("zero_points needs scales: they are those of the same quantizers")
        if self.scale_form != "table" and (self.zero_points or self.scales == "none"):
            raise ValueError(f"scale_form = {self.scale_form} trains scales (not none), and zero_points stay as fitted")
        if self.order in ("risk", "random") and (self.window > 1 or self.replay):
            raise ValueError(f"order = {self.order} chooses single steps of the tape: window must be 1, and replay 0")
        if self.order == "risk" and self.scale_form not in SEARCHED:
            raise ValueError("order = risk goes by the uncertainty of a search: it needs scale_form = groups")
        if not self.straight_through and self.scale_form not in SEARCHED:
            raise ValueError("straight_through = false is for searches: it needs scale_form = groups or channel_groups")
        if min(self.losses.values()) < 0 or max(self.losses.values()) == 0:
            raise ValueError("weights of losses must not be negative, and one must be positive")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """Trajectories, and a quantized network to start from: the student is all of it, whatever is trained."""
        return ("calibrate", "fit weights", "codebooks", "fit activations")

    @property
    def not_after(self) -> tuple[str, ...]:
        """Packed weights cannot be trained."""
        return ("pack",)

    def check(self, survey: Survey, plan: Plan) -> None:
        """Patterns name sites of this model, and select a layer of the plan."""
        if not self._trains(plan):
            return
        names = [*site_names(survey), *(survey.other if self.norms else ())]
        if self.layers not in PRESETS:
            check_pattern(self.layers, [site.name for site in survey.layers()], f"step {self.label}: layers",
                          f"; presets are {', '.join(PRESETS)}")
        if self.frozen:
            check_pattern(self.frozen, names, f"step {self.label}: frozen")
        found = self._selected(name for name in plan.layers if not wrap.is_operand(name))
        check_weights(self, plan, found)
        if self.scale_form == "channel_groups":
            check_channels(plan, f"step {self.label}: scale_form")
        static = [a for s in plan.layers.values() if (a := s.activation) is not None and a.mode == "static"]
        if self.scale_form != "table" and static and not any(a.timed for a in static):
            what = "networks of the time" if self.scale_form == "network" else "groups of timesteps"
            raise InputError(f"{what} need scales a timestep", where=f"step {self.label}: scale_form",
                             why="every static scale of this plan holds for all timesteps",
                             try_='give the layers activation = { timed = true }, or scale_form = "table"')

    def units(self, run: Run) -> list[str]:
        """The whole model, where there is something to train."""
        return [UNIT] if self._trains(run.plan) else []

    def run_unit(self, run: Run, unit: str, generator: torch.Generator) -> UnitResult:
        """Train."""
        run.forget_all()
        chosen = self.chosen(run)
        lessons = teaching.load(run, self.window, self.samples, self.held_out)
        objective = Objective(run.model, lessons, self.losses, list(chosen), self._guidance(run), self.relation_pool,
                              self._importance(run, lessons))
        count = max(1, self.batch // lessons.width)
        index = lessons.schedule(self.iterations, count, self.order, generator)
        learner = self.learner(run, chosen, generator)
        moving, still = moving_weights(self, chosen), self.still(run, chosen)
        with student(run, moving), softmax_in_training(run.model, self.softmax), held_tables(still):
            notes = self._train(run, unit, objective, learner, index)
        notes |= {"groups": len(lessons), "rows": len(lessons.timesteps)}
        result = UnitResult(learner.result(), notes=notes)
        for part in _searches(learner):
            if isinstance(part, GroupLearner):
                specs, tables = grouped(run.plan, part)
                result.plan |= specs
                result.tensors |= tables
        return result

    def apply(self, run: Run, unit: str, result: UnitResult) -> None:
        """Store the outcome; no output that was remembered holds any more."""
        apply_tuned(run, result.tensors)
        run.forget_all()

    # ---- what is trained ---------------------------------------------------------------------------------------
    def chosen(self, run: Run) -> dict[str, QuantLayer]:
        """The layers that `layers` and `frozen` select, in execution order.

        Raises:
            InputError: None at all.
        """
        layers = run.layers()
        return {name: layers[name] for name in self._selected(layers)}

    def _selected(self, names: Iterable[str]) -> list[str]:
        given = list(names)
        named = PRESETS.get(self.layers) or (lambda name: matches(self.layers, name))
        found = [name for name in given if named(name) and not self._is_frozen(name)]
        if not found:
            raise InputError(
                f"layers = {self.layers!r} selects no quantized layer of this model", where=f"step {self.label}",
                why=f"presets are {', '.join(PRESETS)}; {len(given)} layers are quantized, frozen = {self.frozen!r}",
                try_="bitbrush inspect MODEL lists the layers",
            )
        return found

    def quantizers(self, run: Run, chosen: dict[str, QuantLayer]) -> dict[str, ActivationQuantizer]:
        """The static activation quantizers that `scales` selects."""
        static = {
            name: m for name, m in run.model.named_modules()
            if isinstance(m, ActivationQuantizer) and m.spec.mode == "static"
            and not (self.softmax == "float" and leaf(name) == "softmax")
        }
        own = {f"{name}.input" for name in chosen}
        if self.scales == "own":
            return {name: q for name, q in static.items() if name in own}
        if self.scales == "none":
            return {}
        free = {
            name: q for name, q in static.items()
            if not (self._is_frozen(site_of(name)) or self._is_frozen(name.rpartition(".")[0]))
        }
        if self.scales == "all":
            return free
        return {name: q for name, q in free.items() if not PRESETS["time"](site_of(name))}

    def still(self, run: Run, chosen: dict[str, QuantLayer]) -> list[ActivationQuantizer]:
        """The static quantizers that are not trained."""
        moving = {id(q) for q in self.quantizers(run, chosen).values()}
        return [m for m in run.model.modules()
                if isinstance(m, ActivationQuantizer) and m.spec.mode == "static" and id(m) not in moving]

    def learner(self, run: Run, chosen: dict[str, QuantLayer], generator: torch.Generator) -> Together:
        """Everything that is trained, as one learner; learning rates are absolute (the budget's is 1)."""
        return together(self, run, chosen, generator)

    def norm_layers(self, run: Run) -> dict[str, nn.Module]:
        """The normalisation layers that `norms` and `frozen` select."""
        return {n: m for n, m in find_norms(run.model).items() if not self._is_frozen(n)} if self.norms else {}

    def _trains(self, plan: Plan) -> bool:
        anything = (self.weights != "none" or self.bias or self.weight_scale or self.scales != "none"
                    or self.codebooks or self.norms)
        return bool((self.iterations or self.scale_form in SEARCHED) and anything and plan.layers)

    def _is_frozen(self, name: str) -> bool:
        return bool(self.frozen) and matches(self.frozen, name)

    def _guidance(self, run: Run) -> float:
        return calibration(run).guidance if self.guidance is None else self.guidance

    def _importance(self, run: Run, lessons: teaching.Lessons) -> Tensor | None:
        """Weight of each row, mean 1."""
        if not self.importance:
            return None
        of = influence(run.pipeline, calibration(run).steps)
        found = torch.tensor([of[t] for t in lessons.timesteps.tolist()]).pow(self.importance)
        return (found / found.mean()).to(run.device)

    # ---- training ----------------------------------------------------------------------------------------------
    def _train(
        self, run: Run, unit: str, objective: Objective, learner: Together, index: Tensor
    ) -> dict[str, Any]:
        size, index = index.shape[1], index.to(run.device)  # there, because rounds are written into it
        refresh, unchanged = self._refresh(run, objective.lessons, index, learner)
        probe = objective.lessons.probe(self.evaluate_rows, unchanged)

        def loss_at(groups: Tensor) -> Tensor:
            return objective.total(objective.parts(groups, half_precision(run.device, self.autocast)))

        def measured() -> float:
            return objective.measure(probe, size)["total"]

        start = objective.measure(probe, size)
        if not math.isfinite(start["total"]):
            raise self._not_finite(run, objective, start)
        for part in _searches(learner):
            part.unit = start["total"]
        budget = Budget(self.iterations, self.checkpoint, 1.0, self.schedule, EPSILON)
        run.progress.start(f"{self.label}: {unit}", self.iterations)
        try:
            facts = optimise(learner, loss_at, index, budget, run, (self.label, unit),
                             probe=Probe(measured, self.evaluate_every), refresh=refresh,
                             capture=objective.lessons.resident)
        finally:
            run.progress.finish()
        facts |= learner.harden()
        end = objective.measure(probe, size)
        kept = "trained" if end["total"] < start["total"] else "start"  # NaN compares false: the start is kept
        if kept == "start":
            learner.restore()
            end, facts = start, facts | {"codes_changed": 0.0} | dict.fromkeys(MOVES & set(facts), 0.0)
        learner.release()
        return self._notes(run, learner, start, end) | {"kept": kept} | facts

    def _refresh(
        self, run: Run, lessons: teaching.Lessons, index: Tensor, learner: Together
    ) -> tuple[Refresh | None, Tensor | None]:
        """What changes the data while it trains, and the groups whose rows never change (None: all)."""
        if 0 < self.replay < self.iterations:
            replay = Replay(run, lessons, self.replay_share, self.label, self.autocast)
            return Refresh(replay.walk, self.replay), replay.kept()
        if self.order not in ("risk", "random") or not self.iterations:
            return None, None
        search = _searches(learner)[0] if self.order == "risk" else None
        rounds = Rounds(index, lessons.moments.where(~lessons.held, -1), self.round_length,
                        None if search is None else lambda: search.uncertainty().flip(0),
                        derived(run.seed, self.label, "rounds"), self.risk_penalty)
        return Refresh(rounds.begin, self.round_length, at_start=True, changed={"index": index}), None

    def _notes(
        self, run: Run, learner: Learner, start: dict[str, float], end: dict[str, float]
    ) -> dict[str, Any]:
        trained = sum(p.numel() for p in learner.parameters().values())
        whole = sum(site.parameters for site in run.survey.layers()) + sum(run.survey.other.values())
        return {
            "loss_start": short(start["total"]), "loss_end": short(end["total"]),
            "losses": {n: [short(start[n]), short(end[n])] for n in start if n != "total"},
            "trained": trained, "trained_share": short(trained / whole),
        }

    def _not_finite(self, run: Run, objective: Objective, start: dict[str, float]) -> NumericsError:
        """Names the losses that are not finite, and the first module that answers NaN or Inf."""
        lessons = objective.lessons
        args, kwargs = lessons.inputs(lessons.rows(lessons.probe(1)))
        bad = ", ".join(name for name, value in start.items() if name != "total" and not math.isfinite(value))
        return NumericsError(
            f"the loss {bad or 'total'} is NaN or Inf before any training",
            where=f"step {self.label}: {find_nonfinite(run.model, args, kwargs)}",
            why="the quantized network or its targets are not finite", try_="check the ranges found by the fit steps",
        )


def _searches(learner: Together) -> list[GroupLearner | ChannelGroupLearner]:
    return [part for part in learner.learners if isinstance(part, GroupLearner | ChannelGroupLearner)]
