"""Learners of a finetuning: they start at the stored numbers, and what they store answers as it did in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flat_reference
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.clock import Clock
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import expand_weight_scale, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from bitbrush.numbers.straight_through import encode_weight
from bitbrush.steps import tuning_learners
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.fit import binary_scale, weight_tables
from bitbrush.steps.learners import RoundingLearner, ScaleLearner, SharedTables, Together, held_tables
from bitbrush.steps.loop import Budget, _Loop
from bitbrush.steps.reconstruct import Reconstruct
from bitbrush.steps.tuning_learners import BiasLearner, WeightLearner, merged

NOW = torch.tensor(0.5)
KINDS = ("linear", "conv", "split", "mixed", "scaled", "tensor")


def settings(**changes: Any) -> Finetune:
    return Finetune(do="finetune", rank=3, **changes)


def layer_of(kind: str, seed: int = 0, bits: int = 4, times: int = 1) -> QuantLayer:
    """A layer with fitted scales and nearest codes: plain, split, of mixed bits (symmetric 1-bit rows too), ..."""
    torch.manual_seed(seed)
    module = nn.Linear(8, 10) if kind == "linear" else nn.Conv2d(8, 10, 3, padding=1)
    rows = (1, 2, 3, 4, 5, 1, 2, 3, 4, 5) if kind == "mixed" else ()
    weight = WeightSpec(grid=Grid(bits=bits), row_bits=rows, binary="symmetric",
                        granularity="tensor" if kind == "tensor" else "row")
    spec = LayerSpec(
        weight=weight, activation=ActivationSpec(grid=Grid(bits=4), timed=times > 1),
        segments=(5, 3) if kind == "split" else (), input_scale=kind == "scaled",
    )
    clock = Clock(tuple(float(t) for t in range(1, times + 1)))
    layer: QuantLayer
    if isinstance(module, nn.Linear):
        layer = QuantLinear.wrap(module, spec, clock, times)
    else:
        layer = QuantConv2d.wrap(module, spec, clock, times)
    if kind == "scaled":
        layer.set_input_scale(torch.rand(8) + 0.5)
    scale, zero = weight_tables(layer, weight, lambda v, g: ranges.search(v, g, method="minmax"), binary_scale)
    layer.weight_scale, layer.weight_zero_point = scale, zero.to(torch.uint8)
    s, z = layer.scale_tables()
    codes = encode_weight(layer.scaled_weight(), s, z, layer.top(), binary=layer.binary_rows())
    layer.set_weight(codes, scale, zero)
    assert layer.input is not None
    tables = layer.input.scale.shape
    layer.input.set_scale(torch.rand(tables) * 0.1 + 0.1, torch.randint(2, 12, tables))
    layer.face = "sim"
    return layer


def given(layer: QuantLayer, seed: int = 1) -> Tensor:
    shape = (4, 8, 6, 6) if isinstance(layer, nn.Conv2d) else (4, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(layer: QuantLayer) -> Tensor:
    with torch.no_grad():
        return layer(given(layer))


def whole(layer: QuantLayer, cfg: Finetune, zero_points: bool = True) -> Together:
    """Everything of one layer: weight, bias, activation tables."""
    assert layer.input is not None
    return Together(
        WeightLearner({"l": layer}, cfg, torch.Generator().manual_seed(2)), BiasLearner({"l": layer}, {"l": 1.0}),
        ScaleLearner({"l.input": layer.input}, zero_points=zero_points),
    )


def disturb(learner: Together, size: float = 0.1, seed: int = 3) -> None:
    """Move every parameter at random, as far as its own size asks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in learner.parameters().items():
            if name == "zero_point":
                p.add_(1.3)
            else:
                by = 5.0 if name.startswith(("first", "second")) else 1.0
                p.add_(torch.randn(p.shape, generator=generator) * size * by)


FORMS = [
    {"weights": "full"}, {"weights": "lora"}, {"weights": "lora", "adapter": "tap"}, {"weights": "none"},
    {"weights": "lora", "base": "quantized"}, {"weights": "full", "rounding": "offset"},
    {"weights": "lora", "rounding": "offset", "base": "quantized"}, {"weights": "lora", "scale_aware": "gradient"},
]


# ---- starting ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_starts_at_the_stored_network(form: dict[str, Any]) -> None:
    """B = 0 and theta = 0: bit for bit what the layer answered before."""
    ran = 0
    for kind in KINDS:
        layer = layer_of(kind)
        want, learner = answer(layer), whole(layer, settings(weight_scale=True, **form))
        learner.relax(NOW)
        assert layer.trial_weight is not None and torch.equal(answer(layer), want), kind
        first = learner.learners[0]
        assert isinstance(first, WeightLearner) and first.starts_elsewhere == 0
        ran += 1
    assert ran == 6


def test_offsets_keep_adarounds_decisions() -> None:
    """Codes rounded either way at random: nearest rounding does not start there, the frozen offset does."""
    started = 0
    for kind in KINDS:
        layer = layer_of(kind)
        scale, zero = layer.scale_tables()
        up = torch.rand(layer.stored_codes().shape, generator=torch.Generator().manual_seed(5)) < 0.5
        binary = layer.binary_rows()
        codes = encode_weight(layer.scaled_weight(), scale, zero, layer.top(), up.float(), binary)
        layer.set_weight(codes, layer.weight_scale, layer.weight_zero_point)
        want, distance = answer(layer), codes - zero - layer.scaled_weight() / scale
        inside = (codes > 0) & (codes < layer.top()) & (torch.ones_like(up) if binary is None else ~binary)
        assert (distance[inside].abs() < 1.001).all() and int(inside.sum()) > 20
        exact, other = (whole(layer, settings(rounding=r)) for r in ("offset", "nearest"))
        exact.relax(NOW)
        assert torch.equal(answer(layer), want), kind
        assert exact.learners[0].starts_elsewhere == 0 < other.learners[0].starts_elsewhere  # type: ignore[attr-defined]
        started += 1
    assert started == 6


def test_with_offsets_a_code_changes_where_the_weight_crosses_a_multiple_of_the_scale() -> None:
    layer = layer_of("conv")
    learner = WeightLearner({"l": layer}, settings(rounding="offset"), torch.Generator())
    scale, _ = layer.scale_tables()
    before, weight = layer.stored_codes().float(), learner.trained["weight/l"]
    share = weight.detach() * reciprocal(scale) - torch.floor(weight.detach() * reciprocal(scale))
    free = (before > 0) & (before < layer.top()) & (share > 0.01) & (share < 0.99)
    for step, moved in ((1 - share) * 0.98, 0), ((1 - share) * 1.02, 1), (-share * 0.98, 0), (-share * 1.02, -1):
        with torch.no_grad():
            weight.copy_(learner.kept["l"].base + step * scale)
        assert torch.equal(learner._encoded("l")[free].float(), before[free] + moved)
    learner.relax(NOW)
    assert layer.trial_weight is not None and int(free.sum()) > 300
    (gradient,) = torch.autograd.grad(layer.trial_weight.sum(), weight)
    assert set(gradient.unique().tolist()) <= {0.0, 1.0} and gradient[free].eq(1).float().mean() > 0.9


# ---- hardening ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_hardening_answers_as_training_did(kind: str, form: dict[str, Any]) -> None:
    layer = layer_of(kind)
    before = answer(layer)
    learner = whole(layer, settings(weight_scale=True, **form))
    disturb(learner)
    learner.relax(NOW)
    trained = answer(layer)
    facts = learner.harden()
    assert layer.trial_weight is None and layer.trial_bias is None and torch.equal(answer(layer), trained)
    assert not torch.equal(trained, before) and facts["zero_points_changed"] == len(layer.segments)
    if form["weights"] != "none":
        assert facts["codes_changed"] > 0
    tensors = learner.result()
    assert set(tensors) == {"l/codes", "l/scale", "l/zero_point", "l/bias", "l.input/scale", "l.input/zero_point"}
    assert tensors["l/codes"].dtype == tensors["l.input/zero_point"].dtype == torch.uint8
    if kind == "tensor":
        assert len(layer.weight_scale.unique()) == 1, "rows go on sharing their scale"
    layer.pack()
    assert torch.equal(answer(layer), trained), "packed, too"
    learner_layer = layer_of(kind)
    other = whole(learner_layer, settings(weight_scale=True, **form))
    disturb(other)
    other.harden()
    other.restore()
    other.release()
    assert torch.equal(answer(learner_layer), before), "restored"


def test_at_most_two_to_the_bits_values() -> None:
    """Zero-points are trained as numbers; rounded, they add no level."""
    looked = 0
    for kind in KINDS:
        layer = layer_of(kind)
        learner = whole(layer, settings(weights="lora", weight_scale=True))
        disturb(learner, 0.3)
        learner.relax(NOW)
        assert layer.input is not None and layer.input.trial_zero_point is not None and layer.trial_weight is not None
        assert float(layer.input.trial_zero_point.detach().frac().abs().max()) > 0.01
        with torch.no_grad():
            parts = layer.input(given(layer) * 9, 1).split(list(layer.segments), dim=1)
            assert all(len(part.unique()) <= 16 for part in parts) and len(parts) == len(layer.segments)
        bits = layer.spec.weight.row_bits or (4,) * 10  # type: ignore[union-attr]
        for row, b in zip(layer.trial_weight.detach(), bits, strict=True):
            parts = row.split(list(layer.segments))
            assert all(len(part.unique()) <= 2**b for part in parts)
            looked += 1
    assert looked == 60


# ---- adapters ----------------------------------------------------------------------------------------------------
def test_adapters_by_hand() -> None:
    first, second = torch.randn(3, 8, 2, 2), torch.randn(10, 3, 2, 2)
    tap = merged(first, second, torch.Size((10, 8, 2, 2)))
    for u in range(2):
        for v in range(2):
            assert torch.allclose(tap[:, :, u, v], second[:, :, u, v] @ first[:, :, u, v], atol=1e-6)
    shared = merged(first, second[:, :, 0, 0], torch.Size((10, 8, 2, 2)))
    assert torch.allclose(shared[:, :, 1, 0], second[:, :, 0, 0] @ first[:, :, 1, 0], atol=1e-6)
    x = torch.randn(1, 8, 5, 5)  # EfficientDM: the adapter is a convolution followed by a 1x1 convolution
    want = nn.functional.conv2d(nn.functional.conv2d(x, first), second[:, :, :1, :1])
    assert torch.allclose(nn.functional.conv2d(x, shared), want, atol=1e-4)
    layer = layer_of("conv")
    sizes = {}
    for form in ("shared", "tap"):
        adapters = whole(layer, settings(weights="lora", adapter=form)).learners[0].parameters()
        sizes[form] = sum(p.numel() for p in adapters.values())
    assert sizes == {"shared": 3 * 8 * 9 + 10 * 3, "tap": 3 * 8 * 9 + 10 * 3 * 9}
    start = whole(layer, settings(weights="lora")).parameters()
    assert float(start["first/l"].detach().abs().max()) <= 72**-0.5 and not start["second/l"].any()


def test_an_adapter_adds_to_the_weight_before_it_is_smoothed() -> None:
    layer = layer_of("scaled")
    learner = WeightLearner({"l": layer}, settings(weights="lora"), torch.Generator().manual_seed(0))
    with torch.no_grad():
        learner.trained["second/l"].normal_()
    change = merged(learner.trained["first/l"], learner.trained["second/l"], layer.weight.shape)
    assert layer.input_scale is not None
    want = (layer.weight + change) / layer.input_scale.reshape(1, -1, 1, 1)
    assert torch.allclose(learner._weight("l"), want, atol=1e-5)


@pytest.mark.parametrize("base", ["quantized", "float"])
def test_codes_of_weights_on_the_grid_need_half_a_step(base: str) -> None:
    """EfficientDM section 3.1: behind a quantized base |BA| must exceed s/2; a float base flips much earlier."""
    layer = layer_of("conv")
    learner = WeightLearner({"l": layer}, settings(weights="lora", base=base), torch.Generator().manual_seed(0))
    codes, (scale, _) = layer.stored_codes(), layer.scale_tables()
    with torch.no_grad():
        learner.trained["second/l"].normal_()
        change = merged(learner.trained["first/l"], learner.trained["second/l"], layer.weight.shape)
        largest = (change.abs() / scale).amax()
        flipped = {}
        for reach in (0.49, 4.0):
            before = learner.trained["second/l"].clone()
            learner.trained["second/l"].mul_(reach / largest)
            flipped[reach] = int((learner._encoded("l") != codes).sum())
            learner.trained["second/l"].copy_(before)
    assert flipped[4.0] > 0 and (flipped[0.49] == 0) is (base == "quantized")


def test_literal_gradient_scaling_is_undone_by_adam() -> None:
    """EfficientDM section 3.3: only the learning rate a layer does what its equation 8 asks for."""
    paths = {}
    for aware in ("none", "gradient", "rate"):
        layers = {k: layer_of(k, bits=b) for k, b in (("linear", 2), ("conv", 8))}
        cfg = settings(weights="lora", lr_weights=0.01, scale_aware=aware)
        learner = WeightLearner(layers, cfg, torch.Generator().manual_seed(2))

        def loss_at(rows: Tensor, layers: dict[str, QuantLayer] = layers) -> Tensor:
            errors = [(layer(given(layer)[rows]) - layer.operation(given(layer)[rows], layer.weight)).square().mean()
                      for layer in layers.values()]
            return torch.stack(errors).sum()

        loop = _Loop(learner, loss_at, torch.tensor([[0, 1, 2, 3]] * 8), Budget(8, 99, 1.0, "constant", 1e-12))
        for k in range(8):
            loop.iterate(k)
        paths[aware] = {n: p.detach().clone() for n, p in learner.parameters().items()}
        rates = learner.rates()
        means = {k: float(layer.weight_scale.mean()) for k, layer in layers.items()}
        want = {k: 0.01 * (means[k] if aware == "rate" else 1.0) for k in layers}
        assert all(rates[f"{part}/{k}"] == pytest.approx(want[k]) for part in ("first", "second") for k in layers)
        assert means["linear"] > 10 * means["conv"]
    start = WeightLearner(layers, settings(weights="lora"), torch.Generator().manual_seed(2)).trained
    same, far, moved = 0, 0, 0
    for name, p in paths["none"].items():
        length = (p - start[name].detach()).norm()
        same += int((p - paths["gradient"][name]).norm() < 0.02 * length)
        far += int((p - paths["rate"][name]).norm() > 0.5 * length)
        moved += int(length > 0)
    assert moved == same == far == 4


# ---- activation tables -------------------------------------------------------------------------------------------
def test_one_row_of_time_equals_a_static_table() -> None:
    """TALSQ with T = 1 is LSQ: same answer, same gradients."""
    found = []
    for timed in (True, False):
        torch.manual_seed(0)
        spec = ActivationSpec(grid=Grid(bits=4), timed=timed)
        clock = Clock((500.0,))
        quantizer = ActivationQuantizer(spec, (), clock, 1)
        quantizer.set_scale(torch.tensor([[0.2]]), torch.tensor([[6]]))
        learner = ScaleLearner({"q": quantizer}, zero_points=True)
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        with clock.at(torch.tensor([3.0, 500.0, 999.0])):
            learner.relax(NOW)
            out = quantizer(x, 1)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, learner.theta.grad, learner.zero.grad])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and all(t.abs().sum() > 0 for t in found[0])


def test_a_table_moves_only_where_it_is_looked_up() -> None:
    layer = layer_of("conv", times=5)
    learner = ScaleLearner({"l.input": layer.input}, zero_points=True)  # type: ignore[dict-item]
    clock = layer.input._clock[0]  # type: ignore[union-attr]
    assert clock is not None
    before = layer.input.scale.clone()  # type: ignore[union-attr]

    def loss_at(rows: Tensor) -> Tensor:
        with clock.at(torch.tensor([2.0, 4.0, 4.0, 2.0])):
            return layer(given(layer) * 2).square().mean()

    loop = _Loop(learner, loss_at, torch.zeros(6, 1, dtype=torch.long), Budget(6, 99, 0.05, "constant", 1e-12))
    for k in range(6):
        loop.iterate(k)
    learner.harden()
    moved = (layer.input.scale != before).flatten().tolist()  # type: ignore[union-attr]
    assert moved == [False, True, False, True, False]


def test_the_scales_gradient_against_differences_where_values_are_clipped() -> None:
    """Beyond the range the answer is linear in s: a central difference is exact there."""
    quantizer = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4)))
    quantizer.set_scale(torch.tensor([[0.1]]), torch.tensor([[5]]))
    learner = ScaleLearner({"q": quantizer})
    x = torch.randn(50) * 20
    x = x[(x < -1) | (x > 1.5)]

    def total(theta: float) -> Tensor:
        with torch.no_grad():
            learner.theta.fill_(theta)
        learner.relax(NOW)
        return quantizer(x, 0).sum()

    want = (total(0.01) - total(-0.01)) / 0.02
    (gradient,) = torch.autograd.grad(total(0.0), learner.theta)
    assert len(x) > 30 and torch.allclose(gradient.flatten()[0], want, rtol=1e-3)


def test_symmetric_grids_keep_their_zero_point() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(grid=Grid(bits=4, signed=True)))
    quantizer.set_scale(torch.tensor([[0.1]]), torch.tensor([[8]]))
    learner = ScaleLearner({"q": quantizer}, zero_points=True)
    assert list(learner.parameters()) == ["scale"] and list(learner.result()) == ["q/scale"]
    learner.relax(NOW)
    assert quantizer.trial_zero_point is None


# ---- all layers, all tables at once ------------------------------------------------------------------------------
class Operations(TorchDispatchMode):
    """Counts what is computed: neither views nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        idle = "empty" in func.name() or "detach" in func.name() or "set_" in func.name()
        self.count += int(not idle and not func.is_view and "_unsafe_view" not in func.name())
        return out


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scales", [True, False])
def test_all_layers_at_once_equal_each_by_itself(
    form: dict[str, Any], scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels the weights lie in one flat tensor; values, codes and gradients to weights are the same bits."""
    found = []
    for fused in (None, flat_reference.FUSED):
        monkeypatch.setattr(tuning_learners, "fused_weight", lambda device, fused=fused: fused)
        layers = {kind: layer_of(kind) for kind in KINDS}
        if not scales and form["weights"] == "none":
            return
        cfg = settings(weight_scale=scales, **form)
        learner = WeightLearner(layers, cfg, torch.Generator().manual_seed(2))
        assert (learner.flat is None) is (fused is None) and learner.starts_elsewhere == 0
        generator = torch.Generator().manual_seed(3)
        by_tap = fused is not None and form.get("adapter") == "tap"
        with torch.no_grad():
            for name, p in learner.parameters().items():
                like = p if not (by_tap and p.ndim == 3) else p.reshape(3, 3, *p.shape[1:]).permute(2, 3, 0, 1)
                like.add_(torch.randn(like.shape, generator=generator) * (0.5 if "weight" not in name else 0.1))
        learner.relax(NOW)
        trial = [layer.trial_weight for layer in layers.values()]
        assert all(t is not None and t.shape == layer.weight.shape
                   for t, layer in zip(trial, layers.values(), strict=True))
        signs = [torch.randn(t.shape, generator=torch.Generator().manual_seed(4)) for t in trial if t is not None]
        grads = torch.autograd.grad(trial, list(learner.parameters().values()), signs)  # type: ignore[arg-type]
        parts = {
            name: g.permute(1, 2, 0).reshape(*g.shape[1:], 3, 3) if by_tap and g.ndim == 3 else g
            for name, g in zip(learner.parameters(), grads, strict=True)
        }
        facts = learner.harden()
        for t, layer in zip(trial, layers.values(), strict=True):
            assert t is not None and torch.equal(layer.decoded_weight(), t.detach())
        found.append((facts, [t.detach() for t in trial if t is not None], parts, learner.result()))
    (facts, trial_one, grads_one, result_one), (facts_two, trial_two, grads_two, result_two) = found
    assert facts == facts_two and all(torch.equal(a, b) for a, b in zip(trial_one, trial_two, strict=True))
    assert all(torch.equal(result_one[key], result_two[key]) for key in result_one)
    for name, one in grads_one.items():
        assert torch.allclose(one, grads_two[name], rtol=1e-4, atol=1e-4) and float(one.abs().max()) > 0, name
        assert not name.startswith("weight/") or torch.equal(one, grads_two[name])


def test_operations_do_not_multiply_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights: nothing but the products of the adapters is done layer by layer."""
    def stub(weight: Tensor, *others: Any) -> Tensor:
        return weight * 1.0

    def stub_backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return grad * 1.0, others[1] * 1.0

    fused = tuning_learners.FusedWeight(stub, stub_backward)
    monkeypatch.setattr(tuning_learners, "fused_weight", lambda device: fused)
    counts = {}
    for weights in ("full", "lora"):
        for number in (2, 8):
            layers = {str(i): layer_of("scaled", i) for i in range(number)}
            learner = WeightLearner(layers, settings(weights=weights, weight_scale=True), torch.Generator())
            with Operations() as operations:
                learner.relax(NOW)
                total = torch.stack([layer.trial_weight.sum() for layer in layers.values()]).sum()  # type: ignore[union-attr]
                forward = operations.count - number - 2  # the sums
                torch.autograd.grad(total, list(learner.parameters().values()))
            counts[weights, number] = (forward, operations.count)
    assert counts["full", 2][0] == counts["full", 8][0] < 12
    assert counts["lora", 8][0] - counts["lora", 2][0] == 6 and counts["lora", 2][0] < 14  # a product a layer


def quantizers_of_all_kinds(clock: Clock) -> dict[str, ActivationQuantizer]:
    """Timed and not, one scale and more, two lookups, a symmetric grid, two numbers of bits."""
    plans: dict[str, tuple[ActivationSpec, tuple[int, ...]]] = {
        "timed": (ActivationSpec(grid=Grid(bits=4), timed=True), ()),
        "still": (ActivationSpec(grid=Grid(bits=8)), ()),
        "timed split": (ActivationSpec(grid=Grid(bits=4), timed=True), (5, 3)),
        "ceil": (ActivationSpec(grid=Grid(bits=4), timed=True, lookup="ceil"), ()),
        "still split": (ActivationSpec(grid=Grid(bits=4)), (2, 6)),
        "symmetric": (ActivationSpec(grid=Grid(bits=4, signed=True), timed=True), ()),
        "channels": (ActivationSpec(grid=Grid(bits=4), timed=True, granularity="channel"), ()),
    }
    found = {}
    generator = torch.Generator().manual_seed(0)
    for name, (spec, segments) in plans.items():
        q = ActivationQuantizer(spec, segments, clock, 3 if spec.timed else 1, channels=8)
        shape = q.scale.shape
        zero = torch.full(shape, 8) if spec.grid.signed else torch.randint(2, 12, shape, generator=generator)
        q.set_scale(torch.rand(shape, generator=generator) * 0.2 + 0.1, zero)
        found[name] = q
    return found


@pytest.mark.parametrize("zero_points", [True, False])
def test_shared_tables_equal_each_quantizers_own(zero_points: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, bit for bit, at several times with the same tables."""
    clock, found = Clock((10.0, 500.0, 900.0)), []
    for shared in (True, False):
        quantizers = quantizers_of_all_kinds(clock)
        learner = ScaleLearner(quantizers, zero_points=zero_points)
        if not shared:
            monkeypatch.setattr(SharedTables, "put", lambda *args: None)
        disturb(Together(learner))
        learner.relax(NOW)
        assert all((q.trial_rows is not None) is shared for q in quantizers.values())
        x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
        answers = []
        for now in (torch.tensor([7.0, 600.0, 7.0]), torch.tensor([900.0]), torch.tensor([480.0, 501.0, 11.0])):
            for grad in (False, True):  # a measurement in between must not leave tables without gradients
                with clock.at(now), torch.set_grad_enabled(grad):
                    answers.append([q(x, 1) for q in quantizers.values()])
        flat = [a for given in answers[1::2] for a in given]
        weights = [torch.randn(a.shape, generator=torch.Generator().manual_seed(i)) for i, a in enumerate(flat)]
        leaves = [x, *learner.parameters().values()]
        grads = torch.autograd.grad(flat, leaves, weights)
        assert len(grads) == (3 if zero_points else 2) and all(float(g.abs().sum()) > 0 for g in grads)
        assert all(torch.equal(a, b) for one, two in zip(answers[::2], answers[1::2], strict=True)
                   for a, b in zip(one, two, strict=True))
        learner.harden()
        assert all(q.trial_rows is None for q in quantizers.values())
        with clock.at(torch.tensor([900.0])):
            assert all(torch.equal(q(x, 1), a) for q, a in zip(quantizers.values(), answers[3], strict=True))
        found.append((flat, grads))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_held_tables_change_nothing_but_the_count() -> None:
    clock = Clock((10.0, 500.0, 900.0))
    quantizers = quantizers_of_all_kinds(clock)
    x, now, results = torch.randn(3, 8, 4, 4, requires_grad=True), torch.tensor([7.0, 600.0, 905.0]), []

    def measured() -> int:
        with clock.at(now), Operations() as operations:
            answers = [q(x, 1) for q in quantizers.values()]
            forward = operations.count
        results.append([*answers, *torch.autograd.grad(answers, x, [a.detach() for a in answers])])
        return forward

    alone = measured()
    with held_tables(quantizers.values()):
        together = measured()
        assert measured() == together, "another time is looked up again"
    assert measured() == alone > together + 25
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    with held_tables([]):
        assert measured() == alone
    with held_tables(quantizers.values()), pytest.raises(Exception, match="clock is not set"):
        quantizers["timed"](x, 1)


# ---- together ----------------------------------------------------------------------------------------------------
def test_rates_make_groups() -> None:
    layer = layer_of("conv")
    cfg = settings(weights="full", weight_scale=True, lr_weights=0.5, lr_weight_scale=0.25)
    learner = Together(
        WeightLearner({"l": layer}, cfg, torch.Generator()), BiasLearner({"l": layer}, {"l": 0.5}),
        ScaleLearner({"l.input": layer.input}, zero_points=True, rate=0.125, zero_rate=2.0),  # type: ignore[dict-item]
    )
    loop = _Loop(learner, lambda _: torch.zeros(()), torch.zeros(4, 1, dtype=torch.long), Budget(4, 9, 0.1, "linear"))
    torch.mul(loop.factors, loop.budget.rate(2), out=loop.rate)
    found = {id(p): float(group["lr"]) for group in loop.adam.param_groups for p in group["params"]}
    rates = {n: found[id(p)] for n, p in learner.parameters().items()}
    want = {"weight/l": 0.5, "weight_scale/l": 0.25, "bias/l": 0.5, "scale": 0.125, "zero_point": 2.0}
    assert len(loop.adam.param_groups) == 4 and rates == pytest.approx({n: 0.05 * r for n, r in want.items()})


def test_nothing_becomes_part_of_the_model() -> None:
    """A module registers a parameter that is assigned to it: relaxed forms must not be parameters."""
    layer = layer_of("conv")
    before = set(layer.state_dict())
    learner = whole(layer, settings())
    learner.relax(NOW)
    assert set(layer.state_dict()) == before and len(learner.parameters()) == 4
    names = [n for n, _ in layer.named_parameters()]
    learner.harden()
    assert [n for n, _ in layer.named_parameters()] == names
    scales = [m.scale for m in layer.modules() if isinstance(m, ActivationQuantizer)]
    assert all(s.untyped_storage().nbytes() == 4 * s.numel() for s in scales), "no views of the flat table stay"


def test_adaround_leaves_binary_rows_alone() -> None:
    """A symmetric 1-bit row has no code between its two: rounding up or down would make one."""
    layer = layer_of("mixed")
    before, binary = layer.stored_codes().clone(), layer.binary_rows()
    assert binary is not None
    learner = RoundingLearner({"l": layer}, Reconstruct(do="reconstruct", train="rounding"))
    learner.relax(NOW)
    assert layer.trial_weight is not None
    rows = binary.flatten()
    assert all(len(row.unique()) == 2 for row in layer.trial_weight.detach()[rows])
    with torch.no_grad():
        learner.alpha.neg_()
    learner.harden()
    assert torch.equal(layer.stored_codes()[rows], before[rows])
    assert not torch.equal(layer.stored_codes()[~rows], before[~rows]) and int(rows.sum()) == 2


def test_expanding_the_table_is_the_layers_own() -> None:
    layer = layer_of("split")
    learner = WeightLearner({"l": layer}, settings(weight_scale=True), torch.Generator())
    with torch.no_grad():
        learner.trained["weight_scale/l"].normal_(0, 0.1)
    table = learner._table("l")
    learner.harden()
    assert torch.equal(layer.weight_scale, table.detach()) and table.shape == (10, 2)
    assert torch.equal(layer.scale_tables()[0], expand_weight_scale(table.detach(), (5, 3), 4))
