"""The shortcut split: the boundary from the survey, two scales, and the same product where nothing is rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from bitbrush.network.layers import QuantConv2d
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import ActivationSpec, LayerSpec, WeightSpec
from bitbrush.steps.fit import Fit
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, SPLIT, execute


def shortcut(segments: tuple[int, ...], *, weight: bool = True, seed: int = 0) -> QuantConv2d:
    torch.manual_seed(seed)
    spec = LayerSpec(weight=WeightSpec() if weight else None, activation=ActivationSpec(), segments=segments)
    layer = QuantConv2d.wrap(nn.Conv2d(12, 5, 1), spec, None, 1)
    if weight:
        fitted = Fit(do="fit", what="weights").weight(layer)
        layer.set_weight(fitted["codes"], fitted["scale"], fitted["zero_point"])
    return layer


def test_the_segments_are_the_boundary(tmp_path: Path) -> None:
    pipe = tiny.pipeline("text")
    want = {site.name: site.boundary for site in survey(pipe.unet, tokens=tiny.TOKENS).layers()}
    run = execute(tmp_path, pipe, HEAD + CALIBRATE + SPLIT + FIT + RANGES + PACK)
    split = 0
    for name, layer in run.layers().items():
        assert layer.spec.segments == want[name]
        parts = max(len(want[name]), 1)
        assert layer.weight_scale.shape == (layer.out_channels_, parts) and layer.input is not None
        assert layer.input.scale.shape == (1, parts)
        if parts == 2:
            split += 1
            assert not torch.equal(layer.weight_scale[:, 0], layer.weight_scale[:, 1])
            assert layer.input.scale[0, 0] != layer.input.scale[0, 1]
    assert split == 4
    assert next(e for e in run.done if e["step"] == "split")["layers"] == 4


def test_without_rounding_a_split_changes_nothing() -> None:
    """Exact operands (weights and inputs on a grid that both layers share): the sum over parts is the whole."""
    ran = 0
    for segments in ((), (12,), (7, 5), (1, 11), (4, 4, 4)):
        layer = shortcut(segments)
        parts = max(len(segments), 1)
        codes = torch.randint(0, 16, (5, 12, 1, 1), generator=torch.Generator().manual_seed(3))
        layer.set_weight(codes, torch.full((5, parts), 0.25), torch.full((5, parts), 8))
        assert layer.input is not None
        layer.input.set_scale(torch.full((1, parts), 0.5), torch.full((1, parts), 128))
        layer.face = "sim"
        x = torch.randint(-20, 20, (2, 12, 3, 3), generator=torch.Generator().manual_seed(4)) * 0.5
        want = nn.functional.conv2d(x, (codes - 8) * 0.25, layer.bias)
        with torch.no_grad():
            assert torch.allclose(layer(x), want, atol=1e-5)
        ran += 1
    assert ran == 5


def test_unlimited_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight grid and inputs switched off: the split layer is the float layer, bit for bit."""
    layer = shortcut((7, 5), weight=False)
    plain = nn.Conv2d(12, 5, 1)
    plain.weight, plain.bias = layer.float_weight, layer.bias  # type: ignore[assignment]
    assert layer.input is not None
    x = torch.randn(2, 12, 3, 3)
    layer.face, layer.input.enabled = "sim", False
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


def test_a_split_helps_where_the_parts_differ() -> None:
    """A part of a thousandth of the other's range is lost behind one scale, and kept behind two."""
    torch.manual_seed(1)
    x = torch.cat([torch.randn(4, 7, 6, 6) * 30, torch.randn(4, 5, 6, 6) * 0.05], dim=1)
    errors = []
    for segments in ((), (7, 5)):
        layer = shortcut(segments)
        with torch.no_grad():
            layer.float_weight.data[:, 7:] *= 200  # type: ignore[union-attr]
        fitted = Fit(do="fit", what="weights").weight(layer)
        layer.set_weight(fitted["codes"], fitted["scale"], fitted["zero_point"])
        parts = x.split(list(layer.segments), 1)
        bound = torch.stack([p.abs().max() for p in parts])[None]
        assert layer.input is not None
        layer.input.set_scale(bound / 127, torch.full(bound.shape, 128))
        with torch.no_grad():
            want = layer(x)
            layer.face = "sim"
            errors.append(float((layer(x) - want).square().mean()))
    assert errors[1] < 0.5 * errors[0]
