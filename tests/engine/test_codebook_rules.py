"""Additive codebooks in recipes: rules to specs, sizes before a run, and what is refused early."""

from __future__ import annotations

from pathlib import Path

import pytest

import bitbrush
import tiny
from bitbrush.api import read_recipe
from bitbrush.engine.planning import Planned, make_plan
from bitbrush.errors import InputError
from bitbrush.network.survey import survey

RULE = '"*" = { weight = { grid = "codebook", group = 4, bits = 4 } }'


def _plan(folder: Path, layers: str, weights: int = 3, steps: str = "") -> Planned:
    path = folder / "r.toml"
    path.write_text(f'name = "r"\n[layers]\n{layers}\n{steps}')
    return make_plan(survey(tiny.text_unet(), tokens=tiny.TOKENS), read_recipe(path, weights, 16))


def test_rules_make_specs(tmp_path: Path) -> None:
    """``codebooks`` left out: as many as make the run's bits a weight."""
    text = RULE + '\n"*.to_k" = { weight = { grid = "codebook", group = 4, codebooks = 2, shared = "text" } }'
    planned = _plan(tmp_path, text + '\nconv_in = { weight = { bits = 8 } }')
    specs = {name: spec.weight for name, spec in planned.plan.layers.items()}
    assert specs["conv_in"] is not None and not specs["conv_in"].additive and specs["conv_in"].codebooks == 0
    kinds = {(w.table_shape, w.shared) for w in specs.values() if w is not None and w.additive}
    assert kinds == {((3, 16, 4), ""), ((2, 256, 4), "text")} and len(specs) > 50


def test_what_is_refused_before_a_run(tmp_path: Path) -> None:
    cases = [
        ('"*" = { weight = { grid = "codebook" } }', "", "multiple of the group of 8"),  # conv_in has 4 channels
        ('"*" = { weight = { grid = "codebook", group = 4, bits = 5 } }', "", "no number of codebooks"),
        ('"*" = { weight = { shared = "a" } }', "", "kind codebook"),
        (RULE, '[[step]]\ndo = "fit"\nwhat = "weights"\n[[step]]\ndo = "pack"\n', "needs a step 'codebooks'"),
    ]
    for layers, steps, words in cases:
        with pytest.raises(InputError, match=words):
            _plan(tmp_path, layers, steps=steps)
    assert len(cases) == 4


def test_inspect_counts_codebooks(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\nweights = 3\nactivations = 16\n[layers]\n'
                    '"*" = { weight = { grid = "codebook", group = 4, bits = 4, shared = "all" } }\n')
    found = bitbrush.inspect(tiny.text_unet(), recipe=str(path))
    assert {row["weight_bits"] for row in found.rows} == {3}
    assert {row["note"] for row in found.rows} == {"3 codebooks of 16 x 4, set all"}
    rows = sum(row["shape"][0] for row in found.rows)
    weights = sum(row["parameters"] for row in found.rows)
    assert 3 < found.totals["codebook_bits"] < found.totals["average_bits"]
    assert found.totals["codebook_bits"] == pytest.approx(3 + 16 * (rows + 3 * 16 * 4) / weights, rel=0.03)
    assert "codebook_bits" not in bitbrush.inspect(tiny.text_unet(), recipe="rtn").totals
