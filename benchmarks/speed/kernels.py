"""Single operations: convolutions, products, encodes, and whole packed layers; ours beside what a bf16 model runs.

Convolutions: cuDNN in bf16, channels_last, benchmark on, with bias. Products: cuBLAS in bf16 with bias and residual,
eager and compiled, and `torch._int_mm` alone, which gives int32 and no epilogue. Both against one int8 kernel with
scales, zero-points, bias (and residual), bf16 out. Data rotates, so that nothing is found in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush.network import wrap
from bitbrush.numbers.grid import Plan
from speed import models, networks, ours, shapes, timing
from speed.record import Item, Record, told
from speed.shapes import Shape

SMALL_LINEAR, SMALL_CONV = Shape(64, 64, 96), Shape(2 * 8 * 8, 9 * 32, 32, 3, 1, 8, 8, 2)
CONVOLUTIONS, PRODUCTS = 10, 6
NORM_GROUPS = 32


def convolutions(record: Record, device: str, *, smoke: bool) -> None:
    """SDXL's costliest convolutions."""
    torch.backends.cudnn.benchmark = True
    found = [SMALL_CONV] if smoke else shapes.costliest(
        shapes.trace(models.find("sdxl")).counts, convolutions=True, most=CONVOLUTIONS)
    for shape in found:
        record.measure(shape.name, 0 if smoke else 4, lambda shape=shape: convolution(shape, device, smoke=smoke))
    record.finish()


def products(record: Record, device: str, *, smoke: bool) -> None:
    """SDXL's and FLUX's products."""
    found = [SMALL_LINEAR] if smoke else [
        shape for name, most in (("sdxl", PRODUCTS), ("flux", 3))
        for shape in shapes.costliest(shapes.trace(models.find(name)).counts, convolutions=False, most=most, rows=1024)
    ]
    torch._dynamo.config.recompile_limit = 64
    for shape in found:
        record.measure(shape.name, 0 if smoke else 6, lambda shape=shape: product(shape, device, smoke=smoke))
    record.finish()


def convolution(shape: Shape, device: str, *, smoke: bool) -> Item:
    """One convolution in all ways."""
    dtype = torch.float32 if smoke else torch.bfloat16
    count = timing.sets(int(shape.bytes(8, 1)), device)
    bf16 = [_cudnn(shape, device, dtype, seed) for seed in range(count)]
    calls: dict[str, Sequence[Callable[[], Any]]] = {"bf16": bf16}
    return _contest(shape, calls, device, dtype, count, residual=False)


def _cudnn(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> Callable[[], Tensor]:
    drawn = torch.Generator(device).manual_seed(seed)
    size = shape.kernel

    def noise(*sizes: int) -> Tensor:
        made = torch.randn(sizes, device=device, generator=drawn).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made

    x = noise(shape.batch, shape.channels, shape.height, shape.width)
    w, b = noise(shape.outer, shape.channels, size, size) * shape.inner**-0.5, noise(shape.outer)
    return lambda: F.conv2d(x, w, b, shape.stride, size // 2)


def product(shape: Shape, device: str, *, smoke: bool) -> Item:
    """One product in all ways."""
    dtype = torch.float32 if smoke else torch.bfloat16
    count = timing.sets(int(shape.bytes(8, 1, residual=True)), device)

    def plain(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return F.linear(x, w, b) + r

    compiled = torch.compile(plain, dynamic=False, backend="eager" if smoke else "inductor")
    data = [_floats(shape, device, dtype, seed) for seed in range(count)]
    calls: dict[str, Sequence[Callable[[], Any]]] = {
        "bf16": [lambda d=d: plain(*d) for d in data], "bf16, compiled": [lambda d=d: compiled(*d) for d in data],
    }  # fmt: skip
    codes = [_codes(shape, device, seed) for seed in range(count)]
    calls["int_mm"] = [lambda a=a, w=w: torch._int_mm(a, w) for a, w in codes]
    return _contest(shape, calls, device, dtype, count, residual=True)


def _floats(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = torch.Generator(device).manual_seed(seed)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, generator=drawn).to(dtype)

    m, k, n = shape.rows, shape.inner, shape.outer
    return noise(m, k), noise(n, k) * k**-0.5, noise(n), noise(m, n)


def _codes(shape: Shape, device: str, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator(device).manual_seed(seed)
    a, w = (torch.randint(-127, 128, (size, shape.inner), dtype=torch.int8, device=device, generator=drawn)
            for size in (shape.rows, shape.outer))
    return a, w.T


def _contest(
    shape: Shape, calls: dict[str, Sequence[Callable[[], Any]]], device: str, dtype: torch.dtype, count: int, *,
    residual: bool,
) -> Item:
    """Times of what is given and of ours with 8 and 4 bits, errors of ours, and what was counted."""
    reason, errors = ours.available(), {}
    for bits in (8, 4):
        if reason is not None and device == "cuda":
            errors[f"ours, w{bits}"] = reason
            continue
        data = [ours.operands(shape, bits, device, dtype, residual=residual, seed=seed) for seed in range(count)]
        made = [ours.call(one, dtype) for one in data]
        try:
            calls[f"ours, w{bits}"] = made
            off = ours.error(data[0], dtype)
            errors[f"ours, w{bits}"] = off
        except Exception as error:  # noqa: BLE001 - the others are timed without it
            calls.pop(f"ours, w{bits}", None)
            errors[f"ours, w{bits}"] = told(error)
    return {
        "flops": shape.flops, "bytes": {"bf16": shape.bytes(16, 2, residual=residual),
                                        "ours, w8": shape.bytes(8, 1, residual=residual),
                                        "ours, w4": shape.bytes(4, 1, residual=residual)},
        "sets": count, "errors": errors, "times_us": timing.kernels(calls, device),
    }  # fmt: skip


# ---- encodes -----------------------------------------------------------------------------------------------------
def encodes(record: Record, device: str, *, smoke: bool) -> None:
    """Encodes alone, and after a norm or a GEGLU as a compiled model has them and by one kernel, at tensors of SDXL."""
    torch._dynamo.config.recompile_limit = 64
    pictures = (2, 8, 8, 32) if smoke else (2, 128, 128, 320)
    tokens = (2, 16, 64) if smoke else (2, 4096, 640)
    sizes = {"plain": (tokens, pictures), "norm": (tokens, pictures), "gated": (tokens,)}
    if not smoke:
        sizes = {"plain": (tokens, (2, 1024, 1280), (2, 1024, 5120), pictures),
                 "norm": (tokens, (2, 1024, 1280), pictures, (2, 64, 64, 640), (2, 32, 32, 1280)),
                 "gated": ((2, 4096, 2560), (2, 1024, 5120))}  # fmt: skip
    for size in sizes["plain"]:
        record.measure(f"encode {_text(size)}", 0 if smoke else 5, lambda size=size: encode(size, device, smoke=smoke))
    for size in sizes["norm"]:
        kind = "GroupNorm + SiLU" if len(size) == 4 else "LayerNorm"
        record.measure(f"{kind} + encode {_text(size)}", 0 if smoke else 15,
                       lambda size=size: norm_encode(size, device, smoke=smoke))
    for size in sizes["gated"][-1:]:  # queries, keys and values have a scale each
        size = (*size[:-1], size[-1] // 4)
        record.measure(f"LayerNorm + encode for 3 layers {_text(size)}", 0 if smoke else 15,
                       lambda size=size: norm_encode(size, device, consumers=3, smoke=smoke))
    for size in sizes["gated"]:
        record.measure(f"GEGLU and encode {_text(size)}", 0 if smoke else 15,
                       lambda size=size: geglu_encode(size, device, smoke=smoke))
    record.finish()


def _text(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)


def _inputs(size: Sequence[int], device: str, dtype: torch.dtype) -> list[Tensor]:
    numel = 1
    for n in size:
        numel *= n
    made = [torch.randn(size, device=device).to(dtype) for _ in range(timing.sets(3 * numel, device))]
    return [x.permute(0, 3, 1, 2) for x in made] if len(size) == 4 else made


def _frame(size: Sequence[int]) -> list[int]:
    """Of the 3x3 convolution that takes a picture ``[B, H, W, C]``; tokens have none."""
    if len(size) != 4:
        return []
    batch, high, wide, channels = size
    return ours.frame(Shape(batch * high * wide, 9 * channels, channels, 3, 1, high, wide, batch))


def _tables(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(reciprocal of the scale, zero-point, row that is in force) of one tensor's codes."""
    return (torch.full((1, 1), 1 / ours.SCALE, device=device),
            torch.full((1, 1), ours.ZERO, device=device, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.int64, device=device))  # fmt: skip


def encode(size: Sequence[int], device: str, *, smoke: bool) -> Item:
    """The encode alone, by our kernel."""
    dtype, tables, where = torch.float32 if smoke else torch.bfloat16, _tables(device), _frame(size)
    return _encoded({"kernel": lambda x: ours.encode(x, *tables, where)}, _inputs(size, device, dtype), device)


def norm_encode(size: Sequence[int], device: str, *, smoke: bool, consumers: int = 1) -> Item:
    """GroupNorm + SiLU (pictures) or LayerNorm (tokens), then the encode: as a compiled model has them, and as one."""
    dtype = torch.float32 if smoke else torch.bfloat16
    tables = _tables(device)
    inverse, zero = tables[0][0], tables[1][0].float()
    channels, where = size[-1], _frame(size)
    w, b = (torch.randn(channels, device=device).to(dtype) for _ in range(2))

    def written(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return ours.encode_in_graph(F.silu(F.group_norm(x, NORM_GROUPS, w, b)), inverse, zero, where)
        normed = F.layer_norm(x, (channels,), w, b)
        each = [ours.encode_in_graph(normed, inverse / (i + 1), zero, where) for i in range(consumers)]
        return each[0] if consumers == 1 else torch.cat(each)

    def joined(x: Tensor, *, definition: bool = False) -> Tensor:
        return ours.norm_encode(x, w, b, NORM_GROUPS, *tables, where, consumers=consumers, definition=definition)

    compiled = torch.compile(written, dynamic=False, backend="eager" if smoke else "inductor")
    inputs, works = _inputs(size, device, dtype), {"compiled": compiled, "kernel": joined}
    made = _encoded(works, inputs, device, consumers * inputs[0].numel())
    return {**made, **_differing(joined, inputs[0])}


def geglu_encode(size: Sequence[int], device: str, *, smoke: bool) -> Item:
    """GEGLU of tokens with twice the channels that are encoded: as a compiled model has it, and as one."""
    dtype, tables = torch.float32 if smoke else torch.bfloat16, _tables(device)
    inverse, zero = tables[0][0], tables[1][0].float()

    def written(x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return ours.encode_in_graph(hidden * F.gelu(gate), inverse, zero, [])

    def joined(x: Tensor, *, definition: bool = False) -> Tensor:
        return ours.geglu_encode(x, *tables, definition=definition)

    compiled = torch.compile(written, dynamic=False, backend="eager" if smoke else "inductor")
    inputs, works = _inputs((*size[:-1], 2 * size[-1]), device, dtype), {"compiled": compiled, "kernel": joined}
    return {**_encoded(works, inputs, device, inputs[0].numel() // 2), **_differing(joined, inputs[0])}


def _differing(joined: Callable[..., Tensor], x: Tensor) -> Item:
    """Share of the kernel's codes that are not the definition's, and the largest difference."""
    try:
        off = (joined(x).int() - joined(x, definition=True).int()).abs()
    except Exception as error:  # noqa: BLE001 - it is timed all the same
        return {"differing": told(error)}
    return {"differing": {"share": float((off > 0).float().mean()), "most": int(off.max())}}


def _encoded(
    works: dict[str, Callable[[Tensor], Any]], inputs: Sequence[Tensor], device: str, written: int = 0
) -> Item:
    """Times and bytes a second: the input read once, one byte a number written (``written`` numbers, or as many as are
    read); a copy of as many bytes beside them."""
    moved = inputs[0].numel() * inputs[0].element_size() + (written or inputs[0].numel())
    halves = [(torch.empty(moved // 2, dtype=torch.uint8, device=device),
               torch.ones(moved // 2, dtype=torch.uint8, device=device)) for _ in inputs]
    calls: dict[str, Sequence[Callable[[], Any]]] = {"copy": [lambda t=t, s=s: t.copy_(s) for t, s in halves]}
    errors: dict[str, str] = {}
    for name, work in works.items():
        try:
            work(inputs[0])
            calls[name] = [lambda x=x, work=work: work(x) for x in inputs]
        except Exception as error:  # noqa: BLE001 - the others are timed without it
            errors[name] = told(error)
    times = timing.kernels(calls, device)
    return {"bytes": moved, "errors": errors, "times_us": times,
            "rates": {name: moved / time["median"] * 1e6 for name, time in times.items()}}  # fmt: skip


# ---- layers ------------------------------------------------------------------------------------------------------
def layers(record: Record, device: str, *, smoke: bool) -> None:
    """One packed layer in every form, as a model runs it (encode, product, epilogue), at four shapes of SDXL."""
    found = [SMALL_LINEAR, SMALL_CONV]
    if not smoke:
        counts = shapes.trace(models.find("sdxl")).counts
        found = [*shapes.costliest(counts, convolutions=False, most=2, rows=1024),
                 *shapes.costliest(counts, convolutions=True, most=2)]
    for shape in found:
        record.measure(shape.name, 0 if smoke else 10, lambda shape=shape: layer(shape, device, smoke=smoke))
    record.finish()


@torch.no_grad()
def layer(shape: Shape, device: str, *, smoke: bool) -> Item:
    """Times of the bf16 layer and of each form."""
    dtype = torch.float32 if smoke else torch.bfloat16
    torch.backends.cudnn.benchmark = True
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    errors: dict[str, str] = {}
    for name, form in {"bf16": None, **networks.FORMS}.items():
        try:
            made = [_one_layer(shape, form, device, dtype, smoke=smoke) for _ in range(timing.sets(
                int(shape.bytes(16, 2)), device))]
            made[0]()
            calls[name] = made
        except Exception as error:  # noqa: BLE001 - the others are timed without it
            errors[name] = told(error)
    return {"flops": shape.flops, "errors": errors, "times_us": timing.kernels(calls, device)}


class Holder(nn.Module):
    """A network of one layer, whose name lies inside a block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size = shape.kernel
        one = nn.Conv2d(shape.channels, shape.outer, size, shape.stride, size // 2) if size else nn.Linear(
            shape.inner, shape.outer)
        self.blocks = nn.ModuleList([one])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The layer's output; the timestep is for its clock."""
        out: Tensor = self.blocks[0](x)
        return out


def _one_layer(
    shape: Shape, form: networks.Form | None, device: str, dtype: torch.dtype, *, smoke: bool
) -> Callable[[], Tensor]:
    with torch.device("meta"):
        net: nn.Module = Holder(shape).to(dtype)
    if form is not None:
        planned: Plan = networks.plan(form, net)
        wrap.declare(net, planned)
    networks.draw(net, device)
    if form is not None:
        ours.choose(net, device, smoke=smoke)
    size = (shape.batch, shape.channels, shape.height, shape.width) if shape.kernel else (shape.rows, shape.inner)
    x = torch.randn(size, device=device).to(dtype)
    if shape.kernel:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    when = torch.full((1,), networks.TIMESTEPS[12], device=device)
    return lambda: net(x, timestep=when)
