"""The figures that have a bar, from the parts' files; and the short table that a run prints last.

A figure needs its baseline from the same process (steps, kernels) or at least from the same run of the script. What was
not measured is null, and met by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import record
from speed.shapes import geomean

Parts = dict[str, dict[str, Any]]
Figure = dict[str, Any]

STATIC_BARS: dict[str, tuple[str, float]] = {
    "sdxl_w8a8_speedup": (">=", 1.35), "sdxl_w4a8_over_w8a8_time": ("<=", 1.10), "sdxl_w4_weight_ratio": ("<=", 0.30),
    "sd15_w8a8_speedup": (">=", 1.3), "conv_geomean_speedup": (">=", 1.5), "gemm_geomean_speedup": (">=", 1.5),
    "encode_bandwidth_share": (">=", 0.8), "time_table_overhead": ("<=", 0.03), "segments8_overhead": ("<=", 0.15),
    "vq3_step_ratio": ("<=", 1.15), "vq3_weight_ratio": ("<=", 0.23), "w4_peak_memory_ratio": ("<=", 0.40),
    "cpu_w8a8_time_ratio": ("<=", 1.3), "cpu_w4a8_time_ratio": ("<=", 1.0),
}  # fmt: skip
"""Key to the side of the bar that is wanted, and the bar."""
PART_OF = {
    "sdxl_w8a8_speedup": "steps-sdxl", "sdxl_w4a8_over_w8a8_time": "steps-sdxl", "sdxl_w4_weight_ratio": "steps-sdxl",
    "sd15_w8a8_speedup": "steps-sd15", "conv_geomean_speedup": "conv", "gemm_geomean_speedup": "gemm",
    "encode_bandwidth_share": "encode", "time_table_overhead": "steps-sdxl", "segments8_overhead": "steps-sdxl",
    "vq3_step_ratio": "steps-sdxl", "vq3_weight_ratio": "steps-sdxl", "w4_peak_memory_ratio": "memory",
}  # fmt: skip
OURS = "ours, w8"
WITH_VNNI = 1.0


def load(folder: Path) -> Parts:
    """The parts' files of a folder, by part; ``cpu`` as another script writes it."""
    found: Parts = {}
    for file in sorted(folder.glob("*.json")):
        data = record.load(file) if file.stem != "cpu" else _plain(file)
        if data is not None and file.stem != "summary":
            found[file.stem] = data
    return found


def _plain(file: Path) -> dict[str, Any] | None:
    import json

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ---- what an item says -------------------------------------------------------------------------------------------
def items(parts: Parts, part: str) -> dict[str, Any]:
    """Of one part, empty where it is missing or a smoke run."""
    found = parts.get(part)
    return {} if found is None or found.get("smoke") else dict(found["items"])


def median(item: dict[str, Any], name: str) -> float | None:
    """Microseconds of a contestant."""
    time = item["times_us"].get(name)
    return None if time is None else float(time["median"])


def baseline(item: dict[str, Any]) -> float | None:
    """Microseconds of the fastest bf16 contestant."""
    known = [t["median"] for name, t in item["times_us"].items() if name.startswith("bf16")]
    return min(known) if known else None


def speedup(item: dict[str, Any], name: str = OURS) -> float | None:
    """How many times as fast as bf16 of the same item; None where either is missing or an error is too large."""
    base, own = baseline(item), median(item, name)
    return None if base is None or own is None or not sound(item, name) else base / own


def sound(item: dict[str, Any], name: str) -> bool:
    """Whether a kernel's output was that of the reference, to bf16."""
    error = item.get("errors", {}).get(name, 0.0)
    return isinstance(error, float | int) and error < 0.02


def turn(item: dict[str, Any] | None, name: str, key: str = "wall_ms") -> float | None:
    """Milliseconds of one party of an item's turns."""
    found = item["turns"].get(name) if item else None
    return None if found is None else float(found[key])


def ratio(item: dict[str, Any] | None, over: str, under: str, key: str = "wall_ms") -> float | None:
    """Time of one party over another's, of the same turns; None where the output was not finite."""
    a, b = turn(item, over, key), turn(item, under, key)
    good = item is not None and item.get("output", {}).get("finite", True)
    return None if a is None or b is None or not good else a / b


def _geomean(found: dict[str, Any]) -> float | None:
    """Of all shapes; one that failed leaves no figure."""
    values = [speedup(item) for item in found.values()]
    known = [value for value in values if value is not None]
    return geomean(known) if len(known) == len(values) else None


# ---- the figures -------------------------------------------------------------------------------------------------
def _steps(model: str, form: str, over: str, under: str) -> Callable[[Parts], float | None]:
    return lambda parts: ratio(items(parts, f"steps-{model}").get(form), over, under)


def _weights(form: str) -> Callable[[Parts], float | None]:
    def measure(parts: Parts) -> float | None:
        found = items(parts, "steps-sdxl") or {}
        own, base = found.get(form), found.get("bf16")
        if own is None or base is None:
            found = items(parts, "memory")
            own, base = found.get("w4" if form.startswith("w4") else form), found.get("bf16")
        return None if own is None or base is None else own["weight_bytes"] / base["weight_bytes"]

    return measure


def _overhead(form: str) -> Callable[[Parts], float | None]:
    """Of a whole step over the plain form's; where that is missing, of layers (geometric mean)."""
    def measure(parts: Parts) -> float | None:
        whole = ratio(items(parts, "steps-sdxl").get(form), form, "w8a8")
        if whole is not None:
            return whole - 1
        each = [own / base for item in items(parts, "layers").values()
                if (own := median(item, form)) is not None and (base := median(item, "w8a8")) is not None]
        mean = geomean(each)
        return None if mean is None else mean - 1

    return measure


def encode_share(parts: Parts) -> float | None:
    """The least share of the copy's bytes a second (of the ceiling) among the encodes fused with a norm, by their
    faster way."""
    ceiling = items(parts, "ceilings").get("copy")
    shares = [
        max(rate for name, rate in item["rates"].items() if name != "copy") / ceiling["rate"]
        for key, item in items(parts, "encode").items() if ceiling and "+ encode" in key and len(item["rates"]) > 1
    ]
    return min(shares) if shares else None


def _memory(parts: Parts) -> float | None:
    found = items(parts, "memory")
    own, base = found.get("w4"), found.get("bf16")
    return None if own is None or base is None else own["peak_bytes"] / base["peak_bytes"]


def cpu(key: str) -> Callable[[Parts], float | None]:
    """A figure of the CPU's file, which has it at the top."""
    def measure(parts: Parts) -> float | None:
        value = parts.get("cpu", {}).get(key)
        return float(value) if isinstance(value, int | float) else None

    return measure


MEASURES: dict[str, Callable[[Parts], float | None]] = {
    "sdxl_w8a8_speedup": _steps("sdxl", "w8a8", "bf16", "w8a8"),
    "sdxl_w4a8_over_w8a8_time": _steps("sdxl", "w4a8", "w4a8", "w8a8"),
    "sdxl_w4_weight_ratio": _weights("w4a8"),
    "sd15_w8a8_speedup": _steps("sd15", "w8a8", "bf16", "w8a8"),
    "conv_geomean_speedup": lambda parts: _geomean(items(parts, "conv")),
    "gemm_geomean_speedup": lambda parts: _geomean(items(parts, "gemm")),
    "encode_bandwidth_share": encode_share,
    "time_table_overhead": _overhead("w8a8-times"),
    "segments8_overhead": _overhead("w8a8-segments8"),
    "vq3_step_ratio": _steps("sdxl", "vq3", "vq3", "bf16"),
    "vq3_weight_ratio": _weights("vq3"),
    "w4_peak_memory_ratio": _memory,
    "cpu_w8a8_time_ratio": cpu("cpu_w8a8_time_ratio"),
    "cpu_w4a8_time_ratio": cpu("cpu_w4a8_time_ratio"),
}


def figures(parts: Parts) -> dict[str, Figure]:
    """All of them: key to ``value``, ``bar``, ``met``, ``command``."""
    found: dict[str, Figure] = {}
    for key, measure in MEASURES.items():
        side, bar = STATIC_BARS[key]
        if key == "cpu_w8a8_time_ratio" and has_vnni(parts):
            bar = WITH_VNNI
        value = measure(parts)
        met = value is not None and (value >= bar if side == ">=" else value <= bar) and _also(key, parts)
        part = PART_OF.get(key)
        command = f"python benchmarks/speed.py {part}" if part else "python benchmarks/speed_cpu.py"
        found[key] = {"value": value, "bar": bar, "met": met, "command": command}
    return found


def has_vnni(parts: Parts) -> bool:
    """Whether the CPU of the CPU's file has int8 dot products."""
    native = parts.get("cpu", {}).get("settings", {}).get("native", {})
    return bool(native.get("machine", {}).get("vnni"))


def _also(key: str, parts: Parts) -> bool:
    """What a bar asks for beside its number."""
    if key == "gemm_geomean_speedup":
        pairs = [(median(item, OURS), median(item, "int_mm")) for item in items(parts, "gemm").values()]
        return all(own is not None and (other is None or own < other) for own, other in pairs)
    if key == "sdxl_w8a8_speedup":
        item = items(parts, "steps-sdxl").get("w8a8")
        own = turn(item, "w8a8")
        others = [turn(peer, name) for name, peer in peers(parts, item["run"] if item else "").items()]
        return own is not None and all(other is not None and own < other for other in others)
    return True


def peers(parts: Parts, run: str) -> dict[str, Any]:
    """SDXL's item of every peer that was measured in a run."""
    found = {part.removeprefix("peer-"): items(parts, part).get("sdxl") for part in parts if part.startswith("peer-")}
    return {name: item for name, item in found.items() if item is not None and item["run"] == run}


def untimed(item: dict[str, Any]) -> dict[str, str]:
    """Ways of an item that were not timed, and why; a way that cannot be captured in a graph was timed without."""
    return {name: way["error"] for name, way in item["ways"].items() if "error" in way and not name.endswith(", graph")}


# ---- what a run prints -------------------------------------------------------------------------------------------
def table(parts: Parts) -> list[str]:
    """A few lines a part: times, and what they are beside their own baseline."""
    lines = []
    for part, data in parts.items():
        if part == "cpu":
            continue
        smoke = " (smoke: no figure means anything)" if data["smoke"] else ""
        lines += ["", f"{part} on {data['machine']['device']}{smoke}"]
        lines += [f"  {name:<44}{_line(item)}" for name, item in data["items"].items()]
        lines += [f"  {name:<44}{why[:120]}" for name, why in data["errors"].items()]
    return lines[1:] if lines else ["nothing was measured"]


def _line(item: dict[str, Any]) -> str:
    if "rate" in item:
        return f"{item['rate'] / 1e12:9.3f} T/s"
    if "turns" in item:
        each = [f"{name} {t['gpu_ms']:.2f} ms GPU, {t['wall_ms']:.2f} wall ({t['way']})"
                for name, t in item["turns"].items()]
        return "; ".join([*each, *(f"{way}: {why[:60]}" for way, why in untimed(item).items())])
    if "peak_bytes" in item:
        return f"{item['peak_bytes'] / 1e9:.3f} GB peak, {item['weight_bytes'] / 1e9:.3f} GB of weights"
    return ", ".join(f"{name} {time['median']:.1f} us" for name, time in item["times_us"].items())
