"""Additive codebooks: decode is the documented sum, columns are in the documented order, stored bits are as counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bitbrush.errors import InputError, NumericsError
from bitbrush.numbers import codebook


def _case(rows: int, groups: int, count: int, bits: int, group: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups, count), generator=g, dtype=torch.uint8)
    return codes, torch.randn(count, 2**bits, group, generator=g), torch.rand(rows, generator=g) + 0.1


def _loop(codes: torch.Tensor, books: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition, number by number."""
    rows = []
    for i in range(codes.shape[0]):
        row = []
        for j in range(codes.shape[1]):
            total = books[0, int(codes[i, j, 0])]
            for k in range(1, codes.shape[2]):
                total = total + books[k, int(codes[i, j, k])]
            row.append(total * scale[i])
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_is_the_loop_bit_for_bit(dtype: torch.dtype) -> None:
    codes, books, scale = _case(5, 4, 3, 4, 8)
    books, scale = books.to(dtype), scale.to(dtype)
    expected = _loop(codes, books.float(), scale.float())
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        found = codebook.decode(codes.to(kind), books, scale)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_gradients_are_those_of_the_loop() -> None:
    codes, books, scale = _case(6, 5, 3, 3, 4)
    aim = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    found, expected = [], []
    for function, out in ((codebook.decode, found), (_loop, expected)):
        c, s = books.clone().requires_grad_(), scale.clone().requires_grad_()
        (function(codes, c, s) - aim).square().sum().backward()
        out += [c.grad, s.grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_columns_of_a_group_are_channels_at_one_place() -> None:
    """Each number names its own channel and place."""
    weight = torch.arange(3 * 16 * 3 * 2, dtype=torch.float32).reshape(3, 16, 3, 2)
    matrix = codebook.to_groups(weight, 8)
    assert matrix.shape == (3, 96)
    place, channel = 0, 0
    for y in range(3):
        for x in range(2):
            for half in range(2):
                group = matrix[:, (place * 2 + half) * 8 :][:, :8]
                assert torch.equal(group, weight[:, half * 8 : half * 8 + 8, y, x])
                channel += 8
            place += 1
    assert channel == 96
    back = codebook.from_groups(matrix, weight.shape)
    assert torch.equal(back, weight) and back.stride() == weight.stride()


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 8, 1, 3), (2, 24, 3, 3), (5, 16)])
def test_order_is_a_bijection_with_gradient(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    back = codebook.from_groups(codebook.to_groups(weight, 8), shape)
    assert torch.equal(back, weight) and back.stride() == weight.stride()
    (back * weight.detach()).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, weight.detach())


def test_lossless_codes_reproduce_the_convolution() -> None:
    """With a codeword for every group, the decoded filter is the filter."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 16, 3, 3, generator=g)
    words, index = codebook.to_groups(weight, 8).reshape(-1, 8).unique(dim=0, return_inverse=True)
    book = torch.zeros(1, 256, 8)
    book[0, : len(words)] = words
    decoded = codebook.decode(index.reshape(4, 18, 1), book, torch.ones(4))
    x = torch.randn(2, 16, 7, 6, generator=g)
    found = functional.conv2d(x, codebook.from_groups(decoded, weight.shape), stride=2, padding=1)
    assert torch.equal(found, functional.conv2d(x, weight, stride=2, padding=1))


@pytest.mark.parametrize("shape", [(4, 12, 3, 3), (4, 12), (4, 3, 3, 3)])
def test_channels_that_groups_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        codebook.to_groups(torch.zeros(shape), 8, "conv_in")
    error = caught.value
    assert error.where == "conv_in" and str(shape[1]) in str(error.why) and error.try_


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_bytes(bits: int) -> None:
    ran = 0
    for rows, groups, count in ((1, 1, 1), (3, 5, 2), (7, 9, 3), (16, 48, 4)):
        codes = _case(rows, groups, count, bits, 8, rows)[0]
        data = codebook.pack_codes(codes, bits)
        assert data.dtype == torch.uint8 and data.shape == (count, codebook.index_bytes(rows * groups, bits))
        assert torch.equal(codebook.unpack_codes(data, bits, rows, groups), codes)
        ran += 1
    assert ran == 4


@pytest.mark.parametrize(("count", "bits", "group"), [(2, 8, 8), (3, 8, 8), (4, 6, 8), (3, 5, 4), (1, 3, 2)])
def test_bits_are_those_of_the_stored_tensors(count: int, bits: int, group: int) -> None:
    """VQDM section 2.3, to the byte, for layers that share codebooks."""
    shapes, size = [(24, 40), (16, 8, 3, 3)], 0
    for number, shape in enumerate(shapes):
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        codes, books, scale = _case(rows, columns // group, count, bits, group, number)
        size += codebook.pack_codes(codes, bits).nbytes + codebook.to_half(scale).nbytes
    size += codebook.to_half(books).nbytes
    found = codebook.bits_of(shapes, count, bits, group)
    weights = 24 * 40 + 16 * 72
    assert found.total_bytes == size and found.weights == weights
    formula = count * bits / group * weights + count * 2**bits * group * 16 + 16 * (24 + 16)
    assert 0 <= found.total - formula < 8 * 2 * 3 * count  # the last byte of each plane
    if bits == 8:
        assert found.total == formula


def test_bits_of_sdxl_sized_layers() -> None:
    """VQDM pitfall 1: codebooks cost 0.38 bits a weight at 512 x 512, 6 at 128 x 128."""
    for size, overhead in ((512, 0.375), (256, 1.5), (128, 6.0)):
        found = codebook.bits_of([(size, size)], 3, 8, 8)
        assert found.codebooks / found.weights == pytest.approx(overhead)
        assert found.per_weight == pytest.approx(3 + overhead + 16 / size)


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(NumericsError, match="7e\\+04"):
        codebook.to_half(torch.tensor([1.0, 7e4]))
    with pytest.raises(NumericsError):
        codebook.to_half(torch.tensor([1.0, float("nan")]))
