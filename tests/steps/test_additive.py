"""Fitting additive codebooks: exact invariants of VQDM (section 7.1 of its page), and its numbers' order (7.3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitbrush.errors import InputError
from bitbrush.numbers.codebook import bits_of, decode
from bitbrush.numbers.codec import decode as decode_affine
from bitbrush.numbers.codec import encode, reciprocal
from bitbrush.numbers.grid import Grid
from bitbrush.numbers.ranges import search as search_range
from bitbrush.steps import additive, beam
from bitbrush.steps.additive import Settings, Solution, Target

SMALL = Settings(count=2, bits=4, group=4, beam=4, epochs=4, steps=20)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def problem(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Target:
    """A Gaussian weight, correlated inputs with log-normal channel scales."""
    g = seeded(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=g)
    mix = 0.5 * torch.eye(columns) + 0.9 * torch.randn(columns, columns, generator=g) / columns**0.5
    inputs = torch.randn(8 * columns, columns, generator=g) @ mix
    inputs = inputs * torch.exp(0.7 * torch.randn(columns, generator=g))
    return Target(weight, (inputs.T @ inputs / len(inputs)).to(dtype))


def relative(target: Target, solution: Solution) -> float:
    return float(additive.loss([target], [target.energy()], solution))


def test_loss_is_the_mean_error_of_outputs() -> None:
    g = seeded()
    x, w, d = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((500, 24), (10, 24), (10, 24)))
    covariance = x.T @ x / 500
    expected = (x @ d.T).square().sum(dim=0).div(500).mean()
    torch.testing.assert_close(additive.output_error(w, w + d, covariance), expected, rtol=1e-12, atol=0)


# ---- beam search ---------------------------------------------------------------------------------------------------
def beginning(target: Target, settings: Settings, seed: int = 1) -> Solution:
    return additive.start([target], settings, seeded(seed))


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_gets_worse(width: int, dtype: torch.dtype) -> None:
    target = problem(24, 32, 0, dtype)
    solution = beginning(target, SMALL)
    codes, scale = solution.codes[0], solution.scales[0]
    g, before = seeded(2), beam.row_losses(target.weight - solution.weight(), target.covariance)
    for _ in range(4):
        codes = beam.search(target.weight, target.covariance, codes, solution.codebooks, scale, beam=width, generator=g)
        after = beam.row_losses(target.weight - decode(codes, solution.codebooks, scale), target.covariance)
        assert bool((after <= before).all()) and codes.dtype == torch.uint8
        before = after


def test_a_row_that_rounding_made_worse_keeps_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    target = problem(24, 32)
    solution = beginning(target, SMALL)
    better = beam.search(target.weight, target.covariance, solution.codes[0], solution.codebooks, solution.scales[0],
                         beam=4, generator=seeded())
    wrong = torch.where(torch.arange(24)[:, None, None] < 12, better, 15 - better).to(torch.int16)
    monkeypatch.setattr(beam, "_search_rows", lambda *args: wrong)
    found = beam.search(target.weight, target.covariance, solution.codes[0], solution.codebooks, solution.scales[0],
                        beam=4, generator=seeded())
    assert torch.equal(found[:12], better[:12]) and torch.equal(found[12:], solution.codes[0][12:])


def test_reported_change_is_the_recomputed_one_at_each_group() -> None:
    """Blocks of one group: the change never rises, and is that of the exact loss, of every hypothesis."""
    target = problem(12, 16)
    solution = beginning(target, SMALL)
    books, factors = solution.codebooks, solution.scales[0]
    wanted = target.weight / factors[:, None]
    states = solution.codes[0].long()[:, None].repeat(1, 3, 1, 1)
    change = torch.full((12, 3), torch.inf)
    change[:, 0] = 0
    start = beam.row_losses(wanted - decode(states[:, 0], books, torch.ones(12)), target.covariance)
    for group in (2, 0, 3, 1):
        block = beam.make_block(torch.tensor([group]), torch.tensor([[1, 0]]), target.covariance, books)
        flat = decode(states.flatten(0, 1), books, torch.ones(36))
        field = (wanted.repeat_interleave(3, 0) - flat) @ target.covariance[:, block.columns]
        here = states.flatten(0, 1)[:, block.groups].flip(2)
        new, ancestor, here = beam.visit_block(field, here, change, block)
        assert bool((new[:, 0] <= change[:, 0] + 1e-6 * start).all()) and bool((new.diff(dim=1) >= 0).all())
        states, change = states.flatten(0, 1)[ancestor].reshape(12, 3, 4, 2), new
        states[:, :, group] = here.reshape(12, 3, 2).flip(2)
        for hypothesis in range(3):
            left = wanted - decode(states[:, hypothesis], books, torch.ones(12))
            exact = beam.row_losses(left, target.covariance)
            torch.testing.assert_close(start + change[:, hypothesis], exact, rtol=1e-4, atol=1e-4)


def test_beam_of_one_ends_where_no_single_code_helps() -> None:
    target = problem(16, 16, 3, torch.float64)
    solution = beginning(target, SMALL)
    codes, books, scale = solution.codes[0], solution.codebooks, solution.scales[0]
    g = seeded(5)
    for _ in range(30):
        codes = beam.search(target.weight, target.covariance, codes, books, scale, beam=1, generator=g)
    best = beam.row_losses(target.weight - decode(codes, books, scale), target.covariance)
    tried = 0
    for j, m, word in itertools.product(range(4), range(2), range(16)):
        other = codes.clone()
        other[:, j, m] = word
        worse = beam.row_losses(target.weight - decode(other, books, scale), target.covariance)
        assert bool((worse >= best * (1 - 1e-5)).all())
        tried += 1
    assert tried == 128


def test_one_group_and_one_codebook_give_the_optimum() -> None:
    target = problem(20, 8, 1, torch.float64)
    books = torch.randn(1, 32, 8, generator=seeded(2))
    scale, codes = additive.row_scales(target.weight), torch.zeros(20, 1, 1, dtype=torch.uint8)
    for width in (1, 4):
        found = beam.search(target.weight, target.covariance, codes, books, scale, beam=width, generator=seeded())
        every = torch.stack([
            beam.row_losses(target.weight - decode(torch.full_like(codes, word), books, scale), target.covariance)
            for word in range(32)
        ])
        assert torch.equal(found[:, 0, 0].long(), every.argmin(dim=0))


def test_a_beam_that_keeps_everything_finds_the_global_optimum() -> None:
    """K = 2, B = 3, G = 2: 4,096 states, beam 512."""
    target = problem(6, 8, 4, torch.float64)
    books = torch.randn(2, 8, 4, generator=seeded(1)) * torch.tensor([1.0, 0.5])[:, None, None]
    scale = additive.row_scales(target.weight)
    states = torch.tensor(list(itertools.product(range(8), repeat=4))).reshape(-1, 2, 2)
    assert len(states) == 4096
    every = torch.stack([
        beam.row_losses(w - decode(states, books, s.expand(4096)), target.covariance)
        for w, s in zip(target.weight, scale, strict=True)
    ])
    begin = torch.zeros(6, 2, 2, dtype=torch.int64)
    losses = {}
    for width, blocks in itertools.product((1, 8, 512), (1, 8)):
        found = beam.search(target.weight, target.covariance, begin, books, scale, beam=width, generator=seeded(),
                            block_groups=blocks)
        losses[width, blocks] = beam.row_losses(target.weight - decode(found, books, scale), target.covariance)
    for blocks in (1, 8):
        torch.testing.assert_close(losses[512, blocks], every.min(dim=1).values, rtol=1e-6, atol=0)
        assert bool((losses[1, blocks] >= losses[512, blocks]).all())
    assert bool((losses[1, 8] > losses[512, 8] * 1.01).any())  # the check is not empty


def test_without_correlation_it_is_the_nearest_codeword() -> None:
    weight = torch.randn(10, 24, generator=seeded())
    books, scale = torch.randn(1, 16, 4, generator=seeded(1)), torch.ones(10)
    found = beam.search(weight, torch.eye(24), torch.zeros(10, 6, 1, dtype=torch.uint8), books, scale, beam=4,
                        generator=seeded())
    nearest = torch.cdist(weight.reshape(-1, 4), books[0]).argmin(dim=1).reshape(10, 6)
    assert torch.equal(found[:, :, 0].long(), nearest)
    assert torch.equal(additive.assign(weight.reshape(-1, 4), books[0]), nearest.flatten())
    assert torch.equal(additive.assign(weight.reshape(-1, 4), books[0], budget=1), nearest.flatten())


def test_blocks_and_chunks_of_rows_do_not_change_the_result() -> None:
    target = problem(24, 48)
    solution = beginning(target, SMALL)
    found = [
        beam.search(target.weight, target.covariance, solution.codes[0], solution.codebooks, solution.scales[0],
                    beam=4, generator=seeded(2), block_groups=size, budget=budget)
        for size, budget in ((8, 1 << 30), (1, 1 << 30), (5, 1 << 30), (8, 1), (3, 50_000))
    ]
    losses = [beam.row_losses(target.weight - decode(c, solution.codebooks, solution.scales[0]), target.covariance)
              for c in found]
    for codes, value in zip(found, losses, strict=True):
        assert float((codes != found[0]).float().mean()) < 0.01  # ties and rounding only
        torch.testing.assert_close(value.sum(), losses[0].sum(), rtol=1e-3, atol=0)
    sizes = [len(list(beam.row_chunks(solution.codes[0].shape, solution.codebooks.shape, 4, 8, b)))
             for b in (1 << 30, 1, 50_000)]
    assert sizes[0] == 1 and sizes[1] == 24 and 1 < sizes[2] < 24


def test_rows_of_zeros_and_inputs_of_zeros() -> None:
    target = problem(16, 16)
    weight, covariance = target.weight.clone(), target.covariance.clone()
    weight[3] = 0
    covariance[8:12], covariance[:, 8:12] = 0, 0
    solution, losses = additive.fit([Target(weight, covariance)], SMALL, seeded())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    assert float(solution.weight()[3].abs().max()) < 1e-6
    silent = Target(weight, torch.zeros_like(covariance))
    solution, losses = additive.fit([silent], SMALL, seeded())
    assert losses[0] == 0 and bool(solution.weight().isfinite().all())


# ---- start and continuous phase --------------------------------------------------------------------------------------
def test_kmeans_finds_separate_clusters_and_keeps_empty_centres() -> None:
    g = seeded()
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (middles[:, None] + 0.1 * torch.randn(3, 50, 2, generator=g)).flatten(0, 1)
    errors = []
    for seed in range(8):  # Lloyd's algorithm depends on where it starts
        centres = additive.kmeans(points, 3, seeded(seed))
        errors.append(float((points - centres[additive.assign(points, centres)]).square().sum(dim=1).mean()))
    assert min(errors) < 0.03
    few = additive.kmeans(points[:2], 5, g)
    assert few.shape == (5, 2) and bool(few.isfinite().all())
    assert torch.equal(points[:2], few[additive.assign(points[:2], few)])


def test_kmeans_weights_and_subsample() -> None:
    points = torch.tensor([[0.0], [1.0]])
    centre = additive.kmeans(points, 1, seeded(), weights=torch.tensor([3.0, 1.0]))
    assert float(centre) == pytest.approx(0.25)
    points = torch.randn(4000, 2, generator=seeded())
    whole, part = (additive.kmeans(points, 8, seeded(1), points_per_centre=n) for n in (None, 64))
    errors = [float((points - c[additive.assign(points, c)]).square().mean()) for c in (whole, part)]
    assert errors[0] < errors[1] < 1.2 * errors[0]


def test_points_count_by_their_effect_and_layers_alike() -> None:
    covariance = torch.diag(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    found = additive.point_weights(covariance, torch.tensor([1.0, 2.0]), 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 6.0, 8.0, 24.0]) / 40)
    torch.testing.assert_close(additive.point_weights(covariance * 9, torch.tensor([5.0, 10.0]), 2), found)


def test_each_codebook_fits_what_is_left() -> None:
    target = problem(48, 48)
    errors = [
        relative(Target(target.weight, torch.eye(48)), beginning(target, replace(SMALL, count=count, weighted=False)))
        for count in (1, 2, 3)
    ]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_an_adam_phase_does_not_end_above_its_start() -> None:
    target = problem(32, 32)
    for rate in (1e-4, 1.0):  # at 1.0 it diverges: the best point is the start or close to it
        settings = replace(SMALL, rate=rate)
        solution = beginning(target, settings)
        adam = additive.Adam([target], [target.energy()], solution, settings)
        before = relative(target, solution)
        after, reported = adam.phase(solution)
        assert relative(target, after) <= before and float(reported) == pytest.approx(relative(target, after), rel=1e-5)
        assert torch.equal(after.codes[0], solution.codes[0])
        if rate == 1e-4:
            assert relative(target, after) < 0.98 * before


@pytest.mark.parametrize("layers", [1, 2])
def test_the_gradient_is_that_of_the_loss(layers: int) -> None:
    """Written out by hand for speed: autograd of the plain loss is the reference."""
    targets = [problem(16, 16, 0, torch.float64), problem(8, 32, 1, torch.float64)][:layers]
    energies, solution = [target.energy() for target in targets], additive.start(targets, SMALL, seeded(1))
    adam = additive.Adam(targets, energies, solution, SMALL)
    value = adam.differentiate(solution.codes, additive.Users.of(solution.codes, 16))
    books = solution.codebooks.clone().requires_grad_()
    scales = [scale.clone().requires_grad_() for scale in solution.scales]
    plain = additive.loss(targets, energies, Solution(books, solution.codes, tuple(scales)))
    plain.backward()
    torch.testing.assert_close(value, plain.detach())
    for found, expected in zip([adam.books, *adam.scales], [books, *scales], strict=True):
        assert expected.grad is not None and bool(expected.grad.any())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-8)


def test_epochs_never_raise_the_loss_and_stop_early() -> None:
    target, seen = problem(48, 64), []
    settings = replace(SMALL, epochs=40, tolerance=0.02)
    solution, losses = additive.fit([target], settings, seeded(), lambda *what: seen.append(what))
    assert all(b <= a for a, b in itertools.pairwise(losses)) and 2 < len(losses) < 40
    values = [value for _, _, value in seen]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(values))
    assert [phase for phase, _, _ in seen[:3]] == ["start", "adam", "beam"] and len(seen) == 2 * len(losses) - 1
    assert losses[-1] == pytest.approx(relative(target, solution), rel=1e-6)
    assert losses[-1] > losses[-2] * 0.98  # why it stopped
    again, same = additive.fit([target], settings, seeded())
    assert same == losses and torch.equal(again.codes[0], solution.codes[0])


def test_layers_that_share_codebooks() -> None:
    """Other sizes and other units of weights and inputs: both layers are fitted, each by its relative error."""
    first, second = problem(48, 64), problem(32, 32, 7)
    second = Target(second.weight * 100, second.covariance * 1e-3)
    layers = [first, second]
    energies = [target.energy() for target in layers]
    solution, losses = additive.fit(layers, replace(SMALL, feedback=0.0), seeded())
    errors = additive.relative_errors(layers, energies, solution)
    assert [tuple(codes.shape) for codes in solution.codes] == [(48, 16, 2), (32, 8, 2)]
    assert losses[-1] == pytest.approx(float(sum(errors)) / 2, rel=1e-6) and losses[-1] < 0.6 * losses[0]
    alone = [additive.fit([target], replace(SMALL, feedback=0.0), seeded())[1][-1] for target in layers]
    for error, own in zip(errors, alone, strict=True):
        assert float(error) < 2.5 * own


def test_rounding_to_storage_costs_little() -> None:
    target = problem(48, 64)
    solution, losses = additive.fit([target], SMALL, seeded())
    stored = additive.rounded(solution)
    assert relative(target, stored) == pytest.approx(losses[-1], rel=1e-3)
    assert torch.equal(stored.codebooks.half().float(), stored.codebooks)
    assert 0.1 < float(stored.codebooks[0].square().mean().sqrt()) < 3  # entries are about 1, whatever n is


def test_one_more_pass_after_rounding_does_not_hurt() -> None:
    target = problem(48, 64)
    stored = additive.rounded(additive.fit([target], SMALL, seeded())[0])
    again = additive.reassign([target], stored, SMALL, seeded(3))
    assert relative(target, again) <= relative(target, stored)
    assert torch.equal(again.codebooks, stored.codebooks)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_nothing_within_a_phase_reads_a_value_or_leaves_the_device(device: str) -> None:
    """Such tensors have no values, and the first kind does not mix with the CPU's: a graph can be captured."""
    place, g = "meta" if device == "meta" else "cpu", seeded()
    with nullcontext() if device == "meta" else FakeTensorMode():
        target = Target(torch.empty(24, 32, device=place), torch.empty(32, 32, device=place))
        settings = replace(SMALL, kmeans_iterations=9)  # from the tenth on, it looks for convergence
        solution = additive.start([target], settings, g)
        adam = additive.Adam([target], [target.energy()], solution, settings)
        solution, value = adam.phase(solution)
        solution = additive.feed([target], solution, settings)
        solution = additive.reassign([target], solution, settings, g)
        assert solution.codes[0].shape == (24, 8, 2) and solution.codes[0].device.type == value.device.type == place


class Replayed:
    """As a captured function behaves: what it answers lies in the same place for all calls of one shape."""

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self.function, self.kept = function, dict[tuple[torch.Size, ...], tuple[torch.Tensor, ...]]()
        self.calls = 0

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.function(*(t.clone() for t in inputs))
        kept = self.kept.setdefault(tuple(t.shape for t in inputs), outputs)
        for old, new in zip(kept, outputs, strict=True):
            old.copy_(new)
        self.calls += 1
        return kept


def test_answers_that_are_overwritten_do_no_harm() -> None:
    """20 groups: several blocks of the search and of error feedback, the last of each of another shape."""
    targets, settings = [problem(12, 80), problem(8, 80, 1)], replace(SMALL, epochs=2, steps=5, tolerance=0)
    visitor, feeder = (Replayed(made.function) for made in additive.captured(settings, torch.device("cpu")))
    plain, losses = additive.fit(targets, settings, seeded(2))
    found, same = additive.fit(targets, settings, seeded(2), None, visitor, feeder)
    assert losses == same and all(map(torch.equal, plain.codes, found.codes))
    assert len(visitor.kept) == len(feeder.kept) == 4 and min(visitor.calls, feeder.calls) >= 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_ends_where_the_cpu_ends() -> None:
    """Losses, not codes: sums are in another order there."""
    target = problem(64, 64)
    there = Target(target.weight.cuda(), target.covariance.cuda())
    settings = replace(SMALL, epochs=3, tolerance=0)
    ends = [additive.fit([t], settings, seeded())[1][-1] for t in (target, there)]
    assert ends[1] == pytest.approx(ends[0], rel=0.03)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError):
        additive.fit([], SMALL, seeded())
    with pytest.raises(InputError, match="30"):
        additive.fit([Target(torch.zeros(4, 30), torch.eye(30))], SMALL, seeded())


# ---- orders of magnitude (section 7.3) -------------------------------------------------------------------------------
SIZE = 256
TWO_BITS = Settings(count=2, bits=8, group=8, beam=4, epochs=5, steps=60, kmeans_iterations=30)


@cache
def traced(**changes: object) -> tuple[Solution, dict[tuple[str, int], float]]:
    phases: dict[tuple[str, int], float] = {}
    settings = replace(TWO_BITS, **changes)
    solution, _ = additive.fit([problem(SIZE, SIZE)], settings, seeded(1),
                               lambda phase, epoch, value: phases.update({(phase, epoch): value}))
    return solution, phases


def nearest_rounding(bits: int) -> float:
    """Relative output error of round-to-nearest, a scale a row by least squared error."""
    target = problem(SIZE, SIZE)
    grid = Grid(bits=bits)
    scale, zero = (value[:, None] for value in search_range(target.weight, grid, power=2.0))
    rounded = decode_affine(encode(target.weight, reciprocal(scale), zero, grid.levels - 1), scale, zero)
    return float(beam.row_losses(target.weight - rounded, target.covariance).sum() / target.energy())


def test_less_error_than_rounding_at_the_same_number_of_stored_bits() -> None:
    """Codebooks and scales charged: rounding gets as many bits, its error log-interpolated."""
    _, phases = traced()
    stored = bits_of([(SIZE, SIZE)], 2, 8, 8).per_weight  # 3.06 at this size: a third of it is codebooks
    low = stored - 32 / SIZE  # rounding's scale and zero-point
    lower, upper = nearest_rounding(int(low)), nearest_rounding(int(low) + 1)
    rounding = lower * (upper / lower) ** (low - int(low))
    assert 2.9 < stored < 3.1 and 0.02 < upper < 0.06 < lower < 0.25
    assert phases["beam", max(epoch for _, epoch in phases)] < rounding


def test_the_search_gains_most() -> None:
    """The paper's fit, without error feedback; which begins lower and ends no higher."""
    _, fed = traced()
    _, phases = traced(feedback=0.0)
    assert fed["start", 0] < 0.5 * phases["start", 0] and min(fed.values()) < 0.9 * phases["beam", 5]
    assert 0.05 < phases["start", 0] < 0.13 and 0.01 < phases["beam", 5] < 0.045
    assert phases["beam", 1] < 0.7 * phases["adam", 1]  # the search
    assert phases["adam", 1] < 0.97 * phases["start", 0]  # codebooks
    assert phases["beam", 5] < 0.9 * phases["beam", 1]


def test_feedback_before_every_search_ends_lower() -> None:
    """What it changes is kept row by row only where it is better, so the loss of epochs never rises either."""
    few, many = (traced(feedback_epochs=count, epochs=6, tolerance=0.0)[1] for count in (0, 6))
    assert many["beam", 6] < 0.99 * few["beam", 6] and many["start", 0] == few["start", 0]
    epochs = [many["start", 0]] + [many["beam", epoch] for epoch in range(1, 7)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(epochs)) and len(epochs) == 7


def test_the_metric_matters() -> None:
    """With H = I the weight error is smaller, the output error larger."""
    target = problem(SIZE, SIZE)
    plain = Target(target.weight, torch.eye(SIZE))
    aware, _ = traced()
    blind, _ = additive.fit([plain], TWO_BITS, seeded(1))
    assert relative(target, aware) < 0.6 * relative(target, blind)
    assert relative(plain, blind) < 0.7 * relative(plain, aware)


def test_more_codebooks_divide_the_error() -> None:
    one, two, three = (relative(problem(SIZE, SIZE), traced(count=count, epochs=2)[0]) for count in (1, 2, 3))
    assert two < 0.5 * one and three < 0.5 * two
