"""Weights of published metrics: found in the user's cache or a given file, never downloaded, never unpickled here.

A given file is safetensors. The published files are pickles (``.pth``), and the library whose weights they are opens
them, by its own constructor; what is done here is to see that the file is there and that its bytes are the published
ones, since a pickle with other bytes could run code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitbrush.errors import ArtifactError
from bitbrush.evaluation.optional import Unavailable


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

    @property
    def cache(self) -> Path:
        """Where torch's hub keeps it: in ``$TORCH_HOME/hub/checkpoints``."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file


@dataclass(frozen=True)
class Weights:
    """A file of weights that may be used.

    Args:
        path: The file.
        digest: The first eight hexadecimal digits of its SHA-256.
        tensors: By name, on the CPU; None for the published file, which only its library opens.
    """

    path: Path
    digest: str
    tensors: dict[str, Tensor] | None = None

    @property
    def published(self) -> bool:
        """The file is the published one, not one that was given."""
        return self.tensors is None


def find(wanted: Published, file: Path | str | None = None) -> Weights:
    """The weights in ``file``, or, without one, the published file in the cache of torch's hub.

    Raises:
        Unavailable: The file is not there, or the one in the cache has other bytes than the published one. The
            message names it and the place.
        ArtifactError: The given file is not safetensors or cannot be read.
    """
    path = Path(file) if file is not None else wanted.cache
    if not path.is_file():
        raise Unavailable(
            f"{wanted.title} are not there",
            where=str(path),
            why=f"no such file; {'it was given' if file is not None else 'this is the cache of torch.hub (TORCH_HOME)'}"
            f", and nothing is downloaded on its own. Wanted: {wanted.file}",
            try_=f"put {wanted.file} into {wanted.cache.parent}, or give a .safetensors file of the same tensors",
        )
    if file is not None:
        _refuse_pickle(path, wanted)
        return Weights(path, _sha256(path)[:8], read(path))
    digest = _sha256(path)[:8]
    if digest != wanted.digest:
        raise Unavailable(
            f"{wanted.title} are not the published ones",
            where=str(path),
            why=f"its SHA-256 begins with {digest}, its name says {wanted.digest}; a .pth file is a pickle, which "
            "could run code, so no other bytes than the published ones are opened",
            try_="remove it and fetch it again, or give weights of your own as .safetensors",
        )
    return Weights(path, digest)


def read(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a safetensors file.

    Raises:
        ArtifactError: The file is something else.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def _refuse_pickle(path: Path, wanted: Published) -> None:
    if path.suffix == ".safetensors":
        return
    out = str(path.with_suffix(".safetensors"))
    convert = f"save_file(torch.load({str(path)!r}, weights_only=True), {out!r})"
    raise ArtifactError(
        "a given file of weights must be .safetensors",
        where=str(path),
        why="other formats are pickles, which could run code",
        try_=f'python -c "import torch; from safetensors.torch import save_file; {convert}"\n'
        f"or put {wanted.file}, as published, into {wanted.cache.parent}",
    )


def _unreadable(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "a file of weights cannot be read",
        where=str(path),
        why=why,
        try_="fetch or write the file again, as .safetensors",
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, str(error)) from error
