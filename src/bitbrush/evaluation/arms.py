"""The arms of an evaluation: a pipeline, the folder or name of one, or a function that returns one.

An arm is opened when its turn comes and let go of afterwards, so that one candidate is in memory at a time. What its
pictures follow from can be told of a folder without opening it.
"""

from __future__ import annotations

import gc
import inspect
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from bitbrush import kernels, loading
from bitbrush.artifact import manifest
from bitbrush.artifact.load import load
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.digests import Opaque, file_digest, folder_digest, pipeline_digest, text_digest
from bitbrush.evaluation.sampling import with_ddim
from bitbrush.network.pipelines import DENOISERS

Given = Any
"""A diffusers pipeline, a path, a hub id, or a function without arguments that returns a pipeline."""


class Arm:
    """One arm. Inside ``turn`` it may be opened; ``digest`` and ``pipeline`` open it where they must.

    Args:
        name: As the result calls it.
        given: What the caller gave.
        device: Where a path is opened; None: CUDA where there is one. Objects stay where they are.
        sampler: ``"own"``, or ``"ddim"``: unconditional pipelines are put under DDIM.
        kernel: What computes the packed layers of a result of bitbrush, as for `bitbrush.load`.
    """

    def __init__(
        self, name: str, given: Given, *, device: str | None = None, sampler: str = "own", kernel: str = "reference"
    ) -> None:
        self.name, self.given, self.sampler = name, given, sampler
        self.kernel = kernel if self.is_result else "reference"
        self.device = device or loading.default_device()
        self.opaque = ""  # why its pictures cannot be used again
        self._digest: str | None = None
        self._pipeline: Any = None

    @property
    def path(self) -> Path | None:
        """The folder or file that was given, if it is one."""
        return Path(self.given) if isinstance(self.given, str | Path) and Path(self.given).exists() else None

    @property
    def folder(self) -> Path | None:
        """The folder that was given, if it is one."""
        return self.path if self.path is not None and self.path.is_dir() else None

    @property
    def is_result(self) -> bool:
        """Whether a folder was given that bitbrush wrote."""
        return self.folder is not None and (self.folder / manifest.NAME).exists()

    def check(self, *, prompts: bool) -> None:
        """All that can be said before anything is drawn.

        Raises:
            InputError: It is none of the things that can be an arm, or takes prompts and has none, or the reverse.
            ArtifactError: The folder is an unfinished or damaged result.
        """
        if isinstance(self.given, str | Path):
            check_folder(str(self.given))
            _check_kind(self.name, Path(self.given), prompts)
        elif is_pipeline(self.given):
            check_prompts(self.name, type(self.given), prompts)
        elif isinstance(self.given, nn.Module) or not callable(self.given):
            raise InputError(
                "this cannot be evaluated", where=self.name,
                why=f"a {type(self.given).__name__} is no pipeline, no path and no function that returns a pipeline",
                try_="give the whole pipeline: pictures need its scheduler, decoder and text encoder",
            )  # fmt: skip

    @contextmanager
    def turn(self) -> Iterator[Arm]:
        """Inside the block the arm may be opened; when it ends, what was opened here is let go of."""
        try:
            yield self
        finally:
            opened, self._pipeline = self._pipeline is not None, None
            if opened and not is_pipeline(self.given):
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def pipeline(self) -> Any:
        """The pipeline, opened at the first call of a turn.

        Raises:
            InputError, ArtifactError: It cannot be opened.
        """
        if self._pipeline is None:
            self._pipeline = self._open()
        return self._pipeline

    def digest(self) -> str:
        """What the pictures of this arm follow from, as a hash; a random one where that cannot be told.

        Raises:
            InputError, ArtifactError: A file cannot be read, or a result's hashes are not those of its manifest.
        """
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def _open(self) -> Any:
        if isinstance(self.given, str | Path):
            found = open_pipeline(str(self.given), self.device, checked=self._digest is not None, kernel=self.kernel)
        elif is_pipeline(self.given):
            found = self.given
        else:
            found = self.given()
        if not is_pipeline(found):
            raise InputError("the function of an arm returned no pipeline", where=self.name,
                             why=f"it returned a {type(found).__name__}", try_="return a diffusers pipeline")
        return with_ddim(found) if self.sampler == "ddim" else found

    def _hash(self) -> str:
        folder = self.folder
        if folder is not None:
            if self.is_result:
                files = manifest.check(folder).files
                return text_digest(files if self.kernel == "reference" else {**files, "kernel": self.kernel})
            return folder_digest(folder)
        if isinstance(self.given, str | Path) and Path(self.given).is_file():
            return file_digest(Path(self.given))
        try:
            return pipeline_digest(self.pipeline())
        except Opaque as error:
            self.opaque = f"{error.what} ({error.where}: {error.why})"
            return f"never again: {uuid.uuid4().hex}"


def check_kernel(kernel: str, arms: Iterable[Arm], where: str) -> None:
    """Refuses a kernel that is not known, or that nothing would use.

    Raises:
        InputError: So.
    """
    kernels.known(kernel)
    if kernel != "reference" and not any(arm.is_result for arm in arms):
        raise InputError(f"kernel {kernel!r} has nothing to compute", where=where,
                         why="no candidate is a folder that bitbrush wrote", try_="leave it out, or give such a folder")


def is_pipeline(given: object) -> bool:
    """Whether something can draw by diffusers' protocol: called, with a denoiser and a scheduler."""
    denoiser = any(isinstance(getattr(given, name, None), nn.Module) for name in DENOISERS)
    return denoiser and callable(given) and hasattr(given, "scheduler") and not isinstance(given, nn.Module)


def check_prompts(name: str, kind: type, prompts: bool) -> None:
    """Refuses prompts for an unconditional kind of pipeline, and a text-to-image one without.

    Raises:
        InputError: They do not belong together.
    """
    if ("prompt" in inspect.signature(kind.__call__).parameters) != prompts:
        raise InputError(
            "the arm and the prompts do not belong together", where=name,
            why=f"{kind.__name__} {'takes no prompts' if prompts else 'needs prompts'}",
            try_="compare pipelines of one kind, and pass prompts for text-to-image only",
        )  # fmt: skip


def draws_from_text(name: str) -> bool:
    """Whether the pipeline of this name takes prompts, told by its index.

    Raises:
        InputError: It has no index that can be read.
    """
    path = Path(name)
    if path.is_file():
        return True  # single files are text-to-image checkpoints
    try:
        kind = getattr(diffusers, str(diffusers.DiffusionPipeline.load_config(name)["_class_name"]))
        return "prompt" in inspect.signature(kind.__call__).parameters
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError("the pipeline's index cannot be read", where=name, why=str(error)[:300],
                         try_="check that it is a diffusers pipeline") from error


def _check_kind(name: str, folder: Path, prompts: bool) -> None:
    """The same of a folder by its index; what cannot be told there shows when it is opened."""
    index = folder / "model_index.json"
    if index.is_file():
        with suppress(ValueError, AttributeError):
            kind = getattr(diffusers, str(json.loads(index.read_text(encoding="utf-8")).get("_class_name")), None)
            if isinstance(kind, type):
                check_prompts(name, kind, prompts)


def open_pipeline(name: str, device: str | None = None, *, checked: bool = False, **options: Any) -> Any:
    """A pipeline ready to draw: a bitbrush result with every hash checked, or any diffusers pipeline.

    One that somebody else quantized is opened as it is (``loading.open_model`` would refuse it).

    Args:
        name: Folder, hub id or single file.
        device: Where to; None: CUDA where there is one.
        checked: The hashes of a result were compared just now.
        options: For `bitbrush.load`: ``kernel``, ``graph``.

    Raises:
        InputError: Options for something that is no result of bitbrush; or there is no such pipeline, or diffusers
            cannot load it, or it is a model without its pipeline.
        ArtifactError: The folder is an unfinished, changed or foreign bitbrush result.
    """
    folder = Path(name)
    if (folder / manifest.NAME).exists():
        pipeline = load(folder, fast=checked, **options)
    elif (folder / ".run").is_dir():
        raise unfinished(name)
    elif options.get("kernel", "reference") != "reference" or options.get("graph"):
        raise InputError("a kernel or a graph is chosen for packed layers", where=name,
                         why="this is no folder that bitbrush wrote", try_="leave --kernel and --graph out")
    else:
        pipeline = loading.open_any(name).pipeline
    if not hasattr(pipeline, "set_progress_bar_config"):
        raise bare(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or loading.default_device())


def check_folder(name: str) -> None:
    """What can be said of a folder before minutes of drawing: it is whole by its manifest, and a pipeline.

    Raises:
        InputError, ArtifactError: It is not there, unfinished, truncated, or a model without its pipeline.
    """
    folder = Path(name)
    if (folder / manifest.NAME).exists():
        manifest.check(folder, fast=True)
    elif (folder / ".run").is_dir():
        raise unfinished(name)
    elif not folder.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError("no such result", where=name, why="there is no such folder", try_="check the path")
    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise bare(name)


def unfinished(name: str) -> ArtifactError:
    """The error for a run that was interrupted."""
    return ArtifactError("this result is not finished", where=name,
                         why="its run was interrupted: there is no manifest yet", try_=f"bitbrush resume {name}")


def bare(name: str) -> InputError:
    """The error for a denoiser without its pipeline."""
    return InputError("a bare model cannot draw", where=name,
                      why="pictures need the whole pipeline: scheduler, decoder, text encoder",
                      try_="put the model into its pipeline's folder and name that")


