"""Constants a timestep that correct a quantized denoiser's input and estimate, applied by hooks on the denoiser.

    call:    estimate = scale[i] * network(sample - shift[i], t) + bias[i]          i: the row of timestep t

All three are ``[T, C]``, one number a sampling step and channel; both halves of a guided call get the same. A constant
passes through guidance unchanged, (e_u + k) + g ((e_c + k) - (e_u + k)) = e_u + g (e_c - e_u) + k, so ``bias`` can
carry what the scheduler has to be told (`bitbrush.steps.chain`), and no pipeline or scheduler is changed.

The numbers belong to whole trajectories of one scheduler and one number of steps. A denoiser is told its timestep only,
so the rule is: a trajectory begins at the first timestep of the table (where the call before was not at a noisier one),
visits its rows in order, and is corrected as long as it does. At any other timestep, or one out of turn (another number
of steps, image-to-image), the correction is left out until a trajectory begins anew, and one warning says so. Where the
pipeline is known (`watch`), its scheduler's class is compared too. At the first timestep ``shift`` and ``bias`` are 0
and ``scale`` speaks of the network alone, so the one step that two schedules may share is right for both.

This is the one place where a forward depends on the forward before it; the position and the last timestep are a tensor,
so that a compiled graph takes them as data. A compiled graph cannot warn; of calls on a GPU a later one does, so that
nobody waits (`bitbrush.network.arrivals`). On CUDA each step is one kernel (`bitbrush.kernels.triton_correction`).
"""

from __future__ import annotations

import inspect
import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitbrush.errors import Notice
from bitbrush.kernels import triton_correction
from bitbrush.kernels.triton_correction import OFF, Corrector
from bitbrush.network.arrivals import Arrivals
from bitbrush.network.dtypes import moving_only

NAME = "bitbrush_correction"
TABLES = ("scale", "bias", "shift")


class CorrectionSpec(BaseModel):
    """What a correction belongs to; stands in ``quantization_config``.

    Args:
        method: ``tac``.
        scheduler: Class of the scheduler it was fitted with.
        timesteps: Its timesteps in sampling order (descending), one row of the tables each.
        channels: Of the denoiser's sample and estimate.
        guidance: Guidance scale of the trajectories; None where there is no guidance.
        input_term: ``folded``: the scheduler sees the corrected input too, through ``bias``; ``network``: the network
            alone does; ``none``: only the estimate is corrected.
        why: Why the input term is not folded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    method: Literal["tac"] = "tac"
    scheduler: str
    timesteps: tuple[FiniteFloat, ...] = Field(min_length=1)
    channels: int = Field(ge=1, le=4096)
    guidance: FiniteFloat | None = None
    input_term: Literal["folded", "network", "none"] = "folded"
    why: str = ""

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError("timesteps: expected in sampling order, each once")
        return self

    @classmethod
    def from_json(cls, data: Any) -> CorrectionSpec:
        """Inverse of ``model_dump(mode="json")``. Raises ValueError."""
        return cls.model_validate_json(json.dumps(data))

    def in_words(self) -> str:
        """One line for people."""
        how = {
            "folded": "estimate and input", "network": "estimate, and input of the network only",
            "none": "estimate only",
        }[self.input_term] + (f" ({self.why})" if self.why else "")
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.method}, for {self.scheduler}, {len(self.timesteps)} steps{guidance}: {how}"


class Correction(nn.Module):
    """The tables, and where the trajectory stands.

    Args:
        spec: Its facts. The tables begin as "no correction": scale 1, bias 0, shift 0; float32 ``[T, C]``.
    """

    def __init__(self, spec: CorrectionSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (len(spec.timesteps), spec.channels)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("bias", torch.zeros(shape))
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("timesteps", torch.tensor(spec.timesteps, dtype=torch.float32), persistent=False)
        self.register_buffer("state", torch.empty(2, dtype=torch.float32), persistent=False)
        self.scale: Tensor
        self.bias: Tensor
        self.shift: Tensor
        self.timesteps: Tensor
        self.state: Tensor  # row of the call before (negative: none), its timestep
        self.warned = False
        self._entered = False
        self._arrivals = Arrivals()
        self._owner: weakref.ref[Any] | None = None
        self._hooks: list[RemovableHandle] = []
        self.restart()

    def watch(self, pipeline: Any) -> None:
        """Compare the scheduler's class with this pipeline's from now on. Copies of the model do not."""
        self._owner = weakref.ref(pipeline)

    def restart(self) -> None:
        """Be as before any trajectory."""
        self.state.copy_(torch.tensor([OFF, -torch.inf]))

    def enter(self, sample: Tensor, timestep: Any) -> Tensor:
        """Begin a call: find the row, and answer the sample that the network is to see."""
        now = torch.as_tensor(timestep).to(sample.device).reshape(-1)
        if self.state.device != sample.device:  # offloading may have left it behind
            self.to(sample.device)
        self._entered = True
        fused = _fused(sample, max(len(now), len(self.timesteps)))
        if not torch.compiler.is_compiling() and self.leaves_out():
            self._out_of_turn(now)
        elif fused is not None:
            fused.turn(now, self.timesteps, self.state)
        else:
            self._turn(now.float())
        self.notice()
        if fused is not None:
            return fused.shifted(sample, self.state, self.shift)
        return (sample.float() - self._row("shift", sample)).to(sample.dtype)

    def leave(self, estimate: Tensor) -> Tensor:
        """End a call: the corrected estimate."""
        if not self._entered:
            return estimate
        self._entered = False
        fused = _fused(estimate)
        if fused is not None:
            return fused.corrected(estimate, self.state, self.scale, self.bias)
        scale, bias = self._row("scale", estimate, 1.0), self._row("bias", estimate)
        return (scale * estimate.float() + bias).to(estimate.dtype)

    def _turn(self, now: Tensor) -> None:
        """Whose turn it is at timesteps float32 ``[1]`` or ``[B]``."""
        match = self.timesteps == now[0]
        row, (position, last) = match.int().argmax(), self.state.unbind()
        in_turn = ((row == 0) & (last <= now[0])) | (row == position) | (row == position + 1)
        on = match.any() & (now == now[0]).all() & in_turn
        self.state.copy_(torch.stack([torch.where(on, row, OFF).float(), now[0]]))

    def _out_of_turn(self, now: Tensor) -> None:
        self.state.copy_(torch.stack([torch.full_like(self.state[0], OFF), now[0].float()]))

    def _row(self, name: str, like: Tensor, neutral: float = 0.0) -> Tensor:
        """The row of a table that is in force, to broadcast against ``like [B, C, ..]``."""
        position, table = self.state[:1], getattr(self, name)
        found = table.index_select(0, position.clamp(min=0).long())[0]
        return _wide(torch.where(position < 0, neutral, found), like)

    def leaves_out(self) -> bool:
        """Whether the pipeline's scheduler is another than the one it belongs to."""
        pipeline = self._owner() if self._owner is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        return scheduler is not None and type(scheduler).__name__ != self.spec.scheduler

    def notice(self) -> None:
        """Warn once of a call that was not corrected: this one, or on a GPU an earlier one."""
        if self.warned or torch.compiler.is_compiling():
            return
        if self.state.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        arrived = self._arrivals.latest(self.state)
        if arrived is None or arrived[0][0] >= 0 or torch.isinf(arrived[0][1]):
            return
        self.warned = True
        warnings.warn(
            f"bitbrush leaves the stored correction out (at timestep {float(arrived[0][1]):g}): it belongs to "
            f"whole trajectories of {self.spec.scheduler} in {len(self.spec.timesteps)} steps; sample so, or quantize "
            "with --correct for other settings",
            Notice, stacklevel=2,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay float32: a model cast to half precision keeps its tables."""
        super()._apply(moving_only(fn), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies belong to no pipeline."""
        return {**self.__dict__, "_owner": None, "_entered": False}


def install(model: nn.Module, spec: CorrectionSpec, tables: dict[str, Tensor] | None = None) -> Correction:
    """Hook a correction to a denoiser; one that is there already is replaced.

    Args:
        tables: ``scale``, ``bias``, ``shift``, float32 ``[T, C]``; None: as `Correction` begins.
    """
    remove(model)
    correction = Correction(spec)
    for name, table in (tables or {}).items():
        getattr(correction, name).copy_(table)
    device = next(model.parameters()).device
    if device.type == "meta":  # diffusers is loading: the tables come, what is not stored stays
        for name in TABLES:
            setattr(correction, name, getattr(correction, name).to("meta"))
    else:
        correction = correction.to(device)
    names = list(inspect.signature(model.forward).parameters)
    sample, position = names[0], names.index("timestep")

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        time = kwargs["timestep"] if "timestep" in kwargs else args[position]
        if args:
            return (of(module).enter(args[0], time), *args[1:]), kwargs
        return args, {**kwargs, sample: of(module).enter(kwargs[sample], time)}

    def after(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (of(module).leave(output[0]), *output[1:])
        return replace(output, sample=of(module).leave(output.sample))

    setattr(model, NAME, correction)
    correction._hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after),
    ]
    return correction


def remove(model: nn.Module) -> None:
    """Take a correction off again, if there is one."""
    correction = find(model)
    if correction is not None:
        for hook in correction._hooks:
            hook.remove()
        delattr(model, NAME)


def find(model: nn.Module) -> Correction | None:
    """The correction of a denoiser, or None."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Correction) else None


def of(model: nn.Module) -> Correction:
    """The correction of the model that is being called: a deep copy must find its own."""
    correction: Correction = getattr(model, NAME)
    return correction


def _fused(x: Tensor, most: int = 0) -> Corrector | None:
    """The kernels for tensors like ``x``; None on the CPU, without Triton, and while compiling."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    made = triton_correction.build()
    return made if made is not None and made.fits(x, most) else None


def _wide(row: Tensor, like: Tensor) -> Tensor:
    return row.reshape(1, -1, *[1] * (like.ndim - 2))
