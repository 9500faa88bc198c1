"""Groups of pixels at another size than they were made for: refused by name, or one scale that spans all groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan
from bitbrush.numbers.ranges import affine_parameters
from small import CALIBRATE, FIT, RANGES, SPLIT, TIMED, complete, execute

PIXELS, GROUPS = 12, 3
LAYERS = {"linear": ((2, 12, 6), (2, 20, 6), 2), "conv": ((2, 6, 3, 4), (2, 6, 4, 5), 1)}


def made(clock: Clock | None = None, fallback: Any = "tensor", **more: Any) -> ActivationQuantizer:
    spec = ActivationSpec(grid=Grid(bits=4), granularity="pixel_group", groups=GROUPS, pixels=PIXELS,
                          fallback=fallback, timed=clock is not None, **more)
    quantizer = ActivationQuantizer(spec, (), clock, 2 if clock else 1, channels=6)
    g = torch.Generator().manual_seed(0)
    shape = quantizer.scale.shape
    ends = -torch.rand(shape, generator=g) * 2, torch.rand(shape, generator=g) * 3
    quantizer.set_scale(*affine_parameters(*ends, Grid(bits=4)))
    quantizer.set_groups(torch.arange(PIXELS) % GROUPS)
    return quantizer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("timed", [False, True])
def test_one_scale_spans_all_groups(layer: str, timed: bool) -> None:
    own, other, dim = LAYERS[layer]
    clock = Clock((1.0, 9.0)) if timed else None
    quantizer, refusing = made(clock), made(clock, "refuse")
    with (clock or Clock((1.0, 9.0))).at(torch.tensor([9.0, 1.0])):
        x = torch.randn(own)
        assert torch.equal(quantizer(x, dim), refusing(x, dim)), "its own size is not concerned"
        x = torch.randn(other) * 2
        got = quantizer(x, dim)
        with pytest.raises(InputError, match="another size") as caught:
            refusing(x, dim)
    assert complete(caught.value) and "12 pixels" in (caught.value.why or "") and "20" in (caught.value.why or "")
    assert "fallback" in (caught.value.try_ or "")
    rows = [1, 0] if timed else [0, 0]
    for sample, row in enumerate(rows):
        scale, zero = quantizer.scale[row], quantizer.zero_point[row].float()
        low, high = (-zero * scale).min(), ((15 - zero) * scale).max()
        wide, middle = affine_parameters(low, high, Grid(bits=4))
        want = decode(encode(x[sample], reciprocal(wide), middle, 15), wide, middle)
        assert torch.allclose(got[sample], want, atol=1e-5)
        assert bool((wide >= scale * 0.999).all())


def test_bits_a_timestep() -> None:
    clock = Clock((1.0, 9.0))
    quantizer, x = made(clock, time_bits=(8, 4)), 20 * torch.randn(2, 20, 6)
    with clock.at(torch.tensor([9.0, 1.0])):
        out = quantizer(x, 2)
    assert len(out[0].unique()) <= 16 < len(out[1].unique())


def test_json_says_it_only_where_it_is_chosen() -> None:
    for fallback in ("refuse", "tensor"):
        spec = made(fallback=fallback).spec
        plan = Plan(layers={"a": LayerSpec(activation=spec)})
        data = plan.to_json()
        assert ("fallback" in data["specs"][0]["activation"]) == (fallback == "tensor")
        assert Plan.from_json(data) == plan


def test_a_network_at_another_resolution(tmp_path: Path) -> None:
    """The recipe decides; an artifact keeps it. Packed and simulated are the same there, too."""
    pipes = {}
    for fallback in ("refuse", "tensor"):
        (tmp_path / fallback).mkdir()
        step = f'[[step]]\ndo = "group"\ngroups = 4\ndimension = "pixel"\nfallback = "{fallback}"\n'
        pipe = tiny.pipeline("text")
        run = execute(tmp_path / fallback, pipe, TIMED + CALIBRATE + SPLIT + FIT + step + RANGES)
        wrap.set_face(run.model, "sim")
        pipes[fallback] = (run, pipe)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, tiny.TOKENS, 16, generator=g)
    run, pipe = pipes["refuse"]
    with pytest.raises(InputError, match="another size") as caught, torch.no_grad():
        pipe.unet(x, 334, text)
    assert caught.value.where in run.plan.layers and "256" in (caught.value.why or "")
    notes = next(d for d in run.done if d["step"] == "group")["layers"]
    assert {fact["pixels"] for fact in notes.values()} >= {64, 16, tiny.TOKENS}, "the sizes it was calibrated for"
    run, pipe = pipes["tensor"]
    with torch.no_grad():
        want = pipe.unet(x, 334, text).sample
        for layer in run.layers().values():
            layer.pack()
        wrap.set_face(run.model, "packed")
        assert torch.equal(pipe.unet(x, 334, text).sample, want) and torch.isfinite(want).all()
        again = type(pipe.unet).from_pretrained(save(pipe, tmp_path / "made", run.plan) / "unet")
        assert torch.equal(again(x, 334, text).sample, want)
