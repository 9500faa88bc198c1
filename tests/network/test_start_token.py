"""The start token's row of k, and a logarithmic grid with a static delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

import bitbrush  # noqa: F401  (registers the plug-in)
import tiny
from bitbrush.artifact.save import save
from bitbrush.errors import InputError
from bitbrush.network import attention
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention, install_operands
from bitbrush.network.clock import Clock
from bitbrush.network.log2 import Log2Quantizer
from bitbrush.numbers.codec import decode_log2, encode_log2
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec
from bitbrush.numbers.ranges import LOG2_QUANTILES, search_log2
from bitbrush.steps.fit import quantizers
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, complete, execute

STATIC = LayerSpec(activation=ActivationSpec(grid=Grid(kind="log2", bits=4)), exempt=(0,))


def attend(cross: bool = True, **operands: LayerSpec) -> Any:
    """An attention of two heads in sim face."""
    torch.manual_seed(0)
    module: Any = Attention(query_dim=16, heads=2, dim_head=8, cross_attention_dim=12 if cross else None).eval()
    install_operands(module, operands, Clock(), 1)
    module.processor.face = "sim"
    return module


def given(tokens: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    context = torch.randn(3, tokens, 12, generator=g)
    context[:, 0] *= 20  # the start token's keys are far from the others'
    return {"hidden_states": torch.randn(3, 5, 16, generator=g), "encoder_hidden_states": context}


def keys(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    k: Tensor = module.to_k(inputs["encoder_hidden_states"]).unflatten(-1, (2, -1)).transpose(1, 2)
    return k


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("part", [1 << 30, 1])
@torch.no_grad()
def test_the_start_row_of_k_is_float(mode: Any, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item 8: bit-identical, in the product and for what is fitted; the scale is that of the other rows."""
    monkeypatch.setattr(attention, "PART", part)
    spec = LayerSpec(activation=ActivationSpec(grid=Grid(bits=4), mode=mode), exempt=(0,))
    module, inputs = attend(k=spec), given()
    k = keys(module, inputs)
    quantizer: ActivationQuantizer = module.processor.k
    if mode == "static":
        quantizer.set_scale(torch.tensor([[0.2]]), torch.tensor([[7]]))
    wanted = torch.cat([k[:, :, :1], quantizer(k[:, :, 1:], 3)], dim=2)
    rounded: list[Tensor] = []
    original = attention._weights

    def spy(q: Tensor, keys_: Tensor, *args: Any) -> Tensor:
        rounded.append(attention._rounded_k(args[2], keys_))
        return original(q, keys_, *args)

    monkeypatch.setattr(attention, "_weights", spy)
    got = module(**inputs)
    found = torch.cat([torch.cat(rounded[i : i + 2], 1) for i in range(0, 6, 2)]) if part == 1 else rounded[0]
    assert len(rounded) == (6 if part == 1 else 1)
    assert torch.equal(found, wanted) and torch.equal(found[:, :, 0], k[:, :, 0]) and not torch.equal(found, k)
    whole = attend(k=spec.model_copy(update={"exempt": ()}))
    if mode == "dynamic":  # one scale with the start token's: the words have next to no levels left
        float_k, error = attend(), []
        install_operands(float_k, {}, Clock(), 1)
        want = float_k(**inputs)
        error = [float((out - want).norm()) for out in (got, whole(**inputs))]
        assert error[0] < 0.5 * error[1]


@torch.no_grad()
def test_what_k_is_fitted_to() -> None:
    module, inputs, seen = attend(k=LayerSpec(activation=ActivationSpec(), exempt=(0,))), given(), []
    module.processor.k.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    module(**inputs)
    assert len(seen) == 1 and torch.equal(seen[0], keys(module, inputs)[:, :, 1:])
    alone = given(tokens=1)
    assert torch.isfinite(module(**alone)).all(), "a text of nothing but a start token"


def test_only_k_of_cross_attention() -> None:
    spec = LayerSpec(activation=ActivationSpec(), exempt=(0,))
    with pytest.raises(InputError, match="start token") as caught:
        attend(cross=False, k=spec)
    assert complete(caught.value) and "k" in (caught.value.where or "")


# ---- a static delta ----------------------------------------------------------------------------------------------
def static(rows: int = 1, clock: Clock | None = None) -> Log2Quantizer:
    spec = ActivationSpec(grid=Grid(kind="log2", bits=4), timed=clock is not None)
    made = Log2Quantizer(spec, (0,), clock, rows)
    made.set_scale(torch.tensor([[0.25], [0.03125]])[:rows])
    return made


def test_larger_values_are_clipped_to_delta() -> None:
    x = torch.tensor([0.9, 0.5, 0.25, 0.2, 0.125, 1e-3, 0.0]).reshape(1, 1, 1, 7)
    out = static()(x, 3)
    assert torch.equal(out.flatten()[:3], torch.tensor([0.9, 0.25, 0.25])), "the start column as it was"
    assert torch.equal(out[..., 1:], decode_log2(encode_log2(x[..., 1:], torch.tensor(0.25), 15), torch.tensor(0.25)))


def test_a_delta_a_timestep() -> None:
    clock = Clock((1.0, 9.0))
    made, x = static(2, clock), torch.rand(2, 2, 3, 4)
    with clock.at(torch.tensor([9.0, 1.0])):
        assert made.delta(x).flatten().tolist() == [0.03125, 0.25]
        assert torch.equal(made(x, 3)[0, ..., 1:].amax(), torch.tensor(0.03125))


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = attend(softmax=STATIC), given()
    module.processor.softmax.set_scale(torch.tensor([[0.2]]))
    with torch.no_grad():
        want = module(**inputs)
        monkeypatch.setattr(attention, "PART", 1)
        assert torch.equal(module(**inputs), want)


def test_the_search_takes_the_best_quantile() -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.rand(2, 20000, generator=g)
    values = torch.stack([wide[0] ** 6, wide[1] ** 40, torch.zeros(20000)])
    delta, zero = search_log2(values, Grid(kind="log2", bits=4))
    assert zero.tolist() == [0, 0, 0] and float(delta[2]) == 1
    for row in range(2):
        candidates = [values[row].sort().values[round(q * 19999)] for q in LOG2_QUANTILES]
        errors = [float((decode_log2(encode_log2(values[row], d, 15), d) - values[row]).square().mean())
                  for d in candidates]
        assert float(delta[row]) == float(candidates[errors.index(min(errors))])


def test_through_a_recipe(tmp_path: Path) -> None:
    """Fitted, packed, saved, opened: the same bits; the dynamic arm has no tables."""
    rules = ('"*attn2:k" = { activation = { exempt = [0] } }\n"*:softmax" = { activation = { grid = "log2" } }\n'
             '"*attn2:softmax" = { activation = { grid = "log2", timed = true, exempt = [0] } }\n')
    pipe = tiny.pipeline("text")
    run = execute(tmp_path, pipe, HEAD + rules + CALIBRATE + FIT + RANGES + PACK)
    found = {n: q for n, q in quantizers(run).items() if isinstance(q, Log2Quantizer)}
    assert len(found) == 8 and {tuple(q.scale.shape) for q in found.values()} == {(1, 1), (3, 1)}
    assert all(bool(((q.scale > 0) & (q.scale <= 1)).all()) for q in found.values())
    assert {m.k.exempt for m in run.model.modules() if isinstance(m, QuantAttention) and m.k is not None} == {(0,)}
    want = tiny.run(pipe.unet)
    again = type(pipe.unet).from_pretrained(save(pipe, tmp_path / "made", run.plan) / "unet")
    assert torch.equal(tiny.run(again), want)
