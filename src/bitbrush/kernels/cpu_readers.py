"""Layers all over a network that read one tensor, on the CPU: one product, made by the first of them that is called.

Such a product has few rows, and waits longer for what stands around it than for its sums: encode, unpack, a dozen
calls. Where calibration has given the layers one table of the input, all of them are one product, and each takes its
columns, with every number what it is without. What is kept for how long: `readers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitbrush.kernels import cpu_onednn, cpu_plain, readers
from bitbrush.kernels.blocks import watched
from bitbrush.kernels.cpu_attention import alike, join, runs

if TYPE_CHECKING:
    from bitbrush.kernels.cpu_plain import Facts


class Readers(readers.Readers):
    """Layers that read one tensor, in the order of their columns in the product."""

    def moment(self) -> int | None:
        """The row of the table; 0 where there is one."""
        quantizer = self.layers[0].input
        if quantizer is None:
            return None
        return cpu_plain.row_now(self.layers[0]) if quantizer.spec.timed else 0

    def outputs(self, source: Tensor, seen: Callable[[], Tensor]) -> list[Tensor] | None:
        """See `readers.Readers.outputs`."""
        known = self._known() if source.device.type == "cpu" else None
        x = None if known is None else seen()
        if known is None or x is None or x.numel() == 0:
            return None
        product = cpu_plain.product(known, self.layers[0], x)
        return None if product is None else list(product.split([la.out_channels_ for la in self.layers], dim=-1))

    def _known(self) -> Facts | None:
        """The layers as one, while all of them are plain, run by this kernel, and watched by nobody."""
        if not all(layer.face == "packed" and runs(layer) for layer in self.layers) or watched(self.layers):
            return None
        if self.joined is not None and self.joined.stale():
            self.forget()
        if not self.tried:
            self.tried = True
            here = all(_here(layer) for layer in self.layers)
            self.joined = join(self.layers) if here and cpu_onednn.engine() != "absent" else None
        found: Facts | None = self.joined
        return found


def share(blocks: list[tuple[Any, ...]]) -> None:
    """Give blocks ``(block, layer, ..)`` whose layers read one tensor what makes one product of them, as ``readers``,
    where they are alike in two blocks or more."""
    found: list[list[tuple[Any, ...]]] = []
    for block, *layers in blocks:
        if not all(_here(layer) and alike(layers[0], layer) for layer in layers):
            continue
        group = next((group for group in found if alike(group[0][1], layers[0])), None)
        if group is None:
            found.append(group := [])
        group.append((block, *layers))
    for group in found:
        if len(group) > 1:
            readers = Readers([layer for _, *layers in group for layer in layers])
            for block, *_ in group:
                block.readers = readers
                block.join()  # no pair of its own


def _here(layer: Any) -> bool:
    """Whether it is a packed layer on the CPU."""
    return hasattr(layer, "declare_packed") and layer.face == "packed" and layer.weight_scale.device.type == "cpu"
