"""Grids, specs and plans: JSON both ways, refusals, what this release cannot run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec

SPECS = [
    LayerSpec(),
    LayerSpec(weight=WeightSpec(), activation=ActivationSpec()),
    LayerSpec(weight=WeightSpec(grid=Grid(bits=3), row_bits=(3, 4, 8)), segments=(320, 640)),
    LayerSpec(weight=WeightSpec(rounding="offset", granularity="tensor")),
    LayerSpec(activation=ActivationSpec(mode="dynamic", granularity="token", grid=Grid(bits=8, signed=True))),
    LayerSpec(activation=ActivationSpec(timed=True, lookup="ceil", time_bits=(8, 6), position="output")),
    LayerSpec(weight=WeightSpec(grid=Grid(kind="log2", bits=4)), low_rank=8, rotation="hadamard", exempt=(1, 2)),
    LayerSpec(weight=WeightSpec(), sorted_channels=True, input_scale=True),
]


def _plan() -> Plan:
    names = {f"down_blocks.{i}.conv{j}": spec for i, spec in enumerate(SPECS) for j in range(2)}
    return Plan(layers=names, timesteps=(1.0, 21.5, 981.0))


def test_plan_round_trip() -> None:
    plan = _plan()
    text = json.dumps(plan.to_json())
    again = Plan.from_json(json.loads(text))
    assert again == plan and list(again.layers) == list(plan.layers)
    assert json.dumps(again.to_json()) == text  # byte-stable
    assert len(plan.to_json()["specs"]) == len(SPECS)  # each spec once
    assert Plan.from_json(Plan().to_json()) == Plan()


REFUSED: list[dict[str, Any]] = [
    {"specs": [{"weight": {"grid": {"bits": 0}}}], "layers": {"a": 0}},
    {"specs": [{"weight": {"grid": {"bits": 9}}}], "layers": {"a": 0}},
    {"specs": [{"weight": {"row_bits": [4, 9]}}], "layers": {"a": 0}},
    {"specs": [{"weight": {"grid": {"kind": "posit"}}}], "layers": {"a": 0}},
    {"specs": [{"weight": {"bitz": 4}}], "layers": {"a": 0}},
    {"specs": [{"colour": 1}], "layers": {"a": 0}},
    {"specs": [{"low_rank": -1}], "layers": {"a": 0}},
    {"specs": [{"activation": {"lookup": "random"}}], "layers": {"a": 0}},
    {"specs": [{"activation": {"mode": None}}], "layers": {"a": 0}},
    {"specs": [{}], "layers": {"a": 1}},
    {"specs": [{}], "layers": {"a": -1}},
    {"specs": [{}], "layers": {"a": "0"}},
    {"specs": [{}], "layers": {}, "timesteps": [5, 5]},
    {"specs": [{}], "layers": {}, "timesteps": [5, 1]},
    {"specs": [{}], "layers": {}, "timesteps": ["soon"]},
    {"layers": {}},
    {"specs": []},
    {"specs": [], "layers": {}, "extra": 1},
]


def test_refusals_are_value_errors() -> None:
    taken = []
    for data in REFUSED:
        try:
            taken.append((data, Plan.from_json(data)))
        except ValueError as error:
            assert str(error)
    assert taken == []
    assert len(REFUSED) == 18


def test_grids_refuse_bad_bits_and_types() -> None:
    for bad in (0, 9, -4, 4.0, "4", True, None):
        with pytest.raises(ValidationError):
            Grid(bits=bad)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Grid(bits=4).bits = 5  # type: ignore[misc]
    assert [(Grid(bits=b).levels, Grid(bits=b).mid) for b in (1, 4, 8)] == [(2, 1), (16, 8), (256, 128)]


def test_unsupported_fields_are_named() -> None:
    assert [spec.unsupported() for spec in SPECS] == [
        [], [], [], [], [], [],
        ["rotation", "rotation with low_rank", "exempt", "weight.grid.kind"], ["sorted_channels"],
    ]
    assert [spec.quantized for spec in SPECS] == [False] + [True] * 7
    assert LayerSpec(activation=ActivationSpec(time_bits=(8,))).unsupported() == ["activation.time_bits"]
    assert LayerSpec(activation=ActivationSpec(granularity="pixel")).unsupported() == ["activation.granularity"]
    assert LayerSpec(activation=ActivationSpec(lookup="interpolate")).unsupported() == ["activation.lookup"]


def test_changes_replace_only_named_layers() -> None:
    plan = _plan()
    name = next(iter(plan.layers))
    changed = plan.with_layers({name: LayerSpec(weight=WeightSpec())})
    assert changed.layers[name] != plan.layers[name] and list(changed.layers) == list(plan.layers)
    assert {k: v for k, v in changed.layers.items() if k != name} == {k: v for k, v in plan.layers.items() if k != name}
    assert WeightSpec(row_bits=(4, 3, 4, 8)).bit_classes() == (3, 4, 8)
