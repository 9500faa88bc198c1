"""Fused fake quantization on a GPU: the same bits as the torch form, and how much faster.

    PYTHONPATH=src python benchmarks/check_triton_fake.py --out OUT      # a CUDA device with Triton and a C compiler
    PYTHONPATH=src python benchmarks/check_triton_fake.py --smoke        # anywhere: the torch form against itself

Activations. Compared for every case: forward (bits), dx (bits), and the gradients of scale and zero-point, which are
float32 sums in another order, against a float64 sum. Each case also runs inside a captured CUDA graph. Timed: forward,
and forward with backward.

Weights. The same for layers with mixed bits, symmetric 1-bit rows, frozen offsets and two segments, each layer alone
and all together as a finetuning has them; and a learner of each kind must store what it trained, bit for bit.

The exit status is 1 where bits differ or a sum is off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.kernels import triton_fake
from bitbrush.network.layers import QuantConv2d, QuantLayer, QuantLinear
from bitbrush.numbers.codec import decode, encode, expand_weight_scale, reciprocal
from bitbrush.numbers.grid import Grid, LayerSpec, WeightSpec
from bitbrush.numbers.straight_through import (
    Fused,
    FusedWeight,
    Rows,
    encode_weight,
    fake_quantize,
    fake_rows,
    fake_weight,
)
from bitbrush.steps.finetune import Finetune
from bitbrush.steps.tuning_learners import WeightLearner, rows_of

SHAPES = {
    "one value": (1,), "ragged tokens": (3, 77, 67), "picture": (8, 320, 64, 64), "tokens": (8, 4096, 320),
    "deep picture": (8, 1280, 16, 16), "batch of odd pictures": (5, 33, 17, 19),
}
SMALL = {"one value": (1,), "ragged tokens": (3, 7, 67), "picture": (2, 8, 5, 4)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYERS = {  # rows, channels, kernel side (0: linear), segments
    "conv": (320, 320, 3, ()), "conv, two segments": (320, 960, 3, (640, 320)), "1x1 conv": (320, 640, 1, ()),
    "linear": (1280, 320, 0, ()), "linear, two segments": (640, 2561, 0, (1280, 1281)), "first conv": (320, 4, 3, ()),
}
SMALL_LAYERS = {"conv": (8, 6, 3, ()), "linear, two segments": (10, 2500, 0, (1200, 1300)), "1x1 conv": (5, 4, 1, ())}
ROW_BITS = {"4 bits": (4,), "mixed": (1, 2, 3, 4, 8), "1 bit": (1,)}
LAYOUTS = ("contiguous", "channels last", "heads")
TOLERANCE = 1e-5
"""Of the sums, relative to the sum of magnitudes."""


def example(shape: tuple[int, ...], dtype: torch.dtype, by_sample: bool, layout: str, top: int, seed: int) -> Any:
    """(x, scale, zero_point, grad) with ties, clipped values, zeros and infinities; None where the layout cannot be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator(device).manual_seed(seed)
    table = (shape[0], *[1] * (len(shape) - 1)) if by_sample else ()
    scale = torch.rand(table, generator=g, device=device) * 0.02 + 0.01
    if seed % 2:
        scale = torch.exp2(torch.log2(scale).round())  # exact ties
    zero = torch.randint(0, top + 1, table, generator=g, device=device).float()
    x = torch.randn(shape, generator=g, device=device) * (top + 1) * 0.01
    ties = torch.rand(shape, generator=g, device=device) < 0.1
    x = torch.where(ties, (torch.round(x / scale) + 0.5) * scale, x)
    x.view(-1)[:: 97] = 0.0
    if x.numel() > 1000:
        x.view(-1)[100:103] = torch.tensor([torch.inf, -torch.inf, 3e38], device=device)
    x = x.to(dtype)
    if layout == "channels last":
        if x.ndim != 4:
            return None
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "heads":
        if x.ndim != 3:
            return None
        x = x.unsqueeze(2).transpose(1, 2)  # as attention hands it over: dense, but not in order
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x).transpose(2, 3)
        scale, zero = (t.unsqueeze(-1) if t.ndim else t for t in (scale, zero))
    grad = torch.randn(x.shape, generator=g, device=device).to(dtype)
    return x, scale, zero, grad


def run(x: Tensor, scale: Tensor, zero: Tensor, grad: Tensor, top: int, fused: Fused | None) -> tuple[Tensor, ...]:
    """(y, dx, dscale, dzero)."""
    leaves = [t.detach().requires_grad_() for t in (x, scale, zero)]
    y = fake_quantize(leaves[0], leaves[1], leaves[2], top, fused)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def exact_tables(x: Tensor, scale: Tensor, zero: Tensor, grad: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dscale, dzero, sum of magnitudes) summed in float64 from the float32 terms."""
    v = x.float() * reciprocal(scale)
    code = torch.round(v) + zero
    inside, end = (code >= 0) & (code <= top), code.clamp(0, top)
    slope = grad.double() * torch.where(inside, torch.round(v) - v, end - zero)
    shift = torch.where(inside, torch.zeros_like(slope), -(grad.double() * scale))
    sums = [t.sum_to_size(scale.shape) for t in (slope, shift)]
    return sums[0], sums[1], (slope.abs() + shift.abs() + 1e-30).sum_to_size(scale.shape)


def captured(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``work`` answers when it is replayed from a captured CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    graph.replay()
    torch.cuda.synchronize()
    return out


def compare(case: tuple[Tensor, ...], top: int, fused: Fused | None) -> dict[str, Any]:
    """Counts of wrong bits and the worst relative error of the sums."""
    x, scale, zero, grad = case
    plain, ours = run(x, scale, zero, grad, top, None), run(x, scale, zero, grad, top, fused)
    want = decode(encode(x, reciprocal(scale), zero, top), scale, zero).to(x.dtype)
    ds, dz, size = exact_tables(x, scale, zero, grad, top)
    worst = max(float(((a.double() - b).abs() / size).nan_to_num(0.0).max()) for a, b in zip(ours[2:], (ds, dz),
                                                                                             strict=True))
    found = {
        "values": x.numel(), "fits": fused is None or fused.fits(x, scale, zero),
        "wrong_forward": int((ours[0] != want).sum()), "wrong_dx": int((ours[1] != plain[1]).sum()),
        "table_error": worst, "strides_kept": ours[0].stride() == x.stride(),
    }
    if fused is not None:
        again, replayed = run(x, scale, zero, grad, top, fused), captured(
            lambda: run(x, scale, zero, grad, top, fused))
        found["repeatable"] = all(same(a, b) for a, b in zip(ours, again, strict=True))
        found["graph_equal"] = all(same(a, b) for a, b in zip(ours, replayed, strict=True))
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0))


def good(found: dict[str, Any]) -> bool:
    """Whether a comparison passed."""
    flags = ("fits", "strides_kept", "repeatable", "graph_equal")
    return (found["wrong_forward"] == found["wrong_dx"] == 0 and found["table_error"] < TOLERANCE
            and all(found.get(flag, True) for flag in flags))


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call, launches included."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        _wait()
        begin = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(case: tuple[Tensor, ...], top: int, fused: Fused | None, repeats: int) -> dict[str, float]:
    """Microseconds of both forms, forward alone and with backward."""
    x, scale, zero, grad = case
    out = {}
    for name, form in (("torch", None), ("fused", fused)):
        with torch.no_grad():
            forward = seconds(lambda form=form: fake_quantize(x, scale, zero, top, form), repeats)  # type: ignore[misc]
        both = seconds(lambda form=form: run(x, scale, zero, grad, top, form), repeats)  # type: ignore[misc]
        out[f"{name}_forward_us"], out[f"{name}_both_us"] = round(forward * 1e6, 1), round(both * 1e6, 1)
    return out


def layer_of(kind: tuple[int, int, int, tuple[int, ...]], bits: tuple[int, ...], smooth: bool, seed: int) -> QuantLayer:
    """A layer with tables at random (exact ties with odd seeds) and the codes of its own weight."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    count, channels, side, segments = kind
    weight = WeightSpec(grid=Grid(bits=bits[0]), binary="symmetric",
                        row_bits=tuple(bits[i % len(bits)] for i in range(count)) if len(bits) > 1 else ())
    spec = LayerSpec(weight=weight, segments=segments, input_scale=smooth)
    layer: QuantLayer = (
        QuantConv2d.wrap(nn.Conv2d(channels, count, side), spec, None, 1) if side
        else QuantLinear.wrap(nn.Linear(channels, count), spec, None, 1)
    )
    layer = layer.to(device)
    shape, binary = layer.weight_scale.shape, layer.binary_rows()
    top = torch.as_tensor(layer.top(), device=device).float().reshape(-1, 1).expand(count, 1)
    zero = (torch.rand(shape, device=device) * (top + 1)).floor()
    if binary is not None:
        zero = torch.where(binary.reshape(-1, 1), torch.ones_like(zero), zero)
    scale = (torch.rand(shape, device=device) + 0.5) * 2 / channels ** 0.5 / (top + 1)
    layer.weight_scale = torch.exp2(torch.log2(scale).round()) if seed % 2 else scale
    layer.weight_zero_point = zero.to(torch.uint8)
    if smooth:
        layer.set_input_scale(torch.rand(channels, device=device) + 0.5)
    wide, wide_zero = layer.scale_tables()
    codes = encode_weight(layer.scaled_weight(), wide, wide_zero, layer.top(), None, binary)
    layer.set_weight(codes, layer.weight_scale, zero)
    return layer


def run_weights(
    layers: list[QuantLayer], given: list[tuple[Tensor, Tensor | None]], grad: Tensor, rows: Rows,
    fused: FusedWeight | None,
) -> tuple[Tensor, ...]:
    """(values, dweight, dscale) of all layers, flat; layer by layer in torch, or all at once."""
    weights = [w.detach().requires_grad_() for w, _ in given]
    tables = [layer.weight_scale.detach().requires_grad_() for layer in layers]
    offsets = [offset.reshape(-1) for _, offset in given if offset is not None]
    if fused is None:
        parts = [
            fake_weight(w, expand_weight_scale(t, layer.segments, w.ndim), layer.scale_tables()[1], layer.top(), offset,
                        layer.binary_rows())
            for layer, t, w, (_, offset) in zip(layers, tables, weights, given, strict=True)
        ]
        out = torch.cat([part.reshape(-1) for part in parts])
    else:
        out = fake_rows(
            torch.cat([w.reshape(-1) for w in weights]), torch.cat([t.reshape(-1) for t in tables]),
            rows, torch.cat(offsets) if offsets else None, fused,
        )
    found = torch.autograd.grad(out, weights + tables, grad)
    dw, ds = (torch.cat([g.reshape(-1) for g in part]) for part in (found[: len(layers)], found[len(layers):]))
    return out.detach(), dw, ds


def exact_weight_sums(
    layers: list[QuantLayer], given: list[tuple[Tensor, Tensor | None]], grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(dscale, sum of magnitudes) in float64 from the float32 terms."""
    sums, sizes, start = [], [], 0
    for layer, (w, offset) in zip(layers, given, strict=True):
        scale, zero = layer.scale_tables()
        g, start = grad[start : start + w.numel()].view(w.shape), start + w.numel()
        v = w * reciprocal(scale)
        code = (torch.round(v) if offset is None else torch.floor(v) + offset) + zero
        top = torch.as_tensor(layer.top(), device=w.device).float()
        end = torch.minimum(code.clamp_min(0), top)
        slope = torch.where(code == end, code - zero - v, end - zero)
        binary = layer.binary_rows()
        if binary is not None:
            slope = torch.where(binary, torch.where(w >= 0, 1.0, -1.0), slope)
        terms = (g.double() * slope).flatten(2).sum(2) if w.ndim == 4 else g.double() * slope
        sizes_of = (g.double() * slope).abs().flatten(2).sum(2) if w.ndim == 4 else (g.double() * slope).abs()
        for collected, part in ((sums, terms), (sizes, sizes_of)):
            collected.append(torch.stack([p.sum(1) for p in part.split(list(layer.segments), 1)], 1).reshape(-1))
    return torch.cat(sums), torch.cat(sizes) + 1e-30


def compare_weights(layers: list[QuantLayer], rounding: str, fused: FusedWeight | None, seed: int) -> dict[str, Any]:
    """Counts of wrong bits and the worst relative error of the sums."""
    g = torch.Generator(layers[0].weight_scale.device).manual_seed(seed)
    device = g.device
    given: list[tuple[Tensor, Tensor | None]] = []
    for layer in layers:
        scale, _ = layer.scale_tables()
        w = layer.scaled_weight() * 2
        ties = torch.rand(w.shape, generator=g, device=device) < 0.1
        w = torch.where(ties, (torch.round(w / scale) + 0.5) * scale, w)
        w.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf], device=device)
        up = torch.randint(0, 2, w.shape, generator=g, device=device, dtype=torch.uint8)
        given.append((w, up if rounding == "offset" else None))
    grad = torch.randn(sum(w.numel() for w, _ in given), generator=g, device=device)
    rows = rows_of(layers)

    def work(form: FusedWeight | None = fused) -> tuple[Tensor, ...]:
        return run_weights(layers, given, grad, rows, form)

    plain, ours = work(None), work()
    exact, size = exact_weight_sums(layers, given, grad)
    found = {
        "values": grad.numel(), "wrong_forward": int((ours[0] != plain[0]).sum()),
        "wrong_dx": int((ours[1] != plain[1]).sum()),
        "table_error": float(((ours[2].double() - exact).abs() / size).nan_to_num(0.0).max()),
    }
    if fused is not None:
        again, replayed = work(), captured(work)
        found["repeatable"] = all(same(a, b) for a, b in zip(ours, again, strict=True))
        found["graph_equal"] = all(same(a, b) for a, b in zip(ours, replayed, strict=True))
        for name, form in (("torch", None), ("fused", fused)):
            both = seconds(lambda form=form: work(form), 5)  # type: ignore[misc]
            found[f"{name}_both_us"] = round(both * 1e6, 1)
    return found


def check_learner(layers: list[QuantLayer], form: dict[str, Any]) -> dict[str, Any]:
    """A learner's relaxed weights, moved at random, against what it stores."""
    cfg = Finetune(do="finetune", rank=4, weight_scale=True, **form)
    learner = WeightLearner({str(i): layer for i, layer in enumerate(layers)}, cfg, torch.Generator().manual_seed(0))
    device, start = layers[0].weight_scale.device, learner.starts_elsewhere
    g = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters().values():
            p.add_(torch.randn(p.shape, generator=g, device=device) * 0.05)
    learner.relax(torch.zeros((), device=device))
    trial = [layer.trial_weight.detach() for layer in layers if layer.trial_weight is not None]
    facts = learner.harden()
    wrong = sum(int((layer.decoded_weight() != t).sum()) for layer, t in zip(layers, trial, strict=True))
    learner.restore()
    return {"values": sum(t.numel() for t in trial), "wrong_forward": wrong + (len(layers) - len(trial)),
            "wrong_dx": start, "table_error": 0.0, "moved": facts["codes_changed"] > 0}


def check_weights(fused: FusedWeight | None, smoke: bool) -> list[dict[str, Any]]:
    """All cases of weights, printed."""
    rows: list[dict[str, Any]] = []
    print(f"\n{'layers':24}{'bits':8}{'rounding':34} {'values':>10} {'wrong':>6} {'wrong dw':>9} {'sums':>8}  "
          "torch us   fused us")

    def note(name: str, bits: str, rounding: str, found: dict[str, Any]) -> None:
        ok = good(found) and found.get("moved", True)
        rows.append({"name": name, "kind": "weight", "bits": bits, "rounding": rounding, "ok": ok, **found})
        print(f"{name:24}{bits:8}{rounding:34} {found['values']:10} {found['wrong_forward']:6} {found['wrong_dx']:9} "
              f"{found['table_error']:8.1e}  {found.get('torch_both_us', ''):>8}   {found.get('fused_both_us', ''):>8}"
              f"{'' if ok else '  WRONG'}")

    kinds, seed = SMALL_LAYERS if smoke else LAYERS, 0
    for bits, widths in ROW_BITS.items():
        layers = [layer_of(kind, widths, i % 2 == 1, i) for i, kind in enumerate(kinds.values())]
        groups = {name: [layer] for name, layer in zip(kinds, layers, strict=True)} | {"all together": layers}
        for name, group in groups.items():
            for rounding in ("nearest", "offset"):
                note(name, bits, rounding, compare_weights(group, rounding, fused, seed))
                seed += 1
        for form in ({"weights": "full"}, {"weights": "lora"}, {"weights": "lora", "adapter": "tap"},
                     {"weights": "lora", "base": "quantized", "rounding": "offset"}, {"weights": "none"}):
            found = check_learner(layers, form)
            found["moved"] |= form["weights"] == "none" or bits == "1 bit"
            note("learner", bits, " ".join(form.values()), found)
    return rows


def main() -> int:
    """Run every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes; needs no GPU")
    parser.add_argument("--out", type=Path, help="folder for triton_fake.json")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    fused = triton_fake.build()
    fused_weight = triton_fake.build_weight()
    if (fused is None or fused_weight is None) and not args.smoke:
        print("Triton cannot build here (no CUDA device, no Triton, or no C compiler): use --smoke")
        return 1
    rows, shapes = [], SMALL if args.smoke else SHAPES
    cases = itertools.product(shapes.items(), DTYPES.items(), (False, True), LAYOUTS, (15, 255))
    print(f"{'shape':24}{'dtype':6}{'scales':8}{'layout':15}{'top':>4} {'values':>10} {'wrong':>6} {'wrong dx':>9} "
          f"{'sums':>8}  torch us (fwd, both)   fused us (fwd, both)")
    for i, ((name, shape), (kind, dtype), by_sample, layout, top) in enumerate(cases):
        case = example(shape, dtype, by_sample, layout, top, i)
        if case is None:
            continue
        found = compare(case, top, fused)
        if top == 255 and layout != "heads":
            found |= timed(case, top, fused, 2 if args.smoke else args.repeats)
        scales = "sample" if by_sample else "one"
        rows.append({"shape": list(case[0].shape), "name": name, "dtype": kind, "scales": scales, "layout": layout,
                     "top": top, "ok": good(found), **found})
        print(f"{name:24}{kind:6}{scales:8}{layout:15}{top:4} {found['values']:10} {found['wrong_forward']:6} "
              f"{found['wrong_dx']:9} {found['table_error']:8.1e}  {found.get('torch_forward_us', ''):>8} "
              f"{found.get('torch_both_us', ''):>8}      {found.get('fused_forward_us', ''):>8} "
              f"{found.get('fused_both_us', ''):>8}{'' if good(found) else '  WRONG'}")
    rows += check_weights(fused_weight, args.smoke)
    return ended(rows, fused is not None, args.out and args.out / "triton_fake.json")


def ended(rows: list[dict[str, Any]], fused: bool, file: Path | None) -> int:
    """Say how many cases are wrong, keep all of them, and give the exit status."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} cases on {device}, {'fused' if fused else 'torch form only'}: {bad} wrong")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device, "torch": torch.__version__, "fused": fused, "rows": rows}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
