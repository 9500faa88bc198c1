"""Damaged, foreign and hostile artifacts: each is refused by name, none is loaded, nothing outside is opened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

import bitbrush.artifact.diffusers_plugin as plugin
import tiny
from bitbrush.artifact import manifest
from bitbrush.artifact.load import load
from bitbrush.errors import ArtifactError, BitbrushError, InputError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def artifact(saved: Callable[..., Any], tmp_path: Path) -> Path:
    """A private copy of an artifact."""
    plugin.register()
    return Path(shutil.copytree(saved("unconditional", 4, mixed=True).folder, tmp_path / "out"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three little files with a manifest: enough where only the check matters."""
    folder = tmp_path / "small"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_bytes(b"{}\n")
    (folder / "unet" / "config.json").write_bytes(b"{}\n")
    (folder / "unet" / "model.safetensors").write_bytes(bytes(range(200)))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the manifest anew, as an attacker can."""
    names = [name for name in manifest.list_files(folder)[0] if name != manifest.NAME]
    (folder / manifest.NAME).write_bytes(manifest.describe(folder, names).to_bytes())


def refused(call: Callable[[], object], *words: str) -> BitbrushError:
    """The four-part error that a call raises, within a second."""
    start = time.perf_counter()
    with pytest.raises((ArtifactError, InputError)) as caught:
        call()
    assert time.perf_counter() - start < 2
    error = caught.value
    assert error.what and error.where and error.why and error.try_, error
    for word in words:
        assert word in str(error), f"{word!r} is not in\n{error}"
    return error


# ---- truncation and bit rot ------------------------------------------------------------------------------------
def test_truncated_files_are_named(artifact: Path) -> None:
    data = (artifact / WEIGHTS).read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    offsets = [v["data_offsets"][1] + header for k, v in json.loads(data[8:header]).items() if k != "__metadata__"]
    cuts = {len(data) * i // 64 for i in range(64)} | set(range(17)) | {header - 1, header, header + 1}
    cuts |= {end + d for end in offsets[:: max(1, len(offsets) // 20)] for d in (-1, 0, 1)}
    cases = 0
    for cut in sorted(cuts - {len(data), len(data) + 1}):
        (artifact / WEIGHTS).write_bytes(data[:cut])
        error = refused(lambda: load(artifact), WEIGHTS, f"is {100 * cut // len(data)} % complete", f"found {cut:,}")
        assert isinstance(error, ArtifactError)
        cases += 1
    (artifact / WEIGHTS).write_bytes(data)
    for name in manifest.check(artifact).files:
        whole = (artifact / name).read_bytes()
        for cut in {0, len(whole) // 2, len(whole) - 1}:
            (artifact / name).write_bytes(whole[:cut])
            refused(lambda: load(artifact), name, "% complete")
            refused(lambda: load(artifact, fast=True), name, "% complete")
            cases += 1
        (artifact / name).write_bytes(whole + b"\n")
        refused(lambda: load(artifact, fast=True), name.rsplit("/", 1)[-1], "has changed")
        (artifact / name).write_bytes(whole)
        cases += 1
    assert cases >= 150, cases


def test_every_bit_flip_is_named(artifact: Path) -> None:
    rng, cases = random.Random(0), 0
    names = sorted(manifest.check(artifact).files)
    for i in range(300):
        name = names[i % len(names)]
        flip(artifact / name, rng)
        refused(lambda: load(artifact), name.rsplit("/", 1)[-1], "has changed")
        cases += 1
        restore(artifact / name)
    assert cases == 300 and manifest.check(artifact)


_kept: dict[Path, bytes] = {}


def flip(path: Path, rng: random.Random, start: int = 0) -> int:
    """Flip one bit of a file at or after byte ``start``; `restore` puts it back."""
    data = bytearray(_kept.setdefault(path, path.read_bytes()))
    at = rng.randrange(start, len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return at


def restore(path: Path) -> None:
    path.write_bytes(_kept.pop(path))


def test_every_single_bit_of_the_manifest_counts(small: Path) -> None:
    path = small / manifest.NAME
    whole, cases = path.read_bytes(), 0
    for i in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[i] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(ArtifactError):
                manifest.read(path)
            cases += 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError):
            manifest.read(path)
    assert cases == 8 * len(whole) and len(whole) > 300
    path.write_bytes(whole)
    assert manifest.check(small).files["unet/model.safetensors"][0] == 200


def test_plain_from_pretrained_sees_flips_in_the_tensors(artifact: Path) -> None:
    """No manifest is read there: the digest in config.json covers every tensor of the denoiser."""
    path = artifact / WEIGHTS
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    layout = json.loads(data[8:header])
    kinds = {".codes3", ".codes4", ".codes8", "weight_scale", "weight_zero_point", "row_order", "input.scale",
             "inverse_scale", "input.zero_point", ".bias", "norm1.weight"}
    rng, cases = random.Random(1), 0
    for kind in sorted(kinds):
        name = next(key for key in sorted(layout) if key.endswith(kind))
        start, end = layout[name]["data_offsets"]
        for _ in range(4):
            damaged = bytearray(data)
            damaged[header + rng.randrange(start, end)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            refused(lambda: tiny.UNet2DModel.from_pretrained(artifact / "unet"))
            cases += 1
    for _ in range(20):  # a damaged header: an error of some kind, or what was saved
        damaged = bytearray(data)
        damaged[rng.randrange(8, header)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((BitbrushError, OSError, ValueError)):
            tiny.UNet2DModel.from_pretrained(artifact / "unet", use_safetensors=True)
        cases += 1
    assert cases == 4 * len(kinds) + 20


# ---- hostile manifests -----------------------------------------------------------------------------------------
def test_malformed_manifests(small: Path) -> None:
    path = small / manifest.NAME
    good: dict[str, Any] = json.loads(path.read_bytes())
    entry, name = good["files"]["unet/config.json"], "unet/config.json"

    def files(**changes: Any) -> dict[str, Any]:
        return {**good, "files": {**good["files"], name: {**entry, **changes}}}

    def text(value: object) -> bytes:
        return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"

    raw = path.read_bytes()
    corpus: list[bytes] = [
        b"", b"\x00", b"{", b"[]\n", b"null\n", b"1\n", b'"x"\n', b"\xff\xfe{}", b"{}\n", b"NaN\n", b"{}{}",
        raw + raw, raw[:-1], raw + b" ", b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r\n"),
        raw.decode().encode("utf-16"),
        b"[" * 100_000, b'{"a":' * 5_000, b"[" * 40 + b"]" * 40, b"9" * 5_000, b"-", b"1e999\n",
        json.dumps(good).encode(), text({**good, "extra": 1}), text({**good, "x": float("nan")}),
        raw.replace(b'"format": 1', b'"format": 1, "format": 1'), raw.replace(b'"format": 1', b'"format": 1.0'),
        raw.replace(b'"size": 3', b'"size": 3, "size": 3'), raw.replace(b'"size": 3', b'"size": Infinity'),
        raw.replace(b'"size": 3', b'"size": 03'), raw.replace(b'"size": 3', b'"size": 3e0'),
        raw.replace(b'"size": 3', b'"size": 1' + b"0" * 5_000),
        *[text({key: value for key, value in good.items() if key != gone}) for gone in good],
        *[text({**good, "format": value}) for value in (0, -1, 2, 10**9, "1", None, True, 1.5, [1], {})],
        *[text({**good, "bitbrush": value}) for value in (None, 1, [], "\ud800")],
        *[text({**good, "files": value}) for value in (None, 1, [], "x", {name: None}, {name: []}, {name: {}})],
        *[text({**good, "digest": value}) for value in (None, "", "0" * 64, 5)],
        *[text(files(size=value)) for value in (-1, 1 << 60, "3", None, 3.0, True, [])],
        *[text(files(sha256=value)) for value in ("", "0" * 63, "g" * 64, "A" * 64, None, 0, "0" * 64)],
        text(files(extra=1)), b'{"a": "' + b"x" * (17 << 20) + b'"}',
    ]
    for data in corpus:
        path.write_bytes(data)
        refused(lambda: manifest.check(small), manifest.NAME)
    assert len(corpus) >= 70, len(corpus)


def test_formats_of_other_releases_are_named(small: Path) -> None:
    path, cases = small / manifest.NAME, 0
    good = json.loads(path.read_bytes())
    for number, word in ((2, "newer release"), (10**9, "newer release")):
        path.write_bytes(manifest.canonical({**good, "format": number, "files": "of another form"}))
        refused(lambda: manifest.check(small), f"format version {number}", "reads 1", word)
        refused(partial(plugin.BitbrushConfig.from_dict, {"format_version": number, "codebook": 1}), word)
        cases += 1
    assert cases == 2


NAMES = [
    "../canary", "..", ".", "", "/etc/passwd", "//x", "unet/../../canary", "unet/..", "./unet", "unet//x", "unet/",
    "C:\\x", "C:/x.json", "unet\\config.json", "a\0b.json", "a\nb.json", "a b.json", " a.json", "a.json ", "~/x.json",
    "-x.json", "unet/-x.json", ".hidden.json", "unet/.hidden.json", ".run/x.json", "a" * 5000 + ".json",
    "/".join("abcdef") + ".json", "ｕnet/config.json", "unet∕config.json", "..∕canary.json", "a．．/b.json", "a..json",
    "x.bin", "x.pt", "x.py", "x.pkl", "unet/x.ckpt", "x.so", "x", "x.json.exe", "bitbrush.json", "$HOME.json",
    "%2e%2e/x.json",
    "file:x.json", "http://x/y.json", "x.json?", "x*.json", "|x.json", "x;y.json", "CON:.json", "é.json",
]  # fmt: skip


def test_names_that_lead_elsewhere(small: Path) -> None:
    canary = small.parent / "canary"
    canary.write_text("do not touch")
    entry = (12, hashlib.sha256(b"do not touch").hexdigest())
    opened = watch_opens(canary)
    for name in NAMES:
        bad = manifest.Manifest({**manifest.check(small).files, name: entry}, "0")
        before = (small / manifest.NAME).read_bytes()
        (small / manifest.NAME).write_bytes(bad.to_bytes())
        error = refused(lambda: load(small), manifest.NAME, "is not allowed")
        assert len(str(error)) < 1000
        (small / manifest.NAME).write_bytes(before)
    assert len(NAMES) >= 50 and len(set(NAMES)) == len(NAMES) and not opened


def watch_opens(canary: Path) -> list[str]:
    """Every later opening of a path with the canary's name (an audit hook cannot be removed: it stays, harmlessly)."""
    opened: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[0].endswith("/" + canary.name):
            opened.append(args[0])

    sys.addaudithook(hook)
    return opened


def test_links_and_devices_are_never_followed(small: Path) -> None:
    canary = small.parent / "canary2"
    canary.write_bytes((small / "unet" / "config.json").read_bytes())
    opened = watch_opens(canary)
    places = ["unet/config.json", "model_index.json", manifest.NAME, "unet", "extra.json", "unet/extra"]
    kinds: list[Callable[[Path], None]] = [
        lambda p: p.symlink_to(canary), lambda p: p.symlink_to(p), lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.symlink_to(canary.parent, target_is_directory=True), lambda p: os.mkfifo(p),
    ]
    cases = 0
    for place in places:
        for kind in kinds:
            folder = Path(shutil.copytree(small, small.parent / f"case{cases}"))
            target = folder / place
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            kind(target)
            refused(lambda folder=folder: load(folder), "not a regular file")  # type: ignore[misc]
            cases += 1
    assert cases == 30 and not opened


def test_pickles_beside_are_never_loaded(artifact: Path) -> None:
    trap = artifact.parent / "executed"
    pickle = b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR."
    places = [
        "unet/diffusion_pytorch_model.bin", "unet/pytorch_model.bin", "diffusion_pytorch_model.bin", "unet/weights.pt",
        "unet/weights.pth", "model.ckpt", "scheduler/state.pkl", "tape.npz", "unet/x.joblib", "unet/x.BIN",
        "unet/diffusion_pytorch_model.fp16.bin", "text_encoder/pytorch_model.bin",
    ]
    for place in places:
        (artifact / place).parent.mkdir(exist_ok=True)
        (artifact / place).write_bytes(pickle)
        refused(lambda: load(artifact), place, "only .safetensors is accepted")
        (artifact / place).unlink()
    (artifact / WEIGHTS).unlink()
    (artifact / "unet/diffusion_pytorch_model.bin").write_bytes(pickle)
    refused(lambda: load(artifact), WEIGHTS, "missing")
    names = [name for name in manifest.list_files(artifact)[0] if name != manifest.NAME]
    (artifact / manifest.NAME).write_bytes(manifest.describe(artifact, names).to_bytes())
    refused(lambda: load(artifact), "is not allowed")
    assert len(places) == 12 and not trap.exists()


def test_unlisted_files(artifact: Path) -> None:
    for name in ("README.md", "picture.png", "report.html", ".gitattributes", "unet/notes.md"):
        (artifact / name).write_text("harmless")
    (artifact / ".run").mkdir()
    (artifact / ".run" / "journal.jsonl").write_text("{}\n")
    assert manifest.check(artifact)
    cases = 0
    for name in (WEIGHTS + ".index.json", "unet/loader.py", "extra.json", "unet/more.safetensors"):
        (artifact / name).write_text("{}")
        refused(lambda: load(artifact), name, "does not belong")
        (artifact / name).unlink()
        cases += 1
    assert cases == 4


def test_missing_and_foreign(artifact: Path, tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "nowhere"), "no such folder")
    assert isinstance(refused(lambda: load(artifact / "model_index.json"), "no such folder"), InputError)
    names = sorted(manifest.check(artifact).files)
    for name in names:
        (artifact / name).rename(tmp_path / "aside")
        refused(lambda: load(artifact), name, "missing")
        (tmp_path / "aside").rename(artifact / name)
    (artifact / manifest.NAME).unlink()
    refused(lambda: load(artifact), "not a bitbrush artifact")
    (artifact / ".run").mkdir()
    refused(lambda: load(artifact), "not finished", "bitbrush resume")
    assert len(names) >= 7


# ---- code and other models -------------------------------------------------------------------------------------
def test_no_code_from_the_folder(artifact: Path) -> None:
    index = json.loads((artifact / "model_index.json").read_text())
    config = json.loads((artifact / "unet" / "config.json").read_text())
    attacks: list[tuple[str, dict[str, Any]]] = [
        ("model_index.json", {**index, "_class_name": ["loader", "Pipeline"]}),
        ("model_index.json", {**index, "_class_name": "NoSuchPipeline"}),
        ("model_index.json", {**index, "_class_name": "UNet2DModel"}),
        ("model_index.json", {**index, "_class_name": "logging"}),
        ("model_index.json", {k: v for k, v in index.items() if k != "_class_name"}),
        ("model_index.json", {**index, "unet": ["loader", "UNet2DModel"]}),
        ("model_index.json", {**index, "unet": ["os", "system"]}),
        ("model_index.json", {**index, "unet": ["../x", "UNet2DModel"]}),
        ("model_index.json", {**index, "unet": ["diffusers.utils", "UNet2DModel"]}),
        ("model_index.json", {**index, "unet": ["diffusers", "NoSuchModel"]}),
        ("model_index.json", {**index, "unet": ["diffusers", "UNet2DModel", "x"]}),
        ("model_index.json", {**index, "unet": [["diffusers"], "UNet2DModel"]}),
        ("unet/config.json", {**config, "auto_map": {"AutoModel": "loader.UNet2DModel"}}),
    ]
    for name, data in attacks:
        before = (artifact / name).read_bytes()
        (artifact / name).write_text(json.dumps(data))
        seal(artifact)
        refused(lambda: load(artifact), "outside diffusers and transformers")
        (artifact / name).write_bytes(before)
    seal(artifact)
    options: list[dict[str, Any]] = [
        {"trust_" + "remote_code": True}, {"custom_pipeline": "x"}, {"custom_revision": "x"},
        {"use_safetensors": False}, {"use_safetensors": None},
    ]
    for option in options:
        with pytest.raises(InputError, match="not allowed"):
            load(artifact, **option)
    assert len(attacks) == 13 and len(options) == 5 and load(artifact, use_safetensors=True)


def test_plans_that_do_not_fit(artifact: Path) -> None:
    path = artifact / "unet" / "config.json"
    config = json.loads(path.read_text())
    quant = config["quantization_config"]
    plan = quant["plan"]

    def planned(**changes: Any) -> dict[str, Any]:
        return {**quant, "plan": {**plan, **changes}}

    first = plan["layers"][0]
    spec = plan["specs"][0]
    cases = [
        {**quant, "extra": 1}, {**quant, "format_version": 2}, {**quant, "format_version": 0},
        {**quant, "format_version": "1"}, {**quant, "format_version": True}, {**quant, "digest": "0" * 64},
        {**quant, "plan": {"specs": [], "layers": []}}, {**quant, "plan": "x"}, {**quant, "plan": {"x": 1}},
        {key: value for key, value in quant.items() if key != "plan"},
        planned(layers=[*plan["layers"], ["no.such.layer", 0]]), planned(layers=plan["layers"][1:]),
        planned(layers=[*plan["layers"], first]), planned(layers=[[first[0], 99]]), planned(layers=[[first[0], -1]]),
        planned(layers=[[first[0]]]), planned(layers=7), planned(layers=[["conv_norm_out", 0]]),
        planned(timesteps=[3, 2]), planned(timesteps=["x"]), planned(timesteps=plan["timesteps"][:-1]),
        planned(timesteps=None), planned(specs=[{**spec, "surprise": 1}, *plan["specs"][1:]]),
        planned(specs=[{**spec, "segments": [1, 2]}, *plan["specs"][1:]]),
        planned(specs=[{**spec, "low_rank": 4}, *plan["specs"][1:]]),
        planned(specs=[{**spec, "weight": {**spec["weight"], "grid": {"bits": 9}}}, *plan["specs"][1:]]),
        planned(specs=[{**spec, "weight": {**spec["weight"], "row_bits": [3] * 5}}, *plan["specs"][1:]]),
    ]  # fmt: skip
    for case in cases:
        path.write_text(json.dumps({**config, "quantization_config": case}))
        seal(artifact)
        refused(lambda: load(artifact))
        refused(lambda: tiny.UNet2DModel.from_pretrained(artifact / "unet"))
    assert len(cases) == 27


def test_tensors_of_another_model(artifact: Path, saved: Callable[..., Any]) -> None:
    others = [saved("unconditional", 3).folder, saved("unconditional", 4).folder, saved("text", 4).folder]
    for other in others:
        shutil.copy(other / WEIGHTS, artifact / WEIGHTS)
        seal(artifact)
        refused(lambda: load(artifact), "another model")
    twin, _ = tiny.quantized_pipeline("unconditional", 4, seed=1, mixed=True)  # the same shapes, other numbers
    plugin.attach(twin.unet, saved("unconditional", 4, mixed=True).plan)
    twin.unet.save_pretrained(artifact.parent / "twin")
    shutil.copy(artifact.parent / "twin" / "diffusion_pytorch_model.safetensors", artifact / WEIGHTS)
    seal(artifact)
    refused(lambda: load(artifact), "have changed")
    assert len(others) == 3


def test_hostile_tensors_with_a_valid_digest(saved: Callable[..., Any], tmp_path: Path) -> None:
    """Whoever can write the digest can write any tensor: then the loader still checks what would crash a layer."""
    attacks: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("weight_scale", lambda t: t * float("nan")), ("weight_scale", lambda t: t * 0), ("weight_scale", lambda t: -t),
        ("input.scale", lambda t: t * float("inf")), ("input.inverse_scale", lambda t: -t),
        ("row_order", lambda t: t * 0), ("row_order", lambda t: t + 1), ("row_order", lambda t: t - 100),
    ]
    for i, (leaf, damage) in enumerate(attacks):
        pipe, plan = tiny.quantized_pipeline("unconditional", 3, mixed=True)
        name = next(key for key in pipe.unet.state_dict() if key.endswith("." + leaf))
        tensor = pipe.unet.state_dict()[name]
        tensor.copy_(damage(tensor))
        plugin.attach(pipe.unet, plan)
        pipe.unet.save_pretrained(tmp_path / str(i))
        refused(lambda i=i: tiny.UNet2DModel.from_pretrained(tmp_path / str(i)), name.rpartition("." + leaf)[0])  # type: ignore[misc]
    shape = tmp_path / "shape"
    saved("text").pipe.unet.save_pretrained(shape)
    file = shape / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda name, t: t[..., :-1] if name.endswith("codes4") else t)
    refused(lambda: UNet2DConditionModel.from_pretrained(shape), "wrong shape or type")
    saved("text").pipe.unet.save_pretrained(shape)
    rewrite(file, lambda _, t: t.int() if t.dtype == torch.uint8 else t)
    refused(lambda: UNet2DConditionModel.from_pretrained(shape), "wrong shape or type")
    assert len(attacks) == 8


def rewrite(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: change(name, file.get_tensor(name)).contiguous() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
