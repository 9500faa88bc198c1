"""The vocabulary in which methods differ: grids, layer specs and plans. Pure data, JSON both ways.

A `Grid` says which numbers are representable. A `LayerSpec` says which grid a layer's weight and input use and how
their scales are partitioned:

    N   output rows            a scale a row, optionally bits a row (``WeightSpec.row_bits``)
    K   input channels         ``LayerSpec.segments``: consecutive channel counts after sorting by segment
    T   time buckets           ``ActivationSpec.timed``: a row of the scale table for each entry of ``Plan.timesteps``,
                               or for each group of them (``ActivationSpec.time_groups``)
    sample / token / pixel     scales found at run time (``mode = "dynamic"``)
    token_group                the same, one for every ``ActivationSpec.group`` consecutive channels of a token or pixel
    channel_group, pixel_group static scales of groups of any channels or pixels (``ActivationSpec.groups``)

Fields that no recipe of this release can run are carried because the format is written once; `LayerSpec.unsupported`
names them, and nothing ignores them silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)

GridKind = Literal["affine", "log2", "codebook"]
Scope = Literal["sample", "head", "tensor"]
Lookup = Literal["exact", "ceil", "nearest", "interpolate"]
Granularity = Literal["tensor", "sample", "token", "token_group", "channel", "pixel", "channel_group", "pixel_group"]
Fallback = Literal["refuse", "tensor"]
GROUPED = ("channel_group", "pixel_group")
"""Granularities whose table has a column a group; which group an index is in lies with the tables."""


class Grid(BaseModel):
    """Representable numbers ``(code - zero_point) * scale`` with ``code`` in ``0 .. 2**bits - 1``; of kind ``log2``
    ``delta * 2**-code``, for numbers from 0 to delta.

    Codes are always unsigned. ``signed`` fixes the zero-point at ``2**(bits-1)`` (a symmetric grid); otherwise the
    zero-point is an integer code chosen with the range, which always contains 0.
    """

    model_config = _FROZEN
    kind: GridKind = "affine"
    bits: int = Field(default=8, ge=1, le=8)
    signed: bool = False

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The fixed zero-point of a signed grid."""
        return 1 << (self.bits - 1)


class WeightSpec(BaseModel):
    """Grid and row partition of a layer's weight ``[N, C, kh, kw]`` (``[N, C]`` for linear layers).

    ``binary`` says what rows of 1 bit hold: ``affine`` {0, s} or {-s, 0}, as any other grid; ``symmetric`` {-s, +s},
    with the codes {0, 2} around the zero-point 1.

    On a grid of kind ``codebook`` every ``group`` of consecutive input channels is a sum of vectors, one from each of
    ``codebooks`` codebooks of ``2**grid.bits`` vectors, times a scale of its row (`bitbrush.numbers.codebook`).
    ``shared`` names the set of codebooks that this layer has in common with others; empty: its own.
    """

    model_config = _FROZEN
    grid: Grid = Grid(bits=4)
    granularity: Literal["row", "tensor"] = "row"
    row_bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = ()
    rounding: Literal["nearest", "offset"] = "nearest"
    binary: Literal["affine", "symmetric"] = "affine"
    codebooks: int = Field(default=0, ge=0, le=16)
    group: int = Field(default=8, ge=1, le=128)
    shared: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$", max_length=64)

    @property
    def additive(self) -> bool:
        """Whether the weight is stored as additive codebooks."""
        return self.grid.kind == "codebook"

    @property
    def table_shape(self) -> tuple[int, int, int]:
        """Shape of a set of codebooks, ``[K, 2**B, g]``."""
        return (self.codebooks, self.grid.levels, self.group)

    def halved(self, bits: int) -> bool:
        """Whether rows of ``bits`` bits are symmetric 1-bit rows, whose codes {0, 2} are stored as {0, 1}."""
        return bits == 1 and self.binary == "symmetric"

    def bit_classes(self) -> tuple[int, ...]:
        """Distinct bit widths of the rows, ascending."""
        return tuple(sorted(set(self.row_bits))) if self.row_bits else (self.grid.bits,)


class ActivationSpec(BaseModel):
    """Grid and partition of a layer's input (or output) activation.

    ``timed`` says that the scale table has one row for each timestep of the plan; ``time_bits`` gives bits a row (in
    the order of `Plan.timesteps`, ascending), where they are not those of ``grid``. ``time_groups`` gives the group of
    each timestep, in the same order: integers ``0 .. K-1``, each of them used; the table then has K rows, one a group.
    ``lookup`` says what a timestep outside the table means. ``scope`` says what shares the delta of a ``log2`` grid,
    the maximum of the values at hand: a ``sample``, a ``head`` of it, or the ``tensor``, all samples of a batch.

    With granularity ``channel_group`` or ``pixel_group`` (DGQ) the table has ``groups`` columns, each for any number of
    the input's channels or pixels; a tensor beside the tables says which. A pixel is a token of a linear layer or a
    place of a 1x1 convolution's input; ``pixels`` is how many of them there are, and ``fallback`` says what happens to
    an input with another number: ``refuse``, or ``tensor``, one scale that spans the ranges of all groups.

    ``groups_timed`` says that the groups, too, are those of a timestep: the tensor beside the tables then has one row
    for each. ``unfolded`` says that a convolution's input is quantized as its product sees it, a copy for every place
    of the kernel: a channel is one of (channel, kernel row, kernel column), a pixel one of the output's places, and
    what pads the picture is quantized with it. Both are how DGQ's authors simulate; no kernel has them.

    With granularity ``token_group`` every ``group`` consecutive channels of a token (of a pixel, where the input is a
    picture) have a scale, found at run time; the last group has what is left where the channels are not a multiple.
    """

    model_config = _FROZEN
    grid: Grid = Grid(bits=8)
    mode: Literal["static", "dynamic"] = "static"
    granularity: Granularity = "tensor"
    groups: int = Field(default=0, ge=0, le=256)
    pixels: int = Field(default=0, ge=0)
    fallback: Fallback = "refuse"
    groups_timed: bool = False
    unfolded: bool = False
    group: int = Field(default=0, ge=0, le=4096)
    position: Literal["input", "output"] = "input"
    timed: bool = False
    time_bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = ()
    time_groups: tuple[Annotated[int, Field(ge=0)], ...] = ()
    lookup: Lookup = "nearest"
    scope: Scope = "sample"

    def grids(self) -> tuple[Grid, ...]:
        """The grid of each row of the table: of every timestep with ``time_bits``, else one for all rows."""
        return tuple(self.grid.model_copy(update={"bits": bits}) for bits in self.time_bits) or (self.grid,)

    @property
    def most_bits(self) -> int:
        """Bits of the widest row."""
        return max(self.time_bits, default=self.grid.bits)

    @property
    def average_bits(self) -> float:
        """Bits of the rows, their mean: every timestep of the plan counts once."""
        return sum(self.time_bits) / len(self.time_bits) if self.time_bits else float(self.grid.bits)

    def table_rows(self, times: int) -> int:
        """Rows of the scale table on a grid of ``times`` timesteps: one, one a timestep, or one a group of them."""
        if not self.timed:
            return 1
        return max(self.time_groups) + 1 if self.time_groups else times

    def runnable_times(self, table: tuple[int, ...]) -> bool:
        """Whether something given a timestep (or nothing) belongs to a scale table that has rows over time."""
        return not table or (self.timed and self.mode == "static")

    def runnable_granularity(self) -> bool:
        """Whether this release has such scales: a tensor always, a sample or a token (or its groups) at run time only,
        channels and their groups static only."""
        if self.granularity in ("sample", "token", "token_group"):
            return self.mode == "dynamic"
        return self.granularity == "tensor" or (self.mode == "static" and self.granularity != "pixel")

    def runnable_groups(self) -> bool:
        """Whether the groups fit the granularity: at least one where there are groups, of a layer's input; a number of
        pixels where they are of pixels; a timestep's own only where scales are."""
        if self.groups_timed and not (self.timed and not self.time_groups):
            return False
        if self.granularity not in GROUPED:
            return not (self.groups or self.pixels or self.groups_timed)
        return self.groups > 0 and (self.pixels > 0) == (self.granularity == "pixel_group") and self.position == "input"

    def runnable_unfolded(self) -> bool:
        """Whether what is said of an unfolded input can be computed: static scales of the tensor or of groups."""
        static = self.mode == "static" and self.granularity in ("tensor", *GROUPED)
        return not self.unfolded or (static and self.position == "input")

    def runnable_group(self) -> bool:
        """Whether a group's size is given where there are groups of a token's channels, of a layer's input, and only
        there."""
        if self.granularity != "token_group":
            return self.group == 0
        return self.group > 0 and self.position == "input"

    def runnable_grid(self) -> bool:
        """Whether this release has such a grid: affine, or ``log2`` with one delta, found at run time or static (and
        timed, or not)."""
        if self.grid.kind != "log2":
            return self.grid.kind == "affine"
        plain = self.granularity == "tensor" and self.position == "input" and not self.grid.signed
        return plain and (not self.timed or self.mode == "static") and not (self.time_bits or self.time_groups)


class LayerSpec(BaseModel):
    """Everything static about how one layer, or one operand of attention, is quantized.

    ``exempt``: columns that stay float and have no part in the scale; this release can run ``(0,)``, the start token's,
    of a softmax on a ``log2`` grid, and of k, which has a row for each of those columns. ``low_rank``: rank of the
    16-bit branch beside the product, 0 where there is none.
    """

    model_config = _FROZEN
    weight: WeightSpec | None = None
    activation: ActivationSpec | None = None
    segments: tuple[int, ...] = ()
    sorted_channels: bool = False
    input_scale: bool = False
    low_rank: int = Field(default=0, ge=0)
    rotation: Literal["none", "hadamard"] = "none"
    exempt: tuple[int, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether anything in this layer leaves full precision."""
        return self.weight is not None or self.activation is not None

    def unsupported(self) -> list[str]:
        """Names of fields set to something this release cannot run."""
        log2 = self.activation is not None and self.activation.grid.kind == "log2"
        found = [
            ("sorted_channels", self.sorted_channels),
            ("rotation", self.rotation != "none" and (
                self.weight is None or self.weight.grid.kind != "affine" or len(self.segments) > 1)),
            ("rotation with low_rank", self.rotation != "none" and self.low_rank > 0),
            ("exempt", self.exempt not in ((), (0,)) or bool(self.exempt and (self.weight or not self.activation))),
            ("weight.grid.kind", self.weight is not None and self.weight.grid.kind == "log2"),
            ("activation.grid.kind", self.activation is not None and not self.activation.runnable_grid()),
            ("activation.scope", self.activation is not None and self.activation.scope != "sample" and not log2),
            ("activation.time_bits", self.activation is not None
             and not self.activation.runnable_times(self.activation.time_bits)),
            ("activation.time_groups", self.activation is not None
             and (not self.activation.runnable_times(self.activation.time_groups)
                  or bool(self.activation.time_groups and self.activation.time_bits))),
            ("activation.granularity", self.activation is not None and not self.activation.runnable_granularity()),
            ("activation.groups", self.activation is not None and not self.activation.runnable_groups()),
            ("activation.group", self.activation is not None and not self.activation.runnable_group()),
            ("activation.unfolded", self.activation is not None and not self.activation.runnable_unfolded()),
            ("activation.unfolded with segments, an input scale or a low-rank branch", self.activation is not None
             and self.activation.unfolded and (len(self.segments) > 1 or self.input_scale or self.low_rank > 0)),
            ("activation.groups with segments", self.activation is not None and len(self.segments) > 1
             and self.activation.granularity in GROUPED),
            ("activation.lookup", self.activation is not None and self.activation.lookup == "interpolate"),
        ]
        return [name for name, bad in found if bad]


class Plan(BaseModel):
    """Layer name to spec, in execution order, with the time grid that every timed table of the model shares."""

    model_config = _FROZEN
    layers: dict[str, LayerSpec] = Field(default_factory=dict)
    timesteps: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _ascending(self) -> Plan:
        if any(b <= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError("timesteps must be strictly ascending")
        return self

    def with_layers(self, changes: dict[str, LayerSpec]) -> Plan:
        """A plan in which the named layers' specs are replaced."""
        return self.model_copy(update={"layers": {**self.layers, **changes}})

    def to_json(self) -> dict[str, Any]:
        """Compact form: each distinct spec is written once, in the order of first use."""
        specs: list[dict[str, Any]] = []
        index: dict[str, int] = {}
        for name, spec in self.layers.items():
            data = _spec_json(spec)
            if data not in specs:
                specs.append(data)
            index[name] = specs.index(data)
        return {"specs": specs, "layers": index, "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_json`; raises ``ValueError`` with a key path on anything unknown."""
        for key in ("specs", "layers"):
            if key not in data:
                raise ValueError(f"{key}: missing")
        unknown = sorted(set(data) - {"specs", "layers", "timesteps"})
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown key")
        specs = [LayerSpec.model_validate(item, strict=False) for item in data["specs"]]
        layers = {}
        for name, i in data["layers"].items():
            if not isinstance(i, int) or not 0 <= i < len(specs):
                raise ValueError(f"layers.{name}: no spec number {i!r}")
            layers[name] = specs[i]
        return cls(layers=layers, timesteps=tuple(float(t) for t in data.get("timesteps", ())))


_SINCE = {
    "weight": {"binary": "affine", "codebooks": 0, "group": 8, "shared": ""},
    "activation": {"time_groups": [], "scope": "sample", "groups": 0, "pixels": 0, "fallback": "refuse", "group": 0,
                   "groups_timed": False, "unfolded": False},
}
"""What format 1 did not have from the start, with its defaults."""


def _spec_json(spec: LayerSpec) -> dict[str, Any]:
    """JSON of a spec. What came later is left out at its default: digests stay the same."""
    data = spec.model_dump(mode="json")
    for part, defaults in _SINCE.items():
        for name, default in defaults.items() if data[part] is not None else ():
            if data[part][name] == default:
                del data[part][name]
    return data
