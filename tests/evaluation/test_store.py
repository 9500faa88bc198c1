"""Pictures are drawn once: stopped draws go on, larger sets take over smaller ones, other facts are another set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitbrush.errors import ArtifactError, InputError, InternalError
from bitbrush.evaluation.store import FACTS, PictureStore

FACTS_OF = {"model": "abc", "seed": 0, "steps": 3}


class Artist:
    """Draws picture i from a generator of its own; remembers what it was asked for and stops after a while."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[range] = []
        self.stop_after = stop_after

    def __call__(self, part: range) -> dict[str, Tensor]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(part)
        pictures = torch.stack([torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in part])
        return {"pictures": pictures, "latents": torch.tensor([[float(i)] for i in part])}


def test_drawn_once_and_read_part_by_part(tmp_path: Path) -> None:
    artist, told = Artist(), []
    store = PictureStore(tmp_path / "pictures")
    found = store.drawn(FACTS_OF, 7, artist, batch=3, advance=told.append)
    assert artist.asked == [range(3), range(3, 6), range(6, 7)] and told == [3, 3, 1] and len(found) == 7
    want = Artist()(range(7))
    assert torch.equal(found.all(), want["pictures"]) and torch.equal(found.all("latents"), want["latents"])
    assert [len(part) for part in found.parts()] == [3, 3, 1] and set(found.tensors()) == {"pictures", "latents"}
    again = Artist()
    assert torch.equal(store.drawn(FACTS_OF, 7, again, batch=3).all(), want["pictures"]) and not again.asked


def test_a_stopped_draw_goes_on(tmp_path: Path) -> None:
    store = PictureStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.drawn(FACTS_OF, 9, Artist(stop_after=2), batch=2)
    artist = Artist()
    found = store.drawn(FACTS_OF, 9, artist, batch=2)
    assert artist.asked == [range(4, 6), range(6, 8), range(8, 9)] and not found.missing()
    assert torch.equal(found.all(), Artist()(range(9))["pictures"])


def test_more_and_fewer_pictures_share_the_parts(tmp_path: Path) -> None:
    """A part that ended early is drawn again whole; a smaller set reads the head of what is there."""
    store, artist = PictureStore(tmp_path), Artist()
    store.drawn(FACTS_OF, 5, artist, batch=4)
    found = store.drawn(FACTS_OF, 10, artist, batch=4)
    assert artist.asked == [range(4), range(4, 5), range(4, 8), range(8, 10)]
    assert torch.equal(found.all(), Artist()(range(10))["pictures"])
    fewer = store.drawn(FACTS_OF, 6, artist, batch=4)
    assert len(artist.asked) == 4 and torch.equal(fewer.all(), Artist()(range(6))["pictures"])


def test_other_facts_are_another_set(tmp_path: Path) -> None:
    store, artist = PictureStore(tmp_path), Artist()
    folders = {store.drawn({**FACTS_OF, **change}, 2, artist, batch=2).folder
               for change in ({}, {"seed": 1}, {"model": "x"})}
    folders.add(store.drawn(FACTS_OF, 2, artist, batch=1).folder)
    folders.add(PictureStore(tmp_path, eight_bits=True).drawn(FACTS_OF, 2, artist, batch=2).folder)
    assert len(folders) == 5 and len(artist.asked) == 6


def test_eight_bits(tmp_path: Path) -> None:
    found = PictureStore(tmp_path, eight_bits=True).drawn(FACTS_OF, 4, Artist(), batch=4)
    exact, kept = Artist()(range(4))["pictures"], found.all()
    assert kept.dtype == torch.float32 and torch.allclose(kept, exact, atol=1 / 255 + 1e-6)
    levels = (kept + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4) and not torch.equal(kept, exact)
    assert torch.equal(found.all("latents")[:, 0], torch.arange(4.0))


def test_what_is_refused(tmp_path: Path) -> None:
    store = PictureStore(tmp_path)
    with pytest.raises(InputError, match="no pictures"):
        store.drawn(FACTS_OF, 0, Artist(), batch=2)
    with pytest.raises(InternalError, match="not drawn as it was asked"):
        store.drawn(FACTS_OF, 2, lambda part: {"pictures": torch.zeros(5, 3, 4, 4)}, batch=2)
    found = store.drawn(FACTS_OF, 2, Artist(), batch=2)
    with pytest.raises(ArtifactError, match="was not kept"):
        found.all("depth")
    file = found.file(found.ranges()[0])
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        store.drawn(FACTS_OF, 2, Artist(), batch=2)
    assert "remove this file" in str(caught.value)
    (found.folder / FACTS).write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="other pictures"):
        store.drawn(FACTS_OF, 2, Artist(), batch=2)


def test_single_parts_and_what_was_kept_of_them(tmp_path: Path) -> None:
    def draw(part: range) -> dict[str, Tensor]:
        kept = {"latents": torch.ones(len(part), 2)} if part.start < 3 else {}
        return {"pictures": torch.zeros(len(part), 3, 2, 2) + part.start / 10, **kept}

    found = PictureStore(tmp_path).drawn(FACTS_OF, 5, draw, batch=3)
    first, last = found.ranges()
    assert found.has(first, "latents") and not found.has(last, "latents") and found.has(last, "pictures")
    assert found.part(last).shape == (2, 3, 2, 2) and float(found.part(last).max()) == pytest.approx(0.3)
    with pytest.raises(ArtifactError, match="was not kept"):
        found.part(last, "latents")
