"""The quantization method ``bitbrush`` of diffusers: a config, a quantizer, and their registration.

After ``register()`` (``import bitbrush`` calls it) a saved denoiser loads with plain ``from_pretrained``, alone or in a
pipeline. The config names the plan, from which the packed layers are built empty before the weights come; the weights
are 1:1 names. What is worth knowing about the hooks of diffusers 0.40 to 0.43:

* floating tensors are cast to ``torch_dtype`` before a quantizer sees them, so scales are taken from the untouched
  ``state_dict`` (`BitbrushQuantizer.create_quantized_param`); they stay float32 (float16) under every dtype;
* keys that the model does not have are skipped and missing ones left on meta with a warning only: here both are errors;
* the raw tensors pass `maybe_update_state_dict` shard by shard; there they are hashed for the digest.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from bitbrush.artifact import digest, manifest
from bitbrush.errors import ArtifactError, InputError
from bitbrush.network import codebooks, correction, wrap
from bitbrush.network.activation import ActivationQuantizer
from bitbrush.network.attention import QuantAttention
from bitbrush.network.codebook_layers import CodebookLayer
from bitbrush.network.correction import Correction, CorrectionSpec
from bitbrush.network.dtypes import HalfTables
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.grid import Plan

_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)
_KEYS = {"quant_method", "format_version", "bitbrush_version", "plan", "digest", "correction"}


class Method(StrEnum):
    """``quant_method`` of the config; diffusers reads ``.value``."""

    BITBRUSH = "bitbrush"


class BitbrushConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed denoiser.

    Args:
        plan: The plan, or its JSON form.
        digest: SHA-256 over plan and tensors, see `artifact.digest`.
        bitbrush_version: The release that wrote it.
        format_version: Of the packed layout.
        correction: Facts of a correction (`network.correction`), or their JSON form; None: there is none.

    Raises:
        ArtifactError: Another format version, or a plan that cannot be read.
    """

    def __init__(
        self, plan: Plan | dict[str, Any] | None = None, digest: str = "", bitbrush_version: str = "",
        format_version: int = manifest.FORMAT, correction: CorrectionSpec | dict[str, Any] | None = None,
    ) -> None:
        self.quant_method: Any = Method.BITBRUSH
        if type(format_version) is not int or format_version < 1:
            raise _malformed(f"format_version: expected a positive integer, got {str(format_version)[:40]!r}")
        if format_version != manifest.FORMAT:
            raise manifest.other_format("quantization_config", format_version)
        self.format_version = format_version
        self.bitbrush_version = bitbrush_version or manifest.version()
        self.digest = digest
        self.plan = plan if isinstance(plan, Plan) else _read_plan(plan or {"specs": [], "layers": {}})
        self.correction = _read_correction(correction)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in ``config.json``."""
        data = {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "bitbrush_version": self.bitbrush_version,
            "plan": _plan_json(self.plan),
            "digest": self.digest,
        }
        return data if self.correction is None else {**data, "correction": self.facts()}

    def facts(self) -> dict[str, Any] | None:
        """The correction's facts, JSON-able."""
        return None if self.correction is None else self.correction.model_dump(mode="json")

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`, without the plan's details: diffusers logs it."""
        return {**self.to_dict(), "plan": f"{len(self.plan.layers)} layers, {len(self.plan.timesteps)} timesteps"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`; unknown keys are errors."""
        unknown = sorted(set(config_dict) - _KEYS)
        version = config_dict.get("format_version", manifest.FORMAT)
        if unknown and version == manifest.FORMAT:
            raise _malformed(f"unknown key {str(unknown[0])[:80]!r}")
        known = {key: value for key, value in config_dict.items() if key in _KEYS - {"quant_method"}}
        config = cls(**known)
        return (config, kwargs) if return_unused_kwargs else config

    def __deepcopy__(self, memo: dict[int, Any]) -> BitbrushConfig:
        return BitbrushConfig(self.plan, self.digest, self.bitbrush_version, self.format_version, self.correction)


class BitbrushQuantizer(DiffusersQuantizer):
    """Loads packed denoisers for diffusers. Quantizing is `bitbrush.quantize`, never a side effect of loading."""

    use_keep_in_fp32_modules = True
    quantization_config: Any  # a BitbrushConfig; the base class declares its own mixin

    def __init__(self, quantization_config: BitbrushConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise _not_quantized()
        self._keys: list[str] = []
        self._lines: dict[str, str] = {}
        self._expected: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BitbrushQuantizer:
        return BitbrushQuantizer(self.quantization_config.__deepcopy__(memo), pre_quantized=True)

    # ---- before the weights ------------------------------------------------------------------------------------
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses offloading to disk, which would bypass the float32 scales."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError("packed weights cannot be offloaded to disk", where="device_map",
                             why="diffusers would cast the scales on the way", try_="device_map={'': 'cpu'}")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Notes which tensors the checkpoint has, over all shards."""
        self._keys, self._lines = list(loaded_keys), {}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if kwargs.get("state_dict") is not None:  # from_single_file passes one
            raise _not_quantized()
        plan: Plan = self.quantization_config.plan
        try:
            clock = wrap.declare(model, plan)
            if self.quantization_config.correction is not None:
                correction.install(model, self.quantization_config.correction)
        except (AttributeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise _malformed(f"the plan does not fit a {type(model).__name__}: {str(error)[:160]}") from error
        if clock.timesteps.is_meta:
            clock.timesteps = torch.tensor(plan.timesteps, dtype=torch.float32)
        wrap.set_face(model, "packed")
        self._expected = dict(model.state_dict())

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Missing and unknown tensors are errors, not warnings."""
        missing = sorted(set(self._expected) - set(self._keys))
        unknown = sorted(set(self._keys) - set(self._expected))
        if missing or unknown:
            raise ArtifactError(
                f"the tensors are those of another model: {len(missing)} missing, {len(unknown)} unknown",
                where=(missing or unknown)[0], why=f"config.json describes {len(self._expected)} tensors",
                try_="copy the whole model folder again",
            )
        return missing_keys

    # ---- the weights -------------------------------------------------------------------------------------------
    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks shapes and dtypes of a shard and hashes its tensors, before anything is cast."""
        for name, tensor in state_dict.items():
            expected = self._expected.get(name)
            if expected is None:
                continue
            if tensor.shape != expected.shape or not _compatible(tensor.dtype, expected.dtype):
                raise ArtifactError(
                    "a tensor has the wrong shape or type", where=name,
                    why=f"expected {list(expected.shape)} {expected.dtype}, found {list(tensor.shape)} {tensor.dtype}",
                    try_="copy the whole model folder again",
                )
            self._lines[name] = digest.tensor_line(name, tensor)
        return state_dict

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Claims the floating scale tables: they must not be cast."""
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        mine = isinstance(module, QuantLayer | ActivationQuantizer | Correction | HalfTables)
        return mine and leaf in module._buffers and state_dict[param_name].is_floating_point()

    def create_quantized_param(  # type: ignore[override]
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, state_dict: dict[str, Any],
        *args: Any, **kwargs: Any,
    ) -> None:
        """Puts the untouched table in its place: float16 of codebooks, their scales and branches, else float32."""
        table = state_dict[param_name]
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        half = isinstance(module, HalfTables) or (isinstance(module, CodebookLayer) and leaf == "weight_scale")
        signed = half or (leaf != "scale" and isinstance(module, Correction))
        dtype = torch.float16 if half else torch.float32
        fits = torch.isfinite(table) if signed else torch.isfinite(table) & (table > 0)
        if table.dtype != dtype or not bool(fits.all()):
            name = str(dtype).removeprefix("torch.")
            what = f"a table is not finite {name}" if signed else f"a scale is not a positive finite {name} number"
            raise ArtifactError(what, where=param_name, why="the tensor was changed",
                                try_="copy the artifact again, or quantize again")
        set_module_tensor_to_device(model, param_name, target_device, value=table)

    # ---- after the weights -------------------------------------------------------------------------------------
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        state = model.state_dict()
        bare = [name for name, tensor in state.items() if tensor.is_meta]
        if bare and not _offloads(model):
            raise ArtifactError(f"{len(bare)} tensors were not loaded", where=bare[0], why="diffusers left them empty",
                                try_="load without offload_state_dict")
        config: BitbrushConfig = self.quantization_config
        if digest.combine(config.plan, self._lines, config.facts()) != config.digest:
            raise ArtifactError(
                "the packed weights have changed since they were saved", where=type(model).__name__,
                why="their SHA-256 differs from the digest in config.json",
                try_="copy the artifact again, or quantize again; `bitbrush.load(OUT)` names the file",
            )
        _check_row_orders(model)
        _check_groups(model)
        for module in model.modules():
            if isinstance(module, ActivationQuantizer):
                module.keep()
        self._recount(config, state)
        _protect(model)
        self._keys, self._lines, self._expected = [], {}, {}

    def _recount(self, config: BitbrushConfig, state: dict[str, Tensor]) -> None:
        """A model loaded in another dtype has other biases: what it saves must carry their digest."""
        for name, tensor in state.items():
            if str(tensor.dtype).removeprefix("torch.") != self._lines[name].split(" ", 2)[1]:
                self._lines[name] = "" if tensor.is_meta else digest.tensor_line(name, tensor)
        config.digest = digest.combine(config.plan, self._lines, config.facts())

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Refuses to save with adapters inside, or as a pickle."""
        if any(".base_layer." in name for name in state_dict):
            raise InputError("a packed model with LoRA adapters cannot be saved", why="adapters are saved on their own",
                             try_="pipeline.unload_lora_weights(), then save")
        if not safe_serialization:
            raise InputError("packed weights are saved as safetensors only", why="pickles can run code",
                             try_="leave safe_serialization at True")
        return state_dict, {}

    def _dequantize(self, model: Any) -> Any:
        for name, layer in wrap.layers(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _float_layer(layer, model.dtype))
        for module in list(model.modules()):
            if isinstance(getattr(module, "processor", None), QuantAttention):
                module.set_processor(module.processor.original)
        correction.remove(model)
        codebooks.remove(model)
        if hasattr(model, "bitbrush_clock"):
            model.bitbrush_clock.detach()
            del model.bitbrush_clock
        for name in ("fuse_lora", "fuse_qkv_projections", "quantization_method"):
            model.__dict__.pop(name, None)
        _forget(model, "quantization_config", "_pre_quantization_dtype")
        return model

    @property
    def is_serializable(self) -> bool:
        """Packed models save with ``save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile(model, fullgraph=True)`` works."""
        return True


class NoTextEncoder:
    """Stands in transformers' registry: bitbrush quantizes denoisers, so asking for a text encoder is an error."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        raise InputError("bitbrush does not quantize transformers models", where="quantization_config",
                         why="it packs the denoiser of a pipeline (unet)", try_="bitbrush quantize MODEL -o OUT")


def register() -> None:
    """Make diffusers know ``quant_method: bitbrush``, and transformers its name. May be called any number of times."""
    add = getattr(auto, "register_quantizer", None)  # not in any release so far
    if add is not None and Method.BITBRUSH not in auto.AUTO_QUANTIZER_MAPPING:
        add(Method.BITBRUSH.value)(BitbrushQuantizer)
    auto.AUTO_QUANTIZER_MAPPING[Method.BITBRUSH.value] = BitbrushQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.BITBRUSH.value] = BitbrushConfig
    from transformers.quantizers import auto as other  # PipelineQuantizationConfig looks into both

    quantizers: dict[str, Any] = other.AUTO_QUANTIZER_MAPPING
    quantizers[Method.BITBRUSH.value] = NoTextEncoder
    other.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.BITBRUSH.value] = BitbrushConfig


def attach(model: Any, plan: Plan) -> BitbrushConfig:
    """Make a denoiser that was packed in memory look like a loaded one, so that ``save_pretrained`` works.

    Also to be called again after its tensors were changed on purpose: the digest is taken anew.

    Raises:
        InputError: A layer of the plan is not packed, or adapters are loaded.
    """
    for name, layer in wrap.layers(model).items():
        if layer.face != "packed":
            raise InputError("the model is not packed", where=name, why=f"the layer shows its {layer.face} face",
                             try_="pack every layer first")
        if name.endswith(".base_layer"):
            raise InputError("a packed model with LoRA adapters cannot be saved", where=name,
                             why="adapters are saved on their own", try_="pipeline.unload_lora_weights(), then save")
    found = correction.find(model)
    config = BitbrushConfig(plan, correction=None if found is None else found.spec)
    config.digest = digest.of_model(model, plan, config.facts())
    model.hf_quantizer = BitbrushQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = Method.BITBRUSH
    model.register_to_config(quantization_config=config)
    _protect(model)
    return config


def drop_path(component: Any) -> None:
    """Forget the folder that diffusers notes in a config on loading: it would be written out on saving."""
    _forget(component, "_name_or_path")


def _forget(component: Any, *keys: str) -> None:
    config = getattr(component, "_internal_dict", None)
    if isinstance(config, FrozenDict):
        component._internal_dict = FrozenDict({k: v for k, v in config.items() if k not in keys})


def _protect(model: Any) -> None:
    """Instance overrides of what would silently lose the quantization. Plain functions, so that copies keep them."""
    for name, refusal in (("fuse_lora", _refuse_fuse), ("fuse_qkv_projections", _refuse_fuse_qkv)):
        if hasattr(model, name):
            setattr(model, name, refusal)


def _refuse_fuse(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "LoRA adapters cannot be fused into packed weights", where="fuse_lora",
        why="the merged weight is not on the low-bit grid and could not be written back",
        try_="keep the adapter loaded, it runs beside the packed layers; or fuse into the float model, then quantize",
    )


def _refuse_fuse_qkv(*args: Any, **kwargs: Any) -> None:
    raise InputError("projections of packed layers cannot be fused", where="fuse_qkv_projections",
                     why="the fused layer would be a float one, without the quantized input",
                     try_="fuse in the float model, then quantize")


def _float_layer(layer: QuantLayer, dtype: torch.dtype) -> nn.Module:
    weight = layer.restored_weight().to(dtype)
    plain: nn.Module
    if isinstance(layer, QuantLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, QuantConv2d):
        shape: dict[str, Any] = {key: getattr(layer, key) for key in _CONV}
        plain = nn.Conv2d(**shape, bias=layer.bias is not None, device="meta")
    else:
        raise InputError(f"a {type(layer).__name__} cannot be dequantized", why="only linear and conv layers can",
                         try_="load the original model")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain.train(layer.training)


def _check_row_orders(model: nn.Module) -> None:
    for name, layer in wrap.layers(model).items():
        order = layer._buffers.get("row_order")
        if order is None or order.is_meta:
            continue
        if not torch.equal(order.sort().values.long().cpu(), torch.arange(order.numel())):
            raise ArtifactError("row_order is not a permutation", where=name, why="the tensor was changed",
                                try_="copy the artifact again, or quantize again")


def _check_groups(model: nn.Module) -> None:
    for name, module in model.named_modules():
        labels = module.group_of if isinstance(module, ActivationQuantizer) else None
        if labels is None or labels.is_meta or int(labels.max()) < module.spec.groups:
            continue
        raise ArtifactError("group_of names a group that does not exist", where=name, why="the tensor was changed",
                            try_="copy the artifact again, or quantize again")


def _compatible(found: torch.dtype, expected: torch.dtype) -> bool:
    return found == expected or (found.is_floating_point and expected.is_floating_point)


def _offloads(model: nn.Module) -> bool:
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def _plan_json(plan: Plan) -> dict[str, Any]:
    """The plan with its layers as pairs: diffusers sorts the keys of config.json, and the order is the execution's."""
    data = plan.to_json()
    return {**data, "layers": [[name, number] for name, number in data["layers"].items()]}


def _read_plan(data: dict[str, Any]) -> Plan:
    try:
        pairs = data["layers"].items() if isinstance(data["layers"], dict) else data["layers"]
        layers = dict(pairs)
        if len(layers) != len(pairs):
            raise ValueError("a layer is named twice")
        return Plan.from_json({**data, "layers": layers})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _malformed(f"plan: {str(error)[:200]}") from error


def _read_correction(data: CorrectionSpec | dict[str, Any] | None) -> CorrectionSpec | None:
    if data is None or isinstance(data, CorrectionSpec):
        return data
    try:
        return CorrectionSpec.from_json(data)
    except (ValueError, TypeError) as error:
        raise _malformed(f"correction: {str(error)[:200]}") from error


def _malformed(why: str) -> ArtifactError:
    return ArtifactError("quantization_config is malformed", where="config.json", why=why,
                         try_="copy the artifact again; never edit this file by hand")


def _not_quantized() -> InputError:
    return InputError(
        "this model is not quantized yet", where="quantization_config=BitbrushConfig(...)",
        why="bitbrush quantizes once, with calibration, and saves; it does not quantize while loading",
        try_="bitbrush quantize MODEL -o OUT, then from_pretrained(OUT) without quantization_config",
    )
