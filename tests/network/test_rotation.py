"""Layers whose input is rotated (ViDiT-Q): exact in float, packed equal to simulated, proven, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush import kernels
from bitbrush.artifact.save import save
from bitbrush.errors import InputError
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLinear
from bitbrush.numbers.codec import decode
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.numbers.rotation import rotate
from bitbrush.steps.fit import nearest_codes
from bitbrush.steps.smooth import Smooth
from small import CALIBRATE, FIT, HEAD, PACK, SPLIT, complete, execute

TOKEN = ActivationSpec(mode="dynamic", granularity="token")
CHANNELS = 24


def layer(scaled: bool = False, bits: int = 8, activation: ActivationSpec | None = TOKEN) -> QuantLinear:
    torch.manual_seed(0)
    weight = WeightSpec(grid=Grid(bits=bits, signed=bits == 8))
    spec = LayerSpec(weight=weight, activation=activation, rotation="hadamard", input_scale=scaled)
    made = QuantLinear.wrap(nn.Linear(CHANNELS, 10), spec, None, 1)
    if scaled:
        made.set_input_scale(torch.rand(CHANNELS) + 0.5)
    scale = made.scaled_weight().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1))
    made.set_weight(nearest_codes(made, scale, zero), scale, zero)
    return made


@pytest.mark.parametrize("scaled", [False, True])
def test_the_product_is_the_same(scaled: bool) -> None:
    """Check 1: scaling, rotation and both leave y as it is; the decoded weight serves an input as it comes."""
    made, x = layer(scaled), torch.randn(3, 7, CHANNELS)
    weight = made.float_weight
    assert weight is not None
    want = nn.functional.linear(x, weight)
    got = nn.functional.linear(made.prepare(x), made.scaled_weight())
    assert torch.allclose(got, want, atol=1e-4) and not torch.allclose(made.prepare(x), x, atol=0.1)
    assert torch.allclose(made.restored_weight(), weight, atol=0.02)
    assert not torch.allclose(made.decoded_weight(), weight, atol=0.1)
    made.face = "float"
    assert torch.equal(made(x), nn.functional.linear(x, weight, made.bias))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", [TOKEN, None, ActivationSpec(mode="dynamic")])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_and_proven(scaled: bool, activation: ActivationSpec | None, bits: int) -> None:
    made, x = layer(scaled, bits, activation), torch.randn(2, 7, CHANNELS)
    made.face = "sim"
    want, codes, tables = made(x), made.stored_codes(), made.weight_tables()
    made.pack()
    assert torch.equal(made(x), want)
    proof = prove_layer(codes, made, x, tables)
    assert proof["ok"], proof
    assert proof["kernels"]["reference"]["identity"]["ok"] is True and made.rotated
    if activation is not None:
        assert "skipped" not in proof["kernels"]["cpu-int8"]
        assert torch.allclose(kernels.KERNELS["cpu-int8"](made, x), want, atol=1e-4)


def test_the_proof_sees_a_rotation_that_is_left_out() -> None:
    made, x = layer(), torch.randn(2, 7, CHANNELS)
    codes, tables = made.stored_codes(), made.weight_tables()
    made.pack()
    made.prepare = lambda t: t  # type: ignore[method-assign]
    assert not prove_layer(codes, made, x, tables)["ok"]


def test_the_codes_are_those_of_the_rotated_weight() -> None:
    made = layer()
    scale, zero = made.scale_tables()
    assert made.float_weight is not None
    error = decode(made.stored_codes(), scale, zero) - rotate(made.float_weight.detach())
    assert float(error.abs().max()) <= float(scale.max()) / 2 * 1.001


def test_refusals() -> None:
    weight = WeightSpec()
    turned = LayerSpec(weight=weight, rotation="hadamard")
    with pytest.raises(InputError, match="rotated") as caught:
        wrap.wrap(tiny.text_unet(), Plan(layers={"conv_in": turned}))
    assert complete(caught.value) and caught.value.where == "conv_in"
    assert not turned.unsupported()
    for wrong in (LayerSpec(rotation="hadamard"), turned.model_copy(update={"segments": (8, 8)}),
                  turned.model_copy(update={"weight": WeightSpec(grid=Grid(kind="codebook"), codebooks=1)})):
        assert wrong.unsupported() == ["rotation"]


@pytest.mark.parametrize("ratios", ["balanced", "none"])
def test_a_whole_recipe(ratios: str, tmp_path: Path) -> None:
    """Planned by `smooth`, packed, proven, saved and opened by diffusers alone."""
    head = HEAD.replace("activation = {}", 'activation = { mode = "dynamic" }')
    step = f'[[step]]\ndo = "smooth"\nratios = "{ratios}"\nrotation = "hadamard"\n'
    pipe = tiny.pipeline("text")
    run = execute(tmp_path, pipe, head + CALIBRATE + SPLIT + step + FIT + PACK)
    turned = [n for n, spec in run.plan.layers.items() if spec.rotation == "hadamard"]
    linear = [n for n, m in run.layers().items() if isinstance(m, QuantLinear)]
    assert turned == linear and len(turned) > 20
    assert all(spec.input_scale == (ratios == "balanced") for spec in run.plan.layers.values())
    notes = next(done for done in run.done if done["step"] == "smooth")
    assert notes["rotated"] == len(turned) and notes["layers"] == (len(run.layers()) if ratios == "balanced" else 0)
    proofs = [p for done in run.done for p in done.get("proof", {}).values()]
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs)
    want = tiny.run(pipe.unet)
    again = type(pipe.unet).from_pretrained(save(pipe, tmp_path / "made", run.plan) / "unet")
    assert torch.equal(tiny.run(again), want)


def test_what_it_foresees(tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + CALIBRATE)
    for ratios, rotation, kinds in (("none", "none", set()), ("none", "hadamard", {"linear"}),
                                    ("balanced", "none", {"linear", "conv"})):
        step = Smooth(do="smooth", ratios=ratios, rotation=rotation)  # type: ignore[arg-type]
        found = step.foresee(run.survey, run.plan)
        assert {site.kind for site in run.survey.layers() if site.name in found} == kinds
