"""`sample` and `compare` on the bundled model and on a tiny unconditional one: pipelines, files, names, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from bitbrush import assets
from bitbrush.artifact.save import save
from bitbrush.cli import main, pictures
from bitbrush.errors import ArtifactError, InputError


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def test_sample_text_to_image(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "picture.png"
    model = str(assets.path("emoji-sd-tiny"))
    assert main(["sample", model, "--prompt", "red apple", "--steps", "2", "-o", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.size == (128, 128)
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]


def test_sample_unconditional_and_the_same_seed_again(unconditional: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["sample", str(unconditional), "-n", "2", "--steps", "2", "--device", "cpu", "--json"]
    assert main([*words, "-o", str(tmp_path / "a.png")]) == 0
    names = json.loads(capsys.readouterr().out)["pictures"]
    assert names == [str(tmp_path / "a-000.png"), str(tmp_path / "a-001.png")]
    assert main([*words, "-o", str(tmp_path / "b.png"), "--batch", "1"]) == 0
    capsys.readouterr()
    first, second = (tmp_path / f"a-{i:03}.png" for i in range(2))
    assert first.read_bytes() != second.read_bytes()
    a, b = (torch.tensor(list(Image.open(tmp_path / f"{x}-001.png").tobytes())).float() for x in "ab")
    assert (a - b).abs().max() <= 1  # the batch changes sums by rounding only


def test_a_kernel_is_chosen_for_results_alone(unconditional: Path, tmp_path: Path, capsys: Any) -> None:
    out, words = tmp_path / "out", ["--steps", "2", "--device", "cpu"]
    pipe, plan = tiny.quantized_pipeline("unconditional")
    save(pipe, out, plan)
    found = {}
    for kernel in ("reference", "auto"):
        file = tmp_path / f"{kernel}.png"
        assert main(["sample", str(out), "-o", str(file), *words, "--kernel", kernel, "--graph"]) == 0
        found[kernel] = torch.tensor(list(Image.open(file).tobytes())).float()
    assert (found["reference"] - found["auto"]).abs().mean() < 2, "another kernel rounds elsewhere, no more"
    capsys.readouterr()
    for more in (["--kernel", "auto"], ["--graph"]):
        assert main(["sample", str(unconditional), "-o", str(tmp_path / "x.png"), *words, *more]) == 3
        assert "leave --kernel and --graph out" in capsys.readouterr().err
    assert main(["sample", str(out), "-o", str(tmp_path / "x.png"), *words, "--kernel", "fastest"]) == 3


def test_prompts_and_kind_must_fit(unconditional: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "a.png")
    assert main(["sample", str(unconditional), "--prompt", "x", "--steps", "2", "-o", out]) == 3
    assert main(["sample", str(assets.path("emoji-sd-tiny")), "--steps", "2", "-o", out]) == 3
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and "takes no prompt" in shown and "a prompt is missing" in shown
    assert '--prompt "red apple"' in shown


@pytest.mark.parametrize("name", ["picture", "picture.txt", "picture.tiff"])
def test_unknown_picture_format(name: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["sample", "anything", "-o", str(tmp_path / name)]) == 3
    assert ".png" in capsys.readouterr().err


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        pictures.open_pipeline(str(folder), "cpu")
    assert caught.value.where and caught.value.why and caught.value.try_
    return str(caught.value)


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    assert "not a diffusers model" in refusal(tmp_path)
    assert "no such model" in refusal(tmp_path / "none")
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json" in refusal(tmp_path)


def test_half_a_pipeline(unconditional: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((unconditional / "model_index.json").read_bytes())
    assert "lacks" in refusal(tmp_path)


def test_a_bare_model(unconditional: Path) -> None:
    assert "bare model cannot draw" in refusal(unconditional / "unet")


def test_a_pickle_is_not_loaded(unconditional: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(unconditional, folder)
    weights = next(folder.glob("unet/*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert "pickle" in refusal(folder)


def test_an_unfinished_result(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    with pytest.raises(ArtifactError, match="not finished") as caught:
        pictures.open_pipeline(str(tmp_path))
    assert caught.value.try_ == f"bitbrush resume {tmp_path}"


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("missing", 3, "no such result"),
        ("unfinished", 4, "not finished"),
        ("bare", 3, "bare model"),
        ("cut", 4, "missing"),
    ],
)
def test_a_comparison_refuses_before_it_draws(
    kind: str, code: int, words: str, unconditional: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / kind
    if kind == "unfinished":
        (folder / ".run").mkdir(parents=True)
    elif kind == "bare":
        shutil.copytree(unconditional / "unet", folder)
    elif kind == "cut":
        pipe, plan = tiny.quantized_pipeline("unconditional")
        next(save(pipe, folder, plan).glob("unet/*.safetensors")).unlink()
    out = tmp_path / "r.html"
    assert main(["compare", str(folder), "--reference", str(unconditional), "-n", "2", "-o", str(out)]) == code
    captured = capsys.readouterr()
    assert words in captured.err and "draw" not in captured.err.partition("error")[0] and not out.exists()


def test_what_the_report_says_of_files(unconditional: Path, tmp_path: Path) -> None:
    found = pictures.about({"FP": unconditional, "other": tmp_path})
    assert found["sizes"]["FP"] == pictures.denoiser_bytes(unconditional) > 10_000 and "other" not in found["sizes"]
    assert found["sizes_of"].endswith("stored as float32")
    assert pictures.denoiser_dtype(assets.path("emoji-sd-tiny")) == "bfloat16"
    assert pictures.denoiser_dtype(tmp_path) == ""
    assert pictures.processor() and "threads" in pictures.machine()


def test_pictures_are_rounded_to_bytes(tmp_path: Path) -> None:
    drawn = torch.tensor([-1.5, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    (path,) = pictures.save_pictures(drawn, tmp_path / "a.png")
    with Image.open(path) as picture:
        assert [picture.getpixel((x, y)) for y in range(2) for x in range(2)] == [(v,) * 3 for v in (0, 0, 128, 255)]


def test_names_of_folders(tmp_path: Path) -> None:
    assert list(pictures.unique_names(["x/rtn", "x/qdiffusion"])) == ["rtn", "qdiffusion"]
    assert list(pictures.unique_names(["a/out", "b/out"])) == ["a/out", "b/out"]
    with pytest.raises(InputError, match="twice"):
        pictures.unique_names(["a/out", "a/../a/out"])


def test_prompts_for_a_comparison(unconditional: Path) -> None:
    said: list[str] = []
    progress: Any = SimpleNamespace(say=said.append)
    pipeline = pictures.open_pipeline(str(unconditional), "cpu")
    assert pictures.choose_prompts(pipeline, None, progress) is None and not said
    assert pictures.choose_prompts(pipeline, ["a"], progress) is None and "not used" in said.pop()
    emoji = pictures.open_pipeline(str(assets.path("emoji-sd-tiny")), "cpu")
    assert pictures.choose_prompts(emoji, ["a"], progress) == ["a"] and not said
    assert len(pictures.choose_prompts(emoji, None, progress) or ()) == 512 and "bundled" in said.pop()
    assert pictures.emoji_evaluator(pipeline) is None
    assert pictures.emoji_evaluator(emoji) is not None


def test_history(tmp_path: Path) -> None:
    assert pictures.read_history(tmp_path) is None
    (tmp_path / "history.json").write_text('{"recipe": "rtn"}')
    assert pictures.read_history(tmp_path) == {"recipe": "rtn"}
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ArtifactError):
        pictures.read_history(tmp_path)
