"""Put quantized layers into a model, and switch the face that they show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from bitbrush.errors import InputError
from bitbrush.network import codebooks, low_rank
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention, install_operands
from bitbrush.network.clock import Clock
from bitbrush.network.codebook_layers import CodebookConv2d, CodebookLayer, CodebookLinear
from bitbrush.network.layers import Face, QuantConv2d, QuantLayer, QuantLinear
from bitbrush.network.log2 import check_log2
from bitbrush.network.norms import FacedNorm
from bitbrush.network.temporary import holding
from bitbrush.numbers.grid import LayerSpec, Plan

FACED = (QuantLayer, QuantAttention, FacedNorm)
"""What has a face."""


def wrap(model: nn.Module, plan: Plan) -> Clock:
    """Replace every layer of the plan by its quantized form, in float face; weights are shared, not copied.

    Returns:
        The clock, attached to the model.
    """
    clock = _prepare(model, plan)
    for name, spec in plan.layers.items():
        if not is_operand(name):
            _replace(model, name, _wrapped(model.get_submodule(name), name, spec, clock, len(plan.timesteps) or 1))
    _share(model, plan)
    _operands(model, plan, clock)
    return clock


def rewrap(model: nn.Module, plan: Plan, names: Iterable[str], clock: Clock) -> None:
    """Give the named layers of a wrapped model their specs in ``plan``; all others keep their state.

    A named layer starts anew in the face it showed: codes, tables and trained biases are dropped, the float weight
    stays. Where nothing but the activation's spec changed, what belongs to the weight is kept, too, and groups of
    channels or pixels where the new spec has as many. Attention operands start anew together with the other operands of
    their attention. A set of codebooks that layers share stays as it is as long as its shape does.

    Args:
        model: A model that `wrap` has wrapped, not yet packed.
        plan: The new plan; its time grid is the one of ``clock``.
        names: Entries of the plan that changed.
        clock: The clock of the model, kept.
    """
    times, owners, formers = len(plan.timesteps) or 1, set(), {}
    for name in names:
        _check(name, plan.layers[name], len(plan.timesteps))
        if is_operand(name):
            owners.add(name.partition(":")[0])
            continue
        former = model.get_submodule(name)
        layer = _wrapped(former, name, plan.layers[name], clock, times)
        if isinstance(former, QuantLayer):
            layer.face = former.face
            formers[name] = former
            _keep_groups(former, layer)
        _replace(model, name, layer)
    _share(model, plan)
    for name, former in formers.items():
        _keep_weight(former, layers(model)[name])
    if owners:
        of_these = {name: spec for name, spec in plan.layers.items() if name.partition(":")[0] in owners}
        _operands(model, plan.model_copy(update={"layers": of_these}), clock)


def declare(model: nn.Module, plan: Plan) -> Clock:
    """Replace every layer of the plan by an empty packed layer of the final shapes, for loading an artifact into.

    Buffers are created on the device of the module they replace (meta while diffusers loads).
    """
    timed = next((name for name, s in plan.layers.items() if s.activation is not None and s.activation.timed), None)
    if timed is not None and not plan.timesteps:
        raise InputError("a layer has scales a timestep, but the plan has no timesteps", where=timed,
                         why="the time grid is empty", try_="quantize again with a calibrate step")
    clock = _prepare(model, plan)
    for name, spec in plan.layers.items():
        if is_operand(name):
            continue
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        layer = _wrapped(module, name, spec, clock, len(plan.timesteps) or 1)
        if spec.weight is not None:
            layer.float_weight = None
        layer.declare_packed()
        layer.to(device)
        _replace(model, name, layer)
    _share(model, plan)
    _operands(model, plan, clock)
    set_face(model, "packed")
    return clock


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside the block a float model may be wrapped, and its layers packed or not; afterwards the layers and processors
    that were there before are back, and no clock is attached."""
    before = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")}
    try:
        yield
    finally:
        codebooks.remove(model)
        for name, module in before.items():
            _replace(model, name, module)
        for name, processor in processors.items():
            model.get_submodule(name).set_processor(processor)  # type: ignore[operator]
        clock = getattr(model, "bitbrush_clock", None)
        if isinstance(clock, Clock):
            clock.detach()
            del model.bitbrush_clock


def layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by name, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def set_face(model: nn.Module, face: Face) -> None:
    """Show one face on every quantized layer and attention of the model, and every trained normalisation layer."""
    for module in model.modules():
        if isinstance(module, FACED):
            module.face = face


def show(model: nn.Module, face: Face) -> AbstractContextManager[None]:
    """Show a face inside the block; the faces shown before come back afterwards."""
    return holding((m for m in model.modules() if isinstance(m, FACED)), "face", face)


def float_activations(model: nn.Module) -> AbstractContextManager[None]:
    """Switch all activation quantizers off inside the block."""
    return holding((m for m in model.modules() if isinstance(m, ActivationQuantizer)), "enabled", False)


def is_operand(name: str) -> bool:
    """Whether a plan name denotes an attention operand (``<attention>:q``), not a layer."""
    return ":" in name


def _prepare(model: nn.Module, plan: Plan) -> Clock:
    for name, spec in plan.layers.items():
        _check(name, spec, len(plan.timesteps))
    codebooks.remove(model)
    earlier = getattr(model, "bitbrush_clock", None)
    if isinstance(earlier, Clock):
        earlier.detach()
        del model.bitbrush_clock
    clock = Clock(plan.timesteps)
    device = next(model.parameters()).device
    if device.type != "meta":  # while diffusers loads, everything but the time grid is on meta
        clock = clock.to(device)
    if plan.timesteps:
        clock.attach(model)
        model.bitbrush_clock = clock
    return clock


def _check(name: str, spec: LayerSpec, times: int) -> None:
    if spec.unsupported():
        raise InputError(
            f"this release cannot run {', '.join(spec.unsupported())}", where=name,
            why="the layer spec asks for a partition or grid that a later release brings",
            try_="bitbrush recipes show NAME, and choose another setting",
        )
    check_log2(name, spec)
    if spec.activation is None:
        return
    for what, table in (("bits", spec.activation.time_bits), ("groups", spec.activation.time_groups)):
        if table and len(table) != times:
            raise InputError(
                f"{what} a timestep do not fit the time grid", where=name,
                why=f"{len(table)} entries for {times} timesteps",
                try_="give one entry for each of the plan's timesteps",
            )
    used = sorted(set(spec.activation.time_groups))
    gap = next((i for i, group in enumerate(used) if group != i), None)
    if gap is not None:
        raise InputError(
            "the groups of timesteps are not numbered 0 .. K-1", where=name,
            why=f"no timestep is in group {gap}, but one is in group {used[-1]}",
            try_="number the groups that are used from 0, without gaps",
        )


def _wrapped(module: nn.Module, name: str, spec: LayerSpec, clock: Clock, times: int) -> QuantLayer:
    conv = isinstance(module, nn.Conv2d)
    channels = module.in_channels // module.groups if conv else getattr(module, "in_features", 0)  # type: ignore[operator]
    if spec.segments and sum(spec.segments) != channels:
        raise InputError(
            f"the segments {spec.segments} do not make up the layer's input", where=name,
            why=f"they sum to {sum(spec.segments)}, the layer has {channels} input channels",
            try_="take the boundary that `bitbrush inspect` shows",
        )
    if spec.rotation != "none" and not isinstance(module, nn.Linear):
        raise InputError("only linear layers can have rotated inputs", where=name,
                         why="the rotation mixes channels that lie last", try_="leave rotation out for this layer")
    if spec.input_scale and conv and module.groups != 1:
        raise InputError(
            "the input of a grouped convolution cannot be scaled by channel", where=name,
            why=f"groups = {module.groups}: one factor would serve several channels",
            try_="leave the layer out of the smooth step's pattern",
        )
    codebooks.check(name, spec, int(channels), int(getattr(module, "groups", 1)))
    if spec.low_rank and isinstance(module, nn.Conv2d | nn.Linear):
        rows, features = module.weight.shape[0], module.weight[0].numel()
        low_rank.check(name, spec, int(getattr(module, "groups", 1)), (rows, features))
    pixels = spec.activation.pixels if spec.activation is not None else 0
    unfolded = spec.activation is not None and spec.activation.unfolded
    if unfolded and (not isinstance(module, nn.Conv2d) or module.groups > 1 or module.padding_mode != "zeros"):
        raise InputError("only a plain convolution's input can be unfolded", where=name,
                         why=f"this is {module}", try_="leave unfolded out of the recipe's rule for this layer")
    if pixels and not unfolded and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        raise InputError(
            "a convolution wider than 1x1 has no groups of pixels", where=name,
            why=f"a product of {module.kernel_size[0]} x {module.kernel_size[1]} mixes places of several groups",
            try_="give the layer groups of channels",
        )
    additive = spec.weight is not None and spec.weight.additive
    layer: QuantLayer | None = None
    if isinstance(module, nn.Linear):
        layer = (CodebookLinear if additive else QuantLinear).wrap(module, spec, clock, times)
    elif isinstance(module, nn.Conv2d):
        layer = (CodebookConv2d if additive else QuantConv2d).wrap(module, spec, clock, times)
    if layer is not None:
        if layer.input is not None:
            layer.input.place = name
        return layer
    raise InputError(
        f"a {type(module).__name__} cannot be quantized", where=name, why="only Linear and Conv2d layers can",
        try_="leave the layer out of the recipe's patterns",
    )


def _keep_weight(former: QuantLayer, layer: QuantLayer) -> None:
    """Codes, tables, input scale, branch and trained bias of a layer whose activation's spec alone has changed."""
    same = {"activation": None}
    if former.spec.model_copy(update=same) != layer.spec.model_copy(update=same):
        return
    if former.input_scale is not None:
        layer.set_input_scale(former.input_scale)
    if former.low_rank is not None:
        layer.set_low_rank(*former.low_rank())
    layer.take_weight(former)
    if former.trained_bias is not None:
        layer.set_bias(former.trained_bias)


def _share(model: nn.Module, plan: Plan) -> None:
    """Give every layer on shared codebooks its set, which the model owns."""
    sets = codebooks.install(model, plan)
    for layer in layers(model).values() if sets else ():
        if isinstance(layer, CodebookLayer) and layer.weight_spec.shared:
            layer.share(sets[layer.weight_spec.shared])


def _keep_groups(former: QuantLayer, layer: QuantLayer) -> None:
    """Which group each channel or pixel is in; that is found once, tables are fitted again."""
    if former.input is None or layer.input is None or former.input.group_of is None:
        return
    before, now = former.input.spec, layer.input.spec
    if all(getattr(before, key) == getattr(now, key) for key in ("granularity", "groups", "pixels", "groups_timed")):
        layer.input.set_groups(former.input.group_of)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _operands(model: nn.Module, plan: Plan, clock: Clock) -> None:
    grouped: dict[str, dict[str, LayerSpec]] = {}
    for name, spec in plan.layers.items():
        if is_operand(name):
            owner, _, operand = name.partition(":")
            grouped.setdefault(owner, {})[operand] = spec
    for owner, specs in grouped.items():
        install_operands(model.get_submodule(owner), specs, clock, len(plan.timesteps) or 1)
