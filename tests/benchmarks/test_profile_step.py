"""A step's kernels by name: what is counted, and names without what differs from build to build."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Script = Callable[[str], ModuleType]


def test_every_operation_is_counted_a_step(script: Script) -> None:
    profile_step = script("profile_step")
    x = torch.randn(64, 64)
    rows = profile_step.summed(profile_step.kernels(lambda: torch.relu(x @ x) @ x, "cpu"), by_grid=False)
    launches = {row["name"]: row["launches"] for row in rows}
    assert launches["aten::mm"] == 2 and launches["aten::relu"] == 1
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)
    found = profile_step.measured(profile_step.models.find("sd15").shrunk(), "w8a8", "cpu", True)
    assert found["launches"] > 100 and found["kernels_ms"] > 0
    assert profile_step.table("w8a8", found).count("\n") == 2 * profile_step.SHOWN


def test_kernels_of_a_trace_are_told_apart_by_their_grids(script: Script) -> None:
    profile_step = script("profile_step")

    def event(name: str, grid: list[int], time: float, kind: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "dur": time, "args": {"grid": grid}}

    once = [event("product", [128, 1, 1], 10.0), event("product", [64, 2, 1], 30.0)]
    once += [event("void norm<4>(int)", [8], 5.0)]
    others = [event("cudaGraphLaunch", [], 99.0, "cuda_runtime"), {"ph": "M", "name": "process_name"}]
    found = profile_step.launches({"traceEvents": once * profile_step.STEPS + others}, cuda=True)
    assert profile_step.summed(found, by_grid=False) == [
        {"name": "product", "launches": 2, "us": 40.0}, {"name": "norm", "launches": 1, "us": 5.0}]  # fmt: skip
    rows = profile_step.summed(found, by_grid=True)
    assert [(row["grid"], row["us"]) for row in rows] == [("64 x 2 x 1", 30.0), ("128 x 1 x 1", 10.0), ("8", 5.0)]


def test_names_lose_what_no_reader_looks_for(script: Script) -> None:
    short = script("profile_step").short
    assert short("void at::native::elementwise_kernel<128, 4, lambda>(int, X)") == "elementwise_kernel"
    assert short("void at::native::(anonymous namespace)::CatArrayBatchedCopy<int>(int)") == "CatArrayBatchedCopy"
    assert short("sm90_xmma_gemm_bf16") == "sm90_xmma_gemm_bf16" and short("<lambda>") == "<lambda>"
    assert len(short("x" * 200)) == 70
