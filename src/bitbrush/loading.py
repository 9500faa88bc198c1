"""Open what a user names: a pipeline folder or hub id, a bare model folder, a single-file checkpoint.

Only safetensors are read, no code from a model folder is run, and a missing or half folder is an error in four parts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from bitbrush.errors import ArtifactError, InputError
from bitbrush.network.pipelines import denoiser_name, text_tokens
from bitbrush.network.survey import FAMILIES
from bitbrush.network.wrap import layers

UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
"""What diffusers and transformers raise for a folder that is not whole."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass
class Opened:
    """A denoiser, its pipeline (None for a bare model), and where it came from."""

    model: nn.Module
    pipeline: Any
    source: str

    @property
    def tokens(self) -> int:
        """Length of the text condition."""
        return text_tokens(self.pipeline) if self.pipeline is not None else 77


def open_model(target: Any, device: str | None = None) -> Opened:
    """Open a path, hub id, pipeline or model.

    Args:
        target: Folder or hub id of a pipeline, bare model folder, ``.safetensors`` file, pipeline object or denoiser.
        device: Where to put it; None: CUDA when torch sees it, else the CPU. Objects stay where they are unless given.
    """
    if isinstance(target, str | Path):
        opened = _open_path(str(target))
        device = device or default_device()
    elif isinstance(target, nn.Module):
        opened = Opened(target, None, f"a {type(target).__name__} object")
    else:
        name = denoiser_name(target)
        opened = Opened(getattr(target, name), target, f"a {type(target).__name__} object")
    if getattr(opened.model, "quantization_method", None) is not None or layers(opened.model):
        raise InputError("the model is already quantized", where=opened.source,
                         why="a second rounding would compound the first; a run changes the model object it is given, "
                         "an interrupted run too", try_="load the float model again")
    _check_whole(opened)
    if device is not None:
        (opened.pipeline or opened.model).to(device)
    opened.model.eval().requires_grad_(False)
    return opened


def default_device() -> str:
    """CUDA when torch sees it, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_any(name: str) -> Opened:
    """Open a path or hub id to draw with, quantized by whom it may be, on the CPU or where its own loader puts it."""
    opened = _open_path(name)
    _check_whole(opened)
    return opened


def _check_whole(opened: Opened) -> None:
    """Diffusers leaves weights that a file lacks without data, and only warns."""
    parts = opened.pipeline.components if opened.pipeline is not None else {"model": opened.model}
    for part, module in parts.items():
        lost = [n for n, p in module.named_parameters() if p.is_meta] if isinstance(module, nn.Module) else []
        if lost:
            raise InputError(f"{len(lost)} weights of {part} are missing, first: {lost[0]}", where=opened.source,
                             why="the weights file does not hold them", try_="download the model again")


def _open_path(name: str) -> Opened:
    from diffusers import DiffusionPipeline

    path = Path(name)
    if path.is_file():
        return _single_file(path)
    if path.is_dir() and not (path / "model_index.json").exists():
        return _bare(path)
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError("no such model", where=name, why="neither a folder nor a hub id (owner/name)",
                         try_="check the path")
    try:
        if path.is_dir():
            _check_components(path)
        pipeline = DiffusionPipeline.from_pretrained(name, use_safetensors=True)
    except UNLOADABLE as error:
        raise InputError("the pipeline cannot be loaded", where=name, why=_first_line(error),
                         try_="check that the folder is whole: every component of model_index.json, as safetensors"
                         ) from error
    return Opened(getattr(pipeline, denoiser_name(pipeline)), pipeline, name)


def _check_components(path: Path) -> None:
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("model_index.json is not JSON", where=str(path), why=_first_line(error),
                         try_="download the model again") from error
    for key, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        if not (path / key).is_dir():
            raise InputError(f"the model folder lacks {key}/", where=str(path), why="model_index.json names it",
                             try_="download the model again")
        if value[0] not in ("diffusers", "transformers"):
            raise InputError(f"component {key} comes from {value[0]!r}", where=str(path / "model_index.json"),
                             why="only classes of diffusers and transformers are loaded, no code from a model folder",
                             try_="use a pipeline without custom components")
        _refuse_pickle(path / key)


def _refuse_pickle(folder: Path) -> None:
    pickles = [p for p in folder.iterdir() if p.suffix in PICKLES]
    if pickles and not list(folder.glob("*.safetensors")):
        raise InputError("only a pickle is there where safetensors belong", where=str(pickles[0]),
                         why="a pickle can run code when it is loaded, so it never is",
                         try_="convert the weights to safetensors (save_pretrained does)")


def _bare(path: Path) -> Opened:
    import diffusers

    config = path / "config.json"
    if not config.exists():
        raise InputError("this is not a diffusers model or pipeline", where=str(path),
                         why="there is neither model_index.json nor config.json", try_="check the path")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        name = data.get("_class_name") if isinstance(data, dict) else None
    except ValueError as error:
        raise InputError("config.json is not JSON", where=str(config), why=_first_line(error),
                         try_="download the model again") from error
    if name not in FAMILIES:
        raise InputError(f"a {name} cannot be quantized by this release", where=str(config),
                         why=f"known: {', '.join(FAMILIES)}", try_="use a pipeline with a UNet")
    _refuse_pickle(path)
    try:
        model = getattr(diffusers, name).from_pretrained(path, use_safetensors=True)
    except UNLOADABLE as error:
        raise InputError("the model cannot be loaded", where=str(path), why=_first_line(error),
                         try_="check that the folder is whole") from error
    return Opened(model, None, str(path))


def _single_file(path: Path) -> Opened:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        raise InputError("only .safetensors checkpoints are read", where=str(path),
                         why="other formats are pickles, which can run code when they are loaded",
                         try_="convert the checkpoint to safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            large = any(key.startswith("conditioner.embedders.1.") for key in file.keys())  # noqa: SIM118
        kind = StableDiffusionXLPipeline if large else StableDiffusionPipeline
        pipeline = kind.from_single_file(str(path))
    except UNLOADABLE as error:
        raise InputError("the single-file checkpoint cannot be loaded", where=str(path), why=_first_line(error),
                         try_="use a diffusers folder of the same model") from error
    return Opened(pipeline.unet, pipeline, str(path))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def config_text(config: Any) -> str:
    """What a config says, as JSON, without what begins with an underscore, such as where it was loaded from."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps({k: v for k, v in plain.items() if not str(k).startswith("_")}, sort_keys=True, default=str)


def content(part: Any) -> str:
    """SHA-256 over the config and the tensors of a pipeline's component."""
    found = hashlib.sha256(f"{type(part).__name__} {config_text(getattr(part, 'config', {}))}".encode())
    for name, tensor in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else []:
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def refuse_foreign(path: Path) -> None:
    """Raise unless ``path`` is a finished artifact."""
    if not (path / "bitbrush.json").exists():
        raise ArtifactError("this folder is not a bitbrush artifact", where=str(path), why="bitbrush.json is missing",
                            try_=f"bitbrush resume {path}" if (path / ".run").exists() else "bitbrush quantize")
