"""The outcome in words: what a candidate saved, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitbrush.evaluation.compare import Comparison
from bitbrush.report.text import interval, number, size


@dataclass
class Card:
    """One figure of the summary."""

    label: str
    value: str
    note: str


@dataclass
class Verdict:
    """The summary of one candidate."""

    arm: str
    headline: str
    sentences: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)


def verdict(
    comparison: Comparison, arm: str, history: Mapping[str, Any], sizes: Mapping[str, float], stored_as: str = ""
) -> Verdict:
    """Sums up one candidate. Says nothing about what was not measured. ``stored_as``: the reference's type on disk."""
    result = Verdict(arm, "")
    saved = _size(result, comparison, arm, sizes, stored_as)
    cost = _psnr(result, comparison, arm)
    _clip(result, comparison, arm)
    _retrieval(result, comparison, arm)
    _fid(result, comparison, arm)
    claims = " and ".join(part for part in (saved, cost) if part)
    bits = bits_in_words(history)
    result.headline = f"{bits}: {claims}" if bits and claims else claims or bits or arm
    result.headline = result.headline[:1].upper() + result.headline[1:]
    return result


def bits_in_words(history: Mapping[str, Any]) -> str:
    """``4-bit weights, 8-bit activations``; empty when the history does not say."""
    parts = []
    for key, what in (("weight_bits", "weights"), ("activation_bits", "activations")):
        bits = history.get(key)
        if isinstance(bits, int | float):
            parts.append(f"float {what}" if bits >= 16 else f"{bits:g}-bit {what}")
    return ", ".join(parts)


def _size(result: Verdict, comparison: Comparison, arm: str, sizes: Mapping[str, float], stored_as: str) -> str:
    full, packed = sizes.get(comparison.reference), sizes.get(arm)
    if not full or not packed:
        return ""
    ratio = full / packed
    kind = f" ({stored_as})" if stored_as else ""
    result.cards.append(Card("Size", f"{ratio:.1f}× smaller", f"{size(full)}{kind} to {size(packed)}"))
    share = f"{packed / full:.0%}".replace("%", " %")
    result.sentences.append(f"It takes {size(packed)} instead of {size(full)}{kind}, {share} of full precision.")
    return f"{ratio:.1f}× smaller"


def _psnr(result: Verdict, comparison: Comparison, arm: str) -> str:
    metrics = comparison.metrics[arm]
    if "psnr" not in metrics:
        return ""
    own = metrics["psnr"].to_json()
    result.sentences.append(
        f"Its pictures lie {number(own['value'], 1)} dB {interval(own, 1)} from those of full precision "
        "(PSNR, higher is closer)."
    )
    baseline = comparison.baseline
    if baseline is None or baseline == arm or "psnr" not in comparison.per_picture.get(baseline, {}):
        result.cards.append(Card("PSNR to full precision", f"{number(own['value'], 1)} dB", interval(own, 1)))
        return f"{number(own['value'], 1)} dB PSNR to full precision"
    gain = comparison.paired("psnr", arm, baseline).to_json()
    plain = comparison.metrics[baseline]["psnr"].value
    note = f"{number(own['value'], 1)} dB against {number(plain, 1)} dB"
    result.cards.append(Card("PSNR against plain rounding", f"{number(gain['value'], 1, sign=True)} dB", note))
    result.sentences.append(
        f"Plain rounding ({baseline}) reaches {number(plain, 1)} dB; picture by picture the difference is "
        f"{number(gain['value'], 2, sign=True)} dB {interval(gain, 2, sign=True)}."
    )
    if gain["low"] <= 0 <= gain["high"]:
        return "no measurable gain over plain rounding"
    side = "closer to" if gain["value"] > 0 else "further from"
    return f"{number(abs(gain['value']), 1)} dB {side} full precision than plain rounding"


def _clip(result: Verdict, comparison: Comparison, arm: str) -> None:
    metrics = comparison.metrics[arm]
    if "clip_difference" not in metrics:
        return
    change = metrics["clip_difference"].to_json()
    full = comparison.metrics[comparison.reference]["clip"].value
    change_text, change_interval = number(change["value"], 3, sign=True), interval(change, 3, sign=True)
    ours = metrics["clip"].value
    result.cards.append(Card("CLIP score", change_text, f"{number(ours, 3)} against {number(full, 3)}"))
    if change["low"] <= 0 <= change["high"]:
        result.sentences.append(
            f"No change of the emoji CLIP score is measurable: {change_text} {change_interval}, paired by prompt."
        )
    else:
        result.sentences.append(
            f"The emoji CLIP score goes from {number(full, 3)} to {number(ours, 3)}; the change is {change_text} "
            f"{change_interval}, paired by prompt."
        )


def _retrieval(result: Verdict, comparison: Comparison, arm: str) -> None:
    ours, full = comparison.metrics[arm], comparison.metrics[comparison.reference]
    parts = [
        f"{number(ours[key].value, 3)} on {what} prompts (full precision {number(full[key].value, 3)})"
        for key, what in (("r1_heldout", "held-out"), ("r1_seen", "seen"))
        if key in ours and key in full
    ]
    if parts:
        result.sentences.append(f"The evaluator finds a picture's own caption (R@1) in {', and in '.join(parts)}.")


def _fid(result: Verdict, comparison: Comparison, arm: str) -> None:
    ours, full = comparison.metrics[arm].get("fid"), comparison.metrics[comparison.reference].get("fid")
    if ours is None or full is None:
        return
    result.cards.append(Card("FID", number(ours.value, 2), f"full precision {number(full.value, 2)}"))
    result.sentences.append(f"FID goes from {number(full.value, 2)} to {number(ours.value, 2)} (lower is better).")
