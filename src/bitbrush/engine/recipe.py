"""Recipes: TOML in, a checked `Recipe` out, before any model is loaded.

    name = "mine"
    base = "qdiffusion"                      # inherit another recipe: layers are merged, steps replaced if given
    weights = 4                              # default bits; the command line's --weights goes first
    activations = 8
    [layers]                                 # pattern (fnmatch, "|" for or) -> rule; later rules override earlier ones
    "*" = { weight = {}, activation = {} }   # {} = the run's bits; "float" = leave in full precision
    "conv_in | conv_out" = { weight = { bits = 8, signed = true } }
    "*:softmax" = { activation = { bits = 8 } }   # attention operands are named <attention>:q, :k, :v, :softmax
    "*.to_k | *.to_v" = { weight = { grid = "codebook", codebooks = 3, bits = 8, shared = "text" } }
    "*attn1:softmax" = { activation = { bits = 4, mode = "dynamic", grid = "log2" } }
    "*attn2:softmax" = { activation = { bits = 4, mode = "dynamic", grid = "log2", exempt = [0] } }
    [[step]]
    do = "calibrate"
    [preset.demo.set]                        # what `--preset demo` changes, in the form of --set
    "weights.iterations" = 100

Unknown keys are errors that name the nearest valid one. Nothing in a recipe is executed.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitbrush.engine.step import Step
from bitbrush.errors import InputError
from bitbrush.numbers.grid import Lookup, Scope

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
FLOAT_BITS = 16
_FORMS: dict[str, tuple[type, str]] = {
    "base": (str, "expected the name or path of a recipe"),
    "layers": (dict, "expected a table: [layers]"),
    "step": (list, "expected tables: [[step]]"),
    "preset": (dict, "expected tables: [preset.NAME.set] or [preset.NAME.layers]"),
    "set": (dict, "expected a table: [set]"),
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "tac": {"method": "tac"},
    "tac-state": {
        "method": "tac", "fit": "state", "significance": 2.0, "l1": 0.0, "l2": 0.0, "tau": 0.0, "clamp": 1.05,
    },
    "tac-even": {"method": "tac", "fit": "even", "significance": 2.0, "clamp": 1.2},
    "tac-mean": {"method": "tac", "fit": "even", "significance": 2.0, "clamp": 1.0},
    "tac-auto": {"method": "tac", "fit": "auto"},
}
"""What ``--correct NAME`` sets in the step ``correct``; the rest is as its defaults say."""


class WeightRule(BaseModel):
    """What a pattern says of weights. ``bits`` left out means the run's ``--weights``.

    ``binary`` says how rows of 1 bit are represented: ``affine`` (0 and one more value) or ``symmetric`` (-s, +s).

    ``grid = "codebook"``: additive codebooks, each group of ``group`` input channels a sum of one vector from each of
    ``codebooks`` codebooks of ``2**bits`` vectors. There ``bits`` left out means 8, and ``codebooks`` left out as many
    as make the run's ``--weights`` bits a weight. Layers that name the same set under ``shared`` have it in common.

    ``share`` forms sets by itself: ``layer`` gives every layer its own; ``shape`` lets layers of one shape in one block
    of the network have a set in common, ``block`` any layers there, those of one shape or kind first, until all sets
    together add no more than ``table_bits`` bits a weight (`bitbrush.engine.codebook_sets`).
    """

    model_config = _STRICT
    bits: int | None = Field(default=None, ge=1, le=8)
    signed: bool = False
    granularity: Literal["row", "tensor"] = "row"
    binary: Literal["affine", "symmetric"] = "affine"
    grid: Literal["affine", "codebook"] = "affine"
    codebooks: int | None = Field(default=None, ge=1, le=16)
    group: int = Field(default=8, ge=1, le=128)
    shared: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$", max_length=64)
    share: Literal["layer", "shape", "block"] = "layer"
    table_bits: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _sharing(self) -> WeightRule:
        if self.share != "layer" and (self.shared or self.grid != "codebook"):
            raise ValueError("share forms sets of additive codebooks: it needs grid = codebook, and no set by name")
        return self


class ActivationRule(BaseModel):
    """What a pattern says of inputs. ``bits`` left out means the run's ``--activations``.

    ``granularity``: one scale a tensor, a sample or a token (both found at run time: ``mode = "dynamic"``), or an input
    channel (``mode = "static"``; simulated only, no integer product can factor such scales out); with ``token_group``
    one for every ``group`` consecutive channels of a token or pixel (``mode = "dynamic"``; 64 where it is left out).

    ``unfolded``: inputs of convolutions wider than 1x1 are quantized as their product sees them, a copy for every place
    of the kernel, as DGQ's authors do (simulated only); other layers do not mind.

    Of the softmax of attention (``*:softmax``) with ``mode = "dynamic"``: ``grid = "log2"`` for powers of two times
    delta, the largest value of what ``scope`` names: a ``sample``, a ``head`` of it, or the ``tensor`` (a picture then
    depends on its neighbours in the batch). ``exempt = [0]`` leaves the start token's column float, and out of delta,
    where the text encoder begins every prompt with one.
    """

    model_config = _STRICT
    bits: int | None = Field(default=None, ge=1, le=8)
    signed: bool = False
    mode: Literal["static", "dynamic"] = "static"
    granularity: Literal["tensor", "sample", "token", "token_group", "channel"] = "tensor"
    group: int | None = Field(default=None, ge=1, le=4096)
    position: Literal["input", "output"] = "input"
    timed: bool = False
    unfolded: bool = False
    lookup: Lookup = "nearest"
    grid: Literal["affine", "log2"] = "affine"
    scope: Scope = "sample"
    exempt: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = Field(default=(), strict=False)  # TOML has lists


class LayerRule(BaseModel):
    """One line of ``[layers]``. ``optional`` allows the pattern to match nothing."""

    model_config = _STRICT
    weight: WeightRule | Literal["float"] | None = None
    activation: ActivationRule | Literal["float"] | None = None
    optional: bool = False
    why: str = ""


class Recipe(BaseModel):
    """A checked recipe: bits, layer rules and steps, fully expanded."""

    model_config = _STRICT
    name: str
    title: str = ""
    paper: str = ""
    notes: str = ""
    weights: int = 4
    activations: int = 8
    layers: dict[str, LayerRule] = Field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    def needs_data(self) -> bool:
        """Whether a step samples from the pipeline (a bare model folder is not enough then)."""
        return any(step.do == "calibrate" for step in self.steps)

    def prompts_needed(self) -> int:
        """Prompts that the steps want."""
        return max([step.needs_prompts() for step in self.steps], default=0)

    def to_dict(self) -> dict[str, Any]:
        """Fully expanded, JSON-able, with every default written out."""
        data = self.model_dump(mode="json", exclude={"steps"})
        data["step"] = [step.model_dump(mode="json") for step in self.steps]
        return data

    def to_toml(self) -> str:
        """The fully expanded recipe as TOML; loading it gives this recipe again."""
        head = {k: v for k, v in self.to_dict().items() if k not in ("layers", "step")}
        lines = [f"{k} = {toml_value(v)}" for k, v in head.items()]
        lines += ["", "[layers]"]
        for pattern, rule in self.layers.items():
            data = rule.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
            lines.append(f"{toml_value(pattern)} = {toml_value(data)}")
        for step in self.steps:
            lines += ["", "[[step]]"]
            lines += [f"{k} = {toml_value(v)}" for k, v in step.model_dump(mode="json").items() if v is not None]
        return "\n".join(lines) + "\n"


def load_recipe(
    source: str | Path, step_types: dict[str, type[Step]], *, weights: int | None = None,
    activations: int | None = None, preset: str | None = None, settings: dict[str, Any] | None = None,
    correct: str | None = None,
) -> Recipe:
    """Read a bundled recipe by name, or a TOML file by path, and check everything in it.

    Args:
        source: Name (``qdiffusion``) or path (``my.toml``).
        step_types: Step name to class.
        weights, activations: Bits that override the recipe's; 1 to 8, or 16 for float.
        preset: Name of a ``[preset.NAME]`` table.
        settings: ``{"step.key": value}``, applied last.
        correct: Correction to add (a name in `CORRECTIONS`): its steps join the recipe's.
    """
    data = _inherited(source, ())
    presets = data.pop("preset", {})
    if preset is not None:
        if preset not in presets:
            raise InputError(f"recipe {data.get('name')!r} has no preset {preset!r}", why=_nearest(preset, presets),
                             try_=f"bitbrush recipes show {data.get('name')}")
        data = _with_preset(data, presets[preset])
    for key, value in (("weights", weights), ("activations", activations)):
        if value is not None:
            data[key] = value
        _check_bits(key, data.get(key, 8))
    steps = [dict(item) for item in data.pop("step", [])]
    if correct is not None:
        steps = _with_correction(steps, correct, f"recipe {data.get('name', source)}")
    _apply_settings(steps, settings or {}, step_types)
    recipe: Recipe = _validated(Recipe, {**data, "steps": ()}, f"recipe {data.get('name', source)}")
    recipe = recipe.model_copy(update={"steps": tuple(_step(item, i, step_types) for i, item in enumerate(steps))})
    check_order(recipe)
    return recipe


def check_order(recipe: Recipe) -> None:
    """Raise `InputError` for steps that cannot work in this order, before anything slow starts."""
    where, labels, done = f"recipe {recipe.name}", set[str](), set[str]()
    spare = _unneeded(recipe)
    for step in recipe.steps:
        if step.label in labels:
            raise InputError(f"two steps are called {step.label!r}", where=where, why="results are kept by step name",
                             try_='give each an id of its own: id = "..."')
        missing = [name for name in step.needs if name not in done | spare]
        late = [name for name in step.not_after if name in done]
        if missing or late:
            what = f"needs a step {missing[0]!r} before it" if missing else f"must come before the step {late[0]!r}"
            like = "vqdm" if "codebooks" in (*missing, *late) else "qdiffusion"
            raise InputError(f"step {step.label!r} {what}", where=where,
                             why=f"before it come: {', '.join(sorted(done)) or 'no steps'}",
                             try_=f"compare with `bitbrush recipes show {like}`")
        labels.add(step.label)
        done.add(step.kind)
    _check_allocation(recipe, where)
    if "pack" in done and "calibrate" not in done and any(rule.timed for rule in _activations(recipe)):
        raise InputError("scales a timestep need a calibrate step", where=where, why="the time grid would be empty",
                         try_="put a calibrate step first, or leave `timed` out")


def _check_allocation(recipe: Recipe, where: str) -> None:
    """Rows of one bit less and of one bit more must exist."""
    for step in recipe.steps:
        data = step.model_dump()
        bits = data.get("bits") or recipe.weights
        if step.do == "allocate" and data["shares"] and bits in (1, 8):
            raise InputError(f"step {step.label!r} cannot mix rows around {bits} bits", where=where,
                             why="it gives rows one bit less and one bit more; rows have 1 to 8 bits",
                             try_=f"--set {step.label}.shares=0, or --weights {2 if bits == 1 else 7}")


def _activations(recipe: Recipe) -> list[ActivationRule]:
    return [r.activation for r in recipe.layers.values() if isinstance(r.activation, ActivationRule)]


def _unneeded(recipe: Recipe) -> set[str]:
    """Kinds of steps that the layers of this recipe can do without."""
    spare, grids = set(), set()
    if recipe.weights != FLOAT_BITS:
        grids = {r.weight.grid for r in recipe.layers.values() if isinstance(r.weight, WeightRule)}
    for grid, step in (("affine", "fit weights"), ("codebook", "codebooks")):
        if grid not in grids:
            spare.add(step)
    if recipe.activations == FLOAT_BITS or all(rule.mode == "dynamic" for rule in _activations(recipe)):
        spare.add("fit activations")
    return spare


def bundled() -> list[str]:
    """Names of the recipes in the package."""
    folder = _folder()
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def source_text(name: str) -> str:
    """The TOML text of a bundled recipe, comments included."""
    return (_folder() / f"{name}.toml").read_text(encoding="utf-8")


def _folder() -> Traversable:
    """Where the bundled recipes lie. The folder is not imported: ``bitbrush.recipes`` is the public function."""
    return resources.files("bitbrush") / "recipes"


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    name = str(source)
    if name in bundled():
        text, where = source_text(name), f"recipe {name}"
    elif name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise InputError("no such recipe file", where=name, try_="bitbrush recipes")
        try:
            text, where = path.read_text(encoding="utf-8"), name
        except UnicodeDecodeError as error:
            raise InputError("the recipe is not UTF-8", where=name, why=str(error), try_="save it as UTF-8") from error
    else:
        raise InputError(f"unknown recipe {name!r}", why=_nearest(name, bundled()), try_="bitbrush recipes")
    try:
        data = tomllib.loads(text)
        _check_shape(data, where)
        return data, where
    except tomllib.TOMLDecodeError as error:
        raise InputError("the recipe is not valid TOML", where=where, why=str(error),
                         try_="compare with `bitbrush recipes show qdiffusion`") from error


def _check_shape(data: dict[str, Any], where: str) -> None:
    """Keys at the top of the file, and tables where tables belong; what is in them is checked by the models."""
    top = [*(key for key in Recipe.model_fields if key not in ("steps", *_FORMS)), *_FORMS]
    for key, value in data.items():
        if key not in top:
            raise InputError(f"unknown key {key!r}", where=f"{where}: {key}", why=_nearest(key, top),
                             try_="bitbrush recipes show NAME lists the keys")
        kind, form = _FORMS.get(key, (object, ""))
        fits = isinstance(value, kind)
        if key == "step":
            fits = fits and all(isinstance(item, dict) for item in value)
        if key == "preset":
            fits = fits and all(isinstance(t, dict) and all(isinstance(v, dict) for v in t.values())
                                for t in value.values())
        if not fits:
            raise InputError(f"{key!r} cannot be {str(value)[:60]!r}", where=f"{where}: {key}", why=form,
                             try_="compare with `bitbrush recipes show qdiffusion`")


def _inherited(source: str | Path, seen: tuple[str, ...]) -> dict[str, Any]:
    data, where = _read(source)
    base = data.pop("base", None)
    if base is None:
        return _defaults(data, source)
    if base in seen:
        raise InputError("recipes inherit from each other in a circle", where=where, why=" -> ".join([*seen, base]),
                         try_="remove one `base`")
    parent = _inherited(base, (*seen, str(base)))
    data = _with_preset(parent, {"layers": data.pop("layers", {}), "set": data.pop("set", {})}) | data
    return _defaults(data, source)


def _defaults(data: dict[str, Any], source: str | Path) -> dict[str, Any]:
    data.setdefault("name", Path(str(source)).stem)
    return data


def _with_preset(data: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    unknown = set(preset) - {"layers", "set"}
    if unknown:
        raise InputError(f"unknown key {min(unknown)!r} in a preset", why=_nearest(min(unknown), ["layers", "set"]),
                         try_="use [preset.NAME.set] and [preset.NAME.layers]")
    out = dict(data)
    out["layers"] = {**data.get("layers", {}), **preset.get("layers", {})}
    steps = [dict(item) for item in data.get("step", [])]
    _apply_settings(steps, preset.get("set", {}), None)
    out["step"] = steps
    return out


def _with_correction(steps: list[dict[str, Any]], method: str, where: str) -> list[dict[str, Any]]:
    """The steps and those of a correction: trajectories after the first calibrate step, the fit at the end."""
    kinds = [item.get("do") for item in steps]
    if "correct" in kinds or "trajectories" in kinds:
        raise InputError("the recipe has a correction already", where=where, why="it has a step `correct`",
                         try_="leave --correct out")
    if "calibrate" not in kinds:
        raise InputError("a correction needs a recipe with a calibrate step", where=where,
                         why="it is fitted along sampling trajectories, and this recipe uses no data",
                         try_="--recipe rtn --correct " + method)
    at = kinds.index("calibrate") + 1
    chosen = CORRECTIONS.get(method, {"method": method})
    return [*steps[:at], {"do": "trajectories"}, *steps[at:], {"do": "correct", **chosen}]


def _apply_settings(steps: list[dict[str, Any]], settings: dict[str, Any], types: dict[str, type[Step]] | None) -> None:
    names = [str(item.get("id") or item.get("do")) for item in steps]
    for key, value in settings.items():
        step, _, field = key.partition(".")
        if not field or step not in names:
            raise InputError(f"no step {step!r} in this recipe", where=f"--set {key}", why=_nearest(step, names),
                             try_="bitbrush recipes show NAME lists the steps")
        item = steps[names.index(step)]
        known = types.get(str(item.get("do"))) if types else None
        if known is not None and field not in known.model_fields:
            raise InputError(f"step {step!r} has no key {field!r}", where=f"--set {key}",
                             why=_nearest(field, known.model_fields), try_="bitbrush recipes show NAME lists the keys")
        item[field] = value


def _step(item: dict[str, Any], index: int, step_types: dict[str, type[Step]]) -> Step:
    name = item.get("do")
    if name not in step_types:
        raise InputError(f"unknown step {name!r}", where=f"step {index + 1}", why=_nearest(str(name), step_types),
                         try_="bitbrush recipes show qdiffusion")
    return _validated(step_types[str(name)], {"id": str(name), **item}, f"step {index + 1} ({name})")


def _validated(model: Any, data: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        key = str(first["loc"][-1]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise InputError(f"unknown key {key!r}", where=f"{where}: {path}", why=_nearest(key, _fields(model, first)),
                             try_="bitbrush recipes show NAME lists the keys") from error
        raise InputError(f"{key!r} cannot be {first.get('input')!r}", where=f"{where}: {path}", why=first["msg"],
                         try_="correct the value") from error


def _fields(model: Any, error: Any) -> list[str]:
    if len(error["loc"]) <= 1:
        return list(model.model_fields)
    return [*WeightRule.model_fields, *ActivationRule.model_fields, *LayerRule.model_fields]


def _check_bits(key: str, bits: Any) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not (1 <= bits <= 8 or bits == FLOAT_BITS):
        raise InputError(f"{key} cannot have {bits!r} bits", where=f"--{key}", why="1 to 8 bits, or 16 for float",
                         try_=f"--{key} 4")


def _nearest(name: str, known: Any) -> str:
    names = [str(item) for item in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def toml_value(value: Any) -> str:
    """A JSON-like value in TOML syntax (inline tables for dicts)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + " }"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else toml_value(name)
