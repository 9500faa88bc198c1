"""Layer errors of additive codebooks, of rounding to nearest and of a small GPTQ, at equal total bits.

    python benchmarks/codebook_error.py MODEL [--bits 3] [--preset P] [--set step.key=value] [--zoo FOLDER] [--out FILE]
    python benchmarks/codebook_error.py emoji-sd-tiny --smoke      # minutes on a CPU: a few layers

MODEL is ``emoji-sd-tiny`` (embedded), or a folder name under ``--zoo``. The float network samples trajectories with two
disjoint sets of prompts; the input covariances H of the first are what every arm is fitted to, those of the second what
it is measured on: tr(D H D^T) / tr(W H W^T). Codebooks are fitted with the settings and the shared sets of recipe
``vqdm``, and counted whole: codes, scales, and of a shared set the part of the layer's weights. The scalar arms have a
float16 scale and a zero-point of as many bits as a code for each group of columns; the groups are the largest that give
them at least as many bits as the codebooks take. Their ranges are those of least squared error. Rows: every layer of
more than 100,000 weights. The bar: codebooks below both arms in every row. Written to --out after every set; called
again with the same arguments, it goes on with the sets that are missing there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import bitbrush
from bitbrush import assets
from bitbrush.engine.estimate import codebook_storage
from bitbrush.engine.planning import make_plan
from bitbrush.network import wrap
from bitbrush.network.layers import QuantLayer
from bitbrush.network.pipelines import sample_latents, takes_prompt, text_tokens
from bitbrush.network.survey import Site, survey
from bitbrush.numbers import ranges
from bitbrush.numbers.codebook import to_groups
from bitbrush.numbers.grid import Grid
from bitbrush.steps import additive
from bitbrush.steps.beam import row_losses
from bitbrush.steps.codebooks import FitCodebooks, Group, by_subset, damped
from bitbrush.steps.covariance import Covariance
from bitbrush.steps.moments import features, recorder

LARGE = 100_000
SCALE_BITS = 16


def nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Rounded to nearest: a scale and zero-point for each row and group of columns, of least squared error."""
    parts = weight.reshape(-1, group)
    scale, zero = ranges.search(parts, Grid(bits=bits), power=2.0)
    codes = ((parts / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)
    return ((codes - zero[:, None]) * scale[:, None]).reshape_as(weight)


def gptq(weight: Tensor, covariance: Tensor, bits: int, group: int, damping: float = 0.01, block: int = 128) -> Tensor:
    """GPTQ (Frantar et al. 2022): columns one after another; what is lost is made up for in the columns to come.

    Ranges of a group of columns are found when its first column is reached. Damping is a share of H's mean diagonal.
    """
    left, h = weight.double().clone(), covariance.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out, columns = torch.empty_like(left), weight.shape[1]
    scale = zero = left.new_zeros(len(left))
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = left.new_zeros(len(left), end - start)
        for i in range(start, end):
            if i % group == 0:  # what earlier blocks left is in it; of this block, what its columns already got
                scale, zero = (t.double() for t in ranges.search(left[:, i : i + group], Grid(bits=bits), power=2.0))
            codes = ((left[:, i] / scale).round() + zero).clamp(0, 2**bits - 1)
            out[:, i] = (codes - zero) * scale
            errors[:, i - start] = (left[:, i] - out[:, i]) / upper[i, i]
            left[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return out.float()


def scalar_group(columns: int, bits: int, total: float) -> int:
    """Columns that share a scale: as many as leave the scalar arms at least ``total`` bits a weight."""
    sizes = [size for size in range(8, columns + 1) if columns % size == 0]
    fitting = [size for size in sizes if bits + (SCALE_BITS + bits) / size >= total]
    return max(fitting, default=8)


@contextmanager
def recording(chosen: dict[str, tuple[QuantLayer, Covariance]]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(recorder(layer, found)) for layer, found in chosen.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def covariances(
    pipe: Any, layers: dict[str, QuantLayer], sites: dict[str, Site], args: argparse.Namespace, first: int
) -> dict[str, Tensor]:
    """H of every layer from the trajectories ``first .. first + args.trajectories`` of the float network."""
    text, device = takes_prompt(pipe), next(iter(layers.values())).weight.device
    generator = torch.Generator().manual_seed(first)
    samples = args.trajectories * args.steps * (2 if text else 1)
    found = {}
    for name, layer in layers.items():
        positions, size = sites[name].macs // layer.weight.numel(), features(layer)
        share = min(1.0, max(args.tokens, args.tokens_per_feature * size) / (samples * positions))
        found[name] = (layer, Covariance(size, share=share, generator=generator, device=device))
    members = range(first, first + args.trajectories)
    with recording(found), torch.no_grad():
        for start in range(0, len(members), args.batch):
            part = members[start : start + args.batch]
            prompts = [assets.prompts("calibration")[i] for i in part] if text else None
            seeds = [torch.Generator().manual_seed(i) for i in part]
            sample_latents(pipe, prompts, seeds, steps=args.steps, guidance=4.0)
    return {name: each.mean() for name, (_, each) in found.items()}


def compare(
    group: Group, layers: dict[str, QuantLayer], fitted: dict[str, Tensor], held: dict[str, Tensor], step: FitCodebooks,
    bits: dict[str, float], index_bits: int,
) -> list[dict[str, Any]]:
    """Rows of the large layers of one set."""
    spec = layers[group.layers[0]].spec.weight
    if spec is None:
        return []
    targets = [additive.Target(to_groups(layers[n].scaled_weight(), spec.group).contiguous(), fitted[n])
               for n in group.layers]
    given = [damped(target, step.damping) for target in targets]
    start = time.perf_counter()
    solution, losses = additive.fit(given, step.settings(spec), torch.Generator().manual_seed(0))
    seconds, solution = time.perf_counter() - start, additive.rounded(solution)
    rows = []
    for place, (name, target) in enumerate(zip(group.layers, targets, strict=True)):
        if target.weight.numel() <= LARGE:
            continue
        columns = target.weight.shape[1]
        size = scalar_group(columns, index_bits, bits[name])
        arms = {
            "codebooks": solution.weight(place), "nearest": nearest(target.weight, index_bits, size),
            "gptq": gptq(target.weight, target.covariance, index_bits, size),
        }
        row: dict[str, Any] = {"layer": name, "shape": list(target.weight.shape), "set": group.name,
                               "set_layers": len(group.layers), "bits": bits[name], "scalar_group": size,
                               "scalar_bits": index_bits + (SCALE_BITS + index_bits) / size, "losses": losses,
                               "set_seconds": seconds}
        for arm, found in arms.items():
            for kind, h in (("", held[name]), ("_fitted", target.covariance)):
                error = row_losses(found - target.weight, h).sum() / row_losses(target.weight, h).sum()
                row[f"{arm}{kind}"] = float(error)
        row["ok"] = row["codebooks"] < min(row["nearest"], row["gptq"])
        rows.append(row)
    return rows


def total_bits(sites: dict[str, Site], plan: Any) -> dict[str, float]:
    """Bits a weight of every additive layer: codes, scales, and its part of the codebooks."""
    stored = codebook_storage({name: site.shape for name, site in sites.items()}, plan)
    found = {}
    for name, spec in plan.layers.items():
        if spec.weight is not None and spec.weight.additive:
            owner = stored[f"set {spec.weight.shared}" if spec.weight.shared else name]
            shape = sites[name].shape
            weights = torch.Size(shape).numel()
            index = spec.weight.codebooks * spec.weight.grid.bits / spec.weight.group
            found[name] = index + owner.codebooks / owner.weights + 16 * shape[0] / weights
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, with what they were measured with."""
    folder = assets.path(args.model) if args.model == "emoji-sd-tiny" else Path(args.zoo) / args.model
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = dict(item.split("=", 1) for item in args.set)
    recipe = bitbrush.read_recipe("vqdm", args.bits, 16, preset=args.preset,
                                  settings={key: json.loads(value) for key, value in settings.items()})
    step = next(s for s in recipe.steps if isinstance(s, FitCodebooks))
    found = survey(pipe.unet, tokens=text_tokens(pipe))
    plan, sites = make_plan(found, recipe).plan, {site.name: site for site in found.layers()}
    wrap.wrap(pipe.unet, plan)
    groups = [g for subset in by_subset(plan).values() for g in subset
              if any(torch.Size(sites[n].shape).numel() > LARGE for n in g.layers)]
    groups = groups[: args.sets] if args.sets else groups
    facts: dict[str, Any] = {
        "model": args.model, "bits": args.bits, "preset": args.preset, "step": step.model_dump(mode="json"),
        "trajectories": args.trajectories, "steps": args.steps, "device": pipe.device.type, "sets": len(groups),
        "command": "python benchmarks/codebook_error.py " + command(args),
    }
    rows, bits = measured(args.out, facts), total_bits(sites, plan)
    missing = [group for group in groups if group.name not in {row["set"] for row in rows}]
    named = {name for group in missing for name in group.layers}
    layers = {name: layer for name, layer in wrap.layers(pipe.unet).items() if name in named}
    result = summed(facts, rows, len(groups) - len(missing))
    if missing:
        fitted, held = (covariances(pipe, layers, sites, args, first) for first in (0, args.trajectories))
    for done, group in enumerate(missing, len(groups) - len(missing) + 1):
        rows += compare(group, layers, fitted, held, step, bits, args.bits)
        print(f"{group.name}: {len(rows)} rows, set {done} of {len(groups)}", file=sys.stderr, flush=True)
        result = summed(facts, rows, done)
        if args.out is not None:  # a run that is stopped has measured what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def measured(out: Path | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier run of the same settings has left in ``out``."""
    try:
        found = json.loads(out.read_text()) if out is not None else {}
    except (OSError, ValueError):
        return []
    return list(found["layers"]) if found and all(found.get(key) == value for key, value in facts.items()) else []


def summed(facts: dict[str, Any], rows: list[dict[str, Any]], done: int) -> dict[str, Any]:
    """What is written after so many sets."""
    return {**facts, "sets_done": done, "ok": bool(rows) and all(row["ok"] for row in rows), "layers": rows}


def command(args: argparse.Namespace) -> str:
    """The arguments that matter, without paths of the machine."""
    words = [args.model, "--bits", str(args.bits), *(["--preset", args.preset] if args.preset else [])]
    words += [word for item in args.set for word in ("--set", item)]
    words += ["--trajectories", str(args.trajectories), "--steps", str(args.steps), "--batch", str(args.batch)]
    return " ".join(words + (["--zoo", "ZOO"] if args.model != "emoji-sd-tiny" else []))


def table(result: dict[str, Any]) -> str:
    """Errors on held-out inputs, one line a layer."""
    lines = [f"{'layer':<58}{'shape':>12}{'bits':>7}{'scalar':>8}{'nearest':>10}{'gptq':>10}{'codebooks':>11}"]
    for row in result["layers"]:
        lines.append(f"{row['layer']:<58}{'x'.join(map(str, row['shape'])):>12}{row['bits']:>7.3f}"
                     f"{row['scalar_bits']:>8.3f}{row['nearest']:>10.5f}{row['gptq']:>10.5f}{row['codebooks']:>11.5f}"
                     f"{'' if row['ok'] else '  MISSED'}")
    held = sum(row["ok"] for row in result["layers"])
    return "\n".join([*lines, f"codebooks below both in {held} of {len(result['layers'])} layers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--preset")
    parser.add_argument("--set", action="append", default=[], metavar="STEP.KEY=VALUE")
    parser.add_argument("--zoo", default="zoo")
    parser.add_argument("--trajectories", type=int, default=64, help="for each of the two covariances")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tokens-per-feature", type=int, default=8)
    parser.add_argument("--sets", type=int, default=0, help="only the first so many sets of codebooks")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few layers, prompts and passes")
    args = parser.parse_args()
    if args.smoke:
        args.trajectories, args.steps, args.batch, args.sets = 4, 5, 4, args.sets or 3
        args.tokens, args.tokens_per_feature = 4096, 3
        args.set = ["codebooks.epochs=2", "codebooks.steps=30", "codebooks.beam=2", "codebooks.kmeans_iterations=20",
                    *args.set]
        args.preset = args.preset or ("small" if args.model == "emoji-sd-tiny" else None)
    result = run(args)
    print(table(result))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
