"""A tensor that grows by batches up to a known count: in memory when it fits, else in a memory-mapped file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bitbrush.engine.disk import failing_as_resource


class Store:
    """Rows appended in order and taken by index.

    Args:
        folder: Where the file goes when the rows do not fit; the file has no name and vanishes with the process.
        device: Where rows are kept when they fit, and where `take` returns them.
        budget: Bytes allowed in memory.
        count: Rows that will be appended.
    """

    def __init__(self, folder: Path, device: torch.device, budget: int, count: int) -> None:
        self.folder, self.device, self.budget, self.count = folder, device, budget, count
        self.data: Tensor | None = None
        self.filled = 0
        self._file: object = None

    def __len__(self) -> int:
        return self.filled

    def append(self, rows: Tensor) -> None:
        """Append a batch of rows."""
        if self.data is None:
            self.data = self._allocate(rows)
        self.data[self.filled : self.filled + rows.shape[0]] = rows.detach().to(self.data.device)
        self.filled += rows.shape[0]

    def take(self, index: Tensor) -> Tensor:
        """Rows by index, on the device."""
        if self.data is None:
            raise IndexError("nothing has been appended")
        if self.data.device == self.device:
            return self.data.index_select(0, index.to(self.device))
        return self.data.index_select(0, index.cpu()).to(self.device)

    def put(self, index: Tensor, rows: Tensor) -> None:
        """Replace rows by index, in place: a CUDA graph that reads the store reads the new ones."""
        if self.data is None:
            raise IndexError("nothing has been appended")
        device = self.data.device
        self.data.index_copy_(0, index.to(device), rows.detach().to(device, self.data.dtype))

    def _allocate(self, rows: Tensor) -> Tensor:
        shape = (self.count, *rows.shape[1:])
        size = self.count * rows[0].numel() * rows.element_size()
        if size <= self.budget:
            return torch.empty(shape, dtype=rows.dtype, device=self.device)
        file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="store-")  # noqa: SIM115
        with failing_as_resource(self.folder, size):  # reserved now: a full disk must not kill a later memory access
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
        self._file = file
        flat = torch.from_file(file.name, shared=True, size=size // rows.element_size(), dtype=rows.dtype)
        return flat.reshape(shape)
