"""From patterns to plans: what matches, what stays float, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.planning import make_plan, matches
from bitbrush.errors import InputError
from bitbrush.network.survey import Survey, survey
from small import complete


@pytest.fixture(scope="module")
def found() -> Survey:
    return survey(tiny.text_unet(), tokens=tiny.TOKENS)


def plan(found: Survey, folder: Path, layers: str, weights: int = 4, activations: int = 8):  # type: ignore[no-untyped-def]
    path = folder / "r.toml"
    path.write_text(f'name = "r"\n[layers]\n{layers}\n')
    return make_plan(found, read_recipe(path, weights, activations))


def test_matches() -> None:
    cases = [
        ("*", "conv_in", True),
        ("*", "a.b:q", False),
        ("*:q", "a.b:q", True),
        ("*:q", "a.b:k", False),
        ("a.* | b", "a.x", True),
        ("a.* | b", "b", True),
        ("a.* | b", "bb", False),
        ("*:q | conv_in", "conv_in", True),
        ("CONV_IN", "conv_in", False),
        ("conv_?n", "conv_in", True),
        ("*.conv[12]", "x.conv1", True),
    ]
    for pattern, name, want in cases:
        assert matches(pattern, name) is want, (pattern, name)
    assert len(cases) == 11


def test_every_layer_once_in_execution_order(found: Survey, tmp_path: Path) -> None:
    planned = plan(found, tmp_path, '"*" = { weight = {}, activation = {} }')
    assert list(planned.plan.layers) == [site.name for site in found.layers()]
    assert not planned.kept_float and len(planned.plan.layers) > 50
    specs = planned.plan.layers.values()
    assert {s.weight.grid.bits for s in specs if s.weight} == {4}
    assert {s.activation.grid.bits for s in specs if s.activation} == {8}


def test_later_rules_override_and_leave_the_rest(found: Survey, tmp_path: Path) -> None:
    planned = plan(
        found,
        tmp_path,
        """
"*" = { weight = { signed = true }, activation = { mode = "dynamic" } }
"conv_in" = { weight = { bits = 8 } }
"conv_out" = { activation = "float" }
"*.to_q" = { weight = "float", activation = "float", why = "tested" }
""",
    )
    conv_in, conv_out = planned.plan.layers["conv_in"], planned.plan.layers["conv_out"]
    assert conv_in.weight is not None and conv_in.weight.grid.bits == 8 and conv_in.weight.grid.signed
    assert conv_in.activation is not None and conv_in.activation.mode == "dynamic"  # the earlier rule still holds
    assert conv_out.activation is None and conv_out.weight is not None and conv_out.weight.grid.signed
    queries = [site.name for site in found.layers() if site.name.endswith("to_q")]
    assert planned.kept_float == dict.fromkeys(queries, "tested") and len(queries) == 8


def test_reasons(found: Survey, tmp_path: Path) -> None:
    planned = plan(found, tmp_path, '"conv_*" = { weight = {} }\n"conv_in" = { weight = "float" }')
    assert planned.kept_float["conv_in"] == "rule 'conv_in' says so"
    assert planned.kept_float["time_embedding.linear_1"] == "no rule of the recipe names it"
    assert list(planned.plan.layers) == ["conv_out"]
    assert len(planned.kept_float) == len(found.layers()) - 1


def test_sixteen_bits_are_float(found: Survey, tmp_path: Path) -> None:
    rules = '"*" = { weight = {}, activation = {} }\n"conv_in" = { weight = { bits = 8 }, activation = { bits = 8 } }'
    assert not plan(found, tmp_path, rules, 16, 16).plan.layers
    weights = plan(found, tmp_path, rules, 4, 16).plan.layers.values()
    assert all(s.activation is None and s.weight is not None for s in weights) and len(weights) > 50
    inputs = plan(found, tmp_path, rules, 16, 8).plan.layers.values()
    assert all(s.activation is not None and s.weight is None for s in inputs) and len(inputs) > 50


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_reach_every_layer(found: Survey, tmp_path: Path, bits: int) -> None:
    layers = plan(found, tmp_path, '"*" = { weight = {}, activation = {} }', bits, bits).plan.layers.values()
    for spec in layers:
        assert spec.weight is not None and spec.weight.grid.bits == bits and spec.weight.grid.signed == (bits == 8)
        assert spec.activation is not None and spec.activation.grid.bits == bits
    assert len(layers) == len(found.layers())


def test_a_pattern_without_a_layer(found: Survey, tmp_path: Path) -> None:
    cases = [("mid_blok.*", "mid_block"), ("conv_in | conv_outt", "conv_out"), ("*:qq", ":q"), ("xyz", "")]
    for pattern, nearest in cases:
        with pytest.raises(InputError) as caught:
            plan(found, tmp_path, f'"{pattern}" = {{ activation = {{}} }}')
        assert nearest in (caught.value.why or "") and "matches no layer" in caught.value.what
        plan(found, tmp_path, f'"{pattern}" = {{ activation = {{}}, optional = true }}')
    assert len(cases) == 4


def test_attention_operands(found: Survey, tmp_path: Path) -> None:
    planned = plan(found, tmp_path, '"*:q | *:softmax" = { weight = {}, activation = { bits = 6 } }')
    names = {f"{site.name}:{operand}" for site in found.attentions() for operand in ("q", "softmax")}
    assert set(planned.plan.layers) == names and len(names) == 16
    for spec in planned.plan.layers.values():
        assert spec.weight is None and spec.activation is not None and spec.activation.grid.bits == 6


def test_binary_rows(found: Survey, tmp_path: Path) -> None:
    ran = 0
    rules = {"{}": "affine", '{ binary = "affine" }': "affine", '{ binary = "symmetric" }': "symmetric"}
    for rule, want in rules.items():
        specs = plan(found, tmp_path, f'"*" = {{ weight = {rule} }}', 1).plan.layers.values()
        assert {s.weight.binary for s in specs if s.weight} == {want} and len(specs) > 50
        ran += 1
    assert ran == 3


def test_scales_a_channel(found: Survey, tmp_path: Path) -> None:
    rule = '"{}" = {{ activation = {{ granularity = "channel"{} }} }}'
    specs = plan(found, tmp_path, rule.format("*", ", timed = true")).plan.layers.values()
    assert {s.activation.granularity for s in specs if s.activation} == {"channel"} and len(specs) > 50
    assert not any(s.unsupported() for s in specs)
    refused = {rule.format("conv_in", ', mode = "dynamic"'): ("conv_in", "run time"),
               rule.format("*:softmax", ""): (":softmax", "attention")}
    for text, (where, why) in refused.items():
        with pytest.raises(InputError, match="per channel") as caught:
            plan(found, tmp_path, text)
        assert (caught.value.where or "").endswith(where) and why in (caught.value.why or "") and caught.value.try_
    assert len(refused) == 2


def test_scales_a_token_in_a_wide_convolution(found: Survey, tmp_path: Path) -> None:
    rule = '"{}" = {{ activation = {{ mode = "dynamic", granularity = "token" }} }}'
    with pytest.raises(InputError, match="per token"):
        plan(found, tmp_path, rule.format("conv_in"))
    assert plan(found, tmp_path, rule.format("*.to_q")).plan.layers
    assert plan(found, tmp_path, rule.format("*.conv_shortcut")).plan.layers  # 1x1: a product per position


def test_steps_check_their_patterns_against_the_model(found: Survey, tmp_path: Path) -> None:
    """While planning: nothing slow has happened yet. A step that is switched off is not asked."""
    path = tmp_path / "r.toml"

    def planned(do: str, keys: str, layers: str = '"*" = { weight = {}, activation = {} }') -> object:
        fits = "".join(f'[[step]]\ndo = "fit"\nid = "{w}"\nwhat = "{w}"\n' for w in ("weights", "activations"))
        steps = {"smooth": ("", fits), "allocate": (fits, ""), "finetune": (fits, "")}[do]
        path.write_text(f'name = "r"\n[layers]\n{layers}\n[[step]]\ndo = "calibrate"\n{steps[0]}'
                        f'[[step]]\ndo = "{do}"\n{keys}\n{steps[1]}')
        return make_plan(found, read_recipe(path, 4, 8))

    wrong = [
        ("smooth", 'layers = "conv_inn"', "layers", "nearest layer: conv_in", "enabled = false"),
        ("smooth", 'layers = "conv_in | *:q"', "layers", "", "enabled = false"),
        ("allocate", 'layers = "*.conv3"', "layers", "nearest layer: ", "shares = 0"),
        ("finetune", 'layers = "mid_blok.resnets.0.conv1"', "layers", "mid_block.resnets.0.conv1", "iterations = 0"),
        ("finetune", 'layers = "qkv_fff"', "layers", "", "iterations = 0"),
        ("finetune", 'layers = "*:q"', "layers", "", "iterations = 0"),
        ("finetune", 'frozen = "conv_in | conv_ou"', "frozen", "nearest layer: conv_out", "iterations = 0"),
        ("finetune", 'frozen = "*:qq"', "frozen", "operands are :q", "iterations = 0"),
    ]
    for do, keys, field, nearest, off in wrong:
        with pytest.raises(InputError, match="matches no layer of this model") as caught:
            planned(do, keys)
        assert complete(caught.value) and caught.value.where == f"step {do}: {field}", keys
        assert nearest in (caught.value.why or ""), caught.value.why
        planned(do, f"{keys}\n{off}")
    for do, keys in (("smooth", 'layers = "conv_in | *.to_q"'), ("allocate", 'layers = "*"'),
                     ("finetune", 'frozen = "*:softmax | conv_in"'), ("finetune", 'layers = "time_proj"')):
        planned(do, keys)
    none = '"*.to_q" = { weight = {}, activation = {} }'
    for keys in ('layers = "ff"', 'layers = "conv_in"', 'layers = "attention"\nfrozen = "*.to_q"'):
        with pytest.raises(InputError, match="selects no quantized layer") as caught:
            planned("finetune", keys, none)
        assert complete(caught.value)
    planned("finetune", 'layers = "ff"', '"conv_in" = {}')  # nothing is quantized: nothing to train, and no complaint
    assert len(wrong) == 8
