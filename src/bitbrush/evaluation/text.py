"""Does a picture show what its prompt says? The emoji CLIP, or transformers' CLIP from the user's cache or a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from bitbrush import assets
from bitbrush.errors import ArtifactError
from bitbrush.evaluation.clip import EmojiClip
from bitbrush.evaluation.digests import file_digest
from bitbrush.evaluation.eight_bits import round_to_8_bits
from bitbrush.evaluation.optional import Unavailable

PUBLISHED = "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of all OpenAI CLIPs
WANTED = ("config.json", "model.safetensors")
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


class Evaluator(Protocol):
    """Two towers into one space, as `EmojiClip` and `TransformersClip` have them."""

    def embed_pictures(self, pictures: Tensor, *, batch: int = 128) -> Tensor:
        """Unit vectors [n, d], float32, on the CPU, of pictures [n, 3, H, W] in [-1, 1]."""

    def embed_texts(self, texts: Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit vectors [n, d], float32, on the CPU."""


class TransformersClip:
    """transformers' ``CLIPModel``. Make it with ``TransformersClip.load``.

    Pictures are rounded to 8 bits, brought to the model's size (shorter side, bicubic and antialiased, then the middle)
    and normalised as its ``preprocessor_config.json`` says.

    Args:
        label: Its name beside every figure: the hub id for weights of the hub's cache, else folder and digest.
        model: ``CLIPModel``.
        tokenizer: Its tokenizer.
        mean, std: Of the three colours, on intensities from 0 to 1.
        device: Where it runs.
    """

    def __init__(
        self, label: str, model: Any, tokenizer: Any, mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.label, self.model, self.tokenizer, self.device = label, model.to(device), tokenizer, device
        self.size = int(model.config.vision_config.image_size)
        self.mean, self.std = (torch.tensor(tuple(c)).view(3, 1, 1).to(device) for c in (mean, std))

    @classmethod
    def load(cls, name: str | Path = PUBLISHED, *, device: str = "cpu") -> TransformersClip:
        """The model in a folder, or of a hub id from the cache; nothing is downloaded, nothing is unpickled.

        Raises:
            Unavailable: It is not there; the message says which files are wanted and where they were looked for.
            ArtifactError: It is there and cannot be read.
        """
        from transformers import AutoTokenizer, CLIPModel

        folder = Path(name)
        if not folder.is_dir():
            folder = _cached(str(name))
        absent = [file for file in WANTED if not (folder / file).is_file()]
        if absent:
            raise _absent(str(name), folder, f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not there")
        try:
            options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
            loaded: Any = CLIPModel.from_pretrained(folder, **options)
            model = _whole(*loaded)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            colours = _colours(folder / "preprocessor_config.json")
        except UNREADABLE as error:
            raise ArtifactError(
                "the CLIP model cannot be read", where=str(folder), why=f"{type(error).__name__}: {error}"[:400],
                try_="give a folder as CLIPModel.save_pretrained and its tokenizer write it",
            ) from error  # fmt: skip
        label = str(name)
        if Path(name).is_dir():
            label = f"the CLIP in {Path(name).resolve().name} ({file_digest(folder / WANTED[1])[:8]})"
        return cls(label, model.float().eval().requires_grad_(False), tokenizer, *colours, device=device)

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor, *, batch: int = 128) -> Tensor:
        """Unit vectors [n, d], float32, on the CPU, of pictures [n, 3, H, W] in [-1, 1]."""
        parts = [self.model.get_image_features(pixel_values=self._ready(part)) for part in pictures.split(batch)]
        return F.normalize(torch.cat([_tensor(part) for part in parts]), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit vectors [n, d], float32, on the CPU."""
        parts = []
        length = int(self.model.config.text_config.max_position_embeddings)
        for first in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[first : first + batch]), padding="max_length", max_length=length,
                                    truncation=True, return_tensors="pt").to(self.device)
            parts.append(_tensor(self.model.get_text_features(**tokens)))
        return F.normalize(torch.cat(parts), dim=-1).cpu()

    def _ready(self, pictures: Tensor) -> Tensor:
        x = (round_to_8_bits(pictures).to(self.device) + 1) / 2
        height, width = x.shape[-2:]
        scale = self.size / min(height, width)
        size = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        return (x[..., top : top + self.size, left : left + self.size] - self.mean) / self.std


class Judge:
    """An evaluator with the prompts of one evaluation: texts are embedded once.

    Args:
        evaluator: Its towers.
        prompts: Of the pictures, in their order.
        captions: The closed set that R@1 chooses among; None: the evaluator's own, where it has one.
    """

    def __init__(self, evaluator: Evaluator, prompts: Sequence[str], captions: Sequence[str] | None = None) -> None:
        self.evaluator, self.prompts = evaluator, list(prompts)
        own = evaluator.captions if isinstance(evaluator, EmojiClip) else []
        self.captions = list(dict.fromkeys(captions)) if captions is not None else own
        self.heldout = evaluator.heldout if isinstance(evaluator, EmojiClip) and captions is None else frozenset[str]()
        texts = sorted(set(prompts))
        place = {text: i for i, text in enumerate(texts)}
        self._targets = evaluator.embed_texts(texts)[[place[prompt] for prompt in prompts]]
        self._place = {caption: i for i, caption in enumerate(self.captions)}
        self._gallery: Tensor | None = None

    @property
    def label(self) -> str:
        """What the towers are called."""
        return evaluator_label(self.evaluator)

    def groups(self) -> dict[str, list[int]]:
        """``r1_heldout`` and ``r1_seen`` (or ``r1``) to the numbers of the prompts that R@1 is defined for."""
        known = [i for i, prompt in enumerate(self.prompts) if prompt in self._place]
        if not self.heldout:
            return {"r1": known} if known else {}
        parts = {"r1_heldout": [i for i in known if self.prompts[i] in self.heldout]}
        parts["r1_seen"] = [i for i in known if self.prompts[i] not in self.heldout]
        return {key: members for key, members in parts.items() if members}

    def look(self, pictures: Tensor, part: range) -> tuple[Tensor, Tensor]:
        """Embeddings [b, d] of the pictures with these numbers, and their scores [b] against their prompts."""
        found = self.evaluator.embed_pictures(pictures)
        return found, (found * self._targets[part.start : part.stop]).sum(dim=-1)

    def hits(self, embedded: Tensor, members: Sequence[int]) -> Tensor:
        """[m] booleans for chosen pictures of all that were embedded: the nearest caption is their own."""
        if self._gallery is None:
            if isinstance(self.evaluator, EmojiClip) and self.captions is self.evaluator.captions:
                self._gallery = self.evaluator.gallery()  # kept there for the next evaluation
            else:
                self._gallery = self.evaluator.embed_texts(self.captions)
        nearest = (embedded[list(members)] @ self._gallery.T).argmax(dim=-1)
        return nearest == torch.tensor([self._place[self.prompts[i]] for i in members])


def evaluator_label(evaluator: Evaluator) -> str:
    """What an evaluator is called: the model's name."""
    return "the emoji CLIP" if isinstance(evaluator, EmojiClip) else str(getattr(evaluator, "label", "a given CLIP"))


def open_evaluator(
    given: Any, *, speaks_emoji: Callable[[], bool], device: str = "cpu"
) -> Evaluator:  # fmt: skip
    """The evaluator that was asked for.

    Args:
        given: An evaluator, ``"emoji"``, a folder or a hub id of transformers' CLIP; None: the emoji CLIP for models
            with its vocabulary, else OpenAI's from the cache.
        speaks_emoji: Whether the reference has the emoji models' vocabulary; asked only where that decides.
        device: Where it runs.

    Raises:
        Unavailable, ArtifactError: As for ``TransformersClip.load``.
    """
    if given is not None and not isinstance(given, str | Path):
        found: Evaluator = given
        return found
    if given == "emoji" or (given is None and speaks_emoji()):
        return EmojiClip.load(device=device)
    return TransformersClip.load(PUBLISHED if given is None else given, device=device)


def has_emoji_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer holds the emoji models' whole vocabulary; the emoji CLIP says nothing about other models."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return False
    stored = json.loads(assets.path("emoji-sd-tiny/tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    return bool(stored["model"]["vocab"].items() <= tokenizer.get_vocab().items())


def _cached(name: str) -> Path:
    """The snapshot folder of a hub id in the cache; where it would be, if it is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise _absent(name, Path(name), "there is no such folder")
    found = try_to_load_from_cache(name, WANTED[0])
    if not isinstance(found, str):
        raise _absent(name, place, f"the cache has no {WANTED[0]} of it")
    return Path(found).parent


def _absent(name: str, looked: Path, why: str) -> Unavailable:
    return Unavailable(
        f"the CLIP model {name} is not there", where=str(looked),
        why=f"{why}; wanted: {', '.join(WANTED)} and its tokenizer. Nothing is downloaded on its own",
        try_=f"fetch it into the cache yourself (hf download {PUBLISHED}), or give a folder with these files",
    )  # fmt: skip


def _whole(model: Any, found: Any) -> Any:
    """transformers fills tensors that a file lacks with random numbers, and only warns."""
    lost = [*found["missing_keys"], *found["mismatched_keys"]]
    if lost:
        raise ValueError(f"{len(lost)} tensors are not in the file or have another shape, first: {lost[0]}")
    return model


def _colours(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found.get("image_mean", MEAN), found.get("image_std", STD)


def _tensor(found: Any) -> Tensor:
    """Features as older and newer releases of transformers return them."""
    tensor: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return tensor
