"""Weights that are decoded once are those of every call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import tiny
from bitbrush.network.layers import QuantLayer


def test_weights_are_decoded_once_and_are_the_same(script: Any, monkeypatch: Any) -> None:
    model = tiny.quantized_model(tiny.text_unet(), tiny.plan_for(tiny.text_unet()))
    before, calls = tiny.run(model, 1), list[str]()
    script("decoded").decode_once(SimpleNamespace(unet=model))
    monkeypatch.setattr(QuantLayer, "stored_codes", lambda layer: calls.append(type(layer).__name__))
    assert torch.equal(tiny.run(model, 1), before) and not calls
