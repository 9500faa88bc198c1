"""Write an artifact: diffusers saves into a staging folder, the files are adopted one by one, the manifest comes last.

The bytes depend on the model, the plan and the extras only: not on the time, the machine or the folder.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bitbrush.artifact import manifest
from bitbrush.artifact.diffusers_plugin import attach
from bitbrush.engine.disk import Disk, disk_error, failing_as_resource
from bitbrush.errors import InputError
from bitbrush.numbers.grid import Plan

STAGE = Path(".run") / "stage"
_MACHINE_KEYS = ("_name_or_path", "name_or_path")


def save(
    target: Any, folder: Path | str, plan: Plan, extras: dict[str, bytes] | None = None, disk: Disk | None = None,
    *, source: Path | str | None = None,
) -> Path:
    """Save a pipeline, or a bare denoiser, whose denoiser is packed.

    Args:
        target: The pipeline or model.
        folder: Where; an artifact that is there already is replaced.
        plan: The plan of the denoiser.
        extras: Further files by name: ``proof.json``, ``recipe.toml``, ``history.json``.
        disk: The writer.
        source: Folder that the float model came from, if any; it is never written to.

    Raises:
        InputError: The denoiser is not packed, the folder is the source, or the folder holds files of somebody else.
        ResourceError: The disk is full, read-only or broken; nothing that was complete is lost.
    """
    folder, disk, extras = Path(folder), disk or Disk(), extras or {}
    odd = [name for name in extras if not manifest.valid_name(name) or "/" in name]
    if odd:
        raise InputError(f"an extra file cannot be named {odd[0]!r}", try_="use names such as proof.json")
    if source is not None and folder.resolve() == Path(source).resolve():
        raise InputError("the result would overwrite the model it was made from", where=str(folder),
                         try_="choose another folder with -o")
    attach(denoiser(target), plan)
    stage = folder / STAGE
    begun = stage.parent.exists()  # a run of ours, perhaps cut short: its files may be replaced
    disk.make(folder)
    disk.remove(stage)
    disk.make(stage)
    with _staging(disk, stage):
        target.save_pretrained(str(stage), safe_serialization=True)
    _strip_machine(disk, stage)
    names, special = manifest.list_files(stage)
    _clear(disk, folder, {*names, *extras}, special, begun)
    for name in names:
        disk.make((folder / name).parent)
        disk.adopt(stage / name, folder / name)
    for name, data in sorted(extras.items()):
        disk.write(folder / name, data)
    disk.write(folder / manifest.NAME, manifest.describe(folder, sorted({*names, *extras})).to_bytes())
    disk.remove(stage)
    if not any(stage.parent.iterdir()):
        disk.remove(stage.parent)
    return folder


def denoiser(target: Any) -> Any:
    """The denoiser of a pipeline (``unet`` or ``transformer``, unwrapped if compiled); a bare model is itself."""
    model = getattr(target, "unet", None) or getattr(target, "transformer", None) or target
    return getattr(model, "_orig_mod", model)


@contextmanager
def _staging(disk: Disk, stage: Path) -> Iterator[None]:
    """Diffusers and safetensors write by themselves here; their complaints about the disk become ours."""
    try:
        with failing_as_resource(stage, None):
            disk._op("before-stage", stage)
            yield
            disk._op("after-stage", stage)
    except SafetensorError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            if f"os error {number})" in str(error):
                raise disk_error(number, stage) from error
        raise


def _strip_machine(disk: Disk, stage: Path) -> None:
    """Drop from the configs the path that the model was once loaded from."""
    for path in sorted(stage.rglob("*.json")):
        if path.name == "tokenizer.json" or path.name.endswith(".index.json"):
            continue
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and any(key in data for key in _MACHINE_KEYS):
            for key in _MACHINE_KEYS:
                data.pop(key, None)
            disk.write(path, manifest.canonical(data))


def _clear(disk: Disk, folder: Path, names: set[str], special: list[str], begun: bool) -> None:
    """Make room: an older artifact's manifest and leftovers go, somebody else's files are an error."""
    path = folder / manifest.NAME
    old = set(manifest.read(path).files) if path.is_file() and not path.is_symlink() else set()
    found, odd = manifest.list_files(folder)
    foreign = [*manifest.unlisted(found, names | old if begun or old else set()), *odd, *special]
    if foreign:
        raise InputError("the folder holds files that are not the artifact's", where=str(folder / foreign[0]),
                         why=f"{len(foreign)} such files", try_="choose an empty folder with -o")
    for name in sorted(old - names):
        disk.remove(folder / name)
    disk.remove(path)
