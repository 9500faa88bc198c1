"""Runs packed layers of the grid of cases through the CUDA kernels in Triton's interpreter; prints JSON.

Decoded weights must be the reference's bit for bit, in every bit width, mixed and symmetric rows and codebooks.

A process of its own, because the interpreter is chosen when Triton is imported. Float32 layers must equal the integer
kernel of the CPU bit for bit: the same integers, the same float32 epilogue.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch

import builder
from bitbrush.kernels import cpu, cpu_fused, gpu, gpu_decode, int8_ops, tuning
from bitbrush.kernels.triton_int8 import Config
from bitbrush.numbers.codebook import decode, pack_codes


def decoded_weights() -> tuple[int, list[str]]:
    """(weights compared, those that differ) of `gpu_decode`."""
    gpu_decode._OPS = SimpleNamespace(
        decode_affine=gpu_decode._affine_cuda, decode_codebook=gpu_decode._codebook_cuda
    )
    count, unequal = 0, []
    for i, case in enumerate(builder.pairwise(8)[::2]):
        _, packed, _ = builder.build(case, i)
        if not torch.equal(gpu_decode.weight(packed, torch.float32), packed.decoded_weight()):
            unequal.append(str(case))
        count += 1
    shapes = ((9, 10), (16, 32), (7, 74))  # of one program that is not full, of two that are, and of one of each
    for bits, books, size, (rows, groups) in itertools.product((8, 6, 3), (1, 3), (8, 4, 3), shapes):
        if not _codebooks_equal(bits, books, size, rows, groups):
            unequal.append(f"codebooks {bits} {books} {size} {rows} {groups}")
        count += 1
    return count, unequal


def _codebooks_equal(bits: int, books: int, size: int, rows: int, groups: int) -> bool:
    """Whether codes ``[rows, groups, books]`` are decoded to the reference's weight."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, groups, books), generator=g)
    values, scale = torch.randn((books, 2**bits, size), generator=g).half(), torch.rand(rows, generator=g).half()
    packed = pack_codes(codes, bits)
    return all(torch.equal(gpu_decode._codebook_cuda(packed, bits, values, scale, groups, dtype),
                           decode(codes, values, scale).to(dtype)) for dtype in (torch.float32, torch.float16))


def main() -> None:
    """Print what was compared."""
    gpu._OPS = SimpleNamespace(
        int8_encode=int8_ops._encode_cuda, int8_weight=int8_ops._weight_cuda, int8_product=int8_ops._product_cuda
    )
    cpu_fused.takes = lambda layer, x: False  # the plain form, whose epilogue is in the pinned order
    ran, unequal = {"linear": 0, "conv": 0}, []
    for i, case in enumerate(builder.pairwise(7)[::2]):
        case = builder.square({**case, "dtype": torch.float32})
        _, packed, _ = builder.build(case, i)
        if gpu.unable(packed) is not None:
            continue
        cut = Config(16, 16, 32, 2, 4, 2, tma=i % 2 == 0)
        tuning.config = lambda problem, device, run, cut=cut: cut  # type: ignore[assignment]
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            if not torch.equal(gpu.run(packed, x), cpu.run(packed, x)):
                unequal.append(str(case))
        ran[case["kind"]] += 1
    decoded, other = decoded_weights()
    sys.stdout.write(json.dumps({**ran, "unequal": unequal + other, "decoded": decoded}) + "\n")


if __name__ == "__main__":
    main()
