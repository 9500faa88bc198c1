"""Low-rank branches of weights: the best factors of a rank, and iterating around a quantizer (SVDQuant, section B3).

    W = L + R        L = L1 L2 of rank r, the truncated SVD of W, which leaves the R of least Frobenius norm
    iterate          L <- SVD_r(W - Q(R)),  R <- W - L;  the best point is kept, the first that is not better ends it

Everything is about one weight as a matrix ``[N, n]``, a convolution's with n = C * kh * kw. Factors are float16 numbers
from the start: R is what *they* leave over, so that their rounding is in what is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitbrush.network.layers import QuantLayer
from bitbrush.network.low_rank import product
from bitbrush.numbers.codebook import to_half
from bitbrush.steps.patches import output_size, patches

if TYPE_CHECKING:
    from bitbrush.engine.run import Run

Quantize = Callable[[Tensor], Tensor]
"""Matrix ``[N, n]`` to the one that its codes decode to."""
Error = Callable[[Tensor, Tensor], float]
"""(decoded R, L), matrices ``[N, n]``, to the error of the output."""


@dataclass(frozen=True)
class Split:
    """A weight in two parts: factors float16 (``up`` ``[N, r]``, ``down`` ``[r, n]``), ``rest`` R, and ``decoded``
    Q(R), float32 ``[N, n]``. ``errors``: of every iterate in order; the one kept has the least."""

    up: Tensor
    down: Tensor
    rest: Tensor
    decoded: Tensor
    errors: tuple[float, ...]


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Float16 factors ``[N, r]``, ``[r, n]`` of the best approximation of rank r of a matrix ``[N, n]``.

    The singular vectors of one side are the eigenvectors of the smaller Gram matrix, in float64; the other factor is
    the projection on them. Both carry the square root of the singular values, which keeps them inside float16.

    Raises:
        NumericsError: A factor is not finite in float16.
    """
    w = weight.double()
    if w.shape[0] <= w.shape[1]:
        up = torch.linalg.eigh(w @ w.T).eigenvectors[:, w.shape[0] - rank :].flip(1)
        down = up.T @ w
    else:
        down = torch.linalg.eigh(w.T @ w).eigenvectors[:, w.shape[1] - rank :].flip(1).T
        up = w @ down.T
    left, right = up.norm(dim=0), down.norm(dim=1)
    level = (left * right).sqrt()
    up = up * torch.where(left > 0, level / left.clamp_min(1e-300), 0)
    down = down * torch.where(right > 0, level / right.clamp_min(1e-300), 0)[:, None]
    return to_half(up, "a low-rank branch"), to_half(down, "a low-rank branch")


def split(weight: Tensor, rank: int, quantize: Quantize, error: Error, iterations: int = 1) -> Split:
    """The weight ``[N, n]`` (float32) as a branch of rank r and a quantized rest.

    Args:
        weight: Matrix, smoothed where the layer is.
        rank: 0: no branch, everything is quantized.
        quantize: What rounds the rest.
        error: What is to become small.
        iterations: Iterates at most; the first is the SVD of the weight alone.
    """
    best, errors = None, []
    source = weight
    for _ in range(max(1, iterations) if rank else 1):
        up, down = factors(source, rank)
        branch = product(up, down)
        rest = weight - branch
        decoded = quantize(rest)
        errors.append(error(decoded, branch))
        if best is not None and errors[-1] >= min(errors[:-1]):
            break
        best = (up, down, rest, decoded)
        source = weight - decoded
    if best is None:  # a NaN among the errors of a single iterate cannot come here
        best = (up, down, rest, decoded)
    return Split(*best, tuple(errors))


class OutputError:
    """Share of a layer's output that is lost, ``|y - y^|^2 / |y|^2``, on kept inputs; the dynamic rounding of the input
    is part of it (that of static scales is not: they are fitted later).

    Args:
        layer: For its weight and input quantizer.
        inputs: ``[M, C]``, or of a convolution patches ``[M, C, kh, kw]``, unscaled.
        factor: Of the input's channels, ``[C]``, or None.
    """

    def __init__(self, layer: QuantLayer, inputs: Tensor, factor: Tensor | None = None) -> None:
        weight = layer.weight.detach().float().flatten(1)
        self.target = inputs.flatten(1) @ weight.T
        wide = [1, -1, *[1] * (inputs.ndim - 2)]
        scaled = inputs if factor is None else inputs * factor.reshape(wide)
        quantizer = layer.input
        dynamic = quantizer is not None and quantizer.spec.mode == "dynamic" and quantizer.spec.position == "input"
        rounded = quantizer(scaled, 1) if quantizer is not None and dynamic else scaled
        self.scaled, self.rounded = scaled.flatten(1), rounded.flatten(1)
        self.energy = float(self.target.double().square().sum())

    def __call__(self, decoded: Tensor, branch: Tensor) -> float:
        """The share, for decoded codes and a branch, both ``[N, n]``."""
        found = self.rounded @ decoded.T + self.scaled @ branch.T
        lost = float((found - self.target).double().square().sum())
        return lost / self.energy if self.energy > 0 else lost


def inputs_of(layer: QuantLayer, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random inputs of a layer's product, float32: rows ``[M, C]``, or patches ``[M, C, kh, kw]``."""
    if not isinstance(layer, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.randint(len(rows), (count,), generator=generator).to(x.device)].float()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    pictures, (sh, sw), (dh, dw) = padded.permute(0, 2, 3, 1), layer.stride, layer.dilation
    shape = (layer.kernel_hw, (int(sh), int(sw)), (int(dh), int(dw)))
    high, wide = output_size(pictures, *shape)
    place = torch.randint(len(x) * high * wide, (count,), generator=generator).to(x.device)
    return patches(pictures, place, *shape).permute(0, 3, 1, 2).float().contiguous()


def smoothings(inputs: Tensor, weights: Tensor, grid: int) -> Iterator[tuple[tuple[float, float], Tensor]]:
    """Candidates of the input's factors ``[C]``, ``max|W_c|**b / max|X_c|**a``, with their (a, b), without (0, 0).

    (a, 0) and (a, 1 - a) for a in 1/grid .. (grid-1)/grid: SVDQuant's, of which 20 is the grid.

    Args:
        inputs, weights: Positive maxima by channel, ``[C]``.
        grid: Number of parts.
    """
    for a in (i / grid for i in range(1, grid)):
        for b in (0.0, 1 - a):
            yield (a, round(b, 9)), weights.pow(b) / inputs.pow(a)


def apply_branches(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store ``<layer>/up`` and ``/down`` in the layers, whose specs ask for a branch."""
    layers = run.layers()
    for key, up in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "up":
            layers[name].set_low_rank(up, tensors[f"{name}/down"])
