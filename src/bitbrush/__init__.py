"""bitbrush: diffusers pipelines in few bits, with the published methods, packed, and measured.

    import bitbrush
    result = bitbrush.quantize("my/finetune", recipe="qdiffusion", weights=4, activations=8)
    result.save_pretrained("out")

Importing bitbrush registers its quantizer with diffusers, so that ``from_pretrained`` of any diffusers pipeline or model
class loads what `save_pretrained` wrote.
"""

from __future__ import annotations

__version__ = "0.1.0"

from bitbrush.api import Result, dry_run, inspect, load, quantize, read_recipe, recipes, resume
from bitbrush.artifact.diffusers_plugin import register
from bitbrush.engine.recipe import Recipe

register()

__all__ = ["Recipe", "Result", "dry_run", "inspect", "load", "quantize", "read_recipe", "recipes", "resume"]
