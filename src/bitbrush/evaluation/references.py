"""What figures are measured against: a folder of pictures, or stored statistics of real ones."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitbrush.engine.disk import write_bytes
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.eight_bits import from_levels
from bitbrush.evaluation.feature_sets import FeatureSet, Floats, Gaussian

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LOSSLESS = {"1", "L", "P", "RGB"}  # modes that become RGB without loss
WITH_ALPHA = {"LA", "PA", "RGBA", "La", "RGBa"}
MIN_SIDE, MAX_PIXELS = 8, 64 * 2**20
THREADS = 4
Resize = Literal["stretch", "crop"]


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features of a reference set.

    Args:
        pooled: Of the pooled features.
        spatial: Of the spatial features, or None.
        source: Where they come from.
        extractor: The network's name if the file says it, else None.
        count: Number of pictures if the file says it, else None.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    source: str
    extractor: str | None = None
    count: int | None = None


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder in the order of their names. Make it with ``PictureFolder.open``.

    Args:
        files: The pictures.
        size: Height and width that every picture has after reading.
        resize: How others come to it; None: they are refused.
        background: Colour that stands behind transparent pictures, 0 to 255; None: they are refused.
        left_out: Names in the folder that are no pictures.
    """

    files: tuple[Path, ...]
    size: tuple[int, int]
    resize: Resize | None = None
    background: tuple[int, int, int] | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        size: tuple[int, int] | None = None,
        resize: Resize | None = None,
        background: tuple[int, int, int] | None = None,
        deep: bool = False,
    ) -> PictureFolder:
        """Lists a folder's PNG, JPEG and WebP files; what is in them is checked when they are read.

        Args:
            size: Height and width wanted; without it, those of the first picture.
            resize: ``"stretch"`` or ``"crop"`` (the shorter side to its length, then the middle), both with Pillow's
                antialiased bicubic filter on 8 bits (Parmar et al. 2022 on why that matters for FID).
            background: See above.
            deep: Folders below are read too.

        Raises:
            InputError: No such folder, or no picture in it.
        """
        root = Path(folder)
        found = sorted(path for path in (root.rglob("*") if deep else root.glob("*")) if path.is_file())
        files = tuple(path for path in found if path.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(
                "there are no pictures",
                where=str(root),
                why="no such folder" if not root.is_dir() else f"{len(found)} files, none ends with {_list(SUFFIXES)}",
                try_="name a folder of pictures" if deep else "name a folder of pictures, or deep=True for those below",
            )
        left_out = tuple(path.name for path in found if path.suffix.lower() not in SUFFIXES)
        if size is None:
            height, width, _ = read_picture(files[0], background=background).shape
            size = height, width
        return cls(files, size, resize, background, left_out)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch: int = 64) -> Iterator[Tensor]:
        """Pictures float32 [b, 3, H, W] in [-1, 1], at most ``batch`` at a time.

        Raises:
            InputError: A picture is broken, of a kind that cannot be taken without loss, or of another resolution.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(self.files), batch):
                read = list(pool.map(self._read, self.files[first : first + batch]))
                yield from_levels(torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2))

    @property
    def source(self) -> str:
        """The folder in words, for results."""
        height, width = self.size
        resized = f", others resized ({self.resize})" if self.resize else ""
        others = f", {len(self.left_out)} other files left out" if self.left_out else ""
        return f"{len(self)} pictures of {width}x{height} in {self.files[0].parent}{resized}{others}"

    def _read(self, path: Path) -> NDArray[np.uint8]:
        return read_picture(path, size=self.size, resize=self.resize, background=self.background)


def read_picture(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    resize: Resize | None = None,
    background: tuple[int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """One picture [H, W, 3], 8 bits a colour, turned as its EXIF says; grey and palette become RGB without loss.

    Raises:
        InputError: The picture is broken, has more than 8 bits a colour, several frames, transparent pixels without
            ``background``, another colour space, fewer than 8 or more than 64 million pixels, or another resolution.
    """
    try:
        with path.open("rb") as file:
            head = file.read(26)
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            _check_kind(path, picture, head)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            rgb = _to_rgb(path, upright, background)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise _refused(path, "is broken", f"{type(error).__name__}: {error}", "remove it or make it anew") from error
    if size is not None and (rgb.height, rgb.width) != size:
        rgb = _resized(path, rgb, size, resize)
    return np.asarray(rgb)


def _check_kind(path: Path, picture: Image.Image, head: bytes) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _refused(path, "is too large", f"{width}x{height} pixels, at most {MAX_PIXELS:,}", "scale it down")
    if min(width, height) < MIN_SIDE:
        raise _refused(path, "is too small", f"{width}x{height} pixels, at least {MIN_SIDE}x{MIN_SIDE}", "leave it out")
    if getattr(picture, "n_frames", 1) > 1:
        raise _refused(path, "moves", f"{getattr(picture, 'n_frames', 1)} frames", "save one frame of it")
    if head.startswith(b"\x89PNG") and head[24] > 8:  # Pillow would cut 16-bit colours to 8 without a word
        raise _refused(path, f"has {head[24]} bits a colour", "figures are defined for 8 bits", "save it with 8 bits")
    if picture.mode not in LOSSLESS | WITH_ALPHA:
        raise _refused(path, "has another colour space", f"mode {picture.mode}", "save it as RGB, 8 bits a colour")


def _to_rgb(path: Path, picture: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if picture.mode not in WITH_ALPHA and "transparency" not in picture.info:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    if layered.getchannel("A").getextrema() == (255, 255):
        return layered.convert("RGB")
    if background is None:
        raise _refused(
            path, "has transparent pixels", "the colour behind them is not known", "pass background=(255, 255, 255)"
        )
    return Image.alpha_composite(Image.new("RGBA", layered.size, (*background, 255)), layered).convert("RGB")


def _resized(path: Path, picture: Image.Image, size: tuple[int, int], resize: Resize | None) -> Image.Image:
    height, width = size
    if resize is None:
        raise _refused(
            path, "has another resolution", f"{picture.width}x{picture.height}, wanted {width}x{height}",
            'ask for it: resize="crop" or "stretch"',
        )  # fmt: skip
    if resize == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _refused(path: Path, how: str, why: str, try_: str) -> InputError:
    return InputError(f"a picture {how}", where=str(path), why=why, try_=try_)


def load_statistics(file: Path | str, split: str | None = None) -> Statistics:
    """Stored statistics: ``mu`` [d], ``sigma`` [d, d] and, if there, ``mu_s``, ``sigma_s`` of the spatial features.

    The layouts of pytorch-fid and of Dhariwal and Nichol (2021), as ``.npz`` or ``.safetensors``.

    Args:
        split: Read ``{split}.mu`` and so on instead: ``"train"`` or ``"test"`` of the zoo's CIFAR-10 file.

    Raises:
        ArtifactError: The file is missing, is of another kind, or holds no such statistics.
    """
    path = Path(file)
    reader = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix)
    if reader is None:
        raise _bad_statistics(path, f"the name ends with {path.suffix!r}, not .npz or .safetensors")
    start = f"{split}." if split else ""
    try:
        arrays, words = reader(path, [start + name for name in ("mu", "sigma", "mu_s", "sigma_s")])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise _bad_statistics(path, f"{type(error).__name__}: {error}") from error
    pooled = _gaussian(path, arrays, f"{start}mu", f"{start}sigma")
    if pooled is None:
        raise _bad_statistics(path, f"there is no {start}mu and {start}sigma in it")
    count = words.get("count", "")
    return Statistics(
        pooled, _gaussian(path, arrays, f"{start}mu_s", f"{start}sigma_s"),
        f"statistics {start}mu, {start}sigma of {path.name}" if split else f"statistics of {path.name}",
        words.get("extractor"), int(count) if count.isdecimal() else None,
    )  # fmt: skip


def summarize(features: FeatureSet) -> Statistics:
    """The statistics of a feature set, to compare many sets with without fitting it again."""
    spatial = features.gaussian(spatial=True) if features.spatial is not None else None
    return Statistics(features.gaussian(), spatial, features.source, features.extractor, features.count)


def save_statistics(features: FeatureSet, file: Path | str) -> Statistics:
    """Writes the statistics of a feature set as ``.safetensors``, with the extractor's name and count; returns them.

    Raises:
        ResourceError: The disk refuses.
    """
    found = summarize(features)
    arrays = {"mu": found.pooled.mu, "sigma": found.pooled.sigma}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mu, "sigma_s": found.spatial.sigma}
    words = {"extractor": features.extractor, "count": str(features.count), "source": features.source}
    write_bytes(file, save({name: torch.from_numpy(array) for name, array in arrays.items()}, metadata=words))
    return replace(found, source=f"statistics of {Path(file).name}")


_Read = tuple[dict[str, Floats], dict[str, str]]
_Reader = Callable[[Path, Sequence[str]], _Read]


def _read_npz(path: Path, names: Sequence[str]) -> _Read:
    held = np.load(path, allow_pickle=False)
    if not isinstance(held, np.lib.npyio.NpzFile):
        raise ValueError("no npz archive")
    with held:
        return {name: np.asarray(held[name], np.float64) for name in names if name in held.files}, {}


def _read_safetensors(path: Path, names: Sequence[str]) -> _Read:
    with safe_open(path, framework="pt") as held:
        keys = set(held.keys())
        return {name: held.get_tensor(name).double().numpy() for name in names if name in keys}, held.metadata() or {}


def _gaussian(path: Path, arrays: dict[str, Floats], mean: str, covariance: str) -> Gaussian | None:
    if mean not in arrays or covariance not in arrays:
        return None
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise _bad_statistics(path, f"{mean} has shape {mu.shape}, {covariance} {sigma.shape}; wanted [d] and [d, d]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise _bad_statistics(path, f"{mean} or {covariance} is not finite")
    if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-5 * float(np.abs(sigma).max())):
        raise _bad_statistics(path, f"{covariance} is not symmetric, so it is no covariance")
    return Gaussian(mu, sigma)


def _bad_statistics(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "stored statistics cannot be used", where=str(path), why=why,
        try_="give a .npz or .safetensors with mu [d] and sigma [d, d], or a split that is in it",
    )  # fmt: skip


def _list(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"
