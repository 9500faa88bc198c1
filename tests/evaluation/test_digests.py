"""Hashes of pipelines: equal for equal ones, others for any change, none where it cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small
import tiny
from bitbrush.errors import InputError
from bitbrush.evaluation.digests import Opaque, folder_digest, module_digest, pipeline_digest
from bitbrush.evaluation.sampling import draw
from bitbrush.network import wrap


def test_equal_pipelines_are_equal_and_drawing_changes_nothing() -> None:
    first, second = small.least_pipeline(), small.least_pipeline()
    digest = pipeline_digest(first)
    assert digest == pipeline_digest(second) != pipeline_digest(small.least_pipeline(seed=1))
    draw(first, prompts=None, n=2, steps=2)
    assert pipeline_digest(first) == digest


def test_every_change_shows() -> None:
    found = {pipeline_digest(small.least_pipeline())}
    changed = small.least_pipeline()
    next(changed.unet.parameters()).data.flatten()[0] += 1e-6
    found.add(pipeline_digest(changed))
    found.add(pipeline_digest(small.least_pipeline().to(torch.float16)))
    scheduled = small.least_pipeline()
    scheduled.scheduler = type(scheduled.scheduler).from_config(scheduled.scheduler.config, clip_sample=False)
    found.add(pipeline_digest(scheduled))
    training = small.least_pipeline()
    training.unet.train()
    found.add(pipeline_digest(training))
    assert len(found) == 5


def test_quantized_layers_and_their_face() -> None:
    def made(bits: int, face: Any = None) -> str:
        pipe, _ = tiny.quantized_pipeline("unconditional", bits, pack=False)
        if face is not None:
            wrap.set_face(pipe.unet, face)
        return pipeline_digest(pipe)

    packed, _ = tiny.quantized_pipeline("unconditional", 4)
    digest = pipeline_digest(packed)
    draw(packed, prompts=None, n=1, steps=2)
    assert pipeline_digest(packed) == digest, "the clock and what was said of it are no part of it"
    assert len({digest, made(4), made(4, "float"), made(3), pipeline_digest(tiny.pipeline("unconditional"))}) == 5


class Stored(Tensor):
    """A tensor made of others, as torchao's and quanto's are."""

    codes: Tensor
    scale: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, int]]:
        return ["codes", "scale"], {"bits": 4}


def stored(scale: float) -> Stored:
    made = torch.zeros(2, 2).as_subclass(Stored)
    made.codes, made.scale = torch.arange(4, dtype=torch.uint8), torch.tensor([scale])
    return made


class State:
    """What bitsandbytes hangs onto a parameter."""

    def __init__(self, scale: float) -> None:
        self.absmax, self.blocksize, self.nested = torch.tensor([scale]), 64, None


class Foreign(nn.Parameter):
    """A parameter with a state, as bitsandbytes' are."""


def foreign(scale: float) -> Foreign:
    made = Foreign(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    made.quant_state = State(scale)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("make", [stored, foreign])
def test_tensors_of_other_quantizers_are_hashed_by_what_they_hold(make: Any) -> None:
    def digest(scale: float) -> str:
        layer = nn.Module()
        value = make(scale)
        if isinstance(value, nn.Parameter):
            layer.register_parameter("weight", value)
        else:
            layer.register_buffer("weight", value)
        return module_digest(layer)

    assert digest(1.0) == digest(1.0) != digest(2.0)


def test_settings_hung_onto_a_layer_count() -> None:
    def digest(group: int) -> str:
        layer = nn.Linear(2, 2)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.dequantizer = State(float(group))  # type: ignore[assignment]
        return module_digest(layer)

    assert digest(32) == digest(32) != digest(64)


def test_what_cannot_be_told_has_no_digest() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    with torch.device("meta"):
        away = nn.Linear(2, 2)
    for layer, words in ((hooked, "hook of unknown code"), (replaced, "forward"), (away, "no data")):
        with pytest.raises(Opaque, match=words):
            module_digest(nn.Sequential(layer))


def test_a_folder_is_its_index_and_the_parts_named_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small.least_pipeline().save_pretrained(folder)
    digest = folder_digest(folder)
    (folder / "README.md").write_text("a card")
    (folder / "other").mkdir()
    (folder / "other" / "more.safetensors").write_bytes(b"x")
    assert folder_digest(folder) == digest
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": 1}))
    assert folder_digest(folder) != digest
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not JSON") as caught:
        folder_digest(folder)
    assert small.complete(caught.value)
