"""Small values of a GPU, looked at on the host without waiting for the GPU.

A denoiser that is told its timestep on the GPU has to be asked for it where somebody wants to warn of it, and asking
waits until everything before is computed: a tenth of a step of a small network. What is only worth a warning may come a
call later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arrivals:
    """One tensor at a time on its way to the host."""

    def __init__(self) -> None:
        self._under_way: tuple[Any, Tensor, Any] | None = None

    def latest(self, values: Tensor, about: Any = None) -> tuple[Tensor, Any] | None:
        """What has arrived, with what was said about it; None while nothing new has.

        Args:
            values: Answered at once where they are on the host; of a GPU a copy is begun where none is under way, which
                a later call answers.
            about: Answered with them.
        """
        if not values.is_cuda:
            return values, about
        arrived = None
        if self._under_way is not None and self._under_way[0].query():
            arrived, self._under_way = self._under_way[1:], None
        if self._under_way is None:
            copy, event = values.detach().to("cpu", non_blocking=True), torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self._under_way = event, copy, about
        return arrived

    def __reduce__(self) -> tuple[type[Arrivals], tuple[()]]:
        """A copy waits for nothing."""
        return Arrivals, ()
