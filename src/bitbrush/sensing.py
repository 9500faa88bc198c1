"""`bitbrush.sensitivity`: opens the pipeline, rounds by the recipe ``rtn``, has `evaluation.sensitivity` measure."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from bitbrush import __version__, assets, loading
from bitbrush.engine.planning import check_pattern, matches
from bitbrush.engine.progress import Progress, TqdmProgress
from bitbrush.engine.recipe import FLOAT_BITS
from bitbrush.errors import InputError, InterruptedRun
from bitbrush.evaluation import perceptual
from bitbrush.evaluation.sensitivity import Compare, Measure, Sensitivity, correlations, units
from bitbrush.network.pipelines import takes_prompt
from bitbrush.network.survey import survey
from bitbrush.prompts import check_enough
from bitbrush.steps.plain import RECIPE, plain_rounding

METRICS = ("psnr", "lpips", "clip")
BATCH = 8


def sensitivity(
    target: Any, weights: int | Sequence[int] = 4, activations: int = 8, *, by: str = "layer",
    prompts: Sequence[str] | None = None, n: int = 8, seed: int = 0, steps: int = 25, guidance: float = 4.0,
    batch: int = BATCH, metric: str = "psnr", layers: str = "*", evaluator: Any = None,
    lpips_weights: str | Path | None = None, autocast: torch.dtype | None = None, device: str | None = None,
    folder: str | Path | None = None, output: str | Path | None = None, progress: Progress | None = None,
) -> Sensitivity:
    """Round one layer (or block) at a time and measure the change of the pictures.

    Args:
        target: Float pipeline, or a path or hub id of one. An object is unchanged afterwards.
        weights: Bits, 1 to 8, or several of them; 16 leaves the weights float.
        activations: Bits of the inputs of what is rounded; 16 = float.
        by: ``layer`` or ``block``.
        prompts: One a picture; None: the bundled ones.
        n, seed, steps, guidance, batch, autocast: Of the pictures, as for ``evaluation.draw``.
        metric: What ranks the layers: ``psnr``, ``lpips`` (with published weights, or those of ``lpips_weights``) or
            ``clip`` (with an ``evaluator``). PSNR is always measured.
        layers: Pattern of the layers looked at, as in a recipe.
        evaluator: Has ``score(pictures, prompts)``, such as `evaluation.EmojiClip`.
        device: As for `quantize`.
        folder: Of the pictures and finished rows: the same call goes on there, and one with more bit widths adds them.
            None: a temporary one.
        output: The JSON file.
        progress: Where to report; None: tqdm bars.

    Raises:
        InputError: Bits, metric, pattern or prompts cannot be used.
        Unavailable: The weights of LPIPS are not there.
        InterruptedRun: Ctrl-C; with a ``folder`` the same call goes on.
    """
    widths = _checked(weights, activations, by, metric, evaluator, n)
    opened = loading.open_model(target, device)
    if opened.pipeline is None:
        raise InputError("a bare model draws no pictures", where=opened.source,
                         why="sensitivity is measured on pictures", try_="give the pipeline's folder")  # fmt: skip
    texts = _prompts(opened.pipeline, prompts, n)
    compare, named = _compare(opened.pipeline, metric, evaluator, lpips_weights)
    found_layers = survey(opened.model, tokens=opened.tokens)
    wanted = units(found_layers, by, _chosen(layers, [site.name for site in found_layers.layers()]))
    facts = _facts(opened, named)
    report = progress or TqdmProgress()
    root = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="bitbrush-"))
    how: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
    try:
        with plain_rounding(
            opened.model, opened.pipeline, weights=widths, activations=activations, prompts=texts or [],
            tokens=opened.tokens, progress=report, folder=root / "calibration" / _key(facts, how, activations, texts),
            **how,
        ) as rounding:  # fmt: skip
            measure = Measure(opened.pipeline, rounding, folder=root, facts=facts, activations=activations,
                              prompts=texts, compare=compare, n=n, batch=batch, autocast=autocast, progress=report,
                              **how)  # fmt: skip
            found = measure.run(wanted, widths)
    except (KeyboardInterrupt, InterruptedRun) as stop:
        where = f"in {folder}" if folder is not None else "nowhere: no folder was given"
        raise InterruptedRun("interrupted", where="bitbrush.sensitivity", why="Ctrl-C or a stop signal",
                             try_=f"the same call again; finished rows are kept {where}") from stop  # fmt: skip
    finally:
        if folder is None:
            shutil.rmtree(root, ignore_errors=True)
    settings = {"by": by, "metric": metric, "n": n, "batch": batch, "layers": layers, "recipe": RECIPE, **how,
                "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
                "device": opened.model.device.type, "prompts": texts,
                "compared_by": named,
                "versions": facts["versions"]}  # fmt: skip
    result = Sensitivity(
        Path(opened.source).name if Path(opened.source).exists() else opened.source, list(widths), activations,
        {"all": [found[bits][-1] for bits in widths]}, settings, [row for bits in widths for row in found[bits][:-1]],
        {str(bits): correlations(found[bits][:-1], ("psnr", *compare)) for bits in widths},
    )  # fmt: skip
    if output is not None:
        result.save(output)
    return result


# ---- inside ----------------------------------------------------------------------------------------------------------
def _checked(
    weights: int | Sequence[int], activations: int, by: str, metric: str, evaluator: Any, n: int
) -> tuple[int, ...]:
    widths = tuple(dict.fromkeys([weights] if isinstance(weights, int) else weights))
    where = "bitbrush.sensitivity"
    bad = [bits for bits in (*widths, activations) if not (1 <= bits <= 8 or bits == FLOAT_BITS)]
    if bad or not widths:
        raise InputError("bits out of range", where=where, try_="weights=4, activations=8",
                         why=f"{bad[0] if bad else 'none'} given, 1 to 8 or 16 expected")  # fmt: skip
    if FLOAT_BITS in widths and activations == FLOAT_BITS:
        raise InputError("nothing would be rounded", where=where, why="weights and activations are both 16 (float)",
                         try_="weights=4")  # fmt: skip
    for name, value, known in (("by", by, ("layer", "block")), ("metric", metric, METRICS)):
        if value not in known:
            raise InputError(f"{name} = {value!r} is not known", where=where, why=f"known: {', '.join(known)}",
                             try_=f"{name}={known[0]!r}")  # fmt: skip
    if metric == "clip" and evaluator is None:
        raise InputError("there is no evaluator for the CLIP score", where=where,
                         why="metric = 'clip' needs one that knows the prompts of this pipeline",
                         try_="evaluator=bitbrush.evaluation.EmojiClip.load() for emoji, or metric='psnr'")  # fmt: skip
    if n < 1:
        raise InputError("no pictures are asked for", where=where, why=f"n = {n}", try_="n=8")
    return widths


def _prompts(pipeline: Any, prompts: Sequence[str] | None, n: int) -> list[str] | None:
    if not takes_prompt(pipeline):
        return None
    texts = list(prompts) if prompts is not None else assets.prompts("evaluation")
    check_enough(texts, n)
    return texts[:n]


def _chosen(pattern: str, names: list[str]) -> list[str]:
    check_pattern(pattern, names, "bitbrush.sensitivity: layers")
    return [name for name in names if matches(pattern, name)]


def _compare(
    pipeline: Any, metric: str, evaluator: Any, lpips_weights: Any
) -> tuple[dict[str, Compare], dict[str, str]]:
    """What compares pictures beside PSNR, and whose weights it has."""
    if metric == "lpips":
        distance = perceptual.lpips("alex", weights=lpips_weights, device=str(pipeline.device))
        return {"lpips": lambda pictures, plain, _: distance(pictures, plain)}, {"lpips": distance.name}
    if metric == "clip":
        return (
            {"clip": lambda pictures, plain, texts: evaluator.score(pictures, texts) - evaluator.score(plain, texts)},
            {"clip": f"{type(evaluator).__name__}, change of the score"},
        )
    return {}, {}


def _facts(opened: loading.Opened, named: dict[str, str]) -> dict[str, Any]:
    """What pictures and rows follow from, besides the settings."""
    parts = {name: loading.content(part) for name, part in opened.pipeline.components.items() if part is not None}
    versions = {"bitbrush": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"components": parts, "device": opened.model.device.type, "versions": versions, "compared_by": named}


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
