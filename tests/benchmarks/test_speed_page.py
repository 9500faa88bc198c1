"""What the page and the summary say of files that are made up here: figures, their baselines, what is missing."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
KEYS = [
    "sdxl_w8a8_speedup", "sdxl_w4a8_over_w8a8_time", "sdxl_w4_weight_ratio", "sd15_w8a8_speedup",
    "conv_geomean_speedup", "gemm_geomean_speedup", "encode_bandwidth_share", "time_table_overhead",
    "segments8_overhead", "vq3_step_ratio", "vq3_weight_ratio", "w4_peak_memory_ratio", "cpu_w8a8_time_ratio",
    "cpu_w4a8_time_ratio",
]  # fmt: skip
GRAPH = "compiled, graph"


def part(name: str, items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    machine = {"device": "H100", "torch": "2.11", "cuda": "13.0", "cudnn": 1, "triton": "3.6", "diffusers": "0.42"}
    kept = {key: {"run": "first"} | item for key, item in items.items()}
    return {"part": name, "command": "c", "machine": machine, "smoke": False, "items": kept, "errors": {},
            "doing": {}, "complete": True} | changes  # fmt: skip


def times(**medians: float) -> dict[str, Any]:
    return {name.replace("__", ", "): {"median": t, "low": t - 1, "high": t + 1, "rounds": 9}
            for name, t in medians.items()}  # fmt: skip


def kernel(**medians: float) -> dict[str, Any]:
    return {"flops": 10**11, "bytes": {"bf16": 2e8, "ours, w8": 1e8, "ours, w4": 9e7}, "sets": 1,
            "errors": {"ours, w8": 3e-3, "ours, w4": 3e-3}, "times_us": times(**medians)}  # fmt: skip


def step(form: str, ms: float, weights: float, beside: dict[str, float] | None = None) -> dict[str, Any]:
    turns = {name: {"way": GRAPH, "gpu_ms": t, "gpu_low": t, "gpu_high": t, "wall_ms": t + 1}
             for name, t in ({form: ms} | (beside or {})).items()}  # fmt: skip
    ways = {"eager": {"wall_ms": 4 * ms, "gpu_ms": 1.2 * ms}, GRAPH: {"wall_ms": ms + 1, "gpu_ms": ms}}
    return {"weight_bytes": weights, "batch": 2, "ways": ways, "strongest": GRAPH, "turns": turns,
            "output": {"finite": True, "size": 1.0}}  # fmt: skip


def parts() -> dict[str, Any]:
    """Everything measured in one run, round numbers."""
    sdxl = {
        "bf16": step("bf16", 39.0, 5e9), "w8a8": step("w8a8", 26.0, 2.5e9, {"bf16": 39.5}),
        "w4a8": step("w4a8", 27.0, 1.26e9, {"bf16": 39.0, "w8a8": 26.0}),
        "vq3": step("vq3", 42.0, 0.95e9, {"bf16": 39.0}),
        "w8a8-times": step("w8a8-times", 26.27, 2.5e9, {"bf16": 39.0, "w8a8": 26.0}),
        "w8a8-segments8": step("w8a8-segments8", 28.7, 2.5e9, {"bf16": 39.0, "w8a8": 26.0}),
    }  # fmt: skip
    peer = step("torchao-int8", 35.0, 2.6e9, {"bf16": 44.0}) | {
        "version": "0.18", "call": "quantize_(..)", "layers": {}, "bf16_weight_bytes": 5e9, "bf16_ways": {},
    }  # fmt: skip
    encode = {"bytes": 3e7, "errors": {}, "times_us": times(compiled=12.0, copy=11.0),
              "rates": {"compiled": 2.5e12, "copy": 2.7e12}}  # fmt: skip
    return {
        "ceilings": part("ceilings", {
            "copy": {"rate": 3e12, "bytes": 4, "time_us": times(a=1)["a"]},
            "bf16": {"rate": 7.7e14, "side": 8192}, "int8": {"rate": 9.1e14, "side": 8192},
        }),
        "steps-sdxl": part("steps-sdxl", sdxl),
        "steps-sd15": part("steps-sd15", {"bf16": step("bf16", 6.0, 1.7e9),
                                          "w8a8": step("w8a8", 4.0, 0.9e9, {"bf16": 6.0})}),
        "conv": part("conv", {"3x3 a": kernel(bf16=200.0, ours__w8=100.0, ours__w4=110.0),
                              "3x3 b": kernel(bf16=128.0, ours__w8=100.0, ours__w4=110.0)}),
        "gemm": part("gemm", {"m": kernel(bf16=170.0, bf16__compiled=160.0, int_mm=120.0, ours__w8=100.0)}),
        "encode": part("encode", {"LayerNorm + encode 2 x 16": encode, "encode 2 x 16": encode}),
        "memory": part("memory", {"bf16": {"weight_bytes": 5e9, "peak_bytes": 6e9, "loaded_bytes": 5e9},
                                  "w4": {"weight_bytes": 1.3e9, "peak_bytes": 2.1e9, "loaded_bytes": 1.3e9}}),
        "peer-torchao-int8": part("peer-torchao-int8", {"sdxl": peer}),
        "peer-sdnq-int8": part("peer-sdnq-int8", {}, errors={"sdxl": "left out: sdnq is not installed here"}),
        "cpu": {"cpu_w8a8_time_ratio": 1.2, "cpu_w4a8_time_ratio": 0.9, "settings": {"native": {
            "machine": {"vnni": False, "processor": "P", "capability": "AVX2", "threads": 2},
            "ms": {"float32": {"median": 60.0, "fastest": 59.0}, "w8a8": {"median": 72.0, "fastest": 70.0}},
            "ratios": {"w8a8": {"median": 1.2, "q1": 1.19, "q3": 1.21, "fastest": 1.186}}, "weights": {"w8a8": 0.53},
            "kinds": {"linear": {"layers": 80.0, "float32": 20.0, "w8a8": 22.0}}}}},
    }  # fmt: skip


def test_every_figure_of_a_whole_run(script: Script) -> None:
    found = script("speed.summary").figures(parts())
    assert list(found) == KEYS
    assert all(set(figure) == {"value", "bar", "met", "command"} for figure in found.values())
    values = {key: round(figure["value"], 4) for key, figure in found.items()}
    assert values == {
        "sdxl_w8a8_speedup": 1.5, "sdxl_w4a8_over_w8a8_time": round(28 / 27, 4), "sdxl_w4_weight_ratio": 0.252,
        "sd15_w8a8_speedup": 1.4, "conv_geomean_speedup": 1.6, "gemm_geomean_speedup": 1.6,
        "encode_bandwidth_share": 0.8333, "time_table_overhead": 0.01, "segments8_overhead": 0.1,
        "vq3_step_ratio": 1.075, "vq3_weight_ratio": 0.19, "w4_peak_memory_ratio": 0.35, "cpu_w8a8_time_ratio": 1.2,
        "cpu_w4a8_time_ratio": 0.9,
    }  # fmt: skip
    assert all(figure["met"] for figure in found.values())
    assert found["conv_geomean_speedup"]["command"] == "python benchmarks/speed.py conv"


def test_nothing_measured_is_null_and_not_met(script: Script) -> None:
    found = script("speed.summary").figures({})
    assert list(found) == KEYS
    assert all(figure["value"] is None and figure["met"] is False for figure in found.values())
    json.dumps(found)


def test_smoke_runs_are_no_results(script: Script) -> None:
    made = {name: data | {"smoke": True} for name, data in parts().items() if name != "cpu"}  # which writes none
    assert all(figure["value"] is None for figure in script("speed.summary").figures(made).values())


@pytest.mark.parametrize(("change", "key", "value"), [
    (lambda p: p["gemm"]["items"]["m"]["times_us"]["int_mm"].update(median=99.0), "gemm_geomean_speedup", 1.6),
    (lambda p: p["peer-torchao-int8"]["items"]["sdxl"]["turns"]["torchao-int8"].update(wall_ms=20.0),
     "sdxl_w8a8_speedup", 1.5),
    (lambda p: p["conv"]["items"]["3x3 a"]["errors"].update({"ours, w8": 0.5}), "conv_geomean_speedup", None),
    (lambda p: p["conv"]["items"]["3x3 a"]["times_us"].pop("ours, w8"), "conv_geomean_speedup", None),
    (lambda p: p["steps-sdxl"]["items"]["w8a8"]["output"].update(finite=False), "sdxl_w8a8_speedup", None),
    (lambda p: p["steps-sdxl"]["items"]["w8a8"]["turns"].pop("bf16"), "sdxl_w8a8_speedup", None),
    (lambda p: p["cpu"]["settings"]["native"]["machine"].update(vnni=True), "cpu_w8a8_time_ratio", 1.2),
    (lambda p: p.pop("ceilings"), "encode_bandwidth_share", None),
])  # fmt: skip
def test_a_bar_is_not_met_when(
    script: Script, change: Callable[[dict[str, Any]], Any], key: str, value: float | None
) -> None:
    """A product slower than torch._int_mm, a faster peer, a wrong kernel, a missing one, a step of NaN, no baseline of
    the same turns, a CPU with VNNI that is slower than float32, no ceiling."""
    made = copy.deepcopy(parts())
    change(made)
    figure = script("speed.summary").figures(made)[key]
    assert figure["met"] is False
    assert figure["value"] is None if value is None else figure["value"] == pytest.approx(value)


def test_a_peer_of_another_run_is_compared_to_nothing_but_its_own_turns(script: Script) -> None:
    page, tables, made = script("speed_page"), script("speed.tables"), parts()
    row = next(line for line in tables.peers(made) if line.startswith("| torchao-int8"))
    assert row.split(" | ")[-2:] == ["1.11", "0.520 |"] and page.peer_speedup(made, "torchao-int8") is not None
    made["peer-torchao-int8"]["items"]["sdxl"]["run"] = "second"
    row = next(line for line in tables.peers(made) if line.startswith("| torchao-int8"))
    assert row.split(" | ")[-3:] == ["1.26", "", "0.520 |"] and page.peer_speedup(made, "torchao-int8") is None


def test_a_peer_whose_compiled_way_did_not_end_counts_by_those_that_did(script: Script) -> None:
    """As the parent leaves an item; the page says which ways the comparison is with."""
    page, summary, made = script("speed_page"), script("speed.summary"), parts()
    peer, why = made["peer-torchao-int8"]["items"]["sdxl"], "did not end within 150 s"
    peer["ways"]["compiled by blocks"] = {"error": why}
    peer["ways"]["eager, graph"] = {"error": "capture"}  # was timed, if not in a graph
    text = page.page(made, summary.figures(made), set())
    assert f"- torchao-int8, compiled by blocks: {why}" in text and "- torchao-int8, eager, graph: capture" not in text
    assert "torchao-int8 (compiled, graph, 36.00 ms on the wall; not timed: compiled by blocks)" in text
    assert summary.figures(made)["sdxl_w8a8_speedup"]["met"]
    assert any(f"compiled by blocks: {why}" in line for line in summary.table(made))
    del made["peer-torchao-int8"]
    assert "No peer was measured in the run" in page.page(made, summary.figures(made), set())
    assert not any("(compiled, graph, 36" in line for line in script("speed.tables").contest(made))


def test_overheads_of_layers_stand_in_for_those_of_a_step(script: Script) -> None:
    made = parts()
    del made["steps-sdxl"]["items"]["w8a8-times"]
    made["layers"] = part("layers", {"a": {"flops": 1, "errors": {}, "times_us": {
        "w8a8": {"median": 100.0}, "w8a8-times": {"median": 102.0}}}})  # fmt: skip
    assert script("speed.summary").figures(made)["time_table_overhead"]["value"] == pytest.approx(0.02)


def test_the_page_of_a_whole_run(script: Script, tmp_path: Path) -> None:
    module, made = script("speed_page"), parts()
    figures = script("speed.summary").figures(made)
    plotted = module.plot(made, tmp_path)
    assert plotted == {"performance-steps.svg", "performance-kernels.svg"}
    before = {name: (tmp_path / name).read_bytes() for name in plotted}
    assert module.plot(made, tmp_path) == plotted
    assert before == {name: (tmp_path / name).read_bytes() for name in plotted}
    text = module.page(made, figures, plotted)
    assert "| 1.500 | at least 1.35 | yes |" in text and "![speed-ups of steps](performance-steps.svg)" in text
    assert "bf16, compiled, graph (the baseline) | 39.00 | 40.00 |" in text
    assert "| W8A8, static, compiled, graph | 26.00 | 27.00 | 39.50, 40.50 | 1.50 | 0.500 |" in text
    assert "- sdnq-int8, left out: sdnq is not installed here" in text
    assert "11.955" in text  # TFLOP of SDXL's two samples
    assert "Not measured: Layers." in text
    assert "| w8a8 | 72.0 | 70.0 | 1.200 (1.190 to 1.210) | 1.186 | 0.530 |" in text
    lines = text.splitlines()
    for first, second in itertools.pairwise(lines):
        assert not (first.startswith("|") and second.startswith("|")) or first.count("|") == second.count("|")


def test_floors_of_the_page(script: Script) -> None:
    tables = script("speed.tables")
    rates = tables.rates(parts())
    assert rates == {"copy": 3e12, "bf16": 7.7e14, "int8": 1.54e15}
    known = tables.floors("sdxl", rates)[1]
    assert known["bf16"]["all"] / known["w8a8"]["all"] == pytest.approx(1.7, abs=0.05)
    assert known["w4a8"]["all"] < known["w8a8"]["all"] and known["vq3"]["all"] <= known["bf16"]["all"]


def test_the_page_of_nothing_says_so(script: Script, tmp_path: Path) -> None:
    module = script("speed_page")
    (tmp_path / "performance-steps.svg").write_text("old")
    assert module.plot({}, tmp_path) == set() and not list(tmp_path.iterdir())
    text = module.page({}, script("speed.summary").figures({}), set())
    assert text.count("not measured") == len(KEYS) and "Not measured: Steps, Peers, Roofline" in text


def test_files_are_read_by_part(script: Script, tmp_path: Path) -> None:
    summary = script("speed.summary")
    for name, data in parts().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    (tmp_path / "summary.json").write_text(json.dumps(summary.figures({})))
    (tmp_path / "run.json").write_text(json.dumps({"run": "first", "card": "c"}))
    found = summary.load(tmp_path)
    assert found == parts()
    assert any("w8a8 26.00 ms GPU" in line for line in summary.table(found))


def test_the_committed_page_is_what_the_files_say(script: Script) -> None:
    module = script("speed_page")
    kept = script("speed.summary").load(module.FOLDER)
    if not module.PAGE.exists():
        assert not any(name != "cpu" for name in kept), "there are results and no page"
        pytest.skip("no run on a GPU has been committed")
    figures = script("speed.summary").figures(kept)
    there = {name for name in (module.STEPS_PLOT, module.KERNELS_PLOT) if (module.PAGE.parent / name).exists()}
    assert module.page(kept, figures, there) == module.PAGE.read_text(encoding="utf-8")
    assert module.text_of(figures) == (module.FOLDER / "summary.json").read_text(encoding="utf-8")
    assert not any(data.get("smoke") for data in kept.values())
