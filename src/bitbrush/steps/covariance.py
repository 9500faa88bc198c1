"""Second moments of a layer's inputs, H = mean x x^T, collected as the batches come (VQDM section 3.1; AQLM, GPTQ).

One sample is a token of a linear layer or an output pixel of a convolution. What is kept is the sum and the number of
samples, so the mean does not depend on how the data was split, and two accumulators merge by adding. Products are
float32 matrix products of a bounded number of samples and are added up in float64: rounding does not grow with the
amount of data, and a float32 product costs a fraction of a float64 one.

Convolution patches are gathered in the order (kh, kw, C_in) of `bitbrush.numbers.codebook.to_groups`, and only those
that are kept: no unfolded copy of the whole input exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitbrush.errors import InputError
from bitbrush.steps.patches import Pair, output_size, patches


class Covariance:
    """Running H of inputs with ``size`` features.

    Args:
        size: Features n: input channels of a linear layer, kh * kw * C_in of a convolution.
        share: Part of the samples of each batch that is kept, drawn without replacement; in (0, 1].
        generator: For the draws, on the CPU; needed where ``share`` is below 1.
        device: Where the sum lies.
        budget: Bytes for the samples and the products of one chunk, each.
        dtype: Of the sum.
    """

    def __init__(
        self, size: int, *, share: float = 1.0, generator: torch.Generator | None = None,
        device: torch.device | str = "cpu", budget: int = 1 << 28, dtype: torch.dtype = torch.float64,
    ) -> None:
        if not 0 < share <= 1 or (share < 1 and generator is None):
            raise InputError("the share of samples to keep is not usable", why=f"share {share}, with a generator "
                             "below 1, expected", try_="give a share in (0, 1] and a generator")
        self.size, self.share, self.generator, self.budget = size, share, generator, budget
        self.total = torch.zeros(size, size, dtype=dtype, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Inputs of a linear layer, ``[..., n]``: every leading index is a sample."""
        rows = inputs.reshape(-1, self.size)
        kept = self._kept(len(rows), rows.device)
        for chunk in self._chunks(len(rows) if kept is None else len(kept)):
            self._add_rows(rows[chunk] if kept is None else rows[kept[chunk]])

    @torch.no_grad()
    def add_conv(self, inputs: Tensor, kernel: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0),
                 dilation: Pair = (1, 1)) -> None:
        """Inputs of a convolution (one group of channels, zero padding), ``[B, C, H, W]``: every output pixel is one.

        Raises:
            InputError: kh * kw * C is not the size.
        """
        if inputs.shape[1] * kernel[0] * kernel[1] != self.size:
            raise InputError("inputs of another layer", why=f"{inputs.shape[1]} channels and kernel {kernel}, "
                             f"expected {self.size} features", try_="give each layer an accumulator of its own")
        padded = functional.pad(inputs, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        padded = padded.contiguous()  # the channels of a pixel side by side: they are gathered together
        high, wide = output_size(padded, kernel, stride, dilation)
        count = len(inputs) * high * wide
        kept = self._kept(count, inputs.device)
        for chunk in self._chunks(count if kept is None else len(kept)):
            place = torch.arange(chunk.start, chunk.stop, device=inputs.device) if kept is None else kept[chunk]
            self._add_rows(patches(padded, place, kernel, stride, dilation).flatten(1))

    def merge(self, other: Covariance) -> None:
        """Take in what another accumulator saw: both weigh by their numbers of samples."""
        self.total += other.total.to(self.total)
        self.count += other.count

    def mean(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """H ``[n, n]``, exactly symmetric.

        Raises:
            InputError: Nothing was added.
        """
        if not self.count:
            raise InputError("there is no covariance", why="no input was recorded",
                             try_="check that calibration reaches this layer")
        mean = self.total.to(dtype) / self.count
        return mean.add_(mean.T.clone()).mul_(0.5)

    def _kept(self, count: int, device: torch.device) -> Tensor | None:
        """Indices of the samples that are kept of ``count``, ascending, at least one; None: all."""
        if self.share == 1:
            return None
        order = torch.randperm(count, generator=self.generator)
        return order[: max(1, round(self.share * count))].sort().values.to(device)

    def _chunks(self, count: int) -> list[slice]:
        rows = max(1, self.budget // (4 * self.size))
        return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]

    def _add_rows(self, rows: Tensor) -> None:
        rows = rows.to(self.total.device).float()
        wide = max(1, self.budget // (4 * self.size))
        for start in range(0, self.size, wide):
            self.total[start : start + wide] += rows[:, start : start + wide].T @ rows
        self.count += len(rows)
