"""`bitbrush sensitivity` on the smallest pipeline: files, tables, refusals before anything slow."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bitbrush
import small
from bitbrush.cli import main, sensing
from bitbrush.cli.render import Screen
from bitbrush.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "least"
    small.least_pipeline().save_pretrained(folder)
    return str(folder)


def words(model: str, folder: Path, *more: str) -> list[str]:
    return ["sensitivity", model, "-n", "1", "--steps", "2", "--device", "cpu", "-o", str(folder / "s.json"), *more]


def test_a_whole_run(model: str, tmp_path: Path, capsys: Any) -> None:
    plot = tmp_path / "map.svg"
    assert main(words(model, tmp_path, "--weights", "4,2", "--layers", "conv_*", "--plot", str(plot))) == 0
    shown = capsys.readouterr().out
    assert "W4A8" in shown and "W2A8" in shown and "conv_in" in shown and "all layers at once" in shown
    assert "rank correlation" in shown and str(tmp_path / "s.run") in shown
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["weights"] == [4, 2] and len(data["rows"]) == 4 and data["settings"]["layers"] == "conv_*"
    assert plot.read_text().count("conv_out") >= 1
    first = (tmp_path / "s.json").read_bytes()
    assert main(words(model, tmp_path, "--weights", "4,2", "--layers", "conv_*", "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == data["rows"] and (tmp_path / "s.json").read_bytes() == first


def test_options_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    kept: dict[str, Any] = {}

    def stand_in(*arguments: Any, **options: Any) -> Any:
        kept.update(options, arguments=arguments)
        return SimpleNamespace(to_json=lambda: {"rows": []})

    monkeypatch.setattr(bitbrush, "sensitivity", stand_in, raising=False)
    prompts = tmp_path / "p.txt"
    prompts.write_text("red apple\nblue car\n")
    line = ["sensitivity", "model", "-w", "3", "-a", "16", "--by", "block", "--prompts", str(prompts), "-n", "2"]
    line += ["--metric", "lpips", "--seed", "5", "--guidance", "2", "--batch", "3", "--folder", str(tmp_path), "--json"]
    assert main(line) == 0
    assert kept["arguments"] == ("model", [3], 16) and kept["prompts"] == ["red apple", "blue car"]
    expected = {"by": "block", "n": 2, "metric": "lpips", "seed": 5, "guidance": 2.0, "batch": 3, "folder": tmp_path,
                "steps": 25, "evaluator": None, "output": Path("sensitivity.json")}  # fmt: skip
    assert {name: kept[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--weights", "four"], "commas"), (["--weights", "9"], "1 to 8"), (["--plot", "map.gif"], "svg"),
        (["--metric", "fid"], "psnr, lpips, clip"), (["--layers", "nowhere.*"], "21 sites"),
        (["--metric", "clip"], "evaluator"),
    ],
)  # fmt: skip
def test_refusals(model: str, tmp_path: Path, capsys: Any, more: list[str], why: str) -> None:
    assert main(words(model, tmp_path, *more)) == 3
    said = capsys.readouterr().err
    assert why in said and "what:" in said and "why:" in said and "try:" in said
    assert "calibrate" not in said, "nothing slow was begun"
    assert not (tmp_path / "s.json").exists()


def test_missing_weights_of_lpips_say_which_file(model: str, tmp_path: Path, capsys: Any) -> None:
    missing = tmp_path / "none.safetensors"
    assert main(words(model, tmp_path, "--metric", "lpips", "--lpips-weights", str(missing))) == 3
    assert str(missing) in capsys.readouterr().err


def test_text_from_outside_cannot_steer_the_terminal(capsys: Any) -> None:
    row = {"layer": "a[red]\x1b[2J", "parameters": 1, "weight_bits": 4, "psnr": None, "output_error": None,
           "noise_error": 0.5}  # fmt: skip
    found = SimpleNamespace(
        weights=[4], activations=8, metric="psnr", settings={"by": "layer"}, rows=[row], baseline={"all": [row]},
        rank_correlation={"4": {"n": 1}}, worst=lambda count, bits: [row],
    )  # fmt: skip
    Screen().show({}, *sensing.tables(found, {"output": "x\x1b"}))
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "a[red]\\x1b[2J" in shown and "not finite" in shown


@pytest.mark.parametrize("text", ["", "4,,2", "4;2"])
def test_bits_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError) as caught:
        sensing.read_bits(text)
    assert small.complete(caught.value)
