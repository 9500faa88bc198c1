"""Input scales, symmetric 1-bit rows, scales a channel and trained biases through save and plain from_pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitbrush  # noqa: F401  (registers the plug-in)
import builder
import tiny
from bitbrush.artifact.save import save
from bitbrush.errors import ArtifactError
from bitbrush.network import wrap
from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, Plan, WeightSpec


def _plan(model: Any) -> Plan:
    """Every second layer with rows of 1, 2, 3 bits; every layer with an input scale; every third by channel."""
    layers = {}
    for i, (name, spec) in enumerate(tiny.plan_for(model).layers.items()):
        rows = model.get_submodule(name).weight.shape[0]
        weight = WeightSpec(grid=Grid(bits=4))
        if i % 2:
            row_bits = tuple((2, 1, 3)[row % 3] for row in range(rows))
            weight = WeightSpec(grid=Grid(bits=2), row_bits=row_bits, binary="symmetric")
        activation = ActivationSpec(timed=True, granularity="tensor" if i % 3 else "channel")
        layers[name] = spec.model_copy(update={"weight": weight, "activation": activation, "input_scale": True})
    assert any(len(spec.segments) == 2 and spec.weight is not None and spec.weight.row_bits for spec in layers.values())
    return Plan(layers=layers, timesteps=tiny.TIMES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor, torch.Tensor, Path]:
    """(packed denoiser, its output, the simulation's output, the artifact's folder)."""
    model = tiny.text_unet()
    plan, generator = _plan(model), torch.Generator().manual_seed(0)
    wrap.wrap(model, plan)
    for layer in wrap.layers(model).values():
        builder.quantize_weight(layer, generator)
        builder.set_ranges(layer, generator)
        if layer.bias is not None:
            layer.set_bias(layer.bias + 0.01 * torch.randn(layer.bias.shape, generator=generator))
    wrap.set_face(model, "sim")
    simulated = tiny.run(model)
    for layer in wrap.layers(model).values():
        layer.pack()
    output = tiny.run(model)
    return model, output, simulated, save(model, tmp_path_factory.mktemp("partitions") / "out", plan)


def test_packed_equals_simulated(made: tuple[Any, torch.Tensor, torch.Tensor, Path]) -> None:
    model, output, simulated, _ = made
    assert torch.equal(output, simulated) and torch.isfinite(output).all()
    found = list(wrap.layers(model).values())
    assert len(found) > 30 and all(layer.input_scale is not None for layer in found)
    assert sum(layer.binary_rows() is not None for layer in found) == len(found) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_pretrained(made: tuple[Any, torch.Tensor, torch.Tensor, Path], dtype: torch.dtype) -> None:
    model, output, _, folder = made
    again = type(model).from_pretrained(folder, torch_dtype=dtype)
    if dtype == torch.float32:
        assert torch.equal(tiny.run(again), output)
    mine, theirs, scales = model.state_dict(), again.state_dict(), 0
    assert sorted(mine) == sorted(theirs)
    for name, layer in wrap.layers(again).items():
        table = theirs[f"{name}.input_scale"]
        assert table.dtype == torch.float32 and torch.equal(table, mine[f"{name}.input_scale"])
        assert layer.spec == wrap.layers(model)[name].spec
        scales += 1
    assert scales > 30
    assert all(torch.equal(theirs[n], t) for n, t in mine.items() if not t.is_floating_point())


def test_a_damaged_input_scale_is_refused(
    made: tuple[Any, torch.Tensor, torch.Tensor, Path], tmp_path: Path
) -> None:
    model, _, _, folder = made
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path, refused = tmp_path / "diffusion_pytorch_model.safetensors", 0
    good = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for value in (-1.0, 0.0, float("nan"), float("inf"), 1.5):
        tensors = {name: tensor.clone() for name, tensor in good.items()}
        tensors["conv_in.input_scale"][1] = value
        save_file(tensors, path, metadata)
        with pytest.raises(ArtifactError):
            type(model).from_pretrained(tmp_path)
        refused += 1
    assert refused == 5


def test_dequantizing_gives_a_model_for_unscaled_inputs(made: tuple[Any, torch.Tensor, torch.Tensor, Path]) -> None:
    model, _, _, folder = made
    again = type(model).from_pretrained(folder)
    want = {name: layer.restored_weight() for name, layer in wrap.layers(again).items()}
    again.dequantize()
    state, compared = again.state_dict(), 0
    for name, weight in want.items():
        assert torch.equal(state[f"{name}.weight"], weight)
        compared += 1
    assert compared > 30


def test_plans_of_earlier_artifacts_keep_their_json() -> None:
    """The new field is written only where it says something: digests of what was saved before stay valid."""
    plan = tiny.plan_for(tiny.text_unet())
    assert '"binary"' not in json.dumps(plan.to_json())
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=1), binary="symmetric"))
    data = Plan(layers={"a": spec}).to_json()
    assert data["specs"][0]["weight"]["binary"] == "symmetric"
    assert Plan.from_json(json.loads(json.dumps(data))).layers["a"] == spec
