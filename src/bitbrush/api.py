"""The public functions: inspect, dry_run, quantize, resume, load, evaluate, recipes."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from bitbrush import __version__, assets, inspection, loading
from bitbrush.engine.cache import Cache
from bitbrush.engine.disk import Disk
from bitbrush.engine.estimate import activation_bits, estimate, in_words, peak_memory, weight_bits
from bitbrush.engine.journal import Journal
from bitbrush.engine.planning import make_plan
from bitbrush.engine.progress import Progress, TqdmProgress
from bitbrush.engine.recipe import Recipe, bundled, load_recipe
from bitbrush.engine.run import Run
from bitbrush.errors import ArtifactError, InputError, ResourceError
from bitbrush.evaluation.evaluate import evaluate as measure
from bitbrush.evaluation.result import Evaluation
from bitbrush.network.pipelines import takes_prompt
from bitbrush.network.survey import survey
from bitbrush.numbers.grid import Plan
from bitbrush.precision import fast_matmul
from bitbrush.steps import STEPS


@dataclass
class Result:
    """A quantized pipeline with the evidence.

    Attributes:
        pipeline: The pipeline (or bare model) with packed layers, ready to draw.
        plan: What every layer became.
        proof: Layer by layer, that packed equals simulated.
        history: Losses of the units, bits and bytes of the layers, activation ranges a timestep.
        seconds, peak_memory: Of this run (bytes; GPU memory where a GPU was used).
        costs: Step to ``seconds`` and, on a GPU, ``peak_memory``, of what this run did itself (not of what it resumed).
        output: The artifact's folder, when one was asked for.
    """

    pipeline: Any
    plan: Plan
    proof: dict[str, Any]
    history: dict[str, Any]
    recipe: Recipe
    seconds: float
    peak_memory: int
    output: Path | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    source: str | None = field(default=None, repr=False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the artifact: a diffusers folder with manifest, proof, recipe and history."""
        from bitbrush.artifact.save import save

        save(self.pipeline, Path(path), self.plan, self.extras(), source=self.source)

    def extras(self) -> dict[str, bytes]:
        """The files that go beside the model, as bytes that depend on the result only."""
        return {
            "proof.json": _json(self.proof), "history.json": _json(self.history),
            "recipe.toml": self.recipe.to_toml().encode(),
        }


def recipes() -> list[str]:
    """Names of the bundled recipes."""
    return bundled()


def read_recipe(
    source: str | Path, weights: int | None = None, activations: int | None = None, preset: str | None = None,
    settings: dict[str, Any] | None = None, correct: str | None = None,
) -> Recipe:
    """A bundled recipe by name or a TOML file by path, checked and expanded. Raises InputError."""
    return load_recipe(source, STEPS, weights=weights, activations=activations, preset=preset, settings=settings,
                       correct=correct)


def inspect(
    model: Any, *, recipe: str | Path = "qdiffusion", weights: int | None = None, activations: int | None = None,
    preset: str | None = None, settings: dict[str, Any] | None = None, device: str | None = None,
) -> inspection.Inspection:
    """Layers, shapes, shares of weights and compute, what stays float and why, size and time estimates.

    Args:
        model: Pipeline, denoiser, or a path or hub id of one.
        device: What the estimates are for; None: as `quantize` would choose.
    """
    checked = read_recipe(recipe, weights, activations, preset, settings)
    opened = loading.open_model(model, "cpu" if isinstance(model, str | Path) else None)
    return _inspect(opened, checked, _estimated_on(model, opened, device))


def dry_run(
    target: Any, recipe: str | Path = "qdiffusion", weights: int | None = None, activations: int | None = None, *,
    prompts: list[str] | None = None, preset: str | None = None, settings: dict[str, Any] | None = None,
    device: str | None = None, correct: str | None = None, **_: Any,
) -> dict[str, Any]:
    """Everything that `quantize` checks before it starts: the expanded recipe and the inspection."""
    checked = read_recipe(recipe, weights, activations, preset, settings, correct)
    opened = loading.open_model(target, "cpu" if isinstance(target, str | Path) else None)
    _prompts(opened, checked, prompts)
    inspected = _inspect(opened, checked, _estimated_on(target, opened, device))
    return {"recipe": checked.to_toml(), "inspection": inspected.to_json()}


def quantize(
    target: Any, recipe: str | Path = "qdiffusion", weights: int | None = None, activations: int | None = None, *,
    prompts: list[str] | None = None, seed: int = 0, device: str | None = None, output: str | Path | None = None,
    preset: str | None = None, settings: dict[str, Any] | None = None, progress: Progress | None = None,
    disk: Disk | None = None, correct: str | None = None, cache: str | Path | None = None,
) -> Result:
    """Quantize a pipeline's denoiser, prove it, and (with ``output``) save the artifact.

    The denoiser is changed in place; its float weights are freed layer by layer while packing.

    Args:
        target: Pipeline, denoiser (data-free recipes only), or a path or hub id of one.
        recipe: Name of a bundled recipe, or path of a TOML file.
        weights, activations: Bits, 1 to 8, or 16 for float; None: as the recipe says.
        prompts: Calibration prompts; None: bundled ones, which is said.
        seed: Seed of everything random.
        device: ``cpu``, ``cuda``...; None: CUDA when there (for paths), or where the object is.
        output: Folder of the artifact; a killed run goes on with `resume`.
        preset: A preset of the recipe, such as ``demo``.
        settings: ``{"step.key": value}``.
        progress: Where to report; None: tqdm bars.
        correct: ``tac``: add a correction a timestep to the recipe, fitted on the packed network; ``tac-state``: one
            fitted for the next state, without what is within its errors; ``tac-even``: the same, balanced instead of
            least, so that noise in the estimate does not shrink it; ``tac-mean``: constants alone, no factor;
            ``tac-auto``: the one of these three that helps most on trajectories that no fit saw, or none
            (`docs/methods/tac.md`).
        cache: Folder of results that runs which begin alike share (same model, prompts, seed, bits, layers and first
            steps): arms of a comparison need not calibrate and round again. What is taken from it is not in ``costs``.

    Raises:
        InputError, ResourceError, NumericsError: Nothing is lost; a run with ``output`` can be resumed.
    """
    checked = read_recipe(recipe, weights, activations, preset, settings, correct)
    if output is not None:
        Journal(Path(output), disk or Disk()).refuse_occupied()
    opened = loading.open_model(target, device)
    asked = {
        "source": _source(target), "recipe": checked.to_toml(), "seed": seed,
        "prompts": prompts, "device": str(_device(opened.model)),
    }
    return _run(opened, checked, asked, output, progress or TqdmProgress(), disk or Disk(), resume=False, cache=cache)


def resume(
    output: str | Path, target: Any = None, *, progress: Progress | None = None, disk: Disk | None = None
) -> Result:
    """Go on with a run that was interrupted, from its last finished unit.

    Args:
        output: The folder given to `quantize`.
        target: The pipeline object, when the run began with an object instead of a path.
    """
    folder, disk = Path(output), disk or Disk()
    record = folder / ".run" / "run.json"
    if not record.exists():
        done = (folder / "bitbrush.json").exists()
        if done:
            Journal(folder, disk).close()  # a kill may have left scratch files behind
        raise InputError(
            "there is nothing to resume", where=str(folder),
            why="the artifact is complete" if done else "no run was begun in this folder",
            try_=f"bitbrush sample {folder}" if done else f"bitbrush quantize MODEL -o {folder}",
        )
    try:
        asked = json.loads(record.read_bytes())["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError("the run's record is damaged", where=str(record), why=str(error)[:200],
                            try_="start again in a new folder") from error
    source = target if target is not None else asked["source"]
    if source is None:
        raise InputError("the run began with a pipeline object", where=str(folder),
                         why="there is no path to load it from", try_="bitbrush.resume(output, pipeline)")
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:  # the expanded recipe, read as any other
        file.write(asked["recipe"])
        file.flush()
        checked = load_recipe(file.name, STEPS)
    opened = loading.open_model(source, asked["device"])
    return _run(opened, checked, asked, folder, progress or TqdmProgress(), disk, resume=True)


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load an artifact after checking every hash of its manifest; ``kwargs`` go to ``from_pretrained``."""
    from bitbrush.artifact.load import load as load_artifact

    return load_artifact(Path(path), **kwargs)


@functools.wraps(measure)
def evaluate(candidates: Any, *, progress: Progress | None = None, **options: Any) -> Evaluation:
    """`bitbrush.evaluation.evaluate.evaluate`, with tqdm bars where no progress is given."""
    return measure(candidates, progress=progress or TqdmProgress(), **options)


# ---- inside ----------------------------------------------------------------------------------------------------
def _run(
    opened: loading.Opened, recipe: Recipe, asked: dict[str, Any], output: str | Path | None, progress: Progress,
    disk: Disk, *, resume: bool, cache: str | Path | None = None,
) -> Result:
    from bitbrush.artifact.save import save

    started = time.perf_counter()
    prompts = _prompts(opened, recipe, asked["prompts"])
    if asked["prompts"] is None and prompts:
        progress.say("No prompts given: using the bundled ones.")
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="bitbrush-"))
    _check_disk(opened, folder)
    journal = Journal(folder, disk)
    try:
        fingerprint = _fingerprint(opened, recipe, asked, prompts)
        journal.open(asked, fingerprint, resume=resume)
        with fast_matmul():
            run = Run(recipe, opened.model, opened.pipeline, journal, asked["seed"], prompts, progress, opened.tokens,
                      memory=_memory_budget(opened.model))
            if cache is not None:
                of_others = {k: v for k, v in fingerprint.items() if k != "recipe"}
                run.cache = Cache(Path(cache), of_others, recipe, disk)
            if not resume:
                progress.say(in_words(_estimate(run, opened)))
            run.execute()
        result = _result(run, opened, started, Path(output) if output is not None else None)
        if output is not None:
            save(result.pipeline, folder, result.plan, result.extras(), disk=disk, source=result.source)
            journal.close()
        return result
    except InputError:
        if not resume:
            journal.abandon()
        raise
    finally:
        journal.release()
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)


def _result(run: Run, opened: loading.Opened, started: float, output: Path | None) -> Result:
    proofs: dict[str, Any] = {}
    verify: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    units = []
    for entry in run.done:
        notes = {k: v for k, v in entry.items() if k not in ("proof", "ranges")}
        proofs |= entry.get("proof", {})
        ranges |= {name.removesuffix(".input"): value for name, value in entry.get("ranges", {}).items()}
        verify = notes if "sqnr_packed_vs_simulated_db" in notes else verify
        if "correction" not in notes:
            units.append(notes)
    layers = {
        name: {
            "weight_bits": round(weight_bits(layer.spec), 4),
            "activation_bits": activation_bits(layer.spec),
            "parameters": next(s.parameters for s in run.survey.sites if s.name == name),
            "packed_bytes": layer.packed_bytes(), "segments": list(layer.spec.segments),
        }
        for name, layer in run.layers().items()
    }
    total = sum(s.parameters for s in run.survey.layers()) + sum(run.survey.other.values())
    stored = sum(t.numel() * t.element_size() for t in opened.model.state_dict().values())
    history = {
        "recipe": run.recipe.name, "weight_bits": run.recipe.weights, "activation_bits": run.recipe.activations,
        "average_bits": round(8 * stored / total, 4), "parameters": total, "bytes": stored, "layers": layers,
        "kept_float": run.kept_float, "units": units, "ranges": ranges, "samples": len(run.tape),
    }
    for entry in run.done:
        if "correction" in entry:
            history["correction"] = entry["correction"]
    proof = {"format": 1, "ok": all(p.get("ok", False) for p in proofs.values()), "model": verify, "layers": proofs}
    source = opened.source if Path(opened.source).is_dir() else None
    target = opened.pipeline if opened.pipeline is not None else opened.model
    peaks = [int(cost.get("peak_memory", 0)) for cost in run.costs.values()]
    return Result(target, run.plan, proof, history, run.recipe, time.perf_counter() - started,
                  max([peak_memory(_device(opened.model).type), *peaks]), output, run.costs, source)


def _inspect(opened: loading.Opened, recipe: Recipe, device: str) -> inspection.Inspection:
    found = survey(opened.model, tokens=opened.tokens)
    return inspection.build(opened.source, type(opened.model).__name__, found, make_plan(found, recipe), recipe,
                            _guided(opened), device)


def _estimate(run: Run, opened: loading.Opened) -> dict[str, Any]:
    return estimate(run.survey, run.plan, run.recipe, _guided(opened), str(run.device))


def _guided(opened: loading.Opened) -> bool:
    return opened.pipeline is not None and takes_prompt(opened.pipeline)


def _estimated_on(target: Any, opened: loading.Opened, device: str | None) -> str:
    """The device that a run would take: for paths CUDA where there is one, for objects where they are."""
    if device is not None or not isinstance(target, str | Path):
        return device or str(_device(opened.model))
    return loading.default_device()


def _prompts(opened: loading.Opened, recipe: Recipe, prompts: list[str] | None) -> list[str]:
    if not recipe.needs_data():
        return []
    if opened.pipeline is None:
        raise InputError(f"recipe {recipe.name!r} needs a pipeline", where=opened.source,
                         why="it calibrates on sampling trajectories, which a bare model cannot make",
                         try_="give the pipeline's folder, or use --recipe rtn-dynamic")
    if not takes_prompt(opened.pipeline):
        return []
    if prompts is None:
        return assets.prompts("calibration")
    if len(prompts) < recipe.prompts_needed():
        raise InputError(
            f"{recipe.prompts_needed()} prompts are needed, {len(prompts)} were given", where="prompts",
            why="calibration trajectories start from them",
            try_=f"give more prompts, or --set calibrate.prompts={len(prompts)} to use each more than once",
        )
    return list(prompts)


def _fingerprint(
    opened: loading.Opened, recipe: Recipe, asked: dict[str, Any], prompts: list[str]
) -> dict[str, str]:
    parts = opened.pipeline.components if opened.pipeline is not None and recipe.needs_data() else {}
    others = {name: part for name, part in parts.items() if part is not None and part is not opened.model}
    return {
        "model": loading.content(opened.model),
        "pipeline": _hash("\n".join(f"{k} {loading.content(v)}" for k, v in others.items())),
        "recipe": _hash(recipe.to_toml()), "prompts": _hash("\n".join(prompts)),
        "seed": str(asked["seed"]), "device": str(_device(opened.model).type), "bitbrush": __version__,
        "torch": torch.__version__, "diffusers": diffusers.__version__,
    }


def _check_disk(opened: loading.Opened, folder: Path) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    needed = sum(p.numel() for p in opened.model.parameters()) * 3
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(f"the disk has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB are needed",
                            where=str(parent), why="codes of finished units and the artifact are kept there",
                            try_="free some space, or choose another -o")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _memory_budget(model: nn.Module) -> int:
    if _device(model).type == "cuda":
        return min(int(torch.cuda.mem_get_info()[0] * 0.25), 6 << 30)
    return 1 << 30


def _source(target: Any) -> str | None:
    """A path in full, so that a run can be resumed from another folder; a hub id as it is."""
    if not isinstance(target, str | Path):
        return None
    return str(Path(target).absolute()) if Path(target).exists() else str(target)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()
