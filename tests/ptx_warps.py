"""Runs the PTX of a warp-specialised kernel as far as waiting goes: a lane of every warp, in a random order of events.

Numbers that decide nothing (sums, values, tables) are unknown; what is kept is control flow, addresses, barriers of
both kinds, registers that warps give and take, copies by the tensor memory accelerator, and which codes every product
reads. So a run shows without a GPU whether the warps come to an end, whether a slot is read before it is full or
written before it is free, and which products and stores there were.
"""

from __future__ import annotations

import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

LABEL, NAMES = re.compile(r"\s*([$\w]+):\s*"), re.compile(r"%[\w.]+|[$\w]+(?:\+\d+)?|-?\d+")
WIDTHS = {"b64": 64, "u64": 64, "s64": 64, "b32": 32, "u32": 32, "s32": 32, "b16": 16, "u16": 16, "pred": 1, "b8": 8}
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge}  # fmt: skip


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "mul": operator.mul, "mad": lambda a, b, c: a * b + c, "min": min, "max": max, "div": _truncated,
    "rem": lambda a, b: a - b * _truncated(a, b), "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
    "bfe": lambda a, b, c: a >> b & ((1 << c) - 1), "mov": lambda a: a, "cvt": lambda a: a, "neg": operator.neg,
    "not": operator.invert, "selp": lambda a, b, c: a if c else b,
}  # fmt: skip


class Deadlock(AssertionError):
    """No warp can go on."""


class Kernel:
    """The statements of one entry. `numbers`: its scalar arguments in order."""

    def __init__(self, ptx: str) -> None:
        head, body = re.split(r"^\{$", ptx[ptx.index(".entry"):], maxsplit=1, flags=re.M)
        parameters = re.findall(r"\.param (.*?) ?(\w+)(?:\[\d+\])?,?$", head, flags=re.M)
        first = next(i for i, (kind, _) in enumerate(parameters) if ".ptr" in kind)
        self.numbers = [name for kind, name in parameters[first:] if kind == ".u32"]
        self.threads, self.registers = (int(re.search(rf"\.{word} (\d+)", head)[1]) for word in ("reqntid", "maxnreg"))
        self.code: list[tuple[str, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        text = "\n".join(line for line in lines if line not in ("{", "}") and not line.startswith((".loc", ".section")))
        for statement in text.split(";"):
            while found := LABEL.match(statement):
                self.labels[found[1]] = len(self.code)
                statement = statement[found.end():]
            guard, word, rest = re.match(r"\s*(@!?\S+)?\s*(\S*)\s*(.*)", statement, flags=re.S).groups()
            if word and not word.startswith((".reg", ".file", "}")) and (guard or "")[2:] != "complete":
                self.code.append((guard or "", word, NAMES.findall(rest)))


class Program:
    """One program of a grid. sizes: of the n-th descriptor's box in bytes, to copy by; stored: the same, to store."""

    def __init__(self, kernel: Kernel, numbers: list[int], at: int, of: int, sizes: list[int], seed: int) -> None:
        self.kernel, self.random, self.sizes = kernel, random.Random(seed), sizes
        self.arguments = dict(zip(kernel.numbers, numbers, strict=True))
        self.special = {"%ctaid.x": at, "%nctaid.x": of, "global_smem": 0}
        warps = kernel.threads // 32
        self.values: list[dict[str, Any]] = [{} for _ in range(warps)]
        self.at, self.owned = [0] * warps, [kernel.registers] * warps
        self.blocked: list[Callable[[], bool] | None] = [None] * warps
        self.pool = 0
        self.named: dict[int, list[int]] = {}
        self.barriers: dict[int, list[int]] = {}  # count, pending, bytes to come, phases ended
        self.bytes: dict[int, int] = {}
        self.copies: list[list[Any]] = []  # address, size, descriptor, x, y, whether complete
        self.coming: list[tuple[list[Any], int]] = []
        self.reading: list[list[list[list[Any]]]] = [[[]] for _ in range(warps)]  # groups of copies that products read
        self.storing: list[list[tuple[int, int]]] = [[] for _ in range(warps)]
        self.products: Counter = Counter()
        self.stores: Counter = Counter()

    # ---- what a statement means ----
    def _value(self, warp: int, name: str) -> Any:
        if name.startswith("%"):
            if name == "%tid.x":
                return 32 * warp
            return self.special[name] if name in self.special else self.values[warp].get(name)
        if re.fullmatch(r"-?\d+", name):
            return int(name)
        symbol, _, more = name.partition("+")
        return self.special[symbol] + int(more or 0) if symbol in self.special else name

    def _compute(self, warp: int, word: str, names: list[str]) -> None:
        parts, given = word.split("."), [self._value(warp, name) for name in names[1:]]
        base, kind = parts[0], parts[-1]
        if base == "cvta" or (base == "mov" and isinstance(given[0], str)):
            self.values[warp][names[0]] = given[0]
            return
        if base == "mov" and len(names) > 2:  # halves of a word: values
            self.values[warp].update(dict.fromkeys(name for name in names if name.startswith("%rs")))
            return
        result, bits = None, WIDTHS.get(kind)
        if bits and all(isinstance(v, int) for v in given) and given:
            signed = [_signed(v & ((1 << bits) - 1), bits) if kind[0] == "s" else v & ((1 << bits) - 1) for v in given]
            if base == "selp":
                signed[2] = given[2]
            if base == "setp":
                result = int(COMPARE[parts[1]](*signed[:2]))
            elif base in ARITHMETIC:
                result = ARITHMETIC[base](*signed)
                if "hi" in parts:
                    result >>= bits
                if "wide" in parts:
                    bits *= 2
                elif base == "cvt":
                    bits = WIDTHS[parts[-2]]
                result &= (1 << bits) - 1
        self.values[warp][names[0]] = result

    def _arrive(self, address: int, size: int = 0, count: int = 1) -> None:
        barrier = self.barriers[address]
        barrier[1] -= count
        barrier[2] += size
        assert barrier[1] >= 0, f"more arrivals than {barrier[0]} at {address}"
        if barrier[1] == 0 and barrier[2] == 0:
            barrier[1], barrier[3] = barrier[0], barrier[3] + 1

    def _meet(self, number: int, warps: int) -> Callable[[], bool]:
        state = self.named.setdefault(number, [0, 0])
        state[0] += 1
        mine = state[1]
        if state[0] == warps:
            state[:] = [0, mine + 1]
        return lambda: state[1] > mine

    def _registers(self, warp: int, wanted: int) -> bool:
        if wanted - self.owned[warp] > self.pool:
            return False
        self.pool -= wanted - self.owned[warp]
        self.owned[warp] = wanted
        return True

    def _copy(self, address: int, name: str, x: int, y: int, barrier: int) -> None:
        size = self.sizes[int(name.rsplit("_", 1)[1]) // 5]
        for reader in self.reading:
            for old in (old for group in reader for old, *_ in group):
                assert old[0] >= address + size or old[0] + old[1] <= address, "a slot is written while it is read"
        self.copies = [old for old in self.copies if old[0] >= address + size or old[0] + old[1] <= address]
        self.copies.append([address, size, name, _signed(x, 32), _signed(y, 32), False])
        self.coming.append((self.copies[-1], barrier))

    def _multiply(self, warp: int, shape: str, left: int, right: int) -> None:
        places = []
        for descriptor in (left, right):
            address = (descriptor & 0x3FFF) << 4
            copy = next(c for c in self.copies if c[0] <= address < c[0] + c[1])
            assert copy[5], "a slot is read before it is full"
            self.reading[warp][-1].append([copy])
            places.append((copy[4] + (address - copy[0]) // 128, copy[3] + (address - copy[0]) % 128))
        if warp % 4 == 0:
            assert places[0][1] == places[1][1], "a product of different channels"
            self.products[places[0][0], places[1][0], int(re.search(r"n(\d+)k", shape)[1]), places[0][1]] += 1

    def _asynchronous(self, warp: int, word: str, names: list[str], given: list[Any]) -> None:
        if word.startswith("wgmma.mma_async"):
            self._multiply(warp, word, given[-3], given[-2])
        elif word.startswith("wgmma.commit"):
            self.reading[warp].append([])
        elif word.startswith("wgmma.wait"):
            self.reading[warp] = self.reading[warp][-1 - given[0]:]
        elif word.startswith("cp.async.bulk.tensor.2d.shared"):
            self._copy(given[0], given[1], given[2], given[3], given[4])
        elif word.startswith("cp.async.bulk.tensor.2d.global"):
            self.stores[_signed(given[1], 32), _signed(given[2], 32)] += 1
            self.storing[warp].append((given[3], self.sizes[int(given[0].rsplit("_", 1)[1]) // 5]))
        elif word.startswith("cp.async.bulk.wait_group"):
            self.storing[warp] = self.storing[warp][len(self.storing[warp]) - given[0]:] if given[0] else []
        elif word.startswith("stmatrix"):
            for address, size in (s for mine in self.storing for s in mine):
                assert not address <= given[0] < address + size, "a stage is written while it is stored"

    def _barrier(self, warp: int, word: str, given: list[Any]) -> None:
        if word.startswith("mbarrier.init"):
            self.barriers[given[0]] = [given[1], given[1], 0, 0]
        elif word.startswith("mbarrier.arrive"):
            self._arrive(given[1], *given[2:3])
        elif word.startswith("mbarrier.try_wait"):
            barrier, parity = self.barriers[given[1]], given[2]
            self.blocked[warp] = lambda: barrier[3] & 1 != parity
        elif word in ("bar.sync", "barrier.sync"):
            self.blocked[warp] = self._meet(given[0], given[1] // 32 if len(given) > 1 else len(self.at))
        elif word.startswith("setmaxnreg"):
            self.blocked[warp] = lambda: self._registers(warp, given[0])

    # ---- running ----
    def _step(self, warp: int) -> bool:
        """One statement; False at the end."""
        guard, word, names = self.kernel.code[self.at[warp]]
        self.at[warp] += 1
        values = self.values[warp]
        if guard:
            allowed = values.get(guard.lstrip("@!"))
            if allowed is None and word.startswith(("st.global", "ld.global", "ld.shared", "st.shared")):
                return True
            assert allowed is not None, f"unknown: {guard} {word} {names}"
            if bool(allowed) == guard.startswith("@!"):
                return True
        base = word.split(".")[0]
        if base == "ret":
            return False
        if base == "bra":
            self.at[warp] = self.kernel.labels[names[0]]
        elif base == "brx":
            _, _, targets = self.kernel.code[self.kernel.labels[names[1]]]
            self.at[warp] = self.kernel.labels[targets[values[names[0]]]]
        elif word.startswith("ld.param"):
            values[names[0]] = self.arguments.get(names[1])
        elif base in ("mbarrier", "bar", "barrier", "setmaxnreg") and word != "bar.warp.sync":
            self._barrier(warp, word, [self._value(warp, name) for name in names])
        elif base in ("wgmma", "cp", "stmatrix"):
            self._asynchronous(warp, word, names, [self._value(warp, name) for name in names])
        elif word.startswith("elect"):
            values[names[1]] = 1
        elif word.startswith("shfl.sync.idx"):
            values[names[0]] = self._value(warp, names[1])
        elif word in ("st.shared.b32", "st.shared.v2.b32"):
            for i, number in enumerate(self._value(warp, name) for name in names[-2 if "v2" in word else -1:]):
                if isinstance(number, int):
                    first = self._value(warp, names[0]) + 4 * i
                    self.bytes.update({first + b: number >> 8 * b & 255 for b in range(4)})
        elif word.startswith("ld.shared.b8"):
            more = names[2] if len(names) > 2 else "0"
            values[names[0]] = self.bytes.get(self._value(warp, names[1]) + int(more.lstrip("+")))
        elif base in ARITHMETIC or base in ("setp", "cvta"):
            self._compute(warp, word, names)
        return True

    def run(self, most: int = 5_000_000) -> None:
        """To the end of every warp."""
        live, count = list(range(len(self.at))), 0
        while live:
            ready = [w for w in live if self.blocked[w] is None or self.blocked[w]()]
            for warp in ready:
                self.blocked[warp] = None
            if self.coming and (not ready or self.random.random() < 0.3):
                copy, barrier = self.coming.pop(self.random.randrange(len(self.coming)))
                copy[5] = True
                self._arrive(barrier, -copy[1], 0)
                continue
            if not ready:
                raise Deadlock([" ".join(self.kernel.code[self.at[w] - 1][1:2]) for w in live])
            warp = self.random.choice(ready)
            for _ in range(self.random.choice((3, 30, 300))):
                count += 1
                if not self._step(warp):
                    live.remove(warp)
                    break
                if self.blocked[warp] is not None:
                    if not self.blocked[warp]():
                        break
                    self.blocked[warp] = None
            assert count < most, "no end"
