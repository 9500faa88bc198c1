"""Commands against a stand-in API: options arrive as given, results and help are shown."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import bitbrush
from bitbrush.cli import main
from bitbrush.cli.app import app, command_line, parse_settings
from bitbrush.errors import InputError

COMMANDS = {
    "inspect": ["MODEL", "--recipe", "--weights", "--activations", "--preset", "--device"],
    "quantize": [
        "MODEL", "--output", "--recipe", "--weights", "--activations", "--preset", "--prompts", "--seed", "--device",
        "--set", "--correct", "--dry-run",
    ],
    "resume": ["OUT"],
    "sample": ["OUT", "--prompt", "--steps", "--guidance", "--seed", "--output", "-n"],
    "compare": ["OUT1", "--reference", "--prompts", "-n", "--seed", "--steps", "--guidance", "--output"],
    "sensitivity": ["MODEL", "--weights", "--activations", "--by", "--prompts", "-n", "--steps", "--metric", "--plot"],
    "eval": [
        "OUT", "--reference", "--prompts", "-n", "--metrics", "--seeds", "--real", "--extractor", "--evaluator",
        "--speed", "--inside", "--work", "--output", "--data",
    ],
    "recipes": ["show", "NAME", "--weights"],
    "doctor": [],
    "demo": ["--output"],
}  # fmt: skip

INSPECTION = {
    "rows": [
        {
            "name": "up.[red]conv", "kind": "conv2d", "shape": [8, 4, 3, 3], "parameters": 288, "macs": 1000,
            "share_of_weights": 0.5, "share_of_compute": 0.25, "weight_bits": 4, "activation_bits": 8,
            "segments": [2, 2], "block": "up", "note": "split 2 + 2",
        }
    ],
    "kept_float": [{"name": "norm", "parameters": 16, "share": 0.01, "why": "not a product"}],
    "totals": {"parameters": 304, "packed_bytes": 200, "average_bits": 4.5, "macs": None},
    "network": "UNet2DModel",
    "source": "model",
    "recipe": "rtn",
    "estimates": {
        "device": "cpu", "tape_bytes": 1_000_000, "peak_bytes": 2_000_000_000, "seconds": 75.0, "advice": "use a [GPU]",
    },
}  # fmt: skip
PROOF = {
    "format": 1,
    "ok": True,
    "model": {"sqnr_simulated_vs_float_db": 41.5},
    "layers": {"a": {"ok": True}, "b": {"ok": True}},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for option in [*COMMANDS[command], "--json", "--debug"]:
        assert option in result.output


def test_the_list_of_commands_is_complete() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    names = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    assert names == set(COMMANDS)
    assert all(name in result.output for name in names)


def test_command_modules_import_nothing_heavy_at_the_top() -> None:
    folder = Path(str(bitbrush.__path__[0])) / "cli"
    seen = 0
    for path in sorted(folder.glob("*.py")):
        seen += 1
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.partition(".")[0] for name in names} & {"torch", "diffusers", "transformers", "matplotlib"}
            assert not heavy, f"{path.name} imports {heavy} at the top"
    assert seen >= 9


class Calls:
    """A stand-in for the API that keeps what it was called with."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.arguments, self.options = outcome, (), {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments, self.options = arguments, options
        return self.outcome


def fake_result(output: Path) -> SimpleNamespace:
    history = {"recipe": "rtn", "weight_bits": 3, "activation_bits": 8, "average_bits": 3.4, "layers": {}}
    return SimpleNamespace(output=output, history=history, seconds=61.0, peak_memory=1_500_000_000, proof=PROOF)


def test_quantize_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("red apple\nblue car\nred apple\n")
    calls = Calls(fake_result(out))
    monkeypatch.setattr(bitbrush, "quantize", calls, raising=False)
    words = ["quantize", "model", "-o", str(out), "--recipe", "rtn", "--weights", "3", "--activations", "8"]
    words += ["--preset", "demo", "--prompts", str(prompts), "--seed", "5", "--device", "cpu"]
    assert main([*words, "--set", "weights.iterations=100", "--set", "fit.method=mse", "--json"]) == 0
    progress = calls.options.pop("progress")
    assert calls.arguments == ("model",)
    assert calls.options == {
        "recipe": "rtn",
        "weights": 3,
        "activations": 8,
        "preset": "demo",
        "prompts": ["red apple", "blue car", "red apple"],
        "seed": 5,
        "device": "cpu",
        "settings": {"weights.iterations": 100, "fit.method": "mse"},
        "output": out,
    }
    assert all(hasattr(progress, name) for name in ("start", "advance", "finish", "say"))
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["output"] == str(out) and report["average_bits"] == 3.4 and report["proof"] == PROOF
    assert "1 of 3 prompts are repeated" in captured.err


def test_resume_shows_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = Calls(fake_result(tmp_path))
    monkeypatch.setattr(bitbrush, "resume", calls, raising=False)
    assert main(["resume", str(tmp_path)]) == 0
    assert calls.arguments == (tmp_path,)
    out = capsys.readouterr().out
    assert "1:01" in out and "1.5 GB" in out and "Proof" in out and "41.5" in out


def test_quantize_needs_an_output_but_a_dry_run_does_not(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["quantize", "model"]) == 3
    assert "-o OUT" in capsys.readouterr().err
    plan = {"recipe": 'title = "x"', "inspection": INSPECTION}
    calls = Calls(plan)
    monkeypatch.setattr(bitbrush, "dry_run", calls, raising=False)
    assert main(["quantize", "model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert 'title = "x"' in out and "up.[red]conv" in out and "1:15" in out
    assert calls.options["settings"] == {} and calls.options["output"] is None
    assert main(["quantize", "model", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan))


def test_bad_prompts_are_found_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls = Calls(None)
    monkeypatch.setattr(bitbrush, "quantize", calls, raising=False)
    missing = tmp_path / "none.txt"
    assert main(["quantize", "model", "-o", str(tmp_path / "out"), "--prompts", str(missing)]) == 3
    assert not calls.options
    assert str(missing) in capsys.readouterr().err
    assert main(["compare", "a", "--reference", "b", "--prompts", str(missing)]) == 3


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = Calls(SimpleNamespace(to_json=lambda: INSPECTION))
    monkeypatch.setattr(bitbrush, "inspect", calls, raising=False)
    assert main(["inspect", "model", "--weights", "4"]) == 0
    assert calls.options == {
        "recipe": "qdiffusion", "weights": 4, "activations": None, "preset": None, "device": None
    }  # fmt: skip
    out = capsys.readouterr().out
    for text in (
        "up.[red]conv",
        "8x4x3x3",
        "50.0 %",
        "W4A8",
        "split 2 + 2",
        "25.0 %",
        "not a product",
        "2.0 GB",
        "4.5",
        "Estimates on cpu",
        "1:15",
        "use a [GPU]",
    ):
        assert text in out
    assert main(["inspect", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == INSPECTION


@pytest.mark.parametrize("words", [["recipes", "list"], ["recipes", "show"]])
def test_recipes_wants_show_and_a_name(words: list[str], capsys: Any) -> None:
    assert main(words) == 3
    assert "recipes" in capsys.readouterr().err


def test_recipes_are_listed(capsys: Any) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("rtn", "rtn-dynamic", "qdiffusion", "ptq4dm", "demo"))
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert {row["name"] for row in rows} == set(bitbrush.recipes()) and all(row["title"] for row in rows)


def test_recipes_show(capsys: Any) -> None:
    assert main(["recipes", "show", "qdiffusion", "--weights", "3", "--preset", "demo"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert shown["weights"] == 3 and {step["do"] for step in shown["step"]} >= {"calibrate", "reconstruct", "verify"}
    assert main(["recipes", "show", "qdiffusion", "--weights", "3", "--preset", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == shown


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["qdifusion"], "qdiffusion"),
        (["qdiffusion", "--preset", "dmo"], "demo"),
        (["qdiffusion", "--weights", "9"], "1 to 8"),
        (["none.toml"], "recipes"),
    ],
)
def test_recipes_show_refuses_with_a_hint(words: list[str], hint: str, capsys: Any) -> None:
    assert main(["recipes", "show", *words]) == 3
    assert hint in capsys.readouterr().err


def test_settings_are_toml_values_or_plain_words() -> None:
    pairs = ["a.b=1", "a.c=0.5", "a.d=true", "a.e=[1, 2]", 'a.f="x y"', "a.g=mse", "a.h=", "x.y.z=a=b"]
    assert parse_settings(pairs) == {
        "a.b": 1, "a.c": 0.5, "a.d": True, "a.e": [1, 2], "a.f": "x y", "a.g": "mse", "a.h": "", "x.y.z": "a=b",
    }  # fmt: skip


@pytest.mark.parametrize("pair", ["", "a", "a.b", "=1", "a=1", ".a=1", "a.=1"])
def test_settings_refused(pair: str) -> None:
    with pytest.raises(InputError, match="could not be read") as caught:
        parse_settings([pair])
    assert caught.value.where and caught.value.why and caught.value.try_
    with pytest.raises(InputError, match="twice"):
        parse_settings(["a.b=1", "a.b=2"])


def test_the_command_stands_in_the_report_as_it_could_be_typed() -> None:
    options: dict[str, object] = {"--reference": "my model", "--prompts": None, "-n": 8, "-o": Path("r.html")}
    assert command_line("compare", ["a", "b"], options) == "bitbrush compare a b --reference 'my model' -n 8 -o r.html"
    assert command_line("demo", [], {"--output": None}) == "bitbrush demo"
