"""Exactness of the CUDA kernels on a GPU, over the tests' grid of layers: is every integer the definition's?

    python benchmarks/check_int8.py [--out FOLDER]        # a CUDA device with Triton
    python benchmarks/check_int8.py --triton              # the grid by Triton's own products, not those in Gluon
    python benchmarks/check_int8.py --smoke               # a few layers, the operations' plain form on the CPU

For every layer of the pairwise grids (bits 1 to 8, mixed and symmetric rows, symmetry, static and timed tables, dynamic
scales, segments, ragged rows, kernels, strides, layouts, dtypes): codes of the input, int32 sums and the decoded
weight must equal those of the CPU, where they are tested against int64 arithmetic; outputs are compared in their own
dtype. Layers that a kernel refuses are counted by reason. Every cut of the product is run on one layer of each kind,
and of joined and gated products, which must equal single products, and GEGLU and encode after one (erf's last bit may
move a code by one); these also with kernels launched before the one ahead of them ends, many in a row. Norms and GEGLU
with the encode: codes equal those of the CPU where a norm is exact, and within one elsewhere.

Attentions on codes are compared likewise: sums of q and k, sums of the softmax's codes and v, and outputs must be
equal; a code of the softmax may differ by one, and how many do is counted.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import bitbrush.kernels.joined_ops  # noqa: E402, F401 - makes the operations
import builder  # noqa: E402
import norm_cases  # noqa: E402
import packed_rows  # noqa: E402
from attention_cases import Case  # noqa: E402
from bitbrush.kernels import cpu, cpu_fused, gpu, gpu_decode, int8_ops, triton_int8, tuning  # noqa: E402
from bitbrush.kernels.gluon_int8 import PAIR  # noqa: E402
from bitbrush.kernels.triton_attention import Cut  # noqa: E402
from bitbrush.kernels.triton_int8 import ONE_ROW, Extra, Frame, Tables  # noqa: E402
from bitbrush.numbers import packing  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kernels"
PARTS = ("fused", "shared", "norms", "attends", "cuts", "splits", "attentions")
ALL = slice(None)
EQUAL = ("weight", "codes", "sums", "output")


def on(device: str, layer: Any) -> Any:
    """A copy of a layer with its clock on a device."""
    moved = builder.copy.deepcopy(layer).to(device)
    if layer.input is not None:
        moved.input._clock = builder.copy.deepcopy(layer.input._clock)
        moved.input._clock[0].to(device)
    return moved


def compare(case: dict[str, Any], seed: int, device: str) -> dict[str, Any]:
    """What of a layer is equal."""
    _, packed, _ = builder.build(case, seed)
    x, time = builder.make_input(case, seed), builder.timestep(case)
    there, given = on(device, packed), x.to(device)
    for layer in (packed, there):  # what is added to a product is a product of floats, in the device's own order
        layer.with_branch = lambda y, x: y
    found: dict[str, Any] = {"kind": case["kind"], "bits": str(case["weight_bits"])}
    weight = gpu_decode.weight(there, case["dtype"]).cpu()
    found["weight"] = torch.equal(weight, packed.decoded_weight().to(case["dtype"]))
    reason = gpu.unable(packed)
    if reason is not None or gpu.leaves(packed, x):
        return {**found, "refused": reason or "left to the reference"}
    clock = there.input._clock[0]
    with packed.input._clock[0].at(time), clock.at(time), torch.no_grad():
        want, got = cpu.accumulators(packed, x), gpu.accumulators(there, given)
        found["sums"] = all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
        found["codes"] = torch.equal(gpu.input_codes(there, given).cpu(), cpu.input_codes(packed, x))
        y = gpu.run(there, given).cpu()
        found["output"] = torch.equal(y, cpu.run(packed, x))
        found["values"] = sum(t.numel() for t in want)
    return found


def cuts(device: str, share: slice = ALL) -> dict[str, Any]:
    """Every cut of the product (or a share of them) gives the same integers (CUDA only)."""
    from triton.errors import TritonError

    ran, wrong, refused = 0, [], collections.Counter()
    for case in ({"kind": "linear", "rows": 33}, {"kind": "linear", "segments": (40, 24)},
                 {"kind": "conv", "padding": (1, 1), "rows": 33},
                 {"kind": "conv", "padding": (1, 1), "stride": (2, 2)}):
        whole = {**builder.ALWAYS, **case}
        _, packed, _ = builder.build(whole)
        there, x = on(device, packed), builder.make_input(whole).to(device)
        with there.input._clock[0].at(1.0), torch.no_grad():
            given = gpu.given_input(there, x)
            a, w = gpu.input_rows(there, x, given), gpu.int8_weight(there)
            tables = Tables(given.scale, given.zero_point, given.times, given.kind, there.weight_scale,
                            gpu.weight_sum(there))
            widths = packing.padded(there.segments)
            want = torch.stack(int8_ops.plain_sums(a, w, tables, list(widths), given.frame, given.per_sample))
            problem = tuning.Problem.of(want.shape[1], a.shape[0], widths, given.frame)
            for cut in (*tuning.CANDIDATES, *tuning.GATHERED, *tuning.flows(problem))[share]:
                kept = torch.empty_like(want)
                try:
                    triton_int8.product(a, w, tables, widths, torch.float32, frame=given.frame,
                                        per_sample=given.per_sample, config=cut, sums=kept)
                except TritonError as error:  # float32 outputs of the largest cuts take more memory than there is
                    refused[f"{type(error).__name__} of {cut}"] += 1
                    continue
                ran += 1
                if not torch.equal(kept, want):
                    wrong.append(f"{case} {cut}")
    return {"ran": ran, "wrong": wrong, "refused": dict(refused)}


def norms(device: str) -> dict[str, Any]:
    """Norms, GEGLU and encode on the device beside the CPU."""
    importlib.import_module("bitbrush.kernels.norm_ops")  # registers them

    def run(op: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), args)
        call = getattr(torch.ops.bitbrush, op)
        return call(*there).cpu(), call(*args)

    return norm_cases.compared(run)


def attends(device: str) -> dict[str, Any]:
    """Attention with the encode behind it, and a norm without one, beside the same in plain torch on the device: in
    half precision codes differ by one where float32's attention, rounded, lies at an edge."""
    ops, report = importlib.import_module("bitbrush.kernels.attend_ops"), {"codes": 0, "apart": 0, "most": 0}
    drawn = torch.Generator(device).manual_seed(0)
    for i, (batch, heads, queries, keys, size) in enumerate((
        (2, 20, 1024, 77, 64), (2, 20, 1024, 1024, 64), (2, 8, 1024, 77, 80), (1, 8, 100, 77, 160), (3, 4, 37, 130, 64),
        (2, 4, 64, 5, 16),
    )):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        q, k, v = (torch.randn((batch, length, heads, size), device=device, generator=drawn).to(dtype).transpose(1, 2)
                   for length in (queries, keys, keys))
        tables = (torch.tensor([[1.0], [40.0]], device=device), torch.tensor([[0], [131]], device=device).byte(),
                  torch.tensor([1], device=device), 255, torch.rand(heads * size, device=device) if i % 3 else None)
        apart = (torch.ops.bitbrush.attend_encode(q, k, v, *tables).int() - ops._plain(q, k, v, *tables).int()).abs()
        report["codes"] += apart.numel()
        report["apart"] += int((apart > 0).sum())
        report["most"] = max(report["most"], int(apart.max()))
    x = (torch.randn((2, 320, 128, 128), device=device, generator=drawn) + 1).bfloat16()
    weight, bias = (torch.randn(320, device=device, generator=drawn).bfloat16() for _ in range(2))
    made = torch.ops.bitbrush.group_norm(x, weight, bias, 32, 1e-5, False).float()
    want = torch.nn.functional.group_norm(x.float(), 32, weight.float(), bias.float(), 1e-5)
    return {**report, "norm_off": float(((made - want).abs() / (want.abs() + 1e-3)).max())}


def weight_of(rows: int, width: int, device: str) -> tuple[torch.Tensor, ...]:
    """(w, scale, sum, bias) of a random weight."""
    w = torch.randint(-128, 128, (rows, width), dtype=torch.int8, device=device)
    return (w, torch.rand((rows, 1), device=device) * 0.01, w.sum(1, dtype=torch.int32)[None],
            torch.randn(rows, device=device))


def chain(device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Joined, gated and single products, each reading what the one before it wrote, and what each should have given."""
    torch.manual_seed(seed)
    ops, (m, n, k, parts) = torch.ops.bitbrush, (190, 320, 160, 3)
    tables = [(torch.rand((4, 1), device=device) * 0.002 + 0.001, torch.randint(90, 166, (4, 1), device=device).byte(),
               torch.randint(0, 4, (1,), device=device)) for _ in range(parts)]
    a = torch.randint(-128, 128, (parts * m, k), dtype=torch.int8, device=device)
    (w, scale, total, bias), gate, out = (weight_of(*s, device) for s in ((parts * n, k), (2 * n, n), (n, n)))
    inverse, zero, times = torch.full((4, 1), 3.0, device=device), tables[0][1].float(), tables[0][2]
    y = ops.int8_joined(a, w, *map(list, zip(*tables, strict=True)), scale, total, [k], parts, bias, dtype)
    codes = ops.int8_encode(y[0], inverse, zero, times, ONE_ROW, [n], 255, [], 1, None)
    found = ops.int8_gated(codes, gate[0], *tables[1], *gate[1:3], n, gate[3], inverse, zero, times, 255, None, dtype)
    last = ops.int8_product(found, out[0], *tables[2], ONE_ROW, *out[1:3], [n], [], 1, out[3], None, None, dtype)
    single = torch.stack([ops.int8_product(
        a[p * m : (p + 1) * m], w[p * n : (p + 1) * n], *tables[p], ONE_ROW, scale[p * n : (p + 1) * n],
        total[:, p * n : (p + 1) * n], [k], [], 1, bias[p * n : (p + 1) * n], None, None, dtype,
    ) for p in range(parts)])
    hidden, opened = ops.int8_product(codes, gate[0], *tables[1], ONE_ROW, *gate[1:3], [n], [], 1, gate[3], None, None,
                                      dtype).chunk(2, 1)
    value = hidden * torch.nn.functional.gelu(opened)
    after = ops.int8_encode(value, inverse, zero, times, ONE_ROW, [n], 255, [], 1, None)
    return {"joined": y, "single": single, "gated": found, "after": after, "last": last}


def shared(device: str) -> dict[str, Any]:
    """One input's codes for many layers, and their product in every cut, beside the definition."""
    report: dict[str, Any] = {"ran": 0, "wrong": []}
    torch.manual_seed(3)
    parts, m, k, n = 10, 154, 768, 320
    x, times = torch.randn((m, k)).bfloat16(), torch.tensor([2])
    scale, zero = torch.rand((parts, 4)) * 0.02 + 0.01, torch.randint(90, 166, (parts, 4)).byte()
    w, weight_scale, total, bias = weight_of(parts * n, k, "cpu")
    given = (x, 1 / scale, zero, times, 255, torch.rand((parts, k)) + 0.5)
    codes = torch.ops.bitbrush.int8_encode_each(*given)
    own = (torch.randn((parts, m, k)).bfloat16(), *given[1:])  # an input each
    want_own = torch.ops.bitbrush.int8_encode_each(*own)
    operands = (codes, w, scale, zero, times, weight_scale, total, k, bias, torch.bfloat16)
    want = torch.ops.bitbrush.int8_stacked(*operands)
    given, own, operands = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(device), (given, own, operands))
    if not torch.equal(torch.ops.bitbrush.int8_encode_each(*given).cpu(), codes):
        report["wrong"].append("encode")
    if not torch.equal(torch.ops.bitbrush.int8_encode_each(*own).cpu(), want_own):
        report["wrong"].append("encode of an input each")
    usual = tuning.config
    for cut in (*tuning.CANDIDATES, *tuning.GATHERED, *tuning.FLOWS):
        tuning.config = lambda problem, device, run, cut=cut: cut  # type: ignore[assignment]
        report["ran"] += 1
        if not torch.equal(torch.ops.bitbrush.int8_stacked(*operands).cpu(), want):
            report["wrong"].append(str(cut))
    tuning.config = usual
    return {**report, "weights": unpacked(device, report["wrong"]), "sums": joined_sums(device, report["wrong"])}


def unpacked(device: str, wrong: list[str]) -> int:
    """Weights of several layers by one launch, beside the definition; how many."""
    count, op = 0, torch.ops.bitbrush.int8_weights
    for given in packed_rows.cases():
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), given)
        for got, want in zip(op(*there), op(*given), strict=True):
            count += want.numel()
            if not torch.equal(got.cpu(), want):
                wrong.append(f"weights of {given[4]} bits")
    return count


def joined_sums(device: str, wrong: list[str]) -> int:
    """Joined layers of several sums in every cut that is for them, beside the definition; how many."""
    torch.manual_seed(4)
    parts, m, n, count, usual = 3, 190, 320, 0, tuning.config
    for widths in ((160,) * 8, (96, 224, 0, 352, 32)):
        w = torch.randint(-128, 128, (parts * n, sum(widths)), dtype=torch.int8)
        total = torch.stack([part.sum(1, dtype=torch.int32) for part in w.split(widths, 1)])
        rows = [[torch.rand((4, len(widths))) * 0.01 + 0.001 for _ in range(parts)],
                [torch.randint(90, 166, (4, len(widths))).byte() for _ in range(parts)],
                [torch.randint(0, 4, (1,)) for _ in range(parts)]]  # fmt: skip
        given = (torch.randint(-128, 128, (parts * m, sum(widths)), dtype=torch.int8), w, *rows,
                 torch.rand((parts * n, len(widths))) * 0.01, total, list(widths), parts, torch.randn(parts * n),
                 torch.bfloat16)  # fmt: skip
        want = torch.ops.bitbrush.int8_joined(*given)
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), given)
        for cut in (*tuning.CANDIDATES, *tuning.flows(tuning.Problem(m, n * parts, widths, 1, 1, parts))):
            tuning.config = lambda problem, device, run, cut=cut: cut  # type: ignore[assignment]
            count += 1
            if not torch.equal(torch.ops.bitbrush.int8_joined(*there).cpu(), want):
                wrong.append(f"{widths}: {cut}")
    tuning.config = usual
    return count


def splits(device: str, share: slice = ALL) -> dict[str, Any]:
    """Products of long rows, and a convolution, whole and with split sums, with all that is added to them and gates, in
    every cut beside the definition."""
    report: dict[str, Any] = {"ran": 0, "outputs": 0, "wrong": []}
    torch.manual_seed(4)
    m, k, n = 154, 1184, 320
    frame = Frame(2, 9, 8, (3, 3), 1)
    for place, rows, taps in ((None, m, 1), (frame, frame.rows, 9)):
        w, scale, total, bias = weight_of(n, k * taps, device)
        a = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device)
        count = m if place is None else 2 * 9 * 8
        table = (torch.rand((4, 1), device=device) * 0.01, torch.randint(90, 166, (4, 1), device=device).byte(),
                 torch.tensor([2], device=device))
        extra = Extra(bias, *(torch.randn(size, n, device=device).half() for size in (2, count)))
        plain = [t.cpu() for t in (a, w, *table)], [t.cpu() for t in (scale, total)], [t.cpu() for t in extra[:3]]
        want = [int8_ops._product_plain(*plain[0], ONE_ROW, *plain[1], [k], int8_ops.numbers_of(place), -(-count // 2),
                                        *plain[2], torch.float16, gate) for gate in (False, True)]  # fmt: skip
        for gate, cut in [(gate, replace(cut, split_k=parts)) for parts, gate in ((1, True), (2, False), (5, True))
                          for cut in (*tuning.CANDIDATES, *tuning.GATHERED, *tuning.FLOWS)
                          if parts == 1 or cut.flow in ("", PAIR)][share]:  # fmt: skip
            y = triton_int8.product(a, w, Tables(*table, ONE_ROW, scale, total), (k,), torch.float16, frame=place,
                                    per_sample=-(-count // 2), extra=extra._replace(gate=gate), config=cut)
            report["ran"], report["outputs"] = report["ran"] + 1, report["outputs"] + y.numel()
            if not torch.equal(y.cpu(), want[gate]):
                report["wrong"].append(f"{place} {cut} {'gate' if gate else ''}")
    return report


def fused(device: str, share: slice = ALL) -> dict[str, Any]:
    """Joined and gated products in every cut (or a share of them), in order and launched early."""
    usual, report = tuning.config, {"ran": 0, "codes": 0, "codes_unequal": 0, "wrong": []}
    both = [(cut, cut) for cut in (*tuning.CANDIDATES, *tuning.GATHERED)]
    both += list(zip(tuning.FLOWS, itertools.cycle(tuning.GATED_FLOWS)))
    for i, cut in enumerate(both[share]):
        tuning.config = lambda problem, device, run, cut=cut: cut[problem.gated]  # type: ignore[assignment]
        found = chain(device, i)
        apart = (found["gated"].int() - found["after"].int()).abs()
        report["ran"], report["codes"] = report["ran"] + 1, report["codes"] + apart.numel()
        report["codes_unequal"] += int((apart > 0).sum())
        if not torch.equal(found["joined"], found["single"]) or apart.max() > 1:
            report["wrong"].append(str(cut))
        os.environ["BITBRUSH_EARLY"] = "1"
        triton_int8.early.cache_clear()
        again = [chain(device, i) for _ in range(20)]
        del os.environ["BITBRUSH_EARLY"]
        triton_int8.early.cache_clear()
        if any(not torch.equal(each[name], found[name]) for each in again for name in found):
            report["wrong"].append(f"launched early: {cut}")
    tuning.config = usual
    return report


ATTENTIONS = (
    (2, 4, 1024, 1024, 64), (2, 4, 1024, 77, 64), (2, 2, 4096, 4096, 40), (1, 8, 256, 256, 160), (2, 8, 64, 77, 160),
    (2, 3, 37, 45, 40), (1, 2, 16, 5, 8), (1, 2, 333, 130, 80), (1, 1, 130, 1000, 256),
)
"""(samples, heads, queries, keys, channels of a head): those of SD 1.5 and SDXL, fewer heads, and ragged ones."""
ATTENTION_CUTS = tuple(Cut(*each) for each in (
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3),
    (128, 128, 8, 2), (128, 128, 8, 3)))  # fmt: skip


def attentions() -> dict[str, Any]:
    """What is equal of attentions on codes, and of one in every cut (CUDA only)."""
    cases = [(shape, Case(*shape, bits=8 if i % 3 else 6, zero=i % 4 == 3, seed=i), None, dtype)
             for i, (shape, dtype) in enumerate((shape, dtype) for shape in ATTENTIONS
                                                for dtype in (torch.float32, torch.bfloat16))]  # fmt: skip
    for cut in ATTENTION_CUTS:
        cases += [(shape, Case(*shape, seed=50), cut, torch.float16) for shape in ((1, 2, 333, 130, 40),
                                                                                  (1, 3, 256, 256, 64))]
    found, wrong = [], []
    for shape, case, cut, dtype in cases:
        found.append(case.compared("cuda", cut, dtype))
        if not all(found[-1][key] for key in ("sums", "totals", "output")) or found[-1]["most"] > 1:
            wrong.append({"shape": shape, "cut": str(cut), "dtype": str(dtype), **found[-1]})
            print(f"attention: {wrong[-1]}", file=sys.stderr, flush=True)
    return {"cases": len(found), "codes": sum(f["codes"] for f in found), "codes_apart": sum(f["apart"] for f in found),
            **{f"{key}_equal": sum(f[key] for f in found) for key in ("sums", "totals", "output")}, "wrong": wrong}


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--grids", type=int, default=5, help="pairwise grids of some 95 layers, each drawn anew")
    parser.add_argument("--triton", action="store_true", help="the grid by Triton's own products, not those in Gluon")
    parser.add_argument("--only", choices=PARTS, nargs="*", help="these parts, without the grid of layers")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"),
                        help="with --only: every N-th cut from the I-th, to share them among processes")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("BITBRUSH_TUNE", "0")
    if args.triton:
        os.environ["BITBRUSH_FLOWS"] = "0"
    cpu_fused.takes = lambda layer, x: False  # the CPU's plain form, whose epilogue is in the pinned order
    device, grids = ("cpu", 1) if args.smoke else ("cuda", 0 if args.only else args.grids)
    cases = [case for grid in range(grids) for case in builder.pairwise(100 + grid)]
    cases = [builder.square(case) if i % 2 else case for i, case in enumerate(cases)]
    rows = []
    for i, case in enumerate(cases[:24] if args.smoke else cases):
        rows.append(compare(case, i, device))
        if i % 20 == 19 or not all(rows[-1].get(key, True) for key in EQUAL):
            print(f"{i + 1} of {len(cases)}: {rows[-1]}", file=sys.stderr, flush=True)
    ran = [row for row in rows if "refused" not in row]
    report = {
        "layers": len(rows), "multiplied": len(ran), "values": sum(row["values"] for row in ran),
        "weights_equal": sum(row["weight"] for row in rows),
        **{f"{key}_equal": sum(row[key] for row in ran) for key in ("codes", "sums", "output")},
        "refused": dict(collections.Counter(row["refused"] for row in rows if "refused" in row)),
        "unequal": [row for row in rows if not all(row.get(key, True) for key in EQUAL)],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        "command": "python benchmarks/check_int8.py" + " --triton" * args.triton,
    }
    share = slice(args.share[0], None, args.share[1])
    parts: dict[str, Callable[[], Any]] = {"fused": lambda: fused(device, share), "shared": lambda: shared(device),
                                            "norms": lambda: norms(device), "attends": lambda: attends(device)}
    if device == "cuda":
        parts |= {"cuts": lambda: cuts(device, share), "splits": lambda: splits(device, share),
                  "attentions": attentions}
    write(report, args)
    for name, work in parts.items():
        if args.only and name not in args.only:
            continue
        try:
            report[name] = work()
        except Exception as error:  # noqa: BLE001 - what else was found is kept
            report[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        write(report, args)
    print(json.dumps(report, indent=1))


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    """As far as it is known."""
    if not args.smoke:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"int8_gpu{'-triton' * args.triton}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
