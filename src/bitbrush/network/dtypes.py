"""Modules whose tensors keep their dtype when a model is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def moving_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a cast or a move (as ``Module._apply`` is given it) leaves of it: the move alone, values as they are."""

    def moved(tensor: Tensor) -> Tensor:
        done = fn(tensor)
        return done if done.dtype == tensor.dtype else tensor.to(done.device)

    return moved
