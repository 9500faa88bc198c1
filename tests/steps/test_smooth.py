"""Smoothing: the function stays, the ranges of the channels change as the formula says, and it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.steps.smooth import FLOOR, Smooth, weight_maxima
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, SPLIT, execute, least_pipeline


def smooth(**choices: Any) -> str:
    return '[[step]]\ndo = "smooth"\n' + "".join(f"{k} = {v!r}\n" for k, v in choices.items()).replace("'", '"')


def given(run: Run, name: str, count: int | None = None) -> Tensor:
    """What a layer receives in the float face over the tape."""
    with wrap.show(run.model, "float"):
        recording = run.tape.record(run.model, name, output=False)
    return recording.inputs[0].take(torch.arange(count or len(run.tape)))


def channel_maxima(layer: QuantLayer, x: Tensor) -> Tensor:
    return x.movedim(layer.channel_dim, 0).flatten(1).abs().amax(1)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    text = HEAD + CALIBRATE + SPLIT + smooth(samples=99)
    return execute(tmp_path_factory.mktemp("balanced"), tiny.pipeline("text"), text)


def test_the_product_is_the_same(balanced: Run) -> None:
    """Section 7, invariant 1: f(x delta, W / delta) = f(x, W), convolutions, linear layers and split ones."""
    kinds, ran = set[str](), 0
    for name, layer in balanced.layers().items():
        x = given(balanced, name, 3)
        with torch.no_grad():
            want = layer.operation(x, layer.weight)
            again = layer.operation(layer.prepare(x), layer.scaled_weight())
        assert torch.allclose(again, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())), name
        assert layer.spec.input_scale and layer.input_scale is not None and len(layer.input_scale.unique()) > 1
        kinds.add(type(layer).__name__ + ("split" if len(layer.segments) > 1 else ""))
        ran += 1
    assert ran == len(balanced.plan.layers) > 50
    assert kinds == {"QuantLinear", "QuantConv2d", "QuantConv2dsplit"}
    assert torch.equal(tiny.run(balanced.model), tiny.run(tiny.pipeline("text").unet)), "the float face is untouched"


def test_maxima_of_input_and_weight_become_equal(balanced: Run) -> None:
    """sqrt(max|X_c| max|W_c|) both, as MPQ-DM says."""
    ran = 0
    for name, layer in balanced.layers().items():
        x = given(balanced, name)
        inputs, weights = channel_maxima(layer, layer.prepare(x)), weight_maxima(layer.scaled_weight())
        alive = (channel_maxima(layer, x) > FLOOR * x.abs().max()) & (weight_maxima(layer.weight) > 0)
        assert torch.allclose(inputs[alive], weights[alive], rtol=1e-4), name
        want = (channel_maxima(layer, x) * weight_maxima(layer.weight)).sqrt()
        assert torch.allclose(inputs[alive], want[alive], rtol=1e-4)
        ran += int(alive.sum())
    assert ran > 1000


def test_notes_say_how_far_it_goes(balanced: Run) -> None:
    notes = balanced.done[-1]
    factors = torch.cat([layer.input_scale for layer in balanced.layers().values() if layer.input_scale is not None])
    assert notes["layers"] == len(balanced.plan.layers)
    assert notes["smallest_factor"] == pytest.approx(float(factors.min()), rel=1e-5)
    assert notes["largest_factor"] == pytest.approx(float(factors.max()), rel=1e-5)


def test_the_activation_alone(tmp_path: Path) -> None:
    """Every channel gets the same range: the geometric mean of what the channels had."""
    text = HEAD + CALIBRATE + SPLIT + smooth(samples=99, ratios="activation")
    run, ran = execute(tmp_path, least_pipeline(), text), 0
    for name, layer in run.layers().items():
        x = given(run, name)
        before, after = channel_maxima(layer, x), channel_maxima(layer, layer.prepare(x))
        assert torch.allclose(after, before.log().mean().exp().expand_as(after), rtol=1e-4), name
        ran += 1
    assert ran == len(run.plan.layers) >= 12


def test_exponents() -> None:
    x, w, ran = torch.tensor([1.0, 4.0, 9.0, 0.5]), torch.tensor([2.0, 0.5, 1.0, 8.0]), 0
    for exponent, want in ((0.0, 1 / x), (1.0, w), (0.5, (w / x).sqrt()), (0.25, w**0.25 / x**0.75)):
        assert torch.allclose(Smooth(do="smooth", exponent=exponent).factors(x, w), want)
        ran += 1
    assert ran == 4


def test_dead_channels_do_not_explode() -> None:
    """Zeros in the input, in the weight, in both, everywhere: factors stay positive, finite and bounded."""
    alive, dead, ran = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4), 0
    half = torch.tensor([1.0, 0.0, 3.0, 0.0])
    for ratios in ("balanced", "activation"):
        for exponent in (0.0, 0.5, 1.0):
            step = Smooth(do="smooth", ratios=ratios, exponent=exponent)  # type: ignore[arg-type]
            for x in (alive, half, dead, alive * 1e-30):
                for w in (alive, half, dead, alive * 1e30):
                    factors = step.factors(x, w)
                    assert torch.isfinite(factors).all() and (factors > 0).all()
                    assert float(factors.max() / factors.min()) <= 4 / FLOOR
                    ran += 1
    assert ran == 96
    assert torch.equal(Smooth(do="smooth").factors(dead, dead), torch.ones(4))


def test_layers_left_alone(tmp_path: Path) -> None:
    rules = (
        '"*.conv2" = { activation = "float" }\n"*.conv_shortcut" = { weight = "float" }\n'
        '"*.to_q" = { activation = { position = "output" } }\n"*:q" = { activation = {} }\n'
    )
    text = HEAD + rules + CALIBRATE + SPLIT + smooth(layers="*resnets* | *attentions*")
    run = execute(tmp_path, tiny.pipeline("unconditional"), text)
    smoothed = {n for n, s in run.plan.layers.items() if s.input_scale}
    want = {n for n in run.layers() if n.rpartition(".")[2] not in ("conv2", "conv_shortcut", "to_q")
            and ("resnets" in n or "attentions" in n)}
    assert smoothed == want and 10 < len(want) < len(run.layers()) - 5
    assert all((layer.input_scale is not None) == (n in want) for n, layer in run.layers().items())
    (tmp_path / "off").mkdir()
    off = execute(tmp_path / "off", least_pipeline(), HEAD + CALIBRATE + SPLIT + smooth(enabled=True).replace(
        "True", "false"))
    assert not any(s.input_scale for s in off.plan.layers.values()) and len(off.done) == 3


def test_other_layers_keep_their_codes(tmp_path: Path) -> None:
    """The rest of the network is not wrapped anew."""
    text = HEAD + CALIBRATE + SPLIT + smooth(layers="conv_out") + FIT + RANGES
    run = execute(tmp_path, least_pipeline(), text)
    (tmp_path / "without").mkdir()
    plain = execute(tmp_path / "without", least_pipeline(), text.replace(smooth(layers="conv_out"), ""))
    same = [n for n, layer in run.layers().items()
            if torch.equal(layer.stored_codes(), plain.layers()[n].stored_codes())]
    assert set(run.layers()) - set(same) == {"conv_out"} and len(same) >= 11


@pytest.mark.parametrize("timed", [False, True])
def test_outlier_channels_of_the_activation(timed: bool, tmp_path: Path) -> None:
    """A channel made 40 times as large (and its weights as small): at 4 bits smoothing takes most of the harm away."""
    errors = {}
    for name, step in (("plain", ""), ("balanced", smooth()), ("activation", smooth(ratios="activation"))):
        pipe = tiny.pipeline("unconditional")
        pipe.unet.eval()
        with torch.no_grad():
            for block in pipe.unet.modules():
                if type(block).__name__ == "Attention":
                    block.group_norm.weight[3] *= 40
                    block.group_norm.bias[3] *= 40
                    for inner in (block.to_q, block.to_k, block.to_v):
                        inner.weight[:, 3] /= 40
        (tmp_path / name).mkdir()
        want = tiny.run(pipe.unet)
        head = HEAD.replace("activations = 8", "activations = 4").replace("weights = 4", "weights = 8")
        head = head.replace("activation = {}", f"activation = {{ timed = {str(timed).lower()} }}")
        run = execute(tmp_path / name, pipe, head + CALIBRATE + SPLIT + step + FIT + RANGES + PACK)
        errors[name] = float((tiny.run(run.model) - want).square().mean())
    assert errors["balanced"] < 0.8 * errors["plain"] and errors["activation"] < 0.8 * errors["plain"], errors
