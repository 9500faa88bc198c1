"""What a run will cost, before it starts: disk, memory, time. Rough, and says so."""

from __future__ import annotations

import time
from typing import Any

import torch

from bitbrush.engine.recipe import Recipe
from bitbrush.network.survey import Survey
from bitbrush.numbers import packing
from bitbrush.numbers.grid import LayerSpec, Plan


def layer_bytes(shape: tuple[int, ...], spec: LayerSpec, bias: bool, times: int = 1) -> int:
    """Bytes of one layer in an artifact (codes, tables, bias)."""
    rows, channels = shape[0], shape[1]
    kernel = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
    total = 4 * rows if bias else 0
    segments = spec.segments or (channels,)
    if spec.weight is None:
        total += 4 * rows * channels * kernel[0] * kernel[1]
    else:
        length = packing.row_length(segments, kernel)
        bits = spec.weight.row_bits or (spec.weight.grid.bits,) * rows
        total += sum(packing.row_bytes(length, b) for b in bits) + rows * len(segments) * 5
    if spec.activation is not None and spec.activation.mode == "static":
        total += 9 * len(segments) * (times if spec.activation.timed else 1)
    return total


def model_bytes(survey: Survey, plan: Plan) -> dict[str, int]:
    """Parameters, bytes in bf16, and bytes of the packed denoiser (everything kept counts)."""
    parameters = sum(site.parameters for site in survey.layers()) + sum(survey.other.values())
    packed = 4 * sum(survey.other.values())
    for site in survey.layers():
        weights = 1
        for n in site.shape:
            weights *= n
        spec = plan.layers.get(site.name)
        bias = site.parameters > weights
        packed += layer_bytes(site.shape, spec, bias, len(plan.timesteps)) if spec else 4 * site.parameters
    return {"parameters": parameters, "bf16_bytes": 2 * parameters, "packed_bytes": packed}


def estimate(survey: Survey, plan: Plan, recipe: Recipe, guided: bool, device: str = "cpu") -> dict[str, Any]:
    """Estimated tape bytes, peak memory and seconds of a run."""
    macs = sum(site.macs for site in survey.layers())
    parameters = sum(site.parameters for site in survey.layers())
    forwards = 0.0
    tape = 0
    for step in recipe.steps:
        data = step.model_dump()
        if step.do == "calibrate":
            forwards += data["trajectories"] * data["steps"] * (2 if guided else 1)
            tape = data["samples"]
        elif step.do == "fit" and data["what"] == "activations":
            forwards += min(data["samples"], tape or data["samples"])
        elif step.do == "reconstruct":
            forwards += 3.5 * data["iterations"] * data["batch"] + 2 * min(data["samples"], tape or data["samples"])
    rate = measured_rate(device)
    return {
        "seconds": round(forwards * macs / rate + 1e-7 * parameters + 5, 1),
        "tape_bytes": tape * 200_000,
        "peak_bytes": int(8 * parameters + (2 << 30) + 16 * max((s.macs // max(s.parameters, 1) for s in
                                                               survey.layers()), default=1) * 4096),
        "forwards": int(forwards),
        "macs_per_second": rate,
    }


def measured_rate(device: str) -> float:
    """Multiply-accumulates a second of a medium matrix product on the device, halved for what real layers reach."""
    n = 1024 if device == "cpu" else 4096
    a = torch.ones(n, n, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    (a @ a).sum().item()
    return float(n) ** 3 / max(time.perf_counter() - start, 1e-6) / 2
