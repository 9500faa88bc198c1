"""Packing is a bijection, its bytes are as described, and rows hold the weight in the documented order."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bitbrush.numbers import packing

LONG = (301, 511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2880, 4095, 4096, 4097)


def _codes(rows: int, length: int, bits: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, length), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bijection(bits: int) -> None:
    ran = 0
    for length in (*range(301), *LONG):
        codes = _codes(2, length, bits, length)
        codes[0] = 2**bits - 1
        data = packing.pack(codes, bits)
        assert data.dtype == torch.uint8 and data.shape == (2, packing.row_bytes(length, bits))
        assert data.shape[1] % packing.ROW_ALIGN == 0
        assert torch.equal(packing.unpack(data, bits, length), codes)
        ran += 1
    assert ran == 301 + len(LONG)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_plane_bijection_and_padding_bits(width: int) -> None:
    for length in range(301):
        codes = _codes(3, length, width, length)
        data = packing.pack_plane(codes, width)
        assert data.shape[1] == -(-length * width // 8)
        assert torch.equal(packing.unpack_plane(data, width, length), codes)
        if length * width % 8:
            assert int((data[:, -1] >> (length * width % 8)).sum()) == 0  # unused bits are zero: bytes are determined


def test_every_byte_pattern_comes_back() -> None:
    """The other direction: packing what was unpacked restores any bytes, so no two codes share bytes."""
    ran = 0
    for bits in range(1, 9):
        length = 128
        size = packing.row_bytes(length, bits)
        g = torch.Generator().manual_seed(bits)
        data = torch.randint(0, 256, (64, size), generator=g, dtype=torch.uint8)
        assert torch.equal(packing.pack(packing.unpack(data, bits, length), bits), data)
        ran += 1
    assert ran == 8


def test_bytes_by_hand() -> None:
    """3 bits are planes 2 + 1, low-order bits first, from the low end of a byte, padded to 16 bytes a plane."""
    assert [packing.planes(b) for b in range(1, 9)] == [
        (1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,),
    ]
    codes = torch.tensor([[5, 2, 7, 0, 4]])  # 101 010 111 000 100
    data = packing.pack(codes, 3)[0].tolist()
    assert data[:2] == [0b00_11_10_01, 0b00] and data[2:16] == [0] * 14
    assert data[16] == 0b10101 and data[17:] == [0] * 15
    assert packing.pack(torch.tensor([[0xA, 0x3, 0xF]]), 4)[0, :2].tolist() == [0x3A, 0x0F]
    whole = packing.pack(torch.tensor([[200, 7]]), 8)
    assert whole[0, :2].tolist() == [72, 135]
    assert packing.int8_rows(whole)[0].tolist() == [72, -121] + [0] * 14  # code - 128, past the row's codes 0


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        packing.planes(bits)


def test_weight_rows_inverse_and_order() -> None:
    rng, ran = random.Random(0), 0
    shapes = [(1, 1), (1, 3), (3, 1), (3, 3), (2, 5)]
    splits = [(1,), (32,), (33,), (40, 24), (31, 1, 33), (64, 64), (1, 1, 1)]
    for (kh, kw), segments in itertools.product(shapes, splits):
        n, channels = rng.choice([1, 2, 5]), sum(segments)
        codes = _codes(n, channels * kh * kw, 8, ran).reshape(n, channels, kh, kw)
        fill = _codes(n, len(segments), 8, ran + 1)
        rows = packing.weight_rows(codes, segments, fill)
        assert rows.shape == (n, packing.row_length(segments, (kh, kw)))
        back = packing.rows_to_weight(rows, segments, (kh, kw))
        assert torch.equal(back, codes) and back.stride() == codes.stride()  # 1x1: not channels-last by accident
        start = first = 0
        for s, count in enumerate(segments):  # every element is where (segment, kh, kw, channel) says
            wide = -(-count // 32) * 32
            for y, x, c in itertools.product(range(kh), range(kw), range(wide)):
                want = codes[:, first + c, y, x] if c < count else fill[:, s]
                assert torch.equal(rows[:, start + (y * kw + x) * wide + c], want)
            start, first = start + kh * kw * wide, first + count
        ran += 1
    assert ran == len(shapes) * len(splits) == 35
