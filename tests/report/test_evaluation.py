"""The page of an evaluation: what it says, and that its words follow the numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluations
from bitbrush.errors import InputError, ResourceError
from bitbrush.evaluation.result import Evaluation, PairedTest
from bitbrush.evaluation.statistics import Estimate
from bitbrush.report import render_evaluation, write_evaluation
from bitbrush.report.cleaned import cleaned
from bitbrush.report.evaluation import policy
from bitbrush.report.expense import brief, quantity
from bitbrush.report.findings import finding, leads, mark, speed_up
from bitbrush.report.flip import FIRST, album
from bitbrush.report.intervals import axis, extent
from bitbrush.report.svg import tick_text, ticks
from markup import Page, without_map


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_evaluation(evaluations.full(), evaluations.extras()))


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_the_page_tells_what_was_measured(page: Page) -> None:
    text = words(page)
    for part in (
        "ours and torchao against full precision", "5.9× smaller and 1.67× faster", "1.23× slower",
        "no significant change of CLIP score by the emoji CLIP", "PSNR, worst 5 %", "[25.1, 25.7]", "floor ± 0.38",
        "in features of CIFAR-10 classifier of the zoo", "within the noise floor", "beyond the noise floor",
        "there is no file vgg16-397923af.pth", "put the file there", "fewer than twice the 512 features",
        "512 pictures were drawn", "Farthest from the reference", "#377", "Paired tests", "triton int8 x int4",
        "4.61", "7.9× fewer", "7.10 ms", "Kurtosis", "To the token “panda”", "rho = −0.87 at 4 bits (9 layers)",
        "other seeds 9.3", "Features of CIFAR-10 classifier of the zoo", "control, energy distance",
        "Full precision, other seeds", "preset", "torch 2.13.0",
        "bitbrush eval OUT --reference emoji-sd", "6 min 52 s", "3.21 GB", "Only a test.",
    ):  # fmt: skip
        assert part in text.replace("\u00a0", " "), part


def test_the_page_loads_and_runs_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "video", "audio", "svg"}
    attributes = {key for _, attrs in page.tags for key, _ in attrs}
    assert not {a for a in attributes if a.startswith("on")} and not attributes & {"href", "style", "srcset"}
    assert all(s.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for s in page.sources)


def test_the_policy_allows_the_one_style_sheet_by_its_hash() -> None:
    html = render_evaluation(evaluations.full())
    styles = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    found = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert len(styles) == len(found) == 1
    assert found[0].replace("&#39;", "'") == policy(styles[0])
    assert policy(styles[0]).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in found[0] and "url(" not in styles[0] and "@import" not in styles[0]


def test_no_text_from_outside_enters_the_style_sheet_or_a_plot() -> None:
    def fixed(texts: dict[str, str]) -> tuple[list[str], list[str]]:
        html = without_map(render_evaluation(evaluations.full(texts), evaluations.extras(texts)))
        return re.findall(r"<style>.*?</style>", html, flags=re.DOTALL), re.findall(r"data:image/svg[^\"]*", html)

    plain, other = fixed({}), fixed({name: f"other {name}" for name in evaluations.SINKS if name != "reference"})
    assert len(plain[1]) > 20 and plain == other


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = (render_evaluation(evaluations.full(), evaluations.extras()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("make", [evaluations.minimal, evaluations.edges, evaluations.full])
def test_every_evaluation_makes_a_page_from_its_json_too(make: Any, tmp_path: Path) -> None:
    plain = Evaluation.from_json(json.loads(json.dumps(make().to_json())))
    for made in (make(), plain):
        file = write_evaluation(tmp_path / "folder" / "report.html", made)
        text = file.read_text(encoding="utf-8")
        assert "About this evaluation" in text and "nan" not in Page(text).text.lower()
        assert Page(text).tags.count(("div", (("class", "frame"),))) == (0 if made is plain else _frames(made))


def _frames(made: Evaluation) -> int:
    found = album(cleaned(made))
    return 0 if found is None else sum(len(tile["shots"]) for group in found["groups"] for tile in group["tiles"])


def test_a_minimal_page_has_no_empty_section() -> None:
    text = words(Page(render_evaluation(evaluations.minimal())))
    assert "21.5 dB PSNR to full precision" in text and "1 picture" in text and "1 pictures" not in text
    for heading in ("Pictures ", "Cost", "Inside", "Sensitivity", "Paired tests", "Asked for", "sampling step"):
        assert heading not in text.replace("Pictures a seed", ""), heading


def test_zero_candidates_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without candidates"):
        write_evaluation(tmp_path / "x.html", Evaluation("FP", [], {}))
    with pytest.raises(InputError, match="two arms are named 'a'"):
        write_evaluation(tmp_path / "x.html", Evaluation("FP", ["a", "a"], {}))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("old", encoding="utf-8")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ResourceError):
        write_evaluation(file, evaluations.minimal())
    assert file.read_text(encoding="utf-8") == "old"


def test_arms_whose_names_read_alike_stay_apart() -> None:
    made = Evaluation("FP", ["a\x00", "a\\x00", "Full precision", " "], {})
    made.values = {arm: [replace(evaluations.minimal().values["candidate"][0], value=float(i))] for i, arm in
                   enumerate(made.candidates)}  # fmt: skip
    clean = cleaned(made)
    assert clean.arms == ["Full precision", "a\\x00", "a\\x00 (2)", "Full precision (2)", "arm 4"]
    assert [clean.values[arm][0].value for arm in clean.candidates] == [0.0, 1.0, 2.0, 3.0]


# ---- words ---------------------------------------------------------------------------------------------------------
def test_the_claim_leaves_out_no_significant_loss() -> None:
    made = evaluations.full()
    assert (
        "CLIP score by the emoji CLIP −0.043 (significant) and FID in features of CIFAR-10 classifier of the zoo +2.94"
        in finding(made, "torchao").claim
    )
    assert "FID" not in finding(made, "ours").claim, "within the floor, and CLIP says it"
    assert finding(made, "ours").claim.endswith("by the emoji CLIP, 25.4 dB PSNR"), "no loss shown: how far, at least"
    made.tests = [replace(test, adjusted=0.01) for test in made.tests]
    assert "CLIP score by the emoji CLIP −0.005 (significant)" in finding(made, "ours").claim


@pytest.mark.parametrize(
    ("difference", "adjusted", "turned", "kind"),
    [(-0.1, 0.01, False, "worse"), (0.1, 0.01, False, "better"), (-0.1, 0.01, True, "better"),
     (0.1, 0.01, True, "worse"), (-0.1, 0.2, False, "same"), (0.0, 0.01, False, "same")],
)  # fmt: skip
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_marks_follow_test_direction_and_metric(
    difference: float, adjusted: float, turned: bool, kind: str, better: Any
) -> None:
    made = evaluations.minimal()
    value = replace(made.values["candidate"][0], key="clip", better=better)
    arms = ("FP", "candidate") if turned else ("candidate", "FP")
    estimate = Estimate(difference, difference - 0.05, difference + 0.05)
    made.tests = [PairedTest("clip", *arms, estimate, adjusted, adjusted, 64)]
    flipped = {"worse": "better", "better": "worse", "same": "same"}
    found = mark(made, "candidate", value)
    assert found is not None and found.kind == (kind if better == "higher" else flipped[kind])


def test_without_test_and_floor_nothing_is_said() -> None:
    made = evaluations.full()
    r1 = made.values["ours"][4]
    assert mark(made, "ours", replace(r1, floor=0.9)) is None, "a floor of one run is no test"
    made.tests = []
    assert mark(made, "ours", made.values["ours"][3]) is None and "not tested" in finding(made, "ours").sentence
    fid = made.values["ours"][5]
    found = mark(made, "ours", fid)
    assert found is not None and found.words == "within the noise floor"
    without = [replace(v, floor=None) for v in made.values["FP"]]
    made.values["FP"] = without
    assert mark(made, "ours", replace(fid, floor=None)) is None


def test_only_a_significant_lead_over_all_others_is_bold() -> None:
    made = evaluations.full()
    psnr, ssim = made.values["ours"][0], made.values["ours"][2]
    assert leads(made, "ours", psnr) and not leads(made, "torchao", made.values["torchao"][0])
    made.tests = [replace(test, adjusted=0.3) if test.key == "psnr" else test for test in made.tests]
    assert not leads(made, "ours", psnr) and leads(made, "ours", ssim)
    made.candidates.append("third")
    assert not leads(made, "ours", ssim), "not tested against the third"
    assert not leads(evaluations.minimal(), "candidate", psnr), "nobody to lead"


def test_a_speed_up_needs_a_baseline_of_the_same_run_and_device() -> None:
    made = evaluations.full()
    assert speed_up(made, "ours") == (pytest.approx(164 / 98), True)
    made.cost["ours"]["picture_seconds"] |= {"low": 0.001, "high": 0.1}
    assert speed_up(made, "ours") == (pytest.approx(164 / 98), False)
    assert "faster" not in finding(made, "ours").claim
    for key in ("run", "device", "settings"):
        other = evaluations.full()
        other.cost["FP"][key] = "another"
        assert speed_up(other, "ours") is None, key
    del made.cost["FP"]
    assert speed_up(made, "ours") is None and "faster" not in render_evaluation(made).replace("faster than", "")


def test_features_that_differ_are_said_where_fid_does_not_say_so() -> None:
    made = evaluations.full()
    for arm in made.arms:
        made.values[arm] = [value for value in made.values[arm] if value.group == "paired"]
    assert "a significant difference in features of CIFAR-10 classifier" in finding(made, "torchao").claim
    found = finding(made, "ours")
    assert "no significant difference in features" in found.claim and "25.4 dB" in found.sentence


def test_sizes_and_bits_come_from_the_command_where_cost_was_not_measured() -> None:
    made = evaluations.full()
    made.cost = {}
    more = {"sizes": {"FP": 8_000_000, "ours": 2_000_000}, "histories": {"ours": {"weight_bits": 4}}}
    text = words(Page(render_evaluation(made, more)))
    assert "ours 4-bit weights: 4.0× smaller" in text and "8 MB to 2 MB" in text and "torchao: CLIP" in text
    assert made.cost == {}, "the evaluation stays as it was"


@pytest.mark.parametrize(
    ("found", "said"),
    [({"output_error~psnr": {"rho": -0.5, "n": 3}}, "rho = −0.50 (3 layers)."),
     ({"4": {"output_error~psnr": -0.9, "n": 7}, "3": {"output_error~psnr": None, "n": 7}}, "rho = −0.90 at 4 bits"),
     ({}, "")],
)  # fmt: skip
def test_rank_correlations_of_sensitivity(found: dict[str, Any], said: str) -> None:
    data = evaluations.extras()["sensitivity"] | {"rank_correlation": found}
    data["rows"][3] |= {"psnr": None}
    text = words(Page(render_evaluation(evaluations.minimal(), {"sensitivity": data})))
    assert said in text and ("rho" in text) == bool(said)
    assert text.index("not finite") < text.index("24.1 dB"), "pictures that are not finite are the worst"


def test_ranges_that_are_not_finite_are_left_out() -> None:
    made = evaluations.full()
    layer = next(iter(made.inside["ours"]["activations"].values()))
    layer["high"][3] = None
    text = words(Page(render_evaluation(made)))
    assert "6 of 7 layers" in text and "6 of 8 layers" in text


# ---- pictures ------------------------------------------------------------------------------------------------------
def test_first_and_worst_pictures_with_their_distances() -> None:
    made = cleaned(evaluations.full())
    found = album(made)
    assert found is not None
    first, ours, torchao = found["groups"]
    assert [tile["number"] for tile in first["tiles"]] == list(range(FIRST))
    assert [tile["number"] for tile in ours["tiles"]] == made.worst["ours"]
    assert (ours["arm"], torchao["arm"]) == ("ours", "torchao")
    number = made.worst["ours"][0]
    expected = made.per_picture["ours"]["psnr"][0][number]
    assert ours["tiles"][0]["shots"][1]["note"] == f"{expected:.1f} dB"
    assert ours["tiles"][0]["prompt"] == made.prompts[made.kept.index(number)]
    made.per_picture = {}
    again = album(made)
    assert again is not None and again["groups"][1]["tiles"][0]["shots"][1]["note"] == f"{expected:.1f} dB"


def test_pictures_equal_to_the_reference_are_called_equal() -> None:
    found = album(cleaned(evaluations.edges()))
    assert found is not None and found["groups"][0]["tiles"][0]["shots"][1]["note"] == "equal"
    assert [tile["number"] for tile in found["groups"][1]["tiles"]] == [0], "picture 7 is not kept"


def test_an_album_needs_pictures_of_two_arms() -> None:
    made = evaluations.full()
    made.pictures = {"FP": made.pictures["FP"]}
    assert album(made) is None
    made.pictures = {"ours": torch.zeros(2, 3, 4, 4)}
    assert album(made) is None


# ---- numbers -------------------------------------------------------------------------------------------------------
def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and ticks(1, 20, 4, whole=True) == [5, 10, 15, 20]
    assert ticks(1, 2, 10, whole=True) == [1, 2] and ticks(3, 3, 5) == [3]
    assert [tick_text(t, ticks(0, 1, 5)) for t in ticks(0, 1, 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert tick_text(-5, [-5, 0, 5]) == "−5" and tick_text(2e6, [0, 2e6]) == "2e06"
    for low, high in ((1e-12, 3e-12), (-7e8, 9e8), (0.1234, 0.1239)):
        found = ticks(low, high, 5)
        assert 2 <= len(found) <= 8 and all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)


def test_short_times_and_large_counts() -> None:
    assert [brief(s) for s in (0, 4.2e-5, 0.0123, 0.9996, 3.21, 75, 3000)] == [
        "0 s", "42.0 µs", "12.3 ms", "1.00 s", "3.21 s", "75.0 s", "50 min",
    ]  # fmt: skip
    assert [quantity(v) for v in (0, 812, 4.21e9, 6.4e12)] == ["0", "812", "4.21 G", "6.40 T"]


def test_an_axis_holds_all_intervals_and_the_floor() -> None:
    made = evaluations.full()
    values = [made.values[arm][-2] for arm in made.arms]
    scale = axis(values, values[0])
    assert scale.floor == (pytest.approx(8.04), pytest.approx(8.8)) and scale.low < 8.04 and scale.high > 11.36
    kid = made.values["ours"][6]
    assert extent(kid) == (pytest.approx(0.0018), pytest.approx(0.003))
    assert axis([kid], None).floor is None
