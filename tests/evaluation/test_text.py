"""Text alignment: transformers' CLIP from a folder or the cache, retrieval, what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import small
import tiny
from bitbrush.errors import ArtifactError
from bitbrush.evaluation import EmojiClip
from bitbrush.evaluation.optional import Unavailable
from bitbrush.evaluation.text import (
    PUBLISHED,
    Judge,
    TransformersClip,
    evaluator_label,
    has_emoji_vocabulary,
    open_evaluator,
)

TEXTS = ["red apple", "blue car", "green tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, as transformers writes it."""
    torch.manual_seed(0)
    text = {"vocab_size": 2050, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 24, "bos_token_id": 2048, "eos_token_id": 2049,
            "pad_token_id": 2049}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    place = tmp_path_factory.mktemp("clip") / "small-clip"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def pictures(n: int = 3, height: int = 20, width: int = 24) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_folder_is_named_with_its_digest(folder: Path) -> None:
    found = TransformersClip.load(folder)
    assert found.label.startswith("the CLIP in small-clip (") and evaluator_label(found) == found.label
    assert found.size == 16


def test_scores_are_cosines_of_the_model(folder: Path) -> None:
    found = TransformersClip.load(folder)
    x = (((pictures(height=16, width=16) + 1) * 127.5).round() / 255 - found.mean) / found.std
    tokens = found.tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        out = found.model(pixel_values=x, **tokens)
    expected = F.cosine_similarity(out.image_embeds, out.text_embeds)
    _, scores = Judge(found, TEXTS).look(pictures(height=16, width=16), range(3))
    assert torch.allclose(scores, expected, atol=1e-5)


def test_pictures_of_any_shape_become_the_middle_square(folder: Path) -> None:
    found = TransformersClip.load(folder)
    assert found._ready(pictures()).shape == (3, 3, 16, 16)
    assert found._ready(pictures(2, 40, 9)).shape == (2, 3, 16, 16)
    assert found.embed_pictures(pictures()).shape == (3, 8)
    assert torch.allclose(found.embed_texts(TEXTS).norm(dim=1), torch.ones(3))


def test_retrieval_needs_a_closed_set(folder: Path, evaluator: EmojiClip) -> None:
    found = TransformersClip.load(folder)
    assert Judge(found, TEXTS).groups() == {}
    judge = Judge(found, TEXTS, captions=["blue car", "red apple", "blue car"])
    assert judge.captions == ["blue car", "red apple"] and judge.groups() == {"r1": [0, 1]}
    embedded = found.embed_texts(TEXTS)  # pictures that lie where their texts do
    assert judge.hits(embedded, [0, 1]).tolist() == [True, True]
    assert judge.hits(embedded[[1, 0, 2]], [0, 1]).tolist() == [False, False]
    seen, heldout = next(c for c in evaluator.captions if c not in evaluator.heldout), min(evaluator.heldout)
    assert Judge(evaluator, [seen, heldout, "a cathedral"]).groups() == {"r1_heldout": [1], "r1_seen": [0]}


def test_the_judge_agrees_with_the_emoji_clip(evaluator: EmojiClip) -> None:
    prompts = [evaluator.captions[0], evaluator.captions[5], evaluator.captions[0]]
    shown = pictures(3, 64, 64)
    judge = Judge(evaluator, prompts)
    embedded, scores = judge.look(shown, range(3))
    assert torch.allclose(scores, evaluator.score(shown, prompts), atol=1e-6)
    assert judge.hits(embedded, [0, 2]).tolist() == evaluator.hits(shown[[0, 2]], [prompts[0], prompts[2]]).tolist()
    assert judge.label == "the emoji CLIP"


def test_what_is_missing_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Unavailable, match="is not there") as caught:
        TransformersClip.load()
    assert small.complete(caught.value) and "models--openai--clip-vit-large-patch14" in str(caught.value.where)
    assert "model.safetensors" in str(caught.value.why) and PUBLISHED in str(caught.value.try_)
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path, "config.json and model.safetensors")):
        with pytest.raises(Unavailable, match="is not there") as caught:
            TransformersClip.load(place)
        assert words in str(caught.value.why) and str(place) == caught.value.where


def test_a_pickle_is_not_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(Unavailable, match="is not there") as caught:
        TransformersClip.load(tmp_path)
    assert "model.safetensors is not there" in str(caught.value.why)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TransformersClip.load(tmp_path)


def test_weights_that_the_file_lacks_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        TransformersClip.load(tmp_path / "half")
    assert "visual_projection.weight" in str(caught.value.why)


def test_which_evaluator_is_opened(folder: Path, evaluator: EmojiClip, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bool:
        pytest.fail("asked although it does not matter")

    assert open_evaluator(evaluator, speaks_emoji=never) is evaluator
    assert isinstance(open_evaluator("emoji", speaks_emoji=never), EmojiClip)
    assert isinstance(open_evaluator(folder, speaks_emoji=never), TransformersClip)
    assert isinstance(open_evaluator(None, speaks_emoji=lambda: True), EmojiClip)
    named: list[Any] = []
    monkeypatch.setattr(TransformersClip, "load", lambda name, device: named.append(name))
    open_evaluator(None, speaks_emoji=lambda: False)
    assert named == [PUBLISHED]


def test_the_emoji_vocabulary() -> None:
    assert has_emoji_vocabulary(tiny.tokenizer()) and not has_emoji_vocabulary(None) and not has_emoji_vocabulary(3)
