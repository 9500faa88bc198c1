"""The tape, recordings, stores and memos: batches in order, bounded memory, the same bits with and without a memo."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from bitbrush.engine.memo import Memo
from bitbrush.engine.store import Store
from bitbrush.engine.tape import Tape
from bitbrush.errors import InputError, NumericsError, ResourceError
from bitbrush.network import wrap
from bitbrush.network.survey import survey

CPU = torch.device("cpu")


def filled(folder: Path, counts: tuple[int, ...] = (5, 1, 4), budget: int = 1 << 30) -> Tape:
    """A tape for `tiny.text_unet` with shards of these sizes; sample i has timestep 10 i."""
    tape = Tape(folder, CPU, budget)
    start = 0
    for number, count in enumerate(counts):
        generator = torch.Generator().manual_seed(number)
        path = folder / f"shard{number}.safetensors"
        save_file(
            {
                "sample": torch.randn(count, 4, 8, 8, generator=generator),
                "timestep": 10.0 * torch.arange(start, start + count),
                "encoder_hidden_states": torch.randn(count, tiny.TOKENS, 16, generator=generator),
                "output": torch.randn(count, 4, 8, 8, generator=generator),
            },
            path,
        )
        tape.add(path)
        start += count
    return tape


# ---- batches -----------------------------------------------------------------------------------------------------
def test_batches_keep_the_order_and_do_not_cross_shards(tmp_path: Path) -> None:
    tape, ran = filled(tmp_path), 0
    assert len(tape) == 10 and tape.batch == 16
    for size in (1, 2, 3, 5, 100):
        for limit in (None, 1, 4, 5, 6, 7, 10, 99):
            batches = list(tape.batches(size, limit))
            times = torch.cat([b["timestep"] for b in batches])
            assert times.tolist() == [10.0 * i for i in range(min(10, limit or 10))]
            assert all(0 < len(b["sample"]) <= size for b in batches)
            crossing = {(b["timestep"][0] >= edge, b["timestep"][-1] >= edge) for b in batches for edge in (50, 60)}
            assert (False, True) not in {(bool(a), bool(b)) for a, b in crossing}
            ran += 1
    assert ran == 40


def test_select(tmp_path: Path) -> None:
    tape = filled(tmp_path)
    for chosen in ([0, 4, 5, 9], [3], list(range(10)), [5], []):
        batches = list(tape.select(chosen, 3))
        assert [float(t) for b in batches for t in b["timestep"]] == [10.0 * i for i in chosen]
    whole = torch.cat([b["sample"] for b in tape.batches()])
    part = torch.cat([b["sample"] for b in tape.select([1, 7, 8])])
    assert torch.equal(part, whole[[1, 7, 8]])


def labelled(folder: Path, rows: list[list[tuple[int, float, int]]], sources: list[str]) -> Tape:
    """A tape of shards whose samples are (trajectory, timestep, half)."""
    tape = Tape(folder, CPU, 1)
    for number, (shard, source) in enumerate(zip(rows, sources, strict=True)):
        trajectory, timestep, half = (list(part) for part in zip(*shard, strict=True))
        path = folder / f"labelled{number}.safetensors"
        save_file({"timestep": torch.tensor(timestep), "trajectory": torch.tensor(trajectory),
                   "half": torch.tensor(half), "sample": torch.zeros(len(shard), 1)}, path)
        tape.add(path, source)
    return tape


def test_the_table_of_trajectories(tmp_path: Path) -> None:
    """Gaps are -1; steps descend; numbers of two steps are kept apart; a limit keeps the grid of the whole tape."""
    rows = [[(3, 900.0, 0), (3, 900.0, 1), (0, 100.0, 0)], [(7, 500.0, 1)], [(3, 500.0, 0), (0, 900.0, 1)]]
    tape = labelled(tmp_path, rows, ["a", "a", "b"])
    gap = [-1, -1]
    want = [  # steps 900, 500, 100
        [gap, gap, [2, -1]],  # trajectory 0 of a
        [[0, 1], gap, gap],  # 3 of a
        [gap, [-1, 3], gap],  # 7 of a
        [[-1, 5], gap, gap],  # 0 of b
        [gap, [4, -1], gap],  # 3 of b
    ]
    table = tape.table()
    assert table.dtype == torch.int64 and table.tolist() == want
    assert tape.table(2).tolist() == [want[1]]
    assert tape.table(4).tolist() == want[:3] and tape.table(99).tolist() == want
    assert tape.column("timestep", 4).tolist() == [900.0, 900.0, 100.0, 500.0]
    found = [i for row in want for step in row for i in step if i >= 0]
    assert sorted(found) == list(range(len(tape))) == list(range(6))


def test_the_table_orders_like_the_sampler_whatever_the_shards(tmp_path: Path) -> None:
    generator, ran = torch.Generator().manual_seed(0), 0
    times = [999.0, 666.5, 333.25, 0.0]
    for case in range(5):
        cells = [(k, t, h) for k in range(6) for t in times for h in range(2)]
        kept = [cells[i] for i in torch.randperm(len(cells), generator=generator)[:40].tolist()]
        (tmp_path / str(case)).mkdir()
        table = labelled(tmp_path / str(case), [kept[:11], kept[11:12], kept[12:]], ["s"] * 3).table()
        for i, (k, t, h) in enumerate(kept):
            assert table[k, times.index(t), h] == i
            ran += 1
        assert (table == -1).sum() == 8
    assert ran == 200


def test_an_empty_tape(tmp_path: Path) -> None:
    tape = Tape(tmp_path, CPU, 1)
    for read in (tape.batches, lambda: tape.select([0]), tape.table):
        with pytest.raises(InputError, match="no calibration samples") as caught:
            list(read())
        assert "calibrate" in (caught.value.try_ or "")


def test_inputs_restore_nested_conditions(tmp_path: Path) -> None:
    batch = {
        "sample": torch.ones(2, 3),
        "timestep": torch.tensor([1.0, 2.0]),
        "output": torch.ones(2, 3),
        "trajectory": torch.tensor([5, 6]),
        "half": torch.tensor([0, 1]),
        "class_labels": torch.tensor([1, 2]),
        "added_cond_kwargs.text_embeds": torch.ones(2, 4),
        "added_cond_kwargs.time_ids": torch.ones(2, 6),
    }
    args, kwargs = Tape(tmp_path, CPU, 1, torch.bfloat16).inputs(batch)
    assert args[0].dtype == torch.bfloat16 and args[1].dtype == torch.float32
    assert set(kwargs) == {"class_labels", "added_cond_kwargs"} and kwargs["class_labels"].dtype == torch.int64
    assert {k: v.dtype for k, v in kwargs["added_cond_kwargs"].items()} == dict.fromkeys(
        ("text_embeds", "time_ids"), torch.bfloat16
    )


# ---- stores ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_store_spills_to_a_file_and_reads_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(23, 3, 4, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    stores = [Store(tmp_path, CPU, budget, 23) for budget in (1 << 20, 0)]
    for store in stores:
        for part in rows.split(7):
            store.append(part)
        assert len(store) == 23
        index = torch.tensor([22, 0, 7, 7, 13])
        assert torch.equal(store.take(index), rows[index])
    memory, spilled = stores
    assert memory._file is None and spilled._file is not None
    assert list(tmp_path.iterdir()), "the rows lie in the folder"
    del spilled, store
    stores.clear()
    assert not list(tmp_path.iterdir()), "and go with the store"


def test_store_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="disk is full"):
        Store(tmp_path, CPU, 0, 5).append(torch.ones(1, 3))
    with pytest.raises(IndexError):
        Store(tmp_path, CPU, 0, 5).take(torch.tensor([0]))


# ---- recordings --------------------------------------------------------------------------------------------------
def test_a_recording_is_what_the_module_saw(tmp_path: Path) -> None:
    model, tape, ran = tiny.text_unet(), filled(tmp_path), 0
    found = survey(model, tokens=tiny.TOKENS)
    for site in found.blocks:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(site).register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        recording = tape.record(model, site)
        handle.remove()
        assert len(recording) == 10 and recording.timesteps.tolist() == [10.0 * i for i in range(10)]
        index = torch.arange(10)
        answer = torch.cat(seen)
        assert torch.equal(recording.output.take(index), answer)
        with torch.no_grad():
            again = recording.call(model.get_submodule(site), index)
        assert torch.allclose(again, answer, atol=1e-5), site
        assert not model.get_submodule(site)._forward_hooks and not model.get_submodule(site)._forward_pre_hooks
        ran += 1
    assert ran == len(found.blocks) == 26


def test_recordings_only_of_what_is_wanted(tmp_path: Path) -> None:
    model, tape = tiny.text_unet(), filled(tmp_path, budget=0)
    target = tape.record(model, "mid_block.resnets.0", inputs=False, limit=7)
    assert not target.inputs and len(target) == 7
    given = tape.record(model, "mid_block.resnets.0", output=False, limit=7)
    assert given.inputs and len(given.output) == 0
    assert all(store._file is not None for store in given.inputs.values())


def test_memo_changes_no_bit(tmp_path: Path) -> None:
    """Recordings of every block in order, in the float and in the quantized face, with memos of several budgets."""
    plan = tiny.plan_for(tiny.text_unet(), timed=False)
    model = tiny.quantized_model(tiny.text_unet(), plan, pack=False)
    tape = filled(tmp_path)
    blocks = list(survey(tiny.text_unet(), tokens=tiny.TOKENS).blocks)
    ran = replayed = 0
    for budget in (0, 20_000, 1 << 30):
        memo = Memo(budget)
        for site in blocks:
            plain = tape.record(model, site, size=4)
            with_memo = tape.record(model, site, size=4, memo=memo)
            index = torch.arange(10)
            assert torch.equal(plain.output.take(index), with_memo.output.take(index)), site
            for i, store in plain.inputs.items():
                assert torch.equal(store.take(index), with_memo.inputs[i].take(index))
            memo.finish(site)
            ran += 1
        assert memo.used <= budget
        replayed = max(replayed, len(memo.kept))
    assert ran == 3 * 26 and replayed > 60
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_memo_saves_work(tmp_path: Path) -> None:
    model, tape, memo = tiny.text_unet(), filled(tmp_path, (8,)), Memo(1 << 30)
    calls: list[int] = []
    memo.finish("down_blocks.0.resnets.0")
    inner = model.down_blocks[0].resnets[0].conv1
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        tape.record(model, "mid_block.resnets.0", memo=memo)
    handle.remove()
    assert len(calls) == 1


def test_memo_shared_by_steps_that_look_at_different_samples(tmp_path: Path) -> None:
    """A step of fewer samples has a smaller last batch: its outputs must not be replayed for the full one."""
    model, tape, memo = tiny.text_unet(), filled(tmp_path, (10,)), Memo(1 << 30)
    memo.finish("conv_in")
    for limit in (6, 10, 6, 9):
        plain = tape.record(model, "down_blocks.0.resnets.0", size=4, limit=limit)
        shared = tape.record(model, "down_blocks.0.resnets.0", size=4, limit=limit, memo=memo)
        assert torch.equal(plain.output.take(torch.arange(limit)), shared.output.take(torch.arange(limit)))


def test_memo_of_a_block_does_not_hide_its_layers(tmp_path: Path) -> None:
    """One step by block, the next by layer: the finished block around the layer has to run."""
    model, tape, memo = tiny.text_unet(), filled(tmp_path), Memo(1 << 30)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in ("conv_in", "down_blocks.0.resnets.0", block):
        memo.finish(name)
    tape.record(model, "mid_block.resnets.0", memo=memo)
    plain = tape.record(model, f"{block}.attn1.to_q")
    shared = tape.record(model, f"{block}.attn1.to_q", memo=memo)
    assert torch.equal(plain.output.take(torch.arange(10)), shared.output.take(torch.arange(10)))


def test_nan_while_recording_names_the_site(tmp_path: Path) -> None:
    model, tape = tiny.text_unet(), filled(tmp_path)
    with torch.no_grad():
        model.mid_block.resnets[0].conv1.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError) as caught:
        tape.record(model, "mid_block.resnets.0")
    assert caught.value.where == "mid_block.resnets.0"
    wrap.wrap(model, tiny.plan_for(tiny.text_unet(), timed=False))
    assert len(tape.record(model, "conv_in")) == 10  # before the fault, all is well
