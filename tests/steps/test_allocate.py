"""Mixed bits inside a layer: what is ranked, what moves, and that the split chosen is the best of those allowed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from bitbrush import inspection
from bitbrush.engine.estimate import model_bytes, weight_bits
from bitbrush.engine.planning import Planned
from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.numbers import ranges
from bitbrush.numbers.codec import decode, encode, reciprocal
from bitbrush.numbers.grid import Grid
from bitbrush.steps.allocate import Allocate, kurtosis, split_rows
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, SPLIT, begin, execute, least_pipeline, recipe

SMOOTH = '[[step]]\ndo = "smooth"\n'


def allocate(**choices: Any) -> str:
    keys = {"samples": 6, "points": 8, "step": 0.08, **choices}
    return '[[step]]\ndo = "allocate"\n' + "".join(f"{k} = {v!r}\n" for k, v in keys.items()).replace("'", '"')


def whole(middle: str = SMOOTH, last: str = "", **choices: Any) -> str:
    return HEAD + CALIBRATE + SPLIT + middle + FIT + RANGES + allocate(**choices) + last


def notes(run: Run) -> list[dict[str, Any]]:
    return [entry for entry in run.done if entry["step"] == "allocate"]


def codes(run: Run) -> dict[str, Tensor]:
    return {name: layer.stored_codes().clone() for name, layer in run.layers().items()}


def gauss(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---- kurtosis and splits -----------------------------------------------------------------------------------------
def test_kurtosis_of_known_rows() -> None:
    """Section 7, invariant 2."""
    rows = gauss(50, 20_000)
    found = kurtosis(rows)
    assert torch.allclose(found, torch.full_like(found, 3.0), atol=0.2)
    assert torch.allclose(kurtosis(rows * 7 - 2), found) and torch.allclose(kurtosis(-rows * 1e-6), found)
    assert torch.allclose(kurtosis(rows.reshape(50, 200, 10, 10)), found)
    spiked = gauss(30, 300)
    spiked[17, 5] = 30.0
    assert int(kurtosis(spiked).argmax()) == 17
    uniform = torch.linspace(-1, 1, 10_001)[None]
    assert float(kurtosis(uniform)) == pytest.approx(1.8, abs=0.01)
    assert float(kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))) == pytest.approx((3 / 4) ** 2)  # unbiased: not 1
    odd = torch.stack([torch.zeros(4), torch.full((4,), 0.1), torch.tensor([1.0, 2, 3, 4])])
    assert kurtosis(odd)[:2].tolist() == [0.0, 0.0] and torch.isfinite(kurtosis(torch.ones(3, 1))).all()


def test_splits_are_balanced_partitions() -> None:
    """Section 7, invariant 3: as many rows up as down, those with the largest and the smallest score."""
    ran = 0
    for count in (10, 16, 29, 30, 200, 1280):
        scores = gauss(1, count, count)[0]
        order = scores.argsort().tolist()
        for bits in (2, 3, 4, 7):
            for groups in range(6):
                found, k = split_rows(scores, bits, groups), groups * (count // 10)
                assert len(found) == count and Counter(found) == Counter(
                    {b: n for b, n in ((bits - 1, k), (bits, count - 2 * k), (bits + 1, k)) if n})
                assert sum(found) == bits * count, "the average is N exactly"
                assert {i for i, b in enumerate(found) if b == bits - 1} == set(order[:k])
                assert {i for i, b in enumerate(found) if b == bits + 1} == set(order[count - k :])
                ran += 1
    assert ran == 144
    assert split_rows(torch.rand(9), 4, 5) == (4,) * 9  # too few rows to move any
    assert split_rows(torch.ones(20), 4, 2) == (5,) * 4 + (4,) * 12 + (3,) * 4  # equal scores: by number


def test_extra_rows() -> None:
    """MPQ-DM+: the next ones by score get one bit more, those that moved already do not."""
    scores, ran = torch.arange(40.0), 0
    for groups in range(6):
        for extra in (0.05, 0.1, 0.5, 1.0):
            found, k = split_rows(scores, 3, groups, extra), groups * 4
            more = min(round(extra * 40), 40 - 2 * k)
            assert found == (2,) * k + (3,) * (40 - 2 * k - more) + (4,) * (k + more)
            ran += 1
    assert ran == 24


@pytest.mark.parametrize("bits", [3, 4])
def test_the_synthetic_table(bits: int) -> None:
    """Section 7: 200 rows of 576 Gaussian weights, 20 of them with two outliers of 15 sd; relative error."""
    weight, generator = gauss(200, 576) * 0.05, torch.Generator().manual_seed(1)
    chosen = torch.randperm(200, generator=generator)[:20]
    for row in chosen.tolist():
        signs = torch.randint(0, 2, (2,), generator=generator) * 2 - 1
        weight[row, torch.randperm(576, generator=generator)[:2]] = 0.75 * signs
    errors = {}
    for width in (bits - 1, bits, bits + 1):
        s, z = (t[:, None] for t in ranges.search(weight, Grid(bits=width)))
        errors[width] = (weight - decode(encode(weight, reciprocal(s), z, 2**width - 1), s, z)).square().sum(1)

    def total(scores: Tensor, groups: int, extra: float = 0.0) -> float:
        split = torch.tensor(split_rows(scores, bits, groups, extra))
        return float(sum(errors[b][split == b].sum() for b in errors) / errors[bits].sum())

    by_kurtosis, raised = total(kurtosis(weight), 1), total(kurtosis(weight), 0, 0.1)
    draws = [total(torch.randperm(200, generator=torch.Generator().manual_seed(i)).float(), 1) for i in range(20)]
    by_chance, reverse = sum(draws) / len(draws), total(-kurtosis(weight), 1)
    assert by_kurtosis < 1 < by_chance < reverse and raised < by_kurtosis < min(draws)
    want = {4: (0.65, 1.12, 0.55), 3: (0.77, 1.10, 0.64)}[bits]
    assert (by_kurtosis, by_chance, raised) == pytest.approx(want, abs=0.07)
    assert set(kurtosis(weight).topk(20).indices.tolist()) == set(chosen.tolist())


# ---- a run -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A fitted run, and one that goes on to mix, at 3 bits with timed ranges; a tenth of the rows have outliers."""
    runs = []
    for name, last in (("fitted", ""), ("mixed", allocate())):
        pipe = tiny.pipeline("text")
        with torch.no_grad():
            for module in pipe.unet.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    rows = module.weight.flatten(1)
                    rows[::10, 3] = 12 * rows.std()
        text = whole().replace("activation = {}", "activation = { timed = true }").replace(allocate(), last)
        runs.append(execute(tmp_path_factory.mktemp(name), pipe, text, weights=3))
    return runs[0], runs[1]


def test_units_are_the_wide_layers_of_these_bits(pair: tuple[Run, Run]) -> None:
    _, run = pair
    want = [n for n, layer in run.layers().items() if n not in ("conv_in", "conv_out")]
    assert [entry["unit"] for entry in notes(run)] == want and len(want) > 50
    for text, keep in ((allocate(layers="*to_q | conv_in"), lambda n: n.endswith("to_q")),
                       (allocate(bits=5), lambda n: False), (allocate(shares=0), lambda n: False),
                       (allocate(bits=3), lambda n: n in want)):
        step = next(s for s in recipe(run.journal.folder, whole().replace(allocate(), text)).steps
                    if isinstance(s, Allocate))
        assert step.units(run) == [n for n in run.layers() if keep(n)]
    assert run.recipe.steps[-1].units(run) == want  # the same after all have been mixed


def test_every_layer_ends_with_a_balanced_split(pair: tuple[Run, Run]) -> None:
    fitted, run = pair
    used = Counter[int]()
    for entry in notes(run):
        layer, before = run.layers()[entry["unit"]], fitted.layers()[entry["unit"]]
        spec = layer.spec.weight
        assert spec is not None and before.spec.weight is not None
        bits = spec.row_bits or (3,) * layer.out_channels_
        k = entry["groups"] * (layer.out_channels_ // 10)
        assert Counter(bits)[2] == Counter(bits)[4] == k and sum(bits) == 3 * len(bits)
        assert entry["average_bits"] == 3 and entry["rows"].get("3", 0) == len(bits) - 2 * k
        assert entry["loss_end"] <= entry["loss_start"]  # section 7, invariant 4: split 0 is a candidate
        assert (entry["loss_end"] == entry["loss_start"]) == (entry["groups"] == 0)
        kept = torch.tensor(bits) == 3
        assert torch.equal(layer.stored_codes()[kept], before.stored_codes()[kept])
        assert torch.equal(layer.weight_scale[kept], before.weight_scale[kept])
        for row, width in zip(layer.stored_codes(), bits, strict=True):  # invariant 6
            assert len(row.unique()) <= 2**width * len(layer.segments) and int(row.max()) < 2**width
        if entry["groups"] == 0:
            assert torch.equal(layer.stored_codes(), before.stored_codes()) and not spec.row_bits
        used[entry["groups"]] += 1
    assert sum(used.values()) > 50 and len(used) >= 2 and sum(n for g, n in used.items() if g) > 15, used


def test_the_rest_of_a_layer_is_as_it_was(pair: tuple[Run, Run]) -> None:
    """Input scales, tables of the activation, and every layer that did not move."""
    fitted, run = pair
    ran = 0
    for name, layer in run.layers().items():
        before = fitted.layers()[name]
        assert layer.input is not None and before.input is not None
        assert layer.input_scale is not None and before.input_scale is not None
        assert torch.equal(layer.input_scale, before.input_scale)
        assert layer.input.scale.shape[0] == 3
        for key in ("scale", "inverse_scale", "zero_point"):
            assert torch.equal(getattr(layer.input, key), getattr(before.input, key))
        assert layer.trial_weight is None and layer.face == "float"
        ran += 1
    assert ran == len(run.plan.layers) > 50
    untouched = ("conv_in", "conv_out")
    assert all(torch.equal(run.layers()[n].stored_codes(), fitted.layers()[n].stored_codes()) for n in untouched)


def test_the_objective_is_the_output_error_behind_quantized_layers(pair: tuple[Run, Run]) -> None:
    """Measured anew, in full: the float layer on what the final network gives it, against the final layer."""
    fitted, run = pair
    ran = 0
    for entry in notes(run)[::6]:
        name, losses = entry["unit"], []
        with wrap.show(run.model, "sim"):
            recording = run.tape.record(run.model, name, output=False, limit=6)
        assert recording.inputs
        for layer in (fitted.layers()[name], run.layers()[name]):
            clock = (fitted if layer is fitted.layers()[name] else run).clock
            x = recording.inputs[0].take(torch.arange(6))
            with torch.no_grad(), clock.at(recording.timesteps):
                target = layer.operation(x, layer.weight)
                with wrap.show(layer, "sim"):
                    losses.append(float((layer(x) - target).double().square().sum() / 6))
        assert losses == pytest.approx([entry["loss_start"], entry["loss_end"]], rel=1e-3), name
        ran += 1
    assert ran >= 9


def test_rows_with_outliers_get_the_bits(pair: tuple[Run, Run]) -> None:
    _, run = pair
    raised = Counter[bool]()
    for layer in run.layers().values():
        spec = layer.spec.weight
        if spec is not None and spec.row_bits:
            raised.update(i % 10 == 0 for i, b in enumerate(spec.row_bits) if b == 4)
            scores = kurtosis(layer.scaled_weight())
            up, down = (scores[torch.tensor(spec.row_bits) == b] for b in (4, 2))
            assert float(up.min()) >= float(down.max())
    share = raised[True] / sum(raised.values())
    assert share > 0.25, share  # a tenth of all rows


def test_random_order_follows_the_seed(tmp_path: Path) -> None:
    plans = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        text = whole(rank="random", extra=0.2)
        run = execute(tmp_path / str(i), least_pipeline(channels=20), text, seed=seed)
        assert len(notes(run)) > 8 and all(s.weight.row_bits for s in map(run.plan.layers.get, (
            e["unit"] for e in notes(run))) if s is not None and s.weight is not None)
        plans.append([s.weight.row_bits for s in run.plan.layers.values() if s.weight is not None])
    assert plans[0] == plans[1] != plans[2]


def test_extra_bits_in_a_run(tmp_path: Path) -> None:
    """The average rises by the share, at once in the notes, in the packed bytes and in what inspection would say."""
    run = execute(tmp_path, least_pipeline(channels=20), whole(extra=0.1, last=PACK))
    for entry in notes(run):
        layer = run.layers()[entry["unit"]]
        assert layer.spec.weight is not None
        bits = layer.spec.weight.row_bits
        more = round(0.1 * len(bits))
        assert sum(bits) == 4 * len(bits) + more and entry["average_bits"] == round(sum(bits) / len(bits), 4)
        assert layer.face == "packed" and all(hasattr(layer, f"codes{b}") for b in set(bits))
        assert weight_bits(layer.spec) == round(sum(bits) / len(bits), 3)
    assert len(notes(run)) > 8 and all(p["ok"] for e in run.done for p in e.get("proof", {}).values())
    stored = sum(t.nbytes for t in run.model.state_dict().values())
    assert model_bytes(run.survey, run.plan)["packed_bytes"] == stored
    shown = inspection.build("x", "y", run.survey, Planned(run.plan, {}), run.recipe, False, "cpu")
    assert {row["name"]: row["weight_bits"] for row in shown.rows} == {
        name: weight_bits(spec) for name, spec in run.plan.layers.items()
    }
    assert any(isinstance(row["weight_bits"], float) for row in shown.rows)


@pytest.mark.parametrize("binary", ["affine", "symmetric"])
def test_one_bit_rows(binary: str, tmp_path: Path) -> None:
    """At 2 bits on average the lowered rows have one: 0 and one value, or two signs. Half of the rows are like that."""
    text = whole(middle="", last=PACK).replace("weight = {}", f'weight = {{ binary = "{binary}" }}')
    pipe = least_pipeline(channels=20)
    with torch.no_grad():
        for module in pipe.unet.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                rows = module.weight[::2]
                rows.copy_(0.1 * (rows > 0) if binary == "affine" else torch.where(rows > 0, 0.1, -0.1))
    run = execute(tmp_path, pipe, text, weights=2)
    ran = 0
    for entry in notes(run):
        layer = run.layers()[entry["unit"]]
        assert layer.spec.weight is not None
        if not layer.spec.weight.row_bits:
            continue
        rows = torch.tensor(layer.spec.weight.row_bits) == 1
        values = layer.decoded_weight()[rows][:, : layer.segments[0]]
        for row in values:
            found = row.unique()
            assert len(found) <= 2 and ((found == 0).any() if binary == "affine" else (found != 0).all())
            ran += 1
    assert ran > 0 and torch.isfinite(pipe.unet(torch.zeros(1, 1, 8, 8), torch.tensor(5)).sample).all()


def test_memory_changes_no_bit(tmp_path: Path) -> None:
    """With all outputs kept, with few and with none, the choices are the same; what is kept stays within its bounds."""
    found = []
    for memory in (1 << 30, 60_000, 0):
        folder = tmp_path / str(memory)
        folder.mkdir()
        run = begin(folder, tiny.pipeline("unconditional"), recipe(folder, whole(rank="random")), memory=memory)
        run.execute()
        run.journal.release()
        assert "allocate" not in run.memos  # dropped with the last unit
        found.append((run.plan, codes(run), notes(run)))
    for plan, stored, said in found[1:]:
        assert plan == found[0][0] and said == found[0][2]
        assert all(torch.equal(stored[n], found[0][1][n]) for n in stored) and len(stored) > 20


def test_finished_blocks_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of layers inside a finished block are dropped, those of whole blocks stay."""
    from bitbrush.steps import allocate as module

    settle, seen = module.settle, 0

    def checked(run: Run, memo: Any, unit: str) -> None:
        nonlocal seen
        settle(run, memo, unit)
        closed = {b for b in memo.finished if b in run.survey.blocks}
        inner = {m for b in closed for m in run.survey.blocks[b] if m != b}
        assert inner.isdisjoint(memo.finished) and inner.isdisjoint(key[0] for key in memo.kept)
        assert memo.used == sum(t.nbytes for t in memo.kept.values())
        seen += 1

    monkeypatch.setattr(module, "settle", checked)
    run = execute(tmp_path, tiny.pipeline("unconditional"), whole())
    assert seen == len(notes(run)) > 20
