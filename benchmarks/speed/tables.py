"""The tables of docs/performance.md, from the parts' files. A figure stands only beside a baseline of its own run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speed import models, networks, shapes, summary
from speed.summary import OURS, Parts, items, turn

UNITS = {"sdxl_w4_weight_ratio": "x", "vq3_weight_ratio": "x", "w4_peak_memory_ratio": "x"}
MEANING = {
    "sdxl_w8a8_speedup": "SDXL's step, W8A8: the strongest bf16 over ours; faster than every peer of that run, too",
    "sdxl_w4a8_over_w8a8_time": "SDXL's step: W4A8 over W8A8",
    "sdxl_w4_weight_ratio": "SDXL's weights in memory: W4 over bf16",
    "sd15_w8a8_speedup": "SD 1.5's step, W8A8: the strongest bf16 over ours",
    "conv_geomean_speedup": "convolutions: cuDNN bf16 over ours, geometric mean",
    "gemm_geomean_speedup": "products: bf16 over ours, geometric mean; each faster than `torch._int_mm`, too",
    "encode_bandwidth_share": "encode fused with a norm: share of the copy's bytes a second, the least",
    "time_table_overhead": "a scale a timestep: time beyond a static one's",
    "segments8_overhead": "8 segments: time beyond one's",
    "vq3_step_ratio": "SDXL's step, 3 bits in codebooks over bf16",
    "vq3_weight_ratio": "SDXL's weights in memory: 3 bits in codebooks over bf16",
    "w4_peak_memory_ratio": "peak of loading SDXL and one step: W4 over bf16",
    "cpu_w8a8_time_ratio": "CPU, a step of emoji-sd-tiny: W8A8 over float32",
    "cpu_w4a8_time_ratio": "CPU, a step of emoji-sd-tiny: W4A8 over float32",
}
Lines = list[str]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    """Markdown, the first column to the left; nothing without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1),
            *(f"| {' | '.join(row)} |" for row in rows), ""]  # fmt: skip


def number(value: float | None, digits: int = 2) -> str:
    """As it is printed; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def bars(figures: dict[str, dict[str, Any]]) -> Lines:
    """Every figure that has a bar."""
    rows = []
    for key, figure in figures.items():
        side = "at least" if summary.STATIC_BARS[key][0] == ">=" else "at most"
        value = "not measured" if figure["value"] is None else f"{figure['value']:.3f}"
        met = "" if figure["value"] is None else "yes" if figure["met"] else "**no**"
        rows.append([MEANING[key], value, f"{side} {figure['bar']:g}", met, f"`{figure['command']}`"])
    return table(["figure", "value", "bar", "met", "command"], rows)


def ceilings(parts: Parts) -> Lines:
    """What the machine can do."""
    found = items(parts, "ceilings")
    words = {"copy": ("copy on the device, read and written counted", "TB/s"),
             "bf16": ("bf16 product", "TFLOP/s"), "int8": ("`torch._int_mm`", "TOP/s"),
             "fp8": ("fp8 product, `torch._scaled_mm`", "TFLOP/s")}  # fmt: skip
    rows = []
    for name, (text, unit) in words.items():
        if name in found:
            size = f", {found[name]['side']} cubed" if "side" in found[name] else ""
            rate = found[name]["rate"] / 1e12
            rows.append([text + size, f"{rate:.2f} {unit}" if rate < 10 else f"{rate:.0f} {unit}"])
    return table(["ceiling, measured", "rate"], rows)


def rates(parts: Parts) -> dict[str, float] | None:
    """Ceilings of the roofline: operations a second of bf16 and int8 (twice bf16: the instructions' ratio), bytes a
    second; None where they were not measured."""
    found = items(parts, "ceilings")
    if "copy" not in found or "bf16" not in found:
        return None
    bf16 = found["bf16"]["rate"]
    return {"copy": found["copy"]["rate"], "bf16": bf16, "int8": 2 * bf16}


# ---- steps -------------------------------------------------------------------------------------------------------
def floors(model: str, ceiling: dict[str, float]) -> tuple[shapes.Trace, dict[str, dict[str, float]]]:
    """What a model's step consists of, and the floor of bf16 and of every form, in seconds."""
    found = shapes.trace(models.find(model))
    every = {"bf16": shapes.floor(found, ceiling, 16, packed=False)}
    for form in networks.FORMS.values():
        packed = form.activations < 16
        every[form.name] = shapes.floor(found, ceiling, form.weights, packed=packed)
    return found, every


def steps(parts: Parts, model: str) -> Lines:
    """One model: bf16 in every way, then every form beside the bf16 it took turns with."""
    found = items(parts, f"steps-{model}")
    if not found:
        return []
    ceiling = rates(parts)
    known = floors(model, ceiling)[1] if ceiling else {}
    base = found.get("bf16")
    rows = []
    for way, one in (base["ways"] if base else {}).items():
        if "wall_ms" in one:
            strongest = " (the baseline)" if way == base["strongest"] else ""
            rows.append([f"bf16, {way}{strongest}", number(one.get("gpu_ms")), number(one["wall_ms"]), "", "", "",
                         over(one.get("gpu_ms"), known.get("bf16"))])  # fmt: skip
    for name, form in networks.FORMS.items():
        if name in found:
            rows.append(_form(form, found[name], base, known.get(name)))
            rows += [
                [f"{form.title}, {way}", number(one.get("gpu_ms")), number(one["wall_ms"]), "", "", "",
                 over(one.get("gpu_ms"), known.get(name))]
                for way, one in found[name]["ways"].items() if way != found[name]["strongest"] and "wall_ms" in one
            ]  # fmt: skip
    lines = [f"### {models.find(model).title}", ""]
    lines += table(["", "GPU, ms", "wall, ms", "bf16 in the same turns: GPU, wall", "speed-up (wall)",
                    "weights", "GPU time over the floor"], rows)  # fmt: skip
    return lines + failed(parts, f"steps-{model}")


def _form(
    form: networks.Form, item: dict[str, Any], base: dict[str, Any] | None, known: dict[str, float] | None
) -> list[str]:
    own, other = item["turns"][form.name], item["turns"].get("bf16")
    good = item["output"]["finite"]
    beside = f"{other['gpu_ms']:.2f}, {other['wall_ms']:.2f}" if other else ""
    fast = summary.ratio(item, "bf16", form.name)
    share = item["weight_bytes"] / base["weight_bytes"] if base else None
    return [f"{form.title}, {own['way']}{'' if good else ' (its output is not finite)'}", number(own["gpu_ms"]),
            number(own["wall_ms"]), beside, number(fast), number(share, 3), over(own["gpu_ms"], known)]  # fmt: skip


def over(milliseconds: float | None, known: dict[str, float] | None) -> str:
    """Time over its floor."""
    return "" if milliseconds is None or not known else f"{milliseconds / 1e3 / known['all']:.2f}"


def failed(parts: Parts, part: str) -> Lines:
    """What was tried and did not work, or not in every way."""
    data = parts.get(part)
    if data is None or data.get("smoke"):
        return []
    lines = [f"- {name}: `{clean(why)}`" for name, why in data["errors"].items()]
    for name, item in data["items"].items():
        for way, one in item.get("ways", {}).items():
            lines += [f"- {name}, {way}: `{clean(one['error'])}`"] if "error" in one else []
        for way, why in item.get("errors", {}).items():
            lines += [f"- {name}, {way}: `{clean(why)}`"] if isinstance(why, str) else []
    return ["Did not work:", "", *lines, ""] if lines else []


def clean(text: str) -> str:
    """One line that ends no code."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/")


def peers(parts: Parts) -> Lines:
    """SDXL's step by other libraries."""
    base = items(parts, "steps-sdxl").get("bf16")
    rows: list[list[str]] = []
    lines: Lines = []
    for part in sorted(p for p in parts if p.startswith("peer-")):
        name, item = part.removeprefix("peer-"), items(parts, part).get("sdxl")
        lines += [f"- {name}, {clean(why)}" for why in parts[part]["errors"].values() if not parts[part]["smoke"]]
        if item is None:
            continue
        lines += [f"- {name}, {way}: {clean(why)}" for way, why in summary.untimed(item).items()]
        own, same = item["turns"][name], base is not None and base["run"] == item["run"]
        strongest = base["turns"]["bf16"] if same and base else None
        rows.append([
            f"{name} {item['version']}", own["way"], number(own["gpu_ms"]), number(own["wall_ms"]),
            number(item["turns"]["bf16"]["gpu_ms"]), number(turn(item, "bf16", "gpu_ms") / own["gpu_ms"]),  # type: ignore[operator]
            number(strongest["wall_ms"] / own["wall_ms"] if strongest else None),
            number(item["weight_bytes"] / item["bf16_weight_bytes"], 3),
        ])  # fmt: skip
    made = table(["peer", "fastest way of those timed", "GPU, ms", "wall, ms", "eager bf16 in the same turns: GPU",
                  "speed-up of that", "over the strongest bf16 of the same run", "weights"], rows)  # fmt: skip
    return made + (["Left out, or failed:", "", *lines, ""] if lines else [])


def contest(parts: Parts) -> Lines:
    """Which peers, and which of their ways, the bar of W8A8's step speaks of."""
    item = items(parts, "steps-sdxl").get("w8a8")
    if item is None:
        return []
    each = []
    for name, peer in summary.peers(parts, item["run"]).items():
        own, missing = peer["turns"][name], list(summary.untimed(peer))
        without = f"; not timed: {', '.join(missing)}" if missing else ""
        each.append(f"{name} ({own['way']}, {number(own['wall_ms'])} ms on the wall{without})")
    if not each:
        return ["No peer was measured in the run of SDXL's W8A8 step: its bar speaks of bf16 alone.", ""]
    return [f"Peers of the run of SDXL's W8A8 step, each by the fastest way that was timed: {', '.join(each)}.", ""]


# ---- kernels -----------------------------------------------------------------------------------------------------
def kernels(parts: Parts, part: str) -> Lines:
    """Convolutions or products."""
    ceiling, rows = rates(parts), []
    for name, item in items(parts, part).items():
        base, own = summary.baseline(item), summary.median(item, OURS)
        library = summary.median(item, "int_mm")
        low = None
        if ceiling is not None:
            low = max(item["flops"] / ceiling["int8"], item["bytes"][OURS] / ceiling["copy"]) * 1e6
        rows.append([
            name, number(item["flops"] / 1e9, 1), number(base, 1), *([number(library, 1)] if part == "gemm" else []),
            spread(item, OURS), number(summary.median(item, "ours, w4"), 1), number(summary.speedup(item)),
            number(summary.speedup(item, "ours, w4")), number(item["flops"] / own / 1e6 if own else None, 0),
            number(low, 1), number(own / low if own and low else None), _error(item),
        ])  # fmt: skip
    head = ["shape", "GFLOP", "bf16, us", *(["`_int_mm`, us"] if part == "gemm" else []), "W8A8, us (quartiles)",
            "W4A8, us", "speed-up W8A8", "W4A8", "TOP/s W8A8", "floor, us", "over the floor", "error"]  # fmt: skip
    return table(head, rows) + failed(parts, part)


def spread(item: dict[str, Any], name: str) -> str:
    """Median with quartiles."""
    time = item["times_us"].get(name)
    return "" if time is None else f"{time['median']:.1f} ({time['low']:.1f} to {time['high']:.1f})"


def _error(item: dict[str, Any]) -> str:
    error = item["errors"].get(OURS)
    return f"{error:.0e}" if isinstance(error, float) else ""


def encodes(parts: Parts) -> Lines:
    """Encodes: bytes counted, and their rate beside the copy's."""
    ceiling, rows = items(parts, "ceilings").get("copy"), []
    for name, item in items(parts, "encode").items():
        for way, rate in item["rates"].items():
            if way == "copy":
                continue
            share = rate / ceiling["rate"] if ceiling else None
            rows.append([f"{name}, {way}", number(item["bytes"] / 1e6, 1), spread(item, way), number(rate / 1e12),
                         number(share), number(rate / item["rates"]["copy"])])  # fmt: skip
    return table(["encode", "MB", "us (quartiles)", "TB/s", "of the large copy", "of a copy of as many bytes"], rows
                 ) + failed(parts, "encode")


def layers(parts: Parts) -> Lines:
    """A layer in every form."""
    names = ["bf16", *networks.FORMS]
    rows = [
        [shape, *(number(summary.median(item, name), 1) for name in names)]
        for shape, item in items(parts, "layers").items()
    ]
    return table(["layer, us", *names], rows) + failed(parts, "layers")


def memory(parts: Parts) -> Lines:
    """Peaks."""
    found = items(parts, "memory")
    base = found.get("bf16")
    rows = [
        [name, number(item["weight_bytes"] / 1e9, 3), number(item["peak_bytes"] / 1e9, 3),
         number(item["peak_bytes"] / base["peak_bytes"] if base else None, 3)]
        for name, item in found.items()
    ]  # fmt: skip
    return table(["SDXL UNet", "weights, GB", "peak of load and step, GB", "over bf16"], rows)


def cpu(parts: Parts) -> Lines:
    """A step of emoji-sd-tiny on the CPU, by the settings of ``speed_cpu.py``."""
    lines: Lines = []
    for setting, found in parts.get("cpu", {}).get("settings", {}).items():
        machine = found["machine"]
        lines += [f"{setting}: {machine['processor']}, {machine['capability']}, {machine['threads']} threads, "
                  f"{'with' if machine['vnni'] else 'without'} VNNI", ""]  # fmt: skip
        rows = []
        for name, each in found["ms"].items():
            ratio = found["ratios"].get(name)
            beside = f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})" if ratio else ""
            rows.append([name, number(each["median"], 1), number(each["fastest"], 1), beside,
                         number(ratio["fastest"] if ratio else None, 3), number(found["weights"].get(name), 3)])
        lines += table(["step of emoji-sd-tiny, batch 2", "ms", "fastest", "over float32 in the same turns (quartiles)",
                        "of the fastest", "weights, of bf16"], rows)  # fmt: skip
        names = list(found["ms"])
        lines += table(["layers of a step, ms", "layers", *names], [
            [kind, number(row["layers"], 0), *(number(row[name], 2) for name in names)]
            for kind, row in found["kinds"].items()
        ])  # fmt: skip
    return lines


def roofline(parts: Parts) -> Lines:
    """Operations and bytes counted, and the floors that they give with the measured ceilings."""
    ceiling = rates(parts)
    rows = []
    for model in models.MODELS if ceiling else ():
        if not items(parts, f"steps-{model}") or ceiling is None:
            continue
        found, every = floors(model, ceiling)
        base, packed = every["bf16"], every["w8a8"]
        rows.append([
            models.find(model).title, number(found.flops / 1e12, 3), number(found.attention / 1e12, 3),
            number(2 * found.parameters / 1e9), number(found.encoded / 1e9, 3),
            _parts(base), _parts(packed), number(base["all"] / packed["all"]),
        ])  # fmt: skip
    head = ["step", "TFLOP with weights", "of attention", "weights in bf16, GB", "numbers that layers take, 1e9",
            "floor of bf16, ms: layers + between + attention", "floor of W8A8, ms", "most speed-up"]  # fmt: skip
    return table(head, rows)


def _parts(floor: dict[str, float]) -> str:
    each = " + ".join(f"{floor[name] * 1e3:.2f}" for name in ("layers", "between", "attention"))
    return f"{each} = {floor['all'] * 1e3:.2f}"
