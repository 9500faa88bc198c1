"""What a finetuned network is compared by. Teacher: the float face on the same x_t; everything here is float32.

    output     mean (eps - eps')^2 of the noise estimate, each half of a guided step alone     (QuEST L_G, per element)
    guided     the same of the guided estimate eps_u + w (eps_c - eps_u)                       (EfficientDM eq. 7)
    layers     sum over the trained layers of mean (O_l - O'_l)^2, each on the input it gets   (QuEST L_TLA, L_CMA)
    relation   KL of the relations between pixels of the last decoder features                 (MPQ-DM, TRD)
    features   mean squared error of those features                                            (for comparison)

All are means, so weights do not depend on batch and resolution. MPQ-DM's code adds sums: squared errors of ``C`` output
channels over a window of ``n`` steps, and once a window 100 times the KL summed over images (both halves) and rows. For
the same balance `relation` is the mean KL times ``100 * halves / (n * C)`` (`relation_unit`; 25 for guided latents and
n = 2), so that a weight of 1 is the code's whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitbrush.engine.tape import first_tensor
from bitbrush.errors import InputError
from bitbrush.network import wrap
from bitbrush.steps.teaching import Lessons

LossName = Literal["output", "guided", "layers", "relation", "features"]
FEATURES = "conv_norm_out"
"""The module whose input is the output of the last decoder block."""


def mean_square(answer: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean (answer - target)^2`` in float32; squares are multiplied by ``weight``, which broadcasts."""
    squares = (answer.float() - target.float()).square()
    return squares.mean() if weight is None else (squares * weight).mean()


def guided_estimate(answer: Tensor, guidance: float) -> Tensor:
    """``eps_u + w (eps_c - eps_u)`` of answers ``[.., halves, C, H, W]``; one half alone is the estimate itself."""
    answer = answer.float()
    if answer.shape[-4] == 1:
        return answer
    free, given = answer.unbind(-4)
    return free + guidance * (given - free)


def smoothed(features: Tensor, pool: int = 0) -> Tensor:
    """Features of a window ``[g, window, halves, C, H, W]``, averaged over it: ``[g * halves, C, H, W]``.

    With ``pool`` they are averaged over areas, to at most ``pool`` pixels a side.
    """
    return pooled(features.float().mean(dim=1).flatten(0, 1), pool)


def pooled(features: Tensor, pool: int) -> Tensor:
    """Features ``[.., C, H, W]`` averaged over areas, to at most ``pool`` pixels a side; 0 leaves them as they are."""
    height, width = features.shape[-2:]
    if pool and max(height, width) > pool:
        return F.adaptive_avg_pool2d(features, (min(height, pool), min(width, pool)))
    return features


def log_relations(features: Tensor) -> Tensor:
    """Logarithms of the relations between pixels ``[B, HW, HW]``: rows are softmax (temperature 1) of the cosine
    similarities of one pixel of ``[B, C, H, W]`` with all of the same image."""
    unit = F.normalize(features.float().flatten(2).transpose(1, 2), dim=2)
    return torch.log_softmax(unit @ unit.transpose(1, 2), dim=2)


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the relations in features ``[B, C, H, W]``, mean over rows and images."""
    taught, learnt = log_relations(teacher), log_relations(student)
    return (taught.exp() * (taught - learnt)).sum(dim=2).mean()


def relation_unit(halves: int, window: int, channels: int) -> float:
    """Factor between the mean KL and MPQ-DM's weight of 100 on sums, beside a mean squared error."""
    return 100.0 * halves / (window * channels)


class Watch:
    """Keeps what chosen layers answer and what the feature site is given, during one forward, and no longer.

    Args:
        model: The network.
        layers: Names of the layers.
        features: Whether to keep the features.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], features: bool) -> None:
        self.model, self.layers, self.wanted = model, layers, features
        self.answers: dict[str, Tensor] = {}
        self.features: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        for name in self.layers:
            self._handles.append(self.model.get_submodule(name).register_forward_hook(self._keeper(name)))
        if self.wanted:
            site = self.model.get_submodule(FEATURES)
            self._handles.append(site.register_forward_pre_hook(self._features))
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, out: Tensor) -> None:
            self.answers[name] = out

        return keep

    def _features(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.features = args[0]


class Objective:
    """The weighted sum of losses on groups of rows. The model must show the student's face (sim).

    Args:
        model: The network, wrapped.
        lessons: The rows.
        weights: Loss name to weight.
        layers: Trained layers, for ``layers``.
        guidance: Guidance scale, for ``guided``.
        pool: Largest side of the features of ``relation``; 0 leaves them as they are.
        importance: Of each row, ``[M]`` on the device: factor of its squared error in ``output`` and ``guided``.

    Raises:
        InputError: A loss that this model cannot have.
    """

    def __init__(
        self, model: nn.Module, lessons: Lessons, weights: dict[LossName, float], layers: Sequence[str],
        guidance: float, pool: int = 0, importance: Tensor | None = None,
    ) -> None:
        self.importance = importance
        self.model, self.lessons, self.weights = model, lessons, {n: w for n, w in weights.items() if w}
        self.guidance, self.pool = guidance, pool
        self.layers = tuple(layers) if "layers" in self.weights else ()
        self.features = "relation" in self.weights or "features" in self.weights
        if self.features and not isinstance(getattr(model, FEATURES, None), nn.Module):
            raise InputError("this model has no features to relate", where=f"finetune: losses, {FEATURES}",
                             why="the losses 'relation' and 'features' take the input of the last norm",
                             try_="leave them out")
        if "layers" in self.weights and not layers:
            raise InputError("the loss 'layers' has no layers", where="finetune: losses",
                             why="no layer of the plan is trained", try_="name other layers, or leave the loss out")

    @property
    def teaches(self) -> bool:
        """Whether the float network has to answer again: the tape keeps its output, but not what lies inside."""
        return bool(self.layers) or self.features

    def parts(self, groups: Tensor, half: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
        """Each loss, unweighted, on groups ``[g]``; ``half`` is an autocast context for the two forwards."""
        rows = self.lessons.rows(groups)
        args, kwargs = self.lessons.inputs(rows)
        with half or nullcontext():
            teacher = self._teacher(args, kwargs) if self.teaches else None
            with Watch(self.model, self.layers, self.features) as student:
                answer = first_tensor(self.model(*args, **kwargs))
        grouped = (-1, *self.lessons.groups.shape[1:], *answer.shape[1:])
        answer, target = answer.reshape(grouped), self.lessons.output.take(rows).reshape(grouped)
        weight = self._weight(rows, answer.ndim)
        found: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "output":
                found[name] = mean_square(answer, target, weight)
            elif name == "guided":
                one = None if weight is None else weight[:, :, 0]
                ours, theirs = (guided_estimate(t, self.guidance) for t in (answer, target))
                found[name] = mean_square(ours, theirs, one)
            elif name == "layers" and teacher is not None:
                pairs = [mean_square(student.answers[n], teacher.answers[n]) for n in self.layers]
                found[name] = torch.stack(pairs).sum()
            elif teacher is not None:
                taught, ours = self._smoothed(teacher), self._smoothed(student)
                if name == "features":
                    found[name] = mean_square(ours, taught)
                else:
                    found[name] = relation_loss(pooled(ours, self.pool), pooled(taught, self.pool))
        if "relation" in found:
            window, halves, channels = grouped[1:4]
            found["relation"] = found["relation"] * relation_unit(halves, window, channels)
        return found

    def _weight(self, rows: Tensor, ndim: int) -> Tensor | None:
        """Importance of rows, ``[g, window, halves, 1, ..]``."""
        if self.importance is None:
            return None
        shape = (-1, *self.lessons.groups.shape[1:], *[1] * (ndim - 3))
        return self.importance.index_select(0, rows).reshape(shape)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()  # type: ignore[index]

    def measure(self, groups: Tensor, size: int) -> dict[str, float]:
        """Each loss over groups, ``size`` at a time, in the model's own precision; ``total`` is their weighted sum."""
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for part in groups.split(size):
                found = self.parts(part)
                for name, value in (found | {"total": self.total(found)}).items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value.double() * len(part)
            names = list(sums)
            values = (torch.stack([sums[n] for n in names]) / len(groups)).tolist()
        return dict(zip(names, values, strict=True))

    def _teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watch:
        with torch.no_grad(), wrap.show(self.model, "float"), Watch(self.model, self.layers, self.features) as watch:
            self.model(*args, **kwargs)
        return watch

    def _smoothed(self, watch: Watch) -> Tensor:
        """Features that were seen, averaged over windows: ``[g * halves, C, H, W]``; pooled where they may be."""
        if watch.features is None:
            raise InputError(f"{FEATURES} was not reached", where="finetune: losses",
                             why="the model's forward skips it", try_="leave 'relation' and 'features' out")
        shape = self.lessons.groups.shape[1:]
        pool = 0 if "features" in self.weights else self.pool
        return smoothed(watch.features.reshape(-1, *shape, *watch.features.shape[1:]), pool)
