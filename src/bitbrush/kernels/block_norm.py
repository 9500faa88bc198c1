"""torch's GroupNorm outside of fused blocks, on channels-last pictures; see `bitbrush.kernels.blocks`.

Packed networks keep pictures channels last, which torch's own GroupNorm copies to another order, reads by one program a
group and leaves so that the next layer copies back. The last norm of a UNet took a hundredth of a step of SDXL so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import direct, norm_ops  # noqa: F401 - its operations are registered by their module
from bitbrush.kernels.blocks import FusedBlock

HALF = (torch.bfloat16, torch.float16)


class FusedNorm(FusedBlock):
    """A GroupNorm that reads and writes pictures in the order in which they lie."""

    passes_codes = False

    def forward(self: Any, input: Tensor) -> Tensor:
        """The norm; see `torch.nn.GroupNorm`."""
        x = input
        plain = torch.compiler.is_compiling() or x.ndim != 4 or not x.is_cuda or x.dtype not in HALF
        if plain or (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)) or not _last(x):
            out: Tensor = self.plain_class.forward(self, x)
            return out
        found: Tensor = direct.OPS.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, False)
        return found


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
