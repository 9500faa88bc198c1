"""What DGQ's parts are worth on a small model, in minutes on a CPU: signal over error, no pictures.

    python benchmarks/group_layers.py groups      SQNR of the noise estimate, float weights, by groups of the inputs
    python benchmarks/group_layers.py softmax     SQNR of self-attention's output and of the estimate, log2 and uniform

Ranges come from ``--trajectories`` sampled with calibration prompts, figures from ``--heldout`` others (other prompts,
other noise). Weights are float in both, and attention's products in the first. SQNR in dB over all values together.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor

import bitbrush
from bitbrush import assets
from bitbrush.engine.disk import Disk
from bitbrush.engine.journal import Journal
from bitbrush.engine.progress import Silent
from bitbrush.engine.run import Run
from bitbrush.network import wrap
from bitbrush.steps.fit import Fit
from bitbrush.steps.group import Group

HEAD = 'name = "layers"\nweights = {weights}\nactivations = {bits}\n[layers]\n{layers}\n'
CALIBRATE = '[[step]]\ndo = "calibrate"\nsamples = "all"\ntrajectories = {count}\nsteps = {steps}\nbatch = 8\n'
WEIGHTS = '[[step]]\ndo = "fit"\nwhat = "weights"\nmethod = "minmax"\n'
SOFTMAX = '"*attn1:softmax" = {{ activation = {{ {rule} }} }}'
ARMS: dict[str, dict[str, Any] | None] = {
    "tensor": None, "2 groups": {"groups": 2}, "8 groups": {"groups": 8}, "16 groups": {"groups": 16},
    "8 groups, pixel": {"groups": 8, "dimension": "pixel"}, "8 groups, channel": {"groups": 8, "dimension": "channel"},
    "tensor, by search": None, "8 groups, by search": {"groups": 8}, "16 groups, by search": {"groups": 16},
}
RANGES: dict[bool, dict[str, Any]] = {  # by search or by the extremes
    True: {"method": "mse", "samples": 6400, "values": 256, "extremes_from": 8},
    False: {"method": "minmax", "samples": 4096, "values": 2},
}


@contextmanager
def started(args: argparse.Namespace, text: str, prompts: list[str], seed: int) -> Iterator[Run]:
    """A run whose steps are done, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.toml"
        path.write_text(text)
        journal = Journal(Path(folder) / "out", Disk())
        journal.open({}, {"model": "layers"}, resume=False)
        pipe = StableDiffusionPipeline.from_pretrained(args.model).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        run = Run(bitbrush.read_recipe(path), pipe.unet, pipe, journal, seed, prompts, Silent(), 24)
        try:
            run.execute()
            yield run
        finally:
            journal.release()


def sqnr(signal: list[float]) -> float:
    """dB of (sum of squares, sum of squared errors)."""
    return 10 * math.log10(signal[0] / signal[1]) if signal[1] else math.inf


def estimate(run: Run, heldout: Run) -> float:
    """SQNR of the noise estimate of the sim face to the float one."""
    total = [0.0, 0.0]
    with torch.no_grad():
        for batch in heldout.tape.batches():
            args, kwargs = run.tape.inputs(batch)
            with wrap.show(run.model, "float"):
                want: Tensor = run.model(*args, **kwargs).sample.double()
            with wrap.show(run.model, "sim"):
                got: Tensor = run.model(*args, **kwargs).sample.double()
            total = [total[0] + float(want.square().sum()), total[1] + float((got - want).square().sum())]
    return sqnr(total)


def float_weights(run: Run) -> None:
    """The sim face multiplies with the float weight."""
    for layer in run.layers().values():
        layer.trial_weight = layer.float_weight


def groups(args: argparse.Namespace, heldout: Run) -> Iterator[dict[str, Any]]:
    """A row for each number of groups and of bits."""
    layers = '"*" = { weight = {}, activation = { timed = true } }'
    text = HEAD.format(weights=8, bits=8, layers=layers) + calibrate(args.trajectories, args.steps) + WEIGHTS
    with started(args, text, assets.prompts("calibration"), 0) as run:
        plain = dict(run.plan.layers)
        for bits in args.bits:
            for name, choices in ARMS.items():
                run.change_plan({n: spec.model_copy(update={"activation": spec.activation.model_copy(update={
                    "grid": spec.activation.grid.model_copy(update={"bits": bits})})}) for n, spec in plain.items()})
                float_weights(run)
                notes = {}
                if choices is not None:
                    step = Group(do="group", samples=4096, **choices)
                    result = step.run_unit(run, "all layers", torch.Generator())
                    run.change_plan(result.plan)
                    step.apply(run, "all layers", result)
                    float_weights(run)
                    ratios = [x["channel_over_pixel"] for x in result.notes["layers"].values()
                              if "channel_over_pixel" in x]
                    notes = {k: result.notes[k] for k in ("channel", "pixel", "per_tensor")}
                    notes["channel_over_pixel"] = quartiles(ratios)
                ranges = Fit(do="fit", what="activations", **RANGES["by search" in name])
                found = ranges.run_unit(run, "all activations", torch.Generator().manual_seed(0))
                ranges.apply(run, "all activations", found)
                yield {"bits": bits, "arm": name, "estimate_db": round(estimate(run, heldout), 2), **notes}


def quartiles(values: list[float]) -> list[float]:
    """Smallest, quarter, half, three quarters, largest."""
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.25, 0.5, 0.75, 1)] if ordered else []


def softmax(args: argparse.Namespace, heldout: Run) -> Iterator[dict[str, Any]]:
    """A row for each grid of self-attention's softmax and number of bits."""
    rules = {"uniform, a static scale a step": "timed = true", "uniform, the batch's scale": 'mode = "dynamic"',
             "log2, static": 'grid = "log2", timed = true', "log2, a sample": 'mode = "dynamic", grid = "log2"',
             "log2, a head": 'mode = "dynamic", grid = "log2", scope = "head"'}
    for name, rule in rules.items():
        for bits in args.bits:
            layers = SOFTMAX.format(rule=f"bits = {bits}, {rule}")
            fit = '[[step]]\ndo = "fit"\nwhat = "activations"\nmethod = "minmax"\nsamples = 4096\nvalues = 2\n'
            text = HEAD.format(weights=16, bits=8, layers=layers) + calibrate(args.trajectories, args.steps)
            with started(args, text + ("" if "dynamic" in rule else fit), assets.prompts("calibration"), 0) as run:
                found = attention_outputs(run, heldout)
                yield {"bits": bits, "arm": name, "estimate_db": round(estimate(run, heldout), 2),
                       "attention_db": round(sum(found) / len(found), 2), "worst_attention_db": round(min(found), 2)}


def attention_outputs(run: Run, heldout: Run) -> list[float]:
    """SQNR of each self-attention's output, given the float network's input."""
    found = {n: m for n, m in run.model.named_modules() if isinstance(m, Attention) and not m.is_cross_attention}
    totals = {name: [0.0, 0.0] for name in found}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
            if module.processor.face == "float":
                module.processor.face = "sim"
                got = module(*args, **kwargs).double()
                module.processor.face = "float"
                want = out.double()
                totals[name][0] += float(want.square().sum())
                totals[name][1] += float((got - want).square().sum())
        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in found.items()]
    with wrap.show(run.model, "float"), torch.no_grad():
        for batch in heldout.tape.batches():
            args, kwargs = run.tape.inputs(batch)
            run.model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return [sqnr(total) for total in totals.values()]


def calibrate(count: int, steps: int) -> str:
    return CALIBRATE.format(count=count, steps=steps)


def main() -> None:
    """Measure, a line of JSON a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("groups", "softmax"))
    parser.add_argument("--model", default=str(assets.path("emoji-sd-tiny")))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6])
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--heldout", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    text = HEAD.format(weights=16, bits=8, layers='"*" = { weight = {} }') + calibrate(args.heldout, args.steps)
    with started(args, text, assets.prompts("evaluation"), 1) as heldout:
        for row in (groups if args.what == "groups" else softmax)(args, heldout):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
