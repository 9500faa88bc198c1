"""Which layers a finetuning means: sets by name, and the plan's name of a quantizer."""

from __future__ import annotations

from collections.abc import Callable


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def site_of(quantizer: str) -> str:
    """The plan's name of what a quantizer belongs to: ``<layer>``, or ``<attention>:q``."""
    owner, _, leaf = quantizer.rpartition(".")
    attention = owner.removesuffix(".processor")
    return owner if attention == owner else f"{attention}:{leaf}"


def _is_query(name: str) -> bool:
    """Projections of attention from the picture: not keys and values of cross-attention, which come from the text."""
    return leaf(name) == "to_q" or (leaf(name) in ("to_k", "to_v") and ".attn2." not in name)


PRESETS: dict[str, Callable[[str], bool]] = {
    "time_proj": lambda name: leaf(name) == "time_emb_proj",
    "time_mlp": lambda name: name.startswith("time_embedding."),
    "time": lambda name: leaf(name) == "time_emb_proj" or name.startswith("time_embedding."),
    "qkv": _is_query,
    "ff": lambda name: ".ff.net." in name,
    "qkv_ff": lambda name: _is_query(name) or ".ff.net." in name,
    "attention": lambda name: ".attentions." in f".{name}",
    "all": lambda name: True,
}
"""Sets of layers by name, as QuEST's code chooses them (its names in diffusers' words): ``time_proj`` is stage 1,
``qkv_ff`` stage 2 for class-conditional and (``to_q``, ``to_k``, ``to_v``) unconditional models, ``ff`` stage 2 for
Stable Diffusion."""
