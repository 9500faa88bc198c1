"""relax: which timesteps get more bits, what moves, what the budget is, and that the better end is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import tiny
from bitbrush.engine.run import Run
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.numbers.grid import Plan
from bitbrush.steps.fit import quantizers, tables
from bitbrush.steps.relax import Relax, ends, relaxed_number
from small import FIT, HEAD, PACK, SPLIT, TIMED, begin, complete, execute, least_pipeline, recipe

CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = "all"\ntrajectories = 3\nsteps = 5\nbatch = 2\nguidance = 1.0\n'
RANGES = '[[step]]\ndo = "fit"\nid = "ranges"\nwhat = "activations"\nmethod = "minmax"\nvalues = 16\nsamples = 99\n'
PROGRESSIVE = RANGES + 'inputs = "progressive"\n'
START = TIMED + CALIBRATE + SPLIT + FIT
RELAX = '[[step]]\ndo = "relax"\nshare = 0.4\ntrajectories = 2\n'


def relax(which: str, **choices: Any) -> str:
    more = "".join(f"{key} = {value}\n" for key, value in choices.items())
    return RELAX + f'which = "{which}"\n' + more


def note(run: Run) -> dict[str, Any]:
    return next(entry for entry in run.done if entry["step"] == "relax")


def bits(run: Run) -> set[tuple[int, ...]]:
    return {s.activation.time_bits for s in run.plan.layers.values() if s.activation is not None}


def scales(run: Run) -> dict[str, Tensor]:
    return {n: t for n, t in tables(quantizers(run, "static")).items() if n.endswith("/scale")}


def made(folder: Path, name: str, text: str, pipe: Any = least_pipeline) -> Run:
    (folder / name).mkdir()
    return execute(folder / name, pipe(), text)


def test_which_timesteps() -> None:
    """Invariant 5, with the rounding that our page defines; row 0 is the cleanest."""
    assert [relaxed_number(n, s) for n, s in ((50, 0.2), (4, 0.2), (25, 0.05), (10, 1.0), (51, 0.2))] == [
        10, 1, 1, 10, 10,
    ]
    assert ends(51, 10, "end") == list(range(10)) and ends(51, 10, "start") == list(range(41, 51))


@pytest.mark.parametrize("ranges", [RANGES, PROGRESSIVE], ids=["float", "progressive"])
def test_only_the_relaxed_rows_are_fitted_again(ranges: str, tmp_path: Path) -> None:
    """After a progressive fit the later calls follow: their inputs have changed."""
    plain = made(tmp_path, "plain", START + ranges)
    looked = 0
    for which, rows in (("end", [0, 1]), ("start", [3, 4])):
        run = made(tmp_path, which, START + ranges + relax(which))
        assert bits(run) == {tuple(8 if r in rows else 4 for r in range(5))}
        before, after = scales(plain), scales(run)
        moved = [row for row in range(5) if any(bool((before[n][row] != after[n][row]).any()) for n in before)]
        later = list(range(5)) if which == "start" and ranges == PROGRESSIVE else rows
        assert moved == later and before.keys() == after.keys() and len(before) > 10
        ratio = torch.cat([(after[n][rows] / before[n][rows]).flatten() for n in before])
        assert 0.03 < float(ratio.median()) < 0.12, "17 times as many steps in the range"
        found = note(run)
        assert found["average_activation_bits"] == 5.6 and found["average_activation_bits_before"] == 4.0
        assert found["timesteps"] == sorted((run.plan.timesteps[r] for r in rows), reverse=True)
        looked += 1
    assert looked == 2


def test_weights_stay(tmp_path: Path) -> None:
    """Changing the activations' specs keeps codes, their tables and the face; attention operands keep theirs."""
    head = TIMED + '"*:q | *:k" = { activation = { timed = true } }\n"*:softmax" = { activation = { bits = 8 } }\n'
    text = head + CALIBRATE + SPLIT + FIT + RANGES
    plain = made(tmp_path, "plain", text, tiny.text_pipeline)
    run = made(tmp_path, "end", text + relax("end"), tiny.text_pipeline)
    compared = 0
    for name, layer in run.layers().items():
        other = plain.layers()[name]
        assert torch.equal(layer.stored_codes(), other.stored_codes())
        assert torch.equal(layer.weight_scale, other.weight_scale)
        compared += 1
    before, after = scales(plain), scales(run)
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert compared == len(run.layers()) > 30 and still and all("softmax" in n for n in still)
    assert bits(run) == {(8, 8, 4, 4, 4), ()}


def test_all_steps_relaxed_equal_the_wider_network(tmp_path: Path) -> None:
    """Invariant 6: everything relaxed is W4A8; nothing relaxed is W4A4."""
    wide = made(tmp_path, "wide", START.replace("activations = 4", "activations = 8") + PROGRESSIVE)
    all_ = made(tmp_path, "all", START + PROGRESSIVE + RELAX.replace("0.4", "1.0") + 'which = "end"\n')
    none = made(tmp_path, "none", START + PROGRESSIVE + relax("none"))
    plain = made(tmp_path, "plain", START + PROGRESSIVE)
    x, compared = torch.randn(2, 1, 8, 8), 0
    for one, two in ((wide, all_), (plain, none)):
        assert scales(one).keys() == scales(two).keys()
        assert all(torch.equal(a, b) for a, b in zip(scales(one).values(), scales(two).values(), strict=True))
        for t in one.plan.timesteps:
            with torch.no_grad(), wrap.show(one.model, "sim"), wrap.show(two.model, "sim"):
                assert torch.equal(one.model(x, torch.tensor(t)).sample, two.model(x, torch.tensor(t)).sample)
                compared += 1
    assert compared == 10 and bits(none) == {()} and not any(e["step"] == "relax" for e in none.done)


@pytest.mark.parametrize("ranges", [RANGES, PROGRESSIVE], ids=["float", "progressive"])
def test_the_better_end_is_kept(ranges: str, tmp_path: Path) -> None:
    """Both ends are measured on equal noise; the kept one ends with the bytes of asking for it."""
    run = made(tmp_path, "measured", START + ranges + relax("measured"))
    found = note(run)
    errors = {which: found[f"error_{which}_db"] for which in ("start", "end")}
    assert found["which"] == min(errors, key=lambda k: errors[k]) and min(errors.values()) < found["error_none_db"]
    late = found["end_over_start"]
    assert late["gain_db"] == pytest.approx(errors["start"] - errors["end"], abs=1e-3) and late["error_db"] > 0
    asked = made(tmp_path, "asked", START + ranges + relax(found["which"]))
    one, two = (tables(quantizers(r, "static")) for r in (run, asked))
    assert len(one) > 20 and all(torch.equal(one[n], two[n]) for n in one) and run.plan == asked.plan


def test_one_trajectory_does_not_outweigh_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is better in three of four by 4 dB, worse in one by 1 dB, where nothing is left of the picture: the mean
    of the errors would say start."""
    errors = iter([[-9.0, -9, -9, 0], [-10.0, -10, -10, -1], [-14.0, -14, -14, 0]])  # none, start, end
    powers = [10 ** (torch.tensor(e) / 10) for e in ([-10.0, -10, -10, -1], [-14.0, -14, -14, 0])]
    monkeypatch.setattr(Relax, "_error", lambda self, run, truth: torch.tensor(next(errors)))
    found = note(made(tmp_path, "measured", START + RANGES + relax("measured")))
    assert found["which"] == "end" and powers[0].mean() < powers[1].mean()
    assert (found["error_none_db"], found["error_start_db"], found["error_end_db"]) == (-6.75, -7.75, -10.5)
    assert found["end_over_start"] == {"gain_db": 2.75, "error_db": 1.25}


def test_random_steps_are_as_many(tmp_path: Path) -> None:
    runs = [made(tmp_path, str(i), START + RANGES + relax("random")) for i in range(2)]
    (found,) = bits(runs[0])
    assert sorted(found) == [4, 4, 4, 8, 8] and bits(runs[1]) == {found}, "drawn from the seed"
    assert note(runs[0])["average_activation_bits"] == 5.6


def test_packed_proven_and_resumed(tmp_path: Path) -> None:
    asked = START + PROGRESSIVE + relax("measured") + PACK
    run = made(tmp_path, "run", asked)
    proofs = {n: p for entry in run.done for n, p in entry.get("proof", {}).items()}
    assert len(proofs) == len(run.layers()) and all(p["ok"] for p in proofs.values())
    assert Plan.from_json(run.plan.to_json()) == run.plan
    again = begin(tmp_path / "run", least_pipeline(), recipe(tmp_path, asked), resume=True)
    again.execute()
    again.journal.release()
    one, two = run.model.state_dict(), again.model.state_dict()
    assert again.plan == run.plan and len(one) > 60 and all(torch.equal(one[n], two[n]) for n in one)


def test_nothing_to_relax_is_said(tmp_path: Path) -> None:
    run = made(tmp_path, "run", START.replace("activations = 4", "activations = 8") + RANGES + relax("measured"))
    assert note(run)["which"] == "none" and "8 bits or more already" in note(run)["why"] and bits(run) == {()}


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    refused: list[tuple[str, Any]] = [
        ("bits", 10), ("share", 0.0), ("share", 1.1), ("which", "both"), ("trajectories", 0),
    ]
    for key, value in refused:
        with pytest.raises(ValidationError):
            Relax(**{"do": "relax", key: value})
    with pytest.raises(InputError, match="only scales a timestep") as caught:
        begin(tmp_path, least_pipeline(), recipe(tmp_path, HEAD + CALIBRATE + SPLIT + FIT + RANGES + RELAX))
    assert complete(caught.value)
