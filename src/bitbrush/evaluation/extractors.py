"""Pictures to features, by a network whose name stands beside every figure computed from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbrush.errors import ArtifactError, InputError, NumericsError
from bitbrush.evaluation.eight_bits import round_to_8_bits, to_levels
from bitbrush.evaluation.feature_sets import FeatureSet, Sink
from bitbrush.evaluation.features import ResNet, cifar_classifier
from bitbrush.evaluation.optional import fidelity
from bitbrush.evaluation.weights import Published, Weights, find

INCEPTION = Published("the Inception weights of FID", "weights-inception-2015-12-05-6726825d.pth")
SPATIAL_CHANNELS = 7  # of a middle feature map, as sFID takes them (Nash et al. 2021)
PROBE_SIZE = (64, 64)


@dataclass(frozen=True)
class Output:
    """What a network says about n pictures: features [n, d]; logits [n, classes]; spatial features [n, s]."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A feature extractor as a value. Make it with ``inception``, ``zoo_classifier`` or ``from_module``.

    Args:
        name: Printed beside every figure.
        run: Pictures float32 [n, 3, H, W] in [-1, 1] on ``device`` to an ``Output`` there.
        width: d, the number of features.
        logits: Number of classes, 0 without logits: then there is no Inception score.
        spatial: Number of spatial features, 0 without: then there is no sFID.
        size: The only height and width that it takes, or None for any.
        resizing: What the network does to the size of pictures itself, in words.
        eight_bits: Pictures are rounded to 256 levels a colour first, as a file would hold them.
        standard: Inception with the published weights: only then FID may be called so without more words.
        device: Where it runs.
        batch: Pictures at a time.
    """

    name: str
    run: Callable[[Tensor], Output]
    width: int
    logits: int = 0
    spatial: int = 0
    size: tuple[int, int] | None = None
    resizing: str = "none"
    eight_bits: bool = True
    standard: bool = False
    device: str = "cpu"
    batch: int = 64

    def to_json(self) -> dict[str, Any]:
        """What a report says of it: name, widths, the size it takes, resizing, rounding."""
        names = ("name", "standard", "width", "logits", "spatial", "size", "resizing", "eight_bits")
        return {name: getattr(self, name) for name in names}

    def extract(
        self,
        pictures: Tensor | Iterable[Tensor],
        *,
        source: str,
        count: int | None = None,
        folder: Path | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> FeatureSet:
        """Features of all pictures, in their order.

        At most one batch of pictures is held at a time, besides what ``pictures`` itself holds.

        Args:
            pictures: [n, 3, H, W] in [-1, 1], or parts of that form.
            source: What they are, for messages and results: "real pictures in DIR", "full precision, seed 0".
            count: Their number, needed with ``folder`` when parts are given.
            folder: Features are written there and mapped from there, instead of held in memory.
            advance: Called with the number of pictures done, batch by batch.

        Raises:
            InputError: No picture, or pictures of another shape than the network takes.
            NumericsError: Features that are not finite.
            ResourceError: The disk is full.
        """
        if isinstance(pictures, Tensor):
            count, pictures = len(pictures), (pictures,)
        sink = Sink(folder, count)
        with sink, torch.no_grad():
            for part in self._batches(pictures):
                output = self.run(part.to(self.device))
                sink.add({name: self._checked(name, tensor, len(part), source) for name, tensor in _named(output)})
                if advance is not None:
                    advance(len(part))
        if sink.count < 2:
            raise InputError(
                "features need at least two pictures", where=source, why=f"{sink.count} given", try_="give more"
            )
        return sink.done(extractor=self.name, standard=self.standard, source=source)

    def _batches(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            if part.ndim != 4 or part.shape[1] != 3 or (self.size and tuple(part.shape[2:]) != self.size):
                wanted = "x".join(map(str, self.size)) if self.size else "any number of"
                raise InputError(
                    "the feature extractor does not take these pictures",
                    where=self.name,
                    why=f"it takes [n, 3, H, W] with {wanted} pixels, the shape is {tuple(part.shape)}",
                    try_="read the pictures with a size and a way to resize, or choose another extractor",
                )
            for batch in part.split(self.batch):
                yield round_to_8_bits(batch) if self.eight_bits else batch.float()

    def _checked(self, name: str, tensor: Tensor, count: int, source: str) -> Tensor:
        wanted = {"pooled": self.width, "logits": self.logits, "spatial": self.spatial}[name]
        if tuple(tensor.shape) != (count, wanted):
            raise InputError(
                "the feature extractor changed its width",
                where=f"{self.name}, {name}",
                why=f"[{count}, {wanted}] was declared, the shape is {tuple(tensor.shape)}",
                try_="give pictures of one size, or an extractor that pools over space",
            )
        tensor = tensor.float().cpu()
        if not tensor.isfinite().all():
            raise NumericsError(
                "features are not finite", where=f"{self.name}, {name}", why=f"pictures: {source}",
                try_="look at the pictures for NaN, and run the extractor in float32",
            )  # fmt: skip
        return tensor


def inception(weights: Path | str | None = None, *, device: str = "cpu", batch: int = 64) -> Extractor:
    """torch-fidelity's ``inception-v3-compat``: 2,048 features, 1,008 logits, 2,023 spatial features.

    Pictures of any size are rounded to 8 bits and resized inside, as TensorFlow 1 did. Spatial features are the first
    7 channels of the 17x17 map "mixed_6/conv" (Nash et al. 2021, as evaluated by Dhariwal and Nichol 2021). Logits come
    without the bias of the last layer, as torch-fidelity takes them for the Inception score.

    Args:
        weights: A .safetensors file of other weights, which the name then says; without one, the published file in the
            cache of torch's hub, opened by torch-fidelity.

    Raises:
        Unavailable: torch-fidelity or the weights are not there.
        ArtifactError: The file is not safetensors or holds other tensors.
    """
    module = fidelity("feature_extractor_inceptionv3")
    found = find(INCEPTION, weights)
    network = _inception_network(module, found).to(device)
    maps: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: maps.append(output))

    def run(pictures: Tensor) -> Output:
        maps.clear()
        pooled, logits = network(to_levels(pictures))
        return Output(pooled, logits, maps.pop()[:, :SPATIAL_CHANNELS].flatten(1))

    name = (
        "Inception-v3 of 2015-12-05 (torch-fidelity)"
        if found.published
        else f"Inception-v3 with the weights of {found.path.name} ({found.digest}), not the published ones"
    )
    return Extractor(
        name, run, 2048, logits=1008, spatial=SPATIAL_CHANNELS * 17 * 17,
        resizing="inside, to 299x299, bilinear as TensorFlow 1 did",
        standard=found.published, device=device, batch=batch,
    )  # fmt: skip


def zoo_classifier(file: Path | str, *, device: str = "cpu", batch: int = 250) -> Extractor:
    """The CIFAR-10 classifier: 384 features, 10 logits, 448 spatial features (7 channels of its 8x8 map). 32x32 only.

    Raises:
        ArtifactError: The file cannot be read or holds other tensors.
    """
    network = cifar_classifier(Path(file)).to(device)
    return Extractor(
        "CIFAR-10 classifier of the zoo", lambda pictures: _classify(network, pictures), 384,
        logits=10, spatial=SPATIAL_CHANNELS * 8 * 8, size=(32, 32), device=device, batch=batch,
    )  # fmt: skip


def from_module(
    module: nn.Module,
    *,
    name: str,
    size: tuple[int, int] | None = None,
    eight_bits: bool = True,
    device: str = "cpu",
    batch: int = 64,
) -> Extractor:
    """A user's own network, put into evaluation mode and onto ``device``.

    Args:
        module: Pictures float32 [n, 3, H, W] in [-1, 1] to features [n, d], or to a mapping with ``"features"`` and,
            if it has them, ``"logits"`` [n, classes] and ``"spatial"`` [n, ...].
        name: Printed beside every figure.
        size: The only height and width that it takes; None: any (its widths are then found with 64x64).

    Raises:
        InputError: No name, a name that promises published weights, or a network that gives something else.
    """
    if not name.strip() or "inception" in name.lower():
        raise InputError(
            "the feature extractor needs a name of its own",
            where=f"name={name!r}",
            why="it is printed beside every figure; the name of Inception is kept for its published weights",
            try_="say what the network is and what it was trained on",
        )
    module = module.eval().to(device)

    def run(pictures: Tensor) -> Output:
        return _as_output(module(pictures), name)

    try:
        with torch.no_grad():
            probe = run(torch.zeros(2, 3, *(size or PROBE_SIZE), device=device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            "the feature extractor cannot be run",
            where=name,
            why=f"on pictures [2, 3, {', '.join(map(str, size or PROBE_SIZE))}]: {type(error).__name__}: {error}",
            try_="pass size=(H, W), or a network that takes pictures float32 [n, 3, H, W] in [-1, 1]",
        ) from error
    widths = {key: tensor.shape[1] for key, tensor in _named(probe)}
    return Extractor(
        name, run, widths["pooled"], logits=widths.get("logits", 0), spatial=widths.get("spatial", 0),
        size=size, eight_bits=eight_bits, device=device, batch=batch,
    )  # fmt: skip


def _inception_network(module: Any, found: Weights) -> Any:
    """Their network. The published file is opened by their constructor; tensors that were given are handed to it."""
    layers = ["2048", "logits_unbiased"]
    try:
        if found.tensors is None:
            file = {"feature_extractor_weights_path": str(found.path)}
            return module.FeatureExtractorInceptionV3("inception-v3-compat", layers, **file)
        with _answering(module, "load_state_dict_from_url", found.tensors):
            return module.FeatureExtractorInceptionV3("inception-v3-compat", layers)
    except (RuntimeError, OSError) as error:
        raise ArtifactError(
            "the file of Inception weights does not hold this network",
            where=str(found.path),
            why=str(error).splitlines()[0],
            try_=f"put {INCEPTION.file} into {INCEPTION.cache.parent}, or give those tensors as .safetensors",
        ) from error


@contextlib.contextmanager
def _answering(module: Any, function: str, answer: object) -> Iterator[None]:
    """Inside the block ``module.function`` gives ``answer`` to any call."""
    before = getattr(module, function)
    setattr(module, function, lambda *args, **kwargs: answer)
    try:
        yield
    finally:
        setattr(module, function, before)


def _classify(network: ResNet, pictures: Tensor) -> Output:
    middle = network.body[:6](network.stem(pictures))  # [n, 192, 8, 8]
    pooled = network.body[6:](middle).mean(dim=(2, 3))
    return Output(pooled, network.head(pooled), middle[:, :SPATIAL_CHANNELS].flatten(1))


def _as_output(given: object, name: str) -> Output:
    parts = given if isinstance(given, Mapping) else {"features": given}
    tensors: dict[str, Any] = {key: parts.get(key) for key in ("features", "logits", "spatial")}
    wrong = [key for key, value in tensors.items() if not (value is None or isinstance(value, Tensor))]
    pooled, logits, spatial = tensors.values()
    if wrong or not isinstance(pooled, Tensor) or pooled.ndim != 2 or set(parts) - set(tensors):
        found = {key: tuple(value.shape) if isinstance(value, Tensor) else type(value) for key, value in parts.items()}
        raise InputError(
            "the feature extractor gives no features",
            where=name,
            why=f"wanted: a tensor [n, d], or a mapping with features, logits, spatial; given: {found}",
            try_="wrap the network so that it returns features [n, d]",
        )
    return Output(pooled, logits, spatial.flatten(1) if isinstance(spatial, Tensor) else None)


def _named(output: Output) -> list[tuple[str, Tensor]]:
    pairs = (("pooled", output.pooled), ("logits", output.logits), ("spatial", output.spatial))
    return [(name, tensor) for name, tensor in pairs if tensor is not None]
