"""What is in a denoiser: its quantizable sites in execution order, its blocks, and where it concatenates.

The network is run once on meta tensors (shapes without data), so a survey of a model of any size takes no memory and
next to no time. The order of execution, the shapes and the multiply-accumulates come from that run; registration order
differs (``mid_block`` is registered after ``up_blocks``).

A layer whose input *is* the result of a channel concatenation has a boundary there (the shortcut convolutions of up
blocks: deep features first, then the skip connection). It is found by watching ``torch.cat`` during the run, not from
names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bitbrush.errors import InputError

FAMILIES = ("UNet2DModel", "UNet2DConditionModel")
BLOCK_TYPES = (ResnetBlock2D, BasicTransformerBlock, Attention)


@dataclass(frozen=True)
class Site:
    """One quantizable thing: a Conv2d, a Linear, or an attention with its operands.

    ``boundary`` are the channel counts of the concatenated parts of its input, empty where there is no concatenation.
    ``macs`` are multiply-accumulates for one sample. ``order`` is the place in execution order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    block: str
    order: int
    boundary: tuple[int, ...] = ()


@dataclass(frozen=True)
class Survey:
    """Sites and reconstruction blocks in execution order, and what cannot be quantized (name to parameters).

    ``sample_values`` counts the numbers of one calibration sample: the denoiser's input, output and conditions.
    """

    sites: tuple[Site, ...]
    blocks: dict[str, tuple[str, ...]]
    other: dict[str, int] = field(default_factory=dict)
    sample_values: int = 0

    def layers(self) -> tuple[Site, ...]:
        """Only Conv2d and Linear sites."""
        return tuple(site for site in self.sites if site.kind != "attention")

    def attentions(self) -> tuple[Site, ...]:
        """Only attention sites (whose operands q, k, v, softmax can be quantized)."""
        return tuple(site for site in self.sites if site.kind == "attention")


def survey(model: nn.Module, *, tokens: int = 77) -> Survey:
    """Trace a denoiser on meta tensors.

    Args:
        model: A `UNet2DModel` or `UNet2DConditionModel`, any device; it is not changed.
        tokens: Length of the text condition, for the compute estimate.

    Raises:
        InputError: Another kind of network.
    """
    if type(model).__name__ not in FAMILIES:
        raise InputError(
            f"a {type(model).__name__} cannot be quantized by this release", why=f"known: {', '.join(FAMILIES)}",
            try_="use a pipeline with a UNet; transformers come later",
        )
    watch = _Watch(model)
    state = {
        name: t.to("meta", torch.float32 if t.is_floating_point() else None)  # as the inputs, whatever the model is
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    args, kwargs = example_inputs(model, batch=1, tokens=tokens, device="meta")
    with watch, torch.no_grad():
        out = torch.func.functional_call(model, state, args, kwargs).sample
    values = sum(t.numel() for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
    return watch.result(values)


def example_inputs(
    model: nn.Module, *, batch: int, tokens: int = 77, device: str | torch.device = "cpu",
    generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of the shapes that the model's config asks for: (args, kwargs) of its forward."""
    config: Any = model.config

    def noise(*shape: int) -> Tensor:
        if str(device) == "meta":
            return torch.empty(*shape, device="meta")
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    size = config.sample_size or 32
    height, width = (size, size) if isinstance(size, int) else size
    sample = noise(batch, config.in_channels, height, width)
    timestep = torch.full((batch,), 500, device=device)
    kwargs: dict[str, Any] = {}
    if "encoder_hidden_states" in inspect.signature(model.forward).parameters:
        wide = config.cross_attention_dim
        kwargs["encoder_hidden_states"] = noise(batch, tokens, wide if isinstance(wide, int) else wide[0])
        if config.addition_embed_type == "text_time":
            ids = 6
            text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {
                "text_embeds": noise(batch, text), "time_ids": torch.ones(batch, ids, device=device)
            }
        elif config.addition_embed_type is not None:
            raise InputError(
                f"condition type {config.addition_embed_type!r} is not known", where="config.addition_embed_type",
                why="this release knows None and 'text_time'", try_="open an issue with the model's config.json",
            )
    if getattr(config, "num_class_embeds", None) or getattr(config, "class_embed_type", None):
        kwargs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    return (sample, timestep), kwargs


class _Cats(TorchFunctionMode):
    """Remembers results of channel concatenations, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.cat, torch.concat):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1 and out.ndim == 4:
                self.found.append((out, tuple(int(t.shape[1]) for t in (args[0] if args else kwargs["tensors"]))))
        return out

    def parts(self, tensor: Tensor) -> tuple[int, ...]:
        for known, sizes in self.found:
            if known is tensor:
                return sizes
        return ()


class _Watch:
    """Hooks on every leaf of interest for the duration of one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cats = _Cats()
        self.records: dict[str, Site] = {}
        self.handles: list[Any] = []
        self.blocks_of = _owners(model)

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | Attention):
                self.handles.append(module.register_forward_hook(self._recorder(name), with_kwargs=True))
        self.cats.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.cats.__exit__(*exc)
        for handle in self.handles:
            handle.remove()

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if name in self.records:
                return
            x = args[0] if args else next(iter(kwargs.values()))
            self.records[name] = self._site(name, module, x, out)

        return record

    def _site(self, name: str, module: nn.Module, x: Tensor, out: Tensor) -> Site:
        block, order = self.blocks_of.get(name, name), len(self.records)
        if isinstance(module, Attention):
            length = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]
            return Site(name, "attention", (module.heads, length), 0, 0, block, order)
        weight: Tensor = module.weight  # type: ignore[assignment]
        positions = out.numel() // (out.shape[0] * weight.shape[0])
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        bias = module.bias.numel() if module.bias is not None else 0  # type: ignore[operator]
        return Site(
            name, kind, tuple(weight.shape), weight.numel() + int(bias), weight.numel() * int(positions), block, order,
            self.cats.parts(x),
        )

    def result(self, sample_values: int) -> Survey:
        sites = tuple(self.records.values())
        blocks: dict[str, list[str]] = {}
        for site in sites:
            if site.kind != "attention":
                blocks.setdefault(site.block, []).append(site.name)
        counted = {site.name for site in sites}
        other: dict[str, int] = {}
        for name, module in self.model.named_modules():
            own = sum(p.numel() for p in module.parameters(recurse=False))
            if own and name not in counted:
                other[name] = own
        return Survey(sites, {k: tuple(v) for k, v in blocks.items()}, other, sample_values)


def _owners(model: nn.Module) -> dict[str, str]:
    """Layer name to the outermost block module it belongs to; layers outside blocks stand for themselves."""
    owners: dict[str, str] = {}
    roots: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(root + ".") for root in roots):
            continue
        if isinstance(module, BLOCK_TYPES):
            roots.append(name)
            owners.update({f"{name}.{child}" if child else name: name for child, _ in module.named_modules()})
    return owners
