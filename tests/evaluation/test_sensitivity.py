"""Sensitivity of the smallest networks: a planted layer is found, numbers agree with direct ones, runs go on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbrush
import small
import tiny
from bitbrush.engine.progress import Silent
from bitbrush.errors import ArtifactError, InputError, InterruptedRun
from bitbrush.evaluation import psnr, sensitivity
from bitbrush.evaluation.rows import RowLog
from bitbrush.evaluation.sampling import draw
from bitbrush.evaluation.sensitivity import Measure, Sensitivity
from bitbrush.network import wrap
from bitbrush.report import heat

HOW: dict[str, Any] = {"n": 2, "steps": 2, "batch": 2, "progress": Silent()}
PLANTED = "up_blocks.0.resnets.0.conv1"


def planted() -> Any:
    """A pipeline with a layer that rounding alone wrecks: every row has a huge weight, on an input that is always 0.

    The float network does not see that weight; the grid of the row does. What comes after the layer listens to it more
    than to the rest.
    """
    pipe = small.least_pipeline(channels=8)
    block = pipe.unet.get_submodule(PLANTED.rpartition(".")[0])
    with torch.no_grad():
        block.norm1.weight[0] = block.norm1.bias[0] = 0
        block.conv1.weight[:, 0] = 60 * block.conv1.weight.abs().amax()
        block.conv2.weight.mul_(6)
    return pipe


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return bitbrush.sensitivity(planted(), [8, 4, 2], 16, **HOW)


def test_a_planted_layer_ranks_first(found: Sensitivity) -> None:
    for bits in (4, 2):
        worst = found.worst(3, bits)
        assert worst[0]["layer"] == PLANTED, [row["layer"] for row in worst]
        assert worst[0]["psnr"]["value"] < worst[1]["psnr"]["value"] - 3


def test_every_layer_and_width_has_a_row(found: Sensitivity) -> None:
    names = [row["layer"] for row in found.rows if row["weight_bits"] == 8]
    inspected = [row["name"] for row in bitbrush.inspect(planted(), recipe="rtn").rows]
    assert names == inspected and "conv_in" in names, "in the order they run, the ends too"
    assert [row["weight_bits"] for row in found.rows] == [8] * len(names) + [4] * len(names) + [2] * len(names)
    by_width = {bits: {r["layer"]: r for r in found.rows if r["weight_bits"] == bits} for bits in (8, 4, 2)}
    for name in names:
        errors = [by_width[bits][name]["output_error"] for bits in (8, 4, 2)]
        assert errors == sorted(errors) and errors[0] > 0
    means = [sum(r["psnr"]["value"] for r in by_width[bits].values()) / len(names) for bits in (8, 4, 2)]
    assert means == sorted(means, reverse=True)


def test_a_row_is_what_a_direct_computation_gives(found: Sensitivity) -> None:
    """The layer's weight replaced by hand with what the recipe ``rtn`` decodes to."""
    row = next(r for r in found.rows if r["layer"] == PLANTED and r["weight_bits"] == 4)
    result = bitbrush.quantize(planted(), "rtn", 4, 8, settings=small_calibration(), progress=Silent())
    layer = result.pipeline.unet.get_submodule(PLANTED)
    pipe = planted()
    reference = draw(pipe, prompts=None, n=2, steps=2, batch=2)
    with torch.no_grad():
        pipe.unet.get_submodule(PLANTED).weight.copy_(layer.decoded_weight())
    assert row["psnr"]["value"] == pytest.approx(
        psnr(draw(pipe, prompts=None, n=2, steps=2, batch=2), reference).mean().item(), abs=1e-3
    )


def small_calibration() -> dict[str, Any]:
    return {"calibrate.trajectories": 2, "calibrate.samples": 4, "calibrate.steps": 2}


def test_the_proxies_are_relative_errors(found: Sensitivity) -> None:
    row = next(r for r in found.rows if r["layer"] == "conv_in" and r["weight_bits"] == 2)
    pipe, seen = planted(), list[tuple[Tensor, Any, Tensor]]()
    handle = pipe.unet.register_forward_hook(lambda _m, a, out: seen.append((a[0], a[1], out[0])))
    draw(pipe, prompts=None, n=2, steps=2, batch=2)
    handle.remove()
    plain = copy.deepcopy(pipe.unet.conv_in)
    whole = own = whole_signal = own_signal = 0.0
    rounded = rounded_like(plain.weight.detach())
    with torch.no_grad():
        for sample, time, answer in seen:
            expected = plain(sample)
            pipe.unet.conv_in.weight.copy_(rounded)
            own += float((pipe.unet.conv_in(sample) - expected).double().square().sum())
            whole += float((pipe.unet(sample, time).sample - answer).double().square().sum())
            own_signal += float(expected.double().square().sum())
            whole_signal += float(answer.double().square().sum())
            pipe.unet.conv_in.weight.copy_(plain.weight)
    assert row["output_error"] == pytest.approx((own / own_signal) ** 0.5, rel=1e-4)
    assert row["noise_error"] == pytest.approx((whole / whole_signal) ** 0.5, rel=1e-4)


def rounded_like(weight: Tensor) -> Tensor:
    """What ``rtn`` makes of a weight in 2 bits."""
    from bitbrush.numbers import ranges
    from bitbrush.numbers.codec import decode, encode, reciprocal
    from bitbrush.numbers.grid import Grid

    grid = Grid(bits=2, signed=True)
    scale, zero = ranges.search(weight.flatten(1), grid, points=25, step=0.03, power=2.0)
    s, z = scale.reshape(-1, 1, 1, 1), zero.reshape(-1, 1, 1, 1)
    return decode(encode(weight, reciprocal(s), z, 3), s, z)


def test_the_pipeline_is_unchanged() -> None:
    pipe = tiny.text_pipeline()
    before, processors = dict(pipe.unet.named_modules()), dict(pipe.unet.attn_processors)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    bitbrush.sensitivity(pipe, 4, 8, by="block", layers="mid_block.*", prompts=small.PROMPTS, **HOW)
    assert dict(pipe.unet.named_modules()) == before and pipe.unet.attn_processors == processors
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())
    assert not wrap.layers(pipe.unet) and not hasattr(pipe.unet, "bitbrush_clock")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_blocks_are_rounded_whole() -> None:
    seen = bitbrush.sensitivity(tiny.text_pipeline(), 3, 8, by="block", layers="mid_block.*", prompts=small.PROMPTS,
                                **HOW)  # fmt: skip
    kinds = {row["layer"]: row["kind"] for row in seen.rows}
    assert kinds["mid_block.resnets.0"] == "block" and kinds["mid_block.attentions.0.proj_in"] in ("linear", "conv")
    assert "mid_block.attentions.0.transformer_blocks.0" in kinds and "conv_in" not in kinds
    together = seen.baseline["all"][0]
    assert together["psnr"]["value"] < min(row["psnr"]["value"] for row in seen.rows)
    assert together["parameters"] == sum(row["parameters"] for row in seen.rows) and together["output_error"] is None
    assert set(seen.rank_correlation["3"]) == {"output_error~psnr", "noise_error~psnr", "n"}


def test_weights_may_stay_float() -> None:
    seen = bitbrush.sensitivity(tiny.text_pipeline(), [16, 8], 4, layers="conv_*", prompts=small.PROMPTS, **HOW)
    rows = {(row["layer"], row["weight_bits"]): row["output_error"] for row in seen.rows}
    assert set(rows) == {(name, bits) for name in ("conv_in", "conv_out") for bits in (16, 8)}
    assert all(0 < rows[name, 16] == pytest.approx(rows[name, 8], rel=0.1) for name in ("conv_in", "conv_out"))


def test_clip_and_another_distance() -> None:
    class Bright:
        """Scores a picture by its brightness."""

        def score(self, pictures: Tensor, prompts: Any) -> Tensor:
            assert len(pictures) == len(prompts)
            return pictures.flatten(1).mean(1)

    seen = bitbrush.sensitivity(tiny.text_pipeline(), 2, 8, layers="conv_*", prompts=small.PROMPTS, metric="clip",
                                evaluator=Bright(), **HOW)  # fmt: skip
    assert all({"psnr", "clip"} <= set(row) for row in seen.rows)
    assert seen.settings["compared_by"] == {"clip": "Bright, change of the score"}
    assert seen.worst(1)[0]["clip"]["value"] == min(row["clip"]["value"] for row in seen.rows)


# ---- going on --------------------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, widths: Any = (4, 2)) -> Any:
        places = {"folder": tmp_path / name, "output": tmp_path / f"{name}.json"}
        return bitbrush.sensitivity(planted(), widths, 8, **places, **HOW)

    run("whole")
    measured, row = list[str](), Measure.row

    def dying(self: Measure, unit: Any, bits: int) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(unit.name)
        return row(self, unit, bits)

    monkeypatch.setattr(Measure, "row", dying)
    with pytest.raises(InterruptedRun, match="finished rows are kept") as caught:
        run("killed")
    assert small.complete(caught.value) and not (tmp_path / "killed.json").exists()
    log = next((tmp_path / "killed" / "rows").rglob("rows.jsonl"))
    log.write_bytes(log.read_bytes() + b'{"torn')
    again = list[str]()
    monkeypatch.setattr(Measure, "row", lambda self, unit, bits: (again.append(unit.name), row(self, unit, bits))[1])
    result = run("killed")
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert len(again) == len(result.rows) + 2 - 5, "nothing is measured twice"
    again.clear()
    assert len(run("killed", (4, 3)).rows) == len(result.rows) and len(again) == len(result.rows) // 2 + 1
    assert Sensitivity.from_json(json.loads((tmp_path / "whole.json").read_text())) == result


def test_hooks_and_layers_are_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = planted()
    before = dict(pipe.unet.named_modules())
    monkeypatch.setattr(Measure, "_pictures", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bitbrush.sensitivity(pipe, 4, 16, **HOW)
    assert dict(pipe.unet.named_modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_pictures_that_are_not_finite_rank_first() -> None:
    rows = [{"psnr": {"value": 3.0}}, {"psnr": None}, {"psnr": {"value": 50.0}}]
    assert sorted(range(3), key=lambda i: -sensitivity.damage(rows[i], "psnr")) == [1, 0, 2]
    assert sensitivity.damage({"lpips": {"value": 0.4}}, "lpips") == 0.4


def test_rank_correlations() -> None:
    rows = [{"output_error": e, "noise_error": 1.0, "psnr": {"value": p}}
            for e, p in ((0.1, 40.0), (0.2, 30.0), (0.3, 35.0), (0.4, 20.0))]  # fmt: skip
    found = sensitivity.correlations(rows, ("psnr",))
    assert found == {"output_error~psnr": -0.8, "noise_error~psnr": None, "n": 4}
    assert sensitivity.correlations(rows[:2], ("psnr",))["output_error~psnr"] is None


def test_rows_of_a_damaged_log_are_forgotten(tmp_path: Path) -> None:
    log = RowLog(tmp_path, {"a": 1})
    for name in ("first", "second", "third"):
        log.add(name, {"value": 0.1, "of": name})
    lines = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"0.1", b"0.2"), *lines[2:]]))
    again = RowLog(tmp_path, {"a": 1})
    assert again.rows == {"first": {"value": 0.1, "of": "first"}} and again.path.read_bytes() == lines[0] + b"\n"
    assert RowLog(tmp_path, {"a": 2}).rows == {}


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weights": 9}, "1 to 8"), ({"weights": []}, "none given"), ({"weights": 16, "activations": 16}, "both 16"),
        ({"by": "channel"}, "layer, block"), ({"metric": "fid"}, "psnr, lpips, clip"),
        ({"metric": "clip"}, "evaluator"), ({"layers": "nothing.*"}, "nothing"), ({"n": 0}, "n = 0"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        bitbrush.sensitivity(planted(), **{"weights": 4, "activations": 16} | HOW | change)
    assert small.complete(caught.value)


def test_a_bare_model_and_a_quantized_one_are_refused() -> None:
    quantized, _ = tiny.quantized_pipeline("text", timed=False)
    for target, why in ((small.least_unet(), "pipeline"), (quantized, "already quantized")):
        with pytest.raises(InputError, match=why):
            bitbrush.sensitivity(target, 4, 16, **HOW)
    with pytest.raises(InputError, match="prompts are needed"):
        bitbrush.sensitivity(tiny.text_pipeline(), prompts=["one"], **HOW)
    with pytest.raises(ArtifactError, match="format"):
        Sensitivity.from_json({"format": 99})


# ---- heat map --------------------------------------------------------------------------------------------------------
def test_a_heat_map(found: Sensitivity, tmp_path: Path) -> None:
    data = found.to_json()
    data["rows"][3]["psnr"] = None
    names, values = heat.table(data, "psnr")
    assert values.shape == (3, len(names)) and int(torch.tensor(values).isnan().sum()) == 1
    heat.save(tmp_path / "map.svg", data)
    heat.save(tmp_path / "again.svg", data)
    svg = (tmp_path / "map.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and PLANTED in svg and "W2A16" in svg and "<script" not in svg
    assert svg == (tmp_path / "again.svg").read_text()
    heat.save(tmp_path / "map.png", data)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"svg or \.png") as caught:
        heat.save(tmp_path / "map.gif", data)
    assert small.complete(caught.value)
