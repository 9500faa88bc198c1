"""Distribution metrics of an evaluation: features once an arm, figures against one reference, floors beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from bitbrush.errors import ArtifactError, BitbrushError, InputError, NumericsError
from bitbrush.evaluation.asked import DISTRIBUTION, Asked, Tools
from bitbrush.evaluation.digests import file_digest, text_digest
from bitbrush.evaluation.distribution import Figure, Floor, floor, measure
from bitbrush.evaluation.drawing import Drawn
from bitbrush.evaluation.extractors import Extractor
from bitbrush.evaluation.feature_sets import INDEX, FeatureSet
from bitbrush.evaluation.references import PictureFolder, Statistics
from bitbrush.evaluation.result import Missing, Value
from bitbrush.evaluation.values import figure_value

FITTING = (InputError, NumericsError, ArtifactError, ValueError, ArithmeticError)
SAME_NOISE = "the reference's own pictures, of the same noise: nearer than pictures of other seeds can be"


@dataclass
class Spread:
    """Features of all arms.

    Args:
        asked, tools: The settings and the networks.
        folder: Features are kept there.
        advance: Told of pictures.
        sets: Arm to its features.
        real: Of the pictures or statistics that were given; None: the reference arm's features serve.
        missing: What could not be computed.
    """

    asked: Asked
    tools: Tools
    folder: Path
    advance: Callable[[int], None]
    sets: dict[str, FeatureSet] = field(default_factory=dict)
    real: FeatureSet | Statistics | None = None
    missing: list[Missing] = field(default_factory=list)

    @property
    def wanted(self) -> list[str]:
        """Distribution metrics that are asked for and not found to be missing."""
        gone = {missing.key for missing in [*self.missing, *self.tools.missing]}
        return [name for name in DISTRIBUTION if name in self.asked.metrics and name not in gone]

    def prepare(self, height: int, width: int) -> None:
        """Features of the real pictures, as soon as the resolution of drawn ones is known.

        Raises:
            InputError: They have another resolution, or one of them cannot be read; or the extractor does not take
                pictures of this size.
        """
        extractor, given = self.tools.extractor, self.tools.real
        if extractor is not None and extractor.size not in (None, (height, width)) and self.wanted:
            raise InputError(
                "the feature extractor does not take these pictures", where=extractor.name,
                why=f"it takes {extractor.size[1]}x{extractor.size[0]} pixels, the arms draw {width}x{height}"
                if extractor.size else "", try_="choose another extractor, or leave the distribution metrics out",
            )  # fmt: skip
        if not isinstance(given, PictureFolder) or extractor is None or not self.wanted:
            self.real = given if isinstance(given, Statistics) else None
            return
        if given.resize is not None:
            given = replace(given, size=(height, width))
        if given.size != (height, width):
            raise InputError(
                "the real pictures have another resolution", where=given.source,
                why=f"the arms draw {width}x{height} pixels",
                try_='resize them on purpose: resize="crop" or "stretch" (--resize)',
            )  # fmt: skip
        files = {str(path.name): file_digest(path) for path in given.files}
        key = text_digest({"files": files, "size": given.size, "resize": given.resize, "by": self.tools.extractor_key})
        self.real = self._extract(extractor, given.batches(), len(given), given.source, key)

    def add(self, name: str, drawn: Drawn) -> None:
        """Features of one arm, where an extractor is there; what cannot be computed is noted."""
        extractor = self.tools.extractor
        if extractor is None or (extractor.size is not None and extractor.size != drawn.shape()[-2:]):
            return

        def parts() -> Iterator[Tensor]:
            for own in drawn.sets:
                yield from own.parts()

        names = [own.folder.name for own in drawn.sets]
        key = text_digest({"pictures": names, "n": self.asked.n, "by": self.tools.extractor_key})
        try:
            count = self.asked.n * len(drawn.sets)
            self.sets[name] = self._extract(extractor, parts(), count, f"pictures of {name}", key)
        except (InputError, NumericsError) as error:
            self._lack(self.wanted or ["features"], error)
        self.advance(self.asked.n * len(drawn.sets))

    def values(self, arms: list[str], reference: str, other: str | None) -> dict[str, list[Value]]:
        """Figures of every arm, with floors where features of ``other`` (full precision, other seeds) are there."""
        found: dict[str, list[Value]] = {arm: [] for arm in arms}
        first, second = self.sets.get(reference), self.sets.get(other or "")
        for metric in self.wanted if first is not None else ():
            try:
                floors = self._floors(metric, second, first)
                new = {arm: self._of_arm(metric, arm, reference, second, floors) for arm in arms}
            except FITTING as error:
                self._lack([metric], error)
                continue
            found = {arm: values + new[arm] for arm, values in found.items()}
        return found

    def _of_arm(
        self, metric: str, arm: str, reference: str, second: FeatureSet | None, floors: dict[str, Floor]
    ) -> list[Value]:
        values = []
        for figure, others in self._figures(metric, arm, reference, second):
            beside = floors.get(figure.metric)
            detail: dict[str, object] = {} if beside is None else {"floor": beside.meaning}
            detail |= {} if self.real is not None or metric == "is" else {"noise": SAME_NOISE}
            detail |= {} if others is None else {"to_other_seeds": others.value}
            values.append(figure_value(figure, None if beside is None else beside.value, detail))
        return values

    def _figures(
        self, metric: str, arm: str, reference: str, second: FeatureSet | None
    ) -> list[tuple[Figure, Figure | None]]:
        """Figures of an arm, and beside each the same against full precision with other seeds."""
        ours = self.sets[arm]
        if metric == "is" or self.real is not None:
            return [(figure, None) for figure in measure(metric, ours, self.real)]
        if arm == reference:
            return []
        figures = measure(metric, ours, self.sets[reference])
        others = measure(metric, ours, second) if second is not None else (None,) * len(figures)
        return list(zip(figures, others, strict=True))

    def _floors(self, metric: str, second: FeatureSet | None, first: FeatureSet | None) -> dict[str, Floor]:
        if second is None or first is None:
            return {}
        return {found.metric: found for found in floor(metric, second, first, self.real)}

    def _extract(
        self, extractor: Extractor, parts: Iterator[Tensor], count: int, source: str, key: str
    ) -> FeatureSet:
        """Features of pictures, or those of an earlier run where it can be told that they are the same."""
        known = self.tools.extractor_key is not None
        folder = self.folder / key[:20] if known else None
        if folder is not None and (folder / INDEX).exists():
            return replace(FeatureSet.open(folder), source=source)
        return extractor.extract(parts, source=source, count=count, folder=folder)

    def _lack(self, keys: list[str], error: BaseException) -> None:
        where, why, try_ = "bitbrush.evaluation.distribution", f"{type(error).__name__}: {error}", "leave it out"
        what = f"{', '.join(keys)} could not be computed"
        if isinstance(error, BitbrushError):
            what, where, why, try_ = error.what, error.where or where, error.why or "", error.try_ or try_
        known = {missing.key for missing in self.missing}
        self.missing += [Missing(key, what, where, why, try_) for key in keys if key not in known]
