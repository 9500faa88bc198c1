"""Normalisation layers with two faces, where a step trains their scale and shift: the teacher keeps the original's.

Such parameters lie outside of the wrapped layers, so the layer that holds them gets a face of its own, like those: its
class becomes one that derives from it (as PyTorch's parametrizations do). Whoever shows a face shows it here, too:

    float           the module's own parameters, untouched: the teacher
    sim, packed     the trained ones, buffers that no state dict lists

`fold` makes the trained values the module's parameters and gives its class back: the artifact holds plain modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitbrush.errors import InternalError
from bitbrush.network.layers import Face, QuantLayer

_BUFFER = "trained_{}"


class FacedNorm(nn.Module):
    """What the class of a normalisation layer with trained values is mixed with.

    While a step trains it puts values (any floating dtype) into ``trial``, by parameter; every value is used in the
    dtype of the parameter that it stands for.
    """

    face: Face
    trial: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output in the face it shows."""
        own = dict(self._parameters)
        try:
            if self.face != "float":
                self._parameters.update(self.values())  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(own)

    def values(self) -> dict[str, Tensor]:
        """What stands for the parameters that were trained or are being trained."""
        found = {}
        for key, own in self._parameters.items():
            value = self.trial.get(key, getattr(self, _BUFFER.format(key), None))
            if own is not None and value is not None:
                found[key] = value.to(own.dtype)
        return found

    def trained(self) -> dict[str, Tensor]:
        """The stored values."""
        stored = {key: getattr(self, _BUFFER.format(key), None) for key in self._parameters}
        return {key: value for key, value in stored.items() if value is not None}

    def set(self, values: dict[str, Tensor]) -> None:
        """Store trained values in the dtype of the parameters, in place of all stored before."""
        wrong = [k for k, v in values.items() if (own := self._parameters.get(k)) is None or own.shape != v.shape]
        if wrong:
            raise InternalError(f"the layer has no parameter {wrong[0]!r} of this shape", where=type(self).__name__)
        _forget(self)
        for key, value in values.items():
            own = self._parameters[key]
            if own is not None:
                stored = value.detach().to(device=own.device, dtype=own.dtype).clone()
                self.register_buffer(_BUFFER.format(key), stored, persistent=False)


def find(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own parameters and whose class is called a norm, by name."""
    return {
        name: module for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not isinstance(module, QuantLayer)
        and any(p is not None for p in module._parameters.values())
    }


def faced(module: nn.Module, face: Face = "float") -> FacedNorm:
    """The module itself, given a face if it had none."""
    if not isinstance(module, FacedNorm):
        module.__class__ = _class(type(module))
        module.face, module.trial = face, {}  # type: ignore[assignment]
    if not isinstance(module, FacedNorm):
        raise InternalError("the layer cannot be given a face", where=type(module).__name__)
    return module


def fold(model: nn.Module) -> None:
    """Trained values become the parameters; what they replace is freed, and the modules are plain ones again."""
    for module in [m for m in model.modules() if isinstance(m, FacedNorm)]:
        for key, value in module.trained().items():
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        _forget(module)
        del module.face, module.trial
        module.__class__ = type(module).__mro__[2]


def _forget(module: FacedNorm) -> None:
    for key in module.trained():
        name = _BUFFER.format(key)
        delattr(module, name)
        module._non_persistent_buffers_set.discard(name)


def _class(plain: type[nn.Module]) -> type[FacedNorm]:
    return type(f"Faced{plain.__name__}", (FacedNorm, plain), {})
