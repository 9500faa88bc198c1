"""Low-rank branches: the factors, the iteration around the quantizer, the smoothing search, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.estimate import foreseen, model_bytes, weight_bits
from bitbrush.engine.planning import make_plan
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.network.layers import QuantConv2d, QuantLinear
from bitbrush.network.low_rank import product
from bitbrush.network.survey import survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec
from bitbrush.steps.branches import OutputError, factors, inputs_of, smoothings, split
from bitbrush.steps.low_rank import INPUTS
from small import CALIBRATE, FIT, PACK, begin, complete, execute, least_pipeline, recipe

GROUPS = '{ mode = "dynamic", granularity = "token_group", group = 8, signed = true }'
HEAD = f"""
name = "small"
weights = 4
activations = 4
[layers]
"*" = {{ weight = {{ signed = true }}, activation = {GROUPS} }}
"conv_in | conv_out" = {{ weight = {{ bits = 8 }} }}
"""


def branch(**choices: Any) -> str:
    given = {"rank": 4, "grid": 3, "rows": 40, "samples": 12, "iterations": 6, "points": 4, **choices}
    return '[[step]]\ndo = "low_rank"\n' + "".join(f"{k} = {v!r}\n" for k, v in given.items()).replace("'", '"')


def four_bits(matrix: Tensor) -> Tensor:
    grid = Grid(bits=4, signed=True)
    scale, zero = (t[:, None] for t in ranges.search(matrix, grid, method="minmax"))
    return decode(encode(matrix, reciprocal(scale), zero, 15), scale, zero)


def matrix(rows: int = 20, columns: int = 33, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- factors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16)])
def test_the_rest_has_the_discarded_singular_values(shape: tuple[int, int]) -> None:
    """B6.3: ``|R|^2`` is the sum of their squares, up to float16, and falls with the rank."""
    w = matrix(*shape)
    values, before, ran = torch.linalg.svdvals(w.double()), torch.inf, 0
    for rank in (1, 2, 5, 12, 16):
        up, down = factors(w, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1]) and up.dtype == torch.float16
        left = float((w - product(up, down)).double().square().sum())
        assert left == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-4)
        assert left < before
        before, ran = left, ran + 1
    assert ran == 5


def test_the_whole_rank_leaves_nothing() -> None:
    """B6.2: exact up to the 16 bits of the factors; of rank-deficient and zero matrices, too."""
    deficient = matrix(20, 4) @ matrix(4, 33, 1)
    for w in (matrix(), matrix(33, 20), deficient, torch.zeros(5, 7)):
        up, down = factors(w, min(w.shape))
        assert torch.allclose(product(up, down), w, atol=4e-3 * max(1.0, float(w.abs().max())))
        assert bool(up.isfinite().all()) and bool(down.isfinite().all())


def test_factors_of_any_size_fit_float16() -> None:
    """Balanced: singular values of 1e-3 or 1e5 are outside what one factor could hold precisely."""
    for size in (1e-4, 1.0, 1e4):
        w = matrix() * size
        assert torch.allclose(product(*factors(w, 20)), w, atol=4e-3 * size)


def test_a_planted_column_goes_into_the_branch() -> None:
    """B6.5: an outlier column, as smoothing makes them, is not in the rest."""
    w = matrix(24, 32) * 0.1
    w[:, 5] += 4 * torch.sign(matrix(24, 1, 3))[:, 0]
    done = split(w, 1, four_bits, lambda q, b: float((q + b - w).square().sum()))
    assert float(done.rest[:, 5].abs().max()) < 0.1 * float(w[:, 5].abs().max())
    plain = float((four_bits(w) - w).square().sum())
    assert done.errors[0] < 0.1 * plain


# ---- the iteration ---------------------------------------------------------------------------------------------------
def test_the_best_iterate_is_kept_and_the_first_worse_one_is_the_last() -> None:
    """B6.4, and the order: SVD of W - Q(R), then R = W - L."""
    gained = 0
    for seed in range(6):
        w = matrix(seed=seed)
        done = split(w, 3, four_bits, lambda q, b, w=w: float((q + b - w).square().sum()), 50)
        kept = min(done.errors)
        assert float((done.decoded + product(done.up, done.down) - w).square().sum()) == pytest.approx(kept, rel=1e-6)
        assert list(done.errors[:-1]) == sorted(done.errors[:-1], reverse=True) and kept <= done.errors[0]
        assert torch.equal(done.rest, w - product(done.up, done.down))
        assert len(done.errors) == 50 or done.errors[-1] >= done.errors[-2]
        one = split(w, 3, four_bits, lambda q, b, w=w: float((q + b - w).square().sum()), 1)
        assert one.errors == done.errors[:1]
        second = factors(w - one.decoded, 3)
        if len(done.errors) == 3:
            assert torch.equal(second[0], done.up)
        gained += kept < done.errors[0]
    assert gained >= 3


def test_rank_zero_is_rounding() -> None:
    w = matrix()
    done = split(w, 0, four_bits, lambda q, b: float((q + b - w).square().sum()), 9)
    assert torch.equal(done.decoded, four_bits(w)) and torch.equal(done.rest, w) and len(done.errors) == 1
    assert done.up.shape == (20, 0) and done.down.shape == (0, 33)


def test_more_rank_loses_less() -> None:
    """B6.7 for one layer: a weight whose singular values fall off, as trained ones' do."""
    u, s, v = torch.linalg.svd(matrix(64, 64))
    w = u @ torch.diag(s * torch.exp(-torch.arange(64) / 12)) @ v
    lost = [split(w, r, four_bits, lambda q, b: float((q + b - w).square().sum()), 20).errors for r in (0, 4, 8, 16)]
    least = [min(errors) for errors in lost]
    assert least == sorted(least, reverse=True) and least[3] < 0.5 * least[0]


# ---- inputs and errors -----------------------------------------------------------------------------------------------
CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


def _layer(kind: str, conv: dict[str, Any] | None = None, **spec: Any) -> Any:
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(12, 7) if kind == "linear" else nn.Conv2d(12, 7, **(conv or CONVS[0]))
    wrapper: Any = QuantLinear if kind == "linear" else QuantConv2d
    activation = ActivationSpec(grid=Grid(bits=4), mode="dynamic", granularity="token_group", group=5)
    full = LayerSpec(**{"weight": WeightSpec(), "activation": activation, **spec})
    return wrapper.wrap(module.requires_grad_(False), full, None, 1)


def test_kept_inputs_are_those_of_the_product() -> None:
    """Every kept row or patch gives an output that the layer has somewhere."""
    ran = 0
    for kind, conv in [("linear", None), *(("conv", c) for c in CONVS)]:
        layer = _layer(kind, conv)
        x = torch.randn((3, 5, 12) if kind == "linear" else (3, 12, 8, 9), generator=torch.Generator().manual_seed(1))
        kept = inputs_of(layer, x, 30, torch.Generator().manual_seed(2))
        found = kept.flatten(1) @ layer.weight.flatten(1).T + layer.bias
        outputs = layer(x).movedim(layer.channel_dim, -1).reshape(-1, 7)
        nearest = torch.cdist(found, outputs, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        assert kept.shape[0] == 30 and float(nearest.max()) < 1e-4, conv
        assert len(kept.flatten(1).unique(dim=0)) > 8
        ran += 1
    assert ran == 5


def test_the_error_is_that_of_the_layer() -> None:
    """On all rows of a linear layer, and the only patch of a convolution."""
    for kind in ("linear", "conv"):
        layer = _layer(kind, {"kernel_size": 3}, input_scale=True, low_rank=2)
        x = torch.randn((40, 12) if kind == "linear" else (40, 12, 3, 3), generator=torch.Generator().manual_seed(3))
        factor = torch.rand(12, generator=torch.Generator().manual_seed(4)) + 0.5
        layer.set_input_scale(factor)
        up, down = factors(layer.scaled_weight().flatten(1), 2)
        layer.set_low_rank(up, down.reshape(layer.low_rank.down.shape))
        decoded = four_bits(layer.scaled_weight().flatten(1))
        layer.trial_weight, layer.face = decoded.reshape(layer.weight.shape), "sim"
        bias = layer.bias.reshape(1, -1, *[1] * (x.ndim - 2))
        want = layer.operation(x, layer.weight) - bias
        share = float((layer(x) - bias - want).square().sum() / want.square().sum())
        assert OutputError(layer, x, factor)(decoded, product(up, down)) == pytest.approx(share, rel=1e-4)
        assert share > 1e-4


def test_candidates_of_the_smoothing() -> None:
    x, w = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    found = dict(smoothings(x, w, 20))
    assert len(found) == 38  # and (0, 0), which is not tried twice
    assert torch.allclose(found[(0.5, 0.5)], torch.tensor([0.5, 3.0]))
    assert torch.allclose(found[(0.5, 0.0)], torch.tensor([0.5, 1.0]))


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    text = HEAD + CALIBRATE + branch() + FIT + PACK
    return execute(tmp_path_factory.mktemp("branch"), tiny.pipeline("text"), text)


def test_a_run_packs_branches_in_attention_and_feed_forward(done: Run) -> None:
    with_branch, without = set[str](), set[str]()
    for name, layer in done.layers().items():
        (with_branch if layer.low_rank is not None else without).add(name)
        assert layer.spec.input_scale and layer.face == "packed"
        if layer.low_rank is not None:
            assert layer.spec.low_rank == 4 and float(layer.low_rank.weight().abs().max()) > 0
    assert len(with_branch) >= 20 and all(".attentions." in name for name in with_branch)
    assert "conv_in" in without and any(name.endswith("time_emb_proj") for name in without)
    verify = next(entry for entry in done.done if entry["step"] == "verify")
    assert verify["equal"] and verify["sqnr_simulated_vs_float_db"] > 5


def test_notes_say_what_it_brought_and_costs(done: Run) -> None:
    ran = better = 0
    for entry in done.done:
        for name, fact in entry["layers"].items() if entry["step"] == "low_rank" and entry["unit"] != INPUTS else ():
            layer = done.layers()[name]
            assert fact["kept"] <= fact["first"] and fact["kept"] <= 1.05 * fact["plain"]
            better += fact["kept"] < fact["plain"]
            if layer.low_rank is not None:
                up, down = layer.low_rank()
                assert fact["branch_bytes"] == 2 * (up.numel() + down.numel())
                macs = (up.numel() + down.numel()) / (layer.out_channels_ * layer.in_channels_)
                assert fact["branch_macs"] == pytest.approx(macs, rel=1e-4) and 1 <= fact["iterates"] <= 6
            ran += 1
    assert ran == len(done.plan.layers) > 50 and better > 0.8 * ran


def test_the_float_face_is_untouched(done: Run, tmp_path: Path) -> None:
    run = execute(tmp_path, tiny.pipeline("text"), HEAD + CALIBRATE + branch(branch="all") + FIT)
    assert torch.equal(tiny.run(run.model), tiny.run(tiny.pipeline("text").unet))
    plain = [layer for layer in run.layers().values() if layer.low_rank is not None]
    assert len(plain) == len(run.plan.layers) > 50 and {type(layer) for layer in plain} == {QuantLinear, QuantConv2d}
    assert all(layer.spec.low_rank == min(4, *layer.weight.flatten(1).shape) for layer in plain)


def _lost(run: Run) -> float:
    batch = next(iter(run.tape.select(list(range(len(run.tape))))))
    args, kwargs = run.tape.inputs(batch)
    with torch.no_grad():
        with wrap.show(run.model, "float"):
            want = run.model(*args, **kwargs).sample
        with wrap.show(run.model, "sim"):
            return float((run.model(*args, **kwargs).sample - want).square().mean())


def test_ablation_of_outlier_channels(tmp_path: Path) -> None:
    """B6.7: rounding alone is worst, smoothing with branch best, each of them alone in between."""
    lost: dict[str, float] = {}
    for name, choices in {
        "rtn": {"rank": 0, "smooth": "keep"}, "smooth": {"rank": 0, "smooth": "search"},
        "branch": {"rank": 4, "smooth": "keep"}, "both": {"rank": 4, "smooth": "search"},
    }.items():
        pipe = least_pipeline(channels=16)
        with torch.no_grad():
            for module in pipe.unet.modules():
                if isinstance(module, nn.GroupNorm):  # a few channels of what convolutions receive are large
                    module.weight[::5] *= 12
                if isinstance(module, nn.Conv2d) and module.in_channels > 1:
                    module.weight[:, ::5] /= 3
        (tmp_path / name).mkdir()
        text = HEAD.replace("group = 8", "group = 64") + CALIBRATE + branch(branch="all", **choices) + FIT
        lost[name] = _lost(execute(tmp_path / name, pipe, text))
    assert lost["both"] < lost["smooth"] < lost["rtn"] and lost["both"] < lost["branch"] < lost["rtn"], lost


def test_rank_zero_keeping_is_the_recipe_without_the_step(tmp_path: Path) -> None:
    runs = []
    for i, middle in enumerate(("", branch(rank=0, smooth="keep"))):
        (tmp_path / str(i)).mkdir()
        runs.append(execute(tmp_path / str(i), least_pipeline(), HEAD + CALIBRATE + middle + FIT))
    assert runs[0].plan == runs[1].plan
    pairs = list(zip(runs[0].layers().values(), runs[1].layers().values(), strict=True))
    assert len(pairs) > 8 and all(torch.equal(a.stored_codes(), b.stored_codes()) for a, b in pairs)


def test_a_smooth_step_before_it_is_kept(tmp_path: Path) -> None:
    text = HEAD + CALIBRATE + '[[step]]\ndo = "smooth"\n' + branch(smooth="keep", branch="all") + FIT
    run = execute(tmp_path, least_pipeline(), text)
    smooth, ran = run.journal.find("smooth", "all layers"), 0
    assert smooth is not None
    for name, layer in run.layers().items():
        assert layer.low_rank is not None and torch.equal(layer.input_scale, smooth.tensors[f"{name}/input_scale"])
        ran += 1
    assert ran > 8


def test_resumed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    text = HEAD + CALIBRATE + branch(branch="all") + FIT + PACK
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = execute(tmp_path / "a", least_pipeline(), text)
    first = begin(tmp_path / "b", least_pipeline(), recipe(tmp_path / "b", text))
    cut = first.recipe.steps[1]
    for step in first.recipe.steps[:2]:
        for unit in step.units(first)[: 3 if step is cut else None]:
            first._one(step, unit)
    first.journal.release()
    again = begin(tmp_path / "b", least_pipeline(), recipe(tmp_path / "b", text), resume=True)
    again.execute()
    again.journal.release()
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert sorted(ours) == sorted(theirs) and len(ours) > 40
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_estimate_foresees_the_bytes(done: Run, tmp_path: Path) -> None:
    asked = recipe(tmp_path, HEAD + CALIBRATE + branch() + FIT + PACK)
    found = survey(tiny.text_unet(), tokens=tiny.TOKENS)
    plan = foreseen(found, make_plan(found, asked).plan, asked)
    assert {n: s.low_rank for n, s in plan.layers.items()} == {n: s.low_rank for n, s in done.plan.layers.items()}
    packed = sum(layer.packed_bytes() for layer in done.layers().values()) + 4 * sum(found.other.values())
    assert model_bytes(found, plan)["packed_bytes"] == packed
    assert weight_bits(plan.layers["mid_block.resnets.0.conv1"]) == 4


def test_orders_that_cannot_work(tmp_path: Path) -> None:
    for text, why in [
        (branch(), "needs a step 'calibrate'"), (CALIBRATE + FIT + branch(), "before the step 'fit weights'"),
        (CALIBRATE + branch() + '[[step]]\ndo = "smooth"\n', "before the step 'low_rank'"),
        (CALIBRATE + branch() + '[[step]]\ndo = "split"\n', "before the step 'low_rank'"),
    ]:
        with pytest.raises(InputError, match=why) as found:
            recipe(tmp_path, HEAD + text)
        assert complete(found.value)
    with pytest.raises(InputError, match="matches no layer"):
        make_plan(survey(tiny.text_unet(), tokens=tiny.TOKENS), recipe(tmp_path, HEAD + CALIBRATE + branch(layers="x")))


def test_the_recipe_and_its_presets() -> None:
    found = survey(tiny.text_unet(), tokens=tiny.TOKENS)
    ranks = {}
    for preset in (None, "rank-0", "rank-8", "rank-16", "convs", "no-smooth", "rtn", "signed", "demo"):
        asked = read_recipe("svdquant", preset=preset)
        plan = foreseen(found, make_plan(found, asked).plan, asked)
        ranks[preset] = sum(spec.low_rank for spec in plan.layers.values())
        assert all(s.activation is not None and s.activation.group == 64 for s in plan.layers.values())
        signed = {n: s.activation.grid.signed for n, s in plan.layers.items() if s.activation is not None}
        assert signed["mid_block.resnets.0.conv1"] == (preset == "signed") and signed["conv_in"]
        scaled = {s.input_scale for s in plan.layers.values()}
        assert scaled == {preset not in ("no-smooth", "rtn")}
    assert ranks["rtn"] == ranks["rank-0"] == 0 < ranks["rank-8"] < ranks["rank-16"] < ranks[None] < ranks["convs"]


def test_weights_in_groups_of_channels(tmp_path: Path) -> None:
    """split with a group: a scale a row and group; outliers of one group do not cost the others."""
    text = HEAD + CALIBRATE + '[[step]]\ndo = "split"\ngroup = 8\n' + branch(branch="all") + FIT + PACK
    run = execute(tmp_path, least_pipeline(channels=12), text)
    want = {site.name: site for site in run.survey.layers()}
    cut = 0
    for name, layer in run.layers().items():
        assert sum(layer.segments) == want[name].shape[1] and max(layer.segments) <= 8
        bounds = {sum(layer.segments[:i]) for i in range(len(layer.segments))}
        assert not want[name].boundary or want[name].boundary[0] in bounds
        assert layer.weight_scale.shape == (layer.out_channels_, len(layer.segments))
        cut += len(layer.segments) > 1
    assert cut > 8 and any(site.boundary for site in want.values())
    assert next(e for e in run.done if e["step"] == "verify")["equal"]
