"""The mixture of quantizers: forward is the codec, backward the naive autograd build; memory does not grow with K."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitbrush.numbers import codec
from bitbrush.numbers.mixture import FusedMixture, Wanted, mixture
from bitbrush.numbers.straight_through import fake_quantize

SHAPE = (3, 5, 4, 6)
TABLES = {"one": (1, 1, 1, 1), "channel": (1, 5, 1, 1), "last": (1, 1, 1, 6)}
SHARES = {"all": (1, 1, 1, 1), "sample": (3, 1, 1, 1), "channel": (1, 5, 1, 1), "both": (3, 5, 1, 1)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _made(
    count: int, table: str, share: str, bits: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, shares that sum to 1, scales and zero-points."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(SHAPE, generator=g) * 2).to(dtype)
    shares = torch.softmax(torch.randn((count, *SHARES[share]), generator=g), dim=0)
    scale = torch.rand((count, *TABLES[table]), generator=g) * 0.3 + 1.5 / (1 << bits)
    return [x, shares, scale, torch.randint(0, 1 << bits, scale.shape, generator=g).float()]


def _naive(x: Tensor, share: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """K straight-through quantizers, each kept by autograd."""
    parts = [share[k] * fake_quantize(x, scale[k], zero[k], top).float() for k in range(len(share))]
    return torch.stack(parts).sum(0).to(x.dtype)


def test_forward_is_a_sum_of_codecs() -> None:
    ran = 0
    for count, table, share, bits, dtype in itertools.product((1, 2, 5), TABLES, SHARES, (1, 4, 8), DTYPES):
        x, shares, scale, zero = _made(count, table, share, bits, ran, dtype)
        top = (1 << bits) - 1
        got = mixture(x, shares, scale, zero, top)
        want = torch.zeros(SHAPE)
        for k in range(count):
            want = want + shares[k] * codec.decode(
                codec.encode(x, codec.reciprocal(scale[k]), zero[k], top), scale[k], zero[k])
        assert got.dtype == dtype and torch.equal(got, want.to(dtype)), (count, table, share, bits, dtype)
        ran += 1
    assert ran == 3 * 3 * 4 * 3 * 3


def test_one_member_is_the_plain_quantizer_bit_for_bit() -> None:
    """K = 1 has share 1; and one-hot shares of several are their one member."""
    ran = 0
    for table, bits, dtype in itertools.product(TABLES, range(1, 9), DTYPES):
        x, _, scale, zero = _made(4, table, "sample", bits, ran, dtype)
        top = (1 << bits) - 1
        for k in range(4):
            plain = fake_quantize(x, scale[k], zero[k], top)
            one = slice(k, k + 1)
            assert torch.equal(mixture(x, torch.ones(1, 1, 1, 1, 1), scale[one], zero[one], top), plain)
            shares = torch.zeros(4, 3, 1, 1, 1)
            shares[k] = 1
            assert torch.equal(mixture(x, shares, scale, zero, top), plain)
            ran += 1
    assert ran == 3 * 8 * 3 * 4


def test_gradients_equal_the_naive_build() -> None:
    ran = 0
    for count, table, share, bits in itertools.product((1, 3), TABLES, SHARES, (2, 6)):
        for needs in itertools.product((False, True), repeat=4):
            if not any(needs):
                continue
            given, up = _made(count, table, share, bits, ran), torch.randn(SHAPE)
            grads = []
            for form in (mixture, _naive):
                leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
                (form(leaves[0], leaves[1], leaves[2], leaves[3], (1 << bits) - 1) * up).sum().backward()
                grads.append([leaf.grad for leaf in leaves])
            for got, want, need in zip(*grads, needs, strict=True):
                assert (got is not None) == need
                if need:
                    assert got.shape == want.shape and torch.allclose(got, want, atol=2e-4, rtol=1e-4)
            ran += 1
    assert ran == 2 * 3 * 4 * 2 * 15


def test_gradients_by_hand() -> None:
    """To x: the shares of those in whose range it lies. To a share: grad times what its quantizer answers."""
    x = torch.tensor([[0.6], [5.2]], requires_grad=True)
    share = torch.tensor([0.25, 0.75]).view(2, 1, 1).requires_grad_()
    scale = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    zero = torch.zeros(2, 1, 1)
    out = mixture(x, share, scale, zero, 3)  # ranges [0, 1.5] and [0, 6]
    assert torch.allclose(out.detach(), torch.tensor([[0.125], [0.25 * 1.5 + 0.75 * 6.0]]), atol=1e-6)
    out.backward(torch.tensor([[1.0], [2.0]]))
    assert x.grad is not None and torch.allclose(x.grad, torch.tensor([[1.0], [1.5]]))
    assert share.grad is not None and torch.allclose(share.grad.flatten(), torch.tensor([0.5 + 2 * 1.5, 2 * 6.0]))


def test_without_straight_through_the_input_gets_zeros_and_the_rest_what_it_got() -> None:
    """What the released code of ADP-DM trains with: the derivative of rounding."""
    grads, outs = [], []
    for through in (True, False):
        leaves = [t.requires_grad_() for t in _made(3, "one", "both", 4)]
        out = mixture(leaves[0], leaves[1], leaves[2], leaves[3], 15, straight_through=through)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append([leaf.grad for leaf in leaves])
    assert torch.equal(*outs) and bool((grads[0][0] != 0).any()) and not bool(grads[1][0].any())
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))


def test_gradients_of_half_precision_come_in_its_dtype() -> None:
    for dtype in DTYPES[1:]:
        x, share, scale, zero = _made(3, "one", "sample", 4, 7, dtype)
        x.requires_grad_()
        share.requires_grad_()
        mixture(x, share, scale, zero, 15).sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        assert share.grad is not None and share.grad.dtype == torch.float32


def test_what_is_kept_for_backward_does_not_grow_with_the_count() -> None:
    sizes: dict[int, int] = {}
    for count in (1, 16):
        x, share, scale, zero = (t.requires_grad_() for t in _made(count, "one", "channel", 4))
        kept: list[Tensor] = []

        def keep(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            mixture(x, share, scale, zero, 15).sum().backward()
        sizes[count] = sum(t.numel() for t in kept) - count * 8  # 5 shares, a scale, its reciprocal, a zero-point
        assert len(kept) == 5
    assert sizes == {1: 360, 16: 360}, "x, once"


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("tables", [False, True])
def test_fused_kernels_are_used_where_they_fit(tables: bool, through: bool) -> None:
    """Kernels as `FusedMixture` describes them, made of the plain form: asked once each, for what is wanted."""
    calls = {"forward": 0, "backward": 0}

    def forward(x: Tensor, share: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        calls["forward"] += 1
        return mixture(x, share, scale, zero, top)

    def backward(
        grad: Tensor, x: Tensor, share: Tensor, scale: Tensor, zero: Tensor, top: int, wanted: Wanted
    ) -> tuple[Tensor | None, ...]:
        calls["backward"] += 1
        assert wanted == (through, True, tables, tables) and grad.dtype == x.dtype
        leaves = [t.detach().clone().requires_grad_() for t in (x, share, scale, zero)]
        with torch.enable_grad():
            out = mixture(leaves[0], leaves[1], leaves[2], leaves[3], top)
            found = torch.autograd.grad(out, leaves, grad)
        return tuple(part if want else None for part, want in zip(found, wanted, strict=True))

    fused = FusedMixture(lambda x, share, scale, zero: share.shape[2] == 1, forward, backward)
    results = []
    for kernels in (fused, None):
        leaves = _made(3, "one", "sample", 4)
        for leaf, need in zip(leaves, (True, True, tables, tables), strict=True):
            leaf.requires_grad_(need)
        out = mixture(leaves[0], leaves[1], leaves[2], leaves[3], 15, kernels, straight_through=through)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert calls == {"forward": 1, "backward": 1}
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
    x, share, scale, zero = _made(3, "one", "channel", 4)
    mixture(x, share, scale, zero, 15, fused)
    assert calls["forward"] == 1, "shares of a channel do not fit"
