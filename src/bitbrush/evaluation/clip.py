"""The emoji CLIP: does a picture show what its caption says? It knows emoji names only (see assets/README.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbrush import assets
from bitbrush.errors import ArtifactError, InputError
from bitbrush.evaluation.features import clip_image_tower, read_tensors

IMAGE_SIZE = 64
TOKENS = 24


class EmojiClip:
    """Scores pictures of emoji against texts. Build it with ``EmojiClip.load``.

    Args:
        image: Image tower, pictures [n, 3, 64, 64] in [-1, 1] to [n, 256].
        text: ``CLIPTextModelWithProjection``.
        tokenizer: Its tokenizer.
        captions: The texts that R@1 chooses among, without duplicates.
        heldout: Those of them that the generators never saw.
        device: Where both towers run.
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        tokenizer: Any,
        captions: Sequence[str],
        heldout: Sequence[str],
        device: str = "cpu",
    ) -> None:
        self.image, self.text, self.tokenizer, self.device = image.to(device), text.to(device), tokenizer, device
        self.captions, self.heldout = list(captions), frozenset(heldout)
        self._place = {caption: i for i, caption in enumerate(self.captions)}
        self._gallery: Tensor | None = None

    @classmethod
    def load(cls, folder: Path | str | None = None, *, device: str = "cpu") -> EmojiClip:
        """The evaluator in ``folder`` (default: the embedded one), with the embedded captions.

        Raises:
            ArtifactError: A file is missing or holds something else.
        """
        from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

        root = Path(folder) if folder is not None else assets.path("emoji-clip")
        image = clip_image_tower(root / "emoji-clip-image.safetensors")
        weights = read_tensors(root / "emoji-clip-text" / "model.safetensors")
        try:
            text = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(root / "emoji-clip-text"))
            text.load_state_dict(weights, strict=True)
            tokenizer = AutoTokenizer.from_pretrained(root / "emoji-clip-text" / "tokenizer", local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                "the evaluator's text tower cannot be read",
                where=str(root / "emoji-clip-text"),
                why=str(error),
                try_="restore the folder",
            ) from error
        text = text.float().eval().requires_grad_(False)
        return cls(image, text, tokenizer, assets.prompts("captions"), assets.prompts("heldout"), device)

    def embed_pictures(self, pictures: Tensor, *, batch: int = 128) -> Tensor:
        """Unit vectors [n, 256], float32, on the CPU, of pictures [n, 3, H, W] in [-1, 1] (area-resized to 64x64)."""
        with torch.no_grad():
            parts = [self.image(_resize(part.float().to(self.device))) for part in pictures.split(batch)]
        return F.normalize(torch.cat(parts), dim=-1).cpu()

    def embed_texts(self, texts: Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit vectors [n, 256], float32, on the CPU."""
        parts = []
        with torch.no_grad():
            for first in range(0, len(texts), batch):
                tokens = self.tokenizer(
                    list(texts[first : first + batch]),
                    padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt",
                )  # fmt: skip
                parts.append(self.text(input_ids=tokens["input_ids"].to(self.device)).text_embeds)
        return F.normalize(torch.cat(parts), dim=-1).cpu()

    def score(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture and its prompt.

        Args:
            pictures: [n, 3, H, W] in [-1, 1].
            prompts: n texts.

        Returns:
            [n] in [-1, 1], float32.

        Raises:
            InputError: The numbers differ.
        """
        _same_number(pictures, prompts)
        texts = sorted(set(prompts))
        place = {text: i for i, text in enumerate(texts)}
        targets = self.embed_texts(texts)[[place[prompt] for prompt in prompts]]
        return (self.embed_pictures(pictures) * targets).sum(dim=-1)

    def is_caption(self, prompts: Sequence[str]) -> Tensor:
        """[n] booleans: which prompts stand in the caption list. R@1 is defined for these only."""
        return torch.tensor([prompt in self._place for prompt in prompts], dtype=torch.bool)

    def is_heldout(self, prompts: Sequence[str]) -> Tensor:
        """[n] booleans: which prompts the generators never saw."""
        return torch.tensor([prompt in self.heldout for prompt in prompts], dtype=torch.bool)

    def gallery(self) -> Tensor:
        """Unit vectors [captions, 256] of all captions, embedded once."""
        if self._gallery is None:
            self._gallery = self.embed_texts(self.captions)
        return self._gallery

    def hits(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """[n] booleans: the nearest of all captions is the picture's own. Their mean is R@1.

        Raises:
            InputError: The numbers differ, or a prompt is no caption.
        """
        _same_number(pictures, prompts)
        strange = [prompt for prompt in prompts if prompt not in self._place]
        if strange:
            raise InputError(
                "R@1 is defined for prompts of the caption list only",
                where=repr(strange[0]),
                why=f"{len(strange)} of {len(prompts)} prompts are not among the {len(self.captions)} captions",
                try_="choose with is_caption() first",
            )
        nearest = (self.embed_pictures(pictures) @ self.gallery().T).argmax(dim=-1)
        return nearest == torch.tensor([self._place[prompt] for prompt in prompts])


def _resize(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")


def _same_number(pictures: Tensor, prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise InputError(
            "every picture needs its prompt",
            where="bitbrush.evaluation.clip",
            why=f"{len(pictures)} pictures, {len(prompts)} prompts",
            try_="pass the prompts that the pictures were drawn from",
        )
