"""One run by the quality protocol: quantize, draw, measure, write one JSON file for each sampling seed.

    python benchmarks/quality.py MODEL RECIPE BITS [--arm NAME] [--zoo FOLDER] [--seeds 0 1 2] [--work FOLDER]

MODEL is ``emoji-sd-tiny`` (embedded), or a folder name under ``--zoo`` (``emoji-sd``, ``cifar10-ddpm``). BITS is
``w4a8``; 16 means float. Full precision, ``rtn`` and ``rtn-dynamic`` at the same bits are drawn in the same work
folder from the same noise and stand in every result. Everything finished stays in ``--work`` (artifacts, pictures'
metrics), so a run may span several short ones: call it again with the same arguments.

Emoji models: the pipeline's own scheduler, 25 steps, guidance 4, the 512 evaluation prompts. CIFAR-10: DDIM, 50 steps,
eta 0, 5,000 pictures, FID in the classifier's features. float32 weights under bf16 autocast on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from decoded import decode_once
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_memory import memory

import bitbrush
from bitbrush import assets
from bitbrush.engine.progress import Silent
from bitbrush.evaluation import statistics
from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.fid import cifar_fid
from bitbrush.evaluation.pairs import psnr, ssim
from bitbrush.evaluation.sampling import draw, with_ddim

RESULTS = Path(__file__).parent / "results" / "quality"


@dataclasses.dataclass
class Protocol:
    """What is drawn, and how."""

    model: str
    folder: Path
    prompts: list[str] | None
    n: int
    steps: int
    guidance: float
    batch: int
    evaluators: Path | None
    device: str
    cache: Path | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.device == "cuda" else None

    def settings(self) -> dict[str, Any]:
        sampler = "own scheduler" if self.prompts else "DDIM, eta 0, clipped"
        return {
            "sampler": sampler,
            "steps": self.steps,
            "guidance": self.guidance if self.prompts else None,
            "precision": "fp32 weights, bf16 autocast" if self.autocast else "fp32",
        }

    def pipeline(self, folder: Path) -> Any:
        """A float pipeline or an artifact, under the protocol's sampler, on the device."""
        if (folder / "bitbrush.json").exists():
            pipe = bitbrush.load(folder)
        else:
            pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        pipe = pipe if self.prompts else with_ddim(pipe)
        return pipe.to(self.device)

    def draw(self, pipeline: Any, seed: int) -> Tensor:
        return draw(
            pipeline,
            prompts=self.prompts,
            n=self.n,
            seed=seed,
            steps=self.steps,
            guidance=self.guidance,
            batch=self.batch,
            autocast=self.autocast,
        )


@dataclasses.dataclass
class Arm:
    """One way of quantizing: recipe, bits, name, settings, quantization seed."""

    recipe: str
    weights: int
    activations: int
    name: str = "bar"
    seed: int = 0
    preset: str | None = None
    correct: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.recipe}-w{self.weights}a{self.activations}-{self.name}-q{self.seed}"


def protocol_for(args: argparse.Namespace) -> Protocol:
    """The protocol of the model asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedded = args.model == "emoji-sd-tiny"
    folder = assets.path("emoji-sd-tiny") if embedded else Path(args.zoo) / args.model
    if args.model.startswith("cifar10"):
        evaluators = Path(args.evaluators or Path(args.zoo) / "evaluators")
        return Protocol(args.model, folder, None, args.n or 5000, 50, 1.0, args.batch or 1000, evaluators, device)
    prompts = assets.prompts("evaluation")
    return Protocol(args.model, folder, prompts, args.n or len(prompts), 25, 4.0, args.batch or 128, None, device)


def quantized(protocol: Protocol, arm: Arm, work: Path) -> dict[str, Any]:
    """Quantize (or go on, or do nothing when done); facts about the artifact."""
    folder = work / protocol.model / arm.key
    facts = folder.with_name(f"{arm.key}.facts.json")
    if facts.exists():
        return dict(json.loads(facts.read_text()))
    if protocol.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    target = protocol.pipeline(protocol.folder)
    if (folder / ".run" / "run.json").exists():
        result = bitbrush.resume(folder, target, progress=Silent())
    else:
        settings = dict(arm.settings)
        if not protocol.prompts and arm.recipe != "rtn-dynamic":
            settings = {"calibrate.steps": protocol.steps, **settings}
        result = bitbrush.quantize(
            target,
            arm.recipe,
            arm.weights,
            arm.activations,
            seed=arm.seed,
            output=folder,
            preset=arm.preset,
            correct=arm.correct,
            settings=settings,
            progress=Silent(),
            cache=protocol.cache,
        )
    size = sum(f.stat().st_size for f in (folder / "unet").glob("*.safetensors"))
    out = {
        "seconds": time.perf_counter() - start,
        "peak_memory": result.peak_memory,
        "unet_bytes": size,
        "average_bits": result.history["average_bits"],
        "proof_ok": result.proof["ok"],
        "proof": result.proof["model"],
        "share_of_bf16": size / (2 * result.history["parameters"]),
        "recipe": result.recipe.to_dict(),
        "losses": [u for u in result.history["units"] if "loss_start" in u],
        "correction": result.history.get("correction"),
        "costs": result.costs,
    }
    costs = result.costs
    del result, target
    out |= memory(protocol.folder, bool(protocol.prompts), out["recipe"], costs)
    facts.write_text(json.dumps(out))
    if protocol.device == "cuda":
        torch.cuda.empty_cache()  # other runs may share the card
    return out


def measured(protocol: Protocol, key: str, folder: Path, seed: int, work: Path) -> dict[str, Any]:
    """Per-picture metrics of one arm and sampling seed, from the work folder when they are there."""
    file = work / protocol.model / f"{key}-s{seed}-n{protocol.n}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    reference = None if key == "fp" else full_precision(protocol, seed, work)
    start = time.perf_counter()
    if reference is None:
        pictures = full_precision(protocol, seed, work)
    else:
        pictures = protocol.draw(decode_once(protocol.pipeline(folder)), seed)
    seconds = time.perf_counter() - start
    out = per_picture(protocol, pictures, reference) | {"draw_seconds": seconds}
    file.write_text(json.dumps(out))
    return out


def full_precision(protocol: Protocol, seed: int, work: Path) -> Tensor:
    """Pictures of the float model, kept in the work folder."""
    file = work / protocol.model / f"fp-s{seed}-n{protocol.n}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # runs side by side share the folder
        save_file({"pictures": protocol.draw(protocol.pipeline(protocol.folder), seed)}, part)
        part.replace(file)
    return load_file(file)["pictures"]


def per_picture(protocol: Protocol, pictures: Tensor, reference: Tensor | None) -> dict[str, Any]:
    """Lists of numbers, one a picture; the FID is one estimate."""
    out: dict[str, Any] = {}
    if reference is not None:
        both = pictures.to(protocol.device), reference.to(protocol.device)  # in float64: on a CPU as long as drawing
        out["psnr"], out["ssim"] = psnr(*both).tolist(), ssim(*both).tolist()
    if protocol.prompts:
        prompts = protocol.prompts[: protocol.n]
        clip = EmojiClip.load(device=protocol.device)
        out["clip"] = clip.score(pictures, prompts).tolist()
        out["hits"] = clip.hits(pictures, prompts).float().tolist()
        out["heldout"] = clip.is_heldout(prompts).tolist()
    elif protocol.evaluators is not None:
        fid = cifar_fid(pictures, protocol.evaluators, small=protocol.n < 1000, device=protocol.device)
        out["fid"] = {"value": fid.value, "low": fid.low, "high": fid.high}
    return out


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics with intervals from per-picture numbers."""
    out: dict[str, Any] = {}
    if "psnr" in values:
        out["psnr"] = estimate(statistics.bootstrap_mean(values["psnr"]))
        out["psnr_worst5"] = estimate(statistics.bootstrap_worst(values["psnr"], resamples=400))
        out["ssim"] = estimate(statistics.bootstrap_mean(values["ssim"]))
    if "clip" in values:
        out["clip"] = estimate(statistics.bootstrap_mean(values["clip"]))
        for name, wanted in (("r1_heldout", True), ("r1_seen", False)):
            hits = [h for h, held in zip(values["hits"], values["heldout"], strict=True) if held is wanted]
            if hits:
                out[name] = estimate(statistics.bootstrap_share(hits))
    if "fid" in values:
        out["fid"] = values["fid"]
    return out


def estimate(found: statistics.Estimate) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def differences(candidate: dict[str, Any], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Paired differences to the other arms: CLIP to full precision, PSNR to the rounding baselines."""
    out = {}
    if "clip" in candidate:
        out["clip_minus_fp"] = estimate(statistics.paired_difference(candidate["clip"], arms["fp"]["clip"]))
    for name in ("rtn", "rtn_dynamic"):
        if "psnr" in candidate and name in arms:
            out[f"psnr_minus_{name}"] = estimate(statistics.paired_difference(candidate["psnr"], arms[name]["psnr"]))
    return out


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Do everything; returns the results, one a sampling seed."""
    weights, activations = parse_bits(args.bits)
    protocol = protocol_for(args)
    protocol.cache = Path(args.cache) if args.cache else None
    work = Path(args.work)
    choices = {"preset": args.preset, "correct": args.correct, "settings": parse_set(args.set)}
    arm = Arm(args.recipe, weights, activations, args.arm, args.quantization_seed, **choices)
    baselines = {"rtn": Arm("rtn", weights, activations), "rtn_dynamic": Arm("rtn-dynamic", weights, activations)}
    if args.smoke:
        for item in (arm, *baselines.values()):
            item.settings = smoke_settings(item) | item.settings
    facts = quantized(protocol, arm, work)
    if not args.no_baselines:
        for item in baselines.values():
            quantized(protocol, item, work)
    results = []
    for seed in args.seeds:
        arms = {"fp": measured(protocol, "fp", protocol.folder, seed, work)}
        if not args.no_baselines and (args.baseline_seeds is None or seed in args.baseline_seeds):
            for name, item in baselines.items():
                arms[name] = measured(protocol, item.key, work / protocol.model / item.key, seed, work)
        own = measured(protocol, arm.key, work / protocol.model / arm.key, seed, work)
        results.append(record(args, protocol, arm, facts, arms, own, seed))
    return results


def record(
    args: argparse.Namespace,
    protocol: Protocol,
    arm: Arm,
    facts: dict[str, Any],
    arms: dict[str, dict[str, Any]],
    own: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """One result in the agreed form, written to its file."""
    out = {
        "model": args.model,
        "recipe": arm.recipe,
        "arm": arm.name,
        "weight_bits": arm.weights,
        "activation_bits": arm.activations,
        "average_bits": facts["average_bits"],
        "seed": seed,
        "n": protocol.n,
        "metrics": summary(own),
        "paired": differences(own, arms),
        "fp": summary(arms["fp"]),
        "rtn": summary(arms.get("rtn", {})),
        "rtn_dynamic": summary(arms.get("rtn_dynamic", {})),
        "settings": protocol.settings()
        | {"quantization_seed": arm.seed, "preset": arm.preset, "correct": arm.correct, "recipe": facts["recipe"]},
        "seconds": facts["seconds"],
        "draw_seconds": own["draw_seconds"],
        "per_picture": {k: [float(f"{v:.6g}") for v in own[k]] for k in ("clip", "psnr") if k in own},
        "peak_memory": facts["peak_memory"],
        **{k: facts[k] for k in ("finetune_peak_memory", "training_step_memory", "memory_ratio") if k in facts},
        "unet_bytes": facts["unet_bytes"],
        "share_of_bf16": facts["share_of_bf16"],
        "proof": facts["proof"],
        "proof_ok": facts["proof_ok"],
        "losses": facts["losses"],
        **({"correction": facts["correction"]} if facts.get("correction") else {}),
        "costs": facts.get("costs", {}),
        "device": torch.cuda.get_device_name() if protocol.device == "cuda" else platform.processor() or "cpu",
        "versions": {
            "bitbrush": bitbrush.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "command": "python benchmarks/quality.py " + command(args),
    }
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{args.model}-{arm.recipe}-w{arm.weights}a{arm.activations}-{arm.name}-s{seed}.json"
    (folder / name).write_text(text(out))
    return out


def text(out: dict[str, Any]) -> str:
    """Indented JSON, with lists of numbers on one line: thousands of pictures have one each."""
    lines = json.dumps(out, indent=1, sort_keys=True)
    return re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), lines) + "\n"


def command(args: argparse.Namespace) -> str:
    """The arguments that matter, without paths of the machine."""
    parts = [args.model, args.recipe, args.bits, "--seeds", *map(str, args.seeds), "--arm", args.arm]
    parts += ["--quantization-seed", str(args.quantization_seed)]
    parts += ["--preset", args.preset] if args.preset else []
    parts += ["--correct", args.correct] if args.correct else []
    for item in args.set:
        parts += ["--set", item]
    parts += ["--zoo", "ZOO"] if args.model != "emoji-sd-tiny" else []
    return " ".join(parts + (["--smoke"] if args.smoke else []))


def smoke_settings(arm: Arm) -> dict[str, Any]:
    """Few samples and iterations, to see that everything runs."""
    recipe = bitbrush.read_recipe(arm.recipe, preset=arm.preset, correct=arm.correct)
    small = {
        "calibrate": {"samples": "all", "trajectories": 2, "steps": 4},
        "reconstruct": {"iterations": 3, "batch": 2, "samples": 16},
        "fit": {"samples": 8},
        "smooth": {"samples": 8},
        "low_rank": {"samples": 8, "rows": 32, "grid": 3, "iterations": 2},
        "group": {"samples": 16},
        "allocate": {"samples": 4, "points": 4},
        "trajectories": {"samples": 2},
        "codebooks": {"epochs": 1, "steps": 4, "beam": 1, "kmeans_iterations": 4, "tokens": 512,
                      "tokens_per_feature": 1},
        "finetune": {"iterations": 3, "batch": 4, "evaluate_every": 2, "evaluate_rows": 4},
    }
    return {f"{step.label}.{key}": value for step in recipe.steps for key, value in small.get(step.do, {}).items()}


def parse_bits(text: str) -> tuple[int, int]:
    """``w4a8`` to (4, 8)."""
    found = re.fullmatch(r"w(\d+)a(\d+)", text)
    if not found:
        sys.exit(f"BITS must look like w4a8, not {text!r}")
    return int(found[1]), int(found[2])


def parse_set(items: list[str]) -> dict[str, Any]:
    """``step.key=value`` items, values as JSON where they are JSON."""
    out: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


def table(results: list[dict[str, Any]]) -> str:
    """Rows of FP, baselines and candidate, one block a seed."""
    names = ["clip", "psnr", "psnr_worst5", "ssim", "r1_heldout", "r1_seen", "fid"]
    lines = [f"{'':<28}" + "".join(f"{n:>12}" for n in names)]
    for r in results:
        rows = {
            "FP": r["fp"],
            "rtn": r["rtn"],
            "rtn-dynamic": r["rtn_dynamic"],
            f"{r['recipe']} {r['arm']}": r["metrics"],
        }
        for name, metrics in rows.items():
            cells = [f"{metrics[n]['value']:>12.4f}" if n in metrics else f"{'':>12}" for n in names]
            lines.append(f"{name + ' s' + str(r['seed']):<28}" + "".join(cells))
        for name, d in r["paired"].items():
            lines.append(f"  {name}: {d['value']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]")
        lines.append(
            f"  W{r['weight_bits']}A{r['activation_bits']}, {r['average_bits']:.3f} bits on average, "
            f"{r['share_of_bf16']:.4f} of bf16, quantize {r['seconds']:.1f} s, draw {r['draw_seconds']:.1f} s, "
            f"peak {r['peak_memory'] / 1e9:.2f} GB, packed == simulated: {r['proof_ok']}"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipe")
    parser.add_argument("bits")
    parser.add_argument("--arm", default="bar")
    parser.add_argument("--zoo", default="zoo", help="folder of the reference models")
    parser.add_argument("--evaluators", help="folder of the CIFAR-10 classifier and statistics")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="sampling seeds")
    parser.add_argument("--quantization-seed", type=int, default=0)
    parser.add_argument("--preset")
    parser.add_argument("--correct", help="tac, tac-state, tac-even, tac-mean, tac-auto: a correction on top")
    parser.add_argument("--set", action="append", default=[], metavar="step.key=value")
    parser.add_argument("--n", type=int, help="pictures (default: the protocol's)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--work", default="work-quality", help="where artifacts and pictures are kept between calls")
    parser.add_argument("--out", help="results (default: benchmarks/results/quality; of a smoke run: in --work)")
    parser.add_argument("--no-baselines", action="store_true", help="leave rtn and rtn-dynamic out (ablation arms)")
    parser.add_argument("--baseline-seeds", type=int, nargs="*", help="sampling seeds of the baselines (default: all)")
    parser.add_argument("--cache", help="share the first steps with other arms; seconds then say less (ablation arms)")
    parser.add_argument("--smoke", action="store_true", help="a few pictures and iterations on the CPU")
    args = parser.parse_args(words)
    if args.smoke:
        args.n, args.batch, args.seeds = args.n or 4, args.batch or 4, args.seeds[:1]
    args.out = args.out or str(Path(args.work) / "results" if args.smoke else RESULTS)  # a smoke run is no result
    print(table(run(args)))


if __name__ == "__main__":
    main()
