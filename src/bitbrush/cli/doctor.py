"""`bitbrush doctor`: what this machine has, what would run on it, and why other things would not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import psutil

import bitbrush
from bitbrush.cli.pictures import processor

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "peft")


def examine() -> dict[str, Any]:
    """Versions, devices, kernels, plug-in, free memory and disk, and ``problems`` in sentences (empty: all is well)."""
    plugin = plugin_state()
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.getcwd())
    report: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "kernels": kernels(),
        "plugin": plugin,
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"folder": os.getcwd(), "free_bytes": disk.free},
    }
    report["problems"] = problems(report)
    return report


def versions() -> dict[str, str | None]:
    """Python, the system, and each package's version; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    found["bitbrush"] = bitbrush.__version__
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """The CPU, then every CUDA device that torch sees."""
    import torch

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor(),
            "note": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "memory_bytes": psutil.virtual_memory().total,
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        note = f"compute capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
        found.append({"device": f"cuda:{index}", "name": facts.name, "note": note, "memory_bytes": facts.total_memory})
    return found


def kernels() -> list[dict[str, Any]]:
    """Every kernel on every kind of device: whether it would run a typical layer of its kind, else why not."""
    import torch

    from bitbrush.kernels import KERNELS, why_not

    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    layers = {"cpu-lookup": _codebook_layer()}
    scalar = _typical_layer()
    rows = []
    for kind in kinds:
        for name in KERNELS:
            reason = why_not(name, layers.get(name, scalar), kind)
            rows.append({"kernel": name, "device": kind, "runs": reason is None, "why_not": reason})
    return rows


def _typical_layer() -> Any:
    """A linear layer with 4-bit weights and 8-bit static activations, packed."""
    from torch import nn

    from bitbrush.network.layers import QuantLinear
    from bitbrush.numbers.grid import ActivationSpec, Grid, LayerSpec, WeightSpec

    spec = LayerSpec(weight=WeightSpec(grid=Grid(bits=4)), activation=ActivationSpec(grid=Grid(bits=8)))
    return QuantLinear.wrap(nn.Linear(64, 64), spec, None, 1)


def _codebook_layer() -> Any:
    """A linear layer of additive codebooks."""
    from torch import nn

    from bitbrush.network.codebook_layers import CodebookLinear
    from bitbrush.numbers.grid import Grid, LayerSpec, WeightSpec

    spec = LayerSpec(weight=WeightSpec(grid=Grid(kind="codebook", bits=8), codebooks=3))
    return CodebookLinear.wrap(nn.Linear(64, 64), spec, None, 1)


def plugin_state() -> dict[str, Any]:
    """Whether diffusers knows quant_method "bitbrush", hence whether ``from_pretrained`` opens results."""
    from diffusers.quantizers import auto

    known = "bitbrush" in auto.AUTO_QUANTIZER_MAPPING and "bitbrush" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    return {"registered": known, "how": "import bitbrush"}


def problems(report: dict[str, Any]) -> list[str]:
    """What would go wrong, in sentences."""
    found = []
    for name in ("torch", "diffusers", "transformers", "accelerate", "safetensors"):
        if report["versions"].get(name) is None:
            found.append(f"{name} is not installed: pip install {name}")
    if not report["plugin"]["registered"]:
        found.append(
            "diffusers does not know bitbrush: from_pretrained cannot open results (is diffusers 0.40 to 0.43?)"
        )
    if report["memory"]["available_bytes"] < 4e9:
        found.append("less than 4 GB of memory is free: the demo may not fit")
    if report["disk"]["free_bytes"] < 2e9:
        found.append("less than 2 GB of disk is free here: quantize with -o on another disk")
    return found
