"""A second reader of the packed format, in numpy and Python integers, that shares no code with the package.

The format (docs/format.md), for a layer with N rows, S segments of C_s channels and a kernel of kh x kw:

* `codes{b}` holds the rows of bit width b, classes ascending, in the order that `row_order` (when there) names;
* a row is, for each segment, for each kernel row, for each kernel column: the channels, padded to a multiple of 32 with
  the segment's zero-point;
* rows of 1 bit hold, where the plan says `binary = symmetric`, half their code: 0 and 1 stand for the codes 0 and 2
  (around zero-point 1), and their padding is undefined;
* b bits are planes of 8, 4, 2, 1 bits, the widest first, the low-order bits of a code in the first plane; each plane
  starts at a multiple of 16 bytes; within a plane code k has its bits at bit k * width, counted from the low end of
  byte 0;
* a code of 8 bits has its highest bit flipped in the file;
* the value of a code is (code - weight_zero_point[n, s]) * weight_scale[n, s] in float32.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from bitbrush.numbers import packing


def _row(data: np.ndarray, bits: int, length: int) -> list[int]:
    """Codes of one row, as one big integer a plane."""
    out, start, shift = [0] * length, 0, 0
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        size = -(-(length * width) // 8)
        size += -size % 16
        plane = int.from_bytes(data[start : start + size].tobytes(), "little")
        for k in range(length):
            out[k] |= ((plane >> (k * width)) & ((1 << width) - 1)) << shift
        start, shift = start + size, shift + width
    assert start == len(data)
    return [code ^ 128 for code in out] if bits == 8 else out


def read_weight(
    state: dict[str, np.ndarray], segments: tuple[int, ...], kernel: tuple[int, int], symmetric: bool = False
) -> np.ndarray:
    """The decoded float32 weight ``[N, C, kh, kw]`` of a packed layer's tensors."""
    kh, kw = kernel
    wide = [c + -c % 32 for c in segments]
    length = kh * kw * sum(wide)
    classes = [(b, line) for b in range(1, 9) if f"codes{b}" in state for line in state[f"codes{b}"]]
    double = [symmetric and b == 1 for b, _ in classes]
    rows = [[2 * c for c in _row(line, b, length)] if two else _row(line, b, length)
            for (b, line), two in zip(classes, double, strict=True)]
    order = state["row_order"].tolist() if "row_order" in state else range(len(rows))
    weight = np.full((len(rows), sum(segments), kh, kw), np.nan, dtype=np.float32)
    for stored, two, n in zip(rows, double, order, strict=True):
        at = channel = 0
        for s, count in enumerate(segments):
            zero, scale = int(state["weight_zero_point"][n, s]), np.float32(state["weight_scale"][n, s])
            for y in range(kh):
                for x in range(kw):
                    for c in range(wide[s]):
                        code = stored[at + (y * kw + x) * wide[s] + c]
                        if c < count:
                            weight[n, channel + c, y, x] = np.float32(code - zero) * scale
                        else:
                            assert two or code == zero, "padded channels hold the zero-point"
            at, channel = at + kh * kw * wide[s], channel + count
    return weight


def test_second_reader_agrees(builder: ModuleType) -> None:
    ran = values = signs = 0
    for i, case in enumerate(builder.pairwise(11)):
        sim, packed, _ = builder.build(case, i)
        integers = (torch.uint8, torch.int16, torch.int32)
        state = {k: v.numpy() for k, v in packed.state_dict().items() if v.dtype in integers}
        state["weight_scale"] = packed.state_dict()["weight_scale"].numpy()
        symmetric = packed.spec.weight.binary == "symmetric"
        weight = read_weight(state, packed.segments, packed.kernel_hw, symmetric)
        signs += symmetric
        want = sim.decoded_weight().reshape(weight.shape).numpy()
        assert np.array_equal(weight, want)
        assert not np.isnan(weight).any()
        ran, values = ran + 1, values + weight.size
    assert ran >= 45 and values > 100_000 and signs >= 8


def test_every_bit_width_is_read() -> None:
    seen = set()
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (2, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
        data = packing.pack(codes, bits).numpy()
        assert [_row(line, bits, 77) for line in data] == codes.tolist()
        seen.add(bits)
    assert len(seen) == 8
