"""Attention in parts: the same bits and gradients as in one piece, and nothing of its size kept for backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

import tiny
from bitbrush.network import attention, wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import OPERANDS, QuantAttention, install_operands, softmax_in_training
from bitbrush.network.clock import Clock
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec

TIMES = (1.0, 500.0, 999.0)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unconditional": {"norm_num_groups": 4, "residual_connection": True, "bias": True, "rescale_output_factor": 2.0},
    "cross": {"cross_attention_dim": 12},
    "qk norm": {"qk_norm": "layer_norm"},
}
PARTS = {"one": 1 << 30, "samples": 2 * 2 * 4 * 15 * 15, "heads": 4 * 15 * 15, "smallest": 1}


class Case:
    """An attention with quantized operands, trial tables on all of them, and inputs."""

    def __init__(self, form: str = "plain", *, timed: bool = False, masked: bool = False, batch: int = 5,
                 operands: tuple[str, ...] = OPERANDS, trial: bool = True, **choices: Any) -> None:
        torch.manual_seed(0)
        self.module: Any = Attention(query_dim=16, heads=2, dim_head=8, **FORMS[form]).eval()
        self.clock = Clock(TIMES if timed else ())
        spec = LayerSpec(activation=ActivationSpec(grid=Grid(bits=4), timed=timed, **choices))
        install_operands(self.module, dict.fromkeys(operands, spec), self.clock, len(TIMES) if timed else 1)
        self.processor = cast(QuantAttention, self.module.processor)
        self.processor.face = "sim"
        self.tables: dict[str, Tensor] = {}
        for name in operands:
            quantizer = getattr(self.processor, name)
            if quantizer.spec.mode == "static":
                self._fit(name, quantizer, trial)
        self.x = torch.randn(batch, 16, 3, 5) if form == "unconditional" else torch.randn(batch, 15, 16)
        self.x.requires_grad_(True)
        self.context = torch.randn(batch, 15, 12) if form == "cross" else None
        self.mask = torch.randn(batch, 1, 15) if masked else None
        self.times = torch.linspace(0, 999, batch) if timed else None

    def _fit(self, name: str, quantizer: ActivationQuantizer, trial: bool) -> None:
        rows = quantizer.scale.shape
        low = 0.02 if name == "softmax" else 0.15
        zero = 0.0 if name == "softmax" else 7.0
        quantizer.set_scale(low + 0.1 * low * torch.rand(rows), torch.full(rows, zero))
        if trial:
            quantizer.trial_scale = self.tables[f"{name}.scale"] = quantizer.scale.clone().requires_grad_(True)
            free = (zero + torch.rand(rows)).requires_grad_(True)
            quantizer.trial_zero_point = self.tables[f"{name}.zero"] = free

    def __call__(self) -> Tensor:
        with nullcontext() if self.times is None else self.clock.at(self.times):
            out = self.module(self.x, encoder_hidden_states=self.context, attention_mask=self.mask)
        assert isinstance(out, Tensor)
        return out

    def gradients(self) -> dict[str, Tensor]:
        """Of a loss, after the clock was cleared; by parameter, table and input."""
        wanted = {"x": self.x, **dict(self.module.named_parameters()), **self.tables}
        out = self()
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad((out.float() * weight).sum(), list(wanted.values()), allow_unused=True)
        return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


def whole(self: QuantAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The definition: everything at once, every operand by its own quantizer, autograd keeping what it likes."""
    def quantized(name: str, t: Tensor) -> Tensor:
        quantizer = getattr(self, name)
        return t if quantizer is None else quantizer(t, 3)

    scores = quantized("q", q) @ quantized("k", k).transpose(-1, -2) * (q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores + mask
    return quantized("softmax", torch.softmax(scores.float(), dim=-1).to(v.dtype)) @ quantized("v", v)


def saved_sizes(case: Case) -> list[int]:
    """Sizes of the tensors that one training forward keeps for backward."""
    sizes: list[int] = []

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = case()
    assert out.requires_grad
    return sizes


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_parts(form: str, timed: bool, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PART", PARTS[parts])
    ran = 0
    for masked in (False, True):
        case = Case(form, timed=timed, masked=masked)
        got, out = case.gradients(), case()
        with monkeypatch.context() as patch:
            patch.setattr(QuantAttention, "_product", whole)
            want, expected = case.gradients(), case()
        assert torch.equal(out, expected)
        tables = {f"{name}.{table}" for name in OPERANDS for table in ("scale", "zero")}
        assert got.keys() == want.keys() and tables | {"x", "to_q.weight"} <= got.keys()
        assert all(got[name].any() for name in tables if name != "softmax.zero")
        for name in want:
            assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-5), name
        ran += 1
    assert ran == 2


@pytest.mark.parametrize("parts", PARTS)
def test_inference_in_parts_is_the_same_bits(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices: list[dict[str, Any]] = [
        {"trial": False}, {"trial": True}, {"timed": True}, {"operands": ("q", "softmax")}, {"operands": ("v",)},
        {"mode": "dynamic"}, {"mode": "dynamic", "granularity": "token"}, {"batch": 1}, {"batch": 16, "timed": True},
    ]
    ran = 0
    for choice in choices:
        for form in FORMS:
            case = Case(form, masked=form == "cross", **choice)
            with torch.no_grad():
                monkeypatch.setattr(attention, "PART", PARTS[parts])
                got = case()
                with monkeypatch.context() as patch:
                    patch.setattr(QuantAttention, "_product", whole)
                    assert torch.equal(got, case()), (choice, form)
                case.processor.face = "packed"
                assert torch.equal(got, case())
            ran += 1
    assert ran == len(choices) * len(FORMS)


def test_bits_do_not_depend_on_parts_at_a_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 256, 4, 16).transpose(1, 2) for _ in range(3))
    processor, found = Case(trial=False).processor, []
    for part in (1 << 30, 2 * 4 * 4 * 256 * 256, 4 * 4 * 256 * 256, 3 * 4 * 256 * 256, 1):
        monkeypatch.setattr(attention, "PART", part)
        with torch.no_grad():
            found.append(processor._product(q, k, v, None))
    assert len(found) == 5 and all(torch.equal(found[0], other) for other in found[1:])


def test_hooks_on_quantizers_see_whole_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is how ranges are fitted; the quantizers may be switched off."""
    monkeypatch.setattr(attention, "PART", 1)
    ran = 0
    for enabled in (True, False):
        case, seen, handles = Case(trial=False), list[tuple[str, tuple[int, ...]]](), []
        with torch.no_grad():
            for name in OPERANDS:
                quantizer = getattr(case.processor, name)
                quantizer.enabled = enabled
            expected = case()
            for name in OPERANDS:
                handles.append(getattr(case.processor, name).register_forward_pre_hook(
                    lambda _m, args, name=name, seen=seen: seen.append((name, tuple(args[0].shape)))
                ))
            assert torch.equal(case(), expected)
            small, large = (5, 2, 15, 8), (5, 2, 15, 15)
            assert sorted(seen) == [("k", small), ("q", small), ("softmax", large), ("v", small)]
            for handle in handles:
                handle.remove()
            assert torch.equal(case(), expected) and len(seen) == 4
        ran += 1
    assert ran == 2


def test_no_part_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    explicit = attention._explicit

    def spy(q: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(q.shape[:2]))
        return explicit(q, *others)

    monkeypatch.setattr(attention, "_explicit", spy)
    for part, shapes in (("one", {(5, 2)}), ("samples", {(2, 2), (1, 2)}), ("heads", {(1, 1)}), ("smallest", {(1, 1)})):
        seen.clear()
        monkeypatch.setattr(attention, "PART", PARTS[part])
        with torch.no_grad():
            Case()()
        assert set(seen) == shapes and sum(b * h for b, h in seen) == 10
    seen.clear()
    with torch.no_grad():
        Case(mode="dynamic")()
    assert seen == [(5, 2)], "one softmax scale for the whole batch"


@pytest.mark.parametrize("parts", PARTS)
def test_nothing_of_the_size_of_the_scores_is_kept(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PART", PARTS[parts])
    length, ran = 64, 0
    choices: list[dict[str, Any]] = [
        {}, {"timed": True}, {"masked": True}, {"operands": ("q", "k", "v")}, {"form": "unconditional"},
    ]
    for choice in choices:
        case = Case(batch=3, **choice)
        shape = (3, 16, 8, 8) if "form" in choice else (3, length, 16)
        case.x = torch.randn(shape, requires_grad=True)
        case.mask = None if case.mask is None else torch.randn(3, 1, length)
        assert saved_sizes(case) and max(saved_sizes(case)) < length * length
        with monkeypatch.context() as patch:
            patch.setattr(QuantAttention, "_product", whole)
            assert max(saved_sizes(case)) >= 3 * 2 * length * length
        ran += 1
    assert ran == 5


@pytest.mark.parametrize("rounding", [False, True], ids=["scales", "rounding"])
def test_no_scores_are_kept_in_a_network(rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training forward as `reconstruct` and `finetune` make it: with quantizers on, and off while rounding."""
    plan = tiny.plan_for(tiny.text_unet(), attention=True)
    model = tiny.quantized_model(tiny.text_unet(), plan, pack=False)
    inputs, shapes = tiny.inputs(model), list[tuple[int, ...]]()
    inputs["sample"] = torch.randn(2, 4, 8, 10, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    def train() -> bool:
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(timestep=torch.tensor(500), **inputs)
        assert len(shapes) > 50
        return any(shape[-2:] == (80, 80) for shape in shapes)  # positions of the largest attention

    with wrap.float_activations(model) if rounding else nullcontext():
        assert not train()
        monkeypatch.setattr(QuantAttention, "_product", whole)
        assert train()


def test_under_autocast_backward_computes_in_the_same_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputation happens outside the autocast block."""
    dtypes: list[torch.dtype] = []
    softmax = torch.softmax

    def spy(x: Tensor, dim: int) -> Tensor:
        out = softmax(x, dim=dim)
        dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(attention, "PART", PARTS["samples"])
    found = []
    for form in (QuantAttention._product, whole):
        case = Case(timed=True)
        with monkeypatch.context() as patch:
            patch.setattr(QuantAttention, "_product", form)
            patch.setattr(torch, "softmax", spy)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                out = case()
            assert out.dtype == torch.bfloat16
            found.append(torch.autograd.grad(out.float().square().sum(), [case.x, *case.tables.values()]))
    assert len(dtypes) == 7 and set(dtypes) == {torch.float32}, "three parts, again in backward, and the whole"
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm() / (want.norm() + 1e-6)) < 0.02


def test_float_softmax_is_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients: no softmax quantizer, its scale gets nothing; without: the exact form."""
    ran = 0
    for form in FORMS:
        for masked in (False, True):
            case = Case(form, timed=True, masked=masked)
            with torch.no_grad():
                exact = case()
            with softmax_in_training(case.module, "float"):
                assert case.processor.training_softmax == "float"
                out, got = case(), case.gradients()
                with torch.no_grad():
                    assert torch.equal(case(), exact)
                case.processor.face = "packed"
                assert torch.allclose(case(), exact, atol=1e-6), "only the face that is trained is approximated"
                case.processor.face = "sim"
            assert case.processor.training_softmax == "exact"
            assert not any(name.startswith("softmax") for name in got)
            with monkeypatch.context() as patch:
                patch.setattr(QuantAttention, "_product", whole)
                case.processor.softmax.enabled = False
                expected, reference = case(), case.gradients()
            assert torch.allclose(out, expected, atol=1e-5) and not torch.allclose(out, exact, atol=1e-5)
            assert reference.keys() == got.keys() and len(got) >= 11
            for name, gradient in reference.items():
                assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-4), name
            ran += 1
    assert ran == 2 * len(FORMS)


def test_compiled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, over changing times, whose numbers are those without parts."""
    plan = tiny.plan_for(tiny.text_unet(), attention=True)
    model = tiny.quantized_model(tiny.text_unet(), plan)
    monkeypatch.setattr(attention, "PART", PARTS["one"])
    whole = [tiny.run(model, time) for time in (1, 999)]
    monkeypatch.setattr(attention, "PART", 1000)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.run(compiled, 1), whole[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(tiny.run(compiled, 999), whole[1])
    assert torch.equal(tiny.run(model, 1), whole[0]) and not torch.equal(*whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["exact", "float"])
def test_captured_in_a_graph(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training iteration under bf16 autocast as a CUDA graph: the same gradients as eager, little memory."""
    monkeypatch.setattr(attention, "PART", 4 * 2 * 1024 * 1024 * 2)
    case = Case(timed=True, batch=16)
    case.module.cuda()
    case.clock.cuda()
    for name, table in case.tables.items():
        operand, kind = name.split(".")
        leaf = case.tables[name] = table.detach().cuda().requires_grad_(True)
        setattr(getattr(case.processor, operand), {"scale": "trial_scale", "zero": "trial_zero_point"}[kind], leaf)
    case.x = torch.randn(16, 1024, 16, device="cuda", requires_grad=True)
    case.times = torch.linspace(0, 999, 16, device="cuda")
    wanted = [case.x, *(t for n, t in case.tables.items() if form == "exact" or not n.startswith("softmax"))]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            out = case()
        return torch.autograd.grad(out.float().square().mean(), wanted)

    with softmax_in_training(case.module, form):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager = [g.clone() for g in step()]
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * 2 * 1024 * 1024 * 4 * 2, "less than two of all scores"
    for got, want in zip(captured, eager, strict=True):
        assert float((got - want).norm() / (want.norm() + 1e-9)) < 1e-2
