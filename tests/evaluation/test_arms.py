"""Arms: opened when their turn comes, let go of afterwards, refused before anything is drawn."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import small
import tiny
from bitbrush import assets
from bitbrush.artifact.save import save
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.arms import Arm, check_folder, check_kernel, draws_from_text, is_pipeline, open_pipeline


def test_a_function_is_called_once_a_turn_and_dropped() -> None:
    alive: list[Any] = []

    def make() -> Any:
        made = small.least_pipeline()
        alive.append(weakref.ref(made.unet))
        return made

    arm = Arm("made", make)
    with arm.turn():
        assert arm.pipeline() is arm.pipeline() and len(alive) == 1
        assert arm.digest() == Arm("given", small.least_pipeline()).digest()
    gc.collect()
    assert alive[0]() is None
    with arm.turn():
        assert arm.pipeline() is not None and len(alive) == 2


def test_a_folder_tells_its_digest_without_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.least_pipeline().save_pretrained(tmp_path / "m")
    arm = Arm("m", tmp_path / "m", device="cpu")
    monkeypatch.setattr(arm, "_open", lambda: pytest.fail("opened"))
    with arm.turn():
        assert len(arm.digest()) == 64 and arm.digest() == Arm("n", str(tmp_path / "m")).digest()


def test_an_artifact_is_checked_by_its_hashes(tmp_path: Path) -> None:
    pipe, plan = tiny.quantized_pipeline("unconditional")
    folder = save(pipe, tmp_path / "q", plan)
    arm = Arm("q", folder, device="cpu")
    arm.check(prompts=False)
    with arm.turn():
        assert len(arm.digest()) == 64 and is_pipeline(arm.pipeline())
    weights = next(folder.glob("unet/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    arm = Arm("q", folder)
    arm.check(prompts=False)  # sizes only
    with pytest.raises(ArtifactError), arm.turn():
        arm.digest()


def test_a_kernel_is_of_results_and_tells_their_pictures_apart(tmp_path: Path) -> None:
    pipe, plan = tiny.quantized_pipeline("text", timed=False)
    folder, plain = save(pipe, tmp_path / "q", plan), tmp_path / "m"
    small.least_pipeline().save_pretrained(plain)
    arms = {kernel: Arm("q", folder, device="cpu", kernel=kernel) for kernel in ("reference", "auto")}
    chosen = {}
    for kernel, arm in arms.items():
        with arm.turn():
            layers = [m for m in arm.pipeline().unet.modules() if hasattr(m, "declare_packed")]
            chosen[kernel] = {layer.kernel for layer in layers}
    assert chosen == {"reference": {"reference"}, "auto": {"auto"}}
    assert arms["reference"].digest() == Arm("q", folder).digest() != arms["auto"].digest()
    assert Arm("m", plain, kernel="auto").digest() == Arm("m", plain).digest()
    check_kernel("auto", arms.values(), "here")
    check_kernel("reference", [Arm("m", plain)], "here")
    with pytest.raises(InputError, match="has nothing to compute"):
        check_kernel("auto", [Arm("m", plain), Arm("given", pipe)], "here")
    with pytest.raises(InputError, match="no kernel named"):
        check_kernel("fastest", arms.values(), "here")


def test_what_cannot_be_hashed_is_never_used_again() -> None:
    pipe = small.least_pipeline()
    pipe.unet.register_forward_hook(lambda *_: None)
    first, second = Arm("a", pipe), Arm("a", pipe)
    assert first.digest() != second.digest() and first.digest() == first.digest()
    assert "hook of unknown code" in first.opaque


def test_prompts_and_kind_must_fit(tmp_path: Path) -> None:
    small.least_pipeline().save_pretrained(tmp_path / "m")
    for given in (small.least_pipeline(), tmp_path / "m"):
        Arm("x", given).check(prompts=False)
        with pytest.raises(InputError, match="do not belong together") as caught:
            Arm("x", given).check(prompts=True)
        assert small.complete(caught.value) and caught.value.where == "x"
    assert draws_from_text(str(assets.path("emoji-sd-tiny"))) and not draws_from_text(str(tmp_path / "m"))


@pytest.mark.parametrize("given", [None, 3, nn.Linear(2, 2), ["a"]])
def test_what_is_no_arm(given: Any) -> None:
    with pytest.raises(InputError, match="cannot be evaluated") as caught:
        Arm("x", given).check(prompts=False)
    assert small.complete(caught.value)


def test_a_function_has_to_return_a_pipeline() -> None:
    arm = Arm("x", lambda: nn.Linear(2, 2))
    arm.check(prompts=False)
    with pytest.raises(InputError, match="returned no pipeline"), arm.turn():
        arm.pipeline()


def test_a_pipeline_that_was_quantized_before_is_opened(tmp_path: Path) -> None:
    """`quantize` refuses a second rounding; to measure one is what this is for."""
    pipe, plan = tiny.quantized_pipeline("unconditional")
    folder = save(pipe, tmp_path / "q", plan)
    (folder / "bitbrush.json").rename(tmp_path / "aside.json")  # as if another tool had written it
    assert is_pipeline(open_pipeline(str(folder), "cpu"))


def test_folders_that_are_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such result"):
        check_folder(str(tmp_path / "none"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="bare model"):
        check_folder(str(tmp_path / "bare"))
    (tmp_path / "half" / ".run").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not finished"):
        check_folder(str(tmp_path / "half"))


def test_a_digest_is_the_same_in_another_process() -> None:
    """Configs keep sets inside, whose order follows the hash seed of the process."""
    import os
    import subprocess
    import sys

    code = ("import tiny; from bitbrush.evaluation.digests import pipeline_digest as digest; "
            "print(digest(tiny.text_pipeline()))")
    found = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.add(run.stdout.split()[-1])
    assert len(found) == 1 and len(found.pop()) == 64
