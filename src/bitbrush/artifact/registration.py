"""Make diffusers know ``quant_method: bitbrush`` without importing diffusers, or torch, for it.

``import bitbrush`` should cost nothing, yet any ``from_pretrained`` after it has to open artifacts. So `announce` puts
two stand-ins into diffusers' tables: at once where diffusers has loaded them, otherwise in the moment it does, by a
finder in front of ``sys.meta_path`` that waits for that one module and then leaves. The first use of a stand-in imports
the plug-in, which puts the real classes in their place.

Stand-ins, because that moment lies inside diffusers' own circle of imports, where the plug-in could not be imported
yet. They are classes, because diffusers passes the values of its tables to ``isinstance``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "diffusers.quantizers.auto"
METHOD = "bitbrush"


def announce() -> None:
    """Let diffusers find bitbrush, now or when it is imported. May be called any number of times."""
    if TABLES in sys.modules:
        _fill(importlib.import_module(TABLES))  # waits where another thread is importing it
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _fill(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, QuantizerLater)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ConfigLater)


def _plugin() -> Any:
    """The plug-in, its classes now in diffusers' tables."""
    plugin = importlib.import_module("bitbrush.artifact.diffusers_plugin")
    plugin.register()
    return plugin


class QuantizerLater:
    """Stands for `BitbrushQuantizer` until it is wanted: calling it makes the real one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A real quantizer."""
        return _plugin().BitbrushQuantizer(*args, **kwargs)


class ConfigLater:
    """Stands for `BitbrushConfig` until it is wanted: calling it, or reading one from a dict, makes the real one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A real config."""
        return _plugin().BitbrushConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """A real config from the ``quantization_config`` of a ``config.json``."""
        return _plugin().BitbrushConfig.from_dict(*args, **kwargs)


class _Waiting(MetaPathFinder):
    """Finds nothing by itself; has diffusers' tables filled right after they are imported, and leaves then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec as the other finders see it, with a loader that fills the tables."""
        if fullname != TABLES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Waiting) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenFill(spec.loader)
                return spec
        return None


class _ThenFill(Loader):
    """A loader that does what another does, gives the module back to it, and fills the tables."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """What the other loader makes."""
        module: ModuleType | None = self.inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then fill it. Where it fails, the finder stays for the next try."""
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _fill(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
