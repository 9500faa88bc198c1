"""Makes codec.json with numpy's float32 alone: an implementation of the pinned arithmetic that shares no line with it.

    python tests/golden/make_codec.py

Floats are written as the integers of their bits. Cases: ties (half to even), both ends of the range, values where a
division and a multiplication with the reciprocal disagree, infinities, subnormal inputs and ordinary ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

F = np.float32


def bits_of(values: np.ndarray) -> list[int]:
    """Float32 values as unsigned integers."""
    return [int(v) for v in np.asarray(values, dtype=F).view(np.uint32)]


def encode(x: np.ndarray, scale: np.float32, zero: int, bits: int) -> np.ndarray:
    """The definition of docs/numerics.md in numpy float32."""
    inverse = F(1) / scale
    return np.clip(np.rint(x * inverse) + F(zero), F(0), F(2**bits - 1)).astype(F)


def disagreeing(scale: np.float32, rng: np.random.Generator) -> np.ndarray:
    """Values that a division would put on another code."""
    ties = (np.arange(-100, 100, dtype=F) + F(0.5)) * scale
    near = np.concatenate([ties, np.nextafter(ties, F(np.inf)), np.nextafter(ties, F(-np.inf))])
    near = np.concatenate([near, rng.normal(size=200_000).astype(F) * scale * F(30)])
    return near[np.rint(near * (F(1) / scale)) != np.rint(near / scale)][:12]


def main() -> None:
    """Write the file beside this script."""
    rng, cases = np.random.default_rng(20260701), []
    for bits in range(1, 9):
        for scale in (F(1), F(2.0**-6), F(0.1), F(0.0137), F(3e-38), F(7.5)):
            for zero in sorted({0, 1, 2 ** (bits - 1), 2**bits - 1}):
                x = np.concatenate([
                    (np.arange(-6, 7, dtype=F) + F(0.5)) * scale, np.array([0.0, -0.0, np.inf, -np.inf, 1e-45], F),
                    rng.normal(size=6).astype(F) * scale * F(2**bits / 3), disagreeing(scale, rng)[:4],
                ])
                code = encode(x, scale, zero, bits)
                value = (code - F(zero)) * scale
                cases.append({
                    "bits": bits, "scale": bits_of([scale])[0], "zero_point": zero, "x": bits_of(x),
                    "codes": [int(c) for c in code], "values": bits_of(value),
                })
    text = "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n"
    Path(__file__).with_name("codec.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
