"""Losses of a finetuning: values by hand, relations with known answers, hooks that live for one forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tiny
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.steps import teaching
from bitbrush.steps.losses import (
    Objective,
    Watch,
    guided_estimate,
    log_relations,
    mean_square,
    relation_loss,
    relation_unit,
    smoothed,
)
from small import FIT, HEAD, RANGES, execute

CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = 16\ntrajectories = 2\nsteps = 4\nbatch = 2\nguidance = 3.0\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A guided tiny pipeline with 2 trajectories of 4 steps, quantized to W4A8."""
    return execute(tmp_path_factory.mktemp("losses"), tiny.pipeline("text"), HEAD + CALIBRATE + FIT + RANGES)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_squares_and_guidance() -> None:
    a, b = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    assert torch.allclose(mean_square(a, b), ((a - b) ** 2).mean())
    answer = torch.randn(3, 2, 2, 4, 5, 5)  # groups, window, halves, C, H, W
    want = answer[:, :, 0] + 3.0 * (answer[:, :, 1] - answer[:, :, 0])
    assert torch.equal(guided_estimate(answer, 3.0), want)
    assert torch.equal(guided_estimate(answer[:, :, :1], 3.0), answer[:, :, :1]), "one half is the estimate"
    assert torch.allclose(guided_estimate(answer, 1.0), answer[:, :, 1], atol=1e-6)


def test_relations_by_hand() -> None:
    f, q = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)

    def rows(x: Tensor) -> Tensor:
        flat = x.flatten(2).transpose(1, 2)
        cosine = torch.nn.functional.cosine_similarity(flat[:, :, None], flat[:, None], dim=-1)
        return torch.softmax(cosine, dim=-1)

    p, r = rows(f), rows(q)
    assert torch.allclose(log_relations(f).exp(), p, atol=1e-6)
    assert torch.allclose(p.sum(-1), torch.ones(2, 12), atol=1e-6)
    assert torch.allclose(relation_loss(q, f), (p * (p / r).log()).sum(-1).mean(), atol=1e-6), "KL(teacher || student)"


def test_relations_have_known_properties() -> None:
    """Zero for equal features, never negative, blind to the length of each pixel's vector."""
    ran = 0
    for seed in range(5):
        torch.manual_seed(seed)
        f, q = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
        assert float(relation_loss(f, f)) == 0
        far, near = relation_loss(q, f), relation_loss(f + 0.1 * q, f)
        assert float(far) > float(near) > 0
        length = torch.rand(2, 1, 4, 4) * 3 + 0.1
        assert torch.allclose(relation_loss(q * length, f), far, rtol=1e-4)
        assert torch.allclose(relation_loss(q, f * length), far, rtol=1e-4)
        ran += 1
    assert ran == 5


def test_features_are_averaged_over_the_window() -> None:
    features = torch.randn(3, 2, 2, 5, 4, 4)
    mean = smoothed(features)
    assert mean.shape == (6, 5, 4, 4) and torch.equal(mean[1], features[0, :, 1].mean(0))
    assert smoothed(features, pool=2).shape == (6, 5, 2, 2)
    assert torch.allclose(smoothed(features, pool=2)[1, :, 0, 0], mean[1, :, :2, :2].mean((1, 2)), atol=1e-6)
    assert torch.equal(smoothed(features, pool=4), mean) and torch.equal(smoothed(features, pool=9), mean)
    one, two = torch.randn(1, 2, 1, 5, 4, 4), torch.randn(1, 2, 1, 5, 4, 4)
    swapped = two.flip(1)
    assert torch.allclose(relation_loss(smoothed(two), smoothed(one)), relation_loss(smoothed(swapped), smoothed(one)))


@pytest.mark.parametrize(("window", "halves", "channels"), [(2, 2, 4), (2, 1, 3), (3, 2, 4), (1, 1, 4)])
def test_weights_that_make_the_means_the_papers_sums(window: int, halves: int, channels: int) -> None:
    """sum of squares + 100 x (sum over images and rows of the KL) = constant x (mean + 100 halves / (n C) mean)."""
    g, side = 3, 4
    eps, eps_q = (torch.randn(g, window, halves, channels, side, side) for _ in range(2))
    f, q = (torch.randn(g, window, halves, 7, side, side) for _ in range(2))
    estimate, estimate_q = guided_estimate(eps, 3.0), guided_estimate(eps_q, 3.0)
    mean = mean_square(estimate_q, estimate)
    mean = mean + relation_unit(halves, window, channels) * relation_loss(smoothed(q), smoothed(f))
    taught, learnt = log_relations(smoothed(f)), log_relations(smoothed(q))
    relations = (taught.exp() * (taught - learnt)).sum()
    sums = (estimate_q - estimate).square().sum() + 100 * relations
    assert torch.allclose(sums, estimate.numel() * mean, rtol=1e-4)


# ---- on a network ------------------------------------------------------------------------------------------------
def objective(run: Run, window: int = 2, **weights: float) -> Objective:
    names = [n for n in run.layers() if n.endswith("time_emb_proj")]
    return Objective(run.model, teaching.load(run, window), weights, names, 3.0)  # type: ignore[arg-type]


ALL = {"output": 1.0, "guided": 0.5, "layers": 2.0, "relation": 3.0, "features": 4.0}


def test_an_unquantized_student_has_no_loss(run: Run) -> None:
    found = objective(run, **ALL)
    with wrap.show(run.model, "float"):
        zero = found.measure(found.lessons.probe(16), 4)
    assert list(zero) == [*ALL, "total"]
    assert zero["layers"] == zero["relation"] == zero["features"] == 0
    assert zero["output"] < 1e-10 and zero["guided"] < 1e-9, "the tape holds other batches' rounding"
    with wrap.show(run.model, "sim"):
        some = found.measure(found.lessons.probe(16), 4)
        apart = found.measure(found.lessons.probe(16), 1)
    assert all(some[name] > 1e-6 for name in ALL)
    assert some["total"] == pytest.approx(sum(w * some[name] for name, w in ALL.items()), rel=1e-5)
    assert all(apart[name] == pytest.approx(some[name], rel=0.02) for name in some), "but for codes on an edge"


def test_values_on_a_network(run: Run) -> None:
    """Against plain forwards of the two faces, row by row."""
    found = objective(run, **ALL)
    lessons, name = found.lessons, found.layers[0]
    rows = lessons.rows(torch.tensor([1]))
    answers, inner = {}, {}
    for face in ("float", "sim"):
        args, kwargs = lessons.inputs(rows)
        with wrap.show(run.model, face), torch.no_grad(), Watch(run.model, [name], True) as watch:  # type: ignore[arg-type]
            answers[face] = run.model(*args, **kwargs).sample
        inner[face] = (watch.answers[name], watch.features)
    assert answers["sim"].shape == (4, 4, 8, 8) and lessons.groups.shape == (4, 2, 2)
    with wrap.show(run.model, "sim"), torch.no_grad():
        parts = found.parts(torch.tensor([1]))
    assert torch.allclose(parts["output"], mean_square(answers["sim"], answers["float"]), rtol=1e-4)
    free, given = ((answers["sim"] - answers["float"])[i::2] for i in (0, 1))
    assert torch.allclose(parts["guided"], (free + 3 * (given - free)).square().mean(), rtol=1e-4)
    mean = [x[1].reshape(2, 2, *x[1].shape[1:]).mean(0) for x in (inner["sim"], inner["float"])]  # type: ignore[union-attr]
    assert torch.allclose(parts["features"], mean_square(*mean), rtol=1e-4)
    assert torch.allclose(parts["relation"], 25 * relation_loss(*mean), rtol=1e-3), "100 * 2 halves / (2 steps * 4)"
    only = Objective(run.model, lessons, {"layers": 1.0}, [name], 3.0)
    with wrap.show(run.model, "sim"), torch.no_grad():
        assert torch.allclose(only.parts(torch.tensor([1]))["layers"], mean_square(inner["sim"][0], inner["float"][0]))


@pytest.mark.parametrize("window", [1, 2])
def test_importance_weighs_the_squares_of_each_step(window: int, run: Run) -> None:
    """By hand: the weighted losses are means over rows of weight times that row's own loss."""
    lessons = teaching.load(run, window)
    importance = 0.5 + torch.arange(len(lessons.timesteps)).float() / 8
    losses = {"output": 1.0, "guided": 1.0}
    groups = torch.arange(len(lessons))
    with wrap.show(run.model, "sim"):
        found = Objective(run.model, lessons, losses, [], 3.0, importance=importance).measure(groups, len(groups))
        args, kwargs = lessons.inputs(lessons.rows(groups))
        with torch.no_grad():
            answer = run.model(*args, **kwargs).sample
    rows = lessons.rows(groups)
    delta, weight = answer - lessons.output.take(rows), importance[rows]
    assert found["output"] == pytest.approx(float((weight * delta.square().flatten(1).mean(1)).mean()), rel=1e-5)
    free, given = delta.unflatten(0, (-1, 2)).unbind(1)
    one = weight.unflatten(0, (-1, 2))[:, 0]
    guided = (free + 3 * (given - free)).square().flatten(1).mean(1)
    # both halves of a step are weighed like its unconditional row
    assert found["guided"] == pytest.approx(float((one * guided).mean()), rel=1e-5)
    assert len(rows) == 16 and weight.unique().numel() == 16


def test_a_window_of_two_over_four_steps_counts_twice_a_trajectory(run: Run) -> None:
    found = objective(run, **ALL)
    assert len(found.lessons) == 4 and sorted(found.lessons.groups.flatten().tolist()) == list(range(16))
    assert found.lessons.moments.bincount().tolist() == [2, 2]


def test_nothing_stays_behind(run: Run) -> None:
    found, before = objective(run, **ALL), hooks(run.model)
    with wrap.show(run.model, "sim"):
        found.parts(torch.tensor([0]))
        with pytest.raises(RuntimeError), Watch(run.model, found.layers, True):
            assert hooks(run.model) == before + len(found.layers) + 1
            raise RuntimeError
    assert hooks(run.model) == before and len(found.layers) > 2


def test_losses_that_need_no_teacher(run: Run) -> None:
    """The tape holds the float network's answer: it runs again only for what lies inside."""
    cases = [({"output": 1.0, "guided": 1.0}, False), ({"layers": 1.0}, True), ({"relation": 1.0}, True)]
    for weights, teaches in cases:
        found = objective(run, **weights)
        assert found.teaches is teaches
        calls = []
        handle = run.model.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        with wrap.show(run.model, "sim"), torch.no_grad():
            found.parts(torch.tensor([0]))
        handle.remove()
        assert len(calls) == 1 + teaches
    assert objective(run, output=1.0, relation=0.0).weights == {"output": 1.0}, "weight 0 costs nothing"


def test_a_model_without_features(run: Run) -> None:
    model = copy.copy(run.model)
    model._modules = {k: v for k, v in run.model._modules.items() if k != "conv_norm_out"}
    with pytest.raises(InputError, match="features to relate"):
        Objective(model, teaching.load(run, 1), {"relation": 1.0}, [], 3.0)
    with pytest.raises(InputError, match="'layers' has no layers"):
        Objective(run.model, teaching.load(run, 1), {"layers": 1.0}, [], 3.0)
