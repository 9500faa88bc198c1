"""Inside small pipelines: every number against a direct computation, and nothing left behind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small
import tiny
from bitbrush.errors import InputError
from bitbrush.evaluation import activation_ranges, attention_maps, inside, sampling
from bitbrush.evaluation.activation_ranges import ActivationRanges
from bitbrush.evaluation.inside import Inside
from bitbrush.network import wrap
from bitbrush.network.attention import attention_weights

PROMPTS = ["red apple", "blue car", "green apple"]
HOW: dict[str, Any] = {"prompts": PROMPTS, "n": 3, "seed": 0, "steps": 3, "guidance": 4.0, "batch": 2}


def hooks(pipe: Any) -> int:
    """Hooks on the denoiser, except those of bitbrush's clock."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


@pytest.fixture(scope="module")
def found() -> Inside:
    pipe, _ = tiny.quantized_pipeline("text", 3, timed=False, dynamic=True)
    return inside.look(pipe, tiny.text_pipeline(), **HOW, token="apple")


def test_a_pipeline_against_itself_has_no_error() -> None:
    pipe = tiny.text_pipeline()
    for reference in (pipe, tiny.text_pipeline()):
        seen = inside.look(pipe, reference, **HOW)
        assert seen.noise_sqnr == seen.latent_sqnr == [None] * 3
        assert seen.attention is not None and set(seen.attention["layers"].values()) == {0.0}
        assert seen.attention["token"] == "apple" and seen.attention["maps"]["reference"] == \
            seen.attention["maps"]["candidate"]
    assert hooks(pipe) == 0
    json.dumps(seen.to_json(), allow_nan=False)


def test_errors_of_each_step_by_hand(found: Inside) -> None:
    pipe, _ = tiny.quantized_pipeline("text", 3, timed=False, dynamic=True)
    plain = tiny.text_pipeline()
    how = {name: HOW[name] for name in ("prompts", "n", "seed", "steps", "guidance", "batch")}
    times, theirs = sampling.trajectory(plain, **how)
    _, ours = sampling.trajectory(pipe, **how)
    assert found.timesteps == times.tolist()
    for step in range(3):
        error = float((theirs[step] - ours[step]).double().square().sum())
        signal = float(theirs[step].double().square().sum())
        expected = None if error == 0 else pytest.approx(10 * math.log10(signal / error), abs=1e-6)
        assert found.latent_sqnr[step] == expected
    assert found.latent_sqnr[0] is None, "both begin with the same noise"
    calls: list[tuple[Any, Tensor]] = []
    handle = plain.unet.register_forward_hook(
        lambda _m, a, k, out: calls.append(((a, k), out[0])), with_kwargs=True)  # fmt: skip
    sampling.draw(plain, **how)
    handle.remove()
    for step in range(3):
        signal = error = 0.0
        for (args, kwargs), answer in calls[step::3]:  # a call of each batch
            with torch.no_grad():
                other = pipe.unet(*args, **kwargs)[0]
            signal += float(answer.double().square().sum())
            error += float((answer.double() - other.double()).square().sum())
        assert found.noise_sqnr[step] == pytest.approx(10 * math.log10(signal / error), abs=1e-6)


def test_more_bits_have_less_error(found: Inside) -> None:
    pipe, _ = tiny.quantized_pipeline("text", 8, timed=False, dynamic=True)
    better = inside.look(pipe, tiny.text_pipeline(), **HOW, token="apple")
    assert all(b > a + 10 for a, b in zip(found.noise_sqnr, better.noise_sqnr, strict=True))  # type: ignore[operator]
    assert all(b > a for a, b in zip(found.latent_sqnr[1:], better.latent_sqnr[1:], strict=True))  # type: ignore[operator]
    assert found.attention is not None and better.attention is not None
    assert sum(better.attention["layers"].values()) < sum(found.attention["layers"].values())


def test_ranges_are_those_of_the_candidates_inputs(found: Inside) -> None:
    pipe, _ = tiny.quantized_pipeline("text", 3, timed=False, dynamic=True)
    name, seen = "mid_block.attentions.0.transformer_blocks.0.ff.net.2", list[Tensor]()
    assert set(found.activations) == set(wrap.layers(pipe.unet)), "every layer"
    handle = pipe.unet.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.append(a[0].clone()))
    sampling.draw(pipe, **{key: HOW[key] for key in ("prompts", "n", "seed", "steps", "guidance", "batch")})
    handle.remove()
    for step in range(3):
        values = torch.cat([x.flatten() for x in seen[step::3]])
        ours = {key: found.activations[name][key][step] for key in ("low", "high", "p01", "p1", "p99", "p999")}
        shares = torch.quantile(values, torch.tensor([0.001, 0.01, 0.99, 0.999])).tolist()
        assert list(ours.values()) == pytest.approx([values.min().item(), values.max().item(), *shares], rel=1e-5)


def test_percentiles_of_a_sample_are_near_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_ranges, "BYTES", 0)
    layer, g = nn.Identity(), torch.Generator().manual_seed(3)
    ranges = ActivationRanges({"layer": layer}, 1, 4)
    batches = [torch.randn(2, 50_000, generator=g) for _ in range(2)]
    with ranges:
        for batch in batches:
            layer(batch)
    layer(torch.full((1, 5), 100.0))  # the hook is gone
    assert sum(kept.numel() for kept in ranges.kept["layer"][0]) == activation_ranges.FEWEST
    got = {key: value[0] for key, value in ranges.result(2)["layer"].items()}
    values = torch.cat(batches).flatten()
    assert got["low"] == pytest.approx(values.min().item(), rel=1e-5)
    assert got["high"] == pytest.approx(values.max().item(), rel=1e-5)
    assert got["p1"] == pytest.approx(-2.326, abs=0.35) and got["p99"] == pytest.approx(2.326, abs=0.35)
    assert ranges.result(2)["layer"]["low"][1] is None, "not called at the second step"


def test_kurtosis(found: Inside) -> None:
    weight = tiny.text_pipeline().unet.conv_in.weight.detach().double()
    centred = weight - weight.mean()
    expected = (centred**4).mean() / (centred**2).mean() ** 2
    assert found.kurtosis["conv_in"] == pytest.approx(expected.item())
    normal = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    assert inside.kurtosis(normal) == pytest.approx(3, abs=0.1)
    assert inside.kurtosis(torch.ones(5)) == 0


def test_maps_are_what_attention_multiplies_with() -> None:
    pipe = tiny.text_pipeline()
    name, attention = next(iter(attention_maps.cross_attentions(pipe.unet).items()))
    assert name.endswith("attn2")
    kept: dict[str, Tensor] = {}
    for part in ("to_q", "to_k", "to_v"):
        getattr(attention, part).register_forward_hook(lambda _m, _a, out, part=part: kept.update({part: out}))
    attention.to_out[0].register_forward_pre_hook(lambda _m, a: kept.update(out=a[0]))
    tiny.run(pipe.unet)
    weights = attention_weights(attention, kept["to_q"], kept["to_k"])
    values = kept["to_v"].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose((weights @ values).transpose(1, 2).flatten(2), kept["out"], atol=1e-5)


def test_maps_know_of_rounded_operands() -> None:
    pipe, _ = tiny.quantized_pipeline("text", timed=False, attention=True, pack=False)
    attention = next(iter(attention_maps.cross_attentions(pipe.unet).values()))
    q, k = torch.randn(2, 16, attention.to_q.out_features), torch.randn(2, 5, attention.to_q.out_features)
    rounded = attention_weights(attention, q, k)
    with wrap.show(pipe.unet, "float"):
        plain = attention_weights(attention, q, k)
    assert not torch.equal(rounded, plain) and torch.allclose(rounded, plain, atol=0.2)


def test_a_token_by_its_pieces() -> None:
    tokenizer = tiny.tokenizer()
    places = attention_maps.token_places(tokenizer, ["red apple", "a red apple", "sun"], "apple")
    assert places[2] == [] and [p + 1 for p in places[0]] == places[1]
    ids = tokenizer("a red apple").input_ids
    assert [ids[i] for i in places[1]] == tokenizer("apple", add_special_tokens=False).input_ids


def test_a_prompt_without_words_has_no_token() -> None:
    pipe = tiny.text_pipeline()
    seen = inside.look(pipe, pipe, **HOW | {"prompts": ["", " ", "."], "n": 1, "steps": 1})
    assert seen.attention is None and any("no token" in note for note in seen.notes)


def test_only_pictures_with_the_token_count(found: Inside) -> None:
    attention = found.attention
    assert attention is not None and attention["pictures"] == 2 and attention["prompt"] == "red apple"
    assert all(value > 0 for value in attention["layers"].values())
    assert all(0 < attention["layers"][name] < 2 * level for name, level in attention["levels"].items())
    maps = attention["maps"]
    assert len(maps["reference"]) == len(maps["candidate"]) == 8 and maps["reference"] != maps["candidate"]


def test_an_unconditional_pipeline() -> None:
    pipe, _ = tiny.quantized_pipeline("unconditional", timed=False)
    seen = inside.look(pipe, tiny.unconditional_pipeline(), prompts=None, n=2, seed=1, steps=2, guidance=4.0)
    assert seen.attention is None and len(seen.noise_sqnr) == 2 and None not in seen.noise_sqnr
    assert seen.settings["guidance"] is None


def test_json_and_back(found: Inside) -> None:
    assert Inside.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_twice_the_same(found: Inside) -> None:
    pipe, _ = tiny.quantized_pipeline("text", 3, timed=False, dynamic=True)
    assert inside.look(pipe, tiny.text_pipeline(), **HOW, token="apple") == found


def test_progress_counts_every_picture_twice(counter: Any) -> None:
    pipe = tiny.text_pipeline()
    inside.look(pipe, tiny.text_pipeline(), **HOW, progress=counter)
    assert (counter.total, counter.done, counter.depth) == (6, 6, 0)


@pytest.mark.parametrize("which", ["reference", "candidate"])
def test_hooks_are_gone_after_an_error(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = tiny.quantized_pipeline("text", timed=False)
    plain = tiny.text_pipeline()
    before = hooks(pipe), hooks(plain)
    broken = plain if which == "reference" else pipe
    monkeypatch.setattr(broken.scheduler, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inside.look(pipe, plain, **HOW)
    assert (hooks(pipe), hooks(plain)) == before


def test_other_steps_are_refused() -> None:
    pipe = tiny.text_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(InputError, match="same scheduler") as caught:
        inside.look(pipe, tiny.text_pipeline(), **HOW)
    assert small.complete(caught.value) and hooks(pipe) == 0


def test_a_token_that_no_prompt_has_is_refused() -> None:
    with pytest.raises(InputError, match="zebra") as caught:
        inside.look(tiny.text_pipeline(), tiny.text_pipeline(), **HOW, token="zebra")
    assert small.complete(caught.value)
