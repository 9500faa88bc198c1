"""What ships with the package: the embedded default pipeline, its evaluator, prompts. README.md is the model card."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath

from bitbrush.errors import InputError

PROMPT_FILES = {
    "calibration": "prompts/calibration.txt",  # 1,024 captions of the training data, none in "evaluation"
    "evaluation": "prompts/evaluation.txt",  # 512: the 150 held-out ones, then 362 seen ones
    "captions": "prompts/captions.txt",  # all 3,543: the texts that R@1 chooses among
    "heldout": "prompts/heldout.txt",  # 150 captions that the generator never saw
}


def path(name: str) -> Path:
    """The file or folder ``name`` (``"emoji-sd-tiny"``, ``"emoji-clip"``, ``"prompts/evaluation.txt"``).

    Raises:
        InputError: No such asset.
    """
    parts = PurePosixPath(name).parts
    found = Path(str(files(__name__))).joinpath(*parts)
    if not parts or ".." in parts or name.startswith("/") or not found.exists():
        raise InputError(
            f"there is no asset {name!r}",
            where="bitbrush.assets",
            why="the package ships emoji-sd-tiny, emoji-clip and prompts/{calibration,evaluation,captions,heldout}.txt",
            try_='use one of these names, for example bitbrush.assets.path("emoji-sd-tiny")',
        )
    return found


def prompts(kind: str) -> list[str]:
    """The bundled prompts of one kind, one string a line, in file order.

    Args:
        kind: ``"calibration"``, ``"evaluation"``, ``"captions"`` or ``"heldout"``.

    Raises:
        InputError: Another kind.
    """
    if kind not in PROMPT_FILES:
        raise InputError(
            f"there are no bundled prompts of the kind {kind!r}",
            where="bitbrush.assets.prompts",
            why=f"the kinds are {', '.join(PROMPT_FILES)}",
            try_='use "calibration" to quantize and "evaluation" to compare',
        )
    return path(PROMPT_FILES[kind]).read_text(encoding="utf-8").splitlines()
