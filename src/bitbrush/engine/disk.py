"""The only module that writes files. A handful of operations, each complete or without effect.

`Disk.write` and `Disk.adopt` never leave a half file under its final name: the bytes are staged beside it, synced, and
renamed. Every primitive (open, write, fsync, rename, ...) goes through `Disk._op` before and after it happens, so that
a test can fail or kill the process at every single one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitbrush.errors import ResourceError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_SICK = {
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
}


class Disk:
    """Durable file operations.

    Every operation raises `ResourceError` when the disk is full, read-only or broken. A subclass may override `_op`.
    """

    def write(self, path: Path, data: bytes) -> None:
        """Put ``data`` at ``path`` atomically: after a crash there is the old file or the new one."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")  # runs side by side may share a cache
        with failing_as_resource(path, len(data)):
            try:
                self._fill(part, data)
                self._rename(part, path)
            except OSError:
                with suppress(OSError):
                    part.unlink()
                raise

    def append(self, path: Path, line: bytes) -> None:
        """Append ``line`` durably; when the write fails, the file keeps its former length."""
        with failing_as_resource(path, len(line)):
            new = not path.exists()
            self._op("before-append", path)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                length = os.fstat(descriptor).st_size
                try:
                    _write_all(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(descriptor, length)
                    raise
            finally:
                os.close(descriptor)
            self._op("after-append", path)
            if new:
                self._sync_folder(path.parent)

    def adopt(self, src: Path, dst: Path) -> None:
        """Move a file that somebody else wrote under a staging folder (same file system) to its place, durably."""
        with failing_as_resource(dst, None):
            self._op("before-fsync", src)
            descriptor = os.open(src, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._op("after-fsync", src)
            self._rename(src, dst)

    def remove(self, path: Path) -> None:
        """Remove a file or a tree; a tree vanishes under its name at once. Nothing there is fine."""
        with failing_as_resource(path, None):
            gone = path.with_name(f".{path.name}.gone")
            self._remove_tree(gone)  # of a removal that was cut short
            if path.is_dir() and not path.is_symlink():
                self._rename(path, gone)
                self._remove_tree(gone)
            elif path.exists() or path.is_symlink():
                self._op("before-remove", path)
                path.unlink()
                self._op("after-remove", path)
                self._sync_folder(path.parent)

    def make(self, path: Path) -> None:
        """Create a folder and its parents."""
        with failing_as_resource(path, None):
            for folder in [*reversed(path.parents), path]:
                if folder.is_dir():
                    continue
                self._op("before-make", folder)
                folder.mkdir(exist_ok=True)
                self._op("after-make", folder)
                self._sync_folder(folder.parent)

    def _op(self, kind: str, path: Path) -> None:
        """Called before and after each primitive, e.g. ``("before-rename", path)``; here it does nothing."""

    def _fill(self, path: Path, data: bytes) -> None:
        self._op("before-write", path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(descriptor, data)
            self._op("after-write", path)
            self._op("before-fsync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._op("after-fsync", path)

    def _rename(self, src: Path, dst: Path) -> None:
        self._op("before-rename", dst)
        os.replace(src, dst)
        self._op("after-rename", dst)
        self._sync_folder(dst.parent)

    def _remove_tree(self, folder: Path) -> None:
        if folder.is_dir():
            self._op("before-remove", folder)
            shutil.rmtree(folder)
            self._op("after-remove", folder)

    def _sync_folder(self, folder: Path) -> None:
        if not hasattr(os, "O_DIRECTORY"):  # Windows cannot sync a folder
            return
        self._op("before-fsync-folder", folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._op("after-fsync-folder", folder)


@contextmanager
def failing_as_resource(path: Path, needed: int | None) -> Iterator[None]:
    """Turn a disk's refusal inside the block into a `ResourceError`; other errors pass.

    Args:
        path: What was being written.
        needed: Bytes wanted, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and error.errno not in _SICK:
            raise
        raise disk_error(error.errno, path, needed) from error


def disk_error(number: int, path: Path, needed: int | None = None) -> ResourceError:
    """The four-part error for an operating system's error number (`errno`)."""
    amount = f"{needed:,} bytes were to be written" if needed is not None else "a file was to be written"
    free = ""
    with suppress(OSError):
        existing = next(folder for folder in [path, *path.parents] if folder.exists())
        free = f", {shutil.disk_usage(existing).free:,} bytes are free"
    full = number in _FULL
    cause = _FULL.get(number) or _SICK.get(number) or os.strerror(number)
    action = "free some space" if full else "make the folder writable"
    return ResourceError(
        f"writing failed: {cause}", where=str(path), why=f"{amount}{free}; nothing that was saved before is lost",
        try_=f"{action}, then `bitbrush resume OUT` (or run the command again)",
    )


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically, with its folder; for reports and pictures."""
    disk, target = Disk(), Path(path)
    disk.make(target.absolute().parent)
    disk.write(target, data)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
