"""The emoji CLIP on real pictures of the embedded generator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bitbrush import assets
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation import EmojiClip, draw

PROMPTS = ["woman lifting weights light skin tone", "nose medium-dark skin tone"]


@pytest.fixture(scope="module")
def drawn(emoji) -> torch.Tensor:
    prompts = assets.prompts("evaluation")
    return draw(emoji, prompts=prompts, indices=[prompts.index(p) for p in PROMPTS], steps=10, batch=2)


def test_full_precision_pictures_find_their_caption(evaluator: EmojiClip, drawn: torch.Tensor) -> None:
    assert evaluator.hits(drawn, PROMPTS).tolist() == [True, True]
    assert evaluator.hits(drawn, PROMPTS[::-1]).tolist() == [False, False]


def test_score_prefers_the_own_prompt(evaluator: EmojiClip, drawn: torch.Tensor) -> None:
    own, other = evaluator.score(drawn, PROMPTS), evaluator.score(drawn, PROMPTS[::-1])
    assert float(own.min()) > 0.7 and float((own - other).min()) > 0.3
    assert torch.allclose(own, (evaluator.embed_pictures(drawn) * evaluator.embed_texts(PROMPTS)).sum(-1), atol=1e-6)
    assert float(evaluator.score(torch.ones_like(drawn), PROMPTS).max()) < 0.5


def test_scores_do_not_depend_on_the_batch(evaluator: EmojiClip, drawn: torch.Tensor) -> None:
    one = torch.cat([evaluator.score(drawn[i : i + 1], [p]) for i, p in enumerate(PROMPTS)])
    assert torch.allclose(one, evaluator.score(drawn, PROMPTS), atol=1e-5)


def test_heldout_and_captions(evaluator: EmojiClip) -> None:
    prompts = [PROMPTS[0], "superhero", "a cathedral at night"]
    assert evaluator.is_caption(prompts).tolist() == [True, True, False]
    assert evaluator.is_heldout(prompts).tolist() == [True, False, False]


def test_refusals(evaluator: EmojiClip, drawn: torch.Tensor) -> None:
    with pytest.raises(InputError, match="caption list"):
        evaluator.hits(drawn, ["superhero", "a cathedral at night"])
    with pytest.raises(InputError, match="its prompt"):
        evaluator.score(drawn, ["superhero"])


def test_damaged_evaluator_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(assets.path("emoji-clip"), folder)
    (folder / "emoji-clip-text" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="text tower"):
        EmojiClip.load(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        EmojiClip.load(tmp_path)
