"""Which of this package's operations a call runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations of this package, or of another namespace."""

    def __init__(self, space: str = "bitbrush") -> None:
        super().__init__()
        self.space, self.count = space, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(function).removesuffix(".default").partition(".")
        self.count[name] += space == self.space
        return function(*args, **(kwargs or {}))
