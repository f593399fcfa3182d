"""The training data as the loop needs it: latents and text conditioning, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spf_plugin.errors import SPFError
from spf_plugin.families.base import Text
from spf_plugin.text import map_text
from spf_plugin.trainer.data import Picture, load_image
from spf_plugin.trainer.models import BaseModel

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""`(what is being done, units done, units in all, numbers worth showing)`"""


@dataclass
class Cached:
    """The training data as the loop needs it: latents, text conditioning and sizes, computed once, on the CPU."""

    captions: list[str]
    repeats: list[int]
    latents: Tensor
    sizes: Tensor
    text: dict[str, Text]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Any]:
        """`captions`, `indices`, `latents [B, C, h, w]`, `sizes [B, 6]` and `text` of a step."""
        captions = [self.captions[i] for i in indices]
        text = map_text(lambda *rows: torch.cat(rows).to(device), *(self.text[caption] for caption in captions))
        return {
            "captions": captions,
            "indices": list(indices),
            "latents": self.latents[list(indices)].to(device),
            "sizes": self.sizes[list(indices)],
            "text": text,
        }


def cache_data(pictures: Sequence[Picture], model: BaseModel, resolution: int, seed: int, progress: Progress) -> Cached:
    """Encode every image and every distinct caption.

    Raises:
        SPFError: with every image that cannot be read.
    """
    random = torch.Generator().manual_seed(seed)
    latents, sizes, broken = [], [], []
    text: dict[str, Text] = {}
    for i, picture in enumerate(pictures, 1):
        try:
            cropped = load_image(picture.path, resolution)
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, DecompressionBombError ...
            broken.append(_reason(picture, error))
            continue
        if not broken:
            latents.append(model.to_latents(cropped.pixels, random))
            sizes.append(cropped.sizes)
            if picture.caption not in text:
                text[picture.caption] = map_text(lambda part: part.cpu(), model.encode([picture.caption]))
        progress("encoding images", i, len(pictures), {})
    if broken:
        raise SPFError(_said(broken, pictures))
    return Cached(
        [p.caption for p in pictures],
        [p.repeats for p in pictures],
        torch.stack(latents),
        torch.tensor(sizes),
        text,
    )


def unreadable(pictures: Sequence[Picture], resolution: int) -> list[str]:
    """What `cache_data` would say of images, for a run that will not start."""
    broken = []
    for picture in pictures:
        try:
            load_image(picture.path, resolution)
        except Exception as error:  # as above
            broken.append(_reason(picture, error))
    return _said(broken, pictures)


def _reason(picture: Picture, error: Exception) -> str:
    return f"{picture.path}: {str(error).split(' <')[0] or type(error).__name__}"


def _said(broken: Sequence[str], pictures: Sequence[Picture]) -> list[str]:
    shown, found = "\n  ".join(broken[:10]), []
    if broken:
        found.append(f"{len(broken)} of {len(pictures)} images cannot be read; replace or remove them:\n  {shown}")
    return found
