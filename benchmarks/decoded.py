"""Weights of an artifact that are decoded once, for drawing many pictures; used by `quality.py`.

The reference kernel decodes every weight at every call: tenths of a millisecond of a GPU, but a dozen operations a
layer, which take the host longer than that. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

from bitbrush.evaluation.sampling import denoiser
from bitbrush.network.layers import QuantLayer


def decode_once(pipeline: Any) -> Any:
    """The same pipeline, its denoiser's packed weights kept as float32; to be called where it will draw."""
    for layer in denoiser(pipeline).modules():
        if isinstance(layer, QuantLayer) and layer.face == "packed" and layer.spec.weight is not None:
            kept = layer.decoded_weight().detach()
            layer.decoded_weight = lambda kept=kept: kept  # type: ignore[method-assign]
    return pipeline
