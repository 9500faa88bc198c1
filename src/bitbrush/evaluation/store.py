"""Pictures of an arm, drawn once: in files, part by part, so that a stopped run goes on and a new metric draws nothing.

    FOLDER/<key>/facts.json             what the pictures follow from; the key is its hash
    FOLDER/<key>/part-00000.safetensors pictures 0 .. batch - 1, and what else was kept of them
    ...

A part appears whole or not at all. What decides about the pictures has to be in the facts (the model's hashes, prompts,
seed, steps, guidance, scheduler, precision, versions): nothing else tells two sets apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitbrush.engine.disk import Disk, write_bytes
from bitbrush.errors import ArtifactError, InputError, InternalError
from bitbrush.evaluation.eight_bits import from_levels, to_levels

FACTS = "facts.json"
PICTURES = "pictures"
Draw = Callable[[range], Mapping[str, Tensor]]
"""From numbers of pictures to ``pictures`` [len, 3, H, W] in [-1, 1] and other tensors with as many rows."""


class PictureSet:
    """The pictures of one arm and seed. Parts are read when they are asked for; no more than one is held.

    Args:
        folder: Of the set.
        count: Pictures in it.
        batch: Pictures a part.
    """

    def __init__(self, folder: Path, count: int, batch: int) -> None:
        self.folder, self.count, self.batch = folder, count, batch

    def __len__(self) -> int:
        return self.count

    def ranges(self) -> list[range]:
        """The numbers of the pictures of each part."""
        return [range(i, min(i + self.batch, self.count)) for i in range(0, self.count, self.batch)]

    def file(self, part: range) -> Path:
        """Where a part lies."""
        return self.folder / f"part-{part.start:05}.safetensors"

    def parts(self, name: str = PICTURES) -> Iterator[Tensor]:
        """A tensor of every part in turn, its first dimension the pictures; ``pictures`` are float32 in [-1, 1].

        Raises:
            ArtifactError: A part is damaged or is not there.
        """
        for part in self.ranges():
            yield self.part(part, name)

    def part(self, part: range, name: str = PICTURES) -> Tensor:
        """The same of one part."""
        return _read(self.file(part), name, len(part))

    def has(self, part: range, name: str) -> bool:
        """Whether a tensor was kept of a part."""
        with _opened(self.file(part)) as file:
            return name in file.keys()  # noqa: SIM118

    def all(self, name: str = PICTURES) -> Tensor:
        """The same of all parts together."""
        return torch.cat(list(self.parts(name)))

    def missing(self) -> list[range]:
        """Parts that are not there yet."""
        return [part for part in self.ranges() if not self.file(part).exists()]

    def tensors(self) -> tuple[str, ...]:
        """Names of what is kept, ``pictures`` among them."""
        path = self.file(self.ranges()[0])
        with _opened(path) as file:
            return tuple(file.keys())


class PictureStore:
    """Sets of pictures by what they follow from.

    Args:
        folder: Made where it is missing.
        eight_bits: Round pictures to the 256 levels of a file, a quarter of the bytes. A paired metric then compares
            rounded pictures; full precision (float32) is for small ones, as in the benchmarks.
    """

    def __init__(self, folder: Path | str, *, eight_bits: bool = False) -> None:
        self.folder, self.eight_bits = Path(folder), eight_bits

    def drawn(
        self, facts: Mapping[str, Any], count: int, draw: Draw, *, batch: int,
        advance: Callable[[int], None] | None = None,
    ) -> PictureSet:
        """The set with these facts; what is missing is drawn.

        Args:
            facts: JSON values that decide about the pictures, whatever their number.
            count: Pictures wanted, numbers 0 to count - 1.
            draw: Called for each missing part.
            batch: Pictures a part; one of the facts, since it may move the last bits of a picture.
            advance: Told of the pictures of each part, also of those that were there.

        Raises:
            InputError: No pictures are asked for.
            ArtifactError: The folder holds another set under this key.
        """
        if count < 1 or batch < 1:
            raise InputError("no pictures are asked for", where="PictureStore.drawn",
                             why=f"n = {count}, batch = {batch}", try_="give n and batch of at least 1")
        known = {**facts, "batch": batch, "eight_bits": self.eight_bits}
        text = json.dumps(known, sort_keys=True, indent=1)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:20]
        Disk().make(folder)
        _agree(folder / FACTS, text)
        found = PictureSet(folder, count, batch)
        for part in found.ranges():
            file = found.file(part)
            if not file.exists() or _rows(file) < len(part):  # a smaller set may have ended within this part
                write_bytes(file, save(self._checked(draw(part), part)))
            if advance is not None:
                advance(len(part))
        return found

    def _checked(self, tensors: Mapping[str, Tensor], part: range) -> dict[str, Tensor]:
        pictures = tensors.get(PICTURES)
        if pictures is None or any(len(tensor) != len(part) for tensor in tensors.values()):
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise InternalError("a part was not drawn as it was asked for", why=f"{shapes} for {len(part)} pictures",
                                where=f"pictures {part.start} to {part.stop - 1}")
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.eight_bits:
            kept[PICTURES] = to_levels(kept[PICTURES])
        return kept


def _agree(path: Path, text: str) -> None:
    if not path.exists():
        write_bytes(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise ArtifactError("the folder holds other pictures", where=str(path.parent),
                            why="its facts are not those that its name stands for", try_="remove the folder")


def _rows(path: Path) -> int:
    with _opened(path) as file:
        return int(file.get_slice(PICTURES).get_shape()[0])


def _read(path: Path, name: str, rows: int) -> Tensor:
    with _opened(path) as file:
        if name not in file.keys():  # noqa: SIM118  (a file of tensors is no mapping)
            raise ArtifactError(f"{name!r} was not kept", where=str(path), why=f"kept: {', '.join(file.keys())}",
                                try_="draw again into another folder, keeping it")
        tensor: Tensor = file.get_tensor(name)[:rows]
    if name == PICTURES and tensor.dtype == torch.uint8:
        return from_levels(tensor)
    return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError("pictures that were drawn before cannot be read", where=str(path), why=str(error),
                            try_="remove this file: its pictures are drawn again") from error
