"""Modules whose tensors keep their dtype when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


def moving_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a cast or a move (as ``Module._apply`` is given it) leaves of it: the move alone, values as they are."""

    def moved(tensor: Tensor) -> Tensor:
        done = fn(tensor)
        return done if done.dtype == tensor.dtype else tensor.to(done.device)

    return moved


class HalfTables(nn.Module):
    """A module whose buffers are float16 numbers, of any sign, wherever it is moved and whatever it is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay float16: in bfloat16 what is computed with them would be something else."""
        super()._apply(moving_only(fn), recurse)
        return self
