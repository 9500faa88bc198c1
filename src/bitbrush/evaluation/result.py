"""What an evaluation found: plain data, in JSON and back. Pictures go beside it, never into the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

import bitbrush
from bitbrush.engine.disk import write_bytes
from bitbrush.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from bitbrush.evaluation.table import Table

REFERENCE = "FP"
OTHER_SEEDS = "FP, other seeds"
FORMAT = 1


@dataclass(frozen=True)
class Value:
    """One number and all that has to stand beside it, whatever metric it is of.

    Args:
        key: ``"psnr"``, ``"psnr_worst5"``, ``"ssim"``, ``"lpips"``, ``"clip"``, ``"r1_heldout"``, ``"fid"``, ...
        label: What a reader calls it; names the feature extractor where its weights are not the published ones.
        group: ``"paired"`` (to the reference, picture by picture), ``"text"`` or ``"distribution"``.
        value: The number.
        low, high: Ends of its 95 % bootstrap interval over prompts; None where there is none.
        spread: Standard deviation over subsets or splits (KID, Inception score); None for others.
        better: Which way is better.
        digits: Decimal places that make sense.
        floor: What full precision against itself with other seeds shows; None if not measured or not applicable.
        count: Pictures it is computed from.
        warning: A sentence, or None.
        detail: Anything else: extractor, width, reference, subset size.
    """

    key: str
    label: str
    group: Literal["paired", "text", "distribution"]
    value: float
    low: float | None
    high: float | None
    spread: float | None
    better: Literal["higher", "lower"]
    digits: int
    floor: float | None
    count: int
    warning: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairedTest:
    """Two arms by one metric, picture by picture.

    Args:
        key: The metric's.
        first, second: Names of the arms.
        difference: Mean of first minus second with its 95 % interval.
        p: Two-sided probability under the null hypothesis that the sign of each prompt's difference is a coin toss.
        adjusted: ``p`` after Holm's correction over all tests of this evaluation.
        prompts: Pairs that the test has.
        detail: Kind of the test, what it compares, and whether it is a control: full precision with other seeds, which
            should differ from full precision no more than chance has it. Controls are corrected among themselves.
    """

    key: str
    first: str
    second: str
    difference: Estimate
    p: float
    adjusted: float
    prompts: int
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def significant(self) -> bool:
        """``adjusted`` is below 0.05."""
        return self.adjusted < 0.05


@dataclass(frozen=True)
class Missing:
    """A metric or part that was asked for and could not be computed; nothing stands in for it."""

    key: str
    what: str
    where: str | None
    why: str | None
    try_: str | None


@dataclass
class Evaluation:
    """What ``bitbrush.evaluate`` measured.

    Attributes:
        reference: Name of the reference arm.
        candidates: Names of the others, in the order given.
        settings: What was asked for and under what: n, seeds, steps, guidance, batch, scheduler, device, versions, ...
        values: arm -> its numbers, in the order to show them. The reference has text and distribution values too.
        tests: Candidates against each other, and against the reference where it has the metric. Arms are named as they
            are, and ``OTHER_SEEDS`` stands for full precision with other seeds.
        per_picture: arm -> metric -> [seeds][n].
        worst: candidate -> numbers of its worst pictures of the first seed, worst first.
        timesteps: Of the sampling steps [steps].
        step_errors: candidate -> for each step the mean over pictures of ||x_q - x_fp|| / ||x_fp||.
        cost: arm -> ``Cost.to_json()``; empty if not measured.
        inside: candidate -> ``Inside.to_json()``; empty if not measured.
        missing: What was asked for and is not here.
        notes: Warnings, in sentences.
        prompts: Of the kept pictures, in their order; empty for an unconditional pipeline.
        kept: Numbers of the kept pictures (first seed).
        pictures: arm -> the kept pictures [k, 3, H, W] in [-1, 1]. Not in the JSON form.
    """

    reference: str
    candidates: list[str]
    settings: dict[str, Any]
    values: dict[str, list[Value]] = field(default_factory=dict)
    tests: list[PairedTest] = field(default_factory=list)
    per_picture: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    worst: dict[str, list[int]] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    step_errors: dict[str, list[Estimate]] = field(default_factory=dict)
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    inside: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """The reference and the candidates."""
        return [self.reference, *self.candidates]

    def value(self, arm: str, key: str) -> Value | None:
        """The number ``key`` of an arm, or None where it has none."""
        return next((value for value in self.values.get(arm, []) if value.key == key), None)

    def table(self) -> Table:
        """The numbers and tests as text: a row an arm, a column a metric; print it, or see it in a notebook."""
        from bitbrush.evaluation.table import text

        return text(self)

    def save(self, path: Path | str, extras: Mapping[str, Any] | None = None) -> Path:
        """Writes the report, one HTML page that loads nothing.

        Args:
            path: The file; its folder is made.
            extras: What only the caller knows; see ``bitbrush.report.write_evaluation``.

        Raises:
            ResourceError: The file cannot be written.
        """
        written: Path = bitbrush.report.write_evaluation(path, self, dict(extras or {}))
        return written

    def to_json(self, path: Path | str | None = None) -> dict[str, Any]:
        """Plain data, without the pictures; also written to ``path``, where one is given.

        Raises:
            ResourceError: The file cannot be written.
        """
        data = self._plain()
        if path is not None:
            text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
            write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))
        return data

    def _plain(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "pictures"}
        plain["values"] = {arm: [asdict(value) for value in values] for arm, values in self.values.items()}
        plain["tests"] = [asdict(test) | {"significant": test.significant} for test in self.tests]
        plain["step_errors"] = {arm: [step.to_json() for step in curve] for arm, curve in self.step_errors.items()}
        plain["missing"] = [asdict(missing) for missing in self.missing]
        return {"format": FORMAT, **plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_json``; without pictures."""
        plain = {name: value for name, value in data.items() if name != "format"}
        plain["values"] = {arm: [Value(**value) for value in values] for arm, values in data["values"].items()}
        plain["tests"] = [_test(test) for test in data["tests"]]
        plain["step_errors"] = {arm: [Estimate(**s) for s in curve] for arm, curve in data["step_errors"].items()}
        plain["missing"] = [Missing(**missing) for missing in data["missing"]]
        return cls(**plain)


def _test(data: Mapping[str, Any]) -> PairedTest:
    known = {name: value for name, value in data.items() if name != "significant"}
    return PairedTest(**known | {"difference": Estimate(**data["difference"])})
