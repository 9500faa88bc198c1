"""Codes for given codebooks with error feedback: groups one after another, later ones make up for what earlier lost.

VQDM's start encodes every group by itself and leaves the rest to the beam search, which changes one code at a time. On
inputs as correlated as those of real networks (a mean far from 0, neighbouring pixels alike) that search ends in a poor
place: measured on emoji-sd-tiny, above GPTQ's error on the same H. So codes are first chosen as GPTQ (Frantar et al.
2022) chooses values, and GPTVQ (van Baalen et al. 2024) vectors. With ``H^-1 = U^T U``, U upper triangular, and the
columns J of a group:

    E = (target_J - q) U_JJ^-1,    q: the sum of codewords with the least |E|,    target_rest -= E U_J,rest

Groups come in the order of their inputs' energy, the largest first. K codes of a group are found by a beam search over
the codebooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bitbrush.numbers.codebook import add_codewords
from bitbrush.steps.beam import lowest

BLOCK = 16
"""Groups after which all later columns are brought up to date; within, only those of the block."""

Feeder = Callable[..., tuple[Tensor, ...]]


@torch.no_grad()
def encode(
    weight: Tensor, covariance: Tensor, codebooks: Tensor, scale: Tensor, *, beam: int, damping: float,
    feeder: Feeder | None = None,
) -> Tensor:
    """Codes ``[N, G, K]`` uint8.

    Args:
        weight: What is to be represented, float32 ``[N, n]``.
        covariance: H ``[n, n]``.
        codebooks: ``[K, 2**B, g]``, B at most 8.
        scale: ``[N]``.
        beam: Hypotheses a row while the codes of a group are found.
        damping: Share of H's mean diagonal that is added to it; above 0.
        feeder: `feeder` of this beam, or a captured form of it.
    """
    group = codebooks.shape[2]
    energy = covariance.diagonal().reshape(-1, group).sum(dim=1)
    order = energy.argsort(descending=True, stable=True)
    columns = (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
    upper = factor(covariance[columns[:, None], columns], damping)
    books, rows = codebooks.float(), len(weight)
    left = (weight.float() / torch.where(scale == 0, 1, scale.float())[:, None])[:, columns]
    unit = torch.eye(group, device=upper.device).expand(len(order), group, group)
    inverses = torch.linalg.solve_triangular(corners(upper, group), unit, upper=True)
    run = feeder or functools.partial(encode_block, beam=beam)
    found = torch.empty(rows, len(order), len(books), dtype=torch.uint8, device=weight.device)
    for first in range(0, len(order), BLOCK):
        here = slice(first * group, (first + BLOCK) * group)
        codes, lost = run(left[:, here], upper[here, here], inverses[first : first + BLOCK], books)
        found[:, first : first + BLOCK] = codes.to(torch.uint8)
        left[:, here.stop :] -= lost @ upper[here, here.stop :]
    return torch.empty_like(found).index_copy_(1, order, found)


def encode_block(left: Tensor, upper: Tensor, inverses: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Codes of T groups, one after another, as a function of tensors: no shape depends on values, none is read back.

    Args:
        left: What is to be represented of their columns, ``[N, T*g]``, in units of the scales.
        upper: U of these columns, ``[T*g, T*g]``.
        inverses: ``U_JJ^-1`` of each group, ``[T, g, g]``.
        books: ``[K, 2**B, g]``, float32.
        beam: Hypotheses a row.

    Returns:
        Codes ``[N, T, K]`` int64, and E ``[N, T*g]``.
    """
    group = books.shape[2]
    white, left = books @ inverses[:, None], left.clone()  # [T, K, 2**B, g]
    codes, lost = [], []
    for t in range(len(inverses)):
        last = (t + 1) * group
        points = left[:, last - group : last] @ inverses[t]
        codes.append(sums(points, white[t], beam))
        lost.append(points - add_codewords(codes[-1], white[t]))
        left[:, last:] -= lost[-1] @ upper[last - group : last, last:]
    return torch.stack(codes, dim=1), torch.cat(lost, dim=1)


def corners(matrix: Tensor, size: int) -> Tensor:
    """The blocks ``[G, g, g]`` on the diagonal of a matrix ``[G*g, G*g]``."""
    blocks = matrix.reshape(len(matrix) // size, size, -1, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def factor(covariance: Tensor, damping: float) -> Tensor:
    """U of ``(H + damping * mean(diag H) * I)^-1 = U^T U``, float32; an H of zeros counts as the identity."""
    h = covariance.to(torch.float64, copy=True)  # one at a time: for the largest layers it is half a gigabyte
    mean = h.diagonal().mean()
    h.diagonal().add_(torch.where(mean > 0, damping * mean, 1))
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    return torch.linalg.cholesky(h, upper=True).float()


def sums(points: Tensor, books: Tensor, beam: int) -> Tensor:
    """Codes ``[P, K]`` int64 whose codewords' sum is near each of ``points`` ``[P, g]``, by a beam over codebooks."""
    _, words, group = books.shape
    residual, codes = points[:, None], points.new_zeros((len(points), 1, 0), dtype=torch.int64)
    change = points.new_zeros(len(points), 1)
    for book in books:
        scores = book.square().sum(dim=1) - 2 * residual @ book.T + change[..., None]
        wide = min(beam, scores[0].numel())
        change, chosen = lowest(scores.flatten(1), wide)
        parent, word = torch.div(chosen, words, rounding_mode="floor"), chosen % words
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, codes.shape[2])), word[..., None]], dim=2)
        residual = residual.gather(1, parent[..., None].expand(-1, -1, group)) - book[word]
    return codes[:, 0]
