"""Runs the package's Gluon kernels on the CPU, as Gluon itself has no interpreter: their own code, with torch's tensors
for tensors, threads for warpgroups and a condition for every barrier.

What is computed and in which order partitions wait for each other is as on a GPU; how values lie in threads is not.
Products in flight are done when they are waited for and no sooner, from what their slots hold then: a slot that is
given back too early shows in the sums. A barrier that nobody arrives at ends in an error after `PATIENCE` seconds.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0
_HERE = threading.local()


class Value(Tensor):
    """A tensor that is converted to what kernels call a type."""

    def to(self, kind: Any, *rest: Any) -> Any:  # type: ignore[override]
        """The same numbers in a type of torch, or one that a pointer has."""
        return super().to(getattr(kind, "torch", kind), *rest)


def value(of: Any) -> Any:
    """A number or a tensor as kernels have it."""
    made = of if isinstance(of, Tensor) else torch.tensor(of, dtype=torch.int32 if type(of) is int else None)
    return made.as_subclass(Value)


class Pointer:
    """Where numbers of a tensor lie, counted in elements."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.flat, self.at = tensor.view(-1), at
        bits = tensor.element_size() * 8
        kind = SimpleNamespace(torch=tensor.dtype, primitive_bitwidth=bits)
        self.dtype = SimpleNamespace(element_ty=kind)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.at + more)


def _load(where: Pointer, mask: Any = True, other: Any = 0) -> Any:
    at = torch.as_tensor(where.at).long()
    kept = torch.as_tensor(mask).expand(torch.broadcast_shapes(at.shape, torch.as_tensor(mask).shape))
    at = at.expand(kept.shape)
    assert bool(((at >= 0) & (at < where.flat.numel()))[kept].all()), "read outside of a tensor"
    found = where.flat[at.where(kept, torch.zeros_like(at))]
    return value(found.where(kept, torch.full_like(found, other)))


def _store(where: Pointer, what: Tensor, mask: Any = True) -> None:
    at = torch.as_tensor(where.at).long().expand(what.shape)
    kept = torch.as_tensor(mask).expand(what.shape)
    assert bool(((at >= 0) & (at < where.flat.numel()))[kept].all()), "written outside of a tensor"
    where.flat[at[kept].as_subclass(Tensor)] = what[kept].as_subclass(Tensor)


class Shared:
    """A piece of shared memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, i: Any) -> Shared:
        return Shared(self.tensor[int(i)])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.tensor.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.tensor.narrow(dim, start, length))

    def load(self, _layout: Any = None) -> Any:
        return value(self.tensor.clone())

    def store(self, what: Tensor) -> None:
        self.tensor.copy_(what)


class Barrier:
    """Arrivals and bytes that a phase waits for."""

    def __init__(self, count: int) -> None:
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0
        self.changed = threading.Condition()

    def arrive(self, arrivals: int, expected: int) -> None:
        with self.changed:
            self.left, self.bytes = self.left - arrivals, self.bytes + expected
            assert self.left >= 0, "more arrivals than a phase has"
            if not self.left and not self.bytes:
                self.left, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE)
        assert done, "nobody arrives"


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, many: int) -> None:
        self.each: list[Any] = [None] * many

    def index(self, i: Any) -> tuple[Barriers, int]:
        return self, int(i)


def _barrier(place: tuple[Barriers, int]) -> Barrier:
    held, i = place
    found: Barrier = held.each[i]
    return found


def _init(place: tuple[Barriers, int], count: int) -> None:
    place[0].each[place[1]] = Barrier(int(count))


class Sums:
    """Sums of products that may be in flight."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.clone()


def _multiply(left: Shared, right: Shared, acc: Any, is_async: bool = False) -> Any:
    sums = acc if isinstance(acc, Sums) else Sums(acc)
    _HERE.flying.append((sums, left, right))
    return sums if is_async else _wait(0, (sums,))


def _wait(num_outstanding: int, deps: tuple[Any, ...]) -> Any:
    while len(_HERE.flying) > num_outstanding:
        sums, left, right = _HERE.flying.pop(0)
        sums.tensor += (left.tensor.double() @ right.tensor.double()).to(torch.int32)
    found = deps if _HERE.flying else tuple(value(sums.tensor if isinstance(sums, Sums) else sums) for sums in deps)
    return found if len(found) > 1 else found[0]


class Copied:
    """A tensor that blocks are copied from; what lies outside is 0."""

    def __init__(self, tensor: Tensor, block: Sequence[int]) -> None:
        self.tensor, self.block, self.layout = tensor, tuple(block), None


def _copy(source: Copied, corner: Sequence[Any], place: tuple[Barriers, int], target: Shared) -> None:
    (row, column), (high, wide) = map(int, corner), source.block
    assert target.tensor.shape == (high, wide)
    target.tensor.zero_()
    there = source.tensor[row : row + high, column : column + wide]
    target.tensor[: there.shape[0], : there.shape[1]] = there
    _barrier(place).arrive(0, -high * wide)


def _specialize(partitions: list[tuple[Any, tuple[Any, ...]]], *_how: Any) -> None:
    failed: list[BaseException] = []
    program, programs = _HERE.program, _HERE.programs

    def run(part: Any, args: tuple[Any, ...]) -> None:
        _HERE.program, _HERE.programs, _HERE.flying = program, programs, []
        try:
            part(*args)
            assert not _HERE.flying
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=run, args=each) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _split(pairs: Tensor) -> tuple[Any, Any]:
    return value(pairs[..., 0].clone()), value(pairs[..., 1].clone())


def _allocate(kind: Any, shape: Sequence[int], _layout: Any) -> Any:
    if kind is torch.int64:  # barriers alone have it
        return Barriers(shape[0])
    return Shared(torch.full(tuple(shape), 77, dtype=kind))


def _where(condition: Any, one: Any, other: Any) -> Any:
    if not isinstance(condition, Tensor):
        return one if condition else other
    return value(torch.where(condition, torch.as_tensor(one), torch.as_tensor(other)))


def _nothing(*_args: Any, **_named: Any) -> None:
    return None


LANGUAGE = SimpleNamespace(
    constexpr=None, int8=torch.int8, int32=torch.int32, int64=torch.int64, float32=torch.float32,
    program_id=lambda axis: value(_HERE.program[axis]), num_programs=lambda axis: value(_HERE.programs[axis]),
    cdiv=lambda a, b: (a + b - 1) // b, minimum=lambda a, b: _where(value(a < b), a, b),
    maximum=lambda a, b: _where(value(a > b), a, b),
    where=_where, arange=lambda start, end, layout=None: value(torch.arange(start, end, dtype=torch.int32)),
    zeros=lambda shape, kind, layout=None: value(torch.zeros(tuple(shape), dtype=kind)), load=_load, store=_store,
    static_range=range, convert_layout=lambda x, layout, assert_trivial=False: x, split=_split,
    reshape=lambda x, shape: value(x.reshape(shape)), permute=lambda x, order: value(x.permute(*order)),
    allocate_shared_memory=_allocate, warp_specialize=_specialize, SliceLayout=_nothing, BlockedLayout=_nothing,
    SwizzledSharedLayout=_nothing, NVMMADistributedLayout=_nothing,
)  # fmt: skip
BARRIERS = SimpleNamespace(
    MBarrierLayout=_nothing, init=_init, wait=lambda place, parity: _barrier(place).wait(int(parity)),
    expect=lambda place, size: _barrier(place).arrive(1, int(size)),
    arrive=lambda place, pred=True: _barrier(place).arrive(1, 0) if pred else None,
)  # fmt: skip
NAMES: dict[str, Any] = {
    "gl": LANGUAGE, "tl": LANGUAGE, "mbarrier": BARRIERS, "tma": SimpleNamespace(async_copy_global_to_shared=_copy),
    "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait, "fence_async_shared": _nothing,
    "sums_layout": _nothing, "written_layout": _nothing, "table_layout": _nothing,
}  # fmt: skip


@contextmanager
def plain(*modules: ModuleType, **instead: Any) -> Iterator[None]:
    """Inside, what kernels of these modules call is plain Python; ``instead``: functions of other names."""
    before = [(module, dict(vars(module))) for module in modules]
    for module in modules:
        for name, found in list(vars(module).items()):
            if name in instead or name in NAMES:
                setattr(module, name, instead.get(name, NAMES.get(name)))
            elif hasattr(found, "fn") and hasattr(found, "arg_names"):
                setattr(module, name, found.fn)
    try:
        yield
    finally:
        for module, names in before:
            vars(module).update(names)


class Launch:
    """In the place of `launching.Launch`: runs every program of a kernel, one after the other."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = inspect.signature(kernel).parameters
        self.kernel, self.grid, self.numbers = kernel, grid, tuple(map(_given, numbers))
        self.constants = {name: held for name, held in options.items() if name in names}

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[Any] | None = None) -> None:
        pointers = tensors if pointers is None else pointers
        _HERE.programs = self.grid
        for _HERE.program in itertools.product(*map(range, self.grid)):
            self.kernel(*map(_given, pointers), *self.numbers, **self.constants)


def _given(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_given, argument))
    return argument if isinstance(argument, Copied) else (
        Pointer(argument) if isinstance(argument, Tensor) else value(argument))


class Described:
    """In the place of `launching.Described`."""

    def __init__(self, _like: Tensor, block: list[int], swizzled: bool = False) -> None:
        self.block = block

    def __call__(self, tensor: Tensor) -> Copied:
        return Copied(tensor, self.block)


def replanted(modules: Sequence[ModuleType], before: str, after: str) -> None:
    """The functions of the first module that has ``before``, as they are with ``after`` in its place, for all that call
    them, within `plain`."""
    module = next(each for each in modules if before in inspect.getsource(each))
    source = inspect.getsource(module).replace(before, after)
    made: dict[str, Any] = {}
    gluon = SimpleNamespace(jit=_undecorated, constexpr_function=_undecorated)
    exec(compile(source[source.index("@gluon") :], module.__name__, "exec"), {**vars(module), "gluon": gluon}, made)
    for name, found in made.items():
        if not inspect.isfunction(found) or name in NAMES:
            continue
        here = type(found)(found.__code__, vars(module), name)
        for each in modules:
            if name in vars(each):
                setattr(each, name, here)


def _undecorated(*given: Any, **_how: Any) -> Any:
    return given[0] if given else (lambda function: function)
