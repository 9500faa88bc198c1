"""Tensors and JSON in one piece of bytes that shows damage: a safetensors file and the SHA-256 of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


def seal(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """The bytes."""
    body = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytes(save(body, metadata={"facts": json.dumps(facts, sort_keys=True)}))
    return data + hashlib.sha256(data).digest()


def unseal(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, facts), or None where the bytes are not what `seal` made."""
    body, digest = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        return load(body), json.loads(header["__metadata__"]["facts"])
    except (SafetensorError, KeyError, ValueError):
        return None
