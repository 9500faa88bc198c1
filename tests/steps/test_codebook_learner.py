"""Codebooks and row scales under fixed codes: the lean decode against autograd's, and what is stored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbrush.network import wrap
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.numbers.codebook import decode, from_groups
from bitbrush.numbers.grid import Grid, LayerSpec, Plan, WeightSpec
from bitbrush.steps import codebook_learner
from bitbrush.steps.additive import Users
from bitbrush.steps.codebook_learner import CodebookLearner, Decode, Part, sets_of
from bitbrush.steps.loop import Budget, _Loop

NOW = torch.tensor(0.5)
SHAPES = ((5, 6), (3, 4), (7, 2))  # rows and groups of three layers


def settings(**changes: Any) -> Any:
    return SimpleNamespace(**{"codebooks": True, "weight_scale": True, "lr_codebooks": 0.01, "lr_weight_scale": 0.02,
                              **changes})


def model(seed: int = 0) -> dict[str, CodebookLayer]:
    """Two convolutions and a linear layer on one set, and a linear layer of its own; random codes and tables."""
    torch.manual_seed(seed)
    grid = Grid(kind="codebook", bits=3)
    shared, own = (LayerSpec(weight=WeightSpec(grid=grid, codebooks=2, group=4, shared=s)) for s in ("some", ""))
    net = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.Linear(8, 5), nn.Conv2d(4, 6, 1), nn.Linear(12, 7))
    wrap.wrap(net, Plan(layers={"0": shared, "1": own, "2": shared, "3": shared}))
    layers: dict[str, CodebookLayer] = {}
    for name, layer in wrap.layers(net).items():
        assert isinstance(layer, CodebookLayer)
        books = None if layer.weight_spec.shared and name != "0" else torch.randn(2, 8, 4) / 2
        layer.set_codes(torch.randint(0, 8, layer.code_shape), books, torch.rand(layer.out_channels_) + 0.1)
        layers[name] = layer
    wrap.set_face(net, "sim")
    return layers


def half(x: Tensor) -> Tensor:
    """Rounded to float16; the gradient passes."""
    return x + (x.half().float() - x).detach()


# ---- the decode ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "bits", "group"), [(1, 1, 2), (2, 4, 8), (3, 8, 4)])
def test_decode_and_its_gradients_are_those_of_the_definition(count: int, bits: int, group: int) -> None:
    g = torch.Generator().manual_seed(count)
    codes = [torch.randint(0, 1 << bits, (n, m, count), generator=g, dtype=torch.uint8) for n, m in SHAPES]
    books = torch.randn(count, 1 << bits, group, generator=g).requires_grad_()
    scales = (torch.rand(sum(n for n, _ in SHAPES), generator=g) + 0.1).requires_grad_()
    part = Part(codes, 1 << bits)
    flat: Tensor = Decode.apply(books, scales, part)
    found = part.matrices(flat)
    wanted = [decode(c, half(books), half(s)) for c, s in zip(codes, scales.split([n for n, _ in SHAPES]), strict=True)]
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    pull = [torch.randn(w.shape, generator=g) for w in wanted]
    grads = [torch.autograd.grad([*outs], (books, scales), pull, retain_graph=True) for outs in (found, wanted)]
    for mine, autograds in zip(*grads, strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-5, atol=1e-5)
        assert bool(mine.any())
    used = torch.stack([torch.cat([c[..., k].flatten() for c in codes]).long().bincount(minlength=1 << bits) > 0
                        for k in range(count)])
    assert bool((grads[0][0].abs().sum(-1)[~used] == 0).all())


def test_only_what_is_wanted_is_differentiated() -> None:
    part = Part([torch.zeros(3, 2, 1, dtype=torch.uint8)], 2)
    for books, scales in ((True, False), (False, True)):
        a, b = torch.ones(1, 2, 4, requires_grad=books), torch.ones(3, requires_grad=scales)
        Decode.apply(a, b, part).sum().backward()
        assert (a.grad is not None, b.grad is not None) == (books, scales)


def test_nothing_of_the_weights_size_is_kept_for_the_backward() -> None:
    part = Part([torch.randint(0, 4, (64, 32, 3), dtype=torch.uint8)], 4)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        Decode.apply(torch.randn(3, 4, 8, requires_grad=True), torch.ones(64, requires_grad=True), part)
    assert sorted(kept) == [64, 96]  # scales and codebooks; the weight has 16,384 numbers


@pytest.mark.parametrize(
    ("groups", "count", "words"), [(1, 1, 2), (64, 1, 1), (65, 2, 2), (1000, 3, 16), (500, 2, 256)]
)
def test_sums_over_users_whatever_the_lists(groups: int, count: int, words: int) -> None:
    """Empty lists, one list of all, lists of just a chunk and one more; in parts of any number of layers."""
    g = torch.Generator().manual_seed(groups)
    codes = torch.randint(0, max(1, words // 2), (groups, 1, count), generator=g, dtype=torch.uint8)
    values = torch.randn(groups, 4, generator=g)
    want = torch.zeros(count * words, 4, dtype=torch.float64)
    for k in range(count):
        want.index_add_(0, codes[:, 0, k].long() + k * words, values.double())
    for pieces in ([codes], list(codes.split(-(-groups // 3)))):
        torch.testing.assert_close(Users.of(pieces, words).sums(values).double(), want, rtol=1e-5, atol=1e-5)


# ---- the learner -----------------------------------------------------------------------------------------------------
def losses(layers: dict[str, CodebookLayer]) -> Any:
    """A loss of the trial weights: their distance to fixed random ones."""
    g = torch.Generator().manual_seed(5)
    targets = {name: torch.randn(layer.weight_shape, generator=g) for name, layer in layers.items()}

    def loss(rows: Tensor) -> Tensor:
        return torch.stack([(layer.weight_in_use() - targets[n]).square().mean() for n, layer in layers.items()]).sum()

    return loss


def trained(layers: dict[str, CodebookLayer], learner: CodebookLearner, steps: int = 8) -> None:
    worker = _Loop(learner, losses(layers), torch.zeros(steps, 1, dtype=torch.long), Budget(steps, 99, 1.0, "constant"))
    for k in range(steps):
        worker.iterate(k)


@pytest.mark.parametrize("part", [codebook_learner.PART, 60, 1], ids=["whole", "two parts", "each layer"])
def test_training_starts_at_the_stored_weight_and_ends_at_the_stored_one(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook_learner, "PART", part)
    layers = model()
    codes = {name: layer.stored_codes().clone() for name, layer in layers.items()}
    before = {name: layer.decoded_weight() for name, layer in layers.items()}
    learner = CodebookLearner(layers, settings())
    assert sorted(len(one.parts) for one in learner.sets.values()) == [1, {60: 2, 1: 3}.get(part, 1)]
    assert {n: p.numel() for n, p in learner.parameters().items()} == {
        "codebooks/bitbrush_codebooks.some": 64, "row_scale/bitbrush_codebooks.some": 19,
        "codebooks/1.codebooks": 64, "row_scale/1.codebooks": 5,
    }
    learner.relax(NOW)
    assert all(torch.equal(layer.weight_in_use(), before[n]) for n, layer in layers.items())
    trained(layers, learner)
    learner.relax(NOW)
    relaxed = {name: layer.weight_in_use().detach() for name, layer in layers.items()}
    facts = learner.harden()
    assert 0 < facts["codebooks_moved"] < 1
    for name, layer in layers.items():
        assert layer.trial_weight is None and torch.equal(layer.stored_codes(), codes[name])
        assert torch.equal(layer.decoded_weight(), relaxed[name]), "what was trained is what is stored"
        assert not torch.equal(layer.decoded_weight(), before[name]) and layer.weight_scale.dtype == torch.float16
    learner.restore()
    assert all(torch.equal(layer.decoded_weight(), before[n]) for n, layer in layers.items())


def test_parts_learn_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for part in (codebook_learner.PART, 1):
        monkeypatch.setattr(codebook_learner, "PART", part)
        layers = model()
        learner = CodebookLearner(layers, settings())
        trained(layers, learner)
        ends.append([p.detach().clone() for p in learner.parameters().values()])
    assert len(ends[0]) == 4
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["codebooks", "weight_scale"])
def test_one_of_both(wanted: str) -> None:
    layers = model()
    learner = CodebookLearner(layers, settings(**{"codebooks": False, "weight_scale": False, wanted: True}))
    assert {"codebooks": "codebooks/", "weight_scale": "row_scale/"}[wanted] in next(iter(learner.parameters()))
    assert len(learner.parameters()) == 2 and len(set(learner.rates().values())) == 1
    books = {name: layer.book()().clone() for name, layer in layers.items()}
    scales = {name: layer.weight_scale.clone() for name, layer in layers.items()}
    trained(layers, learner)
    learner.harden()
    for name, layer in layers.items():
        assert torch.equal(layer.book()(), books[name]) is (wanted == "weight_scale")
        assert torch.equal(layer.weight_scale, scales[name]) is (wanted == "codebooks")


def test_shared_codebooks_are_one_parameter_whose_gradient_is_the_sum() -> None:
    layers = model()
    learner = CodebookLearner(layers, settings())
    assert {key: list(members) for key, members in sets_of(layers).items()} == {
        "bitbrush_codebooks.some": ["0", "2", "3"], "1.codebooks": ["1"],
    }
    learner.relax(NOW)
    losses(layers)(NOW).backward()
    found = learner.parameters()["codebooks/bitbrush_codebooks.some"].grad
    learner.release()
    books = layers["0"].book()().float().requires_grad_()
    for name in ("0", "2", "3"):
        layer = layers[name]
        layer.trial_weight = from_groups(decode(layer.codes, books, layer.weight_scale), layer.weight_shape)
    losses(layers)(NOW).backward()
    assert found is not None and books.grad is not None
    torch.testing.assert_close(found, books.grad, rtol=1e-5, atol=1e-6)
