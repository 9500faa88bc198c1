"""What a reconstruction trains: rounding offsets (AdaRound) or activation scales. One interface for the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import rounding
from bitbrush.numbers.codec import decode, encode_offset, reciprocal


class Learner(Protocol):
    """Parameters with a relaxed form for training and a hard form for keeping."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name."""

    def relax(self, progress: Tensor) -> Tensor:
        """Put the relaxed form into the modules; returns the penalty. ``progress`` = iteration / iterations."""

    def harden(self) -> dict[str, Any]:
        """Put the hard form into the modules; returns facts for the history."""

    def restore(self) -> None:
        """Put back what was there before training."""

    def release(self) -> None:
        """Drop training state."""

    def result(self) -> dict[str, Tensor]:
        """Tensors to journal, from the modules as they are now."""


class RoundingSettings(Protocol):
    """What `RoundingLearner` reads from its step."""

    @property
    def regularisation(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def beta_start(self) -> float: ...
    @property
    def beta_end(self) -> float: ...


class RoundingLearner:
    """AdaRound over the weights of several layers: ``floor(w / s) + h(alpha)``.

    The weights of all layers lie in one flat tensor, so an iteration takes the same few operations however many layers
    a block has.

    Args:
        layers: Layers with fitted scales and nearest codes.
        settings: Factor and annealing of the regulariser.
    """

    def __init__(self, layers: dict[str, QuantLayer], settings: RoundingSettings) -> None:
        self.layers, self.settings = layers, settings
        self.start = {name: layer.stored_codes().clone() for name, layer in layers.items()}
        weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        scales = {name: layer.scale_tables() for name, layer in layers.items()}
        self.weight = _flat(weights.values())
        self.scale = _flat(scales[n][0].expand(self.shapes[n]) for n in layers)
        self.zero = _flat(scales[n][1].expand(self.shapes[n]) for n in layers)
        self.inverse = reciprocal(self.scale)
        tops = {name: torch.as_tensor(layer.top(), device=self.weight.device).float() for name, layer in layers.items()}
        self.top = _flat(tops[n].expand(self.shapes[n]) for n in layers)
        self.alpha = nn.Parameter(rounding.initial_alpha(self.weight, self.inverse))

    def parameters(self) -> dict[str, nn.Parameter]:
        """One alpha a weight, flat."""
        return {"alpha": self.alpha}

    def relax(self, progress: Tensor) -> Tensor:
        """Soft weights into ``trial_weight``; the regulariser as penalty."""
        cfg = self.settings
        done = ((progress - cfg.warmup) / max(1 - cfg.warmup, 1e-9)).clamp(0, 1)
        beta = cfg.beta_end + (cfg.beta_start - cfg.beta_end) * (1 - done)
        factor = torch.where(progress >= cfg.warmup, cfg.regularisation, 0.0)
        offset = rounding.rectified_sigmoid(self.alpha)
        soft = decode(self._codes(offset), self.scale, self.zero)
        for name, part in self._parts(soft).items():
            self.layers[name].trial_weight = part
        return factor * rounding.regulariser(offset, beta)

    def harden(self) -> dict[str, Any]:
        """Decide; store the codes."""
        soft = rounding.rectified_sigmoid(self.alpha.detach())
        decided = float(((soft < 0.05) | (soft > 0.95)).float().mean())
        codes = self._parts(self._codes(rounding.harden(self.alpha.detach())).to(torch.uint8))
        changed = sum(int((codes[name] != self.start[name]).sum()) for name in codes)
        for name, layer in self.layers.items():
            layer.trial_weight = None
            layer.codes = codes[name].clone()
        return {"decided": round(decided, 4), "codes_changed": round(changed / soft.numel(), 4)}

    def restore(self) -> None:
        """Nearest codes again."""
        for name, layer in self.layers.items():
            layer.codes = self.start[name]

    def release(self) -> None:
        """No relaxed weights stay behind."""
        for layer in self.layers.values():
            layer.trial_weight = None

    def result(self) -> dict[str, Tensor]:
        """The codes of every layer."""
        return {f"{name}/codes": layer.stored_codes() for name, layer in self.layers.items()}

    def _codes(self, offset: Tensor) -> Tensor:
        return encode_offset(self.weight, self.inverse, self.zero, self.top, offset)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {n: part.view(self.shapes[n]) for n, part in zip(self.shapes, flat.split(sizes), strict=True)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


class ScaleLearner:
    """Activation scales ``s = s0 * exp(theta)``: a learning rate relative to each scale (a choice of ours; the released
    code of Q-Diffusion trains s itself, whose step then depends on the size of s).

    Args:
        quantizers: Static activation quantizers by name.
    """

    def __init__(self, quantizers: dict[str, ActivationQuantizer]) -> None:
        self.quantizers = quantizers
        self.start = {name: q.scale.clone() for name, q in quantizers.items()}
        self.thetas = {name: nn.Parameter(torch.zeros_like(q.scale)) for name, q in quantizers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """One theta an entry of a scale table."""
        return self.thetas

    def relax(self, progress: Tensor) -> Tensor:
        """Trial scales into the quantizers; no penalty."""
        for name, quantizer in self.quantizers.items():
            quantizer.trial_scale = self.start[name] * self.thetas[name].exp()
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Store the trained scales."""
        for name, quantizer in self.quantizers.items():
            quantizer.trial_scale = None
            quantizer.set_scale(self.start[name] * self.thetas[name].detach().exp())
        return {}

    def restore(self) -> None:
        """The fitted scales again."""
        for name, quantizer in self.quantizers.items():
            quantizer.set_scale(self.start[name])

    def release(self) -> None:
        """No trial scales stay behind."""
        for quantizer in self.quantizers.values():
            quantizer.trial_scale = None

    def result(self) -> dict[str, Tensor]:
        """The scale tables."""
        return {f"{name}/scale": q.scale for name, q in self.quantizers.items()}
