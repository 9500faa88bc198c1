"""Blocks of diffusers on codes: what stands before a product gives int8, what stands behind it is part of it.

    ResnetBlock2D            GroupNorm, SiLU and encode in one pass; the time embedding and the shortcut are added where
                             the convolutions round
    BasicTransformerBlock    LayerNorm, in a DiT with its modulation, and encode in one pass; queries, keys and values
                             as one product; GEGLU and the encode behind it in the product's epilogue, or GELU and
                             encode in one pass; residuals are added where products round
    Transformer2DModel       the GroupNorm and encode before its first projection; the picture that came in is added
                             where its last one rounds
    Upsample2D               pixels are repeated by the encode
    GroupNorm                outside of these blocks: channels last, as its pictures lie

`fuse` gives a block whose parts are all plain a class that derives from its own (as PyTorch's parametrizations do) and
has its name, which libraries look for. Its forward takes the fused way while every layer in it runs by ``cuda-int8``
and nothing asks for what lies between: a hook on a part, a gradient, an attention mask, a processor or adapter put in
later, samples at different times. Otherwise it is the class's own forward.

The fused way rounds less: to half precision after a norm, an activation and a product's sum, but not between a product
and what is added to it. Norms sum in another order than torch's. So outputs differ from the unfused in last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitbrush.kernels import direct, gpu, int8_ops, norm_ops  # noqa: F401 - the operations are registered by their module

if TYPE_CHECKING:
    from bitbrush.network.layers import QuantLayer

Parts = dict[str, nn.Module]
KERNEL = "cuda-int8"


class FusedBlock(nn.Module):
    """What the class of a fused block is mixed with.

    Attributes:
        joined: Layers joined to one product, by what they are for; made where the weights are.
        unpacked: Layers whose weights this block unpacks at once (`gpu_weights`); made where the weights are.
        readers, gpu_readers: Layers all over the network that read what some of this block's do (`cpu_readers`,
            `gpu_readers`).
        loaded: Of the hook that makes them again when other weights have been loaded.
    """

    plain_class: type[nn.Module]
    passes_codes = True
    """Not a norm alone."""
    norm_types: tuple[str, ...] | None = None
    """Of the blocks of a class it is for; None: of all."""
    joined: dict[str, Any]
    unpacked: Any = None
    readers: Any = None
    gpu_readers: Any = None
    loaded: RemovableHandle

    def join(self) -> None:
        """Make what is kept of several layers, where their weights are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.rejoin()
        return self

    def rejoin(self) -> None:
        """Weights may lie elsewhere, or be others."""
        if self.gpu_readers is not None:
            self.gpu_readers.forget()
        self.join()


Form = tuple[Any, Callable[[Any], str | None]]
"""What a block is mixed with, and what says why it cannot be fused."""


@cache
def _kinds() -> dict[type[nn.Module], tuple[Form, ...]]:
    """diffusers' classes, and the forms that their blocks have."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    from bitbrush.kernels import block_adaptive, block_resnet, block_spatial, block_transformer, block_upsample

    return {ResnetBlock2D: ((block_resnet.FusedResnet, block_resnet.unfit),),
            BasicTransformerBlock: ((block_adaptive.FusedAdaptive, block_adaptive.unfit),
                                    (block_transformer.FusedTransformer, block_transformer.unfit)),
            Transformer2DModel: ((block_spatial.FusedSpatial, block_spatial.unfit),),
            Upsample2D: ((block_upsample.FusedUpsample, block_upsample.unfit),)}  # fmt: skip


def _form(block: Any) -> Form:
    """The first that is for a block."""
    return next(form for form in _kinds()[type(block)]
                if form[0].norm_types is None or block.norm_type in form[0].norm_types)  # fmt: skip


@cache
def _mixed(base: Any, mixed: Any) -> Any:
    """The class of a fused block: it has the name of diffusers' class."""
    return type(base.__name__, (mixed, base), {"plain_class": base, "__module__": base.__module__})


def fuse(model: nn.Module) -> dict[str, str]:
    """Let every block that can be compute on codes.

    Returns:
        Block name to ``fused``, or to the reason why not.
    """
    from bitbrush.kernels import block_norm

    answer: dict[str, str] = {}
    if not any(hasattr(module, "declare_packed") for module in model.modules()):
        return answer
    for name, block in model.named_modules():
        if type(block) not in _kinds():
            continue
        kind: Any = type(block)
        mixed, unfit = _form(block)
        reason = unfit(block)
        answer[name] = reason or "fused"
        if reason is None:
            mix(block, _mixed(kind, mixed))
    _share(model)
    plain: tuple[Any, Any] = (nn.GroupNorm, block_norm.FusedNorm)
    inside = {part for block in model.modules() if isinstance(block, FusedBlock) for part in block.modules()}
    for norm in model.modules():
        if type(norm) is nn.GroupNorm and norm.affine and norm not in inside:
            mix(norm, _mixed(*plain))
    return answer


def _share(model: nn.Module) -> None:
    """What reads the time embedding or the time, and what reads the prompt."""
    from bitbrush.kernels import gpu_modulation, gpu_readers
    from bitbrush.kernels.block_adaptive import FusedAdaptive
    from bitbrush.kernels.block_resnet import FusedResnet
    from bitbrush.kernels.block_transformer import FusedTransformer

    found: list[Any] = [module for module in model.modules() if isinstance(module, FusedBlock)]
    for bare in (True, False):
        gpu_readers.share([(block, [block.time_emb_proj]) for block in found if isinstance(block, FusedResnet)
                           and block.time_emb_proj is not None and block.skip_time_act == bare])
    crossing: list[Any] = [block for block in found if isinstance(block, FusedTransformer)]
    gpu_readers.share([(block, [block.attn2.to_k, block.attn2.to_v]) for block in crossing])
    gpu_modulation.share([block for block in found if isinstance(block, FusedAdaptive)])


def mix(module: Any, mixed: Any) -> None:
    """Exchange a module's class."""
    module.__class__, module.joined = mixed, {}
    module.loaded = module.register_load_state_dict_post_hook(_loaded)
    module.join()


def _loaded(module: Any, _keys: object) -> None:
    module.rejoin()


def unfuse(model: nn.Module) -> None:
    """Give every block its own class back."""
    found: list[Any] = [block for block in model.modules() if isinstance(block, FusedBlock)]
    for block in found:
        block.__class__ = block.plain_class
        block.loaded.remove()
        del block.joined, block.loaded
        for name in ("unpacked", "readers", "gpu_readers"):
            block.__dict__.pop(name, None)


def fused(model: nn.Module) -> list[str]:
    """Names of the blocks that compute on codes."""
    return [name for name, block in model.named_modules() if isinstance(block, FusedBlock) and block.passes_codes]


# ---- what can be fused -----------------------------------------------------------------------------------------------
def unfit_layer(layer: Any, name: str) -> str | None:
    """Why a layer's input cannot be encoded by what stands before it, whatever kernel runs it."""
    if not hasattr(layer, "declare_packed"):
        return f"{name} is not a packed layer"
    if layer.face != "packed" or layer.input is None or layer.spec.weight is None:
        return f"{name} has a weight or an input that is not quantized"
    spec = layer.input.spec
    if spec.mode != "static":
        return f"{name} has scales that change with the input"
    if spec.granularity == "pixel_group":
        return f"{name} has groups of pixels"
    if layer.spec.rotation != "none" or layer.low_rank is not None:
        return f"{name} has a rotation or a low-rank branch"
    reason = gpu.unable(layer)
    return reason and f"{name}: {reason}"


def first_reason(layers: Parts) -> str | None:
    """The first layer that is unfit, and why."""
    return next(filter(None, (unfit_layer(layer, name) for name, layer in layers.items())), None)


@cache
def plain_processor() -> type:
    """diffusers' processor whose steps the blocks here take."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0


def bare(attn: Any) -> bool:
    """Whether an attention is its projections alone, without norms, residuals or context of its own."""
    parts = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.add_k_proj)
    if any(part is not None for part in parts):
        return False
    return not attn.residual_connection and attn.rescale_output_factor == 1


def watched(parts: Iterable[nn.Module]) -> bool:
    """Whether a hook wants to see what goes into or out of a part, or a part has a forward of its own: offloading puts
    one into a module, which brings the weights first."""
    for part in parts:  # noqa: SIM110 - a generator takes twice as long
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return True
    return False


def ready(layers: Iterable[QuantLayer], x: Tensor) -> bool:
    """Whether every layer is run by this kernel now, by one row of its table for all samples of an input like ``x``."""
    from bitbrush import kernels

    if torch.is_grad_enabled() and x.requires_grad:
        return False
    device, pictures, asked = x.device.type, x.ndim == 4, None
    for layer in layers:
        if not hasattr(layer, "declare_packed") or kernels.chosen(layer, device) != KERNEL:
            return False
        quantizer = layer._modules.get("input")
        if quantizer is None or not quantizer.enabled or (not pictures and isinstance(layer, nn.Conv2d)):
            return False  # what `gpu.leaves` leaves to the reference
        clock = quantizer._clock[0] if quantizer.spec.timed else None  # type: ignore[index, union-attr]
        if clock is None or (clock, quantizer.spec.lookup) == asked:  # type: ignore[union-attr]
            continue
        asked = (clock, quantizer.spec.lookup)  # type: ignore[union-attr]
        if len(clock.rows(quantizer.spec.lookup)) > 1:  # type: ignore[union-attr]
            return False
    return True


def group_normed(
    norm: nn.GroupNorm, layer: Any, x: Tensor, seen: Tensor, *, silu: bool, shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The layer's output for the norm of pictures, and what is added to it (`gpu.multiply`).

    Args:
        x: Pictures ``[B, C, H, W]``.
        seen: The same as the layer sees them: pictures, or tokens ``[B, H * W, C]``.
        silu: Whether SiLU stands between norm and layer.
    """
    given, known, weights = gpu.given_input(layer, seen), gpu.facts(layer), norm._parameters
    if known.grouped:  # channels of any group of the norm lie side by side: they are sorted by the encode alone
        normed = direct.OPS.group_norm(x, weights["weight"], weights["bias"], norm.num_groups, norm.eps, silu)
        normed = normed if known.conv else normed.flatten(2).transpose(1, 2)
        return gpu.multiply(layer, gpu.input_rows(layer, normed, given), given, seen, shared=shared, residual=residual)
    codes = direct.OPS.group_norm_encode(
        x, weights["weight"], weights["bias"], norm.num_groups, norm.eps, silu, given.inverse, given.encoding,
        given.times, known.counts, known.top, int8_ops.numbers_of(given.frame), gpu.input_scale(layer),
    )
    return gpu.multiply(layer, codes, given, seen, shared=shared, residual=residual)


def projected(block: Any, temb: Tensor, readers: Any) -> Tensor:
    """The time embedding as a resnet adds it, ``[B, C]``.

    Args:
        readers: What makes the projections of all resnets (`bitbrush.kernels.readers`), or None.
    """

    def seen() -> Tensor:
        found: Tensor = temb if block.skip_time_act else block.nonlinearity(temb)
        return found

    parts = None if readers is None else readers.take([block.time_emb_proj], temb, seen)
    out: Tensor = block.time_emb_proj(seen()) if parts is None else parts[0]
    return out
