"""Cost of small pipelines whose bytes, bits and operations are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small
import tiny
from bitbrush import kernels
from bitbrush.errors import InputError
from bitbrush.evaluation import cost, layers, memory
from bitbrush.evaluation.cost import Cost
from bitbrush.network import wrap
from bitbrush.network.survey import survey

INTEGER = ("onednn::qlinear_pointwise", "aten::_int_mm")
ONCE: dict[str, Any] = {"steps": 2, "guidance": 4.0, "batch": 1, "runs": 3}


@pytest.fixture(scope="module")
def packed() -> Cost:
    pipe, _ = tiny.quantized_pipeline("text", timed=False)
    kernels.use(pipe.unet, "cpu-int8")
    return cost.measure(pipe, prompts=["red apple"], **ONCE)


def test_a_packed_pipeline_is_counted_exactly(packed: Cost) -> None:
    pipe, plan = tiny.quantized_pipeline("text", timed=False)
    plain = tiny.text_pipeline().unet
    count = sum(p.numel() for p in plain.parameters())
    stored = sum(t.numel() * t.element_size() for t in pipe.unet.state_dict().values())
    assert packed.weight_bytes == stored
    assert packed.parameters == count
    assert packed.bits_per_weight == pytest.approx(8 * stored / count, abs=1e-4)
    assert packed.quantized_by == "bitbrush"
    macs = {site.name: site.macs for site in survey(plain, tokens=tiny.TOKENS).layers()}
    bits = {name: 8 if name in ("conv_in", "conv_out") else 4 for name in plan.layers}
    assert packed.bit_operations == sum(macs[name] * bits[name] * 8 for name in macs)
    assert packed.float_bit_operations == sum(macs.values()) * 256


def test_the_kernel_of_every_layer_is_named(packed: Cost) -> None:
    by_layer = {row["layer"]: row["kernel"] for row in packed.kernels}
    pipe, plan = tiny.quantized_pipeline("text", timed=False)
    chosen = kernels.use(pipe.unet, "cpu-int8")
    expected = {name: "cpu-int8" if reason == "cpu-int8" else "reference" for name, reason in chosen.items()}
    assert by_layer == expected and set(by_layer) == set(plan.layers)
    assert sum(packed.kernel_counts.values()) == len(plan.layers) and packed.kernel_counts["cpu-int8"] > 40


def test_the_operation_of_every_layer_is_what_ran(packed: Cost) -> None:
    integer = {row["layer"] for row in packed.kernels if row["operation"] in INTEGER}
    assert integer == {row["layer"] for row in packed.kernels if row["kernel"] == "cpu-int8"}
    others = {row["operation"] for row in packed.kernels if row["kernel"] == "reference"}
    assert others and all("conv" in operation for operation in others)
    assert any(note.startswith(f"2 of {len(packed.kernels)} quantized layers decode") for note in packed.notes)


def test_a_profiler_of_somebody_else_goes_on() -> None:
    pipe = tiny.pipeline("unconditional")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs:
        found = cost.measure(pipe, prompts=None, **ONCE)
    assert {row["operation"] for row in found.kernels} == {None}
    assert sum(event.name == "aten::group_norm" for event in theirs.events()) > 20


def test_a_compiled_denoiser_is_looked_at_uncompiled() -> None:
    pipe = tiny.pipeline("unconditional")
    plain = pipe.unet
    compiled = pipe.unet = torch.compile(plain, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long
        found = cost.measure(pipe, prompts=None, **ONCE)
    assert pipe.unet is compiled and found.kernel_counts == {"float (float32)": len(found.kernels)}
    assert any("compiled" in note for note in found.notes) and found.step_seconds.runs == 6


def test_prompts_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    draw = cost.draw
    monkeypatch.setattr(cost, "draw", lambda *a, **k: (asked.append(k["prompts"]), draw(*a, **k))[1])
    cost.measure(tiny.pipeline("text"), prompts=["red apple", "sun"], **ONCE | {"batch": 3, "steps": 1, "runs": 1})
    assert asked == [["red apple", "sun", "red apple"]] * 3


def test_a_kernel_that_leaves_its_input_to_the_reference_is_not_named() -> None:
    pipe, _ = tiny.quantized_pipeline("text", timed=False)
    kernels.use(pipe.unet, "cpu-int8")
    with layers.LayerWatch(pipe.unet) as watch, wrap.float_activations(pipe.unet):
        tiny.run(pipe.unet)
    assert {ran.kernel for ran in watch.ran.values()} == {"reference"}


def test_a_float_pipeline() -> None:
    pipe = tiny.pipeline("unconditional")
    found = cost.measure(pipe, prompts=None, **ONCE)
    assert found.quantized_by == "none" and found.kernel_counts == {"float (float32)": len(found.kernels)}
    assert found.bits_per_weight == 32 and found.bit_operations == found.float_bit_operations
    assert found.weight_bytes == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert found.peak_bytes > found.weight_bytes and "whole process" in found.peak_of
    assert found.step_seconds.runs == 6 and found.picture_seconds.runs == 3
    assert 0 < found.step_seconds.low <= found.step_seconds.median <= found.step_seconds.high
    assert found.picture_seconds.median > found.step_seconds.median


def test_autocast_is_the_type_that_ran() -> None:
    found = cost.measure(tiny.pipeline("unconditional"), prompts=None, autocast=torch.bfloat16, **ONCE)
    assert found.kernel_counts == {"float (bfloat16)": len(found.kernels)}


def test_simulated_layers_are_not_called_packed() -> None:
    pipe, _ = tiny.quantized_pipeline("text", pack=False, timed=False)
    found = cost.measure(pipe, prompts=["red apple"], **ONCE)
    assert set(found.kernel_counts) == {"simulated"} and any("not arithmetic" in note for note in found.notes)
    assert found.bits_per_weight > 32, "codes lie beside the float weights"


def test_json_and_back(packed: Cost) -> None:
    again = Cost.from_json(json.loads(json.dumps(packed.to_json())))
    assert again == packed


def test_a_speedup_needs_one_run_and_one_way() -> None:
    pipe = small.least_pipeline()
    how = ONCE | {"prompts": None, "runs": 2}
    base, same = cost.measure(pipe, **how), cost.measure(pipe, **how)
    found = cost.speedup(same, base)
    assert found["step"] == base.step_seconds.median / same.step_seconds.median
    assert found["step_low"] <= found["step"] <= found["step_high"]
    itself = cost.speedup(base, base)
    assert itself["step"] == itself["picture"] == 1 and itself["step_low"] <= 1 <= itself["step_high"]
    other = cost.measure(pipe, **how, run="another")
    longer = cost.measure(pipe, **how | {"steps": 3})
    for one, why in ((other, "another"), (longer, "steps: 3 and 2")):
        with pytest.raises(InputError, match=why) as caught:
            cost.speedup(one, base)
        assert small.complete(caught.value)


def test_size_on_disk(tmp_path: Path) -> None:
    tiny.text_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / ".run").mkdir()
    (tmp_path / "pipe" / ".run" / "journal.jsonl").write_bytes(b"x" * 1000)
    of_denoiser, whole = cost.disk_bytes(tmp_path / "pipe")
    assert of_denoiser == (tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors").stat().st_size
    files = [p for p in (tmp_path / "pipe").rglob("*") if p.is_file() and ".run" not in p.parts]
    assert whole == sum(p.stat().st_size for p in files)
    assert cost.disk_bytes(tmp_path / "nothing") == (None, None) == cost.disk_bytes(None)
    (tmp_path / "model.gguf").write_bytes(b"12345")
    assert cost.disk_bytes(tmp_path / "model.gguf") == (5, 5)
    assert cost.disk_bytes(tmp_path / "pipe" / "unet")[0] == of_denoiser


def test_hooks_are_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("unconditional")
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cost.measure(pipe, prompts=None, **ONCE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize(("change", "why"), [({"batch": 0}, "batch = 0"), ({"prompts": []}, "draws from text")])
def test_bad_input(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        cost.measure(tiny.pipeline("text"), **{"prompts": ["red apple"]} | ONCE | change)
    assert small.complete(caught.value)


class Packed(Tensor):
    """A weight as torchao and quanto make them: a float tensor from outside, codes and scales inside."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Packed:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        weights = [a.codes.view(torch.int8).float() if isinstance(a, Packed) else a for a in args]
        return func(*weights, **(kwargs or {}))


def test_tensor_subclasses_are_what_they_hold() -> None:
    layer = nn.Linear(64, 32)
    inside = Packed(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32), (32, 64))  # two codes a byte
    layer.weight = nn.Parameter(inside, requires_grad=False)
    assert memory.weight_bytes(layer) == 32 * 32 + 32 * 4 + 32 * 4
    assert memory.parameter_count(layer) == 64 * 32 + 32
    Packed.__module__ = "torchao.made.up"
    try:
        assert layers.library_of(layer) == "torchao" and layers.weight_bits(layer) == 4
        assert layers.kind_of(layer) == "Linear[Packed]"
        assert layers.kernel_of(layer, torch.ones(1, 64)) == "torchao: Linear[Packed]"
    finally:
        Packed.__module__ = __name__


def test_what_lies_beside_a_weight_counts() -> None:
    class State:
        """As bitsandbytes' quantization state, nested."""

        def __init__(self, inner: State | None = None) -> None:
            self.absmax, self.code, self.state2, self.blocksize = torch.ones(8), torch.ones(16), inner, 64

    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = State(State())  # type: ignore[attr-defined]
    assert memory.weight_bytes(layer) == 1024 + 2 * (8 + 16) * 4
    assert memory.parameter_count(layer) == 64 * 32


def test_tied_weights_count_once() -> None:
    both = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    both[1].weight = both[0].weight
    assert memory.weight_bytes(both) == 8 * 8 * 4
