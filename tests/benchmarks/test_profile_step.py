"""A step's kernels by name: what is counted, and names without what differs from build to build."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

Script = Callable[[str], ModuleType]


def test_every_operation_is_counted_a_step(script: Script) -> None:
    profile_step = script("profile_step")
    x = torch.randn(64, 64)
    rows = profile_step.kernels(lambda: torch.relu(x @ x) @ x, "cpu")
    launches = {name: count for name, count, _ in rows}
    assert launches["aten::mm"] == 2 and launches["aten::relu"] == 1
    assert [time for *_, time in rows] == sorted((time for *_, time in rows), reverse=True)
    found = profile_step.measured(profile_step.models.find("sd15").shrunk(), "w8a8", "cpu", True)
    assert found["launches"] > 100 and found["kernels_ms"] > 0
    assert profile_step.table("w8a8", found).count("\n") == profile_step.SHOWN


def test_names_lose_what_no_reader_looks_for(script: Script) -> None:
    short = script("profile_step").short
    assert short("void at::native::elementwise_kernel<128, 4, lambda>(int, X)") == "elementwise_kernel"
    assert short("sm90_xmma_gemm_bf16") == "sm90_xmma_gemm_bf16" and short("<lambda>") == "<lambda>"
    assert len(short("x" * 200)) == 70
