"""A low-rank branch beside a layer's product: the same in every face but the float one, proven, moved, on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import layer_bytes
from bitbrush.errors import ArtifactError, InputError, InternalError, NumericsError
from bitbrush.kernels import proof, use
from bitbrush.network import wrap
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLinear
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.fit import Fit
from small import complete

RANK = 3
DYNAMIC = ActivationSpec(grid=Grid(bits=4), mode="dynamic", granularity="token_group", group=8)
SPEC = LayerSpec(weight=WeightSpec(), activation=DYNAMIC, input_scale=True, low_rank=RANK)
CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


def fill(layer: Any, seed: int = 0) -> Any:
    """Random factors (not float16 numbers), and codes of what they leave over."""
    g = torch.Generator().manual_seed(seed)
    if layer.input_scale is not None:
        layer.set_input_scale(torch.rand(layer.in_channels_, generator=g) + 0.5)
    layer.set_low_rank(*(torch.randn(t.shape, generator=g) * 0.2 for t in layer.low_rank()))
    fitted = Fit(do="fit", what="weights", points=4).weight(layer)
    layer.set_weight(fitted["codes"], fitted["scale"], fitted["zero_point"])
    layer.face = "sim"
    return layer


def make(kind: str, spec: LayerSpec = SPEC, **conv: Any) -> Any:
    torch.manual_seed(1)
    module: nn.Module = nn.Linear(20, 9) if kind == "linear" else nn.Conv2d(20, 9, **(conv or CONVS[0]))
    wrapper: Any = QuantLinear if kind == "linear" else QuantConv2d
    return fill(wrapper.wrap(module.requires_grad_(False), spec, Clock(()), 1))


def given(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn((2, 5, 20) if kind == "linear" else (2, 20, 9, 8), generator=torch.Generator().manual_seed(2))
    return (x * 2).to(dtype)


def packed_copy(layer: Any) -> Any:
    other = copy.deepcopy(layer)
    other.pack()
    return other


# ---- one layer -------------------------------------------------------------------------------------------------------
def test_the_definition() -> None:
    """Q(y) Q(R)^T + y L2^T L1^T + b, with y the scaled input that is not rounded."""
    ran = 0
    for kind, conv in [("linear", {}), *(("conv", c) for c in CONVS)]:
        layer, x = make(kind, **conv), given(kind)
        up, down = (t.float() for t in layer.low_rank())
        y, q, rest = layer.prepare(x), layer.quantize_input(x), layer.decoded_weight()
        if kind == "linear":
            want = q @ rest.T + (y @ down.T) @ up.T + layer.bias
        else:
            inner = layer._conv_forward(y, down, None)
            want = layer._conv_forward(q, rest, layer.bias) + torch.einsum("nr,brhw->bnhw", up, inner)
        assert torch.allclose(layer(x), want, atol=1e-5)
        whole = layer.decoded_weight() + layer.low_rank.weight()
        shape = (1, -1) if kind == "linear" else (1, -1, 1, 1)
        assert torch.equal(layer.restored_weight(), whole * layer.input_scale.reshape(shape))
        layer.input.enabled = False
        plain = layer.operation(x, layer.restored_weight())
        assert torch.allclose(layer(x), plain, atol=1e-4), "both parts together are the restored weight"
        layer.face = "float"
        assert torch.equal(layer(x), layer.operation(x, layer.float_weight))
        ran += 1
    assert ran == 5


def test_the_codes_are_those_of_the_rest() -> None:
    """FP equivalence: rest and branch together are the scaled weight, exactly as float32 has it."""
    for kind in ("linear", "conv"):
        layer = make(kind)
        shape = (1, -1) if kind == "linear" else (1, -1, 1, 1)
        scaled = layer.float_weight / layer.input_scale.reshape(shape)
        assert torch.equal(layer.scaled_weight(), scaled - layer.low_rank.weight())
        error = (layer.decoded_weight() - layer.scaled_weight()).square().sum()
        assert 0 < float(error) < 0.05 * float(layer.scaled_weight().square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_equals_sim_and_is_proven(dtype: torch.dtype) -> None:
    ran = 0
    for kind, conv in [("linear", {}), *(("conv", c) for c in CONVS)]:
        layer, x = make(kind, **conv), given(kind, dtype)
        layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        codes, tables, branch = layer.stored_codes().clone(), layer.weight_tables(), layer.low_rank()
        packed = packed_copy(layer)
        assert torch.equal(packed(x), layer(x)) and packed.float_weight is None
        result = proof.prove_layer(codes, packed, x, tables, branch)
        assert result["ok"] and 0 < result["kernels"]["reference"]["max_error_over_bound"] < 1, result
        assert result["tables"]["entries"] >= sum(t.numel() for t in branch)
        missing = packed.bias.numel() * (4 - packed.bias.element_size())  # the estimate is one of float32 biases
        assert layer_bytes(tuple(layer.float_weight.shape), layer.spec, True) == packed.packed_bytes() + missing
        ran += 1
    assert ran == 5


def test_the_proof_sees_a_changed_branch() -> None:
    for kind in ("linear", "conv"):
        layer, x = make(kind), given(kind)
        codes, tables, branch = layer.stored_codes().clone(), layer.weight_tables(), layer.low_rank()
        packed = packed_copy(layer)
        packed.low_rank.up = packed.low_rank.up.clone()
        packed.low_rank.up[0, 0] += 0.25
        result = proof.prove_layer(codes, packed, x, tables, branch)
        assert not result["ok"] and not result["tables"]["ok"] and result["codes"]["ok"]
        packed.low_rank.up[0, 0] = float("nan")
        assert not proof.prove_layer(codes, packed, x, tables)["ok"]


def test_integer_products_beside_the_branch() -> None:
    spec = SPEC.model_copy(update={"segments": (8, 8, 4)})
    layer, x = make("linear", spec), given("linear")
    codes, packed = layer.stored_codes().clone(), packed_copy(layer)
    result = proof.prove_layer(codes, packed, x)
    assert result["ok"] and result["kernels"]["cpu-int8"]["accumulators"]["total"] > 0
    want = packed(x)
    assert use(nn.Sequential(packed), "cpu-int8") == {"0": "cpu-int8"}
    assert torch.allclose(packed(x), want, atol=1e-5)


def test_casts_and_copies_leave_the_factors_alone() -> None:
    layer = make("linear")
    up, down = layer.low_rank()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        other = copy.deepcopy(layer).to(dtype)
        assert all(t.dtype == torch.float16 for t in other.low_rank())
        assert torch.equal(other.low_rank.up, up) and torch.equal(other.low_rank.down, down)
    empty = copy.deepcopy(packed_copy(layer)).to("meta")
    assert empty.low_rank.up.is_meta


def test_gradients_pass_the_branch() -> None:
    layer, x = make("linear"), given("linear").requires_grad_()
    layer.trial_weight = torch.zeros(9, 20)
    layer(x).sum().backward()
    up, down = (t.float() for t in layer.low_rank())
    assert x.grad is not None and torch.allclose(x.grad[0, 0], layer.input_scale * (up @ down).sum(0), atol=1e-5)


def test_what_is_refused() -> None:
    layer = make("linear")
    with pytest.raises(InternalError, match="not factors"):
        layer.set_low_rank(torch.zeros(9, 2), torch.zeros(2, 20))
    with pytest.raises(NumericsError, match="float16"):
        layer.set_low_rank(torch.full((9, RANK), 1e6), torch.zeros(RANK, 20))
    layer.set_low_rank(torch.zeros(9, RANK), torch.zeros(RANK, 20))
    assert layer.codes is None, "they were those of another rest"
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(8, 8, 3, groups=2))
    for name, spec, why in [
        ("0", LayerSpec(weight=WeightSpec(), low_rank=5), "no rank 5"), ("0", LayerSpec(low_rank=2), "not quantized"),
        ("1", LayerSpec(weight=WeightSpec(), low_rank=2), "groups = 2"),
    ]:
        with pytest.raises(InputError, match=why) as found:
            wrap.wrap(copy.deepcopy(model), Plan(layers={name: spec}))
        assert complete(found.value)


def test_another_activation_keeps_the_branch() -> None:
    model = nn.Sequential(nn.Linear(20, 9).requires_grad_(False))
    plan = Plan(layers={"0": SPEC})
    clock = wrap.wrap(model, plan)
    layer: Any = fill(model[0])
    before, codes = layer.low_rank(), layer.stored_codes()
    other = plan.with_layers({"0": SPEC.model_copy(update={"activation": ActivationSpec(mode="dynamic")})})
    wrap.rewrap(model, other, ["0"], clock)
    again: Any = model[0]
    assert again is not layer and torch.equal(again.stored_codes(), codes)
    assert all(torch.equal(a, b) for a, b in zip(before, again.low_rank(), strict=True))


# ---- a network -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tensor, Tensor, Path]:
    """(packed denoiser, its output, the simulation's, the artifact's folder); a branch in every layer."""
    model = tiny.text_unet()
    layers = {name: s.model_copy(update={"activation": DYNAMIC, "input_scale": True, "low_rank": 2})
              for name, s in tiny.plan_for(model).layers.items()}
    plan = Plan(layers=layers)
    wrap.wrap(model, plan)
    for i, layer in enumerate(wrap.layers(model).values()):
        fill(layer, i)
    simulated = tiny.run(model)
    for layer in wrap.layers(model).values():
        layer.pack()
    return model, tiny.run(model), simulated, save(model, tmp_path_factory.mktemp("low-rank") / "out", plan)


def test_a_network_through_plain_from_pretrained(made: tuple[Any, Tensor, Tensor, Path]) -> None:
    model, output, simulated, folder = made
    assert torch.equal(output, simulated) and torch.isfinite(output).all()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    found = 0
    for dtype in (torch.float32, torch.bfloat16):
        again = type(model).from_pretrained(folder, torch_dtype=dtype)
        if dtype == torch.float32:
            assert torch.equal(tiny.run(again), output)
        for name, layer in wrap.layers(again).items():
            for leaf in ("up", "down"):
                table = getattr(layer.low_rank, leaf)
                assert table.dtype == torch.float16 and torch.equal(table, stored[f"{name}.low_rank.{leaf}"])
            found += 1
    assert found > 100


def test_offloaded_compiled_and_restored(made: tuple[Any, Tensor, Tensor, Path]) -> None:
    model, output, _, folder = made
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    assert torch.equal(tiny.run(compiled), output)
    offloaded = type(model).from_pretrained(folder)
    cpu_offload(offloaded)
    assert torch.equal(tiny.run(offloaded), output)
    plain = type(model).from_pretrained(folder).dequantize()
    assert isinstance(plain.conv_in, nn.Conv2d) and not isinstance(plain.conv_in, QuantConv2d)
    ours = wrap.layers(model)["conv_in"].restored_weight()
    assert torch.equal(plain.conv_in.weight, ours)


def test_damage_is_named(made: tuple[Any, Tensor, Tensor, Path], tmp_path: Path) -> None:
    model, _, _, folder = made
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    key = next(name for name in tensors if name.endswith("low_rank.up"))
    cases: list[tuple[Any, str]] = [
        (lambda t: t.float(), "float16"), (lambda t: t * float("inf"), "float16"), (lambda t: t[1:], "wrong shape"),
        (lambda t: t + 0.5, "changed since"), (None, "missing"),
    ]
    for i, (change, why) in enumerate(cases):
        target = tmp_path / str(i)
        target.mkdir()
        (target / "config.json").write_bytes((folder / "config.json").read_bytes())
        other = {k: v for k, v in tensors.items() if change is not None or k != key}
        if change is not None:
            other[key] = change(tensors[key]).contiguous()
        save_file(other, target / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ArtifactError, match=why) as found:
            type(model).from_pretrained(target)
        assert complete(found.value)
    assert len(cases) == 5
