"""What the pictures of a pipeline follow from, as hashes: of the files of a folder, or of a pipeline object.

A wrong answer here would show the pictures of one model under the name of another. So what cannot be read off an
object (hooks of unknown code, a forward that was replaced, tensors of unknown kinds) is not guessed at: such a
pipeline has no digest, and its pictures are never used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush import loading
from bitbrush.errors import BitbrushError, InputError

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # what a folder's pictures can follow from
KNOWN = ("bitbrush", "accelerate", "diffusers", "transformers", "peft", "torch")  # whose hooks follow from the state
SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
CHUNK = 2**24  # numbers brought to the CPU at a time
DEPTH = 4
CONFIGS = {"config", "_internal_dict"}  # read for what they say, not for how their objects remember it
PASSING = {"said", "warned", "now", "position", "last"}  # of our clock and correction: where a call is, what was said


class Opaque(BitbrushError):
    """An object that cannot be hashed; the caller draws its pictures anew."""

    family = "cannot be hashed"


def text_digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError("a file cannot be read", where=str(path), why=error.strerror or str(error),
                         try_="check the path and its rights") from error


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of a pipeline folder's own files: its index and the parts named in it.

    Other files (other checkpoints, pictures, cards) say nothing of what is drawn. Without an index: all files.
    """
    index = folder / "model_index.json"
    parts: list[Path] = [folder]
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError("model_index.json is not JSON", where=str(index), why=str(error),
                             try_="download the model again") from error
        parts = [folder / name for name, value in named.items() if isinstance(value, list)]
    files = [file for part in parts for file in part.rglob("*") if file.is_file() and file.suffix in SUFFIXES]
    files += [index] if index.is_file() else []
    return text_digest({str(file.relative_to(folder)): file_digest(file) for file in sorted(set(files))})


def pipeline_digest(pipeline: Any) -> str:
    """SHA-256 over all that a pipeline holds: tensors, configs, tokenizers, how its layers are set.

    Packed layers of bitbrush, bitsandbytes, torchao, quanto, GGUF and SDNQ are hashed as they are stored.

    Raises:
        Opaque: A part holds something whose effect on the pictures cannot be read off it.
    """
    found = hashlib.sha256(type(pipeline).__name__.encode())
    for name, part in sorted(getattr(pipeline, "components", {}).items()):
        found.update(f"|{name}:{type(part).__qualname__}:{_words(getattr(part, 'config', {}))}".encode())
        if isinstance(part, nn.Module):
            found.update(module_digest(part).encode())
        elif hasattr(part, "get_vocab"):
            found.update(text_digest(part.get_vocab()).encode())
    return found.hexdigest()


def module_digest(module: nn.Module) -> str:
    """SHA-256 over a network: its layers, their settings, and every tensor as it is stored.

    Raises:
        Opaque: As for ``pipeline_digest``.
    """
    found = hashlib.sha256()
    for name, layer in module.named_modules():
        found.update(f"|{name}:{type(layer).__module__}.{type(layer).__qualname__}".encode())
        _check_hooks(name, layer)
        ours = type(layer).__module__.startswith("bitbrush")
        passing = PASSING if ours else set()
        left_out = {*passing, "_parameters", "_buffers", *CONFIGS}
        found.update(_words(getattr(layer, "config", {})).encode())
        values = {key: value for key, value in vars(layer).items() if key not in left_out}
        state = {**layer._parameters, **layer._buffers}
        values |= {key: value for key, value in state.items() if key not in passing and value is not None}
        for part in _parts(name, values, DEPTH):
            found.update(part)
    return found.hexdigest()


def _parts(where: str, values: Mapping[str, Any], depth: int) -> Iterator[bytes]:
    """Names and values: tensors by their bytes, simple values by their text, objects by what they hold."""
    for key, value in sorted(values.items(), key=lambda item: str(item[0])):
        if isinstance(value, Tensor):
            yield f"|{key}".encode()
            yield from tensor_parts(f"{where}.{key}", value)
        elif isinstance(value, (*SIMPLE, tuple, list, frozenset)) and not str(key).startswith("_hook"):
            if all(isinstance(each, SIMPLE) for each in (value if isinstance(value, (tuple, list)) else ())):
                yield f"|{key}={value!r}".encode()
        elif hasattr(value, "model_dump_json"):  # pydantic: the spec of a quantized layer
            yield f"|{key}={value.model_dump_json()}".encode()
        elif depth and _worth_looking_into(key, value):
            yield f"|{key}:{type(value).__qualname__}".encode()
            yield from _parts(f"{where}.{key}", vars(value), depth - 1)


def _worth_looking_into(key: object, value: object) -> bool:
    """Objects of a layer that are no part of a module's own machinery and no module (these are walked anyway)."""
    if str(key).startswith(("_modules", "_hf_hook", "_old_forward")) or isinstance(value, (nn.Module, type)):
        return False
    return hasattr(value, "__dict__") and not callable(value) and not type(value).__module__.startswith("torch.utils")


def tensor_parts(where: str, tensor: Tensor) -> Iterator[bytes]:
    """Shape, type and bytes of a tensor; of a tensor subclass those of the tensors that it is made of.

    Raises:
        Opaque: Its data are not there, or it is of an unknown kind.
    """
    yield f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode()
    if tensor.is_meta:
        raise Opaque("a tensor has no data here", where=where, why="it is on the device meta: offloaded, or never read")
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, context = flatten()
        yield repr(context).encode()
        for name in names:
            yield name.encode()
            yield from tensor_parts(f"{where}.{name}", getattr(tensor, name))
        return
    if type(tensor) not in PLAIN:  # bitsandbytes, GGUF: data, and what was hung onto the object
        if not isinstance(tensor, nn.Parameter):
            raise Opaque("a tensor of an unknown kind", where=where, why=f"{type(tensor).__qualname__} says nothing of "
                         "what it is made of (__tensor_flatten__)")
        yield from _parts(where, {k: v for k, v in vars(tensor).items() if k not in ("data", "grad")}, 2)
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    for part in flat.split(CHUNK):
        yield part.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _check_hooks(name: str, layer: nn.Module) -> None:
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for hook in getattr(layer, kind).values():
            function = hook
            while isinstance(function, partial):
                function = function.func
            module = getattr(function, "__module__", None) or ""
            if module.partition(".")[0] not in KNOWN:
                raise Opaque("a layer has a hook of unknown code", where=name or type(layer).__name__,
                             why=f"{module}.{getattr(function, '__qualname__', function)}")
    replaced = vars(layer).get("forward")
    if replaced is not None and not hasattr(layer, "_hf_hook"):  # accelerate's moves tensors, and says so
        raise Opaque("the forward of a layer was replaced", where=name or type(layer).__name__,
                     why=f"by {getattr(replaced, '__qualname__', replaced)}")


def _words(config: Any) -> str:
    if not hasattr(config, "to_dict") and not isinstance(config, Mapping):
        return ""
    return loading.config_text(config)
