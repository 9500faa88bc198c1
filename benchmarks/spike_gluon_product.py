"""Spike: an int8 product whose int32 sums stay in flight (`spike_gluon_kernel.py`, in Gluon), beside bitbrush's own.

    PYTHONPATH=src python benchmarks/spike_gluon_product.py --out gluon.json --budget 240    # an H100 or H200
    python benchmarks/spike_gluon_product.py --smoke                                         # compiles all, no GPU

It answers one question: what would the product gain from copies and multiplications that overlap as Triton's own
pipeliner does not let them with int32 sums?

All is built first. Then a ladder of small problems, a process each, tells what works: every step adds one thing, and of
one that hangs it is known how far the producer and each consumer came. What passed is timed at each shape, beside
bitbrush's product, bf16 and `torch._int_mm`. A process that is late is killed, but not while it compiles: it says
`built`, `launched` and `done`, and LIMIT holds from `built` on. All int32 sums and outputs are compared with float64's.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import spike_gluon_kernel as kernel
import torch
import triton
from torch import Tensor
from tune_int8 import graph_time

LIMIT, PATIENCE = 10.0, 90.0
"""Seconds between two lines of a process: from `built` on, and before (it starts, compiles)."""
SHAPES = (
    (2048, 10240, 1280), (2048, 1280, 1280), (2048, 1280, 5120), (8192, 5120, 640), (8192, 640, 640),
    (8192, 640, 2560), (4608, 12288, 3072), (4608, 3072, 3072), (4608, 3072, 15360), (1000, 1296, 656),
)  # fmt: skip
"""Of SDXL, of a DiT with 3072 channels, and one that no tile divides."""
GROUPED = ("c2_128x256", "c2_128x160", "c2_256x160", "pp_128x160")
BYNAME = {variant.name: variant for variant in kernel.VARIANTS}


@dataclass(frozen=True)
class Item:
    """Something to run: a variant, or what it is compared with (bf16, int_mm, bitbrush and the number of a cut).

    Args:
        programs: At most, where not as many as the GPU has processors.
        step: Of the ladder.
    """

    what: str
    shape: tuple[int, int, int]
    group: int = 0
    programs: int = 0
    multiply: bool = True
    step: str = ""

    @property
    def key(self) -> str:
        """In the results."""
        return self.what + (f"/g{self.group}" if self.group else "")


_ONE = BYNAME["c1_64x128_x2"]
LADDER = (
    Item("c1_64x128_x2", (64, 128, 128 * _ONE.stages), 0, 1, False, "a: copies fill every slot once, one tile"),
    Item("c1_64x128_x2", (64, 128, 128 * 11), 0, 1, False, "a2: copies, slots in use more than once"),
    Item("c1_64x128_x2", (64, 128, 128), 0, 1, True, "b: multiplied, one step"),
    Item("c1_64x128_x2", (64, 128, 1280), 0, 1, True, "c: many steps"),
    Item("c1_64x128_x2", (400, 400, 1296), 0, 3, True, "d: many tiles a program, ragged"),
    Item("c1_128x128_x2", (400, 400, 1296), 0, 3, True, "d2: two products of 64 rows, two programs a processor"),
    Item("c1_64x256", (400, 600, 1296), 0, 3, True, "d3: 256 columns"),
    Item("c2_128x128", (400, 400, 1296), 0, 3, True, "e: two consumers"),
    Item("c2_128x160", (400, 400, 1296), 0, 3, True, "e2: columns in two parts"),
    Item("pp_128x128", (400, 400, 1296), 0, 3, True, "f: ping-pong"),
    Item("pp_128x160", (400, 400, 1296), 0, 3, True, "f2: ping-pong, columns in two parts"),
)
"""A variant is timed if the steps of its first two letters passed."""


def cuts() -> tuple[Any, ...]:
    """Of bitbrush's product: those that `tuning` times."""
    from bitbrush.kernels.tuning import CANDIDATES

    return CANDIDATES


def timings() -> list[Item]:
    """What is timed, shape after shape."""
    plain = ["bf16", "int_mm", *(f"bitbrush{i}" for i in range(len(cuts()))), *BYNAME]
    found = [Item(what, shape) for shape in SHAPES for what in plain]
    return found + [Item(what, shape, group) for shape in SHAPES[:-1] for what in GROUPED for group in (2, 4, 16)]


# ---- in a process of its own, on the GPU -----------------------------------------------------------------------------
def operands(m: int, n: int, k: int) -> dict[str, Tensor]:
    """Codes, tables, and what the sums and the output are by the definition."""
    torch.manual_seed(m + n + k)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    return {
        "a": a, "w": w, "bias": torch.randn(n, device="cuda"), "scale_a": torch.full((1, 1), 0.01, device="cuda"),
        "zero_a": torch.full((1, 1), 117, dtype=torch.uint8, device="cuda"),
        "times": torch.zeros(1, dtype=torch.int64, device="cuda"),
        "scale_w": torch.rand(n, 1, device="cuda") * 0.001 + 0.0001, "sum_w": w.sum(1, dtype=torch.int32)[None],
    }  # fmt: skip


def expected(given: dict[str, Tensor], multiply: bool = True) -> tuple[Tensor, Tensor]:
    """Sums int32 [M, N] and output bfloat16. Not multiplied: the rows' sums instead (the ladder's first step)."""
    a, w = given["a"], given["w"]
    if multiply:
        plain = (a.double() @ w.double().t()).to(torch.int32)
    else:
        plain = a.sum(1, dtype=torch.int32)[:, None] + given["sum_w"]
    sums = plain + (128 - int(given["zero_a"][0, 0])) * given["sum_w"]
    return sums, (sums.float() * given["scale_a"] * given["scale_w"].t() + given["bias"]).to(torch.bfloat16)


def launch(item: Item, given: dict[str, Tensor], y: Tensor, acc: Tensor | None = None, trace: Tensor | None = None,
           warm: bool = False) -> None:
    """A variant's product into y, its sums into acc. trace: int32 [programs, 4] in pinned memory, how far each came."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    variant, a, w = BYNAME[item.what], given["a"], given["w"]
    (m, k), n = a.shape, w.shape[0]
    constants = variant.constants(keep=acc is not None, multiply=item.multiply, trace=trace is not None)

    def described(tensor: Tensor, rows: int, columns: int) -> Any:
        size = tensor.element_size()
        return TensorDescriptor.from_tensor(tensor, [rows, columns], kernel.shared(8 * size, size * columns))

    args = (
        described(a, variant.bmc, 128), described(w, variant.bn1, 128), described(w, variant.bn2 or variant.bn1, 128),
        described(y, variant.bmc, constants["CH1"]), described(y, variant.bmc, constants["CH2"]), y,
        y if acc is None else acc, given["bias"], y, given["scale_a"], given["zero_a"], given["times"],
        given["scale_w"], given["sum_w"], y if trace is None else trace, m, n, k, item.group or variant.group,
    )  # fmt: skip
    tiles = -(-m // variant.bm) * -(-n // variant.bn)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    grid = (min(tiles, item.programs or processors * variant.together),)
    if warm:
        kernel.product.warmup(*args, grid=grid, **constants, **kernel.options(variant))
    else:
        kernel.product[grid](*args, **constants, **kernel.options(variant))


def ours(given: dict[str, Tensor], config: Any) -> Tensor:
    """bitbrush's product."""
    from bitbrush.kernels import triton_int8 as i8

    tables = i8.Tables(given["scale_a"], given["zero_a"], given["times"], i8.ONE_ROW, given["scale_w"], given["sum_w"])
    return i8.product(given["a"], given["w"], tables, (given["a"].shape[1],), torch.bfloat16, config=config,
                      extra=i8.Extra(bias=given["bias"]))


def _difference(found: Tensor, wanted: Tensor) -> str:
    wrong = found != wanted
    if not wrong.any():
        return "equal"
    return f"{int(wrong.sum())} of {wrong.numel()} differ, first {wrong.nonzero()[0].tolist()}"


def ladder_step(item: Item, say: Callable[..., None]) -> None:
    """One launch, waited for no longer than the parent waits; if it does not end, how far each partition came."""
    given = operands(*item.shape)
    m, n, _ = item.shape
    sums, output = expected(given, item.multiply)
    y = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    acc = torch.full((m, n), -7, dtype=torch.int32, device="cuda")
    trace = torch.zeros(item.programs, 4, dtype=torch.int32).pin_memory()
    launch(item, given, y, acc, trace, warm=True)
    torch.cuda.synchronize()
    say(state="built")
    ended = torch.cuda.Event()
    launch(item, given, y, acc, trace)
    ended.record()
    say(state="launched")
    begin = time.time()
    while not ended.query() and time.time() - begin < 0.5 * LIMIT:
        time.sleep(0.01)
    done = ended.query()
    came = {"steps of producer, first and second consumer": trace[:, :3].tolist()}
    if not done:
        say(state="hung", **came)
        os._exit(3)
    say(state="done", sums=_difference(acc, sums), output=_difference(y, output), **came)


def timing(item: Item, given: dict[str, Tensor], wanted: tuple[Tensor, Tensor], say: Callable[..., None]) -> None:
    """One comparison or variant at one shape."""
    (m, n, k), checks = item.shape, {}
    if item.what == "bf16":
        x, weight = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
        run: Callable[[], Any] = partial(torch.nn.functional.linear, x, weight, given["bias"].to(torch.bfloat16))
    elif item.what == "int_mm":
        run = partial(torch._int_mm, given["a"], given["w"].t())
        centred = run() + (128 - int(given["zero_a"][0, 0])) * given["sum_w"]
        checks = {"sums": _difference(centred, wanted[0])}
    elif item.what.startswith("bitbrush"):
        run = partial(ours, given, cuts()[int(item.what[8:])])
        checks = {"output": _difference(run(), wanted[1])}
    else:
        y = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        acc = torch.full((m, n), -7, dtype=torch.int32, device="cuda")
        run = partial(launch, item, given, y)
        for keep in (None, acc):
            launch(item, given, y, keep, warm=True)
        torch.cuda.synchronize()
        say(state="built")
        launch(item, given, y, acc)
        say(state="launched")
        checks = {"sums": _difference(acc, wanted[0])}
        y.fill_(float("nan"))
        run()
        checks["output"] = _difference(y, wanted[1])
    torch.cuda.synchronize()
    say(state="built")
    us = graph_time(run, "cuda")
    if item.what in BYNAME:  # once more, after all those launches
        checks["again"] = _difference(y, wanted[1])
    say(state="done", us=us, **checks)


def child(items: list[Item]) -> None:
    """The items one after the other, a line of JSON for each thing that happens."""
    at: tuple[int, int, int] | None = None
    given: dict[str, Tensor] = {}
    wanted: tuple[Tensor, Tensor] | None = None
    for number, item in enumerate(items):

        def say(number: int = number, **what: Any) -> None:
            print(json.dumps({"item": number, **what}), flush=True)

        say(state="begun")
        try:
            if item.step:
                ladder_step(item, say)
                continue
            if at != item.shape:
                given, wanted = {}, None
                torch.cuda.empty_cache()
                at, given = item.shape, operands(*item.shape)
                wanted = expected(given)
            timing(item, given, wanted, say)
        except Exception as error:  # noqa: BLE001 - what fails is a result, and the next item may work
            say(state="failed", error=f"{type(error).__name__}: {str(error)[-400:]}")
            try:
                torch.cuda.synchronize()
            except Exception:  # noqa: BLE001 - the context is lost
                os._exit(3)


def built(part: int, parts: int) -> None:
    """Build a share of what runs; Triton keeps it on disk."""
    given = operands(256, 512, 256)
    y = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda")
    acc = torch.empty(256, 512, dtype=torch.int32, device="cuda")
    trace = torch.zeros(1, 4, dtype=torch.int32).pin_memory()
    first = Item("", (256, 512, 256))
    todo = {(item.what, item.multiply): partial(launch, item, given, y, acc, trace, True) for item in LADDER}
    todo |= {(name, keep): partial(launch, replace(first, what=name), given, y, keep, None, True)
             for name in BYNAME for keep in (None, acc)}  # fmt: skip
    todo |= {("bitbrush", i): partial(ours, given, config) for i, config in enumerate(cuts())}
    for name, run in list(todo.items())[part::parts]:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - said again by the item that needs it
            print(f"not built: {name[0]}: {type(error).__name__}: {str(error)[-300:]}", flush=True)


# ---- the parent ------------------------------------------------------------------------------------------------------
def myself(*args: str, **how: Any) -> subprocess.Popen[str]:
    """This script in a process of its own."""
    return subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *args], text=True, **how)


def lines(process: subprocess.Popen[str], until: float) -> Iterator[dict[str, Any]]:
    """What a child says; it is killed when it is late, and the last line then tells: {"state": "late" or "died"}."""
    said: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in process.stdout or ():
            said.put(line)
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    building = True
    while True:
        patience = PATIENCE if building else LIMIT
        try:
            line = said.get(timeout=max(0.1, min(patience, until - time.time())))
        except queue.Empty:
            process.kill()
            yield {"state": "late" if time.time() < until else "budget"}
            break
        if line is None:
            try:
                ended = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                ended = None
            yield {"state": "ended" if ended == 0 else f"died ({ended})"}
            break
        if line.startswith("{"):
            found = json.loads(line)
            building = found["state"] not in ("built", "launched", "hung")
            yield found
        else:
            print(line, end="", flush=True)


def run_all(items: list[Item], until: float, note: Callable[[Item, dict[str, Any]], None], alone: bool) -> None:
    """All items, in as few processes as possible or one each. A variant that hung or died is left out after that."""
    todo = list(items)
    while todo and time.time() < until:
        batch = todo[:1] if alone else todo
        process = myself("--child", json.dumps([asdict(item) for item in batch]), stdout=subprocess.PIPE)
        number, state, lost = 0, "started", False
        for found in lines(process, until):
            if "item" in found:
                number, state = found.pop("item"), found["state"]
                if state in ("done", "failed", "hung"):
                    note(batch[number], found)
            elif found["state"] not in ("ended", "budget"):
                lost = True
                if state not in ("done", "failed", "hung"):
                    note(batch[number], {"state": f"{found['state']} after {state}"})
        todo = todo[number + 1:]
        if lost and not alone:
            todo = [item for item in todo if item.what != batch[number].what]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Times beside bf16's and bitbrush's."""
    for shape, found in results.items():
        us = {what: one["us"] for what, one in found.items() if "us" in one}
        best = min((t for what, t in us.items() if what.startswith("bitbrush")), default=float("nan"))
        bf16 = us.get("bf16", float("nan"))
        print(f"{shape}: bf16 {bf16:.1f} us, int_mm {us.get('int_mm', float('nan')):.1f}, bitbrush {best:.1f}")
        for what, one in sorted(found.items(), key=lambda pair: pair[1].get("us", 1e9)):
            if what.split("/")[0] in BYNAME:
                rest = {name: value for name, value in one.items() if name not in ("us", "state") and value != "equal"}
                t = one.get("us", float("nan"))
                print(f"   {what:20} {t:8.1f} us  {bf16 / t:5.2f} x bf16  {best / t:5.2f} x bitbrush  "
                      f"{one['state']} {rest or ''}")


def on_gpu(out: Path, budget: float) -> None:
    """Build, ladder, timings; JSON after every item."""
    begin = time.time()
    until = begin + budget - 3
    found: dict[str, Any] = {"triton": triton.__version__, "gpu": torch.cuda.get_device_name(),
                             "ladder": {}, "results": {}}  # fmt: skip
    parts = max(2, min(12, (os.cpu_count() or 4) - 2))
    makers = [myself("--built", f"{i}/{parts}") for i in range(parts)]
    for maker in makers:
        try:
            maker.wait(timeout=max(1.0, begin + 0.5 * budget - time.time()))
        except subprocess.TimeoutExpired:
            maker.kill()
    print(f"built in {time.time() - begin:.0f} s", flush=True)

    def note(item: Item, what: dict[str, Any]) -> None:
        if item.step:
            found["ladder"][item.step] = {"variant": item.what, **what}
            print(f"{item.step} ({item.what}): {what}", flush=True)
        else:
            found["results"].setdefault("x".join(map(str, item.shape)), {})[item.key] = what
        out.write_text(json.dumps(found, indent=1))

    run_all(list(LADDER), until, note, alone=True)
    passed = {step for step, what in found["ladder"].items() if what.get("sums") == what.get("output") == "equal"}
    kinds = {kind for kind in ("c1", "c2", "pp")
             if all(item.step in passed for item in LADDER if item.what.startswith(kind))}  # fmt: skip
    print(f"{len(passed)} of {len(LADDER)} steps passed; timed: {sorted(kinds) or 'no variant'}", flush=True)
    run_all([item for item in timings() if item.what not in BYNAME or item.what[:2] in kinds], until, note, alone=False)
    table(found["results"])
    print(f"{time.time() - begin:.0f} s")


def smoke() -> int:
    """Compile all for compute capability 9.0: how many fail, spill (but for the ladder's) or wait between products."""
    print("Triton", triton.__version__)
    wrong = 0
    jobs = {(name, keep, True, False) for name in BYNAME for keep in (False, True)}
    jobs |= {(item.what, True, item.multiply, True) for item in LADDER}
    for name, keep, multiply, trace in sorted(jobs):
        try:
            made = kernel.evidence(BYNAME[name], keep=keep, multiply=multiply, trace=trace)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises
            made = {"error": f"{type(error).__name__}: {str(error)[-300:]}"}
        wrong += "error" in made or made["serialised"] or bool(made["spilled"] and not trace)
        how = " ".join(word for word, on in (("sums", keep), ("copies", not multiply), ("trace", trace)) if on)
        made.pop("ptx", None)
        print(f"{name:16} {how:18} {made}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("spike_gluon_product.json"))
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--built", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.smoke:
        sys.exit(smoke())
    elif asked.child:
        child([Item(**{**item, "shape": tuple(item["shape"])}) for item in asked.child])
    elif asked.built:
        built(*map(int, asked.built.split("/")))
    else:
        on_gpu(asked.out, asked.budget)


if __name__ == "__main__":
    main()
