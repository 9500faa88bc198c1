"""What is trained: rounding offsets (AdaRound), activation scales, several together. One interface for the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.layers import QuantLayer
from bitbrush.numbers import rounding
from bitbrush.numbers.codec import clamp, decode, encode_offset, reciprocal


class Learner(Protocol):
    """Parameters with a relaxed form for training and a hard form for keeping."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name."""

    def rates(self) -> dict[str, float]:
        """Learning rates relative to the budget's, by parameter; 1 where a name is missing."""

    def relax(self, progress: Tensor) -> Tensor:
        """Put the relaxed form into the modules; returns the penalty. ``progress`` = iteration / iterations."""

    def harden(self) -> dict[str, Any]:
        """Put the hard form into the modules; returns facts for the history."""

    def restore(self) -> None:
        """Put back what was there before training."""

    def release(self) -> None:
        """Drop training state."""

    def result(self) -> dict[str, Tensor]:
        """Tensors to journal, from the modules as they are now."""


class RoundingSettings(Protocol):
    """What `RoundingLearner` reads from its step."""

    @property
    def regularisation(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def beta_start(self) -> float: ...
    @property
    def beta_end(self) -> float: ...


class RoundingLearner:
    """AdaRound over the weights of several layers: ``floor(w / s) + h(alpha)``.

    The weights of all layers lie in one flat tensor, so an iteration takes the same few operations however many layers
    a block has. Symmetric 1-bit rows have nothing to decide: they keep their codes.

    Args:
        layers: Layers with fitted scales and nearest codes.
        settings: Factor and annealing of the regulariser.
    """

    def __init__(self, layers: dict[str, QuantLayer], settings: RoundingSettings) -> None:
        self.layers, self.settings = layers, settings
        self.start = {name: layer.stored_codes().clone() for name, layer in layers.items()}
        weights = {name: layer.scaled_weight() for name, layer in layers.items()}
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        scales = {name: layer.scale_tables() for name, layer in layers.items()}
        self.weight = _flat(weights.values())
        self.scale = _flat(scales[n][0].expand(self.shapes[n]) for n in layers)
        self.zero = _flat(scales[n][1].expand(self.shapes[n]) for n in layers)
        self.inverse = reciprocal(self.scale)
        tops = {name: torch.as_tensor(layer.top(), device=self.weight.device).float() for name, layer in layers.items()}
        self.top = _flat(tops[n].expand(self.shapes[n]) for n in layers)
        self.alpha = nn.Parameter(rounding.initial_alpha(self.weight, self.inverse))
        self.fixed = self._fixed()

    def parameters(self) -> dict[str, nn.Parameter]:
        """One alpha a weight, flat."""
        return {"alpha": self.alpha}

    def rates(self) -> dict[str, float]:
        """The budget's."""
        return {}

    def relax(self, progress: Tensor) -> Tensor:
        """Soft weights into ``trial_weight``; the regulariser as penalty."""
        cfg = self.settings
        done = ((progress - cfg.warmup) / max(1 - cfg.warmup, 1e-9)).clamp(0, 1)
        beta = cfg.beta_end + (cfg.beta_start - cfg.beta_end) * (1 - done)
        factor = torch.where(progress >= cfg.warmup, cfg.regularisation, 0.0)
        offset = rounding.rectified_sigmoid(self.alpha)
        soft = decode(self._codes(offset), self.scale, self.zero)
        for name, part in self._parts(soft).items():
            self.layers[name].trial_weight = part
        return factor * rounding.regulariser(offset, beta)

    def harden(self) -> dict[str, Any]:
        """Decide; store the codes."""
        soft = rounding.rectified_sigmoid(self.alpha.detach())
        decided = float(((soft < 0.05) | (soft > 0.95)).float().mean())
        codes = self._parts(self._codes(rounding.harden(self.alpha.detach())).to(torch.uint8))
        changed = sum(int((codes[name] != self.start[name]).sum()) for name in codes)
        for name, layer in self.layers.items():
            layer.trial_weight = None
            layer.codes = codes[name].clone()
        return {"decided": round(decided, 4), "codes_changed": round(changed / soft.numel(), 4)}

    def restore(self) -> None:
        """Nearest codes again."""
        for name, layer in self.layers.items():
            layer.codes = self.start[name]

    def release(self) -> None:
        """No relaxed weights stay behind."""
        for layer in self.layers.values():
            layer.trial_weight = None

    def result(self) -> dict[str, Tensor]:
        """The codes of every layer."""
        return {f"{name}/codes": layer.stored_codes() for name, layer in self.layers.items()}

    def _codes(self, offset: Tensor) -> Tensor:
        codes = encode_offset(self.weight, self.inverse, self.zero, self.top, offset)
        return codes if self.fixed is None else torch.where(self.fixed[0], self.fixed[1], codes)

    def _fixed(self) -> tuple[Tensor, Tensor] | None:
        """Where nothing is to be decided, and the codes there; None where everything is."""
        binary = {name: layer.binary_rows() for name, layer in self.layers.items()}
        if all(rows is None for rows in binary.values()):
            return None
        blank = torch.zeros((), dtype=torch.bool, device=self.weight.device)
        rows = (blank if binary[n] is None else binary[n] for n in self.layers)
        where = _flat(r.expand(shape) for r, shape in zip(rows, self.shapes.values(), strict=True) if r is not None)
        return where, _flat(self.start.values()).float()

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        return parts_of(flat, self.shapes)


def parts_of(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors that a flat one is made of, as views, by name."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def table_order(widths: Iterable[int], times: int) -> Tensor:
    """Where each entry of tables ``[T, S]``, in order, lies among their columns ``[C, T]`` (C: all S): int64."""
    given = list(widths)
    places = torch.arange(sum(given) * times).view(-1, times)
    return torch.cat([part.t().flatten() for part in places.split(given)])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


Tables = tuple[Tensor, Tensor, Tensor]
"""(scale, inverse scale, zero-point)."""


class SharedTables:
    """Tables of several static quantizers in one flat tensor, which hands every quantizer its rows.

    Reciprocals are taken once for all, and the rows of all timed tables are looked up together, once a call of the
    network: an iteration then takes the same few operations for this however many quantizers there are. Tables of
    groups of timesteps are among them, whatever their groups: where each entry lies at each timestep is known before.

    Args:
        quantizers: Static activation quantizers; their tables ``[T, S]`` follow each other, row by row.
    """

    def __init__(self, quantizers: Iterable[ActivationQuantizer]) -> None:
        self.quantizers = list(quantizers)
        self.shapes = [q.scale.shape for q in self.quantizers]
        ends = torch.tensor([shape.numel() for shape in self.shapes]).cumsum(0).tolist()
        self.starts = [end - shape.numel() for end, shape in zip(ends, self.shapes, strict=True)]
        self.flat: Tables | None = None
        self.whole: list[Tables] = []
        together: dict[tuple[int, str], list[int]] = {}
        for i, q in enumerate(self.quantizers):
            if q.clock is not None:
                together.setdefault((id(q.clock), q.spec.lookup), []).append(i)
        self.lookups = [self._lookup(members) for members in together.values()]
        self.lookup_of = {i: lookup for lookup in self.lookups for i in lookup.members}

    def put(self, scale: Tensor, zero_point: Tensor) -> None:
        """Flat scales and integer-valued zero-points, from now on used by the quantizers."""
        self.flat = (scale, reciprocal(scale.detach()), zero_point)
        sizes = [shape.numel() for shape in self.shapes]
        a, b, c = (t.split(sizes) for t in self.flat)
        self.whole = list(zip(a, b, c, strict=True))
        for lookup in self.lookups:
            lookup.forget()
        for i, quantizer in enumerate(self.quantizers):
            quantizer.trial_rows = partial(self.rows, i)

    def clear(self) -> None:
        """Quantizers use their own tables again; nothing of an iteration is kept."""
        self.flat, self.whole = None, []
        for lookup in self.lookups:
            lookup.forget()
        for quantizer in self.quantizers:
            quantizer.trial_rows = None

    def rows(self, i: int) -> Tables:
        """(scale, inverse scale, zero-point) of quantizer ``i``, ``[B or 1, S]`` each, at the time of this call."""
        lookup = self.lookup_of.get(i)
        if lookup is None:
            a, b, c = (part.view(self.shapes[i]) for part in self.whole[i])
            return a, b, c
        if self.flat is None:
            raise InternalError("the tables were cleared while a quantizer still asks for its rows")
        return lookup.rows(i, self.flat)

    def _lookup(self, members: list[int]) -> _Lookup:
        device = self.quantizers[members[0]].scale.device
        widths = [self.shapes[i][1] for i in members]
        start = torch.tensor([self.starts[i] + s for i in members for s in range(self.shapes[i][1])])[:, None]
        stride = torch.tensor([width for width in widths for _ in range(width)])[:, None]
        found = _Lookup(self.quantizers[members[0]], members, widths, start.to(device), stride.to(device))
        groups = [self.quantizers[i].spec.time_groups for i in members]
        if any(groups):
            times = max(self.shapes[i][0] if not own else len(own) for i, own in zip(members, groups, strict=True))
            row = torch.tensor([own or tuple(range(times)) for own in groups])  # [members, T]
            found.places = (start + row.repeat_interleave(torch.tensor(widths), dim=0) * stride).to(device)
        return found


@dataclass
class _Lookup:
    """Timed tables that are read at the same times: entry (t, s) of each lies at ``start[s] + t * stride[s]``; where
    any has a row a group of timesteps, at ``places[s, t]``."""

    quantizer: ActivationQuantizer
    members: list[int]
    widths: list[int]
    start: Tensor
    stride: Tensor
    places: Tensor | None = None
    now: tuple[Tensor, bool] | None = None
    found: dict[int, Tables] | None = None

    def rows(self, i: int, flat: Tables) -> Tables:
        """Those of quantizer ``i``; looked up for all of them when the time is another than at the last call."""
        clock = self.quantizer.clock
        now = None if clock is None else clock.now
        known = self.now is not None and self.now[0] is now and self.now[1] == torch.is_grad_enabled()
        if self.found is None or not known:
            row = self.quantizer.times()
            if row is None or now is None:
                raise InternalError("a quantizer without a clock was taken for a timed one")
            index = self.start + row * self.stride if self.places is None else self.places.index_select(1, row)
            taken = (t.index_select(0, index.flatten()).view(index.shape) for t in flat)
            a, b, c = ([part.t() for part in t.split(self.widths)] for t in taken)
            self.found = dict(zip(self.members, zip(a, b, c, strict=True), strict=True))
            self.now = (now, torch.is_grad_enabled())
        return self.found[i]

    def forget(self) -> None:
        """Look up again at the next call."""
        self.now = self.found = None


@contextmanager
def held_tables(quantizers: Iterable[ActivationQuantizer]) -> Iterator[None]:
    """Static quantizers whose tables do not move, used from one flat tensor (`SharedTables`) inside the block."""
    held = list(quantizers)
    if not held:
        yield
        return
    tables = SharedTables(held)
    tables.put(_flat(q.scale for q in held), _flat(q.zero_point.float() for q in held))
    try:
        yield
    finally:
        tables.clear()


class ScaleLearner:
    """Activation scales ``s = s0 * exp(theta)``: a learning rate relative to each scale (a choice of ours; the released
    codes train s itself, whose step then depends on the size of s). Zero-points, where wanted, are trained as numbers
    and rounded (straight-through) before every use; a symmetric grid's stay.

    The tables of all quantizers lie in one flat tensor. A row of a table that no sample looks up gets no gradient and
    so never moves.

    Args:
        quantizers: Static activation quantizers by name.
        zero_points: Train zero-points too.
        rate, zero_rate: Learning rates relative to the budget's.
    """

    def __init__(
        self, quantizers: dict[str, ActivationQuantizer], *, zero_points: bool = False, rate: float = 1.0,
        zero_rate: float = 1.0,
    ) -> None:
        self.quantizers = quantizers
        self.start = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in quantizers.items()}
        self.base = _flat(scale for scale, _ in self.start.values())
        self.theta = nn.Parameter(torch.zeros_like(self.base))
        self.moving = [n for n, q in quantizers.items() if zero_points and not q.spec.grid.signed]
        self.zero = nn.Parameter(_flat(self.start[n][1].float() for n in self.moving)) if self.moving else None
        self.factors = {"scale": rate, "zero_point": zero_rate}
        self.tables = SharedTables(quantizers.values())
        self.still = _flat(zero.float() for _, zero in self.start.values())
        tops = (torch.ones_like(self.start[n][0]) * quantizers[n].row_tops() for n in self.moving)
        self.tops = _flat(tops) if self.moving else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """One theta an entry of a scale table, flat; the zero-points, where they are trained."""
        return {"scale": self.theta} | ({} if self.zero is None else {"zero_point": self.zero})

    def rates(self) -> dict[str, float]:
        """Of scales and of zero-points."""
        return self.factors

    def relax(self, progress: Tensor) -> Tensor:
        """Trial tables into the quantizers; no penalty."""
        scales = self.base * self.theta.exp()
        for name, scale in self._parts(scales, list(self.quantizers)).items():
            self.quantizers[name].trial_scale = scale
        if self.zero is not None:
            for name, zero in self._parts(self.zero, self.moving).items():
                self.quantizers[name].trial_zero_point = zero
        self.tables.put(scales, self._zero_points())
        return torch.zeros((), device=progress.device)

    def harden(self) -> dict[str, Any]:
        """Store the trained tables."""
        self.release()
        zeros = {} if self.zero is None else self._parts(self.zero.detach(), self.moving)
        with torch.no_grad():
            scales = self._parts(self.base * self.theta.exp(), list(self.quantizers))
        for name, quantizer in self.quantizers.items():
            zero = clamp(torch.round(zeros[name]), quantizer.row_tops()) if name in zeros else None
            quantizer.set_scale(scales[name].clone(), zero)
        moved = sum(int((q.zero_point != self.start[n][1]).sum()) for n, q in self.quantizers.items())
        return {"zero_points_changed": moved} if self.moving else {}

    def restore(self) -> None:
        """The fitted tables again."""
        for name, quantizer in self.quantizers.items():
            quantizer.set_scale(*self.start[name])

    def release(self) -> None:
        """No trial tables stay behind."""
        self.tables.clear()
        for quantizer in self.quantizers.values():
            quantizer.trial_scale = quantizer.trial_zero_point = None

    def result(self) -> dict[str, Tensor]:
        """The tables: scales of all, zero-points of those whose zero-points are trained."""
        tensors = {f"{name}/scale": q.scale for name, q in self.quantizers.items()}
        return tensors | {f"{name}/zero_point": self.quantizers[name].zero_point for name in self.moving}

    def _zero_points(self) -> Tensor:
        """Of all quantizers, flat: the trained ones rounded (straight-through) and clamped to the codes."""
        if self.zero is None or self.tops is None:
            return self.still
        rounded = self.zero + (torch.round(self.zero) - self.zero).detach()
        trained = rounded.clamp(torch.zeros_like(self.tops), self.tops)
        if len(self.moving) == len(self.quantizers):
            return trained
        parts = self._parts(self.still, list(self.quantizers)) | self._parts(trained, self.moving)
        return _flat(parts.values())

    def _parts(self, flat: Tensor, names: list[str]) -> dict[str, Tensor]:
        return parts_of(flat, {name: self.start[name][0].shape for name in names})


class Together:
    """Several learners as one.

    Args:
        learners: Each trains parameters of other names.
    """

    def __init__(self, *learners: Learner) -> None:
        self.learners = learners

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of all."""
        return {name: p for learner in self.learners for name, p in learner.parameters().items()}

    def rates(self) -> dict[str, float]:
        """Those of all."""
        return {name: rate for learner in self.learners for name, rate in learner.rates().items()}

    def relax(self, progress: Tensor) -> Tensor:
        """Every relaxed form; the sum of the penalties."""
        return torch.stack([learner.relax(progress) for learner in self.learners]).sum()

    def harden(self) -> dict[str, Any]:
        """Every hard form; all facts."""
        return {name: fact for learner in self.learners for name, fact in learner.harden().items()}

    def restore(self) -> None:
        """Everything as before."""
        for learner in self.learners:
            learner.restore()

    def release(self) -> None:
        """No training state anywhere."""
        for learner in self.learners:
            learner.release()

    def result(self) -> dict[str, Tensor]:
        """All tensors."""
        return {name: tensor for learner in self.learners for name, tensor in learner.result().items()}
