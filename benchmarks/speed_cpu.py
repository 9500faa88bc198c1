"""CPU: a denoiser step of emoji-sd-tiny, packed (W4A8 and W8A8) beside float32, and its weights in memory.

    python benchmarks/speed_cpu.py                 # all settings of the processor, one process each; minutes
    python benchmarks/speed_cpu.py --smoke         # few turns, no second process

A step is one call of the UNet as the pipeline makes it: batch 2 (guidance), eager. The three networks share a process
and take turns in an order that rotates, on the same input; a ratio is the median over the turns of packed to float32
within a turn (what drifts, cancels), with its quartiles, and beside it the ratio of the fastest steps. Rounding is the
recipe ``rtn`` after a short calibration: speed does not depend on the codes.

Settings of the processor: ``native``; ``avx2``: oneDNN is held to AVX2 (ONEDNN_MAX_CPU_ISA), where its uint8 x int8
product saturates as on processors without VNNI, and W8A8 is multiplied in halves, while the float32 network's matrix
products (MKL) and torch's own loops keep what they had; ``avx2 all``: those are held to AVX2, too, as they would be
on such a processor.

``kinds`` are times by kind of layer, each layer alone on the input it had in a step, float32 and packed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

import bitbrush
from bitbrush import assets, kernels
from bitbrush.engine.progress import Silent
from bitbrush.evaluation.memory import weight_bytes
from bitbrush.kernels import cpu_onednn, cpu_plain

RESULTS = Path(__file__).parent / "results" / "speed" / "cpu.json"
MODEL = "emoji-sd-tiny"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
SETTINGS: dict[str, dict[str, str]] = {
    "native": {}, "avx2": AVX2, "avx2 all": AVX2 | {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}  # fmt: skip
PACKED = {"w4a8": 4, "w8a8": 8}
CALIBRATION = {"calibrate.steps": 4, "calibrate.samples": 8, "calibrate.trajectories": 2}
BARS = {
    "cpu_w4a8_time_ratio": ("no slower than float32", 1.0),
    "cpu_w8a8_time_ratio": ("no slower than float32 with VNNI, at most 1.3 x without", 1.0),
    "cpu_w4_weight_ratio": ("at most 0.32 of bf16", 0.32),
}
WITHOUT_VNNI = 1.3


# ---- networks --------------------------------------------------------------------------------------------------------
def networks() -> dict[str, nn.Module]:
    """The UNet as it is, and packed at each number of bits with the int8 kernel."""
    made: dict[str, nn.Module] = {"float32": pipeline().unet}
    for name, bits in PACKED.items():
        result = bitbrush.quantize(pipeline(), "rtn", bits, 8, prompts=assets.prompts("calibration")[:2],
                                   settings=CALIBRATION, progress=Silent())  # fmt: skip
        made[name] = result.pipeline.unet
        kernels.use(made[name], "cpu-int8")
    return made


def pipeline() -> Any:
    """The embedded model, float32."""
    return diffusers.DiffusionPipeline.from_pretrained(assets.path(MODEL), use_safetensors=True)


def inputs(model: Any) -> dict[str, Tensor]:
    """Of one step with guidance, seeded."""
    g = torch.Generator().manual_seed(0)
    size, width = model.config.sample_size, model.config.cross_attention_dim
    return {"sample": torch.randn(2, model.config.in_channels, size, size, generator=g), "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, width, generator=g)}  # fmt: skip


# ---- time ------------------------------------------------------------------------------------------------------------
def seconds(work: Callable[[], Any]) -> float:
    """Of one call, on the wall."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def steps(made: dict[str, nn.Module], given: dict[str, Tensor], turns: int) -> dict[str, list[float]]:
    """Seconds of a step of every network, one a turn; each goes first, second and last equally often."""
    names, found = list(made), {name: list[float]() for name in made}
    for name in names * 2:
        made[name](**given)  # warms up
    for turn in range(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(seconds(lambda name=name: made[name](**given)))  # type: ignore[misc]
    return found


def ratio(packed: list[float], plain: list[float]) -> dict[str, float]:
    """Packed to float32: the median over the turns with its quartiles, and the ratio of the fastest steps."""
    low, middle, high = np.percentile(np.array(packed) / np.array(plain), [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high), "fastest": min(packed) / min(plain)}


def by_kind(made: dict[str, nn.Module], given: dict[str, Tensor], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of all layers of a kind in a step, the fastest of ``repeats`` calls each."""
    seen: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in made["w4a8"].named_modules() if hasattr(layer, "declare_packed")}
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
               for name, layer in layers.items()]  # fmt: skip
    made["w4a8"](**given)
    for handle in handles:
        handle.remove()
    out: dict[str, dict[str, float]] = {}
    for name, x in seen.items():
        for network, model in made.items():
            layer, given_x = model.get_submodule(name), x.contiguous() if network == "float32" else x
            fastest = min(seconds(lambda layer=layer, x=given_x: layer(x)) for _ in range(repeats))  # type: ignore[misc]
            row = out.setdefault(_kind(layer), dict.fromkeys(made, 0.0) | {"layers": 0.0})
            row[network] += fastest * 1e3
        row["layers"] += 1
    return out


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d):
        return "linear"
    stride = "" if layer.stride[0] == 1 else f" stride {layer.stride[0]}"
    return f"convolution {layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}"


# ---- all together ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One setting of the processor, in this process."""
    made = networks()
    given = inputs(made["float32"])
    found = steps(made, given, args.turns)
    plain = sum(p.numel() for p in made["float32"].parameters())
    return {
        "machine": {
            "engine": cpu_onednn.engine(), "vnni": cpu_onednn.engine() == "exact",
            "capability": torch.backends.cpu.get_cpu_capability(), "processor": processor(),
            "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        },
        "ms": {name: {"median": statistics.median(each) * 1e3, "fastest": min(each) * 1e3}
               for name, each in found.items()},
        "ratios": {name: ratio(found[name], found["float32"]) for name in PACKED},
        "weights": {name: held(made[name]) / (2 * plain) for name in PACKED},
        "kinds": by_kind(made, given, 3 if args.smoke else 15),
    }  # fmt: skip


def held(model: nn.Module) -> int:
    """Bytes of a network's weights, and of what its layers keep for the next call."""
    return weight_bytes(model) + cpu_plain.kept_bytes(model)


def processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def elsewhere(setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, with the setting's environment."""
    command = [sys.executable, "-W", "ignore", __file__, "--turns", str(args.turns), "--worker"]
    done = subprocess.run(command, env=os.environ | SETTINGS[setting], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(found: dict[str, dict[str, Any]], command: str) -> dict[str, Any]:
    """The bars with what was measured natively, and for W8A8 also where the product saturates."""
    native = found["native"]
    allowed = 1.0 if native["machine"]["vnni"] else WITHOUT_VNNI
    values = {"cpu_w4a8_time_ratio": native["ratios"]["w4a8"]["median"],
              "cpu_w8a8_time_ratio": native["ratios"]["w8a8"]["median"],
              "cpu_w4_weight_ratio": native["weights"]["w4a8"]}  # fmt: skip
    out: dict[str, Any] = {}
    for key, value in values.items():
        words, bound = BARS[key]
        bound = allowed if key == "cpu_w8a8_time_ratio" else bound
        out[key] = {"value": value, "bar": words, "met": value <= bound, "command": command}
    return out


def table(result: dict[str, Any]) -> str:
    """What was measured, for people."""
    lines = []
    for setting, found in result["settings"].items():
        machine = found["machine"]
        lines.append(f"{setting}: {machine['processor']}, {machine['capability']}, product {machine['engine']}, "
                     f"{machine['threads']} threads")  # fmt: skip
        lines.append(f"  {'':10}{'ms (median)':>12}{'fastest':>10}{'ratio':>8}{'quartiles':>16}{'of fastest':>12}"
                     f"{'weights':>9}")  # fmt: skip
        for name, each in found["ms"].items():
            line = f"  {name:10}{each['median']:12.1f}{each['fastest']:10.1f}"
            if name in PACKED:
                r = found["ratios"][name]
                line += (f"{r['median']:8.3f}{r['q1']:9.3f} .. {r['q3']:.3f}{r['fastest']:10.3f}"
                         f"{found['weights'][name]:11.3f}")  # fmt: skip
            lines.append(line)
        lines.append(f"  {'kind':26}{'layers':>7}" + "".join(f"{name + ' ms':>12}" for name in found["ms"]))
        for kind, row in found["kinds"].items():
            lines.append(f"  {kind:26}{row['layers']:7.0f}" + "".join(f"{row[name]:12.2f}" for name in found["ms"]))
        lines.append("")
    for key, each in result["bars"].items():
        lines.append(f"{key}: {each['value']:.3f} ({each['bar']}: {'met' if each['met'] else 'missed'})")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=120, help="steps of each network")
    parser.add_argument("--smoke", action="store_true", help="four turns, the native setting, in this process")
    parser.add_argument("--out", type=Path, help=f"the JSON; by default {RESULTS.name} in the results' folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.turns = min(args.turns, 4)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    found = {"native": measure(args)} if args.smoke else {name: elsewhere(name, args) for name in SETTINGS}
    command = " ".join(["benchmarks/speed_cpu.py", *sys.argv[1:]])
    bars = summary(found, command)
    result = {
        "model": MODEL, "batch": 2, "turns": args.turns, "settings": found, "bars": bars,
        **{key: each["value"] for key, each in bars.items()}, "command": command,
        "versions": {"bitbrush": bitbrush.__version__, "torch": torch.__version__,
                     "diffusers": diffusers.__version__, "python": platform.python_version()},
    }  # fmt: skip
    out = args.out or (None if args.smoke else RESULTS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
