"""The benchmark of peers, with a library made up here in the place of a real one."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tiny

Script = Callable[[str], ModuleType]


class Rounded(nn.Linear):
    """A linear layer of somebody's, rounded to 8 bits on its way to a device."""

    @classmethod
    def like(cls, layer: nn.Linear) -> Rounded:
        return cls(layer.in_features, layer.out_features, layer.bias is not None)

    def to(self, *args: Any, **kwargs: Any) -> Rounded:
        step = self.weight.data.abs().max() / 127
        self.weight.data.div_(step).round_().mul_(step)
        return super().to(*args, **kwargs)


Rounded.__module__ = "somebodys.layers"


def somebodys(peers: ModuleType, broken: nn.Module) -> Callable[[Any], Iterator[Any]]:
    """Arms: one that works, one that does not open, one that opens and cannot draw, one that quantizes nothing."""

    def refuse() -> Any:
        raise RuntimeError(f"no accelerator\n  in {sys.prefix}/lib/somebodys.py")

    def arms(job: Any) -> Iterator[Any]:
        yield peers.Arm("good", "Rounded.like(layer)", lambda: peers.with_layers(job, Rounded.like))
        yield peers.Arm("refused", "refuse()", refuse)
        yield peers.Arm("broken", "...", lambda: peers.with_layers(job, lambda layer: broken))
        yield peers.Arm("nothing", "job.pipeline()", job.pipeline)

    return arms


class Broken(Rounded):
    """Opens and raises when it is called."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("float and bfloat16")


Broken.__module__ = "somebodys.layers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.pipeline("text").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_arms_that_fail_are_told_and_the_others_go_on(script: Script, folder: Path, tmp_path: Path) -> None:
    peers = script("peers")
    job = peers.Job(folder, tmp_path, "cpu", True)
    arms = somebodys(peers, Broken(4, 4))(job)
    working, facts = peers.opened(arms, job.pipeline(), "somebodys", ["a red apple"])
    assert list(working) == ["good"]
    assert {name: fact["works"] for name, fact in facts.items()} == {
        "good": True, "refused": False, "broken": False, "nothing": False,
    }  # fmt: skip
    assert facts["refused"]["error"] == "RuntimeError: no accelerator in ENVIRONMENT/lib/somebodys.py"
    assert facts["broken"] == {
        "call": "...", "works": False, "while": "drawing a picture", "error": "TypeError: float and bfloat16",
    }  # fmt: skip
    assert "no layer" in facts["nothing"]["error"]
    linear = facts["good"]["layers"]["kinds"]["Linear"]
    assert linear["layers"] == linear["of"] > 10
    assert facts["good"]["layers"]["kinds"]["Conv2d"]["layers"] == 0


def test_replaced_layers_keep_what_they_were(script: Script, folder: Path, tmp_path: Path) -> None:
    peers = script("peers")
    job = peers.Job(folder, tmp_path, "cpu", True)
    before, after = job.pipeline().unet.requires_grad_(False), peers.with_layers(job, Rounded.like).unet
    assert [name for name, _ in before.named_modules()] == [name for name, _ in after.named_modules()]
    assert not any(type(module) is nn.Linear for module in after.modules())
    for name, layer in before.named_modules():
        if type(layer) is nn.Linear:
            off = (layer.weight - after.get_submodule(name).weight).abs().max() / layer.weight.abs().max()
            assert 0 < float(off) < 0.01


def test_prompts_are_spread(script: Script) -> None:
    prompts = [str(i) for i in range(512)]
    spread = script("peers").spread
    assert spread(prompts, 64) == [str(8 * i) for i in range(64)]
    assert spread(prompts, 512) == prompts
    assert len(set(spread(prompts, 100))) == 100


def test_a_smoke_run_is_small_and_no_result(script: Script, tmp_path: Path) -> None:
    peers = script("peers")
    small = peers.arguments(["quanto", "--smoke", "--work", str(tmp_path)])
    assert (small.n, small.steps, small.out) == (2, 2, str(tmp_path / "results"))
    whole = peers.arguments(["quanto"])
    assert (whole.n, whole.steps, Path(whole.out)) == (64, 25, peers.RESULTS)
    with pytest.raises(SystemExit):
        peers.arguments(["gptq"])


def test_every_peer_has_a_place_on_the_page(script: Script) -> None:
    assert set(script("peers").PEERS) == set(script("peers_page").ORDER)


def test_keyword_arguments_are_written_as_python(script: Script) -> None:
    chosen = {"weights_dtype": "int8", "quant_conv": True, "compute": torch.float32}
    assert script("peers").words(chosen) == 'weights_dtype="int8", quant_conv=True, compute=torch.float32'


@pytest.mark.slow
def test_a_whole_run(
    script: Script, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the file and the row, by the evaluator itself."""
    peers = script("peers")
    monkeypatch.setitem(peers.PEERS, "quanto", (somebodys(peers, Broken(4, 4)), "torch", "somebodys"))
    words = ["peers.py", "quanto", "--smoke", "--model", str(folder), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", words)
    peers.main()
    rows = capsys.readouterr().out.splitlines()[-3:]
    names = ["full precision", "full precision, other noise", "quanto good"]
    assert [row.split("|")[1].strip() for row in rows] == names
    found = json.loads((tmp_path / "work" / "results" / "model-quanto.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(found)
    assert found["evaluation"]["candidates"] == ["good"]
    assert {value["key"] for value in found["evaluation"]["values"]["good"]} >= {"psnr", "ssim", "clip"}
    assert found["evaluation"]["cost"]["good"]["step_seconds"]["median"] > 0
    assert found["evaluation"]["missing"] == []
    assert {name for name, arm in found["arms"].items() if not arm["works"]} == {"refused", "broken", "nothing"}
    assert found["versions"]["torch"] == torch.__version__


def test_peers_are_imported_in_functions_only(script: Script) -> None:
    """One environment holds one peer; the package knows none of them, the GPL one least of all."""
    names = {"sdnq", "torchao", "bitsandbytes", "optimum"}
    benchmarks = Path(script("peers").__file__).parent
    tops = [node for file in benchmarks.glob("*.py") for node in ast.parse(file.read_text(encoding="utf-8")).body]
    package = [node for file in (benchmarks.parent / "src").rglob("*.py")
               for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]  # fmt: skip
    found = {name.partition(".")[0] for node in (*tops, *package) for name in imported(node)}
    assert {"torch", "diffusers"} <= found
    assert not names & found


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
