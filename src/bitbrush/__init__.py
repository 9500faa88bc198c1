"""bitbrush: diffusers pipelines in few bits, with the published methods, packed, and measured.

    import bitbrush
    result = bitbrush.quantize("my/finetune", recipe="qdiffusion", weights=4, activations=8)
    result.save_pretrained("out")

Importing bitbrush registers its quantizer with diffusers, so that ``from_pretrained`` of any diffusers pipeline or
model class loads what `save_pretrained` wrote. The import itself is cheap: torch, diffusers and the rest of the package
come in when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitbrush.artifact.registration import announce

if TYPE_CHECKING:
    from bitbrush.api import Result, dry_run, evaluate, inspect, load, quantize, read_recipe, recipes, resume
    from bitbrush.engine.recipe import Recipe
    from bitbrush.sensing import sensitivity

__version__ = "0.1.0"
__all__ = [
    "Recipe", "Result", "dry_run", "evaluate", "inspect", "load", "quantize", "read_recipe", "recipes", "resume",
    "sensitivity",
]  # fmt: skip
_ELSEWHERE = {"Recipe": "bitbrush.engine.recipe", "sensitivity": "bitbrush.sensing"}  # all others: bitbrush.api
_PARTS = ("assets", "errors", "evaluation", "kernels", "report")  # there without an import of their own

announce()


def __getattr__(name: str) -> Any:
    """A public name or part, imported when it is first used (PEP 562)."""
    if name in _PARTS:
        return import_module(f"bitbrush.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, "bitbrush.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
