"""How much of cross-attention the start token takes: what to know before its column is left float (``exempt``).

Text encoders that begin every prompt with the same token (CLIP) make a sink of it: most of a row of cross-attention
goes to column 0. Others (T5) have no such token, and column 0 is a word like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention
from bitbrush.network.clock import Clock
from bitbrush.numbers.grid import ActivationSpec, LayerSpec

SINK = 0.5
"""Share from which the start token counts as a sink."""


def start_mass(run: Run, samples: int = 64) -> dict[str, float]:
    """Mean softmax weight of token 0 in each cross-attention: over heads, queries and calibration samples.

    Nothing is quantized while it is measured. With guidance half of the samples are those of the empty prompt.

    Args:
        run: Behind its calibrate step; its model is as before afterwards.
        samples: Calibration samples looked at, spread over the tape.

    Returns:
        Name of the attention to a share in 0 .. 1, in order of registration; empty without cross-attention.
    """
    found = {name: m for name, m in run.model.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not found:
        return {}
    with ExitStack() as stack:
        stack.enter_context(wrap.show(run.model, "float"))
        shares = {name: stack.enter_context(_watched(module)) for name, module in found.items()}
        run.tape.run(run.model, limit=samples)
    return {name: share.total / share.samples for name, share in shares.items()}


def start_in_words(shares: dict[str, float]) -> str:
    """One line for people: whether the start token is a sink, so that leaving it float can be worth something."""
    sinks = sum(share >= SINK for share in shares.values())
    low, high = min(shares.values()), max(shares.values())
    return (f"the start token takes {low:.3f} to {high:.3f} of cross-attention; at least half of it, as where it is a "
            f"sink, in {sinks} of {len(shares)} attentions")


@dataclass
class _Share:
    """Sum over samples of the mean weight of column 0."""

    total: float = 0.0
    samples: int = 0

    def look(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a softmax quantizer, given weights ``[B, heads, T, T']``."""
        weights: Tensor = args[0]
        self.total += float(weights[..., 0].double().mean(dim=(1, 2)).sum())
        self.samples += len(weights)


@contextmanager
def _watched(attention: Any) -> Iterator[_Share]:
    """Inside the block the attention is computed with its weights written out, float, and they are looked at."""
    share, former = _Share(), attention.processor
    original = former.original if isinstance(former, QuantAttention) else former
    spec = LayerSpec(activation=ActivationSpec(mode="dynamic"))
    watching = QuantAttention(original, {"softmax": spec}, Clock(), 1)
    watching.face = "sim"
    for quantizer in watching.modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.enabled = False
            quantizer.register_forward_pre_hook(share.look)
    attention.set_processor(watching)
    try:
        yield share
    finally:
        attention.set_processor(former)
