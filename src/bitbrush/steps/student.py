"""The network as a student: quantized, in evaluation mode, with decoded constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.temporary import holding


@contextmanager
def student(run: Run, trained: dict[str, QuantLayer]) -> Iterator[None]:
    """The sim face of the whole network, ready for training: evaluation mode, none of the model's own parameters wants
    gradients, and weights that are not trained are decoded once."""
    model, training = run.model, run.model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    constant = [layer for n, layer in run.layers().items() if n not in trained and layer.spec.weight is not None]
    try:
        model.eval()
        for p in wanted:
            p.requires_grad_(False)
        with torch.no_grad():
            for layer in constant:
                layer.trial_weight = layer.decoded_weight()
        with wrap.show(model, "sim"):
            yield
    finally:
        for layer in constant:
            layer.trial_weight = None
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)


@contextmanager
def student_so_far(run: Run) -> Iterator[None]:
    """The network where only some layers have got their codes: these are quantized, all others are float, and so are
    activations. What is quantized is decoded once."""
    coded = [layer for layer in run.layers().values() if layer.spec.weight is not None and layer.codes is not None]
    try:
        with torch.no_grad():
            for layer in coded:
                layer.trial_weight = layer.decoded_weight()
        with wrap.show(run.model, "float"), wrap.float_activations(run.model), holding(coded, "face", "sim"):
            yield
    finally:
        for layer in coded:
            layer.trial_weight = None
