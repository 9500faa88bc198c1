"""ViDiT-Q's statistics of the first step, scales a sample and a token, and the recipes `dgq` and `viditq` whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitbrush
import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.planning import make_plan
from bitbrush.engine.progress import Silent
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantConv2d
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import ActivationSpec, Grid
from bitbrush.steps.smooth import weight_maxima
from small import CALIBRATE, FIT, HEAD, PROMPTS, WALKS, execute

FEW = {"calibrate.samples": "all", "calibrate.trajectories": 4, "calibrate.steps": 3, "calibrate.batch": 2}


@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize("times", ["all", "first"])
def test_factors_are_those_of_the_steps_looked_at(times: str, statistic: str, tmp_path: Path) -> None:
    """lambda = a^alpha / w^(1 - alpha) with alpha = 1 - exponent; the stored factor is its inverse."""
    step = f'[[step]]\ndo = "smooth"\ntimes = "{times}"\nstatistic = "{statistic}"\nexponent = 0.7\n'
    run, ran = execute(tmp_path, tiny.pipeline("text"), HEAD + WALKS + step), 0
    moments = run.tape.column("timestep")
    rows = [i for i, t in enumerate(moments.tolist()) if times == "all" or t == float(moments.max())]
    assert len(rows) == (len(run.tape) if times == "all" else len(run.tape) // 4) and len(rows) >= 4
    for name, layer in run.layers().items():
        with wrap.show(run.model, "float"):
            x = run.tape.record(run.model, name, output=False).inputs[0].take(torch.tensor(rows))
        last = x.movedim(layer.channel_dim, -1).flatten(1, -2) if x.ndim > 2 else x[:, None]
        each = last.abs().amax(1)
        a, w = each.amax(0) if statistic == "max" else each.mean(0), weight_maxima(layer.weight)
        want = a**0.3 / w**0.7
        alive = (a > 1e-4 * a.max()) & (w > 1e-4 * w.max())
        assert layer.input_scale is not None and int(alive.sum()) > 0
        assert torch.allclose(1 / layer.input_scale[alive], want[alive], rtol=1e-3), name
        ran += 1
    assert ran > 50


@pytest.mark.parametrize(("shape", "dim"), [((3, 4, 5, 5), 1), ((3, 7, 4), 2), ((3, 4), 1), ((4, 5, 5), 0)])
def test_a_scale_a_sample(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    made = [ActivationQuantizer(ActivationSpec(grid=Grid(bits=4), mode="dynamic", granularity=g))  # type: ignore[arg-type]
            for g in ("sample", "tensor")]
    out = made[0](x, dim)
    if dim == 0:  # one picture without a batch
        assert torch.equal(out, made[1](x, dim))
        return
    for i in range(len(x)):
        assert torch.equal(out[i : i + 1], made[1](x[i : i + 1], dim)) and torch.equal(out[i : i + 1], made[0](
            x[i : i + 1], dim))
    assert not torch.equal(out, made[1](x, dim))


def test_static_scales_a_sample_are_refused(tmp_path: Path) -> None:
    text = HEAD.replace("activation = {}", 'activation = { granularity = "sample" }') + CALIBRATE + FIT
    with pytest.raises(InputError, match="granularity"):
        execute(tmp_path, tiny.pipeline("text"), text)


@pytest.mark.parametrize("preset", [None, "rotated", "rotation-only", "plain", "mse"])
def test_viditq(preset: str | None, tmp_path: Path) -> None:
    """Packed equals simulated; both halves of guidance in one batch are two calls (check 6); tokens stand alone (2)."""
    pipe = tiny.pipeline("text")
    result = bitbrush.quantize(pipe, "viditq", prompts=PROMPTS, preset=preset, settings=FEW, progress=Silent())
    assert result.proof["ok"] and len(result.proof["layers"]) > 50
    found = wrap.layers(pipe.unet)
    wide = {n for n, m in found.items() if isinstance(m, QuantConv2d) and m.kernel_hw == (3, 3)}
    for name, layer in found.items():
        a = layer.spec.activation
        assert a is not None and a.mode == "dynamic"
        assert a.granularity == ("sample" if name in wide else "token"), name
        assert (layer.spec.rotation == "hadamard") == (preset in ("rotated", "rotation-only") and name not in wide
                                                       and not isinstance(layer, QuantConv2d))
        assert (layer.input_scale is not None) == (preset not in ("rotation-only", "plain"))
    assert len(wide) > 5
    g = torch.Generator().manual_seed(0)
    for layer in found.values():
        x = torch.randn(2, layer.in_channels_, 4, 4, generator=g)
        x = x if isinstance(layer, QuantConv2d) else x.flatten(2).transpose(1, 2)
        x[1] *= 20  # the other half
        both = layer.quantize_input(x)
        assert torch.equal(both, torch.cat([layer.quantize_input(x[:1]), layer.quantize_input(x[1:])]))
    layer = next(m for n, m in found.items() if n.endswith("to_q"))
    with torch.no_grad():
        tokens = torch.randn(2, 6, layer.in_channels_, generator=g)
        changed = tokens.clone()
        changed[1, 3] *= 50
        same = (layer(tokens) == layer(changed)).all(-1)
    assert same.tolist() == [[True] * 6, [True, True, True, False, True, True]]


ARMS: dict[str | None, dict[str, Any]] = {
    None: {"channel_group", "pixel_group"}, "channel": {"channel_group"}, "pixel": {"pixel_group"}, "tensor": set(),
    "float-activations": set(), "token": set(), "static-softmax": {"channel_group"},
    "uniform-softmax-4": {"channel_group"},
}


@pytest.mark.parametrize("preset", ARMS)
def test_dgq(preset: str | None, tmp_path: Path) -> None:
    """Arms as the recipe says, packed equal to simulated; softmax, k and the ends as on its page."""
    pipe = tiny.pipeline("text")
    settings = FEW | {"weights.iterations": 2, "weights.batch": 2, "weights-fit.points": 4, "group.samples": 8}
    result = bitbrush.quantize(pipe, "dgq", 4, 6, prompts=PROMPTS, preset=preset, settings=settings, progress=Silent())
    specs = result.plan.layers
    assert result.proof["ok"] and result.proof["model"]["equal"] is True
    kinds = {s.activation.granularity for s in specs.values() if s.activation is not None}
    grouped = {k for k in kinds if k.endswith("_group")}
    assert grouped <= {"channel_group", "pixel_group"} and bool(grouped) == bool(ARMS[preset])
    assert grouped >= ARMS[preset] if len(ARMS[preset]) == 1 else True
    operands = {n: s for n, s in specs.items() if ":" in n}
    if preset == "float-activations":
        assert not operands and all(s.activation is None for s in specs.values())
        return
    for name, spec in operands.items():
        a, cross = spec.activation, "attn2" in name
        assert a is not None and spec.exempt == ((0,) if cross and name.endswith((":k", ":softmax")) else ())
        uniform = not name.endswith(":softmax") or (preset == "uniform-softmax-4" and not cross)
        assert a.grid.kind == ("affine" if uniform else "log2")
        assert a.grid.bits == (4 if preset == "uniform-softmax-4" and name.endswith("attn1:softmax") else 6)
        assert (a.mode == "static") == (uniform or preset == "static-softmax")
    assert len(operands) == 4 * 8
    for name in ("conv_in", "conv_out"):
        weight, a = specs[name].weight, specs[name].activation
        assert weight is not None and a is not None and (weight.grid.bits, a.grid.bits) == (8, 8)
    notes = [u for u in result.history["units"] if u["step"] == "group"]
    assert (not notes) == (preset in ("tensor", "token"))
    if notes:
        assert len(notes[0]["start_mass"]) == 4 and all(0 < s < 1 for s in notes[0]["start_mass"].values())
        shared = [fact for fact in notes[0]["layers"].values() if "channel_over_pixel" in fact]
        assert len(shared) > 10


def test_dgq_without_text(tmp_path: Path) -> None:
    settings = FEW | {"weights.iterations": 2, "weights.batch": 2, "weights-fit.points": 4, "group.samples": 8}
    result = bitbrush.quantize(tiny.pipeline("unconditional"), "dgq", settings=settings, progress=Silent())
    assert result.proof["ok"]
    softmax = [s for n, s in result.plan.layers.items() if n.endswith(":softmax")]
    assert len(softmax) >= 2 and all(s.activation is not None and s.activation.grid.kind == "log2" for s in softmax)
    assert "start_mass" not in next(u for u in result.history["units"] if u["step"] == "group")
    arm = make_plan(survey(tiny.plain_unet()), read_recipe("dgq", preset="uniform-softmax-4")).plan
    grids = [s.activation.grid for n, s in arm.layers.items() if n.endswith(":softmax") and s.activation is not None]
    assert len(grids) == len(softmax) and all((grid.bits, grid.kind) == (4, "affine") for grid in grids)
