"""Read an artifact: every hash first, then diffusers. No pickles, no code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from bitbrush import kernels
from bitbrush.artifact import manifest
from bitbrush.artifact.diffusers_plugin import drop_path, register
from bitbrush.errors import ArtifactError, InputError
from bitbrush.network import correction, graphs
from bitbrush.network.pipelines import DENOISERS

_LIBRARIES = ("diffusers", "transformers")


def load(
    folder: Path | str, *, fast: bool = False, kernel: str = "reference", graph: bool = False, **kwargs: Any
) -> Any:
    """Load a pipeline or a bare denoiser, packed as it was saved.

    Args:
        folder: The artifact.
        fast: Compare file sizes with the manifest, not hashes.
        kernel: What computes the packed layers: ``reference``, on any device what was simulated, bit for bit;
            ``auto``, the best kernel of the device that a call runs on; or the name of one (`bitbrush doctor` lists
            them). Layers that it cannot run keep the reference.
        graph: On CUDA, answer the denoiser's calls by CUDA graphs (`bitbrush.network.graphs`): without, the host takes
            longer to launch a packed network's kernels than the GPU to run them.
        kwargs: For ``from_pretrained``: ``torch_dtype``, ``device_map``, ...

    Raises:
        InputError: No such folder, or an option that would run code from it.
        ArtifactError: See `manifest.check`; also an index that names classes outside diffusers and transformers.
    """
    folder = Path(folder)
    _check_options(kwargs)
    kernels.known(kernel)
    listed = manifest.check(folder, fast=fast)
    _check_configs(folder, listed)
    register()
    index = _json(folder / "model_index.json") if "model_index.json" in listed.files else None
    if index is None:
        loaded = _model_class(folder).from_pretrained(str(folder), use_safetensors=True, **kwargs)
    else:
        _check_index(folder, index)
        loaded = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **kwargs)
    for part in [loaded, *getattr(loaded, "components", {}).values()]:
        drop_path(part)
    denoisers = [part for name in DENOISERS if (part := getattr(loaded, name, None)) is not None]
    for denoiser in denoisers or [loaded]:
        kernels.use(denoiser, kernel)
        if graph:
            graphs.enable(denoiser)
    found = [correction.find(denoiser) for denoiser in denoisers]
    for each in (each for each in found if each is not None):
        each.watch(loaded)
    return loaded


def _check_options(kwargs: dict[str, Any]) -> None:
    asked = [name for name in ("trust_" + "remote_code", "custom_pipeline", "custom_revision") if kwargs.get(name)]
    asked += ["use_safetensors"] if kwargs.pop("use_safetensors", True) is not True else []
    if asked:
        raise InputError(f"{asked[0]} is not allowed", why="an artifact is data; loading it runs no code from it",
                         try_="leave the option out, or call diffusers' from_pretrained yourself")


def _check_configs(folder: Path, listed: manifest.Manifest) -> None:
    for name in listed.files:
        if name.endswith("config.json") and "auto_map" in _json(folder / name):
            raise _code(folder / name, "auto_map names code to import")


def _check_index(folder: Path, index: dict[str, Any]) -> None:
    path = folder / "model_index.json"
    name = index.get("_class_name")
    if not isinstance(name, str) or not _is_class(getattr(diffusers, name, None), DiffusionPipeline):
        raise _code(path, f"_class_name: {str(name)[:80]!r} is not a pipeline of diffusers")
    for key, value in index.items():
        if not isinstance(value, list):
            continue
        if len(value) != 2 or not all(item is None or isinstance(item, str) for item in value):
            raise _code(path, f"{key}: {str(value)[:80]} is not a library and a class")
        library = value[0]
        if library is not None and library not in _LIBRARIES and not _inside(library):
            raise _code(path, f"{key}: library {library[:80]!r}")
        if library == "diffusers" and not hasattr(diffusers, str(value[1])):
            raise _code(path, f"{key}: class {str(value[1])[:80]!r}")


def _inside(library: str) -> bool:
    """Whether a library is a module of diffusers' own pipelines (a safety checker names one)."""
    return library.isidentifier() and hasattr(diffusers.pipelines, library)


def _model_class(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError("neither a pipeline nor a model", where=str(folder),
                            why="there is no model_index.json and no config.json", try_="copy the artifact again")
    name = _json(path).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not _is_class(found, ModelMixin):
        raise _code(path, f"_class_name: {str(name)[:80]!r} is not a model of diffusers")
    return found


def _is_class(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _json(path: Path) -> dict[str, Any]:
    data = manifest.parse(path.read_bytes(), path)
    if not isinstance(data, dict):
        raise manifest.malformed(path, "the top level is not an object")
    return data


def _code(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path.name} names a class outside diffusers and transformers", where=str(path), why=why,
                         try_="get the artifact from somebody you trust; code is never loaded from it")
