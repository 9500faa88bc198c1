"""The softmax on a logarithmic grid: scopes, parts, the start token, training, packed, saved, and through a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import activation_bits
from bitbrush.engine.recipe import load_recipe
from bitbrush.errors import InputError
from bitbrush.network import attention, wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention, install_operands
from bitbrush.network.clock import Clock
from bitbrush.network.log2 import Log2Quantizer
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan
from bitbrush.steps import STEPS
from bitbrush.steps.start_token import start_mass
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, ROUND, SCALES, execute, recipe

SCOPES = ("sample", "head", "tensor")
PARTS = {"one": 1 << 30, "samples": 2 * 2 * 4 * 15 * 15, "heads": 4 * 15 * 15, "smallest": 1}


def spec(bits: int = 4, scope: Any = "sample", exempt: tuple[int, ...] = ()) -> LayerSpec:
    activation = ActivationSpec(grid=Grid(kind="log2", bits=bits), mode="dynamic", scope=scope)
    return LayerSpec(activation=activation, exempt=exempt)


def affine(bits: int = 4) -> LayerSpec:
    return LayerSpec(activation=ActivationSpec(grid=Grid(bits=bits), mode="dynamic"))


def attend(chosen: LayerSpec, cross: bool = True, **operands: LayerSpec) -> Any:
    """An attention of two heads in sim face."""
    torch.manual_seed(0)
    module: Any = Attention(query_dim=16, heads=2, dim_head=8, cross_attention_dim=12 if cross else None).eval()
    install_operands(module, {"softmax": chosen, **operands}, Clock(), 1)
    module.processor.face = "sim"
    return module


def given(cross: bool = True, batch: int = 5) -> dict[str, Tensor | None]:
    """Samples of very different sharpness."""
    g = torch.Generator().manual_seed(1)
    sharp = torch.logspace(-1, 1.5, batch).reshape(-1, 1, 1)
    context = torch.randn(batch, 15, 12, generator=g) if cross else None
    return {"hidden_states": sharp * torch.randn(batch, 15, 16, generator=g), "encoder_hidden_states": context}


def quantizer(scope: str = "sample", exempt: tuple[int, ...] = (), bits: int = 4) -> Log2Quantizer:
    made = spec(bits, scope, exempt)
    assert made.activation is not None
    return Log2Quantizer(made.activation, exempt)


def planted(sink: float = 0.8, index: int = 0, samples: int = 3, seed: int = 0) -> Tensor:
    """Softmax weights ``[samples, 2, 30, 24]``: a sink takes most of every row, words share the rest unevenly."""
    g = torch.Generator().manual_seed(seed)
    words = torch.softmax(2.5 * torch.randn(samples, 2, 30, 23, generator=g), dim=-1)
    share = (sink + 0.1 * torch.rand(samples, 2, 30, 1, generator=g))
    rest = (1 - share) * words
    return torch.cat([rest[..., :index], share, rest[..., index:]], dim=-1)


def uniform(x: Tensor, bits: int) -> Tensor:
    made = affine(bits).activation
    assert made is not None
    out: Tensor = ActivationQuantizer(made)(x, 3)
    return out


# ---- the quantizer -----------------------------------------------------------------------------------------------
def test_delta_has_its_scope() -> None:
    x = planted()
    assert torch.equal(quantizer("sample").delta(x), x.amax((1, 2, 3), keepdim=True))
    assert torch.equal(quantizer("head").delta(x), x.amax((2, 3), keepdim=True))
    assert torch.equal(quantizer("tensor").delta(x), x.amax().reshape(1, 1, 1, 1))
    for scope in SCOPES:
        apart = quantizer(scope, (0,))
        assert torch.equal(apart.delta(x), quantizer(scope).delta(x[..., 1:]))
        assert apart.codes(x).shape == (3, 2, 30, 23) and float(apart.codes(x).max()) <= 15
        assert torch.equal(apart(x[..., :1], 3), x[..., :1]), "nothing but a start token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_start_column_is_float(dtype: torch.dtype) -> None:
    """Item 8: bit-identical where it is exempt; where the sink is elsewhere, exempting column 0 does not help."""
    x = planted().to(dtype)
    out = quantizer(exempt=(0,))(x, 3)
    assert out.dtype == dtype and torch.equal(out[..., 0], x[..., 0]) and not torch.equal(out[..., 1:], x[..., 1:])
    assert not torch.equal(quantizer()(x, 3)[..., 0], x[..., 0])
    if dtype == torch.float32:
        moved = planted(index=5)
        here = float((quantizer(exempt=(0,))(x, 3) - x).norm())
        there = float((quantizer(exempt=(0,))(moved, 3) - moved).norm())
        assert there > 2 * here
        same = torch.cat([moved[..., 5:6], moved[..., :5], moved[..., 6:]], dim=-1)
        assert torch.equal(same, x), "the same weights, in another order"


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("sink", [0.1, 1.0])
def test_log_against_uniform_on_peaked_attention(bits: int, sink: float) -> None:
    """Item C, the error of the product with v, where the sink's value is small or like any other.

    4 bits: with the start token float, octaves are better by far; without, only where the sink's value is small,
    because a large weight is rounded as coarsely as the others. 6 and 8 bits: uniform is better. It gains with every
    bit, and the error of octaves does not fall.
    """
    x, g = planted(), torch.Generator().manual_seed(3)
    v = torch.randn(3, 2, 24, 8, generator=g)
    v[:, :, 0] *= sink

    def error(rounded: Tensor) -> float:
        return float((rounded @ v - x @ v).norm() / (x @ v).norm())

    apart, whole = error(quantizer(exempt=(0,), bits=bits)(x, 3)), error(quantizer(bits=bits)(x, 3))
    even = error(uniform(x, bits))
    assert apart < whole and (apart < 0.6 * even) == (bits == 4)
    assert (whole < even) == (bits == 4 and sink < 1)
    if bits > 4:
        assert even < (0.7 if bits == 6 else 0.2) * apart
    four = error(quantizer(exempt=(0,), bits=4)(x, 3))
    assert apart == pytest.approx(four, rel=1e-3), "more bits do not help"


# ---- in attention ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", SCOPES)
def test_batch_mates(scope: str) -> None:
    """Item 9: one picture's attention is its own, unless the whole batch shares a delta."""
    module, inputs = attend(spec(scope=scope)), given()
    with torch.no_grad():
        together = module(**inputs)
        alone = torch.cat([module(**{k: None if t is None else t[i : i + 1] for k, t in inputs.items()})
                           for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-6) == (scope != "tensor")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_parts_are_the_whole(scope: str, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = 0
    for cross, exempt in ((False, ()), (True, ()), (True, (0,))):
        for others in ({}, {"q": affine(), "k": affine(8), "v": affine()}):
            module, inputs = attend(spec(scope=scope, exempt=exempt), cross, **others), given(cross)
            found = []
            for part in (PARTS["one"], PARTS[parts]):
                monkeypatch.setattr(attention, "PART", part)
                with torch.no_grad():
                    found.append(module(**inputs))
                x = inputs["hidden_states"].detach().requires_grad_(True)  # type: ignore[union-attr]
                out = module(**{**inputs, "hidden_states": x})
                assert torch.equal(out, found[-1])
                found.append(torch.autograd.grad(out.square().sum(), x)[0])
            assert torch.equal(found[0], found[2]) and found[1].any()
            assert torch.allclose(found[1], found[3], rtol=1e-4, atol=1e-5)
            ran += 1
    assert ran == 6


def test_no_part_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a delta of the whole batch: it takes a first pass; without need there is none."""
    seen: list[int] = []
    weights = attention._weights

    def spy(q: Tensor, *others: Any) -> Tensor:
        seen.append(q.shape[0] * q.shape[1])
        return weights(q, *others)

    monkeypatch.setattr(attention, "_weights", spy)
    expected = {"one": (1, 1, 1), "samples": (3, 3, 6), "heads": (20, 10, 20)}
    for parts, counts in expected.items():
        monkeypatch.setattr(attention, "PART", PARTS[parts])
        for scope, count in zip(SCOPES, counts, strict=True):
            seen.clear()
            with torch.no_grad():
                attend(spec(scope=scope))(**given())
            assert len(seen) == count and max(seen) == {"one": 10, "samples": 4, "heads": 1}[parts], (parts, scope)


def test_gradients_are_those_of_the_definition() -> None:
    """Straight-through: as if the weights were as they are, where the grid reaches them."""
    module, inputs = attend(spec(bits=2)), given()
    x = inputs["hidden_states"]
    assert x is not None
    got = torch.autograd.grad(module(**{**inputs, "hidden_states": x.requires_grad_(True)}).square().sum(), x)[0]

    def slow(self: Log2Quantizer, weights: Tensor, _delta: Tensor | None, _dtype: torch.dtype) -> Tensor:
        top = weights.detach().amax((1, 2, 3), keepdim=True)
        rounded = top * torch.exp2(-torch.round(-torch.log2(weights.detach() / top)).clamp(0, 3))
        inside = (weights > top * 2**-3.5).float()
        return rounded + (weights - weights.detach()) * inside

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log2Quantizer, "round_trip", slow)
        out = module(**{**inputs, "hidden_states": x})
        want = torch.autograd.grad(out.square().sum(), x)[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5) and got.any()


def test_float16_takes_the_codes_of_float32() -> None:
    """The logarithm is taken before the softmax becomes float16, which has few bits left of small weights."""
    processor = attend(spec(bits=6)).processor
    score = torch.tensor([0.0, -16.264, -30.0])  # the second weight is 1.45 times float16's smallest number
    q, v = torch.zeros(1, 1, 1, 4).half(), torch.eye(3).reshape(1, 1, 3, 3).half() * 1000
    with torch.no_grad():
        out = processor._product(q, q.expand(1, 1, 3, 4), v, score.reshape(1, 1, 1, 3))
    weights = torch.softmax(score, 0).reshape(1, 1, 1, 3)
    assert out.dtype == torch.float16 and torch.equal(out, processor.softmax(weights, 3).half() @ v)
    assert float(processor.softmax.codes(weights)[..., 1]) == 23 and float(out[..., 1]) > 0
    assert float(processor.softmax.codes(weights.half())[..., 1]) == 24


# ---- in a network, packed and saved -------------------------------------------------------------------------------
def model_with(scope: str = "sample", pack: bool = False) -> tuple[Any, Plan]:
    model = tiny.text_unet()
    layers = dict(tiny.plan_for(model, dynamic=True).layers)
    for site in survey(model, tokens=tiny.TOKENS).attentions():
        exempt = (0,) if site.name.endswith("attn2") else ()
        layers[f"{site.name}:softmax"] = spec(4, scope, exempt)
    plan = Plan(layers=layers)
    wrap.wrap(model, plan)
    for layer in wrap.layers(model).values():
        tiny.fit_weight(layer)
        if pack:
            layer.pack()
    wrap.set_face(model, "packed" if pack else "sim")
    return model, plan


@pytest.mark.parametrize("scope", SCOPES)
def test_packed_equals_sim_and_comes_back_from_disk(scope: str, tmp_path: Path) -> None:
    """Item 11."""
    (sim, _), (packed, plan) = model_with(scope), model_with(scope, pack=True)
    want = tiny.run(sim)
    assert torch.equal(tiny.run(packed), want) and bool(torch.isfinite(want).all())
    folder = save(packed, tmp_path / "out", plan)
    again = type(packed).from_pretrained(folder)
    assert torch.equal(tiny.run(again), want)
    loaded = {n: m for n, m in again.named_modules() if isinstance(m, Log2Quantizer)}
    assert len(loaded) == 8 and {m.exempt for m in loaded.values()} == {(), (0,)}
    assert {m.spec.scope for m in loaded.values()} == {scope} and not any(m.state_dict() for m in loaded.values())
    with wrap.float_activations(packed):
        assert not torch.equal(tiny.run(packed), want)
    half = type(packed).from_pretrained(folder, torch_dtype=torch.float16)
    assert bool(torch.isfinite(tiny.run(half)).all())


def test_compiled() -> None:
    torch._dynamo.reset()
    module, inputs = attend(spec(exempt=(0,))), given()
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), module(**inputs))


def test_a_start_token_is_for_cross_attention() -> None:
    with pytest.raises(InputError, match="start token") as caught:
        attend(spec(exempt=(0,)), cross=False)
    assert "attn2" in (caught.value.try_ or "")
    with pytest.raises(InputError, match="logarithmic") as caught:
        wrap.wrap(tiny.text_unet(), Plan(layers={"conv_in": spec()}))
    assert caught.value.where == "conv_in"


# ---- recipes -------------------------------------------------------------------------------------------------------
RULES = '''"*attn1:softmax" = { activation = { bits = 4, mode = "dynamic", grid = "log2", scope = "head" } }
"*attn2:softmax" = { activation = { bits = 4, mode = "dynamic", grid = "log2", exempt = [0] } }
"*:q" = { activation = {} }
'''
TUNE = '[[step]]\ndo = "finetune"\niterations = 2\nbatch = 2\n'


def test_the_recipes_text(tmp_path: Path) -> None:
    made = recipe(tmp_path, HEAD + RULES)
    path = tmp_path / "again.toml"
    path.write_text(made.to_toml())
    assert load_recipe(path, STEPS).layers == made.layers and "exempt = [0]" in made.to_toml()
    for wrong in ('exempt = ["0"]', "exempt = [-1]", 'scope = "prompt"', 'grid = "codebook"'):
        with pytest.raises(InputError):
            recipe(tmp_path, HEAD + f'"*:softmax" = {{ activation = {{ mode = "dynamic", {wrong} }} }}\n')
    with pytest.raises(InputError, match="logarithmic") as caught:
        execute(tmp_path, tiny.pipeline("text"), HEAD + '"*:q" = { activation = { grid = "log2" } }\n' + FIT)
    assert "attn1:q" in (caught.value.where or "")


def test_a_recipe_with_a_logarithmic_softmax(tmp_path: Path) -> None:
    """Steps that fit, reconstruct, tune, pack and prove leave its quantizers alone and train through them."""
    steps = CALIBRATE + FIT + ROUND + RANGES + SCALES + TUNE + PACK
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + RULES + steps)
    found = {n: m for n, m in run.model.named_modules() if isinstance(m, Log2Quantizer)}
    assert len(found) == 8 and all(m.enabled and not m._forward_pre_hooks for m in found.values())
    for name, chosen in run.plan.layers.items():
        assert chosen.exempt == ((0,) if name.endswith("attn2:softmax") else ())
        if name.endswith(":softmax"):
            assert activation_bits(chosen) == 4
    assert bool(torch.isfinite(tiny.run(run.model)).all())


# ---- the start token ----------------------------------------------------------------------------------------------
def test_start_mass_of_planted_attention(tmp_path: Path) -> None:
    """Zero queries: every column has the same share; and nothing stays behind."""
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + RULES + CALIBRATE)
    names = [n for n, m in run.model.named_modules() if isinstance(m, Attention) and n.endswith("attn2")]
    processors = {n: run.model.get_submodule(n).processor for n in names}
    before, faces = tiny.run(run.model), {m.face for m in processors.values()}
    free = start_mass(run, 6)
    assert list(free) == names and len(names) == 4 and all(0 < share < 1 for share in free.values())
    queries = [run.model.get_submodule(f"{n}.to_q").float_weight for n in names]
    with torch.no_grad():
        for weight in queries:
            weight.zero_()
    assert start_mass(run, 6) == pytest.approx(dict.fromkeys(names, 1 / tiny.TOKENS))
    assert {n: run.model.get_submodule(n).processor for n in names} == processors
    assert {m.face for m in processors.values()} == faces and not torch.equal(tiny.run(run.model), before)


def test_start_mass_finds_a_sink(tmp_path: Path) -> None:
    """A network whose attention is float: the processor is diffusers' own, before and after."""
    pipe = tiny.pipeline("text")
    run = execute(tmp_path, pipe, HEAD + CALIBRATE)
    attention_ = next(m for n, m in run.model.named_modules() if n.endswith("attn2"))

    def sink(module: Any, args: Any, kwargs: Any, mask: Tensor) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    for bias, want in ((0.0, None), (-1e4, 1.0)):
        mask = torch.full((1, 1, tiny.TOKENS), bias)
        mask[..., 0] = 0
        handle = attention_.register_forward_pre_hook(
            lambda m, a, k, mask=mask: sink(m, a, k, mask.expand(len(k["encoder_hidden_states"]), -1, -1)),
            with_kwargs=True,
        )
        share = next(iter(start_mass(run, 4).values()))
        handle.remove()
        assert share == pytest.approx(want) if want else share < 0.9
    assert isinstance(attention_.processor, AttnProcessor2_0) and not isinstance(attention_.processor, QuantAttention)


def test_no_cross_attention_no_start_token(tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.pipeline("unconditional"), HEAD + CALIBRATE)
    assert start_mass(run) == {}
