"""One SHA-256 over the plan and all tensors of a denoiser, as it stands in the model's ``config.json``.

The manifest covers files; this covers a model that is loaded with plain ``from_pretrained``, where no manifest is read.
Each tensor contributes a line ``name dtype shape sha256(bytes)``; lines are sorted by name, so that the split into
shards does not matter.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.numbers.grid import Plan


def tensor_line(name: str, tensor: Tensor) -> str:
    """The line of one tensor (any device except meta)."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def combine(plan: Plan, lines: dict[str, str], correction: dict[str, Any] | None = None) -> str:
    """The digest of a plan, the facts of a correction (if any) and the lines of all tensors, in hexadecimal."""
    total = hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode())
    if correction is not None:
        total.update(b"\n" + json.dumps(correction, sort_keys=True).encode())
    for name in sorted(lines):
        total.update(b"\n" + lines[name].encode())
    return total.hexdigest()


def of_model(model: nn.Module, plan: Plan, correction: dict[str, Any] | None = None) -> str:
    """The digest of a model as its ``state_dict`` is now."""
    lines = {name: tensor_line(name, tensor) for name, tensor in model.state_dict().items()}
    return combine(plan, lines, correction)
