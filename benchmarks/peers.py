"""Other quantizers, each called the way its own documentation says, measured by ``bitbrush.evaluate``.

    python benchmarks/peers.py PEER [--model emoji-sd-tiny|FOLDER] [-n 64] [--steps 25] [--out FOLDER] [--work FOLDER]

PEER is ``bitsandbytes``, ``torchao``, ``quanto``, ``sdnq``, or ``bitbrush`` (the rows beside them, same protocol). Only
the denoiser is quantized. One process and one environment a peer, none of them a dependency of bitbrush; each holds
bitbrush, torch 2.13 (a CPU build will do), diffusers 0.42, transformers and accelerate, and one of

    pip install bitsandbytes==0.50.2
    pip install torchao==0.18.0
    pip install optimum-quanto==0.2.7
    pip install sdnq==0.2.8              # GPL-3.0: called here by its public API, never imported by the package

SDNQ compiles its layers at their first call where torch finds a C++ compiler. Arms that a peer cannot open or run here
stand in the file with the error they end in. ``python benchmarks/peers_page.py`` writes docs/peers.md from the files.

Protocol: the pipeline's own scheduler, guidance 4, float32 on a CPU, ``n`` of the 512 evaluation prompts at equal
distances, one picture each, initial noise of a CPU generator seeded by (seed, number).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import held
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

import bitbrush
from bitbrush import assets
from bitbrush.engine.progress import Silent
from bitbrush.evaluation.sampling import denoiser, draw

RESULTS = Path(__file__).parent / "results" / "peers"
TINY = "emoji-sd-tiny"
GUIDANCE = 4.0
COST_STEPS = 4
COMMON = ("torch", "diffusers", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of quantizing with a peer.

    Attributes:
        name: Of the row.
        call: What a user writes, in words.
        open: To the pipeline; may raise whatever the peer raises.
    """

    name: str
    call: str
    open: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the arms are made from."""

    folder: Path
    work: Path
    device: str
    smoke: bool

    def pipeline(self, config: Any = None) -> Any:
        """The pipeline of the folder; with a configuration of diffusers, its denoiser quantized while loading."""
        chosen: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
        if config is not None:
            chosen["quantization_config"] = PipelineQuantizationConfig(quant_mapping={self.denoiser: config})
        return DiffusionPipeline.from_pretrained(self.folder, **chosen).to(self.device)

    @property
    def denoiser(self) -> str:
        """``unet`` or ``transformer``."""
        parts = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        return "transformer" if "transformer" in parts else "unet"

    def by_diffusers(self, name: str, text: str, config: Callable[[], Any]) -> Arm:
        """An arm whose denoiser diffusers quantizes while it loads."""
        config_text = f'PipelineQuantizationConfig(quant_mapping={{"{self.denoiser}": {text}}})'
        call = f"DiffusionPipeline.from_pretrained(MODEL, quantization_config={config_text}, dtype=torch.float32)"
        return Arm(name, call, lambda: self.pipeline(config()))


def bitsandbytes(job: Job) -> Iterator[Arm]:
    """NF4 and LLM.int8. diffusers asks for a GPU here; without one the library's own layers are put in by hand."""
    import bitsandbytes as bnb
    from diffusers import BitsAndBytesConfig

    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    for name, chosen in (("nf4", four_bits), ("int8", {"load_in_8bit": True})):
        text = f"BitsAndBytesConfig({words(chosen)})"
        yield job.by_diffusers(f"{name} by diffusers", text, lambda chosen=chosen: BitsAndBytesConfig(**chosen))

    def nf4(layer: nn.Linear) -> nn.Module:
        return bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                 compute_dtype=torch.float32, quant_type="nf4")  # fmt: skip

    def int8(layer: nn.Linear) -> nn.Module:
        return bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None,
                                   has_fp16_weights=False, threshold=6.0)  # fmt: skip

    for name, text, make in (
        ("nf4", 'bitsandbytes.nn.Linear4bit(..., compute_dtype=torch.float32, quant_type="nf4")', nf4),
        ("int8", "bitsandbytes.nn.Linear8bitLt(..., has_fp16_weights=False, threshold=6.0)", int8),
    ):
        call = f'{text} for every nn.Linear of the denoiser, .load_state_dict(linear.state_dict()), .to("{job.device}")'
        yield Arm(name, call, lambda make=make: with_layers(job, make))


def words(chosen: dict[str, Any]) -> str:
    """Keyword arguments as they are written."""
    shown = {key: f'"{value}"' if isinstance(value, str) else value for key, value in chosen.items()}
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def with_layers(job: Job, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """The pipeline with every ``nn.Linear`` of its denoiser replaced, as bitsandbytes' documentation does it."""
    pipe = job.pipeline()
    network = denoiser(pipe)
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            new = make(layer)
            new.load_state_dict(layer.state_dict())
            place, _, own = name.rpartition(".")
            setattr(network.get_submodule(place), own, new.to(job.device))  # quantizes
    return pipe


def torchao(job: Job) -> Iterator[Arm]:
    """Weights of 8 and 4 bits, and 8 bits with activations of 8 bits found at run time."""
    import torchao.quantization as q
    from diffusers import TorchAoConfig
    from torchao.quantization.granularity import PerGroup

    for name, text, make in (
        ("int8 weights", "Int8WeightOnlyConfig()", lambda: q.Int8WeightOnlyConfig()),
        ("int8 dynamic", "Int8DynamicActivationInt8WeightConfig()", lambda: q.Int8DynamicActivationInt8WeightConfig()),
        ("int4 weights", "Int4WeightOnlyConfig(group_size=32)", lambda: q.Int4WeightOnlyConfig(group_size=32)),
        ("intx 4-bit weights", "IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))",
         lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    ):  # fmt: skip
        yield job.by_diffusers(name, f"TorchAoConfig({text})", lambda make=make: TorchAoConfig(make()))


def quanto(job: Job) -> Iterator[Arm]:
    """Weights of 8 and 4 bits."""
    from diffusers import QuantoConfig

    for kind in ("int8", "int4"):
        yield job.by_diffusers(kind, f'QuantoConfig(weights_dtype="{kind}")', lambda kind=kind: QuantoConfig(kind))


def sdnq(job: Job) -> Iterator[Arm]:
    """8 bits as it comes, the same with convolutions, 4 bits with convolutions."""
    from diffusers import SDNQConfig

    for name, chosen in (
        ("int8", {"weights_dtype": "int8"}),
        ("int8 with convolutions", {"weights_dtype": "int8", "quant_conv": True}),
        ("uint4 with convolutions", {"weights_dtype": "uint4", "quant_conv": True}),
    ):
        yield job.by_diffusers(name, f"SDNQConfig({words(chosen)})", lambda chosen=chosen: SDNQConfig(**chosen))


def own(job: Job) -> Iterator[Arm]:
    """bitbrush's plain rounding, and the short form of ``qdiffusion`` that ``make demo`` runs."""
    for recipe, preset, weights, activations in (
        ("rtn", None, 8, 8), ("rtn", None, 4, 16), ("qdiffusion", "demo", 4, 8),
    ):  # fmt: skip
        name = f"{recipe} W{weights}A{activations}" + (f", preset {preset}" if preset else "")
        short = f', preset="{preset}"' if preset else ""
        call = f'bitbrush.quantize(MODEL, "{recipe}", {weights}, {activations}{short})'
        chosen = (recipe, preset, weights, activations)
        yield Arm(name, call, lambda chosen=chosen: quantized(job, *chosen))


def quantized(job: Job, recipe: str, preset: str | None, weights: int, activations: int) -> Any:
    """The artifact, made in the work folder or found there, and opened again."""
    folder = job.work / f"bitbrush-{recipe}-w{weights}a{activations}-{preset or 'whole'}"
    settings: dict[str, Any] = {"calibrate.trajectories": 2, "calibrate.samples": 16} if job.smoke else {}
    if job.smoke and recipe == "qdiffusion":
        settings |= {"weights.iterations": 2}
    if (folder / ".run" / "run.json").exists():
        bitbrush.resume(folder, job.pipeline(), progress=Silent())
    elif not (folder / "bitbrush.json").exists():
        bitbrush.quantize(job.pipeline(), recipe, weights, activations, preset=preset, output=folder,
                          settings=settings, progress=Silent())  # fmt: skip
    return bitbrush.load(folder).to(job.device)


PEERS: dict[str, tuple[Callable[[Job], Iterator[Arm]], str, str]] = {
    "bitsandbytes": (bitsandbytes, "bitsandbytes", "bitsandbytes"),
    "torchao": (torchao, "torchao", "torchao"),
    "quanto": (quanto, "optimum-quanto", "optimum"),
    "sdnq": (sdnq, "sdnq", "sdnq"),
    "bitbrush": (own, "bitbrush", "bitbrush"),
}
"""Name to arms, distribution, and top-level name of the modules."""


def opened(
    arms: Iterator[Arm], reference: Any, package: str, prompts: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open each arm, count what it holds, draw a picture in two steps.

    Returns:
        Pipelines by name, and for every arm its facts, or the error it ended in.
    """
    working: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for arm in arms:
        facts[arm.name] = {"call": arm.call}
        doing = "opening it"
        try:
            pipe = arm.open()
            found = held.layers(denoiser(pipe), denoiser(reference), package)
            doing = "drawing a picture"
            draw(pipe, prompts=prompts, n=1, steps=2, guidance=GUIDANCE, batch=1)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is what is to be told
            facts[arm.name] |= {"works": False, "while": doing, "error": told(error)}
            print(f"{arm.name}: {facts[arm.name]['error']} (while {doing})", file=sys.stderr)
            continue
        facts[arm.name] |= {"works": bool(found["weights"]), "layers": found}
        if found["weights"]:
            working[arm.name] = pipe
        else:
            facts[arm.name] |= {"while": "opening it", "error": "it opened, and no layer of the denoiser was quantized"}
    return working, facts


def told(error: Exception) -> str:
    """Kind and words of an error on one line, without places of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for place, name in ((sys.prefix, "ENVIRONMENT"), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        text = text.replace(place.rstrip("/") + "/", name + "/")
    return text


def spread(prompts: list[str], n: int) -> list[str]:
    """``n`` prompts at equal distances, so that held-out and seen ones keep their shares."""
    return [prompts[i * len(prompts) // n] for i in range(n)]


def evaluated(arms: dict[str, Any], folder: Path, prompts: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The evaluation as plain data, cost from a short one: a step takes as long in four steps as in many.

    The reference is given as a folder: its pictures are the same for all peers.
    """
    common: dict[str, Any] = {"reference": folder, "prompts": prompts, "guidance": GUIDANCE, "batch": args.batch,
                              "work": Path(args.work) / "evaluation"}  # fmt: skip
    found = bitbrush.evaluate(
        arms, n=len(prompts), steps=args.steps, metrics=["psnr", "ssim", "clip", "r1"], **common,
    ).to_json()  # fmt: skip
    if not args.no_speed:
        short = bitbrush.evaluate(
            arms, n=args.batch, steps=min(args.steps, COST_STEPS), metrics=["psnr"], speed=True, floor=False, keep=0,
            tracked=0, **common,
        ).to_json()  # fmt: skip
        found["cost"] = short["cost"]
        found["missing"] += short["missing"]
    return dict(found)


def versions(distribution: str) -> dict[str, str]:
    """Of the peer and of what it runs on."""
    names = [name for name in (distribution, *COMMON) if name != "bitbrush"]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"bitbrush": bitbrush.__version__} | found | {"python": platform.python_version()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one peer; the result, written to its file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make, distribution, package = PEERS[args.peer]
    folder = assets.path(TINY) if args.model == TINY else Path(args.model)
    job = Job(folder, Path(args.work), device, args.smoke)
    job.work.mkdir(parents=True, exist_ok=True)
    prompts = spread(assets.prompts("evaluation"), args.n)
    reference = job.pipeline()
    working, facts = opened(make(job), reference, package, prompts)
    result = {
        "peer": args.peer,
        "model": folder.name,
        "protocol": {"n": args.n, "steps": args.steps, "guidance": GUIDANCE, "batch": args.batch, "device": device,
                     "prompts": f"{args.n} of the 512 evaluation prompts, at equal distances", "seed": 0},
        "machine": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": versions(distribution),
        "arms": facts,
        "evaluation": evaluated(working, folder, prompts, args) if working else None,
        "command": f"python benchmarks/peers.py {args.peer} -n {args.n} --steps {args.steps} --batch {args.batch}"
        + ("" if args.model == TINY else " --model MODEL") + (" --smoke" if args.smoke else ""),
    }  # fmt: skip
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / f"{folder.name}-{args.peer}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parsed, with what a smoke run makes smaller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", default=TINY, help=f"{TINY} (embedded), or the folder of another emoji pipeline")
    parser.add_argument("-n", type=int, help="pictures an arm (64)")
    parser.add_argument("--steps", type=int, help="sampling steps (25)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--work", default="work-peers", help="where artifacts and pictures are kept between calls")
    parser.add_argument("--out", help="results (default: benchmarks/results/peers; of a smoke run: in --work)")
    parser.add_argument("--no-speed", action="store_true", help="no cost: leave it to a later call on a quiet machine")
    parser.add_argument("--smoke", action="store_true", help="two pictures in two steps, to see that everything runs")
    args = parser.parse_args(words)
    small = args.smoke
    args.n, args.steps = args.n or (2 if small else 64), args.steps or (2 if small else 25)
    args.batch = min(args.batch, args.n)
    args.out = args.out or str(Path(args.work) / "results" if small else RESULTS)
    return args


def main() -> None:
    """Parse the arguments, run, print the table."""
    from peers_page import table

    print("\n".join(table([run(arguments())])))


if __name__ == "__main__":
    main()
