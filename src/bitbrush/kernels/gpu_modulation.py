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

from bitbrush.kernels import gpu_readers, readers
from bitbrush.kernels.blocks import FusedBlock


class Modulations(readers.Readers):
    """The last of the three layers of every block, and what stands before it.

    Attributes:
        blocks: Those whose layers they are.
        stages: The first, the second and the last layers of all blocks.
    """

    def __init__(self, blocks: list[Any]) -> None:
        self.blocks: list[Any] = blocks
        chains = [layers_of(block) for block in blocks]
        super().__init__([last for *_, last in chains])
        self.stages = [gpu_readers.Readers(list(stage), blocks) for stage in zip(*chains, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        """See `gpu_readers.Readers`. The blocks hold this: a copy of it has to exist before theirs."""
        return Modulations, ([],), (self.blocks,)

    def __setstate__(self, state: tuple[list[Any]]) -> None:
        """What `__reduce__` says; of blocks that are not whole yet."""
        self.blocks = state[0]

    def forget(self) -> None:
        """See `readers.Readers.forget`; other layers may stand in a block by now."""
        Modulations.__init__(self, self.blocks)

    def moment(self) -> Any:
        """See `gpu_readers.Readers.moment`."""
        return self.stages[0].moment()

    def same(self, one: Any, other: Any) -> bool:
        """A time is a tensor, of one forward."""
        return one is other

    def of(self, last: Any, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor | None:
        """``[6, B, C]`` of the block whose last layer that is; None where the block has to make its own.

        Args:
            timestep, labels: ``[B]``, as the blocks are given them.
        """
        if len(self.stages) != len(STAGES):  # a copy that has not been called yet
            self.forget()

        def seen() -> tuple[Tensor, Tensor]:
            return self.blocks[0].norm1.emb.time_proj(timestep).to(dtype), labels

        found = self.take([last], timestep, seen, (labels,))
        return None if found is None else found[0]

    def outputs(self, source: Tensor, seen: Callable[[], Any]) -> list[Tensor] | None:
        """See `readers.Readers.outputs`."""
        stacks = [stage.stack(source) for stage in self.stages]
        first, second, last = stacks
        if first is None or second is None or last is None:
            return None
        embeddings = [block.norm1.emb for block in self.blocks]
        x, labels = seen()
        hidden = nn.functional.silu(torch.cat(self.stages[0].multiply(first, x)))
        times = torch.cat(self.stages[1].multiply(second, hidden))
        classes = torch.stack([emb.class_embedder(labels) for emb in embeddings])
        made = nn.functional.silu(times + classes)
        found = torch.cat(self.stages[2].multiply(last, made)).unflatten(-1, (6, -1))
        return list(found.transpose(1, 2).contiguous().unbind(0))


STAGES = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
"""Of a block's first norm."""


def layers_of(block: Any) -> list[Any]:
    """A block's three layers, in the order of execution."""
    return [block.norm1.get_submodule(name) for name in STAGES]


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


def _kind(block: Any) -> Any:
    """What must be the same of blocks whose modulations are made together; None where a block's cannot be."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, TimestepEmbedding, Timesteps

    norm, emb = block.norm1, block.norm1.emb
    if type(emb) is not CombinedTimestepLabelEmbeddings or type(emb.time_proj) is not Timesteps:
        return None
    later, wave = emb.timestep_embedder, emb.time_proj
    if type(later) is not TimestepEmbedding or type(later.act) is not nn.SiLU or type(norm.silu) is not nn.SiLU:
        return None
    if later.post_act is not None or later.cond_proj is not None:
        return None
    kinds = tuple((gpu_readers.kind(layer), getattr(layer, "out_channels_", 0)) for layer in layers_of(block))
    made = (wave.num_channels, wave.flip_sin_to_cos, wave.downscale_freq_shift, wave.scale)
    return None if any(kind is None for kind, _ in kinds) else (kinds, made)
