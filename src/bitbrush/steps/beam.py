"""Beam search over the codes of an additive codebook (VQDM section 3.4, as in AQLM), for all rows at once.

With the residual R = W - decode(codes), the loss of a row is R H R^T; rows are independent given codebooks and scales.
Every (group j, codebook m) is visited once. Exchanging the code at (j, m), vector u = C_m[old], for k changes the loss
by score(k) - score(old), where

    score(k) = C_m[k] H_JJ C_m[k]^T - 2 <C_m[k], A>,      A = (R H)[J] + u H_JJ

The ``beam`` best pairs (hypothesis, k) of each row live on. As each position is visited once, two hypotheses that are
alive differ at a visited position: no two candidates are the same.

What makes it fast and small:

* Rows are divided by their scales beforehand: scales drop out of every score, and one matrix product with a bias gives
  the scores of all rows, hypotheses and codewords at a position.
* Groups are visited in blocks of the random order. P = R H is kept for the columns of a block only; within it, a
  changed code is a rank-g update. Between blocks R is decoded from the codes again and P computed afresh, so rounding
  does not pile up. Results do not depend on the size of a block but by rounding.
* Hypotheses that are copied within a block copy P and the codes of that block; the whole state follows once a block.
* All shapes are fixed from the start (missing hypotheses have an infinite loss), and nothing within a block asks the
  device for a value: `visit` can be captured (`bitbrush.steps.captured`).

The loss cannot grow but by rounding, as the old code is among the candidates; what rounding did is undone at the end:
a row whose exact loss is above that of the given codes keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitbrush.numbers.codebook import add_codewords, decode

BLOCK_GROUPS = 8
"""Groups of a block: with g = 8, P is kept for 64 columns."""
BUDGET = 1 << 30
"""Bytes for the state of the rows that are searched at a time."""


Visitor = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Block:
    """T groups to be visited one after another, each with the codebooks in an order of its own."""

    groups: Tensor
    """Their numbers, int64 ``[T]``."""
    columns: Tensor
    """Their columns in the matrix, int64 ``[T*g]``."""
    order: Tensor
    """Codebooks in the order of visits, int64 ``[T, K]``."""
    books: Tensor
    """Those codebooks, ``[T, K, 2**B, g]``."""
    covariance: Tensor
    """H of the columns, ``[T*g, T*g]``."""
    squares: Tensor
    """``c H_JJ c^T`` of every codeword, ``[T, K, 2**B]``."""


def row_losses(delta: Tensor, covariance: Tensor) -> Tensor:
    """``delta_i H delta_i^T`` of every row of ``delta`` ``[N, n]``, in the dtype of ``covariance``; ``[N]``."""
    delta = delta.to(covariance.dtype)
    return ((delta @ covariance) * delta).sum(dim=1)


@torch.no_grad()
def search(
    weight: Tensor, covariance: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor, *, beam: int,
    generator: torch.Generator, block_groups: int = BLOCK_GROUPS, budget: int = BUDGET, visitor: Visitor | None = None,
) -> Tensor:
    """One pass over all positions: codes with a loss not above that of the given codes, in any row.

    Args:
        weight: What is to be represented, float32 ``[N, n]``.
        covariance: H, ``[n, n]``, symmetric; the search is in float32, the final check of rows in the dtype of H.
        codes: ``[N, G, K]``, any integer dtype, which is kept.
        codebooks: ``[K, 2**B, g]``.
        scale: ``[N]``.
        beam: Hypotheses a row; 1 is coordinate descent.
        generator: For the order of visits, on the CPU: all devices visit alike.
        block_groups: Groups of a block.
        budget: Bytes for the state of a chunk of rows (at least one row is taken), besides a few copies of the weight.
        visitor: `visit`, or a captured form of it.
    """
    books, factors, h = codebooks.float(), scale.float(), covariance.float()
    target = weight.float() / torch.where(factors == 0, 1, factors)[:, None]
    blocks = visiting_order(codes.shape[1], len(books), block_groups, generator, weight.device)
    found = torch.empty_like(codes)
    for rows in row_chunks(codes.shape, books.shape, beam, block_groups, budget):
        part = _search_rows(target[rows], h, codes[rows], books, blocks, beam, visitor or visit)
        found[rows] = part.to(codes.dtype)
    before = row_losses(weight - decode(codes, codebooks, scale), covariance)
    after = row_losses(weight - decode(found, codebooks, scale), covariance)
    return torch.where((after <= before)[:, None, None], found, codes)


def visiting_order(
    groups: int, count: int, block_groups: int, generator: torch.Generator, device: torch.device | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Groups in random order, cut into blocks ``[T]``, and for each group a random order of codebooks ``[T, K]``.

    They go to the ``device`` together: a copy waits until everything before it has been computed there.
    """
    order = torch.randperm(groups, generator=generator).to(device)
    inner = torch.rand(groups, count, generator=generator).argsort(dim=1).to(device)
    return list(zip(order.split(block_groups), inner.split(block_groups), strict=True))


def row_chunks(
    codes: torch.Size, books: torch.Size, beam: int, block_groups: int, budget: int
) -> Iterator[slice]:
    """Slices of rows whose state fits the budget: residuals twice, codes twice, P, scores with their copies."""
    rows, groups, count = codes
    _, words, group = books
    wide = min(block_groups, groups)
    one = beam * (2 * 4 * groups * group + 2 * 2 * groups * count + wide * (3 * 4 * group + 3 * 8 * count) + 16 * words)
    step = max(1, budget // one)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def make_block(groups: Tensor, order: Tensor, covariance: Tensor, books: Tensor) -> Block:
    """What `visit_block` needs of the groups ``[T]`` with orders ``[T, K]``."""
    size, group = len(groups), books.shape[2]
    columns = (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()
    within = covariance[columns[:, None], columns]
    diagonal = torch.arange(size, device=groups.device)
    corners = within.reshape(size, group, size, group)[diagonal, :, diagonal]
    chosen = books[order]
    squares = ((chosen @ corners[:, None]) * chosen).sum(dim=3)
    return Block(groups, columns, order, chosen, within, squares)


def _search_rows(
    target: Tensor, covariance: Tensor, codes: Tensor, books: Tensor, blocks: list[tuple[Tensor, Tensor]], beam: int,
    visitor: Visitor,
) -> Tensor:
    """Best codes ``[r, G, K]`` for rows in units of their scales, ``[r, n]``; int16."""
    rows, groups, count = codes.shape
    group = books.shape[2]
    states = codes.to(torch.int16)[:, None].expand(-1, beam, -1, -1).flatten(0, 1)
    residual = (target.reshape(rows, groups, group) - add_codewords(codes, books)).flatten(1)
    residual = residual.repeat_interleave(beam, dim=0)
    change = torch.full((rows, beam), torch.inf, device=target.device)
    change[:, 0] = 0  # one hypothesis to begin with
    for numbers, order in blocks:
        block = make_block(numbers, order, covariance, books)
        inverse = block.order.argsort(dim=1).expand(rows * beam, -1, -1)
        field = residual @ covariance.index_select(0, block.columns).T
        here = states[:, block.groups].long().gather(2, block.order.expand(rows * beam, -1, -1))
        change, ancestor, here = visit_block(field, here, change, block, visitor)
        here = here.gather(2, inverse)
        if beam > 1:
            states, residual = states[ancestor], residual[ancestor]
        states[:, block.groups] = here.to(states.dtype)
        wanted = target[:, block.columns].reshape(rows, 1, -1, group)
        left = wanted - add_codewords(here, books).reshape(rows, beam, -1, group)
        residual[:, block.columns] = left.reshape(rows * beam, -1)
    return states.reshape(rows, beam, groups, count)[:, 0]


def visit_block(
    field: Tensor, codes: Tensor, change: Tensor, block: Block, visitor: Visitor | None = None
) -> tuple[Tensor, ...]:
    """Visit every position of a block.

    Args:
        field: P = R H at the block's columns, ``[r*b, T*g]``.
        codes: Codes of the block in the order of visits, int64 ``[r*b, T, K]``.
        change: Loss of each hypothesis against that of the codes the search began with, ``[r, b]``.
        block: Codebooks and covariance.
        visitor: `visit`, or a captured form of it.

    Returns:
        The new change, ascending in each row; the hypothesis of the arguments that each one descends from, as an index
        into ``r*b``; its codes.
    """
    return (visitor or visit)(field, codes, change, block.books, block.covariance, block.squares)


def visit(
    field: Tensor, codes: Tensor, change: Tensor, books: Tensor, covariance: Tensor, squares: Tensor
) -> tuple[Tensor, ...]:
    """`visit_block` as a function of tensors. No shape depends on values and no value is read back."""
    rows, beam = change.shape
    size, count, words, group = books.shape
    base = torch.arange(rows, device=field.device)[:, None] * beam
    ancestor = torch.arange(rows * beam, device=field.device)
    codes = codes.flatten(1).clone()
    for t in range(size):
        columns = slice(t * group, (t + 1) * group)
        for m in range(count):
            book, place = books[t, m], t * count + m
            old = codes[:, place]
            before = functional.embedding(old, book)  # not visited yet: the same in all hypotheses of a row
            pull = torch.addmm(field[:, columns], before, covariance[columns, columns])
            scores = torch.addmm(squares[t, m], pull, book.T, alpha=-2)
            scores += change.reshape(-1, 1) - scores.gather(1, old[:, None])
            change, chosen = lowest(scores.reshape(rows, beam * words), beam)
            new = (chosen % words).flatten()
            if beam > 1:
                parent = (torch.div(chosen, words, rounding_mode="floor") + base).flatten()
                field, codes, ancestor = field[parent], codes[parent], ancestor[parent]
            codes[:, place] = new
            field = torch.addmm(field, functional.embedding(new, book) - before, covariance[columns], alpha=-1)
    return change, ancestor, codes.reshape(-1, size, count)


def lowest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest of each row of ``values`` ``[r, M]``, ascending, and their places."""
    if count == 1:
        return values.min(dim=1, keepdim=True)
    return values.topk(count, dim=1, largest=False, sorted=True)
