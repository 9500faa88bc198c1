"""Do not compute a finished prefix twice.

Block by block reconstruction runs the network up to block k for every k: quadratic work. The outputs of finished
modules do not change any more, so a `Memo` keeps them, batch by batch, and replays them instead of running the module.
It holds at most ``budget`` bytes; what does not fit is simply computed again. The results are the same bits either way,
because the same batches go through the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Memo:
    """Outputs of finished modules, by (module name, batch number, batch size, samples looked at).

    Args:
        budget: Bytes that may be kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.finished: dict[str, None] = {}
        self.kept: dict[tuple[str, int, int, int], Tensor] = {}

    def finish(self, name: str) -> None:
        """Declare that the output of a module will not change any more (for the same samples)."""
        self.finished[name] = None

    @contextmanager
    def batch(self, model: nn.Module, number: int, size: int, site: str = "", looked: int = 0) -> Iterator[None]:
        """Replay finished modules during the forward of batch ``number``; keep new outputs of finished modules.

        Args:
            model: The network.
            number: Of the batch; the same number, size and ``looked`` mean the same samples.
            size: Samples in the batch (a step that looks at fewer samples has a smaller last batch).
            site: A module that is being recorded: those around it run in full, or it would not be reached.
            looked: Samples looked at in all; they are spread over the tape, so fewer of them are other ones.
        """
        replaced: list[nn.Module] = []
        try:
            for name in self.finished:
                if site.startswith(f"{name}."):
                    continue
                module, key = model.get_submodule(name), (name, number, size, looked)
                stored = self.kept.get(key)
                forward = self._keeper(key, module.forward) if stored is None else _replayer(stored)
                module.__dict__["forward"] = forward
                replaced.append(module)
            yield
        finally:
            for module in replaced:
                module.__dict__.pop("forward", None)

    def _keeper(self, key: tuple[str, int, int, int], forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if isinstance(out, Tensor) and self.used + out.numel() * out.element_size() <= self.budget:
                self.kept[key] = out.detach()
                self.used += out.numel() * out.element_size()
            return out

        return run


def _replayer(stored: Tensor) -> Callable[..., Any]:
    def replay(*_args: Any, **_kwargs: Any) -> Tensor:
        return stored

    return replay
