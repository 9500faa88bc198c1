"""What the layers of a denoiser are given over the sampling steps: extremes, exactly, and percentiles from a bounded
number of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BYTES = 64 << 20
"""Of the values kept of all layers and steps together, more or less."""
FEWEST, MOST = 1024, 1 << 16
"""Values kept of one layer at one step."""
PERCENTILES = {"p01": 0.001, "p1": 0.01, "p99": 0.99, "p999": 0.999}


class ActivationRanges:
    """Watches layers' inputs while it lasts; hooks are gone afterwards, also after an error.

    Of every layer and step it keeps the smallest and the largest value, and values at random places, the same number of
    each picture: all of them where there are few.

    Args:
        layers: Name to module.
        steps: Denoiser calls of a trajectory.
        rows: Samples of all calls at one step together.
        seed: Of the random places.
    """

    def __init__(self, layers: Mapping[str, nn.Module], steps: int, rows: int, seed: int = 0) -> None:
        self.layers = layers
        room = BYTES // (4 * max(len(layers) * steps, 1))
        self.share = max(1, min(max(room, FEWEST), MOST) // max(rows, 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0  # set by whoever knows which call this is
        self.ends: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
        self.kept: dict[str, dict[int, list[Tensor]]] = {name: {} for name in layers}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationRanges:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._watch(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel():
                self._see(name, args[0].detach().float())

        return hook

    def _see(self, name: str, x: Tensor) -> None:
        rows = x.reshape(len(x), -1)
        ends = torch.stack([rows.amin(), -rows.amax()])
        known = self.ends[name].get(self.step)
        self.ends[name][self.step] = ends if known is None else torch.minimum(known, ends)
        if rows.shape[1] > self.share:
            places = torch.randint(rows.shape[1], (self.share,), generator=self.generator)
            rows = rows[:, places.to(rows.device)]
        self.kept[name].setdefault(self.step, []).append(rows.flatten().clone())

    def result(self, steps: int) -> dict[str, dict[str, list[float | None]]]:
        """Layer to ``low``, ``high``, ``p01`` (0.1 %), ``p1``, ``p99``, ``p999``, each a list over the steps, to six
        digits; None at a step where the layer was not called. Layers that were never called are left out."""
        found: dict[str, dict[str, list[float | None]]] = {}
        for name, ends in self.ends.items():
            if ends:
                each = [self._at(name, step) for step in range(steps)]
                found[name] = {key: [row.get(key) for row in each] for key in ("low", "high", *PERCENTILES)}
        return found

    def _at(self, name: str, step: int) -> dict[str, float]:
        if step not in self.ends[name]:
            return {}
        low, high = self.ends[name][step].tolist()
        values = torch.cat(self.kept[name][step]).cpu()
        shares = torch.quantile(values, torch.tensor(list(PERCENTILES.values()))).tolist()
        found = {"low": low, "high": -high} | dict(zip(PERCENTILES, shares, strict=True))
        return {key: float(f"{value:.6g}") for key, value in found.items()}
