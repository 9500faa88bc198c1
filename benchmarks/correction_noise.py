"""What corrections along the chain do to the noise in pictures, on few pictures of an unconditional model and a CPU.

    python benchmarks/correction_noise.py cifar10-ddpm --zoo ZOO [--bits w6a4] [--arms tac tac-state tac-even tac-mean]
    python benchmarks/correction_noise.py --smoke                 # a random network, seconds

Plain rounding (``rtn-dynamic``), DDIM with eta 0 and clipping. Each correction is fitted on some trajectories of the
float network and judged on others: PSNR to the float pictures, and their energy by frequency as a share of the float
pictures' energy in the same band (1: neither noise added nor detail lost), which says what PSNR hides and what an FID
of thousands of pictures is sensitive to. Also the factors K of the last third of the steps. Prints a table; ``--out``
keeps the figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from decoded import decode_once
from diffusers import DDIMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from quality import parse_bits
from torch import Tensor

import bitbrush
from bitbrush.engine.progress import Silent
from bitbrush.engine.recipe import CORRECTIONS
from bitbrush.evaluation.pairs import psnr
from bitbrush.evaluation.sampling import draw, draw_with_trajectory, with_ddim
from bitbrush.network import correction
from bitbrush.network.correction import CorrectionSpec
from bitbrush.steps import chain
from bitbrush.steps.correct import rule_of

BANDS = (0.0, 1 / 16, 1 / 6, 1 / 3, 1.0)
"""Bounds of the bands, in cycles a pixel; the mean is left out."""
FIT_SEED, SEED = 1, 0
NAMES = [name for name in CORRECTIONS if name != "tac-auto"]
"""Which is one of the others."""
OPTIONS = {"eta": 0.0, "use_clipped_model_output": True}


def energy(pictures: Tensor) -> Tensor:
    """Energy ``[bands]`` of pictures ``[n, C, H, W]`` by spatial frequency."""
    power = torch.fft.fft2(pictures.double()).abs().square().mean((0, 1))
    rows, columns = (torch.fft.fftfreq(size) for size in pictures.shape[2:])
    radius = (rows[:, None].square() + columns[None].square()).sqrt()
    return torch.stack([power[(radius > a) & (radius <= b)].sum() for a, b in pairwise(BANDS)])


class Recorded:
    """Trajectories of the float network: what it was given and what it answered, step by step."""

    def __init__(self, pipeline: Any, steps: int, n: int, batch: int) -> None:
        self.inputs = draw_with_trajectory(pipeline, prompts=None, n=n, tracked=n, seed=FIT_SEED, steps=steps,
                                           batch=batch)[2]  # fmt: skip
        self.times, self.batch = chain.timesteps_of(pipeline.scheduler, steps), batch
        self.estimates = [self.answers(pipeline.unet, i, x) for i, x in enumerate(self.inputs)]

    def moments(self, step: int) -> tuple[Tensor, Tensor]:
        """(input, estimate) of the float network."""
        return self.inputs[step], self.estimates[step]

    @torch.no_grad()
    def answers(self, network: Any, step: int, x: Tensor) -> Tensor:
        """A network's estimates."""
        return torch.cat([network(part, self.times[step]).sample for part in x.split(self.batch)])


def fitted(name: str, pipeline: Any, recorded: Recorded, steps: int) -> chain.Walk:
    """The tables of ``--correct NAME``; as the step has it, the input term only where it helps, if it is not folded."""
    rule = rule_of(name)
    rules = [rule]
    if rule.shifts_input and chain.folding(pipeline.scheduler, steps)[0] is None:
        rules.append(replace(rule, input_term=False))
    walks = [chain.walk(recorded.moments, lambda i, x: recorded.answers(pipeline.unet, i, x), pipeline.scheduler, steps,
                        rule=one, options=OPTIONS) for one in rules]  # fmt: skip
    return min(walks, key=lambda walk: walk.error[-1])


def install(pipeline: Any, found: chain.Walk, steps: int) -> Any:
    """A copy of the pipeline with the correction on its denoiser."""
    corrected = copy.deepcopy(pipeline)
    times = tuple(chain.timesteps_of(pipeline.scheduler, steps))
    spec = CorrectionSpec(scheduler=type(pipeline.scheduler).__name__, timesteps=times, channels=found.scale.shape[1])
    correction.install(corrected.unet, spec, found.tables()).watch(corrected)
    return corrected


def judged(pictures: Tensor, float_pictures: Tensor, plain: Tensor | None) -> dict[str, Any]:
    """Figures of one arm; ``plain``: PSNR of the pictures without a correction."""
    values = psnr(pictures, float_pictures)
    gain = values - (values if plain is None else plain)
    return {
        "psnr": round(float(values.mean()), 3), "gain": round(float(gain.mean()), 3),
        "gain_error": round(float(gain.std() / len(gain) ** 0.5), 3),
        "energy": [round(v, 4) for v in (energy(pictures) / energy(float_pictures)).tolist()],
        "mean": [round(v, 4) for v in (pictures - float_pictures).mean((0, 2, 3)).tolist()],
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All arms; the figures by arm, printed on the way."""
    torch.set_grad_enabled(False)
    pipeline = with_ddim(opened(args))
    recorded = Recorded(pipeline, args.steps, args.fit, args.batch)
    same: dict[str, Any] = {"prompts": None, "n": args.n, "seed": SEED, "steps": args.steps, "batch": args.batch}
    reference = draw(pipeline, **same)
    weights, activations = parse_bits(args.bits)
    with tempfile.TemporaryDirectory() as folder:
        bitbrush.quantize(pipeline, "rtn-dynamic", weights, activations, output=f"{folder}/out", progress=Silent())
        quantized = decode_once(with_ddim(bitbrush.load(f"{folder}/out")))
    pictures = draw(quantized, **same)
    plain = psnr(pictures, reference)
    arms = {"plain": judged(pictures, reference, None)}
    print(row("plain", arms["plain"]), flush=True)
    for name in args.arms:
        found = fitted(name, quantized, recorded, args.steps)
        late = found.scale[-(args.steps // 3) :]
        arms[name] = judged(draw(install(quantized, found, args.steps), **same), reference, plain)
        arms[name] |= {"late_factors": [round(float(f(late)), 4) for f in (torch.min, torch.mean, torch.max)],
                       "shifted": bool(found.shift.any())}  # fmt: skip
        print(row(name, arms[name]), flush=True)
    return {"model": args.model, "bits": args.bits, "steps": args.steps, "fit": args.fit, "n": args.n, "arms": arms}


def opened(args: argparse.Namespace) -> Any:
    """The float pipeline."""
    if not args.smoke:
        return DiffusionPipeline.from_pretrained(args.zoo / args.model, use_safetensors=True)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    return DDIMPipeline(unet.eval(), DDPMScheduler())


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    bands = " ".join(f"{v:.3f}" for v in found["energy"])
    late = f"  K late {found['late_factors']}" if "late_factors" in found else ""
    shifted = ", input shifted" if found.get("shifted") else ""
    return (f"{name:<12} PSNR {found['psnr']:.2f} ({found['gain']:+.2f} +- {found['gain_error']:.2f})  "
            f"energy {bands}  mean {found['mean']}{late}{shifted}")  # fmt: skip


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="cifar10-ddpm", help="unconditional, a folder of --zoo")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of the reference models")
    parser.add_argument("--bits", default="w6a4")
    parser.add_argument("--arms", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fit", type=int, default=16, help="trajectories that are fitted on")
    parser.add_argument("--n", type=int, default=24, help="pictures that are judged")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--out", type=Path, help="figures as JSON")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.fit, args.n, args.batch = 4, 4, 4, 4
    found = run(args)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
