"""Fitting additive codebooks to layers: residual k-means, Adam on codebooks and scales, beam search over codes (VQDM).

    L = tr((What - W) H (What - W)^T) / o           per layer of o rows; H = mean x x^T of its inputs (section 3)

Everything here serves one layer or several that share one set of codebooks. What is minimized is the mean over the
layers of the *relative* error tr(D H D^T) / tr(W H W^T): a layer counts by the share of its output that is lost, not by
the size of its output or its number of weights. For one layer that is L times a constant. A layer whose inputs or
weights are all zero counts nothing.

A row's scale starts as its root mean square, where the paper takes the norm: codebook entries are then about 1
whatever n is, which layers of different n need to share them and float16 to store them. The learning rates are
converted (codebooks times sqrt(n), scales by 1 / sqrt(n)), so that Adam takes the very steps of the paper's form.

Deviations from the released code, on purpose: before the first searches codes are chosen with error feedback, where
that makes a row better (`bitbrush.steps.feedback`: the search alone ends above GPTQ where inputs are strongly
correlated); the best point of an Adam phase is kept, not the last; a pass of the search that rounding made worse is
undone row by row. The loss of epochs never rises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bitbrush.errors import InputError
from bitbrush.numbers.codebook import add_codewords, decode, to_half
from bitbrush.steps.beam import BLOCK_GROUPS, BUDGET, Visitor, row_losses, search, visit
from bitbrush.steps.captured import Captured
from bitbrush.steps.feedback import Feeder, encode, encode_block

_FLOOR = 1e-9  # added to scales: a row of zeros stays a row of zeros
_CHUNK = 64  # groups that one thread adds up
_FEED = 8  # hypotheses of a group with error feedback: few kernels, whatever the beam
_CHECK = 10  # k-means looks for convergence every so many iterations: the check waits for the device


@dataclass(frozen=True)
class Target:
    """A layer to be represented.

    ``weight`` is float32 ``[N, n]`` in the order of `bitbrush.numbers.codebook.to_groups`; ``covariance`` is H
    ``[n, n]`` in the same order, symmetric. Losses are computed in the dtype of H.
    """

    weight: Tensor
    covariance: Tensor

    def energy(self) -> Tensor:
        """``tr(W H W^T)``, the layer's output energy a sample; a scalar."""
        return row_losses(self.weight, self.covariance).sum()


@dataclass(frozen=True)
class Settings:
    """How codebooks are fitted; the defaults are VQDM's at 3 bits, but for ``epochs`` (the paper's limit is 1000).

    ``count`` K, ``bits`` B, ``group`` g; ``weighted``: k-means points count by their effect on the output (pitfall 6 of
    the paper's initialization) or alike; ``points``: of each codebook's fit, a centre (None: all points; all are
    assigned in any case); ``steps`` of Adam an epoch; ``tolerance``: relative improvement of an epoch below which the
    next one is not begun; ``feedback``: damping of H where codes are chosen with error feedback (0: they are not),
    at the start and in the first ``feedback_epochs``; ``budget``: bytes for the search's state and k-means' distances.
    """

    count: int = 3
    bits: int = 8
    group: int = 8
    weighted: bool = True
    kmeans_iterations: int = 100
    points: int | None = None
    steps: int = 100
    rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.95)
    beam: int = 8
    epochs: int = 30
    tolerance: float = 0.01
    feedback: float = 0.01
    feedback_epochs: int = 2
    block_groups: int = BLOCK_GROUPS
    budget: int = BUDGET


@dataclass(frozen=True)
class Solution:
    """Codebooks ``[K, 2**B, g]``, and of each layer the codes ``[N, G, K]`` and scales ``[N]``; all on one device."""

    codebooks: Tensor
    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    def weight(self, layer: int = 0) -> Tensor:
        """The decoded weight of a layer, float32 ``[N, n]``."""
        return decode(self.codes[layer], self.codebooks, self.scales[layer])


Report = Callable[[str, int, float], None]
"""Called after every phase: "start", "adam" or "beam"; the epoch (0: the start); the loss."""


def fit(
    targets: Sequence[Target], settings: Settings, generator: torch.Generator, report: Report | None = None,
    visitor: Visitor | None = None, feeder: Feeder | None = None,
) -> tuple[Solution, list[float]]:
    """Codebooks, codes and scales for layers that share them, and the losses: at the start, then after every epoch.

    Args:
        targets: The layers, on one device, n a multiple of ``settings.group``.
        settings: Format and schedule.
        generator: On the CPU; all draws come from it.
        report: Told about every phase.
        visitor: Of the search, see there.
        feeder: Of error feedback, see `captured`, which makes both.

    Raises:
        InputError: No layers, or columns that groups do not divide.
    """
    solution = start(targets, settings, generator)
    made = captured(settings, targets[0].weight.device)
    visitor, feeder = visitor or made[0], feeder or made[1]
    solution = feed(targets, solution, settings, feeder)
    energies = [target.energy() for target in targets]
    losses = [float(loss(targets, energies, solution))]
    tell = report or (lambda phase, epoch, value: None)
    tell("start", 0, losses[0])
    adam = Adam(targets, energies, solution, settings)
    for epoch in range(1, settings.epochs + 1):
        solution, value = adam.phase(solution)
        tell("adam", epoch, float(value))
        if epoch <= settings.feedback_epochs:
            solution = feed(targets, solution, settings, feeder)
        solution = reassign(targets, solution, settings, generator, visitor)
        losses.append(float(loss(targets, energies, solution)))
        tell("beam", epoch, losses[-1])
        if losses[-1] >= losses[-2] * (1 - settings.tolerance):
            break
    return solution, losses


def captured(settings: Settings, device: torch.device) -> tuple[Captured, Captured]:
    """Visitor and feeder of a fit, captured on CUDA: what fits many layers makes them once, for their shapes recur."""
    beam = max(settings.beam, _FEED)
    return Captured(visit, device), Captured(functools.partial(encode_block, beam=beam), device)


def feed(
    targets: Sequence[Target], solution: Solution, settings: Settings, feeder: Feeder | None = None
) -> Solution:
    """Codes found with error feedback, row by row where they are better (`bitbrush.steps.feedback`)."""
    if settings.feedback == 0:
        return solution
    codes = []
    for target, old, scale in zip(targets, solution.codes, solution.scales, strict=True):
        new = encode(target.weight, target.covariance, solution.codebooks, scale, beam=max(settings.beam, _FEED),
                     damping=settings.feedback, feeder=feeder).to(old.dtype)
        before, after = (row_losses(target.weight - decode(c, solution.codebooks, scale), target.covariance)
                         for c in (old, new))
        codes.append(torch.where((after < before)[:, None, None], new, old))
    return replace(solution, codes=tuple(codes))


def loss(targets: Sequence[Target], energies: Sequence[Tensor], solution: Solution) -> Tensor:
    """Mean over the layers of tr(D H D^T) / tr(W H W^T), a scalar; see `relative_errors`."""
    return torch.stack(list(relative_errors(targets, energies, solution))).mean()


def relative_errors(targets: Sequence[Target], energies: Sequence[Tensor], solution: Solution) -> list[Tensor]:
    """tr(D H D^T) / tr(W H W^T) of each layer, scalars in the dtype of H; 0 where the layer's output is zero."""
    found = []
    for layer, (target, energy) in enumerate(zip(targets, energies, strict=True)):
        error = row_losses(target.weight - solution.weight(layer), target.covariance).sum()
        found.append(_share(error, energy))
    return found


def output_error(weight: Tensor, decoded: Tensor, covariance: Tensor) -> Tensor:
    """The paper's layer loss, ``tr((What - W) H (What - W)^T) / o``: mean over rows of E[((what - w) x)^2]."""
    return row_losses(decoded - weight, covariance).mean()


def reassign(
    targets: Sequence[Target], solution: Solution, settings: Settings, generator: torch.Generator,
    visitor: Visitor | None = None,
) -> Solution:
    """One pass of `bitbrush.steps.beam.search` over every layer; no row's loss grows."""
    codes = [
        search(target.weight, target.covariance, old, solution.codebooks, scale, beam=settings.beam,
               generator=generator, block_groups=settings.block_groups, budget=settings.budget, visitor=visitor)
        for target, old, scale in zip(targets, solution.codes, solution.scales, strict=True)
    ]
    return replace(solution, codes=tuple(codes))


def rounded(solution: Solution) -> Solution:
    """Codebooks and scales as they will be read back from float16 (values in float32): what a simulation must use.

    Raises:
        NumericsError: A value is not finite in float16.
    """
    return replace(solution, codebooks=to_half(solution.codebooks).float(),
                   scales=tuple(to_half(scale).float() for scale in solution.scales))


def _share(error: Tensor, energy: Tensor) -> Tensor:
    return torch.where(energy > 0, error / torch.where(energy > 0, energy, 1), 0)


# ---- start: residual k-means (section 3.2) ---------------------------------------------------------------------------
def row_scales(weight: Tensor) -> Tensor:
    """Root mean square of the rows of ``weight`` ``[N, n]``, plus 1e-9; ``[N]`` float32."""
    return weight.float().square().mean(dim=1).sqrt() + _FLOOR


def start(targets: Sequence[Target], settings: Settings, generator: torch.Generator) -> Solution:
    """Scales of the rows, then one k-means a codebook on what the codebooks before it left over.

    Raises:
        InputError: No layers, or columns that groups do not divide.
    """
    if not targets or any(target.weight.shape[1] % settings.group for target in targets):
        raise InputError("no additive codebooks can be fitted", why=f"columns of {len(targets)} layers: "
                         f"{[target.weight.shape[1] for target in targets]}, groups of {settings.group}",
                         try_="give at least one layer, with columns in whole groups")
    scales = [row_scales(target.weight) for target in targets]
    parts = [
        (target.weight.float() / scale[:, None]).reshape(-1, settings.group)
        for target, scale in zip(targets, scales, strict=True)
    ]
    weights = None
    if settings.weighted:
        found = [point_weights(t.covariance, s, settings.group) for t, s in zip(targets, scales, strict=True)]
        weights = torch.cat(found)
    books, codes = residual_kmeans(torch.cat(parts), settings, generator, weights)
    pieces = codes.split([len(part) for part in parts])
    return Solution(
        books, tuple(piece.reshape(len(s), -1, settings.count) for piece, s in zip(pieces, scales, strict=True)),
        tuple(scales),
    )


def point_weights(covariance: Tensor, scale: Tensor, group: int) -> Tensor:
    """How much each group of a layer counts in k-means, ``[N*G]``, with the sum 1 (or 0).

    The squared scale of its row times the mean of diag(H) over its columns: the loss, were H diagonal and even within
    groups. The sum makes layers that share codebooks count alike.
    """
    energy = covariance.diagonal().float().reshape(-1, group).mean(dim=1)
    weights = (scale.float().square()[:, None] * energy).flatten()
    return _share(weights, weights.sum())


def residual_kmeans(
    points: Tensor, settings: Settings, generator: torch.Generator, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K codebooks ``[K, 2**B, g]`` and codes ``[P, K]`` (uint8, or int16 where B > 8) for points ``[P, g]``."""
    words = 1 << settings.bits
    left, books, codes = points.clone(), [], []
    for _ in range(settings.count):
        centres = kmeans(left, words, generator, weights, settings.kmeans_iterations, settings.points, settings.budget)
        nearest = assign(left, centres, settings.budget)
        left -= centres[nearest]
        books.append(centres)
        codes.append(nearest.to(torch.uint8 if settings.bits <= 8 else torch.int16))
    return torch.stack(books), torch.stack(codes, dim=1)


def kmeans(
    points: Tensor, count: int, generator: torch.Generator, weights: Tensor | None = None, iterations: int = 100,
    points_per_centre: int | None = None, budget: int = BUDGET,
) -> Tensor:
    """Lloyd's algorithm: centres ``[count, g]`` of ``points`` ``[P, g]``, from random distinct points.

    A centre without points stays where it is (of fewer points than centres, some are taken twice). It ends after
    ``iterations``, or where ten of them change nothing (rtol 1e-6, atol 1e-8). ``weights`` ``[P]``, not negative;
    ``points_per_centre`` times ``count`` random points are used, None: all.
    """
    order = torch.randperm(len(points), generator=generator)
    if points_per_centre is not None:
        order = order[: max(1, points_per_centre * count)].sort().values
        points = points[order.to(points.device)]
        weights = None if weights is None else weights[order.to(points.device)]
        order = torch.randperm(len(points), generator=generator)
    centres = points[order.repeat(-(-count // len(order)))[:count].to(points.device)].clone()
    mass = torch.ones(len(points), device=points.device) if weights is None else weights
    previous = centres
    for iteration in range(1, iterations + 1):
        centres = _centroids(points, mass, assign(points, centres, budget), centres)
        if iteration % _CHECK == 0:
            if torch.allclose(centres, previous, rtol=1e-6, atol=1e-8):
                break
            previous = centres
    return centres


def _centroids(points: Tensor, mass: Tensor, nearest: Tensor, centres: Tensor) -> Tensor:
    sums = torch.zeros_like(centres).index_add_(0, nearest, points * mass[:, None])
    total = torch.zeros(len(centres), device=points.device).index_add_(0, nearest, mass)[:, None]
    return torch.where(total > 0, sums / torch.where(total > 0, total, 1), centres)


def assign(points: Tensor, centres: Tensor, budget: int = BUDGET) -> Tensor:
    """The nearest of ``centres`` ``[E, g]`` of each of ``points`` ``[P, g]``: argmin |c|^2 / 2 - <x, c>; int64."""
    half = centres.square().sum(dim=1) / 2
    rows = max(1, budget // (8 * len(centres)))
    return torch.cat([torch.addmm(half, part, centres.T, alpha=-1).argmin(dim=1) for part in points.split(rows)])


# ---- the continuous phase (section 3.3) ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Users:
    """Which groups use each codeword: their numbers, sorted by codeword into K * 2**B lists.

    A codeword's gradient is a sum over its list. With the codes fixed, the lists are made once a phase; the sums are in
    a fixed order, also on a GPU, and much faster than the scattered additions of an embedding's gradient.

    A list is summed in chunks of at most `_CHUNK` groups, as few long lists would leave most of a GPU idle: ``begin``
    says where each chunk begins, ``lists`` which chunk is the first of each list. Behind the last come empty ones, so
    that their number does not depend on the codes and nothing waits for the device.
    """

    groups: Tensor
    begin: Tensor
    lists: Tensor

    @classmethod
    def of(cls, codes: Sequence[Tensor], words: int) -> Users:
        """From the codes ``[N, G, K]`` of all layers, whose groups are counted through."""
        flat = torch.cat([code.flatten(0, 1).long() for code in codes])
        count = flat.shape[1]
        flat = (flat + torch.arange(count, device=flat.device) * words).T.flatten()
        word, order = flat.sort(stable=True)
        numbers = torch.arange(count * words + 1, device=word.device)
        edges = torch.searchsorted(word, numbers)
        chunks = -(-edges.diff() // _CHUNK)
        ends = chunks.cumsum(0)
        lists = ends - chunks
        chunk = torch.arange(-(-len(flat) // _CHUNK) + count * words, device=word.device)
        owner = torch.searchsorted(ends, chunk, right=True).clamp(max=count * words - 1)
        begin = torch.where(chunk < ends[-1], edges[owner] + _CHUNK * (chunk - lists[owner]), len(flat))
        return cls(*(t.int() for t in (order % (len(flat) // count), begin, lists)))

    def sums(self, values: Tensor) -> Tensor:
        """Sum of ``values`` ``[P, g]`` over the users of each codeword, ``[K * 2**B, g]``."""
        chunks = functional.embedding_bag(self.groups, values, self.begin, mode="sum")
        every = torch.arange(len(chunks), dtype=torch.int32, device=chunks.device)
        return functional.embedding_bag(every, chunks, self.lists, mode="sum")


class Adam:
    """Adam on codebooks and scales with the codes fixed; its moments go on from one epoch to the next.

    Args:
        targets: The layers.
        energies: `Target.energy` of each.
        solution: Where the codebooks and scales begin.
        settings: ``steps``, ``rate`` (of the paper's form, see the head of this file), ``betas``.
    """

    def __init__(
        self, targets: Sequence[Target], energies: Sequence[Tensor], solution: Solution, settings: Settings
    ) -> None:
        self.targets, self.energies, self.steps = targets, energies, settings.steps
        self.books = solution.codebooks.clone()
        self.scales = [scale.clone() for scale in solution.scales]
        lengths = [target.weight.shape[1] ** 0.5 for target in targets]
        groups = [{"params": [self.books], "lr": settings.rate * sum(lengths) / len(lengths)}]
        groups += [{"params": [s], "lr": settings.rate / n} for s, n in zip(self.scales, lengths, strict=True)]
        # eps: the loss is relative, so that gradients of codewords that few groups use may be below 1e-8
        how = {"capturable": True, "fused": True} if self.books.is_cuda else {}
        self.optimizer = torch.optim.Adam(groups, betas=settings.betas, eps=1e-12, amsgrad=True, **how)

    @torch.no_grad()
    def phase(self, solution: Solution) -> tuple[Solution, Tensor]:
        """``steps`` steps from where the last phase ended, with the codes of ``solution``; the best point and its loss.

        The start is among the points, so the loss does not grow. Nothing waits for the device.
        """
        parameters = [self.books, *self.scales]
        best = [parameter.clone() for parameter in parameters]
        lowest = torch.full((), torch.inf, device=self.books.device)
        users = Users.of(solution.codes, self.books.shape[1])

        def look() -> tuple[Tensor, ...]:
            value = self.differentiate(solution.codes, users)
            better = value < lowest
            lowest.copy_(torch.where(better, value, lowest))
            for new, old in zip(parameters, best, strict=True):
                old.copy_(torch.where(better, new, old))
            return ()

        def step() -> tuple[Tensor, ...]:
            look()
            self.optimizer.step()
            return ()

        advance = Captured(step, self.books.device)
        for _ in range(self.steps):
            advance()
        look()
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
        return Solution(best[0], solution.codes, tuple(best[1:])), lowest

    @torch.no_grad()
    def differentiate(self, codes: Sequence[Tensor], users: Users) -> Tensor:
        """The value of `loss`; its gradient is left in the parameters. One product with H a layer."""
        total, slopes = torch.zeros((), device=self.books.device), []
        share = 1 / len(self.targets)
        for target, energy, code, scale in zip(self.targets, self.energies, codes, self.scales, strict=True):
            sums = add_codewords(code, self.books)
            delta = (sums * scale[:, None, None]).flatten(1) - target.weight
            delta = delta.to(target.covariance.dtype)
            pull = delta @ target.covariance  # half the gradient of D H D^T by D
            total = total + share * _share((pull * delta).sum(), energy)
            slope = (2 * share * _share(pull, energy)).float().reshape_as(sums)
            scale.grad = (slope * sums).sum(dim=(1, 2))
            slopes.append((slope * scale[:, None, None]).flatten(0, 1))
        self.books.grad = users.sums(torch.cat(slopes)).reshape_as(self.books)
        return total
