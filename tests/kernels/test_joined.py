"""Joined and gated products: their definitions against single products, GEGLU and encode; shapes for tracing; the
kernels in Triton's interpreter against the definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbrush.kernels import int8_ops, joined_ops
from bitbrush.kernels.triton_int8 import ONE_ROW, Frame
from interpreter import TRITON, interpreted

SOURCE = Path(__file__).resolve().parents[2] / "src"
OPS = torch.ops.bitbrush
assert joined_ops.__doc__  # its import makes the operations


def _int8(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)


def _table(g: torch.Generator, sums: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero-point, times) of a table of four rows."""
    zero = torch.randint(90, 166, (4, sums), generator=g).to(torch.uint8)
    return torch.rand((4, sums), generator=g) * 0.005 + 0.001, zero, torch.randint(0, 4, (1,), generator=g)


def _weight(g: torch.Generator, rows: int, *widths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, scale, sum, bias)."""
    w = _int8(g, rows, sum(widths))
    scale, bias = torch.rand((rows, len(widths)), generator=g) * 0.01, torch.randn(rows, generator=g)
    return w, scale, torch.stack([part.sum(1, dtype=torch.int32) for part in w.split(widths, 1)]), bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts, biased, widths", [(3, False, [64]), (2, True, [64]), (3, True, [32, 96, 64])])
def test_joined_is_each_product_by_itself(parts: int, biased: bool, widths: list[int], dtype: torch.dtype) -> None:
    g, n, m = torch.Generator().manual_seed(parts), 40, 7
    a, (w, scale_w, total, bias) = _int8(g, parts * m, sum(widths)), _weight(g, parts * n, *widths)
    scales, zeros, times = (list(t) for t in zip(*(_table(g, len(widths)) for _ in range(parts)), strict=True))
    got = OPS.int8_joined(a, w, scales, zeros, times, scale_w, total, widths, parts, bias if biased else None, dtype)
    assert got.shape == (parts, m, n) and got.dtype == dtype and len(got.unique()) > 100
    assert all(part.is_contiguous() for part in got)
    for p in range(parts):
        rows = slice(p * n, (p + 1) * n)
        want = OPS.int8_product(
            a[p * m : (p + 1) * m], w[rows], scales[p], zeros[p], times[p], ONE_ROW, scale_w[rows], total[:, rows],
            widths, [], 1, bias[rows] if biased else None, None, None, dtype,
        )
        assert torch.equal(got[p], want)


def test_joined_refuses_what_does_not_divide() -> None:
    g = torch.Generator().manual_seed(1)
    a, (w, scale_w, total, _), table = _int8(g, 6, 32), _weight(g, 6, 32), _table(g)
    for parts, tables in ((4, 4), (3, 2), (1, 1)):
        with pytest.raises(ValueError, match=f"{parts} parts of 6 rows with {tables} tables"):
            OPS.int8_joined(a, w, *([t] * tables for t in table), scale_w, total, [32], parts, None, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, scaled", [(40, False), (64, True)])
def test_gated_is_product_geglu_and_encode(n: int, scaled: bool, dtype: torch.dtype) -> None:
    g, m = torch.Generator().manual_seed(n), 9
    a, (w, scale_w, total, bias), table = _int8(g, m, 32), _weight(g, 2 * n, 32), _table(g)
    inverse, zero, times = 1 / torch.tensor([[0.01], [0.05]]), torch.tensor([[5.0], [77.0]]), torch.tensor([1])
    factor = torch.rand(n, generator=g) + 0.5 if scaled else None
    got = OPS.int8_gated(a, w, *table, scale_w, total, 32, bias, inverse, zero, times, 255, factor, dtype)
    both = OPS.int8_product(a, w, *table, ONE_ROW, scale_w, total, [32], [], 1, bias, None, None, dtype)
    y = both[:, :n] * nn.functional.gelu(both[:, n:])
    want = OPS.int8_encode(y, inverse, zero, times, ONE_ROW, [n], 255, [], 1, factor)
    assert got.dtype == torch.int8 and got.shape == (m, 64) and torch.equal(got, want)
    assert (got[:, n:] == 77 - 128).all() and len(got[:, :n].unique()) > 50
    both_in_one = int8_ops.with_tops(zero, torch.tensor([[255], [127]]))
    less = OPS.int8_gated(a, w, *table, scale_w, total, 32, bias, inverse, both_in_one, times, 255, factor, dtype)
    assert torch.equal(less, got.clamp(max=127 - 128)) and not torch.equal(less, got), "rows with codes of their own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_what_is_added_to_a_product_is_added_before_its_one_rounding(
    spatial: bool, gate: bool, dtype: torch.dtype
) -> None:
    g, n = torch.Generator().manual_seed(3), 24
    frame = Frame(2, 3, 4, (3, 3), 1, 1) if spatial else None
    a = _int8(g, frame.rows if frame else 24, 32)
    (w, scale_w, total, bias), table = _weight(g, n, 32 * (9 if frame else 1)), _table(g)
    shared, residual = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, n), (24, n)))

    def product(*added: Tensor | None, kind: torch.dtype) -> Tensor:
        found = OPS.int8_product(a, w, *table, ONE_ROW, scale_w, total, [32], int8_ops.numbers_of(frame), 12, bias,
                                 *added, kind, gate)
        return found.reshape(24, n)

    plain = product(None, None, kind=torch.float32)
    got = product(shared, residual.reshape(2, 3, 4, n) if spatial else residual, kind=dtype)
    own = shared.float().repeat_interleave(12, 0)
    assert torch.equal(got, ((plain * own if gate else plain + own) + residual.float()).to(dtype))
    assert not torch.equal(got, product(shared, None, kind=dtype)) and got.isfinite().all()


def test_shapes_for_tracing_are_those_of_the_operations() -> None:
    g = torch.Generator().manual_seed(2)
    a, (w, scale_w, total, bias), table = _int8(g, 6, 32), _weight(g, 20, 32), _table(g)
    joined = (a, w, *([t] * 2 for t in table), scale_w, total, [32], 2, bias, torch.bfloat16)
    gated = (a, w, *table, scale_w, total, 32, bias, *table, 255, None, torch.bfloat16)
    for op, args in ((OPS.int8_joined.default, joined), (OPS.int8_gated.default, gated)):
        found = torch.library.opcheck(op, args)
        assert set(found.values()) == {"SUCCESS"}
    assert OPS.int8_joined(*joined).shape == (2, 3, 10) and OPS.int8_gated(*gated).shape == (6, 32)


def _interpreted(*args: str) -> dict[str, Any]:
    return interpreted("interpreted_joined.py", *args)


@TRITON
def test_kernels_give_what_the_definitions_give() -> None:
    found = _interpreted()
    assert len(found["joined"]) == len(found["gated"]) == 6
    assert sum(f["count"] for f in found["joined"]) > 10_000 and sum(f["inner"] for f in found["gated"]) > 2_000
    assert all(f["unequal"] == 0 for f in found["joined"])
    assert all(f["unequal"] <= 0.002 * f["count"] and f["worst"] <= 1 for f in found["gated"])  # erf's last bit


@TRITON
@pytest.mark.parametrize("fault", ["third-as-second", "rows-of-the-first", "halves", "stale"])
def test_a_planted_fault_shows(fault: str) -> None:
    found = _interpreted(fault)
    kind = "joined" if "-" in fault else "gated"
    assert sum(f["unequal"] > 0.1 * f["count"] for f in found[kind]) >= 2
