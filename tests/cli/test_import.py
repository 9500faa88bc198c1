"""`import bitbrush` is cheap, and diffusers knows the quantizer afterwards, whichever was imported first."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitbrush
import tiny
from bitbrush.artifact import registration
from bitbrush.artifact.save import save

SOURCE = str(Path(str(bitbrush.__path__[0])).parent)
BARE = """
import sys, bitbrush
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "diffusers", "transformers", "pydantic"})
assert not heavy, heavy
assert bitbrush.__version__ and {"quantize", "load", "Recipe"} <= set(dir(bitbrush))
try:
    bitbrush.quantise
except AttributeError as error:
    assert "quantise" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
BITBRUSH_FIRST = """
import sys, bitbrush
from diffusers import StableDiffusionPipeline
assert not any(type(finder).__name__ == "_Waiting" for finder in sys.meta_path)
assert "bitbrush.artifact.diffusers_plugin" not in sys.modules
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe.unet.conv_in).__name__ == "QuantConv2d" and pipe.unet.conv_in.face == "packed"
unneeded = {"steps", "engine", "api", "evaluation", "report", "cli"}
found = [name for name in sys.modules if name.startswith("bitbrush.") and name.split(".")[1] in unneeded]
assert not found, found
"""
DIFFUSERS_FIRST = """
import sys
from diffusers import UNet2DConditionModel
import bitbrush
from diffusers.quantizers import auto
assert "bitbrush" in auto.AUTO_QUANTIZER_MAPPING and "bitbrush.artifact.diffusers_plugin" not in sys.modules
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
assert type(unet.conv_in).__name__ == "QuantConv2d" and unet.conv_in.face == "packed"
assert auto.AUTO_QUANTIZER_MAPPING["bitbrush"].__name__ == "BitbrushQuantizer"
"""


def fresh(code: str, *words: str) -> None:
    """Run code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe, plan = tiny.quantized_pipeline("text")
    return str(save(pipe, tmp_path_factory.mktemp("results") / "out", plan))


def test_the_import_is_cheap() -> None:
    fresh(BARE)


@pytest.mark.parametrize("code", [BITBRUSH_FIRST, DIFFUSERS_FIRST], ids=["bitbrush first", "diffusers first"])
def test_from_pretrained_works_in_either_order(code: str, artifact: str) -> None:
    fresh(code, artifact)


def test_help_imports_no_large_library() -> None:
    code = "import sys; from bitbrush.cli import main; main(['--help']); main(['recipes'])\n"
    fresh(code + "assert not {'torch', 'diffusers'} & set(sys.modules), 'torch or diffusers'")


def test_public_names_resolve_and_stay() -> None:
    for name in bitbrush.__all__:
        assert getattr(bitbrush, name) is getattr(bitbrush, name)
    assert bitbrush.recipes() == bitbrush.recipes() and callable(bitbrush.recipes)
    assert bitbrush.errors.InputError.exit_code == 3 and bitbrush.kernels.KERNELS


TABLES = "AUTO_QUANTIZER_MAPPING = {}\nAUTO_QUANTIZATION_CONFIG_MAPPING = {}\n"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for diffusers' module of tables, not imported yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "TABLES", "tables_of_a_test")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "tables_of_a_test", raising=False)
    return tmp_path / "tables_of_a_test.py"


def waiting() -> int:
    return sum(isinstance(finder, registration._Waiting) for finder in sys.meta_path)


def test_the_finder_fills_the_tables_and_leaves(tables: Path) -> None:
    tables.write_text(TABLES)
    registration.announce()
    registration.announce()
    assert waiting() == 1
    module: Any = importlib.import_module("tables_of_a_test")
    assert waiting() == 0
    assert module.__spec__.loader is module.__loader__ and not isinstance(module.__loader__, registration._ThenFill)
    for found in (module.AUTO_QUANTIZER_MAPPING, module.AUTO_QUANTIZATION_CONFIG_MAPPING):
        assert list(found) == ["bitbrush"] and isinstance(found["bitbrush"], type)  # diffusers asks isinstance of them
    registration.announce()
    assert waiting() == 0


def test_an_import_that_fails_is_awaited_again(tables: Path) -> None:
    tables.write_text("raise ImportError('not yet')\n")
    registration.announce()
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("tables_of_a_test")
    assert waiting() == 1
    tables.write_text(TABLES + "# now\n")
    importlib.invalidate_caches()
    assert "bitbrush" in importlib.import_module("tables_of_a_test").AUTO_QUANTIZER_MAPPING and waiting() == 0


def test_a_missing_module_is_not_found_as_before(tables: Path) -> None:
    registration.announce()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("tables_of_a_test")


def test_a_later_release_that_knows_bitbrush_is_left_alone(tables: Path) -> None:
    tables.write_text("AUTO_QUANTIZER_MAPPING = {'bitbrush': int}\nAUTO_QUANTIZATION_CONFIG_MAPPING = {}\n")
    registration.announce()
    assert importlib.import_module("tables_of_a_test").AUTO_QUANTIZER_MAPPING["bitbrush"] is int
