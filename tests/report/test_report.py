"""The page: what it says, that it stays inert, that its words follow the numbers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bitbrush.errors import ResourceError
from bitbrush.evaluation import Comparison, bootstrap_mean, paired_difference
from bitbrush.report import plots, write_report
from bitbrush.report.html import _layer_rows, _layers_in_order, render
from bitbrush.report.pictures import amplification, difference_png, png
from bitbrush.report.strip import CAPTION, GAP, LEFT, SIDE, TOP, strip
from bitbrush.report.text import duration, inert, number, plot_label, size
from bitbrush.report.verdict import bits_in_words, verdict
from markup import PAYLOADS, Page, check_svg

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def comparison(name: str = "Q-Diffusion", prompt: str = "red apple", *, gain: float = 4.0) -> Comparison:
    rng = torch.Generator().manual_seed(0)
    base = 20 + torch.randn(1, 40, generator=rng)
    ours = base + gain + 0.1 * torch.randn(1, 40, generator=rng)
    clip = 0.8 + 0.05 * torch.randn(1, 40, generator=rng)
    per = {
        "FP": {"clip": clip.tolist()},
        "rtn": {"psnr": base.tolist(), "clip": (clip - 0.04).tolist()},
        name: {"psnr": ours.tolist(), "clip": (clip - 0.01).tolist()},
    }
    metrics = {arm: {metric: bootstrap_mean(v) for metric, v in found.items()} for arm, found in per.items()}
    for arm in ("rtn", name):
        metrics[arm]["clip_difference"] = paired_difference(per[arm]["clip"], per["FP"]["clip"])
    curve = [bootstrap_mean([0.0, 0.0]), bootstrap_mean([0.1, 0.2]), bootstrap_mean([0.3, 0.4])]
    pictures = {arm: torch.rand(2, 3, 16, 16, generator=rng) * 2 - 1 for arm in per}
    settings = {
        "n": 40,
        "seeds": [0],
        "steps": 3,
        "guidance": 4.0,
        "batch": 8,
        "sampler": "own",
        "tracked": 2,
        "keep": 2,
    }
    return Comparison(
        "FP", "rtn", metrics, per, [901.0, 501.0, 1.0], {"rtn": curve, name: curve}, dict.fromkeys(per, 0.5), settings,
        ["Only a test."], [prompt, "pizza"], pictures,
    )  # fmt: skip


def history(layer: str = "mid_block.attentions.0.to_q", recipe: str = "qdiffusion") -> dict[str, Any]:
    specs = {"weight_bits": 4, "activation_bits": 8, "parameters": 4096, "packed_bytes": 2048, "segments": [32, 32]}
    times = {"timesteps": [1, 401, 801], "low": [-1.0, -2.0, -3.0], "high": [1.0, 2.0, 4.0]}
    unit = {"step": "weights", "unit": layer, "loss_start": 0.1, "loss_end": 0.02, "kept": "trained"}
    return {
        "recipe": recipe, "weight_bits": 4, "activation_bits": 8, "average_bits": 4.6,
        "layers": {layer: specs, "conv_out": {"weight_bits": 16, "activation_bits": 16, "parameters": 10}},
        "units": [unit, unit | {"loss_end": 0.0}], "ranges": {layer: times}, "kept_float": {f"{layer}.b": layer},
    }  # fmt: skip


def extras(text: str = "plain") -> dict[str, Any]:
    return {
        "model": text, "command": f"bitbrush quantize {text}", "seconds": 212.4, "peak_memory": 2_100_000_000,
        "device": text, "versions": {"torch": text, text: "1"}, "settings": {text: text, "preset": "demo"},
        "sizes": {"FP": 9_655_744, "rtn": 2_900_000}, "sizes_of": text, "stored_as": text, "notes": [text],
        "parts": {text: 20.0}, "cpu_seconds": 400.0,
        "promises": [{"what": text, "bar": text, "found": text, "kept": True}],
    }  # fmt: skip


def page_with(text: str) -> Page:
    return Page(render(comparison(text, text), {text: history(text, text)}, extras(text)))


@pytest.fixture(scope="module")
def harmless() -> Page:
    return page_with("plain")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_stays_text(payload: str, harmless: Page) -> None:
    page = page_with(payload)
    assert page.tags == harmless.tags
    assert inert(payload) in page.text
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in page.sources)
    for source in page.sources:
        if "svg" in source[:20]:
            check_svg(base64.b64decode(source.split(",", 1)[1]))


def test_the_page_loads_and_runs_nothing(harmless: Page) -> None:
    tags = {tag for tag, _ in harmless.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "video", "audio", "svg"}
    attributes = {key for _, attrs in harmless.tags for key, _ in attrs}
    assert not {a for a in attributes if a.startswith("on")} and "href" not in attributes
    policies = [dict(attrs) for tag, attrs in harmless.tags if tag == "meta" and dict(attrs).get("http-equiv")]
    assert [p["content"] for p in policies] == [POLICY]
    assert len([s for s in harmless.sources if s.startswith("data:image/png")]) == 2 * 5


def test_the_page_tells_what_was_measured() -> None:
    text = Page(render(comparison(), {"Q-Diffusion": history()}, extras("emoji"))).text
    for part in (
        "4-bit weights, 8-bit activations", "closer to full precision than plain rounding",
        "mid_block.attentions.0.to_q",
        "32 + 32", "4.60 bits a weight", "Only a test.", "3 min 32 s", "2.1 GB", "red apple", "501",
    ):  # fmt: skip
        assert part in text, part


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = (render(comparison(), {"Q-Diffusion": history()}, extras()) for _ in range(2))
    assert first == second


def test_a_bare_comparison_is_enough(tmp_path: Path) -> None:
    bare = Comparison.from_json(json.loads(json.dumps(comparison().to_json())))
    file = write_report(tmp_path / "report.html", bare, {"Q-Diffusion": {}}, {})
    page = Page(file.read_text(encoding="utf-8"))
    assert "Pictures" not in [t.strip() for t in page.text.splitlines()] and "What it cost" in page.text


def test_home_and_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    token = "hf_" + "a" * 30
    command = f"bitbrush quantize /home/ada/model --token {token} https://ada:secret@example.com/x /home/adam/y"
    text = Page(render(comparison(), {}, {"command": command})).text
    assert "~/model" in text and token not in text and "secret" not in text and "/home/adam/y" in text


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("old", encoding="utf-8")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ResourceError):
        write_report(file, comparison(), {}, {})
    assert file.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [file]


def test_the_verdict_follows_the_sign() -> None:
    sizes = {"FP": 100.0, "Q-Diffusion": 25.0}
    better = verdict(comparison(), "Q-Diffusion", history(), sizes)
    assert better.headline.startswith("4-bit weights, 8-bit activations: 4.0× smaller and ")
    assert "dB closer to" in better.headline
    assert "dB further from" in verdict(comparison(gain=-2.0), "Q-Diffusion", {}, {}).headline
    assert "no measurable gain" in verdict(comparison(gain=0.0), "Q-Diffusion", {}, {}).headline.lower()


def test_the_verdict_says_nothing_about_what_was_not_measured() -> None:
    found = comparison()
    found.metrics["Q-Diffusion"] = {}
    bare = verdict(found, "Q-Diffusion", {}, {})
    assert bare.cards == [] and bare.sentences == [] and bare.headline == "Q-Diffusion"


def test_bits_in_words() -> None:
    assert bits_in_words({"weight_bits": 4, "activation_bits": 16}) == "4-bit weights, float activations"
    assert bits_in_words({}) == ""


def test_numbers_in_words() -> None:
    assert [number(-0.004, 2), number(-1.5, 1), number(2, 1, sign=True)] == ["0.00", "−1.5", "+2.0"]
    assert number(-0.0, 1, sign=True) == "0.0" and number(float("nan")) == "not finite"
    assert [size(999), size(9_655_744), size(2.1e9)] == ["999 B", "9.66 MB", "2.1 GB"]
    assert [duration(0.4), duration(38), duration(312), duration(7380)] == [
        "0.40 s",
        "38 s",
        "5 min 12 s",
        "2 h 03 min",
    ]


def test_labels_for_plots() -> None:
    assert plot_label("a$b") == r"a\$b" and plot_label("日本") == r"\u65e5\u672c"
    long = plot_label("x" * 100, 20)
    assert len(long) <= 20 and "..." in long


def test_inert_reaches_everything() -> None:
    found = inert({"a\x00": ["b\x1b", {"c": ("d\u202e", 1, None)}], "p": Path("x\n")})
    assert found == {"a\\x00": ["b\\x1b", {"c": ["d\\u202e", 1, None]}], "p": "x\\n"}
    assert inert("👩\u200d🚒 é ²") == "👩\u200d🚒 é ²"


def test_differences_are_amplified_as_stated() -> None:
    reference = torch.zeros(3, 4, 4)
    assert amplification([torch.full((1, 3, 4, 4), 0.2)]) == 8 and amplification([torch.full((1, 3, 4, 4), 2.0)]) == 1
    assert amplification([]) == 1
    white, grey = png(torch.ones(3, 4, 4)), png(torch.zeros(3, 4, 4))
    assert difference_png(reference, reference, 8) == white
    assert difference_png(reference + 0.125, reference, 8) == grey  # 8 * 0.125 / 2 is half of the range


# ---- what a run adds -------------------------------------------------------------------------------------------
def test_two_results_share_a_title() -> None:
    made = comparison()
    made.metrics["other"] = made.metrics["Q-Diffusion"]
    made.per_picture["other"] = made.per_picture["Q-Diffusion"]
    page = render(made, {}, {})
    assert "<h1>Q-Diffusion and other against full precision</h1>" in page


def test_promises_times_and_the_best_of_a_row() -> None:
    promises = [
        {"what": "time", "bar": "within 6:00", "found": "5:06", "kept": True},
        {"what": "gain", "bar": "at least 1 dB", "found": "+0.2 dB", "kept": False},
    ]
    extras = {"promises": promises, "parts": {"rtn": 20.4, "drawing": 82.0}, "cpu_seconds": 300.0, "seconds": 180.0}
    page = render(comparison(), {}, extras)
    for text in (
        "within 6:00",
        '<td class="kept">kept</td>',
        '<td class="missed">missed</td>',
        "rtn 20 s",
        "5 min 00 s",
    ):
        assert text in page
    assert page.count('<div class="note best">') == 2, "one a row"
    plain = render(comparison(), {}, {})
    assert "Promised" not in plain and "of which" not in plain and "Processor time" not in plain


def test_layers_stand_in_the_order_they_run_with_those_that_stay_float() -> None:
    names = ["conv_out", "conv_in", "mid_block.attentions.0.to_q", "down_blocks.0.resnets.0.conv1"]
    specs = {"weight_bits": 4, "activation_bits": 8, "parameters": 10, "packed_bytes": 5, "segments": []}
    units = ["conv_in", "down_blocks.0.resnets.0", "mid_block.attentions.0", "conv_out"]
    found = {
        "layers": dict.fromkeys(names[2:], specs),
        "kept_float": {"conv_out": "the baseline leaves it", "conv_in": "the baseline leaves it"},
        "units": [{"step": "pack", "unit": unit} for unit in units],
    }
    rows = _layer_rows(_layers_in_order(found))
    assert [row["name"] for row in rows] == [names[1], names[3], names[2], names[0]]
    assert rows[0]["weights"] == rows[0]["activations"] == "float" and rows[0]["segments"] == "the baseline leaves it"
    page = render(comparison(), {"rtn": found}, {})
    assert "2 layers stay float" in page and "the baseline leaves it" in page
    without = {key: value for key, value in found.items() if key != "units"}
    assert list(_layers_in_order(without)) == [*names[2:], *names[:2]], "an unknown order is kept"


def test_ranges_of_one_input_are_shown_once() -> None:
    def layer(high: float) -> dict[str, list[float]]:
        return {"timesteps": [1.0, 500.0], "low": [-1.0, -1.0], "high": [1.0, high]}

    same = {f"down_blocks.{i}.time_emb_proj": layer(9.0 + 0.01 * i) for i in range(8)}
    others = {f"block.{i}.conv{i % 3}": layer(2.0 + i) for i in range(5)}
    _, shown = plots.ranges({**same, **others})
    assert len([name for name in shown if "time_emb_proj" in name]) == 1 and len(shown) == 6
    assert {name.rpartition(".")[2] for name in shown} == {"time_emb_proj", "conv0", "conv1", "conv2"}


def test_a_strip_has_a_row_an_arm_and_a_column_a_prompt(tmp_path: Path) -> None:
    made = comparison(prompt="a \u202e very long prompt of many, many words that cannot fit above one picture at all")
    labels = {"FP": ("Full precision", ""), "rtn": ("Plain rounding", "W4A8"), "Q-Diffusion": ("Q-Diffusion", "W4A8")}
    with Image.open(io.BytesIO(strip(made, labels))) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert picture.size == (LEFT + 2 * SIDE + GAP + 8, TOP + 3 * (SIDE + CAPTION))
    narrow = strip(made, {"FP": labels["FP"]}, columns=1)
    with Image.open(io.BytesIO(narrow)) as picture:
        assert picture.size == (LEFT + SIDE + 8, TOP + SIDE + CAPTION)
    assert strip(made, labels) == strip(made, labels)
