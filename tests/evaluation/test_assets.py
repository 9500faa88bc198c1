"""What ships is what the model card says."""

from __future__ import annotations

import hashlib
import re

import pytest

from bitbrush import assets
from bitbrush.errors import InputError


def test_prompts_have_the_documented_sizes_and_do_not_overlap() -> None:
    calibration, evaluation = assets.prompts("calibration"), assets.prompts("evaluation")
    captions, heldout = assets.prompts("captions"), assets.prompts("heldout")
    assert [len(p) for p in (calibration, evaluation, captions, heldout)] == [1024, 512, 3543, 150]
    assert not set(calibration) & set(evaluation)
    assert not set(calibration) & set(heldout)
    assert set(calibration) | set(evaluation) | set(heldout) <= set(captions)
    assert evaluation[:150] == heldout == captions[-150:]
    assert len(set(captions)) == len(captions)


def test_model_card_lists_every_file_with_its_hash() -> None:
    root = assets.path("README.md").parent
    card = (root / "README.md").read_text(encoding="utf-8")
    listed = {m[0]: (int(m[1]), m[2]) for m in re.findall(r"\| `([\w./-]+)` \| (\d+) \| `([0-9a-f]{64})` \|", card)}
    folders = ("emoji-sd-tiny", "emoji-clip", "prompts")
    present = {p.relative_to(root).as_posix(): p for f in folders for p in (root / f).rglob("*") if p.is_file()}
    assert listed.keys() == present.keys()
    for name, file in present.items():
        data = file.read_bytes()
        assert listed[name] == (len(data), hashlib.sha256(data).hexdigest()), name


def test_no_pickles_ship() -> None:
    root = assets.path("README.md").parent
    allowed = {".safetensors", ".json", ".txt", ".md", ".py", ".pyc"}
    assert {p.suffix for p in root.rglob("*") if p.is_file()} <= allowed


@pytest.mark.parametrize("name", ["", "nothing", "../errors.py", "/etc/hostname", "prompts/../../errors.py"])
def test_unknown_assets_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no asset"):
        assets.path(name)


def test_unknown_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="no bundled prompts"):
        assets.prompts("training")
