"""Weights below 8 bits of a block's layers, unpacked by one launch.

A layer's weight is unpacked right before its product. In small networks that takes as long as an empty launch: 120 of
them are a fifth of the step of a DiT with 4 bits. Here a block unpacks what all its layers need when it begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbrush.kernels import direct, gpu, int8_ops  # noqa: F401 - its operations are registered by their module
from bitbrush.kernels.joined import Joined

MOST = 1 << 24
"""Bytes that a block may unpack at once: the second level of the cache holds them until they are multiplied, and in a
larger block an empty launch weighs little."""


Held = dict[int, Tensor]
"""int8 ``[N, K]`` of what a block has unpacked at once, by the identity of a layer, or of joined layers."""


class Together(NamedTuple):
    """What a block unpacks at once.

    Attributes:
        members: Layers, or several joined to one product.
        bits, halved: Of all of them; see `bitbrush.kernels.joined.Joined`.
        channels: Of the rows of each.
    """

    members: tuple[Any, ...]
    bits: int
    halved: bool
    channels: list[int]


class _Rows(NamedTuple):
    """Packed rows of a member."""

    codes: Tensor
    zero_point: Tensor
    channels: int


def together(members: Iterable[Any]) -> Together | None:
    """What can be unpacked at once of layers and joined layers; None where that is less than two."""
    kinds: dict[tuple[int, bool], list[Any]] = {}
    for member in members:
        kind = _kind(member)
        if kind is not None:
            kinds.setdefault(kind, []).append(member)
    (bits, halved), found = max(kinds.items(), key=lambda kind: len(kind[1]), default=((0, False), []))
    rows = [_rows(member, bits) for member in found]
    if len(found) < 2 or sum(len(each.codes) * each.channels for each in rows) > MOST:
        return None
    return Together(tuple(found), bits, halved, [each.channels for each in rows])


def held(found: Together | None, like: Tensor) -> Held:
    """The weights of all members; none where they lie elsewhere (offloading), and in a graph that is compiled, which
    would be compiled again for other objects."""
    if found is None or torch.compiler.is_compiling():
        return {}
    rows = [_rows(member, found.bits) for member in found.members]
    if any(each.codes.device != like.device for each in rows):
        return {}
    codes, zeros, _ = zip(*rows, strict=True)
    made = direct.OPS.int8_weights(like, list(codes), list(zeros), found.channels, found.bits, found.halved)
    return {id(member): weight for member, weight in zip(found.members, made, strict=True)}


def of(held: Held, member: Any) -> Tensor | None:
    """The weight of a member, if it is there."""
    return held.get(id(member)) if held else None


def _kind(member: Any) -> tuple[int, bool] | None:
    """(bits, halved), or None where a member is unpacked by itself: of 8 bits, of rows of their own or convolved, or of
    several sums."""
    if isinstance(member, Joined):
        plain = member.bits < 8 and member.columns is None and len(member.segments) == 1
        return (member.bits, member.halved) if plain else None
    spec = member.spec.weight if hasattr(member, "declare_packed") else None
    if spec is None or isinstance(member, nn.Conv2d) or spec.row_bits or len(spec.bit_classes()) > 1:
        return None
    (bits,) = spec.bit_classes()
    return None if bits == 8 or gpu.facts(member).grouped or gpu.several(member) else (bits, bool(spec.halved(1)))


def _rows(member: Any, bits: int) -> _Rows:
    if isinstance(member, Joined):
        return _Rows(member.codes, member.zero_point, member.segments[0])
    own = member._buffers
    return _Rows(own[f"codes{bits}"], own["weight_zero_point"], member.in_channels_)
