"""Folders of pictures and stored statistics: read exactly, resized as asked, refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bitbrush.errors import ArtifactError, BitbrushError, InputError
from bitbrush.evaluation.distribution import as_features, fid
from bitbrush.evaluation.references import PictureFolder, load_statistics, read_picture, save_statistics
from folders import noise_features, pictures, write_folder

LEVELS = np.random.default_rng(0).integers(256, size=(16, 16, 3)).astype(np.uint8)


def test_a_folder_gives_its_pictures_exactly(tmp_path: Path) -> None:
    shown = pictures(7)
    folder = PictureFolder.open(write_folder(tmp_path, shown))
    parts = list(folder.batches(3))
    assert [len(part) for part in parts] == [3, 3, 1] and len(folder) == 7 and folder.size == (32, 32)
    assert torch.equal(torch.cat(parts), shown) and parts[0].dtype == torch.float32


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    smooth = Image.fromarray(LEVELS).resize((64, 64))
    smooth.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    error = np.abs(read_picture(tmp_path / f"a.{suffix}").astype(int) - np.asarray(smooth).astype(int))
    assert error.max() == 0 if suffix != "jpg" else 0 < error.mean() < 20


def test_grey_palette_and_opaque_pictures_become_rgb_without_loss(tmp_path: Path) -> None:
    grey = Image.fromarray(LEVELS[..., 0])
    grey.save(tmp_path / "grey.png")
    grey.convert("1").save(tmp_path / "bits.png")
    few = Image.fromarray(LEVELS // 64 * 64)
    few.quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(LEVELS).convert("RGBA").save(tmp_path / "opaque.png")
    assert np.array_equal(read_picture(tmp_path / "grey.png"), np.repeat(LEVELS[..., :1], 3, axis=2))
    assert set(np.unique(read_picture(tmp_path / "bits.png"))) <= {0, 255}
    assert np.array_equal(read_picture(tmp_path / "palette.png"), np.asarray(few.quantize(64).convert("RGB")))
    assert np.array_equal(read_picture(tmp_path / "opaque.png"), LEVELS)


def test_transparent_pixels_need_a_background(tmp_path: Path) -> None:
    half = Image.fromarray(LEVELS).convert("RGBA")
    half.putalpha(0)
    half.save(tmp_path / "alpha.png")
    with pytest.raises(InputError, match="background"):
        read_picture(tmp_path / "alpha.png")
    found = read_picture(tmp_path / "alpha.png", background=(255, 0, 10))
    assert (found == (255, 0, 10)).all()
    palette = Image.fromarray(LEVELS).quantize(8)
    palette.save(tmp_path / "clear.png", transparency=int(np.asarray(palette)[0, 0]))
    with pytest.raises(InputError, match="transparent"):
        read_picture(tmp_path / "clear.png")


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(LEVELS[:8]).save(tmp_path / "turned.png", exif=exif)
    found = read_picture(tmp_path / "turned.png")
    assert np.array_equal(found, np.rot90(LEVELS[:8], -1))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    Image.fromarray(LEVELS).save(held, kind, **options)  # type: ignore[arg-type]
    return held.getvalue()


def moving() -> bytes:
    held = io.BytesIO()
    frames = [Image.fromarray(LEVELS + i) for i in range(3)]
    frames[0].save(held, "PNG", save_all=True, append_images=frames[1:])
    return held.getvalue()


def cmyk() -> bytes:
    held = io.BytesIO()
    Image.fromarray(LEVELS).convert("CMYK").save(held, "JPEG")
    return held.getvalue()


BAD = {
    "empty": (b"", "broken"),
    "text": (b"no picture at all", "broken"),
    "cut png": (saved("PNG")[:200], "broken"),
    "cut jpeg": (saved("JPEG")[:400], "broken"),
    "cut webp": (saved("WEBP", lossless=True)[:100], "broken"),
    "changed png": (saved("PNG").replace(b"IDAT", b"IDAX"), "broken"),
    "gif": (saved("GIF"), "broken"),
    "1x1": (png(1, 1, 8, 2, b"\0\1\2\3"), "too small"),
    "16-bit grey": (png(16, 16, 16, 0, (b"\0" + bytes(32)) * 16), "16 bits"),
    "16-bit colour": (png(16, 16, 16, 2, (b"\0" + bytes(96)) * 16), "16 bits"),
    "16-bit alpha": (png(16, 16, 16, 6, (b"\0" + bytes(128)) * 16), "16 bits"),
    "bomb": (png(60000, 60000, 8, 2, b""), "broken|too large"),
    "large": (png(9000, 8000, 8, 2, b""), "too large"),
    "animated": (moving(), "moves"),
    "cmyk": (cmyk(), "colour space"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, match = BAD[name]
    write_folder(tmp_path, pictures(2, size=16))
    path = tmp_path / f"{name}.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        list(PictureFolder.open(tmp_path, size=(16, 16)).batches())
    error = caught.value
    assert error.where == str(path) and error.why and error.try_


def test_another_resolution_is_refused_or_resized_as_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(2, size=16))
    Image.fromarray(np.kron(LEVELS[:8], np.ones((4, 4, 1), np.uint8))).save(tmp_path / "z.png")  # 64x32
    with pytest.raises(InputError, match="another resolution") as caught:
        list(PictureFolder.open(tmp_path).batches())
    assert "64x32, wanted 16x16" in str(caught.value) and str(tmp_path / "z.png") in str(caught.value)
    found = {}
    for way in ("stretch", "crop"):
        folder = PictureFolder.open(tmp_path, size=(16, 16), resize=way)
        found[way] = next(iter(folder.batches()))
        assert found[way].shape == (3, 3, 16, 16) and way in folder.source
        assert torch.equal(found[way][:2], pictures(2, size=16))  # those of the right size stay as they are
    assert not torch.equal(found["stretch"], found["crop"])


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(2))
    (tmp_path / "captions.txt").write_text("a cat")
    write_folder(tmp_path / "below", pictures(3))
    flat, deep = PictureFolder.open(tmp_path), PictureFolder.open(tmp_path, deep=True)
    assert (len(flat), len(deep)) == (2, 5) and flat.left_out == ("captions.txt",)
    assert "1 other files left out" in flat.source
    (tmp_path / "none").mkdir()
    for folder, match in ((tmp_path / "none", "none ends with"), (tmp_path / "gone", "no such folder")):
        with pytest.raises(InputError, match=match):
            PictureFolder.open(folder)


def test_statistics_are_read_from_both_kinds_of_files(tmp_path: Path) -> None:
    found = as_features(noise_features(50, 4), extractor="x", source="noise")
    fitted = found.gaussian()
    np.savez(tmp_path / "a.npz", mu=fitted.mu, sigma=fitted.sigma, arr_0=np.zeros(3))
    saved_too = save_statistics(found, tmp_path / "deep" / "b.safetensors")
    for stats in (load_statistics(tmp_path / "a.npz"), load_statistics(tmp_path / "deep" / "b.safetensors"), saved_too):
        assert np.array_equal(stats.pooled.sigma, fitted.sigma) and stats.spatial is None
        assert fid(found, stats)[0].value == pytest.approx(0, abs=1e-5)
    kept = load_statistics(tmp_path / "deep" / "b.safetensors")
    assert (kept.extractor, kept.count) == ("x", 50) and load_statistics(tmp_path / "a.npz").extractor is None
    with pytest.raises(InputError, match="another feature extractor"):
        fid(as_features(noise_features(50, 4), extractor="y", source="noise"), kept)


def test_the_zoos_layout(tmp_path: Path) -> None:
    tensors = {
        "train.mu": torch.zeros(3),
        "train.sigma": torch.eye(3),
        "test.mu": torch.ones(3),
        "test.sigma": torch.eye(3),
    }
    save_file(tensors, tmp_path / "cifar10-stats.safetensors")
    assert load_statistics(tmp_path / "cifar10-stats.safetensors", "train").pooled.mu.tolist() == [0, 0, 0]
    test = load_statistics(tmp_path / "cifar10-stats.safetensors", "test")
    assert test.pooled.mu.tolist() == [1, 1, 1] and "test.mu" in test.source
    with pytest.raises(ArtifactError, match=r"no validation\.mu"):
        load_statistics(tmp_path / "cifar10-stats.safetensors", "validation")
    with pytest.raises(ArtifactError, match="no mu"):
        load_statistics(tmp_path / "cifar10-stats.safetensors")


def test_unusable_statistics_are_refused(tmp_path: Path) -> None:
    skew = np.eye(3)
    skew[0, 1] = 5
    np.savez(tmp_path / "objects.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))  # a pickle inside
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.array([np.nan] * 3), sigma=np.eye(3))
    np.savez(tmp_path / "skew.npz", mu=np.zeros(3), sigma=skew)
    np.savez(tmp_path / "text.npz", mu=np.array(["a"] * 3), sigma=np.eye(3))
    np.save(tmp_path / "array", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "skew.npz").read_bytes()[:100])
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "stats.pkl").write_bytes(b"")
    names = {"objects.npz": "pickle", "shape.npz": r"\[d, d\]", "nan.npz": "finite", "skew.npz": "symmetric"}
    names |= dict.fromkeys(
        ("text.npz", "array.npz", "cut.npz", "cut.safetensors", "gone.npz", "stats.pkl"), "cannot be used"
    )
    for name, match in names.items():
        with pytest.raises(ArtifactError, match=match) as caught:
            load_statistics(tmp_path / name)
        assert name in str(caught.value) and isinstance(caught.value, BitbrushError)
