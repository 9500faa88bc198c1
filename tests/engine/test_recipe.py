"""Recipes: inheritance, presets, settings, and an error with the nearest name for everything misspelt."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest

import bitbrush
from bitbrush.api import read_recipe
from bitbrush.engine.recipe import ActivationRule, LayerRule, Recipe, WeightRule, source_text, toml_value
from bitbrush.errors import InputError
from bitbrush.steps import STEPS
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, ROUND, SCALES, SPLIT, WHOLE

SMOOTH = '[[step]]\ndo = "smooth"\n'
ALLOCATE = '[[step]]\ndo = "allocate"\n'
REQUIRED: dict[str, dict[str, Any]] = {"fit": {"what": "weights"}, "reconstruct": {"train": "rounding"}}


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, **choices: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_recipe(write(folder, text), **choices)
    assert caught.value.what and caught.value.try_, caught.value
    return caught.value


def variants() -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for name in bitbrush.recipes():
        found += [(name, None), *((name, preset) for preset in tomllib.loads(source_text(name)).get("preset", {}))]
    return found


# ---- bundled -----------------------------------------------------------------------------------------------------
def test_recipes_stays_a_function() -> None:
    """The folder of the same name must not be imported over it."""
    first = bitbrush.recipes()
    read_recipe("rtn")
    assert callable(bitbrush.recipes) and bitbrush.recipes() == first
    assert {"rtn", "rtn-dynamic", "qdiffusion", "ptq4dm"} <= set(first)


def test_round_trip_of_every_recipe_and_preset(tmp_path: Path) -> None:
    ran = 0
    for (name, preset), weights in itertools.product(variants(), (None, 3, 16)):
        recipe = read_recipe(name, weights, preset=preset)
        again = read_recipe(write(tmp_path, recipe.to_toml(), f"copy{ran}"))
        assert again == recipe and again.to_toml() == recipe.to_toml()
        assert recipe.weights == (weights or recipe.weights) and len(recipe.steps) >= 3
        assert recipe.to_dict()["step"][0]["do"] == recipe.steps[0].do
        ran += 1
    assert ran == 3 * len(variants()) >= 24


def test_toml_values_round_trip() -> None:
    values = [
        "plain",
        'quo"te',
        "back\\slash",
        "new\nline\ttab\rreturn",
        "é ✓ \U0001f600",
        "\x7f\x01",
        "",
        True,
        False,
        0,
        -3,
        1e-5,
        0.1,
        2.0,
        [1, 2],
        ["a", "b"],
        {"a b": 1, "c": {"d.e": "f"}},
    ]
    for value in values:
        assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value
    assert len(values) == 17


# ---- inheritance, presets, settings ------------------------------------------------------------------------------
def test_inheritance(tmp_path: Path) -> None:
    parent = read_recipe("qdiffusion")
    child = read_recipe(
        write(
            tmp_path,
            """
base = "qdiffusion"
weights = 3
[layers]
"conv_out" = { activation = "float", why = "mine" }
[set]
"weights.iterations" = 7
""",
        )
    )
    assert child.name == "qdiffusion" and child.weights == 3 and child.activations == 8
    assert list(child.layers) == [*parent.layers, "conv_out"] and child.layers["conv_out"].why == "mine"
    by_label = {step.label: step for step in child.steps}
    assert [s.label for s in child.steps] == [s.label for s in parent.steps]
    assert by_label["weights"].model_dump()["iterations"] == 7
    assert by_label["weights"].model_dump()["lr"] == next(s for s in parent.steps if s.label == "weights").lr  # type: ignore[attr-defined]


def test_inheritance_replaces_steps_and_keeps_presets(tmp_path: Path) -> None:
    write(tmp_path, WHOLE + '[preset.short.set]\n"weights.iterations" = 1\n', "parent")
    path = write(
        tmp_path,
        f'base = "{tmp_path}/parent.toml"\nname = "child"\n{FIT}{PACK}'
        '[layers]\n"*" = { weight = {}, activation = "float" }\n',
        "child",
    )
    child = read_recipe(path)
    assert child.name == "child" and [s.do for s in child.steps] == ["fit", "pack", "verify"]
    grandchild = write(tmp_path, f'base = "{tmp_path}/parent.toml"\n', "grandchild")
    assert read_recipe(grandchild, preset="short").steps[3].model_dump()["iterations"] == 1
    assert read_recipe(grandchild).steps[3].model_dump()["iterations"] == 4


def test_recipes_in_a_circle(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'base = "{b}"\n')
    b.write_text(f'base = "{a}"\n')
    with pytest.raises(InputError, match="circle"):
        read_recipe(a)


def test_order_of_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        WHOLE + '[preset.demo.set]\n"weights.iterations" = 2\n"weights.lr" = 0.5\n'
        '[preset.demo.layers]\n"conv_in" = { weight = { bits = 5 } }\n',
    )
    recipe = read_recipe(path, 2, 6, preset="demo", settings={"weights.iterations": 9})
    step = next(s for s in recipe.steps if s.label == "weights").model_dump()
    assert (step["iterations"], step["lr"], recipe.weights, recipe.activations) == (9, 0.5, 2, 6)
    rule = recipe.layers["conv_in"].weight
    assert isinstance(rule, WeightRule) and rule.bits == 5
    with pytest.raises(InputError, match="no preset 'dmo'") as caught:
        read_recipe(path, preset="dmo")
    assert "'demo'" in (caught.value.why or "")


# ---- misspelt ----------------------------------------------------------------------------------------------------
def test_every_misspelt_step_key_names_the_nearest(tmp_path: Path) -> None:
    ran = 0
    for do, step in STEPS.items():
        for field in step.model_fields:
            keys = {"do": do, **REQUIRED.get(do, {}), field + "x": 1}
            text = HEAD + "[[step]]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in keys.items())
            error = refused(tmp_path, text)
            assert error.what == f"unknown key {field + 'x'!r}" and error.why == f"did you mean {field!r}?", error
            assert error.where and do in error.where
            with pytest.raises(InputError) as caught:
                item = "".join(f"{k} = {toml_value(v)}\n" for k, v in list(keys.items())[:-1])
                read_recipe(write(tmp_path, HEAD + "[[step]]\n" + item), settings={f"{do}.{field}x": 1})
            assert caught.value.why == f"did you mean {field!r}?" and f"--set {do}.{field}x" in (
                caught.value.where or ""
            )
            ran += 2
    assert ran == 2 * sum(len(step.model_fields) for step in STEPS.values()) >= 90


def test_every_misspelt_layer_key_names_the_nearest(tmp_path: Path) -> None:
    ran = 0
    forms = [
        (LayerRule, "{{ {key} = 1 }}"),
        (WeightRule, "{{ weight = {{ {key} = 1 }} }}"),
        (ActivationRule, "{{ activation = {{ {key} = 1 }} }}"),
    ]
    for model, form in forms:
        for field in model.model_fields:
            error = refused(tmp_path, f'name = "x"\n[layers]\n"*" = {form.format(key=field + "x")}\n')
            assert error.why == f"did you mean {field!r}?" and "layers" in (error.where or ""), error
            ran += 1
    assert ran == sum(len(model.model_fields) for model, _ in forms) >= 14


def test_every_misspelt_top_key_names_the_nearest(tmp_path: Path) -> None:
    keys = [*(k for k in Recipe.model_fields if k != "steps"), "step", "base", "preset", "set"]
    for key in keys:
        assert refused(tmp_path, f"{key}x = 1\n").why == f"did you mean {key!r}?"
    assert refused(tmp_path, '[[steps]]\ndo = "pack"\n').why == "did you mean 'step'?"  # never dropped in silence
    assert len(keys) == 11


def test_misspelt_names(tmp_path: Path) -> None:
    cases = {
        "unknown recipe": ("qdifusion", {}, "'qdiffusion'"),
        "no preset": ("qdiffusion", {"preset": "dem"}, "'demo'"),
        "no step": ("qdiffusion", {"settings": {"wieghts.lr": 1.0}}, "'weights'"),
        "no step ''": ("qdiffusion", {"settings": {"lr": 1.0}}, ""),
    }
    for source, choices, nearest in cases.values():
        with pytest.raises(InputError) as caught:
            read_recipe(source, **choices)
        assert nearest in (caught.value.why or ""), caught.value
    assert refused(tmp_path, '[[step]]\ndo = "callibrate"\n').why == "did you mean 'calibrate'?"
    assert "unknown step" in refused(tmp_path, "[[step]]\n").what
    assert refused(tmp_path, '[preset.demo.sett]\n"a.b" = 1\n', preset="demo").why == "did you mean 'set'?"
    with pytest.raises(InputError, match="no such recipe file"):
        read_recipe(tmp_path / "absent.toml")
    assert len(cases) == 4


# ---- wrong values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [0, 9, 17, -1, True, False, 4.0, "4", 15, [4]])
def test_bits_out_of_range(bits: Any, tmp_path: Path) -> None:
    for key in ("weights", "activations"):
        with pytest.raises(InputError) as caught:
            read_recipe("qdiffusion", **{key: bits})
        assert f"--{key}" in (caught.value.where or "") and "1 to 8" in (caught.value.why or "")
        assert key in refused(tmp_path, f"{key} = {toml_value(bits)}\n").what
        rule = toml_value(bits)
        refused(tmp_path, f'[layers]\n"*" = {{ {key.removesuffix("s")} = {{ bits = {rule} }} }}\n')


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_bits_in_range(bits: int) -> None:
    recipe = read_recipe("rtn", bits, bits)
    assert (recipe.weights, recipe.activations) == (bits, bits)


@pytest.mark.parametrize(
    "text",
    [
        "not toml at all",
        "layers = 3",
        "step = 5",
        "[step]\ndo = 'pack'",
        "step = [1, 2]",
        "preset = 3",
        "base = 7",
        "[preset]\ndemo = 1",
        "[preset.demo]\nset = 3",
        "set = 1",
        'weights = "four"',
        "name = 3",
        '[layers]\n"*" = 3',
        '[layers]\n"*" = { weight = "flaot" }',
        '[layers]\n"*" = { weight = { signed = 1 } }',
        '[[step]]\ndo = "calibrate"\nsamples = 0',
        '[[step]]\ndo = "calibrate"\nsamples = 2.5',
        '[[step]]\ndo = "calibrate"\ntimes = "normale"',
        '[[step]]\ndo = "fit"',
        '[[step]]\ndo = "fit"\nwhat = "wieghts"',
        '[[step]]\ndo = "reconstruct"\ntrain = "rounding"\nlr = 0',
        '[[step]]\ndo = "pack"\nsamples = true',
        '[layers]\n"*" = { activation = { lookup = "cubic" } }',
    ],
)
def test_wrong_values(text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, preset="demo" if "preset" in text else None)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('title = "gr\xfc\xdfe"\n'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_recipe(path)


# ---- order -------------------------------------------------------------------------------------------------------
def test_steps_in_an_order_that_cannot_work(tmp_path: Path) -> None:
    cases = {
        "pack before fit": (HEAD + PACK, "fit weights"),
        "verify alone": (HEAD + '[[step]]\ndo = "verify"\n', "pack"),
        "ranges without samples": (HEAD + FIT + RANGES, "calibrate"),
        "ranges without weights": (HEAD + CALIBRATE + RANGES, "fit weights"),
        "rounding without samples": (HEAD + FIT + ROUND, "calibrate"),
        "rounding without a fit": (HEAD + CALIBRATE + ROUND, "fit weights"),
        "scales without a fit": (HEAD + CALIBRATE + FIT + SCALES, "fit activations"),
        "pack without ranges": (HEAD + CALIBRATE + FIT + PACK, "fit activations"),
        "split after fit": (HEAD + CALIBRATE + FIT + SPLIT, "fit weights"),
        "calibrate after fit": (HEAD + FIT + CALIBRATE, "fit weights"),
        "fit after rounding": (HEAD + CALIBRATE + FIT + ROUND + FIT.replace("weights-fit", "again"), "reconstruct"),
        "two of one name": (HEAD + CALIBRATE + CALIBRATE, "two steps"),
        "smooth without samples": (HEAD + SMOOTH + FIT, "calibrate"),
        "smooth after fit": (HEAD + CALIBRATE + FIT + SMOOTH, "fit weights"),
        "split after smooth": (HEAD + CALIBRATE + SMOOTH + SPLIT, "smooth"),
        "calibrate after smooth": (HEAD + CALIBRATE + SMOOTH + CALIBRATE + 'id = "more"\n', "smooth"),
        "allocate without samples": (HEAD + FIT + ALLOCATE, "calibrate"),
        "allocate without ranges": (HEAD + CALIBRATE + FIT + ALLOCATE, "fit activations"),
        "allocate without weights": (HEAD + CALIBRATE + ALLOCATE, "fit weights"),
        "allocate twice": (HEAD + CALIBRATE + FIT + RANGES + ALLOCATE + ALLOCATE + 'id = "more"\n', "allocate"),
        "timed without samples": (
            '[layers]\n"*" = { weight = {}, activation = { mode = "dynamic", timed = true } }\n' + FIT + PACK,
            "calibrate",
        ),
    }
    for name, (text, word) in cases.items():
        assert word in refused(tmp_path, text).what, name
    assert len(cases) == 21


@pytest.mark.parametrize("bits", [1, 8])
def test_rows_cannot_have_less_than_one_bit_or_more_than_eight(bits: int, tmp_path: Path) -> None:
    text = HEAD + CALIBRATE + FIT + RANGES + ALLOCATE
    error = refused(tmp_path, text, weights=bits)
    assert "'allocate'" in error.what and f"{bits} bits" in error.what and "allocate.shares=0" in (error.try_ or "")
    for choices in ({"weights": 16}, {"settings": {"allocate.shares": 0}}, {"settings": {"allocate.bits": 3}}):
        asked: dict[str, Any] = {"weights": bits, **choices}
        assert read_recipe(write(tmp_path, text), **asked).steps[-1].do == "allocate"
    refused(tmp_path, text, settings={"allocate.bits": bits})


def test_orders_that_work(tmp_path: Path) -> None:
    dynamic = '[layers]\n"*" = { weight = {}, activation = { mode = "dynamic" } }\n'
    cases = [
        WHOLE,
        HEAD + CALIBRATE + SPLIT + SMOOTH + FIT + RANGES + ALLOCATE + PACK,
        dynamic + FIT + PACK,
        '[layers]\n"*" = { weight = {} }\n' + FIT + PACK,
        HEAD,
        '[layers]\n"*" = { activation = {} }\n' + CALIBRATE + RANGES + PACK.replace("verify", "verify"),
    ]
    for text in cases[:5]:
        read_recipe(write(tmp_path, text))
    assert read_recipe(write(tmp_path, HEAD + CALIBRATE + FIT + PACK), activations=16).activations == 16
    assert len(cases) == 6
