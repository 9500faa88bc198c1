"""Normalisation layers with two faces: the teacher keeps its values, and after folding they are plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

import tiny
from bitbrush.errors import InternalError
from bitbrush.network import norms, wrap
from bitbrush.network.norms import FacedNorm


@pytest.mark.parametrize(
    "module", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4), RMSNorm(4, eps=1e-6), nn.LayerNorm(4, bias=False)],
    ids=["group", "layer", "rms", "diffusers' rms", "no shift"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faces(module: nn.Module, dtype: torch.dtype) -> None:
    plain = copy.deepcopy(module).to(dtype)
    norm = norms.faced(copy.deepcopy(plain))
    assert isinstance(norm, type(plain)) and norms.faced(norm) is norm
    assert norm.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=dtype)
    values = {key: torch.randn(4) for key, _ in plain.named_parameters()}
    want = copy.deepcopy(plain)
    with torch.no_grad():
        for key, value in values.items():
            getattr(want, key).copy_(value)
    assert torch.equal(norm(x), plain(x))
    norm.set(values)
    assert torch.equal(norm(x), plain(x)), "the float face"
    for face in ("sim", "packed"):
        wrap.set_face(norm, face)  # type: ignore[arg-type]
        assert torch.equal(norm(x), want(x)) and not torch.equal(norm(x), plain(x))
    assert norm.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(norm.parameters(), plain.parameters(), strict=True)), "untouched"
    held = nn.Sequential(norm)
    norms.fold(held)
    assert type(norm) is type(plain) and torch.equal(norm(x), want(x)) and not list(norm.buffers())
    assert {p.dtype for p in norm.parameters()} == {dtype} and vars(norm).keys() == vars(plain).keys()


def test_trial_values_get_gradients_and_leave_no_trace() -> None:
    norm = norms.faced(nn.GroupNorm(2, 4), "sim")
    before, x = dict(norm.named_parameters()), torch.randn(2, 4, 3)
    plain = norm(x).detach()
    trial = torch.full((4,), 3.0, requires_grad=True)
    norm.trial = {"weight": trial}
    norm(x).sum().backward()
    assert trial.grad is not None and bool(trial.grad.any()) and norm.weight.grad is None
    assert all(norm._parameters[key] is p for key, p in before.items())
    torch.testing.assert_close(norm(x), 3 * plain)
    with pytest.raises(RuntimeError):
        norm(torch.randn(2, 3, 3))
    assert all(norm._parameters[key] is p for key, p in before.items()), "nor after an error"
    norm.trial = {}
    assert torch.equal(norm(x), plain)


def test_wrong_values_are_refused() -> None:
    norm = norms.faced(nn.LayerNorm(4, bias=False))
    for values in ({"bias": torch.ones(4)}, {"weight": torch.ones(3)}):
        with pytest.raises(InternalError, match="no parameter"):
            norm.set(values)


def test_the_norms_of_a_network() -> None:
    model = tiny.text_unet()
    found = norms.find(model)
    kinds = {name: type(module) for name, module in found.items()}
    assert set(kinds.values()) == {nn.GroupNorm, nn.LayerNorm} and "conv_norm_out" in kinds
    assert kinds == {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    for module in found.values():
        norms.faced(module)
    assert norms.find(model).keys() == found.keys() and sum(isinstance(m, FacedNorm) for m in model.modules()) > 20
    x = tiny.run(model)
    copied = copy.deepcopy(model)
    assert torch.equal(tiny.run(copied), x) and torch.equal(x, tiny.run(tiny.text_unet()))
    with wrap.show(model, "sim"):
        assert {m.face for m in model.modules() if isinstance(m, FacedNorm)} == {"sim"}
    norms.fold(model)
    assert {n: type(m) for n, m in norms.find(model).items()} == kinds
