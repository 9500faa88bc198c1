"""Runs packed layers of the grid of cases through the CUDA kernels in Triton's interpreter; prints JSON.

A process of its own, because the interpreter is chosen when Triton is imported. Float32 layers must equal the integer
kernel of the CPU bit for bit: the same integers, the same float32 epilogue.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch

import builder
from bitbrush.kernels import cpu, gpu, int8_ops, tuning
from bitbrush.kernels.triton_int8 import Config


def main() -> None:
    """Print what was compared."""
    gpu._OPS = SimpleNamespace(
        int8_encode=int8_ops._encode_cuda, int8_weight=int8_ops._weight_cuda, int8_product=int8_ops._product_cuda
    )
    ran, unequal = {"linear": 0, "conv": 0}, []
    for i, case in enumerate(builder.pairwise(7)):
        case = builder.square({**case, "dtype": torch.float32})
        _, packed, _ = builder.build(case, i)
        if gpu.unable(packed) is not None:
            continue
        cut = Config(16, 16, 32, 2, 4, 2, tma=i % 2 == 0, persistent=i % 3 == 0)
        tuning.config = lambda problem, device, run, cut=cut: cut  # type: ignore[assignment]
        x = builder.make_input(case, i)
        with packed.input._clock[0].at(builder.timestep(case)), torch.no_grad():
            if not torch.equal(gpu.run(packed, x), cpu.run(packed, x)):
                unequal.append(str(case))
        ran[case["kind"]] += 1
    sys.stdout.write(json.dumps({**ran, "unequal": unequal}) + "\n")


if __name__ == "__main__":
    main()
