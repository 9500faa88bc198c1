"""Features of a set of pictures, in memory or mapped from a folder, and the Gaussian fitted to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitbrush.engine.disk import Disk, failing_as_resource, write_bytes
from bitbrush.errors import ArtifactError, InputError

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
INDEX = "features.json"  # written last: without it the folder is not complete
ROWS = 4096  # rows turned to float64 at a time
KINDS = ("pooled", "logits", "spatial")


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, float64."""

    mu: Floats
    sigma: Floats


@dataclass(frozen=True)
class FeatureSet:
    """Features of n pictures.

    Args:
        pooled: [n, d], float32.
        logits: [n, classes], or None.
        spatial: [n, s], or None.
        extractor: Name of the network.
        standard: It is Inception with the published weights.
        source: What the pictures are.
    """

    pooled: Singles
    logits: Singles | None
    spatial: Singles | None
    extractor: str
    standard: bool
    source: str

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.pooled)

    def gaussian(self, *, spatial: bool = False) -> Gaussian:
        """Mean and unbiased covariance in float64, with ``ROWS`` rows in float64 at a time.

        Raises:
            InputError: ``spatial`` is asked for and there are no such features.
        """
        features = self.spatial if spatial else self.pooled
        if features is None:
            raise InputError(
                "there are no spatial features", where=self.source, why=f"{self.extractor} gives none",
                try_="leave sFID out, or take an extractor that gives them",
            )  # fmt: skip
        return fit(features)

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Maps features that ``Extractor.extract`` wrote into ``folder``.

        Raises:
            ArtifactError: The folder is not complete or holds something else.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            arrays = {kind: _mapped(folder / f"{kind}.npy", index["shapes"].get(kind)) for kind in KINDS}
            words = {key: str(index[key]) for key in ("extractor", "source")}
            pooled = arrays["pooled"]
            if pooled is None:
                raise ValueError("no pooled features")
            return cls(pooled, arrays["logits"], arrays["spatial"], standard=index["standard"] is True, **words)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise ArtifactError(
                "a folder of features cannot be read", where=str(folder), why=f"{type(error).__name__}: {error}",
                try_="remove the folder; features are then computed again",
            ) from error  # fmt: skip


def fit(features: Singles) -> Gaussian:
    """Mean and unbiased covariance of [n, d], in two passes over blocks of rows."""
    count, width = features.shape
    blocks = [slice(first, first + ROWS) for first in range(0, count, ROWS)]
    mu = sum((features[block].sum(axis=0, dtype=np.float64) for block in blocks), np.zeros(width)) / count
    sigma = np.zeros((width, width))
    for block in blocks:
        centred = features[block].astype(np.float64) - mu
        sigma += centred.T @ centred
    return Gaussian(mu, sigma / max(count - 1, 1))


class Sink:
    """Takes features batch by batch: in memory, or as ``.npy`` files of a folder that are mapped at the end.

    Rows are written, not assigned to a map: a full disk is then an error and not a killed process.
    """

    def __init__(self, folder: Path | None, total: int | None) -> None:
        if folder is not None and total is None:
            raise InputError(
                "the number of pictures is needed to write features to a folder", where=str(folder),
                why="it stands at the head of the file", try_="pass count=",
            )  # fmt: skip
        self.folder, self.total, self.count = folder, total, 0
        self._parts: dict[str, list[Singles]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Sink:
        if self.folder is not None:
            Disk().make(self.folder.absolute())
            Disk().remove(self.folder / INDEX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, features: Mapping[str, Tensor]) -> None:
        """One batch: float32 tensors [b, width] by kind."""
        for kind, tensor in features.items():
            rows = np.ascontiguousarray(tensor.numpy())
            if self.folder is None:
                self._parts.setdefault(kind, []).append(rows)
            else:
                self._write(kind, rows)
        self.count += len(features["pooled"])

    def done(self, *, extractor: str, standard: bool, source: str) -> FeatureSet:
        """The set of all that was added.

        Raises:
            InputError: Another number of pictures came than was said.
        """
        if self.total is not None and self.count != self.total:
            raise InputError(
                "another number of pictures came than was said", where=source,
                why=f"{self.total} said, {self.count} given", try_="pass their number as count=",
            )  # fmt: skip
        if self.folder is None:
            arrays = {kind: np.concatenate(parts) for kind, parts in self._parts.items()}
            return FeatureSet(
                arrays["pooled"], arrays.get("logits"), arrays.get("spatial"), extractor, standard, source
            )
        for kind in self._shapes:
            Disk().adopt(self.folder / f".{kind}.part", self.folder / f"{kind}.npy")
        index = {"extractor": extractor, "standard": standard, "source": source, "shapes": self._shapes}
        write_bytes(self.folder / INDEX, json.dumps(index, indent=1).encode())
        return FeatureSet.open(self.folder)

    def _write(self, kind: str, rows: Singles) -> None:
        path = (self.folder or Path()) / f".{kind}.part"
        with failing_as_resource(path, rows.nbytes):
            if kind not in self._files:
                self._files[kind] = self._open.enter_context(path.open("wb"))
                self._shapes[kind] = (self.total or 0, rows.shape[1])
                head = {"descr": "<f4", "fortran_order": False, "shape": self._shapes[kind]}
                np.lib.format.write_array_header_1_0(self._files[kind], head)
            self._files[kind].write(rows.astype("<f4", copy=False).tobytes())
            self._files[kind].flush()


def _mapped(path: Path, shape: list[int] | None) -> Singles | None:
    """The array of a file, mapped copy-on-write: torch takes it without a word, and the file stays as it is."""
    if shape is None:
        return None
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != np.float32 or list(array.shape) != list(shape):
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, expected float32 {tuple(shape)}")
    return array
