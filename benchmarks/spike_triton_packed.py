"""Spike: one int8 product on a GPU that reads bitbrush's packed rows as they lie in the file.

    PYTHONPATH=src python benchmarks/spike_triton_packed.py            # a CUDA device with Triton
    PYTHONPATH=src python benchmarks/spike_triton_packed.py --smoke    # the CPU reference parts only

It answers one question before the layout is frozen: can a tensor-core kernel eat rows [N, row_bytes] with their planes
(4-bit rows; 3-bit rows = planes 2 + 1), segments with scales of their own and ragged channel counts, exactly?

The exact form, with int8 operands only: activations are stored as ``a = code - 128`` (int8), weights are unpacked to
``w = code - zero_point`` (int8: below 8 bits it always fits, 8-bit grids are symmetric with zero-point 128). Then for
each segment, in int32,

    sum (code_a - zero_a) w  =  sum a w  +  (128 - zero_a) * sum w

and ``sum w`` is an integer a row that is computed once at load. The epilogue is float32:
``y = sum_s (acc_s * act_scale_s) * weight_scale[n, s] + bias``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the smoke run needs neither Triton nor a GPU
    triton = None

ROOT = Path(__file__).resolve().parents[1]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def _packing() -> types.ModuleType:
    """`bitbrush.numbers.packing` without the package's front door, which may import diffusers."""
    if "bitbrush" not in sys.modules:
        package = types.ModuleType("bitbrush")
        package.__path__ = [str(ROOT / "src" / "bitbrush")]
        sys.modules["bitbrush"] = package
    from bitbrush.numbers import packing

    return packing


packing = _packing()


# ---- the kernel ------------------------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _interleave4(p0, p1, p2, p3):
        return tl.join(tl.join(p0, p2), tl.join(p1, p3))

    @triton.jit
    def _spread(b, WIDTH: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, JOIN: tl.constexpr):
        """Bytes [ROWS, COUNT * WIDTH / 8] as values below 2**WIDTH, [ROWS, COUNT]; every byte was loaded once."""
        if WIDTH == 8:
            return b
        elif JOIN and WIDTH == 4:
            return tl.reshape(tl.join(b & 15, b >> 4), (ROWS, COUNT))
        elif JOIN and WIDTH == 2:
            return tl.reshape(_interleave4(b & 3, (b >> 2) & 3, (b >> 4) & 3, b >> 6), (ROWS, COUNT))
        elif JOIN:
            even = _interleave4(b & 1, (b >> 2) & 1, (b >> 4) & 1, (b >> 6) & 1)
            odd = _interleave4((b >> 1) & 1, (b >> 3) & 1, (b >> 5) & 1, b >> 7)
            return tl.reshape(tl.join(even, odd), (ROWS, COUNT))
        else:
            shift = (tl.arange(0, 8 // WIDTH) * WIDTH).to(tl.uint8)
            wide = (b[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1)
            return tl.reshape(wide, (ROWS, COUNT))

    @triton.jit
    def _plane(
        data, rows, row_ok, k, end, stride, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, JOIN: tl.constexpr
    ):
        """One plane of the codes k .. k + BK of BN rows. Segment ends are multiples of 32 codes: whole bytes."""
        byte = k * WIDTH // 8 + tl.arange(0, BK * WIDTH // 8)
        ok = row_ok[:, None] & (byte < end * WIDTH // 8)[None, :]
        tile = tl.load(data + rows[:, None] * stride + byte[None, :], mask=ok, other=0)
        return _spread(tile, WIDTH, BN, BK, JOIN)

    @triton.jit
    def _codes(
        data, rows, row_ok, k, end, stride, LENGTH: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, JOIN: tl.constexpr,
    ):
        """Codes [BN, BK] uint8 from all planes of the rows (widest plane first, low-order bits first)."""
        FOUR: tl.constexpr = (LENGTH * 4 // 8 + 15) // 16 * 16 if BITS & 4 else 0
        TWO: tl.constexpr = (LENGTH * 2 // 8 + 15) // 16 * 16 if BITS & 2 else 0
        if BITS == 8:
            return _plane(data, rows, row_ok, k, end, stride, 8, BN, BK, JOIN)
        if BITS & 4:
            code = _plane(data, rows, row_ok, k, end, stride, 4, BN, BK, JOIN)
            if BITS & 2:
                code |= _plane(data + FOUR, rows, row_ok, k, end, stride, 2, BN, BK, JOIN) << 4
            if BITS & 1:
                code |= _plane(data + FOUR + TWO, rows, row_ok, k, end, stride, 1, BN, BK, JOIN) << (BITS - 1)
        elif BITS & 2:
            code = _plane(data, rows, row_ok, k, end, stride, 2, BN, BK, JOIN)
            if BITS & 1:
                code |= _plane(data + TWO, rows, row_ok, k, end, stride, 1, BN, BK, JOIN) << 2
        else:
            code = _plane(data, rows, row_ok, k, end, stride, 1, BN, BK, JOIN)
        return code

    @triton.jit(do_not_specialize=["M"])
    def _product(
        a_ptr, data, zero_w, scale_w, sum_w, zero_a, scale_a, bias, y_ptr, acc_ptr,
        M, N, stride_a, stride_row, stride_time,
        LENGTH: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
        E2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, JOIN: tl.constexpr,
        SWAP: tl.constexpr, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ):
        m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
        m_ok, n_ok = m < M, n < N
        rows = n.to(tl.int64)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        start = 0
        for s in tl.static_range(S):
            end = E0 if s == 0 else (E1 if s == 1 else E2)
            zero = tl.load(zero_w + n * S + s, mask=n_ok, other=0)
            acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.int32)
            for k in range(start, end, BK):
                columns = k + tl.arange(0, BK)
                inside = m_ok[:, None] & (columns < end)[None, :]  # beyond the segment a = 0, whatever the weight says
                a = tl.load(a_ptr + m[:, None].to(tl.int64) * stride_a + columns[None, :], mask=inside, other=0)
                code = _codes(data, rows, n_ok, k, end, stride_row, LENGTH, BITS, BN, BK, JOIN)
                w = code.to(tl.int8, bitcast=True)
                if BITS < 8:  # 8 bits are stored as code - 128
                    w -= zero.to(tl.int8)[:, None]
                if SWAP:
                    acc = tl.dot(w, tl.trans(a), acc, out_dtype=tl.int32)
                else:
                    acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
            result = acc
            if SWAP:
                result = tl.trans(acc)
            za = tl.load(zero_a + m * stride_time + s, mask=m_ok, other=128)
            sw = tl.load(sum_w + n * S + s, mask=n_ok, other=0)
            result += (128 - za.to(tl.int32))[:, None] * sw[None, :]
            where = m[:, None].to(tl.int64) * N + n[None, :]
            if KEEP:
                tl.store(acc_ptr + s * M * N + where, result, mask=m_ok[:, None] & n_ok[None, :])
            sa = tl.load(scale_a + m * stride_time + s, mask=m_ok, other=0.0)
            ws = tl.load(scale_w + n * S + s, mask=n_ok, other=0.0)
            total += (result.to(tl.float32) * sa[:, None]) * ws[None, :]
            start = end
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n_ok, other=0.0)[None, :]
        out = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


# ---- a random packed layer and its reference -------------------------------------------------------------------------
@dataclass
class Packed:
    """A packed linear layer as the kernel gets it, with the codes it was made from."""

    bits: int
    segments: tuple[int, ...]
    codes: Tensor  # uint8 [N, C]
    data: Tensor  # uint8 [N, row_bytes]
    zero_w: Tensor  # uint8 [N, S]
    scale_w: Tensor  # float32 [N, S]
    sum_w: Tensor  # int32 [N, S], made once at load
    ends: Tensor  # int32 [S], segment ends in packed codes (on the CPU)
    bias: Tensor

    @property
    def length(self) -> int:
        """Codes in a row, padding included."""
        return packing.row_length(self.segments, (1, 1))


def make_layer(n: int, segments: tuple[int, ...], bits: int, seed: int, device: str) -> Packed:
    """A layer of random codes; 8-bit grids are symmetric, lower ones have any zero-point, rows may be flat."""
    g = torch.Generator().manual_seed(seed)
    top, count = 2**bits, len(segments)
    codes = torch.randint(0, top, (n, sum(segments)), generator=g, dtype=torch.uint8)
    codes[0] = top - 1
    zero = torch.randint(0, top, (n, count), generator=g, dtype=torch.uint8)
    zero = torch.full_like(zero, 128) if bits == 8 else zero
    scale = torch.rand((n, count), generator=g) * 0.02 + 1e-4
    rows = packing.weight_rows(codes.reshape(n, -1, 1, 1), segments, zero)
    wide = packing.padded(segments)
    values = [c.long() - z[:, None].long() for c, z in zip(codes.split(segments, 1), zero.unbind(1), strict=True)]
    sums = torch.stack([v.sum(1) for v in values], dim=1).int()
    ends = torch.tensor(wide).cumsum(0).int()
    tensors = (codes, packing.pack(rows, bits), zero, scale, sums)
    bias = torch.randn(n, generator=g).to(device)
    return Packed(bits, segments, *(t.to(device).contiguous() for t in tensors), ends, bias)


def make_input(m: int, layer: Packed, seed: int, per_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes uint8 [M, C], zero_a uint8 [M or 1, S], scale_a float32 [M or 1, S], int8 [M, K] as a kernel reads it)."""
    g = torch.Generator().manual_seed(seed + 1)
    device, rows = layer.data.device, m if per_token else 1
    codes = torch.randint(0, 256, (m, sum(layer.segments)), generator=g, dtype=torch.uint8)
    if m:
        codes[0] = 255
    zero = torch.randint(0, 256, (rows, len(layer.segments)), generator=g, dtype=torch.uint8)
    scale = torch.rand((rows, len(layer.segments)), generator=g) * 0.05 + 1e-4
    parts = []
    for part, wide in zip(codes.split(layer.segments, 1), packing.padded(layer.segments), strict=True):
        parts.append(torch.nn.functional.pad((part.int() - 128).to(torch.int8), (0, wide - part.shape[1]), value=77))
    return codes.to(device), zero.to(device), scale.to(device), torch.cat(parts, 1).to(device).contiguous()


def reference(layer: Packed, codes: Tensor, zero_a: Tensor) -> Tensor:
    """Accumulators int64 [S, M, N] from the codes themselves (not from the packed bytes), on the CPU."""
    out = []
    a, w = codes.cpu().split(layer.segments, 1), layer.codes.cpu().split(layer.segments, 1)
    for s in range(len(layer.segments)):
        left = a[s].double() - zero_a.cpu()[:, s : s + 1].double()
        right = w[s].double() - layer.zero_w.cpu()[:, s : s + 1].double()
        out.append((left @ right.T).long())  # integers below 2**53: exact in float64
    return torch.stack(out)


def exact_output(layer: Packed, acc: Tensor, scale_a: Tensor) -> tuple[Tensor, Tensor]:
    """(y in float64, bound on the float32 epilogue's error): (S + 4) u (sum |acc scale scale| + |bias|) + half ulp."""
    y, size = layer.bias.cpu().double().expand(acc.shape[1:]).clone(), layer.bias.cpu().double().abs()
    for s in range(acc.shape[0]):
        part = acc[s].double() * scale_a.cpu()[:, s : s + 1].double() * layer.scale_w.cpu()[:, s].double()
        y, size = y + part, size + part.abs()
    return y, (acc.shape[0] + 4) * 2.0**-24 * size + y.abs() * 2.0**-24 + 2.0**-149


def cpu_path(layer: Packed, wide: Tensor, zero_a: Tensor) -> Tensor:
    """The kernel's integer arithmetic in plain torch, from the packed bytes: int64 accumulators [S, M, N]."""
    rows = packing.unpack(layer.data, layer.bits, layer.length)
    out, start = [], 0
    for s, end in enumerate(layer.ends.tolist()):
        w = rows[:, start:end].double() - layer.zero_w[:, s : s + 1].double()
        acc = wide[:, start:end].double() @ w.T
        out.append((acc + (128 - zero_a[:, s : s + 1].double()) * layer.sum_w[:, s].double()).long())
        start = end
    return torch.stack(out)


@dataclass(frozen=True)
class Config:
    """How the kernel is cut: tile sizes, warps, pipeline stages, unpacking by join or by shift, operand order."""

    bm: int = 64
    bn: int = 64
    bk: int = 64
    warps: int = 4
    stages: int = 3
    join: bool = True
    swap: bool = False


def launch(
    layer: Packed, wide: Tensor, zero_a: Tensor, scale_a: Tensor, config: Config, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel: (y [M, N], accumulators int32 [S, M, N], empty unless ``keep``)."""
    m, n, count = wide.shape[0], layer.data.shape[0], len(layer.segments)
    y = torch.empty((m, n), dtype=dtype, device=wide.device)
    acc = torch.empty((count, m, n) if keep else (1,), dtype=torch.int32, device=wide.device)
    ends = [*layer.ends.tolist(), 0, 0]
    grid = (triton.cdiv(n, config.bn), triton.cdiv(m, config.bm))
    _product[grid](
        wide, layer.data, layer.zero_w, layer.scale_w, layer.sum_w, zero_a, scale_a, layer.bias, y, acc,
        m, n, wide.stride(0), layer.data.stride(0), count if zero_a.shape[0] > 1 else 0,
        LENGTH=layer.length, BITS=layer.bits, S=count, E0=ends[0], E1=ends[1], E2=ends[2],
        BM=config.bm, BN=config.bn, BK=config.bk, JOIN=config.join, SWAP=config.swap, KEEP=keep, HAS_BIAS=True,
        num_warps=config.warps, num_stages=config.stages,
    )
    return y, acc


# ---- checks ----------------------------------------------------------------------------------------------------------
Case = tuple[int, int, tuple[int, ...], int, bool]  # (M, N, segments, bits, scales a token)


def cases(small: bool) -> list[Case]:
    """Shapes to check: 4, 3, 8 bits and the other widths; one, two, three segments; ragged channels; M from 1."""
    out: list[Case] = []
    for bits in (4, 3, 8):
        for segments in ((64,), (40, 24), (70,), (320, 160) if not small else (96, 33)):
            for m, n in ((1, 24), (17, 40)) if small else ((1, 64), (7, 320), (77, 640), (300, 100), (4096, 640)):
                out.append((m, n, segments, bits, False))
    out += [(33, 40, (40, 24), bits, True) for bits in range(1, 9)]
    out += [(5, 17, (1,), 4, False), (3, 5, (33, 1, 31), 3, True)]
    if not small:
        out += [(4096, 640, (640,), bits, True) for bits in (3, 4, 8)] + [(256, 320, (2880 * 8,), 8, False)]
    return out


def check(case: Case, config: Config | None, device: str, seed: int) -> dict[str, Any]:
    """One comparison; ``config`` None checks the plain torch form of the same arithmetic."""
    m, n, segments, bits, per_token = case
    layer = make_layer(n, segments, bits, seed, device)
    codes, zero_a, scale_a, wide = make_input(m, layer, seed, per_token)
    want = reference(layer, codes, zero_a)
    y64, bound = exact_output(layer, want, scale_a)
    if config is None:
        acc = cpu_path(layer, wide.cpu(), zero_a.cpu()).int()
        y = layer.bias + sum((acc[s].float() * scale_a[:, s : s + 1]) * layer.scale_w[:, s] for s in range(len(acc)))
    else:
        y, acc = launch(layer, wide, zero_a, scale_a, config, torch.float32, keep=True)
    equal = int((acc.cpu().long() == want).sum())
    ratio = float(((y.cpu().double() - y64).abs() / bound).max())
    return {
        "m": m, "n": n, "segments": list(segments), "bits": bits, "per_token": per_token,
        "config": None if config is None else vars(config), "equal": equal, "total": want.numel(),
        "max_error_over_bound": ratio, "largest": int(want.abs().max()),
        "ok": equal == want.numel() and ratio <= 1.0,
    }


# ---- times -----------------------------------------------------------------------------------------------------------
CONFIGS = [
    Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 64, 128, 4, 4), Config(64, 128, 128, 8, 3),
    Config(128, 128, 128, 8, 3), Config(16, 64, 128, 4, 4), Config(32, 64, 128, 4, 4),
]
SIZES = [(4096, 640, 640), (64, 1280, 1280), (4096, 320, 320), (1024, 1280, 1280), (4096, 320, 2880), (1, 1280, 320)]


def _variants(full: bool) -> list[Config]:
    base = CONFIGS if full else CONFIGS[1:6]
    out = []
    for config in base:
        for join, swap in ((True, False), (False, False), (True, True), (False, True)):
            out.append(Config(config.bm, config.bn, config.bk, config.warps, config.stages, join, swap))
    return out


def measure(size: tuple[int, int, int], bits: int, configs: list[Config], device: str) -> dict[str, Any]:
    """Median microseconds of the best configuration against bf16 and torch._int_mm of the same shape."""
    m, n, k = size
    layer = make_layer(n, (k,), bits, 0, device)
    _, zero_a, scale_a, wide = make_input(m, layer, 0, False)
    times: dict[str, float] = {}
    for config in configs:
        if config.bm > 4 * max(m, 16):
            continue
        try:
            times[str(vars(config))] = _median(
                lambda c=config: launch(layer, wide, zero_a, scale_a, c, torch.bfloat16, keep=False)
            )
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            times[f"failed: {vars(config)}: {type(error).__name__}"] = float("inf")
    best = min(times, key=lambda key: times[key])
    a16, w16 = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    row = {"m": m, "n": n, "k": k, "bits": bits, "us": times[best], "config": best,
           "bf16_us": _median(lambda: a16 @ w16.T), "ran": len(times)}
    if m > 16:
        w8 = torch.randint(-128, 127, (n, k), device=device, dtype=torch.int8)
        row["int_mm_us"] = _median(lambda: torch._int_mm(wide[:, :k].contiguous(), w8.T))
    row["all"] = {key: value for key, value in sorted(times.items(), key=lambda kv: kv[1]) if value != float("inf")}
    return row


def _median(function: Any) -> float:
    return 1000.0 * float(triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median"))


def best_config(rows: list[dict[str, Any]], configs: list[Config]) -> list[Config]:
    """The configurations that were among the three fastest somewhere: what the other bit widths are timed with."""
    keep = {key for row in rows for key in list(row["all"])[:4]}
    return [c for c in configs if str(vars(c)) in keep]


# ---- command line ----------------------------------------------------------------------------------------------------
def main() -> int:
    """Run the checks, then the times; the short table comes last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="CPU reference parts only, no Triton")
    parser.add_argument("--full", action="store_true", help="time every configuration (more compiling)")
    parser.add_argument("--no-times", action="store_true", help="checks only")
    args = parser.parse_args()
    began = time.time()
    gpu = triton is not None and not args.smoke and (INTERPRET or torch.cuda.is_available())
    if not gpu and not args.smoke:
        print("no CUDA device with Triton here: only --smoke runs")
        return 3
    device = "cuda" if gpu and not INTERPRET else "cpu"
    checks = [check(case, None, "cpu", i) for i, case in enumerate(cases(small=True))]
    rows: list[dict[str, Any]] = []
    if gpu:
        tried = [Config(), Config(join=False)] + [Config(16, 64, 128, 4, 3, j, True) for j in (True, False)]
        two = tried[:1] + tried[3:]
        todo = [(case, c) for case in cases(small=INTERPRET) for c in (tried if case[0] == 77 else two)]
        for i, (case, config) in enumerate(todo):
            checks.append(check(case, config, device, i))
            if not checks[-1]["ok"]:
                print("FAILED", json.dumps(checks[-1]))
        report(checks, rows, device, began)  # so that nothing is lost if the times are cut off
    if gpu and not INTERPRET and not args.no_times:
        every = _variants(args.full)
        for bits in (4, 3, 8):
            for i, size in enumerate(SIZES if bits == 4 else SIZES[:4]):
                tune = args.full or (bits == 4 and i < 2)  # the others are timed with what was fast there
                rows.append(measure(size, bits, every if tune else best_config(rows[:2], every), device))
                print(f"  timed {bits} bit {size}, {time.time() - began:.0f} s", flush=True)
                report(checks, rows, device, began, quiet=True)
    return report(checks, rows, device, began)


def report(
    checks: list[dict[str, Any]], rows: list[dict[str, Any]], device: str, began: float, quiet: bool = False
) -> int:
    """Write the JSON and print the table; 0 when every check held."""
    bad = [c for c in checks if not c["ok"]]
    result = {
        "checks": len(checks), "failed": bad, "accumulators_equal": sum(c["equal"] for c in checks),
        "accumulators": sum(c["total"] for c in checks), "times": rows, "seconds": round(time.time() - began, 1),
        "max_error_over_bound": max(c["max_error_over_bound"] for c in checks),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (interpreter)" if INTERPRET else "cpu",
        "versions": {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)},
        "by_bits": {b: sum(c["bits"] == b for c in checks) for b in range(1, 9)},
    }
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "spike")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "triton_packed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if quiet:
        return 0
    head = f"{'M':>6} {'N':>5} {'K':>5} bits {'packed us':>10} {'bf16 us':>8} {'int_mm us':>9} {'bf16/packed':>11}"
    print(f"\n{head} best")
    for r in rows:
        ratio = r["bf16_us"] / r["us"]
        print(f"{r['m']:>6} {r['n']:>5} {r['k']:>5} {r['bits']:>4} {r['us']:>10.1f} {r['bf16_us']:>8.1f} "
              f"{r.get('int_mm_us', float('nan')):>9.1f} {ratio:>11.2f} {r['config']}")
    if rows:
        print(f"median bf16 / packed: {statistics.median(r['bf16_us'] / r['us'] for r in rows):.2f}")
    print(f"{result['device']}: {len(checks) - len(bad)} of {len(checks)} checks hold; accumulators equal "
          f"{result['accumulators_equal']} of {result['accumulators']}; largest error / bound "
          f"{result['max_error_over_bound']:.3f}; {result['seconds']} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
