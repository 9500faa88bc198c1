"""Sets of codebooks formed from sizes: within a subset, like layers first, as many as the bits allow."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import bitbrush
import tiny
from bitbrush import assets
from bitbrush.api import read_recipe
from bitbrush.engine.codebook_sets import subset_of
from bitbrush.engine.estimate import codebook_storage, codebook_totals, model_bytes
from bitbrush.engine.planning import Planned, make_plan
from bitbrush.errors import InputError
from bitbrush.network.survey import Survey, survey

HEAD = 'name = "r"\nweights = 3\nactivations = 16\n[layers]\n'


def planned(folder: Path, found: Survey, rule: str, more: str = "") -> Planned:
    path = folder / "r.toml"
    path.write_text(f'{HEAD}"*" = {{ weight = {{ grid = "codebook", group = 4, bits = 4{rule} }} }}\n{more}')
    return make_plan(found, read_recipe(path))


def shared(plan: Planned) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {}
    for name, spec in plan.plan.layers.items():
        if spec.weight is not None and spec.weight.shared:
            sets.setdefault(spec.weight.shared, []).append(name)
    return sets


@pytest.fixture(scope="module")
def network() -> Survey:
    return survey(tiny.text_unet(), tokens=tiny.TOKENS)


def test_subsets_are_entries_of_lists_or_modules() -> None:
    names = ("down_blocks.0.resnets.1.conv1", "mid_block.attentions.0.proj_in", "conv_in", "time_embedding.linear_1",
             "transformer_blocks.12.attn1.to_q")
    found = ["down_blocks.0", "mid_block", "conv_in", "time_embedding", "transformer_blocks.12"]
    assert [subset_of(name) for name in names] == found


def test_sets_lie_in_a_subset_and_a_bound_is_kept_where_blocks_allow(tmp_path: Path, network: Survey) -> None:
    shapes = {site.name: site.shape for site in network.layers()}
    weights, one = sum(prod(shape) for shape in shapes.values()), 3 * 16 * 4 * 16
    counts = []
    for limit in (0.5, 0.2, 1e-9):
        plan = planned(tmp_path, network, f', share = "block", table_bits = {limit!r}')
        assert all(len({subset_of(name) for name in names}) == 1 < len(names) for names in shared(plan).values())
        stored = codebook_storage(shapes, plan.plan)
        counts.append(len(stored))
        assert codebook_totals(stored)["codebook_sets"] == len(stored)
        fits = len(stored) * one <= limit * weights
        assert fits if limit > 1e-6 else len(stored) == len({subset_of(name) for name in shapes})
    assert len(shapes) > counts[0] > counts[1] > counts[2]


def test_sets_of_one_shape(tmp_path: Path, network: Survey) -> None:
    shapes = {site.name: site.shape for site in network.layers()}
    found = shared(planned(tmp_path, network, ', share = "shape", table_bits = 1e-9'))
    assert len(found) > 3 and all(len({shapes[name] for name in names}) == 1 for names in found.values())
    like: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in shapes:
        like.setdefault((subset_of(name), shapes[name]), []).append(name)
    assert sorted(found.values()) == sorted(names for names in like.values() if len(names) > 1)
    assert not shared(planned(tmp_path, network, ""))  # a set a layer, where nothing is said


def test_names_that_rules_gave_are_left_alone(tmp_path: Path, network: Survey) -> None:
    rule = '"mid_block.*" = { weight = { grid = "codebook", group = 4, bits = 4, shared = "down_blocks_0-0" } }\n'
    found = shared(planned(tmp_path, network, ', share = "block", table_bits = 1e-9', rule))
    assert {subset_of(name) for name in found["down_blocks_0-0"]} == {"mid_block"}
    assert {subset_of(name) for name in found["down_blocks_0-1"]} == {"down_blocks.0"}


def test_sharing_that_means_nothing_is_refused(tmp_path: Path, network: Survey) -> None:
    for rule in ('{ share = "block" }', '{ grid = "codebook", share = "shape", shared = "a" }'):
        (tmp_path / "r.toml").write_text(f'{HEAD}"*" = {{ weight = {rule} }}\n')
        with pytest.raises(InputError, match="share forms sets"):
            read_recipe(tmp_path / "r.toml")


def test_bits_of_the_recipe_follow_from_the_run(tmp_path: Path) -> None:
    """`vqdm` on the embedded model: K codebooks by --weights, and 3.6 bits with codebooks of 64 vectors."""
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(assets.path("emoji-sd-tiny") / "unet")
        found = survey(UNet2DConditionModel.from_config(config), tokens=24)
    for bits in (2, 3, 4):
        plan = make_plan(found, read_recipe("vqdm", bits)).plan
        additive = [s.weight for s in plan.layers.values() if s.weight is not None and s.weight.additive]
        assert {w.codebooks for w in additive} == {bits} and {w.grid.bits for w in additive} == {8}
        assert len(additive) == 118 and len(plan.layers) == 133
    small = make_plan(found, read_recipe("vqdm", 3, preset="small")).plan
    size = model_bytes(found, small)
    assert 3.3 < 8 * size["packed_bytes"] / size["parameters"] <= 3.6
    assert {s.weight.table_shape for s in small.layers.values() if s.weight is not None and s.weight.additive} == {
        (4, 64, 8)}


def test_inspect_shows_what_is_stored() -> None:
    found = bitbrush.inspect(assets.path("emoji-sd-tiny"), recipe="vqdm")
    bits = sum(row["stored_bits"] * row["parameters"] for row in found.rows)
    rest = 32 * sum(item["parameters"] for item in found.kept_float)
    assert (bits + rest) / 8 == pytest.approx(found.totals["packed_bytes"], rel=1e-3)
    assert found.totals["codebook_sets"] == len({row["note"] for row in found.rows if "set" in row["note"]}) == 7
    assert found.totals["codebooks_bytes"] == 7 * 3 * 256 * 8 * 2
