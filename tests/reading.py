"""What layers all over a network share as readers of one tensor, and the network's answer without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def readers(model: nn.Module, name: str) -> list[Any]:
    """Those that blocks hold by this name, each once."""
    found = {id(r): r for m in model.modules() if (r := m.__dict__.get(name)) is not None}
    return list(found.values())


@torch.no_grad()
def alone(model: nn.Module, name: str, *given: Any) -> Tensor:
    """The answer without anything that layers share."""
    held = [(m, m.__dict__.pop(name)) for m in model.modules() if name in m.__dict__]
    out: Tensor = model(*given).sample
    for module, taken in held:
        setattr(module, name, taken)
    return out
