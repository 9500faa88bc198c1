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

import torch
from torch import Tensor

from bitbrush.numbers.codebook import add_codewords
from bitbrush.steps.beam import lowest

BLOCK = 16
"""Groups after which all later columns are brought up to date; within, only those of the block."""


@torch.no_grad()
def encode(
    weight: Tensor, covariance: Tensor, codebooks: Tensor, scale: Tensor, *, beam: int, damping: float
) -> Tensor:
    """Codes ``[N, G, K]`` uint8.

    Args:
        weight: What is to be represented, float32 ``[N, n]``.
        covariance: H ``[n, n]``.
        codebooks: ``[K, 2**B, g]``, B at most 8.
        scale: ``[N]``.
        beam: Hypotheses a row while the codes of a group are found.
        damping: Share of H's mean diagonal that is added to it; above 0.
    """
    group = codebooks.shape[2]
    energy = covariance.diagonal().reshape(-1, group).sum(dim=1)
    order = energy.argsort(descending=True, stable=True)
    columns = (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
    upper = factor(covariance[columns[:, None], columns], damping)
    books, rows = codebooks.float(), len(weight)
    left = (weight.float() / torch.where(scale == 0, 1, scale.float())[:, None])[:, columns]
    codes = torch.empty(rows, len(order), len(books), dtype=torch.uint8, device=weight.device)
    wide = BLOCK * group
    for start in range(0, len(columns), wide):
        end = min(start + wide, len(columns))
        lost = torch.empty(rows, end - start, device=left.device)
        for first in range(start, end, group):
            last = first + group
            corner = upper[first:last, first:last]
            white = torch.linalg.solve_triangular(corner, torch.cat([left[:, first:last], books.flatten(0, 1)]),
                                                  upper=True, left=False)
            found = sums(white[:rows], white[rows:].reshape(books.shape), beam)
            codes[:, order[first // group]] = found.to(torch.uint8)
            error = white[:rows] - add_codewords(found, white[rows:].reshape(books.shape))
            lost[:, first - start : last - start] = error
            left[:, last:end] -= error @ upper[first:last, last:end]
        left[:, end:] -= lost @ upper[start:end, end:]
    return codes


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
