"""The fused fake quantization: Triton's interpreter against the torch form, and what may be imported when."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitbrush.kernels import triton_fake
from bitbrush.network import activation
from bitbrush.network.activation import ActivationQuantizer, fused_form
from bitbrush.numbers.grid import ActivationSpec
from bitbrush.numbers.straight_through import Fused

SOURCE = Path(__file__).resolve().parents[2] / "src"
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def _python(*args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def _interpreted(*args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_python(str(Path(__file__).with_name("interpreted_fake.py")), *args))
    return found


@TRITON
def test_interpreted_kernels_equal_the_torch_form() -> None:
    found = _interpreted()
    assert found["cases"] == 6 * 2 * 3 * 3 and found["values"] > 100_000 and found["layouts"] == 9
    assert found["wrong"] == 0 and found["wrong_dx"] == 0 and found["worst_table"] < 1e-6
    assert found["weights"] > 90_000 and found["weight_wrong"] == found["weight_wrong_dw"] == 0
    assert 0 < found["weight_worst_table"] < 1e-5


@TRITON
def test_half_up_rounding_would_show() -> None:
    found = _interpreted("fault")
    assert found["wrong"] > 1000 and found["weight_wrong"] > 1000


def test_triton_is_not_imported_on_the_cpu() -> None:
    code = """
import sys, torch
from bitbrush.kernels import triton_fake
from bitbrush.network.layers import QuantLinear
from bitbrush.numbers.grid import ActivationSpec, LayerSpec
layer = QuantLinear.wrap(torch.nn.Linear(4, 4), LayerSpec(activation=ActivationSpec()), None, 1)
layer.face = "sim"
layer(torch.ones(2, 4, requires_grad=True)).sum().backward()
print("bitbrush.kernels.triton_fake_kernels" in sys.modules, triton_fake.build(), triton_fake.build_weight())
"""
    assert _python("-c", code) == "False None None"


def test_shapes_that_fit() -> None:
    x = torch.zeros(4, 3, 8, 6)
    assert [triton_fake.rows(x, torch.zeros(shape)) for shape in ((), (1,), (1, 1, 1, 1), (4, 1, 1, 1), (1, 3, 1, 1),
                                                                  (4, 3, 1, 1), (4,), (1, 1, 1, 6))] == [
        1, 1, 1, 4, 0, 0, 0, 0]
    forms = {
        "contiguous": (x, True), "channels last": (x.contiguous(memory_format=torch.channels_last), True),
        "heads": (torch.zeros(2, 5, 12).unflatten(-1, (3, 4)).transpose(1, 2), True), "strided": (x[..., ::2], False),
        "expanded": (x[:1].expand(4, -1, -1, -1), False), "narrow": (x[:, :2], False), "one": (x[:1, :2], True),
    }
    assert {name: triton_fake.dense(form) for name, (form, _) in forms.items()} == {k: v for k, (_, v) in forms.items()}
    assert not triton_fake.fits(x, torch.ones(()), torch.ones(()))  # on the CPU
    assert fused_form(x) is None


def test_the_quantizer_hands_the_fused_form_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, with trial tables and without gradients the same kernels are asked."""
    calls = []

    def fits(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> bool:
        calls.append((tuple(scale.shape), tuple(zero.shape)))
        return False

    unused: Any = None
    monkeypatch.setattr(activation, "fused_form", lambda x: Fused(fits, unused, unused))
    quantizer = ActivationQuantizer(ActivationSpec())
    quantizer(torch.ones(2, 3), 1)
    quantizer(torch.ones(2, 3, requires_grad=True), 1)
    quantizer.trial_zero_point = torch.zeros(1, 1)
    quantizer(torch.ones(2, 3), 1)
    assert calls == [((1, 1), (1, 1))] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_on_a_gpu() -> None:
    fused = triton_fake.build()
    if fused is None:
        pytest.skip("Triton cannot build here")
    ran = 0
    for dtype in triton_fake.DTYPES:
        for shape in ((), (8, 1, 1, 1)):
            x = (torch.randn(8, 33, 17, 19, device="cuda") * 3).to(dtype)
            scale, zero = torch.rand(shape, device="cuda") * 0.1 + 0.01, torch.full(shape, 121.0, device="cuda")
            assert fused.fits(x, scale, zero)
            want = activation.decode(activation.encode(x, 1 / scale, zero, 255), scale, zero).to(dtype)
            assert torch.equal(fused.forward(x, scale, 1 / scale, zero, 255), want)
            ran += 1
    assert ran == 6
