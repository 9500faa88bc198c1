"""What a run will cost, before it starts: disk, memory, time. Rough, and says so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from bitbrush.engine.codebook_sets import searched
from bitbrush.engine.recipe import Recipe
from bitbrush.engine.tape import BATCH, LABELS
from bitbrush.network.low_rank import branch_bytes
from bitbrush.network.survey import Site, Survey
from bitbrush.numbers import packing
from bitbrush.numbers.codebook import HALF_BITS, StoredBits, bits_of
from bitbrush.numbers.grid import LayerSpec, Plan, WeightSpec

START = 5.0  # seconds: loading, hashing, packing, saving
CALL = 0.03  # seconds that a GPU's host needs to launch one forward of a denoiser
TOGETHER = 32  # trajectories that calibration runs together, more or less
REPLAY = 0.0008  # seconds of one graph replay of a small block
SHARE = 0.22  # of a convolution's rate that whole denoisers reach
LIBRARIES = 700_000_000
MEMO = {"cpu": 1 << 30, "cuda": 6 << 30}  # bytes of block outputs that are kept of one face
LONG = 1800.0
ADVICE = (
    "That is long for a CPU: use a GPU (--device cuda), a short form where the recipe has one (--preset demo), or "
    "fewer iterations (--set STEP.iterations=200; `bitbrush recipes show NAME` lists the steps)."
)


def layer_bytes(shape: tuple[int, ...], spec: LayerSpec, bias: bool, times: int = 1) -> int:
    """Bytes of one layer in an artifact (codes, tables, branch, bias), without codebooks that layers share."""
    rows, channels = shape[0], shape[1]
    kernel = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
    total = 4 * rows if bias else 0
    segments = spec.segments or (channels,)
    if spec.input_scale:
        total += 4 * channels
    total += branch_bytes(shape, spec)
    if spec.weight is None:
        total += 4 * rows * channels * kernel[0] * kernel[1]
    elif spec.weight.additive:
        stored = bits_of([shape], spec.weight.codebooks, spec.weight.grid.bits, spec.weight.group)
        total += stored.total_bytes - (stored.codebooks // 8 if spec.weight.shared else 0)
    else:
        length = packing.row_length(segments, kernel)
        bits = spec.weight.row_bits or (spec.weight.grid.bits,) * rows
        total += sum(packing.row_bytes(length, b) for b in bits) + rows * len(segments) * 5
        total += packing.order_dtype(rows).itemsize * rows if spec.weight.row_bits else 0
    if spec.activation is not None and spec.activation.mode == "static":
        wide = channels if spec.activation.position == "input" else rows
        wide *= kernel[0] * kernel[1] if spec.activation.unfolded else 1
        columns = wide if spec.activation.granularity == "channel" else spec.activation.groups or len(segments)
        total += 9 * columns * spec.activation.table_rows(times)
        members = (spec.activation.pixels or wide) if spec.activation.groups else 0  # which group each is in
        total += members * (times if spec.activation.groups_timed else 1)
    return total


def shared_bytes(plan: Plan) -> int:
    """Bytes of the sets of codebooks that layers share, each counted once."""
    sets = {s.weight.shared: s.weight.table_shape for s in plan.layers.values() if s.weight is not None}
    return sum(prod(shape) * HALF_BITS // 8 for name, shape in sets.items() if name)


def codebook_storage(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, StoredBits]:
    """What each set of additive codebooks and its layers take, by the set's name or, of a layer's own, the layer's.

    Args:
        shapes: Weight shapes of the plan's layers.
        plan: With their specs.
    """
    sets: dict[str, list[tuple[int, ...]]] = {}
    specs: dict[str, WeightSpec] = {}
    for name, spec in plan.layers.items():
        if spec.weight is not None and spec.weight.additive:
            owner = f"set {spec.weight.shared}" if spec.weight.shared else name
            sets.setdefault(owner, []).append(shapes[name])
            specs[owner] = spec.weight
    return {name: bits_of(found, specs[name].codebooks, specs[name].grid.bits, specs[name].group)
            for name, found in sets.items()}


def codebook_totals(stored: Mapping[str, StoredBits]) -> dict[str, float]:
    """Of all sets: ``codebook_bits`` a weight with codes and scales, ``codebook_sets``, and the bytes of the parts."""
    if not stored:
        return {}
    found = StoredBits(*(sum(getattr(each, part) for each in stored.values())
                         for part in ("index", "codebooks", "scales", "weights")))
    return {"codebook_bits": round(found.per_weight, 3), "codebook_sets": len(stored),
            "codes_bytes": found.index // 8, "codebooks_bytes": found.codebooks // 8, "scales_bytes": found.scales // 8}


def stored_bits(site: Site, spec: LayerSpec | None, stored: Mapping[str, StoredBits], times: int) -> float:
    """Bits a parameter that a layer takes in an artifact; a set that it shares counts by its part of the weights."""
    if spec is None:
        return 32.0
    weights = prod(site.shape)
    total = 8.0 * layer_bytes(site.shape, spec, site.parameters > weights, times)
    if spec.weight is not None and spec.weight.shared:
        owner = stored[f"set {spec.weight.shared}"]
        total += owner.codebooks * weights / owner.weights
    return round(total / site.parameters, 3)


def weight_bits(spec: LayerSpec | None) -> int | float:
    """Bits of a layer's weights, the mean over the rows where they differ; 16 = float.

    Of additive codebooks the bits of their codes a weight, K B / g; what codebooks and scales add is in the bytes.
    """
    if spec is None or spec.weight is None:
        return 16
    if spec.weight.additive:
        return _short(spec.weight.codebooks * spec.weight.grid.bits / spec.weight.group)
    rows = spec.weight.row_bits
    if not rows or len(set(rows)) == 1:
        return rows[0] if rows else spec.weight.grid.bits
    return _short(sum(rows) / len(rows))


def activation_bits(spec: LayerSpec | None) -> int | float:
    """Bits of a layer's activation, the mean over the timesteps where they differ; 16 = float."""
    if spec is None or spec.activation is None:
        return 16
    return _short(spec.activation.average_bits)


def _short(bits: float) -> int | float:
    """Three decimals at most, and none where it is whole."""
    rounded = round(bits, 3)
    return int(rounded) if rounded == int(rounded) else rounded


def foreseen(survey: Survey, plan: Plan, recipe: Recipe) -> Plan:
    """The plan with what the recipe's steps will add to it: time grid, segments, input scales.

    Which rows an allocate step moves is not known before it has run; on average they keep the bits of the plan.
    """
    for step in recipe.steps:
        plan = plan.with_layers(step.foresee(survey, plan))
    times = [step.model_dump()["steps"] for step in recipe.steps if step.do == "calibrate"]
    grid = plan.timesteps or tuple(float(i) for i in range(times[0] if times else 0))
    return plan.model_copy(update={"timesteps": grid})


def model_bytes(survey: Survey, plan: Plan) -> dict[str, int]:
    """Parameters, bytes in bf16, and bytes of the packed denoiser (everything kept counts)."""
    times = len(plan.timesteps) or 1
    parameters = sum(site.parameters for site in survey.layers()) + sum(survey.other.values())
    packed = 4 * sum(survey.other.values()) + shared_bytes(plan)
    for site in survey.layers():
        weights = 1
        for n in site.shape:
            weights *= n
        spec = plan.layers.get(site.name)
        bias = site.parameters > weights
        packed += layer_bytes(site.shape, spec, bias, times) if spec else 4 * site.parameters
    return {"parameters": parameters, "bf16_bytes": 2 * parameters, "packed_bytes": packed}


def estimate(survey: Survey, plan: Plan, recipe: Recipe, guided: bool, device: str = "cpu") -> dict[str, Any]:
    """Estimated cost of a run: device, seconds, peak_bytes of memory, tape_bytes of disk, forwards, macs_per_second,
    and advice (a sentence, or None).

    Time is counted in forwards of one sample: the steps know how many they make. An iteration of a reconstruction
    costs three forwards of its block (forward, and backward to weights and inputs); every sample is also recorded and
    its loss measured in both faces, about six forwards. On a GPU small networks wait for kernel launches instead.
    """
    kind = torch.device(device).type
    macs = sum(site.macs for site in survey.layers())
    rate = network_rate(survey, device)
    forwards = 0.0
    launches = 0.0  # seconds of a GPU's host, whatever the sizes are
    samples = tape = rows = 0
    for step in recipe.steps:
        data = step.model_dump()
        if step.do == "calibrate":
            calls = data["trajectories"] * data["steps"]
            forwards += calls * (2 if guided else 1)
            launches += calls / (data["batch"] or TOGETHER) * CALL
            tape = calls * (2 if guided else 1) if data["samples"] == "all" else data["samples"]
        elif step.do == "trajectories":  # sampled once in float; `correct` walks them twice, packed
            base = next(s.model_dump() for s in recipe.steps if s.do == "calibrate")
            calls = data["samples"] * (data["steps"] or base["steps"])
            tried = any(s.do == "correct" and s.model_dump()["fit"] == "auto" for s in recipe.steps)
            walks = 3 + 3.5 * tried  # three forms on one half, and they and none on the other
            forwards += walks * calls * (2 if guided else 1)
            launches += walks * calls / data["batch"] * CALL
        elif step.do == "fit" and data["what"] == "activations":
            forwards += 1.3 * min(data["samples"], tape or data["samples"])
            if data["inputs"] == "progressive":  # a pass to fit and a pass to go on
                forwards += 2.0 * min(data["samples"], _calls(recipe, guided))
        elif step.do == "relax" and data["which"] != "none":  # of each arm a fit, and measured in all
            arms = 2 if data["which"] == "measured" else 1
            ranges = [s.model_dump()["samples"] for s in recipe.steps if s.kind == "fit activations"]
            forwards += 2.0 * arms * max(ranges, default=0)
            forwards += 4.0 * (arms - 1) * _calls(recipe, guided, data["trajectories"])
        elif step.do == "low_rank" or (step.do in ("smooth", "group") and data["enabled"]):
            forwards += min(data["samples"], tape or data["samples"])
        elif step.do == "allocate" and data["shares"]:  # a recording, three widths and the float layer
            forwards += 6.0 * min(data["samples"], tape or data["samples"])
        elif step.do == "codebooks":
            found = searched(survey, plan, data)
            calls = min(_calls(recipe, guided), _calls(recipe, guided, data["trajectories"]))
            calls = min(calls, tape or calls) if data["inputs"] == "float" else calls
            forwards += found["passes"] * calls + found["macs"] / max(1, macs)
            launches += found["launches"]
        elif step.do == "reconstruct" and data["iterations"]:
            samples = min(data["samples"], tape or data["samples"])
            forwards += 3.0 * data["iterations"] * data["batch"] + 6.0 * samples
            launches += len(survey.blocks) * (data["iterations"] * REPLAY + samples / BATCH["cuda"] * 2 * CALL)
        elif step.do == "finetune" and data["iterations"]:  # forward, backward, and the teacher's where a loss asks
            rows = max(rows, data["batch"])
            checks = data["iterations"] / data["evaluate_every"] + 2
            forwards += 4.0 * data["iterations"] * data["batch"] + 2.0 * checks * data["evaluate_rows"]
            launches += data["iterations"] * CALL
    seconds = START + max(forwards * macs / rate, launches if kind == "cuda" else 0.0)
    return {
        "device": kind,
        "seconds": round(seconds, 1),
        "peak_bytes": _peak(survey, samples, kind, rows),
        "tape_bytes": tape * (4 * survey.sample_values + 8 * len(LABELS)),
        "forwards": int(forwards),
        "macs_per_second": rate,
        "advice": ADVICE if kind == "cpu" and seconds > LONG else None,
    }


def _calls(recipe: Recipe, guided: bool, trajectories: int | None = None) -> int:
    """Samples that the denoiser is given along trajectories (of the calibrate step, where no number is given)."""
    found = [step.model_dump() for step in recipe.steps if step.do == "calibrate"]
    return sum((trajectories or data["trajectories"]) * data["steps"] for data in found[:1]) * (2 if guided else 1)


def network_rate(survey: Survey, device: str) -> float:
    """Multiply-accumulates a second that this network will reach on the device, from a convolution of it timed here.

    The convolution is the one in the middle of the compute (half of it lies in smaller ones), behind a group norm and
    an activation. Whole networks reach `SHARE` of its rate: attention, small layers and additions are not in it.
    """
    convolutions = sorted((s for s in survey.layers() if s.kind == "conv"), key=lambda s: s.macs)
    half, total = sum(s.macs for s in convolutions) / 2, 0
    for site in convolutions:
        total += site.macs
        if total >= half:
            return SHARE * _convolution_rate(site, torch.device(device))
    return SHARE * 2e10


def _convolution_rate(site: Site, device: torch.device) -> float:
    rows, channels, height, width = site.shape
    side = max(1, round(_positions(site) ** 0.5))
    batch = 4 if device.type == "cpu" else 32
    x = torch.ones(batch, channels, side, side, device=device)
    weight = torch.ones(rows, channels, height, width, device=device)

    def run() -> None:
        F.conv2d(F.silu(F.group_norm(x, 1)), weight, padding=(height // 2, width // 2)).sum().item()

    threads = torch.get_num_threads()
    if device.type != "cpu":
        return batch * site.macs / _best(run, time.perf_counter)
    torch.set_num_threads(1)  # processor time of one thread: what another program takes meanwhile does not count
    try:
        return threads * batch * site.macs / _best(run, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def _best(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs; the first one warms up."""
    taken = []
    with torch.no_grad():
        for _ in range(5):
            start = clock()
            run()
            taken.append(clock() - start)
    return max(min(taken), 1e-7)


def _peak(survey: Survey, samples: int, kind: str, rows: int = 0) -> int:
    """Libraries, model, the block outputs kept in two faces (see `engine.memo`), and the training: of the largest
    block, or of the whole network with ``rows`` samples a batch."""
    parameters = sum(site.parameters for site in survey.layers())
    outputs = {site.name: 4 * site.shape[0] * _positions(site) for site in survey.layers()}
    kept = sum(outputs[members[-1]] for members in survey.blocks.values())
    largest = max((sum(outputs[name] for name in members) for members in survey.blocks.values()), default=0)
    memo = min(samples * kept, MEMO.get(kind, 1 << 30))
    training = max(32 * 3 * largest, rows * 3 * sum(outputs.values()))
    return int(LIBRARIES + (24 if rows else 12) * parameters + 2 * memo + training)


def _positions(site: Site) -> int:
    weights = 1
    for n in site.shape:
        weights *= n
    return site.macs // weights


def in_words(found: dict[str, Any]) -> str:
    """The estimate as one sentence for people, with the advice where there is one."""
    seconds = found["seconds"]
    time_ = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    time_ = f"{seconds / 3600:.1f} h" if seconds > 5400 else time_
    text = f"Estimate on {found['device']}: {time_}, {found['peak_bytes'] / 1e9:.1f} GB of memory"
    text += f", {found['tape_bytes'] / 1e6:.0f} MB of disk for calibration." if found["tape_bytes"] else "."
    return f"{text} {found['advice']}" if found["advice"] else text


def peak_memory(device: str = "cpu") -> int:
    """Largest memory in use so far, in bytes: of the GPU where ``device`` is one, else resident in this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
