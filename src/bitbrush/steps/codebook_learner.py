"""Codebooks and row scales trained with the codes fixed (VQDM section 3.6), behind a decode that is lean backwards.

    W[i, J_j] = h(s_i) * (h(C_1)[c_ij1] + ... + h(C_K)[c_ijK])

where h rounds to float16, as the tables are stored; its gradient is passed on unchanged. So the network that is trained
and measured is the one that is stored, bit for bit, and what beat the start before `harden` beats it after.

Autograd of the plain decode would keep K tensors of the weight's size a layer and add gradients to codewords in an
order that a GPU does not fix. `Decode` keeps the codes and the two tables: backwards it decodes again for the gradient
of the scales, and a codeword's is the sum over the sorted list of the groups that use it (`Users`).

Layers that share a set of codebooks are decoded together, up to `PART` groups at a time: layers are small, and what
takes time on a GPU is the number of kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.network.codebooks import NAME, Codebooks
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers.codebook import from_groups
from bitbrush.numbers.grid import LayerSpec, Plan
from bitbrush.steps.additive import Users

PART = 1 << 21
"""Groups that are decoded together, unless one layer has more."""


class CodebookSettings(Protocol):
    """What `CodebookLearner` reads from its step."""

    @property
    def codebooks(self) -> bool: ...
    @property
    def weight_scale(self) -> bool: ...
    @property
    def lr_codebooks(self) -> float: ...
    @property
    def lr_weight_scale(self) -> float: ...


class Part:
    """Layers on one set of codebooks, decoded together: P groups of R rows in all.

    Args:
        codes: ``[N, G, K]`` of each layer.
        words: Codewords of a codebook.
    """

    def __init__(self, codes: list[Tensor], words: int) -> None:
        self.users = Users.of(codes, words)
        self.shapes = [(code.shape[0], code.shape[1]) for code in codes]
        self.codes = torch.cat([code.flatten(0, 1) for code in codes]).T.contiguous()  # [K, P]
        device = self.codes.device
        groups = torch.tensor([g for n, g in self.shapes for _ in range(n)], device=device)
        rows = torch.arange(len(groups), dtype=torch.int32, device=device)
        self.row = rows.repeat_interleave(groups)  # [P]

    def add(self, books: Tensor) -> Tensor:
        """The groups without scales, ``[P, g]``: as `bitbrush.numbers.codebook.add_codewords`, in one buffer."""
        total = functional.embedding(self.codes[0].int(), books[0])
        for k in range(1, len(books)):
            total += functional.embedding(self.codes[k].int(), books[k])
        return total

    def by_row(self, values: Tensor) -> Tensor:
        """Sums of ``values`` ``[P]`` over the groups of each row, ``[R]``."""
        parts = values.split([n * g for n, g in self.shapes])
        return torch.cat([part.view(shape).sum(dim=1) for part, shape in zip(parts, self.shapes, strict=True)])

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """The layers' weights ``[N, G * g]`` of their groups ``[P, g]``."""
        parts = flat.split([n * g for n, g in self.shapes])
        return [part.reshape(n, -1) for part, (n, _) in zip(parts, self.shapes, strict=True)]


class Decode(torch.autograd.Function):
    """Codebooks ``[K, 2**B, g]`` and scales ``[R]``, float32, to the groups ``[P, g]`` of a part."""

    @staticmethod
    def forward(ctx: Any, books: Tensor, scales: Tensor, part: Part) -> Tensor:
        """The groups, with tables rounded as they will be stored."""
        books, scales = books.half().float(), scales.half().float()
        ctx.part = part
        ctx.save_for_backward(books, scales)
        return part.add(books).mul_(scales.index_select(0, part.row)[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Of the tables as if they were not rounded."""
        part: Part = ctx.part
        books, scales = ctx.saved_tensors
        grad, of_books, of_scales = grads[0], None, None
        if ctx.needs_input_grad[1]:
            of_scales = part.by_row(part.add(books).mul_(grad).sum(dim=1))
        if ctx.needs_input_grad[0]:
            slope = grad * scales.index_select(0, part.row)[:, None]
            of_books = part.users.sums(slope).reshape_as(books)
        return of_books, of_scales, None


@dataclass(frozen=True)
class _Set:
    """Layers on one set of codebooks, where the tables begin, and what is decoded together."""

    book: Codebooks
    layers: dict[str, CodebookLayer]
    values: Tensor
    scales: Tensor
    parts: list[tuple[Part, list[CodebookLayer]]]


class CodebookLearner:
    """Codebooks (each set once, however many layers share it) and row scales ``s = s0 * exp(theta)``.

    Args:
        layers: Layers with stored codes; of a shared set all of them.
        settings: Which of both, and the rates.
    """

    def __init__(self, layers: dict[str, CodebookLayer], settings: CodebookSettings) -> None:
        self.layers, self.settings = layers, settings
        self.sets = {key: _set(members) for key, members in sets_of(layers).items()}
        self.trained: dict[str, nn.Parameter] = {}
        for key, one in self.sets.items():
            if settings.codebooks:
                self.trained[f"codebooks/{key}"] = nn.Parameter(one.values.clone())
            if settings.weight_scale:
                self.trained[f"row_scale/{key}"] = nn.Parameter(torch.zeros_like(one.scales))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The codebooks of each set, and one theta a row, flat a set."""
        return self.trained

    def rates(self) -> dict[str, float]:
        """``lr_codebooks`` and ``lr_weight_scale``."""
        cfg = self.settings
        return {key: cfg.lr_codebooks if key.startswith("codebooks/") else cfg.lr_weight_scale for key in self.trained}

    def relax(self, progress: Tensor) -> Tensor:
        """Decoded weights with gradients into ``trial_weight``; no penalty."""
        for key, one in self.sets.items():
            books, scales = self._tables(key)
            rows = scales.split([sum(n for n, _ in part.shapes) for part, _ in one.parts])
            for (part, members), scale in zip(one.parts, rows, strict=True):
                flat: Tensor = Decode.apply(books, scale, part)
                for layer, matrix in zip(members, part.matrices(flat), strict=True):
                    layer.trial_weight = from_groups(matrix, layer.weight_shape)
        return torch.zeros((), device=progress.device)

    @torch.no_grad()
    def harden(self) -> dict[str, Any]:
        """Store the tables; how far the codebooks went, relative to their size, is a fact."""
        self.release()
        moved = whole = 0.0
        for key, one in self.sets.items():
            books, scales = self._tables(key)
            _store(one, books, scales)
            moved += float((books - one.values).double().square().sum())
            whole += float(one.values.double().square().sum())
        share = float(f"{(moved / max(whole, 1e-30)) ** 0.5:.3g}")
        return {"codebooks_moved": share} if self.settings.codebooks else {}

    def restore(self) -> None:
        """The tables as they were."""
        for one in self.sets.values():
            _store(one, one.values, one.scales)

    def release(self) -> None:
        """No relaxed weights stay behind."""
        for layer in self.layers.values():
            layer.trial_weight = None

    def result(self) -> dict[str, Tensor]:
        """``<set>/values`` of every set, by its place in the model, and ``<layer>/weight_scale``."""
        found = {f"{key}/values": one.book() for key, one in self.sets.items()}
        return found | {f"{name}/weight_scale": layer.weight_scale for name, layer in self.layers.items()}

    def _tables(self, key: str) -> tuple[Tensor, Tensor]:
        """Codebooks and scales of a set as they are now, not rounded."""
        one, theta = self.sets[key], self.trained.get(f"row_scale/{key}")
        books: Tensor = self.trained.get(f"codebooks/{key}", one.values)
        return books, one.scales if theta is None else one.scales * theta.exp()


def apply_codebooks(run: Run, tensors: dict[str, Tensor]) -> None:
    """Store what `CodebookLearner.result` names; the codes stay."""
    layers = run.layers()
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if kind == "values":
            book = run.model.get_submodule(name)
            if isinstance(book, Codebooks):
                book.set(tensor)
        elif kind == "weight_scale":
            layer = layers[name]
            if isinstance(layer, CodebookLayer):
                layer.set_codes(layer.stored_codes(), None, tensor)


def additive(spec: LayerSpec) -> bool:
    """Whether a layer's weight is additive codebooks."""
    return spec.weight is not None and spec.weight.additive


def additive_layers(layers: dict[str, QuantLayer]) -> dict[str, CodebookLayer]:
    """Those on additive codebooks."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, CodebookLayer)}


def sets_of(layers: dict[str, CodebookLayer]) -> dict[str, dict[str, CodebookLayer]]:
    """The layers by their set of codebooks, which is called by its place in the model."""
    found: dict[str, dict[str, CodebookLayer]] = {}
    for name, layer in layers.items():
        shared = layer.weight_spec.shared
        found.setdefault(f"{NAME}.{shared}" if shared else f"{name}.codebooks", {})[name] = layer
    return found


def check_sets(plan: Plan, chosen: Iterable[str], label: str) -> None:
    """Raise `InputError` where codebooks would be trained that a layer uses which is not to change."""
    given = set(chosen)
    owner = {s.weight.shared: n for n, s in plan.layers.items() if n in given and s.weight is not None}
    for name, spec in plan.layers.items():
        shared = spec.weight.shared if spec.weight is not None else ""
        if shared and shared in owner and name not in given:
            raise InputError(
                f"the layer is left alone, but its codebooks {shared!r} are to be trained", where=name,
                why=f"{owner[shared]} is on the same set, and step {label} trains that layer",
                try_=f"choose whole sets by layers and frozen, or --set {label}.codebooks=false",
            )


def _set(members: dict[str, CodebookLayer]) -> _Set:
    layers = list(members.values())
    book, spec = layers[0].book(), layers[0].weight_spec
    parts: list[list[CodebookLayer]] = [[]]
    filled = 0
    for layer in layers:
        size = layer.code_shape[0] * layer.code_shape[1]
        if parts[-1] and filled + size > PART:
            parts, filled = [*parts, []], 0
        parts[-1].append(layer)
        filled += size
    made = [(Part([layer.stored_codes() for layer in part], spec.grid.levels), part) for part in parts]
    scales = torch.cat([layer.weight_scale.float() for layer in layers])
    return _Set(book, members, book().float().clone(), scales, made)


def _store(one: _Set, books: Tensor, scales: Tensor) -> None:
    one.book.set(books)
    rows = scales.split([layer.out_channels_ for layer in one.layers.values()])
    for layer, scale in zip(one.layers.values(), rows, strict=True):
        layer.set_codes(layer.stored_codes(), None, scale)
