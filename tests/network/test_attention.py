"""Attention operands: the float face is the original processor, the others compute the same attention, quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

import tiny
from bitbrush.errors import BitbrushError, InputError
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import OPERANDS, QuantAttention, install_operands
from bitbrush.network.clock import Clock
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan


def attention(**choices: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **choices).eval()


def specs(bits: int = 8, names: tuple[str, ...] = OPERANDS, **choices: Any) -> dict[str, LayerSpec]:
    return {name: LayerSpec(activation=ActivationSpec(grid=Grid(bits=bits), **choices)) for name in names}


def fit(module: Attention, bits: int = 8) -> None:
    for quantizer in (m for m in module.processor.modules() if isinstance(m, ActivationQuantizer)):
        if quantizer.spec.mode == "static":
            quantizer.set_scale(
                torch.full_like(quantizer.scale, 8 / 2**bits), torch.full_like(quantizer.zero_point, 2 ** (bits - 1))
            )


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "group norm": {"norm_num_groups": 4},
    "qk norm": {"qk_norm": "layer_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 2.0},
    "cross": {"cross_attention_dim": 12},
    "cross norm": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picture", [False, True])
def test_explicit_attention_equals_the_processor(form: str, picture: bool) -> None:
    """All operands switched off: what is computed is diffusers' attention."""
    module = attention(**FORMS[form])
    x = torch.randn(2, 16, 3, 5) if picture else torch.randn(2, 15, 16)
    context = torch.randn(2, 7, 12) if "cross" in form else None
    mask = torch.zeros(2, 1, 7 if context is not None else 15).masked_fill_(
        torch.rand(2, 1, 7 if context is not None else 15) < 0.3, -1e4
    )
    ran = 0
    for given in (None, mask):
        with torch.no_grad():
            want = module(x, encoder_hidden_states=context, attention_mask=given)
            install_operands(module, specs(), Clock(), 1)
            assert torch.equal(module(x, encoder_hidden_states=context, attention_mask=given), want)  # float face
            module.processor.face = "sim"
            for quantizer in module.processor.modules():
                if isinstance(quantizer, ActivationQuantizer):
                    quantizer.enabled = False
            got = module(x, encoder_hidden_states=context, attention_mask=given)
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5), (form, (got - want).abs().max())
        module.set_processor(AttnProcessor2_0())
        ran += 1
    assert ran == 2


def test_each_operand_is_quantized_alone() -> None:
    x, ran = torch.randn(2, 15, 16, generator=torch.Generator().manual_seed(1)), 0
    for bits in (8, 4, 2):
        for name in OPERANDS:
            module = attention()
            with torch.no_grad():
                want = module(x)
                install_operands(module, specs(bits, (name,), mode="dynamic"), Clock(), 1)
                module.processor.face = "sim"
                error = float((module(x) - want).abs().max())
            assert 0 < error < 2.0 ** (1 - bits), (bits, name, error)
            assert [n for n in OPERANDS if getattr(module.processor, n) is not None] == [name]
            ran += 1
    assert ran == 12


def test_sim_equals_packed_in_a_network() -> None:
    for timed in (False, True):
        plan = tiny.plan_for(tiny.text_unet(), attention=True, timed=timed)
        sim = tiny.quantized_model(tiny.text_unet(), plan, pack=False)
        packed = tiny.quantized_model(tiny.text_unet(), plan)
        assert torch.equal(tiny.run(sim), tiny.run(packed))
        without = tiny.quantized_model(tiny.text_unet(), tiny.plan_for(tiny.text_unet(), timed=timed))
        assert not torch.equal(tiny.run(packed), tiny.run(without))


def test_faces_switch_with_the_model() -> None:
    model = tiny.plain_unet()
    before = tiny.run(model)
    names = [f"{s.name}:{o}" for s in survey(model).attentions() for o in OPERANDS]
    wrap.wrap(
        model,
        Plan(layers={name: LayerSpec(activation=ActivationSpec(mode="dynamic", grid=Grid(bits=3))) for name in names}),
    )
    processors = [m for m in model.modules() if isinstance(m, QuantAttention)]
    assert len(processors) == len(names) // 4 >= 4
    assert torch.equal(tiny.run(model), before)
    with wrap.show(model, "sim"):
        assert {p.face for p in processors} == {"sim"} and not torch.equal(tiny.run(model), before)
        with wrap.float_activations(model):
            assert torch.allclose(tiny.run(model), before, atol=1e-4)
    assert {p.face for p in processors} == {"float"} and torch.equal(tiny.run(model), before)


def test_wrapping_again_keeps_the_original_processor() -> None:
    module = attention()
    original = module.processor
    for _ in range(3):
        install_operands(module, specs(), Clock(), 1)
    assert module.processor.original is original


def test_what_is_not_an_operand() -> None:
    with pytest.raises(InputError) as caught:
        install_operands(attention(), specs(names=("q", "scores")), Clock(), 1)
    assert "scores" in (caught.value.where or "") and "softmax" in (caught.value.why or "")
    model = tiny.text_unet()
    plan = Plan(layers={"conv_in:q": LayerSpec(activation=ActivationSpec())})
    with pytest.raises(BitbrushError):
        wrap.wrap(model, plan)


def test_timed_operands_follow_the_clock() -> None:
    module, clock = attention(), Clock((1.0, 999.0))
    install_operands(module, specs(timed=True), clock, 2)
    fit(module)
    module.processor.q.set_scale(torch.tensor([[0.01], [1.0]]), torch.tensor([[128], [128]]))
    module.processor.face = "sim"
    x = torch.randn(1, 4, 16)
    out: list[Tensor] = []
    for t in (1, 999):
        with clock.at(t), torch.no_grad():
            out.append(module(x))
    assert not torch.equal(*out)
    with pytest.raises(InputError, match="clock"):
        module(x)
