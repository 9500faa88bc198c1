"""Weights of published metrics: found in the user's cache or a given file, never downloaded, read as tensors only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitbrush.errors import ArtifactError
from bitbrush.evaluate.optional import Unavailable


@dataclass(frozen=True)
class Published:
    """A published file of weights.

    Args:
        title: What the weights are, for messages.
        file: Its name in the cache. As torch's hub has it, the name ends with the first digits of the file's SHA-256.
    """

    title: str
    file: str

    @property
    def digest(self) -> str:
        """The first eight hexadecimal digits of the SHA-256 of the published file."""
        return Path(self.file).stem.rpartition("-")[2]


@dataclass(frozen=True)
class Weights:
    """Tensors of a file, and whether it is the published one.

    Args:
        tensors: By name, on the CPU.
        path: The file.
        published: Its SHA-256 begins as the published file's does.
        digest: The first eight hexadecimal digits of its SHA-256.
    """

    tensors: dict[str, Tensor]
    path: Path
    published: bool
    digest: str


def find(wanted: Published, file: Path | str | None = None) -> Weights:
    """The weights in ``file``, or, without one, those in the cache of torch's hub.

    Raises:
        Unavailable: The file is not there. The message names it and every place that was looked at.
        ArtifactError: It cannot be read as tensors.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints" / wanted.file
    path = Path(file) if file is not None else cache
    if not path.is_file():
        raise Unavailable(
            f"{wanted.title} are not there",
            where=str(path),
            why=f"no such file; {'it was given' if file is not None else 'this is the cache of torch.hub (TORCH_HOME)'}"
            f", and nothing is downloaded on its own. Wanted: {wanted.file}",
            try_=f"put {wanted.file} into {cache.parent}, or give a file",
        )
    digest = _sha256(path)[:8]
    return Weights(read(path), path, digest == wanted.digest, digest)


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a ``.pth`` state dictionary.

    The latter goes through torch's restricted reader, which builds tensors and plain containers only.

    Raises:
        ArtifactError: The file holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError, _refusal()) as error:
        raise _unreadable(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _unreadable(path, f"a {type(state).__name__} that is no dictionary of tensors")
    return {str(name): value for name, value in state.items()}


def _refusal() -> type[Exception]:
    """What torch's restricted reader raises; the class is found at torch, since no module here imports pickle."""
    pickle: Any = torch.serialization.__dict__["pickle"]
    return pickle.UnpicklingError


def _unreadable(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "a file of weights cannot be read",
        where=str(path),
        why=why,
        try_="fetch the file again; weights are read as tensors only, from .safetensors or a .pth state dictionary",
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, str(error)) from error
