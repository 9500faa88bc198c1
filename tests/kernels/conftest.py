"""The builder of random layers, the kinds of processors that a layer on the CPU may meet, and a GPU that is none, as
fixtures."""

from __future__ import annotations

from types import ModuleType

import pytest

import builder as layers
from bitbrush.kernels import cpu, cpu_float, cpu_onednn, gpu, gpu_decode


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """tests/builder.py."""
    return layers


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for GPUs, on the CPU: its operations have a plain form there."""
    monkeypatch.setattr(gpu_decode, "has_triton_package", lambda: True)
    monkeypatch.setattr(gpu, "why_not", lambda layer, kind: gpu.unable(layer))


@pytest.fixture(params=["many rows", "few rows", "split", "floats"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This machine with either product, and one whose pairs of products saturate, with weights halved as there, or in
    float32 where that is exact."""
    monkeypatch.setattr(cpu_onednn, "few", lambda m, k, n: request.param == "few rows")
    if request.param in ("split", "floats"):
        monkeypatch.setattr(cpu_onednn, "engine", lambda: "saturates")
    if request.param == "split":
        monkeypatch.setattr(cpu_float, "wanted", lambda shape, x, n: False)
    if request.param == "few rows" and not cpu.int_mm_is_exact():
        pytest.skip("torch._int_mm is not exact here")
    return str(request.param)
