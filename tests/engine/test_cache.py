"""The cache of units: who may share what, damage, and that nothing of the result depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitbrush
import tiny
from bitbrush.engine.cache import Cache
from bitbrush.engine.disk import Disk
from bitbrush.engine.progress import Silent
from bitbrush.engine.sealed import seal, unseal
from bitbrush.engine.step import UnitResult
from bitbrush.network.wrap import layers
from bitbrush.numbers.grid import Grid, LayerSpec, WeightSpec
from small import CALIBRATE, FIT, HEAD, PACK, RANGES, ROUND, SPLIT, least_pipeline, recipe

PRINT = {"model": "a", "seed": "0"}
TEXT = HEAD + CALIBRATE + SPLIT + FIT + ROUND + RANGES + PACK


def keys(folder: Path, text: str, found: dict[str, str] | None = None) -> dict[str, str]:
    return Cache(folder, found or PRINT, recipe(folder, text), Disk()).keys


def test_a_key_holds_the_steps_before_and_not_those_after(tmp_path: Path) -> None:
    base = keys(tmp_path, TEXT)
    assert len(set(base.values())) == len(base) == 7
    later = keys(tmp_path, TEXT.replace("iterations = 4", "iterations = 5"))
    assert {n for n in base if base[n] == later[n]} == {"calibrate", "split", "weights-fit"}
    assert keys(tmp_path, TEXT.replace('name = "small"', 'name = "other"')) == base, "a name does nothing"
    bits = keys(tmp_path, TEXT.replace("weights = 4", "weights = 3"))
    layers = keys(tmp_path, TEXT.replace("conv_in | conv_out", "conv_in"))
    seed = keys(tmp_path, TEXT, PRINT | {"seed": "1"})
    assert not any(set(base.values()) & set(other.values()) for other in (bits, layers, seed))


def test_arms_that_differ_in_activations_share_the_weights(tmp_path: Path) -> None:
    """Calibration, ranges of weights and rounding do not look at activations; a split changes whole specs."""
    text = HEAD + CALIBRATE + FIT + ROUND + RANGES + PACK
    base, shared = keys(tmp_path, text), {"calibrate", "weights-fit", "weights"}
    ran = 0
    for arm in (text.replace("activation = {}", "activation = { timed = true }"),
                text.replace("activations = 8", "activations = 6"),
                text.replace("[layers]", '[layers]\n"*:q" = { activation = { bits = 8 }, optional = true }'),
                text.replace('"conv_in', '"*.to_k" = { activation = "float" }\n"conv_in')):
        assert arm != text
        other = keys(tmp_path, arm)
        assert {name for name in base if base[name] == other[name]} == shared
        ran += 1
    assert ran == 4
    early = keys(tmp_path, HEAD + CALIBRATE + SPLIT + FIT + ROUND + RANGES + PACK)
    other = keys(tmp_path, (HEAD + CALIBRATE + SPLIT + FIT + ROUND + RANGES + PACK).replace("tions = 8", "tions = 6"))
    assert {name for name in early if early[name] == other[name]} == {"calibrate"}
    order = text.replace('"*" =', '"*.to_k" = { weight = { bits = 8 } }\n"*" =')
    assert not set(keys(tmp_path, order).values()) & set(base.values()), "which rule comes last decides"


def test_a_correction_changes_nothing_of_the_network_under_it(tmp_path: Path) -> None:
    """Its trajectories come early and stand aside; what they are counts for the correction alone."""
    fitted = '[[step]]\ndo = "correct"\nmethod = "tac"\n'
    whole = HEAD + CALIBRATE + '[[step]]\ndo = "trajectories"\n' + SPLIT + FIT + ROUND + RANGES + PACK + fitted
    base, arm = keys(tmp_path, TEXT), keys(tmp_path, whole)
    assert base.items() <= arm.items() and set(arm) - set(base) == {"trajectories", "correct"}
    more = keys(tmp_path, whole.replace('do = "trajectories"', 'do = "trajectories"\nsamples = 9'))
    assert {name for name in arm if arm[name] != more[name]} == {"trajectories", "correct"}
    bits = keys(tmp_path, whole.replace("activations = 8", "activations = 6"))
    assert bits["trajectories"] != arm["trajectories"], "whether it matters is not asked"


def test_weights_come_from_an_arm_with_other_activations(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(HEAD + CALIBRATE + FIT + ROUND + RANGES + PACK)
    two.write_text(one.read_text().replace("activation = {}", "activation = { timed = true }"))
    done, codes = [], []
    for path in (one, two):
        result = bitbrush.quantize(least_pipeline(), path, output=tmp_path / path.stem, cache=tmp_path / "cache",
                                   progress=Silent())
        done.append(set(result.costs))
        codes.append(torch.cat([m.stored_codes().flatten() for m in layers(result.pipeline.unet).values()]))
        assert result.proof["ok"]
    assert done[0] - done[1] == {"calibrate", "weights-fit", "weights"} and "activations-fit" in done[1]
    assert torch.equal(*codes) and len(codes[0]) > 1000


def test_a_result_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", PRINT, recipe(tmp_path, TEXT), Disk())
    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=3)))
    given = UnitResult({"a": torch.arange(5), "b": torch.ones(2, 3).half()}, {"x": spec}, {"loss": 0.1, "n": [1, 2]})
    assert cache.find("split", "all") is None and cache.found == 0
    cache.keep("split", "all", given)
    back = cache.find("split", "all")
    assert back is not None and cache.found == 1
    assert back.plan == given.plan and back.notes == given.notes and back.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(back.tensors[k], t) and back.tensors[k].dtype == t.dtype for k, t in given.tensors.items())
    assert cache.find("split", "another") is None and cache.find("weights", "all") is None
    file = next((tmp_path / "c").glob("*.unit"))
    whole = file.read_bytes()
    damaged = 0
    for i in range(0, len(whole), 7):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:])
        assert cache.find("split", "all") is None
        damaged += 1
    file.write_bytes(whole[:-9])
    assert cache.find("split", "all") is None and damaged > 50


def test_sealed_bytes_of_another_kind_are_refused() -> None:
    assert unseal(b"") is None and unseal(b"x" * 100) is None
    tensors, facts = unseal(seal({"a": torch.ones(2)}, {"k": 1})) or ({}, {})
    assert torch.equal(tensors["a"], torch.ones(2)) and facts == {"k": 1}


@pytest.mark.parametrize("kind", ["plain", "text"])
def test_the_artifact_has_the_same_bytes_with_and_without(kind: str, tmp_path: Path) -> None:
    """A run fills the cache; one that differs in a later step takes the first steps from it, and ends as without."""
    other = tmp_path / "other.toml"
    one, two = tmp_path / "one.toml", other
    one.write_text(TEXT)
    two.write_text(TEXT.replace('method = "minmax"', 'method = "mse"'))

    def run(path: Path, out: str, cache: Path | None) -> tuple[dict[str, bytes], set[str]]:
        pipe = least_pipeline() if kind == "plain" else tiny.pipeline("text")
        result = bitbrush.quantize(pipe, path, prompts=["red apple", "blue car", "green tree", "a cat"],
                                   output=tmp_path / out, cache=cache, progress=Silent())
        files = {p.name: p.read_bytes() for p in (tmp_path / out).rglob("*") if p.suffix in (".safetensors", ".json")}
        return files, set(result.costs)

    want, all_steps = run(two, "without", None)
    run(one, "first", tmp_path / "cache")
    got, done = run(two, "second", tmp_path / "cache")
    assert all_steps - done == {"calibrate", "split", "weights-fit", "weights"}
    assert want.keys() == got.keys() and len(want) > 5
    assert all(got[name] == data for name, data in want.items() if name != "bitbrush.json")


def test_two_processes_may_keep_the_same_result(tmp_path: Path) -> None:
    """Written beside each other under names of their own; whoever is last to finish, the file is whole."""
    import os

    from bitbrush.engine.disk import Disk

    target, data = tmp_path / "same.unit", [bytes([k]) * 200_000 for k in range(2)]
    children = []
    for k in range(2):
        child = os.fork()
        if child == 0:
            for _ in range(50):
                Disk().write(target, data[k], shared=True)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert target.read_bytes() in data and [path.name for path in tmp_path.iterdir()] == ["same.unit"]
