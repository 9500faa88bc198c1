"""Scales of consecutive channels of a token or pixel, found at run time: by definition, packed, proven, on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.api import read_recipe
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import layer_bytes
from bitbrush.engine.planning import GROUP, make_plan
from bitbrush.errors import InputError
from bitbrush.kernels import cpu
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantConv2d, QuantLinear
from bitbrush.network.survey import survey
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.numbers.ranges import affine_parameters
from small import complete

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "tokens": ((3, 5, 20), 2), "rows": ((4, 20), 1), "pictures": ((2, 20, 3, 4), 1), "one row": ((20,), 0),
    "deep tokens": ((2, 2, 3, 20), 3),
}


def made(group: int, signed: bool = False, bits: int = 4) -> ActivationQuantizer:
    grid = Grid(bits=bits, signed=signed)
    return ActivationQuantizer(ActivationSpec(grid=grid, mode="dynamic", granularity="token_group", group=group))


def by_hand(x: Tensor, dim: int, group: int, grid: Grid) -> Tensor:
    """Every stretch of every token by itself."""
    last = x.movedim(dim, -1).contiguous()
    out = torch.empty_like(last)
    flat, done = last.reshape(-1, last.shape[-1]), out.reshape(-1, last.shape[-1])
    for row in range(len(flat)):
        for start in range(0, flat.shape[1], group):
            part = flat[row, start : start + group]
            scale, zero = affine_parameters(part.min(), part.max(), grid)
            codes = encode(part, reciprocal(scale), zero, grid.levels - 1)
            done[row, start : start + group] = decode(codes, scale, zero)
    return done.reshape(last.shape).movedim(-1, dim)


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
def test_every_stretch_has_its_own_scale(layout: str, signed: bool) -> None:
    """Groups that divide the 20 channels, that leave a short one, of one channel, and larger than all."""
    shape, dim = SHAPES[layout]
    x, ran = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 0.5, 0
    x[..., 0] = 0
    for group in (5, 8, 1, 19, 20, 64):
        quantizer = made(group, signed)
        assert torch.equal(quantizer(x, dim), by_hand(x, dim, group, quantizer.spec.grid)), group
        free = x.clone().requires_grad_()
        quantizer(free, dim).sum().backward()
        assert free.grad is not None and float(free.grad.abs().sum()) > 0
        ran += 1
    assert ran == 6


@pytest.mark.parametrize("layout", ["tokens", "pictures"])
def test_a_token_knows_nothing_of_others(layout: str) -> None:
    """Neither of batch mates nor of other places; other groups of its own do not matter either."""
    (shape, dim), quantizer = SHAPES[layout], made(8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    whole = quantizer(x, dim)
    for i in range(len(x)):
        assert torch.equal(quantizer(x[i : i + 1], dim), whole[i : i + 1])
    place = (slice(None), 2) if layout == "tokens" else (slice(None), slice(None), 1, 2)
    other = x * 50
    other[place] = x[place]
    assert torch.equal(quantizer(other, dim)[place], whole[place]) and not torch.equal(quantizer(other, dim), whole)
    loud = x.clone()
    loud.narrow(dim, 0, 8).mul_(100)
    assert torch.equal(quantizer(loud, dim).narrow(dim, 8, 12), whole.narrow(dim, 8, 12))


def test_one_group_of_all_channels_is_a_token() -> None:
    plain = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4), mode="dynamic", granularity="token"))
    ran = 0
    for shape, dim in SHAPES.values():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2
        for group in (20, 64):
            assert torch.equal(made(group)(x, dim), plain(x, dim))
            ran += 1
    assert ran == 10


def test_smaller_groups_lose_less_of_outlier_channels() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    x[:, 7] *= 30
    lost = [float((made(group)(x, 1) - x).square().mean()) for group in (64, 32, 16)]
    assert lost[0] > 1.5 * lost[1] > 2 * lost[2]


def test_zero_points_serve_gelu_better_than_signs() -> None:
    """B6.6: what a shift by the known bound and unsigned codes do, a zero-point found at run time does as well."""
    x = nn.functional.gelu(torch.randn(256, 64, generator=torch.Generator().manual_seed(5)) * 2)
    lost = {signed: float((made(64, signed)(x, 1) - x).square().mean()) for signed in (False, True)}
    assert 2 * lost[False] < lost[True]


# ---- layers ----------------------------------------------------------------------------------------------------------
def _layer(kind: str, segments: tuple[int, ...] = (), group: int = 8, **conv: Any) -> Any:
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4, signed=True)), activation=made(group).spec, segments=segments)
    torch.manual_seed(6)
    module = nn.Linear(20, 6) if kind == "linear" else nn.Conv2d(20, 6, conv.pop("kernel", 3), **conv)
    wrapper: Any = QuantLinear if kind == "linear" else QuantConv2d
    layer = wrapper.wrap(module.requires_grad_(False), spec, None, 1)
    tiny.fit_weight(layer)
    layer.face = "sim"
    return layer


def test_packed_equals_simulated_and_nothing_is_stored() -> None:
    cases = [("linear", {}), ("conv", {"padding": 1}), ("conv", {"stride": 2}), ("conv", {"kernel": 1})]
    for kind, choices in cases:
        layer = _layer(kind, **choices)
        x = torch.randn((2, 5, 20) if kind == "linear" else (2, 20, 7, 6), generator=torch.Generator().manual_seed(7))
        codes, packed = layer.stored_codes().clone(), copy.deepcopy(layer)
        packed.pack()
        assert torch.equal(packed(x), layer(x))
        proof = prove_layer(codes, packed, x, layer.weight_tables())
        assert proof["ok"] and proof["activation_codes"]["total"] == x.numel()
        assert "segments of the weight" in proof["kernels"]["cpu-int8"]["skipped"]
        assert not any(key.startswith("input") for key in packed.state_dict())
        assert layer_bytes(tuple(codes.shape), packed.spec, True) == packed.packed_bytes()


def test_integer_products_where_the_weight_has_the_same_groups() -> None:
    """Linear layers and 1x1 convolutions; wider ones mix places of several scales."""
    ran = 0
    for kind, choices in [("linear", {}), ("conv", {"kernel": 1}), ("conv", {"kernel": 1, "stride": 2})]:
        layer = _layer(kind, (8, 8, 4), **choices)
        x = torch.randn((2, 5, 20) if kind == "linear" else (2, 20, 7, 6), generator=torch.Generator().manual_seed(8))
        codes, packed = layer.stored_codes().clone(), copy.deepcopy(layer)
        packed.pack()
        proof = prove_layer(codes, packed, x, layer.weight_tables())
        assert proof["ok"] and proof["kernels"]["cpu-int8"]["accumulators"]["total"] > 0
        assert torch.allclose(cpu.run(packed, x), packed(x), atol=1e-5)
        ran += 1
    wide = _layer("conv", (8, 8, 4), padding=1)
    wide.pack()
    assert ran == 3 and "larger than 1x1" in str(cpu.why_not(wide, "cpu"))


def test_through_an_artifact(tmp_path: Path) -> None:
    model = tiny.text_unet()
    activation = made(8).spec
    layers = {name: s.model_copy(update={"activation": activation}) for name, s in tiny.plan_for(model).layers.items()}
    plan = Plan(layers=layers)
    wrap.wrap(model, plan)
    for layer in wrap.layers(model).values():
        tiny.fit_weight(layer)
    wrap.set_face(model, "sim")
    want = tiny.run(model)
    for layer in wrap.layers(model).values():
        layer.pack()
    again = type(model).from_pretrained(save(model, tmp_path / "out", plan))
    assert torch.equal(tiny.run(again), want) and len(wrap.layers(again)) > 50
    found = [m for m in again.modules() if isinstance(m, ActivationQuantizer)]
    assert len(found) > 50 and all(m.spec == activation and not m.state_dict() for m in found)
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    assert torch.equal(tiny.run(compiled), want)


# ---- recipes ---------------------------------------------------------------------------------------------------------
def _plan(folder: Path, rule: str, pattern: str = "*") -> Plan:
    path = folder / "r.toml"
    path.write_text(f'name = "r"\n[layers]\n"{pattern}" = {{ weight = {{}}, activation = {{ {rule} }} }}\n')
    return make_plan(survey(tiny.text_unet(), tokens=tiny.TOKENS), read_recipe(path, 4, 4)).plan


def test_rules_make_specs_and_are_refused_early(tmp_path: Path) -> None:
    plan = _plan(tmp_path, 'mode = "dynamic", granularity = "token_group"')
    assert {s.activation.group for s in plan.layers.values() if s.activation is not None} == {GROUP} == {64}
    plan = _plan(tmp_path, 'mode = "dynamic", granularity = "token_group", group = 12, signed = true')
    assert {s.activation.group for s in plan.layers.values() if s.activation is not None} == {12}
    assert Plan.from_json(plan.to_json()) == plan and "group" in plan.to_json()["specs"][0]["activation"]
    assert "group" not in _plan(tmp_path, "").to_json()["specs"][0]["activation"]
    refused = [
        ('granularity = "token_group"', "*", "found at run time"), ("group = 8", "*", "a group has a size only"),
        ('mode = "dynamic", granularity = "token_group"', "*:q", "operands"),
        ('mode = "dynamic", granularity = "token_group", position = "output"', "*", "layer's input"),
    ]
    for rule, pattern, why in refused:
        with pytest.raises(InputError, match=why) as found:
            _plan(tmp_path, rule, pattern)
        assert complete(found.value)
    assert len(refused) == 4
