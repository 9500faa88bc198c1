"""A driver for Triton that launches nothing: kernels are built for compute capability 9.0 and looked up as on a GPU,
with tensors on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

OWN = ("bitbrush.kernels.triton_", "bitbrush.kernels.gluon_")


class Driver:
    """What Triton asks of a driver.

    Attributes:
        made: Names of kernels for which something that launches them was made, one a build.
        launched: Names of kernels that were launched.
    """

    def __init__(self) -> None:
        self.made: list[str] = []
        self.launched: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, binary, shared, device: (name, name, 32, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a build."""
        self.made.append(metadata.name)
        return lambda *args: self.launched.append(metadata.name)

    def get_current_target(self) -> Any:
        """A Hopper GPU."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextmanager
def hopper(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Inside, tensors on the CPU are on a Hopper GPU for this package and for Triton, whose cache is a folder.

    What Triton keeps of builds in this process is forgotten before and after.
    """
    from triton.runtime.driver import driver

    from bitbrush.kernels import direct, gpu_decode, tuning

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(direct, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gpu_decode, "no_triton", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_name", lambda device: "a-gpu")
    monkeypatch.setattr(tuning, "_processors", lambda device: 132)
    active, made = driver._active, Driver()
    driver.set_active(made)  # type: ignore[arg-type]
    _forget()
    try:
        yield made
    finally:
        driver._active = active
        _forget()


def another_process() -> None:
    """Forget all that this process knows of builds; what lies on disk stays."""
    _forget()


def _forget() -> None:
    from triton.runtime.jit import JITFunction

    from bitbrush.kernels import (
        gpu_decode,
        triton_attend,
        triton_encode,
        triton_int8,
        triton_norm,
        triton_norm_small,
        triton_unpack,
        tuning,
    )

    modules = [module for name, module in sys.modules.items() if name.startswith(OWN)]
    for function in {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}:
        function.device_caches.clear()
    for known in (triton_int8._PRODUCTS, triton_int8._GATED, triton_unpack._UNPACKED, triton_norm._LAYER_NORMS,
                  triton_norm._SUMS, triton_norm._GROUP_NORMS, triton_norm_small._KNOWN, triton_encode._KNOWN,
                  triton_encode._EACH, triton_unpack._SORTED, triton_unpack._EACH, triton_attend._KNOWN,
                  gpu_decode._CODEBOOKS):  # fmt: skip
        known.clear()
    tuning.forget()
