"""Packages that only some metrics need: torch-fidelity and torchmetrics, the extra ``bitbrush[eval]``.

torch-fidelity imports torchvision for data sets, VGG and CLIP; nothing that is called here uses it. Where torchvision
is not installed a stand-in takes its place during that import. One that is installed but cannot be imported (the usual
cause: a CUDA build beside a CPU build of torch) is an error that says so. Only LPIPS with its published backbone needs
torchvision itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from bitbrush.errors import InputError

_STOOD_IN = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


class Unavailable(InputError):
    """A package or a file of weights that a metric needs is not there. The metric is left out; others go on."""

    family = "metric not available"


def fidelity(module: str) -> Any:
    """The module ``torch_fidelity.<module>``, for example ``"metric_fid"``.

    Raises:
        Unavailable: torch-fidelity is missing, or torchvision is installed and cannot be imported.
    """
    return _load(f"torch_fidelity.{module}", "torch-fidelity")


def torchmetrics(module: str) -> Any:
    """The module ``torchmetrics.<module>``.

    torchmetrics imports torch-fidelity where that is installed, so that is imported first, in the way that works.

    Raises:
        Unavailable: As for ``fidelity``.
    """
    if importlib.util.find_spec("torch_fidelity") is not None:
        fidelity("metrics")
    return _load(f"torchmetrics.{module}", "torchmetrics")


def torchvision(module: str, why: str, try_: str) -> Any:
    """The module ``torchvision.<module>``, for the one thing that needs it.

    Args:
        module: For example ``"models"``.
        why: What needs it, for the message.
        try_: What serves instead.

    Raises:
        Unavailable: torchvision is missing or cannot be imported.
    """
    name, found = f"torchvision.{module}", "it is not installed"
    try:
        if importlib.util.find_spec("torchvision") is not None:
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise Unavailable(
        "torchvision cannot be imported", where=name, why=f"{found}; {why}",
        try_=f"install torchvision from the place that torch came from, or {try_}",
    )  # fmt: skip


def _load(name: str, package: str) -> ModuleType:
    root = name.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise Unavailable(
            f"{package} is not installed",
            where=name,
            why="the metric is computed by that package's code, which bitbrush does not replace by its own",
            try_="pip install 'bitbrush[eval]', or leave the metric out",
        )
    try:
        with _torchvision_or_stand_in(root == "torch_fidelity"):
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise Unavailable(
            f"{package} is installed but cannot be imported",
            where=name,
            why=f"{type(error).__name__}: {error}",
            try_="install a torchvision from the place that torch came from (both builds must match), or none",
        ) from error


@contextmanager
def _torchvision_or_stand_in(wanted: bool) -> Iterator[None]:
    """Inside the block ``import torchvision`` works, without use if it is not installed; outside nothing remains."""
    if not wanted or "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    modules = {name: _Absent(name) for name in _STOOD_IN}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _STOOD_IN:
            sys.modules.pop(name, None)


class _Absent(ModuleType):
    """Stands for a module of torchvision: its classes can be named and inherited from, but not made."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> None:
            raise Unavailable(
                f"{self.__name__}.{name} is not there",
                where="torchvision",
                why="torchvision is not installed",
                try_="install torchvision from the place that torch came from",
            )

        return type(name, (), {"__init__": refuse})
