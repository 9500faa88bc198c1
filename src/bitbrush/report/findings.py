"""The outcome of an evaluation in words: what each candidate cost, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitbrush.evaluation.result import Evaluation, PairedTest, Value
from bitbrush.evaluation.statistics import Estimate
from bitbrush.report.text import interval, number, size
from bitbrush.report.verdict import Card

FEATURES = "features"  # key of the test that compares features of two arms


@dataclass(frozen=True)
class Mark:
    """How a figure of a candidate stands to the reference's: a sign for the table, and words.

    ``kind`` is "worse", "better", "same" (no difference that could not be chance) or "unknown" (which way is better).
    """

    kind: str
    words: str

    @property
    def sign(self) -> str:
        """A sign that needs no colour."""
        return {"worse": "▼", "better": "▲", "same": "≈"}.get(self.kind, "")


@dataclass
class Finding:
    """The summary of one candidate."""

    arm: str
    claim: str
    sentence: str
    cards: list[Card] = field(default_factory=list)


def finding(evaluation: Evaluation, arm: str) -> Finding:
    """Sums up one candidate. Says nothing about what was not measured."""
    parts = [
        _size(evaluation, arm), _speed(evaluation, arm), _text(evaluation, arm), _distribution(evaluation, arm),
        _features(evaluation, arm), _paired(evaluation, arm),
    ]  # fmt: skip
    gains = [part.claim for part in parts[:2] if part is not None and part.claim]
    losses = [part for part in parts[2:] if part is not None]
    costs = [part.claim for part in losses if part.matters][:2]
    if not costs:  # no loss shown: what was looked at first, and how far the pictures lie
        more = [part.claim.removesuffix(f" to {_reference(evaluation)}") for part in losses[1:] if part is parts[5]]
        costs = [", ".join([*(part.claim for part in losses[:1]), *more])]
    claim = "; ".join(part for part in (" and ".join(gains), " and ".join(costs)) if part) or "nothing was measured"
    order = [part for part in (parts[5], parts[2], parts[3], parts[4], parts[0], parts[1]) if part is not None]
    sentence = " ".join(part.sentence for part in order if part.sentence)
    return Finding(arm, claim[:1].upper() + claim[1:], sentence, [part.card for part in order])


@dataclass(frozen=True)
class _Part:
    claim: str
    sentence: str
    card: Card
    matters: bool = False  # a change that is not chance: the headline must not leave it out


def mark(evaluation: Evaluation, arm: str, value: Value) -> Mark | None:
    """How ``value`` of a candidate stands to the reference's, from their paired test or the noise floor.

    None where neither exists: then nothing is said.
    """
    test = _oriented(evaluation, value.key, arm, evaluation.reference)
    if test is not None:
        difference, found = test
        if not found.significant:
            return Mark("same", f"not significant, {probability(found.adjusted)}")
        return Mark(_side(difference.value, value), f"significant, {probability(found.adjusted)}")
    full = evaluation.value(evaluation.reference, value.key)
    floor = value.floor if value.floor is not None else full.floor if full is not None else None
    if arm == evaluation.reference or full is None or floor is None or value.group != "distribution":
        return None
    change = value.value - full.value
    if abs(change) <= floor:
        return Mark("same", "within the noise floor")
    if abs(change) < 0.5 * 10**-value.digits:
        return Mark("same", "equal in the digits shown")
    return Mark(_side(change, value), "beyond the noise floor")


def leads(evaluation: Evaluation, arm: str, value: Value) -> bool:
    """Whether ``arm`` is significantly better than every other candidate by this metric."""
    others = [other for other in evaluation.candidates if other != arm]
    for other in others:
        test = _oriented(evaluation, value.key, arm, other)
        if test is None or not test[1].significant or _side(test[0].value, value) != "better":
            return False
    return bool(others) and arm in evaluation.candidates


def verdict(evaluation: Evaluation, test: PairedTest) -> Mark:
    """A paired test in words."""
    if not test.significant:
        return Mark("same", "no significant difference")
    value = evaluation.value(test.first, test.key) or evaluation.value(test.second, test.key)
    if value is None:
        higher = f"{test.first} is {'higher' if test.difference.value > 0 else 'lower'}"
        return Mark("unknown", "they differ" if test.key.startswith(FEATURES) else higher)
    side = _side(test.difference.value, value)
    return Mark(side, f"{test.first} is {side}")


def change(evaluation: Evaluation, arm: str, value: Value) -> tuple[float, Estimate | None] | None:
    """Change to the reference, with its interval where the test has one."""
    test = _oriented(evaluation, value.key, arm, evaluation.reference)
    if test is not None:
        return test[0].value, test[0]
    full = evaluation.value(evaluation.reference, value.key)
    return None if full is None else (value.value - full.value, None)


def probability(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``, on one line."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{min(p, 1.0):.3f}"


def ratio(full: Any, own: Any) -> float | None:
    """``full / own`` of two positive numbers."""
    usable = all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in (full, own))
    return full / own if usable else None


def speed_up(evaluation: Evaluation, arm: str) -> tuple[float, bool] | None:
    """Times a candidate is faster than the reference, and whether the spreads are apart.

    None unless both were timed in the same run, on the same device and in the same way.
    """
    full, own = (evaluation.cost.get(name) or {} for name in (evaluation.reference, arm))
    if any(full.get(key) != own.get(key) for key in ("run", "device", "device_name", "settings")):
        return None
    for key in ("picture_seconds", "step_seconds"):
        slow, fast = full.get(key) or {}, own.get(key) or {}
        times = ratio(slow.get("median"), fast.get("median"))
        if times is not None:
            apart = slow["low"] > fast["high"] or slow["high"] < fast["low"] if _spreads(slow, fast) else True
            return times, apart
    return None


def times_text(times: float) -> str:
    """``3.4×``, ``1.08×``."""
    return f"{times:.1f}×" if times >= 2 else f"{times:.2f}×"


def _spreads(*found: dict[str, Any]) -> bool:
    return all(isinstance(f.get(end), int | float) for f in found for end in ("low", "high"))


def _oriented(evaluation: Evaluation, key: str, arm: str, other: str) -> tuple[Estimate, PairedTest] | None:
    """The difference ``arm`` minus ``other`` and its test, whichever way round the test was made."""
    for test in evaluation.tests:
        if test.key == key and {test.first, test.second} == {arm, other} and arm != other:
            d = test.difference
            return (d if test.first == arm else Estimate(-d.value, -d.high, -d.low)), test
    return None


def _side(difference: float, value: Value) -> str:
    if difference == 0:
        return "same"
    return "better" if (difference > 0) == (value.better == "higher") else "worse"


def _first(evaluation: Evaluation, arm: str, group: str, preferred: Sequence[str]) -> Value | None:
    found = [value for value in evaluation.values.get(arm, []) if value.group == group]
    ranked = [value for key in preferred for value in found if value.key == key]
    return next(iter(ranked or found), None)


def _paired(evaluation: Evaluation, arm: str) -> _Part | None:
    value = _first(evaluation, arm, "paired", ("psnr", "lpips", "ssim"))
    if value is None:
        return None
    unit = " dB" if value.key.startswith("psnr") else ""
    shown, ends = number(value.value, value.digits) + unit, _ends(value)
    name = "PSNR" if value.key == "psnr" else heading(value.label)[0]
    sentence = f"To the pictures of {_reference(evaluation)} it has {shown} {name}{' ' + ends if ends else ''}"
    worst = evaluation.value(arm, f"{value.key}_worst5")
    if worst is not None:
        sentence += f", {number(worst.value, worst.digits)}{unit} in the worst 5 %"
    card = Card(f"{name} to {_reference(evaluation)}", shown, ends or pictures(value.count))
    return _Part(f"{shown} {name} to {_reference(evaluation)}", f"{sentence}.", card)


def _text(evaluation: Evaluation, arm: str) -> _Part | None:
    return _moved(evaluation, arm, _first(evaluation, arm, "text", ("clip",)))


def _distribution(evaluation: Evaluation, arm: str) -> _Part | None:
    return _moved(evaluation, arm, _first(evaluation, arm, "distribution", ("fid", "kid", "sfid")))


def _features(evaluation: Evaluation, arm: str) -> _Part | None:
    """Whether the pictures differ in the features of a network: the test with the same noise."""
    found = _oriented(evaluation, FEATURES, arm, evaluation.reference)
    if found is None:
        return None
    test = found[1]
    network = f" of {test.detail['features']}" if test.detail.get("features") else ""
    words = "a significant difference" if test.significant else "no significant difference"
    sentence = f"Features{network} show {words} to {_reference(evaluation)} ({probability(test.adjusted)})."
    value = "differ" if test.significant else "none seen"
    card = Card(f"Features{network}", value, f"paired test, {probability(test.adjusted)}")
    return _Part(f"{words} in features{network}", sentence, card, test.significant)


def _moved(evaluation: Evaluation, arm: str, value: Value | None) -> _Part | None:
    """A metric that the reference has too: from what to what, and whether that says anything."""
    if value is None:
        return None
    moved, full = change(evaluation, arm, value), evaluation.value(evaluation.reference, value.key)
    own = number(value.value, value.digits)
    if moved is None:
        return _Part(f"{value.label} {own}", f"{value.label}: {own}.", Card(value.label, own, _ends(value)))
    by, digits = number(moved[0], value.digits, sign=True), value.digits
    found = mark(evaluation, arm, value)
    before = f"{number(full.value, digits)} to " if full is not None else ""
    ends = f" {interval(moved[1].to_json(), digits, sign=True)}" if moved[1] is not None else ""
    words = f", {found.words}" if found is not None else ", significance not tested"
    sentence = f"{value.label}: {before}{own}, a change of {by}{ends}{words}."
    name, features = heading(value.label)
    title = f"{name}, {features.removeprefix('in features of ').removeprefix('by ')}" if features else name
    card = Card(title, by, f"{before}{own}{words}")
    return _Part(_claim(value, by, found), sentence, card, found is not None and found.kind != "same")


def _claim(value: Value, by: str, found: Mark | None) -> str:
    name, features = heading(value.label)
    if found is None:
        return f"{value.label} {by}"
    if found.kind != "same":
        reason = found.words.partition(",")[0]
        return f"{name}{f' {features}' if features else ''} {by} ({reason})"
    if found.words.startswith("within"):
        return f"{name}{f' {features}' if features else ''} {by}, within the noise floor"
    return f"no significant change of {value.label}"


def heading(label: str) -> tuple[str, str]:
    """``FID in features of: X`` as ``FID`` and ``in features of X``; ``CLIP score by X`` alike; other labels whole."""
    for word, shown in ((" in features of: ", "in features of"), (" by ", "by")):
        name, middle, rest = label.partition(word)
        if middle:
            return name, f"{shown} {rest}"
    return label, ""


def pictures(count: int) -> str:
    """``1 picture``, ``512 pictures``."""
    return f"{count:,} picture{'' if count == 1 else 's'}"


def _size(evaluation: Evaluation, arm: str) -> _Part | None:
    full, own = (evaluation.cost.get(name) or {} for name in (evaluation.reference, arm))
    for key, where in (("disk_bytes", "on disk"), ("weight_bytes", "of weights in memory")):
        times = ratio(full.get(key), own.get(key))
        if times is not None:
            words = f"{times_text(times)} smaller" if times >= 1.005 else f"{times_text(1 / times)} larger"
            words = words if abs(times - 1) >= 0.005 else "same size"
            note = f"{size(full[key])} to {size(own[key])}"
            claim = words if words != "same size" else ""
            sentence = f"It takes {size(own[key])} {where} instead of {size(full[key])}."
            return _Part(claim, sentence, Card(f"Size {where}", words, note))
    return None


def _speed(evaluation: Evaluation, arm: str) -> _Part | None:
    found = speed_up(evaluation, arm)
    if found is None:
        return None
    times, apart = found
    words = f"{times_text(times)} faster" if times >= 1 else f"{times_text(1 / times)} slower"
    own = evaluation.cost[arm]
    device = own.get("device_name") or own.get("device")
    where = f" on {device}" if device else ""
    if not apart:
        card = Card("Speed", "no difference", f"{words}, within the spread")
        return _Part("", f"Its speed{where} does not differ beyond the spread.", card)
    return _Part(words, f"It is {words}{where}, measured in the same run.", Card("Speed", words, f"same run{where}"))


def _ends(value: Value) -> str:
    if value.low is None or value.high is None:
        return "" if value.spread is None else f"± {number(value.spread, value.digits)}"
    return interval({"low": value.low, "high": value.high}, value.digits)


def _reference(evaluation: Evaluation) -> str:
    return "full precision" if evaluation.reference == "Full precision" else evaluation.reference
