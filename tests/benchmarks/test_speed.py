"""The benchmark of speed: what it counts, what it keeps, and what it says of what it kept. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

Script = Callable[[str], ModuleType]


# ---- what is counted ---------------------------------------------------------------------------------------------
def test_sdxl_is_counted_as_it_is_known(script: Script) -> None:
    shapes, models = script("speed.shapes"), script("speed.models")
    found = shapes.trace(models.find("sdxl"))
    assert found.parameters == 2_567_463_684
    assert found.flops / 2 == pytest.approx(5.98e12, rel=1e-3)  # a sample; the step has two
    assert found.attention / 2 == pytest.approx(0.78e12, rel=1e-2)
    costly = shapes.costliest(found.counts, convolutions=True, most=10)
    spent = [shape.flops * found.counts[shape] for shape in costly]
    assert costly[0].name == "3x3 1280 to 1280, 2 x 32 x 32" and spent == sorted(spent, reverse=True)
    assert [s.name for s in shapes.costliest(found.counts, convolutions=False, most=2, rows=1024)] == [
        "2048 x 1280 x 10240", "2048 x 1280 x 1280",
    ]  # fmt: skip


def test_dit_and_sd15_are_counted_as_they_are_known(script: Script) -> None:
    shapes, models = script("speed.shapes"), script("speed.models")
    dit, sd15 = (shapes.trace(models.find(name)) for name in ("dit", "sd15"))
    assert (dit.flops + dit.attention) / 2 / 2 == pytest.approx(118.6e9, rel=2e-3)  # the paper counts multiply-adds
    assert sd15.parameters == 859_520_964


@pytest.mark.parametrize("name", ["sdxl", "sd15", "dit", "flux", "emoji", "emoji-tiny"])
def test_the_count_is_that_of_torch(script: Script, name: str) -> None:
    shapes, models = script("speed.shapes"), script("speed.models")
    model = models.find(name).shrunk()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.on_meta()(**model.arguments("meta", torch.float32))
    found = shapes.trace(model)
    assert found.flops + found.attention == counter.get_total_flops()


def test_bytes_and_floor_of_a_layer(script: Script) -> None:
    shapes = script("speed.shapes")
    linear, conv = shapes.Shape(10, 64, 32), shapes.Shape(2 * 4 * 4, 9 * 32, 16, 3, 2, 8, 8, 2)
    assert linear.bytes(8, 1) == 10 * 64 + 64 * 32 + 2 * 10 * 32
    assert linear.bytes(4, 2, residual=True) == 2 * 10 * 64 + 64 * 32 / 2 + 4 * 10 * 32
    assert conv.inputs == 2 * 8 * 8 * 32 and conv.outputs == 2 * 4 * 4 * 16 and conv.flops == 2 * 32 * 288 * 16
    found = shapes.Trace({linear: 3}, {}, encoded=640, attention=2000, attention_numbers=10, parameters=1)
    ceilings = {"copy": 1e3, "bf16": 1e3, "int8": 2e3}
    base, packed = (shapes.floor(found, ceilings, bits, packed=p) for bits, p in ((16, False), (8, True)))
    assert base["layers"] == pytest.approx(3 * 2 * 10 * 64 * 32 / 1e3) and base["attention"] == 2.0
    assert packed["layers"] == pytest.approx(base["layers"] / 2)
    assert (base["between"], packed["between"]) == (2.56, 1.92)
    slow = shapes.floor(found, ceilings | {"copy": 1.0}, 8, packed=True)
    assert slow["layers"] == 3 * linear.bytes(8, 1) and slow["all"] > slow["layers"]


def test_segments_are_multiples_of_32(script: Script) -> None:
    spread = script("speed.shapes").spread
    assert spread(320, 8) == (64, 64, 32, 32, 32, 32, 32, 32)
    assert spread(64, 8) == (32, 32) and spread(32, 8) == () and spread(40, 8) == ()


# ---- networks ----------------------------------------------------------------------------------------------------
def test_packed_networks_hold_what_their_form_says(script: Script) -> None:
    networks, models = script("speed.networks"), script("speed.models")
    model = models.find("sdxl").shrunk()
    for form in networks.FORMS.values():
        net = networks.build(model, form, "cpu", torch.float32)
        layers = {name: m for name, m in net.named_modules() if hasattr(m, "declare_packed")}
        assert {m.face for m in layers.values()} == {"packed"} and not any(t.is_meta for t in net.buffers())
        inner, first = layers["down_blocks.1.attentions.0.proj_in"], layers["conv_in"]
        assert (inner.spec.weight.grid.bits, inner.spec.weight.additive) == (
            (8, True) if form.codebooks else (form.weights, False))  # fmt: skip
        assert first.spec.weight.grid.bits == 8 and not first.spec.weight.additive
        assert (inner.input is None) == (form.activations == 16)
        if form.timed:
            assert inner.input.scale.shape == (25, form.groups or 1)
        grouped = [m for m in layers.values() if m.spec.activation is not None and m.spec.activation.groups]
        assert (len(grouped) > len(layers) // 2) == (form.groups > 0)
        assert torch.isfinite(inner.decoded_weight()).all()
        with torch.no_grad():
            out = net(**model.arguments("cpu", torch.float32))[0]
        assert torch.isfinite(out).all() and out.abs().mean() > 1e-3


@pytest.mark.parametrize(("name", "most"), [("w4a8", 0.30), ("w4", 0.30), ("vq3", 0.23)])
def test_weights_of_the_whole_sdxl(script: Script, name: str, most: float) -> None:
    networks, models = script("speed.networks"), script("speed.models")
    from bitbrush.network import wrap

    net = models.find("sdxl").on_meta().to(torch.bfloat16)
    whole = networks.weight_bytes(net)
    wrap.declare(net, networks.plan(networks.FORMS[name], net))
    assert 0.15 < networks.weight_bytes(net) / whole <= most


def test_wide_layers_are_split_in_eight(script: Script) -> None:
    networks, models = script("speed.networks"), script("speed.models")
    plan = networks.plan(networks.FORMS["w8a8-segments8"], models.find("sdxl").on_meta())
    counts = {name: len(spec.segments) for name, spec in plan.layers.items()}
    assert counts["down_blocks.0.resnets.0.conv1"] == 8 and counts["conv_in"] == 0


# ---- kernels: right before fast ----------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("numbers", [(64, 96, 48), (128, 288, 48, 3, 1, 8, 8, 2), (32, 288, 48, 3, 2, 8, 8, 2)])
def test_what_is_timed_is_right(script: Script, numbers: tuple[int, ...], bits: int) -> None:
    ours, shapes = script("speed.ours"), script("speed.shapes")
    x = ours.operands(shapes.Shape(*numbers), bits, "cpu", torch.float32, residual=len(numbers) == 3)
    assert ours.available() is None and ours.error(x, torch.float32) < 1e-6
    x.w_sum.add_(1)  # a wrong correction of the zero-point must be seen
    assert ours.error(x, torch.float32) > 5e-6


@pytest.mark.parametrize("size", [(2, 16, 64), (2, 8, 8, 32)])
def test_both_encodes_are_one(script: Script, size: tuple[int, ...]) -> None:
    ours, kernels = script("speed.ours"), script("speed.kernels")
    where, x = kernels._frame(size), torch.randn(size)
    x = x.permute(0, 3, 1, 2) if where else x
    inverse, zero = torch.full((1, 1), 1 / ours.SCALE), torch.full((1, 1), ours.ZERO, dtype=torch.uint8)
    made = ours.encode(x, inverse, zero, torch.zeros(1, dtype=torch.int64), where)
    assert made.unique().numel() > 50
    assert torch.equal(made, ours.encode_in_graph(x, inverse[0], zero[0].float(), where))


@pytest.mark.parametrize("size", [(2, 16, 64), (2, 8, 8, 64)])
def test_joined_kernels_are_what_is_compiled_beside_them(script: Script, size: tuple[int, ...]) -> None:
    """In float32 on the CPU the op, its definition and what a compiler is given have the same codes."""
    ours, kernels = script("speed.ours"), script("speed.kernels")
    where, x, tables = kernels._frame(size), torch.randn(size), kernels._tables("cpu")
    inverse, zero = tables[0][0], tables[1][0].float()
    x, (w, b) = x.permute(0, 3, 1, 2) if where else x, torch.randn(2, 64)
    normed = F.silu(F.group_norm(x, 32, w, b)) if where else F.layer_norm(x, (64,), w, b)
    want = ours.encode_in_graph(normed, inverse, zero, where)
    assert want.unique().numel() > 50
    for definition in (False, True):
        assert torch.equal(ours.norm_encode(x, w, b, 32, *tables, where, definition=definition), want)
    if not where:
        want = ours.encode_in_graph(x[..., :32] * F.gelu(x[..., 32:]), inverse, zero, [])
        assert torch.equal(ours.geglu_encode(x, *tables), want)


# ---- records -----------------------------------------------------------------------------------------------------
def opened(script: Script, folder: Path, seconds: float = 100.0, **chosen: Any) -> Any:
    record = script("speed.record")
    told = {"run": "r1", "smoke": True, "command": "c"} | chosen
    return record.Record("part", folder, record.Budget(seconds), **told)


def test_items_are_kept_one_by_one_and_not_measured_twice(script: Script, tmp_path: Path) -> None:
    first, calls = opened(script, tmp_path), list[str]()

    def work() -> dict[str, Any]:
        calls.append("now")
        return {"value": 7}

    assert first.measure("a", 1, work)["value"] == 7
    kept = json.loads((tmp_path / "part.json").read_text())
    assert kept["items"]["a"]["run"] == "r1" and not kept["complete"]  # as a killed run leaves it
    second = opened(script, tmp_path, run="r2")
    assert second.measure("a", 1, work)["run"] == "r1" and calls == ["now"]
    assert second.measure("a", 1, work, again=True)["run"] == "r2" and len(calls) == 2
    second.finish()
    assert json.loads((tmp_path / "part.json").read_text())["complete"]
    assert list(tmp_path.iterdir()) == [tmp_path / "part.json"]


def test_what_there_is_no_time_for_is_left_out(script: Script, tmp_path: Path) -> None:
    made = opened(script, tmp_path, seconds=5.0)
    assert made.measure("long", 60, lambda: {"value": 1}) is None
    assert made.measure("short", 1, lambda: {"value": 1}) is not None
    made.finish()
    assert made.left_out == ["long"] and set(made.items) == {"short"}
    assert not json.loads((tmp_path / "part.json").read_text())["complete"]
    again = opened(script, tmp_path)
    assert not again.has("long") and again.has("short")


def test_a_failure_and_a_crash_are_written_down(script: Script, tmp_path: Path) -> None:
    made = opened(script, tmp_path)
    assert made.measure("bad", 1, lambda: {"value": 1 / 0}) is None
    assert made.has("bad") and "ZeroDivisionError" in made.data["errors"]["bad"]
    for _ in range(2):  # the process ends while an item is measured, twice
        crashed = opened(script, tmp_path)
        assert not crashed.has("crash")
        with pytest.raises(KeyboardInterrupt):
            crashed.measure("crash", 1, interrupted)
    assert opened(script, tmp_path).has("crash")


def interrupted() -> dict[str, Any]:
    raise KeyboardInterrupt


def test_files_of_smoke_runs_and_of_other_machines_are_refused(script: Script, tmp_path: Path) -> None:
    opened(script, tmp_path).finish()
    with pytest.raises(script("speed.record").Foreign):
        opened(script, tmp_path, smoke=False)
    file = tmp_path / "part.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"machine": kept["machine"] | {"device": "another"}}))
    with pytest.raises(script("speed.record").Foreign):
        opened(script, tmp_path)
    file.write_text("{")  # half a file is none
    assert opened(script, tmp_path).items == {}


# ---- the program -------------------------------------------------------------------------------------------------
def test_parts_are_chosen_by_name_and_group(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    program = script("speed.program")
    assert program.arguments(["--smoke"]).parts == list(program.PARTS)
    assert program.arguments(["steps", "conv", "steps-sdxl"]).parts == [
        "steps-sdxl", "steps-sd15", "steps-flux", "steps-dit", "steps-emoji", "steps-emoji-tiny", "conv",
    ]  # fmt: skip
    assert program.arguments(["conv"]).out == program.RESULTS
    assert program.arguments(["conv", "--smoke"]).out != program.RESULTS  # no smoke run among the results
    with pytest.raises(SystemExit):
        program.arguments(["convolutions"])
    assert "steps-sdxl" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped_and_ends_in_time(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script("speed.program")
    words = ["gemm", "layers", "--smoke", "--out", str(tmp_path)]
    assert program.run(program.arguments([*words, "--budget", "0"])) == 0
    assert "no time left for gemm, layers" in capsys.readouterr().err and not list(tmp_path.glob("*s.json"))
    assert program.run(program.arguments(words)) == 0
    told = capsys.readouterr()
    assert "gemm: 64 x 64 x 96" in told.err and "no figure means anything" in told.out
    before = (tmp_path / "gemm.json").read_bytes()
    assert program.run(program.arguments(words)) == 0
    assert "gemm: complete" in capsys.readouterr().err and (tmp_path / "gemm.json").read_bytes() == before
    item = json.loads(before)["items"]["64 x 64 x 96"]
    assert set(item["times_us"]) == {"bf16", "bf16, compiled", "int_mm", "ours, w8", "ours, w4"}
    assert all(one["low"] <= one["median"] <= one["high"] for one in item["times_us"].values())


def test_a_process_that_runs_past_its_time_is_stopped_and_forgiven(script: Script, tmp_path: Path) -> None:
    program, record = script("speed.processes"), script("speed.record")
    assert program.watched([sys.executable, "-c", "import time; time.sleep(60)"], 0.2, {}) is None
    assert program.watched([sys.executable, "-c", "raise SystemExit(3)"], 20, {}) == 3
    made = opened(script, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.measure("slow", 1, interrupted)
    program.forget(tmp_path / "part.json")
    assert record.load(tmp_path / "part.json")["doing"] == {"slow": 0}


def test_calls_on_one_card_within_hours_are_one_run(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script("speed.program")
    monkeypatch.setattr(program, "card_name", lambda: "card")
    first = program.run_name(tmp_path)
    assert program.run_name(tmp_path) == first
    monkeypatch.setattr(program, "card_name", lambda: "another")
    assert json.loads((tmp_path / "run.json").read_text())["card"] == "card"
    program.run_name(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["card"] == "another"
    old = {"run": "2020-01-01T00:00:00+00:00", "card": "another"}
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert program.run_name(tmp_path) > "2021"


def test_a_peer_that_is_missing_is_left_out_by_name(script: Script, tmp_path: Path) -> None:
    peers, models = script("speed.peers"), script("speed.models")
    peer = peers.Peer("nobody", "no_such_library", "no-such-library", "call", lambda net: None)
    made = opened(script, tmp_path)
    peers.run(made, peer, models.find("sdxl").shrunk(), "cpu", smoke=True, way_s=60.0)
    assert made.data["errors"] == {"sdxl": "left out: no-such-library is not installed here"}
    assert len(peers.PEERS) == 6


@pytest.mark.parametrize(("codes", "calls"), [((0,), 1), ((-11, 0), 2), ((1, 1, 1), 3), ((4,), 1), ((None,), 1)])
def test_a_part_whose_process_ends_early_is_called_again(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int | None, ...], calls: int
) -> None:
    """A crash is tried again, three times at most; a file of another machine and the end of the time are not."""
    program, record, seen = script("speed.program"), script("speed.record"), list[list[str]]()
    processes, answers = script("speed.processes"), iter(codes)

    def watched(words: list[str], *others: Any) -> int | None:
        seen.append(words)
        return next(answers)

    monkeypatch.setattr(processes, "watched", watched)
    args = program.arguments(["steps-sdxl", "--out", str(tmp_path), "--forms", "w8a8", "w4a8", "--compile", "none"])
    args.run = "r"
    processes.in_process("steps-sdxl", args, record.Budget(100), args.forms)
    assert len(seen) == calls
    child = program.arguments(seen[0][2:])
    assert child.child and child.run == "r" and child.parts == ["steps-sdxl"] and child.out == tmp_path
    assert child.forms == ["w8a8", "w4a8"] and child.compile == "none" and 80 <= child.budget < 100
    processes.in_process("conv", args, record.Budget(5), None)  # no time to begin
    assert len(seen) == calls


def test_a_peer_finds_its_library_below_the_site(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, environment = script("speed.program"), script("speed.processes").environment
    monkeypatch.setenv("PYTHONPATH", "before")
    args = program.arguments(["peers", "--site", str(tmp_path)])
    assert environment("peer-torchao-int8", args)["PYTHONPATH"].split(":") == [
        str(tmp_path / "torchao"), "before"]  # fmt: skip
    assert environment("conv", args)["PYTHONPATH"] == "before"
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in environment("peer-sdnq-int8", args)
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    args.together = 6
    assert environment("peer-sdnq-int8", args)["TORCHINDUCTOR_COMPILE_THREADS"] == "5"


def test_memory_is_complete_with_all_of_its_forms(script: Script, tmp_path: Path) -> None:
    program, record = script("speed.program"), script("speed.record")
    args = program.arguments(["memory", "--smoke", "--out", str(tmp_path), "--forms", "bf16", "w4"])
    made = record.Record("memory", tmp_path, record.Budget(9), run="r", smoke=True, command="c")
    made.measure("bf16", 0, dict)
    made.finish()  # by the process of bf16 alone
    assert not program.is_complete("memory", args)
    made.measure("w4", 0, dict)
    made.finish()
    assert program.is_complete("memory", args)
    assert not program.is_complete("memory", program.arguments(["memory", "--smoke", "--out", str(tmp_path)]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_there_are_no_results(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = script("speed.program")
    assert program.run(program.arguments(["conv", "--out", str(tmp_path)])) == 2
    assert "--smoke" in capsys.readouterr().err and not list(tmp_path.iterdir())
