"""The kernels that a network lacks are built side by side before its first call, not one after the other within it.

Triton builds a kernel where it is first launched: about a second each, and a network with products that are tuned needs
a hundred and more. So `use` lets a model on CUDA make its first call with inputs of new shapes twice. The first time
launches are noted and left out wherever their kernel is not built (Triton asks a hook, which says so; outputs hold what
was in memory, and nothing is kept of them). What was noted is then built by threads: four fifths of a build or more are
passes over the intermediate form, the assembler and the C compiler, for which Triton gives up the interpreter's lock.
Each build lies in Triton's cache on disk when the call proper looks for it there, by the same source, signature,
constants and options.

Nothing of this is done on a CPU, in a capture, with gradients, while a graph is traced or compiled, or where somebody
would see the first of the two calls: hooks on parts, parts or attention processors that are not of a library known
here. Hooks on the model itself see the call proper alone.
Builds that fail are left to the call proper, which fails or chooses as it always did. ``BITBRUSH_BUILD_THREADS`` says
how many threads there are: as many as cores by default; 0: everything is built where it is first launched.

Importing this module does not import Triton.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitbrush.errors import Notice
from bitbrush.kernels import direct

THREADS = "BITBRUSH_BUILD_THREADS"
KNOWN = ("bitbrush", "diffusers", "torch", "peft", "transformers")
"""Libraries whose parts may be called twice: a forward of theirs changes nothing."""
TRIED = "bitbrush.kernels.triton_fake_kernels"
"""Kernels that are tried when they are first asked for, and done without where they do not build: never left out."""
DELAY = 1.0
"""Seconds before a bar is shown: what lies in Triton's cache takes some milliseconds each."""
FAILURES = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, OSError)


class Progress(Protocol):
    """What is told of builds."""

    def start(self, label: str, total: int) -> None: ...
    def advance(self, n: int = 1) -> None: ...
    def finish(self) -> None: ...


class Build(NamedTuple):
    """What makes a build the one that a launch looks for.

    Attributes:
        kernel: Triton's function.
        signature: Type of each parameter, by name.
        constants: Values of those that are none at run time, by place.
        attributes: What is known of the others (``tt.divisibility``), by place.
        options: Triton's own, all of them.
    """

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


_NOTED: ContextVar[dict[Any, Build] | None] = ContextVar("noted", default=None)
_PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)


def noting() -> bool:
    """Whether launches are noted now and may be left out: what they would have written must not be kept."""
    return _NOTED.get() is not None


@contextmanager
def reporting(progress: Progress | None) -> Iterator[None]:
    """Inside, ``progress`` is told of builds; None: a bar of diffusers' kind, as outside."""
    token = _PROGRESS.set(progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


# ---- what a call needs -----------------------------------------------------------------------------------------------
@contextmanager
def noted() -> Iterator[dict[Any, Build]]:
    """Inside, launches of this package's kernels that are not built are left out; gives what to build, by its key."""
    from triton import knobs

    found: dict[Any, Build] = {}
    before, token = knobs.runtime.jit_cache_hook, _NOTED.set(found)

    def hook(**asked: Any) -> Any:
        return _note(asked) or (before is not None and before(**asked))

    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        _NOTED.reset(token)


def _note(asked: dict[str, Any]) -> bool:
    """What Triton asks before it builds: whether to leave the build and its launch out."""
    found, module = _NOTED.get(), asked["fn"].module
    if found is None or not module.startswith("bitbrush.") or module == TRIED:
        return False
    kernel, how = asked["fn"].jit_function, asked["compile"]
    options = json.loads(how["specialization_data"])["options"]  # all of them are there alone; JSON has no tuples
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    found.setdefault((kernel.cache_key, asked["key"]),
                     Build(kernel, how["signature"], how["constants"], how["configs"][0], options))  # fmt: skip
    return True


# ---- building --------------------------------------------------------------------------------------------------------
def threads() -> int:
    """How many build: as many as there are cores for this process, unless `THREADS` says another number."""
    asked = os.environ.get(THREADS, "")
    if asked.isdecimal():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def able() -> bool:
    """Whether this Triton says what it is about to build, and can build in threads (3.4 and later)."""
    try:
        from triton import knobs
        from triton.runtime import _async_compile  # noqa: F401 - Triton's own threads: builds may be made in some
    except ImportError:
        return False
    return hasattr(knobs.runtime, "jit_cache_hook")


def build(builds: list[Build], driver: Any) -> int:
    """Put builds into Triton's cache; gives how many of them failed.

    Args:
        driver: Triton's: it knows the GPU, and has a C compiler make what launches a build, also into that cache.
    """
    from triton.compiler import compile

    target = driver.get_current_target()

    def make(one: Build) -> None:
        source = _source(one.kernel)(one.kernel, one.signature, one.constants, one.attributes)
        made = compile(source, target=target, options=one.options)
        driver.launcher_cls(made.src, made.metadata)

    bar, failed = _Bar(_PROGRESS.get() or _Tqdm(), len(builds)), 0
    pool = ThreadPoolExecutor(max(1, min(threads(), len(builds))), thread_name_prefix="bitbrush-build")
    try:
        futures: list[Future[None]] = [pool.submit(make, one) for one in builds]
        for future in as_completed(futures):
            failed += future.exception() is not None
            bar.advance()
    finally:
        pool.shutdown(cancel_futures=True)  # of what was begun the end is waited for, also when a user interrupts
        bar.finish()
    return failed


def _source(kernel: Any) -> Any:
    """What a kernel in Triton, or in Gluon, is compiled from."""
    from triton.compiler import ASTSource

    if not getattr(kernel, "is_gluon", lambda: False)():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


class _Bar:
    """A bar that is shown once it has lasted `DELAY` seconds."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done, self.shown = progress, total, 0, False
        self.begun = time.monotonic()

    def advance(self) -> None:
        """One build more is done."""
        self.done += 1
        if self.shown:
            self.progress.advance()
        elif time.monotonic() - self.begun >= DELAY:
            self.shown = True
            self.progress.start("build kernels", self.total)
            self.progress.advance(self.done)

    def finish(self) -> None:
        """No more builds."""
        if self.shown:
            self.progress.finish()


class _Tqdm:
    """diffusers' bar, on a terminal; ``diffusers.utils.logging.disable_progress_bar()`` switches it off."""

    def start(self, label: str, total: int) -> None:
        from diffusers.utils import logging

        self.bar = logging.tqdm(total=total, desc=label, leave=False, disable=None)

    def advance(self, n: int = 1) -> None:
        self.bar.update(n)

    def finish(self) -> None:
        self.bar.close()


# ---- a network -------------------------------------------------------------------------------------------------------
def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Build what ``model(*args, **kwargs)`` lacks, on the current GPU; the model is called, its answer left alone.

    Returns:
        How many builds were asked for; those that lie in Triton's cache on disk are among them. 0, and no call, where
        Triton is missing or older than 3.4.
    """
    if not able():
        return 0
    from triton.runtime.driver import driver

    args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # lists of its own: a forward may take from them
    with noted() as found, _own_hooks_alone(model):
        nn.Module.__call__(model, *args, **kwargs)  # not by a graph
    failed = build(list(found.values()), driver.active) if found else 0
    if failed:
        warnings.warn(f"bitbrush could not build {failed} of {len(found)} kernels ahead; they are built where they are "
                      "first launched, or another cut is taken", Notice, stacklevel=2)
    return len(found)


class FirstCalls:
    """A pre-hook of a model that builds what its first call with inputs of new shapes lacks."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call."""
        if torch.compiler.is_compiling():
            return
        shapes = tuple([x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and direct.on_gpu(x)])
        if not shapes or shapes in self.seen or not direct.unseen() or _capturing():
            return
        self.seen.add(shapes)
        if not threads() or not able() or not unwatched(model):
            return
        try:
            prepare(model, *args, **kwargs)
        except FAILURES as error:  # the call proper follows, and raises where it was not for us
            warnings.warn("bitbrush builds the kernels of this network one after the other: "
                          f"{(str(error).splitlines() or [type(error).__name__])[0]}", Notice, stacklevel=2)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def unwatched(model: nn.Module) -> bool:
    """Whether nobody notices a call more: no dropout, no hook on a part, all of it by libraries known here."""
    return not model.training and not any(_noticed(part, part is model) for part in model.modules())


def _noticed(part: nn.Module, whole: bool) -> bool:
    if not whole and (part._forward_hooks or part._forward_pre_hooks):
        return True
    if "forward" in part.__dict__ and not hasattr(part, "_hf_hook"):  # accelerate's moves weights, and says so
        return True
    kinds = (type(part), type(part.__dict__.get("processor", part)))
    return any(kind.__module__.partition(".")[0] not in KNOWN for kind in kinds)


@contextmanager
def _own_hooks_alone(model: nn.Module) -> Iterator[None]:
    """Inside, of the hooks of a model (not of its parts) those run that set its clock and apply a correction."""
    own = call_hooks(model)
    former = model._forward_pre_hooks, model._forward_hooks
    model._forward_pre_hooks, model._forward_hooks = (
        OrderedDict((key, hook) for key, hook in hooks.items() if key in own) for hooks in former
    )
    try:
        yield
    finally:
        model._forward_pre_hooks, model._forward_hooks = former


def call_hooks(model: nn.Module) -> set[int]:
    """Keys of the hooks on a denoiser that set its clock and apply its correction, which are part of every call."""
    owners = [getattr(model, name, None) for name in ("bitbrush_clock", "bitbrush_correction")]
    return {handle.id for owner in owners for handle in getattr(owner, "_hooks", ())}


def watch(model: nn.Module) -> None:
    """Build ahead what calls of a model lack, from now on."""
    unwatch(model)
    model.register_forward_pre_hook(FirstCalls(), with_kwargs=True, prepend=True)


def unwatch(model: nn.Module) -> None:
    """Build everything where it is first launched."""
    for key in own_hooks(model):
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def own_hooks(model: nn.Module) -> list[int]:
    """Keys of what `watch` registered."""
    return [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, FirstCalls)]
