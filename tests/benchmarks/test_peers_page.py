"""The page of peers follows from the files, and is the one that is committed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

Script = Callable[[str], ModuleType]


def layers(linear: int, conv: int) -> dict[str, Any]:
    return {
        "kinds": {
            "Linear": {"layers": linear, "of": 83, "weights": 100, "of_weights": 100},
            "Conv2d": {"layers": conv, "of": 50, "weights": 0, "of_weights": 300},
        },
        "weights": 100, "of_weights": 400, "bits_floats_at_16": 13.5678, "weight_bytes": 14_682_448,
    }  # fmt: skip


def value(key: str, number: float, digits: int) -> dict[str, Any]:
    return {"key": key, "value": number, "digits": digits}


def result(peer: str = "torchao", **changes: Any) -> dict[str, Any]:
    """A file with one arm that was measured and one that was refused."""
    found = {
        "peer": peer, "model": "emoji-sd-tiny", "command": f"python benchmarks/peers.py {peer}",
        "versions": {peer: "0.1.2"},
        "protocol": {"prompts": "64 prompts", "seed": 0, "steps": 25, "guidance": 4.0, "device": "cpu"},
        "arms": {
            "int8": {"works": True, "call": "Config(int8)", "layers": layers(83, 0)},
            "int4": {"works": False, "call": "Config(int4)", "while": "opening it", "error": "ImportError: needs\n`x`"},
        },
        "evaluation": {
            "reference": "FP", "candidates": ["int8"],
            "values": {"FP": [value("clip", 0.82, 3)], "int8": [value("psnr", 37.123, 2), value("clip", 0.8123, 3)]},
            "missing": [],
            "cost": {"FP": {"step_seconds": {"median": 0.4}}, "int8": {"step_seconds": {"median": 0.5}}},
        },
    }  # fmt: skip
    return found | changes


def test_rows(script: Script) -> None:
    lines = script("peers_page").table([result()])
    assert lines[0] == "| arm | layers: linear, conv | weights | bits | MB held | PSNR, dB | CLIP | step, s |"
    assert lines[2] == "| full precision |  |  |  |  |  | 0.820 | 0.400 |"
    assert lines[3] == "| torchao int8 | 83 of 83, 0 of 50 | 25% | 13.57 | 14.7 | 37.12 | 0.812 | 0.500 (0.400) |"
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}


def test_the_interval_of_psnr_and_the_floor_stand_beside(script: Script) -> None:
    found = result()
    own = found["evaluation"]["values"]["int8"]
    own[0] |= {"low": 35.04, "high": 39.96, "floor": 16.04}
    lines = script("peers_page").table([found])
    assert lines[3] == "| full precision, other noise |  |  |  |  | 16.04 |  |  |"
    assert "| 37.12 [35.0, 40.0] | 0.812 |" in lines[4]


def test_a_step_without_its_baseline_stands_alone(script: Script) -> None:
    found = result()
    del found["evaluation"]["cost"]["FP"]
    assert script("peers_page").table([found])[3].endswith("| 0.500 |")
    found["evaluation"]["cost"] = {}
    assert script("peers_page").table([found])[3].endswith("|  |")


def test_a_peer_without_any_working_arm_is_named(script: Script) -> None:
    arms = {"nf4": {"works": False, "call": "c", "while": "opening it", "error": "RuntimeError: No GPU found."}}
    page = script("peers_page").page([result("bitsandbytes", arms=arms, evaluation=None), result()])
    assert "- bitsandbytes nf4, opening it: `RuntimeError: No GPU found.`" in page
    assert "- torchao int4, opening it: `ImportError: needs 'x'`" in page  # one line, and the code ends where it should
    assert "| torchao int8 |" in page
    assert "Config(int4)" not in page


def test_what_was_not_measured_is_told_once(script: Script) -> None:
    found = result()
    found["evaluation"]["missing"] = 2 * [{"key": "speed", "what": "no clock", "why": "none", "where": "", "try_": ""}]
    page = script("peers_page").page([found])
    assert page.count("- torchao, speed: no clock (none).") == 1
    assert "Not measured" not in script("peers_page").page([result()])


def test_protocols_that_differ_are_told_apart(script: Script) -> None:
    other = result("sdnq")
    other["protocol"] = other["protocol"] | {"steps": 50}
    lines = script("peers_page").protocol([result(), other, result("quanto")])
    assert len(lines) == 2
    assert lines[0].startswith("torchao, quanto: 64 prompts") and ", 25 steps," in lines[0]
    assert lines[1].startswith("sdnq: 64 prompts") and ", 50 steps," in lines[1]


def test_the_committed_page_is_what_the_files_say(script: Script) -> None:
    page = script("peers_page")
    assert page.page(page.load()) == page.PAGE.read_text(encoding="utf-8")
