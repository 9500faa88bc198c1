"""Every block of a model on codes beside what its layers give one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush import kernels
from bitbrush.kernels import blocks
from bitbrush.network import wrap
from operations import Operations

TIME = torch.tensor(500)


def compared(model: nn.Module, given: tuple[Any, ...], operations: Operations) -> Iterator[tuple[str, Tensor]]:
    """Names of all blocks and what their layers give, which each gives, too, but for a few codes; all are fused.

    Args:
        given: What the model is called with.
        operations: Counts those of the blocks on codes.
    """
    kernels.use(model, "cuda-int8")
    blocks.unfuse(model)
    seen = list(_recorded(model, given))
    assert set(blocks.fuse(model).values()) == {"fused"} and len(seen) == len(blocks.fused(model)) > 1
    clock = next(iter(wrap.layers(model).values())).input._clock[0]
    for name, (args, named, want) in seen:
        with operations, clock.at(TIME), torch.no_grad():
            got = model.get_submodule(name)(*args, **named)
        got, want = (out[0] if isinstance(out, tuple) else out for out in (got, want))
        changed = (got - want).abs() > 1e-4 * want.abs().max()  # a code at an edge may fall to its other side
        assert got.shape == want.shape and changed.float().mean() < 0.05, name
        yield name, want


def _recorded(model: nn.Module, given: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Every block with what it was given and gave, layer by layer."""
    found: dict[str, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, args, named, out, name=name: found.__setitem__(name, (args, named, out)), with_kwargs=True)
        for name, block in model.named_modules() if type(block) in blocks._kinds()
    ]  # fmt: skip
    with torch.no_grad():
        model(*given)
    for hook in hooks:
        hook.remove()
    yield from found.items()
