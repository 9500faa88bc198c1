"""Activation scales from the timestep: one small network a quantizer, folded into its table (TDQ, So et al. 2023).

    emb(t) = [cos(t f_j), sin(t f_j)],  f_j = 10000 ** (-j / (d/2))                  d = `CODE`
    h      = ReLU(W3 ReLU(W2 ReLU(W1 emb(t) + b1) + b2) + b3)                        width `WIDTH`
    s(t)   = s0 softplus(w4 . h + b4)                                                one output a segment

``s0`` is the geometric mean of the fitted table, and ``b4 = softplus^-1(1)``: the paper's ``b4 = softplus^-1(s0)`` in
units of ``s0``. Softplus is close to exp far below 1 and to the identity far above it, so that one learning rate would
mean other things for scales of 1e-3 and of 10; relative to ``s0`` all of them are trained alike, and neither end of
float32 is near. Last-layer weights are zero at the start, hence ``s(t) = s0`` for all t.

The networks of all quantizers are evaluated together, on the time grid of the plan only: four batched products an
iteration, whatever their number. What is stored is the table that they give; nothing else of them remains.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.steps.learners import SharedTables, parts_of, table_order

CODE = 128
"""Width of the time code (that of the paper's CIFAR model), whatever the denoiser's own is."""
WIDTH = 64
"""Of the hidden layers."""
LEAST = 1e-6
"""Smallest scale relative to s0: softplus of a network gone astray would underflow to 0, which is no scale."""
WARM_RATE = 1e-3
"""Adam's rate of the warm start."""


def time_code(timesteps: Tensor, width: int = CODE) -> Tensor:
    """Sinusoidal code ``[T, width]`` (float32) of timesteps ``[T]``, integers or not: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    angles = timesteps.double().cpu()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(timesteps.device)


def inverse_softplus(value: Tensor) -> Tensor:
    """The x with ``log(1 + exp(x)) = value``, for positive values of any size: ``value + log(1 - exp(-value))``."""
    return value + torch.log(-torch.expm1(-value))


class TimeNetworks(nn.Module):
    """Q networks of one shape, evaluated together.

    Args:
        code: Time codes ``[T, d]`` of the grid.
        owner: Which network an output belongs to, int64 ``[C]``.
        generator: For the hidden layers (He initialisation, zero biases).
    """

    code: Tensor
    owner: Tensor
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    w3: nn.Parameter
    b3: nn.Parameter

    def __init__(self, code: Tensor, owner: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("code", code)
        self.register_buffer("owner", owner)
        count, outputs = int(owner.max()) + 1, len(owner)
        for i, wide in enumerate((code.shape[1], WIDTH, WIDTH), start=1):
            weight = torch.randn(count, wide, WIDTH, generator=generator) * math.sqrt(2 / wide)
            self.register_parameter(f"w{i}", nn.Parameter(weight.to(code.device)))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(count, 1, WIDTH, device=code.device)))
        self.w4 = nn.Parameter(torch.zeros(outputs, WIDTH, 1, device=code.device))
        self.b4 = nn.Parameter(inverse_softplus(torch.ones(outputs, 1, 1, device=code.device)))

    def forward(self) -> Tensor:
        """``softplus`` of the outputs on the grid: scales relative to their s0, ``[C, T]``."""
        h = self.code.expand(len(self.b1), *self.code.shape)
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2), (self.w3, self.b3)):
            h = F.relu(torch.baddbmm(bias, h, weight))
        if len(self.owner) != len(h):
            h = h.index_select(0, self.owner)
        return F.softplus(torch.baddbmm(self.b4, h, self.w4)).squeeze(2).clamp_min(LEAST)


class NetworkScaleLearner:
    """Tables of timed quantizers, produced by networks of the time. Zero-points stay those of the fitted table, an
    integer a step (the networks of the paper give the scale alone, too).

    Args:
        quantizers: Static activation quantizers with a row a timestep, by name; all of one time grid.
        generator: For the initial weights of the networks.
        warm_start: Adam steps (rate `WARM_RATE`) that regress the logarithm of the fitted tables first.
        rate: Learning rate of the networks' parameters relative to the budget's.
    """

    def __init__(
        self, quantizers: dict[str, ActivationQuantizer], generator: torch.Generator, *, warm_start: int = 500,
        rate: float = 1.0,
    ) -> None:
        clocks = [q.clock for q in quantizers.values()]
        if not clocks or clocks[0] is None or any(clock is not clocks[0] for clock in clocks):
            raise InternalError("networks of the time need tables with a row a timestep, all of one clock")
        self.quantizers, self.rate = quantizers, rate
        self.start = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in quantizers.items()}
        self.tables = SharedTables(quantizers.values())
        self.still = torch.cat([zero.float().flatten() for _, zero in self.start.values()])
        fitted = torch.cat([scale.t() for scale, _ in self.start.values()])  # [C, T]
        self.base = fitted.double().log().mean(dim=1, keepdim=True).exp().float()
        widths = torch.tensor([scale.shape[1] for scale, _ in self.start.values()])
        owner = torch.arange(len(widths)).repeat_interleave(widths).to(fitted.device)
        self.order = table_order(widths.tolist(), fitted.shape[1]).to(fitted.device)
        code = time_code(clocks[0].timesteps.to(fitted.device))
        self.networks = TimeNetworks(code, owner, generator)
        self.warm_error = self._warm(fitted, warm_start)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights and biases of all networks, layer by layer."""
        return {f"time.{name}": p for name, p in self.networks.named_parameters()}

    def rates(self) -> dict[str, float]:
        """One for all."""
        return dict.fromkeys(self.parameters(), self.rate)

    def scales(self) -> Tensor:
        """All tables ``[T, S]``, one after another, flat."""
        return (self.base * self.networks()).flatten().index_select(0, self.order)

    def relax(self, progress: Tensor) -> Tensor:
        """Trial tables into the quantizers; no penalty."""
        scales = self.scales()
        for name, scale in self._parts(scales).items():
            self.quantizers[name].trial_scale = scale
        self.tables.put(scales, self.still)
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Fold: the networks' values on the time grid become the tables."""
        self.release()
        with torch.no_grad():
            parts = self._parts(self.scales())
        for name, quantizer in self.quantizers.items():
            quantizer.set_scale(parts[name].clone())
        return {"time_networks": len(self.quantizers), "warm_start_error": float(f"{self.warm_error:.4g}")}

    def restore(self) -> None:
        """The fitted tables again."""
        for name, quantizer in self.quantizers.items():
            quantizer.set_scale(*self.start[name])

    def release(self) -> None:
        """No trial tables stay behind."""
        self.tables.clear()
        for quantizer in self.quantizers.values():
            quantizer.trial_scale = None

    def result(self) -> dict[str, Tensor]:
        """The tables, and nothing of the networks."""
        return {f"{name}/scale": q.scale for name, q in self.quantizers.items()}

    def _warm(self, fitted: Tensor, iterations: int) -> float:
        """Regress the logarithm of the tables; returns the root mean square error that is left."""
        target = (fitted / self.base).log()
        adam = torch.optim.Adam(self.networks.parameters(), lr=WARM_RATE, foreach=False)
        with torch.enable_grad():
            for _ in range(iterations):
                adam.zero_grad(set_to_none=True)
                (self.networks().log() - target).square().mean(dim=1).sum().backward()
                adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            return float((self.networks().log() - target).square().mean().sqrt())

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        return parts_of(flat, {name: scale.shape for name, (scale, _) in self.start.items()})
