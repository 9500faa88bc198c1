"""The bars: what each method was asked to reach, as data that `results_page.py` prints beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Results = list[dict[str, Any]]
Key = tuple[str, str, int, int]
"""(model, recipe, weight bits, activation bits)."""


class Measured(NamedTuple):
    """Value, whether it meets the bar, and of comparisons the number of seeds that both runs have."""

    value: float | None
    met: bool
    seeds: int | None = None


@dataclass(frozen=True)
class Bar:
    """Text, number format, ``measure(rows of this key, all results)``, and whether it is left out until measured."""

    text: str
    form: str
    measure: Callable[[Results, Results], Measured]
    optional: bool = False


@dataclass(frozen=True)
class Note:
    """What stands above a table of ablations, the arm that the others are compared to, and what stands above the table
    of corrections."""

    base: str
    text: str
    corrections: str = ""


def mean(rows: Results, *keys: str) -> float | None:
    """Mean over the seeds of a nested value, None where no row has it."""
    values = []
    for row in rows:
        found: Any = row
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            values.append(found)
    return sum(values) / len(values) if values else None


def at_least(bound: float, *keys: str) -> Callable[[Results, Results], Measured]:
    """The mean of a value must reach a bound."""

    def measure(rows: Results, _all: Results) -> Measured:
        value = mean(rows, *keys)
        return Measured(value, value is not None and value >= bound)

    return measure


def at_most(bound: float, *keys: str, factor: float = 1.0) -> Callable[[Results, Results], Measured]:
    """The first row's value (times ``factor``) must not pass a bound."""

    def measure(rows: Results, _all: Results) -> Measured:
        value = mean(rows[:1], *keys)
        return Measured(None, False) if value is None else Measured(value * factor, value * factor <= bound)

    return measure


def metric(name: str, bound: float) -> Callable[[Results, Results], Measured]:
    """The mean of a metric must reach a bound."""
    return at_least(bound, "metrics", name, "value")


def paired(name: str, bound: float) -> Callable[[Results, Results], Measured]:
    """The mean of a paired difference must reach a bound."""
    return at_least(bound, "paired", name, "value")


def fid(bound: float, *, over_fp: bool = False) -> Callable[[Results, Results], Measured]:
    """The mean FID (less full precision's) must not pass a bound."""

    def measure(rows: Results, _all: Results) -> Measured:
        value, base = mean(rows, "metrics", "fid", "value"), mean(rows, "fp", "fid", "value")
        if value is None or base is None:
            return Measured(None, False)
        value = value - base if over_fp else value
        return Measured(value, value <= bound)

    return measure


def against(
    name: str,
    judge: Callable[[float, float], bool],
    *,
    recipe: str | None = None,
    arm: str = "bar",
    mine: str | None = None,
    bits: tuple[int, int] | None = None,
) -> Callable[[Results, Results], Measured]:
    """The mean difference of a metric to another run of the same model, over the common seeds.

    Args:
        name: Metric.
        judge: ``(difference, noise) -> met``; the noise is how far full precision lies apart between these seeds.
        recipe: Of the other run; left out, the same.
        arm: Of the other run.
        mine: The arm that is compared; left out, the rows given.
        bits: Of the other run, weights and activations; left out, the same.
    """

    def measure(rows: Results, every: Results) -> Measured:
        first, other = rows[0], recipe or rows[0]["recipe"]
        w, a = bits or (first["weight_bits"], first["activation_bits"])
        wanted = first | {"weight_bits": w, "activation_bits": a}
        like = {r["seed"]: r for r in every if r["recipe"] == other and r["arm"] == arm and _same(r, wanted)}
        if mine is not None:
            rows = [r for r in every if r["recipe"] == first["recipe"] and r["arm"] == mine and _same(r, first)]
        common = [r for r in rows if r["seed"] in like]
        if not common:
            return Measured(None, False)
        deltas = [r["metrics"][name]["value"] - like[r["seed"]]["metrics"][name]["value"] for r in common]
        value, noise = sum(deltas) / len(deltas), [r["fp"][name]["value"] for r in common if name in r["fp"]]
        return Measured(value, judge(value, max(noise) - min(noise) if noise else 0.0), len(common))

    return measure


def corrected(name: str, judge: Callable[[float, float], bool], arm: str) -> Callable[[Results, Results], Measured]:
    """`within_run` against the uncorrected network."""
    return within_run(name, judge, mine=arm, arm="plain")


def within_run(
    name: str, judge: Callable[[float, float], bool], *, mine: str, arm: str
) -> Callable[[Results, Results], Measured]:
    """`against` another arm of the same quantization (``arm``, or ``arm-run1`` of ``mine-run1``): where there are
    several, the one with most seeds, the last of them."""

    def measure(rows: Results, every: Results) -> Measured:
        like = [r for r in every if r["recipe"] == rows[0]["recipe"] and _same(r, rows[0])]
        runs = {r["arm"].removeprefix(mine) for r in like if r["arm"].split("-run")[0] == mine}
        found = [against(name, judge, mine=mine + run, arm=arm + run)(rows, every)
                 for run in sorted(runs, key=lambda run: (run == "", run), reverse=True)]  # fmt: skip
        return max(found, key=lambda each: each.seeds or 0, default=Measured(None, False))

    return measure


def above(difference: float, _noise: float) -> bool:
    """More, by however little."""
    return difference > 0


def well_below(difference: float, noise: float) -> bool:
    """Less, by more than the seed noise."""
    return difference < -noise


def equal(difference: float, noise: float) -> bool:
    """Within the seed noise."""
    return abs(difference) <= noise


def within(bound: float) -> Callable[[float, float], bool]:
    """At most so far below."""
    return lambda difference, _noise: difference >= -bound


def not_below(difference: float, _noise: float) -> bool:
    """At least as much."""
    return difference >= 0


def not_well_below(difference: float, noise: float) -> bool:
    """Not less by more than the seed noise."""
    return difference >= -noise


def not_well_above(difference: float, noise: float) -> bool:
    """Not more by more than the seed noise."""
    return difference <= noise


def memory_over_model(rows: Results, _all: Results) -> Measured:
    """Peak GPU memory less the float32 model's, in GB; it must not pass 6."""
    row = rows[0]
    value = (row["peak_memory"] - 2 * row["unet_bytes"] / row["share_of_bf16"]) / 1e9
    return Measured(value, value <= 6)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[k] == b[k] for k in ("model", "weight_bits", "activation_bits"))


def time_bar(seconds: int) -> Bar:
    """Start to artifact on one GPU."""
    return Bar(f"start to artifact <= {seconds} s on one H100", "{:.0f} s", at_most(seconds, "seconds"))


MEMORY = Bar(
    "peak GPU memory of finetuning <= 2.5 x one full-precision training step", "{:.2f} x", at_most(2.5, "memory_ratio")
)


def packed(share: float) -> list[Bar]:
    """File and memory against bf16."""
    return [
        Bar(f"packed UNet file <= {share:.2f} of bf16", "{:.4f}", at_most(share, "share_of_bf16")),
        Bar(f"loaded UNet's weights <= {share:.2f} of bf16", "{:.4f}", at_most(share, "average_bits", factor=1 / 16)),
    ]


def _qdiffusion(clip: float, share: float) -> list[Bar]:
    return [
        Bar("PSNR >= rtn-dynamic + 3.5 dB", "{:+.2f} dB", paired("psnr_minus_rtn_dynamic", 3.5)),
        Bar(f"CLIP >= FP - {clip}, paired", "{:+.4f}", paired("clip_minus_fp", -clip)),
        *packed(share),
    ]


def _bits(most: float) -> Bar:
    return Bar(f"average bits, everything counted, <= {most}", "{:.3f}", at_most(most, "average_bits"))


_OVER_MODEL = Bar("peak GPU memory <= float model + 6 GB", "+ {:.1f} GB", memory_over_model)

_STATIC = Bar(
    "FID below one static scale by more than the seed noise", "{:+.2f}", against("fid", well_below, arm="static")
)

def _tac(metric: str) -> list[Bar]:
    """Of the published form and of ours (next state, balance, constants alone, the best of these), beside no form."""
    worse = {"clip": ("CLIP not below", "{:+.4f}", not_well_below), "fid": ("FID not above", "{:+.2f}", not_well_above)}
    text, form, judge = worse[metric]
    return [bar for arm in ("tac", "tac-state", "tac-even", "tac-mean", "tac-auto") for bar in (
        Bar(f"`{arm}`: PSNR above that of the same network without", "{:+.3f} dB",
            corrected("psnr", above, arm), optional=True),
        Bar(f"`{arm}`: {text} by more than the seed noise", form, corrected(metric, judge, arm), optional=True),
    )]  # fmt: skip


BARS: dict[Key, list[Bar]] = {
    ("emoji-sd-tiny", "qdiffusion", 4, 8): _qdiffusion(0.015, 0.32),
    ("emoji-sd", "qdiffusion", 4, 8): [*_qdiffusion(0.008, 0.30), time_bar(300), *_tac("clip")],
    ("cifar10-ddpm", "qdiffusion", 4, 8): [
        Bar("FID <= FP + 0.7", "{:+.2f}", fid(0.7, over_fp=True)), *_tac("fid"),
    ],
    ("emoji-sd", "quest", 4, 4): [
        Bar("CLIP >= 0.76", "{:.4f}", metric("clip", 0.76)),
        Bar("R@1 held-out >= 0.80", "{:.3f}", metric("r1_heldout", 0.80)),
        Bar("R@1 seen >= 0.60", "{:.3f}", metric("r1_seen", 0.60)),
        time_bar(300), MEMORY, *_tac("clip"),
    ],
    ("emoji-sd", "quest", 4, 8): [
        Bar("PSNR above qdiffusion W4A8", "{:+.2f} dB", against("psnr", above, recipe="qdiffusion")),
        Bar("CLIP >= FP - 0.008, paired", "{:+.4f}", paired("clip_minus_fp", -0.008)),
        time_bar(300), MEMORY,
    ],
    ("emoji-sd", "mpqdm", 3, 4): [
        Bar("CLIP >= 0.70", "{:.4f}", metric("clip", 0.70)), _bits(3.35), time_bar(480), MEMORY,
    ],
    ("emoji-sd", "mpqdm", 2, 4): [
        Bar("CLIP >= 0.60", "{:.4f}", metric("clip", 0.60)),
        Bar("CLIP above efficientdm W2A4", "{:+.4f}", against("clip", above, recipe="efficientdm")),
        _bits(2.4), time_bar(480), MEMORY,
    ],
    ("emoji-sd", "efficientdm", 2, 4): [time_bar(480), MEMORY],
    ("cifar10-ddpm", "quest", 4, 4): [Bar("FID <= 6.5", "{:.2f}", fid(6.5)), *_tac("fid")],
    ("cifar10-ddpm", "mpqdm", 3, 4): [Bar("FID <= 8", "{:.2f}", fid(8.0)), _bits(3.35)],
    ("cifar10-ddpm", "adpdm", 6, 6): [Bar("FID <= FP + 0.3", "{:+.2f}", fid(0.3, over_fp=True))],
    ("cifar10-ddpm", "adpdm", 4, 6): [_STATIC],
    ("cifar10-ddpm", "adpdm", 4, 4): [_STATIC],
    ("cifar10-ddpm", "tdq", 8, 4): [
        _STATIC, Bar("FID within the seed noise of a free table", "{:+.2f}", against("fid", equal, arm="table")),
    ],
    ("emoji-sd", "pcr", 8, 6): [
        Bar("PSNR above A6 everywhere", "{:+.2f} dB", against("psnr", above, arm="no-relax")),
        Bar("CLIP above A6 everywhere", "{:+.4f}", against("clip", above, arm="no-relax")),
        Bar("PSNR above as many random steps", "{:+.2f} dB", against("psnr", above, arm="random")),
        Bar("CLIP above as many random steps", "{:+.4f}", against("clip", above, arm="random")),
    ],
    ("emoji-sd", "dgq", 4, 8): [
        Bar("CLIP within 0.01 of the same weights with float activations", "{:+.4f}",
            against("clip", within(0.01), arm="float-activations")),
        Bar("self-attention's softmax at 4 bits: CLIP of log2 above uniform", "{:+.4f}",
            against("clip", above, mine="log-softmax-4", arm="uniform-softmax-4")),
    ],
    ("emoji-sd", "dgq", 4, 6): [
        Bar("CLIP >= 0.79", "{:.4f}", metric("clip", 0.79)),
        Bar("CLIP above one scale a tensor, same weights", "{:+.4f}", against("clip", above, arm="tensor")),
        Bar("CLIP above one scale a tensor fitted by error, same weights", "{:+.4f}",
            against("clip", above, arm="tensor-mse")),
        Bar("the same, groups fitted by error, too (`--preset mse`)", "{:+.4f}",
            within_run("clip", above, mine="mse", arm="tensor-mse")),
        Bar("R@1 held-out >= 0.86", "{:.3f}", metric("r1_heldout", 0.86)),
    ],
    ("emoji-sd", "vqdm", 3, 16): [
        Bar("CLIP >= qdiffusion W4A16", "{:+.4f}", against("clip", not_below, recipe="qdiffusion", bits=(4, 16))),
        Bar("PSNR >= qdiffusion W4A16", "{:+.2f} dB", against("psnr", not_below, recipe="qdiffusion", bits=(4, 16))),
        _bits(3.2), time_bar(480), _OVER_MODEL,
    ],
    ("emoji-sd", "vqdm", 2, 16): [
        Bar("CLIP >= 0.74", "{:.4f}", metric("clip", 0.74)), _bits(2.3), time_bar(480), _OVER_MODEL,
    ],
    ("emoji-sd-tiny", "vqdm", 3, 16): [_bits(3.6)],
    ("cifar10-ddpm", "mpqdm", 2, 4): [Bar("FID <= 11", "{:.2f}", fid(11.0)), _bits(2.4)],
}

_BESIDE_STATIC = Note("bar", "`static`: one scale for all steps, the same weights, trained alike.")
_RUNS = (
    "`-run1`, `-run2`: other quantizations of the same recipe and seed, each beside its own `plain`. A GPU adds in an "
    "order of its own, so two differ."
)

NOTES: dict[Key, Note] = {
    ("emoji-sd-tiny", "qdiffusion", 4, 8): Note(
        "block",
        "`block` is the recipe with 400 rounding and 100 scale iterations; the other arms change one thing. "
        "Quantization seed = sampling seed. `attention` quantizes q, k, v and softmax to 8 bits, `normal` draws "
        "calibration times as PTQ4DM does. Intervals: 95 %, paired bootstrap.",
        "The schedule of `block`; `tac-no-input`: TAC's noise term alone; `tac-absolute`: without its relative error. "
        "`none`, `tac` and `tac-absolute` have the same layers, and the other five arms have the same ones: a later "
        "quantization with the same seed. Two such differ more than these arms (`none` is `block`, and 0.32 dB below).",
    ),
    ("emoji-sd-tiny", "quest", 4, 4): Note(
        "full",
        "Short schedule: 300 rounding iterations a block, 200 of stage 1, 800 of stage 2. Quantization seed = sampling "
        "seed. `no-stage1`, `no-stage2`: that step left out; `no-global`: layer losses alone; `shared`: one scale set "
        "for all steps; `channel`: the code's static scales a channel, simulated only; `float-attention`: q, k, v and "
        "softmax float; `output-alone`: the estimate's loss without those of layers.",
    ),
    ("emoji-sd", "quest", 4, 8): Note(
        "bar", "`attention-1700`: 1,700 iterations of stage 2 instead of 1,200, which change nothing.",
    ),
    ("emoji-sd", "vqdm", 3, 16): Note(
        "bar",
        "`tune-4000`: 4,000 iterations of finetuning instead of 1,500. The loss on rows held out goes on falling, the "
        "pictures are no better for it. `no-tuning`: codes and codebooks as searched; `guided`: finetuned by the "
        "guided estimate; `replay`: on trajectories of the student, too. `-run2`, `-run3`: quantized again with the "
        "same seed; the arms of a run have the same codes.",
    ),
    ("emoji-sd", "dgq", 4, 6): Note(
        "bar",
        "`tensor`, `tensor-mse`: one scale a tensor, of the range or of least error; `mse`: groups with ranges of "
        "least error. `-run2`, `-run3`: quantized again with the same seed; the arms of a run have the same weights.",
    ),
    ("cifar10-ddpm", "tdq", 8, 4): Note(
        "bar",
        "`static`: one scale for all steps, `table`: one a step, both trained as the networks are. Rounding of the "
        "weights is to nearest, the same in all arms.",
    ),
    ("emoji-sd", "pcr", 8, 6): Note(
        "bar",
        "`no-relax`: 6 bits at all steps; `random`: 8 bits at as many random steps as `bar` has at the measured end. "
        "`bar` was quantized on another day than the two others, whose weights are the same in 47 of 58 blocks "
        "(a run that was cut off went on by itself); at 8 bits that is little against the difference in PSNR, and the "
        "difference in CLIP is within its interval.",
    ),
    ("cifar10-ddpm", "qdiffusion", 4, 8): Note(
        "bar", "",
        "Two quantizations with the same seed and losses within a few percent of each other need not draw the same "
        "pictures: the files hold three, and the PSNR of their seeds goes from 27.2 to 33.3 dB, the FID from 4.82 to "
        "4.96.",
    ),
    ("cifar10-ddpm", "quest", 4, 4): Note("bar", "", _RUNS),
    ("emoji-sd", "quest", 4, 4): Note("bar", "", _RUNS),
    ("cifar10-ddpm", "adpdm", 6, 6): Note(
        "bar",
        "`nearest`: weights rounded to nearest, as in the authors' code, and not as in `qdiffusion`; `conv-in-8`: so, "
        "and the input of the first convolution, x_t itself, in 8 bits.",
    ),
    ("cifar10-ddpm", "adpdm", 4, 6): _BESIDE_STATIC,
    ("cifar10-ddpm", "adpdm", 4, 4): _BESIDE_STATIC,
    ("cifar10-ddpm", "mpqdm", 2, 4): Note(
        "bar", "`lean`: `--preset lean`, 3 bits instead of 4 for time projections and shortcuts.",
    ),
    ("emoji-sd-tiny", "adpdm", 4, 4): Note(
        "full",
        "Weights rounded to nearest, the same in all arms. Quantization seed = sampling seed. `full`: 8 groups of "
        "timesteps; `groups-N`: N; `static`: one scale for all steps, `table`: one a step, trained alike; `clusters`: "
        "the groups as clustering made them; `uniform`, `random`: steps learned from in a shuffled order or drawn at "
        "random instead of by structural risk; `channels`: the code's groups of channels in a step, simulated only.",
    ),
    ("emoji-sd-tiny", "pcr", 8, 6): Note(
        "full",
        "Quantization seed = sampling seed. `full`: the measured end has 8 bits at 20 % of the steps; `no-relax`: 6 "
        "bits at all; `start`: near x_T, `end`: near x_0, `random`: as many random steps; `float-trajectories`: "
        "calibrated on the float network's trajectories instead of its own.",
    ),
    ("emoji-sd-tiny", "dgq", 4, 6): Note(
        "full",
        "All arms have the same weights. Quantization seed = sampling seed. `groups-2`, `groups-16`: other numbers of "
        "groups than 8; `faithful`: the authors' form, groups anew at each step and convolutions unfolded, simulated "
        "only; `pixel`, `channel`: the dimension forced; `batch`: the softmax's delta of the whole batch; "
        "`tensor`, `tensor-mse`: one scale a tensor, of the range or of least error; `token`: a scale a token (of "
        "convolutions: a sample) found at run time; `groups-64`: a scale a token and 64 channels found at run time.",
    ),
    ("emoji-sd-tiny", "vqdm", 3, 16): Note(
        "full",
        "Codebooks of 64 vectors. Quantization seed = sampling seed. `beam1`: one hypothesis; `one-pass`: one epoch; "
        "`no-tuning`: codes and codebooks as searched; `unshared`: a set a layer; `paper-search`: no error "
        "feedback, no damping; `float-inputs`: covariances of the float network.",
    ),
    ("emoji-sd-tiny", "mpqdm", 2, 4): Note(
        "full",
        "Short schedule: 1,500 iterations. Quantization seed = sampling seed. `random`: as many rows move, but random "
        "ones; `uniform`: no row moves; `no-relation`: the noise estimate alone.",
    ),
}
