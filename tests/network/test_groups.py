"""Groups of channels or pixels that share a scale (DGQ): in simulation, training, packed, proven, on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush import kernels
from bitbrush.artifact.digest import of_model
from bitbrush.artifact.save import save
from bitbrush.engine.estimate import layer_bytes
from bitbrush.errors import ArtifactError, InputError, InternalError
from bitbrush.kernels import cpu, gpu
from bitbrush.kernels.proof import prove_layer
from bitbrush.network import wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantLinear
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import GROUPED, ActivationSpec, Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps.learners import ScaleLearner, SharedTables, held_tables
from bitbrush.steps.range_groups import clustered, hulls
from small import complete

TIMES = tiny.TIMES
C, P, K = 6, 12, 3
SHAPES = {"conv": (2, C, 3, 4), "linear": (2, P, C)}
KINDS = [(granularity, layer) for granularity in GROUPED for layer in SHAPES]


def spec_of(granularity: str, groups: int = K, bits: int = 4, pixels: int = P, **more: Any) -> ActivationSpec:
    count = pixels if granularity == "pixel_group" else 0
    choices: dict[str, Any] = {"granularity": granularity, "groups": groups, "pixels": count, **more}
    return ActivationSpec(grid=Grid(bits=bits), **choices)


def fill(quantizer: ActivationQuantizer, seed: int = 0) -> None:
    """Random ranges, and labels that use every group."""
    g = torch.Generator().manual_seed(seed)
    shape = quantizer.scale.shape
    low, high = -torch.rand(shape, generator=g) * 2, torch.rand(shape, generator=g) * 3
    quantizer.set_scale(*ranges.affine_parameters(low, high, quantizer.spec.grid))
    if quantizer.group_of is not None:
        members = len(quantizer.group_of)
        quantizer.set_groups((torch.arange(members) % quantizer.spec.groups)[torch.randperm(members, generator=g)])


def made(granularity: str, clock: Clock | None = None, groups: int = K, **more: Any) -> ActivationQuantizer:
    spec = spec_of(granularity, groups, timed=clock is not None, **more)
    quantizer = ActivationQuantizer(spec, (), clock, len(TIMES) if clock else 1, channels=C)
    fill(quantizer)
    return quantizer


def channel_dim(layer: str) -> int:
    return 1 if layer == "conv" else 2


def spread_by_hand(table: Tensor, quantizer: ActivationQuantizer, layer: str) -> Tensor:
    """A row ``[R, K]`` as it broadcasts, index by index."""
    assert quantizer.group_of is not None
    wide = torch.stack([table[:, k] for k in quantizer.group_of.tolist()], dim=1)
    if quantizer.spec.granularity == "channel_group":
        return wide[:, :, None, None] if layer == "conv" else wide[:, None]
    return wide.reshape(-1, 1, 3, 4) if layer == "conv" else wide[:, :, None]


# ---- the quantizer -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("granularity", "layer"), KINDS)
def test_codes_are_those_of_the_groups_scale(granularity: str, layer: str) -> None:
    """By the definition of a code; at every timestep, and in a batch of mixed ones."""
    clock, dim, compared = Clock(TIMES), channel_dim(layer), 0
    quantizer = made(granularity, clock)
    assert quantizer.scale.shape == (len(TIMES), K)
    for times in [*TIMES, torch.tensor([750.0, 1.0])]:
        rows = [TIMES.index(t) for t in torch.as_tensor(times).reshape(-1).tolist()]
        x = torch.randn(SHAPES[layer]) * 2
        tables = (quantizer.scale, quantizer.zero_point.float())
        scale, zero = (spread_by_hand(t[rows], quantizer, layer) for t in tables)
        want = decode(encode(x, reciprocal(scale), zero, 15), scale, zero)
        with clock.at(times):
            assert torch.equal(quantizer(x, dim), want)
            free = x.clone().requires_grad_()
            out = quantizer(free, dim)
            out.sum().backward()
            assert torch.equal(out.detach(), want)
        code = torch.round(x * reciprocal(scale)) + zero
        assert free.grad is not None and torch.equal(free.grad != 0, (code >= 0) & (code <= 15))
        compared += 1
    assert compared == 6


@pytest.mark.parametrize("layer", SHAPES)
def test_one_group_is_a_tensor_and_a_group_an_index_is_a_channel(layer: str) -> None:
    """Invariant 1."""
    x, dim = torch.randn(SHAPES[layer]) * 2, channel_dim(layer)
    plain = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)))
    for granularity in GROUPED:
        one = made(granularity, groups=1)
        plain.set_scale(one.scale, one.zero_point)
        assert torch.equal(one(x, dim), plain(x, dim))
    by_channel = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4), granularity="channel"), channels=C)
    fill(by_channel)
    each = made("channel_group", groups=C)
    each.set_groups(torch.arange(C))
    each.set_scale(by_channel.scale, by_channel.zero_point)
    assert torch.equal(each(x, dim), by_channel(x, dim))


@pytest.mark.parametrize(("granularity", "layer"), KINDS)
def test_groups_found_hold_every_value(granularity: str, layer: str) -> None:
    """Invariant 2: no scale is wider than the tensor's, and errors keep to it."""
    x, dim = torch.randn(16, *SHAPES[layer][1:]), channel_dim(layer)
    x[..., 2] += 9
    last = x.movedim(dim, -1).flatten(1, -2)  # [B, pixels, C]
    flat = last.movedim(2 if granularity == "channel_group" else 1, 0).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    quantizer, labels = made(granularity), clustered(low, high, K)
    quantizer.set_groups(labels)
    scale, zero = ranges.affine_parameters(*hulls(low, high, labels), Grid(bits=4))
    quantizer.set_scale(scale[None], zero[None])
    whole = ranges.affine_parameters(x.amin(), x.amax(), Grid(bits=4))[0]
    assert bool((scale <= whole * (1 + 1e-6)).all()) and float(scale.min()) < float(whole)
    error, step = (quantizer(x, dim) - x).abs(), spread_by_hand(scale[None], quantizer, layer)
    assert bool((error <= step * (1 + 1e-5)).all()), "half a step, and half of one for the zero-point"
    assert float((error / step).max()) > 0.3


def test_permuted_channels_have_permuted_labels() -> None:
    """Invariant 6: the layer's answer is the same."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    x = torch.randn(16, C, 3, 4) * torch.tensor([1, 8, 1, 0.1, 8, 1])[:, None, None]
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    labels, moved = clustered(low, high, 2), clustered(low[order], high[order], 2)
    same = labels[order][:, None] == labels[order][None]
    assert torch.equal(same, moved[:, None] == moved[None])
    weight = torch.randn(5, C, 3, 3)
    outs = []
    for given, groups, kernel in ((x, labels, weight), (x[:, order], moved, weight[:, order])):
        quantizer = made("channel_group", groups=2)
        quantizer.set_groups(groups)
        ends = given.amin((0, 2, 3)), given.amax((0, 2, 3))
        scale, zero = ranges.affine_parameters(*hulls(*ends, groups), Grid(bits=4))
        quantizer.set_scale(scale[None], zero[None])
        outs.append(torch.conv2d(quantizer(given, 1), kernel))
    assert torch.allclose(outs[0], outs[1], atol=1e-3)


@pytest.mark.parametrize(("granularity", "layer"), KINDS)
def test_parts_are_what_a_column_serves(granularity: str, layer: str) -> None:
    quantizer, x, dim = made(granularity), torch.randn(SHAPES[layer]), channel_dim(layer)
    parts = quantizer.parts(x, dim)
    where = spread_by_hand(torch.arange(K).float()[None], quantizer, layer).expand_as(x)
    assert len(parts) == K and sum(p.numel() for p in parts) == x.numel()
    for k, part in enumerate(parts):
        assert len(part) == len(x) and torch.equal(part.flatten().sort().values, x[where == k].sort().values)
    assert torch.equal(made(granularity, groups=1).parts(x, dim)[0].reshape(2, -1), x.reshape(2, -1)), "in order"
    quantizer.set_groups(torch.zeros(len(quantizer.group_of), dtype=torch.int64))  # type: ignore[arg-type]
    assert [p.numel() > 0 for p in quantizer.parts(x, dim)] == [True, False, False]


def test_groups_of_timesteps_beside_groups_of_channels() -> None:
    clock, x = Clock(TIMES), torch.randn(2, C, 3, 4) * 2
    quantizer = made("channel_group", clock, time_groups=(0, 1, 1, 1, 0))
    assert quantizer.scale.shape == (2, K)
    plain = made("channel_group")
    plain.set_groups(quantizer.group_of)  # type: ignore[arg-type]
    for i, t in enumerate(TIMES):
        row = (0, 1, 1, 1, 0)[i]
        plain.set_scale(quantizer.scale[row : row + 1], quantizer.zero_point[row : row + 1])
        with clock.at(t):
            assert torch.equal(quantizer(x, 1), plain(x, 1))


@pytest.mark.parametrize(("granularity", "shape", "dim", "given"), [
    ("pixel_group", (2, C, 4, 4), 1, 16), ("pixel_group", (2, 11, C), 2, 11), ("pixel_group", (2, C), 1, 1)])
def test_another_number_of_pixels(granularity: str, shape: tuple[int, ...], dim: int, given: int) -> None:
    """Invariant 11."""
    quantizer = made(granularity)
    quantizer.place = "a.layer"
    with pytest.raises(InputError, match="another size") as caught:
        quantizer(torch.randn(shape), dim)
    assert caught.value.where == "a.layer" and f"{P} pixels and is given {given}" in (caught.value.why or "")
    assert complete(caught.value)
    assert made("channel_group")(torch.randn(2, C, 9, 9), 1).shape == (2, C, 9, 9)


def test_labels_that_do_not_fit() -> None:
    quantizer = made("channel_group")
    for labels in (torch.zeros(C + 1), torch.full((C,), K), torch.full((C,), -1)):
        with pytest.raises(InternalError):
            quantizer.set_groups(labels.long())
    assert ActivationQuantizer(ActivationSpec()).group_of is None
    assert "group_of" in quantizer.state_dict() and "3 groups" in quantizer.extra_repr()


# ---- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("granularity", "layer"), KINDS)
def test_gradients_of_trained_tables(granularity: str, layer: str) -> None:
    """A group's scale gets the sum over its members, those of other timesteps nothing."""
    clock, dim = Clock(TIMES), channel_dim(layer)
    quantizer, x = made(granularity, clock), torch.randn(SHAPES[layer]) * 3
    learner = ScaleLearner({"q": quantizer}, zero_points=True)
    learner.relax(torch.tensor(0.0))
    with clock.at(torch.tensor([250.0, 250.0])):
        out = quantizer(x, dim)
        out.square().sum().backward()
    assert torch.equal(out.detach(), by_table(quantizer, x, layer, 1))
    found = learner.parameters()["scale"].grad
    assert found is not None and found.view(5, K)[1].abs().min() > 0
    assert found.view(5, K).abs().sum(1).nonzero().flatten().tolist() == [1]
    leaf = quantizer.scale[1:2].clone().requires_grad_()
    wide, zero = (spread_by_hand(t, quantizer, layer) for t in (leaf, quantizer.zero_point[1:2].float()))
    v = x * reciprocal(wide.detach())
    rounded = torch.round(v)
    clamped = (rounded + zero).clamp(0, 15)
    slope = torch.where(rounded + zero == clamped, rounded - v, clamped - zero)
    ((2 * out.detach() * slope) * wide).sum().backward()
    assert leaf.grad is not None and torch.allclose(found.view(5, K)[1], leaf.grad[0] * leaf.detach()[0], rtol=1e-3)
    learner.restore()
    learner.release()
    assert quantizer.trial_rows is None


def by_table(quantizer: ActivationQuantizer, x: Tensor, layer: str, row: int) -> Tensor:
    scale, zero = (spread_by_hand(t[row : row + 1], quantizer, layer)
                   for t in (quantizer.scale, quantizer.zero_point.float()))
    return decode(encode(x, reciprocal(scale), zero, quantizer.top), scale, zero)


def test_shared_tables_serve_groups_beside_others() -> None:
    clock, x = Clock(TIMES), torch.randn(2, C, 3, 4) * 2
    every = [made("channel_group", clock), made("pixel_group", clock), made("pixel_group"),
             ActivationQuantizer(ActivationSpec(timed=True), (), clock, len(TIMES))]
    fill(every[3])
    with clock.at(torch.tensor([999.0, 1.0])), torch.no_grad():
        want = [q(x, 1) for q in every]
        with held_tables(every):
            assert all(q.trial_rows is not None for q in every)
            assert all(torch.equal(q(x, 1), w) for q, w in zip(every, want, strict=True))
    assert SharedTables(every).shapes == [(5, 3), (5, 3), (1, 3), (5, 1)]


@pytest.mark.parametrize(("granularity", "layer"), KINDS)
def test_mixtures_of_groups(granularity: str, layer: str) -> None:
    quantizer, x, dim = made(granularity), torch.randn(SHAPES[layer]), channel_dim(layer)
    share = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    scale, zero = torch.rand(2, K) + 0.1, torch.randint(0, 15, (2, K)).float()
    quantizer.trial_mixture = lambda: (share, scale, zero)
    want = torch.zeros_like(x)
    for k in range(2):
        a, b = (spread_by_hand(t[k : k + 1], quantizer, layer) for t in (scale, zero))
        want += share[:, k].reshape(-1, *[1] * (x.ndim - 1)) * decode(encode(x, reciprocal(a), b, 15), a, b)
    assert torch.allclose(quantizer(x, dim), want, atol=1e-6)


# ---- the vocabulary ----------------------------------------------------------------------------------------------
def test_refusals() -> None:
    good = [spec_of(g, timed=timed) for g in GROUPED for timed in (False, True)]
    assert all(LayerSpec(activation=a).unsupported() == [] for a in good)
    bad = {
        "activation.granularity": spec_of("channel_group", mode="dynamic"),
        "activation.groups": spec_of("channel_group", position="output"),
    }
    for name, spec in bad.items():
        assert LayerSpec(activation=spec).unsupported() == [name]
    wrong: list[dict[str, Any]] = [
        {"granularity": "channel_group"}, {"granularity": "pixel_group", "groups": 2}, {"groups": 2},
        {"granularity": "channel_group", "groups": 2, "pixels": 3}, {"granularity": "channel", "pixels": 3},
        {"granularity": "channel_group", "groups": 2, "groups_timed": True}, {"timed": True, "groups_timed": True},
        {"granularity": "channel_group", "groups": 2, "timed": True, "groups_timed": True, "time_groups": (0, 1)},
    ]
    for choices in wrong:
        assert LayerSpec(activation=ActivationSpec(**choices)).unsupported() == ["activation.groups"]
    assert LayerSpec(activation=spec_of("channel_group"), segments=(4, 2)).unsupported() == [
        "activation.groups with segments"]
    for groups in (-1, 257):
        with pytest.raises(ValidationError):
            ActivationSpec(groups=groups)
    unfolded: list[dict[str, Any]] = [{"mode": "dynamic"}, {"position": "output"}, {"granularity": "channel"}]
    for choices in unfolded:
        spec = ActivationSpec(unfolded=True, **choices)
        assert LayerSpec(activation=spec).unsupported() == ["activation.unfolded"]
    spec = LayerSpec(activation=ActivationSpec(unfolded=True), input_scale=True)
    assert [name.split(" ")[0] for name in spec.unsupported()] == ["activation.unfolded"]


def test_what_came_later_is_written_only_where_it_says_something() -> None:
    """Digests of what was saved before stay valid."""
    plain = Plan(layers={"a": LayerSpec(activation=ActivationSpec(timed=True))}, timesteps=(1.0, 2.0)).to_json()
    written = plain["specs"][0]["activation"]
    assert not {"groups", "pixels", "fallback", "groups_timed", "unfolded"} & set(written) and "granularity" in written
    of = spec_of("channel_group", timed=True).model_copy(update={"groups_timed": True, "unfolded": True})
    plan = Plan(layers={"a": LayerSpec(activation=of)}, timesteps=(1.0, 2.0))
    assert plan.to_json()["specs"][0]["activation"]["groups_timed"] is True
    assert Plan.from_json(plan.to_json()) == plan


def test_only_a_plain_convolution_is_unfolded() -> None:
    for name in ("conv_in", next(n for n, m in tiny.text_unet().named_modules() if n.endswith("to_q"))):
        plan = Plan(layers={name: LayerSpec(activation=ActivationSpec(unfolded=True))})
        if name == "conv_in":
            model = tiny.text_unet()
            wrap.wrap(model, plan)
            assert model.conv_in.input.spec.unfolded
            continue
        with pytest.raises(InputError, match="plain convolution") as caught:
            wrap.wrap(tiny.text_unet(), plan)
        assert caught.value.where == name and complete(caught.value)


def test_a_wide_convolution_and_an_operand_are_refused() -> None:
    model = tiny.text_unet()
    plan = Plan(layers={"conv_in": LayerSpec(activation=spec_of("pixel_group", pixels=64))})
    with pytest.raises(InputError, match="no groups of pixels") as caught:
        wrap.wrap(model, plan)
    assert caught.value.where == "conv_in" and complete(caught.value)
    name = next(n for n, m in model.named_modules() if n.endswith("attn1"))
    with pytest.raises(InputError, match="operands have no scales") as caught:
        wrap.wrap(tiny.text_unet(), Plan(layers={f"{name}:q": LayerSpec(activation=spec_of("channel_group"))}))
    assert complete(caught.value)


def test_plans_without_groups_keep_their_json() -> None:
    plan = tiny.plan_for(tiny.text_unet(), attention=True)
    text = json.dumps(plan.to_json())
    assert '"groups"' not in text and '"pixels"' not in text
    layers = {"a": LayerSpec(activation=spec_of("pixel_group")), "b": LayerSpec(activation=spec_of("channel_group"))}
    data = json.loads(json.dumps(Plan(layers=layers).to_json()))
    assert Plan.from_json(data) == Plan(layers=layers) and "pixels" not in data["specs"][1]["activation"]


def test_bytes_of_labels_and_tables() -> None:
    plain = LayerSpec(weight=WeightSpec(), activation=ActivationSpec(timed=True))
    sizes = {g: layer_bytes((16, 32), plain.model_copy(update={"activation": spec_of(g, timed=True)}), False, 5)
             for g in GROUPED}
    base = layer_bytes((16, 32), plain, False, 5)
    assert sizes["channel_group"] - base == 9 * 5 * (K - 1) + 32
    assert sizes["pixel_group"] - base == 9 * 5 * (K - 1) + P


# ---- packed ------------------------------------------------------------------------------------------------------
def layer_of(granularity: str, kind: str) -> tuple[Clock, Any, Any]:
    """(clock, layer in sim face, its packed copy); 24 channels, 15 pixels."""
    activation = spec_of(granularity, bits=6, timed=True, pixels=15)
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4)), activation=activation)
    return tiny.packed_pair(kind, spec, fill, nn.Conv2d(24, 9, 1, stride=2) if kind == "conv1" else None)


PACKED = [("channel_group", "linear"), ("channel_group", "conv"), ("channel_group", "conv1"), ("pixel_group", "linear"),
          ("pixel_group", "conv1")]


@pytest.mark.parametrize(("granularity", "kind"), PACKED)
def test_packed_and_proven_at_every_time(granularity: str, kind: str) -> None:
    clock, layer, packed = layer_of(granularity, kind)
    proven = 0
    for times in [*TIMES, torch.tensor([999.0, 250.0])]:
        x = torch.randn(2, 15, 24) * 2 if kind == "linear" else torch.randn(2, 24, 3, 5) * 2
        with torch.no_grad(), clock.at(times):
            assert torch.equal(packed(x), layer(x))
            result = prove_layer(layer.stored_codes(), packed, x)
        assert result["ok"] and result["kernels"]["cpu-int8"]["largest_sums"]["ok"], result
        proven += 1
    assert proven == 6 and packed.input.group_of.dtype == torch.uint8
    assert cpu.why_not(packed, "cpu") is kernels.why_not("cpu-int8", packed, "cpu") is None
    whole = layer_bytes((9, 24) if kind == "linear" else (9, 24, *layer.kernel_hw), layer.spec, True, len(TIMES))
    assert packed.packed_bytes() == whole


@pytest.mark.parametrize(("granularity", "kind"), PACKED)
def test_the_proof_has_a_second_opinion(granularity: str, kind: str) -> None:
    """A quantizer that spread its columns in another way would be found out."""
    clock, layer, packed = layer_of(granularity, kind)
    x = torch.randn(2, 15, 24) if kind == "linear" else torch.randn(2, 24, 3, 5)
    expand = packed.input.expand
    packed.input.expand = lambda table, *rest: expand(table.flip(1), *rest)
    with torch.no_grad(), clock.at(250.0):
        assert not prove_layer(layer.stored_codes(), packed, x)["ok"]
        packed.input.expand = expand
        assert prove_layer(layer.stored_codes(), packed, x)["ok"]


def test_compiled() -> None:
    torch._dynamo.reset()
    for granularity in GROUPED:
        clock, layer, _ = layer_of(granularity, "linear")
        compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
        x = torch.randn(2, 15, 24)
        with torch.no_grad(), clock.at(500.0):
            assert torch.equal(compiled(x), layer(x))


# ---- the whole network -------------------------------------------------------------------------------------------
def grouped_plan(model: nn.Module) -> Plan:
    """Groups of channels in convolutions, of pixels in the linear layers over the 64 places of a picture."""
    plan, layers = tiny.plan_for(model), {}
    for name, spec in plan.layers.items():
        module, activation = model.get_submodule(name), spec.activation
        if activation is not None and not spec.segments:
            wide = isinstance(module, nn.Linear) and ".attn1.to_q" in name and "mid_block" not in name
            of = {"granularity": "pixel_group" if wide else "channel_group", "groups": K, "pixels": 64 if wide else 0}
            spec = spec.model_copy(update={"activation": activation.model_copy(update=of)})
        layers[name] = spec
    return plan.model_copy(update={"layers": layers})


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[float, Tensor], Path]:
    """(packed pipeline, simulated answers a timestep, the artifact's folder)."""
    pipe = tiny.pipeline("text")
    plan = grouped_plan(pipe.unet)
    simulated = tiny.packed_network(pipe, plan, fill)
    folder = tmp_path_factory.mktemp("groups") / "made"
    save(pipe, folder, plan)
    return pipe, simulated, folder


def test_network_packs_saves_and_loads(network: tuple[Any, dict[float, Tensor], Path]) -> None:
    pipe, simulated, folder = network
    assert all(torch.equal(tiny.run(pipe.unet, t), simulated[t]) for t in TIMES)
    whole = type(pipe).from_pretrained(folder)
    assert all(torch.equal(tiny.run(whole.unet, t), simulated[t]) for t in TIMES)
    found = {n: q for n, q in whole.unet.named_modules() if isinstance(q, ActivationQuantizer)}
    kinds = [q.spec.granularity for q in found.values()]
    assert kinds.count("pixel_group") >= 2 and kinds.count("channel_group") > 20
    state = whole.unet.state_dict()
    assert all(torch.equal(state[n], t) for n, t in pipe.unet.state_dict().items())
    half = type(pipe.unet).from_pretrained(folder / "unet", torch_dtype=torch.float16)
    assert all(q.group_of.dtype == torch.uint8 for q in half.modules()
               if isinstance(q, ActivationQuantizer) and q.group_of is not None)
    used = kernels.use(whole.unet, "cpu-int8")
    left = "reference: a sum for each group of channels takes longer on a CPU than the reference"
    assert list(kernels.use(pipe.unet, "auto", "cpu").values()).count(left) == kinds.count("channel_group") - 2
    ran = [used[name.removesuffix(".input")] for name, q in found.items() if q.spec.groups]
    assert ran.count("cpu-int8") == len(ran) - 2  # conv_in and conv_out have free zero-points
    errors = [tiny.run(whole.unet, t) - simulated[t] for t in TIMES]  # a code that falls to the other side of an edge
    assert all(error.norm() < 0.03 * simulated[t].norm() for t, error in zip(TIMES, errors, strict=True))


def test_another_resolution_names_the_layer(network: tuple[Any, dict[float, Tensor], Path]) -> None:
    pipe, _, folder = network
    loaded = type(pipe.unet).from_pretrained(folder / "unet")
    with pytest.raises(InputError, match="another size") as caught:
        tiny.run(loaded, sample=torch.randn(2, 4, 16, 16))
    assert str(caught.value.where).endswith("attn1.to_q") and "64 pixels and is given 256" in (caught.value.why or "")


def test_labels_that_were_changed_are_refused(network: tuple[Any, dict[float, Tensor], Path], tmp_path: Path) -> None:
    """By the digest; and by name, where the digest was taken anew."""
    pipe, _, folder = network
    for path in (folder / "unet").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("group_of"))
    tensors[name] = torch.full_like(tensors[name], K)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="changed since"):
        type(pipe.unet).from_pretrained(tmp_path)
    model = copy.deepcopy(pipe.unet)
    model.get_submodule(name.removesuffix(".group_of")).group_of = tensors[name]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["digest"] = of_model(model, pipe.unet.hf_quantizer.quantization_config.plan)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="a group that does not exist"):
        type(pipe.unet).from_pretrained(tmp_path)


def test_rewrapping_keeps_labels_where_the_groups_are_the_same() -> None:
    layer: Any = QuantLinear.wrap(nn.Linear(C, 4), LayerSpec(activation=spec_of("channel_group")), None, 1)
    fill(layer.input)
    model = nn.Module()
    model.a = layer
    want = layer.input.group_of
    for groups, kept in ((K, True), (2, False)):
        spec = LayerSpec(activation=spec_of("channel_group", groups, bits=6))
        model.a = layer
        wrap.rewrap(model, Plan(layers={"a": spec}), ["a"], Clock(()))
        again: Any = model.a
        assert again is not layer and torch.equal(again.input.group_of, want) is kept


def test_other_labels_that_are_loaded_are_those_that_are_summed_by() -> None:
    """What a kernel keeps of labels is made again: sizes, the order of the channels, sums of weights."""
    clock, _, packed = layer_of("channel_group", "conv")
    other = copy.deepcopy(packed.state_dict())
    other["input.group_of"] = (other["input.group_of"] + 1) % K
    other["input.scale"] = other["input.scale"] * 1.5
    other["input.inverse_scale"] = 1 / other["input.scale"]
    x, seen = torch.randn(2, 24, 3, 5), []
    for _ in range(2):
        with torch.no_grad(), clock.at(250.0):
            seen.append((cpu.run(packed, x), gpu.run(packed, x)))
            want = packed(x)
        assert all((y - want).abs().max() < 1e-4 * want.abs().max() for y in seen[-1])
        packed.load_state_dict(other)
    assert not torch.allclose(seen[0][0], seen[1][0], rtol=0.05)


def test_groups_of_each_timestep_are_refused_by_name() -> None:
    of = spec_of("channel_group", timed=True).model_copy(update={"groups_timed": True})
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4)), activation=of)
    _, _, packed = tiny.packed_pair("linear", spec, lambda q: q.set_groups(torch.zeros_like(q.group_of)))
    assert gpu.unable(packed) == "groups anew at each timestep would sort the weight anew at each: simulated only"
    many = spec.model_copy(update={"activation": spec_of("channel_group", groups=20)})
    assert gpu.unable(tiny.packed_pair("linear", many, fill)[2]) == "20 groups; the kernel takes 16"


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_groups_with_bits_of_each_timestep(kind: str) -> None:
    of = spec_of("channel_group", bits=8, timed=True).model_copy(update={"time_bits": (4, 6, 8, 6, 4)})
    spec, proven = LayerSpec(weight=WeightSpec(grid=Grid(bits=4)), activation=of), 0
    clock, layer, packed = tiny.packed_pair(kind, spec, fill)
    for times in [*TIMES, torch.tensor([999.0, 250.0])]:
        x = torch.randn(2, 15, 24) * 2 if kind == "linear" else torch.randn(2, 24, 3, 5) * 2
        with torch.no_grad(), clock.at(times):
            assert torch.equal(cpu.run(packed, x), gpu.run(packed, x))
            assert prove_layer(layer.stored_codes(), packed, x)["ok"]
        proven += 1
    assert proven == 6
