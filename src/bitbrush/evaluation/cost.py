"""What a pipeline costs: bytes on disk and in memory, time, which kernel ran, bits and bit operations.

A short draw looks which kernel runs each layer. Time is measured warm: after it another draw is thrown away, then the
same pictures are drawn several times. A *step* is one call of the denoiser as the pipeline makes it, doubled for
guidance where it guides; the scheduler is not in it. A *picture* is a call of the whole pipeline divided by the
pictures drawn together. Times of two costs are compared only where both were measured in the same run and in the same
way: see `speedup`.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from bitbrush.errors import InputError
from bitbrush.evaluation.layers import FLOAT_BITS, LayerWatch, Ran, as_seen, bit_operations, float_product, quantizable
from bitbrush.evaluation.memory import parameter_count, weight_bytes
from bitbrush.evaluation.products import ProductWatch
from bitbrush.evaluation.sampling import Progress, denoiser, draw
from bitbrush.network.pipelines import DENOISERS, denoiser_name, takes_prompt

RUNS, LEAST_RUNS, LONGEST = 7, 3, 60.0
"""Timed draws; the fewest; seconds after which no further one is begun."""
WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx")
POLL = 0.005  # seconds between two looks at the resident set


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the quartiles over ``runs`` measured calls."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Median and quartiles of measured times."""
        low, median, high = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class Cost:
    """What one pipeline costs.

    Args:
        disk_bytes: Weights of the denoiser in the folder; None without a folder.
        disk_total_bytes: Everything in the folder.
        weight_bytes: The denoiser in memory: parameters, buffers, and what quantized weights keep beside them.
        peak_bytes: The most memory that was in use while drawing.
        peak_of: What ``peak_bytes`` is of: the CUDA allocator, or the resident set of the whole process.
        step_seconds: One call of the denoiser.
        picture_seconds: One picture, text encoder and decoder included.
        device: ``cpu``, ``cuda:0`` ...; ``device_name`` in words.
        kernels: ``{layer, kind, kernel, operation, weight_bits, activation_bits}`` in order of execution; `layers.Ran`
            says what ``kernel`` is, ``operation`` is what the profiler saw compute the product (None where it saw
            none), and on a GPU there is ``gpu_kernel``.
        kernel_counts: Kernel to number of layers.
        parameters: Of the float denoiser.
        bits_per_weight: ``8 * weight_bytes / parameters``: codes, scales, tables, and what is kept float.
        bit_operations: Of one sample in one call: multiply-accumulates x bits of the weight x bits of the input, float
            counted as 16 x 16. Products without weights (those of attention) are not counted.
        float_bit_operations: The same with everything float.
        quantized_by: Whose layers the denoiser has, joined by `` + ``; ``none``.
        notes: In sentences.
        settings: How times were measured; two costs are comparable where these are equal.
        run: The run that this was measured in.
    """

    disk_bytes: int | None
    disk_total_bytes: int | None
    weight_bytes: int
    peak_bytes: int
    peak_of: str
    step_seconds: Timing
    picture_seconds: Timing
    device: str
    device_name: str
    kernels: list[dict[str, Any]]
    kernel_counts: dict[str, int]
    parameters: int
    bits_per_weight: float
    bit_operations: int
    float_bit_operations: int
    quantized_by: str
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        """The inverse of ``to_json``."""
        times = {name: Timing(**data[name]) for name in ("step_seconds", "picture_seconds")}
        return cls(**{**data, **times})


@functools.cache
def this_run() -> str:
    """The name of the run that costs belong to unless another is given: this process."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"


def measure(
    pipeline: Any,
    *,
    folder: Path | str | None = None,
    prompts: Sequence[str] | None,
    steps: int,
    guidance: float,
    batch: int,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    runs: int = RUNS,
    run: str | None = None,
) -> Cost:
    """Draws a batch of pictures a few times and looks at everything that costs.

    Args:
        pipeline: A diffusers pipeline, quantized by anyone or not at all.
        folder: Where it was loaded from, for the size on disk; a file where it is a single file.
        prompts: Taken in turn, where they are fewer than ``batch``; None for an unconditional pipeline.
        steps, guidance, batch, autocast: As for ``sampling.draw``; ``batch`` pictures are drawn together.
        progress: Told of every draw.
        runs: Timed draws at most; no further one is begun after a minute, but there are at least three.
        run: Name of the run; None: that of this process.

    Raises:
        InputError: There are no prompts, or nothing is to be drawn.
    """
    _check(pipeline, prompts, batch, runs)
    model = denoiser(pipeline)
    device = _device(pipeline, model)
    settings = _settings(steps, guidance, batch, autocast, device, takes_prompt(pipeline))
    texts = [prompts[i % len(prompts)] for i in range(batch)] if prompts else None
    call = functools.partial(draw, pipeline, prompts=texts, n=batch, steps=steps, guidance=guidance, batch=batch,
                             autocast=autocast)  # fmt: skip
    if progress is not None:
        progress.start("cost", runs + 1)
    try:
        ran = _look(pipeline, call, min(steps, 2))
        peak = _Resident() if device.type != "cuda" else None
        with peak or _nothing():
            call()  # warms up
        told = (lambda: progress.advance(1)) if progress is not None else (lambda: None)
        told()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        pictures, calls = _times(call, model, device, runs, told)
    finally:
        if progress is not None:
            progress.finish()
    memory = torch.cuda.max_memory_allocated(device) if peak is None else peak.most
    return _cost(model, ran, memory, device, folder, settings, run or this_run(),
                 Timing.of(calls), Timing.of([seconds / batch for seconds in pictures]))  # fmt: skip


def speedup(cost: Cost, baseline: Cost) -> dict[str, float]:
    """How many times faster ``cost`` is than ``baseline``: ``step`` and ``picture``, ratios of the medians.

    ``step_low`` and ``step_high`` are the ratios at the unfavourable and the favourable quartiles of both: where 1 is
    between them, no difference was seen.

    Raises:
        InputError: They were not measured in the same run and in the same way.
    """
    different = [
        f"{name}: {ours!r} and {theirs!r}"
        for name, ours, theirs in (
            ("run", cost.run, baseline.run),
            *((key, cost.settings.get(key), baseline.settings.get(key))
              for key in sorted({*cost.settings, *baseline.settings})),
        )
        if ours != theirs
    ]  # fmt: skip
    if different or not cost.run:
        raise InputError(
            "there is no speed-up between these two costs", where="bitbrush.evaluation.cost.speedup",
            why="; ".join(different) or "they do not say which run they are from",
            try_="measure both in one run, with the same steps, batch and device",
        )  # fmt: skip
    return {
        "step": baseline.step_seconds.median / cost.step_seconds.median,
        "picture": baseline.picture_seconds.median / cost.picture_seconds.median,
        "step_low": baseline.step_seconds.low / cost.step_seconds.high,
        "step_high": baseline.step_seconds.high / cost.step_seconds.low,
    }


# ---- inside ----------------------------------------------------------------------------------------------------------
def _cost(
    model: nn.Module, ran: list[Ran], peak: int, device: torch.device, folder: Path | str | None,
    settings: dict[str, Any], run: str, step: Timing, picture: Timing,
) -> Cost:  # fmt: skip
    of_denoiser, whole = disk_bytes(folder)
    size, count = weight_bytes(model), parameter_count(model)
    libraries = sorted({layer.library for layer in ran} - {"none"})
    rows = [{"layer": r.layer, "kind": r.kind, "kernel": r.kernel, "operation": None, **r.product,
             "weight_bits": r.weight_bits, "activation_bits": r.activation_bits} for r in ran]  # fmt: skip
    cuda = device.type == "cuda"
    return Cost(
        disk_bytes=of_denoiser, disk_total_bytes=whole, weight_bytes=size, peak_bytes=peak,
        peak_of="the CUDA allocator on this device while drawing: the pipeline, activations, and whatever else is on it"
        if cuda else "the resident set of the whole process while drawing: libraries and everything loaded count",
        step_seconds=step, picture_seconds=picture, device=str(device),
        device_name=torch.cuda.get_device_name(device) if cuda else
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        kernels=rows, kernel_counts=dict(Counter(r.kernel for r in ran).most_common()), parameters=count,
        bits_per_weight=round(8 * size / max(count, 1), 4), bit_operations=bit_operations(ran),
        float_bit_operations=sum(r.macs for r in ran) * FLOAT_BITS**2,
        quantized_by=" + ".join(libraries) or "none", notes=_notes(model, ran, step), settings=settings, run=run,
    )  # fmt: skip


def _device(pipeline: Any, model: nn.Module) -> torch.device:
    """Where the denoiser runs, with its number; weights that are moved in for a call only may lie elsewhere."""
    resting = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found: torch.device = getattr(pipeline, "_execution_device", None) or resting
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _look(pipeline: Any, call: Callable[..., Any], steps: int) -> list[Ran]:
    """What ran each layer, from a short draw; of a compiled denoiser the module that was compiled is looked at."""
    name, model = denoiser_name(pipeline), denoiser(pipeline)
    plain = getattr(model, "_orig_mod", model)
    setattr(pipeline, name, plain)
    try:
        with ProductWatch(plain, quantizable(plain)) as products, LayerWatch(plain) as watch:
            call(steps=steps)
    finally:
        setattr(pipeline, name, model)
    return [as_seen(ran, products.found.get(layer, {})) for layer, ran in watch.ran.items()]


def _notes(model: nn.Module, ran: list[Ran], step: Timing) -> list[str]:
    found = []
    foreign = sorted({r.library for r in ran} - {"none", "bitbrush"})
    if foreign:
        found.append(f"Layers of {' and '.join(foreign)} are named by their class, and by the operation that the "
                     "profiler saw. Bits of their weights are those that their largest tensor takes.")  # fmt: skip
    if hasattr(model, "_orig_mod"):
        found.append("The denoiser is compiled: kernels are those that run it uncompiled, times are of the compiled "
                     "one.")  # fmt: skip
    quantized = [r for r in ran if r.library != "none"]
    decoded = sum(r.kernel in ("reference", "simulated") or float_product(r) for r in quantized)
    if decoded:
        found.append(f"{decoded} of {len(quantized)} quantized layers decode to float before they multiply: their bits "
                     "save memory, not arithmetic. Bit operations say what the bits would allow.")  # fmt: skip
    if not ran:
        found.append(f"No linear or convolution layer of the {type(model).__name__} was called.")
    if step.low and step.high / step.low > 1.25:
        found.append("Step times spread by more than a quarter between their quartiles: the machine was busy, or steps "
                     "differ.")  # fmt: skip
    return found


def disk_bytes(folder: Path | str | None) -> tuple[int | None, int | None]:
    """(weights of the denoiser, everything) in a pipeline's folder; of a single file both are its size where it holds
    a denoiser alone (GGUF), else the first is None. What a run keeps beside its result (``.run``) does not count.

    Returns:
        None for what is not known: no folder, or a hub id.
    """
    path = Path(folder) if folder is not None else None
    if path is None or not path.exists():
        return None, None
    if path.is_file():
        return (path.stat().st_size if path.suffix == ".gguf" else None), path.stat().st_size
    sizes = {file.relative_to(path).parts: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    sizes = {parts: size for parts, size in sizes.items() if not any(part.startswith(".") for part in parts)}
    bare = not (path / "model_index.json").exists()  # a model without its pipeline
    of_denoiser = [size for parts, size in sizes.items()
                   if parts[-1].endswith(WEIGHT_FILES) and (bare or parts[0] in DENOISERS)]  # fmt: skip
    return sum(of_denoiser), sum(sizes.values())


def _times(
    call: Callable[[], Any], model: nn.Module, device: torch.device, runs: int, told: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of whole draws, and of every denoiser call in them."""
    whole: list[float] = []
    calls: list[float] = []
    begun = time.perf_counter()
    for i in range(runs):
        if i >= LEAST_RUNS and time.perf_counter() - begun > LONGEST:
            break
        clock = _Clock(device)
        with clock.watching(model):
            clock.mark("draw")
            call()
            clock.mark("draw")
        measured = clock.read()
        whole.extend(measured["draw"])
        calls.extend(measured["step"])
        told()
    return whole, calls


class _Clock:
    """Marks in pairs, begin and end: CUDA events on a GPU, which are read when all is done, else the performance
    counter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: dict[str, list[Any]] = {"draw": [], "step": []}

    def mark(self, what: str) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                event = torch.cuda.Event(enable_timing=True)
                event.record()
            self.marks[what].append(event)
        else:
            self.marks[what].append(time.perf_counter())

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Mark every call of the denoiser inside the block."""
        handles = [
            model.register_forward_pre_hook(lambda *_: self.mark("step"), prepend=True),
            model.register_forward_hook(lambda *_: self.mark("step")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> dict[str, list[float]]:
        """Seconds between the marks of every pair."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        pairs = {what: zip(marks[::2], marks[1::2], strict=True) for what, marks in self.marks.items()}
        return {what: [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in both] for what, both in pairs.items()}


class _Resident:
    """The largest resident set of this process inside the block, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._process, self._stop = psutil.Process(), threading.Event()
        self.most = int(self._process.memory_info().rss)
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(POLL):
            self.most = max(self.most, int(self._process.memory_info().rss))

    def __enter__(self) -> _Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, int(self._process.memory_info().rss))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _settings(
    steps: int, guidance: float, batch: int, autocast: torch.dtype | None, device: torch.device, guided: bool
) -> dict[str, Any]:
    return {
        "steps": steps, "guidance": guidance if guided else None, "batch": batch, "device": str(device),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "threads": torch.get_num_threads(), "spread": "quartiles",
    }  # fmt: skip


def _check(pipeline: Any, prompts: Sequence[str] | None, batch: int, runs: int) -> None:
    if batch < 1 or runs < 1:
        raise InputError("nothing is to be drawn", where="bitbrush.evaluation.cost.measure",
                         why=f"batch = {batch}, runs = {runs}", try_="give both at least 1")  # fmt: skip
    if takes_prompt(pipeline) and not prompts:
        raise InputError("there are no prompts", where="bitbrush.evaluation.cost.measure",
                         why=f"a {type(pipeline).__name__} draws from text", try_="give at least one")  # fmt: skip
