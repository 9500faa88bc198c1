"""Scale and shift of normalisation layers as what a finetuning trains; the teacher keeps its own (`network.norms`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.engine.run import Run
from bitbrush.network import norms

PREFIX = "norm."
"""Of what a result calls a parameter of a normalisation layer: ``<module>/norm.weight``."""


class NormLearner:
    """Parameters of several normalisation layers.

    Args:
        modules: The layers, by name; they are given a face.
        rate: Learning rate, in the units of the parameters, which are about 1.
    """

    def __init__(self, modules: dict[str, nn.Module], rate: float) -> None:
        self.modules, self.rate = {name: norms.faced(module) for name, module in modules.items()}, rate
        self.start = {name: module.trained() for name, module in self.modules.items()}
        self.trained = {
            f"norm/{name}/{key}": nn.Parameter(self.start[name].get(key, own).detach().float().clone())
            for name, module in self.modules.items() for key, own in module.named_parameters(recurse=False)
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """One tensor a parameter of the layers."""
        return self.trained

    def rates(self) -> dict[str, float]:
        """As given."""
        return dict.fromkeys(self.trained, self.rate)

    def relax(self, progress: Tensor) -> Tensor:
        """The trained values into ``trial``; no penalty."""
        for name, module in self.modules.items():
            module.trial = dict(self._values(name))
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Store the trained values."""
        self.release()
        for name, module in self.modules.items():
            module.set(dict(self._values(name)))
        return {}

    def restore(self) -> None:
        """The values before."""
        for name, module in self.modules.items():
            module.set(self.start[name])

    def release(self) -> None:
        """No trial values stay behind."""
        for module in self.modules.values():
            module.trial = {}

    def result(self) -> dict[str, Tensor]:
        """``<module>/norm.<parameter>``, where there are any."""
        return {f"{n}/{PREFIX}{key}": v for n, module in self.modules.items() for key, v in module.trained().items()}

    def _values(self, name: str) -> dict[str, nn.Parameter]:
        own = self.modules[name].named_parameters(recurse=False)
        return {key: self.trained[f"norm/{name}/{key}"] for key, _ in own}


def apply_norms(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store what `NormLearner.result` names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind.startswith(PREFIX):
            found.setdefault(name, {})[kind.removeprefix(PREFIX)] = tensor
    for name, values in found.items():
        norms.faced(run.model.get_submodule(name)).set(values)
