"""Attention on codes: the Triton kernel in the interpreter, the definition against the simulation, who is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from attention_cases import Case
from bitbrush import kernels
from bitbrush.kernels import attention_ops, gpu_decode
from bitbrush.network import wrap
from bitbrush.network.attention import OPERANDS, _explicit, install_operands
from bitbrush.network.clock import Clock
from bitbrush.numbers.codec import encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan
from interpreter import TRITON, interpreted
from operations import Operations

SOURCE = Path(__file__).resolve().parents[2] / "src"
TIMES = (1.0, 500.0, 999.0)


def _interpreted(*args: str) -> dict[str, Any]:
    return interpreted("interpreted_attention.py", *args)


@TRITON
def test_integers_in_the_interpreter_are_the_definitions() -> None:
    found = _interpreted()
    assert found["cases"] == found["sums_equal"] == found["totals_equal"] == found["output_equal"] == 8
    assert found["codes"] > 50_000 and found["kinds"] > 200
    assert found["most"] <= 1 and found["apart"] <= 5  # one in ten thousand, where an exponential differs


@TRITON
@pytest.mark.parametrize("fault", ["zero-q", "zero-k", "zero-v", "zero-p", "stale-time", "floor", "one-more",
                                   "padded-scores", "padded-codes", "order-of-keys", "heads"])
def test_a_planted_fault_shows(fault: str) -> None:
    found = _interpreted(fault)
    assert min(found["sums_equal"], found["totals_equal"]) <= 3 or found["apart"] > 1000


def test_the_error_of_a_gpus_exponential_moves_few_codes_by_one() -> None:
    """``ex2.approx`` is within 2**-22 of its value; put in at random, with another order of the sum."""
    total = apart = most = 0
    for seed, shape in enumerate(((1, 4, 512, 512, 64), (1, 4, 512, 77, 64), (1, 2, 700, 700, 40))):
        case, g = Case(*shape, seed=seed), torch.Generator().manual_seed(seed)
        scale = case.tables[3].scale[2] / 10  # so that all codes occur
        case.tables[3] = replace(case.tables[3], scale=case.tables[3].scale / 10)
        inverse = reciprocal(case.tables[3].scale)
        kept = attention_ops.plain_parts(case.q, case.k, case.v, case.tables, inverse, 255, 1, shape[1], shape[4])
        factor = case.tables[0].scale[2] * case.tables[1].scale[2]
        scores = (kept.sums.float() * factor) * shape[4] ** -0.5
        power = (scores - scores.amax(-1, keepdim=True)) * torch.tensor(1.4426950408889634)
        error = (torch.rand(power.shape, generator=g, dtype=torch.float64) * 2 - 1) * 2.0**-22
        found = (torch.exp2(power.double()) * (1 + error)).float()
        share = reciprocal(scale) / found.flip(-1).sum(-1, keepdim=True)
        codes = encode(found * share, torch.ones(()), torch.zeros(()), 255)
        off = (codes - kept.codes).abs()
        total, apart, most = total + off.numel(), apart + int((off > 0).sum()), max(most, int(off.max()))
        assert kept.codes.unique().numel() > 200
    assert total > 2_000_000 and most <= 1 and apart < 20


# ---- attentions ------------------------------------------------------------------------------------------------------
def packed(
    bits: int = 8, specs: dict[str, dict[str, Any]] | None = None, size: int = 8, timed: bool = True, **choices: Any
) -> Attention:
    """An attention with all operands quantized, in packed face, computed on codes; ranges of what is usual."""
    torch.manual_seed(0)
    module = Attention(query_dim=16, heads=2, dim_head=size, **choices).eval()
    chosen = {name: {"grid": Grid(bits=bits), "timed": timed, **(specs or {}).get(name, {})} for name in OPERANDS}
    exempt = {name: options.pop("exempt", ()) for name, options in chosen.items()}
    made = {name: LayerSpec(activation=ActivationSpec(**options), exempt=exempt[name])
            for name, options in chosen.items()}  # fmt: skip
    install_operands(module, made, Clock(TIMES), len(TIMES))
    g, top = torch.Generator().manual_seed(1), (1 << bits) - 1
    for name in OPERANDS:
        quantizer = getattr(module.processor, name)
        if quantizer is not None and quantizer.spec.mode == "static":
            span, zero = (0.5, 0) if name == "softmax" else (3.0, (top + 1) // 2)
            scale = (torch.rand(quantizer.scale.shape, generator=g) * 0.2 + 1) * span / top
            quantizer.set_scale(scale, torch.full_like(quantizer.zero_point, zero))
    module.processor.face, module.processor.kernel = "packed", "cuda-int8"
    return module


def inputs(cross: bool, batch: int = 2, tokens: int = 37) -> tuple[Tensor, Tensor | None]:
    """Tokens, and those of a context."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, tokens, 16, generator=g) * 2
    return x, torch.randn(batch, 7, 12, generator=g) * 2 if cross else None


def called(module: Attention, x: Tensor, context: Tensor | None = None, **more: Any) -> tuple[Tensor, int]:
    """The output at a timestep, and how often the operation was called."""
    operations = Operations()
    with operations, module.processor.q._clock[0].at(torch.tensor(500.0)):
        out = module(x, encoder_hidden_states=context, **more)
    return out, operations.count["int8_attention"]


@pytest.mark.parametrize("form", [{}, {"cross_attention_dim": 12}, {"qk_norm": "layer_norm"}, {"size": 40},
                                  {"bits": 4}, {"timed": False}])
def test_outputs_are_those_of_the_simulation_but_where_a_code_falls_to_its_other_side(form: dict[str, Any]) -> None:
    module = packed(**form)
    x, context = inputs("cross_attention_dim" in form)
    with torch.no_grad():
        got, once = called(module, x, context)
        module.processor.kernel = "reference"
        want, never = called(module, x, context)
        module.processor.face = "float"
        plain, _ = called(module, x, context)
    assert (once, never) == (1, 0) and got.shape == want.shape and got.dtype == want.dtype
    size = want.abs().max()
    assert ((got - want).abs() > 1e-5 * size).float().mean() < 0.01
    assert (got - want).abs().max() < 0.01 * size and (want - plain).abs().max() > 1e-4 * size


def test_codes_of_probabilities_are_those_of_the_simulation() -> None:
    """The simulation's scores are products of floats, so a code in some ten thousand may differ by one."""
    module, g = packed(size=40, timed=False), torch.Generator().manual_seed(3)
    processor = module.processor
    q, k, v = (torch.randn(2, 2, n, 40, generator=g) for n in (190, 170, 170))
    processor.q.set_scale(processor.q.scale * 4)
    q = q * 4  # scores over a wide range, for codes of all sizes
    with torch.no_grad():
        seen: list[Tensor] = []
        hook = processor.softmax.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        want = _explicit(q, k, v, None, *(getattr(processor, name) for name in OPERANDS))
        hook.remove()
        codes = encode(seen[0], processor.softmax.inverse_scale, processor.softmax.zero_point.float(), 255)
        *first, scale, zero_point, times, inverse, top, batch, heads, size, _ = attention_ops.given(processor, q, k, v)
        tables = [attention_ops.Table(*each) for each in zip(scale, zero_point, times, strict=True)]
        kept = attention_ops.plain_parts(*first, tables, inverse, top, batch, heads, size)
        got = attention_ops.run(processor, q, k, v)
    apart = (kept.codes - codes.flatten(0, 1)).abs()
    assert codes.unique().numel() > 60 and apart.max() <= 1 and apart.mean() < 1e-3
    alike = (apart == 0).all(-1).reshape(2, 2, 190)
    assert alike.float().mean() > 0.95 and torch.allclose(got[alike], want[alike], atol=1e-5)


def test_half_precision_is_nearer_to_float64_than_the_simulation() -> None:
    """One rounding, where the simulation rounds operands, scores and probabilities."""
    module, g = packed(size=16, timed=False), torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=g).bfloat16() for _ in range(3))
    operands = [getattr(module.processor, name) for name in OPERANDS]
    with torch.no_grad():
        got = attention_ops.run(module.processor, q, k, v)
        simulated = _explicit(q, k, v, None, *operands)
        exact = _explicit(q.float(), k.float(), v.float(), None, *operands)
    assert got.dtype == torch.bfloat16
    error, other = ((t.float() - exact).abs().mean() for t in (got, simulated))
    assert error < 0.5 * other and error < 0.004 * exact.abs().mean()


def test_calls_that_are_left_to_the_reference_by_name() -> None:
    x, _ = inputs(False)
    ran = []

    def left(module: Attention, reason: str, **more: Any) -> None:
        with torch.no_grad():
            q, k, v = (torch.randn(2, 2, 37, module.to_q.out_features // 2) for _ in range(3))
            clock = module.processor.q._clock[0]
            with clock.at(more.pop("time", torch.tensor(500.0))):
                assert attention_ops.leaves(module.processor, q, k, v, more.get("attention_mask")) == reason
            ran.append(reason)
            assert called(module, x, **more)[1] == (reason == "samples at different times")

    module = packed()
    assert called(module, x)[1] == 0  # the module's own weights want a gradient
    with torch.no_grad():
        assert called(module, x)[1] == 1
        left(module, "samples at different times", time=torch.tensor([1.0, 999.0]))
        left(module, "a mask", attention_mask=torch.zeros(2, 1, 37))
        module.processor.v.enabled = False
        left(module, "an operand is switched off")
        module.processor.v.enabled, module.processor.v.trial_scale = True, module.processor.v.scale
        left(module, "scales are being trained")
        module.processor.v.trial_scale = None
        hook = module.processor.v.register_forward_hook(lambda *_: None)
        assert called(module, x)[1] == 0
        hook.remove()
        module.processor.face = "sim"
        left(module, "the attention is simulated")
        left(packed(size=260), "heads of more than 256 channels, or more than 33025 keys")
        far = torch.zeros(1, 1, 1, 1).expand(1, 1, 33_026, 8)
        assert attention_ops.leaves(packed(timed=False).processor, far[:, :, :4], far, far, None) is not None
        assert attention_ops.leaves(packed(timed=False).processor, far[:, :, :4], *[far[:, :, 1:]] * 2, None) is None
    assert len(ran) == 6


@torch.no_grad()
def test_samples_at_different_times_are_computed_as_simulated() -> None:
    module, (x, _) = packed(), inputs(False)
    operations = Operations()
    with operations, module.processor.q._clock[0].at(torch.tensor([1.0, 999.0])):
        got = module(x)
    alone = []
    module.processor.kernel = "reference"
    for i, time in enumerate((1.0, 999.0)):
        with module.processor.q._clock[0].at(torch.tensor(time)):
            alone.append(module(x[i : i + 1]))
    assert operations.count["int8_attention"] == 0 and torch.allclose(got, torch.cat(alone), atol=1e-6)


def test_the_largest_sum_of_the_most_keys_fits() -> None:
    assert attention_ops.MOST_KEYS * 255 * 255 <= 2**31 - 1 < (attention_ops.MOST_KEYS + 1) * 255 * 255
    assert attention_ops.MOST_SIZE * 255 * 255 <= 2**31 - 1


def test_use_names_every_attention_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    log = {"softmax": {"mode": "dynamic", "grid": Grid(bits=4, kind="log2"), "timed": False}}
    cross = {"cross_attention_dim": 12}
    model = nn.ModuleDict({
        "able": packed(), "log2": packed(specs=log), "token": packed(specs={"v": {"mode": "dynamic", "timed": False}}),
        "start": packed(specs={"k": {"exempt": (0,)}}, **cross), "text": packed(**cross),
        "bits": packed(specs={"q": {"time_bits": (8, 4, 8)}}), "plain": packed(),
    })
    model["plain"].processor.k = None
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: True)
    reasons = {
        "able": "cuda-int8", "text": "cuda-int8",
        "log2": "softmax on a log2 grid: powers of two over 16 octaves, which are left to a product of floats",
        "token": "v has scales found at run time, or more than one", "start": "k: the start token stays float",
        "bits": "q has bits that change over time",
        "plain": "k stays float, and a product on codes needs both its operands quantized",
    }
    want = {name: why if why == "cuda-int8" else f"reference: {why}" for name, why in reasons.items()}
    assert kernels.use(model, "auto", "cuda") == want == kernels.use(model, "cuda-int8")
    kernels.use(model, "auto")
    assert kernels.chosen(model["able"].processor, "cuda") == "cuda-int8"
    assert {kernels.chosen(module.processor, "cpu") for module in model.values()} == {"reference"}
    assert kernels.chosen(model["log2"].processor, "cuda") == "reference"
    assert set(kernels.use(model, "cpu-int8").values()) == {"reference: only cuda-int8 computes attention on codes"}
    assert set(kernels.use(model, "reference").values()) == {"reference"}
    assert kernels.use(model, "cuda-int8", "cpu")["able"] == "reference: the kernel runs on CUDA, not on cpu"
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: False)
    assert kernels.use(model, "auto", "cuda")["able"] == "reference: Triton is not installed"


@torch.no_grad()
def test_a_network_that_is_moved_computes_its_attentions_on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    spec = LayerSpec(activation=ActivationSpec(timed=True))
    wrap.declare(unet, Plan(layers={f"{name}:{each}": spec for name in names for each in OPERANDS}, timesteps=TIMES))
    for name in names:
        for each in OPERANDS:
            quantizer, softmax = getattr(unet.get_submodule(name).processor, each), each == "softmax"
            quantizer.set_scale(quantizer.scale * (1 / 255 if softmax else 4 / 255), quantizer.zero_point + 128 * (not
                                softmax))
    x, time, prompt = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 5, 24)
    want = unet(x, time, prompt).sample
    monkeypatch.setattr(gpu_decode, "no_triton", lambda kind: None)
    assert kernels.use(unet, "cuda-int8") == dict.fromkeys(names, "cuda-int8") and len(names) == 8
    unet.to(torch.float32)
    assert all(set(unet.get_submodule(name).processor.first_rows) == {"cpu"} for name in names)
    operations = Operations()
    with operations:
        got = unet(x, time, prompt).sample
    assert operations.count["int8_attention"] == 8 and operations.count["int8_encode"] == 24
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_a_compiled_graph_has_no_break_and_serves_all_timesteps() -> None:
    module, (x, _) = packed(size=40), inputs(False)
    attention_ops.prepare(module.processor)
    counter, clock = CompileCounter(), module.processor.q._clock[0]
    graph = torch.compile(module, backend=counter, fullgraph=True)
    found = []
    for time in (1.0, 480.0, 999.0):
        with clock.at(torch.tensor(time)), torch.no_grad():
            found.append(graph(x))
            assert torch.equal(found[-1], module(x))
    assert counter.frame_count == 1 and not torch.equal(found[0], found[1])


def test_shapes_for_tracing_are_those_that_come_out() -> None:
    processor, ran = packed(size=40, timed=False).processor, 0
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 2, n, 40, dtype=dtype) for n in (9, 5, 5))
        with torch.no_grad():
            args = attention_ops.given(processor, q, k, v)
            real = torch.ops.bitbrush.int8_attention(*args)
        traced = attention_ops._attention_shape(*(t.to("meta") if isinstance(t, Tensor) else t for t in args))
        assert traced.shape == real.shape == (2, 9, 80) and traced.dtype == real.dtype == dtype
        ran += 1
    assert ran == 2
