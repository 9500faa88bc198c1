"""The forms with gradients: forward is the codec bit for bit, backward is what the equations say."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitbrush.numbers import codec
from bitbrush.numbers.straight_through import Fused, encode_weight, fake_quantize, fake_weight

SHAPE = (3, 5, 4, 6)
TABLES = {"one": (), "sample": (3, 1, 1, 1), "channel": (1, 5, 1, 1), "both": (3, 5, 1, 1), "token": (3, 1, 4, 1)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tables(kind: str, seed: int, top: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(TABLES[kind], generator=g) * 0.3 + 2.0 / (top + 1)
    return scale, torch.randint(0, top + 1, TABLES[kind], generator=g).float()


def _slow(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The same function from autograd's own pieces."""
    v = x * codec.reciprocal(scale.detach()) + (x.detach() / scale - x.detach() / scale.detach())
    q = v + (torch.round(v) - v).detach() + zero
    return (q.clamp(0, top) - zero) * scale


def test_forward_is_the_codec_bit_for_bit() -> None:
    ran = 0
    for bits, kind, dtype in itertools.product(range(1, 9), TABLES, DTYPES):
        top = 2**bits - 1
        scale, zero = _tables(kind, ran, top)
        x = (_normal(SHAPE, ran) * 2).to(dtype)
        want = codec.decode(codec.encode(x, codec.reciprocal(scale), zero, top), scale, zero).to(dtype)
        got = fake_quantize(x.requires_grad_(), scale, zero, top)
        assert got.dtype == dtype and torch.equal(got.detach(), want)
        ran += 1
    assert ran == 8 * 5 * 3


def test_gradients_by_hand() -> None:
    """To x: 1 inside the range, 0 outside. To the scale: round(x/s) - x/s inside, the end outside (LSQ eq. 3). To the
    zero-point: -s outside (LSQ+ eq. 5)."""
    x = torch.tensor([-9.0, -0.62, -0.3, 0.0, 0.26, 0.61, 9.0], requires_grad=True)
    scale, zero = torch.tensor(0.25, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    fake_quantize(x, scale, zero, 7).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    scaled = x.detach() / 0.25
    inside = torch.round(scaled) - scaled
    want = torch.where(x.detach() < -5, torch.tensor(-4.0), torch.where(x.detach() > 5, torch.tensor(3.0), inside))
    assert scale.grad is not None and torch.allclose(scale.grad, want.sum(), atol=1e-6)
    assert zero.grad is not None and zero.grad.item() == -0.25 * 2


def test_gradients_equal_autograd_of_the_pieces() -> None:
    ran = clipped = 0
    for kind, bits, needs in itertools.product(TABLES, (1, 4, 8), itertools.product((False, True), repeat=3)):
        if not any(needs):
            continue
        top = 2**bits - 1
        scale, zero = _tables(kind, bits, top)
        weight, grads = _normal(SHAPE, 1), []
        for form in (fake_quantize, _slow):
            leaves = [t.clone().requires_grad_(need)
                      for t, need in zip((_normal(SHAPE, 2) * 2, scale, zero), needs, strict=True)]
            (form(leaves[0], leaves[1], leaves[2], top) * weight).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for got, want, need in zip(*grads, needs, strict=True):
            assert (got is not None) == need
            if need:
                assert got.shape == want.shape and torch.allclose(got, want, atol=2e-4, rtol=1e-4), (kind, bits)
        clipped += int((grads[0][0] == 0).sum()) if needs[0] else 0
        ran += 1
    assert ran == 5 * 3 * 7 and clipped > 100


def test_gradients_keep_the_dtype_and_survive_infinities() -> None:
    for dtype in DTYPES:
        x = torch.tensor([float("inf"), -float("inf"), 0.3, float("nan")], dtype=dtype, requires_grad=True)
        y = fake_quantize(x, torch.tensor(0.1), torch.tensor(3.0), 15)
        assert y.isnan().tolist() == [False, False, False, True]
        y.nan_to_num().sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype and x.grad[:3].tolist() == [0, 0, 1]


def test_a_known_reciprocal_changes_nothing() -> None:
    for kind in TABLES:
        found = []
        for known in (False, True):
            leaves = [t.requires_grad_() for t in (_normal(SHAPE, 1), *_tables(kind, 3, 15))]
            inverse = codec.reciprocal(leaves[1].detach()) if known else None
            y = fake_quantize(leaves[0], leaves[1], leaves[2], 15, None, inverse)
            found.append((y.detach(), *torch.autograd.grad(y, leaves, _normal(SHAPE, 2))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_the_tensor_and_its_tables_are_kept() -> None:
    x = _normal(SHAPE, 0).to(torch.bfloat16).requires_grad_()
    scale, zero = (t.requires_grad_() for t in _tables("sample", 0, 15))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, scale, zero, 15)
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() * 2 + 3 * 4 * 2
    assert kept[0].data_ptr() == x.data_ptr()


def test_fused_form_is_used_where_it_fits() -> None:
    calls: list[str] = []

    def forward(x: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        calls.append("forward")
        assert torch.equal(inverse, codec.reciprocal(scale))
        return x * 0 + top

    def backward(
        grad: Tensor, x: Tensor, s: Tensor, i: Tensor, z: Tensor, top: int, tables: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(f"backward {tables}")
        return grad * 2, torch.full_like(s, 3.0), torch.full_like(s, 4.0)

    fused = Fused(lambda x, scale, zero: scale.numel() == 1, forward, backward)
    x, scale, zero = (t.requires_grad_() for t in (_normal(SHAPE, 1), torch.tensor([0.5]), torch.tensor(2.0)))
    y = fake_quantize(x, scale, zero, 7, fused)
    y.sum().backward()
    assert y.unique().tolist() == [7.0] and calls == ["forward", "backward True"]
    assert x.grad.unique().tolist() == [2] and scale.grad.tolist() == [3] and zero.grad.item() == 4
    fake_quantize(x, scale.detach(), zero.detach(), 7, fused).sum().backward()
    assert calls[2:] == ["forward", "backward False"]
    other = torch.full((3, 1, 1, 1), 0.5)
    assert torch.equal(fake_quantize(x, other, zero, 7, fused), fake_quantize(x, other, zero, 7))
    assert torch.equal(fake_quantize(x, scale, zero, torch.tensor(7.0), fused), fake_quantize(x, scale, zero, 7))
    assert len(calls) == 4


# ---- weights ---------------------------------------------------------------------------------------------------------
def _weight(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weight, scale, zero, top, binary) of rows with 1 (symmetric), 2, 3, 4 bits in turn."""
    bits = torch.arange(shape[0]) % 4 + 1
    rows = (-1, *[1] * (len(shape) - 1))
    top = torch.where(bits == 1, 2, (1 << bits) - 1).float().reshape(rows)
    zero = torch.where(bits == 1, 1, (1 << bits) // 2).float().reshape(rows)
    weight = _normal(shape, seed)
    weight.view(-1)[:4] = torch.tensor([0.0, -0.0, 5.0, -5.0])
    scale = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)).reshape(rows) * 0.5 + 0.3
    return weight, scale, zero, top, (bits == 1).reshape(rows)


@pytest.mark.parametrize("shape", [(9, 12), (9, 4, 3, 3)])
@pytest.mark.parametrize("rounding", ["nearest", "offset"])
def test_fake_weight_is_decode_of_encode_weight(shape: tuple[int, ...], rounding: str) -> None:
    weight, scale, zero, top, binary = _weight(1, shape)
    offset = (_normal(shape, 3) > 0).float() if rounding == "offset" else None
    codes = encode_weight(weight, scale, zero, top, offset, binary)
    assert torch.equal(codes, codes.round()) and bool((codes >= 0).all()) and bool((codes <= top).all())
    assert sorted(codes[binary.flatten()].unique().tolist()) == [0, 2]
    assert codes.view(-1)[:2].tolist() == [2, 2]  # 0 counts as positive
    value = fake_weight(weight.clone().requires_grad_(), scale.clone().requires_grad_(), zero, top, offset, binary)
    assert torch.equal(value.detach(), codec.decode(codes, scale, zero)) and value.dtype == torch.float32
    plain = codec.encode(weight, codec.reciprocal(scale), zero, top) if offset is None else codec.encode_offset(
        weight, codec.reciprocal(scale), zero, top, offset)
    others = ~binary.flatten()
    assert torch.equal(codes[others], plain[others]) and int(others.sum()) == 6
    assert torch.equal(codes.to(torch.uint8).float(), codes)


@pytest.mark.parametrize("rounding", ["nearest", "offset"])
def test_gradients_of_fake_weight(rounding: str) -> None:
    shape = (9, 4, 3, 3)
    weight, scale, zero, top, binary = _weight(2, shape)
    offset = (_normal(shape, 3) > 0).float() if rounding == "offset" else None
    factor, grads = _normal(shape, 4), []
    for slow in (False, True):
        w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        if slow:
            v = w / s
            hard = torch.round(v.detach()) if offset is None else torch.floor(v.detach()) + offset
            q = (v + (hard - v).detach() + zero).clamp(min=torch.zeros(()), max=top)
            sign = torch.where(w.detach() >= 0, 1.0, -1.0) + (w / s.detach()).clamp(-1, 1)
            sign = sign - (w.detach() / s.detach()).clamp(-1, 1)
            value = torch.where(binary, sign * s, (q - zero) * s)
        else:
            value = fake_weight(w, s, zero, top, offset, binary)
        (value * factor).sum().backward()
        grads.append((w.grad, s.grad))
    (w_got, s_got), (w_want, s_want) = grads
    edge = ((weight / scale).frac().abs() - 0.5).abs() < 1e-5  # quotient and product may round apart
    assert int(edge.sum()) <= 2 and torch.allclose(w_got[~edge], w_want[~edge], atol=1e-6)
    assert torch.allclose(s_got, s_want, atol=1e-4)
    signs = torch.where(weight >= 0, 1.0, -1.0)
    want = (factor * signs).sum((1, 2, 3), keepdim=True)[binary.flatten()]
    assert torch.allclose(s_got[binary.flatten()], want, atol=1e-5)
    inside = weight.abs() <= scale
    assert torch.equal(w_got[binary.flatten()], (factor * inside)[binary.flatten()])


def test_fake_weight_of_a_half_precision_weight() -> None:
    weight, scale, zero, top, binary = _weight(5, (8, 6))
    half = weight.half().requires_grad_()
    value = fake_weight(half, scale, zero, top, None, binary)
    value.sum().backward()
    assert value.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.float16
    assert torch.equal(value, codec.decode(encode_weight(half, scale, zero, top, None, binary), scale, zero))
