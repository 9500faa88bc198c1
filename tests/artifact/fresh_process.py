"""Run in a process of its own by test_loading: ``python fresh_process.py TASK ARTIFACT OUTPUT``."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1]


def plain(folder: str, output: str) -> None:
    """Diffusers alone does not know the format; after one import it does, and nothing else is needed."""
    from diffusers import StableDiffusionPipeline

    try:
        StableDiffusionPipeline.from_pretrained(folder)
    except ValueError as error:
        message = str(error)
    else:
        raise SystemExit("it loaded without the import")
    if "Unknown quantization type, got bitbrush" not in message:
        raise SystemExit(message)
    import bitbrush  # noqa: F401

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    sys.path.insert(0, str(TESTS))
    import tiny

    save_file({"out": tiny.run(pipe.unet), **pipe.unet.state_dict()}, output)


def closure(folder: str, output: str) -> None:
    """What opening an artifact imports, the package's own front door left closed."""
    package = types.ModuleType("bitbrush")
    package.__path__ = [str(TESTS.parent / "src" / "bitbrush")]
    sys.modules["bitbrush"] = package
    from bitbrush.artifact.load import load

    pipe = load(folder)
    names = sorted(name for name in sys.modules if name.startswith("bitbrush."))
    unneeded = {"steps", "engine", "recipes", "evaluation", "report", "cli"}
    heavy = [name for name in names if name.split(".")[1] in unneeded]
    if heavy or len(names) < 12:
        raise SystemExit(f"imported: {heavy} of {names}")
    save_file(pipe.unet.state_dict(), output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"plain": plain, "closure": closure}[sys.argv[1]](sys.argv[2], sys.argv[3])
