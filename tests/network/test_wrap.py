"""Wrapping a model: shared weights, faces that switch and come back, plans that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLinear
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec


@pytest.mark.parametrize("kind", ["text", "unconditional"])
def test_the_float_face_is_the_model(kind: tiny.Kind) -> None:
    model = tiny.pipeline(kind).unet
    want = tiny.run(model)
    tensors = {n: p.data_ptr() for n, p in model.named_parameters()}
    plan = tiny.plan_for(model)
    wrap.wrap(model, plan)
    assert torch.equal(tiny.run(model), want)
    layers = wrap.layers(model)
    assert set(layers) == set(plan.layers) and {type(m) for m in layers.values()} == {QuantConv2d, QuantLinear}
    for name, layer in layers.items():  # no second copy of the weights
        assert layer.weight.data_ptr() == tensors[f"{name}.weight"]
        assert layer.bias is None or layer.bias.data_ptr() == tensors[f"{name}.bias"]


def test_wrapping_again_replaces_the_specs() -> None:
    model = tiny.text_unet()
    want = tiny.run(model)
    first = wrap.wrap(model, tiny.plan_for(model))
    second = wrap.wrap(model, tiny.plan_for(tiny.text_unet(), 3, split=False))
    assert second is not first and torch.equal(tiny.run(model), want)
    assert {layer.spec.weight.grid.bits for layer in wrap.layers(model).values() if layer.spec.weight} == {3, 8}
    assert all(not layer.spec.segments for layer in wrap.layers(model).values())
    assert len(model._forward_pre_hooks) == 1  # the first clock's hooks are gone


def test_faces_come_back_after_an_exception() -> None:
    model = tiny.text_unet()
    wrap.wrap(model, tiny.plan_for(model, timed=False))
    some = list(wrap.layers(model).values())[3]
    some.face = "sim"
    with pytest.raises(KeyError), wrap.show(model, "sim"):
        assert {m.face for m in wrap.layers(model).values()} == {"sim"}
        raise KeyError
    assert [m.face for m in wrap.layers(model).values()].count("sim") == 1 and some.face == "sim"
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    with pytest.raises(KeyError), wrap.float_activations(model):
        assert not any(q.enabled for q in quantizers)
        raise KeyError
    assert all(q.enabled for q in quantizers) and len(quantizers) == len(wrap.layers(model))


@pytest.mark.parametrize("segments", [(10, 17), (1,), (28, 16, 1), (44, 44)])
def test_segments_that_do_not_make_up_the_input(segments: tuple[int, ...]) -> None:
    name = "up_blocks.1.resnets.0.conv_shortcut"
    plan = Plan(layers={name: LayerSpec(weight=WeightSpec(), segments=segments)})
    for change in (wrap.wrap, wrap.declare):
        with pytest.raises(InputError) as caught:
            change(tiny.text_unet(), plan)
        assert caught.value.where == name and "44" in (caught.value.why or "") and caught.value.try_
    wrap.wrap(tiny.text_unet(), Plan(layers={name: LayerSpec(weight=WeightSpec(), segments=(28, 16))}))


def test_timed_scales_without_a_time_grid() -> None:
    plan = Plan(layers={"conv_in": LayerSpec(activation=ActivationSpec(timed=True))})
    with pytest.raises(InputError, match="no timesteps") as caught:
        wrap.declare(tiny.text_unet(), plan)
    assert caught.value.where == "conv_in"
    model = tiny.text_unet()
    clock = wrap.wrap(model, plan)  # a run wraps before its calibration has said which timesteps there are
    tiny.run(model)
    wrap.set_face(model, "sim")
    with clock.at(500), pytest.raises(InputError, match="grid is empty"):
        wrap.layers(model)["conv_in"].quantize_input(torch.randn(1, 4, 8, 8))


def test_plans_this_release_cannot_run() -> None:
    specs = [
        LayerSpec(rotation="hadamard"),
        LayerSpec(activation=ActivationSpec(granularity="token_group", mode="dynamic")),  # without a size
        LayerSpec(sorted_channels=True),
        LayerSpec(exempt=(1,)),
        LayerSpec(weight=WeightSpec(grid=Grid(kind="log2"))),
        LayerSpec(activation=ActivationSpec(granularity="channel", mode="dynamic")),
        LayerSpec(activation=ActivationSpec(granularity="pixel")),
        LayerSpec(activation=ActivationSpec(granularity="token")),
        LayerSpec(activation=ActivationSpec(lookup="interpolate")),
        LayerSpec(activation=ActivationSpec(time_bits=(4,))),
    ]
    for spec in specs:
        with pytest.raises(InputError, match="cannot run"):
            wrap.wrap(tiny.text_unet(), Plan(layers={"conv_in": spec}))
    assert len(specs) == 10


def test_what_is_not_a_layer() -> None:
    with pytest.raises(InputError, match="GroupNorm cannot be quantized"):
        wrap.wrap(tiny.text_unet(), Plan(layers={"conv_norm_out": LayerSpec(weight=WeightSpec())}))


def test_declared_layers_have_the_packed_shapes() -> None:
    plan = tiny.plan_for(tiny.text_unet(), mixed=True)
    packed = tiny.quantized_model(tiny.text_unet(), plan)
    empty = tiny.text_unet()
    wrap.declare(empty, plan)
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (packed, empty)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 200
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(tiny.run(empty), tiny.run(packed))


def test_clock_is_attached_only_where_needed() -> None:
    model = tiny.text_unet()
    clock = wrap.wrap(model, tiny.plan_for(model, timed=False))
    assert isinstance(clock, Clock) and not model._forward_pre_hooks and not hasattr(model, "bitbrush_clock")
    assert len(survey(model, tokens=5).layers()) == len(wrap.layers(model))  # a wrapped model can still be surveyed
    assert isinstance(model, nn.Module)


def test_a_borrowed_model_comes_back_as_it_was() -> None:
    model = tiny.text_unet()
    before, processors, expected = dict(model.named_modules()), dict(model.attn_processors), tiny.run(model)
    with pytest.raises(ZeroDivisionError), wrap.borrowed(model):
        tiny.quantized_model(model, tiny.plan_for(model, attention=True))
        assert not torch.equal(tiny.run(model), expected) and wrap.layers(model)
        raise ZeroDivisionError
    assert dict(model.named_modules()) == before and model.attn_processors == processors
    assert torch.equal(tiny.run(model), expected) and not hasattr(model, "bitbrush_clock")
    assert not model._forward_pre_hooks and not model._forward_hooks
