"""Evaluations made by hand, with every section filled or with nothing optional, for tests of the report."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbrush.evaluation.pairs import psnr
from bitbrush.evaluation.result import Evaluation, Missing, PairedTest, Value
from bitbrush.evaluation.statistics import Estimate

STEPS, N, KEPT = 20, 512, [0, 1, 2, 3, 4, 5, 6, 7, 41, 98, 203, 377]
ZOO = "CIFAR-10 classifier of the zoo"
LAYERS = (
    "conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.1.conv2",
    "mid_block.attentions.0.to_out.0", "up_blocks.0.resnets.1.conv_shortcut", "up_blocks.1.resnets.0.time_emb_proj",
)  # fmt: skip


def full(texts: dict[str, str] | None = None) -> Evaluation:
    """Two candidates and everything else; ``texts`` replaces the text of any sink named in ``SINKS``."""
    says = DEFAULTS | (texts or {})
    arms = [says["reference"], says["first"], says["second"]]
    reference, first, second = arms
    pictures = _pictures(arms)
    per = {arm: {"psnr": [_measured(pictures, arm, reference)]} for arm in arms[1:]}
    return Evaluation(
        reference, [first, second], _settings(says), _values(arms, says), _tests(arms, says), per,
        {arm: sorted(KEPT, key=per[arm]["psnr"][0].__getitem__)[:4] for arm in arms[1:]},
        [float(981 - 49 * i) for i in range(STEPS)],
        {first: _curve(0.1), second: _curve(0.24)}, _cost(arms, says),
        {first: _inside(says, 1.0), second: _inside(says, 2.2)},
        [Missing(says["missing_key"], says["missing_what"], says["where"], says["why"], says["try"]),
         Missing("is", "Inception score", None, None, None)],
        [says["note"]], [says["prompt"], *(f"a {word} on a table" for word in "bcdefghijkl")], KEPT, pictures,
    )  # fmt: skip


def minimal() -> Evaluation:
    """One candidate of an unconditional pipeline, one figure, nothing optional."""
    value = Value("psnr", "PSNR, dB", "paired", 21.5, None, None, None, "higher", 1, None, 1)
    return Evaluation("FP", ["candidate"], {"n": 1}, {"candidate": [value]})


def edges() -> Evaluation:
    """Finite values at the ends of what occurs: equal arms, no width, zeros, tiny and huge figures, one picture."""

    def value(key: str, number: float, group: Literal["paired", "text", "distribution"], **more: Any) -> Value:
        return Value(key, key.upper(), group, number, **(_PLAIN | {"low": number, "high": number} | more))

    found = {
        "FP": [value("clip", 0.0, "text"), value("fid", 0.0, "distribution", floor=0.0, low=None, high=None)],
        "same": [
            value("psnr", 100.0, "paired"), value("ssim", 1.0, "paired"), value("lpips", 0.0, "paired"),
            value("clip", 0.0, "text"), value("fid", 1e-9, "distribution", floor=0.0, low=None, high=None),
            value("kid", -1e6, "distribution", low=None, high=None, spread=0.0),
        ],
    }  # fmt: skip
    one = torch.zeros(1, 3, 1, 1)
    test = PairedTest("clip", "same", "FP", Estimate(0.0, 0.0, 0.0), 1.0, 1.0, 1)
    cost = {"disk_bytes": 0, "picture_seconds": {"median": 1e-7, "low": 1e-7, "high": 1e-7, "runs": 1}, "device": "cpu"}
    inside = {
        "timesteps": [1.0], "activations": {"layer": {"low": [0.0], "high": [0.0]}}, "kurtosis": {"layer": 0.0},
        "noise_sqnr": [None], "latent_sqnr": [120.0], "attention": {"layers": {"layer": 0.0}, "maps": {"m": [[0.0]]}},
    }  # fmt: skip
    return Evaluation(
        "FP", ["same"], {}, found, [test], {}, {"same": [0, 7]}, [1.0], {"same": [Estimate(0.0, 0.0, 0.0)]},
        {"FP": cost, "same": cost}, {"same": inside}, [], [], [""], [0], {"FP": one, "same": one},
    )  # fmt: skip


def extras(texts: dict[str, str] | None = None) -> dict[str, Any]:
    """What the command adds; ``texts`` as for ``full``."""
    says = DEFAULTS | (texts or {})
    row = {
        "layer": says["sensitive_layer"], "block": says["sensitive_block"], "kind": says["sensitive_kind"],
        "parameters": 4096, "weight_bits": 4, "activation_bits": 8, "output_error": 0.03,
        "psnr": {"value": 24.1, "low": 22.8, "high": 25.6},
    }  # fmt: skip
    others = [
        row | {"layer": n, "output_error": 0.02 / (i + 1), "psnr": {"value": 26.0 + i}} for i, n in enumerate(LAYERS)
    ]
    return {
        "model": says["model"], "command": says["command"],
        "seconds": 412.0, "peak_memory": 3_210_000_000,
        "device": says["machine"], "notes": [says["extra_note"]],
        "settings": {says["extra_setting"]: says["extra_value"]},
        "versions": {says["extra_package"]: says["extra_version"]},
        "sensitivity": {
            "format": 1, "model": says["sensitive_model"], "weights": [4], "activations": 8,
            "settings": {"metric": "psnr", "by": "layer"}, "rows": [row, *others],
            "rank_correlation": {"4": {"output_error~psnr": -0.87, "noise_error~psnr": -0.9, "n": 9}},
        },
    }  # fmt: skip


DEFAULTS = {
    "reference": "FP", "first": "ours", "second": "torchao",
    "prompt": "a very long prompt: a small red panda that reads a newspaper on a bench in the evening sun, in the rain",
    "note": "Peak memory of the reference includes the text encoder.", "model": "emoji-sd",
    "missing_key": "lpips", "missing_what": "LPIPS was not computed", "where": "~/.cache/torch/hub/checkpoints",
    "why": "there is no file vgg16-397923af.pth", "try": "put the file there, or name it with --lpips-weights",
    "clip_label": "CLIP score by the emoji CLIP", "fid_label": f"FID in features of: {ZOO}", "extra_key": "r1_heldout",
    "warning": "512 pictures are fewer than twice the 512 features: FID reads too high and depends on their number; "
    "compare equal counts only, beside the noise floor.",
    "detail": "real pictures of the test set", "detail_key": "reference", "test_key": "psnr_of_what",
    "features": ZOO, "statistic": "energy distance as a share", "test_kind": "swaps over prompts",
    "setting": "sampler", "value": "DDIM, eta 0",
    "package": "torch", "version": "2.13.0", "device": "cuda:0", "device_name": "NVIDIA H100",
    "peak_of": "the CUDA allocator",
    "kernel": "triton int8 x int4", "kernel_layer": "conv_in", "kernel_kind": "conv", "by": "bitbrush",
    "inside_note": "Two layers ran in one step only.", "machine": "AMD EPYC, 16 threads, NVIDIA H100",
    "cost_note": "The text encoder stays in half precision.", "layer": LAYERS[-1], "kurtosis_layer": LAYERS[1],
    "token": "panda", "attention_prompt": "a small red panda", "attention_layer": LAYERS[2], "map": "mid_block",
    "command": "bitbrush eval OUT --reference emoji-sd -n 512 --metrics psnr,ssim,lpips,clip,fid,kid -o report.html",
    "extra_note": "Only a test.", "extra_setting": "preset", "extra_value": "demo", "extra_package": "diffusers",
    "extra_version": "0.42.1", "sensitive_layer": "conv_out", "sensitive_block": "out", "sensitive_kind": "conv",
    "sensitive_model": "emoji-sd",
}  # fmt: skip
SINKS = sorted(DEFAULTS)
_PLAIN: dict[str, Any] = {"spread": None, "better": "higher", "digits": 2, "floor": None, "count": 1}


def _settings(says: dict[str, str]) -> dict[str, Any]:
    return {
        "n": N, "seeds": [0], "steps": STEPS, "guidance": 4.0, "batch": 16, "scheduler": "DDIM", "autocast": "bfloat16",
        "device": says["device"], says["setting"]: says["value"], "versions": {says["package"]: says["version"]},
    }  # fmt: skip


def _values(arms: list[str], says: dict[str, str]) -> dict[str, list[Value]]:
    detail = {says["detail_key"]: says["detail"], "width": 512, "extractor": ZOO}
    found: dict[str, list[Value]] = {}
    for arm, psnr_value, structure, clip, r1, fid, kid in zip(
        arms, (0, 25.4, 21.1), (0, 0.912, 0.832), (0.794, 0.789, 0.751), (0.613, 0.604, 0.541), (8.42, 8.71, 11.36),
        (0.0021, 0.0024, 0.0068), strict=True,
    ):  # fmt: skip
        found[arm] = [] if arm == arms[0] else [
            _value("psnr", "PSNR, dB", "paired", psnr_value, 0.33, 1, floor=9.3),
            _value("psnr_worst5", "PSNR, worst 5 %", "paired", psnr_value - 7.1, 0.8, 1),
            _value("ssim", "SSIM", "paired", structure, 0.006, 3),
        ]  # fmt: skip
        found[arm] += [
            _value("clip", says["clip_label"], "text", clip, 0.008, 3),
            _value(says["extra_key"], "R@1, held-out prompts", "text", r1, 0.04, 3),
            _value("fid", says["fid_label"], "distribution", fid, None, 2, floor=0.38,
                   warning=says["warning"], detail=detail),
            _value(
                "kid", f"KID in features of: {ZOO}", "distribution", kid, None, 4, floor=0.0005, spread=0.0006,
                detail=detail | {"subset_size": 256},
            ),
        ]  # fmt: skip
    return found


def _value(
    key: str, label: str, group: Literal["paired", "text", "distribution"], value: float, half: float | None,
    digits: int, **more: Any,
) -> Value:  # fmt: skip
    ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    better = "lower" if group == "distribution" else "higher"
    return Value(key, label, group, value, **_PLAIN | ends | {"better": better, "digits": digits, "count": N} | more)


def _tests(arms: list[str], says: dict[str, str]) -> list[PairedTest]:
    reference, first, second = arms
    return [
        PairedTest("psnr", first, second, Estimate(4.31, 4.02, 4.6), 0.0001, 0.0006, N),
        PairedTest("ssim", first, second, Estimate(0.08, 0.071, 0.089), 0.0001, 0.0006, N),
        PairedTest("clip", first, reference, Estimate(-0.005, -0.011, 0.001), 0.09, 0.18, N),
        PairedTest("clip", reference, second, Estimate(0.043, 0.034, 0.052), 0.0001, 0.0006, N),
        PairedTest("clip", first, second, Estimate(0.038, 0.029, 0.046), 0.0001, 0.0006, N),
        _features(first, reference, 0.21, says, noise="the same noise"),
        _features(second, reference, 0.0004, says, noise="the same noise"),
        _features("FP, other seeds", reference, 0.62, says, noise="other seeds", control=True),
        PairedTest(says["test_key"], first, second, Estimate(0.1, 0.01, 0.2), 0.01, 0.04, N),
    ]


def _features(first: str, second: str, p: float, says: dict[str, str], **more: Any) -> PairedTest:
    detail = {"test": says["test_kind"], "statistic": says["statistic"], "features": says["features"], **more}
    return PairedTest("features", first, second, Estimate(0.02, 0.001, 0.03), p, min(1.0, 2 * p), N, detail)


def _cost(arms: list[str], says: dict[str, str]) -> dict[str, dict[str, Any]]:
    def times(median: float) -> dict[str, float]:
        return {"median": median, "low": 0.985 * median, "high": 1.03 * median, "runs": 20}

    found = {}
    for i, arm in enumerate(arms):
        kernels = ({"cudnn half": 61}, {says["kernel"]: 54, "cudnn half": 7}, {"int8 dequantize": 61})[i]
        found[arm] = {
            "disk_bytes": (9_655_744, 1_640_000, 5_010_000)[i], "weight_bytes": (9_600_000, 1_610_000, 4_950_000)[i],
            "peak_bytes": (412_000_000, 381_000_000, 399_000_000)[i],
            "step_seconds": times((0.0123, 0.0071, 0.0152)[i]),
            "picture_seconds": times((0.0164, 0.0098, 0.0201)[i]), "device": says["device"], "kernel_counts": kernels,
            "kernels": [{"layer": says["kernel_layer"], "kind": says["kernel_kind"], "kernel": says["kernel"]}],
            "bits_per_weight": (16.0, 4.61, 8.2)[i], "bit_operations": (6.4e12, 8.1e11, 1.6e12)[i],
            "device_name": says["device_name"], "peak_of": says["peak_of"], "run": "1",
            "disk_total_bytes": 31_000_000 - 8_000_000 * (i == 1), "float_bit_operations": 6.4e12,
            "quantized_by": ("none", says["by"], "torchao")[i],
            "notes": [says["cost_note"]] if i == 1 else [],
        }  # fmt: skip
    return found


def _inside(says: dict[str, str], scale: float) -> dict[str, Any]:
    times = [981 - 49 * i for i in range(STEPS)]
    names = [*LAYERS[:-1], says["layer"]]
    activations = {}
    for k, name in enumerate(names):
        wide = [scale * (2 + k) * (1 + 0.12 * k * math.sin(0.3 * i + k) + 0.02 * k * i) for i in range(STEPS)]
        parts = {"low": -0.8, "p01": -0.5, "p1": -0.3, "p99": 0.36, "p999": 0.62, "high": 1.0}
        activations[name] = {key: [round(part * w, 4) for w in wide] for key, part in parts.items()}
    attention = {
        "token": says["token"], "prompt": says["attention_prompt"],
        "layers": {says["attention_layer"]: 0.21 * scale, "up_blocks.1.attentions.0": 0.12, "mid_block.attn": 0.05},
        "levels": {"a": 0.1}, "maps": {says["map"]: {"reference": _map(0.0), "candidate": _map(0.6 * scale)}},
    }  # fmt: skip
    return {
        "timesteps": times, "activations": activations,
        "kurtosis": {says["kurtosis_layer"]: 31.2, **{f"{name}.x": 3.0 + 1.7 * i for i, name in enumerate(LAYERS)}},
        "noise_sqnr": [31 - 8 * scale + 6 * math.sin(i / 6) for i in range(STEPS)],
        "latent_sqnr": [None, *(38 - 6 * scale - 7 * math.log(1 + i) for i in range(1, STEPS))], "attention": attention,
        "settings": {"n": 16}, "notes": [says["inside_note"]],
    }  # fmt: skip


def _map(shift: float) -> list[list[float]]:
    return [[math.exp(-((x - 8 - shift) ** 2 + (y - 7) ** 2) / 14) for x in range(16)] for y in range(16)]


def _curve(height: float) -> list[Estimate]:
    means = [height * (i / (STEPS - 1)) ** 1.6 for i in range(STEPS)]
    return [Estimate(m, 0.9 * m, 1.12 * m) for m in means]


def _pictures(arms: list[str]) -> dict[str, Tensor]:
    """Smooth random pictures; the candidates' lie further away one after the other, the last four furthest."""
    rng = torch.Generator().manual_seed(0)

    def smooth(side: int) -> Tensor:
        noise = torch.randn(len(KEPT), 3, side, side, generator=rng)
        return F.interpolate(noise, size=(64, 64), mode="bicubic")

    base = smooth(5)
    far = torch.ones(len(KEPT), 1, 1, 1)
    far[8:] = 2.4
    return {arm: (0.6 * base + i * 0.07 * far * smooth(9)).clamp(-1, 1) for i, arm in enumerate(arms)}


def _measured(pictures: dict[str, Tensor], arm: str, reference: str) -> list[float]:
    found = dict(zip(KEPT, psnr(pictures[arm], pictures[reference]).tolist(), strict=True))
    return [found.get(i, 25.0) for i in range(N)]
