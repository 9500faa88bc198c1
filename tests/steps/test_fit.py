"""Ranges: never worse than min-max, one-sided where values are, averaged soundly, and the same by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, expand_weight_scale, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.fit import Fit, binary_scale
from bitbrush.steps.watch import Watcher
from small import CALIBRATE, FIT, HEAD, RANGES, SPLIT, execute, least_pipeline

TEXT = HEAD + CALIBRATE + SPLIT + FIT


def ranges_of(rows: Tensor, fit: Fit, grid: Grid) -> tuple[Tensor, Tensor]:
    return fit.row(rows[None], grid)


def test_mse_is_never_worse_than_minmax(tmp_path: Path) -> None:
    ran, better = 0, 0
    errors: dict[str, dict[str, float]] = {}
    for method in ("mse", "minmax"):
        (tmp_path / method).mkdir()
        text = TEXT.replace('id = "weights-fit"', f'id = "w"\nmethod = "{method}"')
        run = execute(tmp_path / method, tiny.pipeline("text"), text, weights=3)
        errors[method] = {}
        for name, layer in run.layers().items():
            s, z = layer.scale_tables()
            delta = layer.weight.detach() - decode(layer.stored_codes(), s, z)
            errors[method][name] = float(delta.abs().double().pow(2.4).mean())
    for name, error in errors["mse"].items():
        assert error <= errors["minmax"][name] * (1 + 1e-6), name
        better += error < 0.999 * errors["minmax"][name]
        ran += 1
    assert ran > 50 and better > 40


def test_codes_are_the_nearest_and_weights_stay(tmp_path: Path) -> None:
    reference = {n: p.clone() for n, p in tiny.pipeline("text").unet.named_parameters()}
    run, ran = execute(tmp_path, tiny.pipeline("text"), TEXT), 0
    for name, layer in run.layers().items():
        assert torch.equal(layer.weight, reference[f"{name}.weight"])
        s, z = (
            expand_weight_scale(t.float(), layer.segments, layer.weight.ndim)
            for t in (layer.weight_scale, layer.weight_zero_point)
        )
        assert torch.equal(layer.stored_codes(), encode(layer.weight, reciprocal(s), z, layer.top()).to(torch.uint8))
        inside = (layer.stored_codes() > 0) & (layer.stored_codes() < layer.top())
        delta = (layer.weight - decode(layer.stored_codes(), s, z)).abs()
        assert bool((delta <= 0.50001 * s)[inside].all())
        assert len(layer.weight_scale.unique()) > 1 and int(layer.stored_codes().max()) <= layer.top()
        ran += 1
    assert ran > 50


def test_scales_a_tensor(tmp_path: Path) -> None:
    text = TEXT.replace("weight = {}", 'weight = { granularity = "tensor" }', 1)
    run = execute(tmp_path, least_pipeline(), text)
    several = [layer for n, layer in run.layers().items() if n not in ("conv_in", "conv_out")]
    assert several and all((layer.weight_scale == layer.weight_scale[:1]).all() for layer in several)


def test_activation_ranges_hold_what_was_seen(tmp_path: Path) -> None:
    """Min-max: the scale covers the extremes that the history reports, with quantized weights in front."""
    run, ran = execute(tmp_path, tiny.pipeline("text"), TEXT + RANGES), 0
    seen = {k: v for e in run.done for k, v in e.get("ranges", {}).items()}
    for name, layer in run.layers().items():
        assert layer.input is not None
        scale, zero = layer.input.scale[0], layer.input.zero_point[0].float()
        low, high = float((-zero * scale).min()), float(((255 - zero) * scale).max())
        found = seen[f"{name}.input"]
        slack = 0.51 * float(scale.max())
        assert low - slack <= min(found["low"]) and max(found["high"]) <= high + slack, name
        assert found["timesteps"] == sorted(found["timesteps"]) and len(found["timesteps"]) == 3
        ran += 1
    assert ran == len(seen) > 50


def test_extremes_are_kept_from_some_bits_on(tmp_path: Path) -> None:
    """Here from 8: the ends have 8 bits and hold all that was seen; with 4 bits two random values seldom do."""
    rules = '"conv_in | conv_out" = { weight = { bits = 8 }, activation = { bits = 8 } }\n'
    text = TEXT.replace("activations = 8", "activations = 4")
    text = text.replace('"conv_in | conv_out" = { weight = { bits = 8 } }\n', rules)
    run = execute(tmp_path, least_pipeline(), text + RANGES.replace("values = 32", "values = 2\nextremes_from = 8"))
    seen = {k: v for e in run.done for k, v in e.get("ranges", {}).items()}
    holds: dict[int, list[bool]] = {4: [], 8: []}
    for name, layer in run.layers().items():
        assert layer.input is not None
        scale, zero, grid = layer.input.scale[0], layer.input.zero_point[0].float(), layer.input.spec.grid
        low, high = float((-zero * scale).min()), float(((grid.levels - 1 - zero) * scale).max())
        found, slack = seen[f"{name}.input"], 0.51 * float(scale.max())
        holds[grid.bits].append(low - slack <= min(found["low"]) and max(found["high"]) <= high + slack)
    assert len(holds[8]) == 2 and all(holds[8]) and len(holds[4]) > 15 and sum(holds[4]) < 5


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_same_seed_same_scales(method: str, tmp_path: Path) -> None:
    tables = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        run = execute(tmp_path / str(i), least_pipeline(), TEXT + RANGES.replace("minmax", method), seed=seed)
        tables.append(
            torch.cat([layer.input.scale.flatten() for layer in run.layers().values() if layer.input is not None])
        )
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


# ---- PTQ4DM ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
def test_symmetric_ranges_are_one_sided_where_values_are(sign: str, ema: float) -> None:
    ran = 0
    for bits in (8, 6, 4):
        grid = Grid(bits=bits)
        x = torch.randn(200, 40, generator=torch.Generator().manual_seed(bits))
        x = {"both": x, "positive": x.abs(), "negative": -x.abs()}[sign]
        fit = Fit(do="fit", what="activations", symmetric=True, points=100, ema=ema)
        scale, zero = ranges_of(x, fit, grid)
        want = {"both": grid.mid, "positive": 0, "negative": grid.levels - 1}[sign]
        assert abs(float(zero) - want) <= (sign == "both")  # 2**(bits-1) - 1/2, rounded either way
        best = float(ranges.error(x.reshape(1, -1), scale, zero, grid, 2.4))
        plain = ranges.search(x.reshape(1, -1), grid, method="minmax", symmetric=True)
        if ema == 0:  # a search never ends worse than min-max; an average may
            assert best <= float(ranges.error(x.reshape(1, -1), *plain, grid, 2.4)) * (1 + 1e-6)
        assert float(scale) <= float(plain[0]) * (1 + 1e-6)
        ran += 1
    assert ran == 3


def test_averaged_ranges_of_skewed_values() -> None:
    """Not symmetric: the zero-point follows the range; batches of one sign do not narrow those of two."""
    skewed = torch.rand(300, 50, generator=torch.Generator().manual_seed(0)) * 4 - 1  # in [-1, 3]
    fit = Fit(do="fit", what="activations", method="minmax", ema=0.9)
    scale, zero = ranges_of(skewed, fit, Grid(bits=8))
    assert float(-zero * scale) == pytest.approx(-1, abs=0.05) and float((255 - zero) * scale) == pytest.approx(
        3, abs=0.05
    )
    mixed = torch.cat([torch.rand(64, 50), torch.rand(64, 50) * 2 - 1, torch.rand(64, 50)])
    scale, zero = ranges_of(mixed, fit.model_copy(update={"symmetric": True}), Grid(bits=8))
    assert float((255 - zero) * scale) == pytest.approx(1, abs=0.05) and float(zero) > 0
    signed, mid = ranges_of(skewed, fit, Grid(bits=8, signed=True))
    assert float(mid) == 128 and float(signed * 127) == pytest.approx(3, abs=0.06)


# ---- ranges ------------------------------------------------------------------------------------------------------
def test_the_central_share(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 10_001)[None]
    for share in (0.5, 0.9, 0.998, 1.0):
        scale, zero = ranges.search(x, Grid(bits=8), method="percentile", central_share=share)
        assert float(scale * 255) == pytest.approx(2 * share, rel=0.01) and abs(float(zero) - 127.5) <= 1
    whole = ranges.search(x, Grid(bits=8), method="percentile", central_share=0.9)
    monkeypatch.setattr(ranges, "_QUANTILE_VALUES", 1000)  # longer rows than torch.quantile takes
    few = [ranges.search(x, Grid(bits=8), method="percentile", central_share=0.9) for _ in range(2)]
    assert torch.equal(few[0][0], few[1][0]) and float(few[0][0]) == pytest.approx(float(whole[0]), rel=0.01)


def test_rows_longer_than_torch_quantile_takes() -> None:
    x = torch.zeros(1, (1 << 24) + 3)
    x[0, ::2] = 1
    scale, _ = ranges.search(x, Grid(bits=1), method="percentile", central_share=0.99)
    assert float(scale) == 1.0


def test_ranges_as_wide_as_float32() -> None:
    largest, ran = torch.finfo(torch.float32).max, 0
    for bits in range(1, 9):
        for signed in (False, True):
            scale, zero = ranges.affine_parameters(
                torch.tensor([-largest]), torch.tensor([largest]), Grid(bits=bits, signed=signed)
            )
            assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero).all()
            ran += 1
    assert ran == 16


# ---- mixed bits, binary rows, scaled weights, scales a channel ------------------------------------------------------
def wrapped(weight: WeightSpec, name: str = "up_blocks.1.resnets.0.conv_shortcut", **choices: Any) -> QuantLayer:
    """A split layer of the tiny network with this weight spec."""
    model = tiny.text_unet()
    wrap.wrap(model, Plan(layers={name: LayerSpec(weight=weight, segments=(28, 16), **choices)}))
    return wrap.layers(model)[name]


def fitted(layer: QuantLayer, **choices: Any) -> tuple[QuantLayer, dict[str, Tensor]]:
    found = Fit(do="fit", what="weights", points=20, step=0.04, **choices).weight(layer)
    layer.set_weight(found["codes"], found["scale"], found["zero_point"])
    return layer, found


@pytest.mark.parametrize("binary", ["affine", "symmetric"])
def test_rows_of_each_width_are_fitted_as_if_alone(binary: Any) -> None:
    """Mixed bits: the same scales and codes as in a layer whose rows all have that width."""
    bits, ran = tuple((1, 2, 3, 8, 4, 1, 5)[i % 7] for i in range(16)), 0
    layer, found = fitted(wrapped(WeightSpec(grid=Grid(bits=4), row_bits=bits, binary=binary)))
    assert found["scale"].shape == found["zero_point"].shape == (16, 2)
    for width in set(bits):
        grid = Grid(bits=width, signed=width == 8)
        alone, uniform = fitted(wrapped(WeightSpec(grid=grid, binary=binary)))
        rows = torch.tensor(bits) == width
        assert all(torch.equal(found[key][rows], uniform[key][rows]) for key in found), width
        values = [len(row.unique()) for row in (found["codes"][rows].int() - found["zero_point"][rows].int()[:, :1]
                                                .reshape(-1, 1, 1, 1))[:, :28].flatten(1)]
        assert max(values) <= 2**width and int((found["codes"][rows].int()).max()) <= (1 << width)
        assert torch.equal(layer.decoded_weight()[rows], alone.decoded_weight()[rows])
        ran += len(values)
    assert ran == 16


def test_binary_rows_are_the_best_magnitude() -> None:
    """Section 6 of MPQ-DM's page: on Gaussian weights sign * s leaves about 0.36, the affine form about 0.60."""
    values, ran = torch.randn(40, 400, generator=torch.Generator().manual_seed(0)), 0
    for power in (1.0, 2.0, 2.4, 4.0):
        scale = binary_scale(values, power=power)
        best = (values.abs() - scale[:, None]).abs().pow(power).mean(1)
        for factor in torch.linspace(0.05, 3, 60):
            other = (values.abs() - float(factor) * values.abs().mean(1, keepdim=True)).abs().pow(power).mean(1)
            assert bool((best <= other * (1 + 1e-5)).all())
            ran += 1
    assert ran == 240
    assert torch.allclose(binary_scale(values, 2.0), values.abs().mean(1))
    assert float(binary_scale(torch.full((1, 5), -3.0))) == 3.0 and float(binary_scale(torch.zeros(1, 5))) > 0
    relative = []
    for binary in ("symmetric", "affine"):
        layer = wrapped(WeightSpec(grid=Grid(bits=1), binary=binary))  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
        layer, _ = fitted(layer, power=2.0)
        with torch.no_grad():
            difference = layer.decoded_weight() - layer.weight
            relative.append(float(difference.square().sum() / layer.weight.square().sum()))
    assert relative[0] == pytest.approx(0.36, abs=0.05) and relative[1] > 0.45


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_symmetric_rows_hold_two_values(method: Any) -> None:
    layer, found = fitted(wrapped(WeightSpec(grid=Grid(bits=1), binary="symmetric")), method=method)
    assert set(found["codes"].unique().tolist()) == {0, 2} and bool((found["zero_point"] == 1).all())
    wide = expand_weight_scale(found["scale"], layer.segments, 4)
    assert torch.equal(layer.decoded_weight(), torch.where(layer.weight >= 0, wide, -wide))
    if method == "minmax":
        assert torch.allclose(found["scale"][:, 0], layer.weight[:, :28].abs().flatten(1).mean(1))


def test_the_scaled_weight_is_fitted() -> None:
    """With an input scale: codes of W / delta, for every element the nearest one."""
    layer = wrapped(WeightSpec(grid=Grid(bits=4)), input_scale=True)
    factor = torch.rand(44, generator=torch.Generator().manual_seed(0)) + 0.5
    layer.set_input_scale(factor)
    layer, found = fitted(layer)
    scaled = layer.weight / factor.reshape(1, -1, 1, 1)
    assert torch.equal(layer.scaled_weight(), scaled)
    s, z = layer.scale_tables()
    assert torch.equal(found["codes"], encode(scaled, reciprocal(s), z, 15).to(torch.uint8))
    plain = fitted(wrapped(WeightSpec(grid=Grid(bits=4))))[1]
    assert not torch.equal(found["scale"], plain["scale"])


@pytest.mark.parametrize("timed", [False, True])
def test_scales_a_channel(timed: bool, tmp_path: Path) -> None:
    """Min-max: each channel's table covers its own extremes, no other's; few values are kept of wide layers."""
    head = HEAD.replace("activation = {}", f'activation = {{ granularity = "channel", timed = {str(timed).lower()} }}')
    run, ran = execute(tmp_path, tiny.pipeline("unconditional"), head + CALIBRATE + SPLIT + FIT + RANGES), 0
    times = len(run.plan.timesteps) if timed else 1
    for name, layer in run.layers().items():
        assert layer.input is not None and layer.input.scale.shape == (times, layer.in_channels_), name
        with wrap.show(run.model, "sim"), wrap.float_activations(run.model):
            recording = run.tape.record(run.model, name, output=False)
        for row in range(times):
            here = torch.arange(len(recording.timesteps))
            if timed:
                here = here[recording.timesteps == run.plan.timesteps[row]]
            x = recording.inputs[0].take(here).movedim(layer.channel_dim, 0).flatten(1)
            scale, zero = layer.input.scale[row], layer.input.zero_point[row].float()
            want, zeros = ranges.search(torch.stack([x.amin(1), x.amax(1)], dim=1), Grid(bits=8), method="minmax")
            assert torch.allclose(scale, want, rtol=1e-3) and bool(((zero - zeros).abs() <= 1).all()), name
        ran += 1
    assert ran == len(run.plan.layers) > 30
    kept = Watcher(ActivationQuantizer(ActivationSpec(granularity="channel"), channels=1000), 64, torch.Generator())
    kept.times = torch.zeros(2)
    kept.quantizer(torch.randn(2, 1000, 3, 3), 1)
    assert kept.values_by_segment()[0].shape == (1000, 2, 4)


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_rows_of_several_quantizers_are_those_of_each(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched together or one by one: two grids, two numbers of samples, two numbers of segments."""
    from bitbrush.numbers.grid import Grid

    monkeypatch.setattr("bitbrush.steps.fit.CHUNK", chunk)
    g = torch.Generator().manual_seed(5)
    shapes = {"a": (1, 3, 16), "b": (2, 3, 16), "c": (1, 3, 16), "d": (1, 2, 16), "e": (1, 3, 16)}
    values = {name: torch.randn(shape, generator=g) * (i + 1) for i, (name, shape) in enumerate(shapes.items())}
    grids = {name: Grid(bits=8 if name == "e" else 4) for name in shapes}
    fit = Fit(do="fit", what="activations")
    together = fit.rows(values, grids)
    assert set(together) == set(shapes)
    for name, kept in values.items():
        scale, zero = fit.row(kept, grids[name])
        torch.testing.assert_close(together[name][0], scale, rtol=1e-6, atol=0)
        assert together[name][0].shape == (len(kept),) and torch.equal(together[name][1], zero)
