"""Random attentions on codes: what the kernel makes of them, and what of it is as defined.

Sums of q and k must be equal; codes of the softmax may differ by one, where an exponential or a sum differs in its last
bits; sums of these codes and v must be equal, and the output is then the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitbrush.kernels import attention_ops, triton_attention
from bitbrush.kernels.triton_attention import Cut, Kept, Table
from bitbrush.numbers.codec import reciprocal


class Case:
    """Random codes and tables.

    Args:
        batch, heads, queries, keys, size: Of the attention.
        bits: Of all operands.
        zero: Whether the softmax has a zero-point (its ranges begin at 0 otherwise).
    """

    def __init__(self, batch: int, heads: int, queries: int, keys: int, size: int, *, bits: int = 8, zero: bool = False,
                 seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.batch, self.heads, self.queries, self.keys, self.size = batch, heads, queries, keys, size
        self.top = (1 << bits) - 1
        width = -(-heads * size // 32) * 32
        self.q, self.k, self.v = ((torch.randint(0, 1 << bits, (batch * n, width), generator=g) - 128).to(torch.int8)
                                  for n in (queries, keys, keys))
        low, high, spread = 5 << bits >> 4, 11 << bits >> 4, 255 / self.top

        def table(scale: float, first: int, last: int) -> Table:
            return Table((torch.rand(4, 1, generator=g) + 1) * scale, torch.randint(first, last, (4, 1), generator=g)
                         .to(torch.uint8), torch.tensor([2]))

        self.tables = [table(0.012 * spread, low, high) for _ in range(3)]
        self.tables.append(table(0.0005 * spread, 3, 9) if zero else table(0.001 * spread, 0, 1))

    def ran(self, device: str, config: Cut | None, dtype: torch.dtype) -> tuple[Tensor, Kept]:
        """Output and integers of the kernel on a device, on the CPU."""
        rows, inverse = self.batch * self.heads, reciprocal(self.tables[3].scale)
        kept = Kept.empty(rows, self.queries, self.keys, self.size, device)
        q, k, v = (t.to(device) for t in (self.q, self.k, self.v))
        tables = [Table(*(t.to(device) for t in (table.scale, table.zero_point, table.times))) for table in self.tables]
        y = triton_attention.attention(q, k, v, tables, inverse.to(device), self.top, self.batch, self.heads, self.size,
                                       dtype, config=config, kept=kept)
        return y.cpu(), Kept(kept.sums.cpu(), kept.codes.cpu(), kept.totals.cpu())

    def compared(self, device: str, config: Cut | None, dtype: torch.dtype) -> dict[str, Any]:
        """The kernel's integers, and what of them is as defined."""
        sizes, (y, kept) = (self.batch, self.heads, self.size), self.ran(device, config, dtype)
        inverse = reciprocal(self.tables[3].scale)
        want = attention_ops.plain_parts(self.q, self.k, self.v, self.tables, inverse, self.top, *sizes)
        zero_v, zero_p = (attention_ops._now(t.zero_point, t) for t in self.tables[2:])
        v = attention_ops._values(self.v, *sizes) + (128 - zero_v)
        totals = attention_ops.plain_totals(kept.codes, v, zero_p)
        apart = (kept.codes.int() - want.codes.int()).abs()
        return {
            "sums": torch.equal(kept.sums, want.sums), "totals": torch.equal(kept.totals, totals),
            "output": torch.equal(y, attention_ops.plain_output(totals, self.tables, self.batch, dtype)),
            "codes": apart.numel(), "apart": int((apart > 0).sum()), "most": int(apart.max()),
            "kinds": int(want.codes.unique().numel()),
        }
