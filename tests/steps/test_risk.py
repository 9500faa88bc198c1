"""The choice of calibration steps by structural risk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitbrush.errors import InputError
from bitbrush.steps import loop
from bitbrush.steps.risk import Rounds, choose
from small import FIT, RANGES, SPLIT, TIMED, Killed, begin, execute, kill_training, least_pipeline, recipe


def rounds(index: torch.Tensor, steps: int, uncertainty: torch.Tensor | None, **more: float) -> Rounds:
    moments = torch.arange(steps).repeat(3)
    return Rounds(index, moments, 4, None if uncertainty is None else lambda: uncertainty,
                  torch.Generator().manual_seed(1), **more)


def visits(found: Rounds, index: torch.Tensor) -> list[int]:
    """Runs all rounds; the step of each."""
    out = []
    for start in range(0, len(index), found.length):
        found.begin(start)
        here = found.moments[index[start : start + found.length]].unique()
        assert len(here) == 1, "all groups of a round are of one step"
        out.append(int(here))
    return out


def test_equal_uncertainty_visits_every_step_once_before_any_twice() -> None:
    index = torch.zeros(4 * 14, 5, dtype=torch.long)
    order = visits(rounds(index, 7, torch.ones(7)), index)
    assert order == [6, 5, 4, 3, 2, 1, 0] * 2, "from the cleanest, as the released code does"


def test_without_penalty_the_most_uncertain_step_is_always_taken() -> None:
    index = torch.zeros(4 * 6, 2, dtype=torch.long)
    planted = torch.tensor([0.1, 0.9, 0.2, 0.3])
    assert visits(rounds(index, 4, planted, penalty=0.0), index) == [1] * 6
    index = torch.zeros(4 * 6, 2, dtype=torch.long)
    assert visits(rounds(index, 4, planted, penalty=2.0), index) == [1, 3, 2, 0, 1, 3]


def test_the_penalty_is_in_units_of_the_spread() -> None:
    """Scores, hence choices, do not change when all uncertainties are multiplied or moved."""
    values, counts = torch.tensor([0.3, 0.5, 0.1, 0.45]), torch.tensor([2, 3, 0, 1])
    base = choose(values, counts)
    assert [choose(values * f + c, counts) for f, c in ((100.0, 0.0), (7.0, 3.0))] == [base, base]
    spread = float(values.double().std(correction=0))
    want = (values.double() - 0.5 * spread * counts).argmax()
    assert base == int(want)


def test_random_rounds_follow_the_normal_distribution() -> None:
    index = torch.zeros(4 * 3000, 1, dtype=torch.long)
    order = torch.tensor(visits(rounds(index, 10, None), index))
    clean = 9 - order  # counted from the cleanest
    inner = clean[(clean > 0) & (clean < 9)].double()
    assert 3.5 < float(clean.double().mean()) < 4.5 and len(inner) > 1500
    share_first = float((clean == 0).double().mean())
    assert 0.17 < share_first < 0.28, "P(z < 0.1) = 0.227 is clamped to the cleanest"
    assert len(order) == 3000


@pytest.mark.parametrize("cut", [4, 8, 16])
def test_a_search_that_goes_on_chooses_the_same(cut: int) -> None:
    """Counts come from the schedule so far, which the saved state holds."""
    values = torch.tensor([0.3, 0.5, 0.1, 0.45])
    whole = torch.zeros(24, 3, dtype=torch.long)
    want = visits(rounds(whole, 4, values), whole)
    part = torch.zeros(24, 3, dtype=torch.long)
    part[:cut] = whole[:cut]
    again = rounds(part, 4, values)
    for start in range(cut, 24, 4):
        again.begin(start)
    assert torch.equal(part, whole) and len(want) == 6


# ---- in a whole run ----------------------------------------------------------------------------------------------
CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = "all"\ntrajectories = 4\nsteps = 5\nbatch = 4\n'


def search(order: str, iterations: int = 20) -> str:
    return TIMED + CALIBRATE + SPLIT + FIT + RANGES + (
        f'[[step]]\ndo = "finetune"\nid = "tune"\nweights = "none"\nscales = "all"\nscale_form = "groups"\ngroups = 2\n'
        f'order = "{order}"\nround_length = 2\niterations = {iterations}\nbatch = 3\n'
        "evaluate_every = 10\ncheckpoint = 7\n"
    )


def seen_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps of every iteration's groups, in the runs that follow."""
    seen: list[list[int]] = []
    begin_round, iterate = Rounds.begin, loop._Loop.iterate
    found: list[Rounds] = []

    def watched(self: Rounds, iteration: int) -> None:
        found.append(self)
        begin_round(self, iteration)

    def recorded(self: Any, k: int) -> None:
        seen.append(found[-1].moments[self.index[k].cpu()].tolist())
        iterate(self, k)

    monkeypatch.setattr(Rounds, "begin", watched)
    monkeypatch.setattr(loop._Loop, "iterate", recorded)
    return seen


@pytest.mark.parametrize("order", ["risk", "random"])
def test_each_round_of_a_run_learns_from_one_step(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_steps(monkeypatch)
    run = execute(tmp_path, least_pipeline(), search(order))
    assert len(seen) == 20 and all(len(set(a + b)) == 1 for a, b in zip(seen[::2], seen[1::2], strict=True))
    steps = [a[0] for a in seen[::2]]
    assert len(set(steps)) == 5 if order == "risk" else len(set(steps)) > 1
    if order == "risk":
        assert steps[:5] == [4, 3, 2, 1, 0], "equal logits are equally uncertain"
    assert next(e for e in run.done if e["step"] == "tune")["kept"] in ("trained", "start")


def test_a_killed_search_by_risk_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole = execute(tmp_path / "whole", least_pipeline(), search("risk"))
    began = kill_training(monkeypatch, 16)
    run = begin(tmp_path, least_pipeline(), recipe(tmp_path, search("risk")))
    with pytest.raises(Killed):
        run.execute()
    run.journal.release()
    again = begin(tmp_path, least_pipeline(), recipe(tmp_path, search("risk")), resume=True)
    again.execute()
    again.journal.release()
    assert began[17] == 14, "in the middle between two saved states, at the start of a round"
    files = {p.name: p.read_bytes() for p in (whole.journal.folder / "units").iterdir()}
    assert len(files) > 3
    assert all((again.journal.folder / "units" / name).read_bytes() == data for name, data in files.items())


@pytest.mark.parametrize("change", ['window = 2', 'replay = 5', 'scale_form = "table"'])
def test_what_does_not_go_with_rounds_is_refused(change: str, tmp_path: Path) -> None:
    key = change.split(" ")[0]
    text = "\n".join(line for line in search("risk").splitlines() if not line.startswith(f"{key} ="))
    with pytest.raises(InputError, match="order = risk"):
        recipe(tmp_path, text + "\n" + change + "\n")
