"""Do the evaluator's figures agree with torch-fidelity, torchmetrics and what is known of the zoo's statistics?

    python benchmarks/evaluator_check.py --zoo ZOO [--out FOLDER]
    python benchmarks/evaluator_check.py --smoke              # anywhere, seconds: random weights, nothing is written

Needs the extra ``eval``. ``--zoo`` is the folder with ``evaluators/`` in it, or a folder with the evaluators' files.

    statistics   FID of the real CIFAR-10 test pictures against the training pictures, both from the zoo's file: 0.34
    folders      FID, KID, Inception score, precision and recall on two folders of PNG files, in features of the zoo's
                 classifier, by us and by torch-fidelity's ``calculate_metrics`` with the classifier registered there
    pairs        PSNR and SSIM by us, by torchmetrics, and by scikit-image where it is installed

The folders hold smooth random pictures of two kinds: figures of equal code are compared, not pictures judged.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bitbrush.evaluation import psnr, ssim
from bitbrush.evaluation.distribution import Figure, frechet, measure
from bitbrush.evaluation.extractors import Extractor, zoo_classifier
from bitbrush.evaluation.features import ResNet
from bitbrush.evaluation.optional import fidelity, torchmetrics
from bitbrush.evaluation.references import PictureFolder, load_statistics

RESULTS = Path(__file__).parent / "results" / "evaluator"
KNOWN_TEST_FID, KNOWN_TOLERANCE = 0.34, 0.005
RELATIVE, PAIRS_RELATIVE = 1e-3, 1e-4
NAME = "bitbrush-evaluator-check"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-n", type=int, default=1200, help="pictures a folder")
    options = parser.parse_args()
    if options.zoo is None and not options.smoke:
        parser.error("--zoo or --smoke")
    with tempfile.TemporaryDirectory() as work:
        evaluators = random_evaluator(Path(work)) if options.zoo is None else options.zoo
        evaluators = evaluators / "evaluators" if (evaluators / "evaluators").is_dir() else evaluators
        extractor = zoo_classifier(evaluators / "cifar10-classifier.safetensors")
        parts = {"folders": folders(extractor, Path(work), 24 if options.smoke else options.n), "pairs": pairs()}
        if options.zoo is not None:
            parts["statistics"] = statistics(evaluators / "cifar10-stats.safetensors")
    ok = all(part["ok"] for part in parts.values())
    result = {"ok": ok, "weights": "random" if options.zoo is None else "zoo", **parts, "made_with": versions()}
    print(json.dumps(result, indent=1))
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if ok else 1


def statistics(file: Path) -> dict[str, Any]:
    """FID of the stored statistics of the test pictures against those of the training pictures."""
    test, train = load_statistics(file, "test"), load_statistics(file, "train")
    value = frechet(test.pooled, train.pooled)
    return {"fid_test_to_train": value, "known": KNOWN_TEST_FID, "ok": abs(value - KNOWN_TEST_FID) < KNOWN_TOLERANCE}


def folders(extractor: Extractor, work: Path, n: int) -> dict[str, Any]:
    """Our figures and torch-fidelity's on the same two folders."""
    places = [write(work / name, smooth(n, seed, scale)) for name, seed, scale in (("a", 1, 1.0), ("b", 2, 0.7))]
    opened = [PictureFolder.open(place) for place in places]
    ours, reference = (
        extractor.extract(folder.batches(), source=name) for folder, name in zip(opened, "ab", strict=True)
    )
    size = min(1000, n // 2)
    figures: list[Figure] = [
        *measure("fid", ours, reference), *measure("kid", ours, reference, subset_size=size),
        *measure("is", ours), *measure("prdc", ours, reference)[:2],
    ]  # fmt: skip
    theirs = run_torch_fidelity(extractor, [sorted(place.glob("*.png")) for place in places], size)
    keys = (
        "frechet_inception_distance",
        "kernel_inception_distance_mean",
        "inception_score_mean",
        "precision",
        "recall",
    )
    rows = {
        figure.metric: {
            "bitbrush": figure.value,
            "torch-fidelity": theirs[key],
            "relative": off(figure.value, theirs[key]),
        }
        for figure, key in zip(figures, keys, strict=True)
    }
    ok = all(row["relative"] <= RELATIVE for row in rows.values())
    return {"pictures": n, "kid_subset_size": size, "extractor": extractor.name, "figures": rows, "ok": ok}


def run_torch_fidelity(extractor: Extractor, files: list[list[Path]], subset_size: int) -> dict[str, float]:
    """``calculate_metrics`` on the files, read by torch-fidelity's own data set, with the classifier registered."""
    base = fidelity("feature_extractor_base").FeatureExtractorBase
    registry, datasets = fidelity("registry"), fidelity("datasets")

    class Classifier(base):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, levels: Tensor) -> tuple[Tensor | None, ...]:
            output = extractor.run(levels.float() / 127.5 - 1)
            found = {"features": output.pooled, "logits": output.logits}
            return tuple(found[name] for name in self.features_list)

    registry.register_feature_extractor(NAME, Classifier)
    first, second = (datasets.ImagesPathDataset([str(file) for file in part], to_levels) for part in files)
    return fidelity("metrics").calculate_metrics(
        input1=first, input2=second, feature_extractor=NAME, fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=subset_size, cuda=False, cache=False, verbose=False, batch_size=250, save_cpu_ram=True,
    )  # fmt: skip


def pairs() -> dict[str, Any]:
    """PSNR and SSIM of sixteen pairs."""
    reference = smooth(16, 3, 1.0, size=64)
    shown = (reference + 0.1 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(4))).clamp(-1, 1)
    functional = torchmetrics("functional.image")
    x, y = (shown.double() + 1) / 2, (reference.double() + 1) / 2
    decibels = functional.peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    _, whole = functional.structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    # The paper's windows lie inside the picture; torchmetrics' mean includes those that reflect its border.
    inside = whole[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    ours = {"PSNR": psnr(shown, reference), "SSIM": ssim(shown, reference)}
    others = {"torchmetrics": {"PSNR": decibels, "SSIM": inside}}
    if importlib.util.find_spec("skimage") is not None:
        others["scikit-image"] = by_scikit_image(x, y)
    rows: dict[str, Any] = {name: {"bitbrush": float(value.mean())} for name, value in ours.items()}
    for package, values in others.items():
        for name, value in values.items():
            worst = max(off(a, b) for a, b in zip(ours[name].tolist(), value.tolist(), strict=True))
            rows[name] |= {package: float(value.mean()), f"relative, {package}, worst picture": worst}
    limits = [value for row in rows.values() for key, value in row.items() if key.startswith("relative")]
    return {"pictures": len(shown), "figures": rows, "ok": max(limits) <= PAIRS_RELATIVE}


def by_scikit_image(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The same by scikit-image, with the paper's window."""
    metrics = importlib.import_module("skimage.metrics")
    both = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(x, y, strict=True)]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    return {
        "PSNR": torch.tensor([metrics.peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in both]),
        "SSIM": torch.tensor([metrics.structural_similarity(b, a, data_range=1.0, **window) for a, b in both]),
    }


def off(value: float, reference: float) -> float:
    """Relative difference."""
    return abs(value - reference) / max(abs(reference), 1e-12)


def smooth(n: int, seed: int, scale: float, *, size: int = 32) -> Tensor:
    """Smooth random pictures [n, 3, size, size] on 8-bit levels in [-1, 1]."""
    rough = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * scale
    shown = torch.nn.functional.interpolate(rough, size=(size, size), mode="bicubic").clamp(-1, 1)
    return ((shown + 1) * 127.5).round() / 127.5 - 1


def write(folder: Path, shown: Tensor) -> Path:
    """One PNG file a picture."""
    folder.mkdir()
    levels = ((shown.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    for i, picture in enumerate(levels):
        Image.fromarray(picture).save(folder / f"{i:05d}.png")
    return folder


def to_levels(picture: Image.Image) -> Tensor:
    """Levels [3, H, W], uint8, by Pillow's bytes."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1)


def random_evaluator(folder: Path) -> Path:
    """The classifier's file with random weights."""
    torch.manual_seed(0)
    save_file(ResNet(48, 1, 10).state_dict(), folder / "cifar10-classifier.safetensors")
    return folder


def versions() -> dict[str, str]:
    names = ("torch", "torch-fidelity", "torchmetrics", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in names}
    if importlib.util.find_spec("skimage") is not None:
        found["scikit-image"] = importlib.metadata.version("scikit-image")
    return found | {"python": platform.python_version(), "machine": platform.machine()}


if __name__ == "__main__":
    sys.exit(main())
