"""What modulates the norms of all blocks of a DiT, made at once by the first of them that is called, on a GPU.

    sinusoid of the timestep, linear_1, SiLU, linear_2, + embedding of the class, SiLU, linear: scales, shifts and gates

Every block has these three layers to itself. They multiply one row a sample, which takes as long as an empty launch,
and depend on nothing but timestep and class. Here each of the three is one encode and one product for all blocks. What
is kept for how long: `readers`; how layers become one: `gpu_readers`. A graph that is compiled calls them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.kernels import gpu_readers
from bitbrush.kernels.blocks import FusedBlock


class Modulations(gpu_readers.Readers):
    """The last of the three layers of every block, with what stands before it.

    Attributes:
        norms: The blocks' first norms, which hold these layers.
        before: The first and the second layers of all blocks.
    """

    def __init__(self, blocks: list[Any]) -> None:
        first, second, last = zip(*(layers_of(block.norm1) for block in blocks), strict=True)
        super().__init__(list(last), blocks)
        self.norms: list[Any] = [block.norm1 for block in blocks]
        self.before = [gpu_readers.Readers(list(stage), blocks) for stage in (first, second)]

    def __reduce__(self) -> tuple[Any, ...]:
        """See `gpu_readers.Readers`. The blocks hold this: a copy of it has to exist before theirs."""
        return _empty, (), (self.layers, self.blocks, self.norms, self.before)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """What `__reduce__` says."""
        layers, blocks, self.norms, self.before = state
        gpu_readers.Readers.__init__(self, layers, blocks)

    def forget(self) -> None:
        """See `readers.Readers.forget`."""
        super().forget()
        for stage in self.before:
            stage.forget()

    def of(self, norm: Any, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor | None:
        """``[6, B, C]`` of the block whose first norm that is; None where the block has to make its own.

        Args:
            timestep, labels: ``[B]``, as the blocks are given them.
        """
        if not self.whole(norm):
            return None
        found = self.take([norm.linear], timestep, lambda: (norm.emb.time_proj(timestep).to(dtype), labels), (labels,))
        return None if found is None else found[0]

    def whole(self, norm: Any) -> bool:
        """Whether a norm still has the parts that its share is made with: an adapter may stand in a layer's place."""
        place = self.places.get(id(norm.linear), -1)
        if place < 0 or self.norms[place] is not norm or kind_of(norm) is None:
            return False
        first, second, _ = layers_of(norm)
        return first is self.before[0].layers[place] and second is self.before[1].layers[place]

    def outputs(self, source: Tensor, seen: Callable[[], Any]) -> list[Tensor] | None:
        """See `readers.Readers.outputs`."""
        if not all(map(self.whole, self.norms)):
            return None
        first, second = (stage.stack(source) for stage in self.before)
        last = self.stack(source)
        if first is None or second is None or last is None:
            return None
        x, labels = seen()
        hidden = nn.functional.silu(_all(self.before[0].multiply(first, x)))
        times = _all(self.before[1].multiply(second, hidden))
        classes = torch.stack([norm.emb.class_embedder(labels) for norm in self.norms])
        found = _all(self.multiply(last, nn.functional.silu(times + classes))).unflatten(-1, (6, -1))
        return list(found.transpose(1, 2).contiguous().unbind(0))


def _empty() -> Modulations:
    return Modulations.__new__(Modulations)


def _all(products: list[Tensor]) -> Tensor:
    """The outputs of all blocks, one below the other."""
    return products[0] if len(products) == 1 else torch.cat(products)


def layers_of(norm: Any) -> tuple[Any, Any, Any]:
    """The three layers of a block's first norm, in the order of execution."""
    return norm.emb.timestep_embedder.linear_1, norm.emb.timestep_embedder.linear_2, norm.linear


def share(blocks: list[FusedBlock]) -> None:
    """Give blocks whose embeddings are alike what makes their modulations together, as ``gpu_readers``, where there are
    two or more."""
    kinds: dict[Any, list[FusedBlock]] = {}
    for block in blocks:
        kind = _kind(block)
        if kind is not None:
            kinds.setdefault(kind, []).append(block)
    for alike in kinds.values():
        if len(alike) > 1:
            made = Modulations(alike)
            for block in alike:
                block.gpu_readers = made


def kind_of(norm: Any) -> Any:
    """How a norm's embedding makes its sinusoid; None where it is not the chain that is made for all blocks."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, TimestepEmbedding, Timesteps

    emb = norm.emb
    if type(emb) is not CombinedTimestepLabelEmbeddings or type(emb.time_proj) is not Timesteps:
        return None
    later, wave = emb.timestep_embedder, emb.time_proj
    if type(later) is not TimestepEmbedding or type(later.act) is not nn.SiLU or type(norm.silu) is not nn.SiLU:
        return None
    if later.post_act is not None or later.cond_proj is not None:
        return None
    return (wave.num_channels, wave.flip_sin_to_cos, wave.downscale_freq_shift, wave.scale)


def _kind(block: Any) -> Any:
    """What must be the same of blocks whose modulations are made together; None where a block's cannot be."""
    made = kind_of(block.norm1)
    if made is None:
        return None
    kinds = tuple((gpu_readers.kind(layer), getattr(layer, "out_channels_", 0)) for layer in layers_of(block.norm1))
    return None if any(kind is None for kind, _ in kinds) else (kinds, made)
